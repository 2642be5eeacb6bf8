"""The processes of a run: what they exchange, and how they end."""

import atexit
import functools
import multiprocessing
import re
import signal
from typing import Any

import torch.distributed as dist
from torch import Tensor


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, empty ones left out; all processes call it together."""
    values: list[Any] = [value]
    if dist.is_available() and dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return [v for v in values if v]


def all_reduce(value: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce `value` over all processes, in place; all of them call it together. Does nothing in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op)


@functools.cache
def end_loaders_at_exit() -> None:
    """Let the end of this process, however it comes, be that of the loader processes that are left.

    Python would ask them to end by a signal that they ignore, and wait for them.
    """
    atexit.register(kill_daemons)


def kill_daemons() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as a failure
    for child in multiprocessing.active_children():
        if child.daemon:  # as torch's loader processes are
            child.kill()


def lost_peer(error: BaseException) -> str | None:
    """The message for an error by which torch reports that another process of the run is gone, else None."""
    text = str(error)
    if isinstance(error, BrokenPipeError):  # our own standard output was closed
        return None
    if isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|Connection (closed|reset) by peer", text):
        return f"another process of the run is gone ({text.splitlines()[0].strip()[:200]})"
    return lost_peer(error.__context__) if error.__context__ else None
