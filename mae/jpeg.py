"""JPEG by libjpeg-turbo, for the files that it decodes exactly as Pillow would; the rest is left to Pillow.

Pillow asks the same library, but copies the pixels several times on the way. What is gained here besides: rows below
the part that is wanted are not decoded.
"""

import re
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

ORIENTATION_TAG = 0x0112
END = b"\xff\xd9"
_XMP_TURNED = re.compile(rb'tiff:Orientation(?:="|>)[2-8]')  # which Pillow asks where Exif is silent
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_DECODED = {0xC0: True, 0xC1: True, 0xC2: False}  # baseline, extended, progressive -> whether rows come in order


class Header(NamedTuple):
    """What a JPEG file says before its pixels."""

    height: int
    width: int
    channels: int  # 1 (grey) or 3
    frame: int  # offset of the frame header's marker
    scan: int  # offset of the first scan's marker
    band: int  # rows that are decoded together; 0 in a progressive file, whose rows all come at the end


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG that this module decodes; None for other data, and for a JPEG that is left to Pillow.

    Left to Pillow are CMYK, 12 bits, lossless and arithmetic coding, files to be turned upright, and files whose
    structure is unusual or damaged.
    """
    if data[:2] != b"\xff\xd8":
        return None
    frame = exif = 0
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _ALONE:  # fill bytes and stray markers: allowed, rare
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            return _header(data, frame, at) if frame else None
        if marker in _FRAMES:
            if frame or marker not in _DECODED:
                return None
            frame = at
        elif marker == 0xE1:
            segment = data[at + 4 : at + 2 + length]
            if segment.startswith(b"Exif\0\0"):
                exif += 1
                if exif > 1 or not _upright(segment):
                    return None
            elif _XMP_TURNED.search(segment):
                return None
        at += 2 + length
    return None


def _upright(exif: bytes) -> bool:
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(ORIENTATION_TAG, 1)) not in range(2, 9)
    except Exception:  # of many types
        return True  # damaged EXIF does not make the pixels bad; some ImageNet files have it


def _header(data: bytes, frame: int, scan: int) -> Header | None:
    bits, channels = data[frame + 4], data[frame + 9]
    height, width = (data[frame + i] << 8 | data[frame + i + 1] for i in (5, 7))
    if bits != 8 or channels not in (1, 3) or 0 in (height, width) or scan < frame + 10 + 3 * channels:
        return None
    sampling = max(data[frame + 11 + 3 * i] & 15 for i in range(channels))
    if not 1 <= sampling <= 4:
        return None
    return Header(height, width, channels, frame, scan, 8 * sampling if _DECODED[data[frame + 1]] else 0)


def decode(data: bytes, header: Header, rows: int, reduce: int = 1) -> np.ndarray | None:
    """The pixels of at least the first `rows` rows, (rows or more, W, 1 or 3) uint8; None where this fails.

    Args:
        reduce: 1, or 2, 4, 8: every side divided by this and rounded up, by leaving out high frequencies.
    """
    # One band more than is wanted: the decoder smooths colours over the border between two.
    needed = (rows // header.band + 2) * header.band if header.band else header.height
    stream: bytes | bytearray = data
    height = header.height
    if needed < height:
        # The decoder believes the frame header, and stops at the end of an image that is less high.
        height = needed
        stream = bytearray(data)
        stream[header.frame + 5 : header.frame + 7] = height.to_bytes(2, "big")
    wanted = (-(-height // reduce), -(-header.width // reduce))
    try:
        # Not strict: some ImageNet files have stray bytes between their data and the end marker, and so has every file
        # that is cut short here.
        pixels = simplejpeg.decode_jpeg(
            stream, "GRAY" if header.channels == 1 else "RGB", strict=False, min_height=wanted[0] if reduce > 1 else 0,
            min_width=wanted[1] if reduce > 1 else 0,
        )  # fmt: skip
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == wanted else None
