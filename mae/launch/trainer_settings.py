"""Which of Lightning's settings a run takes, and what is wrong with the others."""

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from mae.data.datamodule import ImageData
from mae.errors import UserError
from mae.options import check_ranges
from mae.training.lightning_internals import ddp_options
from mae.training.module import Stage

# Settings of Lightning that would make an epoch something other than one pass over the images, and the only value that
# each may have.
WHOLE_STEPS_ONLY = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "use_distributed_sampler": False,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "val_check_interval": 1.0,
}


# Lightning's callbacks that would change what a step is, and what to use in their place.
REFUSED_CALLBACKS = {
    "LearningRateFinder": "the rate follows from --model.base_lr; try values of it with --trainer.max_steps",
    "BatchSizeFinder": "the learning rate follows from the batch size; `mae plan` computes the largest that fits",
    "GradientAccumulationScheduler": "all steps have the same global batch; set --trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it replaces the learning rate schedule; `mae finetune --model.ema_decay` averages",
    "BackboneFinetuning": "what is trained is chosen before the start: `mae finetune --model.blocks`",
}


def check_trainer_settings(trainer: Namespace, device: str) -> None:
    """
    Args:
        device: cpu, cuda, ..., where the run will be.

    Raises:
        UserError: A setting of Lightning's would cut or repeat epochs, or is out of its range.
    """
    if device == "cpu" and not re.fullmatch(r"auto|[1-9]\d*", str(trainer.devices)):
        raise UserError(
            f"--trainer.devices {trainer.devices}: on a CPU it is a number of processes, 1 or more, or auto"
        )
    for key, usual in WHOLE_STEPS_ONLY.items():
        # As text: 1 is one batch, 1.0 is all of them.
        if str(value := trainer[key]) not in ("None", str(usual)):
            raise UserError(f"--trainer.{key} {value} would cut or repeat epochs; shorten with --trainer.max_steps")
    if str(limit := trainer.limit_val_batches) not in ("None", "1.0", "0", "0.0"):
        raise UserError(
            f"--trainer.limit_val_batches {limit} would judge by the first held-out images only; 0 leaves it out"
        )
    if trainer.enable_checkpointing is False:
        raise UserError(
            "--trainer.enable_checkpointing false: every run keeps checkpoints; see --checkpoint.every_n_epochs"
        )
    keys = ("accumulate_grad_batches", "log_every_n_steps")
    check_ranges("trainer", "[1, inf)", **{key: trainer[key] for key in keys})


def check_callbacks(callbacks: Sequence[Callback], stage: Stage, data: ImageData, limit_val_batches: Any) -> None:
    """
    Args:
        callbacks: Those of the settings.

    Raises:
        UserError: One of them does not go with a run of ours, or watches a metric that no step logs.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if reason := REFUSED_CALLBACKS.get(name):
            raise UserError(f"--trainer.callbacks {name}: {reason}")
        monitor = getattr(callback, "monitor", None)
        own = not type(stage).__module__.startswith("mae.")  # which may log what it likes
        if own or not isinstance(monitor, str):
            continue
        validates = data.val_source is not None and limit_val_batches not in (0, 0.0)
        known = [key for key in stage.metric_names() if validates or not key.startswith("val/")]
        if monitor not in known:
            raise UserError(f"--trainer.callbacks {name}: monitor {monitor!r} is none of {', '.join(known)}")


def set_ddp_options(strategy: DDPStrategy, accumulate: int) -> None:
    """Have DDP leave out what our networks do not need, unless the settings of the strategy say otherwise.

    Raises:
        UserError: They ask for what torch cannot do.
    """
    options = ddp_options(strategy)
    if options.get("static_graph") and accumulate > 1:
        raise UserError(
            f"--trainer.strategy: static_graph true does not go with --trainer.accumulate_grad_batches {accumulate}: "
            "leave it out"
        )
    options.setdefault("gradient_as_bucket_view", True)  # no second copy of the gradients
    options.setdefault("find_unused_parameters", False)
    # With accumulation only the last micro-batch exchanges gradients, so the graph is not static.
    options.setdefault("static_graph", accumulate == 1 and not options["find_unused_parameters"])
