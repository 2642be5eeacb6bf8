"""Lightning's own settings and callbacks in our commands: they work, or one line says why not."""

from pathlib import Path

import pytest
import torch
from conftest import DIGITS, TINY

from mae.errors import UserError
from mae.evaluation.metrics import Report, score_line
from mae.launch.stages import PretrainCLI


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--trainer.devices=0,1"], "on a CPU it is a number of processes"),
        (["--trainer.devices=-1"], "on a CPU it is a number of processes"),
        (["--trainer.devices=[0,1]"], "on a CPU it is a number of processes"),
        (["--trainer.callbacks=LearningRateFinder"], "LearningRateFinder: the rate follows from --model.base_lr"),
        (["--trainer.callbacks=BatchSizeFinder"], "^--trainer.callbacks BatchSizeFinder: .*mae plan"),
        (["--trainer.callbacks=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"], "replaces the learning"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/los"],
            "EarlyStopping: monitor 'val/los' is none of train/loss, val/loss, lr",
        ),
        (
            [
                *("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
                "--trainer.limit_val_batches=0",
            ],
            "monitor 'val/loss' is none of train/loss, lr",
        ),
    ],
)
def test_what_does_not_go_with_a_run_is_refused_in_a_line(settings: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path}", *settings])
    assert "\n" not in str(error.value)


def test_early_stopping_and_lightnings_checkpoints_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [
        *("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
        *(
            "--trainer.callbacks.patience=1",
            "--trainer.callbacks.min_delta=1e9",
            "--trainer.callbacks+=ModelCheckpoint",
        ),
        *("--trainer.callbacks.monitor=val/loss", f"--trainer.callbacks.dirpath={tmp_path / 'best'}"),
        "--trainer.callbacks+=LearningRateMonitor",
    ]
    settings = ["--data.batch_size_per_device=1000", "--trainer.max_epochs=20", *callbacks]
    cli = PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path / 'run'}", *settings])
    cli.fit()
    assert 4 < cli.trainer.global_step <= 12
    cli.trainer.strategy.checkpoint_io.wait()
    assert list((tmp_path / "best").glob("*.ckpt"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines
    assert all("loss " in line for line in lines)


def test_top_5_is_left_out_where_it_says_nothing() -> None:
    for count, said in ((5, False), (6, True)):
        names = [str(i) for i in range(count)]
        report = Report(50.0, 100.0, 1.0, count, torch.eye(count, dtype=torch.int64), names)
        assert ("top-5" in score_line("probe", report)) == said
