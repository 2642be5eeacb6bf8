"""The processes of a run: which one is first, what the others say, and how they end."""

import multiprocessing
import re
import signal
from typing import Any

import torch.distributed as dist


def gather(value: Any) -> list[Any]:
    """Every process's value, empty ones left out."""
    values: list[Any] = [value]
    if dist.is_available() and dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return [v for v in values if v]


def end_loaders() -> None:
    """At exit Python asks loader processes to end by a signal that they ignore, and waits for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for a fault
    for child in multiprocessing.active_children():
        child.kill()


def lost_peer(error: BaseException) -> str | None:
    """What to say where an error of torch tells that another process of the run is gone; None for other errors."""
    text = str(error)
    if isinstance(error, BrokenPipeError):  # of our own output
        return None
    if isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|Connection (closed|reset) by peer", text):
        return f"another process of the run is gone ({text.splitlines()[0].strip()[:200]})"
    return lost_peer(error.__context__) if error.__context__ else None
