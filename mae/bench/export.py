"""`mae bench export`: an encoder in PyTorch beside the same one in ONNX Runtime, in float32 and in int8."""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.bench.figures import (
    Figure,
    add_json_option,
    alternate,
    check_options,
    figure,
    plural,
    ratio,
    torch_threads,
    write_json,
)
from mae.data.datamodule import TRAINING_ONLY
from mae.data.labelled import LabelledData
from mae.evaluation import features
from mae.evaluation.features import Features, Scaling
from mae.options import SRC_HELP, ToolParser
from mae.runtime.machine import machine_details
from mae.weights import onnx_export
from mae.weights.load import fill_data_settings, read_weights, trained_data_settings

BASE = "PyTorch"

SCALINGS: tuple[Scaling, ...] = ("none", "whiten")

WARM_UP = 2  # calls of each contender that do not count

ROUND_SECONDS = 0.1  # a round of PyTorch; the others are called as often

MB = 1e6


Call = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> tokens (B, 1 + N, D)


class ExportedForm(NamedTuple):
    """The encoder in one of its forms."""

    size: int  # bytes: of the file; in PyTorch, of the weights
    open: Callable[[int], Call]  # takes the number of threads


def export_command(args: Sequence[str]) -> None:
    config = parse_options(args)
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
        forms = exported_forms(encoder, description, Path(folder))
        result: dict[str, Any] = {"machine": versions(), "worth": quality(forms, data, max(config.threads))}
        print_quality(result["worth"])
        rows = []
        for count, batch in product(config.threads, config.batch):
            (images,) = onnx_export.Encoder(encoder).example(batch)
            rows.append(latency(forms, images, count, config.rounds))
            print_latency(rows[-1])
            # Written after each table, so that a bench that is stopped keeps what it has measured.
            write_json(config.json, {**result, "latency": rows})


def parse_options(args: Sequence[str]) -> Namespace:
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
    add_json_option(parser)
    config = parser.parse_args(list(args))
    check_options(config, "threads", "batch", "rounds")
    return config


def exported_forms(encoder: VisionTransformer, description: dict[str, Any], folder: Path) -> dict[str, ExportedForm]:
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
    forms = {BASE: ExportedForm(weights, lambda count: graph)}
    for name, paths in files.items():
        size = sum(path.stat().st_size for path in paths)
        forms[name] = ExportedForm(size, functools.partial(open_onnx, paths[0]))
    return forms


def open_onnx(path: Path, threads: int) -> Call:
    session = onnx_export.session(path, threads)
    return lambda images: onnx_export.run_onnx(session, [images])[0]


def quality(forms: dict[str, ExportedForm], data: LabelledData, threads: int) -> dict[str, dict[str, Any]]:
    """k-NN accuracy of each in percent by scaling, its bytes, and how far its features are from PyTorch's."""
    rows: dict[str, dict[str, Any]] = {}
    base: Features | None = None
    with torch_threads(threads):
        for name, form in forms.items():
            extracted = extract(form.open(threads), data)
            base = base or extracted
            gap = extracted.test - base.test
            rows[name] = {
                "bytes": form.size,
                "knn": {how: features.knn_accuracy(features.rescale(extracted, how)) for how in SCALINGS},
                "greatest_difference": float(gap.abs().max()),
                "relative_difference": float(gap.norm() / base.test.norm()),
            }
    return rows


def extract(call: Call, data: LabelledData) -> Features:
    """Features of both splits: the mean of the patches' tokens."""
    return features.extract_splits(lambda images: features.mean_of_patches(call(images)), data, torch.device("cpu"))


@torch.inference_mode()
def latency(forms: dict[str, ExportedForm], images: Tensor, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds a call of each, in turns: what slows the machine down for a while slows down all."""
    clock = time.process_time if threads == 1 else time.perf_counter

    def turn(call: Call, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call(images)
        return (clock() - start) / calls

    with torch_threads(threads):
        opened = {name: form.open(threads) for name, form in forms.items()}
        for call in opened.values():
            turn(call, WARM_UP)
        calls = max(1, round(ROUND_SECONDS / max(turn(opened[BASE], 1), 1e-6)))
        seconds: dict[str, list[float]] = {name: [] for name in opened}
        for number in range(rounds):
            for name in alternate(list(opened), number):
                seconds[name].append(turn(opened[name], calls))
    figures = {name: figure(values) for name, values in seconds.items()}
    return {
        "threads": threads,
        "batch": len(images),
        "clock": "CPU time" if threads == 1 else "wall clock",
        "calls_a_round": calls,
        "seconds": figures,
        "times_as_fast": {name: ratio(figures[BASE], one) for name, one in figures.items()},
    }


def versions() -> dict[str, Any]:
    """Machine and packages, without the threads, which each table names."""
    details = machine_details(torch.device("cpu"))
    del details["threads"]
    return {**details, **{name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}}


def print_header(config: Namespace) -> None:
    print(", ".join(f"{key} {value}" for key, value in versions().items()))
    print(
        f"encoder {config.encoder}; features: mean of the patches' tokens after the final norm, k-NN with k 20, T 0.07"
    )
    print(f"{config.rounds} rounds of each, in turns, the order reversed every other time; median (range)")
    print(flush=True)


def print_quality(rows: dict[str, dict[str, Any]]) -> None:
    heads = "".join(f"{'k-NN ' + how:>13}" for how in SCALINGS)
    print(f"{'':<14}{'MB':>9}{heads}{'features differ by at most':>28}{'relative':>10}")
    for name, row in rows.items():
        scores = "".join(f"{row['knn'][how]:>11.2f} %" for how in SCALINGS)
        gaps = f"{row['greatest_difference']:>28.2g}{row['relative_difference']:>10.2g}"
        print(f"{name:<14}{row['bytes'] / MB:>9.2f}{scores}{gaps}")
    print(flush=True)


def print_latency(row: dict[str, Any]) -> None:
    print(
        f"batch {row['batch']}, {plural(row['threads'], 'thread')}, {row['clock']}, "
        f"{plural(row['calls_a_round'], 'call')} a round"
    )
    print(f"{'':<14}{'ms a batch':>30}{'times as fast as ' + BASE:>34}")
    for name, one in row["seconds"].items():
        milliseconds: Figure = figure([1000 * value for value in one.rounds])
        print(f"{name:<14}{milliseconds!s:>30}{row['times_as_fast'][name]!s:>34}")
    print(flush=True)
