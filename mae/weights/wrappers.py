"""The encoder in a file that holds more: behind whatever prefix it lies, and the decoder that belongs to it.

An encoder is found by its patch embedding and its blocks, which have names of their own in each software. Everything
before these names is the prefix. A decoder may have another one (`backbone.` and `decoder.`).
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mae.errors import UserError
from mae.weights.state_dict_keys import DECODER, ENCODER, Dialect, State, spelled_decoder, to_ours

# What the names of the patch embedding and of the blocks are, behind the prefix.
FORMS: dict[Dialect, tuple[str, str]] = {
    "official": (r"patch_embed\.proj\.weight", r"blocks\.\d"),
    "hf": (r"embeddings\.patch_embeddings\.projection\.weight", r"(?:encoder\.layer|layers)\.\d"),
    "mmpretrain": (r"patch_embed\.projection\.weight", r"layers\.\d"),
    "torchvision": (r"conv_proj\.weight", r"encoder\.layers\.encoder_layer_\d"),
}

HF_PARTS = ("vit.", "decoder.", "classifier.", "pooler.")  # of a model of transformers, beside each other

MM_HEADS = ("head.fc.", "head.layers.head.")  # mmpretrain's, beside the encoder


SOLO_LEARN_WIDTHS = (192, 384)  # of its vit_tiny and vit_small, which have more heads than others of their width


class Unwrapped(NamedTuple):
    """The tensors of one encoder and of what belongs to it."""

    state: State  # under our names
    dialect: Dialect
    notes: list[str]  # what of the file was left out
    decoder: str  # the prefix of a decoder in a module of its own; "": there is none
    recorded: dict[str, Any]  # what follows from the names: mean and std among the tensors, torchvision's pool


def encoder_roots(names: Collection[str]) -> dict[str, Dialect]:
    """The prefixes behind which there is an encoder, each with the software whose names it has."""
    roots: dict[str, Dialect] = {}
    for dialect, (stem, block) in FORMS.items():
        stems, blocks = (
            {match[1] for name in names if (match := re.match(rf"((?:.*\.)?){part}", name))} for part in (stem, block)
        )
        roots |= dict.fromkeys(sorted(stems & blocks), dialect)
    return roots


def unwrap(path: Path, state: State, prefix: str | None) -> Unwrapped | None:
    """The one encoder of a file, or the one behind `prefix`; None if there is no encoder at all.

    Raises:
        UserError: There are several and `prefix` does not say which, or there is none behind it.
    """
    roots = encoder_roots(state)
    if not roots and prefix is None:
        return None
    root = chosen_root(path, list(roots), prefix)
    dialect, parent = roots[root], root[: root[:-1].rfind(".") + 1]
    decoder, decoder_names = ("", {}) if dialect == "hf" else decoder_of(state, root, parent)
    others = tuple(other for other in roots if other != root and other.startswith(root))  # the root may be ""
    starts: tuple[str, ...] = (root,)
    if dialect == "hf" and root.endswith("vit."):
        root, starts = parent, tuple(parent + part for part in HF_PARTS)
    used = {key: key.removeprefix(root) for key in state if key.startswith(starts) and not key.startswith(others)}
    used = {key: name for key, name in used.items() if key not in decoder_names}
    if dialect == "mmpretrain" and f"{root}ln2.weight" in state and not any(k.startswith("neck.") for k in state):
        for head in MM_HEADS:
            used |= {key: key.replace(head, "head.") for key in state if key.startswith(parent + head)}
    ours = to_ours({name: state[key] for key, name in used.items()}, dialect)
    ours |= {name: state[key] for key, name in decoder_names.items()}
    used |= decoder_names
    notes = []
    # Modules that mask have a mask token beside their ViT, whose head they do not use.
    heads = [key for key in ours if key.startswith(f"{ENCODER}head.")]
    if heads and (any(key.startswith(DECODER) for key in ours) or (parent != root and f"{parent}mask_token" in state)):
        ours = {key: value for key, value in ours.items() if key not in heads}
        notes.append("its head is left out: pre-training does not use it")
    means = {key: f"data_preprocessor.{key}" for key in ("mean", "std") if f"data_preprocessor.{key}" in state}
    left = [key for key in state if key not in used and key not in means.values()]
    if left:
        count = "1 tensor is" if len(left) == 1 else f"{len(left)} tensors are"
        notes.append(f"{count} left out: {', '.join(parts_of(left, root))}")
    if dialect == "official" and root.endswith(ENCODER):
        dialect = "mae"
    stem = ours.get(f"{ENCODER}patch_embed.proj.weight")
    if decoder and f"{parent}classifier.weight" in left and stem is not None and len(stem) in SOLO_LEARN_WIDTHS:
        notes.append("if solo-learn wrote it, it has 12 heads: state --num_heads 12")
    recorded: dict[str, Any] = {key: in_unit_range(state[name]) for key, name in means.items()}
    if dialect == "torchvision":
        recorded["pool"] = "class"
    return Unwrapped(ours, dialect, notes, decoder, recorded)


def chosen_root(path: Path, roots: list[str], prefix: str | None) -> str:
    """
    Raises:
        UserError: As in `unwrap`.
    """
    names = dict(zip(roots, short_names(roots), strict=True))
    fitting = roots
    if prefix is not None:
        wanted = f"{prefix.rstrip('.')}." if prefix.strip(".") else ""
        fitting = [root for root in roots if (root.startswith(wanted) if wanted else not root)]
    quoted = [f"'{name}'" for name in names.values()]
    if not fitting:
        there = f"there is one behind {' and one behind '.join(quoted)}" if roots else "there is none at all"
        raise UserError(f"--prefix {prefix}: {path} has no encoder behind it; {there}")
    if len(fitting) > 1:
        several = " and ".join(f"'{names[root]}'" for root in fitting[:5]) + (" and more" if len(fitting) > 5 else "")
        raise UserError(
            f"{path} holds {len(fitting)} encoders, behind the prefixes {several}: state which; `mae convert` and "
            "`mae inspect` take --prefix, mae.load and mae.load_encoder prefix="
        )
    return fitting[0]


def short_names(roots: list[str]) -> list[str]:
    """The prefixes up to where they differ from each other, without the last dot."""
    if len(roots) < 2:
        return [root.rstrip(".") for root in roots]
    parts = [root.split(".")[:-1] for root in roots]
    for length in range(1, 1 + max(map(len, parts))):
        names = [".".join(part[:length]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [".".join(part) for part in parts]


def decoder_of(state: State, root: str, parent: str) -> tuple[str, dict[str, str]]:
    """The decoder that belongs to an encoder.

    Returns:
        Its prefix if it is a module of its own, else ""; our names of its tensors by theirs.
    """
    end = "decoder_embed.weight"
    prefixes = [key.removesuffix(end) for key in state if key == end or key.endswith(f".{end}")]
    for prefix in sorted(prefixes, key=lambda prefix: (prefix != root, -len(prefix))):
        around = prefix[: prefix[:-1].rfind(".") + 1]
        if prefix == root:  # the official form: its names are among the encoder's
            return "", {}
        if root.startswith(prefix):
            starts = tuple(prefix + start for start in DECODER)
            return "", {key: key.removeprefix(prefix) for key in state if key.startswith(starts)}
        if root.startswith(around):
            names = {key: spelled_decoder(key.removeprefix(prefix)) for key in state if key.startswith(prefix)}
            if "mask_token" not in names.values() and f"{around}mask_token" in state:
                names[f"{around}mask_token"] = "mask_token"
            return prefix, names
    return "", {}


def parts_of(names: Iterable[str], root: str) -> list[str]:
    """The modules that these tensors are in, as far as they differ from where the encoder is."""
    parts: dict[str, None] = {}
    for name in names:
        words = name.split(".")
        length = next((i for i in range(1, len(words)) if not root.startswith(".".join(words[:i]) + ".")), len(words))
        parts[".".join(words[:length]) + ("." if length < len(words) else "")] = None
    return list(parts)


def in_unit_range(values: Tensor) -> list[float]:
    """Mean or std of channels in 0 to 255, as of channels in [0, 1]."""
    return [value / 255 for value in values.flatten().tolist()]
