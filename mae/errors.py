"""Errors that are told, not traced."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's mistake: told as one line that names the file, key or value and the way out; exit code 2."""


class TrainingFailed(RuntimeError):
    """The run cannot go on (a non-finite loss): told as one line; exit code 1."""


class LoaderDied(TrainingFailed):
    """A loader process is gone: told by the rank it belonged to, whichever that is."""


class PeerLost(TrainingFailed):
    """Another process of the run is gone: told by whoever misses it."""


class Stopped(Exception):
    """The run was asked to stop, and has saved: told as one line, with the exit code that says by what."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message where something close to the word is known, "; did you mean X?", else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
