"""`mae bench`: how fast it goes, and what limits it."""

from collections.abc import Callable, Sequence

from mae import bench_data, bench_export, bench_growth, bench_run, bench_save, bench_step
from mae.errors import UserError

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "step": ("the training step beside plainer ones, and beside Hugging Face's", bench_step.run),
    "growth": ("the training step as one setting grows, in time and in FLOPs", bench_growth.growth),
    "scaling": ("the training step by 1, 2, ... processes, beside so many times one", bench_growth.scaling),
    "data": ("the input pipeline beside the official one, and loader processes", bench_data.run),
    "run": ("loader against optimiser step in a run of `mae pretrain`: what limits, what to change", bench_run.run),
    "export": ("an encoder in ONNX Runtime, in float32 and int8: speed, accuracy, size", bench_export.run),
    "save": ("what checkpoints, and results that repeat to the bit, cost the training step", bench_save.run),
}


def run(args: Sequence[str]) -> None:
    """One of the commands below `mae bench`."""
    known = ", ".join(COMMANDS)
    if not args:
        raise UserError(f"`mae bench` needs to know what: {known}")
    if args[0] in ("-h", "--help"):
        lines = [f"  {name:<8} {text}" for name, (text, _) in COMMANDS.items()]
        print("\n".join(["usage: mae bench WHAT [options]; mae bench WHAT --help lists them", "", *lines]))
        return
    if args[0] not in COMMANDS:
        raise UserError(f"{args[0]!r} is nothing that `mae bench` measures; it knows {known}")
    COMMANDS[args[0]][1](args[1:])
