"""Labels: few of them, held-out parts, classes that cannot be; and the strong augmentation of fine-tuning."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_images
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from mae.data.crops import random_crop_box, single_draw_box
from mae.data.datamodule import ImageData
from mae.data.datasets import TrainSamples
from mae.data.labelled import FinetuneData, LabelledData, ProbeData, RandAugment, check_classes
from mae.data.sampling import generator
from mae.data.sources import ArraySource, Subset
from mae.errors import UserError


def digits(**settings: object) -> LabelledData:
    data = LabelledData(dataset="digits", num_workers=0, **settings)
    data.load()
    return data


def names(data: LabelledData) -> list[str]:
    assert data.train_source is not None
    return [data.train_source.name(i) for i in range(len(data.train_source))]


def test_shares_and_counts_are_of_each_class_and_nested() -> None:
    one, ten = digits(label_fraction=0.01), digits(label_fraction=0.1)
    assert np.bincount(one.train_source.labels).tolist() == [4] * 10  # type: ignore[union-attr, arg-type]
    assert np.bincount(ten.train_source.labels).tolist() == [40] * 10  # type: ignore[union-attr, arg-type]
    assert set(names(one)) < set(names(ten))
    assert names(digits(labels_per_class=4)) == names(one)
    assert len(digits(labels_per_class=1).train_source) == 10  # type: ignore[arg-type]
    assert len(digits(label_fraction=0.0001).train_source) == 10  # type: ignore[arg-type]  # at least one each
    assert one.train_source.open(3).pixels().equal(one.train_source.source.open(int(names(one)[3])).pixels())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seed", "digest"),
    [(0, "c0120dfb33ec"), (1, "f35f2e72d324")],
)
def test_published_splits(seed: int, digest: str) -> None:
    # These never change: results with few labels compare only on the same images.
    text = "\n".join(names(digits(label_fraction=0.1, subset_seed=seed)))
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)


def test_a_list_of_names_is_the_training_set(image_folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("cat/001.png\ncat/004.png\ndog/002.png\n")
    data = LabelledData(root=str(image_folder), subset_file=str(listed), num_workers=0)
    data.load()
    assert names(data) == ["cat/001.png", "cat/004.png", "dog/002.png"]
    assert data.train_source.labels == [0, 0, 1]  # type: ignore[union-attr]
    for content, message in (("cat/001.png\n", "no image of class dog"), ("cat/999.png\n", "names 'cat/999.png'")):
        listed.write_text(content)
        with pytest.raises(UserError, match=message):
            LabelledData(root=str(image_folder), subset_file=str(listed)).load()
    listed.write_text("003.png\ncat/001.png\ndog/001.png\n")
    with pytest.raises(UserError, match=r"names '003.png', which is cat/003.png and dog/003.png: give paths"):
        LabelledData(root=str(image_folder), subset_file=str(listed)).load()
    listed.write_text("own.png\ncat/001.png\n")  # a bare name that is of one image only
    (image_folder / "train" / "dog" / "000.png").rename(image_folder / "train" / "dog" / "own.png")
    data = LabelledData(root=str(image_folder), subset_file=str(listed))
    data.load()
    assert names(data) == ["cat/001.png", "dog/own.png"]
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read"):
        LabelledData(root=str(image_folder), subset_file="nowhere.txt").load()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--data.subset_file .*pipe cannot be read: it is a pipe or device"):
        LabelledData(root=str(image_folder), subset_file=str(tmp_path / "pipe")).load()


def test_a_held_out_part_is_apart_and_the_test_images_are_not_in_it() -> None:
    data = digits(holdout=0.25)
    assert isinstance(data.val_source, Subset)
    held_out = {data.val_source.name(i) for i in range(len(data.val_source))}
    assert len(held_out) == 1000
    assert not held_out & set(names(data))
    assert np.bincount(data.val_source.labels).tolist() == [100] * 10  # type: ignore[arg-type]
    assert len(names(data)) == 3000
    before = ImageData("digits", holdout=0.25)
    before.load()
    assert isinstance(before.val_source, Subset)
    assert before.val_source.indices == data.val_source.indices  # pre-training leaves out the very same images
    few = digits(holdout=0.25, labels_per_class=8)
    assert (len(few.train_source), len(few.val_source)) == (60, 20)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="class 0 has 1 training image: none can be held out"):
        digits(holdout=0.25, labels_per_class=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_fraction": 0.0}, "label_fraction 0.0"),
        ({"label_fraction": 0.1, "labels_per_class": 3}, "exclude each other"),
        ({"labels_per_class": 0}, "labels_per_class 0"),
        ({"labels_per_class": 401}, "class 0 has 400 images"),
        ({"holdout": 1.0}, "holdout 1.0"),
    ],
)
def test_splits_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        digits(**settings)


def test_classes_with_no_or_one_image_and_labels_outside(image_folder: Path) -> None:
    def loaded() -> None:
        LabelledData(root=str(image_folder)).load()

    (image_folder / "train" / "bird").mkdir()
    with pytest.raises(UserError, match="training folder bird/ holds no image"):
        loaded()
    save_images(image_folder / "train" / "bird", 1)
    with pytest.raises(UserError, match="class bird has 1 training image: at least 2"):
        loaded()
    save_images(image_folder / "train" / "bird", 2)
    loaded()
    (image_folder / "val" / "bird").mkdir()  # as without it: a class that has no held-out image
    loaded()
    (image_folder / "val" / "bat").mkdir()
    with pytest.raises(UserError, match="held-out folder bat/ holds no image"):
        loaded()
    source = ArraySource(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 7], ["a", "b"])
    with pytest.raises(UserError, match="label 7, outside the 2 classes"):
        check_classes(source, "training")


def test_unlabelled_images_are_refused(tmp_path: Path) -> None:
    save_images(tmp_path / "train", 3)
    with pytest.raises(UserError, match="training images have no labels"):
        LabelledData(root=str(tmp_path)).load()


def test_the_single_draw_is_cut_to_the_image_and_never_tried_again() -> None:
    boxes = [single_draw_box(generator(0, 0, i, "augment"), 100, 300) for i in range(4000)]
    for top, left, height, width in boxes:
        assert 0 < height <= 100
        assert 0 < width <= 300
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 300 - width
    # A third or more of this image's area at a ratio of at most 4/3 is always too high, so its full height is kept:
    # drawn again, as the usual crop is, such boxes would not come up.
    full = sum(height == 100 for _, _, height, _ in boxes) / len(boxes)
    assert 0.60 < full < 0.85
    shares = [height * width / 30000 for _, _, height, width in boxes]
    assert min(shares) < 0.1
    # 100 x 133 of 100 x 300 is the most that the usual crop takes.
    usual = [random_crop_box(generator(0, 0, i, "augment"), 100, 300, (0.08, 1)) for i in range(4000)]
    assert max(height * width for _, _, height, width in usual) <= 100 * 134
    assert max(shares) > 0.6


def test_the_probe_draws_once_and_fine_tuning_does_not() -> None:
    assert (
        ProbeData(dataset="digits").augmentations()[0]
        == "random resized crop 0.08 to 1 of the area, drawn once, bicubic"
    )
    assert "once" not in FinetuneData(dataset="digits", auto_augment=None).augmentations()[0]


def test_randaugment_is_timms_with_the_arguments_of_the_recipe() -> None:
    mean = (0.485, 0.456, 0.406)
    whole = create_transform(
        224, is_training=True, color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=mean, std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    theirs = next(t for t in whole.transforms if type(t).__name__ == "RandAugment")
    ours = RandAugment("rand-m9-mstd0.5-inc1", 224, mean)
    assert [op.name for op in ours.transform.ops] == [op.name for op in theirs.ops]
    for mine, other in zip(ours.transform.ops, theirs.ops, strict=True):
        assert (mine.magnitude, mine.magnitude_std, mine.prob, mine.hparams) == (
            other.magnitude,
            other.magnitude_std,
            other.prob,
            other.hparams,
        )
    image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
    for seed in range(5):
        random.seed(seed)
        np.random.seed(seed)
        mine = ours(image)
        random.seed(seed)
        np.random.seed(seed)
        try:
            wanted = np.array(theirs(Image.fromarray(image.permute(1, 2, 0).numpy())))
        except ValueError:  # newer Pillow does not posterize to 0 bits
            continue
        assert np.array_equal(mine.permute(1, 2, 0).numpy(), wanted), seed


def test_posterize_to_no_bits_is_black() -> None:
    ours = RandAugment("rand-m9-mstd0.5-inc1", 32, (0.5, 0.5, 0.5))
    posterize = next(op for op in ours.transform.ops if op.name == "PosterizeIncreasing")
    image = Image.fromarray(np.full((4, 4, 3), 200, dtype=np.uint8))
    assert not np.array(posterize.aug_fn(image, 0)).any()
    assert np.array(posterize.aug_fn(image, 1)).max() == 128


def rgb(count: int = 8) -> ArraySource:
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArraySource(pixels, [i % 2 for i in range(count)], ["a", "b"])


def finetune_data(**settings: object) -> FinetuneData:
    data = FinetuneData(**{"dataset": "cifar10", "num_workers": 0, "seed": 3, **settings})
    data.train_source = rgb()
    return data


def test_augmented_samples_hang_on_seed_epoch_and_index_alone() -> None:
    data = finetune_data()
    samples = data.samples(rgb())
    one = data.prepare(samples[[(2, 5), (2, 6), (3, 5)]]).images
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(data.prepare(samples[[(2, 6)]]).images[0], one[1])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    data.prepare(samples[[(2, 5)]])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not torch.equal(one[0], one[2])
    assert not torch.equal(finetune_data(seed=4).samples(rgb())[[(2, 5)]].images, samples[[(2, 5)]].images)


def test_settings_of_the_augmentation_have_an_effect() -> None:
    def batch(**settings: object) -> torch.Tensor:
        data = finetune_data(**settings)
        return data.prepare(data.samples(rgb())[[(0, i) for i in range(8)]]).images

    plain = batch(auto_augment=None, erase_prob=0)
    assert not torch.equal(batch(auto_augment="rand-m9-mstd0.5-inc1", erase_prob=0), plain)
    erased = batch(auto_augment=None, erase_prob=1)
    changed = (erased != plain).any(dim=1).float().mean(dim=(1, 2))
    assert changed.min() > 0
    assert changed.max() < 0.5  # boxes of up to a third
    # With noise, not with a constant: erased pixels differ from one another.
    assert erased[erased != plain].unique().numel() > 100


def test_erasing_is_timms_on_normalised_images_and_spares_held_out_ones() -> None:
    data = finetune_data(auto_augment=None, erase_prob=1)
    assert isinstance(data.erasing, RandomErasing)
    data.val_source = rgb()
    batch = next(iter(data.val_dataloader()))  # type: ignore[arg-type]
    plain = finetune_data(auto_augment=None, erase_prob=0)
    assert torch.equal(data.prepare(batch).images, plain.prepare(batch).images)


def test_flips_come_before_randaugment() -> None:
    seen = []

    def spy(image: torch.Tensor) -> torch.Tensor:
        seen.append(image.clone())
        return image

    source = rgb(1)
    samples = TrainSamples(source, (32, 32), 3, 0, None, 1.0, spy)
    batch = samples[[(0, 0)]]
    assert torch.equal(seen[0], source.open(0).pixels().flip(2))
    assert not batch.flip.any()  # not a second time on the device


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "digits"}, "auto_augment rand-m9-mstd0.5-inc1 is for RGB images, these have 1 channels"),
        ({"auto_augment": "nonsense"}, "'nonsense' is not RandAugment as timm writes it"),
        ({"erase_prob": 1.5}, "erase_prob 1.5"),
    ],
)
def test_augmentation_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune_data(**settings)
