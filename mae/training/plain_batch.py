"""What any DataLoader gives, as the batches that the stages train on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae.data.datasets import Batch, normalize
from mae.errors import UserError

IMAGE_KEYS = ("pixel_values", "image", "images", "img")
LABEL_KEYS = ("label", "labels", "target", "targets")

NOT_REPLAYED = -2  # the "epoch" of an image whose loader does not say which image it is


class Given(NamedTuple):
    """The parts of a DataLoader's batch."""

    images: Any
    labels: Any  # None where there are none
    fields: Mapping[Any, Any]  # of a dict, else empty


def parts(batch: Any) -> Given:
    """Find the images and labels of a batch, of any of the forms of `to_batch`.

    Raises:
        UserError: It is a dict without images.
    """
    if isinstance(batch, Mapping):
        images, labels = (next((batch[key] for key in keys if key in batch), None) for keys in (IMAGE_KEYS, LABEL_KEYS))
        if images is None:
            raise UserError(f"the batch has the keys {', '.join(map(str, batch))}: none of {', '.join(IMAGE_KEYS)}")
        return Given(images, labels, batch)
    if isinstance(batch, list | tuple) and batch:
        return Given(batch[0], batch[1] if len(batch) > 1 else None, {})
    return Given(batch, None, {})


def to_batch(
    batch: Any, image_shape: tuple[int, int, int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Batch:
    """A `Batch` of normalised images from what a DataLoader gives.

    Args:
        batch: (B, C, H, W) images; a list or tuple that begins with images and may go on with (B,) labels; or a dict
            with the images under pixel_values, image, images or img, where it has them the labels under label, labels,
            target or targets, and `epoch` and `index`, (B,) each, from which masks are drawn as by our data module.
            uint8 and uint16 images are scaled to [0, 1] and normalised; float images are taken as normalised.
        image_shape: (channels, height, width) that the network takes.
        mean: Of each channel in [0, 1], for integer images.
        std: As mean.

    Raises:
        UserError: There are no images in it, or they are not of this form; or integer images have no mean and std.
    """
    images, labels, fields = parts(batch)
    in_chans = image_shape[0]
    if isinstance(images, list) and images and all(isinstance(image, Tensor) for image in images):
        images = torch.stack(images)
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = f"{tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"the batch's images are {what}: wanted is a tensor (B, {in_chans}, H, W); let the data set return tensors "
            "of one size (torchvision.transforms.v2: RandomResizedCrop, ToImage) or give the DataLoader a collate_fn"
        )
    if images.shape[1] != in_chans:
        raise UserError(
            f"the batch's images are {tuple(images.shape)}: the network takes {in_chans} channels, (B, C, H, W) "
            "(in_chans of the module)"
        )
    if tuple(images.shape[1:]) != image_shape:
        raise UserError(f"the batch's images are {tuple(images.shape)}, the network takes {image_shape}")
    if not images.is_floating_point():
        if images.dtype not in (torch.uint8, torch.uint16):
            raise UserError(f"the batch's images are {images.dtype}: wanted is uint8, uint16, or normalised float")
        if mean is None or std is None:
            raise UserError(
                f"the batch's images are {images.dtype} of {in_chans} channels: give the module mean=[...] and "
                "std=[...], by which they are normalised, or let the data set return normalised float images"
            )
        images = normalize(images, *(torch.tensor(values, device=images.device) for values in (mean, std)))
    n, device = len(images), images.device
    labels = torch.full((n,), -1, device=device) if labels is None else torch.as_tensor(labels, device=device).long()
    known = "epoch" in fields and "index" in fields
    # On the CPU, where masks are drawn: reading them from the device would make each step wait.
    index, epoch = (fields["index"], fields["epoch"]) if known else (torch.arange(n), torch.full((n,), NOT_REPLAYED))
    zeros = torch.zeros(n, dtype=torch.bool, device=device)
    return Batch(images, labels, torch.as_tensor(index), torch.as_tensor(epoch), zeros, (~zeros).float(), [], {})


def describe(batch: Any, images: Tensor) -> str:
    """What a run's first batch holds, for the log, with a warning where float images look unnormalised.

    Args:
        batch: As the loader gave it.
        images: The same images, normalised.
    """
    values = images.float()
    low, high, mean, std = (float(v) for v in (values.min(), values.max(), values.mean(), values.std()))
    text = f"first batch   {tuple(images.shape)}, {low:.3g} to {high:.3g}, mean {mean:.3g}, std {std:.3g} (normalised)"
    given = parts(batch).images
    if isinstance(given, Tensor) and given.is_floating_point() and 0 <= low and high <= 1:
        text += (
            "\nmae: warning: the float images of the first batch lie in [0, 1]: float images are taken as normalised. "
            "Normalise them by mean and std, or return uint8 images, which the module normalises"
        )
    return text
