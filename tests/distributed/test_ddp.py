"""Two processes against one: the same losses and gradients from the same images and masks, and the same end."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DIGITS, SUPPORT, TINY, mae, save_images
from PIL import Image
from torch import Tensor

from mae.data.datamodule import ImageData
from mae.errors import Stopped, UserError
from mae.launch.stage_cli import StageCLI
from mae.launch.stages import FinetuneCLI, LinearProbeCLI, PretrainCLI
from mae.runtime.checkpoint_files import saved, step_file

pytestmark = pytest.mark.slow

TESTS = SUPPORT


def pretrain(run_dir: Path, processes: int, *settings: str) -> subprocess.CompletedProcess[str]:
    return mae(
        "pretrain", *TINY, f"--run_dir={run_dir}", "--trainer.log_every_n_steps=1",
        f"--trainer.devices={processes}", "--trainer.strategy=auto", *settings, timeout=400,
    )  # fmt: skip


def column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


# Settings of a command, and how long it is: 30 steps of 32 images, less than an epoch.
LENGTH = [
    *("--trainer.max_steps=30", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"),
    *("--wandb.mode=disabled", "--trainer.accelerator=cpu", "--data.num_workers=0", "--ckpt_path=last"),
]
PRETRAIN = [*DIGITS, *TINY, *LENGTH, "--model.base_lr=0.01", "--checkpoint.every_n_steps=7"]
SCRATCH = [
    *("--model.encoder=scratch", "--model.size=nano", "--model.embed_dim=32", "--model.depth=2"),
    *("--model.num_heads=2", "--model.warmup_epochs=0.01"),
]
# LARS moves the weight by a thousandth of its norm for a rate of 1.
PROBE = [*LENGTH, *SCRATCH, "--data.dataset=digits", "--model.patch_size=7", "--model.base_lr=100"]
FINETUNE = [*LENGTH, *SCRATCH, "--data.image_size=16", "--model.patch_size=4", "--model.base_lr=0.01"]


def divided(run_dir: Path, processes: int, batch: int, accumulate: int = 1) -> list[str]:
    return [
        *(f"--run_dir={run_dir}", f"--trainer.devices={processes}", "--trainer.strategy=auto"),
        *(f"--data.batch_size_per_device={batch}", f"--trainer.accumulate_grad_batches={accumulate}"),
    ]


def watched(run_dir: Path) -> list[str]:
    callback = "--trainer.callbacks+=run_callbacks.Gradients"
    return [callback, f"--trainer.callbacks.folder={run_dir / 'gradients'}", "--trainer.callbacks.steps=[1,10,20]"]


def signalled(step: int, number: int) -> list[str]:
    callback = "--trainer.callbacks+=run_callbacks.SignalAt"
    return [callback, f"--trainer.callbacks.step={step}", f"--trainer.callbacks.number={int(number)}"]


def two_processes(command: str, *settings: str) -> str:
    done = mae(command, *settings, timeout=400, PYTHONPATH=str(TESTS))
    assert done.returncode == 0, done.stderr
    return done.stdout


def require_same_gradients(run_dir: Path, wanted_dir: Path) -> None:
    for step in (1, 10, 20):
        found, wanted = (torch.load(folder / "gradients" / f"{step}.pt") for folder in (run_dir, wanted_dir))
        assert found.keys() == wanted.keys()
        whole = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
        for name in wanted:
            require_close(name, found[name], wanted[name], whole)


def require_close(name: str, found: Tensor, wanted: Tensor, whole: Tensor) -> None:
    assert wanted.norm() > 0, name
    if name.endswith("qkv.bias"):
        # The key bias' gradient is zero in theory, rounding noise in practice: held against the whole.
        keys = slice(len(wanted) // 3, 2 * len(wanted) // 3)
        assert (found[keys] - wanted[keys]).norm() <= 1e-5 * whole, name
        found, wanted = (torch.cat(gradient.chunk(3)[::2]) for gradient in (found, wanted))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm(), name


def require_same_losses(run_dir: Path, wanted_dir: Path, rel: float = 1e-6) -> None:
    for key in ("train/loss", "lr", "images_seen"):
        wanted = column(wanted_dir, key)
        assert len(wanted) == 30
        assert column(run_dir, key) == pytest.approx(wanted, rel=rel), key


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-training by two processes that nothing has disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "by_two"
    said = two_processes("pretrain", *PRETRAIN, *divided(run_dir, 2, 16), *watched(run_dir))
    assert "16 a device x 1 accumulated x 2 devices = 32 an optimiser step" in said
    losses = column(run_dir, "train/loss")
    assert losses[-1] < 0.9 * losses[0]
    return run_dir


@pytest.mark.parametrize(("processes", "batch", "accumulate"), [(1, 32, 1), (1, 16, 2), (2, 8, 2)])
def test_pretraining_is_the_same_however_a_step_is_divided(
    tmp_path: Path, by_two: Path, processes: int, batch: int, accumulate: int
) -> None:
    settings = [*PRETRAIN, *divided(tmp_path, processes, batch, accumulate), *watched(tmp_path)]
    two_processes("pretrain", *settings) if processes == 2 else PretrainCLI(settings).fit()
    require_same_losses(tmp_path, by_two)
    require_same_gradients(tmp_path, by_two)


def pictures(root: Path) -> Path:
    """64 RGB images of two classes."""
    for seed, name in enumerate(("cat", "dog")):
        save_images(root / "train" / name, 40, seed=seed)
        save_images(root / "val" / name, 2, seed=seed + 2)
    return root


@pytest.mark.parametrize("cli_type", [LinearProbeCLI, FinetuneCLI])
def test_classifiers_are_the_same_where_no_image_depends_on_another(tmp_path: Path, cli_type: type[StageCLI]) -> None:
    # Crops, RandAugment and erasing are drawn by image; BatchNorm, mixing and drop path go by micro-batch.
    if cli_type is LinearProbeCLI:
        settings = [*PROBE, "--trainer.callbacks+=run_callbacks.FixedNorm"]
    else:
        root = pictures(tmp_path / "images")
        settings = [*FINETUNE, f"--data.root={root}", "--model.mixup=0", "--model.cutmix=0", "--model.drop_path=0"]
    dirs = {name: tmp_path / name for name in ("one", "accumulated", "two")}
    own = {name: [*settings, *watched(run_dir)] for name, run_dir in dirs.items()}
    cli_type([*own["one"], *divided(dirs["one"], 1, 32)]).fit()
    cli_type([*own["accumulated"], *divided(dirs["accumulated"], 1, 16, 2)]).fit()
    two_processes(cli_type.command, *own["two"], *divided(dirs["two"], 2, 16))
    losses = column(dirs["one"], "train/loss")
    assert abs(losses[0] - losses[-1]) > 1e-3 * losses[0]
    for name in ("accumulated", "two"):
        require_same_losses(dirs[name], dirs["one"])
        require_same_gradients(dirs[name], dirs["one"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_what_two_processes_began_one_goes_on_with(
    tmp_path: Path, by_two: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*PRETRAIN, *divided(tmp_path, 2, 16)]
    done = mae("pretrain", *settings, *signalled(9, number), timeout=400, PYTHONPATH=str(TESTS))
    if number == signal.SIGTERM:
        assert done.returncode == 143, done.stderr
        assert saved(tmp_path)[0] in (step_file(tmp_path, 10), step_file(tmp_path, 11))  # rank 1 hears of it later
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert saved(tmp_path)[0] == step_file(tmp_path, 7)
    PretrainCLI([*settings, "--trainer.devices=1"]).fit()
    said = "1 devices instead of 2: 16 images a device x 2 accumulated, so that a step has 32 images as before"
    assert said in capsys.readouterr().out
    require_same_losses(tmp_path, by_two, rel=1e-5)


@pytest.mark.parametrize(
    ("rank", "number", "code"),
    [
        (1, signal.SIGSEGV, 1),
        pytest.param(1, signal.SIGKILL, 1, marks=pytest.mark.soak),
        pytest.param(0, signal.SIGSEGV, -signal.SIGSEGV, marks=pytest.mark.soak),
    ],
)
def test_the_death_of_a_rank_is_one_line_and_exit_code_1(tmp_path: Path, rank: int, number: int, code: int) -> None:
    """That of the first rank is the command's own: no process is left to say anything."""
    settings = [*PRETRAIN, *divided(tmp_path, 2, 16), *signalled(9, number), f"--trainer.callbacks.rank={rank}"]
    done = mae("pretrain", *settings, timeout=400, PYTHONPATH=str(TESTS))
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("mae: error")]
    assert len(lines) == (rank == 1)
    assert all("another process of the run is gone" in line for line in lines)


