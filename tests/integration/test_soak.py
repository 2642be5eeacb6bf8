"""Runs that are stopped and go on, by the script that can do it for hours; and whether it would see what is wrong."""

import itertools
import random
from pathlib import Path

import kill_soak as soak
import pytest
import torch

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")


@pytest.mark.soak  # a Slurm job that is signalled and crashes is among the slow ones
@needs_proc
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    kills = [soak.Kill("USR1", "rank 0", "random", 20, 0.5)]
    assert soak.soak(soak.Case(processes=1, workers=0, accumulate=2, steps=40), kills, tmp_path) == 1


@pytest.mark.slow
@needs_proc
def test_fine_tuning_that_was_stopped_by_force_ends_with_the_same_bits(tmp_path: Path) -> None:
    kills = [soak.Kill("KILL", "group", "after STOP", 20, 0.2)]
    assert soak.soak(soak.Case(processes=1, workers=2, accumulate=1, steps=40, stage="finetune"), kills, tmp_path) == 1


@pytest.mark.soak
@needs_proc
def test_two_stopped_processes_end_with_the_same_bits(tmp_path: Path) -> None:
    kills = [soak.Kill("KILL", "rank 1", "random", 17, 0.5), soak.Kill("TERM", "group", "epoch", 25, 0.1)]
    assert soak.soak(soak.Case(processes=2, workers=2, accumulate=1, steps=40), kills, tmp_path) == 2


def test_a_plan_follows_from_its_seed_and_uses_every_signal() -> None:
    case = soak.Case(processes=2, workers=2, accumulate=1, steps=100)
    first, again, other = (
        soak.plan(case, 40, itertools.cycle(["KILL", "TERM", "USR1"]), random.Random(seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert {kill.signal for kill in first} == {"KILL", "TERM", "USR1"}
    assert {kill.target for kill in first} == {"group", "rank 0", "rank 1", "worker"}
    assert all(kill.signal == "KILL" for kill in first if kill.target == "worker")
    assert [kill.step for kill in first] == sorted(kill.step for kill in first)
    assert first[-1].step < 100


def test_what_must_be_kept() -> None:
    # Written at 7, 14, 15 (the end of an epoch), 21, ...: each after its row, and complete before the next begins.
    kept = {0: 0, 7: 0, 8: 0, 14: 0, 15: 7, 16: 14, 21: 14, 22: 15, 29: 21, 30: 21, 31: 28}
    assert {step: soak.kept_at_least(step) for step in kept} == kept


def test_one_bit_is_a_difference() -> None:
    def state(value: float) -> dict[str, object]:
        return {"state": [{"exp_avg": torch.tensor([1.0, value]), "step": torch.tensor(3.0)}], "rate": 0.1}

    assert soak.difference(state(2.0), state(2.0), "optimizer") == ""
    assert soak.difference(state(float("nan")), state(float("nan")), "optimizer") == ""
    assert soak.difference(state(2.0), state(2.0000002), "optimizer").startswith("optimizer['state'][0]['exp_avg']: by")
    assert soak.difference(state(0.0), state(-0.0), "x") != ""
    assert "keys ['b']" in soak.difference({"a": 1}, {"a": 1, "b": 1}, "x")
    assert "torch.float64" in soak.difference(torch.zeros(1), torch.zeros(1).double(), "x")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("1,0.5,,9\n2,0.25,0.3,8\n", None),  # speeds are never the same
        ("1,0.5,,1\n", "0 rows of step 2"),
        ("1,0.5,,1\n2,0.25,0.3,1\n2,0.25,0.3,1\n", "2 rows of step 2"),
        ("2,0.25,0.3,1\n1,0.5,,1\n", "another order"),
        ("1,0.5,,1\n2,0.25,0.3,1\n3,0.1,,1\n", "the uninterrupted run has not"),
        ("1,0.5,,1\n2,0.26,0.3,1\n", "step 2, column train/loss: '0.26'; uninterrupted: '0.25'"),
        ("1,0.5,,1\n2,0.25,,1\n", "step 2, column val/loss"),
    ],
)
def test_rows_must_be_those_of_the_uninterrupted_run(tmp_path: Path, rows: str, complaint: str | None) -> None:
    head = "step,train/loss,val/loss,images_per_s\n"
    (tmp_path / "a.csv").write_text(f"{head}1,0.5,,1\n2,0.25,0.3,1\n")
    (tmp_path / "b.csv").write_text(head + rows)
    if complaint is None:
        soak.compare_metrics(tmp_path / "a.csv", tmp_path / "b.csv")
    else:
        with pytest.raises(soak.Violation, match=complaint):
            soak.compare_metrics(tmp_path / "a.csv", tmp_path / "b.csv")
