"""`mae bench export`: an encoder in PyTorch beside the same one in ONNX Runtime, in float32 and in int8."""

import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.bench import figures as figures_module
from mae.bench.figures import Figure, figure, ratio, write_json
from mae.bench.variants import threads
from mae.data.datamodule import TRAINING_ONLY
from mae.data.labelled import LabelledData
from mae.errors import UserError
from mae.evaluation import features
from mae.evaluation.features import Features, Scaling
from mae.options import SRC_HELP, ToolParser, out_file
from mae.weights import onnx_export
from mae.weights.load import fill_data_settings, read_weights, trained_data_settings

BASE = "PyTorch"

SCALINGS: tuple[Scaling, ...] = ("none", "whiten")

WARM_UP = 2  # calls of each contender that do not count

ROUND_SECONDS = 0.1  # a round of PyTorch; the others are called as often

MB = 1e6


Call = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> tokens (B, 1 + N, D)


class Contender(NamedTuple):
    """The encoder in one of its forms."""

    size: int  # bytes: of the file; in PyTorch, of the weights
    open: Callable[[int], Call]  # by the number of threads


def export_command(args: Sequence[str]) -> None:
    config = parsed(args)
    for package in ("onnx", "onnxscript", "onnxruntime"):  # before any work is done
        onnx_export.import_onnx_package(package)
    weights = read_weights(config.encoder)
    weights.require_pretrained(False, None)
    encoder, description = weights.encoder(), weights.description
    own = trained_data_settings(description)
    data = LabelledData(
        **fill_data_settings(config.data.as_dict(), own, config.encoder, fixed=("image_size", "in_chans"))
    )
    data.require_labels()
    print_header(config)
    with tempfile.TemporaryDirectory() as folder:
        fields = contenders(encoder, description, Path(folder))
        result: dict[str, Any] = {"machine": versions(), "worth": worth(fields, data, max(config.threads))}
        print_worth(result["worth"])
        # After each table: of a bench that is stopped, what is done stays.
        rows = []
        for count in config.threads:
            for batch in config.batch:
                (images,) = onnx_export.Encoder(encoder).example(batch)
                rows.append(latency(fields, images, count, config.rounds))
                print_latency(rows[-1])
                write_json(config.json, {**result, "latency": [figures_module.plain(row) for row in rows]})


def parsed(args: Sequence[str]) -> Namespace:
    parser = ToolParser(
        prog="mae bench export",
        description="What an encoder gains and loses as an ONNX file, in float32 and with int8 weights: k-NN accuracy, "
        "size, time a batch on the CPU; beside PyTorch in the same process.",
    )
    parser.add_argument("--config", action="config")
    parser.add_argument("--encoder", type=str, required=True, help=SRC_HELP)
    parser.add_class_arguments(LabelledData, "data", skip=TRAINING_ONLY)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="Of the CPU, one table each.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="Images a call, one table each.")
    parser.add_argument("--rounds", type=int, default=5, help="Of each, in turns, after a warm-up.")
    parser.add_argument("--json", type=str | None, default=None, help="Write all figures to this file, too.")
    config = parser.parse_args(list(args))
    for option in ("threads", "batch", "rounds"):
        value = config[option]
        for number in value if isinstance(value, list) else [value]:
            if number < 1:
                raise UserError(f"--{option} {number}: at least 1")
            if option == "threads" and number > figures_module.cores():
                raise UserError(f"--threads {number}: this process may use 1 to {figures_module.cores()}")
    if config.json:
        out_file(config.json, "--json")
    return config


def contenders(encoder: VisionTransformer, description: dict[str, Any], folder: Path) -> dict[str, Contender]:
    """PyTorch first; the files of the others are written to the folder.

    Raises:
        UserError: The packages that ONNX needs are missing.
    """
    graph, whole, small = onnx_export.Encoder(encoder), folder / "encoder.onnx", folder / "encoder-int8.onnx"
    files = {
        "ONNX float32": onnx_export.to_onnx(graph, whole, description),
        "ONNX int8": onnx_export.quantize(whole, small),
    }
    weights = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    fields = {BASE: Contender(weights, lambda count: graph)}
    for name, paths in files.items():
        fields[name] = Contender(sum(path.stat().st_size for path in paths), opener(paths[0]))
    return fields


