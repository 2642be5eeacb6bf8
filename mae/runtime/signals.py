"""Signals as wishes: noted when they come, obeyed at the end of an optimiser step.

A handler that did more, such as saving, could come upon a process half-way through a collective that the others have
not reached yet, and each would wait for the other. Imports nothing heavy: it listens before the rest is loaded.
"""

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType


class Wish(IntEnum):
    """What a signal asks for; of several, on one rank or on different ones, the highest counts."""

    NONE = 0
    INTERRUPT = 1  # Ctrl-C: save and stop
    END = 2  # SIGTERM: save, go back to the queue where that can be had, else stop
    REQUEUE = 3  # SIGUSR1, the warning that a batch system gives: the same


WISHES = {signal.SIGINT: Wish.INTERRUPT, signal.SIGTERM: Wish.END, signal.SIGUSR1: Wish.REQUEUE}

PR_SET_PDEATHSIG = 1  # of Linux' prctl

EXIT_CODES = {Wish.INTERRUPT: 130, Wish.END: 143, Wish.REQUEUE: 143}


wished = Wish.NONE  # of this process


def note(number: int, frame: FrameType | None) -> None:
    global wished
    wish = WISHES[signal.Signals(number)]
    if wish == wished == Wish.INTERRUPT:
        raise KeyboardInterrupt  # a second Ctrl-C: not even to the end of this step
    wished = max(wished, wish)


def note_early() -> None:
    """Until training starts only SIGUSR1 is noted: it would kill the process, and nothing would requeue the job."""
    signal.signal(signal.SIGUSR1, note)


@contextmanager
def noted() -> Iterator[None]:
    """While a run trains, signals are wishes."""
    global wished
    before = {number: signal.signal(number, note) for number in WISHES}
    try:
        yield
    finally:
        wished = Wish.NONE
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore() -> None:
    """For loader processes: a batch system signals them, too, but they serve the step under way."""
    for number in WISHES:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
