"""Weights under our names and what is known about them, whatever file they came from."""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.data.crops import usual_crop_pct
from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder, Pair, as_pair
from mae.models.meta_device import to_be_loaded
from mae.weights.state_dict_keys import ENCODER, State

Format = Literal["mae", "official", "timm", "hf", "torchvision", "mmpretrain"]

POSITIONS = (f"{ENCODER}pos_embed", "decoder_pos_embed")


class Weights(NamedTuple):
    """The weights that SRC holds, under the names of MaskedAutoencoder; an encoder's names all begin with `encoder.`

    A classifier has its timm names behind `encoder.`, those of its head included.
    """

    source: Path
    state: State  # floating-point numbers are float32
    description: dict[str, Any]  # model: arguments of MaskedAutoencoder; mean, std, step, images_seen, ...
    format: Format = "mae"
    notes: tuple[str, ...] = ()  # what the file does not record and was assumed, and what of it was left out
    problems: tuple[str, ...] = ()  # why they cannot be used: tensors that are missing, unknown or of another shape
    target_assumed_from: str = ""  # why norm_pix_loss was assumed to be what it is; "": it is recorded or stated

    @property
    def has_decoder(self) -> bool:
        return "mask_token" in self.state

    @property
    def holds(self) -> str:
        return "classifier" if self.classifier else "autoencoder" if self.has_decoder else "encoder"

    @property
    def target(self) -> str | None:
        """What the decoder predicts, in words; None where there is no decoder."""
        if not self.has_decoder:
            return None
        pixels, components = target_in_words(self.config.get("norm_pix_loss", True)), self.config.get("pca_target")
        return f"{components} principal components of {pixels}" if components else pixels

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.description["model"]
        return config

    @property
    def classifier(self) -> dict[str, Any] | None:
        """classes, pool and head of a classifier; None for a pre-trained model."""
        return self.description.get("classifier")

    @property
    def grid(self) -> Pair:
        """Rows and columns of patches."""
        (height, width), (ph, pw) = as_pair(self.config["image_size"]), as_pair(self.config["patch_size"])
        return height // ph, width // pw

    @property
    def timm_state(self) -> State:
        """The encoder, or whole classifier, under timm's names."""
        return {key.removeprefix(ENCODER): value for key, value in self.state.items() if key.startswith(ENCODER)}

    def fingerprint(self) -> str:
        """A hash of names, shapes and a part of every tensor: the same for the same weights, wherever they lie."""
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
                f"{self.source} holds {kind} without decoder; model.safetensors or a .ckpt of a pre-training has one"
            )

    def require_pretrained(self, allowed: bool, flag: str | None) -> None:
        """Refuse a classifier, whose encoder has seen labels, unless the caller has asked for one.

        Args:
            flag: The option that allows it, if there is one.
        """
        if self.classifier and not allowed:
            raise UserError(
                f"{self.source} is a classifier of {len(self.classifier['classes'])} classes, its encoder trained with "
                f"labels, where a pre-trained encoder is wanted" + (f"; {flag} allows it" if flag else "")
            )

    def require_classifier(self) -> dict[str, Any]:
        if self.classifier is None:
            raise UserError(
                f"{self.source} has no classifier head; `mae linprobe` and `mae finetune` write models that have one"
            )
        return self.classifier

    def build(self) -> MaskedAutoencoder:
        """The network, in eval mode. It holds these tensors, not copies: no further memory is taken.

        Raises:
            UserError: There is no decoder.
        """
        self.require_decoder()
        with to_be_loaded(self.config):
            model = MaskedAutoencoder(**self.config)
        model.load_state_dict(self.state, assign=True)
        model.fix_positions()  # assignment loses this
        self.with_preprocessing(model.encoder)
        return model.eval()

    def encoder(self) -> VisionTransformer:
        """The encoder, in eval mode and frozen; `forward_features(images)` gives (B, 1 + N, D), class token first.

        A classifier with mean pooling has no final norm for its tokens: they then get one of weight 1 and bias 0.
        """
        state = {key: value for key, value in self.timm_state.items() if not key.startswith(("head.", "fc_norm."))}
        if self.classifier and "norm.weight" not in state:
            width = self.config["embed_dim"]
            state |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        with to_be_loaded(self.config):
            encoder = MaskedAutoencoder(**self.config).encoder
        encoder.load_state_dict(state, assign=True)
        return self.with_preprocessing(encoder).eval().requires_grad_(False)

    def with_preprocessing(self, network: VisionTransformer) -> VisionTransformer:
        """The same network; timm's `resolve_model_data_config` now finds the images that it takes."""
        network.pretrained_cfg = network.default_cfg = self.preprocessing  # type: ignore[assignment]
        return network

    @property
    def crop_pct(self) -> float:
        """Side of the centre crop in evaluation, as a fraction of the side of the resized image."""
        told: float | None = (self.classifier or self.description).get("crop_pct")
        return usual_crop_pct(as_pair(self.config["image_size"])) if told is None else told

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become the input of these weights, under the names of timm's `pretrained_cfg`."""
        return {
            "input_size": (self.config["in_chans"], *as_pair(self.config["image_size"])),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": self.crop_pct,
            "crop_mode": "center",
            **{key: self.description[key] and tuple(self.description[key]) for key in ("mean", "std")},
            "num_classes": len(self.classifier["classes"]) if self.classifier else 0,
        }

    def adapted(self, image_size: int | Pair | None = None, in_chans: int | None = None) -> "Weights":
        """These weights for images of another size or with other channels.

        Positions, also the decoder's, are resampled (bicubic) where the grid of patches changes. Channels follow timm's
        rule: one is the sum of the three, several repeat them, scaled by 3 / n; means and stds alike. A decoder
        predicts the channels that it was trained on, so it is left out where they change.

        Raises:
            UserError: The size is not divisible by the patch, or the channels change from a number other than three.
        """
        state, model, notes = dict(self.state), dict(self.config), list(self.notes)
        about = {**self.description, "model": model}
        if image_size is not None and (size := as_pair(image_size)) != as_pair(model["image_size"]):
            if "timm_encoder" in model:
                raise UserError(
                    f"image_size {size[0]}x{size[1]}: {self.source} holds timm's {model['timm_encoder']} for images of "
                    f"{model['image_size']}; only the paper's encoder is adapted to another size"
                )
            ph, pw = as_pair(model["patch_size"])
            if size[0] % ph or size[1] % pw or min(size) < 1:
                raise UserError(f"image_size {size[0]}x{size[1]} is not divisible by the patch size {ph}x{pw}")
            model["image_size"], new = list(size), (size[0] // ph, size[1] // pw)
            if new != self.grid:
                for key in (key for key in POSITIONS if key in state):
                    state[key] = resample_positions(state[key], self.grid, new)
                notes.append(
                    f"positions resampled from {self.grid[0]}x{self.grid[1]} patches to {new[0]}x{new[1]} (bicubic)"
                )
        if in_chans is not None and in_chans != (before := model["in_chans"]):
            if before != 3 or in_chans < 1:
                raise UserError(f"in_chans {in_chans}: {self.source} takes {before}; only 3 channels can be adapted")
            stem = f"{ENCODER}patch_embed.proj.weight"
            state = {key: value for key, value in state.items() if key.startswith(ENCODER)}
            state[stem] = adapt_input_conv(in_chans, state[stem].clone())
            model["in_chans"] = in_chans
            for key in ("mean", "std"):
                if len(values := about[key]) == 3:
                    about[key] = [sum(values) / 3] if in_chans == 1 else [values[i % 3] for i in range(in_chans)]
            notes.append(f"patch embedding made for {in_chans} channels from 3")
            if self.has_decoder:
                notes.append("the decoder is left out: it predicts 3 channels")
        return self._replace(state=state, description=about, notes=tuple(notes))


def target_in_words(norm_pix_loss: bool) -> str:
    return "pixels normalised within each patch" if norm_pix_loss else "plain pixels"


def merge_lora(state: State, scale: float) -> State:
    """Add low-rank adapters, as peft names them, to the weights that they adapt; other states come back as they are.

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
            if value.shape != (len(up), *down.shape[1:]):  # before their product takes memory
                raise ValueError(f"{layer} has adapters of another shape")
            value = value + scale * up @ down
        merged[key.replace(".base_layer.", ".")] = value
    return merged


def fold_batchnorm(state: State) -> State:
    """Make a probe's BatchNorm, which has no weights of its own, part of the linear layer after it."""
    state = dict(state)
    mean, var = (state.pop(f"{ENCODER}head.0.running_{key}").double() for key in ("mean", "var"))
    state.pop(f"{ENCODER}head.0.num_batches_tracked", None)
    weight, bias = (state.pop(f"{ENCODER}head.1.{key}").double() for key in ("weight", "bias"))
    if weight.shape[1:] != var.shape or var.shape != mean.shape or var.ndim != 1:
        raise ValueError("its head and the BatchNorm before it are of different widths")
    weight = weight / (var + 1e-6).sqrt()  # epsilon of the official probe, and of ours
    return state | {f"{ENCODER}head.weight": weight.float(), f"{ENCODER}head.bias": (bias - weight @ mean).float()}


def resample_positions(positions: Tensor, old: Pair, new: Pair) -> Tensor:
    """Resample positions (1, 1 + N, D) from one grid to another (bicubic); the class token's row is kept.

    As in the reference: without align_corners, and without the antialiasing that timm uses by default.
    """
    return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1, antialias=False)
