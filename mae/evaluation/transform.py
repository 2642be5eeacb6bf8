"""The evaluation transform of weights, for images that a program of one's own has."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.data.crops import evaluation_pixels
from mae.data.datasets import normalize
from mae.data.decode import BadImage, from_item
from mae.errors import UserError
from mae.models.mae import Pair
from mae.weights.load import read_weights, trained_data_settings


class EvaluationTransform:
    """One image as the encoder takes it: resized, centre-cropped, normalised, as `mae embed`, `knn`, `predict` do it.

    Attributes:
        size: Pixels (height, width) of the result.
        crop_pct: Side of the centre crop as a fraction of the side of the resized image.
        mean: Of each channel, in [0, 1].
        std: Of each channel.
    """

    def __init__(self, size: Pair, crop_pct: float, mean: list[float], std: list[float]):
        self.size, self.crop_pct, self.mean, self.std = size, crop_pct, mean, std

    def __call__(self, image: Any) -> Tensor:
        """
        Args:
            image: A Pillow image of any mode, best as `Image.open` gives it, or a (C, H, W) tensor of uint8, uint16,
                int16 or float32.

        Returns:
            (C, height, width) float32.

        Raises:
            UserError: It is something else, or has another number of channels.
        """
        try:
            pixels = from_item(image, "the image", len(self.mean)).pixels()
        except BadImage as error:
            raise UserError(str(error)) from None
        cropped = evaluation_pixels(pixels, self.size, self.crop_pct)
        return normalize(cropped[None], torch.tensor(self.mean), torch.tensor(self.std))[0]

    def __repr__(self) -> str:
        height, width = self.size
        return f"EvaluationTransform({height}x{width}, crop_pct {self.crop_pct:g}, mean {self.mean}, std {self.std})"


def transform(src: str | Path) -> EvaluationTransform:
    """The evaluation transform of the images that weights were trained on.

    Args:
        src: As in `mae.load_encoder`.

    Raises:
        UserError: As in `mae.load_encoder`.
    """
    weights = read_weights(src)
    settings = trained_data_settings(weights.description)
    if settings["mean"] is None:
        raise UserError(
            f"{weights.source} was trained on images that were normalised elsewhere: it has no mean and std"
        )
    return EvaluationTransform(settings["image_size"], weights.crop_pct, settings["mean"], settings["std"])
