"""`mae knn`: weighted k-NN accuracy of frozen features."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from mae.data.datamodule import TRAINING_ONLY
from mae.data.labelled import LabelledData
from mae.errors import UserError
from mae.evaluation import baseline, features
from mae.options import SRC_HELP, ToolParser, out_file
from mae.runtime.files import write_report
from mae.weights.load import fill_data_settings, read_weights, trained_data_settings


def knn_command(args: Sequence[str]) -> None:
    parser = ToolParser(
        prog="mae knn",
        description="Weighted k-NN accuracy of frozen features, no training: `knn` by cosines of the "
        "features as they are, `knn_whitened` of features whitened by the training images.",
    )
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
    parser.add_argument("--baseline", type=baseline.Choice, default="auto", help=baseline.BASELINE_HELP)
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
    train, test = data.require_labels()
    if data.layout:
        print(data.layout, flush=True)
    step = weights.description.get("step") if weights.source.suffix == ".ckpt" else None
    if step is not None:
        unfinished = ", of a run that has not ended" if Path(config.encoder).is_dir() else ""
        print(f"weights of step {step}: {weights.source}{unfinished}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def scores(encoder: VisionTransformer) -> dict[str, float]:
        encode = features.pooled(encoder.to(device), config.pool)
        encoded = features.extract_splits(encode, data, device)
        return features.knn_scores(encoded, config.k, config.temperature)

    found = scores(weights.encoder())
    chance = found["knn"] / 100
    error = 100 * (chance * (1 - chance) / len(test)) ** 0.5  # of a share of so many images
    about = f"k {config.k}, T {config.temperature}; {len(train)} training images, {len(test)} test images, "
    about += f"standard error {error:.1f}"
    print(score_line("k-NN top-1", found, about), flush=True)
    results = {"acc1": found["knn"], **found, "images": len(test)} | ({} if step is None else {"step": step})
    if baseline.wanted(config.baseline, len(train) + len(test)):
        encoder, which = baseline.untrained_encoder(weights)
        untrained = scores(encoder)
        print(score_line("untrained ", untrained, which), flush=True)
        results |= {f"untrained_{name}": score for name, score in untrained.items()}
    if config.out:
        write_report(config.out, json.dumps(results) + "\n")


def score_line(title: str, scores: dict[str, float], about: str) -> str:
    return f"{title} {', '.join(f'{score:.2f} % {name}' for name, score in scores.items())} ({about})"
