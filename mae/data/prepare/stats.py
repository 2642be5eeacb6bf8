"""`mae stats`: mean and std of the channels of a data set."""

from collections.abc import Sequence

from mae.data.channel_stats import as_option
from mae.data.datamodule import ImageData
from mae.options import ToolParser


def stats_command(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae stats", description="Mean and std of the training images' channels, for a config.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ImageData, "data")
    data = ImageData(**parser.parse_args(list(args)).data.as_dict())
    for key, values in zip(("mean", "std"), data.statistics(), strict=True):
        print(as_option(key, values))
