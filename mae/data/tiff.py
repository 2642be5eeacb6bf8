"""TIFF files: what their tags say that they hold, as it is, or an error.

Pillow reads grey, RGB and other colours of 8 bits. All else is read by tifffile, the reference for scientific TIFF: any
number of bands, uint8, uint16, int16 and float32. No sample is taken for what the tags do not say that it is.
"""

import logging
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from mae.data import jpeg
from mae.data.bounds import MAX_DIRECTORIES, check_memory

MINISWHITE, MINISBLACK, RGB, PALETTE, CMYK, YCBCR, CIELAB = 0, 1, 2, 3, 5, 6, 8  # values of PhotometricInterpretation

UNSPECIFIED, ASSOCIATED, UNASSOCIATED = 0, 1, 2  # values of ExtraSamples

KINDS = {(1, 8): "uint8", (1, 16): "uint16", (2, 16): "int16", (3, 32): "float32"}  # by SampleFormat and BitsPerSample

FORMATS = {1: "uint", 2: "int", 3: "float", 4: "undefined ", 5: "complex int", 6: "complex"}

# Compressions that Pillow reads, first those with which it follows a predictor.
PREDICTED = {5, 8, 32946, 34925, 50000}  # LZW, deflate, LZMA, zstd
BY_PILLOW = PREDICTED | {1, 2, 3, 4, 6, 7, 32773}  # none, CCITT, JPEG, PackBits

JPEG = 7  # compression

STREAMS: dict[int, Any] = {8: zlib.decompressobj, 32946: zlib.decompressobj, 34925: lzma.LZMADecompressor}

SMALL_STRIP = 1 << 17  # compressed bytes, of which deflate makes 135 MB at most

ORIENTATION, INK_SET, GDAL_NODATA = 274, 332, 42113  # tags


