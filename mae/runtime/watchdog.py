"""A rank that stands still says where, and ends.

Each rank has a thread that waits for beats. Without one for the set time it writes the stacks of all its threads into
the run folder and ends the process. All ranks do so by themselves: they stand still in the same collective.

Time is counted in ticks of the thread, so a run that was stopped (Ctrl-Z, a suspended Slurm job) and goes on is not
thought to hang. A rank that another one wakes for its report (see `relatives`) sees that there are reports and follows.

The thread needs Python's lock, which a call into C may keep. For that case the interpreter's own timer collects the
stacks, and a small guard process (this file, run as a script) reports and kills.
"""

import contextlib
import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

STDERR = 2  # itself: what stands in sys.stderr may wait for the thread that hangs

ORPHAN_GRACE = 5.0  # seconds in which a rank may end by itself when its parent has gone

UNSTOPPABLE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Watchdog:
    """Ends this process with code 1 when no beat comes for `seconds`, or when its parent is gone.

    The limit must be longer than all that is done between two beats, and than what one rank does while others wait.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        rank: int,
        relatives: Callable[[], Iterable[int]] = tuple,
        parent: int | None = None,
        grace: float | None = None,
    ):
        """
        Args:
            seconds: Without a beat, of the time in which the process could run.
            folder: Of the run; reports go to `stacks/rank_0003.txt` in it.
            relatives: Pids of the run's other ranks on this machine, as far as known: the first rank's children, or the
                parent. They are woken if stopped, for their own reports; after the grace, those that are not this
                process's parent are killed.
            parent: Pid of the process that must stay alive: the first rank, or torchrun's agent.
            grace: Seconds between report and end, in which other ranks report; at most 10 by default.
        """
        self.seconds = seconds
        self.folder = folder / "stacks"
        self.path = self.folder / f"rank_{rank:04d}.txt"
        self.name = f"rank {rank} (pid {os.getpid()}, host {socket.gethostname()})"
        self.relatives = relatives
        self.parent = parent
        self.grace = min(10.0, seconds / 2) if grace is None else grace
        self.tick = min(1.0, seconds / 10)
        self.last = (time.monotonic(), "the start")
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def beat(self, where: str) -> None:
        """All is well, at `where`, as in "step 12, batch 3"; one assignment, no lock."""
        self.last = (time.monotonic(), where)

    def start(self) -> None:
        global running
        running = self
        self.path.unlink(missing_ok=True)
        self.earlier = self._reports()
        self.last = (time.monotonic(), "the start")
        self.stopping.clear()
        self.stacks = os.memfd_create("stacks")
        self.guard = self._start_guard()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Without a word, and without a process or thread left behind; more than once is harmless."""
        global running
        thread, self.thread = self.thread, None
        if thread is None:
            return
        running = None
        self.stopping.set()
        thread.join()  # for ever, if it is at its report: then the process ends here
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self.guard.stdin.close()  # type: ignore[union-attr]
        self.guard.kill()
        self.guard.wait()
        os.close(self.stacks)

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _watch(self) -> None:
        seen, silent, armed = self.last, 0.0, -1.0
        before = time.monotonic()
        while True:
            now = time.monotonic()
            late = now - before > self.tick + self.seconds / 4  # it was stopped, or somebody kept Python's lock
            silent += min(now - before, 2 * self.tick)
            before = now
            if self.last is not seen:
                seen, silent = self.last, 0.0
            if late or now - armed > self.seconds / 20:
                self._arm()
                armed = now
            with contextlib.suppress(OSError):  # full while the guard is stopped, closed when it is gone
                os.write(self.guard.stdin.fileno(), f"{seen[1]}\n".encode())  # type: ignore[union-attr]
            if silent > self.seconds or ((late or silent > self.seconds / 2) and self._others_reported()):
                self._report(seen)
            if self.parent is not None and os.getppid() != self.parent:
                if self._others_reported():
                    self._report(seen)
                say(f"mae: error: {self.name}: the process that started it (pid {self.parent}) is gone\n")
                if not self.stopping.wait(ORPHAN_GRACE):
                    os._exit(1)
            if self.stopping.wait(self.tick):
                return

    def _arm(self) -> None:
        """The timer that needs no lock of Python's collects stacks if this is not called again in time."""
        faulthandler.cancel_dump_traceback_later()
        os.ftruncate(self.stacks, 0)  # it went off if the process was stopped for long
        os.lseek(self.stacks, 0, os.SEEK_SET)
        faulthandler.dump_traceback_later(self.seconds, file=self.stacks)

    def _start_guard(self) -> subprocess.Popen[bytes]:
        limit = self.seconds + 2 * self.tick  # the timer's stacks come first
        given = (os.getpid(), limit, self.tick, self.grace, self.stacks, self.path, self.name)
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[self.stacks],
            start_new_session=True,  # not reached by Ctrl-C, which it cannot ignore before it has started
            bufsize=0,
        )
        os.set_blocking(guard.stdin.fileno(), False)  # type: ignore[union-attr]
        return guard

    def _reports(self) -> set[tuple[str, int]]:
        found = set()
        with contextlib.suppress(OSError):
            for path in self.folder.glob("rank_*.txt"):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def _others_reported(self) -> bool:
        return bool(self._reports() - self.earlier)

    def _report(self, last: tuple[float, str]) -> None:
        """And end."""
        # If something below stands still (a store that is gone), this ends the process all the same.
        faulthandler.dump_traceback_later(2 * self.grace + 10, file=self.stacks, exit=True)
        os.ftruncate(self.stacks, 0)
        os.lseek(self.stacks, 0, os.SEEK_SET)
        faulthandler.dump_traceback(self.stacks)
        publish(headline(self.name, time.monotonic() - last[0], last[1], self.path), self.stacks, self.path)
        self._signal(signal.SIGCONT)
        time.sleep(self.grace)
        self._signal(signal.SIGKILL)
        os._exit(1)

    def _signal(self, which: signal.Signals) -> None:
        pids: list[int] = []
        with contextlib.suppress(Exception):  # nothing may keep this process from its end
            pids += self.relatives()
        for pid in pids:
            if pid > 0 and (which != signal.SIGKILL or pid not in (1, os.getppid(), os.getpid())):
                with contextlib.suppress(OSError):
                    os.kill(pid, which)


