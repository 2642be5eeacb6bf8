"""What is done with weights: mae knn, mae reconstruct; and mae stats."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace

from mae import checkpoint, features, pictures
from mae.crops import center_box, resized_crop
from mae.data import ImageData
from mae.errors import UserError
from mae.images import BadImage, decode_image
from mae.labelled import LabelledData
from mae.model import MaskedAutoencoder
from mae.randomness import HELD_OUT_EPOCH, sample_noise
from mae.runs import SRC_HELP, TRAINING_ONLY, ToolParser, fitted, image_settings, out_file
from mae.samples import normalize


def knn(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae knn", description="Weighted k-NN accuracy of frozen features, no training.")
    parser.add_argument("--config", action="config")
    parser.add_argument("--encoder", type=str, required=True, help=SRC_HELP)
    parser.add_argument(
        "--pool", default="mean", choices=list(features.POOLS), help="Mean of patch tokens, class token, or both."
    )
    parser.add_argument("--allow_finetuned", type=bool, default=False, help="Take the encoder of a classifier, too.")
    parser.add_argument("--out", type=str | None, default=None, help="Write the figures to this JSON file, too.")
    parser.add_class_arguments(LabelledData, "data", skip=TRAINING_ONLY)
    parser.add_argument("--k", type=int, default=20, help="Neighbours that vote.")
    parser.add_argument("--temperature", type=float, default=0.07, help="Votes weigh exp(cosine / temperature).")
    parser.add_argument(
        "--scaling", type=features.Scaling, default="whiten", help="Of the features, fitted on the training images."
    )
    config = parser.parse_args(list(args))
    if config.k < 1 or config.temperature <= 0:
        raise UserError(f"--k {config.k}, --temperature {config.temperature}: wanted are at least 1 and above 0")
    if config.out:
        out_file(config.out)
    found = encoded(config.encoder, config)
    score = features.knn(features.scaled(found, config.scaling), config.k, config.temperature)
    if config.out:
        Path(config.out).write_text(json.dumps({"acc1": score, "images": len(found.test)}) + "\n")
    print(f"k-NN top-1 {score:.2f} % (k {config.k}, T {config.temperature}, scaling {config.scaling}; {sizes(found)})")


def encoded(src: str, config: Namespace) -> features.Features:
    """Features of both splits under the encoder; size, channels, mean and std are the encoder's own unless set."""
    weights = checkpoint.read(src)
    weights.require_pretrained(config.allow_finetuned, "--allow_finetuned true")
    settings = fitted(config.data.as_dict(), image_settings(weights.description), src, fixed=("image_size", "in_chans"))
    data = LabelledData(**settings)
    data.require_labels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, pool = weights.encoder().to(device), features.POOLS[config.pool]
    return features.extract_splits(lambda images: pool(encoder.forward_features(images)), data, device)


def sizes(found: features.Features) -> str:
    return f"{len(found.train)} training images, {len(found.test)} test images"


def stats(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae stats", description="Mean and std of the training images' channels, for a config.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ImageData, "data")
    data = ImageData(**parser.parse_args(list(args)).data.as_dict())
    for key, values in zip(("mean", "std"), data.statistics(), strict=True):
        print(f"--data.{key} '[{', '.join(f'{value:.4f}' for value in values)}]'")


def reconstruct(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae reconstruct", description="Original, masked and reconstructed images, side by side.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--model", type=str, required=True, help=SRC_HELP)
    parser.add_argument("--out", type=str, required=True, help="The PNG to write.")
    parser.add_argument("--mask_ratio", type=float | None, default=None, help="Fraction to hide; as in pre-training.")
    parser.add_argument(
        "--mask", type=str | None, default=None, help="PNG, white = hidden: a pixel a patch, or image-sized."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the random masks.")
    config = parser.parse_args(list(args))
    weights = checkpoint.read(config.model)
    weights.require_decoder()
    model = weights.build()
    out_file(config.out)
    if config.mask and config.mask_ratio is not None:
        raise UserError("--mask and --mask_ratio exclude each other: a mask says how much is hidden")
    try:
        pixels = [decode_image(path, model.in_chans) for path in config.images]
    except BadImage as error:
        raise UserError(str(error)) from None
    cropped = [resized_crop(p, center_box(p.shape[1], p.shape[2], model.image_size), model.image_size) for p in pixels]
    count = len(cropped)
    if config.mask:
        noise, ratio = given_mask(Path(config.mask), model)
        noise = noise.expand(count, -1)
    else:
        noise = sample_noise(config.seed, [HELD_OUT_EPOCH] * count, list(range(count)), model.num_patches)
        ratio = weights.description["mask_ratio"] if config.mask_ratio is None else config.mask_ratio
    mean, std = weights.description["mean"], weights.description["std"]
    images = normalize(torch.stack(cropped), torch.tensor(mean), torch.tensor(std))
    try:
        with torch.no_grad():
            columns = pictures.reconstruct(model, images, noise, ratio, mean, std)
    except ValueError as error:
        raise UserError(f"--mask_ratio: {error}") from None
    pictures.panel(columns, Path(config.out))
    print(f"wrote {config.out}: {', '.join(columns)}")


def given_mask(path: Path, model: MaskedAutoencoder) -> tuple[torch.Tensor, float]:
    """Scores (1, N) that hide what is white in the file, and the ratio that goes with them."""
    try:
        white = (decode_image(path, in_chans=1) > 127)[0]
    except BadImage as error:
        raise UserError(str(error)) from None
    if white.shape == model.image_size:
        (rows, columns), (ph, pw) = model.grid, model.patch_size
        white = white.reshape(rows, ph, columns, pw).float().mean(dim=(1, 3)) > 0.5
    if white.shape != model.grid:
        raise UserError(
            f"--mask {path} is {tuple(white.shape)} pixels; wanted {model.grid}, a pixel a patch, or {model.image_size}"
        )
    hidden = int(white.sum())
    if not 0 < hidden < model.num_patches:
        raise UserError(
            f"--mask {path} hides {hidden} of {model.num_patches} patches; some must be hidden and some visible"
        )
    # Half a patch off: int(N * (1 - ratio)) then has no rounding error to fear.
    return white.flatten()[None].float(), (hidden - 0.5) / model.num_patches
