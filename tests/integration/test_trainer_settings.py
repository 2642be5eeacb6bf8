"""Lightning's own settings and callbacks in our commands: they work, or one line says why not."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DIGITS, ROOT, TINY
from wandb.sdk.launch.sweeps import utils

from mae.errors import UserError
from mae.evaluation.metrics import Report, score_line
from mae.launch.stages import PretrainCLI
from mae.models.flops import least_seconds
from mae.training import recipe_text

REFUSED: list[tuple[list[str], str]] = [
    (["--trainer.devices=0,1"], "on a CPU it is a number of processes"),
    (["--trainer.devices=-1"], "on a CPU it is a number of processes"),
    (["--trainer.devices=[0,1]"], "on a CPU it is a number of processes"),
    (["--trainer.callbacks=LearningRateFinder"], "LearningRateFinder: the rate follows from --model.base_lr"),
    (["--trainer.callbacks=BatchSizeFinder"], "^--trainer.callbacks BatchSizeFinder: .*mae plan"),
    (["--trainer.callbacks=Timer"], "Timer: a run is a number of steps"),
    (["--trainer.callbacks=BackboneFinetuning"], "BackboneFinetuning: .* --model.blocks"),
    (["--trainer.callbacks=RichProgressBar"], "RichProgressBar: every run has a bar of its own"),
    (
        ["--trainer.callbacks=ModelPruning", "--trainer.callbacks.pruning_fn=l1_unstructured"],
        "ModelPruning: it needs",
    ),
    (
        ["--trainer.callbacks=GradientAccumulationScheduler"],
        "GradientAccumulationScheduler: all steps have the same global batch",
    ),
    (
        ["--trainer.callbacks=EarlyStopping"],
        r"--trainer.callbacks EarlyStopping: missing: --trainer.callbacks.monitor",
    ),
    (
        ["--trainer.callbacks=QuantizationAwareTraining"],
        "QuantizationAwareTraining: no class that settings can build",
    ),
    (["--trainer.logger=TensorBoardLogger"], "TensorBoardLogger: missing: --trainer.logger.save_dir$"),
    (["--trainer.logger=MLFlowLogger"], "--trainer.logger MLFlowLogger: .*pip install -U 'mlflow"),
    (["--trainer.logger=CometLogger"], "CometLogger: .*pip install"),
    (["--trainer.plugins=LSFEnvironment"], "--trainer.plugins LSFEnvironment: .*LSB_DJOB_RANKFILE"),
    (["--trainer.plugins=AsyncCheckpointIO"], "AsyncCheckpointIO: checkpoints are written as the run needs them"),
    (["--trainer.plugins=DoublePrecision"], "DoublePrecision: set --trainer.precision"),
    (["--trainer.profiler=xla"], "--trainer.profiler xla: it needs a TPU"),
    (["--trainer.profiler=XLAProfiler"], "XLAProfiler: .*torch_xla"),
    (["--trainer.strategy=ddp_spawn"], "--trainer.strategy ddp_spawn: .* it is one of auto, single_device"),
    (["--trainer.strategy=ddp_notebook"], "--trainer.strategy ddp_notebook: "),
    (["--trainer.strategy=deepspeed_stage_2"], "--trainer.strategy deepspeed_stage_2: "),
    (["--trainer.strategy=fsdp"], "--trainer.strategy fsdp: "),
    (["--trainer.strategy=single_xla"], "--trainer.strategy single_xla: "),
    (
        ["--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy", "--trainer.strategy.cpu_offload=true"],
        "--trainer.strategy lightning.pytorch.strategies.FSDPStrategy: ",
    ),
    (
        ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy", "--trainer.strategy.start_method=spawn"],
        "start_method spawn: what its processes learn is lost",
    ),
    (["--trainer.num_nodes=2"], "--trainer.num_nodes 2: nothing tells this process which node it is on"),
    (["--trainer.barebones=true"], "--trainer.barebones True: every run logs"),
    (["--trainer.default_root_dir=runs"], "the folder of a run is --run_dir"),
    (["--trainer.check_val_every_n_epoch=0"], "--trainer.check_val_every_n_epoch 0: it must be at least 1"),
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
    (["--trainer.callbacks=SpikeDetection"], "SpikeDetection: .* cannot be resumed"),
]


@pytest.mark.parametrize(
    ("settings", "words"),
    [pytest.param(*case, marks=[pytest.mark.slow] if i % 3 else []) for i, case in enumerate(REFUSED)],
)
def test_what_does_not_go_with_a_run_is_refused_in_a_line(settings: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path}", *settings]).fit()
    assert "\n" not in str(error.value)


@pytest.mark.slow
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


@pytest.mark.slow
def test_tensorboard_has_the_metrics_at_their_steps(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'logs'}"]
    settings = ["--data.batch_size_per_device=1000", "--trainer.max_steps=5", "--trainer.log_every_n_steps=2"]
    PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path / 'run'}", *settings, *logger]).fit()
    (file,) = (tmp_path / "logs").rglob("events.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as rows:
        written = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(rows) if row["train/loss"]}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(written)
    assert sorted(written) == [2, 4, 5]


def test_crowded_cores_are_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mae.runtime.machine.available_cores", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2"])
    notes = [line for line in capsys.readouterr().out.splitlines() if "threads" in line]
    assert notes == [
        "mae: note: 8 threads on 2 cores: this can be 10 times slower; set the environment variable OMP_NUM_THREADS=2"
    ]


def test_the_sweep_file_starts_runs_with_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What W&B's agent would start, as its own code puts it together, with a program that prints its arguments."""
    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    chosen = {key: {"value": given["values"][-1]} for key, given in sweep["parameters"].items()}
    args = utils.create_sweep_command_args({"args": chosen})["args"]
    words = [word for part in sweep["command"] for word in (args if part == "${args}" else [part])]
    fake = tmp_path / "mae"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc1"}
    given = subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()
    assert given[0] == "pretrain"
    with pytest.raises(SystemExit):
        PretrainCLI([*given[1:], "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["run_dir"] == "runs/sweep_abc1"
    assert config["model"]["base_lr"] == 1.2e-2
    assert config["model"]["mask_ratio"] == 0.9


def test_what_a_long_run_costs_is_said_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TINY, *DIGITS, "--trainer.max_steps=1"]
    PretrainCLI([*settings, f"--run_dir={tmp_path / 'short'}"]).fit()
    assert "at least" not in capsys.readouterr().out
    monkeypatch.setattr(recipe_text, "SLOWEST", 1.0)
    before = torch.get_rng_state()
    assert least_seconds(1e12, torch.device("cpu"), torch.float32)  # measured
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(recipe_text, "least_seconds", lambda *_: 3.2 * 86400)
    PretrainCLI([*settings, f"--run_dir={tmp_path / 'long'}"]).fit()
    said = capsys.readouterr().out
    assert said.index("this run takes 3 days at least, by the rate") < said.index("step 1/1")
    assert "`mae pretrain --config pretrain/small`" in said


def test_top_5_is_left_out_where_it_says_nothing() -> None:
    for count, said in ((5, False), (6, True)):
        names = [str(i) for i in range(count)]
        report = Report(50.0, 100.0, 1.0, count, torch.eye(count, dtype=torch.int64), names)
        assert ("top-5" in score_line("probe", report)) == said
