"""One run folder, one run; with real processes, which die."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from mae.errors import UserError
from mae.runtime import run_lock
from mae.runtime.run_lock import FILE, RunLock

FORK = multiprocessing.get_context("fork")
HOST = socket.gethostname()


def answer(action: Callable[[Connection], object], wire: Connection) -> None:
    try:
        wire.send(action(wire))
    except UserError as error:
        wire.send(error)


@contextmanager
def process(action: Callable[[Connection], object]) -> Iterator[tuple[Any, Connection]]:
    """Another process, which sends what the action returns, or its UserError."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=answer, args=(action, theirs), daemon=False)
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join()


def hear(wire: Connection) -> Any:
    assert wire.poll(60), "the other process says nothing"
    return wire.recv()


def elsewhere(action: Callable[[], object]) -> Any:
    """What another process gets: the result, or the UserError's text."""
    with process(lambda _: action()) as (_, wire):
        said = hear(wire)
    return str(said) if isinstance(said, UserError) else said


def holding(folder: Path, rank: int = 0) -> Callable[[Connection], None]:
    """Take the lock, say so, keep it for a minute."""

    def hold(wire: Connection) -> None:
        held = RunLock(folder)
        held.take(rank, wait=0)
        wire.send("held")
        wire.poll(60)

    return hold


def take(folder: Path, wait: float = 0) -> str:
    RunLock(folder).take(wait=wait)
    return "taken"


