"""A run that is stopped in any way and started again with the same command ends with the same bits."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DIGITS, TINY
from conftest import mae as command
from run_folders import few_digits, require_same, rows

from mae.cli import main
from mae.errors import Stopped, TrainingFailed, UserError
from mae.launch.stages import PretrainCLI
from mae.runtime import checkpoint_files
from mae.runtime.checkpoint_files import saved, step_file

# 10 steps an epoch, 28 in all, of 2 micro-batches; held-out images at the end of each epoch.
RUN = [
    *DIGITS,
    *TINY,
    *("--data.batch_size_per_device=20", "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=28"),
    *(
        "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_steps=7",
        "--panels.images=2",
        "--panels.every_n_epochs=1",
    ),
]


def prepared(run_dir: Path, *settings: str) -> PretrainCLI:
    return PretrainCLI([*RUN, f"--run_dir={run_dir}", "--ckpt_path=last", *settings])


def run(run_dir: Path, *settings: str) -> PretrainCLI:
    cli = prepared(run_dir, *settings)
    cli.fit()
    return cli


class Killed(BaseException):
    pass


def at_step(cli: PretrainCLI, step: int, do: Callable[[], Any], hook: str = "on_train_batch_start") -> None:
    """Do it once, when so many optimiser steps have been taken."""
    usual, done = getattr(cli.model, hook), []

    def now(*args: Any, **kwargs: Any) -> Any:
        if cli.model.global_step == step and not done:
            done.append(step)
            do()
        return usual(*args, **kwargs)

    setattr(cli.model, hook, now)


def written(cli: PretrainCLI) -> None:
    """Wait for the checkpoint under way: on a busy machine it may take some steps."""
    cli.trainer.strategy.checkpoint_io.wait()


def die() -> None:
    raise Killed


@pytest.fixture(scope="module", autouse=True)
def few_images() -> Iterator[None]:
    with few_digits():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    run(run_dir)
    assert [row["step"] for row in rows(run_dir) if row["val/loss"]] == ["10", "20"]
    return run_dir


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        # the checkpoint of that step is there, the look at held-out images is not
        pytest.param(10, "on_validation_epoch_start", marks=pytest.mark.slow),
        pytest.param(20, "on_validation_epoch_end", marks=pytest.mark.slow),
        pytest.param(20, "on_train_epoch_start", marks=pytest.mark.slow),
        (14, "on_train_batch_end"),  # after the step, before its row and checkpoint
        pytest.param(28, "on_train_end", marks=pytest.mark.slow),  # all is saved but nothing exported
    ],
)
def test_killed_at_a_delicate_moment(tmp_path: Path, whole: Path, step: int, hook: str) -> None:
    cli = prepared(tmp_path)
    at_step(cli, step, die, hook)
    with pytest.raises(Killed):
        cli.fit()
    run(tmp_path)
    require_same(tmp_path, whole)


STEPS = (5, 9, 27)  # within an epoch; in the last step of an epoch; of the run


@pytest.mark.parametrize(
    ("number", "code", "steps"),
    [
        (signal.SIGTERM, 143, STEPS),
        (signal.SIGINT, 130, STEPS[:1]),
        pytest.param(signal.SIGUSR1, 143, STEPS, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, STEPS[1:], marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step(
    tmp_path: Path, whole: Path, number: int, code: int, steps: tuple[int, ...]
) -> None:
    before = signal.getsignal(number)
    for step in steps:
        cli = prepared(tmp_path)
        at_step(cli, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match=f"stopped at step {step + 1}, saved; --ckpt_path last goes on") as stopped:
            cli.fit()
        assert stopped.value.code == code
        assert saved(tmp_path)[0] == step_file(tmp_path, step + 1)
        assert signal.getsignal(number) == before
    run(tmp_path)
    require_same(tmp_path, whole)


def test_two_signals_in_a_row_are_as_one_and_a_second_ctrl_c_is_not(tmp_path: Path) -> None:
    cli = prepared(tmp_path)
    at_step(cli, 5, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    with pytest.raises(Stopped):
        cli.fit()
    assert saved(tmp_path)[0] == step_file(tmp_path, 6)
    cli = prepared(tmp_path)
    at_step(cli, 8, lambda: [written(cli), *(os.kill(os.getpid(), signal.SIGINT) for _ in range(2))])
    with pytest.raises(KeyboardInterrupt):
        cli.fit()
    assert saved(tmp_path)[0] == step_file(tmp_path, 7)


SCONTROL = """#!/bin/sh
echo "$@" >> "$0.log"
case $1 in
    show)
        echo "JobId=12 JobState=$(cat "$0.state") Restarts=$(cat "$0.restarts") RunTime=00:01:00 TimeLimit=01:00:00"
        ;;
    requeue) cat "$0.error" >&2 && exit 1 ;;