def read(data: bytes, in_chans: int) -> np.ndarray | None:
    """The samples of the first page of a TIFF file.

    With `in_chans` 1, 3 or 4, grey and RGB pictures of unsigned samples, with alpha or without, are converted as those
    of other formats are. Everything else must have exactly `in_chans` bands.

    Returns:
        (in_chans, H, W) uint8, uint16, int16 or float32; None for a picture of 8 bits that Pillow reads.

    Raises:
        Exception: The file is damaged, or holds something else; of many types, with the reason.
    """
    with _opened(data) as file:
        page: Any = file.pages.first
        if _is_stack(file):
            raise ValueError(
                "is a stack of pages of one size, and one image a file is read: save each page as a file, or all as "
                "the bands of one page (planarconfig='separate' in tifffile)"
            )
        height, width, bands = int(page.imagelength), int(page.imagewidth), int(page.samplesperpixel)
        if min(height, width, bands) < 1:
            raise ValueError(f"{width} x {height} pixels of {bands} bands")
        if page.compression == JPEG:
            _check_jpegs(page, data)
        kind = KINDS.get((page.sampleformat, page.bitspersample))
        if _for_pillow(page, kind, bands, in_chans):
            return None
        check_memory(height, width, 2 * bands * (np.dtype(kind).itemsize if kind else 1))
        if kind is None:
            name = f"{FORMATS.get(page.sampleformat, 'unknown ')}{page.bitspersample}"
            hint = "; save it as float32" if name == "float64" else ""
            raise ValueError(f"holds {name}, wanted uint8, uint16, int16 or float32{hint}")
        if page.photometric not in (MINISWHITE, MINISBLACK, RGB) or page.imagedepth != 1:
            raise ValueError(f"holds {_photometric(page)} of {kind}: wanted is grey, RGB or any bands")
        alpha = _alpha(page, bands)
        picture = alpha is not None and kind.startswith("u") and in_chans in (1, 3, 4)
        if not picture and bands != in_chans:
            raise ValueError(f"{_described(page, bands, kind)}: --data.in_chans {bands} takes them as they are")
        inverted = page.photometric == MINISWHITE
        if inverted and not (picture and bands == 1):
            raise ValueError(f"holds {bands} bands of {kind} of which 0 is white: save them with 0 as black")
        samples = upright(_samples(page, data), page.tags.valueof(ORIENTATION, 1))
    if inverted:
        samples = np.iinfo(samples.dtype).max - samples
    if alpha is not None and picture and (bands != in_chans or alpha == ASSOCIATED):
        converted = np.empty((in_chans, *samples.shape[1:]), samples.dtype)
        step = max(1, 2**18 // samples.shape[2])
        for top in range(0, samples.shape[1], step):  # in bands, as it takes several times their memory
            converted[:, top : top + step] = as_picture(samples[:, top : top + step], in_chans, alpha)
        return converted
    return np.ascontiguousarray(samples) if min(samples.strides) < 0 else samples


def frames(data: bytes) -> int:
    """The number of images in a TIFF file, without masks and copies at reduced size."""
    with _opened(data) as file:
        return 1 + sum(not (page.is_reduced or page.is_mask) for page in _further_pages(file))


@contextmanager
def _opened(data: bytes) -> Iterator[tifffile.TiffFile]:
    """A TIFF file that is being read; what tifffile logs meanwhile is dropped."""
    logger, silence = logging.getLogger("tifffile"), _Silence()
    logger.addFilter(silence)
    try:
        with tifffile.TiffFile(BytesIO(data), is_ndpi=False, is_scanimage=False) as file:
            yield file
    finally:
        logger.removeFilter(silence)


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False


def _further_pages(file: tifffile.TiffFile) -> Iterator[Any]:
    seen = {file.pages.first.offset}
    for page in islice(iter(file.pages), 1, MAX_DIRECTORIES):
        if page.offset in seen:
            raise ValueError("file is damaged: its pages go in a circle")
        seen.add(page.offset)
        yield page


def _is_stack(file: tifffile.TiffFile) -> bool:
    """Whether there are more images of the first page's size."""
    first: Any = file.pages.first
    size = first.imagelength, first.imagewidth
    for page in _further_pages(file):
        if (page.imagelength, page.imagewidth) == size and not (page.is_reduced or page.is_mask):
            return True
    # ImageJ and tifffile may describe a whole stack in its first page.
    if first.is_imagej and (found := re.search(r"^images=(\d+)", first.imagej_description, re.MULTILINE)):
        return int(found[1]) > 1
    if first.is_shaped and (found := re.search(r'"shape": \[([\d, ]+)\]', first.shaped_description)):
        return math.prod(map(int, found[1].split(","))) > math.prod(first.shape)
    return False


def _for_pillow(page: Any, kind: str | None, bands: int, in_chans: int) -> bool:
    """Whether Pillow reads the page as its tags say.

    Raises:
        ValueError: It is a picture of other colours than grey and RGB, and of a kind that is not read.
    """
    unsigned, bits = page.sampleformat == 1, page.bitspersample
    followed = page.compression in (PREDICTED if page.predictor != 1 else BY_PILLOW)
    if page.photometric in (PALETTE, CMYK, YCBCR, CIELAB):
        colours = {PALETTE: 1, CMYK: 4}.get(page.photometric, 3)
        alpha = page.photometric == PALETTE and tuple(page.extrasamples) == (UNASSOCIATED,)
        narrow = bits == 8 or (page.photometric == PALETTE and bits in (1, 2, 4))
        inks = page.tags.valueof(INK_SET, 1) == 1 or page.photometric != CMYK
        if not (unsigned and narrow and inks and bands == colours + alpha and followed) or in_chans not in (1, 3, 4):
            raise ValueError(
                f"holds {_photometric(page)} of {bands} bands and {bits} bits, compression {page.compression}: read "
                "with 8 bits, without extra samples, and as 1, 3 or 4 channels"
            )
        return True
    if in_chans not in (1, 3, 4) or not unsigned or not followed:
        return False
    if bits in (1, 2, 4):
        return bands == 1 and page.photometric in (MINISWHITE, MINISBLACK)
    alpha = _alpha(page, bands)
    if kind != "uint8" or page.photometric not in (MINISWHITE, MINISBLACK, RGB) or alpha is None:
        return False
    # Pillow reads planar grey with alpha wrongly, and cannot convert grey with associated alpha.
    return not alpha or (page.planarconfig == 1 and (page.photometric == RGB or alpha == UNASSOCIATED))


def _alpha(page: Any, bands: int) -> int | None:
    """ExtraSamples of the alpha of a grey or RGB picture, UNSPECIFIED if it has none; None for other bands."""
    extra = bands - (3 if page.photometric == RGB else 1)
    if extra == 0:
        return UNSPECIFIED
    kinds = tuple(page.extrasamples)
    return kinds[0] if extra == 1 and kinds in ((ASSOCIATED,), (UNASSOCIATED,)) else None


def _photometric(page: Any) -> str:
    return str(getattr(page.photometric, "name", page.photometric))


def _described(page: Any, bands: int, kind: str) -> str:
    names = {UNSPECIFIED: "unspecified", ASSOCIATED: "associated alpha", UNASSOCIATED: "unassociated alpha"}
    extra = [names.get(value, str(int(value))) for value in page.extrasamples]
    if len(extra) > 2:
        extra = [f"{len(extra)} extra samples"]
    what = " and ".join(["RGB" if page.photometric == RGB else "grey", *extra])
    return f"holds {bands} band{'s' * (bands > 1)} of {kind} ({what})"


def _samples(page: Any, data: bytes) -> np.ndarray:
    """(bands, H, W) of a page, in the type of its tags."""
    offsets, counts, expected = page.dataoffsets, page.databytecounts, math.prod(page.chunked)
    if min(len(offsets), len(counts)) < expected:
        raise ValueError(f"file is damaged: {min(len(offsets), len(counts))} of its {expected} strips or tiles")
    if not (all(offsets[:expected]) and all(counts[:expected])):
        raise ValueError("some of its strips or tiles have no data (a sparse file): fill them first")
    if any(offset + count > len(data) for offset, count in zip(offsets, counts, strict=False)):
        raise ValueError("file is truncated")
    if page.is_tiled and math.prod(page.tile) > 2**24 + 4 * page.imagelength * page.imagewidth:
        raise ValueError(f"tiles of {page.tile} pixels in an image of {page.imagelength} x {page.imagewidth}")
    if find_spec("imagecodecs") is None:
        _check_expansion(page, data)
    try:
        samples = page.asarray(maxworkers=1)
    except (ValueError, NotImplementedError) as error:
        if "imagecodecs" not in str(error):
            raise
        if page.shape != page.shape[:2] or page.dtype != np.uint16:
            raise ValueError(
                f"compression {_name(page.compression)}, predictor {_name(page.predictor)} need the package "
                "imagecodecs: pip install 'vit-mae-lightning[tiff]'"
            ) from None
        samples = np.array(Image.open(BytesIO(data), formats=("TIFF",)))
    samples = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    if samples.ndim == 2:
        samples = samples[None]
    elif page.planarconfig == 1:
        samples = samples.transpose(2, 0, 1)
    if samples.shape != (page.samplesperpixel, page.imagelength, page.imagewidth):
        raise ValueError(f"file is damaged: {samples.shape} samples")
    _check_data(samples, page.tags.valueof(GDAL_NODATA))
    return samples


def _check_expansion(page: Any, data: bytes) -> None:
    """Refuse strips that hold more than their tags say, which Python's own libraries would decompress to the end."""
    if page.compression in STREAMS:
        most = math.prod(page.chunks) * page.dtype.itemsize
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
            if count > SMALL_STRIP:
                made = STREAMS[page.compression]().decompress(data[offset : offset + count], most + 1)
                if len(made) > most:
                    raise ValueError(f"file is damaged: a strip or tile holds over {most:,} bytes")


def _check_jpegs(page: Any, data: bytes) -> None:
    """Refuse strips or tiles that lack data, which libtiff and Pillow fill up with grey."""
    tables = page.jpegtables or b"\xff\xd8\xff\xd9"
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        part = tables[:-2] + data[offset + 2 : offset + count]
        jpeg.check_whole(part, "CMYK" if page.samplesperpixel == 4 else "GRAY")


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))


