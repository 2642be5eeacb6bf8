"""What every training run shares: optimiser steps, the schedule, what is logged, and when a run must stop.

A stage (pre-training, probe, fine-tuning) is a subclass with its network, its loss and its optimiser; all that goes by
optimiser steps is here.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mae.data.datamodule import ImageData
from mae.data.datasets import Batch, blank_batch
from mae.errors import TrainingFailed, UserError
from mae.models import compilation
from mae.models.compilation import Choice
from mae.models.flops import peak_rate, training_flops
from mae.runtime import memory
from mae.runtime.checkpoint_files import FORMAT, last_checkpoint
from mae.runtime.processes import gather
from mae.training import recipe_audit
from mae.training.fsdp import shard, whole
from mae.training.optim import WarmupCosine, scaled_lr
from mae.training.throughput import DataWait

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}  # by what a precision begins with


@runtime_checkable
class AfterStep(Protocol):
    """A callback with something to do at the end of an optimiser step, when its row is written."""

    def after_step(self, trainer: Trainer, stage: "Stage") -> None: ...


class Stage(LightningModule):
    """A training run of `self.model`, counted in optimiser steps.

    Subclasses set `model` and give `make_optimizer`, `claims`, `architecture`, `settings`, `describe` and a
    `training_step` that returns `mean_loss(...)`.
    """

    model: nn.Module
    window_loss: Tensor
    window_weight: Tensor
    own_settings: tuple[str, ...] = ()  # what a resumed run must not change, besides what all stages share
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
    ):
        super().__init__()
        if cuda_graphs and compile is False:
            raise UserError("--model.cuda_graphs true needs --model.compile auto or true")
        self.compile_choice, self.cuda_graphs = compile, cuda_graphs
        rates = {"base_lr": base_lr, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs, "min_lr": min_lr}
        for key, value in rates.items():
            if not value >= 0:
                raise UserError(f"--model.{key} {value}: wanted is 0 or more")
        self.base_lr, self.weight_decay, self.warmup_epochs, self.min_lr = base_lr, weight_decay, warmup_epochs, min_lr
        self.seed = seed

        self.lr = 0.0  # of the optimiser step last taken
        self.skipped_steps = 0  # optimiser steps that the fp16 scaler left out
        self.bad_images: dict[str, str] = {}  # path: reason, of this rank
        self.decoded = Counter[str]()  # images by decoder, of this rank since the start or restart
        self.metrics: dict[str, float] = {}  # as last logged, for the progress bar
        self.clock, self.clock_step = time.perf_counter(), 0  # when the last row of metrics was written
        self.gradients_checked = False
        self.seconds = 0.0  # of training, looks at held-out images included; without what a kill has lost
        self.resumed_at: int | None = None  # the optimiser step of the checkpoint that the run goes on from
        self.planned: int | None = None  # the length of the run, in steps, when that checkpoint was written
        self.allow_changes = False  # of the plan
        self.starts_at = 0  # the step that this process would go on from
        self.begin: Callable[[], None] = lambda: None  # what is done once nothing stands against training any more

    # ---- what a stage says of itself ------------------------------------------------------------------------------

    def make_optimizer(self, lr: float) -> Optimizer:
        """The optimiser of the recipe at its peak rate; a group's `lr_scale` multiplies the schedule."""
        raise NotImplementedError

    def claims(self) -> recipe_audit.Claims:
        """What the settings promise about groups and blocks; the run stops if the optimiser or network differ."""
        raise NotImplementedError

    def architecture(self) -> dict[str, Any]:
        """Plain types: what a checkpoint must share with this network to be resumed."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Plain types, stored with the weights beside what all stages store."""
        raise NotImplementedError

    def summed_loss(self, network: Callable[..., Any], images: Tensor) -> Tensor:
        """Something to derive, by as much work as the loss of these images."""
        out: Tensor = network(images)
        return out

    # ---- the optimiser --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        per_epoch = self.steps_per_epoch = trainer.datamodule.train_sampler().steps_per_epoch  # type: ignore[attr-defined]
        # Lightning's estimate would start the loader now, before a resumed run knows its place.
        limits = [trainer.max_steps, (trainer.max_epochs or -1) * per_epoch]
        if max(limits) < 0:
            raise UserError("the run has no end: set --trainer.max_epochs or --trainer.max_steps")
        steps = self.total_steps = min(limit for limit in limits if limit >= 0)
        # The end is a number of steps, and ours to tell: Lightning's count of epochs begins anew at each restart, and a
        # run that comes back after its last step has that step's look at held-out images still to take.
        trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = -1
        warmup = self.warmup_epochs * per_epoch
        if warmup >= steps:
            raise UserError(
                f"--model.warmup_epochs {self.warmup_epochs} is {warmup:g} optimiser steps, the run only {steps}: "
                "lower it, or raise --trainer.max_epochs or --trainer.max_steps"
            )
        optimizer = self.make_optimizer(self.peak_lr)
        self.schedule = WarmupCosine(optimizer, per_epoch, steps / per_epoch, self.warmup_epochs, self.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

    @property
    def fused(self) -> bool:
        """Whether the optimiser is one kernel: it would undo an fp16 scaler itself, and Lightning then cannot clip."""
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        return not (mixed and self.trainer.gradient_clip_val)

    @property
    def peak_lr(self) -> float:
        return scaled_lr(self.base_lr, self.images_per_step)

    @property
    def images_per_step(self) -> int:
        """The effective batch."""
        trainer = self.trainer
        per_device: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        return per_device * trainer.accumulate_grad_batches * trainer.world_size

    @property
    def max_bad_images(self) -> int:
        number: int = self.trainer.datamodule.max_bad_images  # type: ignore[attr-defined]
        return number

    # ---- Lightning's loop, by optimiser steps ----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        trainer = self.trainer
        if len(steps := set(gather((self.starts_at,)))) > 1:
            raise UserError(
                f"the processes would go on from different steps, {sorted(step for (step,) in steps)}: do all of them "
                "see the same --run_dir?"
            )
        # When to look at held-out images follows from the step alone, wherever in an epoch the run was started.
        trainer.fit_loop.epoch_loop._should_check_val_fx = lambda data_fetcher: self.validation_due()  # type: ignore[method-assign]
        # Lightning's handlers save and broadcast within the handler, where ranks wait for each other forever, and its
        # loop asks all ranks about SIGTERM before each micro-batch, which makes the device wait. Ours: `signals`.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        # Now: later the network may be spread over processes.
        self.flops = training_flops(self.model, self.summed_loss, data.in_chans, *data.image_size)

    @property
    def step_done(self) -> bool:
        """No accumulation window is open."""
        ready: int = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return ready % self.trainer.accumulate_grad_batches == 0

    @property
    def at_epoch_end(self) -> bool:
        return self.global_step > 0 and self.global_step % self.steps_per_epoch == 0

    def validation_due(self) -> bool:
        trainer = self.trainer
        if not trainer.enable_validation or not self.step_done or not self.at_epoch_end:
            return False
        return self.global_step // self.steps_per_epoch % (trainer.check_val_every_n_epoch or 1) == 0

    def finish_epoch(self) -> None:
        """What a run does between epochs; for one that was stopped after the last step of an epoch and has it to do."""
        trainer = self.trainer
        if self.validation_due():
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        call._call_callback_hooks(trainer, "on_train_epoch_end")

    # ---- the audit ------------------------------------------------------------------------------------------------

    def recipe(self) -> str:
        """The arithmetic of batch and learning rate, to be read before days are spent on it."""
        trainer, data = self.trainer, self.trainer.datamodule  # type: ignore[attr-defined]
        images = len(data.train_source)
        unused = images - self.steps_per_epoch * self.images_per_step
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return "\n".join(
            [
                f"images        {images} for training, "
                + (f"{len(data.val_source)} held out" if data.val_source else "none held out: no held-out figures"),
                f"augmentation  {'; '.join(data.augmentations())}",
                f"batch         {data.batch_size} a device x {trainer.accumulate_grad_batches} accumulated x "
                f"{trainer.world_size} devices = {self.images_per_step} an optimiser step",
                f"epoch         {self.steps_per_epoch} optimiser steps; {unused} images of each epoch's order left out",
                f"learning rate {self.base_lr:g} x {self.images_per_step} / 256 = {self.peak_lr:g} at its peak, after "
                f"{self.warmup_epochs * self.steps_per_epoch:g} steps of warm-up; {self.total_steps} steps in all",
                f"parameters    {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M, of which "
                f"{trained / 1e6:.2f} M are trained",
                *(f"{key:<13} {text}" for key, text in self.recipe_notes().items()),
                f"work          {self.flops / 1e9:.4g} GFLOP an image, forward and backward, in matrix products; "
                f"{self.flops * self.images_per_step * self.total_steps:.2g} FLOP in all",
            ]
        )

    def recipe_notes(self) -> dict[str, str]:
        """More lines of the recipe, of this stage."""
        return {}

    def on_fit_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        recipe_audit.check(self.model, optimizer, self.schedule, self.claims())
        self.group_settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if self.trainer.is_global_zero:
            groups = recipe_audit.groups(self.model, optimizer, self.schedule)
            text = f"{self.recipe()}\n\n{recipe_audit.table(groups)}\n{recipe_audit.drop_path_line(self.model)}\n"
            print(text, flush=True)
            names = recipe_audit.names_table(groups)
            path = Path(self.trainer.default_root_dir) / "recipe.txt"
            try:
                path.write_text(f"{text}\n{names}\n")
            except OSError as error:  # it has been said, at least
                print(f"mae: warning: {path} cannot be written: {error.strerror}", flush=True)

    # ---- one step -------------------------------------------------------------------------------------------------

    def mean_loss(self, per_image: Tensor, batch: Batch, weight: Tensor | None = None) -> Tensor:
        """The loss of a micro-batch from those of its images, (B,); unreadable images have weight 0 and are counted.

        Args:
            weight: (B,), where it is not the batch's own.
        """
        loss = per_image.mean()
        if self.max_bad_images:
            weight = batch.weight if weight is None else weight
            loss = (per_image * weight).mean()
            self.window_weight += weight.mean() / self.trainer.accumulate_grad_batches
        for error in batch.errors:
            if error.path in self.bad_images:
                continue
            self.bad_images[error.path] = error.reason
            if self.max_bad_images:
                print(f"mae: warning: unreadable image, its slot has weight 0: {error}", flush=True)
        self.decoded.update(batch.decoders)
        self.window_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def reweight(self) -> None:
        """From a mean over all slots of the optimiser step to one over the readable images, of all ranks."""
        share = self.window_weight / self.trainer.world_size
        self.all_reduce(share)
        factor = torch.where(share > 0, 1 / share, 0.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor
        self.window_loss *= factor
        self.window_weight = torch.zeros_like(self.window_weight)

    def blank_pass(self, backward: Callable[[Tensor], Any], wrapped: bool) -> None:
        """A pass over a blank batch, of which nothing is kept.

        Args:
            backward: What is done with the loss.
            wrapped: Through DDP.
        """
        trainer = self.trainer
        buffers = [buffer.clone() for buffer in self.buffers()]
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        batch = self.on_before_batch_transfer(blank_batch(data.batch_size, data.in_chans, data.image_size), 0)
        batch = trainer.strategy.batch_to_device(batch._replace(images=batch.images.to(self.dtype)))
        self.open_window()
        if wrapped:
            loss = trainer.strategy.training_step(batch, 0)
        else:
            with trainer.precision_plugin.train_step_context():
                loss = self.training_step(batch, 0)
        assert isinstance(loss, Tensor)
        backward(loss)
        self.zero_grad(set_to_none=True)
        for buffer, before in zip(self.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.open_window()

    def settle_buckets(self) -> None:
        """After its first backward pass DDP arranges the gradients anew in its buckets, and from three ranks on a sum
        rounds by its place there: the first step of each start would be another than in a run that was never stopped.
        A static graph is learnt in the first pass, and arranged after the second.
        """
        ddp = self.trainer.strategy.model
        if isinstance(ddp, DistributedDataParallel):
            for _ in range(2 if ddp.static_graph else 1):
                self.blank_pass(lambda loss: loss.backward(), wrapped=True)  # type: ignore[no-untyped-call]

    def compile_network(self) -> None:
        """As the setting says; all ranks do the same, by their own networks and compilers.

        Raises:
            UserError: It is to be compiled, and cannot be.
        """
        if self.compile_choice is False:
            return
        must, start = self.compile_choice is True, time.perf_counter()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        why = ""
        if self.device_mesh is not None:
            why = "not with --trainer.strategy fsdp2"
        elif self.cuda_graphs and self.device.type != "cuda":
            raise UserError(f"--model.cuda_graphs true: there are none on {self.device.type}")
        elif not must:
            run = self.flops * self.images_per_step * self.total_steps
            why = compilation.too_short(self.device, run)
        if not why:
            # Not through DDP: a rank that fails must not leave the others waiting for its gradients.
            once = lambda loss: torch.autograd.grad(loss, trained, allow_unused=True)  # noqa: E731
            step = lambda: self.blank_pass(once, wrapped=False)  # noqa: E731
            failed = gather(compilation.attempt(self.model, step, self.cuda_graphs))
            if failed:
                compilation.restore(self.model)
                why = failed[0]
        if why and must:
            raise UserError(f"--model.compile true: {why}; --model.compile auto goes on without")
        if self.trainer.is_global_zero:
            done = f"not compiled: {why}" if why else f"compiled in {time.perf_counter() - start:.0f} s"
            print(f"{done} (--model.compile {self.compile_choice})", flush=True)

    def open_window(self) -> None:
        self.window_loss = torch.zeros((), device=self.device)  # of the accumulation window under way
        self.window_weight = torch.zeros((), device=self.device)  # share of its slots that are readable, of this rank

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.trainer.training and hasattr(self, "data_wait"):
            self.data_wait.came()
        return batch

    def on_train_start(self) -> None:
        if self.device.type == "cpu":
            memory.keep_freed_memory()
        self.compile_network()
        self.settle_buckets()
        self.open_window()
        self.step_loss = self.window_loss
        self.first_bad_step = torch.full((), torch.inf, device=self.device)  # first step with a non-finite loss
        precision = str(self.trainer.precision)
        dtype = next((t for key, t in DTYPES.items() if precision.startswith(key)), torch.float32)
        self.peak_rate = peak_rate(self.device, dtype)
        self.clock, self.clock_step = time.perf_counter(), self.global_step
        self.started = self.clock
        self.data_wait = DataWait(self.device)
        self.data_wait.done()

        # A resumed optimiser comes back with its old settings, and the rates of its old schedule.
        groups = self.trainer.optimizers[0].param_groups
        for group, own, rate in zip(groups, self.group_settings, self.schedule.get_lr(), strict=True):
            group.update(own, lr=rate)

        self.keep_plan()
        self.begin()
        if self.resumed_at is not None and self.at_epoch_end:
            self.finish_epoch()
            self.clock = self.started = time.perf_counter()
        if self.global_step >= self.total_steps:
            self.trainer.should_stop = True

    def keep_plan(self) -> None:
        """A run may be made longer, and says so; a shorter one would have had other learning rates from the start.

        Raises:
            UserError: It is to be shorter.
        """
        if self.planned in (None, self.total_steps):
            return
        said = f"the run is to have {self.total_steps} optimiser steps, and was to have {self.planned}"
        if self.total_steps < self.planned and not self.allow_changes:  # type: ignore[operator]
            raise UserError(
                f"{said}: give --trainer.max_epochs and --trainer.max_steps as before; --allow_changes true goes on"
            )
        if self.trainer.is_global_zero:
            print(f"{said}: from step {self.global_step} on the learning rate follows the new schedule", flush=True)

    def on_train_epoch_start(self) -> None:
        loader = self.trainer.train_dataloader
        assert loader is not None
        loader.sampler.seek(self.global_step)
        self.data_wait.ask()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.max_bad_images:
            self.reweight()
        group = optimizer.param_groups[-1]
        self.lr = group["lr"] / group.get("lr_scale", 1.0)
        if not self.gradients_checked:
            recipe_audit.check_gradients(self.model)
            self.gradients_checked = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        before = scaler.get_scale() if scaler else 0.0
        super().optimizer_step(*args, **kwargs)
        # The scaler lowers its scale exactly where it found an overflow and left the step out.
        if scaler and scaler.get_scale() < before:
            self.skipped_steps += 1
        self.step_loss, self.window_loss = self.window_loss, torch.zeros_like(self.window_loss)
        # Kept on the device: reading it here would make every step wait for the last.
        bad = ~self.step_loss.isfinite() & self.first_bad_step.isinf()
        self.first_bad_step = torch.where(bad, float(self.global_step + 1), self.first_bad_step)

    # ---- what is logged, and when a run must stop ------------------------------------------------------------------

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.data_wait.done()
        if self.step_done:
            self.end_step()
        self.data_wait.ask()

    def end_step(self) -> None:
        trainer, step = self.trainer, self.global_step
        if step % trainer.log_every_n_steps == 0 or step == self.total_steps:  # type: ignore[attr-defined]
            self.log_dict(self.write(self.step_metrics()), logger=False)
        if step >= self.total_steps:
            trainer.should_stop = True
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AfterStep):
                callback.after_step(trainer, self)

    def step_metrics(self) -> dict[str, float]:
        """Of the optimiser step just taken; and how fast it has gone since the last call, held-out loss not counted."""
        metrics = {**self.agree(), "lr": self.lr}  # reading the loss waits for the device, so the clock is right
        now, step = time.perf_counter(), self.global_step
        rate = (step - self.clock_step) * self.images_per_step / (now - self.clock)
        metrics["images_per_s"] = rate
        metrics["mfu"] = rate * self.flops / self.trainer.world_size / self.peak_rate
        metrics["data_wait"] = self.data_wait.seconds() / (now - self.clock)
        metrics["peak_memory_gib"] = memory.peak(self.device) / memory.GIB
        self.clock, self.clock_step = now, step
        self.data_wait = DataWait(self.device)
        self.data_wait.done()
        return metrics

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    def on_validation_start(self) -> None:
        # Processes may have different numbers of held-out batches, and a sharded network waits in each for the others.
        self.gathered = ExitStack()
        self.gathered.enter_context(whole(self.model))
        self.validation_start = time.perf_counter()

    def on_validation_end(self) -> None:
        self.gathered.close()
        self.clock += time.perf_counter() - self.validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training:
            self.agree()  # nothing is written after a step that went wrong
        del checkpoint["loops"]  # the place in the run is its number of optimiser steps
        checkpoint["mae_format"] = FORMAT
        checkpoint["mae"] = self.description()
        seconds = self.seconds + (time.perf_counter() - self.started if self.trainer.training else 0.0)
        checkpoint["mae_counts"] = {
            "bad_images": self.all_bad_images(),
            "decoded": dict(sum(gather(self.decoded), Counter[str]())),
            "skipped_steps": self.skipped_steps,
            "seconds": seconds,
            "total_steps": self.total_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        step, counts = checkpoint["global_step"], checkpoint["mae_counts"]
        self.resumed_at, self.planned = step, counts.get("total_steps")
        progress = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = step
        self.bad_images, self.skipped_steps, self.seconds = (
            counts["bad_images"],
            counts["skipped_steps"],
            counts["seconds"],
        )
        if self.global_rank == 0:  # summed over the ranks again
            self.decoded = Counter(counts["decoded"])

    def on_train_end(self) -> None:
        self.seconds += time.perf_counter() - self.started
        decoded = sum(gather(self.decoded), Counter[str]())
        del decoded["memory"]
        if decoded and self.trainer.is_global_zero:
            said = ", ".join(f"{count} by {decoder}" for decoder, count in decoded.most_common())
            print(f"images decoded: {said}", flush=True)

    def write_last_row(self) -> None:
        if self.global_step != self.clock_step:
            self.write(self.step_metrics())

    def agree(self) -> dict[str, float]:
        """The last step's loss over all ranks; every rank stops here if one of them has reason to.

        Raises:
            TrainingFailed: A loss since the last call was not finite.
            UserError: More images than max_bad_images could not be read.
        """
        counts = [float(len(self.bad_images)), float(self.decoded["Pillow"])]
        sums = torch.stack([self.step_loss, *self.step_loss.new_tensor(counts)])
        self.all_reduce(sums)
        step = self.first_bad_step.clone()
        self.all_reduce(step, dist.ReduceOp.MIN)
        loss, bad, pillow = sums.tolist()
        if step.isfinite():
            lr = self.schedule.lr_at(int(step) - 1, float(self.schedule.base_lrs[0]))
            self.trainer.strategy.checkpoint_io.wait()  # type: ignore[attr-defined]
            path = last_checkpoint(self.trainer.default_root_dir)
            last = path.resolve() if path.is_file() else "none was written"
            raise TrainingFailed(
                f"the loss is not finite at step {int(step)} (learning rate {lr:g}); last good checkpoint: {last}. "
                "Lower --model.base_lr, lengthen --model.warmup_epochs or use --trainer.precision 32-true"
            )
        paths = self.all_bad_images() if bad else {}
        if len(paths) > self.max_bad_images:
            told = [f"{path}: {reason}" for path, reason in list(paths.items())[:20]]
            raise UserError(
                f"{len(paths)} unreadable training images, --data.max_bad_images is {self.max_bad_images}: "
                + "; ".join(told)
            )
        return {
            "train/loss": loss / self.trainer.world_size,
            "bad_images": float(len(paths)),
            "pillow_images": pillow,
        }

    def all_bad_images(self) -> dict[str, str]:
        """Path and reason of each, of all ranks."""
        return dict(sorted(item for found in gather(self.bad_images) for item in found.items()))

    def write(self, metrics: dict[str, float]) -> dict[str, float]:
        """To every logger, under the number of optimiser steps taken; returns all that was written."""
        step = self.global_step
        metrics = {**metrics, "epoch": step / self.steps_per_epoch, "images_seen": step * self.images_per_step}
        if getattr(self.trainer.precision_plugin, "scaler", None):
            metrics["skipped_steps"] = self.skipped_steps
        self.metrics.update(metrics)
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)
        return metrics

    def all_reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        if self.trainer.world_size > 1:
            dist.all_reduce(value, op)

    # ---- what is stored --------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """What a user of the weights must know; plain types, stored with them."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return {
            "mean": data.mean,
            "std": data.std,
            "step": self.global_step,
            "images_seen": self.global_step * self.images_per_step,
            "devices": self.trainer.world_size,
            "recipe": self.settings(self.trainer, data),
            **self.describe(),
        }

    def settings(self, trainer: Trainer, data: ImageData) -> dict[str, Any]:
        """What a resumed run must not change, by key of the command line; plain types. A longer run is allowed."""
        keys = ("base_lr", "weight_decay", "warmup_epochs", "min_lr", *self.own_settings)
        own = {f"model.{key}": getattr(self, key) for key in keys}
        shared = {
            "seed_everything": self.seed,
            "effective batch": data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
            "trainer.precision": trainer.precision,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            "trainer.gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        }
        return {key: plain(value) for key, value in (own | data.settings() | shared).items()}


def plain(value: Any) -> Any:
    """Tuples as lists and names as text, as they come back from a file."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, str) else value
