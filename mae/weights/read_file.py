"""Reading files of weights: the kind of file, its tensors, and what is recorded beside them. No code in them is run.

A pickle may hold tensors, plain values and argparse.Namespace, in which the official scripts store their settings. A
file that asks for any other class is refused, and the error names the class.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mae.errors import UserError
from mae.options import require_utf8
from mae.runtime import checkpoint_files, reading
from mae.runtime.reading import open_regular, read_regular
from mae.runtime.run_files import settings_in
from mae.weights.pickle_outline import read_outline
from mae.weights.state_dict_keys import State, bare_name
from mae.weights.wrappers import encoder_roots

# Of a run folder, the first of these that exists is read.
RUN_FILES = ("model.safetensors", "checkpoints/last.ckpt", "encoder.safetensors")

MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

MOST_TENSORS, LONGEST_NAME = 20_000, 1000  # in a file, and characters of a tensor's name

AVERAGED_KEYS = ("state_dict_ema", "model_ema")

# Where other software stores tensors, in the order in which it looks for them itself.
TENSOR_KEYS = (*AVERAGED_KEYS, "state_dict", "model")

SETTING_KEYS = ("args", "arch", "epoch")

GRAPHS = (".onnx", ".pt2")

# Classes that torch reads by itself.
KNOWN_CLASSES = ("argparse.Namespace", "collections.OrderedDict", "builtins.set", "_codecs.encode")


class Opened(NamedTuple):
    """The content of a file."""

    path: Path  # of the file, also where SRC is a folder
    state: State  # on the CPU, mapped from the file where it allows that; without the prefixes of wrappers
    description: dict[str, Any] | None  # the one that our own files hold
    about: dict[str, Any]  # `config` and its `config_path`, `key` (of the tensors), `args`, `arch`, `epoch`
    optimizer: bool  # it holds the state of an optimiser
    notes: list[str]


def open_weights(src: str | Path) -> Opened:
    """Open the weights of a file or folder.

    Raises:
        UserError: There are none, or they cannot be read; the error names the file and what is wrong with it.
    """
    path = Path(src).expanduser()
    try:
        if path.is_dir():
            path = in_folder(path)
        require_utf8(path)
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not path.is_file():
            raise UserError(f"{path} is no file")
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    config = config_of(path)
    if path.name.endswith(".index.json"):
        return open_parts(path, config)
    if container_of(path) == "safetensors":
        opened = open_safetensors(path)
    else:
        if checkpoint_files.is_sealed(path) and (wrong := checkpoint_files.damage(path)):
            raise UserError(f"{path} is damaged: {wrong}")
        opened = open_torch(path)
    return opened._replace(about=opened.about | config)


def in_folder(folder: Path) -> Path:
    """The file to read in a run folder, or in a folder that transformers or timm has saved."""
    names = MODEL_FILES if (folder / "config.json").exists() else (*RUN_FILES, *MODEL_FILES)
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} is no run folder and no saved model: it holds none of {', '.join(names)}")


def config_of(path: Path) -> dict[str, Any]:
    """The configuration that transformers or timm has written beside the weights, if there is one."""
    in_saved_folder = path.name in MODEL_FILES
    beside = path.with_name("config.json" if in_saved_folder else f"{path.name}.json")
    config = read_json(beside, required=in_saved_folder)
    if not {"model_type", "architecture"} & config.keys():  # a JSON file about something else
        return {}
    processor = read_json(beside.with_name("preprocessor_config.json"), required=True) if in_saved_folder else {}
    return {"config": {**config, "processor": processor}, "config_path": beside}


def read_json(path: Path, required: bool) -> dict[str, Any]:
    """The settings in a JSON file; empty where the file does not exist or holds something else.

    Raises:
        UserError: `required`, and the file exists but holds no settings.
    """
    if not path.exists():
        return {}
    try:
        return settings_in(read_regular(path, reading.SETTINGS))
    except (OSError, ValueError) as error:
        if required:
            raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return {}


def container_of(path: Path) -> str:
    """By the first bytes."""
    size = path.stat().st_size
    try:
        with open_regular(path) as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix in GRAPHS:
        raise UserError(f"{path} is a graph, which is run and not read back: convert from what it was made of")
    if not size:
        raise UserError(f"{path} is empty (0 bytes)")
    # First, since the length that these begin with may have the bytes of any other kind.
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) < 2**32:
        if length > reading.WEIGHTS_HEADER:
            raise UserError(f"{path} is damaged: a header of {length:,} bytes, over {reading.WEIGHTS_HEADER:,}")
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80":  # as torch writes today, and before 1.6
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
            state = {key: file.get_tensor(key) for key in file.keys()}  # `file` is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    try:
        description = settings_in(metadata["mae"]) if "mae" in metadata else None
    except ValueError as error:
        raise UserError(f"{path} is damaged: its own description cannot be read: {error}") from None
    return Opened(path, with_bare_names(path, state), description, {}, False, [])


def open_torch(path: Path, content: Any = None) -> Opened:
    """What a file of torch holds; `content` is what `load_pickle` has read from it, where it has been read already."""
    content = load_pickle(path) if content is None else content
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} instead of a dictionary of tensors")
    description = content.get("mae")
    version = content.get("mae_format", 0)
    if isinstance(description, dict) and isinstance(version, int) and version > checkpoint_files.FORMAT:
        raise UserError(
            f"{path} was written by a newer version of this package (format {version}, this one reads up to "
            f"{checkpoint_files.FORMAT}): update the package"
        )
    about = {name: content[name] for name in SETTING_KEYS if name in content}
    if isinstance(about.get("args"), argparse.Namespace):
        about["args"] = vars(about["args"])
    key = next((key for key in TENSOR_KEYS if isinstance(content.get(key), Mapping)), None)
    notes = [f"the averaged weights are used ({key})"] if key in AVERAGED_KEYS else []
    # Dictionaries beside each other: of student and teacher, of encoder and decoder.
    parts = [name for name, value in content.items() if holds_tensors(value)]
    rivals = [name for name in parts if name not in TENSOR_KEYS and encoder_roots(content[name])]
    beside = any(isinstance(value, Tensor) for value in content.values())
    used = [key, *rivals] if key and rivals else [] if key or beside else parts
    state = dict(content[key] if key else content)
    if used:
        state = {f"{part}.{name}": value for part in used for name, value in content[part].items()}
    optimizer = any(name.startswith("optimizer") for name in content if isinstance(name, str))
    if key is not None:
        about["key"] = key
    if not isinstance(description, dict):
        description = None
    return Opened(path, with_bare_names(path, state), description, about, optimizer, notes)


def holds_tensors(value: Any) -> bool:
    """Whether it is a dictionary of tensors by their names."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())


