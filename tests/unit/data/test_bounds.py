"""Small files that would take gigabytes or minutes: refused in a moment, under a limit of the address space."""

import functools
import resource
import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from image_files import encoded, in_child, png_chunk, smooth
from PIL import Image

from mae.data import bounds, tiff
from mae.data.decode import BadImage, decode_image, open_image
from mae.runtime.memory import status

RGB = Image.fromarray(smooth(40, 60))
ROOM = 200 << 20  # bytes of address space besides what Python has


@functools.cache
def zeros(megabytes: int) -> bytes:
    stream = zlib.compressobj(1)
    return b"".join(stream.compress(bytes(1 << 20)) for _ in range(megabytes)) + stream.flush()


def directory(*tags: tuple[int, int, int, int]) -> bytes:
    """The start of a TIFF file, or EXIF."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)


def strip(compression: int, data: bytes, bits: int = 16, side: int = 64) -> bytes:
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1)]
    tags += [(273, 4, 1, 122), (277, 3, 1, 1), (278, 4, 1, side), (279, 4, 1, len(data))]
    return directory(*tags) + bytes(4) + data


def png(bits: int, colour: int, side: tuple[int, int], *chunks: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *side, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def hostile() -> Iterator[tuple[str, bytes, str]]:
    """What it is, the file, and what the error says; "" where the picture is read."""
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(40 * 181)))
    bomb = zeros(250)
    parts = "more than any program writes"
    # 3,000 tags of 400 kB each, in the same place.
    tags = directory(*((1000 + i, 1, 400_000, 8) for i in range(3000))) + bytes(400_000)
    yield "16 bits, 4 channels", png(16, 6, (13377, 13377), png_chunk(b"IDAT", bomb)), "over the limit of 1,073,741,824"
    yield "16 bits, 4 channels, smaller", png(16, 6, (7000, 7000), png_chunk(b"IDAT", bomb)), "over the limit of 1,073"
    yield "chunks", png(8, 2, (60, 40), 200_000 * png_chunk(b"teSt", b""), pixels), parts
    yield "empty data", png(8, 2, (60, 40), 200_000 * png_chunk(b"IDAT", b""), pixels), parts
    yield "text", png(8, 2, (60, 40), png_chunk(b"zTXt", b"k\0\0" + bomb), pixels), "too large"
    yield "profile", png(8, 2, (60, 40), png_chunk(b"iCCP", b"k\0\0" + bomb), pixels), "too large"
    yield "data that expand", png(8, 2, (60, 40), png_chunk(b"IDAT", bomb)), ""
    yield "EXIF", png(8, 2, (60, 40), png_chunk(b"eXIf", tags), pixels), ""
    told = b"Raw profile type exif\0\nexif\n9\n" + tags[:500_000].hex().encode()
    yield (
        "EXIF as text",
        png(8, 2, (60, 40), png_chunk(b"zTXt", told[:22] + b"\0" + zlib.compress(told[22:])), pixels),
        "",
    )
    yield "EXIF of WebP", encoded(RGB, "WEBP", exif=b"Exif\0\0" + tags), ""
    photo = encoded(RGB, "JPEG")
    pieces = [b"Exif\0\0" + tags[at : at + 65000] for at in range(0, len(tags), 65000)]
    segments = [b"\xff\xe1" + struct.pack(">H", len(piece) + 2) + piece for piece in pieces]
    yield "EXIF of JPEG", photo[:2] + b"".join(segments) + photo[2:], "claim more bytes than it has"
    yield "tags", tags, "claim more bytes than it has"
    yield "deflate", strip(8, bomb), ""
    yield "deflate, 8 bits", strip(8, bomb, bits=8), ""
    strips = directory((256, 4, 1, 64), (257, 4, 1, 9), (273, 4, 2_000_000, 8), (279, 4, 2_000_000, 8))
    yield "strips", strips + bytes(20_000_000), "strips or tiles, over the limit"
    many = directory(*((1000 + i, 4, 1, 8) for i in range(60_000)))
    yield "many tags", many, "tags, over the limit"
    gif = encoded(RGB.quantize(20), "GIF")
    at = 13 + (3 << (gif[10] & 7) + 1)
    yield "comment of GIF", gif[:at] + b"!\xfe" + (b"\xff" + b"x" * 255) * 100_000 + b"\0" + gif[at:], parts
    yield "extensions of GIF", gif[:at] + b"!\xfe\1x\0" * 100_000 + gif[at:], parts
    yield "frames of GIF", gif[:-1] + gif[at:-1] * 2000 + b";", ""
    yield "comment of PPM", b"P6\n#" + b"x" * 20_000_000 + b"\n60 40 255\n" + bytes(7200), "header of over 65,536"
    yield "text of PPM", b"P3 3000 3000 255\n" + b"1 " * 10_000_000, "written as text"


@pytest.mark.parametrize("group", range(4))
def test_small_files_take_neither_gigabytes_nor_minutes(group: int) -> None:
    cases = list(islice(hostile(), group, None, 4))

    def tell() -> list[tuple[str, str, str]]:
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ROOM, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 20))  # the process would be killed
        found = []
        for name, data, told in cases:
            try:
                said = f"read {tuple(open_image(data, 'x').pixels().shape)}"
            except BadImage as error:
                said = error.reason[:120]
            except BaseException as error:
                said = repr(error)[:80]
            found.append((name, said, told))
        return found

    for name, said, told in in_child(tell):
        good = told in said if told else said.startswith("read ") or "SPACE" in said or "holds over" in said
        assert good, (name, said)


def test_deflate_is_bounded_without_the_package_that_bounds_it() -> None:
    with (
        mock.patch.object(tiff, "find_spec", return_value=None),
        pytest.raises(BadImage, match="holds over 8,192 bytes"),
    ):
        open_image(strip(8, zeros(250)), "x", 1)


def test_honest_parts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = encoded(RGB, "PNG")
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + 5000 * png_chunk(b"tEXt", b"key\0value") + data[at:])
    np.testing.assert_array_equal(decode_image(path).permute(1, 2, 0).numpy(), np.asarray(RGB))


def test_what_decoding_takes_is_what_is_counted() -> None:
    """The largest image of each kind is decoded within the bound, with a tenth for buffers."""

    def peak(data: bytes) -> int:
        def tell() -> int:
            open_image(encoded(RGB, "PNG"), "x").pixels()
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            open_image(data, "x").pixels()
            return status("VmHWM") - before

        return int(in_child(tell))

    side = 1500
    wide = png(16, 6, (side, side), png_chunk(b"IDAT", zlib.compress(bytes(side * (8 * side + 1)), 1)))
    flat = Image.new("RGB", (side, side))
    cases = [(wide, 25), (encoded(flat, "PNG"), 7), (encoded(flat, "JPEG", progressive=True), 6)]
    for data, counted in cases:
        limit = side * side * counted
        with mock.patch.object(bounds, "MAX_MEMORY", limit - 1), pytest.raises(BadImage, match="to decode, over"):
            open_image(data, "x")
        with mock.patch.object(bounds, "MAX_MEMORY", limit):
            assert peak(data) < 1.1 * limit + (24 << 20)
