"""`mae bench growth` and `scaling`: that their figures are there and fit together; never how large they are."""

import json
import math
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

from mae.bench import growth
from mae.bench.growth import (
    AXES,
    MASK_RATIO,
    How,
    Job,
    Setting,
    Trained,
    compare,
    counts_of,
    name,
    steps_a_turn,
    together,
    values,
    vary,
)
from mae.cli import main
from mae.errors import TrainingFailed, UserError
from mae.models import compilation
from mae.models.flops import training_flops

SMALL = Setting("nano", 28, 7, MASK_RATIO, 4, 8, 1)
OPTIONS = ["--size=nano", "--image_size=28", "--patch_size=7", "--batch=1", "--device=cpu", "--threads=1"]
QUICK = How("float32", False, rounds=2, threads=1, turn_seconds=0.0)
TOO_MANY = 10**9  # images: more bytes than any machine has


def fails(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    assert main(["bench", *map(str, args)]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def fits(one: dict[str, Any], rounds: int) -> None:
    """A figure of something."""
    assert 0 < one["low"] <= one["median"] <= one["high"] < math.inf
    assert len(one["rounds"]) == rounds


# ---- growth ----------------------------------------------------------------------------------------------------------


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "TURN_SECONDS", 0.0)
    out, before = tmp_path / "figures.json", torch.get_num_threads()
    axes = ["mask_ratio", "batch"]
    args = ["growth", *OPTIONS, "--rounds=2", f"--json={out}", "--axes", *axes]
    assert main(["bench", *args]) == 0
    assert torch.get_num_threads() == before
    found = json.loads(out.read_text())
    assert found["base"] == SMALL._asdict()
    assert (found["dtype"], found["compiled"], found["rounds"], found["threads"]) == ("float32", False, 2, 1)
    assert {"cpu", "cores", "device", "torch"} <= set(found["machine"])
    assert list(found["axes"]) == axes
    said = capsys.readouterr().out
    for axis in axes:
        rows = found["axes"][axis]
        assert list(rows) == [str(value) for value in values(axis, SMALL)]
        base = rows[str(getattr(SMALL, axis))]
        assert base["flops_ratio"] == 1
        assert base["time_ratio"]["rounds"] == [1, 1]
        for value, row in rows.items():
            assert row["out_of_memory"] is False
            for key in ("images_per_s", "ms_per_image", "time_ratio", "of_products"):
                fits(row[key], 2)
            pairs = zip(row["ms_per_image"]["rounds"], base["ms_per_image"]["rounds"], strict=True)
            assert row["time_ratio"]["rounds"] == pytest.approx([own / other for own, other in pairs])
            assert row["flops_ratio"] == pytest.approx(row["flops"] / base["flops"])
            assert f"\n{value} " in said
    assert "0.75 (base)" in said
    assert "1 (base)" in said


def test_a_value_without_memory_drops_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "values", lambda axis, base: [1, 2, TOO_MANY])
    axis = growth.Axis("batch", SMALL, QUICK, torch.device("cpu"))
    rows = axis.measure(64)
    assert len(axis.networks) == 1  # the same for all batches
    assert [row["out_of_memory"] for row in rows.values()] == [False, False, True]
    assert [row["flops_ratio"] for row in rows.values()] == [1, 1, 1]
    growth.print_axis("batch", rows, 1)
    assert f"\n{TOO_MANY}    out of memory" in capsys.readouterr().out

    # A value that has had turns before, with a network of its own.
    monkeypatch.setattr(growth, "values", lambda axis, base: [1, 8])
    axis = growth.Axis("decoder_depth", SMALL, QUICK, torch.device("cpu"))
    step, calls = growth.Step.gradients, []

    def gradients(self: growth.Step) -> None:
        calls.append(self.setting.decoder_depth)
        if calls.count(1) > 3 and self.setting.decoder_depth == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self)

    monkeypatch.setattr(growth.Step, "gradients", gradients)
    rows = axis.measure(64)
    assert [row["out_of_memory"] for row in rows.values()] == [True, False]
    assert len(rows[8]["images_per_s"].rounds) == 2
    assert [network[-1] for network in axis.networks] == [8]


