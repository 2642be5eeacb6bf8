"""What the benches share: figures with their spread, turns, options, torch's threads, a JSON file."""

import contextlib
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from mae.errors import UserError
from mae.options import out_file
from mae.runtime.files import write_report
from mae.runtime.machine import available_cores

T = TypeVar("T")

TURN_SECONDS = 0.5  # a turn has as many steps as fill this, so that waiting for the device costs nothing

MOST_STEPS = 50  # in a turn


class Figure(NamedTuple):
    """A quantity that was measured once a round."""

    median: float
    low: float
    high: float
    rounds: list[float]

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values), list(values))


def ratio(values: Figure, base: Figure) -> Figure:
    """The quotient of each round: what slows the machine down for a while slows down both."""
    return figure([value / other for value, other in zip(values.rounds, base.rounds, strict=True)])


def consecutive_groups(items: Sequence[T], count: int = 8) -> list[list[T]]:
    """At most `count` groups of neighbours, of nearly the same length, none empty."""
    return [[items[i] for i in group] for group in np.array_split(np.arange(len(items)), min(count, len(items)))]


def alternate(items: Sequence[T], turn: int) -> list[T]:
    """The order of a turn, reversed every other time: each finds in the caches what its neighbour has left there."""
    return list(items)[:: -1 if turn % 2 else 1]


def steps_per_turn(seconds: float) -> int:
    """How many steps, of so many seconds each, fill a turn."""
    return min(MOST_STEPS, max(1, round(TURN_SECONDS / max(seconds, 1e-9))))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with `count` threads and compiles for as many: its cache may hold programs for another number."""
    import torch._inductor.config as inductor

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with inductor.patch({"cpp.threads": count}):
            yield
    finally:
        torch.set_num_threads(before)


def add_json_option(parser: ArgumentParser) -> None:
    parser.add_argument("--json", type=str | None, default=None, help="Also write all figures to this file.")


def check_options(config: Namespace, *positive: str) -> None:
    """Check `--json` and those options, numbers or lists of numbers, that must be at least 1.

    Raises:
        UserError: One is smaller, there are more threads than cores, or the JSON file cannot be written.
    """
    for option in positive:
        values = config[option] if isinstance(config[option], list) else [config[option]]
        for value in values:
            if value is not None and value < 1:
                raise UserError(f"--{option} {value}: at least 1")
            if option == "threads" and value is not None and value > available_cores():
                raise UserError(f"--threads {value}: this process may use 1 to {available_cores()}")
    if config.json:
        out_file(config.json, "--json")


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    if path:
        write_report(path, json.dumps(plain_values(figures), indent=1) + "\n")


def plain_values(value: Any) -> Any:
    """Each Figure in a nested dict or list as a dict of its fields."""
    if isinstance(value, Figure):
        return value._asdict()
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    return {str(key): plain_values(item) for key, item in value.items()} if isinstance(value, dict) else value
