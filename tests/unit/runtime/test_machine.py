"""Cores, quotas, threads, and the number of loader processes that follows."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from mae.data.datamodule import ImageData
from mae.data.datasets import default_workers
from mae.runtime import machine
from mae.runtime.machine import available_cores, cpu_quota, crowding


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores, 16 of which this process may run on, in the cgroup /job/task."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/task\n")
    (tmp_path / "job" / "task").mkdir(parents=True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    monkeypatch.setattr(machine, "LOADAVG", tmp_path / "loadavg")
    return tmp_path


def test_quotas_of_containers(cgroups: Path) -> None:
    assert (cpu_quota(), available_cores()) == (float("inf"), 16)
    (cgroups / "job" / "task" / "cpu.max").write_text("max 100000\n")
    (cgroups / "job" / "cpu.max").write_text("250000 100000\n")
    assert (cpu_quota(), available_cores()) == (2.5, 3)
    (cgroups / "cpu").mkdir()  # version 1
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota() == 2.5
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    assert (cpu_quota(), available_cores()) == (0.5, 1)


def test_more_threads_than_free_cores_are_told(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert crowding(16) == crowding(4, processes=4) == ""
    assert "64 threads on 16 cores" in crowding(16, processes=4)
    assert crowding(16, processes=4).endswith("OMP_NUM_THREADS=4")
    monkeypatch.setattr(os, "getloadavg", lambda: (12.2, 0.0, 0.0))
    assert "16 threads on a machine of 16 cores with a load of 12.2 already" in crowding(16)
    assert crowding(16).endswith("OMP_NUM_THREADS=3")
    (cgroups / "loadavg").write_text("12.20 3.00 1.00 4/1190 36\n")  # others have just ended
    assert crowding(16) == ""
    (cgroups / "loadavg").write_text("12.20 3.00 1.00 14/1190 36\n")
    assert "a load of 12.2 already" in crowding(16)
    assert crowding(1) == ""
    (cgroups / "job" / "cpu.max").write_text("200000 100000\n")
    assert "16 threads on 2 cores" in crowding(16)
    assert "OMP_NUM_THREADS" not in crowding(1, processes=4)


def test_loaders_and_torch_together_have_no_more_threads_than_cores(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for threads, workers in ((1, 8), (10, 6), (15, 1), (16, 0), (32, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert default_workers() == workers
    assert default_workers(1) == 8  # where torch computes nothing
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    data = ImageData("digits")
    data.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)  # starts the second process
    data.setup("fit")
    assert data.num_workers == 6
    chosen = ImageData("digits", num_workers=5)
    chosen.trainer = data.trainer
    chosen.setup("fit")
    assert chosen.num_workers == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 3
    (cgroups / "job" / "cpu.max").write_text("200000 100000\n")
    assert default_workers() == 0
