"""Files that appear whole or not at all, whatever lies where they are written."""

import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mae.errors import UserError
from mae.runtime.files import PARTIAL, atomic_write, atomic_write_text, clear_partial, exclusive_lock
from mae.runtime.run_lock import RunLock
from mae.weights.load import save_safetensors

FORK = multiprocessing.get_context("fork")


def ended(process: multiprocessing.process.BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


def as_nobody(action: Callable[[], None]) -> None:
    """Let another user do something, for which the tests must run as root."""

    def act() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        action()

    process = FORK.Process(target=act)
    process.start()
    assert ended(process) == 0


@contextlib.contextmanager
def mask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path) as partial:
        assert partial.name == "a.json"  # some libraries go by the suffix, and some add theirs
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    atomic_write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert list(tmp_path.iterdir()) == [path]
    longest = tmp_path / ("ü" * 127)
    atomic_write_text(longest, "x")
    assert longest.read_text() == "x"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    absent, full = tmp_path / "none" / "a.json", tmp_path / "b.json"
    with pytest.raises(FileNotFoundError) as error:
        atomic_write_text(absent, "")
    assert error.value.filename == str(absent)

    def fail(other: Path | None) -> None:
        with atomic_write(full) as partial:
            (other or partial).open("r+")

    with pytest.raises(FileNotFoundError) as error:
        fail(None)
    assert error.value.filename == str(full)
    with pytest.raises(FileNotFoundError) as error:  # not what the writer did not find
        fail(tmp_path / "source")
    assert error.value.filename == str(tmp_path / "source")


def test_nothing_of_others_is_overwritten_followed_or_removed(tmp_path: Path) -> None:
    """In a folder such as /tmp, where others have put what a program might fall for."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir()
    shared.mkdir()
    shared.chmod(0o1777)
    tmp_path.chmod(0o755)
    (own / "diary").write_text("mine")

    def plant() -> None:
        Path("a.csv.partial").write_text("of another")
        Path("linked.csv.partial").symlink_to(own / "diary")
        Path("a.csv.abcd1234.partial").mkdir()
        Path("a.csv.abcd1234.partial/.in_use").touch()
        Path("c.csv.abcd1234.partial").symlink_to(own)

    before = Path.cwd()
    os.chdir(shared)  # nobody may not pass the folders above
    as_nobody(plant) if os.geteuid() == 0 else plant()
    os.chdir(before)
    planted = sorted(shared.rglob("*"))
    (shared / "b.csv").symlink_to(own / "diary")  # a name that we give
    for name in ("a.csv", "linked.csv", "b.csv", "c.csv"):
        atomic_write_text(shared / name, "table")
        assert (shared / name).read_text() == "table"
        assert not (shared / name).is_symlink()
    assert (own / "diary").read_text() == "mine"
    assert (shared / "a.csv.partial").read_text() == "of another"
    left = set(shared.rglob("*")) - {shared / name for name in ("a.csv", "linked.csv", "b.csv", "c.csv")}
    if os.geteuid() == 0:  # else what was planted is our own
        assert sorted(left) == planted


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    for value, wanted in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with mask(value):
            atomic_write_text(tmp_path / "a.txt", "x")
            save_safetensors({"a": torch.zeros(1)}, {}, tmp_path / "a.safetensors")
            with atomic_write(tmp_path / "private") as partial:
                partial.write_text("x")
                assert stat.S_IMODE(partial.parent.stat().st_mode) == 0o700
        for name in ("a.txt", "a.safetensors"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == wanted, name


def write_often(path: Path, text: str) -> None:
    for _ in range(40):
        atomic_write_text(path, text)


def test_processes_that_write_the_same_file_all_succeed(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.csv", [letter * 200_000 for letter in "xyz"]
    processes = [FORK.Process(target=write_often, args=(path, text)) for text in texts]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        with contextlib.suppress(FileNotFoundError):
            seen.add(path.read_text())
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert seen <= set(texts)
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def write_and(how: Callable[[], object], path: Path) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        how()


def test_what_a_killed_process_was_writing_is_removed_by_the_next_and_nothing_else(tmp_path: Path) -> None:
    path, other = tmp_path / "a.csv", tmp_path / "b.csv"
    for name in (path, other):
        process = FORK.Process(target=write_and, args=(lambda: os.kill(os.getpid(), signal.SIGKILL), name))
        process.start()
        assert ended(process) == -signal.SIGKILL
    assert len(list(tmp_path.glob(f"*{PARTIAL}"))) == 2
    ours, theirs = FORK.Pipe()
    alive = FORK.Process(target=write_and, args=(lambda: (theirs.send("begun"), theirs.recv()), path))
    alive.start()
    assert ours.recv() == "begun"
    (tmp_path / "a.csv.download.partial").mkdir()  # of the same form, and no lock in it
    (tmp_path / "a.csv.download.partial" / "file").touch()
    atomic_write_text(path, "whole")
    left = sorted(tmp_path.glob(f"*{PARTIAL}"))
    assert sorted(path.name.split(".")[0] for path in left) == ["a", "a", "b"]  # of the living, of the stranger, b.csv
    ours.send("end")
    assert ended(alive) == 0
    assert path.read_text() == "half"
    assert [path.name[:5] for path in clear_partial(tmp_path)] == ["b.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.csv.download.partial"]


def test_the_names_of_open_files_are_written_to(tmp_path: Path) -> None:
    code = "from mae.runtime.files import *; atomic_write_text(Path('/dev/stdout'), 'to a file')"
    with (tmp_path / "out").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "to a file"
    assert Path("/dev/stdout").is_symlink()


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_no_way_to_the_file_of_another(tmp_path: Path, kind: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    folder.mkdir()
    for name in (".lock", "mark"):
        (folder / name).symlink_to(victim) if kind == "link" else os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"--run_dir .*run cannot be written: .lock is a {kind}.*remove it"):
        RunLock(folder).take(wait=0)
    with pytest.raises(OSError, match=f"mark is a {kind}"), exclusive_lock(folder / "mark", "mae pack"):
        pass
    assert victim.read_text() == "mine"
