"""From a file to pixels: find image files, decode them, choose a box, crop and resize it.

Images are (C, H, W) tensors, uint8 in [0, 255] or uint16 in [0, 65535]; nothing here normalises or makes floats.
A box is (top, left, height, width) in whole pixels of the image as decoded, that is after its EXIF rotation.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mae.errors import UserError

Box = tuple[int, int, int, int]

IMAGE_SUFFIXES = frozenset(  # compared in lower case
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".npy")
)
MAX_PIXELS = 178_956_970  # per image, Pillow's own limit: 13,377 x 13,377. A header that claims more is refused unread
ALPHA_BACKGROUND = 255  # white, in every channel: what shows through where an image is transparent

# The formats behind IMAGE_SUFFIXES and no other: Pillow goes by content, and a file named .jpg must not start, say,
# its Ghostscript reader. JPEG first, as the first to accept the content wins.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
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
            if _is_dir(entry):
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


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _folder_id(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    return status.st_dev, status.st_ino


def decode_image(path: str | Path, in_chans: int = 3) -> Tensor:
    """Read one image file whole, or raise BadImage: never part of a picture, never a Pillow or system error.

    Args:
        path: An image file (known by its content) or a `.npy` file of shape (H, W, C), or (H, W) for one channel.
        in_chans: Channels wanted. Image files give 1 (grey), 3 (RGB) or 4 (RGB and alpha); with 1 and 3, transparent
            parts are laid on white. A `.npy` file must hold exactly this many, any number.

    Returns:
        (C, H, W) uint8, or uint16 where a `.npy` file holds that. The strides are the decoder's, mostly channel last.
    """
    try:
        if os.path.splitext(path)[1].lower() == ".npy":
            return _decode_npy(path, in_chans)
        return _decode_file(path, in_chans)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(path, f"not an image in a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # damaged files make Pillow raise nearly any type, from KeyError to MemoryError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _decode_npy(path: str | Path, in_chans: int) -> Tensor:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise BadImage(path, "empty file")
        # The header by itself first: np.load would take the memory that it claims, before it finds the data missing.
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if dtype.kind != "u" or dtype.itemsize > 2:
            raise BadImage(path, f"holds {dtype}, wanted uint8 or uint16")
        if len(shape) not in (2, 3) or 0 in shape or (*shape, 1)[2] != in_chans:
            raise BadImage(path, f"has shape {shape}, wanted (height, width, {in_chans})")
        if shape[0] * shape[1] > MAX_PIXELS:
            raise BadImage(path, f"{shape[1]} x {shape[0]} pixels, over the limit of {MAX_PIXELS}")
        count = math.prod(shape)
        if size - file.tell() < count * dtype.itemsize:
            raise BadImage(path, "file is truncated")
        flat = np.fromfile(file, dtype, count)
    array = flat.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F" if fortran_order else "C")
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _decode_file(path: str | Path, in_chans: int) -> Tensor:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise BadImage(path, "empty file")
        if size > 8 * MAX_PIXELS:  # more than the largest image needs with nothing compressed, 4 channels of 16 bits
            raise BadImage(path, f"{size} bytes, too many for an image of at most {MAX_PIXELS} pixels")
        data = file.read()
    if in_chans not in _MODES:
        raise BadImage(path, f"only .npy holds {in_chans} channels; an image file gives 1, 3 or 4")

    # One narrow filter for the process, not catch_warnings for each image: entering and leaving that makes Python
    # forget which warnings it has shown, so any other library's "once" warning would come back at every image.
    if warnings.filters[:1] != [_PILLOW_WARNINGS]:  # not there yet, or a later filter hides it
        warnings.filterwarnings("ignore", module=r"PIL\.")

    stream = BytesIO(data)
    image: Image.Image = Image.open(stream, formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(path, f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS}")
    # A half-written file is often zeros to its full length. The JPEG and PNG decoders make pixels even of those.
    marker = _END_MARKERS.get(image.format or "", b"")
    if not data.endswith(marker) and data.find(marker, stream.tell()) < 0:
        raise BadImage(path, f"file is truncated: no end of the {image.format} data")
    image.load()  # raises on data that ends early: LOAD_TRUNCATED_IMAGES stays False

    # The official MAE pipeline (torchvision ImageFolder) leaves the orientation out and sees such photographs lying on
    # their side; we turn them upright. Hardly any ImageNet file has one.
    turn = _UPRIGHT.get(_orientation(image))
    image = _with_channels(_eight_bit(image, data), in_chans)
    if turn is not None:
        image = image.transpose(turn)

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, in_chans).permute(2, 0, 1)


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


def resized_crop(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut `box` out of a (C, H, W) image and resize it to `size` (height, width), bicubic with antialiasing.

    The dtype stays, uint8 (within a level or, rarely, two of Pillow's crop and resize) or uint16 (through float32).
    The result is contiguous. A box that has the size already is cut out and not filtered.
    """
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    if (height, width) == size:
        return crop.contiguous()
    if crop.dtype == torch.uint16:  # bicubic overshoots, so it needs clamping; the uint8 kernel does that by itself
        return _bicubic(crop.float(), size).round_().clamp_(0, 65535).to(torch.uint16).contiguous()
    if crop.shape[0] > 4:  # beyond 4 channels torch takes a path about three times slower, to the same pixels
        return torch.cat([_bicubic(part, size) for part in torch.split(crop, 4)])
    return _bicubic(crop, size).contiguous()


def _bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]


def random_crop_box(
    generator: torch.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw the box of torchvision's RandomResizedCrop: an area, an aspect ratio, then a place.

    Takes 22 numbers from the (CPU) generator whatever happens, so what is drawn after it does not depend on the image.

    Args:
        scale: Smallest and largest area of the box, as fractions of the image's.
        ratio: Smallest and largest width / height of the box; uniform on a log scale.
    """
    draws = torch.rand(22, generator=generator, dtype=torch.float64).tolist()
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(draws[20] * (height - box_height + 1))
            left = int(draws[21] * (width - box_width + 1))
            return top, left, box_height, box_width

    # Ten misses, an image much longer than wide or the reverse: the largest central box whose ratio is allowed.
    box_height = min(height, round(width / ratio[0]))
    box_width = min(width, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def single_draw_box(
    generator: torch.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """As `random_crop_box`, but drawn once: a side that is too long is cut to the image's, whatever ratio that leaves.

    This is the crop of the official linear probe, after the TensorFlow pipeline; it keeps more large crops.
    """
    draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    aspect = math.exp(log_low + (log_high - log_low) * draws[1])
    box_height = max(1, min(height, round(math.sqrt(area / aspect))))
    box_width = max(1, min(width, round(math.sqrt(area * aspect))))
    return int(draws[2] * (height - box_height + 1)), int(draws[3] * (width - box_width + 1)), box_height, box_width


def center_box(height: int, width: int, size: tuple[int, int], crop_pct: float = 1.0) -> Box:
    """The part of a height x width image that evaluation looks at, to be resized to `size` (height, width).

    Stands for the usual two steps, resize until the image just covers size / crop_pct, then cut `size` out of the
    middle, with one resize and to the nearest whole pixel of the original. The official 256 -> 224 is crop_pct 0.875.

    Args:
        crop_pct: In (0, 1]; 1 keeps the whole of the side that limits.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is not in (0, 1]")
    step = crop_pct * min(height / size[0], width / size[1])  # pixels of the original per pixel of the result
    box_height, box_width = max(1, round(step * size[0])), max(1, round(step * size[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
