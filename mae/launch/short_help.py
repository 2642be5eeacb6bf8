"""The help of the training commands that fits a screen; `--help all` gives every setting.

The settings are listed here as text, so that no torch is loaded to print them; a test compares them with the parsers.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 100
COLUMN = 42  # where the meaning of a setting begins


class Setting(NamedTuple):
    option: str
    default: str | None  # as YAML; None: the text says what holds
    meaning: str


Groups = dict[str, list[Setting]]


class StageHelp(NamedTuple):
    purpose: str
    groups: Groups
    examples: list[str]


RUN = [
    Setting(
        "--config", None, "a packaged config by name (`mae configs`) or a YAML file; repeatable, the last one wins"
    ),
    Setting("--run_dir", None, "folder of the run; by default runs/ and the config's name"),
    Setting("--ckpt_path", None, "`last` resumes the run in --run_dir, or starts it; or a .ckpt file to resume from"),
    Setting("--seed_everything", "0", "seed of the weights, the order of images, crops and masks"),
]
ROOT = Setting("--data.root", None, "folder with train/CLASS/* and val/CLASS/*, or shards of `mae pack`")
BATCH = Setting("--data.batch_size_per_device", "64", "images per device and forward pass")
WORKERS = Setting("--data.num_workers", None, "loader processes per device; by default one for each spare core")
HARDWARE = [
    Setting("--trainer.devices", "auto", "GPUs or processes on each node"),
    Setting("--trainer.num_nodes", "1", "nodes"),
    Setting("--trainer.precision", None, "by default mixed precision on GPUs, float32 on CPUs"),
    Setting("--trainer.accumulate_grad_batches", "1", "batches per optimiser step, on each device"),
]
WANDB = Setting("--wandb.mode", "auto", "online, offline, disabled; auto: online with an account, else offline")
ENCODER = "weights of any format (`mae inspect` says whether they fit)"

STAGES = {
    "pretrain": StageHelp(
        "MAE pre-training (arXiv:2111.06377).",
        {
            "Run": RUN,
            "Data": [
                ROOT,
                Setting("--data.image_size", None, "pixels, one number or [height, width]; by default the data set's"),
                BATCH,
                WORKERS,
            ],
            "Model": [
                Setting("--model.size", "base", "nano, micro, tiny, small, base, large or huge"),
                Setting("--model.patch_size", "16", "pixels, one number or [height, width]"),
                Setting("--model.mask_ratio", "0.75", "fraction of patches that are hidden"),
                Setting("--model.norm_pix_loss", "true", "predict patches normalised by their own mean and variance"),
                Setting("--model.init", None, "weights to start from (a warm start, not a resumed run)"),
            ],
            "Optimisation": [
                Setting("--model.base_lr", "1.5e-4", "learning rate per 256 images of the global batch"),
                Setting("--model.warmup_epochs", "40", "epochs of linear warm-up, before the cosine decay"),
                Setting("--trainer.max_epochs", "800", "epochs; --trainer.max_steps ends earlier"),
            ],
            "Hardware and logging": [*HARDWARE, WANDB],
        },
        [
            "mae pretrain --config pretrain/vitb16_in1k --data.root DIR",
            "mae pretrain --data.root DIR --model.size small --trainer.max_epochs 100 --run_dir runs/small",
        ],
    ),
    "linprobe": StageHelp(
        "Linear probe of frozen features (arXiv:2111.06377, Sec. A.1).",
        {
            "Run": [
                *RUN,
                Setting("--mode", "recipe", "recipe: the paper's training; cached: fast, on cached features; both"),
            ],
            "Data": [
                ROOT,
                Setting("--data.labels_per_class", None, "use so many labelled images of each class only"),
                BATCH,
                WORKERS,
            ],
            "Model": [
                Setting("--model.encoder", None, f"required: {ENCODER}"),
                Setting("--model.pool", "class", "what the probe sees: class token, or mean of the patch tokens"),
            ],
            "Optimisation": [
                Setting("--model.base_lr", "0.1", "learning rate of LARS per 256 images of the global batch"),
                Setting("--model.warmup_epochs", "10", "epochs of linear warm-up, before the cosine decay"),
                Setting("--trainer.max_epochs", "90", "epochs; --trainer.max_steps ends earlier"),
            ],
            "Hardware and logging": [*HARDWARE, WANDB],
        },
        [
            "mae linprobe --config linprobe/vitb16_in1k --model.encoder runs/pretrain_vitb16_in1k --data.root DIR",
            "mae linprobe --mode cached --model.encoder runs/pretrain_vitb16_in1k --data.root DIR",
        ],
    ),
    "finetune": StageHelp(
        "Fine-tuning, whole, partial or from random weights (arXiv:2111.06377, Sec. A.1, A.2).",
        {
            "Run": RUN,
            "Data": [
                ROOT,
                Setting("--data.labels_per_class", None, "use so many labelled images of each class only"),
                BATCH,
            ],
            "Model": [
                Setting("--model.encoder", None, f"required: {ENCODER}, or `scratch`: random"),
                Setting("--model.blocks", None, "train the last blocks only (0.5: the last MLP); by default all"),
                Setting("--model.lora_rank", None, "train low-rank updates of the attention only (needs peft)"),
                Setting("--model.drop_path", "0.1", "stochastic depth of the last block"),
            ],
            "Optimisation": [
                Setting("--model.base_lr", "1.0e-3", "learning rate per 256 images of the global batch"),
                Setting("--model.layer_decay", "0.75", "each layer's learning rate, relative to the one above it"),
                Setting("--model.warmup_epochs", "5", "epochs of linear warm-up, before the cosine decay"),
                Setting("--trainer.max_epochs", "100", "epochs; --trainer.max_steps ends earlier"),
            ],
            "Hardware and logging": [*HARDWARE, WANDB],
        },
        [
            "mae finetune --config finetune/vitb16_in1k --model.encoder runs/pretrain_vitb16_in1k --data.root DIR",
            "mae finetune --config finetune/vitb16_in1k_scratch --data.root DIR",
        ],
    ),
}


HELP = ("-h", "--help")


def is_wanted(args: Sequence[str]) -> bool:
    """Whether the arguments ask for the short help: --help, but not `--help all`."""
    return any(word in HELP for word in without_all(args)) and without_all(args) == list(args)


def without_all(args: Sequence[str]) -> list[str]:
    """The arguments with `--help all` replaced by the --help of the whole parser."""
    words: list[str] = []
    for word in args:
        if not (word == "all" and words and words[-1] in HELP):
            words.append("--help" if word == "--help=all" else word)
    return words


def short_help(command: str) -> str:
    """The settings of a training command that matter most, in groups, with two examples."""
    stage = STAGES[command]
    lines = [f"usage: mae {command} [--config NAME|FILE] [--SETTING VALUE ...]", "", stage.purpose]
    for title, settings in stage.groups.items():
        lines += ["", f"{title}:"]
        for setting in settings:
            default = f" (default: {setting.default})" if setting.default is not None else ""
            first, *rest = textwrap.wrap(setting.meaning + default, WIDTH - COLUMN)
            lines += [f"  {setting.option:<{COLUMN - 2}}{first}", *(" " * COLUMN + line for line in rest)]
    lines += ["", "Examples:", *(f"  {example}" for example in stage.examples), ""]
    lines += [f"mae {command} --help all           every setting, with Lightning's own"]
    lines += [f"mae {command} ... --print_config   the settings of this command as YAML, to save and change"]
    return "\n".join(lines)
