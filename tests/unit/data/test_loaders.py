"""Loader processes and their deaths."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset

from mae.data.loaders import Loader

armed: list[int] = []  # processes to kill in the next fork


def kill_armed() -> None:
    while armed:
        pid = armed.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


os.register_at_fork(before=kill_armed)


class Zeros(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("handler")
def test_a_loader_killed_while_others_start_is_named_once_they_have(capfd: pytest.CaptureFixture[str]) -> None:
    """In the midst of a fork an error would be printed, with a traceback, and lost."""
    first = Loader(Zeros(), batch_size=2, num_workers=1, persistent_workers=True)
    next(iter(first))
    assert first._iterator is not None
    armed.append(first._iterator._workers[0].pid)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        iter(Loader(Zeros(), batch_size=2, num_workers=2))
    assert "Exception ignored" not in capfd.readouterr().err
