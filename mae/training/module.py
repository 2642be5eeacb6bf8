"""What every training run shares: the way of an optimiser step, the schedule, and what a checkpoint says of the run.

A stage (pre-training, probe, fine-tuning) is a subclass with its network, its loss and its optimiser.
"""

import inspect
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data.datamodule import DEFAULTS, ImageData
from mae.data.datasets import Batch
from mae.data.sampling import EpochSampler
from mae.errors import UserError
from mae.models.compilation import Choice
from mae.models.flops import training_flops
from mae.options import check_ranges
from mae.runtime import memory
from mae.runtime.checkpoint_files import FORMAT
from mae.runtime.processes import all_reduce
from mae.training import lightning_internals, recipe_audit
from mae.training.checkpoint_io import CheckpointFiles
from mae.training.fsdp import shard, whole
from mae.training.optim import WarmupCosine, scaled_lr
from mae.training.plain_batch import describe, to_batch
from mae.training.recipe_text import report_recipe
from mae.training.step_metrics import StepMetrics
from mae.training.throughput import images_per_step
from mae.training.warm_up_pass import compile_network, warm_up_ddp_buckets


@runtime_checkable
class BeforeFirstStep(Protocol):
    """A callback with something to do once every check has passed, before the first step and any resumed validation."""

    def before_first_step(self, trainer: Trainer, stage: "Stage") -> None: ...


@runtime_checkable
class AfterStep(Protocol):
    """A callback with something to do at the end of an optimiser step, when its row is written."""

    def after_step(self, trainer: Trainer, stage: "Stage") -> None: ...


