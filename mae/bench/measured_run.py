"""What `mae bench run` and `mae bench save` share: a pre-training run that is measured and leaves no weights."""

import contextlib
import io
import warnings
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from mae.bench.figures import add_json_option, check_options
from mae.callbacks.checkpointing import Checkpoints
from mae.callbacks.online_eval import Online
from mae.callbacks.reconstructions import Panels
from mae.launch.stages import PretrainCLI

# A measured run is a new one, without logs; it ends when enough is measured, not before.
UNMEASURED = (
    *("--ckpt_path=null", "--trainer.logger=false", "--trainer.limit_val_batches=0"),
    *("--trainer.enable_progress_bar=false", "--trainer.max_epochs=1000000", "--trainer.max_steps=-1"),
)


class MeasuredRunCLI(PretrainCLI):
    """The settings of `mae pretrain` and those of the bench."""

    positive: tuple[str, ...] = ()  # options that must be at least 1

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        add_json_option(parser)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        check_options(self.config, *self.positive)

    def finish(self) -> None:
        """A measured run writes no weights."""

    def fit_with(self, callback: Callback) -> None:
        """Train until the callback stops, without what would disturb it: checkpoints, panels, online evaluation."""
        usual: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        kept = [each for each in usual if not isinstance(each, Panels | Online | Checkpoints)]
        self.trainer.callbacks = [*kept, callback]  # type: ignore[attr-defined]
        # The recipe, and hints on settings, would be about a run that is none.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
            self.fit()
