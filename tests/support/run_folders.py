"""Runs on few images, and what two run folders have in common."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mae.data.sources import ArraySource, load_digits


@contextlib.contextmanager
def few_digits() -> Iterator[None]:
    """Runs in this process have a tenth of the digits: 400 for training, 100 held out."""
    few = [ArraySource(s.images[::10], list(s.labels or [])[::10], s.classes) for s in load_digits()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae.data.datamodule.load_digits", lambda: few)
        yield


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        for key in ("images_per_s", "mfu", "data_wait", "peak_memory_gib"):
            row.pop(key, None)
    return found


def require_same(run_dir: Path, whole: Path) -> None:
    a, b = final(run_dir), final(whole)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "mae"):
        assert same(a[key], b[key]), key
    assert rows(run_dir) == rows(whole)
    for name in ("encoder.safetensors", "model.safetensors"):
        assert (run_dir / name).read_bytes() == (whole / name).read_bytes(), name
    pictures = [sorted(path.name for path in (folder / "reconstructions").iterdir()) for folder in (run_dir, whole)]
    assert pictures[0] == pictures[1]


def final(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
