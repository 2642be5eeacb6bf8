"""`mae bench save`: what checkpoints, and results that repeat to the bit, cost a pre-training run."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from mae.bench.figures import figure, write_json
from mae.bench.measured_run import UNMEASURED, MeasuredRunCLI
from mae.runtime.checkpoint_files import step_file
from mae.runtime.device_clock import wait_for
from mae.runtime.machine import machine_details
from mae.training.checkpoint_io import CheckpointFiles, HostCopy
from mae.training.module import Stage
from mae.training.throughput import images_per_step

WARM_UP = 2  # optimiser steps

MOST_WRITING = 50  # steps that are measured while a file is written

CUBLAS = ":4096:8"  # what torch wants of cuBLAS before its results repeat


class SaveCLI(MeasuredRunCLI):
    """A pre-training run that is saved now and then, and measured; its checkpoints are removed."""

    command, description = (
        "bench save",
        "What saving costs the training step: steps without it, steps with it, steps while the file is written.",
    )
    positive = ("rounds",)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rounds", type=int, default=4, help="Number of saves, with four other steps each.")


class Rounds(Callback):
    """Steps without saving; one with it; those while the file is written; and some under deterministic algorithms.

    The first save takes the memory for its copy, which later ones use again: it is among the steps with saving.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.seconds: dict[str, list[float]] = {name: [] for name in ("plain", "saving", "writing", "deterministic")}
        self.clones: list[float] = []
        self.schedule = self.next_steps()

    def next_steps(self) -> Iterator[str]:
        """The name of each step."""
        yield from ["warm-up"] * WARM_UP
        for _ in range(self.rounds):
            yield from ["plain"] * 2
            yield "saving"
            for _ in range(MOST_WRITING):
                if not self.files.busy:
                    break
                yield "writing"
            self.files.wait()
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield from ["deterministic"] * 2
            torch.use_deterministic_algorithms(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        files = trainer.strategy.checkpoint_io
        assert isinstance(files, CheckpointFiles)
        self.files = files
        self.current, self.start = next(self.schedule), time.perf_counter()

    def after_step(self, trainer: Trainer, stage: Stage) -> None:
        wait_for(stage.device)
        now = time.perf_counter()
        if self.current in self.seconds:
            self.seconds[self.current].append(now - self.start)
        # A save is a part of the step that follows it, as in training.
        try:
            self.current = next(self.schedule)
        except StopIteration:
            self.clones = [self.clone(trainer) for _ in range(3)]
            trainer.should_stop = True
            return
        self.start = time.perf_counter()
        if self.current == "saving":
            trainer.save_checkpoint(step_file(trainer.default_root_dir, trainer.global_step), weights_only=False)

    def clone(self, trainer: Trainer) -> float:
        """Seconds to copy weights and optimiser states to new memory of the host."""
        strategy = trainer.strategy
        state = {
            "state_dict": strategy.lightning_module_state_dict(),
            "optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in strategy.optimizers],
        }
        wait_for(trainer.strategy.root_device)
        start = time.perf_counter()
        HostCopy().take(state)
        return time.perf_counter() - start


def save_command(args: Sequence[str]) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)
    with tempfile.TemporaryDirectory() as folder:
        own_folder = any(arg.split("=")[0] == "--run_dir" for arg in args)
        forced = [
            *(() if own_folder else (f"--run_dir={folder}",)),
            *(*UNMEASURED, "--checkpoint.keep=1", "--trainer.deterministic=false"),
        ]
        cli = SaveCLI([*args, *forced])
        try:
            write_json(cli.config.json, bench_save(cli))
        finally:
            for path in cli.run_dir.glob("checkpoints/*.ckpt"):
                path.unlink()


def bench_save(cli: SaveCLI) -> dict[str, Any]:
    """Measures and prints."""
    trainer, rounds = cli.trainer, Rounds(cli.config.rounds)
    cli.fit_with(rounds)
    files = rounds.files
    files.wait()
    size = max(path.stat().st_size for path in cli.run_dir.glob("checkpoints/step_*.ckpt"))
    steps = {name: figure(seconds) for name, seconds in rounds.seconds.items() if seconds}
    clone, plain, saving = figure(rounds.clones), steps["plain"], steps["saving"]
    bound = plain.high + 1.5 * clone.median
    batch = images_per_step(trainer)
    print(f"checkpoint     {size / 1e6:,.0f} MB; written in {figure(files.seconds)} s; seconds below: median (range)")
    print(f"clone of it    {clone}, in memory")
    print(f"step           {plain}, batch {batch}")
    verdict = "within it" if saving.high <= bound else "OVER it"
    print(f"with a save    {saving}; the bound, worst without + 1.5 clones, is {bound:.2f}: {verdict}")
    if "writing" in steps:
        print(f"while writing  {steps['writing']}, {steps['writing'].median / plain.median:.2f} times a step")
    else:
        print("while writing  the file was written before the step with the save was over")
    deterministic = steps["deterministic"]
    print(f"deterministic  {deterministic}, {deterministic.median / plain.median:.2f} times a step", flush=True)
    return {
        "machine": machine_details(trainer.strategy.root_device),
        "batch": batch,
        "bytes": size,
        "clone": clone,
        "write": figure(files.seconds),
        "bound": bound,
        **steps,
    }
