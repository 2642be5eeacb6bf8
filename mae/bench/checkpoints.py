"""`mae bench save`: what checkpoints, and results that repeat to the bit, cost a pre-training run."""

import contextlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mae.bench.figures import figure, machine, write_json
from mae.callbacks.checkpointing import Checkpoints
from mae.callbacks.online_eval import Online
from mae.callbacks.reconstructions import Panels
from mae.errors import UserError
from mae.launch.stages import PretrainCLI
from mae.options import out_file
from mae.runtime.checkpoint_files import step_file
from mae.runtime.device_clock import wait_for
from mae.training.checkpoint_io import CheckpointFiles, HostCopy
from mae.training.lightning_internals import dump_checkpoint
from mae.training.module import Stage
from mae.training.throughput import images_per_step

WARM_UP = 2  # optimiser steps

CUBLAS = ":4096:8"  # what torch wants of cuBLAS before its results repeat


class SaveCLI(PretrainCLI):
    """A pre-training run that is saved now and then, and measured; its checkpoints are removed."""

    command, description = (
        "bench save",
        "What saving costs the training step: steps without it, steps with it, steps while the file is written.",
    )

    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rounds", type=int, default=4, help="So many saves, and as many other steps each.")
        parser.add_argument("--json", type=str | None, default=None, help="Write all figures to this file, too.")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if self.config.rounds < 1:
            raise UserError(f"--rounds {self.config.rounds}: at least 1")
        if self.config.json:
            out_file(self.config.json, "--json")

    def finish(self) -> None:
        """No weights."""


class Rounds(Callback):
    """Steps without saving; one with it; those while the file is written; and some under deterministic algorithms.

    The first save takes the memory for its copy, which later ones use again: it is among the steps with saving.
    """

    KINDS = ("plain", "saving", "writing", "deterministic")

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.KINDS}
        self.clones: list[float] = []
        self.plan = self.steps()

    def steps(self) -> Iterator[str]:
        """What kind the next step is."""
        yield from ["warm-up"] * WARM_UP
        for _ in range(self.rounds):
            yield from ["plain"] * 2
            yield "saving"
            while self.files.busy:
                yield "writing"
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield from ["deterministic"] * 2
            torch.use_deterministic_algorithms(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        files = trainer.strategy.checkpoint_io
        assert isinstance(files, CheckpointFiles)
        self.files = files
        self.kind, self.start = next(self.plan), time.perf_counter()

    def after_step(self, trainer: Trainer, stage: Stage) -> None:
        wait_for(stage.device)
        now = time.perf_counter()
        if self.kind in self.seconds:
            self.seconds[self.kind].append(now - self.start)
        # A save is a part of the step that follows it, as in training.
        try:
            self.kind = next(self.plan)
        except StopIteration:
            self.clones = [self.clone(trainer) for _ in range(3)]
            trainer.should_stop = True
            return
        self.start = time.perf_counter()
        if self.kind == "saving":
            trainer.save_checkpoint(step_file(trainer.default_root_dir, trainer.global_step), weights_only=False)

    def clone(self, trainer: Trainer) -> float:
        """Seconds to copy the state to new memory of the host."""
        state = dump_checkpoint(trainer)
        wait_for(trainer.strategy.root_device)
        start = time.perf_counter()
        HostCopy().take(state)
        return time.perf_counter() - start


def save_command(args: Sequence[str]) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)
    with tempfile.TemporaryDirectory() as folder:
        given = any(arg.split("=")[0] == "--run_dir" for arg in args)
        forced = [
            *(() if given else (f"--run_dir={folder}",)),
            *("--ckpt_path=null", "--trainer.logger=false", "--trainer.limit_val_batches=0"),
            *("--trainer.enable_progress_bar=false", "--trainer.max_epochs=1000000", "--trainer.max_steps=-1"),
            *("--checkpoint.keep=1", "--trainer.deterministic=false"),
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
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Panels | Online | Checkpoints)] + [rounds]  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        cli.fit()
    files = rounds.files
    files.wait()
    size = max(path.stat().st_size for path in cli.run_dir.glob("checkpoints/step_*.ckpt"))
    kinds = {kind: figure(seconds) for kind, seconds in rounds.seconds.items() if seconds}
    clone, plain, saving = figure(rounds.clones), kinds["plain"], kinds["saving"]
    bound = plain.high + 1.5 * clone.median
    batch = images_per_step(trainer)
    print(f"checkpoint     {size / 1e6:,.0f} MB; written in {figure(files.seconds)} s; seconds below: median (range)")
    print(f"clone of it    {clone}, in memory")
    print(f"step           {plain}, batch {batch}")
    verdict = "within it" if saving.high <= bound else "OVER it"
    print(f"with a save    {saving}; the bound, worst without + 1.5 clones, is {bound:.2f}: {verdict}")
    if "writing" in kinds:
        print(f"while writing  {kinds['writing']}, {kinds['writing'].median / plain.median:.2f} times a step")
    else:
        print("while writing  the file was written before the step with the save was over")
    deterministic = kinds["deterministic"]
    print(f"deterministic  {deterministic}, {deterministic.median / plain.median:.2f} times a step", flush=True)
    return {
        "machine": machine(trainer.strategy.root_device),
        "batch": batch,
        "bytes": size,
        "clone": clone,
        "write": figure(files.seconds),
        "bound": bound,
        **kinds,
    }
