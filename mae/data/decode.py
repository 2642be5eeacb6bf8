"""Decoding image files to pixels.

Pixels are (C, H, W) tensors: uint8 in [0, 255], uint16 in [0, 65535], or float32 in the file's own units. int16 becomes
uint16 by adding 32768. Nothing here normalises.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mae.data import jpeg
from mae.data.bounds import MAX_MEMORY, check_directories, check_memory, check_parts, pillow_bytes
from mae.data.crops import Box, resized_crop
from mae.data.image_files import FORMATS, formats_for
from mae.runtime.reading import read_regular
from mae.runtime.text import printable

ALPHA_BACKGROUND = 255  # white, in every channel, behind transparent parts


KINDS = ("uint8", "uint16", "int16", "float32")  # types of samples that are read

SCALES = {"uint8": "[0, 1]", "uint16": "[0, 1]", "int16": "(v + 32768) / 65535", "float32": "its own units"}

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_TIFF = tuple(order + version for order in (b"II", b"MM") for version in (b"*\0", b"\0*", b"+\0", b"\0+"))

_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

_ORIENTATION_TAG = 0x0112

_EXIF_START = re.compile(rb"^(Exif\0\0){1,2}")

_UPRIGHT = {  # EXIF orientation -> the operation that undoes it; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LAID_OVER = [_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]  # those that swap height and width

_LIBRARY_WARNINGS = ("ignore", None, Warning, re.compile(r"(PIL|tifffile|imagecodecs)\."), 0)


class BadImage(Exception):
    """A file that cannot be decoded as asked; `str()` is one line, "path: reason"."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # both in args, so that the error can be pickled between processes
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return printable(f"{self.path}: {' '.join(self.reason.split())}")


class Picture:
    """One image whose size is known and whose pixels may not be decoded yet.

    Attributes:
        height, width: Size in pixels, after EXIF rotation.
        decoder: The library that makes the pixels, for the log.
        kind: The type of the file's samples, one of KINDS.
    """

    kind = "uint8"

    def __init__(self, pixels: Tensor, decoder: str = "memory", kind: str | None = None) -> None:
        self._pixels, self.decoder = pixels, decoder
        self.height, self.width = pixels.shape[1:]
        if pixels.dtype != torch.uint8:
            self.kind = kind or str(pixels.dtype).removeprefix("torch.")

    def pixels(self) -> Tensor:
        """(C, H, W) uint8, uint16 or float32, see the module; the strides are those of the decoder.

        Raises:
            BadImage: The image cannot be decoded.
        """
        return self._pixels

    def resized_crop(self, box: Box, size: tuple[int, int], reduced: bool = False) -> Tensor:
        """As `crops.resized_crop`, applied to the pixels of the whole image.

        Args:
            reduced: Decode large boxes of a JPEG at a half, quarter or eighth of the size if that suffices: faster, but
                not the same pixels. Not of one that is turned, or becomes grey.
        """
        return resized_crop(self.pixels(), box, size)


