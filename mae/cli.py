"""The program `mae`: one subcommand a stage, each with its own settings; errors as one line and an exit code."""

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae import checkpoint, features, pictures
from mae.callbacks import Checkpoints, MetricsCSV, Panels, Progress
from mae.data import ImageData
from mae.errors import TrainingFailed, UserError
from mae.images import BadImage, center_box, decode_image, resized_crop
from mae.model import MaskedAutoencoder
from mae.pretrain import Pretrain
from mae.randomness import HELD_OUT_EPOCH, sample_noise
from mae.tracking import WandbSettings, wandb_logger


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 done, 1 failed, 2 the user's mistake, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            print(usage())
            return 0
        if args[0] not in COMMANDS:
            raise UserError(f"{args[0]!r} is no command; the commands are {', '.join(COMMANDS)}")
        quieten()
        COMMANDS[args[0]][1](args[1:])
    except UserError as error:
        return tell(error, 2)
    except TrainingFailed as error:
        return tell(error, 1)
    except KeyboardInterrupt:
        return 130
    return 0


def is_first_rank() -> bool:
    """Of all processes of the run, known from the launcher's environment before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def tell(error: Exception, code: int) -> int:
    # Ranks agree on why they stop, and one line is enough to say it.
    if is_first_rank():
        print(f"mae: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def usage() -> str:
    lines = [f"  {name:<12} {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(["usage: mae COMMAND [options]; mae COMMAND --help lists them", "", *lines])


def quieten() -> None:
    """Leave the terminal to what this program says: Lightning's banners and hints are off, its warnings stay on."""
    logging.getLogger("lightning").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    hints = [
        ".*does not have many workers.*",
        ".*`srun` command is available.*",
        ".*You have overridden `on_before_batch_transfer`.*",  # where masks are drawn; the data module leaves it alone
        ".*treespec.*is deprecated.*",
    ]
    for hint in hints:
        warnings.filterwarnings("ignore", hint)


