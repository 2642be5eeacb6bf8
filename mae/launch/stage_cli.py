"""A run: its settings, its folder, its loggers, its end."""

import atexit
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mae.callbacks.checkpointing import Checkpoints
from mae.callbacks.liveness import Alive
from mae.callbacks.metrics_csv import MetricsCSV
from mae.callbacks.progress_bar import Progress
from mae.callbacks.wandb_logger import Resumed, RunLogger, WandbSettings, wandb_logger
from mae.data.datamodule import ImageData
from mae.data.datasets import worker_death_message
from mae.errors import LoaderDied, PeerLost, Stopped, TrainingFailed, UserError
from mae.launch import out_of_memory as out_of_memory_module
from mae.launch.stage_parser import StageParser
from mae.options import flatten_settings, run_name
from mae.runtime import checkpoint_files, signals
from mae.runtime.environment import is_first_rank, torchrun_sizes
from mae.runtime.memory import GIB, is_out_of_memory
from mae.runtime.processes import end_loaders, lost_peer
from mae.runtime.run_lock import RunLock
from mae.runtime.storage import sync
from mae.training import precision
from mae.training.checkpoint_io import CheckpointFiles
from mae.training.fsdp import FSDP2
from mae.training.module import Stage
from mae.weights import load

# Settings that a run may change when it is started again: where and how it runs and is watched, not what it learns. The
# effective batch has a check of its own.
FREE = (
    *("allow_changes", "cached.", "checkpoint.", "ckpt_path", "config", "online.", "panels.", "run_dir", "wandb."),
    *("data.batch_size_per_device", "data.download", "data.max_bad_images", "data.num_workers", "data.root"),
    *("data.train_dir", "data.val_dir", "model.activation_checkpointing", "model.compile", "model.cuda_graphs"),
    *("trainer.accelerator",),
    *("trainer.accumulate_grad_batches", "trainer.callbacks", "trainer.default_root_dir", "trainer.devices"),
    *("trainer.enable_", "trainer.log_every_n_steps", "trainer.logger", "trainer.max_epochs", "trainer.max_steps"),
    *("trainer.num_nodes", "trainer.plugins", "trainer.profiler", "trainer.strategy", "watchdog"),
)


HURRY_SECONDS = 5.0  # for W&B's last uploads where a run is stopped; the next start sends what is missing


# Settings of Lightning that would break the promise of what an epoch is, and the one value they may have.
WHOLE_STEPS_ONLY = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "use_distributed_sampler": False,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "val_check_interval": 1.0,
}


