"""Weights on disk: what a file holds, loading it strictly, writing it so that timm can read the encoder."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae import saving
from mae.errors import UserError
from mae.model import MaskedAutoencoder

ENCODER = "encoder."
EXPORTS = ("model.safetensors", "encoder.safetensors")  # what a run leaves at its end, in this order
State = dict[str, Tensor]


class Weights(NamedTuple):
    """What SRC holds, under the names of MaskedAutoencoder; without a decoder only names that begin with `encoder.`

    Of a classifier these are its timm names behind `encoder.`, head included.
    """

    source: Path
    state: State
    description: dict[str, Any]  # model: arguments of MaskedAutoencoder; mean, std, step, images_seen, ...

    @property
    def has_decoder(self) -> bool:
        return "mask_token" in self.state

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.description["model"]
        return config

    @property
    def classifier(self) -> dict[str, Any] | None:
        """classes, pool and head of a classifier; None of a pre-trained model."""
        return self.description.get("classifier")

    @property
    def timm_state(self) -> State:
        """The encoder, or whole classifier, under timm's names."""
        return {key.removeprefix(ENCODER): value for key, value in self.state.items() if key.startswith(ENCODER)}

    def fingerprint(self) -> str:
        """The same for the same weights, wherever they lie: of names, shapes and a part of every tensor."""
        digest = hashlib.blake2b(digest_size=8)
        for key in sorted(self.state):
            value = self.state[key]
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.flatten()[:1024].float().numpy().tobytes())
        return f"weights {digest.hexdigest()}"

    def require_decoder(self) -> None:
        if not self.has_decoder:
            kind = "a classifier" if self.classifier else "an encoder"
            raise UserError(
                f"{self.source} holds {kind} without decoder; a pre-training's model.safetensors or .ckpt has one"
            )

    def require_pretrained(self, allowed: bool, flag: str | None) -> None:
        """A classifier's encoder has seen labels: as a starting point or for features it must be asked for.

        Args:
            flag: What allows it, if anything does.
        """
        if self.classifier and not allowed:
            raise UserError(
                f"{self.source} is a classifier of {len(self.classifier['classes'])} classes, its encoder trained with "
                f"labels, where a pre-trained encoder is wanted" + (f"; {flag} allows it" if flag else "")
            )

    def require_classifier(self) -> dict[str, Any]:
        if self.classifier is None:
            raise UserError(
                f"{self.source} has no classifier head; `mae probe` and `mae finetune` write models that have one"
            )
        return self.classifier

    def build(self) -> MaskedAutoencoder:
        """The network of this size, with these weights; its decoder stays random where there is none.

        A classifier by mean pooling has no final norm for its tokens: theirs is then the plain one, weight 1, bias 0.
        """
        model = MaskedAutoencoder(**self.config)
        state, may_miss = self.state, set[str]()
        if self.classifier:
            state = {k: v for k, v in state.items() if not k.startswith((f"{ENCODER}head.", f"{ENCODER}fc_norm."))}
            may_miss = {f"{ENCODER}norm.weight", f"{ENCODER}norm.bias"}
        loaded = model.load_state_dict(state, strict=self.has_decoder)
        missing = [key for key in loaded.missing_keys if key.startswith(ENCODER) and key not in may_miss]
        if missing or loaded.unexpected_keys:
            raise UserError(f"{self.source} does not fit its own description: {(missing + loaded.unexpected_keys)[:3]}")
        return model.eval()


def load(src: str | Path) -> MaskedAutoencoder:
    """The whole autoencoder, in eval mode.

    Args:
        src: A run folder, a .ckpt or a .safetensors file of this project.

    Raises:
        UserError: There is no such file, it is of another kind, or it has no decoder.
    """
    weights = read(src)
    weights.require_decoder()
    return weights.build()


def load_encoder(src: str | Path, allow_finetuned: bool = False) -> VisionTransformer:
    """The encoder, ready for features: timm's VisionTransformer in eval mode, frozen; `forward_features(images)` gives
    (B, 1 + N, D), class token first. `src` as in `load`, or an exported encoder; or, where allowed, a classifier.
    """
    weights = read(src)
    weights.require_pretrained(allow_finetuned, "allow_finetuned=True")
    return weights.build().encoder.requires_grad_(False)


