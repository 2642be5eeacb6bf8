"""Mean and std of the channels of images, from the moments of each image."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}  # what becomes 1; float32 is not scaled


def moments(pixels: Tensor) -> list[tuple[float, float]]:
    """Mean and mean square of each channel of (C, H, W) pixels, from exact sums of integers, scaled to [0, 1].

    float32 is not scaled.
    """
    if pixels.is_floating_point():
        return [(float(c.mean()), float(c.square().mean())) for c in pixels.double()]
    full, n = FULL_SCALE[pixels.dtype], pixels[0].numel()
    result = []
    for channel in pixels:
        counts = torch.bincount(channel.flatten() if full == 255 else channel.flatten().int())
        levels = torch.arange(len(counts))
        total, squares = int((counts * levels).sum()), int((counts * levels * levels).sum())
        result.append((total / (n * full), squares / (n * full * full)))
    return result


def extremes(pixels: Tensor) -> np.ndarray:
    """(2, C): the smallest and the largest sample of each channel of (C, H, W) pixels, scaled as in `moments`."""
    samples = pixels.numpy()
    return np.stack([samples.min(axis=(1, 2)), samples.max(axis=(1, 2))]) / FULL_SCALE.get(pixels.dtype, 1)


def mean_and_std(sums: np.ndarray, count: int) -> tuple[list[float], list[float]]:
    """Mean and std of each channel, from the (C, 2) sum of the `moments` of `count` images."""
    mean, squares = (sums / count).T
    return mean.tolist(), np.sqrt(np.maximum(0, squares - mean**2)).tolist()


def constant_channels(mean: Sequence[float], std: Sequence[float]) -> str:
    """A warning that names the channels whose values are all the same, up to rounding; "" if there are none."""
    found = [str(i) for i, (m, s) in enumerate(zip(mean, std, strict=True)) if s <= 1e-7 * abs(m)]
    which = f"channel{'s' * (len(found) > 1)} {', '.join(found)}"
    return (
        f"mae: warning: std 0 of {which}, by which nothing can be divided: leave out, or set another" if found else ""
    )


def as_option(key: str, values: Sequence[float]) -> str:
    """("mean", [0.5]) -> "--data.mean '[0.5000]'"."""
    return f"--data.{key} '[{as_text(values)}]'"


def as_text(values: Sequence[float]) -> str:
    """Four decimals, and of small values four significant digits."""
    return ", ".join(f"{value:.4f}" if abs(value) >= 0.01 or value == 0 else f"{value:.4g}" for value in values)