class StageCLI(LightningCLI):
    """Settings and objects of a training run; `fit` runs it. One subclass a stage, each with fixed classes."""

    command: str
    description: str
    stage: type[Stage]
    data: type[ImageData]
    epochs: int  # of the paper

    def __init__(self, args: Sequence[str]):
        try:
            self.parse_and_build(args)
        except BaseException as error:
            if hasattr(self, "lock"):
                self.lock.release()
            if is_out_of_memory(error):
                raise UserError("out of memory before training: the network and the data do not fit") from None
            raise

    def parse_and_build(self, args: Sequence[str]) -> None:
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

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of weights, order and all that is random."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder; runs/ + the config's name.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="`last`: go on with the run in run_dir; or a .ckpt file."
        )
        parser.add_argument(
            "--allow_changes",
            type=bool,
            default=False,
            help="Go on with settings that differ from those of the run in run_dir; they are said at the start.",
        )
        parser.add_argument(
            "--watchdog_minutes",
            type=float | None,
            default=30,
            help="A process without a batch for so long says where it stands, and ends; null: never.",
        )
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Of products of float32 matrices: highest; high, by TF32 on NVIDIA GPUs; medium, by bfloat16.",
        )
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            config = parser.parse_args(args)
        except UserError as error:
            if said := re.search(r'"trainer\.precision".* Given value: (\S+)', str(error), re.DOTALL):
                precision.check_precision(said[1], "")
            raise
        if config.run_dir is None:
            name = run_name(str(config.config[0])) if config.config else self.command
            config = parser.parse_args([*args, f"--run_dir=runs/{name}"])
        if config.seed_everything < 0:
            raise UserError(f"--seed_everything {config.seed_everything}: wanted is 0 or more")
        self.config = config
        self.run_dir = Path(config.run_dir)

    def before_instantiate_classes(self) -> None:
        """What can be wrong with the settings and the run folder is said before anything is built."""
        for key, usual in WHOLE_STEPS_ONLY.items():
            # As text: 1 is one batch, 1.0 is all of them.
            if str(value := self.config.trainer[key]) not in ("None", str(usual)):
                raise UserError(f"--trainer.{key} {value} would cut or repeat epochs; shorten with --trainer.max_steps")
        if str(limit := self.config.trainer.limit_val_batches) not in ("None", "1.0", "0", "0.0"):
            raise UserError(
                f"--trainer.limit_val_batches {limit} would judge by the first held-out images only; 0 leaves it out"
            )
        if self.config.trainer.enable_checkpointing is False:
            raise UserError(
                "--trainer.enable_checkpointing: every run keeps one; --checkpoint.every_n_epochs says how often"
            )
        for key in ("accumulate_grad_batches", "log_every_n_steps"):
            if (number := self.config.trainer[key]) is not None and number < 1:
                raise UserError(f"--trainer.{key} {number}: at least 1")
        trainer = self.config.trainer
        said = precision.check_precision(trainer.precision, precision.device_type(trainer.accelerator))
        if said and is_first_rank():
            print(said, flush=True)
        torch.set_float32_matmul_precision(self.config.float32_matmul_precision)
        if (minutes := self.config.watchdog_minutes) is not None and not minutes > 0:
            raise UserError(f"--watchdog_minutes {minutes}: above 0, or null")
        self.lock = RunLock(self.run_dir)
        if is_first_rank():
            self.lock.take()
        self.ckpt_path = self.resumed_from()
        self.begun = (self.run_dir / "config.yaml").exists()
        if self.begun and not checkpoint_files.saved(self.run_dir):
            self.refuse_another_start()

    def resumed_from(self) -> Path | None:
        """The checkpoint to go on from."""
        given = self.config.ckpt_path
        if given is None:
            if checkpoint_files.saved(self.run_dir):
                raise UserError(
                    f"{self.run_dir} holds a run; add --ckpt_path last to go on with it, or give another --run_dir"
                )
            return None
        if given != "last":
            path = Path(given)
            if not path.is_file():
                raise UserError(f"--ckpt_path {path} does not exist; `last` goes on with the run in --run_dir")
            if path.suffix != ".safetensors" and (wrong := checkpoint_files.damage(path)):
                raise UserError(f"--ckpt_path {path} is damaged: {wrong}")
            return path
        found, complaints = checkpoint_files.newest(self.run_dir)
        for complaint in complaints if is_first_rank() else ():
            print(f"mae: warning: {complaint}", flush=True)
        return found

    def refuse_another_start(self) -> None:
        """A run that ended before its first checkpoint left its settings: others would be another run.

        Raises:
            UserError: They differ, or the run has had checkpoints.
        """
        path = self.run_dir / "config.yaml"
        before, now = yaml.safe_load(path.read_text()), yaml.safe_load(self.parser.dump(self.config))
        if not isinstance(before, dict):
            raise UserError(f"{path} holds no settings: remove it, or give another --run_dir")
        if (newest := checkpoint_files.ever_saved(self.run_dir)) and not self.config.allow_changes:
            raise UserError(
                f"{self.run_dir} had checkpoints, the newest {newest}, and has none now: bring them back, or give "
                "another --run_dir; --allow_changes true starts this run over"
            )
        before, now = flatten_settings(before), flatten_settings(now)
        for key in sorted(before.keys() & now.keys()):
            if before[key] != now[key] and not key.startswith(FREE):
                self.differ(key, now[key], before[key], f"{path}, left by a run that ended before its first checkpoint")

    def differ(self, key: str, own: Any, given: Any, where: str) -> None:
        said = f"{key} is {own}, but {given} in {where}"
        if not self.config.allow_changes:
            raise UserError(f"{said}; another --run_dir starts a new run, --allow_changes true goes on all the same")
        if is_first_rank():
            print(f"mae: warning: {said}", flush=True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Wrong data or weights are an error now, before anything is written or a process is started.
        self.datamodule.setup("fit")
        self.resumed: dict[str, Any] = {}
        if self.ckpt_path:
            self.resumed = load.require_resumable(self.ckpt_path, self.model.architecture())
        else:
            self.start()
        given = self.config_init.trainer
        self.metrics = MetricsCSV(self.run_dir / "metrics.csv", self.resumed.get("step", 0))
        loggers: list[Logger] = [self.metrics]
        if given.logger is not False:
            settings = WandbSettings(**self.config.wandb.as_dict())
            merged = yaml.safe_load(self.parser.dump(self.config))
            went_before = Resumed(self.resumed.get("step", 0), self.metrics.rows) if self.begun else None
            if wandb := wandb_logger(self.run_dir, settings, merged, went_before):
                loggers.append(wandb)
            if given.logger not in (None, True):
                loggers += as_list(given.logger)
        if given.precision is None:
            device = precision.device_type(given.accelerator)
            kwargs["precision"] = precision.usual_precision(device, sharded=given.strategy == "fsdp2")
        kwargs |= torchrun_sizes()
        if given.strategy == "fsdp2":
            kwargs["strategy"] = FSDP2()
        callbacks = as_list(given.callbacks)
        if given.enable_progress_bar is not False:
            callbacks.append(Progress())
        self.alive = Alive(self.lock, self.config.watchdog_minutes)
        callbacks.append(self.alive)
        files = CheckpointFiles(self.config.checkpoint.keep)
        files.alongside = [self.metrics.sync]
        plugins = as_list(given.plugins)
        try:
            return super().instantiate_trainer(
                callbacks=callbacks,
                logger=loggers,
                plugins=[*plugins, files],
                default_root_dir=str(self.run_dir),
                **kwargs,
            )
        except (MisconfigurationException, ModuleNotFoundError, ValueError) as error:
            raise UserError(f"--trainer: {error}") from None

    def begin(self) -> None:
        """Change the run folder; not before nothing stands against training any more. All ranks call it.

        Raises:
            UserError: It cannot be written.
        """
        problem = ""
        if self.trainer.is_global_zero:
            try:
                self.write_config()
                self.tidy_up()
                self.metrics.begin()
            except OSError as error:
                problem = f"--run_dir {self.run_dir} cannot be written: {error.filename}: {error.strerror}"
        if problem := self.trainer.strategy.broadcast(problem):
            raise UserError(problem)

    def tidy_up(self) -> None:
        """What a run that was killed, one that is gone back upon, or one that is made longer leaves."""
        for path in checkpoint_files.clear_unfinished(self.run_dir):
            print(f"{path} was being written when the run was killed: removed", flush=True)
        if not self.resumed:
            return
        print(f"goes on from step {self.resumed['step']} ({self.ckpt_path})", flush=True)
        later = checkpoint_files.supersede(self.run_dir, self.resumed["step"])
        if self.resumed["step"] < self.model.total_steps:  # else they would be taken for what comes out in the end
            exports = [self.run_dir / name for name in load.EXPORTS]
            later += [
                path.rename(path.with_name(path.name + checkpoint_files.SUPERSEDED))
                for path in exports
                if path.exists()
            ]
        for path in later:
            print(f"{path.name} is of a later step: kept as *{checkpoint_files.SUPERSEDED}", flush=True)

    def start(self) -> None:
        """What a run that is not resumed does first."""

    def finish(self) -> None:
        """What is left in the run folder when training ends; called on every rank."""
        raise NotImplementedError

    def fit(self) -> None:
        """Train to the end and export the weights.

        Raises:
            KeyboardInterrupt: After Ctrl-C, which Lightning turns into exit code 1.
        """
        trainer = self.trainer
        self.keep_effective_batch()
        self.refuse_another_recipe()
        if isinstance(trainer.strategy, DDPStrategy):
            set_ddp_options(trainer.strategy, trainer.accumulate_grad_batches)
        self.room = out_of_memory_module.room(trainer.strategy.root_device, trainer.num_devices)
        self.model.allow_changes = self.config.allow_changes
        self.model.starts_at, self.model.begin = self.resumed.get("step", 0), self.begin
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.local_rank > 0 and isinstance(environment, LightningEnvironment):
            signals.die_with_parent()  # the first rank has started this one
        with signals.noted():
            try:
                self.train()
            finally:
                self.leave()

    def train(self) -> None:
        trainer, path = self.trainer, str(self.ckpt_path) if self.ckpt_path else None
        try:
            trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
            try:
                self.finish()
            except OSError as error:
                raise TrainingFailed(f"{error.filename or self.run_dir}: {error.strerror}; {self.way_on()}") from None
            for logger in self.trackers():
                logger.complete()
                logger.finish()
        except MisconfigurationException as error:
            raise UserError(f"--trainer: {error}") from None
        except SystemExit:
            if trainer.interrupted:  # by a second Ctrl-C, before the first was obeyed
                raise KeyboardInterrupt from None
            raise
        except (UserError, TrainingFailed, Stopped):
            # Every rank ends by itself with this error. Lightning's observer would kill this one, half-way through its
            # last words, as soon as it sees another gone.
            getattr(trainer.strategy.launcher, "procs", []).clear()
            raise
        except Exception as error:
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # they hold the activations
                raise self.out_of_memory() from None
            if said := worker_death_message(error):
                raise LoaderDied(f"{said}; {self.way_on()}") from None
            if trainer.world_size > 1 and (said := lost_peer(error)):
                raise PeerLost(f"rank {trainer.global_rank}: {said}; {self.way_on()}") from None
            raise

    def out_of_memory(self) -> UserError:
        """What to say where a device has no memory left, by the rank that it has happened to."""
        trainer, model, batch = self.trainer, self.model, self.datamodule.batch_size
        accumulate, device = trainer.accumulate_grad_batches, trainer.strategy.root_device
        getattr(trainer.strategy.launcher, "procs", []).clear()  # as for other errors that are told
        fits = out_of_memory_module.largest_batch(
            model.model,
            (self.datamodule.in_chans, *self.datamodule.image_size),
            getattr(model, "mask_ratio", None),
            self.room,
            trainer.precision,
            device.type,
            devices=trainer.world_size,
            averaged=getattr(model, "ema", None) is not None,
        )
        checkpointing = self.config.model.get("activation_checkpointing")
        said = (
            f"out of memory with {batch} images a device ({device}, {self.room / GIB:.1f} GiB): "
            + out_of_memory_module.way_out(batch, accumulate, fits, checkpointing)
        )
        if checkpoint_files.saved(self.run_dir):
            # Where the division of a step counts, another is a change.
            changed = "" if model.elastic else " --allow_changes true"
            said += f"; --ckpt_path last{changed} goes on from the last checkpoint"
        if trainer.global_rank and not is_first_rank():
            print(f"mae: error: rank {trainer.global_rank}: {said}", file=sys.stderr, flush=True)
        return UserError(said)

    def leave(self) -> None:
        """Whatever has happened."""
        self.alive.stop()
        for logger in self.trackers():
            logger.finish(HURRY_SECONDS)
        atexit.register(end_loaders)
        self.lock.release()

    def trackers(self) -> list[RunLogger]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, RunLogger)]

    def way_on(self) -> str:
        if checkpoint_files.saved(self.run_dir):
            return "--ckpt_path last goes on from the last checkpoint"
        return "there is no checkpoint yet, the same command starts anew"

    def write_config(self) -> None:
        unfinished = self.run_dir / "config.yaml.partial"
        self.parser.save(self.config, str(unfinished), overwrite=True, multifile=False)
        sync(unfinished)
        unfinished.replace(self.run_dir / "config.yaml")

    def keep_effective_batch(self) -> None:
        """With more or fewer devices than before, a run goes on with as many images a step, in the same order."""
        trainer, data = self.trainer, self.datamodule
        before = self.resumed.get("devices")
        if not self.model.elastic or before in (None, trainer.world_size):
            return
        images = self.resumed["recipe"]["effective batch"]
        batch, world = data.batch_size, trainer.world_size
        if batch * world * trainer.accumulate_grad_batches == images:
            return
        if images % world:
            raise UserError(
                f"{images} images a step, as before, cannot be divided among {world} devices: use another number"
            )
        # As few micro-batches as the memory for `batch` images allows.
        accumulate = next(n for n in range(1, images + 1) if images % (n * world) == 0 and images <= n * world * batch)
        data.batch_size, trainer.accumulate_grad_batches = images // (accumulate * world), accumulate
        if is_first_rank():
            print(
                f"{world} devices instead of {before}: {data.batch_size} images a device x {accumulate} accumulated, "
                f"so that a step has {images} images as before",
                flush=True,
            )

    def refuse_another_recipe(self) -> None:
        """Going on with other settings would be another run under the same name."""
        own = self.model.settings(self.trainer, self.datamodule)
        for key, given in self.resumed.get("recipe", {}).items():
            if own.get(key) != given:
                self.differ(key, own.get(key), given, f"the run that {self.ckpt_path} belongs to")


def set_ddp_options(strategy: DDPStrategy, accumulate: int) -> None:
    """What DDP need not do for our networks, unless the settings of the strategy say otherwise.

    Raises:
        UserError: They ask for what torch cannot do.
    """
    given = strategy._ddp_kwargs
    if given.get("static_graph") and accumulate > 1:
        raise UserError(
            f"--trainer.strategy: static_graph true does not go with --trainer.accumulate_grad_batches {accumulate}: "
            "leave it out"
        )
    given.setdefault("gradient_as_bucket_view", True)  # no second copy of the gradients
    given.setdefault("find_unused_parameters", False)
    # A step without exchange among others is another graph.
    given.setdefault("static_graph", accumulate == 1 and not given["find_unused_parameters"])


def as_list(given: Any) -> list[Any]:
    """Of what may be given once, several times or not at all."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
