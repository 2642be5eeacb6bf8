"""Two processes against one: the same losses from the same images and masks, and the same end."""

import csv
import subprocess
from pathlib import Path

import pytest
from conftest import DIGITS, TINY, mae, save_images

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


def test_a_loss_that_is_not_finite_ends_every_rank_with_1(tmp_path: Path) -> None:
    settings = [*DIGITS, "--trainer.max_steps=30", "--model.base_lr=1e38", "--data.batch_size_per_device=32"]
    done = pretrain(tmp_path, 2, *settings)
    assert done.returncode == 1
    assert "the loss is not finite at step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "encoder.safetensors").exists()
