"""A rank that stands still; real processes, which hang and lose their parents."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mae.runtime import watchdog
from mae.runtime.watchdog import Watchdog

# The module alone: a process that imports the package needs seconds to start.
PRELUDE = f"""
import ctypes, importlib.util, os, signal, subprocess, sys, threading, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("watchdog", {watchdog.__file__!r})
watchdog = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watchdog)
Watchdog, folder = watchdog.Watchdog, Path(sys.argv[1])

def standing_still(seconds):
    time.sleep(seconds)
"""


@contextmanager
def running(script: str, folder: Path, *args: object) -> Iterator[subprocess.Popen[str]]:
    """The script, after its line "ready" has come; stderr to a file."""
    with (folder / "stderr.txt").open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, folder, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            process_group=0,
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", said(folder)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


def until(reached: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Not gone, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def said(folder: Path) -> str:
    return (folder / "stderr.txt").read_text()


def report(folder: Path, rank: int = 0) -> str:
    return (folder / "stacks" / f"rank_{rank:04d}.txt").read_text()


HANG = """
dog = Watchdog(1.5, folder, rank=3, grace=0.2)
dog.start()
dog.beat("step 12, batch 3")
print("ready", flush=True)
"""


def test_a_rank_that_stands_still_reports_and_ends(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank_0003.txt").write_text("of an earlier start")
    (tmp_path / "stacks" / "rank_0001.txt").write_text("of an earlier start")
    script = HANG + "threading.Thread(target=standing_still, args=(60,), name='other').start(); standing_still(60)"
    with running(script, tmp_path) as process:
        assert "earlier" not in report(tmp_path, 3)
        assert process.wait(60) == 1
    text = report(tmp_path, 3)
    head = text.splitlines()[0]
    assert head.startswith(f"mae: error: rank 3 (pid {process.pid}, host ")
    assert head.endswith(f"it was last at: step 12, batch 3; stacks in {tmp_path}/stacks/rank_0003.txt")
    assert text.count("in standing_still") == 2
    assert head in said(tmp_path)
    assert "in standing_still" in said(tmp_path)


def test_a_call_that_keeps_the_interpreter_is_reported_and_ended(tmp_path: Path) -> None:
    script = HANG + "time.sleep(0.5)\ndef in_c():\n    ctypes.PyDLL(None).sleep(60)\nin_c()"
    with running(script, tmp_path) as process:
        assert process.wait(30) == 1
    text = report(tmp_path, 3)
    assert text.startswith(f"rank 3 (pid {process.pid}, host ")
    assert "it was last at: step 12, batch 3; its stacks" in text.splitlines()[0]
    assert "in in_c" in text


@pytest.mark.parametrize("obstacle", ["no folder", "full pipe"])
def test_what_keeps_it_from_writing_does_not_keep_it_from_ending(tmp_path: Path, obstacle: str) -> None:
    if obstacle == "no folder":
        (tmp_path / "stacks").touch()
        with running(HANG + "standing_still(60)", tmp_path) as process:
            assert process.wait(60) == 1
        assert "in standing_still" in said(tmp_path)
    else:
        fill = """
reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while os.write(writer, bytes(4096)): pass
except BlockingIOError:
    os.set_blocking(writer, True)
os.dup2(writer, 2)
"""
        with running(fill + HANG + "standing_still(60)", tmp_path) as process:
            assert process.wait(60) == 1
        assert "in standing_still" in report(tmp_path, 3)


@pytest.mark.slow
def test_beats_keep_a_run_alive_and_leave_nothing(tmp_path: Path) -> None:
    script = """
dog = Watchdog(2, folder, rank=0)
dog.start()
print("ready", flush=True)
for step in range(60):
    dog.beat(f"step {step}")
    time.sleep(0.05)
dog.stop()
"""
    with running(script, tmp_path) as process:
        assert process.wait(60) == 0
    assert not (tmp_path / "stacks").exists()
    assert said(tmp_path) == ""


FAMILY = """
if len(sys.argv) == 2:
    child = subprocess.Popen([sys.executable, "-c", PRELUDE, str(folder), "child"], process_group=os.getpgid(0))
    rank, parent = 0, None
else:
    rank, parent = 1, os.getppid()
watchdog.ORPHAN_GRACE = 0.5
dog = Watchdog(2, folder, rank, parent, grace=1)
dog.start()
if rank:
    (folder / "child").write_text(str(os.getpid()))
    standing_still(60)
while not (folder / "child").exists():
    time.sleep(0.05)
print("ready", flush=True)
{first}
dog.stop()
"""


def family(first: str) -> str:
    """The first rank starts the second with its own script, and then does `first`."""
    script = FAMILY.replace("{first}", first)
    return f"PRELUDE = {PRELUDE + 'PRELUDE = None' + script!r}\n{script}"


def child_of(folder: Path) -> int:
    until(lambda: (folder / "child").exists() and (folder / "child").read_text())
    return int((folder / "child").read_text())


@pytest.mark.slow
def test_a_rank_whose_parent_is_killed_ends(tmp_path: Path) -> None:
    # The parent beats, the child does not: only the kill may end it within its limit.
    with running(family("standing_still(60)").replace("Watchdog(2", "Watchdog(60"), tmp_path) as process:
        child = child_of(tmp_path)
        process.kill()
        until(lambda: not alive(child), 30)
    assert f"mae: error: rank 1 (pid {child}, host " in said(tmp_path)
    assert f"the process that started it (pid {process.pid}) is gone\n" in said(tmp_path)
    assert "standing_still" not in report(tmp_path, 1)


@pytest.mark.parametrize(("own_end", "code"), [("standing_still(60)", 1), ("standing_still(1)", 0)])
def test_an_orphan_may_end_by_itself_in_its_grace(tmp_path: Path, own_end: str, code: int) -> None:
    script = f"""
watchdog.ORPHAN_GRACE = 5 if {code} == 0 else 0.2
dog = Watchdog(60, folder, rank=1, parent=os.getpid())  # which its parent is not
print("ready", flush=True)
dog.start()
{own_end}
dog.stop()
"""
    with running(script, tmp_path) as process:
        assert process.wait(60) == code
    assert said(tmp_path).count("is gone\n") == 1


def test_stop_leaves_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    threads, files = threading.active_count(), descriptors()
    dog = Watchdog(0.5, tmp_path, rank=0)
    dog.stop()
    for _ in range(2):
        dog.start()
        dog.beat("step 1")
        time.sleep(0.1)
        dog.stop()
        dog.stop()
    assert (threading.active_count(), descriptors()) == (threads, files)
    time.sleep(1.2)  # nothing is left that ends this process
    assert not (tmp_path / "stacks").exists()