def load_pickle(path: Path) -> Any:
    """The content, with tensors mapped from the file where its format allows that.

    Raises:
        UserError: It is damaged or cut off, which costs little memory, or asks for classes that are not read.
    """
    outline = read_outline(path)
    if unknown := [name for name in outline.classes if name not in KNOWN_CLASSES and not name.startswith("torch.")]:
        raise UserError(
            f"{path} is not safe to load: it asks for {', '.join(unknown[:3])}, which could run any code; only "
            "tensors, plain values and argparse.Namespace are read. If you trust it, save its state_dict alone where "
            "it comes from"
        )
    if outline.wrong:
        raise UserError(f"{path} is damaged or cut off: {outline.wrong}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old files, which torch reads all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=outline.is_zip)
    except pickle.UnpicklingError as error:
        # The first sentences of torch's message advise to load the file all the same; the cause comes later.
        match = re.search(r"[Uu]nsupported [^\n]*", str(error))
        what = match[0] if match else "a pickle"
        raise UserError(f"{path} is not safe to load: it holds more than tensors ({what})") from None
    except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or cut off: {reason}") from None


def with_bare_names(path: Path, state: Mapping[Any, Any]) -> State:
    """The tensors by their names without the prefixes of wrappers.

    Raises:
        UserError: Something else than a tensor is among them, a tensor has no values, or a name comes twice.
    """
    if len(state) > MOST_TENSORS:
        raise UserError(f"{path} holds {len(state):,} tensors, over the limit of {MOST_TENSORS:,}")
    tensors: State = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds no weights: {key!r} is a {type(value).__name__}, but tensors by their names are expected"
            )
        if value.layout is not torch.strided or value.is_meta:
            raise UserError(f"{path}: {key} has no numbers of its own (it is sparse or a placeholder)")
        if (claimed := value.numel() * value.element_size()) > (stored := value.untyped_storage().nbytes()):
            raise UserError(f"{path}: {key} claims {claimed:,} bytes, of which {stored:,} are stored")
        if len(key) > LONGEST_NAME:
            raise UserError(f"{path} holds a tensor with a name of {len(key):,} characters: {key[:30]}...")
        name = bare_name(key)
        if name in tensors:
            raise UserError(f"{path} holds {name} twice, with and without a prefix: keep one of them")
        tensors[name] = value
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors


def open_parts(index: Path, config: dict[str, Any]) -> Opened:
    """Open weights in several files, as transformers splits large ones."""
    state: State = {}
    for part in parts_in(index):
        state |= open_weights(part).state
    return Opened(index, state, None, config, False, [])


def parts_in(index: Path) -> list[Path]:
    """The files that an index of weights names, which lie beside it."""
    try:
        names = sorted(set(settings_in(read_regular(index, reading.SETTINGS))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name[:256]).name != name or not name or name.endswith(".json"):
            raise UserError(f"{index} names {str(name)[:100]}, which is not beside it or no file of weights")
    return [index.with_name(name) for name in names]
