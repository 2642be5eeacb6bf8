"""When a device has done its work, without waiting for it."""

import time
from collections.abc import Sequence
from typing import Any

import torch


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
