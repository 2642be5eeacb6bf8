"""`mae reconstruct`: original, masked and reconstructed images side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mae.commands import reconstruct_parser
from mae.data.datasets import WholeSamples, normalize
from mae.data.decode import BadImage, decode_image
from mae.data.sampling import HELD_OUT_EPOCH, mask_scores
from mae.data.sources import ImageFiles
from mae.errors import UserError
from mae.evaluation import plots
from mae.models.mae import MaskedAutoencoder, Pair, hidden_patches
from mae.options import out_file
from mae.weights.load import read_weights


def reconstruct_command(args: Sequence[str]) -> None:
    config = reconstruct_parser().parse_args(list(args))
    weights = read_weights(config.model)
    weights.require_decoder()
    model = weights.build()
    out_file(config.out)
    if config.mask and config.mask_ratio is not None:
        raise UserError("--mask and --mask_ratio exclude each other: a mask says how much is hidden")
    cropped = read_images(config.images, model.in_chans, model.image_size)
    count = len(cropped)
    if config.mask:
        noise, ratio = load_mask(Path(config.mask), model)
        noise = noise.expand(count, -1)
    else:
        ratio = weights.description["mask_ratio"] if config.mask_ratio is None else config.mask_ratio
        sampling, hidden = weights.description.get("mask_sampling", "random"), hidden_patches(model.num_patches, ratio)
        noise = mask_scores(sampling, config.seed, [HELD_OUT_EPOCH] * count, list(range(count)), model.grid, hidden)
    mean, std = weights.description["mean"], weights.description["std"]
    images = normalize(cropped, torch.tensor(mean), torch.tensor(std))
    try:
        with torch.no_grad():
            columns = plots.reconstruction_columns(model, images, noise, ratio, mean, std)
    except ValueError as error:
        raise UserError(f"--mask_ratio: {error}") from None
    plots.panel(columns, Path(config.out))
    print(f"wrote {config.out}: {', '.join(columns)}")


def read_images(paths: Sequence[str], in_chans: int, size: Pair) -> torch.Tensor:
    """Image files, resized and centre-cropped: (B, C, H, W) uint8, uint16 or float32.

    Raises:
        UserError: One of them cannot be read.
    """
    if folder := next((path for path in paths if Path(path).is_dir()), None):
        raise UserError(f"{folder} is a folder: name the images to show, such as {folder.rstrip('/')}/*.jpg")
    batch = WholeSamples(ImageFiles(list(map(Path, paths)), in_chans), size, crop_pct=1.0)[range(len(paths))]
    if batch.errors:
        raise UserError(str(batch.errors[0]))
    return batch.images


def load_mask(path: Path, model: MaskedAutoencoder) -> tuple[torch.Tensor, float]:
    """Read a mask, white = hidden.

    Returns:
        Noise (1, N) that hides these patches, and the mask ratio that goes with it.

    Raises:
        UserError: The file is unreadable, has another size, or hides all patches or none.
    """
    try:
        mask = decode_image(path, in_chans=1)[0]
    except BadImage as error:
        raise UserError(str(error)) from None
    if mask.is_floating_point():
        raise UserError(f"--mask {path} holds float32: save black and white as 8 bits")
    white = mask.int() > torch.iinfo(mask.dtype).max // 2
    if white.shape == model.image_size:
        (rows, columns), (ph, pw) = model.grid, model.patch_size
        white = white.reshape(rows, ph, columns, pw).float().mean(dim=(1, 3)) > 0.5
    if white.shape != model.grid:
        raise UserError(
            f"--mask {path} is {tuple(white.shape)} pixels; expected {model.grid}, a pixel a patch, or "
            f"{model.image_size}"
        )
    hidden = int(white.sum())
    if not 0 < hidden < model.num_patches:
        raise UserError(
            f"--mask {path} hides {hidden} of {model.num_patches} patches; some must be hidden and some visible"
        )
    # Half a patch less keeps int(N * (1 - ratio)) away from rounding errors.
    return white.flatten()[None].float(), (hidden - 0.5) / model.num_patches