def _check_data(samples: np.ndarray, nodata: Any) -> None:
    """Refuse signed samples that the file itself declares as missing: as numbers they would drown the others."""
    if nodata is None or samples.dtype.kind == "u":
        return
    try:
        value = float(nodata)
    except (TypeError, ValueError):
        return
    with np.errstate(over="ignore"):
        if count := int((samples == np.float64(value).astype(np.float32)).sum()):
            raise ValueError(f"{count} samples are the file's no-data value {value:g}: fill them first")


def upright(samples: np.ndarray, orientation: Any) -> np.ndarray:
    """(C, H, W) as it is to be seen, by the TIFF tag Orientation (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        samples = samples.transpose(0, 2, 1)
    if orientation in (2, 3, 6, 7):
        samples = samples[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        samples = samples[:, ::-1]
    return samples


def as_picture(samples: np.ndarray, in_chans: int, alpha: int) -> np.ndarray:
    """Grey or RGB as 1, 3 or 4 channels, as Pillow does for 8 bits: alpha laid on white, grey by ITU-R 601.

    Args:
        samples: (C, H, W) uint8 or uint16: grey or RGB, and perhaps alpha.
        in_chans: 1 grey, 3 RGB, 4 RGB and unassociated alpha.
        alpha: The kind of the alpha: UNSPECIFIED if there is none, ASSOCIATED or UNASSOCIATED.
    """
    top = np.iinfo(samples.dtype).max
    wide = samples.astype(np.uint32)  # holds the product of two samples
    colours, opacity = (wide[:-1], wide[-1:]) if alpha else (wide, np.full_like(wide[:1], top))
    if in_chans == 4:
        if alpha == ASSOCIATED:
            colours = np.minimum(top, (colours * top + opacity // 2) // np.maximum(opacity, 1))
        colours = np.broadcast_to(colours, (3, *colours.shape[1:]))
        return np.concatenate([colours, opacity]).astype(samples.dtype)
    if alpha == ASSOCIATED:
        colours = np.minimum(top, colours + top - opacity)
    elif alpha == UNASSOCIATED:
        colours = (colours * opacity + (top - opacity) * top + top // 2) // top
    if in_chans == 1 and len(colours) == 3:
        red, green, blue = colours
        colours = (red * 19595 + green * 38470 + blue * 7471 + 0x8000 >> 16)[None]
    return np.broadcast_to(colours, (in_chans, *colours.shape[1:])).astype(samples.dtype)
