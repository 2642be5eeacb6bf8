"""The machine that a measurement was made on."""

import contextlib
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "lightning", "pillow", "simplejpeg", "numpy")  # those that decide about speed


LOADAVG = Path("/proc/loadavg")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """The number of cores that this process may use: those it may run on, or fewer by the quota of its container."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota() -> float:
    """Cores' worth of time that the cgroups of this process may take (versions 1 and 2); infinite without a limit."""
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        own = next((line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::")), "/")
        folder = CGROUPS / own.strip("/")
        for path in (folder, *folder.parents):
            if path.is_relative_to(CGROUPS) and (path / "cpu.max").is_file():
                quota, period = (path / "cpu.max").read_text().split()
                limits.append(math.inf if quota == "max" else int(quota) / int(period))
    with contextlib.suppress(OSError, ValueError):
        used, whole = (int((CGROUPS / "cpu" / f"cpu.cfs_{key}_us").read_text()) for key in ("quota", "period"))
        limits.append(used / whole if used > 0 else math.inf)
    return min(limits)


def busy_cores() -> float:
    """Cores that others use: over the last minute, and at this moment, whichever is less.

    The average alone would count what the user has just run before.
    """
    load = os.getloadavg()[0]
    with contextlib.suppress(OSError, ValueError, IndexError):
        load = min(load, int(LOADAVG.read_text().split()[3].partition("/")[0]) - 1)  # without this process
    return load


def crowding(threads: int, processes: int = 1) -> str:
    """What makes a run on this CPU slow by having more threads than free cores, and the way out; empty if nothing does.

    Threads that wait for each other at the end of each matrix product wait for the one that has no core.

    Args:
        threads: Of each process.
        processes: Of the run, on this machine.
    """
    cores, load, machine = available_cores(), busy_cores(), os.cpu_count() or 1
    if threads * processes > cores:
        what, fitting = f"{threads * processes} threads on {cores} cores", max(1, cores // processes)
    elif threads * processes > 1 and load > machine / 2:
        what = f"{threads * processes} threads on a machine of {machine} cores with a load of {load:.1f} already"
        fitting = max(1, int(cores * max(0.0, 1 - load / machine)) // processes)
    else:
        return ""
    if fitting >= threads:
        return f"{what}: this can be several times slower; use fewer processes"
    return f"{what}: this can be 10 times slower; set the environment variable OMP_NUM_THREADS={fitting}"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_details(device: "torch.device") -> dict[str, Any]:
    """Hardware and versions, without which a measured speed says nothing."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }
