"""Crops: choosing a box of an image, and resizing it.

Images are (C, H, W) tensors, uint8 in [0, 255], uint16 in [0, 65535] or float32 of any range.
A box is (top, left, height, width) in whole pixels of the decoded image, after its EXIF rotation.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[int, int, int, int]

# How images become pixels in evaluation, as runs record it; runs of earlier versions recorded nothing.
RESIZED_THEN_CROPPED, AS_THEY_ARE = "resized, then cropped", "as they are"
BEFORE_IT_WAS_RECORDED = "cropped, then resized"

LONGEST_SIDE = 16  # of a resized image, in sides of what it has to cover; longer images are cut first, to save memory


class Crop(NamedTuple):
    """A random resized crop: `scale` is the area as a fraction of the image, `ratio` is width / height."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    single_draw: bool = False  # False: up to ten draws, until one fits into the image

    def box(self, draw: torch.Generator, height: int, width: int) -> Box:
        draw_box = single_draw_box if self.single_draw else random_crop_box
        return draw_box(draw, height, width, self.scale, self.ratio)

    def __str__(self) -> str:
        low, high = self.scale
        return f"random resized crop {low:g} to {high:g} of the area" + (", drawn once" if self.single_draw else "")


class FixedCrop(NamedTuple):
    """A random crop of a fixed size: the largest box of an image that has the shape of `size`, times `side`."""

    side: float
    size: tuple[int, int]  # (height, width) of the result

    def box(self, draw: torch.Generator, height: int, width: int) -> Box:
        _, _, *largest = center_box(height, width, self.size)
        box_height, box_width = (max(1, round(self.side * side)) for side in largest)
        top, left = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        return int(top * (height - box_height + 1)), int(left * (width - box_width + 1)), box_height, box_width

    def __str__(self) -> str:
        return f"random crop of {self.side:g} of the side"


