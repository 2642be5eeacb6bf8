"""`mae convert`: weights in another format, checked numerically before the file gets its name."""

import contextlib
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from safetensors import SafetensorError

from mae.commands import convert_parser
from mae.errors import UserError
from mae.options import out_file, require_utf8
from mae.runtime.files import sync
from mae.runtime.text import printable_lines
from mae.weights import model_card, onnx_export
from mae.weights.classifier import build_classifier
from mae.weights.conversion_checks import (
    TOLERANCE,
    check_gap,
    check_same_outputs,
    check_same_tensors,
    own_outputs,
    timm_outputs,
    transformers_outputs,
)
from mae.weights.detect import overrides_from, usable_weights
from mae.weights.load import print_notes, save_safetensors
from mae.weights.read_file import MODEL_FILES
from mae.weights.state_dict_keys import ENCODER, from_ours
from mae.weights.weights import Weights, fold_batchnorm

FOLDED = "the head's BatchNorm, which is folded into its linear layer: the logits are the same"


class Conversion(NamedTuple):
    """Converted weights in the staging folder, under the name that they will have."""

    path: Path  # the file or folder to load
    weights: Weights  # what the format holds of the weights that were converted
    lost: list[str]  # what the format does not hold
    checks: list[str]  # what was compared, and how it came out


def convert_command(args: Sequence[str]) -> None:
    config = convert_parser().parse_args(list(args))
    dst = checked_destination(config)
    weights = usable_weights(config.src, overrides_from(config)).adapted(config.image_size, config.in_chans)
    if "timm_encoder" in weights.config and config.format != "mae":
        raise UserError(
            f"--format {config.format}: {weights.source} holds timm's {weights.config['timm_encoder']}, which is "
            "written in --format mae alone; the encoder.safetensors of its run loads into timm's model as it is"
        )
    for option in ("decoder_num_heads", "norm_pix_loss"):
        if config[option] is not None and not weights.has_decoder:
            raise UserError(f"--{option} {config[option]}: there is no decoder in what is written")
    print_notes(weights)
    with staging_folder(dst, config.force) as folder:
        conversion = FORMATS[config.format][1](weights, folder / dst.name, config)
        write_card(conversion, config.format)
        names = sorted(path.name for path in conversion.path.iterdir()) if conversion.path.is_dir() else []
    for check in conversion.checks:
        print(f"checked   {check}")
    for lost in conversion.lost:
        print(f"left out  {lost}")
    print(f"wrote     {dst}: {model_card.architecture_name(weights)}, {conversion.weights.holds}")
    if config.push:
        push_to_hub(dst, names, config.push, config.private)


def checked_destination(config: Namespace) -> Path:
    """The absolute path to write to.

    Raises:
        UserError: The path does not suit the format, or an option would have no effect.
    """
    dst = Path(config.dst).absolute()
    require_utf8(dst, "DST")
    suffixes, _ = FORMATS[config.format]
    if file_suffix(dst) not in suffixes or not dst.name:
        wanted = " or ".join(suffix or "no suffix (a folder)" for suffix in suffixes)
        raise UserError(f"{dst}: --format {config.format} wants {wanted}")
    if dst.exists() and dst.is_dir() != (file_suffix(dst) == ""):
        kinds = ("folder", "file") if dst.is_dir() else ("file", "folder")
        raise UserError(f"{dst} is a {kinds[0]}, but a {kinds[1]} is to be written: choose another name")
    if (dst / "config.yaml").exists() or (dst / "checkpoints").exists():
        raise UserError(f"{dst} is a run folder: choose another one, or a file in it")
    out_file(str(dst.parent / f"{dst.name}.md"), "DST")
    is_graph = config.format in ("onnx", "export")
    for option, no_effect in (
        ("output", config.output is not None and not is_graph),
        ("free_size", config.free_size and not is_graph),
        ("mask_ratio", config.mask_ratio is not None and config.output != "reconstruction"),
        ("quantize", config.quantize and config.format != "onnx"),
        ("push", config.push is not None and file_suffix(dst) != ""),
    ):
        if no_effect:
            raise UserError(f"--{option} does nothing here: see `mae convert --help`")
    if config.free_size and config.output not in (None, "tokens"):
        raise UserError(f"--free_size true: --output {config.output} has a fixed size")
    return dst


def file_suffix(path: Path) -> str:
    """The suffix of a file; "" for a folder, whose name may end in a number (v1.5)."""
    return "" if re.fullmatch(r"\.\d*", path.suffix) else path.suffix


