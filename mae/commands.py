"""The commands of `mae`: one a stage, each with its own settings; errors as one line and an exit code."""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae import bench, convert, demo, doctor, embed, evaluate, inspection, pack, plan, report, runs, tools
from mae.errors import LoaderDied, PeerLost, Stopped, TrainingFailed, UserError
from mae.samples import dead_loader

ALONE_SECONDS = 7.0


def run(args: Sequence[str]) -> int:
    """Run one subcommand; returns the exit code.

    0 done, or stopped and back in the batch system's queue; 1 failed; 2 the user's mistake; 130 after Ctrl-C; 143 after
    another signal.
    """
    try:
        if not args or args[0] in ("-h", "--help"):
            print(usage())
            return 0
        if args[0] not in COMMANDS:
            raise UserError(f"{args[0]!r} is no command; the commands are {', '.join(COMMANDS)}")
        quieten()
        COMMANDS[args[0]][1](args[1:])
    except UserError as error:
        return tell(error, 2)
    except TrainingFailed as error:
        return tell(error, 1)
    except Stopped as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if said := dead_loader(error):
            return tell(LoaderDied(said), 1)
        raise
    return 0


def tell(error: Exception, code: int) -> int:
    line = f"mae: error: {' '.join(str(error).split())}"
    if runs.is_first_rank() or isinstance(error, LoaderDied | PeerLost):
        print(line, file=sys.stderr, flush=True)
    elif not dist.is_initialized():
        # Later, ranks agree on why they stop, and one line is enough to say it. Until then each finds its own mistakes;
        # where the first rank has found the same, it has said so, and the launcher ends this one meanwhile.
        time.sleep(ALONE_SECONDS)
        print(f"{line} (rank {getattr(rank_zero_only, 'rank', 0)})", file=sys.stderr, flush=True)
    return code


def usage() -> str:
    lines = [f"  {name:<12} {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(["usage: mae COMMAND [options]; mae COMMAND --help lists them", "", *lines])


def quieten() -> None:
    """Leave the terminal to what this program says: Lightning's banners and hints are off, its warnings stay on."""
    logging.getLogger("lightning").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    hints = [
        ".*does not have many workers.*",
        ".*`srun` command is available.*",
        r".*module\(s\) in eval mode at the start of training.*",  # frozen encoders and averages are
        ".*You have overridden `on_before_batch_transfer`.*",  # where masks are drawn; the data module leaves it alone
        ".*treespec.*is deprecated.*",
        ".*recommended to use `self.log.*sync_dist=True.*",  # our figures are summed over processes before
    ]
    for hint in hints:
        warnings.filterwarnings("ignore", hint)


def pretrain(args: Sequence[str]) -> None:
    runs.PretrainCLI(args).fit()


def probe(args: Sequence[str]) -> None:
    runs.ProbeCLI(args).fit()


def finetune(args: Sequence[str]) -> None:
    runs.FinetuneCLI(args).fit()


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "demo": ("pre-train on bundled digits, compare features, draw reconstructions", demo.run),
    "pretrain": ("MAE pre-training", pretrain),
    "probe": ("linear probe of frozen features: the paper's recipe, or fast on cached features", probe),
    "finetune": ("fine-tuning, whole, partial, or from scratch", finetune),
    "evaluate": ("top-1, top-5 and per-class accuracy of a classifier", evaluate.evaluate),
    "predict": ("classes and probabilities of images, as CSV", evaluate.predict),
    "knn": ("weighted k-NN of frozen features", tools.knn),
    "report": (
        "pretrain, knn, probe and finetune over several seeds, as one page beside published figures",
        report.run,
    ),
    "reconstruct": ("original, masked and reconstructed images as a PNG", tools.reconstruct),
    "embed": ("features of a folder of any images, as Parquet or npz", embed.embed),
    "inspect": ("what a file of weights is, what it can be used for, what is wrong with it", inspection.inspect),
    "convert": ("weights into another format: this one, official, timm, Hugging Face, ONNX, torch.export", convert.run),
    "plan": ("batch a device, accumulation, learning rate and memory of a run, before there is a machine", plan.run),
    "bench": ("speed and memory: step, growth, scaling, data, run, export, save", bench.run),
    "doctor": ("what is in a data folder and what is wrong with it", doctor.run),
    "pack": ("images into tar shards with an index; --verify finds damaged records", pack.run),
    "stats": ("mean and std of a data set, for its config", tools.stats),
}
