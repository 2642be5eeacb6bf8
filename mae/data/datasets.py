"""Map-style data sets that turn the indices of a sampler into batches; this is the work of the loader processes."""

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from mae.data.channel_stats import FULL_SCALE
from mae.data.crops import Box, Crop, FixedCrop, batched_resized_crop, center_box, evaluation_pixels, is_channels_last
from mae.data.decode import SCALES, BadImage, Picture
from mae.data.sampling import HELD_OUT_EPOCH, Key, generator, seeded
from mae.data.sources import Source
from mae.errors import UserError
from mae.runtime.machine import available_cores
from mae.runtime.memory import shared_memory_message
from mae.runtime.text import printable

# The path of a socket has at most 107 characters, of which Python needs "/pymp-xxxxxxxx/listener-xxxxxxxx". With a
# longer one a thread of the loader process fails, and training would wait for it forever.
LONGEST_TMPDIR = 75

Pair = tuple[int, int]

Distort = Callable[[Tensor], Tensor]  # (C, H, W) uint8 -> the same shape, by the global generators


class Batch(NamedTuple):
    """A batch on its way from the loader to a training step."""

    images: Tensor  # (B, C, H, W): uint8, uint16 or float32 from the loader, float and normalised on the device
    labels: Tensor  # (B,) int64, -1 where there is none
    indices: Tensor  # (B,) int64, index of the image in its data set
    epochs: Tensor  # (B,) int64; the mask of a sample depends on this, its index and the seed, and on nothing else
    flip: Tensor  # (B,) bool, True = to be flipped left to right on the device
    weight: Tensor  # (B,) float, 0 if the image could not be read and its slot holds zeros
    errors: list[BadImage]  # the images that could not be read
    decoders: dict[str, int]  # number of images that each decoder made
    noise: Tensor | None = None  # (B, N) float, the noise for random masking; pre-training adds it before the transfer


class WorkerProgress:
    """The image that each loader process is reading, in shared memory, so that the main process can name it.

    It does so when a loader process has died, and the watchdog when nothing moves. Without loader processes the main
    process notes its own image.

    Raises:
        UserError: TMPDIR is too long for the sockets between processes, or there is no shared memory.
    """

    instances: ClassVar["WeakSet[WorkerProgress]"] = WeakSet()  # those of this process

    def __init__(self, source: Source, workers: int) -> None:
        if workers and len(os.fsencode(folder := tempfile.gettempdir())) > LONGEST_TMPDIR:
            raise UserError(
                f"TMPDIR {folder} has more than {LONGEST_TMPDIR} characters, too many for the sockets of loader "
                "processes: set TMPDIR to a shorter path, such as /tmp, or --data.num_workers 0"
            )
        self.source, self.workers = source, workers
        try:
            # For each worker its process id, the index of its image, and when it began with it; 0 when it is done.
            self.slots = RawArray("q", 3 * max(workers, 1))
        except OSError as error:
            raise UserError(shared_memory_message(error)) from None
        WorkerProgress.instances.add(self)  # last, as the message about a dead process may be needed at any moment

    def set(self, index: int) -> None:
        """Note the image that this process reads next; the main process of loaders notes nothing."""
        worker = get_worker_info()
        if worker is not None:
            self.slots[3 * worker.id : 3 * worker.id + 3] = [os.getpid(), index, time.monotonic_ns()]
        elif not self.workers:
            self.slots[:] = [os.getpid(), index, time.monotonic_ns()]

    def done(self) -> None:
        """Note that this process waits for what to read next."""
        worker = get_worker_info()
        if worker is not None or not self.workers:
            self.slots[3 * (worker.id if worker else 0) + 2] = 0

    def last(self, pid: int) -> str | None:
        """The image that a loader process was reading, or None if the process is not one of these."""
        for worker in range(self.workers):
            owner, index = self.slots[3 * worker : 3 * worker + 2]
            if owner == pid:
                return self.source.where(index)
        return None

    def under_way(self) -> list[str]:
        """What is being read at this moment: each image, by which process and since when."""
        found, now = [], time.monotonic_ns()
        for pid, index, begun in zip(*(self.slots[i::3] for i in range(3)), strict=True):
            if begun:
                found.append(f"{self.source.where(index)} (pid {pid}, for {(now - begun) / 1e9:.0f} s)")
        return found


def images_under_way() -> str:
    """The images that loader processes, or this process, are reading at this moment; for the watchdog."""
    return printable(", ".join(image for progress in list(WorkerProgress.instances) for image in progress.under_way()))