def test_a_rank_that_is_lost_while_the_first_one_does_something_else_ends_it(tmp_path: Path) -> None:
    callbacks = [*signalled(3, signal.SIGSEGV), "--trainer.callbacks.rank=1"]
    callbacks += [
        "--trainer.callbacks+=run_callbacks.HangAt",
        "--trainer.callbacks.step=3",
        "--trainer.callbacks.rank=0",
    ]
    settings = [*PRETRAIN, *divided(tmp_path, 2, 16), *callbacks]
    done = mae("pretrain", *settings, timeout=400, PYTHONPATH=str(TESTS))
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mae: error"))
    assert "another process of the run is gone (rank 1, by SIGSEGV); " in line


def began(run_dir: Path) -> list[str]:
    """Settings of a pre-training by one process, which a signal has stopped."""
    settings = [*PRETRAIN, *divided(run_dir, 1, 32)]
    with pytest.raises(Stopped, match="stopped at step 10, saved"):
        PretrainCLI([*settings, *signalled(9, signal.SIGTERM)]).fit()
    return settings


def test_what_one_process_began_two_go_on_with(tmp_path: Path, by_two: Path) -> None:
    said = two_processes("pretrain", *began(tmp_path), "--trainer.devices=2")
    line = "2 devices instead of 1: 16 images a device x 1 accumulated, so that a step has 32 images as before"
    assert said.count(line) == 1
    require_same_losses(tmp_path, by_two, rel=1e-5)


