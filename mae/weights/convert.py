"""`mae convert`: weights into another format, checked before they get their name."""

import contextlib
import json
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import timm
import torch
from jsonargparse import Namespace
from safetensors import SafetensorError
from torch import Tensor

from mae.commands import convert_parser
from mae.errors import TrainingFailed, UserError
from mae.options import out_file
from mae.runtime.storage import sync
from mae.weights import detect, load, model_card, onnx_export
from mae.weights.classifier import network_of
from mae.weights.detect import overrides_from
from mae.weights.read_file import MODEL
from mae.weights.state_dict_keys import ENCODER, State, from_ours
from mae.weights.weights import Weights, folded_head

TOLERANCE = 1e-4  # of what two programs compute from the same weights, relative to the largest number

Format = Literal["mae", "official", "timm", "hf", "onnx", "export"]

Output = Literal["tokens", "reconstruction", "logits"]

SUFFIXES: dict[Format, tuple[str, ...]] = {  # "": a folder
    "mae": (".safetensors", ""),
    "official": (".pth",),
    "timm": (".safetensors", ".pth", ""),
    "hf": ("",),
    "onnx": (".onnx",),
    "export": (".pt2",),
}


class Made(NamedTuple):
    """A conversion in its folder for now, under the name that it will have."""

    main: Path  # the file or folder to load
    weights: Weights  # of which it is made: what the format holds of those that were given
    lost: list[str]  # what this format does not hold
    checks: list[str]  # what was compared, and how it came out


def convert_command(args: Sequence[str]) -> None:
    config = convert_parser().parse_args(list(args))
    dst = place(config)
    weights = detect.read(config.src, overrides_from(config)).adapted(config.image_size, config.in_chans)
    for option in ("decoder_num_heads", "norm_pix_loss"):
        if config[option] is not None and not weights.has_decoder:
            raise UserError(f"--{option} {config[option]}: there is no decoder in what is written")
    load.say(weights)
    with staged(dst, config.force) as folder:
        made = WRITERS[config.format](weights, folder / dst.name, config)
        describe(made, config.format)
        names = sorted(path.name for path in made.main.iterdir()) if made.main.is_dir() else []
    for line in [*(f"checked   {line}" for line in made.checks), *(f"left out  {line}" for line in made.lost)]:
        print(line)
    print(f"wrote     {dst}: {model_card.architecture(weights)}, {made.weights.holds}")
    if config.push:
        push(dst, names, config.push, config.private)


def place(config: Namespace) -> Path:
    """Where to write; settings that would do nothing are refused."""
    dst = Path(config.dst).expanduser().absolute()
    suffixes = SUFFIXES[config.format]
    if suffix_of(dst) not in suffixes or not dst.name:
        wanted = " or ".join(suffix or "no suffix (a folder)" for suffix in suffixes)
        raise UserError(f"{dst}: --format {config.format} wants {wanted}")
    if dst.exists() and dst.is_dir() != (suffix_of(dst) == ""):
        raise UserError(f"{dst} is a {'folder' if dst.is_dir() else 'file'}; wanted is the other: take another name")
    if (dst / "config.yaml").exists() or (dst / "checkpoints").exists():
        raise UserError(f"{dst} is a run folder: take another, or a file in it")
    out_file(str(dst.parent / f"{dst.name}.md"), "DST")
    is_graph = config.format in ("onnx", "export")
    for option, wrong in (
        ("output", config.output is not None and not is_graph),
        ("free_size", config.free_size and not is_graph),
        ("mask_ratio", config.mask_ratio is not None and config.output != "reconstruction"),
        ("quantize", config.quantize and config.format != "onnx"),
        ("push", config.push is not None and suffix_of(dst) != ""),
    ):
        if wrong:
            raise UserError(f"--{option} does nothing here: see `mae convert --help`")
    if config.free_size and config.output not in (None, "tokens"):
        raise UserError(f"--free_size true: --output {config.output} has a fixed size")
    return dst


def suffix_of(path: Path) -> str:
    """Of a file; "" is a folder, whose name may end in a number (v1.5)."""
    return "" if re.fullmatch(r"\.\d*", path.suffix) else path.suffix


