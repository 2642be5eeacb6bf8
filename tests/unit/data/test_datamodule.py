"""Sources of images and the LightningDataModule."""

import gzip
import multiprocessing.process
import pickle
import struct
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_images
from PIL import Image

from mae.data.crops import FixedCrop
from mae.data.datamodule import ImageData
from mae.data.datasets import LONGEST_TMPDIR
from mae.data.labelled import FinetuneData, LabelledData
from mae.data.prepare.stats import channel_statistics
from mae.data.sampling import EpochSampler, generator
from mae.data.sources import load_digits
from mae.errors import UserError


def folder(root: Path, **settings: object) -> ImageData:
    data = ImageData(root=str(root), image_size=8, num_workers=0, batch_size_per_device=4, **settings)  # type: ignore[arg-type]
    data.load()
    return data


def test_class_folders(image_folder: Path) -> None:
    data = folder(image_folder)
    train, val = data.require_labels()
    assert (len(train), len(val), train.classes) == (16, 8, ["cat", "dog"])
    assert train.labels == [0] * 8 + [1] * 8
    batch = next(iter(data.train_dataloader()))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.labels.tolist() == [train.labels[i] for i in batch.indices]


def test_split_folders_have_the_names_that_settings_give(image_folder: Path) -> None:
    (image_folder / "val").rename(image_folder / "test")
    (image_folder / "train").rename(image_folder / "fit")
    data = folder(image_folder, train_dir="fit", val_dir="test")
    assert [len(source) for source in data.require_labels()] == [16, 8]
    with pytest.raises(UserError, match="holdout does not exist"):
        folder(image_folder, train_dir="fit", val_dir="holdout")


def test_flat_folder_without_labels(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 3)
    save_images(tmp_path, 3)
    data = folder(tmp_path)
    assert data.train_source is not None
    assert (len(data.train_source), data.train_source.labels, data.val_source) == (6, None, None)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).labels.tolist() == [-1] * 4
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match="needs labelled images as train/CLASS"):
        data.require_labels()


