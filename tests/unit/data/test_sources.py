"""The same samples from wherever the images come, and whoever loads them."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae.data.crops import batched_resized_crop, random_crop_box, resized_crop
from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.prepare import pack
from mae.data.sampling import EpochSampler
from mae.errors import UserError

KINDS = ("folder", "tar", "shards", "resident")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """48 photograph-like JPEG and PNG images of one size, of two classes: as a folder, a tar file and shards."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = root / "folder" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        picture = coarse.resize((48, 40), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i:03d}.{'png' if i % 5 == 0 else 'jpg'}", quality=90)
    with tarfile.open(root / "images.tar", "w") as tar:
        tar.add(root / "folder", arcname=".")
    pack.pack_command([str(root / "folder"), str(root / "shards"), "--shard_mb=0.02", "--num_workers=0"])
    return {"folder": root / "folder", "tar": root / "images.tar", "shards": root / "shards"}


def batches(places: dict[str, Path], kind: str, workers: int = 0, world: int = 1, **settings: object) -> list[Batch]:
    """The global batches of two epochs, joined over the ranks."""
    root = places["folder" if kind == "resident" else kind]
    ranks = []
    for rank in range(world):
        data = ImageData(
            root=str(root), image_size=32, batch_size_per_device=12 // world, num_workers=workers, seed=3,
            device_resident=kind == "resident", **settings,
        )  # fmt: skip
        data.setup("fit")
        data.train_sampler = lambda data=data, rank=rank: EpochSampler(  # type: ignore[method-assign]
            len(data.train_source), data.batch_size, 1, rank, world, data.seed
        )
        loader = data.train_dataloader()
        ranks.append([])
        for epoch in (0, 1):
            loader.sampler.seek(epoch * loader.sampler.steps_per_epoch)  # type: ignore[attr-defined]
            ranks[-1] += list(loader)
    return [
        Batch(*(torch.cat(parts) for parts in zip(*(b[:6] for b in step), strict=True)), [], {})
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def wanted(places: dict[str, Path]) -> list[Batch]:
    return batches(places, "folder")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_samples(
    places: dict[str, Path], wanted: list[Batch], kind: str, workers: int, world: int
) -> None:
    found = batches(places, kind, workers, world)
    assert len(found) == len(wanted) == 8
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[1:6], theirs[1:6], strict=True))
        difference = (ours.images.int() - theirs.images.int()).abs()
        if kind == "resident":
            assert difference.float().mean() <= 0.1
            assert difference.max() <= 2
        else:
            assert not difference.any()


def test_batched_crops_are_within_two_levels_of_single_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    for height, width, size in ((32, 32, (32, 32)), (90, 61, (32, 48)), (20, 30, (64, 64))):
        images = torch.randint(0, 256, (40, 3, height, width), dtype=torch.uint8, generator=draw)
        boxes = [random_crop_box(draw, height, width) for _ in images]
        single = torch.stack([resized_crop(image, box, size) for image, box in zip(images, boxes, strict=True)])
        batched = batched_resized_crop(images, torch.tensor(boxes), size)
        assert batched.dtype == torch.uint8
        difference = (single.int() - batched.int()).abs()
        assert difference.float().mean() < 0.1
        assert difference.max() <= 2


def test_a_box_of_the_wanted_size_is_cut_out_of_the_batch() -> None:
    images = torch.arange(2 * 6 * 6, dtype=torch.uint8).view(2, 1, 6, 6)
    boxes = torch.tensor([[0, 1, 4, 3], [2, 3, 4, 3]])
    assert torch.equal(batched_resized_crop(images, boxes, (4, 3))[1], images[1, :, 2:6, 3:6])


def test_resident_images_must_be_of_one_size_and_augmented_on_the_device(
    places: dict[str, Path], tmp_path: Path
) -> None:
    for name, size in (("a", (8, 8)), ("b", (8, 9))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    data = ImageData(root=str(tmp_path), batch_size_per_device=2, num_workers=0, device_resident=True)
    data.setup("fit")
    with pytest.raises(UserError, match=r"one size: .*b\.png is \(3, 9, 8\)"):
        data.train_dataloader()
    data.distort = lambda image: image
    with pytest.raises(UserError, match=r"--data.auto_augment null"):
        data.train_dataloader()


def test_resident_images_that_do_not_fit(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae.data.datamodule.free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"needs 0.0 GiB on cpu"):
        batches(places, "resident")


def test_an_unreadable_resident_image_keeps_its_slot(places: dict[str, Path], tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (50 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    data = ImageData(root=str(tmp_path), batch_size_per_device=4, num_workers=0, device_resident=True, image_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.weight.tolist() == [float(index != 2) for index in batch.indices.tolist()]
    assert [Path(error.path).name for error in batch.errors] == ["2.png"]


def test_reduced_decoding_has_an_effect_only_where_it_is_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg")
    found = {}
    for scaling in (False, True):
        data = ImageData(
            root=str(tmp_path), image_size=32, batch_size_per_device=4, num_workers=0, jpeg_scaling=scaling
        )
        data.setup("fit")
        found[scaling] = next(iter(data.train_dataloader())).images.float()
        said = data.augmentations()[0]
        assert ("levels off" in said) == scaling
        assert data.settings()["data.jpeg_scaling"] is scaling
    difference = (found[True] - found[False]).abs().mean()
    assert 0 < difference < 4
    assert f"({data.scaling_difference():.2f} of 255 levels off)" in said
    assert data.scaling_difference() > 0.1
    for settings in ({"device_resident": True}, {"dataset": "digits"}):
        with pytest.raises(UserError, match=r"--data.jpeg_scaling true has no effect"):
            ImageData(root=str(tmp_path), jpeg_scaling=True, **settings)  # type: ignore[arg-type]
