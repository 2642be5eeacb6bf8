"""From a file to pixels: find image files, decode them.

Pixels are (C, H, W) tensors, uint8 in [0, 255] or uint16 in [0, 65535]; nothing here normalises or makes floats.
"""

import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mae.data import jpeg
from mae.data.crops import Box, resized_crop
from mae.errors import UserError

IMAGE_SUFFIXES = frozenset(  # compared in lower case
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".npy")
)

MAX_PIXELS = 178_956_970  # per image, Pillow's own limit: 13,377 x 13,377. A header that claims more is refused unread

MAX_BYTES = 8 * MAX_PIXELS  # nothing compressed, 4 channels of 16 bits

ALPHA_BACKGROUND = 255  # white, in every channel: what shows through where an image is transparent


# The formats behind IMAGE_SUFFIXES and no other: Pillow goes by content, and a file named .jpg must not start, say,
# its Ghostscript reader. JPEG first, as the first to accept the content wins.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

_ORIENTATION_TAG = 0x0112

_UPRIGHT = {  # EXIF orientation -> what undoes it; 1 is upright already
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class BadImage(Exception):
    """A file that cannot be turned into the pixels asked for; `str()` is one line, "path: reason"."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # both in args, so that it survives pickling between processes
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        # A file name may hold line breaks, or bytes that are not UTF-8 and cannot be printed.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{self.path}: {' '.join(self.reason.split())}")


def find_images(root: str | Path) -> list[str]:
    """All image files below `root` at any depth, as POSIX paths relative to it, in code point order on every machine.

    Known by their suffix; hidden files and folders (.name) are left out. Links to folders are followed, except where
    they lead back into themselves; a dangling link to an image is listed, so that it is reported and not lost.
    A folder that cannot be read is a UserError.
    """
    root = Path(root)
    found = []
    # Each folder waits with the identities of the folders above it: a link to one of those would never end.
    stack: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while stack:
        folder, above = stack.pop()
        folder_id = _folder_id(root / folder)
        if folder_id in above:
            continue
        above |= {folder_id}
        prefix = f"{folder}/" if folder else ""
        for entry in _scan(root / folder):
            if is_dir(entry):
                stack.append((prefix + entry.name, above))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and (entry.is_symlink() or entry.is_file()):
                found.append(prefix + entry.name)
    return sorted(found)


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list the folder {folder}: {error.strerror}") from error


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Also of a link; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _folder_id(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    return status.st_dev, status.st_ino


class Picture:
    """One image: its size is known; its pixels may not have been decoded yet.

    Attributes:
        height, width: Of the image turned upright.
        decoder: Who made the pixels, for the log.
    """

    decoder = "memory"

    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels
        self.height, self.width = pixels.shape[1:]

    def pixels(self) -> Tensor:
        """(C, H, W) uint8, or uint16 where a `.npy` file holds that; the strides are the decoder's.

        Raises:
            BadImage: They cannot be decoded.
        """
        return self._pixels

    def resized_crop(self, box: Box, size: tuple[int, int], reduced: bool = False) -> Tensor:
        """As the function of this name, of the whole image's pixels.

        Args:
            reduced: Decode a JPEG's large boxes at a half, quarter or eighth of the size where that is still enough:
                faster, and not the same pixels.
        """
        return resized_crop(self.pixels(), box, size)


class PillowPicture(Picture):
    decoder = "Pillow"


class NpyPicture(Picture):
    decoder = "numpy"


class JpegPicture(Picture):
    """A JPEG for libjpeg-turbo, decoded when and as far as it is needed; by Pillow where that fails."""

    decoder = "libjpeg-turbo"

    def __init__(self, data: bytes, path: str | Path, header: jpeg.Header, in_chans: int) -> None:
        self.data, self.path, self.header, self.in_chans = data, path, header, in_chans
        self.height, self.width = header.height, header.width

    def pixels(self) -> Tensor:
        return self._decode(self.height, 1)

    def resized_crop(self, box: Box, size: tuple[int, int], reduced: bool = False) -> Tensor:
        top, left, height, width = box
        reduce = 1
        while reduced and reduce < 8 and height >= 2 * reduce * size[0] and width >= 2 * reduce * size[1]:
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
        with _told_as_bad_image(self.path):
            pixels = jpeg.decode(self.data, self.header, rows, reduce)
            whole = _open_with_pillow(self.data, self.path, self.in_chans) if pixels is None else None
        if whole is not None:
            self.decoder = whole.decoder
            size = -(-self.height // reduce), -(-self.width // reduce)
            return whole.resized_crop((0, 0, self.height, self.width), size)
        return torch.from_numpy(pixels).permute(2, 0, 1).expand(self.in_chans, -1, -1)


def decode_image(path: str | Path, in_chans: int = 3) -> Tensor:
    """Read one image file whole, or raise BadImage: never part of a picture, never a Pillow or system error.

    Args:
        path: An image file (known by its content) or a `.npy` file of shape (H, W, C), or (H, W) for one channel.
        in_chans: Channels wanted. Image files give 1 (grey), 3 (RGB) or 4 (RGB and alpha); with 1 and 3, transparent
            parts are laid on white. A `.npy` file must hold exactly this many, any number.

    Returns:
        As `Picture.pixels`.
    """
    return open_image(read_file(path), path, in_chans).pixels()


def read_file(path: str | Path) -> bytes:
    """The bytes of a file, or BadImage; more than any image needs are not read."""
    with _told_as_bad_image(path), open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(path, "not a file but a pipe or device")
        if size > MAX_BYTES:
            raise BadImage(path, f"{size} bytes, too many for an image of at most {MAX_PIXELS} pixels")
        return file.readall()


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for somebody to write


def open_image(data: bytes, path: str | Path, in_chans: int = 3) -> Picture:
    """An image from the bytes of its file; arguments and errors as for `decode_image`.

    Args:
        path: For messages; and its suffix tells `.npy` from all others, which are known by their content.
    """
    with _told_as_bad_image(path):
        return _open_image(data, path, in_chans)


@contextmanager
def _told_as_bad_image(path: str | Path) -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(path, f"not an image in a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # damaged files make Pillow raise nearly any type, from KeyError to MemoryError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _open_image(data: bytes, path: str | Path, in_chans: int) -> Picture:
    if not data:
        raise BadImage(path, "empty file")
    if os.path.splitext(path)[1].lower() == ".npy":
        return NpyPicture(_decode_npy(data, path, in_chans))
    if in_chans not in _MODES:
        raise BadImage(path, f"only .npy holds {in_chans} channels; an image file gives 1, 3 or 4")
    header = jpeg.read_header(data)
    if header is None:
        return _open_with_pillow(data, path, in_chans)
    _check_pixels(path, header.height, header.width)
    _check_end(data, path, "JPEG", header.data)
    # Grey from colour is Pillow's formula, and it alone knows of alpha.
    exact = (in_chans, header.channels) in ((3, 3), (3, 1), (1, 1))
    if not exact or (header.metadata and not _is_plain(_asked_of_pillow(BytesIO(data)))):
        return _open_with_pillow(data, path, in_chans)
    return JpegPicture(data, path, header, in_chans)


def _check_pixels(path: str | Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(path, f"{width} x {height} pixels, over the limit of {MAX_PIXELS}")


def _check_end(data: bytes, path: str | Path, kind: str, start: int) -> None:
    # A half-written file is often zeros to its full length. The JPEG and PNG decoders make pixels even of those.
    marker = _END_MARKERS.get(kind, b"")
    if not data.endswith(marker) and data.find(marker, start) < 0:
        raise BadImage(path, f"file is truncated: no end of the {kind} data")


def _decode_npy(data: bytes, path: str | Path, in_chans: int) -> Tensor:
    # The header by itself first: np.load would take the memory that it claims, before it finds the data missing.
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise BadImage(path, f"holds {dtype}, wanted uint8 or uint16")
    if len(shape) not in (2, 3) or 0 in shape or (*shape, 1)[2] != in_chans:
        raise BadImage(path, f"has shape {shape}, wanted (height, width, {in_chans})")
    _check_pixels(path, shape[0], shape[1])
    count = math.prod(shape)
    if len(data) - file.tell() < count * dtype.itemsize:
        raise BadImage(path, "file is truncated")
    flat = np.frombuffer(data, dtype, count, file.tell())
    array = flat.astype(dtype.newbyteorder("=")).reshape(shape, order="F" if fortran_order else "C")  # writable
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _asked_of_pillow(stream: BytesIO) -> Image.Image:
    """The image as far as its header."""
    # One narrow filter for the process, not catch_warnings for each image: entering and leaving that makes Python
    # forget which warnings it has shown, so any other library's "once" warning would come back at every image.
    if warnings.filters[:1] != [_PILLOW_WARNINGS]:  # not there yet, or a later filter hides it
        warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image.open(stream, formats=_FORMATS)


def _is_plain(image: Image.Image) -> bool:
    """Whether a JPEG file holds one image (not several, as MPO), upright."""
    return image.format == "JPEG" and _orientation(image) not in _UPRIGHT


def _open_with_pillow(data: bytes, path: str | Path, in_chans: int) -> Picture:
    stream = BytesIO(data)
    image = _asked_of_pillow(stream)
    _check_pixels(path, image.height, image.width)
    _check_end(data, path, image.format or "", stream.tell())
    image.load()  # raises on data that ends early: LOAD_TRUNCATED_IMAGES stays False

    # The official MAE pipeline (torchvision ImageFolder) leaves the orientation out and sees such photographs lying on
    # their side; we turn them upright. Hardly any ImageNet file has one.
    turn = _UPRIGHT.get(_orientation(image))
    image = _with_channels(_eight_bit(image, data), in_chans)
    if turn is not None:
        image = image.transpose(turn)

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return PillowPicture(pixels.view(image.height, image.width, in_chans).permute(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # of many types, as above
        return 1  # damaged EXIF does not make the pixels bad; some ImageNet files have it


def _eight_bit(image: Image.Image, data: bytes) -> Image.Image:
    """The same image in a mode of 8 bits a channel: 16-bit samples become round(x / 257), so 65535 becomes 255."""
    if image.format == "PNG" and data[24] == 16 and image.mode in ("RGB", "RGBA"):
        samples = _png_16_bit_colour(image, data)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        samples = np.asarray(image)[..., None]
    elif image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; save 8 or 16 bits a channel")
    else:
        return image

    channels = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")  # one grey or RGB value, in 16 bits, that stands for transparent
    if key is not None and channels.shape[2] in (1, 3):
        opaque = (samples != np.asarray(key)).any(axis=2, keepdims=True)
        channels = np.concatenate([channels, opaque.astype(np.uint8) * 255], axis=2)
    return Image.fromarray(channels.squeeze(2) if channels.shape[2] == 1 else channels)  # L, LA, RGB or RGBA


def _png_16_bit_colour(image: Image.Image, data: bytes) -> np.ndarray:
    """The samples of a 16-bit PNG with 2 to 4 channels, (H, W, C) uint16, of which Pillow keeps the high bytes."""
    # Read once more, by other rules. Grey and alpha (colour type 4, in the header) goes as four channels of 8 bits, so
    # that nothing is lost; the rest as if in the other byte order, so that what is kept is the low bytes.
    grey_alpha = data[25] == 4
    again = Image.open(BytesIO(data), formats=("PNG",))
    again.tile = [(*again.tile[0][:3], "RGBA" if grey_alpha else f"{image.mode};16L")]  # type: ignore[list-item]
    if grey_alpha:
        return np.frombuffer(again.tobytes(), ">u2").reshape(image.height, image.width, 2)
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(again).astype(np.uint16)


def _with_channels(image: Image.Image, in_chans: int) -> Image.Image:
    mode = _MODES[in_chans]
    if in_chans != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, (ALPHA_BACKGROUND,) * 3)
        opaque.paste(image, mask=image.getchannel("A"))  # per channel round((a * x + (255 - a) * 255) / 255)
        image = opaque
    return image if image.mode == mode else image.convert(mode)


def moments(pixels: Tensor) -> list[tuple[float, float]]:
    """Mean and mean square of each channel of (C, H, W) pixels, in [0, 1]; from whole numbers, so exact to rounding."""
    full, n = (255 if pixels.dtype == torch.uint8 else 65535), pixels[0].numel()
    found = []
    for channel in pixels:
        counts = torch.bincount(channel.flatten() if full == 255 else channel.flatten().int())
        levels = torch.arange(len(counts))
        total, squares = int((counts * levels).sum()), int((counts * levels * levels).sum())
        found.append((total / (n * full), squares / (n * full * full)))
    return found
