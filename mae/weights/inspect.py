"""`mae inspect`: what a file of weights holds, what it can be used for, and what is wrong with it."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mae.commands import inspect_parser
from mae.errors import UserError
from mae.models.mae import as_pair, sincos_positions
from mae.options import out_file
from mae.runtime.checkpoint_files import last_checkpoint
from mae.runtime.files import write_report
from mae.runtime.text import printable
from mae.weights.detect import count_non_finite, detect_opened, first_names, overrides_from
from mae.weights.detect_architecture import NO_OVERRIDES, SINCOS_TOLERANCE, ArchOverrides
from mae.weights.model_card import count_of, size_name
from mae.weights.read_file import Opened, open_weights, parts_in
from mae.weights.state_dict_keys import DECODER, ENCODER, State
from mae.weights.weights import POSITIONS, Weights

FORMAT_NAMES = {
    "mae": "this project",
    "official": "the official code",
    "timm": "timm",
    "hf": "Hugging Face's transformers",
    "torchvision": "torchvision",
    "mmpretrain": "mmpretrain",
}

POSITION_KINDS = {"zeros": "all zeros", "sin-cos": "the sin-cos table", "learned": "learned"}

BIAS_OR_NORM = re.compile(r"(?P<norm>norm\d?\.weight)$|\.bias$")  # tensors that are ones, or zeros, before training

BUFFER = re.compile(r"\.(running_(mean|var)|num_batches_tracked)$")

NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)


def inspect_command(args: Sequence[str]) -> None:
    """Print what SRC holds; the last line is the verdict.

    Raises:
        UserError: It cannot be used. What is known about it has been printed, and written to --json, all the same.
    """
    config = inspect_parser().parse_args(list(args))
    if config.json:
        out_file(config.json, "--json")
    try:
        facts = collect_facts(config.src, overrides_from(config))
    except UserError as error:
        facts = {"source": printable(config.src), "problems": [str(error)], "verdict": str(error)}
    else:
        print("\n".join(map(printable, table_lines(facts))))
    if config.json:
        write_report(config.json, json.dumps(facts, indent=1, allow_nan=False) + "\n")
        print(f"wrote {config.json}")
    if facts["problems"]:
        raise UserError(facts["verdict"])
    print(facts["verdict"])


# ---- facts -----------------------------------------------------------------------------------------------------------


def collect_facts(src: str, overrides: ArchOverrides) -> dict[str, Any]:
    """Everything that is printed, as plain data.

    Raises:
        UserError: The file cannot be read, or holds nothing that is known here.
    """
    opened = open_weights(src)
    weights = detect_opened(opened, overrides)
    # The keys must not be those by which a configuration of transformers or timm is recognised ("model_type",
    # "architecture"): the JSON file may lie beside the weights.
    facts: dict[str, Any] = {"source": printable(str(weights.source)), "bytes": size_on_disk(opened.path)}
    facts |= {"format": weights.format, "holds": weights.holds, "training_state": training_state(opened)}
    unused = () if weights.has_decoder else ("decoder_", "norm_pix_loss")
    model = {key: value for key, value in weights.config.items() if not key.startswith(unused)}
    facts |= {"size": size_name(weights.config), "model": model}
    if about := weights.classifier:
        facts["classifier"] = {"classes": len(about["classes"]), "pool": about["pool"], "head": about["head"]}
    facts |= {"parameters": parameters_by_part(weights.state), "target": weights.target}
    facts["target_assumed_from"] = weights.target_assumed_from or None
    facts["positions"] = kinds_of_positions(weights)
    facts |= {key: weights.description.get(key) for key in ("mean", "std", "licence")}
    facts["dtypes"] = dict(Counter(str(value.dtype).removeprefix("torch.") for value in opened.state.values()))
    facts |= odd_values(weights.state)
    facts["notes"] = list(weights.notes)
    facts["warnings"] = list(warning_lines(facts))
    problems = list(weights.problems)
    if facts["non_finite"]:
        counts = [f"{key} ({count:,})" for key, count in facts["non_finite"].items()]
        problems.append(f"it holds numbers that are NaN or infinite: {first_names(counts)}")
    facts["problems"] = problems
    facts["uses"] = possible_uses(src, opened, weights, required_options(opened, weights, overrides))
    if problems:
        facts["uses"] = dict.fromkeys(facts["uses"], "no, something is wrong with it")
    facts["verdict"] = f"{weights.source} cannot be used: {'; '.join(problems)}" if problems else "usable"
    return facts


def size_on_disk(path: Path) -> int:
    """Bytes, those of all parts where the weights are split over several files."""
    files = [path]
    if path.name.endswith(".index.json"):
        files += parts_in(path)
    return sum(file.stat().st_size for file in files)


def training_state(opened: Opened) -> dict[str, int] | None:
    """Step and epoch, where recorded, of a file with the state of an optimiser; None for other files."""
    if not opened.optimizer:
        return None
    state = {"step": (opened.description or {}).get("step"), "epoch": opened.about.get("epoch")}
    return {key: value for key, value in state.items() if isinstance(value, int)}


def model_part(key: str) -> str:
    return "decoder" if key.startswith(DECODER) else "head" if key.startswith(f"{ENCODER}head.") else "encoder"


def parameters_by_part(state: State) -> dict[str, int]:
    """How many parameters encoder, decoder and head have, positions included."""
    counts: Counter[str] = Counter()
    for key, value in state.items():
        counts[model_part(key)] += 0 if BUFFER.search(key) else value.numel()
    return {part: counts[part] for part in ("encoder", "decoder", "head") if counts[part]}


def kinds_of_positions(weights: Weights) -> dict[str, str]:
    """One of POSITION_KINDS for each position embedding that has the expected shape, (1, 1 + N, D)."""
    kinds = {}
    for key in POSITIONS:
        positions = weights.state.get(key, torch.empty(0))
        if positions.ndim != 3 or positions.shape[:2] != (1, 1 + weights.grid[0] * weights.grid[1]):
            continue
        fixed = positions.shape[2] % 4 == 0 and torch.allclose(
            positions, sincos_positions(positions.shape[2], weights.grid), rtol=0, atol=SINCOS_TOLERANCE
        )
        kinds[key] = "sin-cos" if fixed else "learned" if positions.any() else "zeros"
    return kinds


def odd_values(state: State) -> dict[str, Any]:
    """What is odd about the values of single tensors.

    Returns:
        non_finite: by tensor, how many of its numbers are NaN or infinite; constant: by tensor, the one value that it
        has throughout; untrained: the parts whose biases and norms are all as before the first step, none of which is
        in `constant`.
    """
    non_finite: dict[str, int] = {}
    constant: dict[str, float] = {}
    for key, value in state.items():  # one after the other, so that no second copy of the weights takes memory
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = (float(end) for end in value.aminmax())  # NaN if the tensor holds a NaN
        if not (-torch.inf < low and high < torch.inf):
            non_finite[key] = count_non_finite(value)
        elif low == high and value.numel() > 1:
            constant[key] = low
    initial: dict[str, dict[str, float]] = defaultdict(dict)
    for key in state:
        if (match := BIAS_OR_NORM.search(key)) and "patch_embed" not in key:  # its bias is drawn at random
            initial[model_part(key)][key] = 1.0 if match["norm"] else 0.0
    untrained = [part for part, values in initial.items() if all(constant.get(k) == v for k, v in values.items())]
    for part in untrained:
        for key in initial[part]:
            del constant[key]
    return {"non_finite": non_finite, "constant": constant, "untrained": untrained}


def required_options(opened: Opened, weights: Weights, overrides: ArchOverrides) -> list[str]:
    """The options without which other commands would take these weights for something else, or refuse them."""
    options = [f"--{key}" for key, value in overrides._asdict().items() if value is not None]
    if not options:
        return []
    try:
        return options if detect_opened(opened, NO_OVERRIDES).config != weights.config else []
    except UserError:
        return options


def warning_lines(facts: dict[str, Any]) -> Iterator[str]:
    """What a user should know, though the weights can be used."""
    constant: dict[str, float] = dict(facts["constant"])
    for part in facts["untrained"]:
        yield f"{part} never trained? All its biases are zero and all its norms one, as before the first step"
    for key, token in ((f"{ENCODER}cls_token", "class token"), ("mask_token", "mask token")):
        if constant.get(key) == 0:
            del constant[key]
            yield f"the {token} never trained? It is all zeros"
    for key, kind in facts["positions"].items():
        constant.pop(key, None)
        if kind == "zeros":
            yield f"{key} is all zeros: the network cannot tell positions apart"
    if constant:
        yield f"one value throughout: {first_names([f'{key} ({value:g})' for key, value in constant.items()])}"
    if facts["licence"] and NON_COMMERCIAL.search(facts["licence"]):
        yield f"not for commercial use: {facts['licence']}"


def possible_uses(src: str, opened: Opened, weights: Weights, options: list[str]) -> dict[str, str]:
    """For each group of commands: yes or no, and why."""
    yes = f"yes, after `mae convert` with {', '.join(options)}" if options else "yes"
    encoder = yes
    if about := weights.classifier:
        encoder += f", with allow_finetuned true: its encoder has seen the labels of {len(about['classes'])} classes"
    start = "--model.encoder" if weights.classifier else "--model.init"
    if opened.optimizer and "recipe" in (opened.description or {}):
        resume = "yes"
    elif opened.optimizer:
        resume = f"no, other software's training cannot be resumed: {start} starts from its weights"
    elif Path(src).is_dir() and (last := last_checkpoint(src)).is_file():
        resume = f"no, it holds only weights: {last} has the state of the training"
    else:
        resume = f"no, it has no training state: {start} starts from its weights"
    return {
        "probe, finetune, knn, embed": encoder,
        "reconstruct": yes if weights.has_decoder else "no, it has no decoder",
        "evaluate, predict": yes if weights.classifier else "no, it has no classifier head",
        "resume": resume,
    }


# ---- the table -------------------------------------------------------------------------------------------------------


def table_lines(facts: dict[str, Any]) -> Iterator[str]:
    """The lines of the table, without the verdict."""
    model: dict[str, Any] = facts["model"]
    size = f"{facts['bytes'] / 1e6:,.1f} MB" if facts["bytes"] >= 1e5 else f"{facts['bytes']:,} bytes"
    rows = [("file", f"{facts['source']}, {size}"), ("kind", kind_in_words(facts))]
    rows += [("architecture", sizes_in_words(facts["size"], model))]
    if facts["holds"] == "autoencoder":
        sizes = (model[f"decoder_{key}"] for key in ("embed_dim", "depth", "num_heads"))
        source = facts["target_assumed_from"]
        target = facts["target"] + (f" (not recorded: assumed from {source})" if source else "")
        rows += [("decoder", "width {}, depth {}, heads {}".format(*sizes)), ("target", target)]
    rows += [("parameters", ", ".join(f"{part} {count:,}" for part, count in facts["parameters"].items()))]
    rows += [("positions", f"{key} {POSITION_KINDS[kind]}") for key, kind in facts["positions"].items()]
    rows += [("mean, std", "; ".join(" ".join(f"{v:g}" for v in facts[key] or []) for key in ("mean", "std")))]
    rows += [("numbers", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in facts["dtypes"].items()))]
    rows += [("licence", facts["licence"])] if facts["licence"] else []
    rows += [("good for", f"{commands}: {answer}") for commands, answer in facts["uses"].items()]
    for key in ("notes", "warnings", "problems"):
        rows += [(key.removesuffix("s"), line) for line in facts[key]]
    before = ""
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        yield f"{'' if name == before else name:<{width}}{value}"
        before = name


def kind_in_words(facts: dict[str, Any]) -> str:
    holds = "encoder and decoder" if facts["holds"] == "autoencoder" else facts["holds"]
    words = f"{holds}, in the format of {FORMAT_NAMES[facts['format']]}"
    if about := facts.get("classifier"):
        pooled = {"mean": "the mean of patch tokens", "class": "the class token"}[about["pool"]]
        norm = " after BatchNorm" if about["head"] == "batchnorm" else ""
        words += f"; {about['classes']} classes from {pooled}{norm}"
    if (state := facts["training_state"]) is None:
        return words
    progress = ", ".join(f"{key} {value:,}" for key, value in state.items())
    return f"{words}; with the state of its training" + (f" ({progress})" if progress else "")


def sizes_in_words(name: str | None, model: dict[str, Any]) -> str:
    (ph, pw), (h, w) = as_pair(model["patch_size"]), as_pair(model["image_size"])
    sizes = f"width {model['embed_dim']}, depth {model['depth']}, heads {model['num_heads']}"
    sizes += f", mlp ratio {model['mlp_ratio']:g}"
    images = f"images {h}x{w} of {count_of(model['in_chans'], 'channel')}, patches {ph}x{pw}"
    return f"{name or 'of its own size'}: {sizes}; {images} (a grid of {h // ph}x{w // pw})"
