"""The parser of the training commands: Lightning's, with our errors and packaged configs."""

from lightning.pytorch.cli import LightningArgumentParser

from mae.options import ToolParser


class StageParser(ToolParser, LightningArgumentParser):
    """Lightning's parser, asked first by ours."""
