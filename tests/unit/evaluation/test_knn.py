"""`mae knn` and its names, the untrained network beside it, and the same figures while pre-training."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DIGITS, TINY
from PIL import Image
from run_folders import few_digits

from mae.callbacks.online_eval import Online
from mae.cli import main
from mae.data.labelled import LabelledData
from mae.data.sources import load_digits
from mae.evaluation import baseline, features
from mae.launch.stages import PretrainCLI
from mae.weights.load import load_encoder, read_weights


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 training and 100 held-out digits as files."""
    root = tmp_path_factory.mktemp("digits")
    for split, source in zip(("train", "val"), load_digits(), strict=True):
        assert source.labels is not None
        for i in range(0, len(source), 10):
            folder = root / split / source.classes[source.labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.open(i).pixels()[0].numpy()).save(folder / f"{i}.png")
    return root


def knn(encoder: object, root: Path, *settings: str) -> None:
    assert main(["knn", f"--encoder={encoder}", f"--data.root={root}", "--data.num_workers=0", *settings]) == 0


def scores(encoder: torch.nn.Module, root: Path, src: Path) -> dict[str, float]:
    """Worked out from the features themselves."""
    about = read_weights(src).description
    data = LabelledData(root=str(root), num_workers=0, image_size=28, in_chans=1, mean=about["mean"], std=about["std"])
    found = features.extract_splits(
        lambda images: features.mean_of_patches(encoder.forward_features(images)), data, torch.device("cpu")
    )
    whitened = features.rescale(found, "whiten")
    return {"knn": features.knn_accuracy(found), "knn_whitened": features.knn_accuracy(whitened)}


def test_knn_is_of_features_as_they_are_and_the_others_stand_beside_it_by_name(
    pretrained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knn(pretrained, labelled, f"--out={tmp_path / 'knn.json'}")
    taken, line, second = capsys.readouterr().out.splitlines()
    split = f"{labelled}/{{}} ({{}} images, 10 classes)"
    assert taken == f"train: {split.format('train', 400)}, val: {split.format('val', 100)}"
    expected = scores(load_encoder(pretrained), labelled, pretrained)
    assert expected["knn"] != expected["knn_whitened"]
    figures = f"{expected['knn']:.2f} % knn, {expected['knn_whitened']:.2f} % knn_whitened"
    error = (expected["knn"] * (100 - expected["knn"]) / 100) ** 0.5
    about = f"k 20, T 0.07; 400 training images, 100 test images, standard error {error:.1f}"
    assert line == f"k-NN top-1 {figures} ({about})"
    untrained = scores(baseline.untrained_encoder(read_weights(pretrained))[0], labelled, pretrained)
    figures = f"{untrained['knn']:.2f} % knn, {untrained['knn_whitened']:.2f} % knn_whitened"
    assert second == f"untrained  {figures} (the run's weights before its first step, seed 0)"
    assert json.loads((tmp_path / "knn.json").read_text()) == {
        "acc1": expected["knn"],
        **expected,
        "images": 100,
        **{f"untrained_{name}": score for name, score in untrained.items()},
    }
    knn(pretrained, labelled, "--baseline=false")
    assert "untrained" not in capsys.readouterr().out


def test_the_baseline_is_off_by_itself_where_there_are_many_images() -> None:
    most = baseline.MOST_IMAGES
    assert [baseline.wanted(choice, most) for choice in ("auto", True, False)] == [True, True, False]
    assert [baseline.wanted(choice, most + 1) for choice in ("auto", True, False)] == [False, True, False]


def test_the_untrained_network_is_the_run_before_its_first_step(tmp_path: Path) -> None:
    with few_digits():
        cli = PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path}", "--seed_everything=7", "--trainer.max_steps=2"])
        before = {key: value.clone() for key, value in cli.model.model.encoder.state_dict().items()}
        cli.fit()
    for src in (tmp_path, tmp_path / "checkpoints" / "last.ckpt", tmp_path / "encoder.safetensors"):
        draw = torch.get_rng_state()
        encoder, which = baseline.untrained_encoder(read_weights(src))
        assert which == "the run's weights before its first step, seed 7"
        assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
        assert torch.equal(draw, torch.get_rng_state())
    alone = shutil.copy(tmp_path / "encoder.safetensors", tmp_path.parent / "alone.safetensors")
    encoder, which = baseline.untrained_encoder(read_weights(alone))
    assert which == "random weights, seed 0"
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"])
    config = tmp_path / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["model"]["init"] = str(alone)
    config.write_text(yaml.safe_dump(settings))
    assert baseline.untrained_encoder(read_weights(tmp_path))[1] == "random weights, seed 0"
    config.write_text("no: [settings")
    assert baseline.untrained_encoder(read_weights(tmp_path))[1] == "random weights, seed 0"


def test_of_a_run_that_has_not_ended_the_step_is_said(
    pretrained: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pretrained / "checkpoints", tmp_path / "run" / "checkpoints", symlinks=True)
    knn(tmp_path / "run", labelled, "--baseline=false", f"--out={tmp_path / 'knn.json'}")
    _, line, _ = capsys.readouterr().out.splitlines()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert line == f"weights of step 3: {last}, of a run that has not ended"
    assert json.loads((tmp_path / "knn.json").read_text())["step"] == 3
    knn(last, labelled, "--baseline=false")
    assert f"weights of step 3: {last}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_online_figures_have_these_names_and_keep_their_meaning_in_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = ["--online.every_n_epochs=1", "--online.train_images=300", "--online.held_out_images=100"]
    settings = [*DIGITS, *TINY, *online, "--data.batch_size_per_device=50", "--checkpoint.every_n_epochs=1"]

    def rows(name: str, epochs: int, *more: str) -> list[dict[str, str]]:
        with few_digits():
            PretrainCLI([*settings, f"--run_dir={tmp_path / name}", f"--trainer.max_epochs={epochs}", *more]).fit()
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("online/knn")]

    new = rows("new", 2)
    assert all(row["online/knn"] != row["online/knn_whitened"] for row in new)

    with monkeypatch.context() as before:  # as a checkpoint of before was written
        before.setattr(Online, "state_dict", lambda self: {})
        before.setattr(
            features, "knn_scores", lambda both: {"knn": features.knn_accuracy(features.rescale(both, "whiten"))}
        )
        rows("old", 1, "--allow_changes=true")
    monkeypatch.undo()
    go_on = ["--ckpt_path=last"]
    old = rows("old", 2, *go_on)
    assert [row["online/knn"] for row in old] == [row["online/knn_whitened"] for row in new]
    assert "online/knn_whitened" not in old[0]
    assert [row["online/knn"] for row in rows("old", 3, *go_on)[:2]] == [row["online/knn"] for row in old]
    third = rows("new", 3, *go_on)
    assert third[:2] == new
    assert third[2]["online/knn_whitened"]
