"""What measurements of speed share: figures with their spread, the machine, waiting for a device, a JSON file."""

import contextlib
import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Figure(NamedTuple):
    """Something measured several times."""

    median: float
    low: float
    high: float
    rounds: list[float]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values), list(values))


def ratio(values: Figure, base: Figure) -> Figure:
    """Round by round: what slows the machine down for a while slows down both."""
    return figure([value / other for value, other in zip(values.rounds, base.rounds, strict=True)])


def blocks(items: Sequence[T], count: int = 8) -> list[list[T]]:
    """Consecutive, of nearly the same length, none empty."""
    parts = np.array_split(np.arange(len(items)), min(count, len(items)))
    return [[items[i] for i in part] for part in parts]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def machine(device: torch.device) -> dict[str, Any]:
    """What figures of speed mean nothing without."""
    packages = ("torch", "torchvision", "lightning", "pillow", "simplejpeg", "numpy")
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(plain(figures), indent=1) + "\n")


def plain(value: Any) -> Any:
    """Figures by the names of their parts."""
    if isinstance(value, Figure):
        return value._asdict()
    return {str(key): plain(item) for key, item in value.items()} if isinstance(value, dict) else value