class OneLineErrors:
    """Parser errors become UserErrors, instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message)


class StageParser(OneLineErrors, LightningArgumentParser):
    pass


class ToolParser(OneLineErrors, ArgumentParser):
    pass


# ---- mae pretrain ------------------------------------------------------------------------------------------------


# Settings of Lightning that would break the promise of what an epoch is, and the one value they may have.
WHOLE_STEPS_ONLY = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "use_distributed_sampler": False,
}


class PretrainCLI(LightningCLI):
    """Settings and objects of a pre-training run; `fit` runs it."""

    def __init__(self, args: Sequence[str]):
        super().__init__(
            Pretrain,
            ImageData,
            save_config_callback=None,
            trainer_defaults={
                "max_epochs": 800,
                "log_every_n_steps": 50,
                "use_distributed_sampler": False,  # ours divides the steps itself
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_kwargs={"prog": "mae pretrain", "description": "MAE pre-training (arXiv:2111.06377)."},
            parser_class=StageParser,
            args=list(args),
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--seed_everything", type=int, default=0, help="Seed of weights, order, crops and masks.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="Run folder; runs/ + the config's name.")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="`last`: go on with the run in run_dir; or a .ckpt file."
        )
        parser.add_class_arguments(WandbSettings, "wandb")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_lightning_class_args(Panels, "panels")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("run_dir", "checkpoint.dirpath", lambda run_dir: f"{run_dir}/checkpoints")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")
        parser.link_arguments("data.in_chans", "model.in_chans", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        config = parser.parse_args(args)
        if config.run_dir is None:
            name = Path(str(config.config[0])).stem if config.config else "pretrain"
            config = parser.parse_args([*args, f"--run_dir=runs/{name}"])
        self.config = config
        self.run_dir = Path(config.run_dir)

    def before_instantiate_classes(self) -> None:
        """What can be wrong with the settings and the run folder is said before anything is built."""
        for key, usual in WHOLE_STEPS_ONLY.items():
            if (value := self.config.trainer[key]) not in (None, usual):
                raise UserError(f"--trainer.{key} {value} would cut or repeat epochs; shorten with --trainer.max_steps")
        existing = self.run_dir / "checkpoints" / "last.ckpt"
        self.ckpt_path = self.config.ckpt_path
        if self.ckpt_path == "last":
            self.ckpt_path = str(existing) if existing.exists() else None
        elif self.ckpt_path is not None and not Path(self.ckpt_path).is_file():
            raise UserError(f"--ckpt_path {self.ckpt_path} does not exist; `last` goes on with the run in --run_dir")
        elif self.ckpt_path is None and existing.exists():
            raise UserError(
                f"{self.run_dir} holds a run; add --ckpt_path last to go on with it, or give another --run_dir"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.datamodule.setup("fit")  # a wrong folder is an error now, before a run folder or a process is started
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if is_first_rank():
            self.parser.save(self.config, str(self.run_dir / "config.yaml"), overwrite=True, multifile=False)
        given = self.config_init.trainer
        loggers: list[Logger] = [MetricsCSV(self.run_dir / "metrics.csv")]
        if given.logger is not False:
            settings = WandbSettings(**self.config.wandb.as_dict())
            merged = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            if wandb := wandb_logger(self.run_dir, settings, merged):
                loggers.append(wandb)
            loggers += given.logger if isinstance(given.logger, list) else [given.logger] if given.logger else []
        if given.precision is None:
            kwargs["precision"] = "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 32
        callbacks = list(given.callbacks or [])
        if given.enable_progress_bar is not False:
            callbacks.append(Progress())
        try:
            return super().instantiate_trainer(
                callbacks=callbacks, logger=loggers, default_root_dir=str(self.run_dir), **kwargs
            )
        except MisconfigurationException as error:
            raise UserError(f"--trainer: {error}") from None

    def fit(self) -> None:
        """Train to the end and export the weights.

        Raises:
            KeyboardInterrupt: After Ctrl-C, which Lightning turns into exit code 1.
        """
        if self.ckpt_path is not None:
            checkpoint.require_same(self.model.model, self.ckpt_path)
        if self.config.model.init and self.ckpt_path is None:
            said = checkpoint.warm_start(self.model.model, self.config.model.init)
            if is_first_rank():
                print(said, flush=True)
        try:
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path, weights_only=True)
        except SystemExit:
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        if self.trainer.is_global_zero:
            for path in checkpoint.export(self.model.model, self.model.description(), self.run_dir):
                print(f"wrote {path}", flush=True)


def pretrain(args: Sequence[str]) -> None:
    PretrainCLI(args).fit()


# ---- features: mae knn, mae probe, mae stats -----------------------------------------------------------------------


def knn(args: Sequence[str]) -> None:
    parser = feature_parser("knn", "Weighted k-NN accuracy of frozen features, no training.", "encoder")
    parser.add_argument("--k", type=int, default=20, help="Neighbours that vote.")
    parser.add_argument("--temperature", type=float, default=0.07, help="Votes weigh exp(cosine / temperature).")
    parser.add_argument(
        "--standardize",
        type=bool,
        default=True,
        help="Give each feature mean 0 and std 1 over the training images first.",
    )
    config = parser.parse_args(list(args))
    found = encoded(config.encoder, config)
    score = features.knn(features.standardized(found) if config.standardize else found, config.k, config.temperature)
    scale = "standardised" if config.standardize else "raw"
    print(f"k-NN top-1 {score:.2f} % (k {config.k}, T {config.temperature}, {scale} features; {sizes(found)})")


def probe(args: Sequence[str]) -> None:
    parser = feature_parser("probe", "Linear probe: logistic regression on frozen, cached features.", "model.encoder")
    config = parser.parse_args(list(args))
    found = encoded(config.model.encoder, config)
    score, strength = features.linear_probe(found)
    print(
        f"linear probe top-1 {score:.2f} % (C {strength:g}, chosen on a fifth of the training images; {sizes(found)})"
    )


def feature_parser(command: str, description: str, encoder: str) -> ToolParser:
    parser = ToolParser(prog=f"mae {command}", description=description)
    parser.add_argument("--config", action="config")
    parser.add_argument(f"--{encoder}", type=str, required=True, help="A run folder, .ckpt or .safetensors file.")
    parser.add_argument(
        "--pool", type=str, default="mean", choices=list(features.POOLS), help="Patch mean or class token."
    )
    parser.add_class_arguments(ImageData, "data")
    return parser


def encoded(src: str, config: Namespace) -> features.Features:
    """Features of both splits under the encoder; size, channels, mean and std are the encoder's own unless set."""
    weights = checkpoint.read(src)
    settings = config.data.as_dict()
    own = {"image_size": weights.config["image_size"], "in_chans": weights.config["in_chans"]}
    own |= {key: weights.description[key] for key in ("mean", "std")}
    data = ImageData(**settings | {key: value for key, value in own.items() if settings[key] is None})
    for key in ("image_size", "in_chans"):
        if as_list(getattr(data, key)) != as_list(own[key]):
            raise UserError(f"--data.{key} {getattr(data, key)} does not fit the encoder {src}, which takes {own[key]}")
    data.require_labels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, pool = weights.build().to(device), features.POOLS[config.pool]
    return features.extract_splits(lambda images: pool(model.encode(images)), data, device)


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def sizes(found: features.Features) -> str:
    return f"{len(found.train)} training images, {len(found.test)} test images"


