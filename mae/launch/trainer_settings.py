"""Which of Lightning's settings a run takes, and what is wrong with the others."""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from mae.data.datamodule import ImageData
from mae.errors import UserError
from mae.options import check_ranges
from mae.runtime.environment import is_first_rank
from mae.runtime.machine import crowding
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
    "Timer": "a run is a number of steps; set --trainer.max_steps, or stop it by a signal, and it saves",
    "SpikeDetection": "Lightning's cannot be resumed; a loss that is not finite ends the run by itself",
    "ModelPruning": "it needs losses that can be derived twice; prune the exported encoder",
    "BaseFinetuning": "it is a base class; give a subclass of your own by its path",
    **dict.fromkeys(
        ("ProgressBar", "TQDMProgressBar", "RichProgressBar", "Progress"),
        "every run has a bar of its own; --trainer.enable_progress_bar false leaves it out",
    ),
    "BackboneFinetuning": "what is trained is chosen before the start: `mae finetune --model.blocks`",
}


# What else does not go with a run: values, and why.
REFUSED_SETTINGS = {
    "barebones": (("True",), "every run logs and keeps checkpoints; leave it out"),
    "profiler": (("xla",), "it needs a TPU; simple, advanced or pytorch"),
}

# By their names; classes are taken if they are Lightning's of these, or not Lightning's.
STRATEGIES = (
    *("auto", "single_device", "fsdp2"),
    *("ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"),
)


def check_trainer_settings(trainer: Namespace, device: str) -> None:
    """Refuse what does not go with a run; print a note where its threads are more than the free cores.

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
    for key, (values, reason) in REFUSED_SETTINGS.items():
        if str(value := trainer[key]) in values:
            raise UserError(f"--trainer.{key} {value}: {reason}")
    if trainer.default_root_dir is not None:
        raise UserError(f"--trainer.default_root_dir {trainer.default_root_dir}: the folder of a run is --run_dir")
    check_strategy(trainer.strategy)
    plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
    for name in map(class_name, filter(None, plugins)):
        if "CheckpointIO" in name:
            raise UserError(f"--trainer.plugins {name}: checkpoints are written as the run needs them; leave it out")
        if "Precision" in name:
            raise UserError(f"--trainer.plugins {name}: set --trainer.precision in its place")
    keys = ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch")
    check_ranges("trainer", "[1, inf)", **{key: trainer[key] for key in keys})
    if device == "cpu" and is_first_rank() and (note := crowding(*planned_threads(trainer.devices))):
        print(f"mae: note: {note}", flush=True)


def planned_threads(devices: Any) -> tuple[int, int]:
    """Threads of each process and processes of a run on this machine's CPU, for `crowding`."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", devices if str(devices).isdecimal() else 1))
    if processes == 1 or "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads(), processes
    return max(1, torch.get_num_threads() // processes), processes  # as Lightning divides them


def check_strategy(strategy: str | Namespace) -> None:
    """
    Raises:
        UserError: A run under this strategy could not be resumed, or would lose what its processes have learnt.
    """
    path = strategy if isinstance(strategy, str) else strategy.class_path
    known = path in STRATEGIES
    if not isinstance(strategy, str):
        known = not path.startswith("lightning.") or class_name(strategy) in ("DDPStrategy", "SingleDeviceStrategy")
        method = strategy.get("init_args", Namespace()).get("start_method", "popen")
        if method != "popen":
            raise UserError(
                f"--trainer.strategy: start_method {method}: what its processes learn is lost with them; leave it out"
            )
    if not known:
        raise UserError(
            f"--trainer.strategy {path}: runs are saved and resumed on one device, by ddp and by fsdp2; it is one of "
            f"{', '.join(STRATEGIES)}"
        )


def class_name(value: str | Namespace) -> str:
    """Of a class in the settings, without its modules."""
    path: str = value if isinstance(value, str) else value.class_path
    return path.rpartition(".")[2]


def class_error(message: str) -> str | None:
    """The parser's page on a logger, callback, plugin or the like that cannot be made, as a line; None: not of one."""
    begin = r"(?:Problem with given class_path '|Given value: \[?(?:Namespace\(class_path=)?'?)"
    given = re.search(begin + r"([\w.]+)", message)
    key = re.search(r'"(trainer\.(?:logger|callbacks|plugins|profiler|strategy|accelerator))"', message)
    if not given or "Subtypes:" not in message or ("Parser key" in message and not key):
        return None
    name = class_name(given[1])
    if name in REFUSED_CALLBACKS:
        return f"--trainer.callbacks {name}: {REFUSED_CALLBACKS[name]}"
    kinds = ("logger", "callbacks", "plugins", "profiler")
    option = key[1] if key else next((f"trainer.{kind}" for kind in kinds if kind.rstrip("s") in given[1]), "trainer")
    lines = message.partition("Errors:")[2].partition("Given value type")[0].splitlines()
    reasons = [line.strip().removeprefix("- ") for line in lines]
    reasons = [line for line in reasons if line and not re.match(r"Expected a|Import path|Problem with", line)]
    if not reasons:
        return f"--{option} {name}: no class that settings can build; `mae pretrain --help all` lists the known ones"
    if missing := re.match(r"(--.+) (?:is|are) missing", reasons[0]):
        return f"--{option} {name}: missing: {missing[1].replace('--', f'--{option}.')}"
    return f"--{option} {name}: {' '.join(reasons)}"


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
