"""Two processes against one: the same losses from the same images and masks, and the same end."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DIGITS, TINY, mae, save_images
from PIL import Image

from mae.data import ImageData

pytestmark = pytest.mark.slow


def pretrain(run_dir: Path, processes: int, *settings: str) -> subprocess.CompletedProcess[str]:
    return mae(
        "pretrain", *TINY, f"--run_dir={run_dir}", "--trainer.log_every_n_steps=1",
        f"--trainer.devices={processes}", "--trainer.strategy=auto", *settings, timeout=400,
    )  # fmt: skip


def column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    settings = [*DIGITS, "--trainer.max_steps=20", "--model.base_lr=0.01"]
    runs = {
        "one": (1, "--data.batch_size_per_device=64"),
        "two": (2, "--data.batch_size_per_device=32"),
        "accumulated": (2, "--data.batch_size_per_device=16", "--trainer.accumulate_grad_batches=2"),
    }
    for name, (processes, *own) in runs.items():
        done = pretrain(tmp_path / name, processes, *settings, *own)
        assert done.returncode == 0, done.stderr
        assert f"x {processes} devices = 64 an optimiser step" in done.stdout
        assert len(column(tmp_path / name, "train/loss")) == 20
    for name in ("two", "accumulated"):
        for key in ("train/loss", "lr", "images_seen"):
            wanted = column(tmp_path / "one", key)
            assert column(tmp_path / name, key) == pytest.approx(wanted, rel=1e-5), (name, key)


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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_fine_tune_by_the_rule(tmp_path: Path, accumulate: int) -> None:
    settings = finetune(
        tmp_path / "run",
        *("--trainer.devices=2", "--trainer.strategy=ddp", f"--trainer.accumulate_grad_batches={accumulate}"),
        *("--trainer.max_steps=12", "--data.batch_size_per_device=8", "--trainer.precision=64-true"),
        "--trainer.limit_val_batches=0",
    )
    program = [sys.executable, str(Path(__file__).parent / "adam_watch.py"), *settings]
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