def opener(path: Path) -> Callable[[int], Call]:
    def opened(count: int) -> Call:
        session = onnx_export.session(path, count)
        return lambda images: onnx_export.run_onnx(session, [images])[0]

    return opened


def worth(fields: dict[str, Contender], data: LabelledData, count: int) -> dict[str, dict[str, Any]]:
    """Of each: k-NN accuracy in percent by scaling, bytes, and how far its features are from PyTorch's."""
    rows: dict[str, dict[str, Any]] = {}
    base: Features | None = None
    with threads(count):
        for name, contender in fields.items():
            found = extract(contender.open(count), data)
            base = base or found
            gap = found.test - base.test
            rows[name] = {
                "bytes": contender.size,
                "knn": {how: features.knn_accuracy(features.rescale(found, how)) for how in SCALINGS},
                "greatest_difference": float(gap.abs().max()),
                "relative_difference": float(gap.norm() / base.test.norm()),
            }
    return rows


def extract(call: Call, data: LabelledData) -> Features:
    """Features of both splits: the mean of the patches' tokens."""
    return features.extract_splits(lambda images: features.mean_of_patches(call(images)), data, torch.device("cpu"))


@torch.inference_mode()
def latency(fields: dict[str, Contender], images: Tensor, count: int, rounds: int) -> dict[str, Any]:
    """Seconds a call of each, in turns: what slows the machine down for a while slows down all.

    The order is turned round every other time, as each finds in the caches what its neighbour has left there.
    """
    clock = time.process_time if count == 1 else time.perf_counter
    with threads(count):
        calls = {name: contender.open(count) for name, contender in fields.items()}
        for call in calls.values():
            for _ in range(WARM_UP):
                call(images)
        often = max(1, round(ROUND_SECONDS / max(seconds(calls[BASE], images, 1, clock), 1e-6)))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name in list(calls)[:: -1 if number % 2 else 1]:
                taken[name].append(seconds(calls[name], images, often, clock))
    figures = {name: figure(values) for name, values in taken.items()}
    return {
        "threads": count,
        "batch": len(images),
        "clock": "CPU time" if count == 1 else "wall clock",
        "calls_a_round": often,
        "seconds": figures,
        "times_as_fast": {name: ratio(figures[BASE], one) for name, one in figures.items()},
    }


def seconds(call: Call, images: Tensor, often: int, clock: Callable[[], float]) -> float:
    """Of one call, among so many."""
    start = clock()
    for _ in range(often):
        call(images)
    return (clock() - start) / often


def versions() -> dict[str, Any]:
    """Machine and packages; threads are each table's own."""
    found = figures_module.machine(torch.device("cpu"))
    del found["threads"]
    return {**found, **{name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}}


def print_header(config: Namespace) -> None:
    print(", ".join(f"{key} {value}" for key, value in versions().items()))
    print(
        f"encoder {config.encoder}; features: mean of the patches' tokens after the final norm, k-NN with k 20, T 0.07"
    )
    print(f"{config.rounds} rounds of each, in turns, the order turned round every other time; median (range)")
    print(flush=True)


def print_worth(rows: dict[str, dict[str, Any]]) -> None:
    heads = "".join(f"{'k-NN ' + how:>13}" for how in SCALINGS)
    print(f"{'':<14}{'MB':>9}{heads}{'features differ by at most':>28}{'relative':>10}")
    for name, row in rows.items():
        scores = "".join(f"{row['knn'][how]:>11.2f} %" for how in SCALINGS)
        gaps = f"{row['greatest_difference']:>28.2g}{row['relative_difference']:>10.2g}"
        print(f"{name:<14}{row['bytes'] / MB:>9.2f}{scores}{gaps}")
    print(flush=True)


def print_latency(row: dict[str, Any]) -> None:
    count, batch = row["threads"], row["batch"]
    print(
        f"batch {batch}, {count} thread{'s' if count != 1 else ''}, {row['clock']}, "
        f"{row['calls_a_round']} call{'s' if row['calls_a_round'] != 1 else ''} a round"
    )
    print(f"{'':<14}{'ms a batch':>30}{'times as fast as ' + BASE:>34}")
    for name, one in row["seconds"].items():
        milliseconds: Figure = figure([1000 * value for value in one.rounds])
        print(f"{name:<14}{milliseconds!s:>30}{row['times_as_fast'][name]!s:>34}")
    print(flush=True)
