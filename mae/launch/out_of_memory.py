"""For runs that end without memory: how much there was, and the settings with which the run would fit."""

import contextlib
import os
import resource
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from mae.data.datamodule import ImageData
from mae.errors import UserError
from mae.runtime import memory
from mae.training.module import Stage

MANY = 2**30  # images: no estimate


CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


# Files of a control group: what it may have, what it has, and the key of what it would give back, in memory.stat.
CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that a process has or could get on its device, measured before training.

    On CPUs this includes what Python and its libraries take.

    Args:
        processes: How many processes of the run share the memory of this machine's CPUs.
    """
    if device.type == "cuda":
        # What torch has reserved for its tensors is not free, but this process can use it.
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device)
    free = min(left for left in (physical() // processes, cgroup(processes), address_space()) if left is not None)
    return max(0, free) + memory.resident()


def physical() -> int:
    """Bytes that the machine could give without swapping."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def address_space() -> int | None:
    """Bytes left of `ulimit -v`; None: there is no such limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit - memory.status("VmSize")


def cgroup(processes: int = 1) -> int | None:
    """Bytes left, for each process, of what a container or a batch system allows; None: as much as there is."""
    limits = []
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            version, top = (1, CGROUPS / "memory") if controllers else (2, CGROUPS)
            # The limit may be set further up; inside a container the path may be that of the machine around it.
            group = top / path.lstrip("/")
            limits += [left for folder in (group, *group.parents) if (left := cgroup_left(folder, version)) is not None]
    return min(limits) // processes if limits else None


def cgroup_left(folder: Path, version: int) -> int | None:
    limit, used, key = CGROUP_FILES[version]
    with contextlib.suppress(OSError, ValueError):  # `max` is no number
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return left + int(stat.get(key, 0))
    return None


def message(trainer: Trainer, stage: Stage, data: ImageData, available: int, checkpointing: bool | None) -> str:
    """The error message of a run that has run out of memory: how much there was, and what needs less.

    Args:
        available: Bytes, by `available_memory`.
        checkpointing: `--model.activation_checkpointing`; None: this stage has no such setting.
    """
    from mae.models import memory_estimate  # loaded only where something has gone wrong

    device = trainer.strategy.root_device
    compiled = any(getattr(module, "_compiled_call_impl", None) for module in stage.model.modules())
    try:
        fits = memory_estimate.largest_batch(
            stage.model,
            (data.in_chans, *data.image_size),
            getattr(stage, "mask_ratio", None),
            available,
            trainer.precision,
            compiled,
            device.type,
            accumulated=True,
            devices=trainer.world_size,
            averaged=getattr(stage, "ema", None) is not None,
        )
    except (MemoryError, RuntimeError, UserError):  # no memory to think, or a precision that is not known there
        fits = MANY
    return (
        f"out of memory with {data.batch_size} images a device ({device}, {available / memory.GIB:.1f} GiB): "
        + settings_that_need_less(data.batch_size, trainer.accumulate_grad_batches, fits, checkpointing)
    )


def settings_that_need_less(batch: int, accumulate: int, fits: int, checkpointing: bool | None) -> str:
    """The settings to change, as a part of a sentence.

    Args:
        batch: Images a device in a micro-batch, which are too many.
        accumulate: Micro-batches an optimiser step.
        fits: Images that would not be too many; 0: not even one.
        checkpointing: Whether activations are computed twice already; None: this stage has no such setting.
    """
    images = batch * accumulate
    # Where the estimate does not know why there were too many: half of them.
    most = fits if fits < batch else batch // 2
    if most:
        fewer = max(n for n in range(1, most + 1) if images % n == 0)
        return (
            f"--data.batch_size_per_device {fewer} --trainer.accumulate_grad_batches {images // fewer} needs less, "
            "with the same global batch"
        )
    if checkpointing is False:
        least = "" if batch == 1 else f" --data.batch_size_per_device 1 --trainer.accumulate_grad_batches {images}"
        return f"not even one image would fit, by estimate: --model.activation_checkpointing true{least} needs less"
    return "not even one image would fit, by estimate: take a smaller --model.size, or --trainer.strategy fsdp2"
