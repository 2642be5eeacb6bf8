"""TIFF: every kind of file is read to tifffile's values or refused by name; nothing is taken for something else."""

import gc
import itertools
import json
import os
import random
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY
from PIL import Image
from tifffile import _imagecodecs

from mae.cli import main
from mae.data import bounds, tiff
from mae.data.channel_stats import as_text
from mae.data.crops import resized_crop
from mae.data.datamodule import ImageData
from mae.data.decode import BadImage, open_image
from mae.data.labelled import FinetuneData
from mae.data.prepare.stats import channel_statistics
from mae.errors import UserError

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
    assert "is a stack of pages" in bad(pages((8, 8), (8, 8), (8, 8)), 1)
    assert "is a stack of pages" in bad(pages((8, 8), (8, 8), (8, 8)), 3)
    for options in ({"imagej": True}, {"metadata": {"axes": "ZYX"}, "truncate": True}):
        stream = BytesIO()
        tifffile.imwrite(stream, np.zeros((5, 8, 8), np.uint8), photometric="minisblack", **options)
        assert "is a stack of pages" in bad(stream.getvalue(), 1)
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
    monkeypatch.setattr(bounds, "MAX_MEMORY", 8 * 8 * 12 - 1)
    assert "8 x 8 pixels take 768 bytes to decode, over the limit of 767" in bad(data)


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


# --- damaged files


def npy(samples: np.ndarray) -> bytes:
    stream = BytesIO()
    np.save(stream, samples)
    return stream.getvalue()


