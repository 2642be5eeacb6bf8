"""One run folder, one run: a lock that ends with the process that holds it.

Each rank of a run locks the byte of its number in the file `.lock` of the run folder. These are POSIX record locks:
the kernel frees them when the process dies, however it dies; forked loader processes do not inherit them; they hold
over NFS. Beside them the file has a line per rank that says who it is, so that a refusal can name host and pid.

A process loses its record locks on a file when it closes any descriptor of that file. So each lock file is opened once
a process, through `_opened`, and nothing else may open and close it: no copying of the run folder from within the run.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mae.errors import UserError

FILE = ".lock"

LINE = 512  # bytes of the file a rank

BUSY = {errno.EACCES, errno.EAGAIN}

WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


@dataclass
class LockFile:
    """The one descriptor that this process has of a lock file."""

    descriptor: int
    pid: int
    uses: Counter[int] = field(default_factory=Counter)  # of this process, by rank

    def lock(self, rank: int) -> bool:
        """Whether it could be had now.

        Raises:
            OSError: The file system has no locks.
        """
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError as error:
            if error.errno in BUSY:
                return False
            raise
        return True

    def unlock(self, rank: int) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, rank)

    def holder(self, first: int, count: int) -> tuple[int, int] | None:
        """Rank and pid of another process that holds one of `count` bytes (0: all there are) from `first` on."""
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, count, 0)
        kind, _, rank, _, pid = FLOCK.unpack(fcntl.fcntl(self.descriptor, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else (rank, pid)

    def write(self, rank: int, record: dict[str, Any] | None) -> None:
        line = json.dumps(record) if record else ""
        os.pwrite(self.descriptor, f"{line:<{LINE - 1}}\n".encode(), rank * LINE)
        os.fsync(self.descriptor)  # for readers on other machines

    def read(self, rank: int) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            found = json.loads(os.pread(self.descriptor, LINE, rank * LINE).strip(b"\0 \n"))
            if isinstance(found, dict):
                return found
        return {}


def _record() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _who(file: LockFile, rank: int, pid: int) -> str:
    """`pid 7 on host a (rank 0, since ...)` of the process that holds this byte, whose pid is `pid` if it is here."""
    here = socket.gethostname()
    for _ in range(10):
        record = file.read(rank)
        if record and (record.get("host") != here or record.get("pid") == pid):
            break
        time.sleep(0.05)  # it has the lock and has not written yet: this is the line of one before it
    # The kernel's pid is right on this machine, in containers too, and means nothing on others.
    if pid <= 0 or record.get("host", here) != here:
        pid = record.get("pid", pid)
    since = f", since {record['since']}" if "since" in record else ""
    return f"pid {pid} on host {record.get('host', here)} (rank {rank}{since})"


_files: dict[tuple[int, int], LockFile] = {}  # by device and inode


def _opened(path: Path) -> LockFile:
    with contextlib.suppress(FileNotFoundError):
        file = _files.get(_identity(os.stat(path)))
        if file is not None and file.pid == os.getpid():  # a fork inherits the table, but no locks
            return file
    file = LockFile(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), os.getpid())
    _files[_identity(os.fstat(file.descriptor))] = file
    return file


def _close_unused() -> None:
    for key, file in list(_files.items()):
        # A file of the process that this one was forked from stays open: it may be the same as one of our own.
        if file.pid == os.getpid() and not file.uses.total():
            del _files[key]
            os.close(file.descriptor)  # and with it go locks that were had and not kept


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


class RunLock:
    """The right of one run to a folder; several of them in one process, for the same folder, go together."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.path = run_dir / FILE
        self.file: LockFile | None = None
        self.rank = 0
        self.made = False

    def take(self, wait: float = 20.0) -> None:
        """For rank 0, before anything in the folder is read or written; makes the folder.

        Args:
            wait: Seconds that processes of an earlier start are given to end.

        Raises:
            UserError: Another run, or a rank that an earlier start left behind, is alive; or the folder cannot be
                written.
        """
        self._acquire(0, wait)

    def share(self, rank: int, wait: float = 20.0) -> None:
        """For the other ranks, when rank 0 surely has the lock.

        Raises:
            UserError: A process that was this rank in an earlier start is alive; or the folder cannot be written.
        """
        self._acquire(rank, wait)

    def release(self) -> None:
        """Another run may have the folder; nothing where there is nothing to release."""
        file, self.file = self.file, None
        if file is None or file.pid != os.getpid():
            return
        file.uses[self.rank] -= 1
        if file.uses[self.rank] == 0:
            with contextlib.suppress(OSError):
                file.write(self.rank, None)
            with contextlib.suppress(OSError):
                self._tidy(file)
            file.unlock(self.rank)
        _close_unused()

    def _acquire(self, rank: int, wait: float) -> None:
        if self.file is not None and self.file.pid == os.getpid():
            return
        deadline = time.monotonic() + wait
        told = False
        try:
            while blocked := self._try(rank):
                if time.monotonic() >= deadline:
                    raise UserError(self._refusal(rank, *blocked))
                if not told and wait >= 1:
                    said = f"run folder {self.run_dir}: waiting up to {wait:g} s for {_who(*blocked)} to end"
                    print(said, flush=True)
                    told = True
                time.sleep(0.1)
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise UserError(f"--run_dir {self.run_dir} cannot be written: {error.strerror}") from None
            said = f"{self.run_dir} lies where there are no locks ({error.strerror}): a second run there goes unnoticed"
            print(f"mae: warning: {said}", file=sys.stderr, flush=True)
        finally:
            _close_unused()

    def _try(self, rank: int) -> tuple[LockFile, int, int] | None:
        """The lock is ours, or who is in the way: the file, and there the rank and the pid.

        Raises:
            OSError: The folder cannot be made or written, or there are no locks there.
        """
        for _ in range(100):  # a run that ends with nothing done removes its lock file, and the folder if it made it
            if not self.run_dir.is_dir():
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self.made = True
            with contextlib.suppress(FileNotFoundError):
                file = _opened(self.path)
                if not file.uses[rank]:
                    if not file.lock(rank):
                        if holder := file.holder(rank, 1):
                            return file, *holder
                        continue  # it has just gone
                    if not self._is_current(file):
                        continue
                    file.write(rank, _record())
                    # Byte 0 is kept while old ranks end: of several starters one goes on, the others meet it.
                    if rank == 0 and (orphan := file.holder(1, 0)):
                        return file, *orphan
                file.uses[rank] += 1
                self.file, self.rank = file, rank
                return None
        raise FileNotFoundError(errno.ENOENT, "it comes and goes")

    def _is_current(self, file: LockFile) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return _identity(os.stat(self.path)) == _identity(os.fstat(file.descriptor))
        return False

    def _refusal(self, rank: int, file: LockFile, other: int, pid: int) -> str:
        who = _who(file, other, pid)
        if rank == other == 0:
            return f"run folder {self.run_dir} is in use by {who}; wait for it, stop it, or give another --run_dir"
        return f"run folder {self.run_dir}: a rank of an earlier start is still alive: {who}; kill it"

    def _tidy(self, file: LockFile) -> None:
        """A folder in which nothing was done is left as it was found."""
        if self.rank == 0 and os.listdir(self.run_dir) == [FILE] and self._is_current(file) and not file.holder(1, 0):
            self.path.unlink()
            if self.made:
                self.run_dir.rmdir()
