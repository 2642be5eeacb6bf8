"""Files to pixels: every format against Pillow, every kind of broken file, the boxes, and the walk over folders."""

import contextlib
import io
import math
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from image_files import become_nobody, encoded, in_child, on_white, png16, png_chunk, public_folder, smooth
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from mae.data import bounds, decode, image_files
from mae.data.crops import center_box, random_crop_box, resized_crop
from mae.data.decode import BadImage, decode_image
from mae.data.image_files import find_images
from mae.errors import UserError


def hwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(1, 2, 0).numpy()


def pillow(path: Path, mode: str) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def bad(path: Path, in_chans: int = 3) -> str:
    """The message of the BadImage that this file must give: one line, beginning with the path."""
    with pytest.raises(BadImage) as caught:
        decode_image(path, in_chans)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message) > len(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert " object at 0x" not in message
    return message


RGB = Image.fromarray(smooth(37, 53))
FORMATS = [
    ("jpg", "JPEG", RGB, {}),
    ("jpg", "JPEG", RGB, {"progressive": True}),
    ("jpg", "JPEG", RGB.convert("L"), {}),
    ("jpg", "JPEG", RGB.convert("CMYK"), {}),
    ("png", "PNG", RGB, {}),
    ("png", "PNG", RGB.convert("L"), {}),
    ("png", "PNG", RGB.convert("1"), {}),
    ("png", "PNG", RGB.quantize(40), {}),
    ("webp", "WEBP", RGB, {}),
    ("webp", "WEBP", RGB, {"lossless": True}),
    ("gif", "GIF", RGB.quantize(200), {}),
    ("bmp", "BMP", RGB, {}),
    ("ppm", "PPM", RGB, {}),
    ("pgm", "PPM", RGB.convert("L"), {}),
    ("tif", "TIFF", RGB, {}),
    ("tif", "TIFF", RGB, {"compression": "tiff_lzw"}),
    ("tif", "TIFF", RGB.convert("CMYK"), {}),
    ("jp2", "JPEG2000", RGB, {}),
    ("j2k", "JPEG2000", RGB.convert("L"), {"no_jp2": True}),
    ("jp2", "JPEG2000", RGB.convert("RGBA"), {}),
    ("avif", "AVIF", RGB, {}),
    ("heic", "HEIF", RGB, {}),
]
FORMATS = [case for case in FORMATS if case[1] in image_files.FORMATS]  # some an installation may lack
image_files.formats_for(b"\0\0\0\x1cftypheic")  # so that Pillow writes HEIC, too
format_cases = pytest.mark.parametrize(
    ("suffix", "kind", "picture", "options"), FORMATS, ids=[f"{k}-{p.mode}-{'-'.join(o)}" for _, k, p, o in FORMATS]
)


@format_cases
def test_formats_equal_pillow(tmp_path, suffix, kind, picture, options):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(encoded(picture, kind, **options))
    for in_chans, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        image = decode_image(path, in_chans)
        assert image.dtype == torch.uint8
        assert image.shape == (in_chans, 37, 53)
        np.testing.assert_array_equal(hwc(image), pillow(path, mode))


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "really_a_png.JPEG"
    path.write_bytes(encoded(RGB, "PNG"))
    np.testing.assert_array_equal(hwc(decode_image(path)), np.asarray(RGB))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_exif_orientation_is_applied_once(tmp_path, kind, orientation):
    if kind not in image_files.FORMATS:
        pytest.skip(f"this installation does not read {kind}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(encoded(RGB, kind, exif=exif.tobytes()))
    image = decode_image(path)
    assert image.shape == ((3, 37, 53) if orientation < 5 else (3, 53, 37))
    np.testing.assert_array_equal(hwc(image), pillow(path, "RGB"))
    if orientation == 6 and kind in ("PNG", "TIFF"):  # by hand: the camera was turned, its top row is our right column
        np.testing.assert_array_equal(hwc(image)[:, -1], np.asarray(RGB)[0])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09"]
)
def test_damaged_exif_leaves_the_pixels_readable_and_silent(tmp_path, exif):
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(RGB, "JPEG", exif=exif))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(path)
    path.write_bytes(encoded(RGB, "JPEG"))
    assert torch.equal(image, decode_image(path))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(tmp_path, kind):
    rgba = np.zeros((256, 256, 4), np.uint8)
    rgba[..., 0], rgba[..., 1] = np.mgrid[:256, :256]
    rgba[..., 2] = 77
    rgba[..., 3] = np.mgrid[:256, :256][1]  # each red value with each alpha
    path = tmp_path / "x.img"
    path.write_bytes(
        encoded(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    )
    expected = on_white(rgba[..., :3], rgba[..., 3:])
    np.testing.assert_array_equal(hwc(decode_image(path)), expected)
    np.testing.assert_array_equal(hwc(decode_image(path, 4)), rgba)
    np.testing.assert_array_equal(
        hwc(decode_image(path, 1))[..., 0], np.asarray(Image.fromarray(expected).convert("L"))
    )
    assert hwc(decode_image(path))[:, 0].min() == 255  # alpha 0 is white, whatever colour hides there


def test_grey_with_alpha(tmp_path):
    grey_alpha = smooth(20, 30, 2)
    path = tmp_path / "x.png"
    path.write_bytes(encoded(Image.fromarray(grey_alpha), "PNG"))
    expected = on_white(grey_alpha[..., :1], grey_alpha[..., 1:])
    np.testing.assert_array_equal(hwc(decode_image(path, 1)), expected)
    np.testing.assert_array_equal(hwc(decode_image(path, 3)), expected.repeat(3, axis=2))


@pytest.mark.parametrize("transparency", [3, bytes([255, 128, 0, 64])], ids=["one entry", "alpha per entry"])
def test_palette_transparency_is_laid_on_white_and_silent(tmp_path, transparency):
    picture = RGB.quantize(8)
    path = tmp_path / "x.png"
    path.write_bytes(encoded(picture, "PNG", transparency=transparency))
    rgba = pillow(path, "RGBA")
    assert rgba[..., 3].min() < 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(path)
        decode_image(path, 1)
    np.testing.assert_array_equal(hwc(image), on_white(rgba[..., :3], rgba[..., 3:]))


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_transparent_colour_is_laid_on_white(tmp_path, mode):
    picture = RGB.convert(mode)
    colour = picture.getpixel((5, 5))
    path = tmp_path / "x.png"
    path.write_bytes(encoded(picture, "PNG", transparency=colour))
    expected = np.asarray(picture.convert("RGB")).copy()
    expected[(expected == expected[5, 5]).all(axis=2)] = 255
    np.testing.assert_array_equal(hwc(decode_image(path)), expected)


def test_animated_gif_gives_its_first_frame(tmp_path):
    first, second = RGB.quantize(30), Image.new("P", RGB.size)
    path = tmp_path / "x.gif"
    first.save(path, save_all=True, append_images=[second], duration=50)
    with Image.open(path) as both:
        assert both.n_frames == 2
    np.testing.assert_array_equal(hwc(decode_image(path)), np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_divided_by_257_and_rounded(tmp_path, channels):
    samples = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(channels, axis=2)
    samples = (samples + np.arange(channels, dtype=np.uint16) * 9999).astype(np.uint16)  # channels that differ
    path = tmp_path / "x.png"
    path.write_bytes(png16(samples))
    expected = np.floor(samples / 257 + 0.5).astype(np.uint8)  # 257 is odd, so no sample is half way
    assert (expected.min(), expected.max()) == (0, 255)
    if channels in (2, 4):
        colours = on_white(expected[..., :-1], expected[..., -1:])
        np.testing.assert_array_equal(hwc(decode_image(path, 4))[..., 3], expected[..., -1])
    else:
        colours = expected
    np.testing.assert_array_equal(hwc(decode_image(path, 3)), colours.repeat(3 // colours.shape[2], axis=2))
    if channels == 1:
        np.testing.assert_array_equal(hwc(decode_image(path, 1)), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_png_transparent_value(tmp_path, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (6, 7, channels), dtype=np.uint16)
    samples[1, 1] = samples[0, 0] ^ 1  # another value that is the same in 8 bits
    path = tmp_path / "x.png"
    path.write_bytes(png16(samples, transparent=samples[0, 0]))
    expected = np.floor(samples / 257 + 0.5).astype(np.uint8)
    expected[0, 0] = 255
    np.testing.assert_array_equal(hwc(decode_image(path)), expected.repeat(3 // channels, axis=2))


def test_16_bit_grey_in_other_formats(tmp_path):
    samples = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (tmp_path / "x.pgm").write_bytes(b"P5 256 256 65535\n" + samples.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode_image(tmp_path / "x.pgm", 1)[0].numpy(), np.floor(samples / 257 + 0.5))
    (tmp_path / "x.tif").write_bytes(encoded(Image.fromarray(samples), "TIFF"))
    np.testing.assert_array_equal(decode_image(tmp_path / "x.tif", 1)[0].numpy(), samples)  # TIFF keeps all bits


def test_jpeg_2000_gives_what_the_file_holds_or_is_refused(tmp_path):
    path = tmp_path / "x.jp2"
    samples = np.random.default_rng(0).integers(0, 65536, (37, 53), dtype=np.uint16)
    grey = encoded(Image.fromarray(samples), "JPEG2000")
    path.write_bytes(grey)
    np.testing.assert_array_equal(decode_image(path, 1)[0].numpy(), np.floor(samples / 257 + 0.5))
    place = grey.index(b"\xff\x4f\xff\x51") + 42  # of the bits of a sample, less 1
    for bits, told in ((0x8F, "1 x 16 bits, signed"), (3, "1 x 4 bits"), (20, "1 x 21 bits")):
        path.write_bytes(grey[:place] + bytes([bits]) + grey[place + 1 :])
        assert told in bad(path)
    colour = encoded(RGB, "JPEG2000")
    place = colour.index(b"\xff\x4f\xff\x51") + 42
    path.write_bytes(colour[:place] + b"\x0b" + colour[place + 1 :])
    assert "3 x 12 bits, unsigned: save as TIFF or PNG" in bad(path)
    path.write_bytes(encoded(RGB.convert("RGBA"), "JPEG2000", no_jp2=True))
    assert "4 channels, none said to be alpha" in bad(path)


def test_formats_that_an_installation_lacks_are_told_with_what_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "find_spec", lambda name: None)
    monkeypatch.setattr(image_files.features, "check", lambda name: False)
    read, unread = image_files.optional_formats()
    assert read == {}
    monkeypatch.setattr(image_files, "UNREAD_SUFFIXES", unread)
    monkeypatch.setattr(image_files, "IMAGE_SUFFIXES", image_files.IMAGE_SUFFIXES - set(unread))
    touch(tmp_path, "1.avif", "a/1.heic", "a/2.HEIC", "a/1.txt")
    leftovers = image_files.Leftovers()
    assert find_images(tmp_path, leftovers) == []
    heic = '.heic 2 (pip install "vit-mae-lightning[heif]")'
    assert leftovers.note() == f"left out: .avif 1 (Pillow 11.3 or newer), {heic}"
    assert str(leftovers.no_image("x")) == f"x holds no image that can be read; {leftovers.note()}"
    touch(tmp_path, "1.cr2")
    find_images(tmp_path, leftovers)
    assert str(leftovers.no_image("x")).endswith('[heif]"); convert to PNG, TIFF or JPEG')


# --- .npy


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int16", ">f4"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_is_returned_as_it_is(tmp_path, dtype, channels, order):
    low, top = (-1e6, 3e38) if dtype == ">f4" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    array = np.random.default_rng(0).uniform(low, 1e6 if dtype == ">f4" else top, (6, 9, channels))
    array = array.astype(dtype, order=order)
    array[0, 0], array[0, 1] = top, low
    path = tmp_path / "x.NPY"
    with path.open("wb") as file:
        np.save(file, array)
    image = decode_image(path, channels)
    assert image.dtype == {"uint8": torch.uint8, ">f4": torch.float32}.get(dtype, torch.uint16)
    assert image.shape == (channels, 6, 9)
    np.testing.assert_array_equal(hwc(image), array.astype(int) + 32768 if dtype == "int16" else array)


def test_npy_without_a_channel_axis(tmp_path):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(decode_image(tmp_path / "x.npy", 1).numpy(), array[None])
    assert "shape (3, 4), wanted (height, width, 3)" in bad(tmp_path / "x.npy", 3)


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((4, 5, 4), np.uint8), "shape (4, 5, 4), wanted (height, width, 3)"),
        (np.zeros((3, 4, 5), np.uint8), "shape (3, 4, 5)"),
        (np.zeros((1, 4, 5, 3), np.uint8), "shape (1, 4, 5, 3)"),
        (np.zeros(3, np.uint8), "shape (3,)"),
        (np.zeros((), np.uint8), "shape ()"),
        (np.zeros((0, 5, 3), np.uint8), "shape (0, 5, 3)"),
        (np.zeros((4, 5, 3), np.float64), "holds float64, wanted uint8, uint16, int16 or float32; save it as float32"),
        (np.full((4, 5, 3), np.nan, np.float32), "60 samples are NaN or infinite"),
        (np.zeros((4, 5, 3), np.int8), "int8"),
        (np.zeros((4, 5, 3), np.uint32), "uint32"),
        (np.zeros((4, 5, 3), bool), "bool"),
        (np.full((4, 5, 3), None), "object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_npy_of_the_wrong_kind(tmp_path, array, told):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert told in bad(tmp_path / "x.npy")


def test_npy_that_is_broken(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((40, 50, 3), np.uint8))
    whole = path.read_bytes()
    for cut in (1, 6000, len(whole) - 40, len(whole) - 7, len(whole) - 3):
        path.write_bytes(whole[:-cut])
        bad(path)
    path.write_bytes(b"")
    assert "empty file" in bad(path)
    path.write_bytes(encoded(RGB, "PNG"))
    bad(path)
    with path.open("wb") as file:
        np.savez(file, np.ones((4, 5, 3), np.uint8))
    bad(path)
    # A header that claims 3 GB a channel, and nothing behind it.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (60000, 60000, 3)})
    assert str(bounds.MAX_PIXELS) in bad(path)


# --- broken image files


@format_cases
def test_truncation_is_an_error_or_costs_no_pixel(tmp_path, suffix, kind, picture, options):
    path = tmp_path / f"x.{suffix}"
    whole = encoded(picture, kind, **options)
    path.write_bytes(whole)
    expected = decode_image(path)
    refused = 0
    for keep in sorted({len(whole) * part // 16 for part in range(16)} | {len(whole) - cut for cut in range(1, 24)}):
        path.write_bytes(whole[:keep])
        try:
            image = decode_image(path)
        except BadImage:
            refused += 1
        else:
            assert torch.equal(image, expected)
            assert keep > len(whole) - 24  # no more than a trailer that holds no pixels, such as the GIF one
    assert refused >= 16


def closed(kind: str, data: bytes, part: float) -> bytes:
    """A file of which a part is left, with its end mark, and the lengths in its structure mended."""
    cut = data[: int(len(data) * part)]
    if kind == "JPEG":
        return cut + b"\xff\xd9"
    if kind == "GIF":
        return cut + b"\0;"
    if kind == "PNG":
        at = data.index(b"IDAT")
        pixels = data[at + 4 : at + 4 + int(int.from_bytes(data[at - 4 : at]) * part)]
        return data[: at - 4] + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    if kind == "WEBP":
        cut = cut[: len(cut) & ~1]
        at = cut.index(b"VP8") + 4
        chunk = cut[:at] + struct.pack("<I", len(cut) - at - 4) + cut[at + 4 :]
        return chunk[:4] + struct.pack("<I", len(cut) - 8) + chunk[8:]
    if kind == "JPEG2000":
        edited = bytearray(cut + b"\xff\xd9")
        if (box := edited.find(b"jp2c")) > 0:
            edited[box - 4 : box] = bytes(4)  # up to the end
        tile = edited.rindex(b"\xff\x90\0\x0a")
        edited[tile + 6 : tile + 10] = (len(edited) - 2 - tile).to_bytes(4)
        return bytes(edited)
    if kind == "TIFF":
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            tag, last = page.tags["StripByteCounts"], len(page.databytecounts) - 1
            size = {3: 2, 4: 4}[tag.dtype]
            place, count = tag.valueoffset + size * last, int(page.databytecounts[last] * part)
            edited = bytearray(data)
            edited[place : place + size] = count.to_bytes(size, "little")
            if page.compression == 7:
                end = page.dataoffsets[last] + count
                edited[end - 2 : end] = b"\xff\xd9"
            return bytes(edited)
    return cut  # of formats without an end mark


CLOSED = [*FORMATS, ("tif", "TIFF", RGB, {"compression": "jpeg"}), ("tif", "TIFF", RGB, {"compression": "packbits"})]
CLOSED += [("tif", "TIFF", RGB.convert("L"), {"compression": kind}) for kind in ("jpeg", "tiff_adobe_deflate")]


@pytest.mark.parametrize(
    ("suffix", "kind", "picture", "options"), CLOSED, ids=[f"{k}-{p.mode}-{o}" for _, k, p, o in CLOSED]
)
def test_half_a_picture_with_an_end_mark_is_not_taken_for_the_whole(tmp_path, suffix, kind, picture, options):
    path = tmp_path / f"x.{suffix}"
    whole = encoded(picture, kind, **options)
    path.write_bytes(whole)
    expected = decode_image(path)
    for tenths in (5, 7, 9):
        path.write_bytes(closed(kind, whole, tenths / 10))
        try:
            image = decode_image(path)
        except BadImage:
            continue
        assert kind == "TIFF"  # without compression the lengths are not needed
        assert "compression" not in options
        assert torch.equal(image, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_half_written_and_full_of_zeros(tmp_path, kind):
    path = tmp_path / "x"
    whole = encoded(RGB.resize((640, 480)), kind)
    for keep in (len(whole) // 2, len(whole) * 9 // 10, len(whole) - 20):
        path.write_bytes(whole[:keep].ljust(len(whole), b"\0"))
        assert "truncated" in bad(path)
    path.write_bytes(whole + b"some cameras write more after the end")
    assert decode_image(path).shape == (3, 480, 640)


def test_files_that_are_no_image(tmp_path):
    path = tmp_path / "x.jpg"
    assert "No such file" in bad(path)
    path.write_bytes(b"")
    assert "empty file" in bad(path)
    path.write_text("not an image\n" * 50)
    assert "known format" in bad(path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert "known format" in bad(path)  # Pillow can read this one, through Ghostscript
    path.write_bytes(encoded(RGB, "PNG")[:33])
    bad(path)
    bad(tmp_path)
    bad(tmp_path / "x.jpg" / "y.jpg")
    bad(tmp_path / ("n" * 300 + ".jpg"))


def test_damaged_bytes_give_pixels_or_a_bad_image_and_no_other_error(tmp_path):
    path = tmp_path / "x.jpg"
    rng = np.random.default_rng(0)
    for _, kind, picture, options in FORMATS:
        whole = encoded(picture, kind, **options)
        for _ in range(20):
            damaged = bytearray(whole)
            for position in rng.integers(0, min(len(whole), 300), 3):
                damaged[position] = rng.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(BadImage):
                decode_image(path)


def test_no_permission():
    with public_folder() as folder:
        path, other = folder / "x.jpg", folder / "other.jpg"
        for file in (path, other):
            file.write_bytes(encoded(RGB, "JPEG"))
            decode_image(file)  # before anything is forbidden
        path.chmod(0)
        (folder / "locked").mkdir(mode=0)

        def tell() -> tuple[str, str, int]:
            with pytest.raises(UserError) as caught:
                find_images(folder)
            return bad(path), str(caught.value), decode_image(other).shape[1]

        told, folder_told, height = in_child(tell, become_nobody)
        (folder / "locked").chmod(0o700)  # for whoever tidies up
    assert told == f"{path}: Permission denied"
    assert folder_told == f"cannot list the folder {folder / 'locked'}: Permission denied"
    assert height == 37


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("pipe.jpg", tmp_path / "pipe"), ("zeros.png", Path("/dev/zero"))):
        (tmp_path / name).symlink_to(target)
        assert "not a file" in bad(tmp_path / name)


def test_a_header_over_the_limit_is_refused_before_decoding(tmp_path, monkeypatch):
    # Headers alone, with no pixel behind them: trying to decode would give another error, or take 1.2 GB.
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    path = tmp_path / "x.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    assert "pixels" in bad(path)
    (tmp_path / "x.ppm").write_bytes(b"P6 20000 20000 255\n")
    assert "pixels" in bad(tmp_path / "x.ppm")

    # Below Pillow's error but above its warning: decoded, and no warning gets out.
    path.write_bytes(encoded(RGB, "PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RGB.width * RGB.height - 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(path)
    assert not caught

    # Our own limit holds where Pillow's was lifted.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(bounds, "MAX_PIXELS", RGB.width * RGB.height - 1)
    assert "53 x 37 pixels, over the limit of 1960" in bad(path)


def test_other_channel_counts_need_npy(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(encoded(RGB, "PNG"))
    for in_chans in (2, 13):
        assert f"only .npy and TIFF hold {in_chans} channels" in bad(path, in_chans)


def test_bad_image_is_one_line_and_survives_pickling():
    error = BadImage(Path("a\nb\udcff.jpg"), "broken\n  data")
    assert str(error) == r"a\nb\xff.jpg: broken data"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.reason) == (str(error), error.path, error.reason)


# --- crop and resize


def is_dense(image: torch.Tensor) -> bool:
    return image.is_contiguous() or image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (96, 160)])
@pytest.mark.parametrize("box", [(0, 0, 120, 160), (11, 23, 64, 90), (30, 40, 20, 20), (40, 50, 1, 1)])
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_resized_crop_is_within_a_level_of_pillow(kind, box, size):
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    pixels = smooth(120, 160) if kind == "smooth" else noise
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    out = resized_crop(image, box, size)
    assert (out.dtype, out.shape) == (torch.uint8, (3, *size))
    assert is_dense(out)
    top, left, height, width = box
    cut = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    difference = np.abs(hwc(out) - np.asarray(cut.resize(size[::-1], Image.Resampling.BICUBIC)).astype(int))
    assert difference.max() <= 2  # each of the two passes may round the other way
    assert (difference > 1).mean() < 2e-4
    assert difference.mean() < 0.02
    assert torch.equal(resized_crop(image.contiguous(), box, size), out)  # whatever the strides


@pytest.mark.parametrize(("box", "size"), [((5, 100, 100, 3), (96, 160)), ((0, 0, 120, 160), (7, 300))])
def test_resized_crop_of_far_other_shapes(box, size):
    image = torch.from_numpy(smooth(120, 160)).permute(2, 0, 1)
    assert resized_crop(image, box, size).shape == (3, *size)


def test_resized_crop_treats_channels_alike():
    image = torch.from_numpy(smooth(40, 60, 13)).permute(2, 0, 1)
    box = (3, 5, 30, 41)
    alone = torch.cat([resized_crop(image[c : c + 1], box, (24, 32)) for c in range(13)])
    assert torch.equal(resized_crop(image, box, (24, 32)), alone)


def test_resized_crop_of_uint16():
    image = torch.from_numpy(smooth(40, 60, 13)).permute(2, 0, 1)
    wide = (image.int() * 257).to(torch.uint16)
    out = resized_crop(wide, (3, 5, 30, 41), (24, 32))
    assert (out.dtype, out.shape) == (torch.uint16, (13, 24, 32))
    assert is_dense(out)
    narrow = resized_crop(image, (3, 5, 30, 41), (24, 32))
    # The uint8 kernel rounds and clamps between its two passes, the float one only at the end.
    assert (out.double() / 257 - narrow.double()).abs().max() < 1.5
    # Bicubic overshoots at an edge between the two extremes: clamped, not wrapped around.
    edge = torch.zeros(1, 8, 8, dtype=torch.uint16)
    edge[..., 4:] = 65535
    large = resized_crop(edge, (0, 0, 8, 8), (8, 64))[0, 0].tolist()
    assert large == sorted(large, key=lambda value: value > 32767)
    assert (min(large), max(large)) == (0, 65535)


def test_resized_crop_of_float32_neither_rounds_nor_clamps():
    image = torch.from_numpy(smooth(40, 60, 13)).permute(2, 0, 1)
    box = (3, 5, 30, 41)
    out = resized_crop(image.float() * 40 - 3000, box, (24, 32))
    assert out.dtype == torch.float32
    assert out.min() < -2000
    assert out.max() > 5000
    exact = F.interpolate(image[None, :, 3:33, 5:46].double() * 40 - 3000, (24, 32), mode="bicubic", antialias=True)
    assert (out - exact[0]).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_resized_crop_to_its_own_size_changes_nothing(dtype):
    image = torch.arange(3 * 20 * 30).view(20, 30, 3).permute(2, 0, 1).to(dtype)
    out = resized_crop(image, (2, 4, 10, 12), (10, 12))
    assert is_dense(out)
    assert torch.equal(out, image[:, 2:12, 4:16])


# --- boxes

SIZES = [(375, 500), (500, 375), (32, 32), (1, 1), (1, 1000), (20000, 10000), (10, 3000), (3000, 10), (17, 5)]


def inside(box: decode.Box, height: int, width: int) -> bool:
    top, left, box_height, box_width = box
    return min(top, left) >= 0 < min(box_height, box_width) and top + box_height <= height and left + box_width <= width


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_random_crop_box_is_inside_and_reproducible(height, width):
    generator = torch.Generator().manual_seed(0)
    boxes = [random_crop_box(generator, height, width) for _ in range(500)]
    assert all(inside(box, height, width) for box in boxes)
    generator.manual_seed(0)
    assert [random_crop_box(generator, height, width) for _ in range(500)] == boxes


def test_random_crop_box_draws_as_many_numbers_for_each_image():
    after = set()
    for height, width in SIZES:
        generator = torch.Generator().manual_seed(0)
        random_crop_box(generator, height, width)
        after.add(torch.rand(1, generator=generator).item())
    assert len(after) == 1


def test_random_crop_box_keeps_to_scale_and_ratio():
    generator = torch.Generator().manual_seed(0)
    for scale, ratio in (((0.2, 1.0), (3 / 4, 4 / 3)), ((0.08, 0.3), (0.5, 1.5)), ((0.5, 0.5), (1.0, 1.0))):
        for _ in range(1000):
            _, _, height, width = random_crop_box(generator, 1000, 1200, scale, ratio)
            assert scale[0] - 0.002 <= height * width / 1_200_000 <= scale[1] + 0.002  # 0.002: whole pixels
            assert ratio[0] - 0.004 <= width / height <= ratio[1] + 0.004


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 1000), (40, 30)])
def test_random_crop_box_is_distributed_as_torchvision_draws(height, width):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    count, scale, ratio = 4000, (0.2, 1.0), (3 / 4, 4 / 3)
    blank = torch.empty(3, height, width, dtype=torch.uint8)
    theirs = [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)]
    ours = [random_crop_box(generator, height, width, scale, ratio) for _ in range(count)]

    def quantities(boxes: list[decode.Box]) -> torch.Tensor:  # area fraction, log ratio, and the place within its range
        t, left, h, w = torch.tensor(boxes, dtype=torch.float64).T
        return torch.stack(
            [h * w / height / width, (w / h).log(), t, left, t / (height - h + 1), left / (width - w + 1)]
        )

    for a, b in zip(quantities(ours), quantities(theirs), strict=True):
        # Kolmogorov-Smirnov distance of two samples; 1.95 * sqrt(2 / n) is exceeded once in a thousand.
        values = torch.cat([a, b]).sort().values
        distance = (torch.searchsorted(a.sort().values, values, right=True) / count).sub(
            torch.searchsorted(b.sort().values, values, right=True) / count
        )
        assert distance.abs().max() < 1.95 * math.sqrt(2 / count)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (10, 3000, (0, 1493, 10, 13)),  # too wide for any try: full height, ratio 4/3, in the middle
        (3000, 10, (1493, 0, 13, 10)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_random_crop_box_falls_back_to_the_centre(height, width, expected):
    generator = torch.Generator().manual_seed(0)
    assert {random_crop_box(generator, height, width, scale=(0.9, 1.0)) for _ in range(50)} == {expected}
    blank = torch.empty(3, height, width)
    assert RandomResizedCrop.get_params(blank, [0.9, 1.0], [3 / 4, 4 / 3]) == expected


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (375, 500, (224, 224), (0, 62, 375, 375)),
        (500, 375, (224, 224), (62, 0, 375, 375)),
        (100, 100, (64, 128), (25, 0, 50, 100)),  # the width limits
        (100, 400, (64, 128), (0, 100, 100, 200)),  # the height limits
        (32, 32, (32, 32), (0, 0, 32, 32)),
        (1, 1000, (224, 224), (0, 499, 1, 1)),
        (20000, 10000, (224, 224), (5000, 0, 10000, 10000)),
    ],
)
def test_center_box(height, width, size, expected):
    assert center_box(height, width, size) == expected
    assert inside(expected, height, width)


# --- folders


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_find_images_order_suffixes_and_hidden_names(tmp_path):
    names = ["a/1.jpg", "a-b/1.JPEG", "a/10.png", "a/2.Tif", "B/x.webp", "deep/er/still/y.npy", "z.bmp", "\u00e9.gif"]
    touch(tmp_path, *names)
    touch(tmp_path, ".hidden/1.jpg", "a/.thumbs/1.jpg", "a/._1.jpg", "a/.jpg", "a/notes.txt", "a/1.jpg.part", "a/jpg")
    (tmp_path / "folder.jpg").mkdir()
    touch(tmp_path, "folder.jpg/in.ppm")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert find_images(tmp_path) == sorted([*names, "folder.jpg/in.ppm"])
    assert find_images(tmp_path)[:3] == ["B/x.webp", "a-b/1.JPEG", "a/1.jpg"]  # by code points, not by language
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_find_images_follows_links_but_not_in_circles(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root, "a/1.jpg")
    touch(elsewhere, "2.jpg", "sub/3.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "me").symlink_to(".")
    (root / "b").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "c").symlink_to("a")  # an alias, no circle: listed under both names
    (root / "self").symlink_to("self")
    (root / "self.jpg").symlink_to("self.jpg")
    (root / "file.jpg").symlink_to(elsewhere / "2.jpg")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert find_images(root) == ["a/1.jpg", "b/2.jpg", "b/sub/3.jpg", "c/1.jpg", "file.jpg", "gone.jpg", "self.jpg"]
    bad(root / "gone.jpg")
    bad(root / "self.jpg")


def test_a_folder_that_is_not_there(tmp_path):
    touch(tmp_path, "file.jpg")
    for root in (tmp_path / "nowhere", tmp_path / "file.jpg"):
        with pytest.raises(UserError, match=root.name) as caught:
            find_images(root)
        assert "\n" not in str(caught.value)
