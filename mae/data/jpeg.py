"""Decoding JPEG with libjpeg-turbo, for files that it decodes exactly as Pillow would; others are left to Pillow.

Pillow uses the same library, but copies the pixels several times. Besides, rows below the wanted part are not decoded
here.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg

_ALONE = range(0xD0, 0xD9)  # markers without a length field

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}

# Segments that concern only the decoder, by their first bytes, with their least length: Pillow may refuse shorter ones.
_WHOLE = {b"JFIF\0": 14, b"Adobe": 12, b"ICC_P": 14}

_DECODED = {0xC0: True, 0xC1: True, 0xC2: False}  # baseline, extended, progressive -> whether rows are stored in order

# libjpeg's warning if data follow after the last row: in every file that is shortened here, and in some of ImageNet.
_STRAY = "extraneous bytes before marker"


class Header(NamedTuple):
    """The header of a JPEG file."""

    height: int
    width: int
    channels: int  # 1 (grey) or 3
    frame: int  # offset of the frame header's marker
    data: int  # offset of the first scan's data
    band: int  # rows that are decoded together; 0 if the scans do not hold whole rows, as in a progressive file
    metadata: bool  # whether there is metadata that could rotate the image, or make Pillow refuse it


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG file that this module can decode; None for other data and for files left to Pillow.

    These are files with CMYK, 12 bits, lossless or arithmetic coding, and files with an unusual or damaged structure.
    """
    if data[:2] != b"\xff\xd8":
        return None
    frame, metadata = 0, False
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if not 0xC0 <= marker < 0xFF or marker in _ALONE:  # fill bytes, stray bytes and markers: allowed, but rare
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            return _header(data, frame, at, metadata) if frame else None
        if marker in _FRAMES:
            if frame or marker not in _DECODED:
                return None
            frame = at
        elif 0xE0 <= marker <= 0xEF:
            whole = _WHOLE.get(data[at + 4 : at + 9])
            metadata = metadata or whole is None or length - 2 < whole
        at += 2 + length
    return None


def _header(data: bytes, frame: int, scan: int, metadata: bool) -> Header | None:
    if not frame + 10 <= scan < len(data) - 4:
        return None
    bits, channels = data[frame + 4], data[frame + 9]
    height, width = (data[frame + i] << 8 | data[frame + i + 1] for i in (5, 7))
    if bits != 8 or channels not in (1, 3) or 0 in (height, width) or scan < frame + 10 + 3 * channels:
        return None
    sampling = max(data[frame + 11 + 3 * i] & 15 for i in range(channels))
    if not 1 <= sampling <= 4:
        return None
    in_order = _DECODED[data[frame + 1]] and data[scan + 4] == channels  # else there is one scan per channel
    start = scan + 2 + (data[scan + 2] << 8 | data[scan + 3])
    return Header(height, width, channels, frame, start, 8 * sampling if in_order else 0, metadata)


def decode(data: bytes, header: Header, rows: int, reduce: int = 1) -> np.ndarray | None:
    """The pixels of at least the first `rows` rows, (rows or more, W, 1 or 3) uint8; None if decoding fails.

    Args:
        reduce: 1, 2, 4 or 8: divides every side, rounding up, by leaving out high frequencies.
    """
    # One band more than needed, as the decoder smooths colours over the border between two bands.
    needed = (rows // header.band + 2) * header.band if header.band else header.height
    stream: bytes | bytearray = data
    height = header.height
    if needed < height:
        # The decoder believes the frame header and stops at the end of a less high image.
        height = needed
        stream = bytearray(data)
        stream[header.frame + 5 : header.frame + 7] = height.to_bytes(2, "big")
    pixels = np.empty((-(-height // reduce), -(-header.width // reduce), header.channels), np.uint8)
    least = pixels.shape[:2] if reduce > 1 else (0, 0)
    try:
        # Strict mode raises warnings, too: otherwise an error that follows a warning would be taken for one.
        simplejpeg.decode_jpeg(
            stream, "GRAY" if header.channels == 1 else "RGB", min_height=least[0], min_width=least[1], buffer=pixels
        )
    except ValueError as error:
        # The header holds no stray bytes, so they follow the last row: all rows are there.
        if not header.band or _STRAY not in str(error):
            return None
    return pixels
