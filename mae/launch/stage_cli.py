"""The command line of a training run: its settings, and the objects that are built from them."""

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mae.callbacks.checkpointing import Checkpoints
from mae.callbacks.liveness import Alive
from mae.callbacks.metrics_csv import MetricsCSV
from mae.callbacks.progress_bar import Progress
from mae.callbacks.wandb_logger import RunLogger
from mae.callbacks.wandb_settings import WandbSettings
from mae.data.datamodule import ImageData
from mae.errors import TrainingFailed, UserError
from mae.launch import out_of_memory, own_class
from mae.launch.resume import ResumePoint
from mae.launch.run_errors import translated_errors
from mae.launch.run_folder import RunFolder
from mae.launch.stage_parser import StageParser
from mae.launch.trainer_settings import check_callbacks, check_trainer_settings, set_ddp_options
from mae.options import check_ranges, require_utf8, run_name
from mae.runtime import checkpoint_files, signals
from mae.runtime.environment import is_first_rank, torchrun_sizes
from mae.runtime.files import atomic_write
from mae.runtime.memory import is_out_of_memory
from mae.runtime.run_lock import RunLock
from mae.training import precision
from mae.training.checkpoint_io import CheckpointFiles
from mae.training.fsdp import FSDP2
from mae.training.module import Stage, own_arguments

HURRY_SECONDS = 5.0  # for W&B's last uploads when a run is stopped; the next start sends what is missing


