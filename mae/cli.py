"""The program `mae`: one command a stage or use; errors as one line and an exit code.

Nothing heavy is imported here: torch and Lightning take seconds, and a command loads only what it uses.
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module

from mae import __version__
from mae.errors import LoaderDied, PeerLost, Stopped, TrainingFailed, UserError, did_you_mean
from mae.launch.short_help import short_help, wants_short_help, with_full_help
from mae.runtime import signals
from mae.runtime.environment import environment_rank, is_first_rank
from mae.runtime.text import printable_output

ALONE_SECONDS = 7.0
TRAINING = ("pretrain", "linprobe", "finetune")
WITHOUT_WANDB = ("attention", "reconstruct", "inspect", "convert", "predict", "embed")
ALIASES = {"probe": "linprobe"}  # old names of commands

# Name: (what it does, where its function is).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("pre-train on bundled digits, compare features, draw reconstructions", "launch.demo:demo_command"),
    "pretrain": ("MAE pre-training", "launch.stages:pretrain_command"),
    "linprobe": ("linear probe of frozen features (alias: probe)", "launch.stages:linprobe_command"),
    "finetune": ("fine-tuning, whole, partial, or from scratch", "launch.stages:finetune_command"),
    "evaluate": ("top-1, top-5 and per-class accuracy of a classifier", "evaluation.evaluate:evaluate_command"),
    "predict": ("classes and probabilities of images, as CSV", "evaluation.evaluate:predict_command"),
    "knn": ("weighted k-NN of frozen features", "evaluation.knn:knn_command"),
    "report": ("pretrain, knn, linprobe and finetune over several seeds, as one page", "launch.report:report_command"),
    "reconstruct": (
        "original, masked and reconstructed images as a PNG",
        "evaluation.reconstruct:reconstruct_command",
    ),
    "attention": ("where the class token looks, as a PNG", "evaluation.attention:attention_command"),
    "embed": ("features of a folder of any images, as Parquet or npz", "evaluation.embed:embed_command"),
    "inspect": (
        "what a file of weights is, what it can be used for, what is wrong with it",
        "weights.inspect:inspect_command",
    ),
    "convert": (
        "weights into another format: mae, official, timm, hf, onnx, export",
        "weights.convert:convert_command",
    ),
    "plan": ("batch per device, accumulation, learning rate and memory of a run", "launch.plan:plan_command"),
    "bench": ("speed and memory: step, data, run, save", "bench.commands:bench_command"),
    "doctor": ("what is in a data folder and what is wrong with it", "data.prepare.doctor:doctor_command"),
    "pack": ("images into tar shards with an index; --verify finds damaged records", "data.prepare.pack:pack_command"),
    "stats": ("mean and std of a data set, for its config", "data.prepare.stats:stats_command"),
    "configs": ("the packaged configs, which --config finds by name", "launch.list_configs:configs_command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, or stopped and back in the batch system's queue; 1 failed; 2 the user's mistake; 130 after Ctrl-C; 143 after
    another signal.
    """
    with printable_output():
        return exit_code(list(sys.argv[1:] if argv is None else argv))


def exit_code(args: Sequence[str]) -> int:
    """As `main`."""
    try:
        if not args or args[0] in ("-h", "--help"):
            print(usage())
            return 0
        if args[0] == "--version":
            print(f"mae {__version__}")
            return 0
        name = ALIASES.get(args[0], args[0])
        if name not in COMMANDS:
            hint = did_you_mean(name, [*COMMANDS, *ALIASES])
            commands = f"{hint + ' The' if hint else '; the'} commands are {', '.join(COMMANDS)}"
            raise UserError(f"{name!r} is not a command{commands}")
        dispatch(name, args[1:])
        if name != args[0] and is_first_rank():
            print(f"mae: note: `mae {args[0]}` is an old name of `mae {name}`", file=sys.stderr)
    except UserError as error:
        return report_error(error, 2)
    except TrainingFailed as error:
        return report_error(error, 1)
    except Stopped as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        datasets = sys.modules.get("mae.data.datasets")  # only a program that has loaded data can lose a loader process
        if datasets and (message := datasets.worker_death_message(error)):
            return report_error(LoaderDied(message), 1)
        raise
    return 0


def dispatch(name: str, args: Sequence[str]) -> None:
    """Import what a command needs, and call it.

    Where that takes seconds and the options are known without it, --help and mistakes are answered first: the command
    parses the same arguments once more.
    """
    if name in TRAINING:
        if wants_short_help(args):
            print(short_help(name))
            return
        args = with_full_help(args)
        signals.note_early()
    elif parser := import_module("mae.commands").PARSERS.get(name):
        parser().parse_args(list(args))
    with hidden_module("wandb") if name in WITHOUT_WANDB else nullcontext():
        command = command_function(name)
    silence_libraries()  # after the import: Lightning sets its own level there
    command(args)


@contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Let a module look as if it were not installed: timm imports wandb for its own scripts, which takes a second."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def command_function(name: str) -> Callable[[Sequence[str]], None]:
    module, _, function = COMMANDS[name][1].partition(":")
    command: Callable[[Sequence[str]], None] = getattr(import_module(f"mae.{module}"), function)
    return command


def usage() -> str:
    lines = [f"  {name:<12} {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(["usage: mae COMMAND [options]; mae COMMAND --help lists them", "", *lines])


def report_error(error: Exception, code: int) -> int:
    line = f"mae: error: {' '.join(str(error).split())}"
    distributed = sys.modules.get("torch.distributed")
    if is_first_rank() or isinstance(error, LoaderDied | PeerLost):
        print(line, file=sys.stderr, flush=True)
    elif distributed is None or not distributed.is_initialized():
        # Once the ranks can talk they agree on why they stop, and one line is enough. Until then each finds its own
        # mistakes; the first rank has reported the same one, and the launcher ends this process meanwhile.
        time.sleep(ALONE_SECONDS)
        print(f"{line} (rank {environment_rank()})", file=sys.stderr, flush=True)
    return code


def silence_libraries() -> None:
    """Turn off Lightning's banners and the hints that do not apply here; its other warnings stay on."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    hints = [
        ".*does not have many workers.*",
        ".*`srun` command is available.*",
        r".*module\(s\) in eval mode at the start of training.*",  # frozen encoders and averages are
        ".*You have overridden `on_before_batch_transfer`.*",  # where masks are drawn; the data module leaves it alone
        ".*treespec.*is deprecated.*",
        ".*is smaller than the logging interval.*",  # the last step of a run is always logged
        ".*Total length of .* across ranks is zero.*",  # no held-out images
        ".*recommended to use `self.log.*sync_dist=True.*",  # our figures are summed over processes before
    ]
    for hint in hints:
        warnings.filterwarnings("ignore", hint)


if __name__ == "__main__":
    sys.exit(main())