def test_classes_without_held_out_images_can_be_divided(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save_images(tmp_path / name, 5)
    with pytest.raises(UserError, match=r"as val/CLASS/\*: .*, or hold out a fifth of its images: --data.holdout 0.2$"):
        LabelledData(root=str(tmp_path), image_size=8).require_labels()
    train, val = LabelledData(root=str(tmp_path), image_size=8, holdout=0.2).require_labels()
    assert (len(train), len(val)) == (8, 2)


def test_images_without_labels_can_be_held_out(tmp_path: Path) -> None:
    save_images(tmp_path, 10)
    data = ImageData(root=str(tmp_path), image_size=8, num_workers=0, batch_size_per_device=2, holdout=0.2)
    data.setup("fit")
    assert data.train_source is not None
    assert data.val_source is not None
    kept, held_out = ({source.name(i) for i in range(len(source))} for source in (data.train_source, data.val_source))
    assert (len(kept), len(held_out), kept & held_out) == (8, 2, set())
    assert data.settings()["data.holdout"] == 0.2
    assert len(next(iter(data.train_dataloader())).images) == 2


def test_unlabelled_train_folder_with_held_out_images(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 5)
    save_images(tmp_path / "val", 2)
    data = folder(tmp_path)
    assert data.val_source is not None
    assert len(data.val_source) == 2


def test_wrong_folders_are_named(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        folder(tmp_path / "empty")
    save_images(image_folder / "val" / "bird", 1)
    with pytest.raises(UserError, match=r"held-out images have a class that .*train lacks: bird"):
        folder(image_folder)


def test_held_out_labels_are_numbered_as_the_training_ones(image_folder: Path) -> None:
    import shutil

    shutil.rmtree(image_folder / "val" / "cat")
    assert folder(image_folder).require_labels()[1].labels == [1] * 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_of_thirteen_channels(tmp_path: Path, dtype: type) -> None:
    full = np.iinfo(dtype).max
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.full((8, 8, 13), full * i // 3, dtype))
    data = ImageData(
        root=str(tmp_path), in_chans=13, mean=[0.5] * 13, std=[0.25] * 13, num_workers=0, image_size=8,
        batch_size_per_device=4,
    )  # fmt: skip
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.dtype == (torch.uint8 if dtype is np.uint8 else torch.uint16)
    values = data.prepare(batch).images.mean(dim=(1, 2, 3))
    expected = (batch.indices / 3 - 0.5) / 0.25
    assert torch.allclose(values, expected, atol=0.02)


def test_other_numbers_of_channels_need_their_statistics(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((8, 8, 5), np.uint8))
    data = ImageData(root=str(tmp_path), in_chans=5)
    with pytest.raises(UserError, match=r"--data.mean and --data.std are needed for 5 channels"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"--data.mean has 3 values for 5 channels"):
        ImageData(root=str(tmp_path), in_chans=5, mean=[0, 0, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_pct": 0.0}, r"--data\.crop_pct 0\.0: it must be above 0 and at most 1"),
        ({"hflip": 1.5}, r"--data\.hflip 1\.5: it must be at least 0 and at most 1"),
        ({"max_bad_images": -1}, r"--data\.max_bad_images -1: it must be at least 0"),
        ({"num_workers": -1}, r"--data\.num_workers -1: "),
        ({"batch_size_per_device": 0}, r"--data\.batch_size_per_device 0: it must be at least 1"),
        ({"image_size": (0, 8)}, r"--data\.image_size \(0, 8\): "),
        ({"in_chans": 0}, r"--data\.in_chans 0: "),
        ({"std": [0.2, 0.0, 0.2]}, r"--data\.std \[0\.2, 0\.0, 0\.2\]: it must be above 0"),
        ({"crop_scale": (0.5, 0.2)}, r"--data\.crop_scale \[0\.5, 0\.2\]: .*smallest <= largest"),
    ],
)
def test_settings_outside_their_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageData(**settings)  # type: ignore[arg-type]


def test_flip_and_normalisation_happen_on_the_batch(image_folder: Path) -> None:
    data = folder(image_folder, crop_scale=None)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batch = batch._replace(flip=torch.tensor([True, False, True, False]))
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    plain = (batch.images / 255 - mean) / std
    assert torch.allclose(data.prepare(batch).images[1], plain[1], atol=1e-6)
    assert torch.allclose(data.prepare(batch).images[0], plain[0].flip(2), atol=1e-6)


def test_settings_of_the_augmentation_have_an_effect(image_folder: Path) -> None:
    def first(**settings: object):
        data = folder(image_folder, **settings)
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    usual = first()
    assert not torch.equal(usual.images, first(crop_scale=(0.9, 1.0)).images)
    assert not torch.equal(usual.images, first(crop_scale=None).images)
    assert not first(hflip=0.0).flip.any()
    assert first(hflip=1.0).flip.all()
    assert not torch.equal(usual.indices, first(seed=1).indices)


def test_digits_are_split_by_a_fixed_rule() -> None:
    train, val = load_digits()
    assert (len(train), len(val)) == (4000, 1000)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(val.labels).tolist() == [100] * 10
    assert train.images.shape[1:] == (1, 28, 28)
    assert not {i.numpy().tobytes() for i in train.images} & {i.numpy().tobytes() for i in val.images}


def test_statistics_of_the_digits_are_the_defaults() -> None:
    data = ImageData("digits", num_workers=0, batch_size_per_device=500)
    mean, std = channel_statistics(data)
    assert mean == pytest.approx(data.mean, abs=5e-4)
    assert std == pytest.approx(data.std, abs=5e-4)


def test_statistics_of_known_pixels(tmp_path: Path) -> None:
    for i, level in enumerate((0, 255, 0, 255)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / f"{i}.png")
    mean, std = channel_statistics(folder(tmp_path, in_chans=1))
    assert mean == pytest.approx([0.5])
    assert std == pytest.approx([0.5])


def test_cifar10_from_an_archive_of_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    draw = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        blob = pickle.dumps(content)
        (base / name).write_bytes(blob)
        return hashlib.md5(blob).hexdigest()

    def images(count: int) -> dict[str, object]:
        pixels = draw.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": draw.integers(0, 10, count).tolist()}

    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", write(f"data_batch_{i}", images(6))] for i in (1, 2)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", write("test_batch", images(4))]])
    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as archive:
        archive.add(base, CIFAR10.base_folder)

    data = ImageData("cifar10", str(tmp_path), num_workers=0, batch_size_per_device=4)
    train, val = data.require_labels()
    assert (len(train), len(val), train.classes[3]) == (12, 4, "class 3")
    assert train.open(0).pixels().shape == (3, 32, 32)
    data.setup("fit")
    assert next(iter(data.train_dataloader())).images.dtype == torch.uint8


