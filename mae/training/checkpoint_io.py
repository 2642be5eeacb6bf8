"""Lightning's checkpoint plugin: a copy in memory, written by a thread."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from mae.errors import UserError
from mae.runtime import checkpoint_files
from mae.runtime.checkpoint_files import NEWEST, point_last_at, saved
from mae.runtime.files import atomic_write_text

WRITER_NICE = 17  # not the lowest, by which a busy machine would hardly ever write


class HostCopy:
    """A copy of all tensors in memory of the host, which is kept for the next copy: new pages cost more than bytes."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, value: Any) -> Any:
        """`value` with every tensor replaced by its copy; valid until the next call."""
        copied = self.copy(value, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def copy(self, value: Any, key: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            buffer = self.buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self.buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {name: self.copy(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self.copy(item, (*key, i)) for i, item in enumerate(value)])
        return value


class CheckpointFiles(CheckpointIO):
    """Writes and reads the checkpoints of a Trainer: training waits for a copy in memory, a thread writes it to disk.

    Args:
        keep: So many checkpoints stay; older ones are removed once a newer one is complete.

    Attributes:
        alongside: Each puts something on the disk that must be there before a checkpoint is.
        preloaded: A file and its content, where it has been read already: `load_checkpoint` hands that out, once.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.alongside: list[Callable[[], None]] = []
        self.preloaded: tuple[Path, dict[str, Any]] | None = None
        self.host = HostCopy()
        self.thread: threading.Thread | None = None
        self.failed: tuple[Path, Exception] | None = None  # the last write, where it did not succeed
        self.failures = 0  # in a row, RETRY_SECONDS or more between them
        self.failed_at = -checkpoint_files.RETRY_SECONDS
        self.seconds: list[float] = []  # that each write took

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Begin to write; `path` exists when the checkpoint is complete. Waits for the one before."""
        self.wait()
        path = Path(path)
        # Not a daemon: the end of the program waits for it.
        self.thread = threading.Thread(target=self.put, args=(self.host.take(checkpoint), path), name=f"write {path}")
        self.thread.start()

    def put(self, checkpoint: dict[str, Any], path: Path) -> None:
        start = time.monotonic()
        with contextlib.suppress(OSError):  # where cores are scarce, training comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICE)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for beside in self.alongside:
                beside()
            checkpoint_files.write(checkpoint, path)
        except Exception as error:  # whatever it is, the run must know that it is not saved
            self.failed = path, error
            if time.monotonic() - self.failed_at >= checkpoint_files.RETRY_SECONDS:
                self.failures, self.failed_at = self.failures + 1, time.monotonic()
            return
        self.failed, self.failures, self.failed_at = None, 0, -checkpoint_files.RETRY_SECONDS
        self.seconds.append(time.monotonic() - start)
        try:
            point_last_at(path)
            atomic_write_text(path.parent.parent / NEWEST, path.name)
            for old in saved(path.parent.parent)[self.keep :]:
                old.unlink(missing_ok=True)
        except (OSError, UserError) as error:
            print(f"mae: warning: {path} is saved, but older ones stay: {error}", flush=True)

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk, or has failed to get there."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain types, on the CPU, mapped from the file."""
        if self.preloaded is not None and self.preloaded[0] == Path(path):
            content, self.preloaded = self.preloaded[1], None
            return content
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
