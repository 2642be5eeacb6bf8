"""The training that `mae pretrain` runs: the official run step by step, resume, and when it must stop."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DIGITS, TINY, reference
from run_folders import few_digits
from torch import Tensor

import mae.data.datamodule
import mae.pretrain
from mae.data import sampling
from mae.data.decode import BadImage, Picture
from mae.data.sampling import HELD_OUT_EPOCH, EpochSampler, sample_noise
from mae.data.sources import ArraySource, load_digits
from mae.errors import TrainingFailed, UserError
from mae.launch.stages import PretrainCLI
from mae.training.optim import WarmupCosine
from mae.weights.load import load_official_state_dict
from mae.weights.state_dict_keys import official_name


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(run_dir: Path, *settings: str) -> PretrainCLI:
    cli = PretrainCLI([*DIGITS, *TINY, f"--run_dir={run_dir}", "--trainer.log_every_n_steps=1", *settings])
    cli.fit()
    return cli


def weights(cli: PretrainCLI) -> Tensor:
    return torch.cat([p.detach().flatten() for p in cli.model.parameters()])


def test_fifty_steps_of_the_official_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, facts = reference("pretrain_50_steps")
    source = ArraySource(tensors["images_u8"], [0] * 160, ["any"])
    monkeypatch.setattr(mae.data.datamodule, "load_torchvision", lambda *_: (source, None))

    def stored_order(self: EpochSampler) -> Any:
        return ([(self.step // 10, 16 * step + i) for i in range(16)] for step in range(10))

    monkeypatch.setattr(EpochSampler, "__iter__", stored_order)

    def stored_noise(seed: int, epochs: list[int], indices: list[int], num_patches: int) -> Tensor:
        if epochs[0] == HELD_OUT_EPOCH:  # of pictures
            return sample_noise(seed, epochs, indices, num_patches)
        return tensors["noise"][10 * epochs[0] + indices[0] // 16]

    monkeypatch.setattr(sampling, "sample_noise", stored_noise)
    cli = PretrainCLI(
        [
            *("--data.dataset=cifar10", f"--data.root={tmp_path}", "--data.crop_scale=null", "--data.hflip=0"),
            *(f"--data.mean={facts['mean']}", f"--data.std={facts['std']}", "--data.num_workers=0"),
            *("--data.batch_size_per_device=16", "--model.patch_size=4", "--model.embed_dim=48", "--model.depth=2"),
            *("--model.num_heads=3", "--model.decoder_embed_dim=32", "--model.decoder_depth=2"),
            *("--model.decoder_num_heads=4", f"--model.base_lr={facts['base_lr']}", "--model.warmup_epochs=1"),
            *("--trainer.max_epochs=5", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"),
            *("--wandb.mode=disabled", f"--run_dir={tmp_path / 'run'}"),
        ]
    )
    network = cli.model.model
    load_official_state_dict(network, {k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")})
    cli.fit()

    logged = rows(tmp_path / "run")
    assert [float(row["lr"]) for row in logged] == facts["lrs"]  # to the last bit
    for row, loss in zip(logged, facts["losses"], strict=True):
        assert float(row["train/loss"]) == pytest.approx(loss, rel=1e-4)
    whole = torch.cat([value.flatten() for key, value in tensors.items() if key.startswith("final.")]).norm()
    for name, value in network.state_dict().items():
        wanted = tensors["final." + official_name(name)]
        if name.endswith("qkv.bias"):
            # The key bias' gradient is zero in theory, so Adam makes steps of rounding noise: held against the whole.
            keys = slice(len(value) // 3, 2 * len(value) // 3)
            assert (value[keys] - wanted[keys]).norm() <= 1e-3 * whole, name
            value, wanted = (torch.cat(t.chunk(3)[::2]) for t in (value, wanted))
        assert (value - wanted).norm() <= 1e-3 * wanted.norm(), name


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0), (20, 0.0012), (40, 0.0024), (100, 0.002363280319127196)])
def test_schedule_of_the_paper(epoch: int, lr: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.5e-4 * 4096 / 256)
    schedule = WarmupCosine(optimizer, steps_per_epoch=312, epochs=800, warmup_epochs=40)
    assert schedule.lr_at(epoch * 312, 0.0024) == pytest.approx(lr, rel=1e-12)


def test_min_lr_is_where_the_cosine_ends() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosine(optimizer, 10, epochs=5, warmup_epochs=1, min_lr=0.1)
    assert schedule.lr_at(50, 1.0) == pytest.approx(0.1)


def test_default_recipe_decays_what_the_official_one_decays(tmp_path: Path) -> None:
    cli = run(tmp_path / "run", "--trainer.max_steps=2", "--model.warmup_epochs=0.01")
    optimizer = cli.trainer.optimizers[0]
    names = {id(p): name for name, p in cli.model.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay["encoder.cls_token"] == decay["mask_token"] == 0.05
    assert decay["encoder.patch_embed.proj.weight"] == decay["decoder_pred.weight"] == 0.05
    assert all(value == 0 for name, value in decay.items() if name.endswith("bias") or "norm" in name)
    assert not any(name.endswith("pos_embed") for name in decay)
    assert optimizer.defaults["betas"] == (0.9, 0.95)


# Each switch of Table 1 in another position.
ABLATIONS = [
    *("--model.mask_sampling=block", "--model.visible_loss_weight=0.5", "--model.encoder_mask_tokens=true"),
    *("--model.pca_target=8", "--data.color_jitter=0.4", "--data.crop_side=0.8"),
]


class Killed(BaseException):
    pass


def killed_at(step: int, run_dir: Path, *settings: str) -> None:
    """Run until this optimiser step has been taken, and die there as by SIGKILL."""
    cli = PretrainCLI([*DIGITS, *TINY, f"--run_dir={run_dir}", "--trainer.log_every_n_steps=1", *settings])

    def die(*_: Any) -> None:
        if cli.model.global_step == step:
            cli.trainer.strategy.checkpoint_io.wait()  # a thread of this process goes on writing, unlike a killed one's
            raise Killed

    cli.model.on_before_zero_grad = die  # type: ignore[method-assign]
    with pytest.raises(Killed):
        cli.fit()


@pytest.mark.parametrize(
    ("limit", "kills", "own"),
    [
        ("--trainer.max_epochs=3", [15, 17], ["--checkpoint.every_n_steps=7"]),  # within an epoch, twice
        ("--trainer.max_steps=12", [8], ["--checkpoint.every_n_steps=4", *ABLATIONS]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("--trainer.max_epochs=3", [15], ["--checkpoint.every_n_steps=7", "--data.num_workers=2"]),
                ("--trainer.max_steps=28", [12, 25], []),  # back to the end of an epoch, twice
                ("--trainer.max_epochs=3", [12, 25], []),
                ("--trainer.max_steps=28", [13], ["--trainer.check_val_every_n_epoch=2"]),
                ("--trainer.max_steps=28", [15, 22], ["--checkpoint.every_n_steps=7", "--trainer.limit_val_batches=0"]),
                ("--trainer.max_steps=28", [12], ["--data.num_workers=2"]),
            )
        ),
    ],
)
def test_killed_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, limit: str, kills: list[int], own: list[str]
) -> None:
    settings = ["--data.batch_size_per_device=20", "--trainer.accumulate_grad_batches=2", limit, *own]  # 10 an epoch
    with few_digits():
        whole = run(tmp_path / "whole", *settings)
        for step in kills:
            killed_at(step, tmp_path / "cut", *settings, "--ckpt_path=last")
        again = run(tmp_path / "cut", *settings, "--ckpt_path=last")
    assert again.model.global_step == whole.model.global_step
    assert torch.equal(weights(whole), weights(again))
    logged, wanted = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    assert [row["step"] for row in logged] == [str(step) for step in range(1, whole.model.global_step + 1)]
    assert [row["train/loss"] for row in logged] == [row["train/loss"] for row in wanted]


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--data.batch_size_per_device=400"]
    run(tmp_path, *settings, "--trainer.max_epochs=1")
    cli = run(tmp_path, *settings, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert (
        "20 optimiser steps, and was to have 10: from step 10 on the learning rate follows" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="is to have 10 optimiser steps, and was to have 20"):
        run(tmp_path, *settings, "--trainer.max_epochs=1", "--ckpt_path=last")
    logged = rows(tmp_path)
    assert [int(row["step"]) for row in logged] == list(range(1, 21))
    assert float(logged[10]["lr"]) == cli.model.schedule.lr_at(10, 1.5e-4 * 400 / 256)  # of the longer schedule
    before = (tmp_path / "config.yaml").read_text()
    for setting, said in {
        "--model.base_lr=1": "model.base_lr is 1.0, but 0.00015",
        "--data.batch_size_per_device=100": "effective batch is 100, but 400",
        "--seed_everything=5": "seed_everything is 5, but 0",
        "--model.depth=2": "another architecture",
    }.items():
        with pytest.raises(UserError, match=said):
            run(tmp_path, *settings, "--trainer.max_epochs=3", "--ckpt_path=last", setting)
    assert (tmp_path / "config.yaml").read_text() == before
    with pytest.raises(UserError, match="without the state of a run"):
        run(tmp_path, *settings, f"--ckpt_path={tmp_path / 'model.safetensors'}")


def test_accumulation_averages_the_window(tmp_path: Path) -> None:
    once = run(tmp_path / "once", "--data.batch_size_per_device=32", "--trainer.max_steps=4")
    twice = run(
        tmp_path / "twice",
        "--data.batch_size_per_device=16",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_steps=4",
    )
    for a, b in zip(rows(tmp_path / "once"), rows(tmp_path / "twice"), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-5)
        assert (a["lr"], a["images_seen"]) == (b["lr"], b["images_seen"])
    assert torch.allclose(weights(once), weights(twice), atol=1e-5)


@pytest.mark.slow
def test_held_out_loss_has_the_same_images_and_masks_each_time(tmp_path: Path) -> None:
    # With the learning rate at nought nothing changes, so any difference would come from the images or the masks.
    run(tmp_path / "run", "--model.base_lr=0", "--data.batch_size_per_device=400", "--trainer.max_epochs=2")
    losses = [row["val/loss"] for row in rows(tmp_path / "run") if row["val/loss"]]
    assert len(losses) == 2
    assert losses[0] == losses[1]
    run(tmp_path / "other", "--model.base_lr=0", "--data.batch_size_per_device=300", "--trainer.max_epochs=1")
    other = [row["val/loss"] for row in rows(tmp_path / "other") if row["val/loss"]]
    assert float(other[0]) == pytest.approx(float(losses[0]), rel=1e-6)  # however it is cut into batches


def test_a_loss_that_is_not_finite_stops_the_run_and_writes_nothing_more(tmp_path: Path) -> None:
    cli = PretrainCLI(
        [*DIGITS, *TINY, f"--run_dir={tmp_path}", "--trainer.max_steps=40", "--checkpoint.every_n_steps=5"]
    )
    forward = cli.model.model.forward

    def poisoned(*args: Any) -> Any:
        out = forward(*args)
        return out._replace(per_image=out.per_image * float("nan")) if cli.model.global_step == 14 else out

    cli.model.model.forward = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingFailed, match=r"not finite at step 15 \(learning rate .*step_0000010.ckpt"):
        cli.fit()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 10
    assert not (tmp_path / "encoder.safetensors").exists()


def test_an_overflow_that_the_scaler_handles_is_counted(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    cli = PretrainCLI(
        [*DIGITS, *TINY, f"--run_dir={tmp_path}", "--trainer.max_steps=6", "--trainer.log_every_n_steps=1"]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(cli.trainer.strategy, "precision_plugin", precision)
    hook = cli.model.model.mask_token.register_hook(
        lambda grad: grad * float("inf") if cli.model.global_step == 3 else grad
    )
    cli.fit()
    hook.remove()
    monkey.undo()
    assert [float(row["skipped_steps"]) for row in rows(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert all(p.isfinite().all() for p in cli.model.parameters())


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """32 digits, of which these cannot be read."""
    train, _ = load_digits()
    lost = {3, 17}

    class Damaged(ArraySource):
        def open_all(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
            for index, picture in zip(indices, super().open_all(indices), strict=True):
                yield BadImage(f"{index}.png", "truncated") if index in lost else picture

    assert train.labels is not None
    few = Damaged(train.images[:32], train.labels[:32], train.classes)
    monkeypatch.setattr(mae.data.datamodule, "load_digits", lambda: (few, None))
    return lost


def test_the_loss_is_the_mean_over_the_readable_images_of_the_whole_step(tmp_path: Path, lost: set[int]) -> None:
    settings = ["--trainer.max_steps=3", "--data.max_bad_images=2", "--model.base_lr=0.1"]
    whole = run(tmp_path / "whole", *settings, "--data.batch_size_per_device=32")
    split = ["--data.batch_size_per_device=8", "--trainer.accumulate_grad_batches=4"]
    parts = run(tmp_path / "parts", *settings, *split)
    wanted = [float(row["train/loss"]) for row in rows(tmp_path / "whole")]
    assert [float(row["train/loss"]) for row in rows(tmp_path / "parts")] == pytest.approx(wanted, rel=1e-6)
    for (name, a), b in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        if not name.endswith("qkv.bias"):  # a third of it has no gradient but rounding noise, which Adam enlarges
            assert torch.allclose(a, b, rtol=0, atol=1e-5), name
    lost.clear()
    complete = run(tmp_path / "complete", *settings, "--data.batch_size_per_device=32")
    assert float(rows(tmp_path / "complete")[0]["train/loss"]) != pytest.approx(wanted[0], rel=1e-6)
    assert not torch.allclose(weights(complete), weights(whole), rtol=0, atol=1e-5)


def test_an_unreadable_image_has_no_weight(tmp_path: Path, lost: set[int]) -> None:
    settings = ["--data.batch_size_per_device=32", "--trainer.max_steps=3"]
    run(tmp_path / "run", *settings, "--data.max_bad_images=2")
    logged = rows(tmp_path / "run")
    assert [float(row["bad_images"]) for row in logged] == [2, 2, 2]

    cli = run(tmp_path / "again", *settings, "--data.max_bad_images=2", "--model.base_lr=0")
    loader = cli.datamodule.train_dataloader()
    loader.sampler.seek(0)
    batch = next(iter(loader))
    assert sorted(batch.indices[batch.weight == 0].tolist()) == sorted(lost)
    prepared = cli.datamodule.prepare(batch)
    noise = sample_noise(0, batch.epochs.tolist(), batch.indices.tolist(), cli.model.model.num_patches)
    good = batch.weight > 0
    wanted = cli.model.model(prepared.images[good], noise[good]).loss.item()
    assert float(rows(tmp_path / "again")[0]["train/loss"]) == pytest.approx(wanted, rel=1e-5)

    with pytest.raises(UserError, match=r"2 unreadable training images, --data.max_bad_images is 1: 17.png.*3.png"):
        run(tmp_path / "strict", *settings, "--data.max_bad_images=1")
    assert not (tmp_path / "strict" / "checkpoints").exists()


def test_warm_start_says_what_it_did_and_refuses_another_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path / "first", "--trainer.max_steps=3")
    settings = ["--trainer.max_steps=2", "--model.base_lr=0"]
    warm = run(tmp_path / "warm", *settings, f"--model.init={tmp_path / 'first'}")
    assert "encoder loaded, decoder loaded" in capsys.readouterr().out
    assert torch.equal(weights(first), weights(warm))
    assert rows(tmp_path / "warm")[0]["step"] == "1"

    run(
        tmp_path / "wide",
        *settings,
        "--data.image_size=35",
        f"--model.init={tmp_path / 'first' / 'encoder.safetensors'}",
    )
    said = capsys.readouterr().out
    assert "positions recomputed for [35, 35]" in said
    assert "decoder left random: the file has none" in said

    with pytest.raises(UserError, match="another architecture: depth 1, this model has 2"):
        run(tmp_path / "deep", *settings, "--model.depth=2", f"--model.init={tmp_path / 'first'}")


def test_the_recipe_is_said_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--trainer.max_steps=2", "--trainer.accumulate_grad_batches=2", "--data.batch_size_per_device=48")
    said = capsys.readouterr().out
    assert "48 a device x 2 accumulated x 1 devices = 96 an optimiser step" in said
    assert "41 optimiser steps; 64 images of each epoch's order left out" in said
    assert "0.00015 x 96 / 256 = 5.625e-05 at its peak" in said
    assert "step 2/2 | loss" in said


def test_a_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=2", "--seed_everything=3")
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "encoder.safetensors", "model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
    assert [p.name for p in (tmp_path / "reconstructions").iterdir()] == ["step_0000002.png"]
    assert "seed_everything: 3" in (tmp_path / "config.yaml").read_text()


@pytest.mark.slow
def test_seed_changes_weights_order_and_masks(tmp_path: Path) -> None:
    a, b, again = (run(tmp_path / n, "--trainer.max_steps=2", f"--seed_everything={n}") for n in ("0", "1", "00"))
    assert (a.datamodule.seed, a.model.seed, b.datamodule.seed, b.model.seed) == (0, 0, 1, 1)
    assert not torch.equal(weights(a), weights(b))
    assert torch.equal(weights(a), weights(again))


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precisions_train_a_network_of_that_type(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    cli = run(tmp_path / "run", "--trainer.max_steps=3", f"--trainer.precision={precision}")
    assert cli.model.model.decoder_pred.weight.dtype == dtype
    assert len(rows(tmp_path / "run")) == 3


def test_every_switch_of_the_paper_changes_the_loss(tmp_path: Path) -> None:
    with few_digits():
        settings = ["--seed_everything=0", "--model.mask_sampling=grid", "--model.norm_pix_loss=false", *ABLATIONS]
        for place, own in enumerate(settings):
            run(tmp_path / str(place), "--data.batch_size_per_device=20", "--trainer.max_steps=1", own)
    losses = [rows(tmp_path / str(place))[0]["train/loss"] for place in range(len(settings))]
    assert len({*losses}) == len(settings)


def test_principal_components_are_found_once(tmp_path: Path) -> None:
    """On training images before the first step, the same in every run; a warm start keeps those that it brings."""
    settings = ["--data.batch_size_per_device=20", "--trainer.max_steps=1", "--model.pca_target=8"]
    with few_digits():
        first, second = (run(tmp_path / name, *settings).model.model for name in ("first", "second"))
        other = ["--seed_everything=1", f"--model.init={tmp_path / 'first'}"]
        warm = run(tmp_path / "warm", *settings, *other).model.model
    assert torch.equal(first.target_basis, second.target_basis)
    assert torch.equal(first.target_basis, warm.target_basis)
    torch.testing.assert_close(first.target_basis.T @ first.target_basis, torch.eye(8))
    assert (tmp_path / "first" / "reconstructions" / "step_0000001.png").is_file()
