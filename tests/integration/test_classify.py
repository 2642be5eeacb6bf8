"""Fine-tuning and linear probe: the official runs step by step, through the code that the commands run."""

import csv
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from adam_watch import AdamWatch
from conftest import reference
from timm.data import Mixup
from torch import Tensor

import mae.data.datamodule
from mae.data.sampling import EpochSampler
from mae.data.sources import ArraySource
from mae.errors import UserError
from mae.evaluation.features import POOLS
from mae.finetune import Finetune
from mae.launch.stage_cli import StageCLI
from mae.launch.stages import FinetuneCLI, LinearProbeCLI
from mae.models.mae import MaskedAutoencoder, sincos_positions
from mae.models.vit import build, frozen_features, train_last
from mae.training import recipe_audit
from mae.weights.classifier import load_classifier, load_pretrained
from mae.weights.weights import Weights, resample_positions

EIGHT_STEPS = ["--trainer.max_steps=8", "--trainer.limit_val_batches=0"]
CPU = ["--trainer.accelerator=cpu", "--wandb.mode=disabled", "--data.num_workers=0"]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def official_run(
    name: str, cli_type: type[StageCLI], run_dir: Path, monkeypatch: pytest.MonkeyPatch, *settings: str
) -> tuple[StageCLI, dict[str, Tensor], dict[str, Any]]:
    """Train on the images of an official run, in their order, from its initial weights."""
    tensors, facts = reference(name)
    source = ArraySource(tensors["images_u8"], tensors["labels"].tolist(), [f"class {i}" for i in range(10)])
    monkeypatch.setattr(mae.data.datamodule, "load_torchvision", lambda *_: (source, None))
    steps, size = facts["steps_per_epoch"], facts["batch_size"]

    def stored_order(self: EpochSampler) -> Any:
        return ([(self.step // steps, size * step + i) for i in range(size)] for step in range(steps))

    monkeypatch.setattr(EpochSampler, "__iter__", stored_order)
    cli = cli_type(
        [
            *CPU,
            *("--data.dataset=cifar10", f"--data.root={run_dir.parent}", "--data.crop_scale=null", "--data.hflip=0"),
            *("--data.mean=[0.485,0.456,0.406]", "--data.std=[0.229,0.224,0.225]"),
            *(f"--data.batch_size_per_device={size}", "--model.encoder=scratch", "--model.patch_size=4"),
            *("--model.embed_dim=48", f"--model.depth={facts['depth']}", "--model.num_heads=3"),
            *(f"--model.base_lr={facts['base_lr']}", f"--model.warmup_epochs={facts['warmup_epochs']}"),
            *(f"--trainer.max_epochs={facts['epochs']}", "--trainer.log_every_n_steps=1", f"--run_dir={run_dir}"),
            *settings,
        ]
    )
    cli.model.model.load_state_dict({k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")})
    cli.fit()
    return cli, tensors, facts


def follows(cli: StageCLI, run_dir: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    logged = rows(run_dir)
    for row, loss in zip(logged, facts["losses"], strict=True):
        assert float(row["train/loss"]) == pytest.approx(loss, rel=1e-4)
    whole = torch.cat([v.flatten().float() for k, v in tensors.items() if k.startswith("final.")]).norm()
    for name, value in cli.model.model.state_dict().items():
        wanted = tensors["final." + name]
        if name.endswith("qkv.bias"):
            # The key bias' gradient is zero in theory, so Adam makes steps of rounding noise: held against the whole.
            keys = slice(len(value) // 3, 2 * len(value) // 3)
            assert (value[keys] - wanted[keys]).norm() <= 1e-3 * whole, name
            value, wanted = (torch.cat(t.chunk(3)[::2]) for t in (value, wanted))
        assert (value - wanted).float().norm() <= 1e-3 * wanted.float().norm(), name


def test_thirty_steps_of_the_official_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--data.auto_augment=null", "--data.erase_prob=0", "--model.mixup=0", "--model.cutmix=0"]
    settings += ["--model.layer_decay=0.65", "--model.drop_path=0", "--model.label_smoothing=0.1"]
    run = official_run("finetune_30_steps", FinetuneCLI, tmp_path / "run", monkeypatch, *settings)
    follows(run[0], tmp_path / "run", *run[1:])


def test_forty_steps_of_the_official_linear_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = official_run("linprobe_40_steps", LinearProbeCLI, tmp_path / "run", monkeypatch)
    follows(run[0], tmp_path / "run", *run[1:])


def digits_run(cli_type: type[StageCLI], run_dir: Path, *settings: str) -> StageCLI:
    """A short run of a small random network on 400 digits."""
    own = ["--data.auto_augment=null"] if issubclass(cli_type, FinetuneCLI) else []
    cli = cli_type(
        [
            *CPU,
            *("--data.dataset=digits", "--data.labels_per_class=40", "--data.batch_size_per_device=20"),
            *("--model.encoder=scratch", "--model.size=nano", "--model.embed_dim=32", "--model.depth=3"),
            *("--model.num_heads=2", "--model.patch_size=7", "--model.warmup_epochs=0.1", "--model.base_lr=0.02"),
            *("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", f"--run_dir={run_dir}"),
            *own,
            *settings,
        ]
    )
    cli.fit()
    return cli


def weights(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# ---- the network ----

CONFIG = {"image_size": [16, 16], "patch_size": [4, 4], "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 2}
CONFIG["mlp_ratio"] = 4.0  # type: ignore[assignment]


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_logits_are_those_of_a_plain_timm_vit(pool: Any) -> None:
    ours = build(CONFIG, 10, pool, "linear").eval()
    torch.nn.init.normal_(ours.head.weight)  # type: ignore[arg-type]
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=10,
        global_pool={"mean": "avg", "class": "token"}[pool],
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())  # strict
    images = torch.randn(5, 3, 16, 16)
    assert torch.allclose(ours(images), theirs(images), rtol=0, atol=1e-6)
    tokens = ours.forward_features(images)
    pooled = ours.fc_norm(tokens[:, 1:].mean(dim=1)) if pool == "mean" else tokens[:, 0]
    assert torch.allclose(ours.head(pooled), ours(images), rtol=0, atol=1e-6)  # type: ignore[operator]
    assert isinstance(ours.norm if pool == "mean" else ours.fc_norm, torch.nn.Identity)


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_a_probe_sees_the_features_that_the_encoder_gives(pool: Any) -> None:
    encoder = MaskedAutoencoder(**{**CONFIG, "image_size": 16, "patch_size": 4}).eval()
    state = {f"encoder.{key}": value for key, value in encoder.encoder.state_dict().items()}
    network = build(CONFIG, 10, pool, "batchnorm").eval()
    load_pretrained(network, Weights(Path("x"), state, {"model": CONFIG}))
    images = torch.randn(5, 3, 16, 16)
    wanted = POOLS[pool](encoder.encode(images))
    assert torch.allclose(frozen_features(network, images), wanted, rtol=0, atol=1e-6)
    norm, linear = network.head  # type: ignore[misc]
    assert norm.eps == 1e-6
    assert not norm.affine
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert not linear.bias.any()


def test_initial_heads_of_fine_tuning_are_almost_zero() -> None:
    network = build({**CONFIG, "embed_dim": 512}, 100, "mean", "linear")
    assert network.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)  # type: ignore[operator]
    assert torch.allclose(network.pos_embed, sincos_positions(512, (4, 4)))
    assert network.pos_embed.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize("new", [(8, 8), (3, 3), (3, 7), (4, 4)])
def test_positions_are_resampled_as_torch_does_without_antialiasing(new: tuple[int, int]) -> None:
    table = torch.randn(1, 1 + 5 * 4, 6)
    found = resample_positions(table, (5, 4), new)
    grid = table[:, 1:].reshape(1, 5, 4, 6).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
    assert torch.allclose(found[:, 1:], wanted.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=1e-6)
    assert torch.equal(found[:, 0], table[:, 0])


def test_stochastic_depth_rises_linearly() -> None:
    network = build({**CONFIG, "depth": 5}, 10, "mean", "linear", drop_path=0.2)
    assert recipe_audit.drop_paths(network) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 0.5, 1, 1.5, 3])
def test_partial_fine_tuning_moves_the_top_and_nothing_else(tmp_path: Path, blocks: float) -> None:
    settings = ["--model.layer_decay=1"] if blocks < 1 else []
    settings += ["--model.drop_path=0"] if blocks == 0 else []
    settings += [] if blocks > 1 or blocks == 0 else ["--model.drop_path=0.1"]
    before: dict[str, Tensor] = {}

    class Watched(FinetuneCLI):
        def start(self) -> None:
            before.update({k: v.clone() for k, v in self.model.model.state_dict().items()})

    cli = digits_run(Watched, tmp_path / "run", f"--model.blocks={blocks}", *settings)
    moved = {k for k, v in cli.model.model.state_dict().items() if not torch.equal(v, before[k])}
    top = {k for k in before if k.startswith(("fc_norm", "head"))}
    for i in range(3):
        own = {k for k in before if k.startswith(f"blocks.{i}.")}
        above = 3 - i
        if above <= blocks:
            top |= own
        elif above - blocks == 0.5:
            top |= {k for k in own if ".mlp." in k or ".norm2." in k}
    assert moved == top


def test_a_frozen_branch_is_not_dropped() -> None:
    network = build({**CONFIG, "depth": 3}, 10, "mean", "linear", drop_path=0.3)
    train_last(network, 1.5)
    assert recipe_audit.drop_paths(network) == pytest.approx([0, 0.15, 0.3])
    assert isinstance(network.blocks[1].drop_path1, torch.nn.Identity)
    for wrong in (-1, 0.3, 3.5):
        with pytest.raises(UserError, match=f"blocks {wrong}"):
            train_last(network, wrong)


@pytest.mark.slow
def test_lora_trains_small_updates_that_can_be_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    cli = digits_run(FinetuneCLI, tmp_path / "run", "--model.lora_rank=2", "--model.lora_alpha=6")
    network = cli.model.model.eval()
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith(("fc_norm", "head")) for name in trained)
    assert sum(".lora_" in name for name in trained) == 3 * 2 * 2  # blocks x (qkv, proj) x (A, B)
    images = torch.randn(4, 1, 28, 28)
    merged = load_classifier(tmp_path / "run")
    assert torch.allclose(merged.network(images), network(images), rtol=0, atol=1e-5)
    resumable = load_classifier(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert torch.allclose(resumable.network(images), merged.network(images), rtol=0, atol=1e-6)


# ---- the training ----


@pytest.mark.slow
def test_every_tensor_moves_by_rate_times_scale_times_adam(tmp_path: Path) -> None:
    watch = AdamWatch()
    settings = ["--trainer.accumulate_grad_batches=2", "--model.weight_decay=0.1", "--trainer.precision=64-true"]
    cli = digits_run(watch.watched(FinetuneCLI), tmp_path / "run", *settings)
    assert watch.steps >= 10
    assert len({group["lr_scale"] for group in cli.trainer.optimizers[0].param_groups}) == 5


@pytest.mark.slow
def test_killed_and_resumed_fine_tuning_ends_with_the_same_bits(tmp_path: Path) -> None:
    # Drop path, mixing, crops and erasing are all replayed.
    own = ["--trainer.max_epochs=3", "--model.ema_decay=0.9", "--checkpoint.every_n_steps=7"]
    own += ["--trainer.accumulate_grad_batches=2", "--model.cutmix=1"]
    whole = digits_run(FinetuneCLI, tmp_path / "whole", *own)

    class Killed(BaseException):
        pass

    class Dying(FinetuneCLI):
        def start(self) -> None:
            def die(*_: Any) -> None:
                if self.model.global_step == 17:
                    raise Killed

            self.model.on_before_zero_grad = die

    with pytest.raises(Killed):
        digits_run(Dying, tmp_path / "resumed", *own)
    resumed = digits_run(FinetuneCLI, tmp_path / "resumed", *own, "--ckpt_path=last")
    assert torch.equal(weights(whole.model.model), weights(resumed.model.model))
    assert torch.equal(weights(whole.model.ema.module), weights(resumed.model.ema.module))
    assert [row["train/loss"] for row in rows(tmp_path / "whole")] == [
        row["train/loss"] for row in rows(tmp_path / "resumed")
    ]


@pytest.mark.parametrize(
    "setting",
    [
        *("--model.drop_path=0", "--model.mixup=0", "--model.cutmix=0", "--model.label_smoothing=0"),
        *("--model.layer_decay=0.5", "--model.weight_decay=0.5", "--model.mix_prob=0.2", "--model.switch_prob=0.05"),
        *("--model.betas=[0.8,0.9]", "--model.min_lr=1e-3", "--model.warmup_epochs=0.3", "--model.pool=class"),
        *("--seed_everything=1", "--data.erase_prob=1", "--data.crop_scale=[0.9,1]", "--data.hflip=0"),
        *("--data.subset_seed=1", "--model.base_lr=0.01"),
    ],
)
def test_settings_of_fine_tuning_have_an_effect(tmp_path: Path, plain_finetune: list[str], setting: str) -> None:
    cli = digits_run(FinetuneCLI, tmp_path / "run", *EIGHT_STEPS, setting)
    assert [row["train/loss"] for row in rows(tmp_path / "run") if row["train/loss"]] != plain_finetune
    assert cli.model.global_step == 8


@pytest.mark.parametrize(
    "setting",
    [
        *("--model.momentum=0.5", "--model.trust_coefficient=0.01", "--model.pool=mean", "--model.base_lr=50"),
        *("--model.min_lr=3", "--model.warmup_epochs=0.3", "--data.crop_scale=[0.9,1]", "--data.hflip=0"),
    ],
)
def test_settings_of_the_probe_have_an_effect(tmp_path: Path, plain_probe: list[str], setting: str) -> None:
    digits_run(LinearProbeCLI, tmp_path / "run", *EIGHT_STEPS, "--model.base_lr=10", setting)
    assert [row["train/loss"] for row in rows(tmp_path / "run") if row["train/loss"]] != plain_probe


@pytest.fixture(scope="module")
def plain_probe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    digits_run(LinearProbeCLI, run_dir, *EIGHT_STEPS, "--model.base_lr=10")
    return [row["train/loss"] for row in rows(run_dir) if row["train/loss"]]


@pytest.mark.parametrize(
    "setting",
    [
        *("--data.batch_size_per_device=40", "--trainer.gradient_clip_val=1", "--trainer.precision=bf16-mixed"),
        *("--model.mixup=0.5", "--data.erase_prob=0.5", "--data.labels_per_class=41"),
    ],
)
def test_a_resumed_fine_tuning_keeps_its_recipe(tmp_path: Path, stopped: Path, setting: str) -> None:
    key = setting.split("=")[0].strip("-").replace("data.labels_per_class", "number of training images")
    with pytest.raises(UserError, match=key):
        digits_run(
            FinetuneCLI, stopped, "--trainer.accumulate_grad_batches=2", "--trainer.max_epochs=3", "--ckpt_path=last",
            *(["--trainer.accumulate_grad_batches=1"] if "batch_size" in setting else []), setting,
        )  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    digits_run(FinetuneCLI, run_dir, "--trainer.accumulate_grad_batches=2")
    return run_dir


@pytest.fixture(scope="module")
def plain_finetune(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    digits_run(FinetuneCLI, run_dir, *EIGHT_STEPS)
    return [row["train/loss"] for row in rows(run_dir) if row["train/loss"]]


def test_mixing_is_timms_with_the_arguments_of_the_recipe() -> None:
    model = Finetune("scratch", size="nano", patch_size=7, image_size=28, in_chans=1, classes=list("abc"))
    assert isinstance(model.mixing, Mixup)
    found = {key: getattr(model.mixing, key) for key in vars(Mixup(num_classes=3))}
    assert found == vars(Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1, switch_prob=0.5, mode="batch", num_classes=3))
    assert model.mixing.label_smoothing == 0.1


@pytest.mark.slow
def test_the_average_is_a_moving_one_and_is_kept(tmp_path: Path) -> None:
    cli = digits_run(FinetuneCLI, tmp_path / "run", "--model.ema_decay=0.99")
    assert float(rows(tmp_path / "run")[-1]["val/acc1_ema"]) != float(rows(tmp_path / "run")[-1]["val/acc1"])
    kept = load_classifier(tmp_path / "run").network
    assert torch.equal(weights(kept), weights(cli.model.ema.module))
    assert not torch.equal(weights(kept), weights(cli.model.model))
    from_checkpoint = load_classifier(tmp_path / "run" / "checkpoints" / "last.ckpt").network
    assert torch.equal(weights(kept), weights(from_checkpoint))


def test_a_probe_trains_its_head_alone_on_unmasked_features(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}

    class Watched(LinearProbeCLI):
        def start(self) -> None:
            before.update({k: v.clone() for k, v in self.model.model.state_dict().items()})

    cli = digits_run(Watched, tmp_path / "run")
    moved = {k for k, v in cli.model.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"} | {
        "head.1.weight",
        "head.1.bias",
    }
    cli.model.train()
    assert not any(m.training for m in cli.model.model.blocks.modules())
    assert cli.model.model.head.training


def test_the_recipe_is_said_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits_run(FinetuneCLI, tmp_path / "run", "--trainer.max_steps=3", "--model.warmup_epochs=0.05")
    said, saved = capsys.readouterr().out, (tmp_path / "run" / "recipe.txt").read_text()
    for text in (
        "random erasing 0.25",
        "mixup 0.8, cutmix 1, probability 1, of cutmix 0.5; label smoothing 0.1",
        "20 a device x 1 accumulated x 1 devices = 20 an optimiser step",
        "0.02 x 20 / 256 = 0.0015625 at its peak",
        "drop path by block: 0 0.05 0.1",
    ):
        assert text in said
        assert text in saved
    assert "  blocks.1.attn.qkv.weight" in saved  # every name
    assert "0.42188" in said  # 0.75 ** 3


def test_the_probe_says_when_its_rate_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits_run(
        LinearProbeCLI, tmp_path / "run", "--trainer.max_steps=3", "--model.warmup_epochs=0.05", "--model.base_lr=0.1"
    )
    assert "which is little: a larger --model.base_lr suits so few images" in capsys.readouterr().out


@pytest.mark.slow
def test_settings_without_effect_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model.layer_decay 0.75 has no effect"):
        digits_run(FinetuneCLI, tmp_path / "a", "--model.blocks=0", "--model.drop_path=0")
    with pytest.raises(UserError, match=r"--model.drop_path 0.1 has no effect"):
        digits_run(FinetuneCLI, tmp_path / "b", "--model.blocks=0", "--model.layer_decay=1")
    with pytest.raises(UserError, match=r"batch_size_per_device 5: .* even"):
        digits_run(FinetuneCLI, tmp_path / "c", "--data.batch_size_per_device=5")


def test_the_validation_after_the_last_step_has_a_whole_row(tmp_path: Path) -> None:
    digits_run(FinetuneCLI, tmp_path, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=5")
    (row,) = [row for row in rows(tmp_path) if row["val/acc1"]]
    assert float(row["images_seen"]) > 0
    assert row["step"] == rows(tmp_path)[-1]["step"]
