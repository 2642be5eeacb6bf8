"""What is in a file of weights, and what it is good for: mae inspect."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae.commands import inspect_parser
from mae.errors import UserError
from mae.models.mae import Pair, as_pair, sincos_positions
from mae.options import out_file
from mae.runtime.checkpoint_files import last_checkpoint
from mae.weights.detect import (
    SINCOS_TOLERANCE,
    ArchOverrides,
    named,
    non_finite,
    overrides_from,
    recognised,
)
from mae.weights.model_card import counted, size_name
from mae.weights.read_file import Opened, open_weights
from mae.weights.state_dict_keys import DECODER, ENCODER, State
from mae.weights.weights import POSITIONS, Weights

WHOSE = {"mae": "this project", "official": "the official code", "timm": "timm", "hf": "Hugging Face's transformers"}

HOLDS = {"encoder": "encoder", "autoencoder": "encoder and decoder", "classifier": "classifier"}

TARGET = "what its decoder predicts is "  # how the note begins that tells of an assumption

TABLES = {"zeros": "all zeros", "sin-cos": "the sin-cos table", "learned": "learned"}

START = re.compile(r"(?P<norm>norm\d?\.weight)$|\.bias$")  # tensors that begin as ones, or as zeros

BUFFER = re.compile(r"\.(running_(mean|var)|num_batches_tracked)$")

NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial", re.IGNORECASE)


class Numbers(NamedTuple):
    """What is odd about the values of tensors, by their names."""

    not_finite: dict[str, int]  # how many are NaN or infinite
    constant: dict[str, float]  # the one value that a tensor has throughout
    untrained: list[str]  # parts whose biases and norms all are as before a first step; none of them is in `constant`
    identical: list[list[str]]  # blocks, equal in all their tensors


def inspect_command(args: Sequence[str]) -> None:
    """Print what SRC holds; the last line is the verdict.

    Raises:
        UserError: It cannot be used. What could be found out has been printed, and written to --json, all the same.
    """
    config = inspect_parser().parse_args(list(args))
    if config.json:
        out_file(config.json, "--json")
    try:
        facts = examined(config.src, overrides_from(config))
    except UserError as error:
        facts = {"source": config.src, "problems": [str(error)], "verdict": str(error)}
    else:
        print("\n".join(text(facts)))
    if config.json:
        Path(config.json).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
        print(f"wrote {config.json}")
    if facts["problems"]:
        raise UserError(facts["verdict"])
    print(facts["verdict"])


# ---- what is found out -----------------------------------------------------------------------------------------------


def examined(src: str, told: ArchOverrides) -> dict[str, Any]:
    """All that is printed, as plain data.

    Raises:
        UserError: It cannot be read, or is nothing that is known.
    """
    opened = open_weights(src)
    weights = recognised(opened, told)
    # No names here by which a configuration of transformers or timm is known: the file may lie beside the weights.
    facts: dict[str, Any] = {"source": str(weights.source), "bytes": size_on_disk(opened.path)}
    facts |= {"format": weights.format, "holds": weights.holds, "training_state": training_state(opened)}
    facts |= {"size": size_name(weights.config), "model": model_of(weights)}
    if about := weights.classifier:
        facts["classifier"] = {"classes": len(about["classes"]), "pool": about["pool"], "head": about["head"]}
    facts |= {"parameters": parameters(weights.state), "target": target(weights)}
    facts["positions"] = {key: kind_of_positions(weights.state[key], weights.grid) for key in places(weights)}
    facts |= {key: weights.description.get(key) for key in ("mean", "std", "licence")}
    facts["dtypes"] = dict(Counter(str(value.dtype).removeprefix("torch.") for value in opened.state.values()))
    numbers = judged(weights.state)
    facts |= {"non_finite": numbers.not_finite, "constant": numbers.constant, "untrained": numbers.untrained}
    facts["identical_blocks"] = numbers.identical
    facts["notes"] = list(weights.notes)
    facts["warnings"] = list(warnings(facts))
    facts["problems"] = problems = [*weights.problems, *not_finite(numbers)]
    facts["uses"] = uses(src, opened, weights, needed(opened, weights, told))
    if problems:
        facts["uses"] = dict.fromkeys(facts["uses"], "no, something is wrong with it")
    facts["verdict"] = f"{weights.source} cannot be used: {'; '.join(problems)}" if problems else "usable"
    return facts


def size_on_disk(path: Path) -> int:
    """Bytes, of all parts where there are several."""
    files = [path]
    if path.name.endswith(".index.json"):
        files += [path.with_name(name) for name in set(json.loads(path.read_text())["weight_map"].values())]
    return sum(file.stat().st_size for file in files)


def training_state(opened: Opened) -> dict[str, int] | None:
    """Step and epoch, as far as told, of a file from which a training could go on."""
    if not opened.optimizer:
        return None
    told = {"step": (opened.description or {}).get("step"), "epoch": opened.about.get("epoch")}
    return {key: value for key, value in told.items() if isinstance(value, int)}


def model_of(weights: Weights) -> dict[str, Any]:
    """The arguments of MaskedAutoencoder, without those of a decoder where there is none."""
    theirs = () if weights.has_decoder else ("decoder_", "norm_pix_loss")
    return {key: value for key, value in weights.config.items() if not (theirs and key.startswith(theirs))}


def part_of(key: str) -> str:
    return "decoder" if key.startswith(DECODER) else "head" if key.startswith(f"{ENCODER}head.") else "encoder"


def parameters(state: State) -> dict[str, int]:
    """How many numbers the parts have, positions among them."""
    counts: Counter[str] = Counter()
    for key, value in state.items():
        counts[part_of(key)] += 0 if BUFFER.search(key) else value.numel()
    return {part: counts[part] for part in ("encoder", "decoder", "head") if counts[part]}


def target(weights: Weights) -> str | None:
    """What the decoder predicts; None: there is no decoder."""
    if not weights.has_decoder:
        return None
    for note in weights.notes:
        if note.startswith(TARGET):
            return note.removeprefix(TARGET)
    return "pixels normalised within each patch" if weights.config.get("norm_pix_loss", True) else "plain pixels"


def places(weights: Weights) -> list[str]:
    """The names of positions that have the shape they should have."""
    rows = 1 + weights.grid[0] * weights.grid[1]
    return [
        key
        for key in POSITIONS
        if key in weights.state and weights.state[key].ndim == 3 and weights.state[key].shape[:2] == (1, rows)
    ]


def kind_of_positions(positions: Tensor, grid: Pair) -> str:
    """(1, 1 + N, D): one of TABLES."""
    width = positions.shape[2]
    if not positions.any():
        return "zeros"
    table = width % 4 == 0 and torch.allclose(positions, sincos_positions(width, grid), rtol=0, atol=SINCOS_TOLERANCE)
    return "sin-cos" if table else "learned"


def judged(state: State) -> Numbers:
    """One tensor after the other, so that memory for no other copy is taken."""
    found = Numbers({}, {}, [], identical_blocks(state))
    for key, value in state.items():
        if not value.is_floating_point() or not value.numel():
            continue
        low, high = (float(end) for end in value.aminmax())  # of which a NaN makes NaNs
        if not (-torch.inf < low and high < torch.inf):
            found.not_finite[key] = non_finite(value)
        elif low == high and value.numel() > 1:
            found.constant[key] = low
    starts: dict[str, dict[str, float]] = defaultdict(dict)
    for key in state:
        if (match := START.search(key)) and "patch_embed" not in key:  # whose bias is drawn at random
            starts[part_of(key)][key] = 1.0 if match["norm"] else 0.0
    for part, first in starts.items():
        if all(found.constant.get(key) == value for key, value in first.items()):
            found.untrained.append(part)
            for key in first:
                del found.constant[key]
    return found


def identical_blocks(state: State) -> list[list[str]]:
    """Groups of blocks that have the same numbers throughout."""
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        if match := re.match(r"((?:encoder\.|decoder_)blocks\.\d+)\.(.*)", key):
            blocks[match[1]][match[2]] = value
    groups: list[list[str]] = []
    for name, block in blocks.items():
        for group in groups:
            other = blocks[group[0]]
            if block.keys() == other.keys() and all(torch.equal(value, other[part]) for part, value in block.items()):
                group.append(name)
                break
        else:
            groups.append([name])
    return [group for group in groups if len(group) > 1]


def needed(opened: Opened, weights: Weights, told: ArchOverrides) -> list[str]:
    """The options without which other commands would find something else, or nothing."""
    given = [f"--{key}" for key, value in told._asdict().items() if value is not None]
    if not given:
        return []
    try:
        return given if recognised(opened, ArchOverrides()).config != weights.config else []
    except UserError:
        return given


def not_finite(numbers: Numbers) -> Iterator[str]:
    if numbers.not_finite:
        counts = [f"{key} ({count:,})" for key, count in numbers.not_finite.items()]
        yield f"it holds numbers that are NaN or infinite: {named(counts)}"


def warnings(facts: dict[str, Any]) -> Iterator[str]:
    """What does not keep the weights from being used, and should be known."""
    constant: dict[str, float] = dict(facts["constant"])
    for part in facts["untrained"]:
        yield f"{part} never trained? All its biases are zero and all its norms one, as before the first step"
    for key, what in ((f"{ENCODER}cls_token", "class token"), ("mask_token", "mask token")):
        if constant.get(key) == 0:
            del constant[key]
            yield f"the {what} never trained? It is all zeros"
    for key, kind in facts["positions"].items():
        constant.pop(key, None)
        if kind == "zeros":
            yield f"{key} is all zeros: positions are not told apart"
    if constant:
        yield f"one value throughout: {named([f'{key} ({value:g})' for key, value in constant.items()])}"
    for group in facts["identical_blocks"]:
        yield f"blocks with the same numbers throughout: {named(group)}"
    if facts["licence"] and NON_COMMERCIAL.search(facts["licence"]):
        yield f"not for commercial use: {facts['licence']}"


def uses(src: str, opened: Opened, weights: Weights, options: list[str]) -> dict[str, str]:
    """By commands: yes or no, and why."""
    yes = f"yes, once `mae convert` with {', '.join(options)} has written it down" if options else "yes"
    encoder = yes
    if about := weights.classifier:
        encoder += f", with allow_finetuned true: its encoder has seen the labels of {len(about['classes'])} classes"
    return {
        "probe, finetune, knn, embed": encoder,
        "reconstruct": yes if weights.has_decoder else "no, it has no decoder",
        "evaluate, predict": yes if weights.classifier else "no, it has no classifier head",
        "resume": resume(src, opened, weights),
    }


def resume(src: str, opened: Opened, weights: Weights) -> str:
    start = "--model.encoder" if weights.classifier else "--model.init"
    if opened.optimizer and "recipe" in (opened.description or {}):
        return "yes"
    if opened.optimizer:
        return f"no, other software's training is not continued: {start} starts from its weights"
    if Path(src).expanduser().is_dir() and (last := last_checkpoint(src)).is_file():
        return f"no, these are weights alone: {last} has the state of the training"
    return f"no, it has no training state: {start} starts from its weights"


# ---- in words --------------------------------------------------------------------------------------------------------


def text(facts: dict[str, Any]) -> Iterator[str]:
    """The table, a line each; all but the verdict."""
    rows = [("file", f"{facts['source']}, {size_in_words(facts['bytes'])}"), ("kind", kind(facts))]
    rows += [("architecture", architecture(facts))]
    model: dict[str, Any] = facts["model"]
    if facts["holds"] == "autoencoder":
        sizes = (model[f"decoder_{key}"] for key in ("embed_dim", "depth", "num_heads"))
        rows += [("decoder", "width {}, depth {}, heads {}".format(*sizes)), ("target", facts["target"])]
    rows += [("parameters", ", ".join(f"{part} {count:,}" for part, count in facts["parameters"].items()))]
    rows += [("positions", f"{key} {TABLES[found]}") for key, found in facts["positions"].items()]
    rows += [("mean, std", "; ".join(" ".join(f"{v:g}" for v in facts[key] or []) for key in ("mean", "std")))]
    rows += [("numbers", ", ".join(f"{dtype} ({count} tensors)" for dtype, count in facts["dtypes"].items()))]
    rows += [("licence", facts["licence"])] if facts["licence"] else []
    rows += [("good for", f"{what}: {said}") for what, said in facts["uses"].items()]
    for key in ("notes", "warnings", "problems"):
        rows += [(key.removesuffix("s"), line) for line in facts[key]]
    before = ""
    width = max(len(name) for name, _ in rows) + 2
    for name, said in rows:
        yield f"{'' if name == before else name:<{width}}{said}"
        before = name


def size_in_words(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"


def kind(facts: dict[str, Any]) -> str:
    said = f"{HOLDS[facts['holds']]}, in the format of {WHOSE[facts['format']]}"
    if about := facts.get("classifier"):
        pooled = {"mean": "the mean of patch tokens", "class": "the class token"}[about["pool"]]
        norm = " after BatchNorm" if about["head"] == "batchnorm" else ""
        said += f"; {about['classes']} classes from {pooled}{norm}"
    if (state := facts["training_state"]) is None:
        return said
    told = ", ".join(f"{key} {value:,}" for key, value in state.items())
    return f"{said}; with the state of its training" + (f" ({told})" if told else "")


def architecture(facts: dict[str, Any]) -> str:
    model: dict[str, Any] = facts["model"]
    (ph, pw), (h, w) = as_pair(model["patch_size"]), as_pair(model["image_size"])
    sizes = ", ".join(
        f"{word} {model[key]:g}"
        for word, key in (
            ("width", "embed_dim"),
            ("depth", "depth"),
            ("heads", "num_heads"),
            ("mlp ratio", "mlp_ratio"),
        )
    )
    channels = counted(model["in_chans"], "channel")
    images = f"images {h}x{w} of {channels}, patches {ph}x{pw} (a grid of {h // ph}x{w // pw})"
    return f"{facts['size'] or 'of its own size'}: {sizes}; {images}"