def default_workers(threads: int | None = None, processes: int | None = None) -> int:
    """The number of loader processes of one thread each: one for each core that this process leaves, at most 8.

    Args:
        threads: Cores that this process keeps busy itself; by default 1 beside a GPU, else those of torch.
        processes: Of the run on this machine, which share the cores that this process may use; by default torchrun's.
    """
    if threads is None:
        threads = 1 if torch.cuda.is_available() else torch.get_num_threads()
    if processes is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, available_cores() // processes - threads))


class Samples(Dataset[Any]):
    """Images of a source. Subclasses say what an item is.

    Attributes:
        eight_bits: Whether images of more than 8 bits are refused, as RandAugment cannot change them.
    """

    eight_bits = False

    def __init__(self, source: Source) -> None:
        self.source = source
        self.progress: WorkerProgress | None = None

    def open_images(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
        pictures, usual = self.source.open_all(indices), self.source.kind()
        for index in indices:
            if self.progress:
                self.progress.set(index)
            picture = next(pictures)
            if not isinstance(picture, BadImage):
                usual = usual or picture.kind
                reason = ""
                if SCALES[picture.kind] != SCALES[usual]:
                    reason = f"holds {picture.kind} among images of {usual}, which have another scale: keep them apart"
                elif self.eight_bits and picture.kind != "uint8":
                    reason = f"holds {picture.kind}, but RandAugment is for 8 bits: --data.auto_augment null"
                if reason:
                    picture = BadImage(self.source.where(index), reason)
            yield picture
        if self.progress:
            self.progress.done()


class DecodedSamples(Samples):
    """Decoded images of any size, (C, H, W), or the reason why one cannot be decoded. Items are indices."""

    def __getitem__(self, index: int) -> Tensor | BadImage:
        try:
            picture = next(self.open_images([index]))
            return picture if isinstance(picture, BadImage) else picture.pixels()
        except BadImage as error:
            return error


class TrainSamples(Samples):
    """Batches for training, each image cropped and flipped by its (seed, epoch, index). Items are lists of keys.

    Args:
        distort: Applied to the flipped crop; without it the flip is left to the device.
        reduced: As for `decode.Picture.resized_crop`.
    """

    def __init__(
        self,
        source: Source,
        size: Pair,
        in_chans: int,
        seed: int,
        crop: Crop | FixedCrop | None,
        flip: float,
        distort: Distort | None = None,
        reduced: bool = False,
    ):
        super().__init__(source)
        self.size, self.in_chans, self.seed = size, in_chans, seed
        self.crop, self.flip, self.distort, self.reduced = crop, flip, distort, reduced

    def draw(self, key: Key, height: int, width: int) -> tuple[bool, Box]:
        """Draw whether to flip an image and the box to crop from it."""
        draw = generator(self.seed, *key, "augment")
        flip = torch.rand((), generator=draw).item() < self.flip
        return flip, self.crop.box(draw, height, width) if self.crop else center_box(height, width, self.size)

    def __getitem__(self, keys: list[Key]) -> Batch:
        images: list[Tensor] = []
        flips, decoders = [], Counter[str]()
        errors: dict[int, BadImage] = {}
        for key, picture in zip(keys, self.open_images([index for _, index in keys]), strict=True):
            try:
                if isinstance(picture, BadImage):
                    raise picture
                flip, box = self.draw(key, picture.height, picture.width)
                image = picture.resized_crop(box, self.size, self.reduced)
                decoders[picture.decoder] += 1
                if self.distort:
                    with seeded(self.seed, *key, "distort"):
                        image, flip = self.distort(image.flip(2) if flip else image), False
            except BadImage as error:
                errors[len(images)] = error
                image, flip = torch.zeros(self.in_chans, *self.size, dtype=torch.uint8), False
            images.append(image)
            flips.append(flip)
        batch = make_batch(self.source, [index for _, index in keys], stack(images), decoders)
        return self.for_training(batch, keys, flips, errors)

    def for_training(self, batch: Batch, keys: list[Key], flips: Sequence[bool], errors: dict[int, BadImage]) -> Batch:
        """The batch with its epochs, flips and errors; the latter by place in the batch."""
        epochs = torch.tensor([epoch for epoch, _ in keys])
        weight = torch.tensor([0.0 if i in errors else 1.0 for i in range(len(keys))])
        return batch._replace(epochs=epochs, flip=torch.tensor(flips), weight=weight, errors=list(errors.values()))


class ResidentSamples(TrainSamples):
    """As `TrainSamples`, but from images of one size in the memory of a device, which crops a whole batch at once.

    Args:
        images: (n, C, H, W) uint8, by index of the source; zeros for unreadable images.
        bad: The unreadable images, by index.
    """

    def __init__(self, images: Tensor, bad: dict[int, BadImage], like: TrainSamples) -> None:
        super().__init__(like.source, like.size, like.in_chans, like.seed, like.crop, like.flip)
        self.images, self.bad = images, bad

    def __getitem__(self, keys: list[Key]) -> Batch:
        device = self.images.device
        height, width = self.images.shape[2:]
        flips, boxes = zip(*(self.draw(key, height, width) for key in keys), strict=True)
        indices = [index for _, index in keys]
        whole = self.images[torch.tensor(indices, device=device)]
        images = batched_resized_crop(whole, torch.tensor(boxes, device=device), self.size)
        errors = {i: self.bad[index] for i, index in enumerate(indices) if index in self.bad}
        return self.for_training(make_batch(self.source, indices, images), keys, flips, errors)


class WholeSamples(Samples):
    """Batches for evaluation: resized and centre-cropped, without randomness. Items are sequences of indices.

    Unreadable images are left out of the batch and are in its `errors`, for whoever uses it to refuse or tolerate.
    """

    def __init__(self, source: Source, size: Pair, crop_pct: float):
        super().__init__(source)
        self.size, self.crop_pct = size, crop_pct

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        images, kept, errors, decoders = [], [], [], Counter[str]()
        for index, picture in zip(indices, self.open_images(indices), strict=True):
            try:
                if isinstance(picture, BadImage):
                    raise picture
                images.append(evaluation_pixels(picture.pixels(), self.size, self.crop_pct))
            except BadImage as error:
                errors.append(error)
                continue
            kept.append(index)
            decoders[picture.decoder] += 1
        pixels = stack(images) if images else torch.zeros(0, 1, 1, 1)
        return make_batch(self.source, kept, pixels, decoders)._replace(errors=errors)


def worker_death_message(error: BaseException) -> str | None:
    """The message for an error of torch that says that loader processes have died; None for other errors."""
    match = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
    if not match and error.__context__:  # torch raises it anywhere, and then Lightning may fail while it cleans up
        return worker_death_message(error.__context__)
    if not match:
        return None
    pids = [int(pid) for pid in match[1].split(",")]
    files = [file for pid in pids for progress in WorkerProgress.instances if (file := progress.last(pid))]
    reason = match[2].strip().rstrip(".")
    return (
        f"a loader process (pid {match[1].strip()}) {reason}; the last file it read: {', '.join(files) or 'none yet'}. "
        "If the machine ran out of memory, lower --data.num_workers"
    )


def make_batch(
    source: Source, indices: Sequence[int], images: Tensor, decoders: Mapping[str, int] | None = None
) -> Batch:
    """A batch for evaluation: no flips, all weights 1. Labels are -1 if the source has none."""
    n = len(indices)
    labels = [-1 if source.labels is None else source.labels[index] for index in indices]
    return Batch(
        images,
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(indices, dtype=torch.long),
        torch.full((n,), HELD_OUT_EPOCH),
        torch.zeros(n, dtype=torch.bool),
        torch.ones(n),
        [],
        dict(decoders or {}),
    )


def blank_batch(size: int, in_chans: int, image_size: Pair) -> Batch:
    """A batch as a training step gets it, but without noise: black images of class 0."""
    zeros = torch.zeros(size, dtype=torch.long)
    images = torch.zeros(size, in_chans, *image_size)
    return Batch(images, zeros, torch.arange(size), zeros, zeros.bool(), torch.ones(size), [], {})


def stack(images: list[Tensor]) -> Tensor:
    """(C, H, W) each -> (B, C, H, W), channels last if all are; uint8 beside uint16 is widened, 255 to 65535.

    Beside float32 there are only float32 and the zeros of unreadable images.
    """
    types = {image.dtype for image in images}
    if torch.float32 in types:
        images = [image.float() for image in images]
    elif len(types) > 1:
        images = [(i.int() * 257).to(torch.uint16) if i.dtype == torch.uint8 else i for i in images]
    batch: Tensor  # in a loader process default_collate stacks directly into memory shared with the main process
    if all(map(is_channels_last, images)):
        batch = default_collate([image.permute(1, 2, 0) for image in images])  # (B, H, W, C)
        return batch.permute(0, 3, 1, 2)
    batch = default_collate(images)
    return batch


def mirrored(images: Tensor, flip: Tensor) -> Tensor:
    """(B, C, H, W) with the images flipped left to right for which `flip`, (B,) bool, is True."""
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) -> float, contiguous: integers scaled to [0, 1], then normalised by mean and std of (C,)."""
    # In place, because allocating the memory of a batch costs more than the arithmetic.
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return pixels.div_(FULL_SCALE.get(images.dtype, 1)).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
