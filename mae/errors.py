"""Errors that are told, not traced."""


class UserError(ValueError):
    """The user's mistake: told as one line that names the file, key or value and the way out; exit code 2."""


class TrainingFailed(RuntimeError):
    """The run cannot go on (a non-finite loss): told as one line; exit code 1."""


class LoaderDied(TrainingFailed):
    """A loader process is gone: told by the rank it belonged to, whichever that is."""
