"""Accuracy of a classifier: top-1, top-5, per class, which classes are confused. Counts over all processes: exact."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from mae.runtime.files import atomic_write, atomic_write_text
from mae.runtime.processes import gather
from mae.runtime.text import csv_row

FULL_MATRIX = 2_000  # classes up to which there is a full confusion matrix: 32 MB; with 21,841 it would be 3.8 GB

WORST_PAIRS = 10_000  # rows of confusion.csv, at most, where there is none


class Report(NamedTuple):
    """The result of an evaluation; accuracies in percent."""

    acc1: float
    acc5: float  # among the five most likely classes, or all where there are fewer
    loss: float  # cross-entropy without label smoothing
    images: int
    pairs: Tensor  # (n, 3) int64: true class, predicted class, images; those that occur, in ascending order
    classes: list[str]

    @property
    def class_images(self) -> Tensor:
        """(classes,) int64: images of each class."""
        return torch.zeros(len(self.classes), dtype=torch.int64).index_add_(0, self.pairs[:, 0], self.pairs[:, 2])

    @property
    def per_class(self) -> list[float]:
        """Top-1 accuracy of each class; NaN for a class without images."""
        right = self.pairs[self.pairs[:, 0] == self.pairs[:, 1]]
        hits = torch.zeros(len(self.classes), dtype=torch.int64).index_add_(0, right[:, 0], right[:, 2])
        accuracy: list[float] = (100 * hits / self.class_images).tolist()
        return accuracy

    @property
    def has_matrix(self) -> bool:
        return len(self.classes) <= FULL_MATRIX

    @property
    def confusion(self) -> Tensor:
        """(classes, classes) int64, rows are the true classes; for up to FULL_MATRIX classes."""
        counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)
        counts[self.pairs[:, 0], self.pairs[:, 1]] = self.pairs[:, 2]
        return counts

    @property
    def wrong_pairs(self) -> Tensor:
        """Those of `pairs` whose classes differ, the most frequent first."""
        wrong = self.pairs[self.pairs[:, 0] != self.pairs[:, 1]]
        return wrong[wrong[:, 2].argsort(descending=True, stable=True)]

    def worst(self, count: int) -> list[tuple[str, float, str]]:
        """The classes of lowest accuracy: name, percent, and the class they are most often taken for ("" if none)."""
        ranked = sorted((a, i) for i, a in enumerate(self.per_class) if a == a)  # leaves out NaN
        wrong = self.wrong_pairs
        rows = []
        for accuracy, i in ranked[:count]:
            taken_for = wrong[wrong[:, 0] == i, 1][:1].tolist()
            rows.append((self.classes[i], accuracy, self.classes[taken_for[0]] if taken_for else ""))
        return rows

    def worst_pairs(self, count: int) -> list[tuple[str, str, int]]:
        """The classes that are confused most often: true class, predicted class, images."""
        return [(self.classes[i], self.classes[j], n) for i, j, n in self.wrong_pairs[:count].tolist()]

    def write(self, folder: Path, **more: Any) -> list[Path]:
        """Write results.json, with `more` in it, per_class.csv and confusion.csv; returns their paths.

        confusion.csv is the full matrix for up to FULL_MATRIX classes, and beyond that a list of at most WORST_PAIRS
        confused pairs, the most frequent first.
        """
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("results.json", "per_class.csv", "confusion.csv")]
        with atomic_write(paths[1]) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "images", "acc1"])
            columns = (self.classes, self.class_images.tolist(), self.per_class)
            writer.writerows(map(csv_row, zip(*columns, strict=True)))
        with atomic_write(paths[2]) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if self.has_matrix:
                writer.writerow(csv_row(["true \\ predicted", *self.classes]))
                rows = zip(self.classes, self.confusion.tolist(), strict=True)
                writer.writerows(csv_row([name, *row]) for name, row in rows)
            else:
                writer.writerow(["true", "predicted", "count"])
                writer.writerows(map(csv_row, self.worst_pairs(WORST_PAIRS)))
        # Last: where this file exists, the others are complete.
        figures = {"acc1": self.acc1, "acc5": self.acc5, "loss": self.loss, "images": self.images, **more}
        atomic_write_text(paths[0], json.dumps(figures, indent=1) + "\n")
        return paths


class Scores(nn.Module):
    """Metrics that accumulate over batches and, in `report`, over processes.

    With up to FULL_MATRIX classes there is a count for each pair of classes; beyond that 8 bytes for each image.

    Args:
        num_classes: Classes of the logits.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.matrix = MulticlassConfusionMatrix(num_classes) if num_classes <= FULL_MATRIX else None
        self.codes: list[Tensor] = []  # without a matrix: true class * classes + predicted class, (B,) int64
        self.top5, self.loss = SumMetric(), SumMetric()
        for metric in (self.top5, self.loss):
            metric.set_dtype(torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, classes), labels (B,) int64."""
        logits = logits.float()
        predicted = logits.argmax(dim=1)
        if self.matrix is None:
            self.codes.append(labels * self.num_classes + predicted)
        else:
            self.matrix.update(predicted, labels)
        best = logits.topk(min(5, self.num_classes), dim=1).indices
        self.top5.update((best == labels[:, None]).sum())
        self.loss.update(F.cross_entropy(logits, labels, reduction="sum"))

    def report(self, classes: list[str]) -> Report:
        """Compute the report and reset; all processes must call it."""
        pairs = self._pairs()
        images = int(pairs[:, 2].sum())
        hits, loss = float(self.top5.compute()), float(self.loss.compute())
        for metric in (self.top5, self.loss):
            metric.reset()
        n = max(images, 1)
        right = int(pairs[pairs[:, 0] == pairs[:, 1], 2].sum())
        return Report(100 * right / n, 100 * hits / n, loss / n, images, pairs, classes)

    def _pairs(self) -> Tensor:
        """As in Report, and reset."""
        if self.matrix is not None:
            matrix = self.matrix.compute().cpu()
            self.matrix.reset()
            places = matrix.nonzero()
            return torch.cat([places, matrix[tuple(places.T)][:, None]], dim=1)
        mine = torch.cat([torch.empty(0, dtype=torch.int64), *(codes.cpu() for codes in self.codes)])
        self.codes = []
        parts = gather(mine.unique(return_counts=True))
        codes, places = torch.cat([codes for codes, _ in parts]).unique(return_inverse=True)
        counts = torch.zeros_like(codes).index_add_(0, places, torch.cat([counts for _, counts in parts]))
        return torch.stack([codes // self.num_classes, codes % self.num_classes, counts], dim=1)


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