def test_accumulation_may_change_between_starts(tmp_path: Path, by_two: Path) -> None:
    settings = [*began(tmp_path), "--data.batch_size_per_device=8"]
    with pytest.raises(UserError, match="effective batch is 8, but 32 in the run that"):
        PretrainCLI(settings).fit()
    PretrainCLI([*settings, "--trainer.accumulate_grad_batches=4"]).fit()
    require_same_losses(tmp_path, by_two, rel=1e-5)


def test_devices_that_do_not_divide_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        PretrainCLI([*began(tmp_path), "--trainer.devices=3"]).fit()
    said = "32 images a step, as before, cannot be divided among 3 devices: use another number"
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("cli_type", [LinearProbeCLI, FinetuneCLI])
def test_classifiers_keep_their_number_of_devices(tmp_path: Path, cli_type: type[StageCLI]) -> None:
    root = pictures(tmp_path / "images")
    run_dir = tmp_path / "run"
    settings = [*PROBE] if cli_type is LinearProbeCLI else [*FINETUNE, f"--data.root={root}"]
    settings += divided(run_dir, 1, 32)
    cli_type([*settings, "--trainer.max_steps=2"]).fit()
    for size in (32, 16):
        with pytest.raises(UserError, match=r"number of devices is 2, but 1 in the run that"):
            cli_type([*settings, "--trainer.devices=2", f"--data.batch_size_per_device={size}"]).fit()
    assert saved(run_dir) == [step_file(run_dir, 2)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rank_that_hangs_is_reported_with_the_stacks_of_all(tmp_path: Path, processes: int) -> None:
    done = mae(
        "pretrain", *DIGITS, *TINY, f"--run_dir={tmp_path}", f"--trainer.devices={processes}",
        "--trainer.strategy=auto", "--trainer.max_steps=30", "--watchdog_minutes=0.15",
        "--trainer.callbacks+=run_callbacks.HangAt", "--trainer.callbacks.step=5",
        PYTHONPATH=str(SUPPORT),
    )  # fmt: skip
    assert done.returncode not in (0, 2), done.stdout
    for rank in range(processes):
        report = (tmp_path / "stacks" / f"rank_{rank:04d}.txt").read_text()
        assert f"mae: error: rank {rank} (pid " in report
        assert "has not finished a step for" in report
        assert "it was last at: step 5, in training" in report
        assert report.splitlines()[0] in done.stderr
    assert "on_train_batch_start" in report  # where the last one sleeps


def test_held_out_loss_counts_every_image_once(tmp_path: Path) -> None:
    settings = [*DIGITS, "--trainer.max_epochs=1", "--model.base_lr=0"]
    # 1,000 held-out images are 3 x 300 + 100 for one process, and no whole batches for two.
    assert pretrain(tmp_path / "one", 1, *settings, "--data.batch_size_per_device=300").returncode == 0
    assert pretrain(tmp_path / "two", 2, *settings, "--data.batch_size_per_device=150").returncode == 0
    assert column(tmp_path / "two", "val/loss") == pytest.approx(column(tmp_path / "one", "val/loss"), rel=1e-6)


def folder_run(root: Path, run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    return pretrain(
        run_dir, 2, f"--data.root={root}", "--data.image_size=14", "--data.num_workers=0",
        "--data.batch_size_per_device=2", "--trainer.max_epochs=2", *settings,
    )  # fmt: skip


def test_ranks_agree_about_unreadable_images(tmp_path: Path) -> None:
    paths = save_images(tmp_path / "images", 16)
    paths[5].write_bytes(paths[5].read_bytes()[:40])
    done = folder_run(tmp_path / "images", tmp_path / "strict")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("mae: error")]
    assert len(errors) == 1
    assert "005.png" in errors[0]
    assert "Traceback" not in done.stderr
    done = folder_run(tmp_path / "images", tmp_path / "tolerant", "--data.max_bad_images=1")
    assert done.returncode == 0, done.stderr
    assert column(tmp_path / "tolerant", "bad_images")[-1] == 1
    # The loss is the mean over the readable images of all processes.
    alone = pretrain(
        tmp_path / "alone", 1, f"--data.root={tmp_path / 'images'}", "--data.image_size=14", "--data.num_workers=0",
        "--data.batch_size_per_device=4", "--trainer.max_epochs=2", "--data.max_bad_images=1",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    wanted = column(tmp_path / "alone", "train/loss")
    assert column(tmp_path / "tolerant", "train/loss") == pytest.approx(wanted, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_every_rank_with_1(tmp_path: Path) -> None:
    settings = [*DIGITS, "--trainer.max_steps=30", "--model.base_lr=1e38", "--data.batch_size_per_device=32"]
    done = pretrain(tmp_path, 2, *settings)
    assert done.returncode == 1
    assert "the loss is not finite at step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "encoder.safetensors").exists()


def test_online_evaluation_is_that_of_one_process(tmp_path: Path) -> None:
    settings = [*DIGITS, "--trainer.max_epochs=1", "--model.base_lr=0", "--online.every_n_epochs=1"]
    settings += ["--online.train_images=500", "--online.held_out_images=201"]
    assert pretrain(tmp_path / "one", 1, *settings, "--data.batch_size_per_device=300").returncode == 0
    assert pretrain(tmp_path / "two", 2, *settings, "--data.batch_size_per_device=150").returncode == 0
    for key in ("online/knn", "online/probe"):
        assert column(tmp_path / "one", key) == column(tmp_path / "two", key) != []


def digits_as_png(root: Path, count: int) -> Path:
    """`count` digits as files, root/val/CLASS/*.png."""
    data = ImageData("digits")
    data.load()
    assert data.train_source is not None
    assert data.train_source.labels is not None
    for i in range(count):
        folder = root / "val" / str(data.train_source.labels[i * 3])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.train_source.open(i * 3).pixels()[0].numpy()).save(folder / f"{i:04d}.png")
    return root


def finetune(run_dir: Path, *settings: str) -> list[str]:
    return [
        *("--data.dataset=digits", "--data.auto_augment=null", "--data.num_workers=0", "--wandb.mode=disabled"),
        *("--model.encoder=scratch", "--model.size=nano", "--model.embed_dim=32", "--model.depth=2"),
        *("--model.num_heads=2", "--model.patch_size=7", "--model.warmup_epochs=0.01", "--model.base_lr=0.01"),
        *("--trainer.accelerator=cpu", f"--run_dir={run_dir}", *settings),
    ]


def test_accuracy_is_the_same_from_one_two_and_three_processes(tmp_path: Path) -> None:
    done = mae("finetune", *finetune(tmp_path / "run", "--trainer.max_steps=60", "--data.crop_scale=null"))
    assert done.returncode == 0, done.stderr
    root = digits_as_png(tmp_path / "images", 1003)
    results = []
    for processes in (1, 2, 3):
        out = tmp_path / f"out{processes}"
        done = mae(
            "evaluate", "--model", tmp_path / "run", "--data.root", root, "--data.num_workers=0", "--accelerator=cpu",
            f"--devices={processes}", "--out", out,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 2  # once: the line and the head of the table
        results.append((json.loads((out / "results.json").read_text()), (out / "confusion.csv").read_text()))
    assert [figures["images"] for figures, _ in results] == [1003] * 3
    for figures, confusion in results[1:]:
        assert (figures["acc1"], figures["acc5"]) == (results[0][0]["acc1"], results[0][0]["acc5"])
        assert figures["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-6)
        assert confusion == results[0][1]


def test_evaluation_by_more_processes_than_images_or_of_a_bad_image_is_one_line(tmp_path: Path) -> None:
    done = mae("finetune", *finetune(tmp_path / "run", "--trainer.max_steps=2"))
    assert done.returncode == 0, done.stderr
    root = digits_as_png(tmp_path / "images", 2)

    def fails() -> str:
        done = mae(
            "evaluate", "--model", tmp_path / "run", "--data.root", root, "--data.num_workers=0", "--accelerator=cpu",
            "--devices=3",
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("mae: error"))
        return line

    assert "2 held-out images are fewer than the 3 devices" in fails()
    digits_as_png(root, 7)
    bad = sorted(root.glob("val/*/*.png"))[4]
    bad.write_bytes(bad.read_bytes()[:50])
    assert bad.name in fails()


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_two_processes_fine_tune_by_the_rule(tmp_path: Path, accumulate: int) -> None:
    settings = finetune(
        tmp_path / "run",
        *("--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.accumulate_grad_batches={accumulate}"),
        *("--trainer.max_steps=12", "--data.batch_size_per_device=8", "--trainer.precision=64-true"),
        "--trainer.limit_val_batches=0",
    )
    program = [sys.executable, str(SUPPORT / "adam_watch.py"), *settings]
    done = subprocess.run(program, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 steps as they should be") == 2


def test_held_out_accuracy_in_training_is_exact_over_processes(tmp_path: Path) -> None:
    # Nothing moves at rate 0, so both must see the initial network, on 1,000 images in uneven parts.
    for processes in (1, 2):
        settings = [f"--trainer.devices={processes}", "--trainer.max_steps=2", "--model.base_lr=0", "--model.min_lr=0"]
        settings += ["--data.batch_size_per_device=300" if processes == 1 else "--data.batch_size_per_device=150"]
        done = mae("finetune", *finetune(tmp_path / f"run{processes}", *settings, "--trainer.strategy=auto"))
        assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / f"run{n}" / "confusion.csv").read_text() for n in (1, 2))
    assert one == two


def exchanges(run_dir: Path, *settings: str) -> list[dict[str, Any]]:
    """What two processes have told each other in 20 steps of which every tenth is logged, by rank."""
    callback = ["--trainer.callbacks+=ddp_watch.Exchanges", f"--trainer.callbacks.folder={run_dir / 'exchanges'}"]
    length = ["--trainer.max_steps=20", "--trainer.log_every_n_steps=10", "--checkpoint.every_n_steps=null"]
    two_processes("pretrain", *PRETRAIN, *settings, *length, *callback)
    return [json.loads((run_dir / "exchanges" / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_exchange_gradients_once_a_step_and_figures_when_they_are_logged(tmp_path: Path, accumulate: int) -> None:
    for found in exchanges(tmp_path, *divided(tmp_path, 2, 4, accumulate)):
        last = [accumulate * step - 1 for step in range(1, 21)]  # micro-batches at the end of a step
        assert sorted(set(found["gradients"])) == last
        assert len(found["gradients"]) % 20 == 0
        assert set(found["others"]) <= {last[9], last[19]}
        assert set(found["signals"]) <= set(last)
        assert found["views"]
        assert found["static_graph"] == (accumulate == 1)


def test_settings_of_the_strategy_count(tmp_path: Path) -> None:
    given = ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.static_graph=true"]
    given += ["--trainer.strategy.gradient_as_bucket_view=false"]
    for found in exchanges(tmp_path, *divided(tmp_path, 2, 4), *given):
        assert not found["views"]
        assert found["static_graph"]
    done = mae("pretrain", *PRETRAIN, *divided(tmp_path / "other", 2, 4, 2), *given, timeout=400)
    assert done.returncode == 2, done.stderr
    assert "static_graph true does not go with --trainer.accumulate_grad_batches 2: leave it out" in done.stderr


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipped_and_checkpointed_steps_are_those_of_one_process(tmp_path: Path, accumulate: int) -> None:
    # Images of three channels, one of them unreadable: gradients are changed in place in every way there is.
    paths = save_images(tmp_path / "images", 64)
    paths[5].write_bytes(paths[5].read_bytes()[:40])
    common = [
        *(*TINY, *LENGTH, "--model.base_lr=0.01", f"--data.root={tmp_path / 'images'}", "--data.image_size=14"),
        *("--data.max_bad_images=1", "--trainer.gradient_clip_val=0.05", "--model.activation_checkpointing=true"),
        *("--model.warmup_epochs=0", "--trainer.max_epochs=30"),
    ]
    PretrainCLI([*common, *divided(tmp_path / "one", 1, 16)]).fit()
    done = mae("pretrain", *common, *divided(tmp_path / "two", 2, 8 // accumulate, accumulate), timeout=400)
    assert done.returncode == 0, done.stderr
    assert "Grad strides do not match" not in done.stderr
    require_same_losses(tmp_path / "two", tmp_path / "one", rel=1e-5)
