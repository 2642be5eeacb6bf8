"""Predicted memory against what autograd keeps and what processes take; how an effective batch is divided."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from mae.errors import UserError
from mae.launch import plan
from mae.models.blocks import Block
from mae.models.mae import MaskedAutoencoder
from mae.models.memory_estimate import largest_batch, layers_of, loss_bytes, numerics, predicted_peak, usable
from mae.models.vit import build, train_last
from mae.runtime.memory import GIB

CONFIGS = ROOT / "configs"
PRETRAIN = str(CONFIGS / "pretrain/vitb16_in1k.yaml")
FINETUNE = str(CONFIGS / "finetune/vitb16_in1k.yaml")
ENCODER = {"image_size": 48, "patch_size": 4, "in_chans": 3, "embed_dim": 64, "depth": 3, "num_heads": 4}
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
TOLERANCE = 0.1  # of the claim


def autoencoder(**settings: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(**{**ENCODER, **DECODER, **settings})


def classifier(**settings: Any) -> Any:
    return build({**ENCODER, "mlp_ratio": 4.0}, 10, **{"pool": "mean", "head": "linear", **settings})


def kept(network: nn.Module, run: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(storage.nbytes() for storage in found.values())


def predicted_kept(network: nn.Module, ratio: float | None, batch: int, precision: str) -> int:
    layers = [layer for layer in layers_of(network, ratio, numerics(precision, False, "cpu")) if not layer.frozen]
    return sum(batch * layer.kept + layer.cast for layer in layers)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("ratio", [0.25, 0.75, 0.9])
@pytest.mark.parametrize("image_size", [24, 48])  # 36 and 144 patches: attention by two products, and fused
@pytest.mark.parametrize(
    ("kernel", "switch"),
    [
        *((kernel, {}) for kernel in (None, "plain", "fused")),
        *((None, switch) for switch in ({"visible_loss_weight": 1}, {"encoder_mask_tokens": True}, {"pca_target": 6})),
    ],
)
def test_pre_training_keeps_what_is_predicted(
    precision: str, ratio: float, image_size: int, kernel: Any, switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "kernel", kernel)
    network, batch = autoencoder(image_size=image_size, **switch).train(), 6
    images = torch.randn(batch, 3, image_size, image_size)

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            return network(images, None, ratio).loss

    assert predicted_kept(network, ratio, batch, precision) == pytest.approx(kept(network, run), rel=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("blocks", [None, 2, 1.5, 0])
def test_fine_tuning_keeps_what_is_predicted(precision: str, pool: str, blocks: float | None) -> None:
    network, batch = classifier(pool=pool).train(), 6
    if blocks is not None:
        train_last(network, blocks)
    images = torch.randn(batch, 3, 48, 48)

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            return network(images).float().square().mean()

    given = images.nbytes if blocks is None and precision == "32-true" else 0  # kept, and counted as images
    wanted = predicted_kept(network, None, batch, precision) + given
    assert wanted == pytest.approx(kept(network, run), rel=0.02, abs=20_000)


def test_checkpointing_keeps_less_and_needs_a_block_more() -> None:
    plain, twice = ([*layers_of(autoencoder(activation_checkpointing=on), 0.75, HOW)] for on in (False, True))
    assert sum(layer.kept for layer in twice) < 0.4 * sum(layer.kept for layer in plain)
    for a, b in zip(plain, twice, strict=True):
        assert a.kept + a.extra == b.kept + b.extra


HOW = numerics("32-true", False, "cpu")


def test_the_peak_is_the_largest_of_all_moments() -> None:
    network = autoencoder()
    weights = 4 * sum(p.numel() for p in network.parameters())
    trained = 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    few = predicted_peak(network, (3, 48, 48), 0.75, 1, device="cpu")
    assert (few.weights, few.gradients, few.optimiser) == (weights, trained, 2 * trained)
    assert few.total >= weights + 3 * trained
    many = [predicted_peak(network, (3, 48, 48), 0.75, n, device="cpu").total for n in (64, 128, 256)]
    assert many[2] - many[1] == pytest.approx(2 * (many[1] - many[0]), rel=0.01)
    least = sum(layer.kept for layer in layers_of(network, 0.75, HOW)) + loss_bytes(network, 0.75, HOW)
    assert many[2] - many[1] >= 128 * least
    exchanged = predicted_peak(network, (3, 48, 48), 0.75, 64, device="cpu", devices=2)
    assert (exchanged.gradients, exchanged.communication) == (0, trained)
    assert many[0] - trained <= exchanged.total <= many[0] + trained


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_largest_batch_fits_and_one_more_does_not(precision: str) -> None:
    about = (autoencoder(), (3, 48, 48), 0.75)
    batch = largest_batch(*about, 4 * GIB, precision, False)
    peaks = [predicted_peak(*about, n, precision).total for n in (batch, batch + 1)]
    assert peaks[0] <= usable(4 * GIB, "cuda") < peaks[1]
    assert largest_batch(*about, GIB, precision, False) == 0


def planned(tmp_path: Path, *args: object) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    plan.plan_command([*map(str, args), "--json", str(path)])
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def test_the_fewest_accumulated_batches_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = planned(
        *(tmp_path, "--config", PRETRAIN, "--images_per_step", 4096, "--device_memory_gib", 16, "--devices", 8)
    )
    batch, accumulate = figures["batch_size_per_device"], figures["accumulate_grad_batches"]
    assert batch * accumulate * 8 == 4096
    assert batch <= figures["largest_batch_accumulated"]
    assert accumulate > 1
    for fewer in range(1, accumulate):
        assert 512 % fewer or 512 // fewer > figures["largest_batch" + "_accumulated" * (fewer > 1)]
    assert figures["lr"] == pytest.approx(2.4e-3)
    assert figures["precision"] == "bf16-mixed"
    parts = ("weights", "gradients", "optimiser", "communication", "images", "activations", "transient")
    assert figures["peak_bytes"] == sum(figures[f"{part}_bytes"] for part in parts)
    assert figures["peak_bytes"] + figures["reserve_bytes"] <= 16 * GIB
    said = capsys.readouterr().out
    assert f"{batch} a device x {accumulate} accumulated x 8 devices = 4096" in said
    assert "0.0024" in said


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem == "vitb16_in1k" else pytest.mark.slow)
        for path in sorted(CONFIGS.glob("*/*_in1k*.yaml"))
    ],
)
def test_every_published_recipe_is_planned(path: Path, tmp_path: Path) -> None:
    figures = planned(
        *(tmp_path, "--config", path, "--images_per_step", 1024, "--device_memory_gib", 80, "--devices", 8)
    )
    assert figures["stage"] == {"linprobe": "probe"}.get(path.parent.name, path.parent.name)
    assert figures["batch_size_per_device"] * figures["accumulate_grad_batches"] == 128
    assert figures["batch_size_per_device"] % 2 == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--images_per_step", "100", "--devices", "8"], "96 or 104"),
        (["--device_memory_gib", "2"], "--model.activation_checkpointing true"),
        (["--device_memory_gib", "2"], "fsdp2"),
        (["--device_memory_gib", "-1"], "--device_memory_gib -1"),
        (["--devices", "0"], "--devices 0"),
        (["--precision", "64-true"], "bf16-mixed"),
        (["--model.mask_ratio", "0.999"], "mask_ratio"),
        (["--model.no_such", "1"], "no_such"),
        (["--no_such", "1"], "no_such"),
    ],
)
def test_what_cannot_be_planned(args: list[str], words: str) -> None:
    usual = ["--config", PRETRAIN, "--images_per_step", "512", "--device_memory_gib", "16"]
    with pytest.raises(UserError, match=words):
        plan.plan_command([*usual, *args])


def test_a_config_that_tells_no_stage(tmp_path: Path) -> None:
    more = ["--images_per_step", "64", "--device_memory_gib", "16"]
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  base_lr: 0.1\n  size: small\n")
    with pytest.raises(UserError, match="--stage"):
        plan.plan_command(["--config", str(path), *more])
    assert planned(tmp_path, "--config", path, "--stage", "probe", *more)["stage"] == "probe"
    path.write_text("model:\n  bas_lr: 0.1\n")
    with pytest.raises(UserError, match=r"no stage knows model\.bas_lr"):
        plan.plan_command(["--config", str(path), *more])
    path.write_text("model:\n  mask_ratio: 0.5\ndata:\n  rot: x\n")
    with pytest.raises(UserError, match="rot"):
        plan.plan_command(["--config", str(path), *more])
    with pytest.raises(UserError, match="encoder's size"):
        plan.plan_command(["--config", str(CONFIGS / "finetune/micro_cifar10.yaml"), *more])
    with pytest.raises(UserError, match="cannot be read"):
        plan.plan_command(["--config", str(tmp_path / "none.yaml"), *more])


CIFAR = str(CONFIGS / "pretrain/micro_cifar10.yaml")
SMALL = ["--model.size=tiny", "--data.image_size=112"]


@pytest.mark.parametrize(
    ("config", "batch", "more"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((PRETRAIN, 16, SMALL), (FINETUNE, 48, SMALL))),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in (
                (CIFAR, 96, []),
                (PRETRAIN, 16, [*SMALL, "--model.activation_checkpointing=true", "--model.decoder_depth=1"]),
                (CIFAR, 96, ["--compile", "true"]),
                (PRETRAIN, 8, ["--model.mask_ratio=0.5", "--model.norm_pix_loss=false"]),
                (FINETUNE, 4, ["--model.size=small"]),
            )
        ),
    ],
)
def test_processes_take_what_is_predicted(config: str, batch: int, more: list[str], tmp_path: Path) -> None:
    figures = planned(
        *(tmp_path, "--config", config, "--device", "cpu", "--precision", "32-true", *more),
        *("--check", "true", "--check_batch", batch),
    )
    assert figures["ratio"] == pytest.approx(1, abs=TOLERANCE)
