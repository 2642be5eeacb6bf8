"""Reading the text files of a run folder: people open, edit and copy them, and disks fill up in the midst of a line."""

import csv
from pathlib import Path
from typing import Any

import yaml

from mae.errors import UserError
from mae.runtime.reading import METRICS, SETTINGS, read_regular


def read_text(path: Path, limit: int = SETTINGS) -> str:
    """
    Raises:
        UserError: The file cannot be read, is larger than the limit (bytes), or is not text.
    """
    try:
        return read_regular(path, limit).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; none in an empty one.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        settings = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the date 2025-13-45, for example
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML: {reason}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds {type(settings).__name__} where settings are wanted (key: value)")
    return settings


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a `metrics.csv`; none where there is no file.

    A last line without an end is left out: a full disk has cut it off, or it is being written.

    Raises:
        UserError: It cannot be read, or is not as it was written.
    """
    if not path.exists():
        return [], []
    lines = [line for line in read_text(path, METRICS).splitlines(keepends=True) if line.endswith("\n")]
    reader = csv.DictReader(lines)
    columns, rows, last = list(reader.fieldnames or []), [], -1
    wrong = f"the first column is {columns[0]!r} where step is wanted" if columns and columns[0] != "step" else ""
    for row in reader if not wrong else ():
        try:
            if None in row or None in row.values():
                raise ValueError(f"it has not as many values as there are columns ({len(columns)})")
            step = int(row["step"])
            for value in filter(None, row.values()):
                float(value)
        except ValueError as error:
            wrong = f"line {reader.line_num}: {error}"
            break
        if step <= last:
            wrong = f"line {reader.line_num}: step {step} comes after step {last}"
            break
        last = step
        rows.append(row)
    if wrong:
        raise UserError(
            f"{path} was changed by something else: {wrong}. Bring it back as it was, or move it away: the run goes on "
            "without its earlier rows"
        )
    return columns, rows
