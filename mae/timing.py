"""What measurements of speed share: figures with their spread, the machine, waiting for a device, a JSON file."""

import contextlib
import json
import os
import platform
import statistics
import time
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


def wait_for(device: torch.device | None) -> None:
    """Until a device has done what it was given."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """When a device has done what it was given, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.zero = torch.cuda.Event(enable_timing=True)
            self.zero.record()
        wait_for(device)
        self.start = time.perf_counter()

    def mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        wait_for(self.device)
        return time.perf_counter()

    def times(self, marks: Sequence[Any]) -> list[float]:
        """By the clock `time.perf_counter`."""
        if self.device.type != "cuda":
            return list(marks)
        wait_for(self.device)
        return [self.start + self.zero.elapsed_time(event) / 1000 for event in marks]


def idle(done: Sequence[float], waits: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds that a device had nothing to do before each batch, for want of it.

    Args:
        done: When the device was done with what came before each batch.
        waits: When each batch was asked for, and when it came.
    """
    return [max(0.0, came - max(asked, before)) for (asked, came), before in zip(waits, done, strict=True)]