class JpegPicture(Picture):
    """A JPEG for libjpeg-turbo, decoded when and as far as needed; by Pillow if that fails.

    Args:
        turn: The operation that makes it upright; such an image is always decoded whole.
    """

    def __init__(
        self,
        data: bytes,
        path: str | Path,
        header: jpeg.Header,
        in_chans: int,
        turn: Image.Transpose | None = None,
    ) -> None:
        self.data, self.path, self.header, self.in_chans, self.turn = data, path, header, in_chans, turn
        self.height, self.width = (header.width, header.height) if turn in _LAID_OVER else (header.height, header.width)
        self.as_it_is = turn is None and in_chans in (3, header.channels)
        self.decoder = "libjpeg-turbo"

    def pixels(self) -> Tensor:
        return self._decode(self.height, 1)

    def resized_crop(self, box: Box, size: tuple[int, int], reduced: bool = False) -> Tensor:
        top, left, height, width = box
        reduce = 1
        while (
            reduced
            and self.as_it_is
            and reduce < 8
            and height >= 2 * reduce * size[0]
            and width >= 2 * reduce * size[1]
        ):
            reduce *= 2
        pixels = self._decode(top + height, reduce)
        if reduce > 1:
            (top, bottom), (left, right) = (
                (round(start / reduce), round((start + length) / reduce))
                for start, length in ((top, height), (left, width))
            )
            height, width = bottom - top, right - left
        return resized_crop(pixels, (top, left, height, width), size)

    def _decode(self, rows: int, reduce: int) -> Tensor:
        """(C, H, W) of at least so many rows, at 1 / `reduce` of the size."""
        with _errors_as_bad_image(self.path):
            pixels = jpeg.decode(self.data, self.header, rows if self.turn is None else self.header.height, reduce)
            whole = _open_with_pillow(self.data, self.path, self.in_chans) if pixels is None else None
            if pixels is not None and not self.as_it_is:
                image = Image.fromarray(pixels.squeeze(2) if self.header.channels == 1 else pixels)
                pixels = _upright_samples(_with_channels(image, self.in_chans), self.turn)
        if whole is not None:
            self.decoder = whole.decoder
            size = -(-self.height // reduce), -(-self.width // reduce)
            return whole.resized_crop((0, 0, self.height, self.width), size)
        return torch.from_numpy(pixels).permute(2, 0, 1).expand(self.in_chans, -1, -1)


def decode_image(path: str | Path, in_chans: int = 3) -> Tensor:
    """Decode one image file completely.

    Args:
        path: An image file (known by its content) or a `.npy` file of shape (H, W, C), or (H, W) for one channel.
        in_chans: Channels of the result. Image files give 1 (grey), 3 (RGB) or 4 (RGB and alpha); with 1 and 3,
            transparent parts are laid on white. A `.npy` file, and a TIFF file that is no such picture (see
            `tiff.read`), must hold exactly this many, which may be any number.

    Returns:
        As `Picture.pixels`.

    Raises:
        BadImage: The image cannot be read or decoded, data of it are missing, or it is over a limit of `bounds`. No
            other error is raised.
    """
    return open_image(read_file(path), path, in_chans).pixels()


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImage: The file cannot be read, or is larger than what may be decoded of it.
    """
    with _errors_as_bad_image(path):
        return read_regular(path, MAX_MEMORY)


def open_image(data: bytes, path: str | Path, in_chans: int = 3) -> Picture:
    """An image from the bytes of its file; arguments and errors as for `decode_image`.

    Args:
        path: For messages; its suffix also tells `.npy` files from all others, which are known by their content.
    """
    with _errors_as_bad_image(path):
        if not data:
            raise BadImage(path, "empty file")
        if os.path.splitext(path)[1].lower() == ".npy":
            return _as_stored(_decode_npy(data, path, in_chans), path, "numpy")
        if data.startswith(_TIFF):
            return _open_tiff(data, path, in_chans)
        if in_chans not in _MODES:
            raise BadImage(path, f"only .npy and TIFF hold {in_chans} channels; other image files give 1, 3 or 4")
        header = jpeg.read_header(data)
        if header is None:
            return _open_with_pillow(data, path, in_chans)
        _check_end(data, path, "JPEG", header.data)
        turn = None
        if header.metadata:
            image = read_pillow_header(data)
            if image.format != "JPEG":  # several images, as in MPO
                return _open_with_pillow(data, path, in_chans)
            turn = _UPRIGHT.get(_orientation(image))
        picture = JpegPicture(data, path, header, in_chans, turn)
        further = 0 if picture.as_it_is else 8 + in_chans
        check_memory(header.height, header.width, header.channels + header.coefficients + further)
        return picture


@contextmanager
def _errors_as_bad_image(path: str | Path) -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(path, f"not an image in a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # damaged files make Pillow raise nearly any type, from KeyError to MemoryError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _check_end(data: bytes, path: str | Path, kind: str, start: int) -> None:
    # A half-written file often has zeros up to its full length, of which the JPEG and PNG decoders make pixels, too.
    marker = _END_MARKERS.get(kind, b"")
    if not data.endswith(marker) and data.find(marker, start) < 0:
        raise BadImage(path, f"file is truncated: no end of the {kind} data")


def _as_stored(samples: np.ndarray, path: str | Path, decoder: str) -> Picture:
    """The picture of (C, H, W) samples of one of KINDS."""
    kind = samples.dtype.name
    if kind == "int16":
        samples = samples.view(np.uint16)
        samples ^= 0x8000  # x + 32768
    if kind == "float32" and (bad := samples.size - int(np.isfinite(samples).sum())):
        raise BadImage(path, f"{bad} samples are NaN or infinite: fill in what has no data first")
    return Picture(torch.from_numpy(samples), decoder, kind)


def _open_tiff(data: bytes, path: str | Path, in_chans: int) -> Picture:
    from mae.data import tiff  # tifffile is only imported if there is a TIFF

    _hide_library_warnings()
    check_directories(data)
    samples = tiff.read(data, in_chans)
    return _open_with_pillow(data, path, in_chans) if samples is None else _as_stored(samples, path, "tifffile")


def _decode_npy(data: bytes, path: str | Path, in_chans: int) -> np.ndarray:
    # The header first: np.load would allocate the memory that it claims before it finds that data are missing.
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.name not in KINDS:
        hint = "; save it as float32" if dtype.name == "float64" else ""
        raise BadImage(path, f"holds {dtype}, wanted {', '.join(KINDS[:-1])} or {KINDS[-1]}{hint}")
    if len(shape) not in (2, 3) or 0 in shape or (*shape, 1)[2] != in_chans:
        raise BadImage(path, f"has shape {shape}, wanted (height, width, {in_chans})")
    check_memory(shape[0], shape[1], 2 * in_chans * dtype.itemsize)
    count = math.prod(shape)
    if len(data) - file.tell() < count * dtype.itemsize:
        raise BadImage(path, "file is truncated")
    flat = np.frombuffer(data, dtype, count, file.tell())
    array = flat.astype(dtype.newbyteorder("=")).reshape(shape, order="F" if fortran_order else "C")  # writable
    return (array if array.ndim == 3 else array[..., None]).transpose(2, 0, 1)


def _hide_library_warnings() -> None:
    # One narrow filter for the process instead of catch_warnings for each image: that makes Python forget which
    # warnings it has shown, so "once" warnings of other libraries would come back with every image.
    if warnings.filters[:1] != [_LIBRARY_WARNINGS]:  # not there yet, or a later filter hides it
        warnings.filterwarnings("ignore", module=_LIBRARY_WARNINGS[3].pattern)


def read_pillow_header(data: bytes) -> Image.Image:
    """An image that Pillow has opened and not decoded.

    Raises:
        Exception: It is none, is damaged, or has more parts than is honest; of many types, with the reason.
    """
    _hide_library_warnings()
    check_parts(data)
    check_directories(jpeg.joined_exif(data))
    image = Image.open(BytesIO(data), formats=formats_for(data))
    if image.format == "JPEG2000":
        _check_jpeg2000(image, data)
    return image


def _check_jpeg2000(image: Image.Image, data: bytes) -> None:
    """Refuse what Pillow would cut to 8 bits, scale by a power of two, or take for transparency without being told."""
    start = data.index(b"\xff\x4f\xff\x51")  # SIZ, right behind the start of the code stream
    components = data[start + 42 : start + 42 + 3 * int.from_bytes(data[start + 40 : start + 42])]
    for sample in components[::3]:
        bits = (sample & 127) + 1
        if sample > 127 or (bits != 8 and (len(components) > 3 or not 8 < bits <= 16)):
            kind = "signed" if sample > 127 else "unsigned"
            raise ValueError(f"JPEG 2000 of {len(components) // 3} x {bits} bits, {kind}: save as TIFF or PNG")
    if image.mode in ("LA", "RGBA") and b"cdef" not in data[:start]:
        raise ValueError(f"JPEG 2000 of {len(components) // 3} channels, none said to be alpha: save as TIFF")


def _open_with_pillow(data: bytes, path: str | Path, in_chans: int) -> Picture:
    image = read_pillow_header(data)
    # To look for the EXIF of a PNG that has none, Pillow would decode it to its end.
    turned = (image.format != "PNG" or "exif" in image.info) and is_turned(image)
    transparent, wide = in_chans != 4 and image.has_transparency_data, _is_wide(image, data)
    converted = turned or wide or image.mode not in (_MODES[in_chans], "RGBA" if transparent else "")
    per_pixel = pillow_bytes(image.format, image.mode, converted, transparent, wide, in_chans)
    check_memory(image.height, image.width, per_pixel)
    file = getattr(image, "fp", None)  # which stands behind the header; Pillow has closed it for some formats
    _check_end(data, path, image.format or "", file.tell() if file else 0)
    if image.format in ("JPEG", "MPO"):
        jpeg.check_whole(data, "CMYK" if image.mode == "CMYK" else "GRAY")
    image.load()  # raises on data that ends early: LOAD_TRUNCATED_IMAGES stays False

    return _as_picture(image, data, in_chans)


def _as_picture(image: Image.Image, data: bytes, in_chans: int) -> Picture:
    # The official MAE pipeline (torchvision's ImageFolder) ignores the orientation and sees such photographs lying on
    # their side; here they are turned upright. Hardly any file of ImageNet has one.
    turn = _UPRIGHT.get(_orientation(image))
    pixels = _upright_samples(_with_channels(_eight_bit(image, data), in_chans), turn)
    return Picture(torch.from_numpy(pixels).permute(2, 0, 1), "Pillow")


def _upright_samples(image: Image.Image, turn: Image.Transpose | None) -> np.ndarray:
    """(H, W, C) uint8 of an image of 1, 3 or 4 channels, turned."""
    image = image if turn is None else image.transpose(turn)
    samples = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for rows, part in _bands(image):
        samples[rows] = part
    return samples


def _bands(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """An image in horizontal bands, (h, W, C) each: Pillow copies what it gives, and a whole image twice."""
    step = max(1, 2**18 // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        band = image if step >= image.height else image.crop((0, top, image.width, bottom))
        yield slice(top, bottom), np.asarray(band).reshape(bottom - top, image.width, -1)


def from_item(image: Any, where: str, in_chans: int) -> Picture:
    """An image as data sets of torchvision and Hugging Face give it.

    Args:
        image: A Pillow image, or a (C, H, W) tensor of uint8, uint16, int16 or float32. A Pillow image that has been
            opened and not yet decoded gives the pixels of its file; others have 8 bits a channel.
        where: For messages.

    Raises:
        BadImage: It is something else, or has another number of channels.
    """
    if isinstance(image, torch.Tensor):
        kind = str(image.dtype).removeprefix("torch.")
        if image.ndim != 3 or kind not in KINDS or len(image) != in_chans:
            raise BadImage(
                where,
                f"is a tensor {tuple(image.shape)} {image.dtype}, wanted ({in_chans}, H, W) of {', '.join(KINDS)}",
            )
        return Picture(image) if kind.startswith("u") else _as_stored(image.numpy(), where, "memory")
    if not isinstance(image, Image.Image):
        raise BadImage(where, f"is {type(image).__name__}, wanted a Pillow image or a uint8 tensor")
    with _errors_as_bad_image(where):
        if data := _undecoded_file(image):
            return open_image(data, where, in_chans)
        if in_chans not in _MODES:
            raise BadImage(where, f"is a Pillow image, which gives 1, 3 or 4 channels, not {in_chans}")
        return _as_picture(image, b"", in_chans)


def _undecoded_file(image: Image.Image) -> bytes:
    """The file of an image that Pillow has opened and not yet decoded; empty for all others."""
    file = getattr(image, "fp", None)
    if not getattr(image, "tile", None) or file is None or image.tell():
        return b""
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    return data


def _orientation(image: Image.Image) -> int:
    try:
        exif = image.info.get("exif", b"")
        if "Raw profile type exif" in image.info:  # as Pillow takes it from PNG files
            exif = exif or bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        check_directories(_EXIF_START.sub(b"", exif))
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow raises many types
        return 1  # damaged EXIF does not make the pixels bad; some files of ImageNet have it


def is_turned(image: Image.Image) -> bool:
    """Whether an image is not upright by its EXIF orientation."""
    return _orientation(image) in _UPRIGHT


def _is_wide(image: Image.Image, data: bytes) -> bool:
    """Whether an image has 16 bits a channel that Pillow gives."""
    if image.format == "PNG" and data[24:25] == b"\x10":
        return True
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _eight_bit(image: Image.Image, data: bytes) -> Image.Image:
    """The image in a mode of 8 bits per channel: 16-bit samples become round(x / 257), so 65535 becomes 255."""
    if not _is_wide(image, data):
        if image.mode in ("I", "F"):
            raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; save 8 or 16 bits a channel")
        return image
    key = image.info.get("transparency")  # one grey or RGB value, in 16 bits, that stands for transparent
    result: np.ndarray | None = None
    for rows, samples in _wide_bands(image, data):
        bands = [((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)]
        if key is not None and samples.shape[2] in (1, 3):
            bands.append((samples != np.asarray(key)).any(axis=2, keepdims=True) * np.uint8(255))
        narrow = np.concatenate(bands, axis=2)
        if result is None:
            result = np.empty((image.height, *narrow.shape[1:]), np.uint8)
        result[rows] = narrow
    assert result is not None  # an image has a row
    return Image.fromarray(result.squeeze(2) if result.shape[2] == 1 else result)  # L, LA, RGB or RGBA


def _wide_bands(image: Image.Image, data: bytes) -> Iterator[tuple[slice, np.ndarray]]:
    """As `_bands`, with all 16 bits of the samples; of colour PNG Pillow keeps the high bytes."""
    if image.mode not in ("RGB", "RGBA"):
        yield from _bands(image)
        return
    # Read once more with other modes. Grey with alpha (colour type 4 in the header) is read as four channels of 8 bits,
    # so that nothing is lost; others are read in the other byte order, so that Pillow keeps the low bytes.
    grey_alpha = data[25] == 4
    again = Image.open(BytesIO(data), formats=("PNG",))
    again.tile = [(*again.tile[0][:3], "RGBA" if grey_alpha else f"{image.mode};16L")]  # type: ignore[list-item]
    for (rows, high), (_, low) in zip(_bands(image), _bands(again), strict=True):
        yield rows, low.view(">u2") if grey_alpha else high.astype(np.uint16) << 8 | low


def _with_channels(image: Image.Image, in_chans: int) -> Image.Image:
    mode = _MODES[in_chans]
    if in_chans != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, (ALPHA_BACKGROUND,) * 3)
        opaque.paste(image, mask=image.getchannel("A"))  # per channel round((a * x + (255 - a) * 255) / 255)
        image = opaque
    return image if image.mode == mode else image.convert(mode)
