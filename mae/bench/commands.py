"""`mae bench`: how fast the package is, and what limits it."""

from collections.abc import Callable, Sequence
from importlib import import_module

from mae.errors import UserError

# Name: (what it measures, where its function is).
BENCHES: dict[str, tuple[str, str]] = {
    "step": ("the training step beside plainer ones and Hugging Face's; by settings (--sweep)", "step:step_command"),
    "data": ("the input pipeline beside the official one, and loader processes", "data:data_command"),
    "run": (
        "loader against optimiser step in a run of `mae pretrain`: which limits, what to change",
        "run:run_command",
    ),
    "save": ("what checkpoints, and results that repeat to the bit, cost the step", "checkpoints:save_command"),
}


def bench_command(args: Sequence[str]) -> None:
    """Start one of `BENCHES`."""
    known = ", ".join(BENCHES)
    if not args:
        raise UserError(f"`mae bench` needs the name of a bench: {known}")
    name, *rest = args
    if name in ("-h", "--help"):
        lines = [f"  {bench:<8} {text}" for bench, (text, _) in BENCHES.items()]
        print("\n".join(["usage: mae bench WHAT [options]; mae bench WHAT --help lists them", "", *lines]))
        return
    if name not in BENCHES:
        raise UserError(f"{name!r} is not a bench; the benches are {known}")
    module, _, function = BENCHES[name][1].partition(":")
    command: Callable[[Sequence[str]], None] = getattr(import_module(f"mae.bench.{module}"), function)
    command(rest)
