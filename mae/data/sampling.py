"""Reproducible randomness: every draw is a function of (seed, epoch, index) and of nothing else.

The place of a training image in the order, its crop and flip, and its hidden patches do not depend on the worker that
loads it, on the rank, on the number of workers or ranks, or on earlier draws. So a run can be continued from any step,
and one process with 64 images draws the same global batch as two with 32.

All generators are on the CPU, so that CPU and CUDA runs draw the same numbers.
"""

import hashlib
import math
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

# Independent uses of the randomness of one sample; for "mix" and "drop" a sample is a micro-batch.
Stream = Literal["order", "augment", "mask", "blocks", "distort", "erase", "subset", "holdout", "mix", "drop"]

HELD_OUT_EPOCH = -1  # the "epoch" of fixed masks, which validation loss and reconstructions use all run


Key = tuple[int, int]  # (epoch, index of the image in its data set)


def hashed(seed: int, epoch: int, index: int, stream: Stream) -> int:
    """63 bits for one use of one image in one epoch.

    The hash matters: consecutive seeds would give correlated Mersenne-Twister states, and seed + epoch + index would
    repeat the same draws along its diagonals.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, epoch, index), key=stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def hashed_name(seed: int, name: str, stream: Stream) -> int:
    """64 bits for one use of an image, by its name instead of its index."""
    key = struct.pack("<q", seed) + stream.encode()
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, key=key, digest_size=8).digest(), "little")


def generator(seed: int, epoch: int, index: int, stream: Stream) -> torch.Generator:
    """A CPU generator for one use of one image in one epoch."""
    return torch.Generator().manual_seed(hashed(seed, epoch, index, stream))


@contextmanager
def seeded(seed: int, epoch: int, index: int, stream: Stream) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) for a while; for libraries that take no generator."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = hashed(seed, epoch, index, stream)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def sample_noise(seed: int, epochs: list[int], indices: list[int], num_patches: int) -> Tensor:
    """(B, N) float32 on the CPU, uniform in [0, 1): the masking scores of each image."""
    noise = torch.empty(len(indices), num_patches)
    for row, epoch, index in zip(noise, epochs, indices, strict=True):
        torch.rand(num_patches, generator=generator(seed, epoch, index, "mask"), out=row)
    return noise


MaskSampling = Literal["random", "block", "grid"]  # Table 1f, Fig. 6

BLOCK_PATCHES = 16 / 196  # the smallest block, of all patches: BEiT's 16 of 14 x 14

BLOCK_ASPECT = 0.3  # the narrowest block: height over width, or the inverse

BLOCK_TRIES = 100  # blocks of an image; a few suffice, and what is missing then is filled up patch by patch


def mask_scores(
    sampling: MaskSampling, seed: int, epochs: list[int], indices: list[int], grid: tuple[int, int], hidden: int
) -> Tensor:
    """(B, N) float32 on the CPU: the masking scores of each image, of which the `hidden` highest are hidden.

    Args:
        sampling: `random`: every subset is equally likely; the scores of `sample_noise`. `block`: rectangles are hidden
            until they are enough, by BEiT's rule (arXiv:2106.08254, Algorithm 1); the last one is trimmed. `grid`: the
            upper left of every 2 x 2 patches stays visible.
        seed, epochs, indices: As for `sample_noise`.
        grid: Rows and columns of patches.
        hidden: Patches to hide in each image.
    """
    noise = sample_noise(seed, epochs, indices, grid[0] * grid[1])
    if sampling == "block":
        for row, epoch, index in zip(noise, epochs, indices, strict=True):
            draws = torch.rand(BLOCK_TRIES, 4, generator=generator(seed, epoch, index, "blocks"), dtype=torch.float64)
            row += hidden_blocks(grid, hidden, draws.tolist()).flatten()
    elif sampling == "grid":
        kept = torch.zeros(grid)
        kept[::2, ::2] = 1
        noise += 1 - kept.flatten()
    return noise


def hidden_blocks(grid: tuple[int, int], hidden: int, draws: Iterable[Sequence[float]]) -> Tensor:
    """Blocks of an image.

    Args:
        grid, hidden: As for `mask_scores`.
        draws: For each block four numbers in [0, 1): area, aspect ratio, top and left.

    Returns:
        (rows, columns) float: 2 in the blocks; 1 in the last one, if not all of it is to be hidden; 0 elsewhere.
    """
    rows, columns = grid
    least = BLOCK_PATCHES * rows * columns
    blocks, missing = np.zeros(grid, np.float32), hidden  # numpy: its calls cost less than those of torch
    for area, aspect, top, left in draws:
        area = least + area * max(0.0, missing - least)
        aspect = BLOCK_ASPECT ** (2 * aspect - 1)  # its logarithm is uniform
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        top, left = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        block = blocks[top : top + height, left : left + width]
        new = int(np.count_nonzero(block == 0))
        if new >= missing:
            block[block == 0] = 1 if new > missing else 2
            break
        block.fill(2)
        missing -= new
    return torch.from_numpy(blocks)


class EpochSampler(Sampler[list[Key]]):
    """The micro-batches of one rank, each a list of (epoch, index).

    An epoch is `steps_per_epoch` optimiser steps of `images_per_step` images, the global batch, in the order of that
    epoch's permutation. The remainder, shorter than one step, is left out, so that no step averages fewer images. The
    images of a step are divided first by micro-batch, then by rank: any division of the same global batch size draws
    the same global batches.

    The place in the run is its number of optimiser steps, set by `seek` before each pass. Lightning's count of epochs
    is not used, as it differs after some restarts.
    """

    def __init__(
        self, num_images: int, batch_size: int, accumulate: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ):
        self.images_per_step = batch_size * accumulate * world_size
        self.steps_per_epoch = num_images // self.images_per_step
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_images} images are fewer than one optimiser step's {self.images_per_step} "
                f"({batch_size} a device x {accumulate} accumulated x {world_size} devices)"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.step = 0

    def seek(self, step: int) -> None:
        """Let the next pass start after this many optimiser steps of the run; it ends with that epoch."""
        self.step = step

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(self.num_images, generator=generator(self.seed, epoch, 0, "order"))
        used = order[: self.steps_per_epoch * self.images_per_step]
        mine = used.view(self.steps_per_epoch * self.accumulate, self.world_size, self.batch_size)[:, self.rank]
        for indices in mine[start * self.accumulate :].tolist():
            yield [(epoch, index) for index in indices]


class EvalSampler(Sampler[list[int]]):
    """The batches of one rank in evaluation: over all ranks every index below n occurs once, and nothing is padded."""

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1):
        mine = torch.arange(rank, n, world_size)
        self.batches = mine.split(batch_size) if len(mine) else ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.batches)
