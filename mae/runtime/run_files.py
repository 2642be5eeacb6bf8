"""Reading settings and logs: people open, edit and copy such files, and disks fill up in the midst of a line."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import yaml

from mae.errors import UserError
from mae.runtime.reading import METRICS, SETTINGS, YAML, read_regular

DEPTH, VALUES = 50, 50_000  # of settings in YAML, at most; those of a run have 4 levels and some 200 values


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
        UserError: As for `load_yaml`, or it holds something else.
    """
    settings = load_yaml(path)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds {type(settings).__name__} where settings are wanted (key: value)")
    return settings


def load_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        UserError: It cannot be read, or is no YAML within the bounds of this module.
    """
    text = read_text(path, YAML)
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the date 2025-13-45, for example
        reason = "it nests too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{path} is not YAML that can be read: {reason}") from None


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: It is no YAML, or out of bounds.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        measure(root, {}, 0)  # before anything is built
        return loader.construct_document(root)
    finally:
        loader.dispose()


def measure(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """The number of values below a node, references counted as often as they are used.

    Args:
        sizes: Of the nodes seen so far; 0 while their values are counted.

    Raises:
        ValueError: There are too many, or too deep ones; a value holds itself, or a key comes twice.
    """
    place = f"line {node.start_mark.line + 1}"
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(f"{place}: the value holds itself")
        return sizes[id(node)]
    if depth > DEPTH:
        raise ValueError(f"{place}: it nests deeper than {DEPTH} levels")
    sizes[id(node)], size, keys = 0, 1, set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(child, tuple):
            key, child = child
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: a key is no plain text")
            if key.value in keys:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value} comes twice")
            keys.add(key.value)
        size += measure(child, sizes, depth + 1)
    if size > VALUES:
        raise ValueError(f"{place}: it has more than {VALUES:,} values, repeated ones included")
    sizes[id(node)] = size
    return size


def settings_in(text: str | bytes) -> dict[str, Any]:
    """The settings in a text of JSON.

    Raises:
        ValueError: It is too long, is not JSON, holds something else, a name twice, or a number that is not finite.
    """
    if len(text) > SETTINGS:
        raise ValueError(f"it has {len(text):,} bytes, over the limit of {SETTINGS:,}")
    try:
        content = json.loads(text, object_pairs_hook=unique, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of settings")
    return content


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    settings = dict(pairs)
    if len(settings) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)!r} twice")
    return settings


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:30]} is not a finite number")
    return value


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
