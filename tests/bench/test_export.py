"""`mae bench export`: that its figures fit together, and that the files are the encoder; never how fast they are."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae.bench import export
from mae.bench.export import BASE, ExportedForm, export_command, latency
from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder
from mae.runtime.machine import available_cores
from mae.weights import load

NAMES = [BASE, "ONNX float32", "ONNX int8"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """The encoder.safetensors of a run on small colour images."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(16, 4, 3, 48, 1, 3, 16, 1, 2)
    about = {"mean": [0.5] * 3, "std": [0.25] * 3, "model": model.config, "mask_ratio": 0.75, "step": 0}
    folder = tmp_path / "run"
    folder.mkdir()
    return load.export_autoencoder(model.state_dict(), about, folder)[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROUND_SECONDS", 0.001)


def options(encoder: Path, root: Path) -> list[str]:
    return [f"--encoder={encoder}", f"--data.root={root}", "--data.num_workers=0", "--rounds=3"]


def measured(encoder: Path, root: Path, out: Path, *args: str) -> dict[str, Any]:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    export_command([*options(encoder, root), *args, f"--json={out}"])
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


@pytest.mark.usefixtures("quick")
def test_figures_fit_together(
    encoder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    figures = measured(encoder, image_folder, tmp_path / "figures.json", "--batch", "1", "3")
    assert torch.get_num_threads() == before
    assert {"cpu", "cores", "torch", "onnxruntime"} <= set(figures["machine"])

    worth = figures["worth"]
    assert list(worth) == NAMES
    base, whole, small = worth.values()
    assert base["greatest_difference"] == base["relative_difference"] == 0
    assert 0 < whole["greatest_difference"] < 1e-4 < small["greatest_difference"]
    assert small["relative_difference"] < 0.1
    assert small["bytes"] < whole["bytes"]
    assert base["bytes"] < whole["bytes"]  # which holds the graph, too
    for row in worth.values():
        assert all(0 <= row["knn"][how] <= 100 for how in ("none", "whiten"))
    assert base["knn"] == whole["knn"]

    assert [(row["threads"], row["batch"]) for row in figures["latency"]] == [(1, 1), (1, 3)]
    for row in figures["latency"]:
        assert row["clock"] == "CPU time"
        assert list(row["seconds"]) == list(row["times_as_fast"]) == NAMES
        slow = row["seconds"][BASE]["rounds"]
        for name in NAMES:
            taken = row["seconds"][name]
            assert len(taken["rounds"]) == 3
            assert 0 < taken["low"] <= taken["median"] <= taken["high"]
            wanted = [a / b for a, b in zip(slow, taken["rounds"], strict=True)]
            assert row["times_as_fast"][name]["rounds"] == pytest.approx(wanted)
    shown = capsys.readouterr().out
    for words in (*NAMES, "batch 3, 1 thread", "k-NN whiten", "times as fast as PyTorch"):
        assert words in shown


def test_the_order_is_turned_round_every_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROUND_SECONDS", 0.0)
    order: list[str] = []

    def noting(name: str) -> ExportedForm:
        def call(images: Tensor) -> Tensor:
            order.append(name)
            return images

        return ExportedForm(1, lambda count: call)

    forms = {name: noting(name) for name in (BASE, "other")}
    row = latency(forms, torch.zeros(2, 1, 4, 4), 1, 3)
    assert row["calls_a_round"] == 1
    warm = 2 * export.WARM_UP + 1  # and a call that tells how often one is called
    assert order[warm:] == [BASE, "other", "other", BASE, BASE, "other"]


def test_wrong_options_are_named(encoder: Path, image_folder: Path, tmp_path: Path) -> None:
    for args, words in (
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--threads", "100000"], f"--threads 100000: this process may use 1 to {available_cores()}"),
        (["--batch", "1", "0"], "--batch 0: at least 1"),
        (["--rounds=0"], "--rounds 0: at least 1"),
        (["--json", str(tmp_path / "missing" / "out.json")], "there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            export_command([*options(encoder, image_folder), *args])


def test_other_data_than_the_encoders_is_refused(encoder: Path, image_folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=r"--data\.image_size 32 does not fit"):
        export_command([*options(encoder, image_folder), "--data.image_size=32"])


def test_without_onnx_it_is_said_how_to_get_it(
    encoder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'pip install "vit-mae-lightning\[onnx\]"'):
        export_command(options(encoder, image_folder))
