"""Labelled data for linear probing and fine-tuning: label subsets, held-out training images, strong augmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mae.data.crops import Crop
from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.sampling import seeded
from mae.data.sources import Source, by_class
from mae.errors import UserError
from mae.options import check_ranges, expand_home
from mae.runtime.reading import NAMES, read_regular
from mae.runtime.text import escaped


class LabelledData(ImageData):
    """Images with classes.

    Args:
        label_fraction: Train on this fraction of each class, such as 0.01 or 0.1, at least one image of each.
        labels_per_class: Train on this many images of each class.
        subset_file: Train on the images listed in this file, one per line: paths below the training folder, or file
            names (as in the published 1 % and 10 % lists of ImageNet).
        subset_seed: Seed of the choice by label_fraction or labels_per_class. With the same seed, a larger subset
            contains every smaller one.
    """

    single_draw = False

    def __init__(
        self,
        label_fraction: float | None = None,
        labels_per_class: int | None = None,
        subset_file: str | None = None,
        subset_seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if sum(value is not None for value in (label_fraction, labels_per_class, subset_file)) > 1:
            raise UserError("--data.label_fraction, labels_per_class and subset_file exclude each other")
        check_ranges("data", "(0, 1]", label_fraction=label_fraction)
        check_ranges("data", "[1, inf)", labels_per_class=labels_per_class)
        self.label_fraction, self.labels_per_class, self.subset_file = label_fraction, labels_per_class, subset_file
        self.subset_seed = subset_seed
        if isinstance(self.crop, Crop):
            self.crop = self.crop._replace(single_draw=self.single_draw)

    @property
    def classes(self) -> list[str]:
        self.load()
        assert self.train_source is not None
        return self.train_source.classes

    def divide(self) -> None:
        assert self.train_source is not None
        check_classes(self.train_source, "training")
        if self.val_source is not None:
            check_classes(self.val_source, "held-out", fewest=0, known=self.train_source.classes)
        super().divide()

    def subset(self, source: Source) -> list[int]:
        """Indices of the images to train on, in ascending order."""
        if self.subset_file is not None:
            return read_subset_file(source, Path(expand_home(self.subset_file)))
        if self.label_fraction is None and self.labels_per_class is None:
            return super().subset(source)
        chosen = []
        for label, ranked in by_class(source, range(len(source)), self.subset_seed, "subset").items():
            count = self.labels_per_class or max(1, round((self.label_fraction or 0) * len(ranked)))
            if count > len(ranked):
                raise UserError(
                    f"--data.labels_per_class {count}: class {source.classes[label]} has {len(ranked)} images"
                )
            chosen += ranked[:count]
        return sorted(chosen)

    def settings(self) -> dict[str, Any]:
        keys = ("label_fraction", "labels_per_class", "subset_file", "subset_seed")
        return super().settings() | {f"data.{key}": getattr(self, key) for key in keys}


def check_classes(source: Source, which: str, fewest: int = 2, known: Sequence[str] = ()) -> None:
    """Check that there are two classes or more, every class has images, and every label is one of the classes.

    Args:
        which: The split, for messages.
        fewest: Images that each class needs at least.
        known: Classes of the training images: where there are such, one may be missing, or have an empty folder.

    Raises:
        UserError: Names the class or the label.
    """
    if source.labels is None:
        loose = f", since {source.loose} lies beside the folders" if source.loose else ""
        raise UserError(
            f"the {which} images have no labels{loose}: put them into one folder per class (train/CLASS/*, "
            "val/CLASS/*); name the splits with --data.train_dir and --data.val_dir"
        )
    if wrong := [label for label in set(source.labels) if not 0 <= label < len(source.classes)]:
        raise UserError(
            f"a {which} image has the label {wrong[0]}, outside the {len(source.classes)} classes 0 to "
            f"{len(source.classes) - 1}"
        )
    if empty := [name for name in source.empty_folders if name not in known]:
        raise UserError(f"the {which} folder {empty[0]}/ holds no image: fill or remove the folder of this class")
    if not known:
        require_classes(source.classes)
    counts = np.bincount(source.labels, minlength=len(source.classes))
    if few := [(source.classes[i], int(count)) for i, count in enumerate(counts) if count < fewest]:
        raise UserError(
            f"class {few[0][0]} has {few[0][1]} {which} image{'s' * (few[0][1] != 1)}: at least {fewest} are needed"
        )


def require_classes(classes: Sequence[str]) -> None:
    """Raise a UserError where there are fewer than two classes."""
    if len(classes) < 2:
        names = f" ({classes[0]})" if classes else ""
        raise UserError(f"{len(classes)} class{names}: a classifier needs at least 2 (--data.root holds train/CLASS/*)")


def read_subset_file(source: Source, path: Path) -> list[int]:
    """Indices of the images that a file lists, in ascending order.

    Raises:
        UserError: The file cannot be read, lists an unknown image or a bare name of several, or lists none of a class.
    """
    try:
        text = read_regular(path, NAMES).decode("utf-8", "surrogateescape").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"--data.subset_file {path} cannot be read: {error.strerror}") from None
    lines = {line.strip() for line in text.split("\n") if line.strip()}
    chosen, matched = [], dict[str, str]()  # the image of each line
    for index in range(len(source)):
        name = source.name(index)
        names = {name, name.rsplit("/", 1)[-1]}
        if matches := (names | set(map(escaped, names))) & lines:
            chosen.append(index)
            if other := next((matched[line] for line in matches if line in matched), None):
                raise UserError(
                    f"--data.subset_file {path} names {name.rsplit('/', 1)[-1]!r}, which is {other} and {name}: "
                    "give paths below the training folder"
                )
            matched |= dict.fromkeys(matches, name)
    if missing := sorted(lines - set(matched)):
        raise UserError(f"--data.subset_file {path} names {missing[0]!r}, which is no training image")
    assert source.labels is not None
    if empty := sorted(set(range(len(source.classes))) - {source.labels[i] for i in chosen}):
        raise UserError(f"--data.subset_file {path} names no image of class {source.classes[empty[0]]}")
    return chosen


class ProbeData(LabelledData):
    """Images for linear probing: crops of 8 % to 100 % of the area, drawn only once, and flips (Table 10).

    Args:
        crop_scale: Smallest and largest area of the random resized crop, as fractions of the image; null: centre crop.
    """

    single_draw = True

    def __init__(self, crop_scale: tuple[float, float] | None = (0.08, 1.0), **kwargs: Any):
        super().__init__(crop_scale=crop_scale, **kwargs)


class FinetuneData(LabelledData):
    """Images for fine-tuning: crops, flips, timm's RandAugment and random erasing, as in the recipe (Table 9).

    Args:
        crop_scale: Smallest and largest area of the random resized crop, as fractions of the image; null: centre crop.
        auto_augment: RandAugment in timm's notation, for RGB images only; null: none.
        erase_prob: Probability of replacing a box of a training image by noise; 0.25 is from the official code, the
            paper does not list it.
    """

    def __init__(
        self,
        crop_scale: tuple[float, float] | None = (0.08, 1.0),
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        erase_prob: float = 0.25,
        **kwargs: Any,
    ):
        super().__init__(crop_scale=crop_scale, **kwargs)
        check_ranges("data", "[0, 1]", erase_prob=erase_prob)
        self.auto_augment, self.erase_prob = auto_augment, erase_prob
        if auto_augment is not None:
            if self.color_jitter:
                raise UserError("--data.color_jitter and --data.auto_augment exclude each other: set one to 0 or null")
            if self.in_chans != 3 or self.mean is None:
                raise UserError(
                    f"--data.auto_augment {auto_augment} is for RGB images, these have {self.in_chans} channels: "
                    "set it to null"
                )
            self.distort, self.eight_bits = RandAugment(auto_augment, min(self.image_size), self.mean), True
        self.erasing = RandomErasing(erase_prob, mode="pixel", max_count=1, num_splits=0, device="cpu")

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        if not self.erase_prob:
            return batch  # without reading the keys, which would wait for the device
        keys = zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True)
        for image, (epoch, index) in zip(batch.images, keys, strict=True):
            if epoch >= 0:  # not a held-out image
                with seeded(self.seed, epoch, index, "erase"):
                    self.erasing(image)  # in place, on the normalised image, as in the reference code
        return batch

    def augmentations(self) -> list[str]:
        steps = super().augmentations()
        if isinstance(self.distort, RandAugment):
            steps.append(f"RandAugment {self.auto_augment}")
        return steps + ([f"random erasing {self.erasing.probability:g}"] if self.erasing.probability else [])

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"data.auto_augment": self.auto_augment, "data.erase_prob": self.erase_prob}


class RandAugment:
    """timm's RandAugment with the arguments of timm's training transform: (3, H, W) uint8 -> (3, H, W) uint8."""

    def __init__(self, description: str, side: int, mean: Sequence[float]):
        fill = tuple(min(255, round(255 * value)) for value in mean)
        arguments = {"translate_const": int(side * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        try:
            self.transform = rand_augment_transform(description, arguments)
        except (AssertionError, KeyError, ValueError):
            raise UserError(
                f"--data.auto_augment {description!r} is not RandAugment as timm writes it: rand-m9-mstd0.5-inc1"
            ) from None
        for op in getattr(self.transform, "ops", ()):
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize

    def __call__(self, image: Tensor) -> Tensor:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(np.array(self.transform(picture))).permute(2, 0, 1).contiguous()


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's operation, but 0 bits, which a noisy magnitude may ask for, give black; newer Pillow refuses them."""
    if bits_to_keep == 0:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)
