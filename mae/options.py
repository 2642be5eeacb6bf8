"""Options that commands share: a parser whose errors are one line, and checks of files to write."""

import math
import os
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from mae.errors import UserError


class OneLineErrors:
    """Parser errors become UserErrors, instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message)


class ToolParser(OneLineErrors, ArgumentParser):
    pass


SRC_HELP = "Weights: a run folder or file, or the official code's, timm's, Hugging Face's."


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their keys on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def out_file(path: str, option: str = "--out") -> Path:
    """A file that can be written, before the work that fills it is done."""
    out = Path(path)
    if not out.parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder; wanted is a file")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UserError(f"{option} {out} cannot be written: no permission")
    return out


def out_folder(path: str) -> Path:
    """A folder that can be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be made: {error.strerror}") from None
    return Path(path)


def check_ranges(group: str, interval: str, **values: Any) -> None:
    """Refuse settings that are outside an interval.

    Args:
        group: Of the settings on the command line: `--GROUP.KEY`; empty: `--KEY`.
        interval: As in mathematics: "[0, 1)" is 0 or more and below 1, "(0, inf)" is above 0.
        values: By key; numbers, sequences of them, or None, which is not looked at.

    Raises:
        UserError: Names the key, its value and what is wanted.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
    below = "" if high == math.inf else f" and at most {high:g}" if interval[-1] == "]" else f" and below {high:g}"
    for key, value in values.items():
        for number in [] if value is None else value if isinstance(value, list | tuple) else [value]:
            reached = low <= number if interval[0] == "[" else low < number
            if not (reached and (number <= high if interval[-1] == "]" else number < high)):
                option = f"--{group}.{key}" if group else f"--{key}"
                raise UserError(f"{option} {value}: it must be {above}{below}")
