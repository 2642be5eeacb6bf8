"""Small files of weights as other software writes them, and files that are none."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.models.mae import MaskedAutoencoder
from mae.models.vit import build
from mae.weights.detect_architecture import NO_OVERRIDES, ArchOverrides
from mae.weights.state_dict_keys import from_ours

State = dict[str, Tensor]

# Without heads that the width tells, and with them.
SMALL: dict[str, Any] = {
    **{"image_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
    **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}
WIDE: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 16, "embed_dim": 192, "depth": 1, "num_heads": 3},
    **{"decoder_embed_dim": 512, "decoder_depth": 1, "decoder_num_heads": 16},
}
HEADS = ArchOverrides(num_heads=2, decoder_num_heads=2)
SCRIPT = argparse.Namespace(  # settings of the official pre-training
    model="mae_vit_base_patch16", norm_pix_loss=True, mask_ratio=0.75, input_size=224, blr=1.5e-4, device="cuda"
)


@torch.no_grad()
def drawn(network: nn.Module, seed: int) -> Any:
    """With every number drawn, but those of positions: no tensor is as a fresh one is."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not key.endswith("pos_embed"):
            value.copy_(0.05 * torch.randn(value.shape, generator=generator) + key.endswith(("norm.weight", "_var")))
    return network.eval()


def autoencoder(seed: int = 0, **sizes: Any) -> MaskedAutoencoder:
    """SMALL, unless `sizes` say otherwise."""
    return drawn(MaskedAutoencoder(**(SMALL | sizes)), seed)