# ---- complete or not there -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staging_folder(dst: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside DST, whose files are moved into place if the block succeeds.

    Raises:
        UserError: There is something at DST already, or it cannot be written.
    """
    require_free(dst, force)
    # Exit so that the temporary folder is removed when a batch system ends the process.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as temporary:
            folder = Path(temporary)
            yield folder
            move_into_place(folder, dst, force)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{dst} cannot be written: {reason}") from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise UserError(f"{dst} cannot be written: is the disk full?") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def move_into_place(folder: Path, dst: Path, force: bool) -> None:
    """Move the staged files to their places; a new folder is moved as a whole."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in files:
        require_free(dst.parent / name, force)
        sync(folder / name)
    if (folder / dst.name).is_dir() and not dst.exists():
        (folder / dst.name).replace(dst)
    for name in files:
        if (folder / name).exists():
            (folder / name).replace(dst.parent / name)
    if dst.is_dir():  # older weights there, under another name, would be read in place of these
        for old in {*MODEL_FILES, "encoder.safetensors", "config.json", "preprocessor_config.json"}:
            if Path(dst.name) / old not in files:
                (dst / old).unlink(missing_ok=True)
    sync(dst.parent)


def require_free(path: Path, force: bool) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not force:
        raise UserError(f"{path} is there already: --force overwrites it")


# ---- formats ---------------------------------------------------------------------------------------------------------


def write_mae(weights: Weights, path: Path, config: Namespace) -> Conversion:
    description = stored_description(weights)
    kind = description["kind"]
    state = weights.state if kind == "model" else weights.timm_state
    if file_suffix(path):
        save_safetensors(state, description, path)
    else:
        path.mkdir()
        name = "encoder.safetensors" if kind == "encoder" else "model.safetensors"
        save_safetensors(state, description, path / name)
        if kind == "model":
            save_safetensors(weights.timm_state, {**description, "kind": "encoder"}, path / "encoder.safetensors")
    return Conversion(path, weights, [], [check_same_tensors(weights, path)])


def write_official(weights: Weights, path: Path, config: Namespace) -> Conversion:
    """One dictionary under `model`, as in the official files; what those do not record lies beside it under `mae`."""
    require_usual_decoder(weights, "official")
    about = weights.classifier
    if about and about["pool"] == "mean" and about["head"] != "linear":
        raise UserError(
            f"--format official: {weights.source} takes the mean of tokens after their norm, the official code before "
            "it; --format mae or timm holds it"
        )
    torch.save({"model": from_ours(weights.state, "official"), "mae": stored_description(weights)}, path)
    return Conversion(path, weights, [], [check_same_tensors(weights, path)])


def write_timm(weights: Weights, path: Path, config: Namespace) -> Conversion:
    lost = ["the decoder, which reconstructs patches"] if weights.has_decoder else []
    folded = without_batchnorm(weights if weights.classifier else encoder_only(weights))
    if folded.classifier != weights.classifier:
        lost.append(FOLDED)
    state, description = folded.timm_state, stored_description(folded)
    if path.suffix == ".pth":
        torch.save(state, path)
    elif file_suffix(path):
        save_safetensors(state, description, path)
    else:
        path.mkdir()
        save_safetensors(state, description, path / "model.safetensors")
    name = path.with_name(f"{path.name}.json") if file_suffix(path) else path / "config.json"
    model_card.write_config(name, model_card.timm_config(folded))
    checks = [check_same_tensors(folded, path)]
    checks.append(check_same_outputs("timm", own_outputs(weights), timm_outputs(folded, path)))
    return Conversion(path, folded, lost, checks)


def write_hf(weights: Weights, path: Path, config: Namespace) -> Conversion:
    require_usual_decoder(weights, "hf")
    for key in ("image_size", "patch_size"):
        height, width = weights.config[key]
        if height != width:
            raise UserError(
                f"--format hf: {key} {height}x{width} of {weights.source}: transformers' ViTMAE takes only squares; "
                "--format timm or mae holds it"
            )
    if weights.classifier and weights.classifier["pool"] == "mean":
        raise UserError(
            f"--format hf: {weights.source} classifies by the mean of tokens, but transformers' ViT only by the "
            "class token; --format timm holds it"
        )
    folded = without_batchnorm(weights)
    state = from_ours(folded.state, "hf")
    if folded.holds == "encoder":  # written as a ViTModel, whose names have no prefix
        state = {key.removeprefix("vit."): value for key, value in state.items()}
    path.mkdir()
    save_safetensors(state, stored_description(folded), path / "model.safetensors")
    model_card.write_config(path / "config.json", model_card.hf_config(folded))
    model_card.write_config(path / "preprocessor_config.json", model_card.hf_processor(folded))
    checks = [check_same_tensors(folded, path)]
    try:
        import transformers  # noqa: F401
    except ImportError:
        checks.append("not run in transformers, which is not installed: pip install transformers")
    else:
        checks.append(check_same_outputs("transformers", own_outputs(weights), transformers_outputs(folded, path)))
    lost = [FOLDED] if folded is not weights else []
    return Conversion(path, folded, lost, checks)