running: Watchdog | None = None  # of this process


def beat(where: str) -> None:
    """To the watchdog of this process, if one runs."""
    if running is not None:
        running.beat(where)


def headline(name: str, silent: float, where: str, path: Path) -> str:
    return f"mae: error: {name} has not finished a step for {silent:.0f} s; it was last at: {where}; stacks in {path}\n"


def say(text: str) -> None:
    """To stderr, as far as it takes it: a pipe that nobody reads would keep us for ever."""
    data = text.encode()
    with contextlib.suppress(OSError):
        while data and select.select([], [STDERR], [], 1.0)[1]:  # then a pipe takes this much without a wait
            data = data[os.write(STDERR, data[: select.PIPE_BUF]) :]


def publish(head: str, stacks: int, path: Path) -> None:
    """To stderr and into the run folder; what is in the way of the one does not matter to the other."""
    text = head + os.pread(stacks, 1 << 20, 0).decode(errors="replace")
    say(text)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def guard(pid: int, limit: float, tick: float, grace: float, stacks: int, path: Path, name: str) -> None:
    """Kill the parent when it could run for `limit` seconds and its watchdog's thread did not.

    Args:
        pid: Of the parent.
        tick: Seconds between two looks at it.
        grace: Seconds from the report to the end of the parent.
        stacks: Descriptor of the file in which the timer leaves the parent's stacks.
    """
    for number in UNSTOPPABLE:  # sent to all processes of a run, which may end in its own time
        signal.signal(number, signal.SIG_IGN)
    silent, where = 0.0, "the start"
    while silent <= limit:
        if select.select([0], [], [], tick)[0]:
            if not (said := os.read(0, 1 << 16)):
                return
            silent, where = 0.0, said.decode(errors="replace").splitlines()[-1]
        elif not stopped(pid):
            silent += tick
        if os.getppid() != pid:
            return
    publish(headline(name, silent, where, path), stacks, path)
    time.sleep(grace)
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


def stopped(pid: int) -> bool:
    """By a signal or a debugger."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


if __name__ == "__main__":
    (number, limit, tick, grace), (stacks, path, name) = map(float, sys.argv[1:5]), sys.argv[5:]
    guard(int(number), limit, tick, grace, int(stacks), Path(path), name)