def test_without_memory_for_the_base_there_is_nothing_to_compare_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "product_rates", lambda *_, **__: [1e9])
    monkeypatch.setattr(growth, "values", lambda axis, base: [base.batch])
    options = [*OPTIONS, f"--batch={TOO_MANY}", "--axes", "batch"]
    assert "out of memory at the base, nano encoder of 4 blocks" in fails(capsys, "growth", *options)


def test_values_go_around_the_base_and_can_be() -> None:
    base = Setting("small", 224, 16, MASK_RATIO, 12, 8, 8)
    assert values("image_size", base) == [112, 160, 224, 320, 448]
    assert [vary(base, "image_size", value).patches for value in values("image_size", base)] == [49, 100, 196, 400, 784]
    assert values("mask_ratio", base) == [0.25, 0.5, 0.75, 0.85, 0.9]
    assert values("depth", base) == [3, 6, 12, 24]
    assert values("decoder_depth", base) == [1, 2, 4, 8, 12]
    assert values("batch", base) == [2, 4, 8, 16, 32]
    few = base._replace(image_size=32, batch=1, depth=1)  # 4 patches
    assert values("mask_ratio", few) == [0.25, 0.5, 0.75]
    assert values("image_size", few) == [32, 48, 64]
    assert values("batch", few) == [1, 2, 4]
    assert values("depth", few) == [1, 2]


def test_flops_are_those_of_the_network_that_is_measured() -> None:
    network = SMALL.build()
    assert SMALL.flops() == training_flops(network, lambda net, images: net(images, None, 0.75).loss, 3, 28, 28)
    shallow = SMALL._replace(depth=1, decoder_depth=1)
    for axis in ("depth", "decoder_depth"):  # each block costs the same
        first, second, fourth = (vary(shallow, axis, value).flops() for value in (2, 3, 5))
        assert fourth - second == 2 * (second - first) > 0
    assert vary(shallow, "batch", 4).flops() == shallow.flops()
    small = Setting("small", 224, 16, MASK_RATIO, 12, 1, 8)
    assert vary(small, "mask_ratio", 0.25).flops() > 1.5 * small.flops()


def test_turns_are_filled_with_steps() -> None:
    how = QUICK._replace(turn_seconds=0.5)
    assert [steps_a_turn(one, how) for one in (10.0, 0.1, 1e-6)] == [1, 5, 50]
    assert list(growth.in_turn([1, 2, 3], 0)) == [1, 2, 3]
    assert list(growth.in_turn([1, 2, 3], 1)) == [3, 2, 1]


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    how, device = QUICK._replace(compiled=True), torch.device("cpu")
    networks = []

    def attempt(network: torch.nn.Module, step: Any) -> str:
        networks.append(network)
        step()
        return ""

    monkeypatch.setattr(compilation, "attempt", attempt)
    trained = Trained(SMALL, how, device, lr=0.0)
    assert networks == [trained.network]
    assert all(p.grad is None for p in trained.network.parameters())
    monkeypatch.setattr(compilation, "attempt", lambda *_: "no working C++ compiler")
    with pytest.raises(UserError, match="compiler; --compile false measures without"):
        Trained(SMALL, how, device, lr=0.0)


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for bench in ("growth", "scaling"):
        assert "--rounds 0" in fails(capsys, bench, "--rounds=0")
        assert "--batch 0" in fails(capsys, bench, "--batch=0")
        assert "--threads 0" in fails(capsys, bench, "--threads=0")
        assert "--image_size 30 is not divisible by --patch_size 16" in fails(capsys, bench, "--image_size=30")
        assert "--image_size 16 has 1 patches" in fails(capsys, bench, "--image_size=16")
        assert "--json" in fails(capsys, bench, f"--json={tmp_path / 'nowhere' / 'figures.json'}")
        assert "--size" in fails(capsys, bench, "--size=enormous")
        if not torch.cuda.is_available():
            assert "--device cuda: torch sees no GPU" in fails(capsys, bench, "--device=cuda")
    assert "--axes" in fails(capsys, "growth", "--axes", "width")
    assert "--accumulate 0" in fails(capsys, "scaling", "--accumulate=0")
    assert "--processes 0: at least 1" in fails(capsys, "scaling", "--device=cpu", "--processes", 0, 2)
    has = len(os.sched_getaffinity(0))
    wanted = f"--processes {has + 1}: each needs 1 core (--threads 1), and this process may use {has}"
    assert wanted in fails(capsys, "scaling", "--device=cpu", "--processes", has + 1)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for bench, option in (("growth", "--axes"), ("scaling", "--processes")):
        with pytest.raises(SystemExit) as ended:
            main(["bench", bench, "--help"])
        assert ended.value.code == 0
        assert option in capsys.readouterr().out
    assert set(AXES) <= set(Setting._fields)


