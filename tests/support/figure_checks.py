"""What the tests of benches ask of a figure in a JSON file."""

import math
from typing import Any


def check_figure(figure: dict[str, Any], rounds: int | None = None) -> None:
    """It is positive and finite, and its range is that of its rounds."""
    assert 0 < figure["low"] <= figure["median"] <= figure["high"] < math.inf
    assert (figure["low"], figure["high"]) == (min(figure["rounds"]), max(figure["rounds"]))
    assert rounds is None or len(figure["rounds"]) == rounds
