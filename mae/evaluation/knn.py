"""What is done with weights: mae knn, mae reconstruct; and mae stats."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace

from mae.data.datamodule import TRAINING_ONLY
from mae.data.labelled import LabelledData
from mae.errors import UserError
from mae.evaluation import features
from mae.options import SRC_HELP, ToolParser, out_file
from mae.weights import load
from mae.weights.load import fitted, image_settings


def knn_command(args: Sequence[str]) -> None:
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
    weights = load.read_weights(src)
    weights.require_pretrained(config.allow_finetuned, "--allow_finetuned true")
    settings = fitted(config.data.as_dict(), image_settings(weights.description), src, fixed=("image_size", "in_chans"))
    data = LabelledData(**settings)
    data.require_labels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, pool = weights.encoder().to(device), features.POOLS[config.pool]
    return features.extract_splits(lambda images: pool(encoder.forward_features(images)), data, device)


def sizes(found: features.Features) -> str:
    return f"{len(found.train)} training images, {len(found.test)} test images"
