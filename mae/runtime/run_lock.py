"""One run folder, one run: a lock that ends with the process that holds it.

Each rank of a run locks the byte of its number in the file `.lock` of the run folder, and rank 0 writes there who it
is, for the message to others. See `try_lock` for the kind of lock: because a process loses it when it closes any
descriptor of the file, each lock file is opened once a process, and nothing else in the run may open and close it.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mae.errors import UserError
from mae.runtime.files import names_open_file, open_own_file, try_lock

FILE = ".lock"

PAUSE_SECONDS = 0.1  # between two attempts

BEING_REMOVED = "is being removed by another run"  # which ends without having done anything

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass
class HeldLock:
    """A lock file that this process has open."""

    path: Path  # without symbolic links
    descriptor: int
    process: int  # a fork inherits this object, but no lock
    uses: int = 0


_held: dict[Path, HeldLock] = {}


class RunLock:
    """The right of one run to write into a folder; the locks of one folder in one process count as one."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.path = run_dir / FILE
        self.lock: HeldLock | None = None
        self.rank = 0
        self.made: list[Path] = []  # the lock file and the folders that were not there before, the innermost first
        self.found: set[str] = set()  # in the folder before

    def take(self, rank: int = 0, wait: float = 20.0) -> None:
        """Lock the folder for a rank: first for rank 0, before anything in it is read or written; makes the folder.

        Args:
            wait: Seconds that processes of an earlier start are given to end.

        Raises:
            UserError: Another run, or a rank that an earlier start left behind, is alive; or the folder cannot be
                written.
        """
        if self.lock is not None and self.lock.process == os.getpid():
            return
        self.rank = rank
        start, announced = time.monotonic(), wait < 1
        try:
            while obstacle := self._try():
                waited = time.monotonic() - start
                if waited >= wait:
                    raise UserError(f"run folder {self.run_dir} {obstacle}")
                if waited > PAUSE_SECONDS and not announced:
                    print(f"run folder {self.run_dir} {obstacle}; waiting up to {wait:g} s", flush=True)
                    announced = True
                time.sleep(PAUSE_SECONDS)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise UserError(f"--run_dir {self.run_dir} cannot be written: {error.strerror}") from None
            reason = f"no locks ({error.strerror}): a second run in this folder would go unnoticed"
            print(f"mae: warning: the file system of {self.run_dir} has {reason}", file=sys.stderr, flush=True)

    def release(self) -> None:
        """Let another run have the folder; does nothing where there is nothing to release."""
        lock, self.lock = self.lock, None
        if lock is None or lock.process != os.getpid():
            return
        lock.uses -= 1
        if not lock.uses:
            del _held[lock.path]
            with contextlib.suppress(OSError):
                self._remove_unused_folder(lock)
            os.close(lock.descriptor)

    def _try(self) -> str | None:
        """Take the lock, or say what is in the way.

        Raises:
            OSError: The folder cannot be made or written, or its file system has no locks.
        """
        path = self.run_dir.resolve() / FILE
        lock = _held.get(path)
        if lock is None or lock.process != os.getpid():
            self.made = [path for path in (self.path, self.run_dir, *self.run_dir.parents) if not path.exists()]
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.found = set(os.listdir(self.run_dir)) - {FILE}
            try:
                descriptor = open_own_file(path)
            except FileNotFoundError:
                return BEING_REMOVED
            with contextlib.ExitStack() as failed:
                failed.callback(os.close, descriptor)  # which also unlocks what has been locked
                if obstacle := self._try_lock(descriptor):
                    return obstacle
                failed.pop_all()
            lock = _held[path] = HeldLock(path, descriptor, os.getpid())
        lock.uses += 1
        self.lock = lock
        return None

    def _try_lock(self, descriptor: int) -> str | None:
        if not try_lock(descriptor, self.rank, 1):
            if self.rank:
                return f"has a process of an earlier start, rank {self.rank}, that is still alive; kill it"
            return f"is in use by {_holder(descriptor)}; wait for it, stop it, or give another --run_dir"
        if not names_open_file(self.path, descriptor):
            return BEING_REMOVED
        if self.rank == 0:
            if not try_lock(descriptor, 1):
                return f"has ranks of an earlier start that are still alive; kill them; it was {_holder(descriptor)}"
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)  # for the other ranks of this run
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on host {socket.gethostname()} (since {since})\n".encode(), 0)
            os.fsync(descriptor)  # for readers on other machines
        return None

    def _remove_unused_folder(self, lock: HeldLock) -> None:
        """Leave a folder in which nothing was done as it was found, and none where there was none."""
        unused = set(os.listdir(self.run_dir)) - {FILE} == self.found
        if self.rank or not self.made or not unused or not names_open_file(self.path, lock.descriptor):
            return
        if try_lock(lock.descriptor, 1):
            self.path.unlink()
            for folder in self.made[1:]:
                folder.rmdir()


def _holder(descriptor: int) -> str:
    """Process and host that hold the lock, as they have written them."""
    text = os.pread(descriptor, 512, 0).decode(errors="replace").strip()
    return text if text.startswith("pid ") else "another process"
