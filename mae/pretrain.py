"""Pre-training: the network, its recipe and what is logged, as a LightningModule (arXiv:2111.06377, Table 8)."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from mae.data import Batch, ImageData
from mae.errors import TrainingFailed, UserError
from mae.model import SIZES, MaskedAutoencoder, Pair
from mae.optim import WarmupCosine, adamw, scaled_lr
from mae.randomness import sample_noise

HELD_OUT_SEED = 0  # masks of the held-out loss are the same in every run, so that runs can be compared


def last_checkpoint(run_dir: str | Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return Path(run_dir) / "checkpoints" / "last.ckpt"


class Pretrain(LightningModule):
    """MAE pre-training of a ViT.

    Args:
        size: Encoder: nano, micro, tiny, small, base, large or huge (ViT-Ti, S, B, L, H and two for small images).
        patch_size: Pixels, a side or [height, width]; divides the image size.
        mask_ratio: Fraction of patches to hide, in (0, 1).
        norm_pix_loss: Reconstruct pixels normalised within each patch, else pixels of the normalised image.
        decoder_embed_dim: Decoder width.
        decoder_depth: Decoder blocks.
        decoder_num_heads: Decoder attention heads.
        embed_dim: Encoder width, where it is not the size's own.
        depth: Encoder blocks, where not the size's own.
        num_heads: Encoder attention heads, where not the size's own.
        base_lr: Peak learning rate for 256 images an optimiser step; scaled linearly with the effective batch.
        weight_decay: Of AdamW, on everything but biases and norms.
        betas: Of AdamW.
        warmup_epochs: Linear warm-up from 0, in epochs; may be fractional.
        min_lr: Learning rate at the end of the cosine.
        init: Weights to start from: a run folder, .ckpt or .safetensors. Not a resume: that is --ckpt_path.
        image_size: Of the data; set by it.
        in_chans: Of the data; set by it.
        seed: Of the masks; follows seed_everything.
    """

    def __init__(
        self,
        size: str = "base",
        patch_size: int | Pair = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        base_lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_epochs: float = 40,
        min_lr: float = 0.0,
        init: str | None = None,
        image_size: int | Pair = 224,
        in_chans: int = 3,
        seed: int = 0,
    ):
        super().__init__()
        if size not in SIZES:
            raise UserError(f"--model.size {size!r} is none of {', '.join(SIZES)}")
        rates = {"base_lr": base_lr, "weight_decay": weight_decay, "warmup_epochs": warmup_epochs, "min_lr": min_lr}
        for key, value in rates.items():
            if not value >= 0:
                raise UserError(f"--model.{key} {value}: wanted is 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"--model.betas {list(betas)}: wanted is 0 <= beta < 1")
        encoder = SIZES[size]
        try:
            self.model = MaskedAutoencoder(
                image_size=image_size,
                patch_size=patch_size,
                in_chans=in_chans,
                embed_dim=encoder.embed_dim if embed_dim is None else embed_dim,
                depth=encoder.depth if depth is None else depth,
                num_heads=encoder.num_heads if num_heads is None else num_heads,
                decoder_embed_dim=decoder_embed_dim,
                decoder_depth=decoder_depth,
                decoder_num_heads=decoder_num_heads,
                norm_pix_loss=norm_pix_loss,
            )
        except ValueError as error:
            raise UserError(
                f"{error} (--data.image_size, --model.patch_size, --model.*embed_dim, *num_heads)"
            ) from None
        num_patches = self.model.num_patches
        visible = int(num_patches * (1 - mask_ratio))
        if not 0 < visible < num_patches:
            raise UserError(
                f"--model.mask_ratio {mask_ratio} leaves {visible} of {num_patches} patches visible; "
                "some must be visible and some hidden"
            )
        self.mask_ratio, self.seed = mask_ratio, seed
        self.base_lr, self.weight_decay, self.betas = base_lr, weight_decay, betas
        self.warmup_epochs, self.min_lr = warmup_epochs, min_lr

        self.lr = 0.0  # of the optimiser step last taken
        self.skipped_steps = 0  # optimiser steps that the fp16 scaler left out
        self.bad_images: set[str] = set()  # path and reason of each, of this rank
        self.metrics: dict[str, float] = {}  # as last logged, for the progress bar
        self.clock, self.clock_step = time.perf_counter(), 0  # when the last row of metrics was written

    # ---- the batch ------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # On the CPU whatever the device: a CUDA run hides the same patches as a CPU run.
        seed = self.seed if self.trainer.training else HELD_OUT_SEED
        noise = sample_noise(seed, batch.epochs.tolist(), batch.indices.tolist(), self.model.num_patches)
        return batch._replace(noise=noise)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.model(batch.images, batch.noise, self.mask_ratio)
        loss = out.loss if self.max_bad_images == 0 else self.weighted_loss(out.per_image, batch.weight)
        for error in set(batch.errors) - self.bad_images:
            self.bad_images.add(error)
            if self.max_bad_images:
                print(f"mae: warning: unreadable image, its slot has weight 0: {error}", flush=True)
        self.window_loss += loss.detach() / self.trainer.accumulate_grad_batches
        return loss

    def weighted_loss(self, per_image: Tensor, weight: Tensor) -> Tensor:
        """The mean over the readable images of all ranks; DDP averages the gradients of what the ranks return."""
        total = weight.sum()
        if self.trainer.world_size > 1:
            dist.all_reduce(total)
        return (per_image * weight).sum() * self.trainer.world_size / total.clamp(min=1)

    def on_validation_epoch_start(self) -> None:
        self.val_sum = torch.zeros(2, device=self.device, dtype=torch.float64)  # loss, images
        self.val_error = ""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.errors:
            self.val_error = batch.errors[0]
        else:
            per_image = self.model(batch.images, batch.noise, self.mask_ratio).per_image
            self.val_sum += torch.stack([per_image.sum(), per_image.new_tensor(len(per_image))])

    def on_validation_epoch_end(self) -> None:
        if errors := self.gather(self.val_error):
            raise UserError(f"held-out images must all be readable: {errors[0]}")
        self.all_reduce(self.val_sum)
        loss, images = self.val_sum.tolist()
        if not self.trainer.sanity_checking:
            # Lightning's own record is for callbacks that watch a metric; its loggers would count steps from 0.
            self.log_dict(self.write({"val/loss": loss / images}), logger=False)

    # ---- the optimiser --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        per_epoch = self.steps_per_epoch = trainer.datamodule.train_sampler().steps_per_epoch  # type: ignore[attr-defined]
        # Lightning's estimate would start the loader now, before a resumed run knows its place.
        limits = [trainer.max_steps, (trainer.max_epochs or -1) * per_epoch]
        if max(limits) < 0:
            raise UserError("the run has no end: set --trainer.max_epochs or --trainer.max_steps")
        steps = self.total_steps = min(limit for limit in limits if limit >= 0)
        # The end is a number of steps: Lightning's count of epochs can be off by one after a restart.
        trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, steps
        warmup = self.warmup_epochs * per_epoch
        if warmup >= steps:
            raise UserError(
                f"--model.warmup_epochs {self.warmup_epochs} is {warmup:g} optimiser steps, the run only {steps}: "
                "lower it, or raise --trainer.max_epochs or --trainer.max_steps"
            )
        optimizer = adamw(self.model, scaled_lr(self.base_lr, self.images_per_step), self.weight_decay, self.betas)
        self.schedule = WarmupCosine(optimizer, per_epoch, steps / per_epoch, self.warmup_epochs, self.min_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule, "interval": "step"}}

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

    def recipe(self) -> str:
        """The arithmetic of batch and learning rate, to be read before days are spent on it."""
        trainer, data = self.trainer, self.trainer.datamodule  # type: ignore[attr-defined]
        images = len(data.train_source)
        unused = images - self.steps_per_epoch * self.images_per_step
        peak = scaled_lr(self.base_lr, self.images_per_step)
        return "\n".join(
            [
                f"images        {images} for training, "
                + (f"{len(data.val_source)} held out" if data.val_source else "none held out: no held-out loss"),
                f"batch         {data.batch_size} a device x {trainer.accumulate_grad_batches} accumulated x "
                f"{trainer.world_size} devices = {self.images_per_step} an optimiser step",
                f"epoch         {self.steps_per_epoch} optimiser steps; {unused} images of each epoch's order left out",
                f"learning rate {self.base_lr:g} x {self.images_per_step} / 256 = {peak:g} at its peak, after "
                f"{self.warmup_epochs * self.steps_per_epoch:g} steps of warm-up; {self.total_steps} steps in all",
                f"parameters    {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f} M, of which encoder "
                f"{sum(p.numel() for p in self.model.encoder.parameters()) / 1e6:.2f} M",
            ]
        )

    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            print(self.recipe(), flush=True)

    # ---- what is logged, and when a run must stop ------------------------------------------------------------------

    def on_train_start(self) -> None:
        self.window_loss = torch.zeros((), device=self.device)  # of the accumulation window under way
        self.step_loss = self.window_loss
        self.first_bad_step = torch.full((), torch.inf, device=self.device)  # first step with a non-finite loss
        self.clock, self.clock_step = time.perf_counter(), self.global_step

        # A resumed optimiser comes back with the rate of its old schedule, which a longer run does not have.
        for group, rate in zip(self.trainer.optimizers[0].param_groups, self.schedule.get_lr(), strict=True):
            group["lr"] = rate

    def on_train_epoch_start(self) -> None:
        loader = self.trainer.train_dataloader
        assert loader is not None
        loader.sampler.seek(self.global_step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.lr = optimizer.param_groups[0]["lr"]

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

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log_dict(self.write(self.step_metrics()), logger=False)

    def step_metrics(self) -> dict[str, float]:
        """Of the optimiser step just taken; and how fast it has gone since the last call, held-out loss not counted."""
        metrics = {**self.agree(), "lr": self.lr}  # reading the loss waits for the device, so the clock is right
        now, step = time.perf_counter(), self.global_step
        metrics["images_per_s"] = (step - self.clock_step) * self.images_per_step / (now - self.clock)
        self.clock, self.clock_step = now, step
        return metrics

    def on_validation_start(self) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self) -> None:
        self.clock += time.perf_counter() - self.validation_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.training:
            self.agree()  # nothing is written after a step that went wrong
        checkpoint["mae"] = self.description()
        checkpoint["mae_counts"] = {"bad_images": self.all_bad_images(), "skipped_steps": self.skipped_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bad_images = set(checkpoint["mae_counts"]["bad_images"])
        self.skipped_steps = checkpoint["mae_counts"]["skipped_steps"]

    def on_train_end(self) -> None:
        if self.global_step != self.clock_step:
            self.write(self.step_metrics())  # the last step is always logged

    def agree(self) -> dict[str, float]:
        """The last step's loss over all ranks; every rank stops here if one of them has reason to.

        Raises:
            TrainingFailed: A loss since the last call was not finite.
            UserError: More images than max_bad_images could not be read.
        """
        mean = torch.stack([self.step_loss, self.step_loss.new_tensor(float(len(self.bad_images)))])
        self.all_reduce(mean)
        step = self.first_bad_step.clone()
        self.all_reduce(step, dist.ReduceOp.MIN)
        loss, bad = (mean / self.trainer.world_size).tolist()
        if step.isfinite():
            lr = self.schedule.lr_at(int(step) - 1, float(self.schedule.base_lrs[0]))
            path = last_checkpoint(self.trainer.default_root_dir)
            last = path if path.is_file() else "none was written"
            raise TrainingFailed(
                f"the loss is not finite at step {int(step)} (learning rate {lr:g}); last good checkpoint: {last}. "
                "Lower --model.base_lr, lengthen --model.warmup_epochs or use --trainer.precision 32-true"
            )
        if bad == 0:
            return {"train/loss": loss}
        paths = self.all_bad_images()
        if len(paths) > self.max_bad_images:
            raise UserError(
                f"{len(paths)} unreadable training images, --data.max_bad_images is {self.max_bad_images}: "
                + "; ".join(paths[:20])
            )
        return {"train/loss": loss, "bad_images": float(len(paths))}

    def all_bad_images(self) -> list[str]:
        """Path and reason of each, of all ranks."""
        return sorted({error for errors in self.gather(self.bad_images) for error in errors})

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

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, empty ones left out."""
        values: list[Any] = [value]
        if self.trainer.world_size > 1:
            values = [None] * self.trainer.world_size
            dist.all_gather_object(values, value)
        return [v for v in values if v]

    def description(self) -> dict[str, Any]:
        """What a user of the weights must know; plain types, stored with them."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return {
            "model": self.model.config,
            "mean": data.mean,
            "std": data.std,
            "mask_ratio": self.mask_ratio,
            "step": self.global_step,
            "images_seen": self.global_step * self.images_per_step,
            "recipe": self.settings(data, self.images_per_step),
        }

    def settings(self, data: ImageData, effective_batch: int) -> dict[str, Any]:
        """What a resumed run must not change, by key of the command line; plain types. A longer run is allowed."""
        own = ("mask_ratio", "base_lr", "weight_decay", "warmup_epochs", "min_lr")
        return {f"model.{key}": getattr(self, key) for key in own} | {
            "model.betas": list(self.betas),
            "seed_everything": self.seed,
            "data.crop_scale": None if data.crop is None else list(data.crop.scale),
            "data.hflip": data.hflip,
            "data.mean": data.mean,
            "data.std": data.std,
            "number of training images": len(data.train_source or ()),
            "effective batch": effective_batch,
        }