# ---- complete or not there -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(dst: Path, force: bool) -> Iterator[Path]:
    """A folder beside DST, whose files get their places when all is well.

    Raises:
        UserError: Something is there already.
    """
    require_free(dst, force)
    before = signal.signal(signal.SIGTERM, ended)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{dst.name}.", dir=dst.parent) as temporary:
            folder = Path(temporary)
            yield folder
            put(folder, dst, force)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{dst} cannot be written: {reason}") from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise UserError(f"{dst} cannot be written: is the disk full?") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def ended(number: int, frame: FrameType | None) -> None:
    """A batch system's signal must leave no weights behind under a hidden name."""
    raise SystemExit(128 + number)


def put(folder: Path, dst: Path, force: bool) -> None:
    """Files of a folder to where they belong; a folder that is new in one go."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in files:
        require_free(dst.parent / name, force)
        sync(folder / name)
    if (folder / dst.name).is_dir() and not dst.exists():
        (folder / dst.name).replace(dst)
    for name in files:
        if (folder / name).exists():
            (folder / name).replace(dst.parent / name)
    if dst.is_dir():  # else older weights there, under another name, would be read in place of these
        for old in {*MODEL, "encoder.safetensors", "config.json", "preprocessor_config.json"}:
            if Path(dst.name) / old not in files:
                (dst / old).unlink(missing_ok=True)
    sync(dst.parent)


def require_free(path: Path, force: bool) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() and not force:
        raise UserError(f"{path} is there already: --force overwrites it")


# ---- formats ---------------------------------------------------------------------------------------------------------


def to_mae(weights: Weights, path: Path, config: Namespace) -> Made:
    description = to_store(weights)
    kind = description["kind"]
    state = contiguous(weights.state if kind == "model" else weights.timm_state)
    if suffix_of(path):
        load.save(state, description, path)
    else:
        path.mkdir()
        load.save(state, description, path / ("encoder.safetensors" if kind == "encoder" else "model.safetensors"))
        if kind == "model":
            encoder = contiguous(weights.timm_state)
            load.save(encoder, {**description, "kind": "encoder"}, path / "encoder.safetensors")
    return Made(path, weights, [], [same_tensors(weights, path)])


def to_official(weights: Weights, path: Path, config: Namespace) -> Made:
    """As the official files, which hold one dictionary, `model`; ours beside it says what those leave open."""
    about = weights.classifier
    if about and about["pool"] == "mean" and about["head"] != "linear":
        raise UserError(
            f"--format official: {weights.source} takes the mean of tokens after their norm, the official code before "
            "it; --format mae or timm holds it"
        )
    state = contiguous(from_ours(weights.state, "official"))
    torch.save({"model": state, "mae": to_store(weights)}, path)
    return Made(path, weights, [], [same_tensors(weights, path)])


def to_timm(weights: Weights, path: Path, config: Namespace) -> Made:
    lost = ["the decoder, with which patches are reconstructed"] if weights.has_decoder else []
    folded = fold(weights if weights.classifier else bare_encoder(weights))
    if folded.classifier != weights.classifier:
        lost.append("the head's BatchNorm, which is folded into its linear layer: the logits are the same")
    state = contiguous(folded.timm_state)
    description = to_store(folded)
    if path.suffix == ".pth":
        torch.save(state, path)
        model_card.write_json(path.with_name(f"{path.name}.json"), model_card.timm_config(folded))
    elif suffix_of(path):
        load.save(state, description, path)
    else:
        path.mkdir()
        load.save(state, description, path / "model.safetensors")
        model_card.write_json(path / "config.json", model_card.timm_config(folded))
    checks = [same_tensors(folded, path), runs_alike("timm", outputs(weights), timm_outputs(folded, path))]
    return Made(path, folded, lost, checks)


def to_hf(weights: Weights, path: Path, config: Namespace) -> Made:
    refuse_for_hf(weights)
    folded = fold(weights)
    state = from_ours(folded.state, "hf")
    if folded.holds == "encoder":  # ViTModel, which is not inside of another
        state = {key.removeprefix("vit."): value for key, value in state.items()}
    path.mkdir()
    load.save(contiguous(state), to_store(folded), path / "model.safetensors")
    model_card.write_json(path / "config.json", model_card.hf_config(folded))
    model_card.write_json(path / "preprocessor_config.json", model_card.hf_processor(folded))
    checks = [same_tensors(folded, path)]
    try:
        import transformers  # noqa: F401
    except ImportError:
        checks.append("not run in transformers, which is not installed: pip install transformers")
    else:
        checks.append(runs_alike("transformers", outputs(weights), hf_outputs(folded, path)))
    lost = ["the head's BatchNorm, folded into its linear layer: the logits are the same"] * (folded is not weights)
    if weights.classifier:
        lost.append("the central crop: transformers' processor resizes the whole image, to a square")
    return Made(path, folded, lost, checks)


def refuse_for_hf(weights: Weights) -> None:
    """What transformers' ViT and ViTMAE cannot be."""
    for key in ("image_size", "patch_size"):
        height, width = weights.config[key]
        if height != width:
            raise UserError(
                f"--format hf: {key} {height}x{width} of {weights.source}: transformers' ViTMAE takes squares alone; "
                "--format timm or mae holds it"
            )
    if weights.classifier and weights.classifier["pool"] == "mean":
        raise UserError(
            f"--format hf: {weights.source} classifies by the mean of tokens, and transformers' ViT by the class token "
            "alone; --format timm holds it"
        )


