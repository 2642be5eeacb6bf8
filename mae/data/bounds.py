"""Bounds on what one image may take, checked before anything of it is decoded.

A small file can claim many pixels, or consist of parts without end that each take the decoder some time.
"""

import re
import struct
from collections.abc import Iterator
from itertools import islice

MAX_PIXELS = 178_956_970  # per image, Pillow's own limit: 13,377 x 13,377

MAX_MEMORY = 1 << 30  # bytes that decoding an image may take, besides its file; of every loader process

MAX_PARTS = 10_000  # PNG chunks and blocks of a GIF, besides those that the size of the file explains

MAX_PLAIN = 8 << 20  # bytes of a PNM file whose samples are written as text, which Pillow reads 2 MB of in a second

MAX_PNM_HEADER = 1 << 16

_PNM_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")

_EXIF = re.compile(rb"II\*\0|MM\0\*")

MAX_TAGS = 4096  # of a TIFF directory

MAX_STRIPS = 1 << 20

_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}

_STRIPS = {273, 279, 324, 325}  # tags: offsets and sizes of strips and tiles

MAX_DIRECTORIES = 64  # of a TIFF file that are looked at, as only the first is read

# Bytes per pixel that Pillow's decoders take besides the image.
_DECODER = {"WEBP": 12, "AVIF": 8, "HEIF": 8, "JPEG2000": 16, "JPEG": 4, "MPO": 4}

_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}  # bytes per pixel of a Pillow image; others 4


def check_memory(height: int, width: int, per_pixel: float) -> None:
    """Refuse an image by its size and the bytes that decoding takes for each pixel.

    Raises:
        ValueError: It is over a limit.
    """
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, over the limit of {MAX_PIXELS}")
    if height * width * per_pixel > MAX_MEMORY:
        raise ValueError(
            f"{width} x {height} pixels take {height * width * per_pixel:,.0f} bytes to decode, over the limit of "
            f"{MAX_MEMORY:,}: cut it into tiles"
        )


def pillow_bytes(format: str | None, mode: str, converted: bool, transparent: bool, wide: bool, in_chans: int) -> int:
    """Bytes per pixel that Pillow and the conversion of its image take.

    Args:
        converted: Whether the image becomes one of another mode or is turned.
        transparent: Whether it is laid on white.
        wide: Whether it holds 16 bits.
        in_chans: Channels of the result.
    """
    stored = _STORED.get(mode, 4)
    further = 4 * (converted + wide) + 6 * transparent + in_chans
    return stored * (1 + wide) + _DECODER.get(format or "", 0) + further


def check_parts(data: bytes) -> None:
    """Refuse a PNG or GIF file of more parts than any program writes, and what else takes Pillow minutes.

    Raises:
        ValueError: It is over a limit.
    """
    parts = _png_chunks if data.startswith(b"\x89PNG") else _gif_blocks if data.startswith(b"GIF8") else None
    most = MAX_PARTS + len(data) // 512
    if parts and next(islice(parts(data), most, None), None):
        raise ValueError(f"over {most} parts in a file of {len(data):,} bytes, more than any program writes")
    if data[:1] == b"P" and data[1:2] in b"123456":
        if len(_PNM_COMMENT.sub(b" ", data[:MAX_PNM_HEADER]).split(None, 3)) < 4 and len(data) > MAX_PNM_HEADER:
            raise ValueError(f"a header of over {MAX_PNM_HEADER:,} bytes")
        if data[1:2] in b"123" and len(data) > MAX_PLAIN:
            raise ValueError(f"{len(data):,} bytes of samples written as text, over the limit of {MAX_PLAIN:,}")
    if data[4:8] == b"ftyp":  # AVIF and HEIC, of which Pillow reads the EXIF as soon as it opens them
        for found in islice(_EXIF.finditer(data), MAX_DIRECTORIES):
            check_directories(data[found.start() :])


def _png_chunks(data: bytes) -> Iterator[int]:
    at = 8
    while at < len(data) and data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4])
        yield at


def _gif_blocks(data: bytes) -> Iterator[int]:
    """The parts before the first image."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10:11] > b"\x7f" else 0)
    while data[at : at + 1] == b"!":
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
            yield at
        at += 1
        yield at


def check_directories(data: bytes) -> None:
    """Refuse TIFF, or EXIF, whose directories cannot be honest: their values overlap, so that they grow when read.

    Raises:
        ValueError: They claim more than the file can hold.
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    number, head, word, entry = ("Q", 8, 8, 20) if big else ("H", 4, 4, 12)
    pointer = order + ("Q" if big else "I")
    try:
        (at,) = struct.unpack_from(pointer, data, head)
        room, seen = len(data), set[int]()
        while at and at not in seen and len(seen) <= MAX_DIRECTORIES:
            seen.add(at)
            (count,) = struct.unpack_from(order + number, data, at)
            if count > MAX_TAGS:
                raise ValueError(f"{count} tags, over the limit of {MAX_TAGS}")
            at += struct.calcsize(order + number)
            for i in range(count):
                tag, kind = struct.unpack_from(order + "HH", data, at + entry * i)
                (values,) = struct.unpack_from(pointer, data, at + entry * i + 4)
                size = values * _TAG_BYTES.get(kind, 0)
                room -= size if size > word else 0
                if tag in _STRIPS and values > MAX_STRIPS:
                    raise ValueError(f"{values} strips or tiles, over the limit of {MAX_STRIPS}")
            if room < 0:
                raise ValueError("file is damaged: its tags claim more bytes than it has")
            (at,) = struct.unpack_from(pointer, data, at + entry * count)
    except struct.error:
        return  # a directory beyond the end of the file, which the readers judge
