"""`mae bench`: how fast it goes, and what limits it."""

from collections.abc import Callable, Sequence

from mae.bench import checkpoints, data, export, growth, step
from mae.bench import run as run_module
from mae.errors import UserError

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "step": ("the training step beside plainer ones, and beside Hugging Face's", step.step_command),
    "growth": ("the training step as one setting grows, in time and in FLOPs", growth.growth),
    "scaling": ("the training step by 1, 2, ... processes, beside so many times one", growth.scaling),
    "data": ("the input pipeline beside the official one, and loader processes", data.data_command),
    "run": (
        "loader against optimiser step in a run of `mae pretrain`: what limits, what to change",
        run_module.run_command,
    ),
    "export": ("an encoder in ONNX Runtime, in float32 and int8: speed, accuracy, size", export.export_command),
    "save": ("what checkpoints, and results that repeat to the bit, cost the training step", checkpoints.save_command),
}


def bench_command(args: Sequence[str]) -> None:
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
