"""The options of the commands that need no Lightning to know them.

A command's parser is kept apart from its work, and nothing heavy is imported here, so that `mae COMMAND --help` and a
mistyped option are answered at once. Some choices repeat types of heavy modules; a test compares them.
"""

from collections.abc import Callable
from typing import Any, Literal

from mae.options import SRC_HELP, ToolParser

CLASSIFIER_HELP = "A classifier: a run folder of mae finetune or probe, or its files; official, timm's, Hugging Face's."

DEMO_DIR = "runs/demo"

FEATURE_POOLS = ["mean", "class", "both"]


def demo_parser() -> ToolParser:
    parser = ToolParser(
        prog="mae demo", description="The whole method on 5,000 real handwritten digits, in minutes on a laptop."
    )
    parser.add_argument("--run_dir", type=str, default=DEMO_DIR, help="Run folder.")
    parser.add_argument("--steps", type=int, default=2000, help="Optimiser steps of pre-training, 64 images each.")
    parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, order and masks.")
    return parser


def predict_parser() -> ToolParser:
    parser = ToolParser(prog="mae predict", description="Class and probabilities of images, as CSV.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE|DIR", help="Image files, or folders of them.")
    parser.add_argument("--model", type=str, required=True, help=CLASSIFIER_HELP)
    parser.add_argument("--out", type=str, required=True, help="The CSV to write: a row an image, a column a class.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images at once.")
    parser.add_argument("--num_workers", type=int | None, default=None, help="Loader processes; a spare core each.")
    return parser


def reconstruct_parser() -> ToolParser:
    parser = ToolParser(prog="mae reconstruct", description="Original, masked and reconstructed images, side by side.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--model", type=str, required=True, help=SRC_HELP)
    parser.add_argument("--out", type=str, required=True, help="The PNG to write.")
    parser.add_argument("--mask_ratio", type=float | None, default=None, help="Fraction to hide; as in pre-training.")
    parser.add_argument(
        "--mask", type=str | None, default=None, help="PNG, white = hidden: a pixel a patch, or image-sized."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random masks.")
    return parser


def attention_parser() -> ToolParser:
    parser = ToolParser(prog="mae attention", description="Where the class token of an encoder looks, as a PNG.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Image files: a row each.")
    parser.add_argument("--model", type=str, required=True, help=SRC_HELP)
    parser.add_argument("--out", type=str, required=True, help="The PNG to write.")
    parser.add_argument("--block", type=int, default=-1, help="Block: 0 is the first, -1 the last.")
    return parser


def embed_parser() -> ToolParser:
    parser = ToolParser(prog="mae embed", description="Features of a folder of any images, as Parquet or npz.")
    parser.add_argument("--config", action="config")
    parser.add_argument("--encoder", type=str, required=True, help=SRC_HELP)
    parser.add_argument(
        "--data.root", type=str, required=True,
        help="Folder of images, labelled where it has a folder a class or such folders below train/ and val/; a .tar "
        "file of images; or the shards of `mae pack`.",
    )  # fmt: skip
    parser.add_argument("--out", type=str, required=True, help="The .parquet or .npz file to write: a row an image.")
    parser.add_argument(
        "--pool", default="mean", choices=FEATURE_POOLS, help="Mean of patch tokens, class token, or both."
    )
    parser.add_argument(
        "--layers", type=int | list[int], default=-1,
        help="Blocks counted from the end, -1 or [-4,-1]: a column each, the encoder's final norm applied.",
    )  # fmt: skip
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="Data type of the features.")
    parser.add_argument("--allow_finetuned", type=bool, default=False, help="Take the encoder of a classifier, too.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images a device takes at once.")
    parser.add_argument(
        "--num_workers", type=int | None, default=None, help="Loader processes a device; a spare core each."
    )
    parser.add_argument("--devices", type=int | str, default="auto", help="Processes or GPUs; the file is the same.")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto.")
    parser.add_argument(
        "--max_bad_images", type=int, default=0, help="Unreadable images to leave out; they are listed beside --out."
    )
    parser.add_argument(
        "--force", type=bool, default=False, nargs="?", const=True, help="Replace --out, and parts of other settings."
    )
    return parser


def add_override_options(parser: ToolParser) -> None:
    """Options for what a file of weights does not say about its architecture."""
    unrecorded: dict[str, tuple[Any, str]] = {
        "num_heads": (int, "Attention heads of the encoder"),
        "decoder_num_heads": (int, "Attention heads of the decoder"),
        "norm_pix_loss": (bool, "Whether the decoder predicts normalised patches or plain pixels"),
        "pool": (Literal["mean", "class"], "Tokens that a classifier judges by"),
        "prefix": (str, "Prefix of the encoder to take, of several"),
    }
    for name, (kind, meaning) in unrecorded.items():
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=f"{meaning}, if SRC does not tell.")
    grid_help = "Rows and columns of patches, if SRC does not tell."
    parser.add_argument("--grid", type=int, nargs=2, default=None, metavar=("ROWS", "COLUMNS"), help=grid_help)


def inspect_parser() -> ToolParser:
    parser = ToolParser(prog="mae inspect", description="What is in a file of weights, and what it can be used for.")
    parser.add_argument("src", type=str, metavar="SRC", help=SRC_HELP)
    parser.add_argument("--json", type=str | None, default=None, help="Write the same as data to this file.")
    add_override_options(parser)
    return parser