def test_missing_torchvision_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar10 in .*--data.download true"):
        ImageData("cifar10", str(tmp_path)).load()


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
@pytest.mark.slow
def test_fashion_mnist_files_of_debian(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in FASHION.iterdir():
        raw.joinpath(path.name.removesuffix(".gz")).write_bytes(
            gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        )
    data = ImageData("fashion_mnist", str(tmp_path), num_workers=0)
    train, val = data.require_labels()
    assert (len(train), len(val), train.classes[9]) == (60000, 10000, "Ankle boot")
    mean, std = channel_statistics(data)
    assert mean == pytest.approx(data.mean, abs=5e-4)
    assert std == pytest.approx(data.std, abs=5e-4)


def test_fashion_mnist_from_files_of_its_format(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 12), ("t10k", 4)):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + bytes(range(count)))
    train, val = ImageData("fashion_mnist", str(tmp_path)).require_labels()
    assert train.open(0).pixels()[0, 0, :3].tolist() == [0, 1, 2]
    assert val.labels == [0, 1, 2, 3]


def test_a_folder_for_temporary_files_that_is_too_long_for_sockets(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * LONGEST_TMPDIR)
    data = folder(image_folder)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    data.num_workers = 1
    with pytest.raises(UserError, match="set TMPDIR to a shorter path"):
        data.train_dataloader()
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        long = Path(short) / ("x" * (LONGEST_TMPDIR - len(short) - 1))
        long.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(long))
        monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)  # it remembers one
        assert len(next(iter(data.train_dataloader())).images) == 4  # the longest that will do


def test_an_epoch_is_whole_steps_only(image_folder: Path) -> None:
    data = folder(image_folder)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, EpochSampler)
    assert len(loader) == 4
    data.batch_size = 5
    assert len(data.train_dataloader()) == 3
    data.batch_size = 17
    with pytest.raises(UserError, match="16 images are fewer than one optimiser step's 17"):
        data.train_dataloader()


def test_a_crop_of_fixed_size(image_folder: Path) -> None:
    """The same size in every image, which is 3/4 of the largest crop's side, at places all over the image."""
    data = folder(image_folder, crop_side=0.75)
    assert isinstance(data.crop, FixedCrop)
    boxes = {data.crop.box(generator(0, 0, index, "augment"), 40, 24) for index in range(3000)}
    assert {box[2:] for box in boxes} == {(18, 18)}
    assert {box[:2] for box in boxes} == {(top, left) for top in range(23) for left in range(7)}
    assert "random crop of 0.75 of the side" in data.augmentations()[0]
    data.setup("fit")
    same = folder(image_folder, crop_side=1.0, crop_scale=None, hflip=0.0)
    centred = folder(image_folder, crop_scale=None, hflip=0.0)
    keys = [(0, index) for index in range(8)]
    made = [each.samples(each.train_source)[keys].images for each in (data, same, centred)]
    assert not torch.equal(made[0], made[2])
    assert made[1].shape == made[2].shape


def test_colour_jitter_follows_from_seed_epoch_and_index(image_folder: Path) -> None:
    plain, data = folder(image_folder), folder(image_folder, color_jitter=0.4)
    jittered = data.samples(data.train_source)
    both, alone = jittered[[(1, 3), (2, 3)]].images, jittered[[(2, 3)]].images
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[:1], both[1:])
    assert not torch.equal(both, plain.samples(plain.train_source)[[(1, 3), (2, 3)]].images)
    with pytest.raises(UserError, match=r"--data\.color_jitter 0\.4 is for 1 or 3 channels, not 4"):
        folder(image_folder, color_jitter=0.4, in_chans=4, mean=[0.5] * 4, std=[0.5] * 4)
    with pytest.raises(UserError, match=r"color_jitter and --data\.auto_augment exclude each other"):
        FinetuneData(root=str(image_folder), image_size=8, color_jitter=0.4)


def test_first_crops_are_those_of_the_first_epoch(image_folder: Path) -> None:
    data = folder(image_folder)
    (crops,) = data.first_crops(8)
    batch = data.prepare(data.samples(data.train_source)[[(0, index) for index in range(0, 16, 2)]])
    assert torch.equal(crops, batch.images)