def resized_crop(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut `box` out of a (C, H, W) image and resize it to `size` (height, width), bicubic with antialiasing.

    The dtype is kept: uint8 (nearly always within one level of Pillow's crop and resize), uint16 (through float32) or
    float32, of which nothing is rounded or clamped.
    The result is dense, and channels last if the image is. A box that already has the size is cut out without
    filtering.
    """
    top, left, height, width = box
    crop = image[:, top : top + height, left : left + width]
    if (height, width) == size:
        return _dense(crop)
    if crop.dtype == torch.uint16:  # bicubic overshoots, so it needs clamping; the uint8 kernel does that by itself
        return _bicubic(crop.float(), size).round_().clamp_(0, 65535).to(torch.uint16)
    if crop.shape[0] > 4:  # above 4 channels torch takes a path to the same pixels that is about three times slower
        return torch.cat([_bicubic(part, size) for part in torch.split(crop, 4)])
    return _bicubic(crop, size)


def _dense(image: Tensor) -> Tensor:
    if is_channels_last(image):
        return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return image.contiguous()


def is_channels_last(image: Tensor) -> bool:
    """Whether the channels of a pixel of (C, H, W) are adjacent in memory, as decoders leave them."""
    return image.stride(0) == 1


def _bicubic(image: Tensor, size: tuple[int, int]) -> Tensor:
    batch = _dense(image)[None]
    if is_channels_last(image):  # the strides of a batch select torch's fast kernel for channels last
        batch = batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:]))
    return F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]


def batched_resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resized_crop`, for many images of one size at once, on any device; the result is within two levels of it.

    Args:
        images: (B, C, H, W) uint8.
        boxes: (B, 4) int64, one box per image, on the same device.

    Returns:
        (B, C, *size) uint8, contiguous.
    """
    top, left, height, width = boxes.unbind(1)
    # First across, then down, with rounding in between, as in the kernel for one image.
    across = _filters(left, width, images.shape[3], size[1])  # (B, size[1], W)
    down = _filters(top, height, images.shape[2], size[0])  # (B, size[0], H)
    narrowed = (images.float() @ across.transpose(1, 2)[:, None]).round_().clamp_(0, 255)
    return (down[:, None] @ narrowed).round_().clamp_(0, 255).to(torch.uint8)


def _filters(start: Tensor, length: Tensor, side: int, wanted: int) -> Tensor:
    """(B, wanted, side): the weight of each of `side` pixels in each of `wanted` ones; bicubic with antialiasing."""
    places = torch.arange(side, device=start.device) - start[:, None, None]  # (B, 1, side), within the box
    step = length.float() / wanted  # pixels of the box per pixel of the result
    stretch = step.clamp(min=1)[:, None, None]
    centre = (torch.arange(wanted, device=start.device) + 0.5)[None, :, None] * step[:, None, None]
    first, end = (centre - 2 * stretch + 0.5).floor(), (centre + 2 * stretch + 0.5).floor()
    inside = (places >= first.clamp(min=0)) & (places < torch.minimum(end, length[:, None, None].float()))
    x = ((places - centre + 0.5) / stretch).abs()
    near = (1.5 * x - 2.5) * x * x + 1  # Keys' cubic with a = -1/2, as Pillow's
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * inside
    return weights / weights.sum(2, keepdim=True)


def random_crop_box(
    generator: torch.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw the box of torchvision's RandomResizedCrop: an area, an aspect ratio, then a place.

    Always takes 22 numbers from the (CPU) generator, so that later draws do not depend on the image.

    Args:
        scale: Smallest and largest area of the box, as fractions of the image.
        ratio: Smallest and largest width / height of the box; uniform on a log scale.
    """
    draws = torch.rand(22, generator=generator, dtype=torch.float64).tolist()
    for area_draw, ratio_draw in zip(draws[:10], draws[10:20], strict=True):
        box_height, box_width = _box_sides(height * width, area_draw, ratio_draw, scale, ratio)
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(draws[20] * (height - box_height + 1))
            left = int(draws[21] * (width - box_width + 1))
            return top, left, box_height, box_width

    # No draw fits, as the image is much longer than wide or the reverse: the largest central box of an allowed ratio.
    box_height = min(height, round(width / ratio[0]))
    box_width = min(width, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def single_draw_box(
    generator: torch.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """As `random_crop_box`, but with one draw; a side that is too long is cut to the image, so the ratio may change.

    This is the crop of the official linear probe, after the TensorFlow pipeline; more of its crops are large.
    """
    draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    box_height, box_width = _box_sides(height * width, draws[0], draws[1], scale, ratio)
    box_height, box_width = max(1, min(height, box_height)), max(1, min(width, box_width))
    return int(draws[2] * (height - box_height + 1)), int(draws[3] * (width - box_width + 1)), box_height, box_width


def _box_sides(
    pixels: int, area_draw: float, ratio_draw: float, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of a random box of an image with this many pixels, from two draws in [0, 1)."""
    area = pixels * (scale[0] + (scale[1] - scale[0]) * area_draw)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def official_crop_pct(size: tuple[int, int]) -> float:
    """The crop of the official evaluation: 224 / 256 up to 224 pixels, 1 above."""
    return 224 / 256 if min(size) <= 224 else 1.0


def usual_crop_pct(size: tuple[int, int]) -> float:
    """The official crop for images from 128 pixels on; 1 for smaller ones, of which nothing is cut off."""
    return official_crop_pct(size) if min(size) >= 128 else 1.0


def evaluation_pixels(image: Tensor, size: tuple[int, int], crop_pct: float = 1.0) -> Tensor:
    """(C, H, W) -> (C, *size): the official two steps of evaluation, resize and centre crop.

    The image is resized, bicubic with antialiasing, until it just covers size / crop_pct, and `size` is cut out of its
    centre; the official 256 -> 224 is crop_pct 0.875. Both round as torchvision does. An image that covers it already
    is not filtered.

    Args:
        crop_pct: In (0, 1]; with 1 the limiting side is kept whole.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is not in (0, 1]")
    height, width = image.shape[1:]
    cover = int(size[0] / crop_pct), int(size[1] / crop_pct)
    part = (
        min(height, LONGEST_SIDE * cover[0] * width // cover[1] + 1),
        min(width, LONGEST_SIDE * cover[1] * height // cover[0] + 1),
    )
    box = (height - part[0]) // 2, (width - part[1]) // 2, *part
    resized = (
        max(cover[0], int(cover[1] * part[0] / part[1])),
        max(cover[1], int(cover[0] * part[1] / part[0])),
    )
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    return _dense(resized_crop(image, box, resized)[:, top : top + size[0], left : left + size[1]])


def center_box(height: int, width: int, size: tuple[int, int]) -> Box:
    """The largest centred box of the shape of `size` (height, width), of a height x width image."""
    step = min(height / size[0], width / size[1])  # pixels of the original per pixel of the result
    box_height, box_width = max(1, round(step * size[0])), max(1, round(step * size[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
