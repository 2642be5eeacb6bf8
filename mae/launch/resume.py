"""Going on with a run: from which checkpoint, and with which settings."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from mae.data.crops import BEFORE_IT_WAS_RECORDED, RESIZED_THEN_CROPPED
from mae.data.datamodule import ImageData
from mae.errors import UserError
from mae.options import flatten_settings
from mae.runtime import checkpoint_files
from mae.runtime.environment import is_first_rank
from mae.runtime.run_files import read_yaml
from mae.training.module import Stage
from mae.weights import load
from mae.weights.detect import NotFinite

# Settings that a run may change when it is started again: where and how it runs and is watched, not what it learns. The
# global batch has a check of its own.
FREE = (
    *("allow_changes", "cached.", "checkpoint.", "ckpt_path", "config", "online.", "panels.", "run_dir", "wandb."),
    *("data.batch_size_per_device", "data.download", "data.max_bad_images", "data.num_workers", "data.root"),
    *("data.train_dir", "data.val_dir", "model.activation_checkpointing", "model.compile", "model.cuda_graphs"),
    *("trainer.accelerator",),
    *("trainer.accumulate_grad_batches", "trainer.callbacks", "trainer.default_root_dir", "trainer.devices"),
    *("trainer.enable_", "trainer.log_every_n_steps", "trainer.logger", "trainer.max_epochs", "trainer.max_steps"),
    *("trainer.num_nodes", "trainer.plugins", "trainer.profiler", "trainer.strategy", "watchdog"),
)


class ResumePoint:
    """What a run folder holds before this start, and the checkpoint that the run goes on from.

    The checksum of the checkpoint is verified here, once; `load` opens the file, once.

    Args:
        run_dir: The run folder.
        ckpt_path: `--ckpt_path`: `last`, a file, or None for a new run.
        allow_changes: Only warn of settings that differ from those of the run.

    Attributes:
        path: The checkpoint, whole; None where the run starts from the beginning.
        description: What the checkpoint says of the run; empty without a checkpoint, or before `load`.
        started_before: The run has been started before, whether it came to a checkpoint or not.

    Raises:
        UserError: The run folder holds a run and `ckpt_path` is None, or the checkpoint is missing or damaged.
    """

    def __init__(self, run_dir: Path, ckpt_path: str | None, allow_changes: bool) -> None:
        self.run_dir, self.allow_changes = run_dir, allow_changes
        self.takes_newest = ckpt_path == "last"
        self.path = self.find_checkpoint(ckpt_path)
        self.description: dict[str, Any] = {}
        self.started_before = (run_dir / "config.yaml").exists()

    @property
    def ended_without_checkpoint(self) -> bool:
        """Whether an earlier start left its settings, and there is no checkpoint."""
        return self.started_before and not checkpoint_files.saved(self.run_dir)

    @property
    def step(self) -> int:
        """The optimiser step that the run goes on from."""
        step: int = self.description.get("step", 0)
        return step

    def find_checkpoint(self, ckpt_path: str | None) -> Path | None:
        if ckpt_path is None:
            if checkpoint_files.saved(self.run_dir):
                raise UserError(
                    f"{self.run_dir} holds a run; add --ckpt_path last to go on with it, or give another --run_dir"
                )
            return None
        if ckpt_path != "last":
            path = Path(ckpt_path)
            if not path.is_file():
                raise UserError(f"--ckpt_path {path} does not exist; `last` goes on with the run in --run_dir")
            if path.suffix == ".safetensors":
                raise load.not_a_checkpoint(path)
            if problem := checkpoint_files.damage(path):
                if not checkpoint_files.is_sealed(path):
                    problem += "; one of a plain Trainer goes on by its fit(ckpt_path=)"
                raise UserError(f"--ckpt_path {path} is damaged: {problem}")
            return path
        return self.newest()

    def newest(self, than: Path | None = None) -> Path | None:
        """The newest whole checkpoint, of those older `than` another; newer ones that are damaged are warned of."""
        newest, complaints = checkpoint_files.newest(self.run_dir, than)
        for complaint in complaints if is_first_rank() else ():
            print(f"mae: warning: {complaint}", flush=True)
        return newest

    def load(self, architecture: dict[str, Any]) -> dict[str, Any]:
        """The content of the checkpoint, whose description is kept.

        `last` goes past checkpoints whose numbers are not finite, as it does past damaged ones.

        Raises:
            UserError: It belongs to a network of another architecture, or cannot be used.
        """
        assert self.path is not None
        try:
            content = load.read_checkpoint(self.path, architecture)
        except NotFinite as error:
            older = self.newest(self.path) if self.takes_newest else None
            if older is None:
                raise
            if is_first_rank():
                print(f"mae: warning: {error}; going on from {older.name}", flush=True)
            self.path = older
            return self.load(architecture)
        self.description = content["mae"]
        return content

    def hint(self) -> str:
        """How to go on with the run after it has stopped, as a part of a sentence."""
        if checkpoint_files.saved(self.run_dir):
            return "--ckpt_path last goes on from the last checkpoint"
        return "there is no checkpoint yet, the same command starts anew"

    # ---- settings --------------------------------------------------------------------------------------------------

    def reject_changed_setting(self, key: str, now: Any, before: Any, where: str) -> None:
        """Refuse to go on with another value of a setting, or warn of it where changes are allowed.

        Args:
            where: What `before` was read from.
        """
        message = f"{key} is {now}, but {before} in {where}"
        if not self.allow_changes:
            raise UserError(f"{message}; another --run_dir starts a new run, --allow_changes true goes on all the same")
        if is_first_rank():
            print(f"mae: warning: {message}", flush=True)

    def reject_other_start(self, settings: dict[str, Any]) -> None:
        """Refuse to start a run that ended before its first checkpoint with other settings than those it left.

        Args:
            settings: Of this start, nested as in config.yaml.

        Raises:
            UserError: Settings differ, or the run has had checkpoints.
        """
        path = self.run_dir / "config.yaml"
        try:
            if not (before := read_yaml(path)):
                raise UserError(f"{path} holds no settings")
        except UserError as error:
            raise UserError(f"{error}; remove it, or give another --run_dir") from None
        if (newest := checkpoint_files.ever_saved(self.run_dir)) and not self.allow_changes:
            raise UserError(
                f"{self.run_dir} had checkpoints, the newest {newest}, and has none now: bring them back, or give "
                "another --run_dir; --allow_changes true starts this run over"
            )
        before, now = flatten_settings(before), flatten_settings(settings)
        where = f"{path}, left by a run that ended before its first checkpoint"
        for key in sorted(before.keys() & now.keys()):
            if before[key] != now[key] and not key.startswith(FREE):
                self.reject_changed_setting(key, now[key], before[key], where)

    def reject_other_recipe(self, recipe: dict[str, Any]) -> None:
        """Refuse to go on with what would be another run under the same name.

        Args:
            recipe: Of this start, as `Stage.settings` gives it and a checkpoint stores it.
        """
        stored = self.description.get("recipe", {})
        # Earlier versions had their own classes only, and did not say so.
        classes = {
            key: recipe[key] if recipe[key].startswith("mae.") else "a class of this package"
            for key in ("model_class", "data_class")
        }
        # Nor of evaluation pixels.
        if recipe.get(pixels := "evaluation pixels") == RESIZED_THEN_CROPPED:
            classes[pixels] = BEFORE_IT_WAS_RECORDED
        for key, before in ({**classes, **stored} if stored else {}).items():
            if recipe.get(key) != before:
                self.reject_changed_setting(key, recipe.get(key), before, f"the run that {self.path} belongs to")

    def keep_global_batch(self, stage: Stage, trainer: Trainer, data: ImageData) -> None:
        """With more or fewer devices than before, go on with as many images a step, in the same order."""
        before, world = self.description.get("devices"), trainer.world_size
        if not stage.elastic or before in (None, world):
            return
        images, batch = self.description["recipe"]["effective batch"], data.batch_size
        if batch * world * trainer.accumulate_grad_batches == images:
            return
        if images % world:
            raise UserError(
                f"{images} images a step, as before, cannot be divided among {world} devices: use another number"
            )
        # As few micro-batches as the memory for `batch` images allows.
        accumulate = next(n for n in range(1, images + 1) if images % (n * world) == 0 and images <= n * world * batch)
        data.batch_size, trainer.accumulate_grad_batches = images // (accumulate * world), accumulate
        if is_first_rank():
            print(
                f"{world} devices instead of {before}: {data.batch_size} images a device x {accumulate} accumulated, "
                f"so that a step has {images} images as before",
                flush=True,
            )
