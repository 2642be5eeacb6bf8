"""A run: its settings, its folder, its loggers, its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae import checkpoint
from mae.callbacks import Checkpoints, MetricsCSV, Panels, Progress
from mae.data import ImageData
from mae.errors import TrainingFailed, UserError
from mae.model import MaskedAutoencoder
from mae.pretrain import Pretrain, last_checkpoint
from mae.tracking import WandbSettings, wandb_logger


def is_first_rank() -> bool:
    """Of all processes of the run, known from the launcher's environment before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


class OneLineErrors:
    """Parser errors become UserErrors, instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message)


class StageParser(OneLineErrors, LightningArgumentParser):
    pass


class ToolParser(OneLineErrors, ArgumentParser):
    pass


# Settings of Lightning that would break the promise of what an epoch is, and the one value they may have.
WHOLE_STEPS_ONLY = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "use_distributed_sampler": False,
}


class PretrainCLI(LightningCLI):
    """Settings and objects of a pre-training run; `fit` runs it."""

    def __init__(self, args: Sequence[str]):
        super().__init__(
            Pretrain,
            ImageData,
            save_config_callback=None,
            trainer_defaults={
                "max_epochs": 800,
                "log_every_n_steps": 50,
                "use_distributed_sampler": False,  # ours divides the steps itself
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_kwargs={"prog": "mae pretrain", "description": "MAE pre-training (arXiv:2111.06377)."},
            parser_class=StageParser,
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, order, crops and masks.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder; runs/ + the config's name.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="`last`: go on with the run in run_dir; or a .ckpt file."
        )
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Panels, "panels")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        config = parser.parse_args(args)
        if config.run_dir is None:
            name = Path(str(config.config[0])).stem if config.config else "pretrain"
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
        if self.config.trainer.enable_checkpointing is False:
            raise UserError(
                "--trainer.enable_checkpointing: every run keeps one; --checkpoint.every_n_epochs says how often"
            )
        for key in ("accumulate_grad_batches", "log_every_n_steps"):
            if (number := self.config.trainer[key]) is not None and number < 1:
                raise UserError(f"--trainer.{key} {number}: at least 1")
        existing = last_checkpoint(self.run_dir)
        self.ckpt_path = self.config.ckpt_path
        if self.ckpt_path == "last":
            self.ckpt_path = str(existing) if existing.exists() else None
        elif self.ckpt_path is not None and not Path(self.ckpt_path).is_file():
            raise UserError(f"--ckpt_path {self.ckpt_path} does not exist; `last` goes on with the run in --run_dir")
        elif self.ckpt_path is None and existing.exists():
            raise UserError(
                f"{self.run_dir} holds a run; add --ckpt_path last to go on with it, or give another --run_dir"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Wrong data or weights are an error now, before anything is written or a process is started.
        self.datamodule.setup("fit")
        self.resumed_recipe: dict[str, Any] = {}
        if self.ckpt_path:
            self.resumed_recipe = checkpoint.require_resumable(Path(self.ckpt_path), self.network)
        elif self.config.model.init:
            said = checkpoint.warm_start(self.network, self.config.model.init)
            if is_first_rank():
                print(said, flush=True)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--run_dir {self.run_dir} cannot be made: {error.strerror}") from None
        given = self.config_init.trainer
        loggers: list[Logger] = [MetricsCSV(self.run_dir / "metrics.csv")]
        if given.logger is not False:
            settings = WandbSettings(**self.config.wandb.as_dict())
            merged = yaml.safe_load(self.parser.dump(self.config))
            if wandb := wandb_logger(self.run_dir, settings, merged):
                loggers.append(wandb)
            if given.logger not in (None, True):
                loggers += given.logger if isinstance(given.logger, list) else [given.logger]
        if given.precision is None:
            kwargs["precision"] = "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 32
        callbacks = list(given.callbacks or [])
        if given.enable_progress_bar is not False:
            callbacks.append(Progress())
        try:
            return super().instantiate_trainer(
                callbacks=callbacks, logger=loggers, default_root_dir=str(self.run_dir), **kwargs
            )
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"--trainer: {error}") from None

    @property
    def network(self) -> MaskedAutoencoder:
        network: MaskedAutoencoder = self.model.model
        return network

    def fit(self) -> None:
        """Train to the end and export the weights.

        Raises:
            KeyboardInterrupt: After Ctrl-C, which Lightning turns into exit code 1.
        """
        trainer = self.trainer
        self.refuse_another_recipe()
        if is_first_rank():
            self.parser.save(self.config, str(self.run_dir / "config.yaml"), overwrite=True, multifile=False)
        try:
            trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path, weights_only=True)
        except MisconfigurationException as error:
            raise UserError(f"--trainer: {error}") from None
        except SIGTERMException:
            raise SystemExit(143) from None
        except SystemExit:
            if trainer.interrupted:
                kept = last_checkpoint(self.run_dir)
                hint = f"--ckpt_path last goes on from {kept}" if kept.is_file() else "there is no checkpoint yet"
                print(f"stopped at step {trainer.global_step}; {hint}", flush=True)
                raise KeyboardInterrupt from None
            raise
        except (UserError, TrainingFailed):
            # Every rank ends by itself with this error. Lightning's observer would kill this one, half-way through its
            # last words, as soon as it sees another gone.
            getattr(trainer.strategy.launcher, "procs", []).clear()
            raise
        if self.trainer.is_global_zero:
            for path in checkpoint.export(self.network, self.model.description(), self.run_dir):
                print(f"wrote {path}", flush=True)

    def refuse_another_recipe(self) -> None:
        """Going on with other settings would be another run under the same name."""
        trainer, data = self.trainer, self.datamodule
        effective_batch = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        own = self.model.settings(data, effective_batch)
        for key, given in self.resumed_recipe.items():
            if own[key] != given:
                raise UserError(
                    f"{key} is {own[key]}, but {given} in the run that {self.ckpt_path} belongs to; "
                    "another --run_dir starts a new one"
                )
