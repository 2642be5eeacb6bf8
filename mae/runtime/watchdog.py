"""Ends a rank that hangs, after writing where it hangs.

Each rank has a thread that waits for beats. Without one for the set time it writes the stacks of all threads to
standard error and into the run folder, and ends the process. All ranks do so by themselves, since they hang in the same
collective. The thread needs Python's lock, which a call into C may keep. For that case the thread arms faulthandler's
timer again and again, which needs no lock: it writes the stacks into the file of the run folder and ends the process.
"""

import contextlib
import faulthandler
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mae.runtime.files import open_own_file

STDERR = 2  # the descriptor, because sys.stderr may be locked by a thread that hangs

ORPHAN_GRACE = 5.0  # seconds in which a rank may end by itself when its parent has gone


class Watchdog:
    """Ends this process with code 1 when no beat comes for some time, or when its parent is gone.

    Args:
        seconds: Limit between two beats. It must be longer than what one rank does while others wait. The time in
            which a process is stopped (Ctrl-Z, a suspended job) counts.
        folder: The run folder; reports go to `stacks/rank_0003.txt` in it.
        rank: Global rank of this process.
        parent: Pid of the process that must stay alive: the first rank, or torchrun's agent.
        grace: Seconds between report and end, in which other ranks report; at most 10 by default.
        reading: Names the images that are being read, "" if there are none. It must not block.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        rank: int,
        parent: int | None = None,
        grace: float | None = None,
        reading: Callable[[], str] = str,
    ):
        self.seconds = seconds
        self.path = folder / "stacks" / f"rank_{rank:04d}.txt"
        self.name = f"rank {rank} (pid {os.getpid()}, host {socket.gethostname()})"
        self.parent = parent
        self.grace = min(10.0, seconds / 2) if grace is None else grace
        self.reading = reading
        self.tick = min(5.0, seconds / 10)
        self.last = (time.monotonic(), "the start")
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def beat(self, where: str) -> None:
        """Report progress; `where` is for the message, as in "step 12, in training"."""
        self.last = (time.monotonic(), where)  # one assignment needs no lock

    def start(self) -> None:
        global running
        running = self
        self.last = (time.monotonic(), "the start")
        self.stopping.clear()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = os.fdopen(open_own_file(self.path), "wb", buffering=0)
            self.file.truncate()
        except OSError:
            self.file = open(os.devnull, "wb", buffering=0)
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop watching and remove the file of the stacks; more than once is harmless."""
        global running
        thread, self.thread = self.thread, None
        if thread is None:
            return
        running = None
        self.stopping.set()
        thread.join()  # does not return if the thread is reporting: the process ends there
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()  # unless files of other ranks are in it

    def _watch(self) -> None:
        noted = ""
        while True:
            moment, where = self.last
            silent = time.monotonic() - moment
            if silent > self.seconds:
                self._report(silent, where)
            if (where := where + self._images()) != noted:
                self._write(
                    f"{self.name}; it was last at: {where}; its stacks, if it hung in a call into C:\n".encode()
                )
                noted = where
            faulthandler.dump_traceback_later(self.seconds, file=self.file, exit=True)
            if self.parent is not None and os.getppid() != self.parent:
                message = f"mae: error: {self.name}: the process that started it (pid {self.parent}) is gone\n"
                write_to_stderr(message.encode())
                if not self.stopping.wait(ORPHAN_GRACE):
                    os._exit(1)
            if self.stopping.wait(self.tick):
                return

    def _images(self) -> str:
        with contextlib.suppress(Exception):  # whatever happens, the report comes
            if images := self.reading():
                return f"; images being read: {images}"
        return ""

    def _report(self, silent: float, where: str) -> None:
        """Write the stacks and end the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # Ends the process even if what follows blocks, as where a disk has gone.
        faulthandler.dump_traceback_later(2 * self.grace + 10, file=nowhere, exit=True)
        stacks = os.memfd_create("stacks")
        faulthandler.dump_traceback(stacks)
        where += self._images()
        last = f"has not finished a step for {silent:.0f} s; it was last at: {where}; stacks in {self.path}"
        report = f"mae: error: {self.name} {last}\n".encode() + os.pread(stacks, 1 << 20, 0)
        write_to_stderr(report)
        self._write(report)
        time.sleep(self.grace)
        os._exit(1)

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            self.file.seek(0)
            self.file.truncate()
            self.file.write(text)


running: Watchdog | None = None  # of this process


def beat(where: str) -> None:
    """Report progress to the watchdog of this process, if one runs."""
    if running is not None:
        running.beat(where)


def write_to_stderr(data: bytes) -> None:
    """Write as much as standard error takes: a full pipe that nobody reads would block for ever."""
    with contextlib.suppress(OSError):
        while data and select.select([], [STDERR], [], 1.0)[1]:  # then a pipe takes this much without blocking
            data = data[os.write(STDERR, data[: select.PIPE_BUF]) :]