@torch.no_grad()
def to_graph(weights: Weights, path: Path, config: Namespace) -> Made:
    kept = weights
    output = config.output or ("logits" if weights.classifier else "tokens")
    lost = []
    graph: onnx_export.Graph
    if output == "reconstruction":
        ratio = weights.description["mask_ratio"] if config.mask_ratio is None else config.mask_ratio
        weights.require_decoder()
        try:
            graph = onnx_export.Reconstruction(weights.build(), ratio)
        except ValueError as error:
            raise UserError(f"--mask_ratio: {error}") from None
    elif output == "logits":
        graph = onnx_export.Logits(network_of(weights))
    else:
        graph = onnx_export.Encoder(weights.encoder(), config.free_size)
        kept = bare_encoder(weights)
        lost += ["the decoder: --output reconstruction has it"] * weights.has_decoder
        lost += ["the classifier's head: --output logits has it"] * bool(weights.classifier)
    about = {**kept.description, "takes": list(graph.takes), "gives": list(graph.gives)}
    kept = kept._replace(description=about)
    if config.format == "export":
        onnx_export.to_export(graph, path, about)
        return Made(path, kept, lost, [within("torch.export", onnx_export.check_export(path, graph), 1e-5)])
    if not config.quantize:
        onnx_export.to_onnx(graph, path, about)
        return Made(path, kept, lost, [within("ONNX Runtime", onnx_export.check_onnx(path, graph), TOLERANCE)])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        onnx_export.to_onnx(graph, whole, about)
        checks = [within("ONNX Runtime in float32", onnx_export.check_onnx(whole, graph), TOLERANCE)]
        onnx_export.quantize(whole, path)
    apart = onnx_export.check_onnx(path, graph)
    checks.append(f"int8: {output} of noise at most {apart:.2g} apart; `mae bench export` tells what that costs")
    return Made(path, kept, lost, checks)


WRITERS: dict[str, Callable[[Weights, Path, Namespace], Made]] = {
    "mae": to_mae,
    "official": to_official,
    "timm": to_timm,
    "hf": to_hf,
    "onnx": to_graph,
    "export": to_graph,
}


def bare_encoder(weights: Weights) -> Weights:
    """Without decoder or head."""
    description = {key: value for key, value in weights.description.items() if key != "classifier"}
    state = {ENCODER + key: value for key, value in weights.encoder().state_dict().items()}
    return weights._replace(state=state, description=description)


def to_store(weights: Weights) -> dict[str, Any]:
    """The description as files hold it: an autoencoder is a model there."""
    return {**weights.description, "kind": "model" if weights.has_decoder else weights.holds}


def contiguous(state: State) -> State:
    return {key: value.contiguous() for key, value in state.items()}


def fold(weights: Weights) -> Weights:
    """A probe whose BatchNorm is part of its linear layer; other weights as they are."""
    about = weights.classifier
    if not about or about["head"] != "batchnorm":
        return weights
    description = {**weights.description, "classifier": {**about, "head": "plain"}}
    return weights._replace(state=folded_head(weights.state), description=description)


def describe(made: Made, format: str) -> None:
    """Card and configuration: in the folder, or beside the file."""
    path, folder = made.main, made.main.is_dir()
    text = model_card.card(made.weights, format, path.name, folder, made.checks, made.lost)
    (path / "README.md" if folder else path.with_name(f"{path.name}.md")).write_text(text)
    if not folder:
        about = model_card.timm_config(made.weights) if format == "timm" else {"mae": made.weights.description}
        model_card.write_json(path.with_name(f"{path.name}.json"), about)


