"""Scores by hand."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mae.evaluation import plots
from mae.evaluation.metrics import Report, Scores


def scored(logits: torch.Tensor, labels: torch.Tensor, batch: int) -> Report:
    scores = Scores(logits.shape[1])
    for x, y in zip(logits.split(batch), labels.split(batch), strict=True):
        scores.update(x, y)
    return scores.report([f"class {i}" for i in range(logits.shape[1])])


@pytest.mark.parametrize("batch", [7, 64, 1003])
def test_scores_equal_what_sorting_says(batch: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1003, 12, generator=draw)
    labels = torch.randint(0, 12, (1003,), generator=draw)
    report = scored(logits, labels, batch)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert report.acc1 == 100 * int((ranks < 1).sum()) / 1003
    assert report.acc5 == 100 * int((ranks < 5).sum()) / 1003
    assert report.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert report.images == 1003
    for i, accuracy in enumerate(report.per_class):
        own = labels == i
        assert accuracy == pytest.approx(100 * float((ranks[own] == 0).float().mean()), abs=1e-4)
        for j in range(12):
            assert report.confusion[i, j] == ((logits.argmax(dim=1) == j) & own).sum()


def test_reports_start_from_zero() -> None:
    scores = Scores(3)
    for _ in range(2):
        scores.update(torch.eye(3), torch.arange(3))
        assert scores.report(["a", "b", "c"]).images == 3


def test_worst_classes_say_what_they_are_taken_for_and_classes_without_images_are_left_out(tmp_path: Path) -> None:
    logits = F.one_hot(torch.tensor([0, 1, 1, 1, 2]), 4).float()
    report = scored(logits, torch.tensor([0, 0, 0, 1, 2]), 5)
    assert report.worst(2)[0] == ("class 0", pytest.approx(100 / 3), "class 1")
    assert [name for name, *_ in report.worst(9)] == ["class 0", "class 1", "class 2"]
    assert report.acc5 == 100  # four classes: all of them
    paths = report.write(tmp_path / "out", step=7)
    figures = {key: getattr(report, key) for key in ("acc1", "acc5", "loss", "images")}
    assert json.loads(paths[0].read_text()) == {**figures, "step": 7}
    assert (
        paths[1].read_text().splitlines()[1] == "class 0,3,33.333333"[:13] + paths[1].read_text().splitlines()[1][13:]
    )
    picture = tmp_path / "confusion.png"
    plots.confusion(report, picture)
    with Image.open(picture) as image:
        assert image.width > 600
