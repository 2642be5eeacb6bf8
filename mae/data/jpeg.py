"""Decoding JPEG with libjpeg-turbo, for files that it decodes exactly as Pillow would; others are left to Pillow.

Pillow uses the same library, but copies the pixels several times, and is not told where data are missing, which the
library fills up with grey. Besides, rows below the wanted part are not decoded here.
"""

import math
import re
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

# Its warnings if data are missing, for which it makes up grey.
_MISSING = re.compile("premature end|instead of RST", re.IGNORECASE)

_EXIF = re.compile(rb"\xff\xe1(..)Exif\0\0", re.DOTALL)

MAX_SEGMENTS = 1000  # before and between scans: 64 MB of metadata

MAX_SCANS = 100  # encoders write about 10, and each takes the time of decoding the image once


class Incomplete(ValueError):
    """A file that lacks a part of its data, or has more parts than any encoder writes."""


class Header(NamedTuple):
    """The header of a JPEG file."""

    height: int
    width: int
    channels: int  # 1 (grey) or 3
    frame: int  # offset of the frame header's marker
    data: int  # offset of the first scan's data
    band: int  # rows that are decoded together; 0 if the scans do not hold whole rows, as in a progressive file
    metadata: bool  # whether there is metadata that could rotate the image, or make Pillow refuse it
    coefficients: float  # bytes per pixel that the decoder keeps between scans
    restarts: float  # restart markers per row of the image


def read_header(data: bytes) -> Header | None:
    """The header of a JPEG file that this module can decode; None for other data and for files left to Pillow.

    These are files with CMYK, 12 bits, lossless or arithmetic coding, and files with an unusual or damaged structure.

    Raises:
        Incomplete: The scans do not make up an image, or there are too many of them or of other segments.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    header = _usual_header(data)
    if header is None or not header.band:
        _check_scans(data)
    return header


def _usual_header(data: bytes) -> Header | None:
    frame, interval, metadata = 0, 0, False
    at = 2
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if not 0xC0 <= marker < 0xFF or marker in _ALONE:  # fill bytes, stray bytes and markers: allowed, but rare
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            return _header(data, frame, at, metadata, interval) if frame else None
        if marker in _FRAMES:
            if frame or marker not in _DECODED:
                return None
            frame = at
        elif marker == 0xDD:
            interval = int.from_bytes(data[at + 4 : at + 6])
        elif 0xE0 <= marker <= 0xEF:
            whole = _WHOLE.get(data[at + 4 : at + 9])
            metadata = metadata or whole is None or length - 2 < whole
        at += 2 + length
    return None


def _header(data: bytes, frame: int, scan: int, metadata: bool, interval: int) -> Header | None:
    if not frame + 10 <= scan < len(data) - 4:
        return None
    bits, channels = data[frame + 4], data[frame + 9]
    height, width = (data[frame + i] << 8 | data[frame + i + 1] for i in (5, 7))
    if bits != 8 or channels not in (1, 3) or 0 in (height, width) or scan < frame + 10 + 3 * channels:
        return None
    factors = [divmod(data[frame + 11 + 3 * i], 16) for i in range(channels)]
    across, sampling = max(factor[0] for factor in factors), max(factor[1] for factor in factors)
    if not 1 <= sampling <= 4:
        return None
    in_order = _DECODED[data[frame + 1]] and data[scan + 4] == channels  # else there is one scan per channel
    start = scan + 2 + (data[scan + 2] << 8 | data[scan + 3])
    if not in_order:
        samples = sum(h * v for h, v in factors) / max(across * sampling, 1)
        return Header(height, width, channels, frame, start, 0, metadata, 2 * samples, 0)
    blocks = -(-width // 8) if channels == 1 else -(-width // (8 * max(across, 1)))
    rows = 8 if channels == 1 else 8 * sampling
    restarts = blocks / rows / interval if interval else 0
    return Header(height, width, channels, frame, start, 8 * sampling, metadata, 0, restarts)


def _check_scans(data: bytes) -> None:
    """Find all segments as libjpeg does, and whether the scans hold every bit of every coefficient."""
    places = np.flatnonzero(np.frombuffer(data, np.uint8)[:-1] == 0xFF)
    names = np.frombuffer(data, np.uint8)[places + 1]
    known = (names > 0) & (names < 0xFF) & (names & 0xF8 != 0xD0)  # not restarts or stuffing
    places = places[known]
    missing: dict[int, np.ndarray] = {}  # by component, the bits that its 64 coefficients still lack
    progressive, at, segments, scans = False, 2, 0, 0
    while (i := int(np.searchsorted(places, at))) < len(places):
        at = int(places[i])
        marker = data[at + 1]
        if marker == 0xD9:
            break
        if marker < 0xC0 or marker == 0xD8:
            at += 2
            continue
        segments += 1
        length = int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : at + 2 + length]
        if marker in _FRAMES and not missing:
            progressive = marker & 3 == 2
            missing = {name: np.full(64, 255) for name in content[6 : 6 + 3 * content[5] : 3]} if content[5:] else {}
        elif marker == 0xDA and content:
            scans += 1
            for name in content[1 : 1 + 2 * content[0] : 2]:
                if name in missing:
                    first, last, bits = [*content[1 + 2 * content[0] :], 0, 0, 0][:3] if progressive else (0, 63, 0)
                    missing[name][first : last + 1] = bits & 15
        if segments > MAX_SEGMENTS or scans > MAX_SCANS:
            raise Incomplete(f"over {MAX_SCANS} scans or {MAX_SEGMENTS} segments, more than any encoder writes")
        at += 2 + length
    if scans and any(bits.any() for bits in missing.values()):
        raise Incomplete(f"file is truncated: its {scans} scans do not make up the image")


def decode(data: bytes, header: Header, rows: int, reduce: int = 1) -> np.ndarray | None:
    """The pixels of at least the first `rows` rows, (rows or more, W, 1 or 3) uint8; None if decoding fails.

    Args:
        reduce: 1, 2, 4 or 8: divides every side, rounding up, by leaving out high frequencies.

    Raises:
        Incomplete: The data end before these rows.
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
        _refuse_missing(error)
        if not header.band or _STRAY not in str(error):
            return None
        # The header holds no stray bytes, so they follow the last row, and all rows are there; or precede a restart.
        if header.restarts and _count_restarts(data, header.data) < math.ceil(height * header.restarts - 0.001) - 1:
            raise Incomplete("file is truncated: restart markers are missing") from None
    return pixels


def joined_exif(data: bytes) -> bytes:
    """The EXIF of a file that has it in several segments, as Pillow joins them; else nothing.

    A single segment has 64 kB at most.
    """
    if not data.startswith(b"\xff\xd8"):
        return b""
    parts = [data[at.end() : at.start() + 2 + int.from_bytes(at[1])] for at in _EXIF.finditer(data)]
    return b"".join(parts) if len(parts) > 1 else b""


def check_whole(data: bytes, colours: str) -> None:
    """Decode a whole file for nothing but the library's verdict, which Pillow does not pass on.

    Args:
        colours: "GRAY", or "CMYK" for files of four channels.

    Raises:
        Incomplete: Data are missing.
    """
    try:
        simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        _refuse_missing(error)


def _refuse_missing(error: ValueError) -> None:
    if _MISSING.search(str(error)):
        raise Incomplete(f"file is truncated: {error}") from None


def _count_restarts(data: bytes, start: int) -> int:
    stream = np.frombuffer(data, np.uint8, offset=start)
    return int(np.count_nonzero((stream[:-1] == 0xFF) & (stream[1:] & 0xF8 == 0xD0)))