def convert_parser() -> ToolParser:
    parser = ToolParser(
        prog="mae convert",
        description="Weights into another format, checked numerically before they get their name.",
    )
    parser.add_argument("src", type=str, metavar="SRC", help="A run folder or file, of any known format.")
    parser.add_argument("dst", type=str, metavar="DST", help="A file, by its suffix; without one a folder.")
    formats = Literal["mae", "official", "timm", "hf", "onnx", "export"]
    parser.add_argument("--format", type=formats, required=True, help="The format of DST.")
    parser.add_argument("--force", type=bool, default=False, nargs="?", const=True, help="Overwrite what is there.")
    add_override_options(parser)
    size = int | tuple[int, int] | None
    parser.add_argument("--image_size", type=size, default=None, help="For images of this size, positions resampled.")
    parser.add_argument("--in_chans", type=int | None, default=None, help="For so many channels, by timm's rule.")
    outputs = Literal["tokens", "reconstruction", "logits"]
    parser.add_argument("--output", type=outputs | None, default=None, help="onnx, export: what it computes.")
    parser.add_argument("--free_size", type=bool, default=False, help="onnx, export of tokens: images of any size.")
    parser.add_argument("--mask_ratio", type=float | None, default=None, help="onnx, export of a reconstruction.")
    parser.add_argument("--quantize", type=bool, default=False, help="onnx: int8 weights, checked for what it costs.")
    parser.add_argument(
        "--push", type=str | None, default=None, help="Upload the folder to OWNER/NAME on a model hub, too."
    )
    parser.add_argument("--private", type=bool, default=True, help="Whether what --push makes is private.")
    return parser


def doctor_parser() -> ToolParser:
    parser = ToolParser(prog="mae doctor", description="What is in a data folder and what is wrong with it.")
    parser.add_argument("dir", type=str, metavar="DIR", help="As --data.root: a folder, a .tar file or packed shards.")
    parser.add_argument("--train_dir", type=str | None, default=None, help="As --data.train_dir.")
    parser.add_argument("--val_dir", type=str | None, default=None, help="As --data.val_dir.")
    parser.add_argument("--in_chans", type=int, default=3, help="Channels that images are converted to.")
    parser.add_argument("--num_workers", type=int | None, default=None, help="Loader processes; a spare core each.")
    parser.add_argument("--json", type=str | None, default=None, help="Write all figures to this file.")
    parser.add_argument("--list", type=str | None, default=None, help="Write every problem to this CSV: path, problem.")
    return parser


def pack_parser() -> ToolParser:
    parser = ToolParser(prog="mae pack", description="Images into tar shards (WebDataset) with an index.")
    parser.add_argument("--config", action="config")
    parser.add_argument(
        "src", type=str | None, nargs="?", metavar="SRC", help="A folder of images, with or without the splits train/ "
        "and val/; a .tar file of images; or a folder that holds the ILSVRC 2012 archives as downloaded.",
    )  # fmt: skip
    parser.add_argument("dst", type=str | None, nargs="?", metavar="DST", help="DST/train and DST/val are written.")
    parser.add_argument(
        "--verify", type=str | None, default=None, metavar="DST", help="Pack nothing, find every damaged record of DST."
    )
    parser.add_argument("--train_dir", type=str | None, default=None, help="As --data.train_dir.")
    parser.add_argument("--val_dir", type=str | None, default=None, help="As --data.val_dir.")
    parser.add_argument("--shard_mb", type=float, default=256, help="Size that a shard does not exceed, in MiB.")
    parser.add_argument(
        "--short_side", type=int | None, default=None,
        help="Encode images anew whose shorter side is larger, at this many pixels (default: bytes as they are).",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=int | None, default=None, help="Quality of JPEGs encoded anew, 1 to 100 (default 95)."
    )
    parser.add_argument("--in_chans", type=int, default=3, help="Channels, of the statistics and of what is encoded.")
    parser.add_argument("--max_bad_images", type=int, default=0, help="Unreadable images to pack as they are.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace the shards that DST holds.")
    parser.add_argument(
        "--num_workers", type=int | None, default=None, help="Loader processes (default: one a spare core, 8 at most)."
    )
    return parser


def report_parser() -> ToolParser:
    parser = ToolParser(
        prog="mae report",
        description="Pre-training, k-NN, linear probe and fine-tuning over several seeds, on one page beside the "
        "published figures. Finished runs are left out, stopped ones go on.",
    )
    parser.add_argument(
        "--config", type=str, required=True, help="Sections data, pretrain, knn, probe, finetune, published (YAML)."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Each stage runs once for each.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the runs and report.md.")
    parser.add_argument("--root", type=str | None, default=None, help="Folder of the data: data.root of every stage.")
    stages = ["pretrain", "knn", "probe", "finetune"]
    parser.add_argument("--stages", type=str, nargs="+", choices=stages, help="Run only these (default: all).")
    return parser


def configs_parser() -> ToolParser:
    return ToolParser(
        prog="mae configs", description="The packaged configs, which `--config NAME` finds from any folder."
    )


PARSERS: dict[str, Callable[[], ToolParser]] = {
    "demo": demo_parser,
    "predict": predict_parser,
    "report": report_parser,
    "reconstruct": reconstruct_parser,
    "attention": attention_parser,
    "embed": embed_parser,
    "inspect": inspect_parser,
    "convert": convert_parser,
    "doctor": doctor_parser,
    "pack": pack_parser,
    "configs": configs_parser,
}
