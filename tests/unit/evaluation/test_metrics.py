"""Scores by hand."""

import csv
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SUPPORT, TINY
from PIL import Image

from mae.evaluation import metrics, plots
from mae.evaluation.metrics import Report, Scores, score_line


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


def test_of_many_classes_the_scores_are_the_same_and_only_mistakes_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(503, 12, generator=draw), torch.randint(0, 11, (503,), generator=draw)
    full = scored(logits, labels, 64)
    counts = full.confusion
    monkeypatch.setattr(metrics, "FULL_MATRIX", 11)
    monkeypatch.setattr(metrics, "WORST_PAIRS", 40)
    listed = scored(logits, labels, 64)
    assert torch.equal(listed.pairs, full.pairs)
    assert listed._replace(pairs=full.pairs) == full
    assert listed.worst(20) == full.worst(20)
    assert score_line("x", listed) == score_line("x", full)
    full_table = full.write(tmp_path / "full")[1].read_text()
    paths = listed.write(tmp_path / "listed")
    assert paths[1].read_text() == full_table
    with paths[2].open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = counts.clone().fill_diagonal_(0).flatten().sort(descending=True).values
    assert [int(row["count"]) for row in rows] == wrong[:40].tolist()
    for row in rows:
        true, predicted = (int(row[key].removeprefix("class ")) for key in ("true", "predicted"))
        assert true != predicted
        assert counts[true, predicted] == int(row["count"])
    classes = ["$x^", "name " * 60, *listed.classes[2:]]
    for report in (listed, full):
        plots.confusion(report._replace(classes=classes), tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as image:
            assert image.size == (1430, 650)


def one_of_two(rank: int, folder: Path, logits: torch.Tensor, labels: torch.Tensor) -> None:
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    parts = [slice(0, 5), slice(5, None)] if len(labels) > 5 else [slice(None), slice(0, 0)]  # the second without any
    scores = Scores(logits.shape[1])
    if len(labels[parts[rank]]):
        scores.update(logits[parts[rank]], labels[parts[rank]])
    report = scores.report(list(map(str, range(logits.shape[1]))))
    torch.save((report.pairs, report.acc1, report.acc5, report.images), folder / str(rank))
    dist.destroy_process_group()


@pytest.mark.parametrize("images", [13, 4])
def test_counts_of_two_processes_are_those_of_one(tmp_path: Path, images: int) -> None:
    classes = metrics.FULL_MATRIX + 1
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(images, classes, generator=draw), torch.arange(images) % 7
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_of_two, args=(rank, tmp_path, logits, labels)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    alone = scored(logits, labels, 3)
    for rank in range(2):
        pairs, *figures = torch.load(tmp_path / str(rank))
        assert torch.equal(pairs, alone.pairs)
        assert figures == [alone.acc1, alone.acc5, images]


def limited_scores(folder: Path) -> None:
    """As in a validation of ImageNet-21k, in 1 GiB more than there is."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    scores, draw = Scores(21_841), torch.Generator().manual_seed(0)
    for _ in range(20):
        labels = torch.randint(0, 21_841, (128,), generator=draw)
        scores.update(torch.randn(128, 21_841, generator=draw), labels)
    scores.report([f"n{i:08d}" for i in range(21_841)]).write(folder)


def test_scores_of_21841_classes_take_no_matrix(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=limited_scores, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 2560
    assert (tmp_path / "confusion.csv").stat().st_size < 100_000


@pytest.mark.slow
def test_fine_tuning_with_10000_classes_takes_little_memory(tmp_path: Path) -> None:
    """With a matrix it took 9.9 GB, and wrote 190 MB."""
    Image.new("RGB", (28, 28)).save(tmp_path / "one.png")
    for split, count in (("train", 2), ("val", 1)):
        for label in range(10_000):
            folder = tmp_path / "images" / split / f"{label:05d}"
            folder.mkdir(parents=True)
            for i in range(count):
                os.link(tmp_path / "one.png", folder / f"{i}.png")
    network = [word for word in TINY if "decoder" not in word] + ["--model.drop_path=0"]
    settings = ["--model.encoder=scratch", f"--data.root={tmp_path / 'images'}", "--data.image_size=28"]
    settings += ["--data.num_workers=0", "--data.batch_size_per_device=128", "--trainer.max_steps=1"]
    program = [sys.executable, str(SUPPORT / "limited.py"), "700", "0", "finetune", *network, *settings]
    environ: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, f"--run_dir={tmp_path / 'run'}"], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "on 10000 held-out images" in done.stdout
    assert sum(path.stat().st_size for path in (tmp_path / "run").glob("*.csv")) < 1_000_000
