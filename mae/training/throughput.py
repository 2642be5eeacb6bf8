"""How long the device waits for data."""

import time
from typing import Any

import torch

from mae.runtime.device_clock import Clock, idle


class DataWait:
    """How long the device has had nothing to do for want of a batch, without making it wait for the question."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self.waits: list[tuple[float, float]] = []
        self.marks: list[Any] = []
        self.asked: float | None = None

    def ask(self) -> None:
        """The next batch is wanted."""
        self.asked = time.perf_counter()

    def came(self) -> None:
        if self.asked is not None:
            self.waits.append((self.asked, time.perf_counter()))
            self.marks.append(self.before)
            self.asked = None

    def done(self) -> None:
        """The device has been given all of a batch's work."""
        self.before = self.clock.mark()

    def seconds(self) -> float:
        return sum(idle(self.clock.times(self.marks), self.waits))
