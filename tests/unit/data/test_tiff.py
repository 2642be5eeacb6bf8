"""TIFF: every kind of file is read to tifffile's values or refused by name; nothing is taken for something else."""

import itertools
from collections import Counter
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from mae.data import decode, tiff
from mae.data.decode import BadImage, open_image

BANDS = (1, 2, 3, 4, 5, 13)
KINDS = ("uint8", "uint16", "int16", "float32")
EXTRA = {"unspecified": 0, "assocalpha": 1, "unassalpha": 2}


def samples_of(kind: str, bands: int, size: int = 8, seed: int = 0) -> np.ndarray:
    """(H, W, bands) of the whole range, of float32 with fractions and negative values."""
    rng = np.random.default_rng(seed)
    if kind == "float32":
        return rng.normal(0, 1000, (size, size, bands)).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min, info.max + 1, (size, size, bands)).astype(kind)


def written(samples: np.ndarray, planar: bool = False, **options: Any) -> bytes:
    """A TIFF file of one page, (H, W, bands) samples."""
    stream = BytesIO()
    samples = samples[..., 0] if samples.shape[2] == 1 else samples.transpose(2, 0, 1) if planar else samples
    if samples.ndim == 3:
        options["planarconfig"] = "separate" if planar else "contig"
    tifffile.imwrite(stream, np.ascontiguousarray(samples), **options)
    return stream.getvalue()


def stored(pixels: torch.Tensor, kind: str) -> np.ndarray:
    """(H, W, bands) in the type of the file, from decoded pixels."""
    array = pixels.permute(1, 2, 0).numpy()
    return (array.astype(np.int32) - 32768).astype(np.int16) if kind == "int16" else array


def bad(data: bytes, in_chans: int = 3) -> str:
    with pytest.raises(BadImage) as caught:
        open_image(data, "x.tif", in_chans)
    message = str(caught.value)
    assert message.startswith("x.tif: ")
    assert len(message.splitlines()) == 1
    return message


def cells() -> list[tuple[Any, ...]]:
    """Every combination of the matrix that TIFF can hold."""
    compressions = ("none", "lzw", "deflate")
    axes = (BANDS, KINDS, (False, True), compressions, ("rgb", "minisblack"), EXTRA)
    found = []
    for bands, kind, planar, compression, photometric, extra in itertools.product(*axes):
        colours = 3 if photometric == "rgb" else 1
        if bands < colours or (bands == 1 and planar) or (bands == colours and extra != "unspecified"):
            continue
        found.append((bands, kind, planar, compression, photometric, extra))
    return found


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_every_cell_of_the_matrix_is_tifffiles_values_or_refused_by_name(step: int) -> None:
    pytest.importorskip("imagecodecs")
    outcomes = Counter[str]()
    for cell in cells()[::step]:
        bands, kind, planar, compression, photometric, extra = cell
        samples, colours = samples_of(kind, bands), 3 if photometric == "rgb" else 1
        samples[samples == 0] = 1  # associated alpha of 0 has no colour
        extras = [extra, *["unspecified"] * (bands - colours - 1)] if bands > colours else None
        data = written(samples, planar, compression=compression, photometric=photometric, extrasamples=extras)
        alpha = bands - colours == 1 and extra != "unspecified"
        for in_chans in {1, 3, 4, bands}:
            picture = (bands == colours or alpha) and kind.startswith("u") and in_chans in (1, 3, 4)
            if not picture and bands != in_chans:
                assert f"holds {bands} band" in (message := bad(data, in_chans)), cell
                assert f"{kind} (" in message, cell
                assert f"--data.in_chans {bands}" in message, cell
                outcomes["refused"] += 1
                continue
            opened = open_image(data, "x.tif", in_chans)
            assert opened.kind == kind, cell
            pixels = stored(opened.pixels(), kind)
            if bands == in_chans and not (alpha and extra == "assocalpha" and picture):
                np.testing.assert_array_equal(pixels, samples, str(cell))
                np.testing.assert_array_equal(np.squeeze(stored(opened.pixels(), kind)), imread(data, planar, bands))
                outcomes["as stored"] += 1
            else:
                difference = np.abs(pixels.astype(int) - as_defined(samples, colours, EXTRA[extra] * alpha, in_chans))
                assert difference.max() <= (1 if kind == "uint8" or in_chans == 1 else 0), cell
                outcomes["converted"] += 1
    assert len(cells()) == 612
    if step == 1:
        assert outcomes == {"as stored": 600, "converted": 168, "refused": 1428}
    assert min(outcomes.values()) > 20  # or the sample says little


