"""Encoders of timm's: they see the visible patches alone, train, and are read back by every tool."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import DIGITS
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from mae.cli import main
from mae.data.datamodule import ImageData
from mae.errors import UserError
from mae.evaluation import features
from mae.launch.stages import PretrainCLI
from mae.models.mae import MaskedAutoencoder
from mae.pretrain import Pretrain
from mae.weights.load import load, load_encoder

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 7}
PRETRAIN = [
    *(*DIGITS, "--model.patch_size=7", "--model.decoder_embed_dim=32", "--model.decoder_depth=1"),
    *("--model.decoder_num_heads=2", "--model.warmup_epochs=0.1", "--trainer.max_steps=4"),
    "--data.batch_size_per_device=50",
]


def network(name: str, **arguments: Any) -> MaskedAutoencoder:
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    settings: dict[str, Any] = {"image_size": 28, "patch_size": 7, "in_chans": 1, **decoder}
    if name not in ("swin_tiny_patch4_window7_224", "resnet18"):
        arguments = {**SMALL, **arguments}
    return MaskedAutoencoder(**settings, timm_encoder=name, timm_args=arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "prefix"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"reg_tokens": 3}, 4),
        ("vit_tiny_patch16_224", {"class_token": False}, 0),
        ("vit_small_patch16_rope_224", {}, 1),
        ("vit_small_patch16_rope_mixed_224", {}, 1),
        ("vit_small_patch16_dinov3", {}, 5),
        ("eva02_tiny_patch14_224", {}, 1),
    ],
)
def test_it_is_told_the_visible_patches_and_where_they_are(name: str, arguments: dict[str, Any], prefix: int) -> None:
    """As if the hidden ones were masked out of every attention: timm's own forward pass with such a mask."""
    model = network(name, **arguments).eval()
    encoder: Any = model.encoder
    images, noise = torch.randn(2, 1, 28, 28), torch.rand(2, 16)
    masking = model.make_mask(images, noise, 0.75)
    latent = model.latent(images, torch.empty(0), masking)
    assert latent.shape == (2, prefix + 4, 24)
    seen = torch.cat([torch.ones(2, prefix, dtype=torch.bool), ~masking.mask], dim=1)
    whole = encoder.forward_features(images, attn_mask=seen[:, None, None, :].expand(-1, -1, prefix + 16, -1))
    wanted = torch.cat([whole[:, :prefix], whole[:, prefix:][torch.arange(2)[:, None], masking.ids_keep]], dim=1)
    assert torch.allclose(latent, wanted, atol=1e-5)
    out = model(images, noise)
    out.loss.backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.encode(images).shape == (2, prefix + 16, 24)


def test_its_positions_and_tokens_are_trained_and_not_decayed() -> None:
    settings: dict[str, Any] = {"image_size": 28, "patch_size": 7, "in_chans": 1}
    module = Pretrain(timm_encoder="vit_tiny_patch16_224", timm_args={**SMALL, "reg_tokens": 2}, **settings)
    module.trainer = Trainer(accelerator="cpu", logger=False)
    decay = {id(p): group["weight_decay"] for group in module.make_optimizer(1.0).param_groups for p in group["params"]}
    encoder: Any = module.model.encoder
    for parameter in (encoder.pos_embed, encoder.cls_token, encoder.reg_token, encoder.norm.weight):
        assert decay[id(parameter)] == 0
    assert decay[id(encoder.blocks[0].mlp.fc1.weight)] == 0.05


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("swin_tiny_patch4_window7_224", {}, "whole grid of patches"),
        ("vit_smal_patch16_224", {}, "it has vit_small_patch16_224"),
        ("vit_tiny_patch16_224", {"checkpoint_path": "x.pth"}, "timm_args checkpoint_path is no argument"),
        ("vit_tiny_patch16_224", {"patch_size": 14}, r"patch_size \(14, 14\), where patch_size \(7, 7\) is set"),
        ("vit_tiny_patch16_224", {"embed_dim": 25}, "timm cannot build it"),
        ("resnet18", {}, "timm cannot build it"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        network(name, **arguments)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"num_classes": 3}, "a head of 3 classes"),
        ({"num_classes": 0, "global_pool": "avg"}, "create it with global_pool"),
    ],
)
def test_a_module_with_a_head_or_without_a_norm_is_refused(made: dict[str, Any], words: str) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, **SMALL, **made)
    with pytest.raises(ValueError, match=words):
        MaskedAutoencoder(image_size=28, patch_size=7, in_chans=1, timm_encoder=encoder)