esac
true
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that is asked about a running job, and takes it back."""
    path = tmp_path / "bin" / "scontrol"
    path.parent.mkdir()
    path.write_text(SCONTROL)
    path.chmod(0o755)
    path.with_name("scontrol.state").write_text("RUNNING")
    path.with_name("scontrol.restarts").write_text("0")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return path


def stop_under_slurm(run_dir: Path, number: int) -> Stopped:
    cli = prepared(run_dir)
    at_step(cli, 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped:
        cli.fit()
    assert saved(run_dir)[0] == step_file(run_dir, 4)
    return stopped.value


def test_a_slurm_job_goes_back_to_the_queue_once_it_is_saved(tmp_path: Path, scontrol: Path) -> None:
    stopped = stop_under_slurm(tmp_path / "run", signal.SIGUSR1)
    assert stopped.code == 0
    assert "job 12 is back in Slurm's queue" in str(stopped)
    assert scontrol.with_name("scontrol.log").read_text() == "show job -o 12\nrequeue 12\n"


def test_a_task_of_an_array_requeues_itself(tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert stop_under_slurm(tmp_path / "run", signal.SIGTERM).code == 0
    assert "requeue 9_3" in scontrol.with_name("scontrol.log").read_text()


@pytest.mark.parametrize(
    ("file", "text", "code", "said"),
    [
        ("state", "COMPLETING", 143, "job 12 has been cancelled"),
        ("restarts", "1", 0, "Slurm has put job 12 back into the queue"),
        ("error", "Job can not be requeued", 143, "Slurm does not requeue job 12: Job can not be requeued"),
    ],
)
def test_what_slurm_says_of_the_job_counts(
    tmp_path: Path, scontrol: Path, file: str, text: str, code: int, said: str
) -> None:
    scontrol.with_name(f"scontrol.{file}").write_text(text)
    stopped = stop_under_slurm(tmp_path / "run", signal.SIGTERM)
    assert (stopped.code, said in str(stopped)) == (code, True), stopped


def test_ctrl_c_is_not_requeued(tmp_path: Path, scontrol: Path) -> None:
    assert stop_under_slurm(tmp_path / "run", signal.SIGINT).code == 130
    assert not scontrol.with_name("scontrol.log").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = prepared(tmp_path)
    at_step(cli, 17, die)
    with pytest.raises(Killed):
        cli.fit()
    cli.trainer.strategy.checkpoint_io.wait()
    path = step_file(tmp_path, 14)
    path.write_bytes(path.read_bytes()[:-1000])
    unfinished = tmp_path / "checkpoints" / "step_0000021.ckpt.abcd1234.partial"
    unfinished.mkdir()
    (unfinished / "step_0000021.ckpt").write_bytes(b"half")
    (unfinished / ".in_use").touch()
    cli = prepared(tmp_path)
    out = capsys.readouterr().out
    assert f"mae: warning: {path} is damaged: it is torn: its checksum is missing" in out
    cli.fit()
    out = capsys.readouterr().out
    assert f"goes on from step 10 ({step_file(tmp_path, 10)})" in out
    assert "step_0000021.ckpt.abcd1234.partial was being written when the run was killed: removed" in out
    require_same(tmp_path, whole)


def test_a_run_with_damaged_checkpoints_only_is_not_started_over(tmp_path: Path) -> None:
    path = step_file(tmp_path / "x", 7)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    with pytest.raises(UserError, match=r"step_0000007.ckpt is damaged.* another --run_dir starts anew"):
        prepared(tmp_path / "x")


@pytest.mark.slow
def test_going_back_puts_later_checkpoints_aside(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, "--checkpoint.keep=9")
    again = [*RUN, f"--run_dir={tmp_path}", "--checkpoint.keep=9", f"--ckpt_path={step_file(tmp_path, 14)}"]
    with pytest.raises(UserError, match=r"model.base_lr is 0.5, but"):
        PretrainCLI([*again, "--model.base_lr=0.5"]).fit()
    assert saved(tmp_path)[0] == step_file(tmp_path, 28)  # refused, it has touched nothing
    assert rows(tmp_path)[-1]["step"] == "28"
    cli = PretrainCLI(again)
    at_step(cli, 15, die)
    with pytest.raises(Killed):
        cli.fit()
    cli.trainer.strategy.checkpoint_io.wait()
    assert saved(tmp_path)[0] == step_file(tmp_path, 14)
    assert (tmp_path / "checkpoints" / "step_0000028.ckpt.superseded").exists()
    assert (tmp_path / "encoder.safetensors.superseded").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert rows(tmp_path)[-1]["step"] == "15"
    run(tmp_path, "--checkpoint.keep=9")
    require_same(tmp_path, whole)


@pytest.mark.slow
def test_settings_of_a_run_that_died_before_its_first_checkpoint(tmp_path: Path, capsys: Any) -> None:
    cli = prepared(tmp_path)
    at_step(cli, 3, die)
    with pytest.raises(Killed):
        cli.fit()
    assert not saved(tmp_path)
    with pytest.raises(UserError, match=r"model.base_lr is 0.5, but 0.00015 in .*config.yaml.*--allow_changes true"):
        prepared(tmp_path, "--model.base_lr=0.5")
    run(
        tmp_path, "--model.base_lr=0.5", "--allow_changes=true", "--trainer.log_every_n_steps=2", "--data.num_workers=1"
    )
    assert "mae: warning: model.base_lr is 0.5, but 0.00015" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["base_lr"] == 0.5
    assert [row["step"] for row in rows(tmp_path)][:2] == ["2", "4"]  # nothing of the first try
    with pytest.raises(UserError, match=r"model.base_lr is 0.1, but 0.5 in the run that"):
        prepared(tmp_path, "--model.base_lr=0.1").fit()
    prepared(tmp_path, "--model.base_lr=0.1", "--allow_changes=true").fit()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path: Path, whole: Path) -> None:
    cli = prepared(tmp_path)
    at_step(cli, 17, lambda: [written(cli), die()])
    with pytest.raises(Killed):
        cli.fit()
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    before = rows(tmp_path)
    with pytest.raises(UserError, match=r"had checkpoints, the newest step_0000014.ckpt, and has none now: bring them"):
        prepared(tmp_path)
    assert rows(tmp_path) == before
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    run(tmp_path)
    require_same(tmp_path, whole)


def test_changed_settings_of_the_optimiser_are_those_it_uses(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=10")
    changed = ["--model.weight_decay=0.3", "--model.betas=[0.5,0.6]"]
    cli = run(tmp_path, *changed, "--allow_changes=true")
    groups = cli.trainer.optimizers[0].param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in groups} == {(0.5, 0.6)}


@pytest.mark.slow
def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    settings = ["--checkpoint.every_n_steps=null", "--checkpoint.every_n_epochs=99", "--checkpoint.keep=99"]
    cli = prepared(tmp_path / "often", *settings, "--checkpoint.every_n_minutes=0.00001")
    usual = cli.model.on_train_batch_start
    cli.model.on_train_batch_start = lambda *args: (written(cli), usual(*args))[1]  # type: ignore[method-assign]
    cli.fit()
    assert len(saved(tmp_path / "often")) > 5
    run(tmp_path / "never", *settings, "--checkpoint.every_n_minutes=null")
    assert saved(tmp_path / "never") == [step_file(tmp_path / "never", 28)]  # the last step, always


def failing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    write = checkpoint_files.write
    left = [times]

    def fails(*args: Any) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoint_files, "write", fails)


def test_a_checkpoint_that_fails_is_tried_again(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, 2)
    run(tmp_path)
    out = capsys.readouterr().out
    assert "a checkpoint could not be written: " in out
    assert "step_0000007.ckpt: No space left on device; there is none yet" in out
    require_same(tmp_path, whole)


def test_a_run_that_cannot_save_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 99)
    monkeypatch.setattr(checkpoint_files, "RETRY_SECONDS", 0.0)
    with pytest.raises(TrainingFailed, match=r"3 checkpoints in a row could not be written: .*No space left"):
        run(tmp_path)


def test_asked_to_stop_on_a_full_disk_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 99)
    cli = prepared(tmp_path)
    at_step(cli, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(
        TrainingFailed, match=r"asked to stop, but the checkpoint could not be written: .*No space left"
    ):
        cli.fit()


@pytest.mark.slow
def test_a_full_disk_and_more_room_later(small_disk: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *RUN, f"--run_dir={small_disk}", "--ckpt_path=last"]) in (1, 2)
    out, err = capsys.readouterr()
    assert "No space left on device" in out + err
    assert "Traceback" not in err
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    run(small_disk)
    require_same(small_disk, whole)


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    cli = prepared(tmp_path)
    answers = []
    at_step(cli, 3, lambda: answers.append(command("pretrain", *RUN, f"--run_dir={tmp_path}", "--ckpt_path=last")))
    cli.fit()
    (second,) = answers
    assert second.returncode == 2
    assert f"pid {os.getpid()}" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.slow
def test_decoders_and_bad_images_are_counted_over_restarts(tmp_path: Path, image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "000.png").write_bytes(b"no image")
    settings = [
        *("--data.dataset=folder", f"--data.root={image_folder}", "--data.image_size=14", "--data.max_bad_images=1"),
        *("--data.batch_size_per_device=2", "--data.hflip=0.5", "--checkpoint.every_n_steps=3"),
    ]
    run(tmp_path / "whole", *settings)
    for step in (10, 20):
        cli = prepared(tmp_path / "cut", *settings)
        at_step(cli, step, die)
        with pytest.raises(Killed):
            cli.fit()
    run(tmp_path / "cut", *settings)
    require_same(tmp_path / "cut", tmp_path / "whole")
    assert float(rows(tmp_path / "cut")[-1]["pillow_images"]) > 90
