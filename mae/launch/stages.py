"""The command lines of the stages: pretrain, linprobe, finetune."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import WandbLogger

from mae.callbacks.online_eval import Online
from mae.callbacks.reconstructions import Panels
from mae.classify import SCRATCH
from mae.data.datamodule import DEFAULTS, ImageData
from mae.data.labelled import FinetuneData, LabelledData, ProbeData
from mae.data.sources import Subset
from mae.errors import UserError
from mae.evaluation import baseline, cached_probe, plots
from mae.evaluation.cached_probe import CachedSettings
from mae.evaluation.metrics import Report, score_line
from mae.finetune import Finetune
from mae.launch.stage_cli import StageCLI
from mae.linprobe import LinearProbe
from mae.pretrain import Pretrain
from mae.runtime.environment import is_first_rank
from mae.runtime.files import atomic_write_text
from mae.runtime.text import escaped
from mae.training.fsdp import full_state
from mae.weights.load import (
    export_autoencoder,
    export_classifier,
    fill_data_settings,
    read_weights,
    trained_data_settings,
    warm_start,
)


class PretrainCLI(StageCLI):
    command, description = "pretrain", "MAE pre-training (arXiv:2111.06377)."
    stage, data, epochs = Pretrain, ImageData, 800

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(Panels, "panels")
        parser.add_lightning_class_args(Online, "online")

    def start(self) -> None:
        if self.config.model.init:
            message = warm_start(self.model.model, self.config.model.init)
            if is_first_rank():
                print(message, flush=True)

    def finish(self) -> None:
        state = full_state(self.model.model)
        if self.trainer.is_global_zero:
            for path in export_autoencoder(state, self.model.description(), self.run_dir):
                print(f"wrote {path}", flush=True)


class ClassifyCLI(StageCLI):
    """A run that ends with a classifier and its scores."""

    data: type[LabelledData]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        encoder = self.config.model.encoder
        if encoder == SCRATCH:
            return
        # The encoder decides what images look like, where the settings do not.
        wanted = trained_data_settings(read_weights(encoder).description)
        dataset = self.config.data.dataset
        if dataset != "folder" and DEFAULTS[dataset].in_chans != wanted["in_chans"]:
            raise UserError(
                f"--data.dataset {dataset} has images of {DEFAULTS[dataset].in_chans} channels, {encoder} takes "
                f"{wanted['in_chans']}"
            )
        self.config.data.update(
            Namespace(**fill_data_settings(self.config.data.as_dict(), wanted, encoder, fixed=("in_chans",)))
        )

    def finish(self) -> None:
        model, data = self.model, self.datamodule
        if data.val_source is not None and model.report_step != model.global_step:
            self.trainer.validate(model, datamodule=data, verbose=False)
        state = model.trained_state()
        if not self.trainer.is_global_zero:
            return
        paths = export_classifier(state, model.description(), self.run_dir)
        if isinstance(data.train_source, Subset):
            paths.append(self.run_dir / "subset.txt")
            names = map(data.train_source.name, range(len(data.train_source)))
            atomic_write_text(paths[-1], "".join(f"{escaped(name)}\n" for name in names))
        if model.report is not None:
            paths += model.report.write(
                self.run_dir, step=model.global_step, seconds=round(model.step_metrics.seconds, 3)
            )
            paths.append(self.picture(model.report, self.run_dir, "confusion"))
        print("\n".join(f"wrote {path}" for path in paths), flush=True)
        if model.report is not None:
            title = {"linprobe": "linear probe", "finetune": "fine-tuned"}[self.command]
            print(score_line(title, model.report), flush=True)

    def picture(self, report: Report, folder: Path, key: str) -> Path:
        """The confusion matrix and the worst classes, as a file and in W&B."""
        path = folder / "confusion.png"
        plots.confusion(report, path)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key, [str(path)], self.model.global_step, caption=["rows: true classes"])
        return path


class FinetuneCLI(ClassifyCLI):
    command, description = "finetune", "Fine-tuning, whole, partial or from scratch (arXiv:2111.06377)."
    stage, data, epochs = Finetune, FinetuneData, 100


class LinearProbeCLI(ClassifyCLI):
    command, description = "linprobe", "Linear probe of frozen features (arXiv:2111.06377)."
    stage, data, epochs = LinearProbe, ProbeData, 90

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--mode",
            type=Literal["recipe", "cached", "both"],
            default="recipe",
            help="The paper's training, the fast probe on cached features, or both and how they compare.",
        )
        parser.add_argument(
            "--baseline",
            type=baseline.Choice,
            default="auto",
            help=f"{baseline.BASELINE_HELP} With --mode cached or both.",
        )
        parser.add_class_arguments(CachedSettings, "cached")

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        mode, trainer = self.config.mode, self.config.trainer
        if mode != "recipe" and (str(trainer.devices) not in ("auto", "1") or trainer.num_nodes > 1):
            raise UserError(f"--mode {mode} runs in one process: set --trainer.devices 1, --trainer.num_nodes 1")
        if mode == "recipe" and self.config.baseline is True:
            raise UserError("--baseline true: the untrained network is probed by --mode cached or both")
        if mode == "both" and trainer.limit_val_batches == 0:
            raise UserError("--mode both compares on held-out images: --trainer.limit_val_batches 0 leaves them out")
        if mode == "cached" and self.config.ckpt_path is None and (self.run_dir / "cached" / "results.json").exists():
            raise UserError(
                f"{self.run_dir} holds a cached probe; give another --run_dir, or --ckpt_path last to redo it"
            )
        defaults = self.parser.get_defaults()
        unused = {"recipe": ["cached"], "cached": ["model", "trainer"], "both": []}[mode]
        used = {"model.encoder", "model.size", "model.patch_size", "model.embed_dim", "model.depth", "model.num_heads"}
        used |= {"model.allow_finetuned", "model.seed", "trainer.accelerator", "trainer.devices", "trainer.logger"}
        without_effect = [
            f"{group}.{key}"
            for group in unused
            for key, value in self.config[group].items()
            if f"{group}.{key}" not in used and value != defaults[group].get(key)
        ]
        if without_effect and is_first_rank():
            print(f"mode {mode}: not used: {', '.join(without_effect)}", flush=True)

    def reject_other_start(self) -> None:
        if self.config.mode != "cached" and not (self.run_dir / "cached").exists():
            super().reject_other_start()

    def fit(self) -> None:
        mode = self.config.mode
        if mode == "recipe":
            super().fit()
            return
        try:
            if self.trainer.world_size > 1:
                raise UserError(f"--mode {mode} runs in one process: set --trainer.devices 1")
            if mode == "both":
                self.check_start()  # before the cached probe, too
            fast = self.fit_cached()
            for logger in self.wandb_loggers() if mode == "cached" else ():
                logger.complete()
        except BaseException:
            self.clean_up()
            raise
        if mode == "cached":
            self.clean_up()
            return
        super().fit()
        self.compare(fast)

    def fit_cached(self) -> cached_probe.CachedResult:
        settings = CachedSettings(**self.config.cached.as_dict())
        network, device = self.model.model, self.trainer.strategy.root_device
        data = self.datamodule
        recipe = cached_probe.recipe(settings, data, self.model.start_note)
        cached_probe.checked_features(network, data, settings)
        self.write_config()
        self.start_recording()
        print(recipe, flush=True)
        result = cached_probe.run_cached_probe(network, data, settings, self.model.seed, device)
        seconds = round(result.encoding + result.training, 3)
        folder = self.run_dir / "cached"
        about: dict[str, Any] = {"feature": result.chosen.feature, "rate": result.chosen.rate}
        untrained = self.fit_untrained(settings)
        if untrained:
            about["untrained_acc1"] = untrained[0].report.acc1
        paths = result.report.write(folder, seconds=seconds, **about)
        atomic_write_text(folder / "table.txt", f"{recipe}\n\n{result.table()}\n")
        self.picture(result.report, folder, "cached/confusion")
        print(f"{result.table()}\nwrote {paths[0]}")
        print(
            f"linear probe (cached features) top-1 {result.report.acc1:.2f} %: {result.chosen.feature}, rate "
            f"{result.chosen.rate:g}; {result.encoding:.1f} s to encode, {result.training:.1f} s for all heads",
            flush=True,
        )
        if untrained:
            print(
                f"untrained top-1 {untrained[0].report.acc1:.2f} %: {untrained[0].chosen.feature} ({untrained[1]})",
                flush=True,
            )
        return result

    def fit_untrained(self, settings: CachedSettings) -> tuple[cached_probe.CachedResult, str] | None:
        """The same probe of the same network untrained, and in words which weights it has; None if not wanted."""
        data, src = self.datamodule, self.config.model.encoder
        assert data.train_source is not None
        assert data.val_source is not None
        images = len(data.train_source) + len(data.val_source)
        if src == SCRATCH or not baseline.wanted(self.config.baseline, images):
            return None
        network, which = baseline.untrained_encoder(read_weights(src).adapted(data.image_size))
        device = self.trainer.strategy.root_device
        return cached_probe.run_cached_probe(network, data, settings, self.model.seed, device), which

    def compare(self, fast: cached_probe.CachedResult) -> None:
        recipe, seconds = self.model.report, fast.encoding + fast.training
        recipe_seconds = self.model.step_metrics.seconds
        difference = fast.report.acc1 - recipe.acc1
        print(
            f"mode      top-1  seconds, encoding included\n"
            f"recipe   {recipe.acc1:>6.2f}  {recipe_seconds:.1f} ({self.model.pool})\n"
            f"cached   {fast.report.acc1:>6.2f}  {seconds:.1f} ({fast.chosen.feature})\n"
            f"cached is {recipe_seconds / seconds:.1f} times as fast, top-1 {difference:+.2f}",
            flush=True,
        )


def pretrain_command(args: Sequence[str]) -> None:
    PretrainCLI(args).fit()


def linprobe_command(args: Sequence[str]) -> None:
    LinearProbeCLI(args).fit()


def finetune_command(args: Sequence[str]) -> None:
    FinetuneCLI(args).fit()
