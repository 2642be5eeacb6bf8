"""What is drawn depends on (seed, epoch, index) and on nothing else."""

import pytest
import torch

from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.sampling import EpochSampler, MaskSampling, Stream, generator, hidden_blocks, mask_scores, sample_noise
from mae.models.mae import hidden_patches, random_masking


def batches(
    workers: int = 0, batch: int = 8, rank: int = 0, world: int = 1, epoch: int = 1, start: int = 0
) -> list[Batch]:
    data = ImageData("digits", batch_size_per_device=batch, num_workers=workers, seed=5)
    data.setup("fit")
    loader = data.train_dataloader()
    loader = type(loader)(
        loader.dataset,
        sampler=EpochSampler(len(data.train_source), batch, 1, rank, world, 5),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
    )
    loader.sampler.seek(epoch * loader.sampler.steps_per_epoch + start)  # type: ignore[attr-defined]
    drawn = []
    for _, found in zip(range(4), loader, strict=False):
        drawn.append(
            data.prepare(found._replace(noise=sample_noise(5, found.epochs.tolist(), found.indices.tolist(), 49)))
        )
    return drawn


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor))


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    wanted = batches(workers=0)
    assert len({tuple(b.indices.tolist()) for b in wanted}) == 4
    for workers in (1, 3):
        assert all(same(a, b) for a, b in zip(wanted, batches(workers=workers), strict=True))


def test_two_ranks_draw_what_one_process_draws() -> None:
    whole = batches(batch=8)
    ranks = [batches(batch=4, rank=rank, world=2) for rank in (0, 1)]
    for step, wanted in enumerate(whole):
        parts = [ranks[0][step], ranks[1][step]]
        assert not torch.equal(parts[0].noise, parts[1].noise)  # type: ignore[arg-type]
        joined = [torch.cat(pair) for pair in zip(*(p[:6] for p in parts), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(joined, wanted[:6], strict=True))
        assert torch.equal(torch.cat([p.noise for p in parts]), wanted.noise)  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_pass_starts_at_its_step(workers: int) -> None:
    assert same(batches(start=2, workers=workers)[0], batches()[2])
    sampler = EpochSampler(64, 4)
    whole = list(sampler)
    sampler.seek(10)
    assert list(sampler) == whole[10:]
    sampler.seek(16)
    assert [epoch for epoch, _ in next(iter(sampler))] == [1] * 4


def test_each_epoch_and_seed_has_its_own_order_crops_and_masks() -> None:
    first, second = batches(epoch=0)[0], batches(epoch=1)[0]
    assert not torch.equal(first.indices, second.indices)
    assert not torch.equal(sample_noise(0, [0], [7], 16), sample_noise(0, [1], [7], 16))
    assert not torch.equal(sample_noise(0, [0], [7], 16), sample_noise(1, [0], [7], 16))
    assert not torch.equal(sample_noise(0, [0], [7], 16), sample_noise(0, [7], [0], 16))


def hidden(sampling: MaskSampling, grid: tuple[int, int], ratio: float, images: int = 64) -> torch.Tensor:
    """(images, rows, columns) bool"""
    count = hidden_patches(grid[0] * grid[1], ratio)
    noise = mask_scores(sampling, 3, [2] * images, list(range(images)), grid, count)
    return random_masking(noise, ratio).mask.view(-1, *grid)


@pytest.mark.parametrize("sampling", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 6)])
def test_every_image_hides_the_same_number(sampling: MaskSampling, grid: tuple[int, int]) -> None:
    for ratio in (0.75,) if sampling == "grid" else (0.25, 0.5, 0.75, 0.9):
        masks = hidden(sampling, grid, ratio)
        assert masks.flatten(1).sum(1).unique().tolist() == [hidden_patches(grid[0] * grid[1], ratio)]


def test_a_grid_keeps_one_of_every_four() -> None:
    rows = ["".join(".#"[value] for value in row) for row in hidden("grid", (4, 6), 0.75, images=1)[0].tolist()]
    assert rows == [".#.#.#", "######", ".#.#.#", "######"]


def test_blocks_hang_together() -> None:
    """Far more neighbours of hidden patches are hidden than at random, where it is the mask ratio."""

    def neighbours(masks: torch.Tensor) -> float:
        pairs = masks[:, :, 1:] & masks[:, :, :-1]
        return float(pairs.sum() / masks[:, :, 1:].sum())

    for ratio in (0.5, 0.75):
        assert abs(neighbours(hidden("random", (14, 14), ratio)) - ratio) < 0.02
        assert neighbours(hidden("block", (14, 14), ratio)) > ratio + 0.1


def test_blocks_by_hand() -> None:
    """The first, of 10 patches, becomes 3 x 3; the second has the least area, 2.9 of 36, and one patch is missing."""
    blocks = hidden_blocks((6, 6), 10, [(1, 0.5, 0, 0), (0, 0.5, 0.99, 0.99), (0, 0, 0, 0)]).int().tolist()
    assert ["".join(map(str, row)) for row in blocks] == ["222000", "222000", "222000", "000000", "000011", "000011"]
    (wide,) = hidden_blocks((6, 6), 6, [(1, 0.999, 0, 0.5)]).int().tolist()[:1]  # 0.3 times as high as wide
    assert wide == [0, 2, 2, 2, 2, 0]


def test_masks_follow_from_seed_epoch_and_index() -> None:
    def block(seed: int, epoch: int, index: int) -> torch.Tensor:
        return mask_scores("block", seed, [epoch], [index], (14, 14), 147)

    together = mask_scores("block", 0, [1, 1, 2], [5, 6, 5], (14, 14), 147)
    assert torch.equal(together[1:2], block(0, 1, 6))
    for other in (block(1, 1, 6), block(0, 2, 6), block(0, 1, 5)):
        assert not torch.equal(together[1:2].floor(), other.floor())


def test_streams_are_independent() -> None:
    streams: list[Stream] = ["order", "augment", "mask", "blocks"]
    assert len({torch.rand(1, generator=generator(0, 0, 0, stream)).item() for stream in streams}) == 4


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(8, 1, 1), (4, 1, 2), (2, 2, 2), (2, 4, 1)])
def test_any_split_of_the_same_step_draws_the_same_images(batch: int, accumulate: int, world: int) -> None:
    steps = []
    ranks = [list(EpochSampler(53, batch, accumulate, rank, world, seed=1)) for rank in range(world)]
    for step in range(6):
        micro = range(step * accumulate, (step + 1) * accumulate)
        steps.append(sorted(key for i in micro for rank in ranks for key in rank[i]))
    reference = [sorted(keys) for keys in EpochSampler(53, 8, seed=1)]
    assert steps == reference
    assert all(len(rank) == 6 * accumulate for rank in ranks)  # 53 // 8: the rest of the permutation is unused


def test_an_epoch_has_no_image_twice() -> None:
    seen = [index for keys in EpochSampler(53, 8, seed=1) for _, index in keys]
    assert len(set(seen)) == 48


def test_fewer_images_than_a_step_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="31 images are fewer than one optimiser step's 32"):
        EpochSampler(31, 8, accumulate=2, world_size=2)
