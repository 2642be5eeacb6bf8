"""Files of weights as they are: what kind of file, the tensors in it, and what is said beside them. Nothing is run.

A pickle may hold tensors, plain values and argparse.Namespace, in which the official scripts keep their settings; what
asks for any other class is refused by its name.
"""

import argparse
import contextlib
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae.errors import UserError
from mae.runtime import checkpoint_files
from mae.weights.state_dict_keys import State, bare

RUN = ("model.safetensors", "checkpoints/last.ckpt", "encoder.safetensors")  # what of a run folder is taken, if there

MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

HEADER = 100_000_000  # bytes, at most, of what a safetensors file says of its tensors

AVERAGED = ("state_dict_ema", "model_ema")

TENSORS = (*AVERAGED, "state_dict", "model")  # where other software keeps them, in the order in which it looks itself

SETTINGS = ("args", "arch", "epoch")

GRAPHS = (".onnx", ".pt2")

# Classes that torch reads itself.
KNOWN = ("argparse.Namespace", "collections.OrderedDict", "builtins.set", "_codecs.encode")


class Opened(NamedTuple):
    """What a file holds."""

    path: Path  # of the file, where SRC is a folder
    container: str  # "safetensors" or "torch"
    state: State  # on the CPU, mapped from the file where it allows that; without the prefixes of wrappers
    description: dict[str, Any] | None  # our own
    about: dict[str, Any]  # what else is said: `config` (a JSON file), `key` (of the tensors), `args`, `arch`, `epoch`
    optimizer: bool  # it has the state of one
    notes: list[str]


def open_weights(src: str | Path) -> Opened:
    """The weights of a file or folder.

    Raises:
        UserError: There are none, or they cannot be read: the file is named, and what is wrong with it.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        path = in_folder(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is no file")
    config = config_of(path)
    if path.name.endswith(".index.json"):
        return open_parts(path, config)
    kind = container_of(path)
    if kind == "safetensors":
        opened = open_safetensors(path)
    else:
        if checkpoint_files.is_sealed(path) and (wrong := checkpoint_files.damage(path)):
            raise UserError(f"{path} is damaged: {wrong}")
        opened = open_torch(path)
    return opened._replace(about=opened.about | config)


def in_folder(folder: Path) -> Path:
    """The file to take of a run folder, or of one that transformers or timm has saved."""
    names = MODEL if (folder / "config.json").is_file() else (*RUN, *MODEL)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} is no run folder and no saved model: it holds none of {', '.join(names)}")


def config_of(path: Path) -> dict[str, Any]:
    """What transformers or timm have written of the weights in a JSON file beside them, if there is one."""
    folder = path.name in MODEL
    beside = path.with_name("config.json" if folder else f"{path.name}.json")
    config = json_of(beside, must=folder)
    if not {"model_type", "architecture"} & config.keys():  # it may be about anything
        return {}
    processor = json_of(beside.with_name("preprocessor_config.json"), must=True) if folder else {}
    return {"config": {**config, "processor": processor}}


def json_of(path: Path, must: bool) -> dict[str, Any]:
    """The settings in a JSON file; none, where there is no file, or none of that kind.

    Raises:
        UserError: They must be readable, and are not.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no settings")
    except (OSError, ValueError) as error:
        if must:
            raise UserError(f"{path} cannot be read: {error}") from None
        return {}
    return content


