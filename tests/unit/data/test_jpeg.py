"""JPEG by libjpeg-turbo: the pixels that Pillow gives, of a part and of damaged files, too; or else a BadImage."""

import gc
import io
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import torch
from image_files import encoded, smooth
from PIL import Image
from torch import Tensor

from mae.data import jpeg
from mae.data.crops import Box, resized_crop
from mae.data.decode import BadImage, open_image

PHOTO = smooth(37, 53)
NOISE = np.random.default_rng(1).integers(0, 256, (60, 45, 3), dtype=np.uint8)  # every coefficient is used
PHOTOSHOP = b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\x10" + bytes(16) + b"8BIM\x04\x04\0\0\0\0\0\x05hello\0"


def saved(pixels: np.ndarray = PHOTO, mode: str = "RGB", **options: object) -> bytes:
    return encoded(Image.fromarray(pixels).convert(mode), "JPEG", **options)


def sampled(subsampling: str, pixels: np.ndarray = PHOTO, quality: int = 80) -> bytes:
    return bytes(simplejpeg.encode_jpeg(pixels, quality, "RGB", subsampling))


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """These first, in place of the JFIF segment."""
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + b"".join(segments) + data[4 + int.from_bytes(data[4:6], "big") :]


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E], tags[0x011A], tags[0x0128] = orientation, "a picture", 72.0, 2
    return tags.tobytes()


def xmp(orientation: int) -> bytes:
    return b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="%d"/>' % orientation


def with_component_ids(data: bytes, ids: bytes) -> bytes:
    """Renamed in the frame and in its only scan."""
    header = jpeg.read_header(data)
    assert header is not None
    edited = bytearray(data)
    scan = data.index(b"\xff\xda", header.frame)
    for i, name in enumerate(ids):
        edited[header.frame + 10 + 3 * i] = edited[scan + 5 + 2 * i] = name
    return bytes(edited)


def a_scan_a_channel() -> bytes:
    """A baseline file of three channels, each with the one scan of a grey file."""
    grey = [saved(PHOTO[..., channel], "L") for channel in range(3)]
    frame, tables, scan = (grey[0].index(marker) for marker in (b"\xff\xc0", b"\xff\xc4", b"\xff\xda"))
    three = segment(0xC0, grey[0][frame + 4 : frame + 9] + b"\3" + b"".join(bytes([i, 0x11, 0]) for i in (1, 2, 3)))
    scans = [segment(0xDA, bytes([1, i + 1, 0, 0, 63, 0])) + data[scan + 10 : -2] for i, data in enumerate(grey)]
    return grey[0][:frame] + three + grey[0][tables:scan] + b"".join(scans) + b"\xff\xd9"


RICH = saved(exif=exif(1), icc_profile=b"x" * 40, comment=b"hi", extra=segment(0xED, PHOTOSHOP) + segment(0xE1, xmp(1)))
KINDS = {
    "4:4:4": sampled("444"),
    "4:2:2": sampled("422", quality=95),
    "4:2:0": sampled("420", NOISE),
    "4:4:0": sampled("440"),
    "4:1:1": sampled("411"),
    "grey": saved(mode="L"),
    "progressive": saved(NOISE, progressive=True),
    "progressive grey": saved(mode="L", progressive=True),
    "a restart every second block": saved(NOISE, restart_marker_blocks=2),
    "a restart every row of blocks": saved(NOISE, restart_marker_rows=1),
    "optimised": saved(NOISE, optimize=True, quality=60),
    "RGB": saved(keep_rgb=True),
    "RGB by its Adobe marker": with_segments(saved(), adobe(0)),
    "YCbCr by its Adobe marker": with_segments(saved(), adobe(1)),
    "without JFIF": with_segments(saved()),
    "RGB by its names": with_component_ids(with_segments(saved(subsampling=0)), b"RGB"),
    "other names": with_component_ids(with_segments(saved()), b"\x00\x22\x01"),
    "a scan a channel": a_scan_a_channel(),
    "EXIF": saved(exif=exif(1)),
    "much metadata": RICH,
    "more after the end": saved() + b"\0\0 some cameras write more",
    "stray bytes before the end": saved()[:-2] + b"\0\x12\xff\0" + b"\xff\xd9",
    "tall": saved(smooth(300, 40), quality=90),
}


def by_pillow(data: bytes, in_chans: int = 3) -> Tensor:
    """As Pillow alone takes it, the grey of missing data included."""
    with mock.patch.object(jpeg, "read_header", return_value=None), mock.patch.object(jpeg, "check_whole"):
        return open_image(data, "x.jpg", in_chans).pixels()