def seeds() -> dict[str, bytes]:
    """Files of every kind, small, to be damaged; by the suffix and a name."""
    many = {"photometric": "minisblack"}
    tiled = {"tile": (16, 16), "compression": "deflate", "predictor": True}
    return {
        ".tif bands": written(samples_of("uint16", 5), **many),
        ".tif planar": written(samples_of("int16", 4), planar=True, compression="deflate", rowsperstrip=3, **many),
        ".tif tiled": written(samples_of("float32", 3, 40), photometric="rgb", **tiled),
        ".tif alpha": written(
            samples_of("uint16", 4), photometric="rgb", extrasamples=["assocalpha"], compression="lzma"
        ),
        ".tif grey": written(samples_of("uint8", 1), bigtiff=True, byteorder=">", **many),
        ".tif rgb": written(samples_of("uint8", 3), photometric="rgb", compression="packbits"),
        ".tif pages": pages((8, 8), (4, 4)),
        ".tif nodata": written(samples_of("float32", 2), extratags=[(tiff.GDAL_NODATA, 2, 0, "-9999", True)], **many),
        ".npy float32": npy(samples_of("float32", 3)),
        ".npy int16": npy(samples_of("int16", 3)),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four random damages, most of them to numbers of the structure."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(found)) if found else 0
        match rng.randrange(6):
            case 0:
                found[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del found[at:]
            case 2:
                del found[at : at + rng.randint(1, 12)]
            case 3:
                found[at:at] = rng.randbytes(rng.randint(1, 12))
            case _:  # a number of 16 or 32 bits, small or huge
                value = rng.choice((0, 1, 2, 3, 8, 32, 64, 255, 32773, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(1 << 32)))
                size = rng.choice((2, 4))
                found[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
    return bytes(found)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_give_samples_or_a_bad_image(count: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing else is raised, printed, left open, or larger than the file can hold."""
    files, outcomes = seeds(), Counter[str]()
    fitting = dict(zip(files, (5, 4, 3, 4, 1, 3, 1, 2, 3, 3), strict=True))  # bands
    gc.collect()  # as in test_jpeg.py
    descriptors = len(os.listdir("/proc/self/fd"))
    for seed in range(count):
        rng = random.Random(seed)
        name = rng.choice(list(files))
        data = damaged(files[name], rng)
        try:
            pixels = open_image(data, f"x{name.split()[0]}", fitting[name]).pixels()
        except BadImage:
            outcomes["bad"] += 1
            continue
        assert pixels.numel() <= 2**26, seed
        assert not pixels.is_floating_point() or pixels.isfinite().all(), seed
        outcomes["read"] += 1
    assert min(outcomes.values()) > count / 20  # or it says little
    assert len(os.listdir("/proc/self/fd")) == descriptors
    printed = capfd.readouterr()  # libtiff, in Pillow, prints its warnings
    assert printed.out == ""
    assert "tifffile" not in printed.err
    assert "Warning" not in printed.err


# --- from files to batches


def folder(root: Path, kind: str, bands: int, count: int = 6, size: int = 24, **options: Any) -> Path:
    root.mkdir(parents=True)
    for i in range(count):
        data = written(samples_of(kind, bands, size, seed=i), photometric="minisblack", **options)
        (root / f"{i}.tif").write_bytes(data)
    return root


def data_of(root: Path, bands: int, **settings: Any) -> ImageData:
    return ImageData(
        **{"root": str(root), "in_chans": bands, "image_size": 16, "num_workers": 0, "batch_size_per_device": 6}
        | settings
    )


def test_float32_reaches_the_network_in_its_own_units(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", "float32", 13)
    files = [samples_of("float32", 13, 24, seed=i) for i in range(6)]
    mean, std = channel_statistics(data_of(root, 13))
    whole = np.stack(files).reshape(-1, 13).astype(np.float64)
    np.testing.assert_allclose((mean, std), (whole.mean(axis=0), whole.std(axis=0)), rtol=1e-6)

    data = data_of(root, 13, mean=mean, std=std)
    data.setup("fit")
    assert data.train_source is not None
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    (batch,) = data.whole(data.train_source)
    for file, image in zip(files, data.prepare(batch).images, strict=True):
        pixels = resized_crop(torch.from_numpy(file).permute(2, 0, 1), (0, 0, 24, 24), (16, 16))
        torch.testing.assert_close(image, (pixels - shift) / scale)
    samples = data.samples(data.train_source)
    batch = samples[[(0, i) for i in range(6)]]
    flips, boxes = zip(*(samples.draw((0, i), 24, 24) for i in range(6)), strict=True)
    for file, flip, box, image in zip(files, flips, boxes, data.prepare(batch).images, strict=True):
        pixels = resized_crop(torch.from_numpy(file).permute(2, 0, 1), box, (16, 16))
        torch.testing.assert_close(image, ((pixels.flip(2) if flip else pixels) - shift) / scale)
    assert batch.images.abs().max() > 2000


def test_types_of_other_scales_are_kept_apart(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", "float32", 3)
    Image.fromarray(samples_of("uint8", 3)).save(root / "3.png")
    (root / "4.tif").write_bytes(b"II*\0")
    data = data_of(root, 3, mean=[0] * 3, std=[1] * 3, batch_size_per_device=9)
    data.load()
    assert data.train_source is not None
    batch = data.samples(data.train_source)[[(0, i) for i in (3, 5, 0)]]
    assert str(batch.errors[0]) == (
        f"{root}/3.png: holds uint8 among images of float32, which have another scale: keep them apart"
    )
    assert batch.images.dtype == torch.float32
    assert (batch.images[:2] == 0).all()
    assert batch.weight.tolist() == [0, 0, 1]
    (batch,) = data.whole(data.train_source)
    assert (len(batch.errors), len(batch.images)) == (2, 5)
    # uint8 and uint16 have one scale.
    root = folder(tmp_path / "wide", "uint16", 3, count=1)
    Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).save(root / "9.png")
    (batch,) = data_of(root, 3).whole(data_of(root, 3).sources()[0])
    assert (batch.images.dtype, int(batch.images[1].int().min())) == (torch.uint16, 65535)


@pytest.mark.parametrize("kind", ["int16", "float32"])
def test_imagenets_statistics_are_not_assumed_for_signed_samples(tmp_path: Path, kind: str) -> None:
    root = folder(tmp_path / "images", kind, 3)
    with pytest.raises(UserError, match=f"the images hold {kind} .*set --data.mean and --data.std; `mae stats`"):
        data_of(root, 3).setup("fit")
    data_of(root, 3, mean=[0] * 3, std=[1] * 3).setup("fit")
    folder(tmp_path / "both" / "train", kind, 3)
    folder(tmp_path / "both" / "val", "uint16", 3)
    with pytest.raises(UserError, match=f"the training images hold {kind}, the held-out ones uint16"):
        data_of(tmp_path / "both", 3, mean=[0] * 3, std=[1] * 3).setup("fit")


def test_randaugment_is_for_8_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image_size": 16, "num_workers": 0, "batch_size_per_device": 2}
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder(root / split / name, "uint16", 3)
    with pytest.raises(UserError, match=r"--data.auto_augment is for images of 8 bits, these hold uint16: set it"):
        FinetuneData(root=str(root), **settings).setup("fit")
    data = FinetuneData(root=str(root), auto_augment=None, **settings)
    data.setup("fit")
    assert data.train_source is not None
    assert data.samples(data.train_source)[[(0, 0)]].images.dtype == torch.uint16
    Image.fromarray(samples_of("uint8", 3)).save(root / "train" / "a" / "0.png")  # now the first one
    data = FinetuneData(root=str(root), **settings)
    data.setup("fit")
    assert data.train_source is not None
    (error,) = data.samples(data.train_source)[[(0, 0), (0, 1)]].errors
    assert "0.tif: holds uint16, but RandAugment is for 8 bits: --data.auto_augment null" in str(error)


def test_small_figures_keep_their_digits() -> None:
    assert as_text([0.0512, 0.00123456, 0.0, -300.5]) == "0.0512, 0.001235, 0.0000, -300.5000"


# --- commands


def doctor(root: Path, tmp_path: Path, *args: str) -> dict[str, tuple[int, list[str]]]:
    """Count and names of each finding, by what follows the count."""
    assert main(["doctor", str(root), "--num_workers=0", f"--json={tmp_path / 'figures.json'}", *args]) == 0
    findings = json.loads((tmp_path / "figures.json").read_text())["findings"]
    return {finding["what"].split(" ", 1)[1]: (finding["count"], finding["names"]) for finding in findings}


def test_doctor_tells_of_what_scales_badly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(3):
        samples = samples_of("uint16", 3, 40, seed=i) % 4096
        samples[..., 1] = 77
        (root / f"{i}.tif").write_bytes(written(samples, photometric="rgb"))
    frames = [Image.fromarray(samples_of("uint8", 3, 40, seed=i)) for i in range(2)]
    found = doctor(root, tmp_path)
    assert found == {
        "channel of std 0 in train": (1, ["1 (always 0.001175)"]),
        "images in train with 12-bit values in 16 bits: the largest is 4,095": (3, ["0.tif", "1.tif", "2.tif"]),
    }
    assert " to 0.0625, 0.001175, 0.0625" in capsys.readouterr().out
    for suffix in ("gif", "png", "webp"):
        frames[0].save(root / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    (root / "sizes.tif").write_bytes(pages((40, 40), (32, 32)))
    count, names = doctor(root, tmp_path)["images in train with more than one frame or page"]
    assert (count, names) == (4, ["moving.gif", "moving.png", "moving.webp", "sizes.tif"])
    root = folder(tmp_path / "float", "float32", 2, count=2, size=40)
    assert doctor(root, tmp_path, "--in_chans=2") == {"images in train of float32": (2, ["0.tif", "1.tif"])}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_a_folder_of_13_bands_from_doctor_to_embed(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "images", kind, 13, count=8, size=40, planar=True, compression="deflate")
    found = doctor(root, tmp_path, "--in_chans=13")
    assert found == ({"images in train of float32": (8, [f"{i}.tif" for i in range(5)])} if kind == "float32" else {})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--data.mean ")]
    mean, std = (text.strip(" '") for text in line.removeprefix("--data.mean").split("--data.std"))
    assert main(["pack", str(root), str(tmp_path / "shards"), "--in_chans=13", "--num_workers=0"]) == 0
    assert main(["pack", str(root), str(tmp_path / "small"), "--in_chans=3", "--short_side=20"]) == 2
    rows = []
    for source in (root, tmp_path / "shards"):
        run, out = tmp_path / f"run_{source.name}", tmp_path / f"{source.name}.npz"
        settings = [f"--data.root={source}", "--data.in_chans=13", f"--data.mean={mean}", f"--data.std={std}"]
        settings += ["--data.image_size=14", "--data.batch_size_per_device=4", "--data.num_workers=0"]
        assert main(["pretrain", *TINY, *settings, "--trainer.max_steps=2", f"--run_dir={run}"]) == 0
        assert len(list((run / "reconstructions").glob("*.png"))) == 1
        args = [f"--encoder={run}", f"--data.root={source}", f"--out={out}", "--num_workers=0"]
        assert main(["embed", *args]) == 0
        with np.load(out) as file:
            rows.append(file["features"])
    assert rows[0].shape[0] == 8
    np.testing.assert_array_equal(rows[0], rows[1])
    picture = tmp_path / "picture.png"
    for command in ("reconstruct", "attention"):
        assert main([command, str(root / "0.tif"), f"--model={run}", f"--out={picture}"]) == 0
        with Image.open(picture) as image:
            assert np.asarray(image)[40:, :110].std() > 20  # the original, neither black nor white
