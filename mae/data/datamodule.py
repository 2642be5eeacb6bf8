"""Which images are trained and judged on, and how they come: the LightningDataModule.

Pixels stay integers (uint8, or uint16 from .npy) until they are on the device; flips, scaling to [0, 1] and mean/std
are done there, on the whole batch.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from mae.data.crops import Crop
from mae.data.datasets import (
    Batch,
    DecodedSamples,
    Distort,
    Pair,
    Reading,
    ResidentSamples,
    Samples,
    TrainSamples,
    WholeSamples,
    default_workers,
    mirrored,
    normalize,
)
from mae.data.decode import BadImage
from mae.data.sampling import EpochSampler
from mae.data.sources import Source, load_digits, load_torchvision, relabel
from mae.data.tar_shards import open_images, split_places
from mae.errors import UserError
from mae.runtime import signals
from mae.runtime.storage import Place

DatasetName = Literal["folder", "digits", "cifar10", "fashion_mnist"]


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


class Loader(DataLoader[Any]):
    """A DataLoader that names the process that has died, even if it was a connection to it that failed first."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return patiently(super().__iter__())


def patiently(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (OSError, EOFError):
        time.sleep(1)  # as soon as the dying process is dead, torch raises its own error here
        raise


def serve(worker: int) -> None:
    """For a loader process: it goes by what its main process does, in silence, and ends with it at once.

    Not by signals, which a batch system sends to every process; and not later, as it has inherited the connections to
    other ranks: as long as it lives, they wait for its main process.
    """
    sys.excepthook = lambda *_: None
    signals.ignore()
    signals.die_with_parent()


class ReplayLoader(Loader):
    """A DataLoader whose sampler knows where a resumed run goes on.

    Having these two methods tells Lightning that a checkpoint from the middle of an epoch can be continued; there is
    nothing to store, as the place follows from the number of optimiser steps.
    """

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Share(torch.utils.data.Sampler[list[int]]):
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
            (`root/train/CLASS/*`), with images only, or with the shards of `mae pack`; else all images below it are for
            training. Shards may lie on a store that fsspec knows: s3://bucket/folder, http://host/folder. A .tar file
            of images will do, too.
        train_dir: Name of the training split's folder or .tar file below root (default: train, where there is one).
        val_dir: Name of the held-out split's folder or .tar file below root (default: val, where there is one).
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
        device_resident: Keep all training images in the device's memory and crop them there, without loader processes:
            for images of one size that fit, such as CIFAR-10.
        jpeg_scaling: Decode large JPEG crops at a half, quarter or eighth of their size where that is enough: faster,
            but not the same pixels; the difference is measured and printed at start.
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
        device_resident: bool = False,
        jpeg_scaling: bool = False,
        download: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        defaults = DEFAULTS[dataset]
        self.dataset = dataset
        self.root = None if root is None else Place(root)
        self.train_dir, self.val_dir, self.download = train_dir, val_dir, download
        size = defaults.image_size if image_size is None else image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.in_chans = defaults.in_chans if in_chans is None else in_chans
        if dataset != "folder" and self.in_chans != defaults.in_chans:
            raise UserError(f"--data.in_chans {in_chans}: the images of {dataset} have {defaults.in_chans}")
        if num_workers is None:
            num_workers = default_workers()
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
        if jpeg_scaling and (device_resident or dataset != "folder"):
            raise UserError("--data.jpeg_scaling true has no effect on images that are held decoded in memory")
        self.device_resident, self.jpeg_scaling = device_resident, jpeg_scaling
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
            root = self.require_root().path
            self.train_source, self.val_source = load_torchvision(self.dataset, root, self.download)

    def require_root(self) -> Place:
        if self.root is None:
            raise UserError(f"--data.root is not set: the folder that holds the images ({self.dataset})")
        if not self.root.remote and not self.root.exists() and not self.download:
            raise UserError(f"--data.root {self.root} does not exist")
        return self.root

    def load_folders(self) -> None:
        places = split_places(self.require_root(), self.train_dir, self.val_dir)
        self.train_source = images = open_images(places["train"], self.in_chans)
        if "val" in places:
            self.val_source = open_images(places["val"], self.in_chans)
            if images.classes and self.val_source.classes:
                relabel(self.val_source, images.classes, str(places["train"]))

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
        samples = self.samples(self.train_source)
        if self.device_resident:
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            return ReplayLoader(self.resident(samples, device), sampler=sampler, batch_size=None)
        return self.loader(ReplayLoader, samples, sampler)

    def resident(self, samples: TrainSamples, device: torch.device) -> ResidentSamples:
        """The same samples from pixels on a device.

        Raises:
            UserError: The images differ in size, are not of 8 bits, do not fit, or are to be augmented one by one.
        """
        if samples.distort is not None:
            raise UserError("--data.device_resident cannot augment images one by one: set --data.auto_augment null")
        source = samples.source
        images, bad = torch.zeros(0, dtype=torch.uint8), {}
        first = ""
        for i, image in enumerate(self.loader(Loader, DecodedSamples(source), range(len(source)))):
            if isinstance(image, BadImage):
                bad[i] = image
                continue
            if not first:
                first, needed = source.where(i), len(source) * image.numel()
                if needed > (free := free_memory(device)):
                    raise UserError(
                        f"--data.device_resident needs {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB "
                        "are there: set it to false"
                    )
                images = torch.zeros(len(source), *image.shape, dtype=torch.uint8, device=device)
            if image.shape != images.shape[1:] or image.dtype != torch.uint8:
                raise UserError(
                    f"--data.device_resident is for 8-bit images of one size: {source.where(i)} is "
                    f"{tuple(image.shape)} {image.dtype}, {first} is {tuple(images.shape[1:])}"
                )
            images[i] = image.to(device)
        if not first:
            raise UserError(str(bad[0]))
        return ResidentSamples(images, bad, samples)

    def samples(self, source: Source) -> TrainSamples:
        return TrainSamples(
            source, self.image_size, self.in_chans, self.seed, self.crop, self.hflip, self.distort, self.jpeg_scaling
        )

    def augmentations(self) -> list[str]:
        """What happens to a training image, in order."""
        crop = "centre crop" if self.crop is None else str(self.crop)
        if self.jpeg_scaling:
            crop += f" of JPEG decoded at reduced size ({self.scaling_difference():.2f} of 255 levels off)"
        return [f"{crop}, bicubic"] + ([f"flip with probability {self.hflip:g}"] if self.hflip else [])

    def settings(self) -> dict[str, Any]:
        """What a resumed run must not change, by key of the command line."""
        return {
            "data.crop_scale": None if self.crop is None else self.crop.scale,
            "data.hflip": self.hflip,
            "data.device_resident": self.device_resident,
            "data.jpeg_scaling": self.jpeg_scaling,
            "data.mean": self.mean,
            "data.std": self.std,
            "number of training images": len(self.train_source or ()),
        }

    def scaling_difference(self, count: int = 16) -> float:
        """Mean difference that `jpeg_scaling` makes to training crops, in levels of 255, over some images."""
        source = self.train_source
        assert source is not None
        keys = [(0, index) for index in range(0, len(source), max(1, len(source) // count))][:count]
        samples, crops = self.samples(source), []
        for samples.reduced in (True, False):
            crops.append(samples[keys].images.float())
        return float((crops[0] - crops[1]).abs().mean())

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
        sampler = Share(len(source), self.batch_size, rank, world_size)
        return self.loader(Loader, WholeSamples(source, self.image_size, self.crop_pct), sampler)

    def readable(self, source: Source, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """As `whole`; a batch that holds an unreadable image comes image by image, so that only that one is lost."""
        samples = WholeSamples(source, self.image_size, self.crop_pct)
        for indices, batch in zip(
            Share(len(source), self.batch_size, rank, world_size), self.whole(source, rank, world_size), strict=True
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
        return self.loader(Loader, self.samples(source), [[(epoch, i) for i in batch.tolist()] for batch in keys])

    def loader(self, kind: type[DataLoader[Any]], samples: Samples, sampler: Any) -> DataLoader[Any]:
        samples.reading = Reading(samples.source, self.num_workers)
        # batch_size None: the sampler yields whole batches, which the data set draws and stacks itself.
        return kind(
            samples,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=serve,
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
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        images, small = batch.images, batch.images.dtype == torch.uint8
        if small:  # a quarter of the memory to move; older torch cannot flip uint16
            images = mirrored(images, batch.flip)
        images = normalize(images, mean, std)
        return batch._replace(images=images if small else mirrored(images, batch.flip))

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


def free_memory(device: torch.device) -> int:
    """Bytes that could be had, at most, on a device or on this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def raise_errors(batch: Batch) -> None:
    """For uses of images that tolerate no bad one.

    Raises:
        UserError: The batch holds an image that could not be read.
    """
    if batch.errors:
        raise UserError(str(batch.errors[0]))


# Settings of the data that mean nothing where nothing is trained.
TRAINING_ONLY = {"crop_scale", "device_resident", "hflip", "jpeg_scaling", "max_bad_images", "seed"}
