"""The help of the training commands that fits a screen; `--help all` gives every setting.

The settings are listed here as text, so that no torch is loaded to print them; a test compares them with the parsers.
"""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 100
COLUMN = 38  # where the meaning of a setting begins


class HelpLine(NamedTuple):
    option: str
    default: str | None  # as YAML; None: the text says what holds
    meaning: str


class StageHelp(NamedTuple):
    purpose: str
    groups: dict[str, list[HelpLine]]
    examples: list[str]


LABELS = HelpLine("--data.labels_per_class", None, "use only so many labelled images of each class")
RUN = [
    HelpLine("--config", None, "a packaged config's name (`mae configs`) or a file; repeatable"),
    HelpLine("--run_dir", None, "folder of the run; by default runs/ and the config's name"),
    HelpLine("--ckpt_path", None, "`last` resumes the run in --run_dir; or a .ckpt file"),
    HelpLine("--seed_everything", "0", "seed of weights, image order, crops and masks"),
]
ROOT = HelpLine("--data.root", None, "folder with train/CLASS/* and val/CLASS/*, or packed shards")
BATCH = HelpLine("--data.batch_size_per_device", "64", "images per device and forward pass")
WORKERS = HelpLine("--data.num_workers", None, "loader processes per device; by default one a spare core")
HARDWARE = [
    HelpLine("--trainer.devices", "auto", "GPUs or processes on each node"),
    HelpLine("--trainer.num_nodes", "1", "nodes"),
    HelpLine("--trainer.precision", None, "by default mixed precision on GPUs, float32 on CPUs"),
    HelpLine("--trainer.accumulate_grad_batches", "1", "batches per optimiser step, on each device"),
]
WANDB = HelpLine("--wandb.mode", "auto", "auto (by account), online, offline or disabled")
ENCODER = "weights of any format, see `mae inspect`"

HELP_TEXTS = {
    "pretrain": StageHelp(
        "MAE pre-training (arXiv:2111.06377).",
        {
            "Run": RUN,
            "Data": [
                ROOT,
                HelpLine("--data.image_size", None, "pixels, one number or [height, width]; by default 224"),
                BATCH,
            ],
            "Model": [
                HelpLine("--model.size", "base", "nano, micro, tiny, small, base, large or huge"),
                HelpLine("--model.patch_size", "16", "pixels, one number or [height, width]"),
                HelpLine("--model.mask_ratio", "0.75", "fraction of patches that are hidden"),
                HelpLine("--model.norm_pix_loss", "true", "predict patches normalised one by one"),
                HelpLine("--model.init", None, "weights to start from; not the way to resume a run"),
            ],
            "Optimisation": [
                HelpLine("--model.base_lr", "1.5e-4", "learning rate per 256 images of a step"),
                HelpLine("--model.warmup_epochs", "40", "epochs of warm-up, before the cosine decay"),
                HelpLine("--trainer.max_epochs", "800", "epochs; --trainer.max_steps ends earlier"),
            ],
            "Hardware and logging": [*HARDWARE, WANDB],
        },
        [
            "mae pretrain --config pretrain/vitb16_in1k --data.root DIR",
            "mae pretrain --config pretrain/small --data.root DIR --data.image_size 96 --model.patch_size 12",
        ],
    ),
    "linprobe": StageHelp(
        "Linear probe of frozen features (arXiv:2111.06377, Sec. A.1).",
        {
            "Run": [*RUN, HelpLine("--mode", "recipe", "recipe (the paper's), cached (fast, on features), both")],
            "Data": [ROOT, LABELS, BATCH, WORKERS],
            "Model": [
                HelpLine("--model.encoder", None, f"required: {ENCODER}"),
                HelpLine("--model.pool", "class", "what the probe sees: class token or mean of patches"),
            ],
            "Optimisation": [
                HelpLine("--model.base_lr", "0.1", "learning rate of LARS per 256 images of a step"),
                HelpLine("--model.warmup_epochs", "10", "epochs of warm-up, before the cosine decay"),
                HelpLine("--trainer.max_epochs", "90", "epochs; --trainer.max_steps ends earlier"),
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
            "Data": [ROOT, LABELS, BATCH],
            "Model": [
                HelpLine("--model.encoder", None, f"required: {ENCODER}, or `scratch`: random"),
                HelpLine("--model.blocks", None, "train only the last blocks; 0.5: the last MLP"),
                HelpLine("--model.lora_rank", None, "train low-rank updates of the attention; needs peft"),
                HelpLine("--model.drop_path", "0.1", "stochastic depth of the last block"),
            ],
            "Optimisation": [
                HelpLine("--model.base_lr", "1.0e-3", "learning rate per 256 images of a step"),
                HelpLine("--model.layer_decay", "0.75", "learning rate of a layer relative to the next"),
                HelpLine("--model.warmup_epochs", "5", "epochs of warm-up, before the cosine decay"),
                HelpLine("--trainer.max_epochs", "100", "epochs; --trainer.max_steps ends earlier"),
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


def wants_short_help(args: Sequence[str]) -> bool:
    """Whether --help is among the arguments, and not as `--help all`."""
    return any(word in HELP for word in args) and with_full_help(args) == list(args)


def with_full_help(args: Sequence[str]) -> list[str]:
    """The arguments with `--help all` as the parser of all settings has it, --help."""
    words: list[str] = []
    for word in args:
        if not (word == "all" and words and words[-1] in HELP):
            words.append("--help" if word == "--help=all" else word)
    return words


def short_help(command: str) -> str:
    """The settings of a training command that matter most, in groups, with two examples."""
    stage = HELP_TEXTS[command]
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