@pytest.fixture(autouse=True)
def no_other_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs of other tests in this process."""
    monkeypatch.setattr(run_lock, "_held", {})


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with process(holding(folder)) as (child, wire):
        assert hear(wire) == "held"
        with pytest.raises(UserError) as refused:
            RunLock(folder).take(wait=0.2)
    told = str(refused.value)
    assert told.startswith(f"run folder {folder} is in use by pid {child.pid} on host {HOST} (since 20")
    assert told.endswith("; wait for it, stop it, or give another --run_dir")


def test_a_killed_run_frees_its_folder(tmp_path: Path) -> None:
    for _ in range(3):
        with process(holding(tmp_path)) as (child, wire):
            assert hear(wire) == "held"
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            assert elsewhere(lambda: take(tmp_path)) == "taken"


def test_a_killed_run_frees_its_folder_though_processes_that_it_forked_live_on(tmp_path: Path) -> None:
    def fork_and_hold(wire: Connection) -> None:
        held = RunLock(tmp_path)
        held.take(wait=0)
        if not (loader := os.fork()):
            # What a loader may do at its end must not free the lock of its parent, either.
            held.release()
            time.sleep(60)
            os._exit(0)
        wire.send(loader)
        wire.poll(60)

    with process(fork_and_hold) as (child, wire):
        loader = hear(wire)
        time.sleep(0.2)
        assert f"pid {child.pid} " in elsewhere(lambda: take(tmp_path))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        os.kill(loader, 0)  # is alive
        said = elsewhere(lambda: take(tmp_path))
        os.kill(loader, signal.SIGKILL)
    assert said == "taken"


def test_a_rank_that_outlives_its_first_rank_keeps_the_folder(tmp_path: Path) -> None:
    with process(holding(tmp_path)) as (first, wire), process(holding(tmp_path, rank=1)) as (orphan, other_wire):
        assert hear(wire) == hear(other_wire) == "held"
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        said = elsewhere(lambda: take(tmp_path, wait=0.2))
        assert said.startswith(
            f"run folder {tmp_path} has ranks of an earlier start that are still alive; kill them; it was pid "
            f"{first.pid} on host {HOST} (since 20"
        )
        os.kill(orphan.pid, signal.SIGKILL)
        orphan.join()
        assert elsewhere(lambda: take(tmp_path)) == "taken"


def test_ranks_share_the_folder_and_each_rank_is_one_process(tmp_path: Path) -> None:
    with process(holding(tmp_path)) as (_, wire), process(holding(tmp_path, rank=1)) as (_, other_wire):
        assert hear(wire) == hear(other_wire) == "held"
        assert elsewhere(lambda: RunLock(tmp_path).take(2, wait=0)) is None
        assert "rank 1, that is still alive" in elsewhere(lambda: RunLock(tmp_path).take(1, wait=0))


@pytest.mark.slow
def test_of_eight_that_start_together_one_wins(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path / "new", tmp_path / "another"):
        gate = FORK.Barrier(8)

        def start(wire: Connection, gate: Any = gate, folder: Path = folder) -> str:
            gate.wait(60)
            said = take(folder, wait=0.5)  # by then the winner has written who it is
            wire.send(said)
            wire.poll(60)  # has it until all have tried
            return said

        started = [process(start) for _ in range(8)]
        wires = [context.__enter__() for context in started]
        said = [hear(wire) for _, wire in wires]
        for context in started:
            context.__exit__(None, None, None)
        (winner,) = [child.pid for (child, _), word in zip(wires, said, strict=True) if word == "taken"]
        refused = [str(word) for word in said if word != "taken"]
        assert len(refused) == 7
        assert all(f"is in use by pid {winner} on host {HOST} (since" in word for word in refused)


def test_starts_that_release_at_once_never_overlap(tmp_path: Path) -> None:
    """The lock file and its folder are removed again and again while others open them."""
    folder, inside = tmp_path / "run", tmp_path / "inside"

    def again_and_again(_: Connection) -> int:
        done, deadline = 0, time.monotonic() + 20
        while done < 20 and time.monotonic() < deadline:
            held = RunLock(folder)
            try:
                held.take(wait=0.5)
            except UserError:
                continue
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            held.release()
            done += 1
        return done

    with process(again_and_again) as (_, one), process(again_and_again) as (_, two), process(again_and_again) as (_, x):
        assert [hear(wire) for wire in (one, two, x)] == [20, 20, 20]


def test_a_start_waits_for_what_is_ending(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with process(holding(tmp_path)) as (child, wire), process(holding(tmp_path, rank=3)) as (other, other_wire):
        assert hear(wire) == hear(other_wire) == "held"
        with process(lambda _: take(tmp_path, wait=60)) as (_, starter):
            assert not starter.poll(0.3)
            child.kill()
            child.join()
            assert not starter.poll(0.3)
            other.kill()
            other.join()
            assert hear(starter) == "taken"
    said = capfd.readouterr().out
    assert said.startswith(f"run folder {tmp_path} is in use by pid {child.pid} on host {HOST} (since")
    assert said.endswith("; waiting up to 60 s\n")
    assert said.count("\n") == 1


def test_stages_of_one_process_share_its_folder_until_the_last_one_ends(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path / "." / ".." / tmp_path.name)
    first.take(wait=0)
    first.take(wait=0)
    second.take(wait=0)
    (tmp_path / "metrics.csv").touch()
    first.release()
    first.release()
    assert "is in use" in elsewhere(lambda: take(tmp_path))
    second.release()
    assert elsewhere(lambda: take(tmp_path)) == "taken"
    first.take(wait=0)
    first.release()
    assert not run_lock._held
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "metrics.csv"]


def test_a_folder_in_which_nothing_was_done_is_left_as_it_was(tmp_path: Path) -> None:
    for folder, there in ((tmp_path / "new", False), (tmp_path, True)):
        held = RunLock(folder)
        held.take(wait=0)
        assert (folder / FILE).exists()
        held.release()
        assert folder.exists() == there
    assert not list(tmp_path.iterdir())


def test_a_refused_start_leaves_the_lock_of_the_other(tmp_path: Path) -> None:
    with process(holding(tmp_path)) as (_, wire):
        assert hear(wire) == "held"
        for _ in range(3):
            refused = RunLock(tmp_path)
            with pytest.raises(UserError, match="is in use"):
                refused.take(wait=0)
            refused.release()
        assert "is in use" in elsewhere(lambda: take(tmp_path))
    assert not run_lock._held


def test_lines_of_earlier_runs_and_damage_to_the_file_do_not_matter(tmp_path: Path) -> None:
    for damage in (b"", b"[]\n", b"{", b"\xff" * 700):
        (tmp_path / FILE).write_bytes(damage)
        with process(holding(tmp_path)) as (child, wire):
            assert hear(wire) == "held"
            assert f"pid {child.pid} on host {HOST}" in elsewhere(lambda: take(tmp_path))
            (tmp_path / FILE).write_bytes(damage)
            assert "is in use by another process; wait" in elsewhere(lambda: take(tmp_path))


def test_where_there_are_no_locks_a_warning_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    held = RunLock(tmp_path)
    held.take()
    held.release()
    said = capsys.readouterr().err
    assert said.startswith(f"mae: warning: the file system of {tmp_path} has no locks (No locks available)")
    assert said.count("\n") == 1
    assert not run_lock._held


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    def as_nobody() -> str:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return take(Path("run"))

    def nobody_there(mode: int) -> Any:
        Path("run").mkdir()
        Path("run").chmod(mode)
        said = elsewhere(as_nobody)
        Path("run").chmod(0o700)
        Path("run").rmdir()
        return said

    before = Path.cwd()
    os.chdir(tmp_path)  # nobody may not pass the folders above
    tmp_path.chmod(0o755)
    try:
        assert nobody_there(0o555) == "--run_dir run cannot be written: Permission denied"
        assert nobody_there(0o000) == "--run_dir run cannot be written: Permission denied"
        assert elsewhere(as_nobody) == "--run_dir run cannot be written: Permission denied"
        Path("run").touch()
        assert elsewhere(lambda: take(Path("run"))) == "--run_dir run cannot be written: File exists"
        assert elsewhere(lambda: take(Path("run/x"))) == "--run_dir run/x cannot be written: Not a directory"
    finally:
        os.chdir(before)
