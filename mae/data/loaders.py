"""DataLoaders whose processes end together with the run, and which name the process that has died."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mae.errors import UserError
from mae.runtime import signals
from mae.runtime.memory import shared_memory_message
from mae.runtime.processes import end_loaders_at_exit


class Loader(DataLoader[Any]):
    """A DataLoader that names a dead loader process, even if a connection to that process fails first."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers:
            end_loaders_at_exit()
            with deaths_noted():
                return with_worker_errors(super().__iter__())
        return with_worker_errors(super().__iter__())


@contextmanager
def deaths_noted() -> Iterator[None]:
    """Let torch hear of a loader process's death only once the others are started.

    Its handler of SIGCHLD raises an error wherever the program is; in the midst of a fork Python prints and drops it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    errors: list[Exception] = []

    def note(*death: Any) -> None:
        try:
            if callable(before):
                before(*death)
        except RuntimeError as error:
            errors.append(error)

    signal.signal(signal.SIGCHLD, note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGCHLD) is note:  # else torch has set its own by now, for the first time
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    if errors:
        raise errors[0]


def with_worker_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches. If a connection fails, torch gets the time to raise its own error, which names the process.

    Raises:
        UserError: There is not enough shared memory to hand over a batch.
    """
    try:
        try:
            yield from batches
        except (OSError, EOFError):
            time.sleep(1)  # torch raises its error here, as soon as the dying process is dead
            raise
    except RuntimeError as error:
        if "shared memory" in str(error):
            raise UserError(shared_memory_message(error)) from None
        raise


def in_shared_memory(batch: Any) -> Any:
    """A `collate_fn` that puts the tensors of a batch, or one tensor, where the main process finds them.

    torch would do so later, in a thread whose errors are printed and lost: the main process would wait for ever.
    """
    if get_worker_info() is not None:
        for value in batch if isinstance(batch, tuple) else (batch,):
            if isinstance(value, Tensor):
                value.share_memory_()
    return batch


class ReplayLoader(Loader):
    """A DataLoader whose sampler knows where a resumed run continues.

    These two methods tell Lightning that a checkpoint from the middle of an epoch can be continued. There is nothing to
    store, as the place follows from the number of optimiser steps.
    """

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


def init_worker(worker: int) -> None:
    """Make a loader process silent, and let it end with its main process and at no other time.

    It ignores signals, as a batch system sends them to every process of a job. It must not outlive the main process,
    because it has inherited the connections to other ranks: these would wait for the main process as long as it lives.
    """
    sys.excepthook = lambda *_: None
    signals.ignore()
    signals.die_with_parent()


def unchanged(item: Any) -> Any:
    """A `collate_fn` that keeps numpy arrays, which torch would make tensors of."""
    return item
