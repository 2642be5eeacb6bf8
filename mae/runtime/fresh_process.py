"""A function called in a process of its own, whose memory nothing else has used."""

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from mae.errors import UserError

T = TypeVar("T")


class ProcessEnded(Exception):
    """The process ended before it had a result; a negative exit code is the number of a signal."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"the process ended with exit code {exit_code}")
        self.exit_code = exit_code


def call_in_fresh_process(function: Callable[..., T], *args: Any, seconds: float | None = None) -> T:
    """`function(*args)` in a new process, which is gone when this returns.

    Args:
        function: Must be importable; it, its arguments and its result are pickled.
        seconds: How long to wait for the result; None: without limit.

    Raises:
        UserError: The function raised it.
        ProcessEnded: The process failed or was killed.
        TimeoutError: It took too long.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(there, function, args), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise TimeoutError(f"no result after {seconds:g} s")
        result: T | UserError = here.recv()
    except EOFError:
        process.join()
        raise ProcessEnded(process.exitcode) from None
    finally:
        here.close()
        process.kill()
        process.join()
    if isinstance(result, UserError):
        raise result
    return result


def _send_result(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        pipe.send(function(*args))
    except UserError as error:
        pipe.send(error)