def assert_same(data: bytes, decoder: str = "libjpeg-turbo") -> None:
    """As Pillow alone, and by this decoder."""
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    picture = open_image(data, "x.jpg")
    np.testing.assert_array_equal(picture.pixels().permute(1, 2, 0).numpy(), expected)
    assert (picture.decoder, picture.height, picture.width) == (decoder, *expected.shape[:2])


# --- whole images


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_pillow(kind: str) -> None:
    assert_same(KINDS[kind])
    for in_chans in (1, 4):
        assert torch.equal(open_image(KINDS[kind], "x.jpg", in_chans).pixels(), by_pillow(KINDS[kind], in_chans))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_every_size_and_quality_equals_pillow(subsampling: str) -> None:
    rng = np.random.default_rng(0)
    sides = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 35, 67]
    for height in sides[:-1]:
        for width in sides:
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            assert_same(sampled(subsampling, pixels, int(rng.integers(10, 101))))


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 90, 100])
@pytest.mark.parametrize("progressive", [False, True])
def test_photographs_equal_pillow(quality: int, progressive: bool) -> None:
    for subsampling in range(3):
        assert_same(saved(smooth(150, 211), quality=quality, progressive=progressive, subsampling=subsampling))


# --- parts of images


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_equals_that_part_of_the_whole(kind: str) -> None:
    data = KINDS[kind]
    whole = by_pillow(data)
    rng = random.Random(kind)
    height, width = whole.shape[1:]
    tops_and_bottoms = [(0, 1), (0, height), (height - 1, height), *((row, row + 1) for row in range(0, height, 5))]
    tops_and_bottoms += [tuple(sorted(rng.sample(range(height + 1), 2))) for _ in range(30)]
    for top, bottom in tops_and_bottoms:
        left, right = sorted(rng.sample(range(width + 1), 2))
        box = (top, left, bottom - top, right - left)
        for size in (box[2:], (9, 11)):
            picture = open_image(data, "x.jpg")
            assert torch.equal(picture.resized_crop(box, size), resized_crop(whole, box, size)), (box, size)
            assert picture.decoder == "libjpeg-turbo"


@pytest.mark.parametrize("kind", ["tall", "a restart every second block", "4:4:4"])
def test_rows_below_the_part_are_not_decoded(kind: str) -> None:
    data = KINDS[kind]
    header = jpeg.read_header(data)
    assert header is not None
    some, whole = jpeg.decode(data, header, 9), jpeg.decode(data, header, header.height)
    assert some is not None
    assert whole is not None
    assert 9 <= len(some) <= 32 < len(whole) == header.height
    assert np.array_equal(some[:9], whole[:9])


# --- what is left to Pillow


def patched(data: bytes, find: bytes, replacement: bytes) -> bytes:
    assert data.count(find) == 1
    return data.replace(find, replacement)