def container_of(path: Path) -> str:
    """By the first bytes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix in GRAPHS:
        raise UserError(f"{path} is a graph, which is run and not read back: convert from what it was made of")
    if not size:
        raise UserError(f"{path} is empty (0 bytes)")
    # First, since the length that these begin with may have the bytes of any other kind.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER:
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80" or b"ustar" in head:  # as torch writes today, before 1.6, and long ago
        return "torch"
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` where it came from")
    text = re.match(rb"[\x20-\x7e\s]+", head)
    said = f"it begins with the text {text[0][:30].decode()!r}" if text and len(text[0]) >= min(size, 8) else "unknown"
    raise UserError(f"{path} holds no weights: {said}; wanted is a checkpoint of torch or a .safetensors file")


def open_safetensors(path: Path) -> Opened:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # a safetensors file, no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    try:
        description = json.loads(metadata["mae"]) if "mae" in metadata else None
        if not isinstance(description, dict | None):
            raise ValueError(f"a {type(description).__name__}")
    except ValueError as error:
        raise UserError(f"{path} is damaged: the text by which it describes itself cannot be read: {error}") from None
    return Opened(path, "safetensors", cleaned(path, state), description, {}, False, [])


def open_torch(path: Path, content: Any = None) -> Opened:
    """What a file of torch holds; `content` is what `unpickled` has read from it, where it has been read already."""
    content = unpickled(path) if content is None else content
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}; wanted is a dictionary of tensors")
    description = content.get("mae")
    if isinstance(description, dict) and (version := content.get("mae_format", 0)) > checkpoint_files.FORMAT:
        raise UserError(
            f"{path} was written by a newer version of this package (format {version}, this one reads up to "
            f"{checkpoint_files.FORMAT}): update the package"
        )
    about = {name: content[name] for name in SETTINGS if name in content}
    if isinstance(about.get("args"), argparse.Namespace):
        about["args"] = vars(about["args"])
    key = next((key for key in TENSORS if isinstance(content.get(key), Mapping)), None)
    notes = [f"the averaged weights are taken ({key})"] if key in AVERAGED else []
    state = dict(content[key] if key else content)
    optimizer = any(name.startswith("optimizer") for name in content if isinstance(name, str))
    about = about if key is None else {"key": key, **about}
    own = description if isinstance(description, dict) else None
    return Opened(path, "torch", cleaned(path, state), own, about, optimizer, notes)


def unpickled(path: Path) -> Any:
    """The content, tensors mapped from the file where it is of a kind that can be."""
    failed: Exception | None = None
    for mmap in (True, False):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old files, which torch reads all the same
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError as error:
            failed = error
            if "mmap" not in str(error):  # files from before torch 1.6 cannot be mapped
                break
        except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
            failed = error
            break
    said = str(failed)
    if strangers := [name for name in classes_in(path) if name not in KNOWN and not name.startswith("torch.")]:
        raise UserError(
            f"{path} is not safe to load: it asks for {', '.join(strangers[:3])}, which could run any code; only "
            "tensors, plain values and argparse.Namespace are read. If you trust it, save its state_dict alone where "
            "it comes from"
        )
    if isinstance(failed, pickle.UnpicklingError):
        # torch's first sentences advise to load it all the same; what is wrong comes later.
        match = re.search(r"[Uu]nsupported [^\n]*", said)
        raise UserError(f"{path} is not safe to load: it holds more than tensors ({match[0] if match else 'a pickle'})")
    raise UserError(f"{path} is damaged or cut off: {(said.splitlines() or [type(failed).__name__])[0]}")


def classes_in(path: Path) -> list[str]:
    """What a pickle, or one in a zip archive, would import: read as a list of instructions, of which none is run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
        else:
            pickles = [path.read_bytes()]
    except Exception:  # whatever a damaged archive makes zipfile raise
        return []
    found: dict[str, None] = {}
    for data in pickles:
        words: list[str] = []  # strings in the order of their use
        memo: list[str] = []
        with contextlib.suppress(Exception):  # damaged: what was found until there counts
            for operation, argument, _ in pickletools.genops(data):
                if operation.name == "GLOBAL":
                    found[str(argument).replace(" ", ".")] = None
                elif operation.name == "STACK_GLOBAL":
                    found[".".join(words[-2:])] = None
                elif operation.name == "MEMOIZE":
                    memo.append(words[-1] if words else "")
                elif operation.name in ("BINGET", "LONG_BINGET") and int(argument or 0) < len(memo):
                    words.append(memo[int(argument or 0)])
                elif isinstance(argument, str):
                    words.append(argument)
    return list(found)


def cleaned(path: Path, state: Mapping[Any, Any]) -> State:
    """By bare names.

    Raises:
        UserError: What is there is no dictionary of tensors, or a name comes twice.
    """
    found: State = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds no weights: {key!r} is a {type(value).__name__}, where tensors by their names are wanted"
            )
        if value.layout is not torch.strided or value.is_meta:
            raise UserError(f"{path}: {key} has no numbers of its own (it is sparse or a placeholder)")
        name = bare(key)
        if name in found:
            raise UserError(f"{path} holds {name} twice, with and without a prefix: keep one of them")
        found[name] = value
    if not found:
        raise UserError(f"{path} holds no tensors")
    return found


def open_parts(index: Path, config: dict[str, Any]) -> Opened:
    """Weights in several files, as transformers splits large ones."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}") from None
    state: State = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name}, which is not beside it")
        part = open_weights(index.with_name(name))
        state |= part.state
    return Opened(index, part.container, state, None, config, False, [])