def stats(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae stats", description="Mean and std of the training images' channels, for a config.")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ImageData, "data")
    data = ImageData(**parser.parse_args(list(args)).data.as_dict())
    for key, values in zip(("mean", "std"), data.statistics(), strict=True):
        print(f"--data.{key} '[{', '.join(f'{value:.4f}' for value in values)}]'")


# ---- mae reconstruct ---------------------------------------------------------------------------------------------


def reconstruct(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae reconstruct", description="Original, masked and reconstructed images, side by side.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Image files.")
    parser.add_argument("--model", type=str, required=True, help="A run folder, .ckpt or model.safetensors.")
    parser.add_argument("--out", type=str, required=True, help="The PNG to write.")
    parser.add_argument("--mask_ratio", type=float | None, default=None, help="Fraction to hide; as in pre-training.")
    parser.add_argument(
        "--mask", type=str | None, default=None, help="PNG, white = hidden: a pixel a patch, or image-sized."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the random masks.")
    config = parser.parse_args(list(args))
    weights = checkpoint.read(config.model)
    model = checkpoint.load(config.model)
    if model.num_patches and config.mask and config.mask_ratio is not None:
        raise UserError("--mask and --mask_ratio exclude each other: a mask says how much is hidden")
    try:
        pixels = [decode_image(path, model.in_chans) for path in config.images]
    except BadImage as error:
        raise UserError(str(error)) from None
    cropped = [resized_crop(p, center_box(p.shape[1], p.shape[2], model.image_size), model.image_size) for p in pixels]
    count = len(cropped)
    if config.mask:
        noise, ratio = given_mask(Path(config.mask), model)
        noise = noise.expand(count, -1)
    else:
        noise = sample_noise(config.seed, [HELD_OUT_EPOCH] * count, list(range(count)), model.num_patches)
        ratio = weights.description["mask_ratio"] if config.mask_ratio is None else config.mask_ratio
    mean, std = weights.description["mean"], weights.description["std"]
    images = torch.stack([normalized(image, mean, std) for image in cropped])
    try:
        with torch.no_grad():
            columns = pictures.reconstruct(model, images, noise, ratio, mean, std)
    except ValueError as error:
        raise UserError(f"--mask_ratio: {error}") from None
    pictures.panel(columns, Path(config.out))
    print(f"wrote {config.out}: {', '.join(columns)}")


def given_mask(path: Path, model: MaskedAutoencoder) -> tuple[torch.Tensor, float]:
    """Scores (1, N) that hide what is white in the file, and the ratio that goes with them."""
    try:
        white = (decode_image(path, in_chans=1) > 127)[0]
    except BadImage as error:
        raise UserError(str(error)) from None
    if white.shape == model.image_size:
        (rows, columns), (ph, pw) = model.grid, model.patch_size
        white = white.reshape(rows, ph, columns, pw).float().mean(dim=(1, 3)) > 0.5
    if white.shape != model.grid:
        raise UserError(
            f"--mask {path} is {tuple(white.shape)} pixels; wanted {model.grid}, a pixel a patch, or {model.image_size}"
        )
    hidden = int(white.sum())
    if not 0 < hidden < model.num_patches:
        raise UserError(
            f"--mask {path} hides {hidden} of {model.num_patches} patches; some must be hidden and some visible"
        )
    # Half a patch off: int(N * (1 - ratio)) then has no rounding error to fear.
    return white.flatten()[None].float(), (hidden - 0.5) / model.num_patches


def normalized(image: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    from mae.data import normalize

    return normalize(image[None], torch.tensor(mean), torch.tensor(std))[0]


def demo(args: Sequence[str]) -> None:
    from mae.demo import run

    run(args)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "demo": ("pre-train on bundled digits, compare features, draw reconstructions", demo),
    "pretrain": ("MAE pre-training", pretrain),
    "probe": ("linear probe of frozen features", probe),
    "knn": ("weighted k-NN of frozen features", knn),
    "reconstruct": ("original, masked and reconstructed images as a PNG", reconstruct),
    "stats": ("mean and std of a data set, for its config", stats),
}

if __name__ == "__main__":
    sys.exit(main())