class Stage(LightningModule):
    """A training run of `self.model`, counted in optimiser steps.

    It runs under a plain `lightning.Trainer` with any DataLoader (see `training.plain_batch.to_batch`), or under the
    command line, which adds exact resume, the run folder and W&B's continuity: then `exact` is True, the place in the
    run is its number of optimiser steps, and Lightning's own limits and signal handlers are off.

    Subclasses set `model` and implement `make_optimizer`, `expected_groups`, `architecture`, `describe` and a
    `training_step` that returns `mean_loss(...)` of what `to_batch` gives.

    Args:
        base_lr: Peak learning rate for 256 images an optimiser step.
        weight_decay: Of the optimiser.
        warmup_epochs: Linear warm-up from 0, in epochs; cut to a tenth of the run where the run is not longer.
        min_lr: Learning rate at the end of the cosine.
        seed: Of masks, mixing and drop path.
        mean: Of each channel in [0, 1], by which integer images are normalised; None: ImageNet's for 3 channels.
        std: As mean.
    """

    model: nn.Module
    recipe_keys: tuple[str, ...] = ()  # attributes that a resumed run must not change, besides those all stages share
    elastic = True  # a global batch gives the same gradients however it is divided among devices

    def __init__(
        self,
        base_lr: float,
        weight_decay: float,
        warmup_epochs: float,
        min_lr: float,
        seed: int,
        compile: Choice = False,
        cuda_graphs: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__()
        lightning_internals.save_arguments(self)
        if cuda_graphs and compile is False:
            raise UserError("--model.cuda_graphs true needs --model.compile auto or true")
        check_ranges(
            "model", "[0, inf)", base_lr=base_lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, min_lr=min_lr
        )
        self.compile_choice, self.cuda_graphs = compile, cuda_graphs
        self.base_lr, self.weight_decay, self.warmup_epochs, self.min_lr = base_lr, weight_decay, warmup_epochs, min_lr
        self.seed, self.mean, self.std = seed, mean, std
        self.batch_size_per_device: int | None = None  # for a DataLoader that does not say it
        self.step_metrics = StepMetrics()
        self.first_batch_shown = False
        self.gradients_checked = False
        self.resumed_at: int | None = None  # the optimiser step of the checkpoint that the run goes on from

    # ---- what a subclass says of itself ----------------------------------------------------------------------------

    def make_optimizer(self, lr: float) -> Optimizer:
        """The optimiser of the recipe at its peak rate; a group's `lr_scale` multiplies the schedule."""
        raise NotImplementedError

    def expected_groups(self) -> recipe_audit.ExpectedGroups:
        """What the settings promise about parameter groups and blocks; the run stops if the real ones differ."""
        raise NotImplementedError

    def architecture(self) -> dict[str, Any]:
        """Plain types: what a checkpoint must share with this network to be resumed."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Plain types that are stored with the weights, besides what all stages store."""
        raise NotImplementedError

    def metric_names(self) -> list[str]:
        """The metrics that callbacks can watch: those of steps, and of held-out images, which begin with val/."""
        mfu = ["mfu"] if torch.cuda.is_available() else []
        return ["train/loss", "val/loss", *self.step_metrics.NAMES, *mfu]

    def recipe_notes(self) -> dict[str, str]:
        """Lines of the printed recipe that belong to this stage alone, by their first word."""
        return {}

    def loss_for_flops(self, network: Callable[..., Any], images: Tensor) -> Tensor:
        """A differentiable output of `network` that takes as much work as the loss of these images, to count FLOP."""
        out: Tensor = network(images)
        return out

    # ---- what a batch is -------------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the network's images."""
        config = self.architecture()
        height, width = config["image_size"]
        return config["in_chans"], height, width

    @property
    def statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and std of each channel in [0, 1]; of the data module where there is one that has them."""
        data = getattr(lightning_internals.attached_trainer(self), "datamodule", None)
        if isinstance(data, ImageData) and data.mean is not None:
            return data.mean, data.std
        if self.mean is None and self.std is None and self.image_shape[0] == 3:
            return DEFAULTS["folder"].mean, DEFAULTS["folder"].std
        return self.mean, self.std

    def to_batch(self, batch: Any, batch_idx: int) -> Batch:
        """The batch that a step works on, from what the DataLoader gave; a `Batch` stays as it is."""
        if isinstance(batch, Batch):
            return batch
        made = to_batch(batch, self.image_shape, *self.statistics)
        if not self.first_batch_shown and self.trainer.is_global_zero:
            print(describe(batch, made.images), flush=True)
        self.first_batch_shown = True
        return made._replace(images=made.images.to(self.dtype))

    # ---- before the first step -------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether the command line runs this: the place in the run is its optimiser step, not Lightning's loops."""
        trainer = self.trainer
        return isinstance(trainer.strategy.checkpoint_io, CheckpointFiles) and not trainer.fast_dev_run  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        trainer = self.trainer
        # Now, because the network may be spread over processes later.
        self.flops = training_flops(self.model, self.loss_for_flops, *self.image_shape)
        if not self.exact:
            return
        # When validation is due follows from the step alone, wherever in an epoch the run was started.
        lightning_internals.validate_when(trainer, self.validation_due)
        lightning_internals.disable_signal_handling(trainer)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        per_epoch = self.steps_per_epoch = self.count_steps_per_epoch()
        # Lightning's estimate would start the loader now, before a resumed run knows its place.
        limits = [trainer.max_steps, (trainer.max_epochs or -1) * per_epoch]
        if max(limits) < 0:
            raise UserError("the run has no end: set --trainer.max_epochs or --trainer.max_steps")
        steps = self.total_steps = min(limit for limit in limits if limit >= 0)
        if self.exact:
            lightning_internals.remove_limits(trainer)
        warmup = self.warmup_epochs * per_epoch
        # warmup_epochs itself where it holds: the reference's order of operations, to the last bit
        epochs = self.warmup_epochs
        if warmup >= steps > 0:
            if trainer.is_global_zero:
                print(
                    f"mae: warning: the warm-up of {self.warmup_epochs:g} epochs is {warmup:g} optimiser steps and the "
                    f"run has {steps}: shortened to {steps // 10}",
                    flush=True,
                )
            warmup = steps // 10
            epochs = warmup / per_epoch
        self.warmup_steps = warmup
        optimizer = self.make_optimizer(self.peak_lr)
        self.schedule = WarmupCosine(optimizer, per_epoch, steps / per_epoch, epochs, self.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    def count_steps_per_epoch(self) -> int:
        """Optimiser steps an epoch, of our data module or of any loader.

        Raises:
            UserError: The loader has no length, so that an epoch has none.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageData) and self.exact:
            return data.train_sampler().steps_per_epoch
        batches = lightning_internals.training_batches(self.trainer)
        if math.isinf(batches):
            raise UserError(
                "the training DataLoader has no length, so an epoch is no number of steps, which the learning rate "
                "needs: set limit_train_batches=N of the Trainer, the batches of an epoch"
            )
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    @property
    def fused(self) -> bool:
        """Whether the optimiser is fused: such a one unscales fp16 gradients itself, and Lightning cannot clip them."""
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return not (mixed and self.trainer.gradient_clip_val)

    @property
    def peak_lr(self) -> float:
        return scaled_lr(self.base_lr, images_per_step(self.trainer))

    @property
    def tolerates_bad_images(self) -> bool:
        return bool(getattr(self.trainer.datamodule, "max_bad_images", 0))  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        recipe_audit.check(self.model, optimizer, self.schedule, self.expected_groups())
        self.group_settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self.trainer.is_global_zero:
            folder = self.trainer.default_root_dir if self.exact else None
            report_recipe(
                self.trainer, self.model, self.schedule, self.base_lr, self.flops, self.recipe_notes(), folder
            )

    def on_train_start(self) -> None:
        if self.device.type == "cpu":
            memory.keep_freed_memory()
        self.open_window()
        work = self.flops * images_per_step(self.trainer) * self.total_steps
        compile_network(self, self.model, self.compile_choice, self.cuda_graphs, work)
        warm_up_ddp_buckets(self)
        self.open_window()
        self.step_metrics.start(self.trainer, self.schedule, self.flops)
        # A resumed optimiser comes back with its old settings, and the rates of its old schedule.
        groups = self.trainer.optimizers[0].param_groups
        for group, settings, rate in zip(groups, self.group_settings, self.schedule.get_lr(), strict=True):
            group.update(settings, lr=rate)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BeforeFirstStep):
                callback.before_first_step(self.trainer, self)
        if self.resumed_at is not None and self.at_epoch_end:
            # The run was stopped after the last step of an epoch, and what follows such a step is still to be done.
            lightning_internals.finish_epoch(self.trainer, validate=self.validation_due())
            self.step_metrics.restart_clock()
        self.closed_at = self.global_step
        if self.exact and self.global_step >= self.total_steps:
            self.trainer.should_stop = True

    # ---- one step: hooks in the order in which Lightning calls them, each followed by its helpers ----------------

    def on_train_epoch_start(self) -> None:
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, EpochSampler):
            sampler.seek(self.global_step)
        assert self.step_metrics.data_wait is not None
        self.step_metrics.data_wait.batch_wanted()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training and self.step_metrics.data_wait is not None:
            self.step_metrics.data_wait.batch_came()
        return batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def open_window(self) -> None:
        """Start an accumulation window: no loss yet, and no readable images."""
        self.window_loss = torch.zeros((), device=self.device)
        self.window_weight = torch.zeros((), device=self.device)  # share of its slots that are readable, of this rank

    def mean_loss(self, per_image: Tensor, batch: Batch, weight: Tensor | None = None) -> Tensor:
        """The loss of a micro-batch; unreadable images have weight 0 and are counted. `training_step` returns it.

        Args:
            per_image: (B,), the loss of each image.
            weight: (B,), the weight of each image, where it is not the batch's own.
        """
        loss = per_image.mean()
        if self.tolerates_bad_images:
            weight = batch.weight if weight is None else weight
            loss = (per_image * weight).mean()
            self.window_weight += weight.mean() / self.trainer.accumulate_grad_batches
        self.step_metrics.count_images(batch, self.tolerates_bad_images)
        self.window_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.tolerates_bad_images:
            self.reweight()
        group = optimizer.param_groups[-1]
        self.step_metrics.lr = group["lr"] / group.get("lr_scale", 1.0)
        if not self.gradients_checked:
            recipe_audit.check_gradients(self.model)
            self.gradients_checked = True

    def reweight(self) -> None:
        """Turn gradients of a mean over all slots of the step into those of a mean over its readable images."""
        share = self.window_weight / self.trainer.world_size
        all_reduce(share)
        factor = torch.where(share > 0, 1 / share, 0.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor
        self.window_loss *= factor
        self.window_weight = torch.zeros_like(self.window_weight)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        before = scaler.get_scale() if scaler else 0.0
        super().optimizer_step(*args, **kwargs)
        # The scaler lowers its scale exactly where it found an overflow and left the step out.
        skipped = scaler is not None and scaler.get_scale() < before
        self.step_metrics.count_step(self.window_loss, self.global_step + 1, skipped)
        self.window_loss = torch.zeros_like(self.window_loss)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.step_metrics.data_wait is not None
        self.step_metrics.data_wait.batch_done()
        if self.global_step > self.closed_at:
            trainer, step = self.trainer, self.global_step
            self.closed_at = step
            if step % trainer.log_every_n_steps == 0 or step == self.total_steps:  # type: ignore[attr-defined]
                self.log_row(self.step_metrics.measure())
            if self.exact and step >= self.total_steps:
                trainer.should_stop = True
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, AfterStep):
                    callback.after_step(trainer, self)
        self.step_metrics.data_wait.batch_wanted()

    def log_row(self, metrics: dict[str, float]) -> None:
        """Write a row of metrics, and tell Lightning of it for callbacks that watch a metric.

        Not through Lightning's loggers, which would count steps from 0 after a restart. Outside of `fit` a plain
        Trainer logs, and returns the metrics from `trainer.validate` and `trainer.test`.
        """
        if self.trainer.state.fn != TrainerFn.FITTING and not self.exact:
            self.log_dict(metrics)
        elif not self.trainer.sanity_checking:
            written = self.step_metrics.write(metrics)
            if not self.exact:
                written = {key: value for key, value in written.items() if key != "epoch"}  # Lightning has its own
            self.log_dict(written, logger=False)

    # ---- epochs and validation --------------------------------------------------------------------------------------

    @property
    def window_closed(self) -> bool:
        """Whether all micro-batches of the optimiser step have been taken."""
        return lightning_internals.micro_batches_begun(self.trainer) % self.trainer.accumulate_grad_batches == 0

    @property
    def at_epoch_end(self) -> bool:
        return self.global_step > 0 and self.global_step % self.steps_per_epoch == 0

    def validation_due(self) -> bool:
        trainer = self.trainer
        if not trainer.enable_validation or not self.window_closed or not self.at_epoch_end:
            return False
        return self.global_step // self.steps_per_epoch % (trainer.check_val_every_n_epoch or 1) == 0

    def on_test_start(self) -> None:
        self.on_validation_start()

    def on_test_end(self) -> None:
        self.on_validation_end()

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    @property
    def split(self) -> str:
        """What metrics of held-out images begin with: test in `trainer.test`, else val."""
        return "test" if self.trainer.testing else "val"

    def on_validation_start(self) -> None:
        # Processes may have different numbers of held-out batches, and a sharded network waits in each for the others.
        self.gathered = ExitStack()
        self.gathered.enter_context(whole(self.model))
        self.validation_start = time.perf_counter()

    def on_validation_end(self) -> None:
        self.gathered.close()
        self.step_metrics.exclude(time.perf_counter() - self.validation_start)

    def on_train_end(self) -> None:
        self.step_metrics.finish()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training:
            self.step_metrics.agree()  # nothing is written after a step that went wrong
            self.step_metrics.require_finite(checkpoint)
        if self.exact:
            del checkpoint["loops"]  # the place in the run is its number of optimiser steps
        checkpoint["mae_format"] = FORMAT
        checkpoint["mae"] = self.description()
        if hasattr(self, "total_steps"):
            counts = {"total_steps": self.total_steps, "warmup_steps": self.warmup_steps}
            checkpoint["mae_counts"] = {**self.step_metrics.state_dict(), **counts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = lightning_internals.attached_trainer(self)
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:  # load_from_checkpoint, validate, test, predict
            return
        if self.exact and "loops" in checkpoint:
            raise UserError(
                "the checkpoint was written by a plain Trainer and goes on by its fit(ckpt_path=...) in Python; "
                "--model.init FILE takes its weights"
            )
        if not self.exact and "loops" not in checkpoint:
            raise UserError(
                "the checkpoint was written by a command of `mae` and goes on by that command with --ckpt_path; "
                "load_from_checkpoint takes its weights"
            )
        self.resumed_at = checkpoint["global_step"]
        if self.exact:
            lightning_internals.set_global_step(trainer, checkpoint["global_step"])
        self.step_metrics.load_state_dict(checkpoint["mae_counts"], first_rank=self.global_rank == 0)

    def description(self) -> dict[str, Any]:
        """What a user of the weights must know; plain types, stored with them."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        mean, std = self.statistics
        return {
            "mean": plain(mean),
            "std": plain(std),
            "step": self.global_step,
            "warmup_steps": getattr(self, "warmup_steps", None),
            "images_seen": self.global_step * images_per_step(self.trainer),
            "devices": self.trainer.world_size,
            "recipe": self.settings(self.trainer, data),
            **self.describe(),
        }

    def settings(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        """What a resumed run must not change, as plain types: settings, and what follows from several of them."""
        keys = ("base_lr", "weight_decay", "warmup_epochs", "min_lr", *self.recipe_keys)
        settings: dict[str, Any] = {f"model.{key}": getattr(self, key) for key in keys}
        settings |= {f"model.{key}": self.hparams.get(key) for key in own_arguments(self)}
        if isinstance(data, ImageData):
            settings |= data.settings() | {f"data.{key}": value for key, value in data.own_settings.items()}
        settings |= {"model_class": class_path(self), "data_class": class_path(data)}
        settings |= {"seed_everything": self.seed, "effective batch": images_per_step(trainer, data)}
        settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
        for key in ("precision", "gradient_clip_val", "gradient_clip_algorithm"):
            settings[f"trainer.{key}"] = getattr(trainer, key)
        return {key: plain(value) for key, value in settings.items()}


def own_arguments(thing: object) -> list[str]:
    """The constructor's arguments that a user's class adds to those of the package's class that it extends."""
    package = next(kind for kind in type(thing).__mro__ if kind.__module__.startswith("mae."))
    known = inspect.signature(package).parameters
    kinds = [kind for kind in type(thing).__mro__ if issubclass(kind, package) and kind is not package]
    named = [
        name for kind in kinds for name, p in inspect.signature(kind).parameters.items() if p.kind != p.VAR_KEYWORD
    ]
    return [name for name in dict.fromkeys(named) if name not in known]


def class_path(thing: object) -> str:
    """The class path of an object, as it is given on the command line."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def plain(value: Any) -> Any:
    """Tuples as lists and names as text, as they come back from a file."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, str) else value
