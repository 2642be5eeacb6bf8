"""Checkpoints as files: complete or not there, whatever happens to the process, the disk or the bytes."""

import os
import pickle
import re
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONTEXT, start_server

import mae.runtime.checkpoint_files
import mae.runtime.signals
from mae.callbacks.checkpointing import Checkpoints
from mae.errors import UserError
from mae.runtime.checkpoint_files import clear_unfinished, damage, newest, saved, step_file
from mae.training.checkpoint_io import CheckpointFiles, HostCopy
from mae.weights import load


def state(step: int) -> dict[str, Any]:
    weights = {f"w{i}": torch.full((100, 100), float(step + i)) for i in range(5)}
    return {"state_dict": weights, "global_step": step, "list": [1, (2.0, "x")]}


def save(run_dir: Path, *steps: int, keep: int = 3) -> None:
    files = CheckpointFiles(keep)
    for step in steps:
        files.save_checkpoint(state(step), step_file(run_dir, step))
    files.wait()
    assert files.failed is None


def test_what_is_saved_comes_back_and_torch_reads_it_as_any_other(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    path, complaints = newest(tmp_path)
    assert (path, complaints) == (step_file(tmp_path, 20), [])
    assert path is not None
    loaded = CheckpointFiles(1).load_checkpoint(path)
    assert all(torch.equal(loaded["state_dict"][key], value) for key, value in state(20)["state_dict"].items())
    assert (loaded["global_step"], loaded["list"]) == (20, [1, (2.0, "x")])
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20


def test_so_many_are_kept_and_last_is_a_link_to_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step_0000015.ckpt", "step_0000020.ckpt"]
    assert (folder / "last.ckpt").readlink() == Path("step_0000020.ckpt")


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    path = step_file(tmp_path, 20)
    whole = path.read_bytes()
    for part in range(20):
        path.write_bytes(whole[: len(whole) * part // 20 + part % 2])
        found, complaints = newest(tmp_path)
        assert found == step_file(tmp_path, 10)
        assert complaints == [f"{path} is damaged: it is torn: its checksum is missing"]


def test_a_flipped_byte_anywhere_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    path = step_file(tmp_path, 20)
    whole = path.read_bytes()
    places = [*range(0, len(whole), len(whole) // 60), *range(len(whole) - 90, len(whole))]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert newest(tmp_path)[0] == step_file(tmp_path, 10), place
    path.write_bytes(whole)
    assert damage(path) is None


def test_where_all_are_damaged_the_run_does_not_start_over(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    for path in saved(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step_0000020.ckpt is damaged: .*step_0000010.ckpt is damaged: .*no other"):
        newest(tmp_path)


def test_what_is_left_is_told_where_a_checkpoint_cannot_be_written(tmp_path: Path) -> None:
    callback = Checkpoints()
    callback.files = CheckpointFiles(3)
    callback.files.failed = step_file(tmp_path, 30), OSError(28, "No space left on device")
    assert "; there is none yet; " in callback.why()
    save(tmp_path, 10, 20)
    assert "; the last good one is step_0000020.ckpt; " in callback.why()
    newer, older = step_file(tmp_path, 20), step_file(tmp_path, 10)
    newer.unlink()
    os.mkfifo(newer)
    said = "step_0000020.ckpt is damaged: it cannot be read: it is a pipe or device, not a file"
    assert f"{said}; the last good one is step_0000010.ckpt; " in callback.why()
    older.write_bytes(b"")
    assert re.search(rf"{said}; .*step_0000010.ckpt is damaged: .*there is no other checkpoint", callback.why())


def test_a_copy_of_a_run_whose_links_became_files_can_be_used(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    last = tmp_path / "checkpoints" / "last.ckpt"
    data = last.read_bytes()
    last.unlink()
    last.write_bytes(data)
    assert newest(tmp_path)[0] == step_file(tmp_path, 20)
    step_file(tmp_path, 20).unlink()
    step_file(tmp_path, 10).unlink()
    assert newest(tmp_path)[0] == last
    step_file(tmp_path, 20).write_bytes(data)
    last.write_bytes(data[:100])
    assert newest(tmp_path)[0] == step_file(tmp_path, 20)


def write_without_end(run_dir: Path, writing: Connection) -> None:
    files = CheckpointFiles(3)
    for step in range(1, 10_000):
        files.save_checkpoint({"w": torch.full((500_000,), float(step)), "global_step": step}, step_file(run_dir, step))
        if step == 1:
            files.wait()
            writing.send("writing")


def test_killed_while_writing_what_is_there_is_whole(tmp_path: Path) -> None:
    """At three moments; what was being written is found and removed."""
    for pause in range(3):
        run_dir = tmp_path / str(pause)
        start_server()
        receiver, sender = CONTEXT.Pipe(duplex=False)
        writer = CONTEXT.Process(target=write_without_end, args=(run_dir, sender))
        writer.start()
        assert receiver.recv() == "writing"
        time.sleep(0.01 * pause)
        writer.kill()
        writer.join()
        path, complaints = newest(run_dir)
        assert path is not None
        assert complaints == []
        loaded = torch.load(path, weights_only=True)
        assert loaded["w"].eq(loaded["global_step"]).all()
        clear_unfinished(run_dir)
        assert not list((run_dir / "checkpoints").glob("*.partial"))


def test_training_may_change_the_state_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = mae.runtime.checkpoint_files.write

    def slow(*args: Any) -> None:
        time.sleep(0.2)
        write(*args)

    monkeypatch.setattr(mae.runtime.checkpoint_files, "write", slow)
    files, weight = CheckpointFiles(3), torch.zeros(10, 10)
    for step in (1, 2):
        files.save_checkpoint({"w": weight, "strided": weight.t()[::2], "global_step": step}, step_file(tmp_path, step))
        weight += 1
    files.wait()
    for step in (1, 2):
        loaded = torch.load(step_file(tmp_path, step), weights_only=True)
        assert loaded["w"].eq(step - 1).all()
        assert loaded["strided"].eq(step - 1).all()


def test_memory_of_the_copy_is_used_again() -> None:
    host, weight = HostCopy(), torch.zeros(10)
    first = host.take({"w": weight})["w"]
    assert host.take({"w": weight + 1})["w"].data_ptr() == first.data_ptr()
    assert host.take({"w": torch.ones(11)})["w"].shape == (11,)


def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path) -> None:
    files = CheckpointFiles(3)
    files.save_checkpoint(state(1), step_file(small_disk, 1))
    files.wait()
    assert files.failed is None
    for _ in range(2):
        files.save_checkpoint({"w": torch.zeros(1_000_000)}, step_file(small_disk, 2))
        files.wait()
        assert files.failures == 1  # two that follow each other have one cause
        assert files.failed is not None
        assert "No space left" in str(files.failed[1])
        assert newest(small_disk) == (step_file(small_disk, 1), [])
        assert not list((small_disk / "checkpoints").glob("*.partial"))
    files.save_checkpoint(state(3), step_file(small_disk, 3))
    files.wait()
    assert files.failed is None
    assert files.failures == 0
    assert newest(small_disk) == (step_file(small_disk, 3), [])


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """By a user without rights: root could write."""
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "checkpoints").chmod(0o555)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            files = CheckpointFiles(3)
            files.save_checkpoint({"global_step": 1}, step_file(tmp_path, 1))
            files.wait()
            code = 0 if files.failed and "Permission denied" in str(files.failed[1]) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_whatever_keeps_it_from_being_written_is_known(tmp_path: Path) -> None:
    files = CheckpointFiles(3)
    files.save_checkpoint({"global_step": 1, "foreign": lambda: 1}, step_file(tmp_path, 1))  # cannot be pickled
    files.wait()
    assert files.failed is not None
    assert not list((tmp_path / "checkpoints").iterdir())


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["bomb.ckpt", "bomb.pth"])
@pytest.mark.parametrize("by", ["torch", "pickle", "sealed"])
def test_a_pickle_bomb_is_refused_and_not_run(tmp_path: Path, name: str, by: str) -> None:
    path, bomb = tmp_path / name, {"state_dict": Bomb(tmp_path / "boom"), "mae": {}}
    if by == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif by == "torch":
        torch.save(bomb, path)
    else:
        mae.runtime.checkpoint_files.write(bomb, path)
    with pytest.raises(UserError, match=r"not safe to load: it asks for \w+\.\w+"):
        load.read_weights(path)
    with pytest.raises(UserError, match=r"not safe to load: it asks for \w+\.\w+"):
        load.read_checkpoint(path, {})
    assert not (tmp_path / "boom").exists()


def test_a_checkpoint_of_a_newer_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    mae.runtime.checkpoint_files.write(
        {"state_dict": {}, "mae": {"model": {}}, "mae_format": mae.runtime.checkpoint_files.FORMAT + 1}, path
    )
    with pytest.raises(UserError, match=r"x.ckpt was written by a newer version .*format 2, .* up to 1.*: update"):
        load.read_weights(path)


def test_damaged_weights_are_not_used_for_anything(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    mae.runtime.checkpoint_files.write({"state_dict": {"w": torch.zeros(1000)}, "mae": {"model": {}}}, path)
    data = path.read_bytes()
    path.write_bytes(data[:500] + b"x" + data[501:])
    with pytest.raises(UserError, match=r"x.ckpt is damaged: its checksum differs"):
        load.read_weights(path)


def test_signals_do_not_reach_a_loader_process() -> None:
    """As the notes of a batch system do, which go to every process of a job."""
    pid = os.fork()
    if pid == 0:
        mae.runtime.signals.ignore()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
