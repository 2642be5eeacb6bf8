"""Pictures of reconstructions, the loss curve and the confusion matrix."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mae.models.mae import MaskedAutoencoder, patchify, unpatchify
from mae.runtime.run_files import read_metrics

Columns = dict[str, Tensor]  # title -> (B, C, H, W) in [0, 1]

MASKED_GREY = 0.5

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
    pred = pred.float()
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
    Image.fromarray(np.hstack(strips)).save(path, format="PNG")


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
    figure.savefig(path, dpi=130)


def confusion(counts: Tensor, classes: list[str], worst: list[tuple[str, float, str]], path: Path) -> None:
    """Plot the confusion matrix, as shares of each true class, beside the classes of lowest accuracy.

    Args:
        counts: (classes, classes), rows are the true classes.
        worst: Name, accuracy in percent, and the class it is most often taken for.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 0.8])
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    image = left.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=left, label="share of the true class", shrink=0.8)
    left.set_xlabel("predicted")
    left.set_ylabel("true")
    if len(classes) <= 30:  # more names than this cannot be read
        left.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
        left.set_yticks(range(len(classes)), classes, parse_math=False)
    names = [f"{name} → {other}" if other else name for name, _, other in worst]
    bars = right.barh(range(len(worst)), [accuracy for _, accuracy, _ in worst], color="#4878a8")
    right.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    right.set_yticks(range(len(worst)), names, fontsize=8, parse_math=False)
    right.invert_yaxis()
    right.set_xlim(0, 105)
    right.set_xlabel("top-1 in percent (→ most often taken for)")
    right.set_title("lowest accuracy")
    figure.savefig(path, dpi=130)