def imread(data: bytes, planar: bool, bands: int) -> np.ndarray:
    array = tifffile.imread(BytesIO(data))
    return array.transpose(1, 2, 0) if planar and bands > 1 else array


def as_defined(samples: np.ndarray, colours: int, alpha: int, in_chans: int) -> np.ndarray:
    """What a picture with alpha is as grey, RGB or RGBA, in floating point."""
    top = np.iinfo(samples.dtype).max
    values = samples[..., :colours].astype(float)
    opacity = samples[..., colours:].astype(float) if alpha else np.full_like(values[..., :1], top)
    if in_chans == 4:
        if alpha == EXTRA["assocalpha"]:
            values = np.minimum(top, values * top / opacity)
        result = np.concatenate([values.repeat(3 // colours, axis=2), opacity], axis=2)
    else:
        if alpha == EXTRA["assocalpha"]:
            values = np.minimum(top, values + top - opacity)
        elif alpha:
            values = (values * opacity + (top - opacity) * top) / top
        if in_chans == 1 and colours == 3:
            values = values @ np.array([0.299, 0.587, 0.114])[:, None]
        result = values.repeat(in_chans // values.shape[2], axis=2)
    return np.floor(result + 0.5).astype(int)


# --- files that were read as something else


def test_a_fourth_band_is_not_dropped() -> None:
    """Pillow's RGBX: the fourth band was replaced by 255."""
    samples = samples_of("uint8", 4)
    data = written(samples, photometric="rgb", extrasamples=["unspecified"])
    assert "holds 4 bands of uint8 (RGB and unspecified): --data.in_chans 4 takes them as they are" in bad(data)
    np.testing.assert_array_equal(stored(open_image(data, "x.tif", 4).pixels(), "uint8"), samples)


def test_five_bands_are_not_cut_to_three() -> None:
    data = written(samples_of("uint8", 5), photometric="rgb", extrasamples=["unspecified"] * 2)
    assert "holds 5 bands of uint8 (RGB and unspecified and unspecified)" in bad(data)
    assert bad(data, 4).endswith("--data.in_chans 5 takes them as they are")


@pytest.mark.parametrize("kind", ["int8", "uint32", "int32", "float64", "complex64", "float16"])
def test_types_that_are_not_read_are_named(kind: str) -> None:
    data = written((samples_of("uint8", 1) // 4).astype(kind), photometric="minisblack")
    assert ("complex64" if kind == "complex64" else f"holds {kind}, wanted uint8, uint16, int16 or") in bad(data, 1)


def test_16_bits_are_kept() -> None:
    """Pillow keeps the high byte of RGB."""
    samples = np.full((4, 5, 3), 511, np.uint16)
    data = written(samples, photometric="rgb")
    assert (open_image(data, "x.tif").pixels().int() == 511).all()
    grey = written(samples[..., :1], photometric="minisblack")
    assert (open_image(grey, "x.tif", 3).pixels().int() == 511).all()
    assert (open_image(written(samples[..., :1], photometric="miniswhite"), "x.tif", 1).pixels().int() == 65024).all()


def test_12_packed_bits_are_refused() -> None:
    """Pillow takes 4095 for a sixteenth of white."""
    pytest.importorskip("imagecodecs")
    data = written(np.full((4, 6, 1), 4095, np.uint16), photometric="minisblack", bitspersample=12)
    assert "holds uint12" in bad(data, 1)


def test_a_predictor_is_followed_or_named() -> None:
    """Pillow ignores it where the compression is PackBits."""
    pytest.importorskip("imagecodecs")
    samples = samples_of("uint8", 3)
    data = written(samples, photometric="rgb", compression="packbits", predictor=True)
    np.testing.assert_array_equal(stored(open_image(data, "x.tif").pixels(), "uint8"), samples)


def pages(*shapes: tuple[int, ...], **options: Any) -> bytes:
    stream = BytesIO()
    with tifffile.TiffWriter(stream) as file:
        for i, shape in enumerate(shapes):
            file.write(np.full(shape, i, np.uint16), photometric="minisblack", **(options if i else {}))
    return stream.getvalue()


def test_a_stack_is_not_cut_to_its_first_page() -> None:
    assert "is a stack of 3 pages" in bad(pages((8, 8), (8, 8), (8, 8)), 1)
    assert "is a stack of 3 pages" in bad(pages((8, 8), (8, 8), (8, 8)), 3)
    for options in ({"imagej": True}, {"metadata": {"axes": "ZYX"}, "truncate": True}):
        stream = BytesIO()
        tifffile.imwrite(stream, np.zeros((5, 8, 8), np.uint8), photometric="minisblack", **options)
        assert "is a stack of 5 pages" in bad(stream.getvalue(), 1)
    for data in (pages((8, 8), (8, 8), subfiletype=1), pages((8, 8), (4, 4), subfiletype=1), pages((8, 8), (4, 4))):
        assert open_image(data, "x.tif", 1).pixels().shape == (1, 8, 8)
    assert [tiff.frames(data) for data in (pages((8, 8), (4, 4), subfiletype=1), pages((8, 8), (4, 4)))] == [1, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_to_other_images(orientation: int) -> None:
    samples, tag = samples_of("uint8", 3)[:5], [(tiff.ORIENTATION, 3, 1, orientation, True)]
    eight_bits = open_image(written(samples, photometric="rgb", extratags=tag), "x.tif")
    sixteen = open_image(written(samples.astype(np.uint16), photometric="rgb", extratags=tag), "x.tif")
    assert torch.equal(eight_bits.pixels().int(), sixteen.pixels().int())
    assert (eight_bits.decoder, sixteen.decoder) == ("Pillow", "tifffile")
    assert (sixteen.height, sixteen.width) == ((5, 8) if orientation < 5 else (8, 5))


def test_what_has_no_data_must_be_filled_first() -> None:
    samples = samples_of("float32", 2)
    samples[0, 0] = np.nan, -np.inf
    assert "2 samples are NaN or infinite" in bad(written(samples, photometric="minisblack"), 2)
    samples[0, 0], samples[1, 1, 0] = 5, -9999
    declared = {"photometric": "minisblack", "extratags": [(tiff.GDAL_NODATA, 2, 0, "-9999", True)]}
    assert "1 samples are the file's no-data value -9999: fill them first" in bad(written(samples, **declared), 2)
    samples[1, 1, 0] = 0
    assert open_image(written(samples, **declared), "x.tif", 2).kind == "float32"


def test_what_is_claimed_and_missing_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(samples_of("uint16", 3), photometric="rgb", rowsperstrip=2)
    with tifffile.TiffFile(BytesIO(data)) as file:
        tags = {name: file.pages.first.tags[name] for name in ("ImageWidth", "ImageLength", "StripByteCounts")}

    def changed(name: str, value: int, at: int = 0) -> bytes:
        tag = tags[name]
        size = {3: 2, 4: 4}[tag.dtype]
        place = tag.valueoffset + at * size
        return data[:place] + value.to_bytes(size, "little") + data[place + size :]

    for name in ("ImageWidth", "ImageLength"):
        assert "over the limit" in bad(changed(name, 0xFFFF if tags[name].dtype == 3 else 0x7FFFFFFF))
    assert "sparse" in bad(changed("StripByteCounts", 0, at=1))
    assert "truncated" in bad(changed("StripByteCounts", 9999, at=3))
    for keep in range(8, len(data) - 1, 7):
        bad(data[:keep])
    monkeypatch.setattr(decode, "MAX_BYTES", 8 * 8 * 3 * 2 - 1)
    assert "8 x 8 pixels of 384 bytes in all, over the limit of 383" in bad(data)


def test_a_compression_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("imagecodecs")
    samples, grey = samples_of("float32", 3), samples_of("uint16", 1)
    wanting = [
        written(samples, photometric="minisblack", **options)
        for options in ({"compression": "lzw"}, {"compression": "deflate", "predictor": 3})
    ]
    data = written(grey, photometric="minisblack", compression="lzw")
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", _imagecodecs)
    for name, codecs in (("DECOMPRESSORS", "CompressionCodec"), ("UNPREDICTORS", "PredictorCodec")):
        monkeypatch.setattr(tifffile.TIFF, name, getattr(tifffile.tifffile, codecs)(encode=False))
    for file in wanting:
        assert "need the package imagecodecs: pip install 'vit-mae-lightning[tiff]'" in bad(file)
    # Grey of 16 bits is then read by Pillow, as ever.
    np.testing.assert_array_equal(stored(open_image(data, "x.tif", 1).pixels(), "uint16"), grey)
    assert open_image(written(samples, photometric="minisblack", compression="deflate"), "x.tif").kind == "float32"
