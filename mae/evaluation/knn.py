"""`mae knn`: weighted k-NN accuracy of frozen features."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mae.data.datamodule import TRAINING_ONLY
from mae.data.labelled import LabelledData
from mae.errors import UserError
from mae.evaluation import features
from mae.options import SRC_HELP, ToolParser, out_file
from mae.weights.load import fill_data_settings, read_weights, trained_data_settings


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
        raise UserError(f"--k {config.k}, --temperature {config.temperature}: must be at least 1 and above 0")
    if config.out:
        out_file(config.out)
    weights = read_weights(config.encoder)
    weights.require_pretrained(config.allow_finetuned, "--allow_finetuned true")
    trained = trained_data_settings(weights.description)
    settings = fill_data_settings(config.data.as_dict(), trained, config.encoder, fixed=("image_size", "in_chans"))
    data = LabelledData(**settings)
    data.require_labels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, pool = weights.encoder().to(device), features.POOLS[config.pool]
    encoded = features.extract_splits(lambda images: pool(encoder.forward_features(images)), data, device)
    accuracy = features.knn_accuracy(features.rescale(encoded, config.scaling), config.k, config.temperature)
    images = f"{len(encoded.train)} training images, {len(encoded.test)} test images"
    if config.out:
        Path(config.out).write_text(json.dumps({"acc1": accuracy, "images": len(encoded.test)}) + "\n")
    print(f"k-NN top-1 {accuracy:.2f} % (k {config.k}, T {config.temperature}, scaling {config.scaling}; {images})")
