"""Pictures of reconstructions, the loss curve and the confusion matrix."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.evaluation.metrics import Report
from mae.models.mae import MaskedAutoencoder, patchify, unpatchify
from mae.runtime.files import atomic_write
from mae.runtime.run_files import read_metrics
from mae.runtime.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Columns = dict[str, Tensor]  # title -> (B, C, H, W) in [0, 1]

MASKED_GREY = 0.5

LONGEST_NAME = 28  # characters of a class's name in a picture

BORDER = 2  # pixels of white around each image

LEAK_FREE = "reconstruction"

WITH_TRUE_STATISTICS = "with true patch mean/std"


def reconstruction_columns(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, mask_ratio: float, mean: list[float], std: list[float]
) -> Columns:
    """Original, masked image, and reconstruction with the visible patches pasted in.

    A model that predicts normalised patches (norm_pix_loss) predicts a hidden patch's texture but not its mean and
    variance. There are then two reconstructions. The first estimates mean and variance of hidden patches from the
    visible ones around them, so that nothing of the hidden pixels leaks in. The second uses the true ones, as most
    published pictures do, and its title says so.

    Args:
        images: (B, C, H, W) float, normalised with mean and std.
        noise: (B, N), see MaskedAutoencoder.forward.
    """
    pred, mask = model.predict(images.to(model.mask_token.dtype), noise, mask_ratio)
    pred = model.target_pixels(pred.float())
    patches = patchify(images, model.patch_size)  # (B, N, P)

    scale, shift = display_range(images, mean, std)

    def picture(values: Tensor) -> Tensor:
        return (unpatchify(values, model.image_size, model.patch_size) * scale + shift).clamp(0, 1).cpu()

    hidden = mask[:, :, None]
    grey = unpatchify(hidden.expand_as(patches), model.image_size, model.patch_size).cpu()
    columns = {"original": picture(patches), "masked": picture(patches).masked_fill(grey, MASKED_GREY)}
    if not model.norm_pix_loss:
        return columns | {LEAK_FREE: picture(torch.where(hidden, pred, patches))}
    var, mu = torch.var_mean(patches, dim=-1, keepdim=True)
    statistics = mean_of_visible(torch.cat([mu, (var + 1e-6).sqrt()], dim=2), mask, model.grid)
    pasted = torch.where(hidden, pred * statistics[:, :, 1:] + statistics[:, :, :1], patches)
    with_truth = torch.where(hidden, pred * (var + 1e-6).sqrt() + mu, patches)
    return columns | {LEAK_FREE: picture(pasted), WITH_TRUE_STATISTICS: picture(with_truth)}


def display_range(images: Tensor, mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C, 1, 1), by which normalised images come into [0, 1], to be shown.

    They undo mean and std; float32 images in units of their own are shown from two standard deviations below the mean
    to two above.
    """
    scale, shift = (images.new_tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = images * scale + shift
    if pixels.min() < -0.02 or pixels.max() > 1.02:  # more than rounding
        return torch.full_like(scale, 0.25), torch.full_like(shift, 0.5)
    return scale, shift


def original(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Normalised images, (B, C, H, W), in [0, 1] to be shown."""
    scale, shift = display_range(images, mean, std)
    return (images * scale + shift).clamp(0, 1)


def mean_of_visible(values: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, V) -> (B, N, V): for each patch the mean over the visible ones, weighted by 1 / distance^2 on the grid."""
    positions = torch.cartesian_prod(*(torch.arange(n, device=values.device).float() for n in grid))  # (N, 2)
    weight = 1 / torch.cdist(positions, positions).square().clamp(min=0.25)  # (N, N)
    weight = weight * ~mask[:, None, :]  # (B, N, N): hidden patches have no weight
    return weight @ values / weight.sum(dim=2, keepdim=True)


def panel(columns: Columns, path: Path) -> None:
    """Save a PNG with a titled column for each entry and a row for each image; small images are enlarged."""
    height, width = next(iter(columns.values())).shape[2:]
    factor = math.ceil(112 / max(height, width))  # titles need as much
    strips = []
    for title, images in columns.items():
        rgb = displayable(images).repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        bordered = F.pad(rgb, (BORDER, BORDER, BORDER, BORDER), value=1.0)  # (B, 3, h, w) on white
        pixels = (bordered * 255).round().byte().permute(0, 2, 3, 1).flatten(0, 1).numpy()
        font = ImageFont.load_default(size=13)
        text = wrapped(title, font, pixels.shape[1])
        strip = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + 34), "white")
        ImageDraw.Draw(strip).multiline_text((2, 2), text, fill="black", font=font, spacing=1)
        strip.paste(Image.fromarray(pixels), (0, 34))
        strips.append(np.asarray(strip))
    with atomic_write(path) as partial:
        Image.fromarray(np.hstack(strips)).save(partial, format="PNG")