def test_a_stem_that_mixes_patches_is_found_out() -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=0, **SMALL)
    stem = encoder.patch_embed.proj
    encoder.patch_embed.proj = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), stem)
    with pytest.raises(ValueError, match="hidden patches reach the encoder"):
        MaskedAutoencoder(image_size=28, patch_size=7, in_chans=1, timm_encoder=encoder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": "small", "timm_encoder": "vit_tiny_patch16_224"}, "--model.size small"),
        ({"depth": 3, "timm_encoder": "vit_tiny_patch16_224"}, "--model.depth 3"),
        ({"timm_args": {"depth": 3}}, "--model.timm_encoder NAME, which is not set"),
        ({"timm_encoder": 5}, "--model.timm_encoder 5"),
    ],
)
def test_settings_that_would_have_no_effect(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Pretrain(**settings)


@pytest.mark.slow
def test_a_run_is_resumed_and_every_tool_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, arguments = "vit_small_patch16_rope_mixed_224", {**SMALL, "class_token": False}
    own = [f"--model.timm_encoder={name}", f"--model.timm_args={arguments}"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    PretrainCLI([*PRETRAIN, *own, f"--run_dir={whole}"]).fit()
    settings = [*PRETRAIN, *own, f"--run_dir={run}", "--trainer.max_steps=4"]
    PretrainCLI([*settings, "--trainer.max_steps=2", "--allow_changes=true"]).fit()
    PretrainCLI([*settings, "--ckpt_path=last", "--allow_changes=true"]).fit()
    exported = load_file(run / "encoder.safetensors")
    theirs = timm.create_model(name, img_size=28, in_chans=1, num_classes=0, global_pool="", **arguments)
    theirs.load_state_dict(exported)
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        wanted = theirs.eval().forward_features(images)
        before = torch.get_rng_state()
        for encoder in (load_encoder(run), load(run).encoder, load_encoder(run / "checkpoints" / "last.ckpt")):
            assert torch.equal(encoder.forward_features(images), wanted)
        assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="has no class token"):
        features.pooled(load_encoder(run), "class")
    assert ImageData("digits").in_chans == 1

    data = ["--data.dataset=digits", "--data.num_workers=0"]
    assert main(["knn", f"--encoder={run}", *data, "--baseline=true"]) == 0
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "untrained" in said
    assert f"timm's {name}" in said
    quick = [*data, "--data.labels_per_class=10", "--data.batch_size_per_device=50", f"--model.encoder={run}"]
    quick += ["--model.warmup_epochs=0.5", "--trainer.max_epochs=1", "--model.pool=mean"]
    for stage, more in (("linprobe", []), ("finetune", ["--data.auto_augment=null"])):
        out = tmp_path / stage
        assert main([stage, *quick, *more, f"--run_dir={out}"]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert main(["evaluate", "--model", str(out), *data]) == 0
        assert line.split("top-1")[1].split(",")[0] in capsys.readouterr().out
    assert main(["linprobe", *quick, f"--run_dir={tmp_path / 'other'}", "--data.image_size=56"]) == 2
    assert main(["convert", str(run), str(tmp_path / "hf"), "--format=hf"]) == 2
    error = capsys.readouterr().err
    assert "--data.image_size 56x56 does not fit" in error
    assert "loads into timm's model as it is" in error
