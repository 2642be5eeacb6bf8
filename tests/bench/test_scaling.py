"""`mae bench step --processes`: that its figures fit together and no process is left; never how large they are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mae
from figure_checks import check_figure

from mae.bench import scaling
from mae.bench.scaling import Job, process_counts, run_processes, scaling_figures
from mae.bench.variants import Setting
from mae.errors import TrainingFailed, UserError

SETTING = Setting("nano", 28, 7, 32, 1, 2, 1, "float32", "cpu")
OPTIONS = [
    *("--sizes", "nano", "--image_size=28", "--patch_size=7", "--decoder_embed_dim=32", "--decoder_depth=1"),
    *("--decoder_num_heads=2", "--batch=1", "--compile=false", "--device=cpu", "--threads", "1"),
]
TOO_MANY = 10**9  # images: more bytes than any machine has


def test_as_many_processes_as_there_are_cores_or_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(scaling, "available_cores", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert process_counts([], cpu, 1) == [1, 2, 4]
    assert process_counts([], cpu, 3) == [1, 2]
    assert process_counts([], cpu, 9) == [1]
    assert process_counts([], cuda, 1) == [1, 2, 4, 8]
    assert process_counts([6, 2, 2], cpu, 1) == [1, 2, 6]
    with pytest.raises(UserError, match=r"--processes 4: each needs 2 cores \(--threads 2\), and this process .* 6"):
        process_counts([4], cpu, 2)
    with pytest.raises(UserError, match="--processes 9: torch sees 8 GPUs"):
        process_counts([9], cuda, 1)
    with pytest.raises(UserError, match="--processes 0: at least 1"):
        process_counts([0, 2], cpu, 1)


def test_efficiency_is_taken_within_each_round() -> None:
    rates = {(1, True): [10.0, 8.0, 9.0], (2, True): [15.0, 8.0, 18.0], (2, False): [20.0, 16.0, 18.0]}
    rows = scaling_figures(rates, [1, 2])
    assert rows[1]["efficiency"].rounds == [1, 1, 1]
    assert set(rows[1]) == {"images_per_s", "efficiency"}
    assert rows[2]["efficiency"].rounds == [0.75, 0.5, 1]
    assert rows[2]["efficiency_no_sync"].rounds == [1, 1, 1]
    assert rows[2]["all_reduce"].rounds == [0.25, 0.5, 0]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Processes that a test starts here; all are gone at its end."""
    processes: list[Any] = []
    start = torch.multiprocessing.start_processes

    def note(*args: Any, **kwargs: Any) -> Any:
        context = start(*args, **kwargs)
        processes.extend(context.processes)
        return context

    monkeypatch.setattr(torch.multiprocessing, "start_processes", note)
    yield processes
    assert not any(process.is_alive() for process in processes)


def small_job(setting: Setting, processes: int) -> Job:
    return Job("ours", setting, 1, 1, 2, 0.0, [1, processes][:processes])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_scaling(tmp_path: Path, accumulate: int) -> None:
    out = tmp_path / "figures.json"
    more = ["--rounds=2", "--processes", 2, f"--accumulate={accumulate}", f"--json={out}"]
    done = mae("bench", "step", *OPTIONS, *more)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(out.read_text())["results"]
    assert table["setting"] == {**SETTING._asdict(), "depth": 4}
    assert (table["accumulate"], table["backend"], table["threads"]) == (accumulate, "gloo", 1)
    assert list(table["processes"]) == ["1", "2"]
    one, two = table["processes"].values()
    assert one["efficiency"]["rounds"] == [1, 1]
    for key in ("images_per_s", "efficiency", "images_per_s_no_sync", "efficiency_no_sync"):
        check_figure(two[key], 2)
    ideal = [2 * rate for rate in one["images_per_s"]["rounds"]]
    pairs = zip(two["images_per_s"]["rounds"], ideal, strict=True)
    assert two["efficiency"]["rounds"] == pytest.approx([rate / most for rate, most in pairs])
    assert two["all_reduce"]["high"] < 1
    lines = done.stdout.strip().splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["processes", "1", "2"]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(started: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"out of memory at --batch {TOO_MANY} in 2 processes"):
        run_processes(small_job(SETTING._replace(batch=TOO_MANY), 2))
    assert len(started) == 2
    assert all(process.exitcode for process in started)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(TrainingFailed, match="process 0 of the bench failed: KeyError: 'enormous'"):
        run_processes(small_job(SETTING._replace(size="enormous"), 1))


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -signal.SIGKILL)])
def test_processes_do_not_outlive_the_bench(number: str, code: int) -> None:
    more = ["--rounds=100000", "--processes", "2"]
    command = [sys.executable, "-m", "mae.cli", "bench", "step", *OPTIONS, *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pids: list[int] = []
    try:
        # Python's resource tracker is among them.
        wait_until(lambda: process.poll() is not None or len(children(process.pid)) >= 3)
        pids = children(process.pid)
        process.send_signal(getattr(signal, number))
        assert process.wait(60) == code
        wait_until(lambda: not any(map(alive, pids)))
    finally:
        process.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
