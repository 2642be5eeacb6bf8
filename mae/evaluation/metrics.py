"""Accuracy of a classifier: top-1, top-5, per class, confusion matrix. Counts are summed over processes: exact."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassStatScores

from mae.runtime.files import atomic_write_text


class Report(NamedTuple):
    """The result of an evaluation; accuracies in percent."""

    acc1: float
    acc5: float  # among the five most likely classes, or all where there are fewer
    loss: float  # cross-entropy without label smoothing
    images: int
    confusion: Tensor  # (classes, classes) int64, rows are the true classes
    classes: list[str]

    @property
    def per_class(self) -> list[float]:
        """Top-1 accuracy of each class; NaN for a class without images."""
        accuracy: list[float] = (100 * self.confusion.diag() / self.confusion.sum(dim=1)).tolist()
        return accuracy

    def worst(self, count: int) -> list[tuple[str, float, str]]:
        """The classes of lowest accuracy: name, percent, and the class they are most often taken for ("" if none)."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        ranked = sorted((a, i) for i, a in enumerate(self.per_class) if a == a)  # leaves out NaN
        rows = []
        for accuracy, i in ranked[:count]:
            taken_for = int(wrong[i].argmax())
            rows.append((self.classes[i], accuracy, self.classes[taken_for] if wrong[i, taken_for] else ""))
        return rows

    def write(self, folder: Path, **more: Any) -> list[Path]:
        """Write results.json, with `more` in it, per_class.csv and confusion.csv; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("results.json", "per_class.csv", "confusion.csv")]
        with paths[1].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "images", "acc1"])
            writer.writerows(zip(self.classes, self.confusion.sum(dim=1).tolist(), self.per_class, strict=True))
        with paths[2].open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["true \\ predicted", *self.classes])
            writer.writerows([name, *row] for name, row in zip(self.classes, self.confusion.tolist(), strict=True))
        # Last: where this file exists, the others are complete.
        figures = {"acc1": self.acc1, "acc5": self.acc5, "loss": self.loss, "images": self.images, **more}
        atomic_write_text(paths[0], json.dumps(figures, indent=1) + "\n")
        return paths


class Scores(nn.Module):
    """Metrics that accumulate over batches and, in `report`, over processes.

    Args:
        num_classes: Classes of the logits.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.top5 = MulticlassStatScores(num_classes, top_k=min(5, num_classes), average="micro")
        self.loss = SumMetric()
        self.loss.set_dtype(torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, classes), labels (B,) int64."""
        logits = logits.float()
        self.confusion.update(logits.argmax(dim=1), labels)
        self.top5.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels, reduction="sum"))

    def report(self, classes: list[str]) -> Report:
        """Compute the report and reset; all processes must call it."""
        confusion = self.confusion.compute().cpu()
        images = int(confusion.sum())
        hits, *_ = self.top5.compute().tolist()
        loss = float(self.loss.compute())
        for metric in (self.confusion, self.top5, self.loss):
            metric.reset()
        n = max(images, 1)
        return Report(100 * int(confusion.diag().sum()) / n, 100 * hits / n, loss / n, images, confusion, classes)


def top5_tells(classes: float) -> bool:
    """Whether top-5 says anything: of five classes or fewer every guess is among the first five."""
    return classes > 5


def score_line(title: str, report: Report) -> str:
    """The result in one line, to quote."""
    worst = ", ".join(f"{name} {accuracy:.1f}" for name, accuracy, _ in report.worst(3))
    top5 = f", top-5 {report.acc5:.2f} %" if top5_tells(len(report.classes)) else ""
    return (
        f"{title} top-1 {report.acc1:.2f} %{top5}, loss {report.loss:.4f} on {report.images} "
        f"held-out images; worst classes: {worst}"
    )
