"""`mae evaluate`: accuracy of a trained classifier; `mae predict`: its predictions for any images."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mae.commands import CLASSIFIER_HELP, predict_parser
from mae.data.datamodule import TRAINING_ONLY, ImageData
from mae.data.datasets import Batch
from mae.data.image_files import Leftovers, find_images
from mae.data.labelled import check_classes
from mae.data.layout import Splits, open_held_out
from mae.data.sources import ImageFiles, Source, relabel
from mae.errors import UserError
from mae.evaluation import plots
from mae.evaluation.metrics import Scores, score_line
from mae.options import ToolParser, out_file
from mae.runtime.environment import is_first_rank
from mae.runtime.files import atomic_write
from mae.runtime.processes import gather
from mae.runtime.text import csv_row, escaped, printable
from mae.training.lightning_internals import end_with_lost_ranks
from mae.weights.classifier import Classifier, load_classifier
from mae.weights.load import fill_data_settings, trained_data_settings

MOST_CLASSES = 100  # printed at most; --out writes all


class Evaluation(LightningModule):
    """One pass over held-out images on any number of devices, each image counted once."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.network, self.classes = classifier.network, classifier.classes
        self.scores = Scores(len(self.classes))

    def on_validation_epoch_start(self) -> None:
        self.error = ""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.errors:
            self.error = str(batch.errors[0])
        else:
            self.scores.update(self.network(batch.images), batch.labels)

    def on_validation_epoch_end(self) -> None:
        if errors := gather(self.error):
            raise UserError(f"every image must be readable: {errors[0]}")
        self.report = self.scores.report(self.classes)


def evaluate_command(args: Sequence[str]) -> None:
    parser = ToolParser(prog="mae evaluate", description="Top-1, top-5 and per-class accuracy, no training.")
    parser.add_argument("--config", action="config")
    parser.add_argument("--model", type=str, required=True, help=CLASSIFIER_HELP)
    parser.add_argument("--out", type=str | None, default=None, help="Folder for results.json, tables and a picture.")
    parser.add_argument("--devices", type=int | str, default="auto", help="Processes or GPUs; accuracy is the same.")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto.")
    parser.add_class_arguments(ImageData, "data", skip=TRAINING_ONLY)
    config = parser.parse_args(list(args))
    classifier = load_classifier(config.model)
    data = classifier_data(classifier, config.model, config.data.as_dict())
    data.val_source = labelled_images(data, classifier, config.model)
    data.train_source = data.val_source  # nothing is trained; the data module need not look for more
    try:
        if config.out:
            Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be made: {error.strerror}") from None
    try:
        trainer = Trainer(
            devices=config.devices,
            accelerator=config.accelerator,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"--devices {config.devices}, --accelerator {config.accelerator}: {error}") from None
    module = Evaluation(classifier)
    end_with_lost_ranks()
    trainer.validate(module, datamodule=data, verbose=False)
    if not is_first_rank():
        return
    report = module.report
    print(score_line(str(config.model), report))
    shown = report.worst(MOST_CLASSES)
    print(f"{len(shown)} of {len(report.classes)} classes, lowest first: top-1 in percent, and most often taken for")
    for name, accuracy, other in shown:
        print(f"  {name}: {accuracy:.2f}" + (f" → {other}" if other else ""))
    if config.out:
        folder = Path(config.out)
        paths = [*report.write(folder, model=printable(config.model)), folder / "confusion.png"]
        plots.confusion(report, paths[-1])
        print("\n".join(f"wrote {path}" for path in paths))


def classifier_data(classifier: Classifier, src: str, settings: dict[str, Any]) -> ImageData:
    """The data module; size, channels, mean, std and crop are those of the classifier unless set."""
    about = classifier.description
    trained = trained_data_settings(about) | {"crop_pct": about["classifier"]["crop_pct"]}
    return ImageData(**fill_data_settings(settings, trained, src, fixed=("image_size", "in_chans")))


def labelled_images(data: ImageData, classifier: Classifier, src: str) -> Source:
    """The images to evaluate on: the held-out ones, or a root that itself has a folder for each class.

    Raises:
        UserError: They have no labels, or other classes than the classifier.
    """
    if data.dataset != "folder":
        data.load()
        assert data.val_source is not None
        if data.val_source.classes != classifier.classes:
            raise UserError(f"--data.dataset {data.dataset} has other classes than {src}")
        return data.val_source
    root = data.require_root()
    source, place, notes = open_held_out(root, data.in_chans, data.val_dir, classifier.classes)
    if source.labels is None:
        loose = f", since {source.loose} lies beside the folders" if source.loose else ""
        raise UserError(
            f"{place} has no labels{loose}: it needs a folder for each class, named like the classes of {src}"
        )
    if is_first_rank():
        print(Splits({"val": source}, {"val": place}, notes), flush=True)
    relabel(source, classifier.classes, src)
    check_classes(source, "held-out", fewest=0, known=classifier.classes)
    return source


def predict_command(args: Sequence[str]) -> None:
    config = predict_parser().parse_args(list(args))
    out = out_file(config.out)
    if config.batch_size < 1:
        raise UserError(f"--batch_size {config.batch_size}: at least 1")
    classifier = load_classifier(config.model)
    settings = {"batch_size_per_device": config.batch_size, "num_workers": config.num_workers}
    settings |= {"image_size": None, "in_chans": None}
    data = classifier_data(classifier, config.model, settings)
    leftovers = Leftovers()
    paths = [file for name in config.images for file in image_paths(Path(name), leftovers)]
    source = ImageFiles(paths, data.in_chans)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.network.to(device)
    bad: list[str] = []
    row_number = 0
    with atomic_write(out) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(csv_row(["path", "class", "probability", *classifier.classes]))
        for batch in data.whole(source):
            bad += map(str, batch.errors)
            if not len(batch.images):
                continue
            images = data.prepare(batch._replace(images=batch.images.to(device), flip=batch.flip.to(device))).images
            with torch.no_grad():
                probabilities = classifier.network(images).float().softmax(dim=1).cpu()
            for index, row in zip(batch.indices.tolist(), probabilities, strict=True):
                for i in range(row_number, index):  # unreadable ones
                    writer.writerow(csv_row([escaped(source.name(i))]))
                row_number = index + 1
                best = int(row.argmax())
                shares = [f"{value:.6f}" for value in row.tolist()]
                writer.writerow(csv_row([escaped(source.name(index)), classifier.classes[best], shares[best], *shares]))
        writer.writerows(csv_row([escaped(source.name(i))]) for i in range(row_number, len(paths)))
    note = f"; {leftovers.note()}" if leftovers.note() else ""
    print(f"wrote {out}: {len(paths) - len(bad)} images, {len(classifier.classes)} classes{note}")
    if bad:
        raise UserError(f"{len(bad)} of {len(paths)} images could not be read, their rows are empty: {bad[0]}")


def image_paths(path: Path, leftovers: Leftovers) -> list[Path]:
    """The images in a folder; a file by itself. What else is there is added to `leftovers`.

    Raises:
        UserError: The folder holds no image.
    """
    if not path.is_dir():
        return [path]
    paths = [path / name for name in find_images(path, leftovers)]
    if not paths:
        raise leftovers.no_image(path)
    return paths