# ---- scaling ---------------------------------------------------------------------------------------------------------


def test_as_many_processes_as_there_are_cores_or_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(growth, "cores", lambda: 6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert counts_of(None, cpu, 1) == [1, 2, 4]
    assert counts_of(None, cpu, 3) == [1, 2]
    assert counts_of(None, cpu, 9) == [1]
    assert counts_of(None, cuda, 1) == [1, 2, 4, 8]
    assert counts_of([6, 2, 2], cpu, 1) == [1, 2, 6]
    with pytest.raises(UserError, match=r"--processes 4: each needs 2 cores \(--threads 2\), and this process .* 6"):
        counts_of([4], cpu, 2)
    with pytest.raises(UserError, match="--processes 9: torch sees 8 GPUs"):
        counts_of([9], cuda, 1)


def test_efficiency_is_taken_within_each_round() -> None:
    rates = {name(1, True): [10.0, 8.0, 9.0], name(2, True): [15.0, 8.0, 18.0], name(2, False): [20.0, 16.0, 18.0]}
    rows = compare(rates, [1, 2])
    assert rows[1]["efficiency"].rounds == [1, 1, 1]
    assert set(rows[1]) == {"images_per_s", "efficiency"}
    assert rows[2]["efficiency"].rounds == [0.75, 0.5, 1]
    assert rows[2]["efficiency_no_sync"].rounds == [1, 1, 1]
    assert rows[2]["all_reduce"].rounds == [0.25, 0.5, 0]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Processes that a test starts here; all are gone at its end."""
    found: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def note(*args: Any, **kwargs: Any) -> Any:
        found.append(start(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    yield found
    left = [process for process in found if process.poll() is None]
    for process in left:
        process.kill()
    assert not left


def job(setting: Setting, processes: int) -> Job:
    return Job(setting, QUICK, 1, "cpu", [1, processes][:processes], 0, os.getpid())


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_scaling(tmp_path: Path, accumulate: int) -> None:
    out = tmp_path / "figures.json"
    done = mae(
        "bench", "scaling", *OPTIONS, "--rounds=2", "--processes", 2, f"--accumulate={accumulate}", f"--json={out}"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["setting"] == SMALL._asdict()
    assert (found["accumulate"], found["backend"], found["threads"]) == (accumulate, "gloo", 1)
    assert list(found["processes"]) == ["1", "2"]
    one, two = found["processes"].values()
    assert one["efficiency"]["rounds"] == [1, 1]
    for key in ("images_per_s", "efficiency", "images_per_s_no_sync", "efficiency_no_sync"):
        fits(two[key], 2)
    ideal = [2 * rate for rate in one["images_per_s"]["rounds"]]
    pairs = zip(two["images_per_s"]["rounds"], ideal, strict=True)
    assert two["efficiency"]["rounds"] == pytest.approx([rate / most for rate, most in pairs])
    assert two["all_reduce"]["high"] < 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["processes", "1", "2"]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(started: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=f"out of memory at --batch {TOO_MANY} in 2 processes"):
        together(job(SMALL._replace(batch=TOO_MANY), 2))
    assert len(started) == 2
    assert all(process.returncode for process in started)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(TrainingFailed, match="process 0 of the bench ended with exit code 1"):
        together(job(SMALL._replace(size="enormous"), 1))
    assert "KeyError: 'enormous'" in capfd.readouterr().err


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
    command = [sys.executable, "-m", "mae.cli", "bench", "scaling", *OPTIONS, "--rounds=100000", "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    pids: list[int] = []
    try:
        wait_until(lambda: process.poll() is not None or len(children(process.pid)) >= 2)
        pids = children(process.pid)
        process.send_signal(getattr(signal, number))
        assert process.wait(60) == code
        wait_until(lambda: not any(map(alive, pids)))
    finally:
        process.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
