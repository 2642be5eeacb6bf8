"""The main jobs of the command line as functions, for notebooks and scripts; they return objects.

They do what `mae pretrain`, `mae linprobe` and `mae embed` do, with the same defaults, run folders and errors.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mae.errors import UserError
from mae.evaluation.embed import embed_command
from mae.launch.stage_cli import StageCLI
from mae.launch.stages import LinearProbeCLI, PretrainCLI
from mae.runtime.run_files import read_metrics
from mae.runtime.text import printable_output
from mae.training.module import Stage


class Run(NamedTuple):
    """A run that has come to its end."""

    run_dir: Path  # config.yaml, metrics.csv, checkpoints/, and the weights
    module: Stage  # the LightningModule, trained
    metrics: dict[str, float]  # each as it was last logged: train/loss, val/loss, val/acc1, ...

    @property
    def encoder(self) -> Path:
        """The run folder, as every function and command takes it for SRC."""
        return self.run_dir


class Features(NamedTuple):
    """Features of images."""

    features: np.ndarray  # (n, D) float32
    paths: list[str]  # n names, below the folder of the images
    labels: list[str]  # n names of classes, empty where there is none


def run_pretrain(
    data: str | Path, out: str | Path, size: str = "base", epochs: int = 800, resume: bool = True, **settings: Any
) -> Run:
    """Pre-train a masked autoencoder, as `mae pretrain` does.

    Args:
        data: Folder of images as for --data.root, or `digits`, the bundled handwritten digits.
        out: Run folder. A run that is there already goes on, or is loaded if it has come to its end.
        size: Encoder, nano to huge.
        epochs: Length of the run.
        resume: False: refuse a folder that holds a run.
        settings: Other settings of `mae pretrain`, with two underscores for a dot: `data__image_size=32`.

    Raises:
        UserError: As `mae pretrain`.
    """
    return run(PretrainCLI, data, out, resume, {"trainer.max_epochs": epochs, "model.size": size}, settings)


def run_linprobe(
    encoder: str | Path, data: str | Path, out: str | Path, epochs: int = 90, resume: bool = True, **settings: Any
) -> Run:
    """Train the paper's linear probe on frozen features, as `mae linprobe` does.

    Args:
        encoder: What to probe: a run folder or file, official, timm's, Hugging Face's.
        data: Folder with train/CLASS/* and val/CLASS/*, or `digits`.
        out: Run folder, as in `run_pretrain`.
        epochs: Length of the run.
        resume: False: refuse a folder that holds a run.
        settings: Other settings of `mae linprobe`, with two underscores for a dot: `model__base_lr=1.0`.

    Returns:
        The run; `metrics` has val/acc1, val/acc5 and val/loss.

    Raises:
        UserError: As `mae linprobe`.
    """
    own = {"trainer.max_epochs": epochs, "model.encoder": encoder}
    return run(LinearProbeCLI, data, out, resume, own, settings)


def run(
    kind: type[StageCLI],
    data: str | Path,
    out: str | Path,
    resume: bool,
    own: dict[str, Any],
    settings: dict[str, Any],
) -> Run:
    given: dict[str, Any] = {"data.dataset": "digits"} if str(data) == "digits" else {"data.root": data}
    given |= {"run_dir": out, **own}
    if resume:
        given["ckpt_path"] = "last"
    if wrong := [key for key in settings if "__" not in key and key not in ("seed_everything", "allow_changes")]:
        raise UserError(f"{wrong[0]}: wanted is group__setting, such as data__{wrong[0]} or model__{wrong[0]}")
    given |= {key.replace("__", "."): value for key, value in settings.items()}
    with printable_output():
        cli = kind([f"--{key}={as_yaml(value)}" for key, value in given.items()])
        cli.fit()
    return Run(cli.run_dir, cli.model, last_logged(cli.run_dir / "metrics.csv"))


def last_logged(path: Path) -> dict[str, float]:
    """The last value of each column of metrics.csv; empty where a run keeps none."""
    found: dict[str, float] = {}
    for row in read_metrics(path)[1]:
        found |= {key: float(value) for key, value in row.items() if value and key != "step"}
    return found


def as_yaml(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str | Path):
        return str(value)
    text: str = yaml.safe_dump(value, default_flow_style=True)  # "..." on a second line ends a plain number
    return text.split("\n")[0]


def embed_images(encoder: str | Path, images: str | Path, batch_size: int = 64, num_workers: int = 0) -> Features:
    """Features of all images below a folder, as `mae embed` computes them, in memory.

    Args:
        encoder: SRC: a run folder or file, official, timm's, Hugging Face's.
        images: Folder, .tar file or shards.
        batch_size: Images in one forward pass.
        num_workers: Loader processes.

    Raises:
        UserError: As `mae embed`.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="mae_embed_") as folder:
        out = Path(folder) / "features.npz"
        with contextlib.redirect_stdout(said):
            embed_command(
                [
                    *("--encoder", str(encoder), "--data.root", str(images), "--out", str(out)),
                    *("--batch_size", str(batch_size), "--num_workers", str(num_workers)),
                ]
            )
        with printable_output():
            print("".join(line for line in said.getvalue().splitlines(keepends=True) if folder not in line), end="")
        with np.load(out) as file:
            keys = {key: file[key] for key in file.files}
    name = next(key for key, value in keys.items() if value.ndim == 2)
    return Features(keys[name], [str(path) for path in keys["path"]], [str(label or "") for label in keys["label"]])