def classifier(pool: Any = "mean", head: Any = "linear", classes: int = 5) -> VisionTransformer:
    """A small one; timm's names are its own."""
    sizes = {"image_size": [28, 28], "patch_size": [7, 7], "in_chans": 3}
    sizes |= {key: SMALL[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    return drawn(build(sizes, classes, pool, head), 1)


def official(network: MaskedAutoencoder, encoder: bool = False) -> State:
    return dict(network.encoder.state_dict()) if encoder else from_ours(network.state_dict(), "official")


def hub(network: MaskedAutoencoder) -> State:
    """By the names that the files on Hugging Face's hub have."""
    return from_ours(network.state_dict(), "hf")


# ---- good files of an autoencoder's weights --------------------------------------------------------------------------


class Kind(NamedTuple):
    """A way to write a network's weights.

    Attributes:
        write: The network and an empty folder -> what is then given as SRC.
        overrides: What a caller must state about SMALL.
    """

    write: Callable[[MaskedAutoencoder, Path], Path]
    format: str
    holds: str = "autoencoder"
    overrides: ArchOverrides = HEADS


def torch_file(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def in_the_midst(state: State) -> State:
    """As of a network whose blocks were compiled one by one."""
    return {
        key.replace(".attn.", "._orig_mod.attn.").replace(".mlp.", "._orig_mod.mlp."): v for key, v in state.items()
    }


def official_script(n: MaskedAutoencoder, folder: Path) -> Path:
    optimizer = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    args = argparse.Namespace(**(vars(SCRIPT) | {"model": "mae_vit_own", "norm_pix_loss": n.norm_pix_loss}))
    content = {"model": official(n), "optimizer": optimizer, "epoch": 7, "scaler": {"scale": 65536.0}, "args": args}
    return torch_file(content, folder / "checkpoint-7.pth")


def timm_folder(n: MaskedAutoencoder, folder: Path) -> Path:
    save_file(official(n, encoder=True), folder / "model.safetensors")
    config = {
        "architecture": "vit_own_patch7_28",
        "num_classes": 0,
        "model_args": {"img_size": 28, "num_heads": n.config["num_heads"]},
        "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "license": "cc-by-nc-4.0"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def timm_training(n: MaskedAutoencoder, folder: Path) -> Path:
    state = official(n, encoder=True)
    worse = {key: torch.zeros_like(value) for key, value in state.items()}
    return torch_file({"state_dict": worse, "state_dict_ema": state, "arch": "vit_own", "epoch": 3}, folder / "x.tar")


def hub_config(n: MaskedAutoencoder) -> dict[str, Any]:
    c = n.config
    return {
        **{"architectures": ["ViTMAEForPreTraining"], "model_type": "vit_mae", "image_size": c["image_size"][0]},
        **{"num_attention_heads": c["num_heads"], "decoder_num_attention_heads": c["decoder_num_heads"]},
        **{"norm_pix_loss": c["norm_pix_loss"], "mask_ratio": 0.6, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
    }


def hub_bin(n: MaskedAutoencoder, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(hub_config(n)))
    torch.save(hub(n), folder / "pytorch_model.bin")
    return folder


def hub_parts(n: MaskedAutoencoder, folder: Path) -> Path:
    """Every third tensor in a part, so that no part has queries, keys and values of a block together."""
    (folder / "config.json").write_text(json.dumps(hub_config(n)))
    state = hub(n)
    names = {key: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in names if names[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def hub_encoder(n: MaskedAutoencoder, folder: Path) -> Path:
    """As saved by itself, with a pooler that nothing uses."""
    state = {key.removeprefix("vit."): value for key, value in hub(n).items() if key.startswith("vit.")}
    save_file(state | {"pooler.dense.weight": torch.ones(3, 3)}, folder / "x.safetensors")
    return folder / "x.safetensors"


# What others call the tensors of a block, a decoder and an encoder, by our official names.
MM_BLOCK = {"norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
TORCHVISION_BLOCK = {
    **{
        "norm1": "ln_1",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
        "attn.proj": "self_attention.out_proj",
    },
    **{"attn.qkv.": "self_attention.in_proj_"},
}


def parts(n: MaskedAutoencoder) -> tuple[State, State]:
    """The encoder's and the decoder's tensors under the official names."""
    state = official(n)
    decoder = {key: value for key, value in state.items() if key.startswith(("decoder_", "mask_token"))}
    return {key: value for key, value in state.items() if key not in decoder}, decoder


def respelled(state: State, names: dict[str, str]) -> State:
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def lightly(n: MaskedAutoencoder, folder: Path) -> Path:
    """lightly's MaskedVisionTransformerTIMM, with the head that its ViT has and does not use, and MAEDecoderTIMM."""
    encoder, decoder = parts(n)
    encoder |= {"head.weight": torch.ones(1000, n.config["embed_dim"]), "head.bias": torch.ones(1000)}
    state = {"backbone.mask_token": torch.zeros(1, 1, 32), **prefixed(encoder, "backbone.vit.")}
    return torch_file({"state_dict": state | prefixed(decoder, "decoder."), "epoch": 3}, folder / "x.ckpt")


def lightly_on_torchvision(n: MaskedAutoencoder, folder: Path) -> Path:
    """lightly's MAEBackbone and MAEDecoder; the mask token is beside them."""
    encoder, decoder = (respelled(state, TORCHVISION_BLOCK) for state in parts(n))
    names = {"patch_embed.proj": "conv_proj", "cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    names |= {"norm.": "encoder.ln.", "blocks.": "encoder.layers.encoder_layer_"}
    encoder = respelled(encoder, names) | {"heads.head.weight": torch.ones(9, 32), "heads.head.bias": torch.ones(9)}
    names = {"decoder_pos_embed": "pos_embedding", "decoder_norm.": "ln.", "decoder_pred": "prediction_head"}
    decoder = respelled(decoder, names | {"decoder_blocks.": "layers.encoder_layer_"})
    state = {"mask_token": decoder.pop("mask_token"), **prefixed(encoder, "backbone.")}
    return torch_file(state | prefixed(decoder, "decoder."), folder / "x.pth")


def solo_learn(n: MaskedAutoencoder, folder: Path) -> Path:
    encoder, decoder = parts(n)
    state = prefixed(encoder, "backbone.") | {"classifier.weight": torch.ones(5, 32), "classifier.bias": torch.ones(5)}
    return torch_file({"state_dict": state | prefixed(decoder, "decoder."), "epoch": 3}, folder / "x.ckpt")


def stable_pretraining(n: MaskedAutoencoder, folder: Path) -> Path:
    """Its patch embedding is stored twice; its decoder is another one; a callback trains a probe."""
    encoder, _ = parts(n)
    stem = {key: value for key, value in encoder.items() if key.startswith("patch_embed.")}
    state = prefixed(encoder, "encoder.vit.") | prefixed(stem, "encoder.")
    state |= {"decoder.mask_token": torch.zeros(1, 1, 16), "decoder.transformer.context_proj.weight": torch.ones(2, 2)}
    state |= {"callbacks_modules.probe.weight": torch.ones(5, 32)}
    return torch_file({"state_dict": prefixed(state, "model."), "epoch": 3}, folder / "x.ckpt")


def mmpretrain(n: MaskedAutoencoder, folder: Path) -> Path:
    encoder, decoder = (respelled(state, MM_BLOCK) for state in parts(n))
    encoder = respelled(encoder, {"patch_embed.proj": "patch_embed.projection", "blocks.": "layers.", "norm.": "ln1."})
    decoder = respelled(decoder, {"decoder_norm.": "ln1."})
    state = prefixed(encoder, "backbone.") | prefixed(decoder, "neck.")
    state |= {"data_preprocessor.mean": torch.tensor([127.5, 51.0, 0.0]).view(3, 1, 1)}
    state |= {"data_preprocessor.std": torch.tensor([51.0, 51.0, 25.5]).view(3, 1, 1)}
    return torch_file({"meta": {"cfg": "text"}, "state_dict": state}, folder / "x.pth")


KINDS = {
    "state dict under our names": Kind(lambda n, d: torch_file(n.state_dict(), d / "x.pt"), "mae"),
    "official encoder": Kind(
        lambda n, d: torch_file({"model": official(n, encoder=True)}, d / "x.pth"), "official", "encoder"
    ),
    "official encoder and decoder": Kind(lambda n, d: torch_file({"model": official(n)}, d / "x.pth"), "official"),
    "official, not wrapped": Kind(lambda n, d: torch_file(official(n), d / "x.pth"), "official"),
    "official script": Kind(official_script, "official"),
    "before torch 1.6": Kind(
        lambda n, d: torch_file({"model": official(n)}, d / "x.pth", _use_new_zipfile_serialization=False), "official"
    ),
    "DDP": Kind(lambda n, d: torch_file({"model": prefixed(official(n), "module.")}, d / "x.pth"), "official"),
    "compiled": Kind(lambda n, d: torch_file({"model": prefixed(official(n), "_orig_mod.")}, d / "x.pth"), "official"),
    "compiled in DDP": Kind(
        lambda n, d: torch_file({"model": prefixed(official(n), "module._orig_mod.")}, d / "x.pth"), "official"
    ),
    "a LightningModule": Kind(
        lambda n, d: torch_file({"state_dict": prefixed(official(n), "model."), "epoch": 1}, d / "x.ckpt"), "official"
    ),
    "compiled blocks": Kind(lambda n, d: torch_file({"model": in_the_midst(official(n))}, d / "x.pth"), "official"),
    "any prefix": Kind(lambda n, d: torch_file(prefixed(official(n), "_base.model.net."), d / "x.pth"), "official"),
    "transformers in a LightningModule": Kind(
        lambda n, d: torch_file({"state_dict": prefixed(hub(n), "model.")}, d / "x.ckpt"), "hf"
    ),
    "encoder and decoder beside each other": Kind(
        lambda n, d: torch_file(dict(zip(("encoder", "decoder"), parts(n), strict=True)), d / "x.pth"), "mae"
    ),
    "lightly": Kind(lightly, "timm"),
    "lightly on torchvision": Kind(lightly_on_torchvision, "torchvision"),
    "solo-learn": Kind(solo_learn, "timm"),
    "stable-pretraining": Kind(stable_pretraining, "timm", "encoder"),
    "mmpretrain": Kind(mmpretrain, "mmpretrain"),
    "safetensors": Kind(lambda n, d: (save_file(official(n), d / "x.safetensors"), d / "x.safetensors")[1], "official"),
    "timm": Kind(lambda n, d: torch_file(official(n, encoder=True), d / "x.pth"), "timm", "encoder"),
    "timm training": Kind(timm_training, "timm", "encoder"),
    "timm folder": Kind(timm_folder, "timm", "encoder", NO_OVERRIDES),
    "hub .bin": Kind(hub_bin, "hf", overrides=NO_OVERRIDES),
    "hub in parts": Kind(hub_parts, "hf", overrides=NO_OVERRIDES),
    "hub encoder alone": Kind(hub_encoder, "hf", "encoder"),
}


# ---- files that cannot be used ---------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder where it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


class System(Bomb):
    def __reduce__(self) -> Any:
        return (os.system, (f"mkdir {self.path}",))


class Stranger:
    """A class that no file of weights needs."""


def torch_bytes(content: Any, folder: Path, **options: Any) -> bytes:
    path = torch_file(content, folder / "whole", **options)
    content = path.read_bytes()
    path.unlink()
    return content


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def safetensors_bytes(state: State, folder: Path, metadata: dict[str, str] | None = None) -> bytes:
    path = folder / "whole"
    save_file(state, path, metadata)
    content = path.read_bytes()
    path.unlink()
    return content


def picture(folder: Path) -> bytes:
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    return (folder / "x.png").read_bytes()


def zip_of_text(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "x.zip", "w") as file:
        file.writestr("word/document.xml", "<w:document/>")
    return (folder / "x.zip").read_bytes()


def resnet() -> State:
    return {
        **{"conv1.weight": torch.rand(4, 3, 7, 7), "bn1.weight": torch.rand(4)},
        **{"layer1.0.conv1.weight": torch.rand(4, 4, 1, 1), "fc.weight": torch.rand(10, 4), "fc.bias": torch.rand(10)},
    }


def changed(change: Callable[[State], Any]) -> State:
    """The official tensors of a small network after `change`, which works in place."""
    state = {key: value.clone() for key, value in official(autoencoder()).items()}
    change(state)
    return state


def without(state: State, start: str) -> None:
    for key in [key for key in state if key.startswith(start)]:
        del state[key]


def rename(state: State, old: str, new: str) -> None:
    for key in [key for key in state if old in key]:
        state[key.replace(old, new)] = state.pop(key)


def other_vit(**options: Any) -> State:
    return dict(VisionTransformer(28, 7, embed_dim=32, depth=1, num_heads=2, num_classes=0, **options).state_dict())


def model(state: State) -> Callable[[Path], bytes]:
    return lambda folder: torch_bytes({"model": state}, folder)


LENGTH = struct.pack("<Q", 2)

# What is written to a file of this ending, and words of the error. `boom` of the folder must not come to be.
BAD: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty": (".pth", lambda d: b"", r"is empty \(0 bytes\)"),
    "text": (".pth", lambda d: b"loss 0.4 after 3 epochs\n", "begins with the text 'loss 0.4 after"),
    "short text": (".pth", lambda d: b"hi\n", "holds no weights"),
    "HTML": (".pth", lambda d: b"<!DOCTYPE html>\n<html><body>404", "begins with the text '<!DOCTYPE html>"),
    "Git LFS": (
        ".safetensors",
        lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "picture": (".pth", picture, "holds no weights"),
    "zip of text": (".pth", zip_of_text, "damaged or cut off"),
    "zip, cut": (".pth", lambda d: half(torch_bytes({"model": official(autoencoder())}, d)), "damaged or cut off"),
    "old torch, cut": (
        ".pth",
        lambda d: half(torch_bytes(official(autoencoder()), d, _use_new_zipfile_serialization=False)),
        "damaged or cut off",
    ),
    "safetensors, cut": (
        ".safetensors",
        lambda d: half(safetensors_bytes(official(autoencoder()), d)),
        "damaged or cut off",
    ),
    "safetensors, cut in the header": (
        ".safetensors",
        lambda d: safetensors_bytes(official(autoencoder()), d)[:100],
        "damaged or cut off",
    ),
    "safetensors without tensors": (".safetensors", lambda d: LENGTH + b"{}", "holds no tensors"),
    "description of ours that is none": (
        ".safetensors",
        lambda d: safetensors_bytes(official(autoencoder()), d, {"mae": "no JSON"}),
        "its own description cannot be read",
    ),
    "description of ours without a model": (
        ".safetensors",
        lambda d: safetensors_bytes(autoencoder().state_dict(), d, {"mae": '{"mean": [0.5]}'}),
        "its own description",
    ),
    "code": (".pkl", lambda d: pickle.dumps(System(d / "boom")), r"not safe to load: it asks for \w+\.system"),
    "code in a torch zip": (
        ".pth",
        lambda d: torch_bytes({"model": official(autoencoder()), "x": System(d / "boom")}, d),
        r"not safe to load: it asks for \w+\.system",
    ),
    "code in an old torch file": (
        ".pth",
        lambda d: torch_bytes({"model": Bomb(d / "boom")}, d, _use_new_zipfile_serialization=False),
        r"not safe to load: .*\w+\.mkdir",
    ),
    "a class in Namespace": (
        ".pth",
        lambda d: torch_bytes({"model": official(autoencoder()), "args": argparse.Namespace(x=Stranger())}, d),
        r"not safe to load: it asks for foreign\.Stranger",
    ),
    "code in Namespace": (
        ".pth",
        lambda d: torch_bytes({"model": official(autoencoder()), "args": argparse.Namespace(x=Bomb(d / "boom"))}, d),
        r"not safe to load: it asks for \w+\.mkdir",
    ),
    "a whole module": (".pth", lambda d: torch_bytes(nn.Linear(2, 2), d), "not safe to load"),
    "a tensor": (".pth", lambda d: torch_bytes(torch.zeros(3), d), "holds a Tensor"),
    "a list": (".pth", lambda d: torch_bytes([1, 2], d), "holds a list"),
    "numbers": (".pth", lambda d: torch_bytes({"acc": 0.5, "loss": 1.0}, d), "holds no weights: 'acc' is a float"),
    "no tensors": (".pth", lambda d: torch_bytes({}, d), "holds no tensors"),
    "a ResNet": (".pth", model(resnet()), "no ViT that is known here: its tensors are conv1.weight"),
    "all keys renamed": (
        ".pth",
        model({key.replace(".", "_"): value for key, value in official(autoencoder()).items()}),
        "no ViT that is known here: its tensors are ",
    ),
    "student and teacher": (
        ".pth",
        lambda d: torch_bytes({name: official(autoencoder()) for name in ("student", "teacher")}, d),
        "holds 2 encoders, behind the prefixes 'student' and 'teacher': state which.*--prefix",
    ),
    "a name twice": (
        ".pth",
        model(official(autoencoder()) | {"module.cls_token": torch.zeros(1)}),
        "holds cls_token twice",
    ),
    "keys renamed": (
        ".pth",
        model(changed(lambda s: rename(s, "blocks.0.mlp.fc1", "blocks.0.mlp.first"))),
        r"lacks encoder\.blocks\.0\.mlp\.fc1.*holds unknown tensors.*first",
    ),
    "a block is missing": (
        ".pth",
        model(changed(lambda s: without(s, "blocks.0."))),
        r"lacks encoder\.blocks\.0\.norm1\.weight, .* and 9 more",
    ),
    "no blocks": (".pth", model(changed(lambda s: without(s, "blocks."))), r"lacks encoder\.blocks\.0"),
    "a block of an absurd number": (
        ".pth",
        model(changed(lambda s: s.update({"blocks.999999999.norm1.weight": torch.ones(32)}))),
        "block 999999999",
    ),
    "no patch embedding": (
        ".pth",
        model(changed(lambda s: without(s, "patch_embed."))),
        r"lacks encoder\.patch_embed\.proj\.weight",
    ),
    "half a decoder": (
        ".pth",
        model(changed(lambda s: without(s, "decoder_pred."))),
        r"lacks decoder_pred\.weight, decoder_pred\.bias",
    ),
    "a wrong shape": (
        ".pth",
        model(changed(lambda s: s.update({"blocks.1.attn.proj.weight": torch.zeros(32, 31)}))),
        r"encoder\.blocks\.1\.attn\.proj\.weight is \(32, 31\), wanted \(32, 32\)",
    ),
    "an empty tensor": (
        ".pth",
        model(changed(lambda s: s.update({"patch_embed.proj.weight": torch.zeros(0, 3, 7, 7)}))),
        r"patch_embed\.proj\.weight is \(0, 3, 7, 7\)",
    ),
    "whole numbers": (
        ".pth",
        model(changed(lambda s: s.update({k: (100 * v).to(torch.int8) for k, v in s.items()}))),
        "int8",
    ),
    "no numbers": (
        ".pth",
        model(changed(lambda s: s.update({"cls_token": torch.zeros(1, 1, 32, device="meta")}))),
        "cls_token .*numbers",
    ),
    "sparse": (
        ".pth",
        model(changed(lambda s: s.update({"norm.weight": torch.ones(32).to_sparse()}))),
        r"norm\.weight .*numbers",
    ),
    "registers": (".pth", model(other_vit(reg_tokens=4)), "register"),
    "registers without positions": (".pth", model(other_vit(reg_tokens=4, no_embed_class=True)), "register"),
    "layer scale": (".pth", model(other_vit(init_values=1e-5)), r"blocks\.0\.ls1\.gamma"),
    "no class token": (
        ".pth",
        model(other_vit(class_token=False, global_pool="avg", fc_norm=False)),
        "leave none for a class token",
    ),
    "normed queries": (".pth", model(other_vit(qk_norm=True)), r"attn\.q_norm"),
    "no bias": (".pth", model(other_vit(qkv_bias=False)), r"lacks encoder\.blocks\.0\.attn\.qkv\.bias"),
}


def bad_file(name: str, folder: Path) -> Path:
    ending, content, _ = BAD[name]
    path = folder / f"bad{ending}"
    path.write_bytes(content(folder))
    return path
