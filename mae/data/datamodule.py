"""The LightningDataModule: which images are used for training and evaluation, and how they become batches.

Pixels stay as they are decoded (uint8; uint16 and float32 from TIFF and .npy) until they are on the device. There the
whole batch is flipped, integers are scaled to [0, 1], and all is normalised by mean and std.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader

from mae.data.crops import AS_THEY_ARE, RESIZED_THEN_CROPPED, Crop, FixedCrop, usual_crop_pct
from mae.data.datasets import (
    Batch,
    DecodedSamples,
    Distort,
    Pair,
    ResidentSamples,
    Samples,
    TrainSamples,
    WholeSamples,
    WorkerProgress,
    default_workers,
    mirrored,
    normalize,
)
from mae.data.decode import SCALES, BadImage
from mae.data.layout import open_splits
from mae.data.loaders import Loader, ReplayLoader, in_shared_memory, init_worker
from mae.data.sampling import EpochSampler, EvalSampler
from mae.data.sources import Source, Subset, by_class, load_digits, load_torchvision, relabel, spread
from mae.errors import UserError
from mae.options import check_ranges, expand_home
from mae.runtime.storage import Place

DatasetName = Literal["folder", "digits", "cifar10", "fashion_mnist"]


CROPS_AT_ONCE = 64  # images of `first_crops` in memory


class Defaults(NamedTuple):
    """Defaults of a data set; mean and std are those of its training images in [0, 1]."""

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


class ImageData(LightningDataModule):
    """Images for pre-training and for evaluating features.

    Args:
        dataset: `folder`: image files below `root`. `digits`: 5,000 handwritten digits that come with this package's
            dependencies. `cifar10`, `fashion_mnist`: torchvision's files below `root`.
        root: Folder of the data. If it has the sub-folders train/ and val/, these are the splits, each with one folder
            per class (`root/train/CLASS/*`), with images only, or with the shards of `mae pack`; otherwise all images
            below it are for training. Training, valid, validation and test are known, too, in any case. Shards may
            also lie on a store that fsspec knows: s3://bucket/folder, http://host/folder. A .tar file of images works,
            too.
        train_dir: Folder or .tar file of the training split, relative to root (default: train, if it exists).
        val_dir: Folder or .tar file of the validation split, relative to root (default: val, if it exists, or what is
            called like it).
        image_size: Pixels, one side of a square or [height, width] (default: that of the encoder or model; else that
            of the data set, 224 for folders).
        in_chans: Channels that images are converted to: 1 grey, 3 RGB, 4 RGBA; any number for .npy and TIFF files of
            so many bands (default: that of the encoder or model; else that of the data set, 3 for folders).
        mean: Mean of each channel in [0, 1], of float32 in the files' units, which is subtracted; `mae stats` computes
            it (default: that of the encoder or model; else that of the data set, ImageNet's for folders of 3 channels).
        std: Standard deviation of each channel, in the same units, to divide by; defaults as for mean.
        batch_size_per_device: Images per device in one forward pass. The global batch is this x devices x accumulation.
        num_workers: Loader processes per device (default: one for each core that is left for it, at most 8).
        crop_scale: Smallest and largest area of the random resized crop, as fractions of the image; null: centre crop.
        crop_side: Side of a random crop of fixed size, as a fraction of that of the largest crop, in place of
            crop_scale (Table 1e, "crop, fixed size": 0.875).
        color_jitter: Change brightness, contrast and saturation of training images by up to this fraction, each in
            random order (torchvision's ColorJitter; Table 1e); 0 leaves them.
        crop_pct: Side of the centre crop in evaluation, as a fraction of the side of the resized image (default:
            224/256, as is usual, for images of 128 to 224 pixels; 1 for smaller and larger ones).
        hflip: Probability of flipping an image left to right.
        holdout: Fraction of the training images, of each class where there are some, to hold out and validate on, in
            place of the validation split. Names decide which, so that every command holds out the same.
        max_bad_images: Unreadable training images to tolerate. Each is reported, keeps its slot in the batch with
            weight 0 and is counted in the log; one more stops the run.
        device_resident: Keep all training images in the device's memory and crop them there, without loader processes;
            for images of one size that fit, such as CIFAR-10.
        jpeg_scaling: Decode large JPEG crops at a half, quarter or eighth of their size if that suffices: faster, but
            not the same pixels; the difference is measured and printed at the start.
        download: Let torchvision download its data set into root.
        seed: Seed of the order, the crops and the flips; follows seed_everything.
    """

    subset_seed = 0  # of the choice of images to hold out
    eight_bits = False  # whether training images of more than 8 bits are refused

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
        crop_side: float | None = None,
        color_jitter: float = 0.0,
        crop_pct: float | None = None,
        hflip: float = 0.5,
        holdout: float = 0.0,
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
        self.train_dir, self.val_dir, self.download = expand_home(train_dir), expand_home(val_dir), download
        size = defaults.image_size if image_size is None else image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.in_chans = defaults.in_chans if in_chans is None else in_chans
        if dataset != "folder" and self.in_chans != defaults.in_chans:
            raise UserError(f"--data.in_chans {in_chans}: the images of {dataset} have {defaults.in_chans}")
        self.shares_cores = num_workers is None
        if num_workers is None:
            num_workers = default_workers()
        if crop_pct is None:
            crop_pct = usual_crop_pct(self.image_size)
        check_ranges("data", "(0, 1]", crop_pct=crop_pct)
        check_ranges("data", "(0, 1]", crop_side=crop_side)
        check_ranges("data", "[0, 1]", hflip=hflip, color_jitter=color_jitter)
        check_ranges("data", "[0, 1)", holdout=holdout)
        check_ranges("data", "[0, inf)", num_workers=num_workers, max_bad_images=max_bad_images)
        check_ranges("data", "[1, inf)", image_size=self.image_size, in_chans=self.in_chans)
        check_ranges("data", "[1, inf)", batch_size_per_device=batch_size_per_device)
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"--data.crop_scale {list(crop_scale)}: it must be 0 < smallest <= largest <= 1")
        same_chans = self.in_chans == defaults.in_chans
        self.assumes_imagenet = dataset == "folder" and same_chans and None in (mean, std)
        self.mean = self.channel_values("mean", mean, defaults.mean if same_chans else None)
        self.std = self.channel_values("std", std, defaults.std if same_chans else None)
        check_ranges("data", "(0, inf)", std=self.std)
        self.batch_size, self.num_workers, self.crop_pct = batch_size_per_device, num_workers, crop_pct
        self.crop: Crop | FixedCrop | None = None if crop_scale is None else Crop(crop_scale)
        if crop_side is not None:
            self.crop = FixedCrop(crop_side, self.image_size)
        if color_jitter and self.in_chans not in (1, 3):
            raise UserError(f"--data.color_jitter {color_jitter} is for 1 or 3 channels, not {self.in_chans}")
        self.color_jitter = color_jitter
        self.hflip, self.holdout, self.max_bad_images, self.seed = hflip, holdout, max_bad_images, seed
        if jpeg_scaling and (device_resident or dataset != "folder"):
            raise UserError("--data.jpeg_scaling true has no effect on images that are kept decoded in memory")
        self.device_resident, self.jpeg_scaling = device_resident, jpeg_scaling
        # Of a subclass, which a resumed run must not change; the command line sets them.
        self.own_settings: dict[str, Any] = {}
        self.distort: Distort | None = None
        if color_jitter:
            from torchvision.transforms.v2 import ColorJitter  # loads slowly

            self.distort, self.eight_bits = ColorJitter(*[color_jitter] * 3), True
        self.train_source: Source | None = None
        self.val_source: Source | None = None
        self.layout = ""  # of files: which folder was taken for which split, what each holds, and what was left out

    def channel_values(
        self, key: str, values: Sequence[float] | None, default: Sequence[float] | None
    ) -> list[float] | None:
        values = default if values is None else values
        if values is not None and len(values) != self.in_chans:
            raise UserError(f"--data.{key} has {len(values)} values for {self.in_chans} channels")
        return None if values is None else [float(value) for value in values]

    def load(self) -> None:
        """Find the images, once. Called before any process is started, so that a wrong folder is reported early."""
        if self.train_source is not None:
            return
        self.train_source, self.val_source = self.sources()
        try:
            self.divide()
        except UserError:
            self.train_source = None  # so that a second call checks again
            raise

    def divide(self) -> None:
        """Choose the images to train on, and hold some of them out."""
        whole = self.train_source
        assert whole is not None
        indices = self.subset(whole)
        if self.holdout:
            held_out = self.hold_out(whole, indices)
            self.val_source = Subset(whole, held_out)
            indices = sorted(set(indices) - set(held_out))
        if len(indices) < len(whole):
            self.train_source = Subset(whole, indices)

    def subset(self, source: Source) -> list[int]:
        """Indices of the images to train on, in ascending order."""
        return list(range(len(source)))

    def hold_out(self, source: Source, indices: Sequence[int]) -> list[int]:
        """The held-out ones among `indices`, a fraction of each class, in ascending order."""
        chosen = []
        for label, ranked in by_class(source, indices, self.subset_seed, "holdout").items():
            if len(ranked) < 2:
                what = f"class {source.classes[label]} has" if source.labels else "there is"
                raise UserError(f"{what} {len(ranked)} training image: none can be held out (--data.holdout 0)")
            chosen += ranked[: min(len(ranked) - 1, max(1, round(self.holdout * len(ranked))))]
        return sorted(chosen)

    def sources(self) -> tuple[Source, Source | None]:
        """The training and the held-out images; override it for a data set of your own (`DatasetSource`)."""
        if self.dataset == "digits":
            return load_digits()
        if self.dataset != "folder":
            return load_torchvision(self.dataset, self.require_root().path, self.download)
        splits = open_splits(self.require_root(), self.in_chans, self.train_dir, self.val_dir)
        train, val = splits.sources["train"], splits.sources.get("val")
        self.layout = str(splits) + ("; val is not used, as holdout is set" if val and self.holdout else "")
        if val is not None and train.classes and val.classes:
            relabel(val, train.classes, str(splits.places["train"]))
        return train, val

    def augment(self, image: Tensor) -> Tensor:
        """An augmentation of your own for each training image; override it. The default changes nothing.

        Args:
            image: (C, H, W) uint8, uint16 or float32, cropped, resized and flipped; after RandAugment in fine-tuning.
                Draw from the global generators of Python, numpy or torch: they are seeded by (seed, epoch, index), so
                that a resumed run draws the same.

        Returns:
            The same shape and type.
        """
        return image

    @property
    def own_augment(self) -> Distort | None:
        """`augment` where a subclass has overridden it."""
        return None if type(self).augment is ImageData.augment else self.augment

    def distortion(self) -> Distort | None:
        """What is done to each flipped crop, None if nothing is."""
        own = self.own_augment
        if self.distort is None or own is None:
            return own or self.distort
        return lambda image: own(self.distort(image))  # type: ignore[misc]

    def require_root(self) -> Place:
        if self.root is None:
            raise UserError(f"--data.root is not set: the folder that holds the images ({self.dataset})")
        if not self.root.remote and not self.root.exists() and not self.download:
            raise UserError(f"--data.root {self.root} does not exist")
        return self.root

    def require_labels(self) -> tuple[Source, Source]:
        """The training and the validation split, both with labels.

        Raises:
            UserError: One of them is missing or has no classes.
        """
        self.load()
        for source, name in ((self.train_source, self.train_dir or "train"), (self.val_source, self.val_dir or "val")):
            if source is None or source.labels is None:
                labelled = self.train_source is not None and self.train_source.labels is not None
                way_out = ", or hold out a fifth of its images: --data.holdout 0.2" if labelled else ""
                raise UserError(
                    f"{self.root} needs labelled images as {name}/CLASS/*: name the splits with --data.train_dir and "
                    f"--data.val_dir{way_out}"
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
        self.check_kinds()
        # Processes that Lightning itself starts see all cores of the machine, each of them; Slurm's have their own.
        environment = getattr(self.trainer.strategy, "cluster_environment", None) if self.trainer else None
        if self.shares_cores and self.trainer and isinstance(environment, LightningEnvironment):
            self.num_workers = default_workers(processes=self.trainer.num_devices)

    def check_kinds(self) -> None:
        """Refuse settings that do not suit the type of the images' samples, as far as their first images tell it."""
        train, val = (None if source is None else source.kind() for source in (self.train_source, self.val_source))
        if train and val and SCALES[train] != SCALES[val]:
            raise UserError(f"the training images hold {train}, the held-out ones {val}: they are scaled otherwise")
        if train in ("int16", "float32") and self.assumes_imagenet:
            raise UserError(
                f"the images hold {train} (scaled to {SCALES[train]}), for which ImageNet's mean and std are wrong: "
                "set --data.mean and --data.std; `mae stats` with the same --data settings computes them"
            )
        if self.eight_bits and train not in (None, "uint8"):
            key, off = ("color_jitter", "0") if self.color_jitter else ("auto_augment", "null")
            raise UserError(f"--data.{key} is for images of 8 bits, these hold {train}: set it to {off}")

    def train_sampler(self) -> EpochSampler:
        """The sampler of this rank, for the world size and the accumulation of the trainer."""
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
            if samples.distort is not None:
                off = "color_jitter 0" if self.color_jitter else "auto_augment null"
                what = "leave it out" if self.own_augment else f"set --data.{off}"
                raise UserError(f"--data.device_resident cannot augment images one by one: {what}")
            decoded = self.loader(Loader, DecodedSamples(samples.source), range(len(samples.source)))
            return ReplayLoader(resident_samples(samples, decoded, device), sampler=sampler, batch_size=None)
        return self.loader(ReplayLoader, samples, sampler)

    def samples(self, source: Source, jpeg_scaling: bool | None = None) -> TrainSamples:
        """The training samples of a source; `jpeg_scaling` replaces the setting of this name."""
        scaling = self.jpeg_scaling if jpeg_scaling is None else jpeg_scaling
        samples = TrainSamples(
            source, self.image_size, self.in_chans, self.seed, self.crop, self.hflip, self.distortion(), scaling
        )
        samples.eight_bits = self.eight_bits
        return samples

    def augmentations(self) -> list[str]:
        """The augmentations of a training image, in order, for the log."""
        crop = "centre crop" if self.crop is None else str(self.crop)
        if self.jpeg_scaling:
            crop += f" of JPEG decoded at reduced size ({self.scaling_difference():.2f} of 255 levels off)"
        own = [f"{type(self).__name__}.augment"] if self.own_augment else []
        jitter = [f"colour jitter {self.color_jitter:g}"] if self.color_jitter else []
        return [f"{crop}, bicubic", *jitter, *([f"flip with probability {self.hflip:g}"] if self.hflip else []), *own]

    def settings(self) -> dict[str, Any]:
        """The settings that a resumed run must not change, by their keys on the command line."""
        return {
            "data.crop_scale": self.crop.scale if isinstance(self.crop, Crop) else None,
            "data.crop_side": self.crop.side if isinstance(self.crop, FixedCrop) else None,
            "data.color_jitter": self.color_jitter,
            "data.hflip": self.hflip,
            "data.holdout": self.holdout,
            "data.device_resident": self.device_resident,
            "data.jpeg_scaling": self.jpeg_scaling,
            "evaluation pixels": self.evaluation_rule,
            "data.mean": self.mean,
            "data.std": self.std,
            "number of training images": len(self.train_source or ()),
        }

    @property
    def evaluation_rule(self) -> str | None:
        """How images become pixels in evaluation, of which nothing goes on under another rule; None: nothing does."""
        own_size = self.dataset != "folder" and self.image_size == DEFAULTS[self.dataset].image_size
        if self.val_source is None:
            return None
        return AS_THEY_ARE if own_size and self.crop_pct == 1 else RESIZED_THEN_CROPPED

    def scaling_difference(self, count: int = 16) -> float:
        """Mean absolute difference that `jpeg_scaling` makes to `count` training crops, in levels of 255."""
        source = self.train_source
        assert source is not None
        keys = [(0, index) for index in range(0, len(source), max(1, len(source) // count))][:count]
        scaled, exact = (self.samples(source, jpeg_scaling)[keys].images.float() for jpeg_scaling in (True, False))
        return float((scaled - exact).abs().mean())

    def first_crops(self, count: int) -> Iterator[Tensor]:
        """Batches (B, C, H, W) float, normalised: the first epoch's crops of images spread over the training images.

        Args:
            count: How many images, at most; unreadable ones are left out.
        """
        assert self.train_source is not None
        samples = self.samples(self.train_source)
        keys = [(0, index) for index in spread(self.train_source, count)]
        for start in range(0, len(keys), CROPS_AT_ONCE):
            batch = samples[keys[start : start + CROPS_AT_ONCE]]
            yield self.prepare(batch).images[batch.weight > 0]

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        if self.val_source is None:
            return []
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if len(self.val_source) < world:
            raise UserError(
                f"{len(self.val_source)} held-out images are fewer than the {world} devices: use fewer devices"
            )
        return self.whole(self.val_source, rank, world)

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The held-out images, as in validation: `trainer.test`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The held-out images, as in validation: `trainer.predict`."""
        return self.val_dataloader()

    def whole(self, source: Source, rank: int = 0, world_size: int = 1) -> DataLoader[Batch]:
        """A pass over a source for evaluation: no randomness, each image once over all ranks."""
        sampler = EvalSampler(len(source), self.batch_size, rank, world_size)
        return self.loader(Loader, WholeSamples(source, self.image_size, self.crop_pct), sampler)

    def crops(self, source: Source, epoch: int) -> DataLoader[Batch]:
        """A pass over a source in order, each image once, with the crops and flips of training in that epoch."""
        keys = torch.arange(len(source)).split(self.batch_size)
        return self.loader(Loader, self.samples(source), [[(epoch, i) for i in batch.tolist()] for batch in keys])

    def loader(self, kind: type[DataLoader[Any]], samples: Samples, sampler: Any) -> DataLoader[Any]:
        samples.progress = WorkerProgress(samples.source, self.num_workers)
        # batch_size None: the sampler yields whole batches, which the data set reads and stacks itself.
        return kind(
            samples,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=in_shared_memory,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=init_worker,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = self.prepare(batch)
        assert self.trainer is not None
        # With --trainer.precision 64-true or bf16-true the parameters of the network have that type.
        return batch._replace(images=batch.images.to(self.trainer.lightning_module.dtype))

    def prepare(self, batch: Batch) -> Batch:
        """Flip, scale and normalise a batch, on the device where it is."""
        assert self.mean is not None
        assert self.std is not None
        if len(batch.images) == 0:
            return batch
        device = batch.images.device
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        if batch.images.dtype == torch.uint8:  # flipped as uint8, which is a quarter of the memory to move
            return batch._replace(images=normalize(mirrored(batch.images, batch.flip), mean, std))
        images = normalize(batch.images, mean, std)  # older torch cannot flip uint16
        return batch._replace(images=mirrored(images, batch.flip))


def resident_samples(
    samples: TrainSamples, decoded: Iterable[Tensor | BadImage], device: torch.device
) -> ResidentSamples:
    """The same training samples, cropped from pixels that lie on a device.

    Args:
        decoded: Each image of the source in order, (C, H, W), or why it cannot be read.

    Raises:
        UserError: The images differ in size, are not of 8 bits, do not fit, or none of them can be read.
    """
    source = samples.source
    images, bad = torch.zeros(0, dtype=torch.uint8), {}
    first = ""
    for i, image in enumerate(decoded):
        if isinstance(image, BadImage):
            bad[i] = image
            continue
        if not first:
            first, needed = source.where(i), len(source) * image.numel()
            if needed > (free := free_memory(device)):
                raise UserError(
                    f"--data.device_resident needs {needed / 2**30:.1f} GiB on {device}, but {free / 2**30:.1f} GiB "
                    "are free: set it to false"
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


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device; for others all the memory of this machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Settings of the data that have no effect without training.
TRAINING_ONLY = {
    "color_jitter",
    "crop_scale",
    "crop_side",
    "device_resident",
    "hflip",
    "jpeg_scaling",
    "max_bad_images",
    "seed",
}


def raise_errors(batch: Batch) -> None:
    """Refuse a batch with an unreadable image, for uses that tolerate none.

    Raises:
        UserError: Names the image and the reason.
    """
    if batch.errors:
        raise UserError(str(batch.errors[0]))
