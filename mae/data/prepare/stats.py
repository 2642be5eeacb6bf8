"""`mae stats`: mean and std of the channels of a data set, as `mae doctor` finds them."""

import sys
from collections.abc import Sequence

import numpy as np

from mae.data.channel_stats import as_option, constant_channels, mean_and_std, moments
from mae.data.datamodule import ImageData
from mae.data.decode import BadImage
from mae.data.prepare.survey import survey_split
from mae.data.sources import FileSource
from mae.errors import UserError
from mae.options import ToolParser


def stats_command(args: Sequence[str]) -> None:
    parser = ToolParser(
        prog="mae stats",
        description="Mean and std of the training images' channels, for a config: the line of `mae doctor DIR`, also "
        "for data sets that are no folder. Images are taken whole, each counting the same.",
    )
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ImageData, "data")
    data = ImageData(**parser.parse_args(list(args)).data.as_dict())
    statistics = channel_statistics(data)
    if data.layout:
        print(data.layout, file=sys.stderr)  # what is on standard output can be given to a command
    for key, values in zip(("mean", "std"), statistics, strict=True):
        print(as_option(key, values))
    if warning := constant_channels(*statistics):
        print(warning, file=sys.stderr)


def channel_statistics(data: ImageData) -> tuple[list[float], list[float]]:
    """Mean and std of each channel over the training images in [0, 1], whole and each counting the same.

    Raises:
        UserError: An image cannot be read.
    """
    data.load()
    source = data.train_source
    assert source is not None
    if isinstance(source, FileSource):
        split = survey_split("train", data.require_root(), source, data.in_chans, data.num_workers)
        if split.errors:
            index, reason = min(split.errors.items())
            raise UserError(
                f"{source.where(index)}: {reason}; `mae doctor` lists every such image, and leaves them out"
            )
        return mean_and_std(split.moments, len(source))
    sums = np.zeros((data.in_chans, 2))
    for picture in source.open_all(range(len(source))):
        if isinstance(picture, BadImage):
            raise UserError(str(picture))
        sums += moments(picture.pixels())
    return mean_and_std(sums, len(source))