@torch.no_grad()
def write_graph(weights: Weights, path: Path, config: Namespace) -> Conversion:
    """An ONNX file or a torch.export program."""
    output = config.output or ("logits" if weights.classifier else "tokens")
    kept, lost = weights, []
    graph: onnx_export.Graph
    if output == "reconstruction":
        ratio = weights.description["mask_ratio"] if config.mask_ratio is None else config.mask_ratio
        weights.require_decoder()
        try:
            graph = onnx_export.Reconstruction(weights.build(), ratio)
        except ValueError as error:
            raise UserError(f"--mask_ratio: {error}") from None
    elif output == "logits":
        graph = onnx_export.Logits(build_classifier(weights))
    else:
        graph = onnx_export.Encoder(weights.encoder(), config.free_size)
        kept = encoder_only(weights)
        if weights.has_decoder:
            lost.append("the decoder: --output reconstruction has it")
        if weights.classifier:
            lost.append("the classifier's head: --output logits has it")
    about = {**kept.description, "takes": list(graph.takes), "gives": list(graph.gives)}
    about["preprocessing"] = weights.preprocessing
    kept = kept._replace(description=about)
    if config.format == "export":
        onnx_export.to_export(graph, path, about)
        checks = [check_gap("torch.export", onnx_export.check_export(path, graph), 1e-5)]
    elif not config.quantize:
        onnx_export.to_onnx(graph, path, about)
        checks = [check_gap("ONNX Runtime", onnx_export.check_onnx(path, graph), TOLERANCE)]
    else:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            full = Path(folder) / path.name
            onnx_export.to_onnx(graph, full, about)
            checks = [check_gap("ONNX Runtime in float32", onnx_export.check_onnx(full, graph), TOLERANCE)]
            onnx_export.quantize(full, path)
        gap = onnx_export.check_onnx(path, graph)
        checks.append(f"int8: {output} of noise differ by at most {gap:.2g}")
    return Conversion(path, kept, lost, checks)


# Name: (suffixes that DST may have, "" for a folder; what writes it).
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Weights, Path, Namespace], Conversion]]] = {
    "mae": ((".safetensors", ""), write_mae),
    "official": ((".pth",), write_official),
    "timm": ((".safetensors", ".pth", ""), write_timm),
    "hf": (("",), write_hf),
    "onnx": ((".onnx",), write_graph),
    "export": ((".pt2",), write_graph),
}


def require_usual_decoder(weights: Weights, format: str) -> None:
    """
    Raises:
        UserError: Other software would compute something else with it.
    """
    unusual = {"encoder_mask_tokens": "mask tokens in its encoder", "pca_target": "principal components as its target"}
    if has := [what for key, what in unusual.items() if weights.has_decoder and weights.config.get(key)]:
        raise UserError(
            f"--format {format}: {weights.source} has {has[0]}, which that format cannot say; its encoder.safetensors "
            "can be converted"
        )


def encoder_only(weights: Weights) -> Weights:
    """The weights without decoder or head."""
    description = {key: value for key, value in weights.description.items() if key != "classifier"}
    state = {ENCODER + key: value for key, value in weights.encoder().state_dict().items()}
    return weights._replace(state=state, description=description)


def stored_description(weights: Weights) -> dict[str, Any]:
    """The description as our files store it, with their word for what they hold: an autoencoder is a "model"."""
    return {**weights.description, "kind": "model" if weights.has_decoder else weights.holds}


def without_batchnorm(weights: Weights) -> Weights:
    """A probe with its BatchNorm folded into its linear layer; other weights as they are."""
    about = weights.classifier
    if not about or about["head"] != "batchnorm":
        return weights
    description = {**weights.description, "classifier": {**about, "head": "plain"}}
    return weights._replace(state=fold_batchnorm(weights.state), description=description)


def write_card(conversion: Conversion, format: str) -> None:
    """Write the model card into the folder; or card and configuration beside the file."""
    path, weights, folder = conversion.path, conversion.weights, conversion.path.is_dir()
    text = model_card.card_text(weights, format, path.name, folder, conversion.checks, conversion.lost)
    card = path / "README.md" if folder else path.with_name(f"{path.name}.md")
    card.write_text(printable_lines(text), encoding="utf-8")
    if not folder and format != "timm":
        model_card.write_config(path.with_name(f"{path.name}.json"), {"mae": weights.description})


# ---- hubs ------------------------------------------------------------------------------------------------------------


def push_to_hub(folder: Path, files: list[str], name: str, private: bool) -> None:
    """Upload these files of a folder to a model hub; `huggingface_hub` knows its address and the user's token.

    Raises:
        UserError: The hub refused it or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        url: Any = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,  # and no other files that may lie there
            commit_message="Weights of a masked autoencoder",
        )
    except Exception as error:  # its HTTP client, and with it the errors, differ between versions
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push {name}: {message}; {folder} is written; --force writes and pushes it again") from None
    print(f"pushed    {url}")
