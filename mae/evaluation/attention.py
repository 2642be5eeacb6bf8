"""`mae attention`: where the class token of an encoder looks."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mae.commands import attention_parser
from mae.data.datasets import normalize
from mae.errors import UserError
from mae.evaluation import plots
from mae.evaluation.reconstruct import read_images
from mae.models.attention_maps import attention_maps
from mae.models.mae import as_pair
from mae.options import out_file
from mae.weights.load import read_weights, trained_data_settings


def attention_command(args: Sequence[str]) -> None:
    config = attention_parser().parse_args(list(args))
    weights = read_weights(config.model)
    out_file(config.out)
    encoder, trained = weights.encoder(), trained_data_settings(weights.description)
    size = as_pair(trained["image_size"])
    cropped = read_images(config.images, trained["in_chans"], size)
    images = normalize(cropped, torch.tensor(trained["mean"]), torch.tensor(trained["std"]))
    try:
        maps = attention_maps(encoder, images, config.block)  # (B, heads, rows, columns)
    except ValueError as error:
        raise UserError(f"--model {config.model}, --block {config.block}: {error}") from None
    original = plots.original(images, trained["mean"], trained["std"])
    columns = {"original": original}
    shown = {"mean of heads": maps.mean(dim=1)} | {f"head {i}": maps[:, i] for i in range(maps.shape[1])}
    for title, values in shown.items():
        columns[title] = plots.heat(values, original, float(maps.max()))
    plots.panel(columns, Path(config.out))
    print(
        f"wrote {config.out}: {', '.join(columns)}; block {config.block}; weights from 0 (black) to "
        f"{float(maps.max()):.2f} (yellow)"
    )