@pytest.mark.parametrize(
    "data",
    [
        saved(mode="CMYK"),
        patched(saved(mode="CMYK"), b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\x02"),  # YCCK
        saved()[:2] + b"\xff" + saved()[2:],  # fill byte between two segments
        patched(saved(), b"\xff\xdb\0\x43\x01", b"\xff\xff\xdb\0\x43\x01"),
    ],
    ids=["CMYK", "YCCK", "fill byte", "another fill byte"],
)
def test_unusual_files_are_left_to_pillow(data: bytes) -> None:
    assert jpeg.read_header(data) is None
    assert_same(data, "Pillow")


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("where", ["EXIF", "XMP", "EXIF over XMP", "two EXIF"])
def test_turned_files_are_turned(where: str, orientation: int) -> None:
    told = {
        "EXIF": segment(0xE1, exif(orientation)),
        "XMP": segment(0xE1, xmp(orientation)),
        "EXIF over XMP": segment(0xE1, xmp(10 - orientation)) + segment(0xE1, exif(orientation)),
        "two EXIF": segment(0xE1, exif(orientation)) + segment(0xE1, exif(1)),
    }
    data = with_segments(saved(NOISE), told[where])
    picture = open_image(data, "x.jpg")
    assert torch.equal(picture.pixels(), by_pillow(data))
    if where == "XMP" and Image.open(io.BytesIO(data)).getexif().get(0x0112) != orientation:
        orientation = 1  # older Pillow does not ask XMP, so neither do we
    assert picture.decoder == "libjpeg-turbo"
    assert (picture.height, picture.width) == ((45, 60) if 5 <= orientation <= 8 else (60, 45))


def test_of_several_images_in_a_file_the_first_is_taken() -> None:
    other = Image.fromarray(NOISE)
    data = encoded(Image.fromarray(PHOTO), "MPO", save_all=True, append_images=[other])
    assert_same(data, "Pillow")
    # Not even the first is whole, but its thumbnail is: Pillow forgets where the data begin.
    thumbnail = segment(0xE1, exif(1) + saved(smooth(8, 8)))
    assert_same(data[:2] + thumbnail + data[2:], "Pillow")
    half = len(data) // 4
    with pytest.raises(BadImage, match="truncated"):
        open_image(data[:2] + thumbnail + data[2:half] + bytes(len(data)), "x.jpg")


FRAME = b"\xff\xc0\0\x11\x08"
REFUSED = {
    "12 bits": patched(saved(), FRAME, b"\xff\xc0\0\x11\x0c"),
    "lossless": patched(saved(), FRAME, b"\xff\xc3\0\x11\x08"),
    "hierarchical": patched(saved(), FRAME, b"\xff\xc5\0\x11\x08"),
    "two frames": patched(saved(), FRAME, segment(0xC0, b"\x08\0\x10\0\x10\x01\x01\x11\0") + FRAME),
    "no frame": patched(saved(), FRAME, b"\xff\xec\0\x11\x08"),
    "no scan": saved()[: saved().index(b"\xff\xda")],
    "two channels": patched(saved(), saved()[158:168], saved()[158:167] + b"\x02"),
    "no height": patched(saved(), FRAME + b"\0\x25", FRAME + b"\0\0"),
    "sampled 0 times": patched(saved(), b"\x03\x01\x22", b"\x03\x01\x20"),
    "a short JFIF segment": with_segments(saved(), segment(0xE0, b"JFIF\0")),
    "a short Adobe segment": with_segments(saved(), segment(0xEE, b"Adobe")),
    "a short ICC segment": with_segments(saved(), segment(0xE2, b"ICC_PROFILE\0")),
    "a short Photoshop segment": with_segments(saved(), segment(0xED, PHOTOSHOP[:20])),
    "a length beyond the end": patched(saved(), b"\xff\xdb\0\x43\x01", b"\xff\xdb\xf0\x43\x01"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_pillow_refuses_is_refused(kind: str) -> None:
    with pytest.raises(BadImage):
        by_pillow(REFUSED[kind])
    with pytest.raises(BadImage, match=r"x\.jpg: ."):
        open_image(REFUSED[kind], "x.jpg").pixels()


def test_arithmetic_coding_is_left_to_pillow() -> None:
    # There is nobody to write such a file; this one is Huffman-coded and says otherwise, which decodes to noise.
    data = patched(saved(), FRAME, b"\xff\xc9\0\x11\x08")
    assert jpeg.read_header(data) is None
    assert outcome(lambda: open_image(data, "x.jpg").pixels()) == outcome(lambda: by_pillow(data))


# --- damage


def outcome(decode: Callable[[], Tensor]) -> tuple[object, ...]:
    """The pixels, or that there are none; to be compared."""
    try:
        pixels = decode()
    except BadImage as error:
        told = str(error)
        one_line = len(told) > len("x.jpg: ") and len(told.splitlines()) == 1
        return ("bad", one_line, "truncated" if "truncated" in told else "")
    return (tuple(pixels.shape), pixels.contiguous().numpy().tobytes(), "")


def test_an_error_after_a_warning_is_an_error() -> None:
    """libjpeg-turbo reports both as the warning; the pixels would be whatever the memory held."""
    data = KINDS["progressive"]
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    stray = data[:second] + b"stray" + data[second:]
    assert_same(stray, "Pillow")
    with pytest.raises(BadImage, match="broken data stream"):
        open_image(data[:second] + b"stray" + FRAME + data[second:], "x.jpg").pixels()
    data = KINDS["tall"]
    for at in (len(data) // 3, len(data) * 9 // 10):
        broken = data[:at] + b"\xff\x00" + FRAME + data[at:]
        for box in ((0, 0, 5, 5), (100, 0, 200, 40)):
            with pytest.raises(BadImage, match="broken data stream"):
                open_image(broken, "x.jpg").resized_crop(box, (4, 4))


@pytest.mark.parametrize("kind", ["progressive", "a scan a channel"])
def test_a_segment_over_the_end_hides_the_end(kind: str) -> None:
    data = KINDS[kind]
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    with pytest.raises(BadImage, match="truncated"):
        open_image(data[:second] + b"\xff\xe5\xff\xff" + data[second:], "x.jpg").resized_crop((0, 0, 5, 5), (4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused_whatever_part_is_asked_for(kind: str) -> None:
    data = KINDS[kind].removesuffix(b"\0\0 some cameras write more")
    header = jpeg.read_header(data)
    assert header is not None
    for keep in (*range(1, len(data) - 2, max(1, len(data) // 40)), header.data + 1, len(data) - 2, len(data) - 1):
        for cut in (data[:keep], data[:keep] + bytes(len(data) - keep)):
            with pytest.raises(BadImage):
                open_image(cut, "x.jpg").resized_crop((0, 0, 1, 1), (1, 1))


CUT_SHORT = {
    **{kind: KINDS[kind] for kind in ("tall", "4:2:0", "grey", "a scan a channel", "progressive", "progressive grey")},
    **{kind: KINDS[kind] for kind in ("a restart every second block", "a restart every row of blocks")},
    "turned": saved(NOISE, exif=exif(6)),
    "CMYK": saved(mode="CMYK"),
    "fill byte": saved(NOISE)[:2] + b"\xff" + saved(NOISE)[2:],
    "several images": encoded(
        Image.fromarray(NOISE), "MPO", save_all=True, append_images=[Image.fromarray(PHOTO)], quality=95
    ),
}


@pytest.mark.parametrize("kind", CUT_SHORT)
def test_a_file_that_is_cut_and_ended_is_refused(kind: str) -> None:
    """Pillow takes the grey of the missing rows for the picture."""
    data = CUT_SHORT[kind]
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    if kind == "several images":
        end = data.index(b"\xff\xd8", 2)
        start, rest = data.index(b"\xff\xda"), b"\xff\xd9" + data[end:]
    else:
        rest = b"\xff\xd9"
    for keep in range(start + 20, end - 20, max(1, (end - start) // 30)):
        cut = data[:keep].removesuffix(b"\xff") + rest
        assert by_pillow(cut).shape == by_pillow(data).shape
        for in_chans in (1, 3, 4):
            with pytest.raises(BadImage, match="truncated"):
                open_image(cut, "x.jpg", in_chans).pixels()


def test_a_crop_above_a_cut_is_given() -> None:
    data = KINDS["tall"][: len(KINDS["tall"]) // 2] + b"\xff\xd9"
    box = (0, 0, 20, 20)
    part = open_image(data, "x.jpg").resized_crop(box, (9, 9))
    assert torch.equal(part, open_image(KINDS["tall"], "x.jpg").resized_crop(box, (9, 9)))
    with pytest.raises(BadImage, match="truncated"):
        open_image(data, "x.jpg").resized_crop((250, 0, 50, 40), (9, 9))


@pytest.mark.parametrize("kind", ["a scan a channel", "progressive", "progressive grey"])
def test_a_file_without_its_last_scans_is_refused(kind: str) -> None:
    """All rows are there, coarser or without colour, and every decoder is content."""
    data = KINDS[kind]
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert len(scans) >= 3
    for scan in scans[1:]:
        with pytest.raises(BadImage, match="scans do not make up the image"):
            open_image(data[:scan] + b"\xff\xd9", "x.jpg")
        unusual = data[:2] + b"\xff" + data[2:scan] + b"\xff\xd9"
        with pytest.raises(BadImage, match="scans do not make up the image"):
            open_image(unusual, "x.jpg")


def test_lost_restarts_are_refused() -> None:
    data = KINDS["a restart every second block"]
    places = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    lost = data[: places[1]] + data[places[3] :]
    for broken in (lost, data[: places[1]] + b"stray" + data[places[1] : places[3]] + b"\xff\xd9"):
        with pytest.raises(BadImage, match="truncated"):
            open_image(broken, "x.jpg").pixels()
        with pytest.raises(BadImage, match="truncated"):
            open_image(data[:2] + b"\xff" + lost[2:], "x.jpg").pixels()


def test_scans_and_segments_without_end_are_refused() -> None:
    data = KINDS["progressive"]
    last = data.rindex(b"\xff\xda")
    for many in (
        data[:last] + 5000 * data[last:-2] + b"\xff\xd9",
        data[:2] + 100_000 * segment(0xE5, b"") + data[2:],
        data[:last] + 100_000 * segment(0xFE, b"") + data[last:],
        data[:2] + b"\xff" + 100_000 * segment(0xE5, b"") + saved(mode="CMYK")[2:],
    ):
        with pytest.raises(BadImage, match="more than any encoder writes"):
            open_image(many, "x.jpg")
    few = data[:last] + 50 * data[last:-2] + b"\xff\xd9"
    open_image(data[:2] + 900 * segment(0xE5, b"hello") + few[2:], "x.jpg").pixels()


def test_memory_that_cannot_be_had_is_a_bad_image() -> None:
    with mock.patch.object(simplejpeg, "decode_jpeg", side_effect=MemoryError), pytest.raises(BadImage, match="Memory"):
        open_image(KINDS["4:2:0"], "x.jpg").pixels()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to six random damages, many of them to the structure."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if not found:
            break
        at, size = rng.randrange(len(found)), len(found)
        markers = [i for i in range(size - 18) if found[i] == 0xFF and found[i + 1] not in (0, 0xFF)] or [0]
        marker = rng.choice(markers)
        frame = next((i for i in markers if found[i + 1 : i + 2] in (b"\xc0", b"\xc1", b"\xc2")), None)
        match rng.randrange(12):
            case 0:
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                found[at] = rng.randrange(256)
            case 2:
                del found[at:]
            case 3:
                found[at:at] = rng.randbytes(rng.randint(1, 5))
            case 4:
                del found[at : at + rng.randint(1, 20)]
            case 5:  # another marker
                found[marker + 1 : marker + 2] = bytes([rng.choice((*range(0xC0, 0xF0), 0, 0xFE, rng.randrange(256)))])
            case 6:  # another length
                length = int.from_bytes(found[marker + 2 : marker + 4], "big") + rng.randint(-8, 8)
                length = rng.choice((length, rng.randrange(64), rng.randrange(65536)))
                found[marker + 2 : marker + 4] = min(65535, max(0, length)).to_bytes(2, "big")
            case 7 if frame is not None:  # another height or width
                side = rng.choice((0, 1, 2, 8, 9, rng.randrange(400), rng.randrange(3000)))
                place = frame + rng.choice((5, 7))
                found[place : place + 2] = side.to_bytes(2, "big")
            case 8 if frame is not None:  # another precision, number of channels, name, sampling or table
                values = (*range(5), 8, 12, 0x11, 0x12, 0x21, 0x22, 0x14, 0x41, 0x31, 0x13, 0x44, rng.randrange(256))
                found[frame + rng.choice((4, 9, *range(10, 19)))] = rng.choice(values)
            case 9:  # another segment
                kinds = [b"", b"JFIF", b"Adobe", b"Exif\0\0", b"ICC_PROFILE\0", b"MPF\0", xmp(3), rng.randbytes(9)]
                content = rng.choice(
                    [*kinds, PHOTOSHOP[: rng.randrange(len(PHOTOSHOP))], exif(1), b"JFIF\0" + bytes(9)]
                )
                name = rng.choice((*range(0xE0, 0xF0), 0xFE, 0xC4, 0xDB, 0xDD, 0xDC, 0xDA))
                found[marker:marker] = segment(name, content)
            case 10:  # a marker anywhere
                found[at:at] = bytes(
                    [0xFF, rng.choice((*range(0xD0, 0xDA), 0xE1, 0xC4, 0xDA, 0xC0, rng.randrange(256)))]
                )
            case _:  # the rest lost
                found[at:] = rng.choice((bytes(size - at), b"\xff\xd9"))
    return bytes(found)


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1000, 4000, 1000))])
def test_damaged_files_give_pillows_pixels_or_none(start: int, capfd: pytest.CaptureFixture[str]) -> None:
    decoders = Counter[str]()
    gc.collect()  # what earlier tests left open is closed by it, not while this one counts
    descriptors = len(os.listdir("/proc/self/fd"))
    for seed in range(start, start + 1000):
        rng = random.Random(seed)
        kind = rng.choice(list(KINDS))
        data = mutated(KINDS[kind], rng)
        try:
            header = jpeg.read_header(data)
        except jpeg.Incomplete:
            header = None
        if header and header.height * header.width > 400_000:
            continue  # a matter of time
        in_chans = rng.choice((3, 3, 3, 1))
        expected = outcome(lambda: by_pillow(data, in_chans))  # noqa: B023
        found = outcome(lambda: open_image(data, "x.jpg", in_chans).pixels())  # noqa: B023
        cut = found[-1] == "truncated" and expected[0] != "bad"  # and Pillow takes it for whole
        assert found[:2] == expected[:2] or cut, (seed, kind)
        decoders["cut"] += cut
        try:
            picture = open_image(data, "x.jpg", in_chans)
        except BadImage:
            decoders["none"] += 1
            continue
        height, width = picture.height, picture.width
        box_height, box_width = rng.randint(1, height), rng.randint(1, width)
        top = rng.choice((0, rng.randint(0, height - box_height)))
        box = top, rng.randint(0, width - box_width), box_height, box_width
        part = outcome(lambda: picture.resized_crop(box, (8, 8)))  # noqa: B023
        if expected[0] != "bad":
            expected = outcome(lambda: resized_crop(by_pillow(data, in_chans), box, (8, 8)))  # noqa: B023
        assert part[:2] == expected[:2] or (cut and part[-1] == "truncated"), (seed, kind)
        decoders[picture.decoder] += 1
    assert (
        min(decoders["none"], decoders["libjpeg-turbo"], decoders["Pillow"], decoders["cut"]) > 50
    )  # or it says little
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert capfd.readouterr() == ("", "")


# --- decoding at a reduced size


def crops(data: bytes, box: Box, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Reduced, exact."""
    reduced, exact = (open_image(data, "x.jpg").resized_crop(box, size, yes) for yes in (True, False))
    assert reduced.shape == exact.shape == (3, *size)
    return reduced.float(), exact.float()


LARGE = {
    "4:2:0": saved(smooth(400, 520), quality=90),
    "4:4:4": saved(smooth(400, 520), quality=90, subsampling=0),
    "progressive": saved(smooth(400, 520), quality=90, progressive=True),
    "grey": saved(smooth(400, 520), mode="L"),
}


@pytest.mark.parametrize("kind", LARGE)
def test_reduced_decoding_is_close_and_only_where_boxes_are_large(kind: str) -> None:
    rng = random.Random(0)
    changed = Counter[bool]()
    differences = []
    for _ in range(80):
        height, width = rng.randint(20, 400), rng.randint(20, 520)
        box = rng.randint(0, 400 - height), rng.randint(0, 520 - width), height, width
        size = rng.randint(8, 64), rng.randint(8, 64)
        reduced, exact = crops(LARGE[kind], box, size)
        large = height >= 2 * size[0] and width >= 2 * size[1]
        assert large or torch.equal(reduced, exact)
        changed[not torch.equal(reduced, exact)] += 1
        if large:
            differences.append((reduced - exact).abs().mean().item())
    assert min(changed.values()) > 20
    assert np.mean(differences) < 2
    assert max(differences) < 6  # levels, where the box is half a pixel off: it is cut at pixels of the reduced image


def test_reduced_decoding_looks_at_the_same_place() -> None:
    slope = 0.47  # brightness tells the place
    ramp = np.broadcast_to(np.arange(499) * slope, (499, 499)).round().astype(np.uint8)
    rng = random.Random(0)
    for pixels, axis in ((ramp, 2), (ramp.T, 1)):
        data = saved(np.stack([pixels] * 3, axis=2), quality=100)
        shifts = []
        for i in range(200):
            size = rng.choice((16, 24, 31))
            side = rng.randint(2 * size, 498)
            # At the lower right corner, too: no factor divides this side.
            top, left = (499 - side, 499 - side) if i % 4 == 0 else (rng.randint(0, 499 - side) for _ in range(2))
            reduced, exact = crops(data, (top, left, side, side), (size, size))
            step = side / size  # pixels of the image per pixel of the crop
            shift = (reduced - exact).mean(dim=(0, 3 - axis)) / slope
            for part in (shift, shift[: size // 4], shift[-size // 4 :]):
                assert abs(part.mean()) < step / 2 + 1.5  # the box is cut at pixels of the reduced image
            shifts.append(shift.mean().item())
        assert abs(np.mean(shifts)) < 0.2


def test_reduced_decoding_of_a_part_equals_that_of_the_whole() -> None:
    data = saved(NOISE.repeat(4, axis=0).repeat(2, axis=1))
    header = jpeg.read_header(data)
    assert header is not None
    for reduce in (2, 4, 8):
        whole = jpeg.decode(data, header, header.height, reduce)
        assert whole is not None
        for rows in range(reduce, header.height, 24):
            some = jpeg.decode(data, header, rows, reduce)
            assert some is not None
            assert np.array_equal(some[: rows // reduce], whole[: rows // reduce])
