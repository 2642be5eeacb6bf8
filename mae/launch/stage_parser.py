"""The parser of the training commands: Lightning's, with our errors and packaged configs."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from mae.errors import UserError
from mae.launch.trainer_settings import class_error
from mae.options import ToolParser


class StageParser(ToolParser, LightningArgumentParser):
    """Lightning's parser, asked first by ours."""

    def readable(self, message: str) -> str:
        return class_error(message) or super().readable(message)

    def instantiate(self, *args: Any, **settings: Any) -> Any:
        try:
            return getattr(super(), INSTANTIATE)(*args, **settings)
        except ValueError as error:
            if isinstance(error, UserError) or not (message := class_error(str(error))):
                raise
            raise UserError(message) from None


# Its name in the jsonargparse that is installed; Lightning calls it by the former one.
INSTANTIATE = "instantiate" if hasattr(LightningArgumentParser, "instantiate") else "instantiate_classes"
if INSTANTIATE == "instantiate_classes":
    StageParser.instantiate_classes = StageParser.instantiate  # type: ignore[assignment]
