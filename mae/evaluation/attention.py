"""`mae attention`: where the class token of an encoder looks."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mae.commands import attention_parser
from mae.data.crops import center_box, resized_crop
from mae.data.datasets import normalize
from mae.data.decode import BadImage, decode_image
from mae.errors import UserError
from mae.evaluation import plots
from mae.models.attention_maps import attention_maps
from mae.options import out_file
from mae.weights.load import read_weights, trained_data_settings


def attention_command(args: Sequence[str]) -> None:
    config = attention_parser().parse_args(list(args))
    weights = read_weights(config.model)
    out_file(config.out)
    encoder, trained = weights.encoder(), trained_data_settings(weights.description)
    height, width = trained["image_size"]
    try:
        pixels = [decode_image(path, trained["in_chans"]) for path in config.images]
    except BadImage as error:
        raise UserError(str(error)) from None
    size = height, width
    cropped = torch.stack([resized_crop(p, center_box(p.shape[1], p.shape[2], size), size) for p in pixels])
    images = normalize(cropped, torch.tensor(trained["mean"]), torch.tensor(trained["std"]))
    try:
        maps = attention_maps(encoder, images, config.block)  # (B, heads, rows, columns)
    except ValueError as error:
        raise UserError(f"--model {config.model}, --block {config.block}: {error}") from None
    original = cropped.float() / (255 if cropped.dtype == torch.uint8 else 65535)
    columns = {"original": original}
    shown = {"mean of heads": maps.mean(dim=1)} | {f"head {i}": maps[:, i] for i in range(maps.shape[1])}
    for title, values in shown.items():
        columns[title] = plots.heat(values, original, float(maps.max()))
    plots.panel(columns, Path(config.out))
    print(
        f"wrote {config.out}: {', '.join(columns)}; block {config.block}; weights from 0 (black) to "
        f"{float(maps.max()):.2f} (yellow)"
    )