class StageCLI(LightningCLI):
    """The settings and objects of a training run; `fit` runs it. Each stage has a subclass with fixed classes."""

    command: str
    description: str
    stage: type[Stage]
    data: type[ImageData]
    epochs: int  # of the paper

    def __init__(self, args: Sequence[str]):
        args = own_class.with_class_options(args)
        self.stage = own_class.resolve(args, "model_class", self.stage)
        self.data = own_class.resolve(args, "data_class", self.data)
        try:
            super().__init__(
                self.stage,
                self.data,
                save_config_callback=None,
                trainer_defaults={
                    "max_epochs": self.epochs,
                    "log_every_n_steps": 50,
                    "use_distributed_sampler": False,  # ours divides the steps itself
                    "num_sanity_val_steps": 0,
                    "enable_model_summary": False,
                },
                seed_everything_default=0,
                parser_kwargs={"prog": f"mae {self.command}", "description": self.description},
                parser_class=StageParser,
                args=list(args),
                run=False,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except BaseException as error:
            if hasattr(self, "lock"):
                self.lock.release()
            if is_out_of_memory(error):
                raise UserError("out of memory before training: the network and the data do not fit") from None
            raise

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of weights, order and all that is random."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder; runs/ + the config's name.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="`last`: go on with the run in run_dir; or a .ckpt file."
        )
        for key in ("model", "data"):
            parser.add_argument(
                f"--{key}_class",
                type=str | None,
                default=None,
                help=f"Subclass of the stage's {key} to use, my.module.MyClass; the same as --{key} my.module.MyClass.",
            )
        parser.add_argument(
            "--allow_changes",
            type=bool,
            default=False,
            help="Go on with settings that differ from those of the run in run_dir; each is printed at the start.",
        )
        parser.add_argument(
            "--watchdog_minutes",
            type=float | None,
            default=30,
            help="End a process that has had no batch for so long, with a report of where it hangs; null: never.",
        )
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Precision of float32 matrix products: highest; high (TF32 on NVIDIA GPUs); medium (bfloat16).",
        )
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        for key in ("image_size", "in_chans", "mean", "std"):
            parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            config = parser.parse_args(args)
        except UserError as error:
            # Of the many precisions in Lightning's signature few suit a device: those are named.
            if wrong := re.match(r"--trainer\.precision (\S+): it must be", str(error)):
                precision.check_precision(wrong[1], "")
            raise
        if config.run_dir is None:
            name = run_name(*map(str, config.config)) if config.config else self.command
            config = parser.parse_args([*args, f"--run_dir=runs/{name}"])
        if config.seed_everything < 0:
            raise UserError(f"--seed_everything {config.seed_everything}: wanted is 0 or more")
        if config.trainer.fast_dev_run:
            self.scratch = tempfile.TemporaryDirectory(prefix="mae_fast_dev_run_")
            config.run_dir = self.scratch.name
            if is_first_rank():
                print("fast_dev_run: a few batches of training and validation; nothing is kept of them", flush=True)
        require_utf8(config.run_dir, "--run_dir")
        self.config = config
        self.run_dir = Path(config.run_dir)

    def before_instantiate_classes(self) -> None:
        """Check the settings, take the lock of the run folder, choose the checkpoint; nothing is built yet."""
        config = self.config
        device = precision.device_type(config.trainer.accelerator)
        check_trainer_settings(config.trainer, device)
        check_ranges("", "(0, inf)", watchdog_minutes=config.watchdog_minutes)
        advice = precision.check_precision(config.trainer.precision, device)
        if advice and is_first_rank():
            print(advice, flush=True)
        torch.set_float32_matmul_precision(config.float32_matmul_precision)
        self.lock = RunLock(self.run_dir)
        if is_first_rank():
            self.lock.take()
        self.resume = ResumePoint(self.run_dir, config.ckpt_path, config.allow_changes)
        if self.resume.ended_without_checkpoint:
            self.reject_other_start()

    def reject_other_start(self) -> None:
        """Refuse to start a run that ended before its first checkpoint with other settings than it had."""
        self.resume.reject_other_start(self.merged_settings())

    def merged_settings(self) -> dict[str, Any]:
        """All settings as config.yaml holds them, nested plain types."""
        settings: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config))
        return settings

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Wrong data or weights are an error now, before anything is written or a process is started.
        self.datamodule.own_settings = {key: self.config.data[key] for key in own_arguments(self.datamodule)}
        self.datamodule.setup("fit")
        files = CheckpointFiles(self.config.checkpoint.keep)
        if self.resume.path:
            files.preloaded = self.resume.path, self.resume.load(self.model.architecture())
        else:
            self.start()
        self.metrics = MetricsCSV(self.run_dir / "metrics.csv", self.resume.step)
        files.alongside = [self.metrics.sync]
        settings = self.config_init.trainer
        sharded = settings.strategy == "fsdp2"
        if settings.precision is None:
            kwargs["precision"] = precision.usual_precision(precision.device_type(settings.accelerator), sharded)
        kwargs |= torchrun_sizes()
        if sharded:
            kwargs["strategy"] = FSDP2()
        try:
            return super().instantiate_trainer(
                callbacks=self.make_callbacks(),
                logger=self.make_loggers(),
                plugins=[*as_list(settings.plugins), files],
                default_root_dir=str(self.run_dir),
                **kwargs,
            )
        except UserError:
            raise
        except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
            raise UserError(f"--trainer: {error}") from None

    def make_loggers(self) -> list[Logger]:
        """metrics.csv; W&B and those of the settings, unless `--trainer.logger false`."""
        loggers: list[Logger] = [self.metrics]
        configured = self.config_init.trainer.logger
        if configured is False:
            return loggers
        loggers.append(RunLogger(self.run_dir, WandbSettings(**self.config.wandb.as_dict())))
        return loggers if configured is True else loggers + as_list(configured)

    def make_callbacks(self) -> list[Callback]:
        """Those of the settings, and those that every run has; checkpoints and pictures have settings of their own."""
        callbacks = as_list(self.config_init.trainer.callbacks)
        check_callbacks(callbacks, self.model, self.datamodule, self.config.trainer.limit_val_batches)
        if self.config_init.trainer.enable_progress_bar is not False:
            callbacks.append(Progress())
        self.alive = Alive(self.lock, self.config.watchdog_minutes)
        return [*callbacks, self.alive, RunFolder(self.resume, self.metrics, self.write_config, self.start_recording)]

    def start(self) -> None:
        """What a run that is not resumed does first."""

    def finish(self) -> None:
        """What is left in the run folder when training ends; called on every rank."""
        raise NotImplementedError

    def fit(self) -> None:
        """Train to the end and export the weights.

        Raises:
            Stopped: After a signal, once the run is saved.
            KeyboardInterrupt: After a second Ctrl-C.
        """
        with signals.noted():
            try:
                self.check_start()
                with translated_errors(self.trainer, self.resume.hint, self.out_of_memory_message):
                    self.train()
            finally:
                self.clean_up()

    def check_start(self) -> None:
        """What can only be checked once the trainer is there.

        Raises:
            UserError: The run would be another one than that in the run folder, or cannot start like this.
        """
        trainer = self.trainer
        self.resume.keep_global_batch(self.model, trainer, self.datamodule)
        self.resume.reject_other_recipe(self.model.settings(trainer, self.datamodule))
        if isinstance(trainer.strategy, DDPStrategy):
            set_ddp_options(trainer.strategy, trainer.accumulate_grad_batches)
        self.available_memory = out_of_memory.available_memory(trainer.strategy.root_device, trainer.num_devices)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_here = isinstance(environment, LightningEnvironment)
        if started_here and trainer.num_nodes > 1 and "NODE_RANK" not in os.environ:
            raise UserError(
                f"--trainer.num_nodes {trainer.num_nodes}: nothing tells this process which node it is on, and it "
                "would wait for the others: start it by srun or torchrun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
            )
        if trainer.local_rank > 0 and started_here:
            signals.die_with_parent()  # the first rank has started this one

    def train(self) -> None:
        path = str(self.resume.path) if self.resume.path else None
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        if self.config.trainer.fast_dev_run:
            return
        try:
            self.finish()
        except OSError as error:
            where = error.filename or self.run_dir
            raise TrainingFailed(f"{where}: {error.strerror}; {self.resume.hint()}") from None
        for logger in self.wandb_loggers():
            logger.complete()
            logger.finish()

    def out_of_memory_message(self) -> str:
        checkpointing = self.config.model.get("activation_checkpointing")
        text = out_of_memory.message(self.trainer, self.model, self.datamodule, self.available_memory, checkpointing)
        if not checkpoint_files.saved(self.run_dir):
            return text
        # Where results depend on how a step is divided among devices, another division is a change.
        changes = "" if self.model.elastic else " --allow_changes true"
        return f"{text}; --ckpt_path last{changes} goes on from the last checkpoint"

    def clean_up(self) -> None:
        """End what runs beside the training, whether it has come to its end or not."""
        self.alive.stop()
        for logger in self.wandb_loggers():
            logger.finish(HURRY_SECONDS)
        self.lock.release()

    def start_recording(self) -> None:
        """Begin the run in W&B, once nothing can be refused any more."""
        resumed_at = self.resume.step if self.resume.started_before else None
        for logger in self.wandb_loggers():
            logger.start(self.merged_settings(), resumed_at, self.metrics.rows)

    def wandb_loggers(self) -> list[RunLogger]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, RunLogger)]

    def write_config(self) -> None:
        """Write config.yaml, whole or not at all."""
        with atomic_write(self.run_dir / "config.yaml") as partial:
            self.parser.save(self.config, str(partial), overwrite=True, multifile=False)


def as_list(value: Any) -> list[Any]:
    """A setting that may be one value, several or none, as a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