def read(src: str | Path) -> Weights:
    """Recognise SRC by its content.

    Raises:
        UserError: It does not exist or holds no weights of this project.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        candidates = [path / "model.safetensors", path / "checkpoints" / "last.ckpt", path / "encoder.safetensors"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise UserError(f"{path} is no run folder: it holds none of {', '.join(c.name for c in candidates)}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if saving.is_sealed(path) and (wrong := saving.damage(path)):
        raise UserError(f"{path} is damaged: {wrong}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # a safetensors file, no dict
        description = json.loads(metadata["mae"]) if "mae" in metadata else None
        if description and description["kind"] != "model":  # encoders and classifiers are stored under timm's names
            state = {ENCODER + key: value for key, value in state.items()}
    except SafetensorError:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a damaged or foreign file makes the unpickler raise
            # torch's first sentences advise to load it all the same; what is wrong comes later.
            match = re.search(r"[Uu]nsupported [^\n]*", str(error))
            reason = match[0] if match else (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{path} is neither a .safetensors file nor a checkpoint that is safe to load: {reason}"
            ) from None
        description = checkpoint.get("mae") if isinstance(checkpoint, dict) else None
        if description and (version := checkpoint.get("mae_format", 0)) > saving.FORMAT:
            raise UserError(
                f"{path} was written by a newer version of this package (format {version}, this one reads up to "
                f"{saving.FORMAT}): update the package"
            ) from None
        state = state_of_run(checkpoint["state_dict"], description) if description else {}
    if description is None:
        raise UserError(f"{path} was not written by this project; other formats cannot be read yet")
    return Weights(path, state, description)


def state_of_run(state: State, description: dict[str, Any]) -> State:
    """From a run's .ckpt: of a classifier the averaged weights where there are any, with adapters merged."""
    averaged = {key.removeprefix("ema.module."): value for key, value in state.items() if key.startswith("ema.module.")}
    state = averaged or {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    if "classifier" not in description:
        return state
    return {ENCODER + key: value for key, value in merge_lora(state, description["classifier"]["lora_scale"]).items()}


def merge_lora(state: State, scale: float) -> State:
    """Low-rank adapters, as peft names them, added to the weights that they adapt; other states come back as they are.

    Args:
        scale: lora_alpha / rank.
    """
    merged = {}
    for key, value in state.items():
        if ".lora_" in key:
            continue
        if key.endswith(".base_layer.weight"):
            layer = key.removesuffix(".base_layer.weight")
            down, up = state[f"{layer}.lora_A.default.weight"], state[f"{layer}.lora_B.default.weight"]
            value = value + scale * up @ down
        merged[key.replace(".base_layer.", ".")] = value
    return merged


def export(state: State, description: dict[str, Any], folder: Path) -> list[Path]:
    """Write encoder.safetensors (timm's names and layout) and model.safetensors (encoder and decoder)."""
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    encoder = {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}
    paths = [folder / name for name in EXPORTS]
    for kind, tensors, path in zip(("model", "encoder"), (state, encoder), paths, strict=True):
        save(tensors, {"kind": kind, **description}, path)
    return paths


def export_classifier(state: State, description: dict[str, Any], folder: Path) -> list[Path]:
    """Write model.safetensors: a classifier under timm's names, with classes, pool, mean, std and crop described."""
    path = folder / "model.safetensors"
    merged = merge_lora(state, description["classifier"]["lora_scale"])
    plain = {key: value.detach().cpu().contiguous() for key, value in merged.items()}
    save(plain, {"kind": "classifier", **description}, path)
    return [path]


def save(tensors: State, description: dict[str, Any], path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    save_file(tensors, unfinished, {"format": "pt", "mae": json.dumps(description)})
    unfinished.replace(path)


def warm_start(model: MaskedAutoencoder, src: str | Path) -> str:
    """Copy the weights of `src` into `model`; returns what was loaded, resampled or left random, in words.

    Encoder and, where it fits, decoder are copied. Positions of another grid are not copied: ours are fixed and
    computed for the grid at hand.

    Raises:
        UserError: The encoder of src is of another architecture.
    """
    weights = read(src)
    weights.require_pretrained(False, None)
    own, given = model.config, weights.config
    for key in ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "in_chans"):
        if own[key] != given[key]:
            raise UserError(
                f"--model.init {weights.source} is another architecture: {key} {given[key]}, this model has {own[key]}"
            )
    state, said = dict(weights.state), ["encoder loaded"]
    if own["image_size"] != given["image_size"]:
        state = {key: value for key, value in state.items() if not key.endswith("pos_embed")}
        said.append(f"positions recomputed for {own['image_size']} (were {given['image_size']})")
    same_decoder = all(own[key] == given[key] for key in own if key.startswith("decoder_"))
    if weights.has_decoder and same_decoder:
        said.append("decoder loaded")
    else:
        state = {key: value for key, value in state.items() if key.startswith(ENCODER)}
        said.append("decoder left random: " + ("of another size" if weights.has_decoder else "the file has none"))
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"{weights.source} holds unknown tensors: {', '.join(unexpected[:3])}")
    return f"--model.init {weights.source}: {', '.join(said)}"


def require_resumable(src: Path, architecture: dict[str, Any]) -> dict[str, Any]:
    """The description of the run that wrote `src`: its recipe by key of the command line, step, devices.

    Raises:
        UserError: It is no checkpoint of a run, one of a newer version, or one of another network.
    """
    weights = read(src)
    if src.suffix == ".safetensors" or "recipe" not in weights.description:
        raise UserError(f"--ckpt_path {src} holds weights without the state of a run; --model.init starts from weights")
    given = {**weights.config, **(weights.classifier or {})}
    for key, own in architecture.items():
        if key not in given or given[key] != own:
            raise UserError(
                f"--ckpt_path {src} is of another architecture: {key} {given.get(key, 'is missing')}, here {own}"
            )
    return weights.description


def load_official_state_dict(model: MaskedAutoencoder, state_dict: State) -> None:
    """Copy tensors under the official names (`blocks.0...`, `decoder_blocks.0...`) into `model`, strictly.

    Raises:
        ValueError: Names what is missing, extra or of another shape.
    """
    given = {key if key.startswith(("decoder_", "mask_token")) else ENCODER + key: v for key, v in state_dict.items()}
    own = model.state_dict()
    wrong = [f"missing {official_name(key)}" for key in own if key not in given]
    wrong += [f"extra {official_name(key)}" for key in given if key not in own]
    wrong += [
        f"{official_name(key)} is {tuple(given[key].shape)}, wanted {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"official weights do not fit: {'; '.join(wrong[:10])}" + (" ..." if len(wrong) > 10 else ""))
    model.load_state_dict(given)


def official_name(key: str) -> str:
    return key.removeprefix(ENCODER)