def heat(values: Tensor, images: Tensor, top: float) -> Tensor:
    """Values 0 to `top`, (B, rows, columns), as colours over faint images (B, C, H, W) in [0, 1]; (B, 3, H, W).

    Colours are matplotlib's "magma" by the square root of the value, so that small ones can be told apart.
    """
    import matplotlib

    colours = torch.tensor(matplotlib.colormaps["magma"](range(256))[:, :3], dtype=torch.float32)
    picture = colours[(values.cpu() / top).sqrt().mul(255).round().long()].permute(0, 3, 1, 2)
    picture = F.interpolate(picture, images.shape[2:], mode="nearest")  # a square a patch
    return 0.8 * picture + 0.2 * displayable(images)


def displayable(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 3, H, W): the first three channels, or with fewer than three the first as grey."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def loss_curve(metrics: Path, path: Path) -> None:
    """Plot training and held-out loss over images seen, from a run's metrics.csv."""
    from matplotlib.figure import Figure

    _, rows = read_metrics(metrics)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for key, style in (("train/loss", "-"), ("val/loss", "o-")):
        points = [(float(row["images_seen"]), float(row[key])) for row in rows if row.get(key)]
        if len(points) == 1:
            style = "o"  # a line of one point would not be seen
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=key)
    axes.set_xlabel("images seen")
    axes.set_ylabel("loss on hidden patches")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)


def confusion(report: Report, path: Path) -> None:
    """Plot which classes are confused, beside the classes of lowest accuracy.

    That is the confusion matrix, as shares of each true class, or the most frequent mistakes where there is none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 0.8])
    if report.has_matrix:
        counts, classes = report.confusion, list(map(short, report.classes))
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        image = left.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        figure.colorbar(image, ax=left, label="share of the true class", shrink=0.8)
        left.set_xlabel("predicted")
        left.set_ylabel("true")
        if len(classes) <= 30:  # more names than this cannot be read
            left.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
            left.set_yticks(range(len(classes)), classes, parse_math=False)
    else:
        pairs = report.worst_pairs(20)
        named_bars(left, [taken_for(name, other) for name, other, _ in pairs], [count for *_, count in pairs], "%d")
        left.set_xlabel("images (true → predicted)")
        left.set_title(f"most frequent mistakes of {len(report.classes):,} classes")
    worst = report.worst(20)
    named_bars(right, [taken_for(name, other) for name, _, other in worst], [value for _, value, _ in worst], "%.1f")
    right.set_xlim(0, 105)
    right.set_xlabel("top-1 in percent (→ most often taken for)")
    right.set_title("lowest accuracy")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)


def named_bars(axes: "Axes", names: list[str], values: list[float] | list[int], form: str) -> None:
    """Bars from the top down, each with its value."""
    bars = axes.barh(range(len(names)), values, color="#4878a8")
    axes.bar_label(bars, fmt=form, padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()


def taken_for(name: str, other: str) -> str:
    return f"{short(name)} → {short(other)}" if other else short(name)


def short(name: str) -> str:
    """A name of a class for a picture: printable, of at most LONGEST_NAME characters."""
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
