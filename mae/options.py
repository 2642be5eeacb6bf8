"""Options that commands share: a parser whose errors are one line, and checks of files to write."""

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
