"""Shared pieces: small folders of real image files, runs that many tests look at, and the command in a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from PIL import Image
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
REFERENCE = ROOT / "tests" / "reference"

# A network and a run small enough for a test, as settings of `mae pretrain`.
TINY = [
    *("--model.size=nano", "--model.embed_dim=32", "--model.depth=1", "--model.num_heads=2", "--model.patch_size=7"),
    *("--model.decoder_embed_dim=16", "--model.decoder_depth=1", "--model.decoder_num_heads=2"),
    *("--model.warmup_epochs=0.01", "--wandb.mode=disabled", "--trainer.accelerator=cpu"),
]
DIGITS = ["--data.dataset=digits", "--data.crop_scale=[0.5,1]", "--data.num_workers=0"]


# The networks here are too small for more threads, which would wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ROOT / "tests" / "bench" in item.path.parents:
            item.add_marker(pytest.mark.bench)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B account of the person who runs the tests."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def reference(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of official figures."""
    with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads((file.metadata() or {}).get("json", "{}"))


def mae(*args: object, timeout: float = 300, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which need not import torch and Lightning anew: see forked.py."""
    return run_forked(args, timeout, **environ)


def fresh_mae(*args: object, timeout: float = 300, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m mae.cli` in a fresh interpreter, for tests of how it starts."""
    return subprocess.run(
        [sys.executable, "-m", "mae.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        check=False,
    )


def save_images(folder: Path, count: int, size: tuple[int, int] = (12, 16), seed: int = 0) -> list[Path]:
    """Write `count` RGB PNG files of (height, width) pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    paths = []
    for i in range(count):
        pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=draw)
        paths.append(folder / f"{i:03d}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    return paths


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """root/train/{cat,dog}/*.png and root/val/{cat,dog}/*.png, 8 and 4 a class."""
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 4)):
        for seed, name in enumerate(("cat", "dog")):
            save_images(root / split / name, count, seed=seed)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# ---- runs on the digits, for tests that only look at them: each process of the tests makes them once -----------------

ON_DIGITS = [
    *("--data.dataset=digits", "--data.num_workers=0", "--trainer.accelerator=cpu", "--wandb.mode=disabled"),
]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of pre-training."""
    from mae.launch.stages import PretrainCLI

    run_dir = tmp_path_factory.mktemp("pretrained")
    PretrainCLI([*DIGITS, *TINY, f"--run_dir={run_dir}", "--trainer.max_steps=3"]).fit()
    return run_dir


@pytest.fixture(scope="session")
def finetuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuning of it: two epochs of the digits as they are."""
    from mae.launch.stages import FinetuneCLI

    run_dir = tmp_path_factory.mktemp("finetuned")
    settings = ["--data.auto_augment=null", "--data.crop_scale=null", "--data.hflip=0", "--model.base_lr=0.02"]
    settings += ["--trainer.max_steps=120", "--model.warmup_epochs=0.1", "--model.layer_decay=0.9", "--model.mixup=0"]
    settings += ["--model.cutmix=0", "--data.erase_prob=0", "--model.drop_path=0", f"--model.encoder={pretrained}"]
    FinetuneCLI([*ON_DIGITS, *settings, f"--run_dir={run_dir}"]).fit()
    return run_dir