# ---- checks ----------------------------------------------------------------------------------------------------------


def same_tensors(weights: Weights, path: Path) -> str:
    """Read back what was written.

    Raises:
        TrainingFailed: It is not the same, bit by bit.
    """
    back = detect.read(path)
    other = [key for key, value in back.config.items() if value != weights.config[key]]
    if back.state.keys() != weights.state.keys() or other:
        raise TrainingFailed(f"{path.name} does not read back as what was written: nothing is kept")
    for key, value in weights.state.items():
        if not torch.equal(back.state[key], value):
            raise TrainingFailed(f"{path.name}: {key} does not read back as it was written: nothing is kept")
    return f"read back: {len(weights.state)} tensors, the same to the bit"


@torch.no_grad()
def outputs(weights: Weights) -> dict[str, Tensor]:
    """What this package computes: logits of a classifier; tokens; prediction and loss of an autoencoder."""
    images, noise = inputs(weights)
    if weights.classifier:
        return {"logits": network_of(weights)(images)}
    found = {"features": weights.encoder().forward_features(images)}
    if weights.has_decoder:
        model, ratio = weights.build(), weights.description["mask_ratio"]
        found |= {"loss": model(images, noise, ratio).loss, "prediction": model.predict(images, noise, ratio).pred}
    return found


@torch.no_grad()
def timm_outputs(weights: Weights, path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        config, path = json.loads((path / "config.json").read_text()), path / "model.safetensors"
    else:
        config = model_card.timm_config(weights)
    # Not by timm's "local-dir:", which cannot read .safetensors files in older versions.
    network: Any = timm.create_model(config["architecture"], checkpoint_path=str(path), **config["model_args"])
    images, _ = inputs(weights)
    network.eval()
    return {"logits": network(images)} if weights.classifier else {"features": network.forward_features(images)}


@torch.no_grad()
def hf_outputs(weights: Weights, path: Path) -> dict[str, Tensor]:
    import transformers

    images, noise = inputs(weights)
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        kind = getattr(transformers, model_card.hf_config(weights)["architectures"][0])
        network: Any = kind.from_pretrained(path).eval()
    finally:
        transformers.logging.set_verbosity(before)
    if weights.classifier:
        return {"logits": network(images).logits}
    if not weights.has_decoder:
        return {"features": network(images).last_hidden_state}
    found = network(images, noise=noise)
    network.vit.config.mask_ratio = 0.0  # all patches stay visible, in the order of this noise
    order = torch.arange(noise.shape[1]).expand_as(noise) / noise.shape[1]
    features = network.vit(images, noise=order).last_hidden_state
    return {"loss": found.loss, "prediction": found.logits, "features": features}


def inputs(weights: Weights) -> tuple[Tensor, Tensor]:
    """Two random images and the scores of their patches."""
    draw = torch.Generator().manual_seed(0)
    config = weights.config
    images = torch.randn(2, config["in_chans"], *config["image_size"], generator=draw)
    return images, torch.rand(2, weights.grid[0] * weights.grid[1], generator=draw)


def runs_alike(whose: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """Compare what two programs make of the same images."""
    apart = []
    for name, value in theirs.items():
        gap = float((value - ours[name]).abs().max())
        if not gap <= TOLERANCE * max(1.0, float(ours[name].abs().max())):
            raise TrainingFailed(f"{whose} computes other {name} from it, {gap:.2g} apart: nothing is kept")
        apart.append(f"{name} {gap:.1g}")
    return f"run in {whose}, greatest difference: {', '.join(apart)}"


def within(whose: str, gap: float, limit: float) -> str:
    if not gap <= limit:
        raise TrainingFailed(
            f"{whose} computes something else, {gap:.2g} apart where {limit:g} is allowed: nothing is kept"
        )
    return f"run in {whose}, greatest difference: {gap:.1g}"


# ---- hubs ------------------------------------------------------------------------------------------------------------


def push(folder: Path, files: list[str], name: str, private: bool) -> None:
    """Upload these files of a folder to a model hub; token and address are those that `huggingface_hub` knows.

    Raises:
        UserError: It was refused, or the hub cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,  # not what else may lie there
            commit_message="Weights of a masked autoencoder",
        )
    except Exception as error:  # its HTTP client is another from version to version, and so are the errors
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push {name}: {said}; {folder} is written; --force writes and pushes it again") from None
    print(f"pushed    {done}")
