"""What is done with encoders and classifiers, by the real commands: cached probe, online probe, evaluate, predict."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, ON_DIGITS, TINY, save_images
from PIL import Image
from run_folders import few_digits
from torch import Tensor

from mae.cli import main
from mae.data.datamodule import ImageData
from mae.data.sources import load_digits
from mae.errors import UserError
from mae.evaluation.features import POOLS, effective_rank, multi_layer_features
from mae.launch.stages import PretrainCLI
from mae.weights.classifier import load_classifier
from mae.weights.load import load_encoder, read_weights


@pytest.fixture(scope="module")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/CLASS/*.png, 50 held-out digits."""
    root = tmp_path_factory.mktemp("files")
    _, held_out = load_digits()
    assert held_out.labels is not None
    for i in range(0, 1000, 20):
        folder = root / held_out.classes[held_out.labels[i]]
        folder.mkdir(exist_ok=True)
        Image.fromarray(held_out.open(i).pixels()[0].numpy()).save(folder / f"{i:04d}.png")
    return root


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# ---- features while pre-training ----


def test_online_evaluation_leaves_every_bit_of_the_training_as_it_is(tmp_path: Path) -> None:
    def trained(name: str, every: int) -> tuple[Tensor, list[dict[str, str]]]:
        cli = PretrainCLI(
            [
                *(*DIGITS, *TINY, f"--run_dir={tmp_path / name}", "--trainer.max_epochs=4"),
                *("--data.batch_size_per_device=50", f"--online.every_n_epochs={every}"),
                *("--online.train_images=300", "--online.held_out_images=100", "--trainer.log_every_n_steps=1"),
            ]
        )
        cli.fit()
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return torch.cat([p.detach().flatten() for p in cli.model.parameters()]), rows

    with few_digits():
        without, rows_without = trained("without", 100)
        with_, rows_with = trained("with", 2)
    assert torch.equal(without, with_)
    assert [row["train/loss"] for row in rows_without] == [row["train/loss"] for row in rows_with]
    assert "online/knn" not in rows_without[-1]
    found = [
        (row["step"], float(row["online/knn"]), float(row["online/probe"])) for row in rows_with if row["online/knn"]
    ]
    assert [step for step, *_ in found] == ["16", "32"]
    assert all(20 < score < 100 for _, *scores in found for score in scores)
    ranks = [float(row["online/effective_rank"]) for row in rows_with if row["online/effective_rank"]]
    assert len(ranks) == 2
    assert all(1 < rank <= 32 for rank in ranks)


def test_the_spread_of_features_needs_no_labels(tmp_path: Path) -> None:
    save_images(tmp_path / "images", 16)
    settings = [*TINY, f"--data.root={tmp_path / 'images'}", "--data.image_size=28", "--data.num_workers=0"]
    settings += ["--data.batch_size_per_device=8", "--trainer.max_epochs=2", "--online.every_n_epochs=1"]
    PretrainCLI([*settings, f"--run_dir={tmp_path / 'run'}"]).fit()
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["online/effective_rank"]]
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(1 < float(row["online/effective_rank"]) <= 16 for row in rows)
    assert all(float(row["online/class_token_variance"]) > 0 for row in rows)
    assert "online/probe" not in rows[0]


def test_effective_rank() -> None:
    directions = torch.linalg.qr(torch.randn(200, 8))[0]
    assert effective_rank(directions) == pytest.approx(8, rel=1e-4)  # eight directions of the same size
    assert effective_rank(torch.randn(200, 1) @ torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert effective_rank(directions[:, :4] * shares) == pytest.approx(2**1.75, rel=1e-4)


# ---- the cached probe ----


def test_kinds_are_each_layers_pools(pretrained: Path) -> None:
    encoder = load_encoder(pretrained)
    names, encode = multi_layer_features(encoder, [-1], ["class", "mean"])
    images = torch.randn(3, 1, 28, 28)
    tokens = encoder.forward_features(images)
    assert names == ["layer -1 class", "layer -1 mean"]
    for i, pool in enumerate(("class", "mean")):
        assert torch.allclose(encode(images)[:, i], POOLS[pool](tokens), atol=1e-6)
    with pytest.raises(ValueError, match="layers"):
        multi_layer_features(encoder, [-9], ["mean"])


@pytest.mark.slow
def test_cached_probe_chooses_on_training_images(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["probe", f"--model.encoder={pretrained}", *ON_DIGITS, "--mode=cached", "--cached.epochs=10"]

    def run(name: str, *settings: str) -> dict[str, object]:
        assert main([*args, *settings, f"--run_dir={tmp_path / name}"]) == 0
        results: dict[str, object] = json.loads((tmp_path / name / "cached" / "results.json").read_text())
        return results | {"table": (tmp_path / name / "cached" / "table.txt").read_text()}

    plain = run("plain")
    assert float(str(plain["acc1"])) > 50
    assert plain["images"] == 1000
    assert "<- chosen" in str(plain["table"])
    small = "--data.labels_per_class=50"
    of_few = run("few", small)
    assert of_few["table"] != plain["table"]
    for setting in (
        *(
            "--cached.crops=2",
            "--cached.pools=[mean]",
            "--cached.pools=[both]",
            "--cached.epochs=1",
            "--cached.batch_size=100",
        ),
        *("--cached.rates=[1e-3]", "--cached.holdout=0.5", "--seed_everything=1"),
    ):
        assert run(setting.strip("-"), small, setting)["table"] != of_few["table"], setting
    for wrong in (
        "--cached.layers=[-7]",
        "--cached.rates=[]",
        "--cached.holdout=0",
        "--data.labels_per_class=1",
        "--cached.pools=[mean,both]",
    ):
        fails(capsys, *args, wrong, f"--run_dir={tmp_path / 'wrong'}")


def test_cached_figures_are_those_of_the_chosen_head(pretrained: Path, tmp_path: Path) -> None:
    args = ["probe", f"--model.encoder={pretrained}", *ON_DIGITS, "--mode=cached", f"--run_dir={tmp_path / 'run'}"]
    assert main([*args, "--cached.epochs=10"]) == 0
    found = json.loads((tmp_path / "run" / "cached" / "results.json").read_text())
    assert found["acc5"] > 85  # of ten classes, with a top-1 above 50: ranks beyond the first count
    assert found["loss"] < 1.8
    assert (tmp_path / "run" / "cached" / "confusion.png").exists()


@pytest.mark.slow
def test_a_cached_probe_is_not_overwritten_and_unused_settings_are_named(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["probe", f"--model.encoder={pretrained}", *ON_DIGITS, "--mode=cached", f"--run_dir={tmp_path / 'run'}"]
    args += ["--cached.epochs=1", "--data.labels_per_class=5"]
    assert main([*args, "--model.base_lr=9"]) == 0
    said, results = capsys.readouterr().out, tmp_path / "run" / "cached" / "results.json"
    assert "mode cached: not used: model.base_lr" in said
    found = json.loads(results.read_text())
    assert f"untrained top-1 {found['untrained_acc1']:.2f} %: layer -1 " in said
    assert "the run's weights before its first step, seed 0" in said
    assert found["untrained_acc1"] != found["acc1"]
    assert "holds a cached probe" in fails(capsys, *args)
    assert main([*args, "--ckpt_path=last", "--baseline=false"]) == 0
    assert "untrained" not in capsys.readouterr().out
    assert "untrained_acc1" not in json.loads(results.read_text())
    assert "--mode cached or both" in fails(capsys, *args, "--mode=recipe", "--baseline=true")
    assert "--trainer.devices 1" in fails(capsys, *args, "--trainer.devices=2", f"--run_dir={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_both_modes_are_compared(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["probe", f"--model.encoder={pretrained}", *ON_DIGITS, "--mode=both", "--trainer.max_epochs=2"]
    args += ["--model.warmup_epochs=0.1", "--data.labels_per_class=20", "--data.batch_size_per_device=50"]
    assert main([*args, f"--run_dir={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "cached is " in said
    recipe = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"recipe   {recipe['acc1']:>6.2f}" in said
    # Done again, nothing is trained, and the time is still that of the training.
    assert main([*args, f"--run_dir={tmp_path / 'run'}", "--ckpt_path=last"]) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["acc1"] == recipe["acc1"]
    assert 0 < again["seconds"] <= recipe["seconds"]  # up to its last checkpoint


# ---- classifiers ----


def test_a_fine_tuned_file_knows_its_classes_and_images(finetuned: Path) -> None:
    for src in (finetuned, finetuned / "model.safetensors", finetuned / "checkpoints" / "last.ckpt"):
        classifier = load_classifier(src)
        assert classifier.classes == [str(i) for i in range(10)]
        about = classifier.description
        assert about["mean"] == [0.1305]
        assert about["std"] == [0.3079]
        assert about["model"]["image_size"] == [28, 28]
        assert about["classifier"]["crop_pct"] == 1.0


def test_evaluate_repeats_the_score_of_training(
    finetuned: Path, digit_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = json.loads((finetuned / "results.json").read_text())
    args = ["evaluate", "--model", str(finetuned), "--accelerator=cpu", "--data.num_workers=0"]
    assert main([*args, "--data.dataset=digits", f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["acc1"], found["acc5"], found["images"]) == (trained["acc1"], trained["acc5"], 1000)
    assert found["acc1"] > 40
    assert (tmp_path / "out" / "confusion.png").exists()
    said = capsys.readouterr().out
    assert f"top-1 {trained['acc1']:.2f} %" in said
    assert all(f"\n  {i}: " in said for i in range(10))  # per class
    # A folder of class folders, with some of the classes only.
    assert main([*args, f"--data.root={digit_files}"]) == 0
    assert "on 50 held-out images" in capsys.readouterr().out
    save_images(digit_files / "walrus", 1)
    assert "a class that" in fails(capsys, *args, f"--data.root={digit_files}")
    (digit_files / "walrus" / "000.png").unlink()
    (digit_files / "walrus").rmdir()
    (tmp_path / "flat").mkdir()
    save_images(tmp_path / "flat", 2)
    assert "has no labels" in fails(capsys, *args, f"--data.root={tmp_path / 'flat'}")
    assert "--data.image_size" in fails(capsys, *args, "--data.dataset=digits", "--data.image_size=14")


def test_empty_and_single_classes_are_treated_alike(
    pretrained: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    for split in ("train", "Validation"):
        for label in "01":
            save_images(root / split / label, 2, (28, 28), seed=int(label))
    given = [f"--data.root={root}", "--data.num_workers=0"]
    trained = [f"--model.encoder={pretrained}", *given, f"--run_dir={tmp_path / 'run'}"]
    knn = ["knn", f"--encoder={pretrained}", *given]
    commands = [knn, ["finetune", *trained, "--data.auto_augment=null"]]
    commands += [["probe", *trained, f"--mode={mode}", "--trainer.devices=1"] for mode in ("recipe", "cached")]
    evaluate = ["evaluate", f"--model={finetuned}", "--accelerator=cpu", *given]

    (root / "Validation" / "1" / "000.png").unlink()
    (root / "Validation" / "1" / "001.png").unlink()  # a class without held-out images
    for command in (knn, evaluate):
        assert main(command) == 0
        assert f"val: {root}/Validation (2 images, 1 class; no image in 1)" in capsys.readouterr().out
    (root / "Validation" / "x").mkdir()
    (root / "train" / "y").mkdir()
    for command in commands:
        assert "the training folder y/ holds no image: fill or remove" in fails(capsys, *command)
    (root / "train" / "y").rmdir()
    for command in (*commands, evaluate):
        assert "the held-out folder x/ holds no image: fill or remove" in fails(capsys, *command)
    (root / "Validation" / "x").rmdir()
    (root / "Validation" / "1").rmdir()
    (root / "train" / "1").rename(tmp_path / "away")
    for command in commands:
        line = "mae: error: 1 class (0): a classifier needs at least 2 (--data.root holds train/CLASS/*)"
        assert fails(capsys, *command) == line
    assert not (tmp_path / "run").exists()


def test_images_that_are_left_out_are_counted_beside_the_others(
    pretrained: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, left = tmp_path / "images", "left out: .jxl 1 (pip install pillow-jxl-plugin), .svg 2"
    save_images(root, 2, (28, 28))
    for name in ("a.jxl", "b.svg", "c.SVG", "notes.txt"):
        (root / name).touch()
    assert main(["predict", str(root), f"--model={finetuned}", f"--out={tmp_path / 'x.csv'}", "--num_workers=0"]) == 0
    assert capsys.readouterr().out.endswith(f"x.csv: 2 images, 10 classes; {left}\n")
    args = ["embed", f"--encoder={pretrained}", f"--out={tmp_path / 'x.npz'}", "--num_workers=0"]
    assert main([*args, f"--data.root={root}"]) == 0
    assert f"2 images; {left}\n" in capsys.readouterr().out
    for path in root.glob("*.png"):
        path.unlink()
    predict = ["predict", root, f"--model={finetuned}", f"--out={tmp_path / 'x.csv'}"]
    for command in (predict, ["knn", f"--encoder={pretrained}", f"--data.root={root}"]):
        assert f"images holds no image that can be read; {left}; convert to" in fails(capsys, *command)


def test_predict_writes_a_row_an_image(
    finetuned: Path, digit_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next(digit_files.glob("3/*.png"))
    out = tmp_path / "out.csv"
    args = ["predict", "--model", str(finetuned), "--out", str(out), "--num_workers=0", "--batch_size=7"]
    assert main([*args, str(digit_files), str(one)]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 51
    assert next(row for row in rows if row["path"] == str(one)) == rows[-1]
    right = 0
    for row in rows:
        shares = {str(i): float(row[str(i)]) for i in range(10)}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(shares, key=lambda name: shares[name])
        assert float(row["probability"]) == max(shares.values())
        right += row["class"] == Path(row["path"]).parent.name
    assert right > 20

    # An unreadable image is told and loses nothing of the others.
    broken = tmp_path / "broken.png"
    broken.write_bytes(one.read_bytes()[:60])
    assert "1 of 52 images could not be read" in fails(capsys, *args, digit_files, broken, one)
    with out.open(newline="") as file:
        again = list(csv.DictReader(file))
    assert again[:50] == rows[:50]
    assert again[50]["path"] == str(broken)
    assert not again[50]["class"]
    assert again[51] == rows[50]


# ---- mistakes ----


def test_encoder_and_settings_that_do_not_fit_are_both_named(
    pretrained: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("probe", "finetune"):
        args = [stage, f"--model.encoder={pretrained}", *ON_DIGITS, f"--run_dir={tmp_path / 'run'}"]
        args += ["--data.auto_augment=null"] if stage == "finetune" else []
        for setting, own, given in (
            ("--model.patch_size=4", "[4, 4]", "[7, 7]"),
            ("--model.embed_dim=64", "64", "32"),
            ("--model.size=base", "768", "32"),
        ):
            line = fails(capsys, *args, setting)
            assert own in line
            assert given in line
            assert str(pretrained) in line
            assert setting.split("=")[0] in line
    args = ["probe", f"--model.encoder={pretrained}", f"--data.root={image_folder}", "--data.num_workers=0"]
    line = fails(capsys, *args, "--data.in_chans=3", "--data.image_size=28", f"--run_dir={tmp_path / 'run'}")
    assert "--data.in_chans 3 does not fit" in line
    line = fails(
        capsys,
        "finetune",
        f"--model.encoder={pretrained}",
        *ON_DIGITS,
        "--data.image_size=30",
        "--data.auto_augment=null",
    )
    assert "30x30 is not divisible by the encoder's patch size 7x7" in line
    assert not (tmp_path / "run").exists()


def test_tools_say_what_cannot_be_before_they_work(
    finetuned: Path, digit_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--model", finetuned, "--data.dataset=digits", "--data.num_workers=0"]
    assert "--accelerator nonsense" in fails(capsys, *evaluate, "--accelerator=nonsense")
    assert "--devices 0" in fails(capsys, *evaluate, "--accelerator=cpu", "--devices=0")
    assert "--out /proc/x cannot be made" in fails(capsys, *evaluate, "--accelerator=cpu", "--out=/proc/x")
    predict = ["predict", digit_files, "--model", finetuned]
    assert "is a folder" in fails(capsys, *predict, "--out", tmp_path)
    assert "--batch_size 0" in fails(capsys, *predict, "--out", tmp_path / "x.csv", "--batch_size=0")
    knn = ["knn", f"--encoder={finetuned}", "--allow_finetuned=true", "--data.dataset=digits", "--data.num_workers=0"]
    assert "there is no folder" in fails(capsys, *knn, f"--out={tmp_path / 'nowhere' / 'x.json'}")
    line = fails(capsys, "finetune", f"--model.encoder={finetuned}", "--data.dataset=cifar10", "--run_dir=nowhere")
    assert "--data.dataset cifar10 has images of 3 channels" in line
    assert "takes 1" in line


def test_a_classifier_is_not_taken_for_a_pretrained_encoder(
    finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = ["probe", f"--model.encoder={finetuned}", *ON_DIGITS, f"--run_dir={tmp_path / 'run'}", "--mode=cached"]
    probe += ["--cached.epochs=1", "--data.labels_per_class=20"]
    knn = ["knn", f"--encoder={finetuned}", "--data.dataset=digits", "--data.num_workers=0"]
    for args, flag in ((probe, "--model.allow_finetuned=true"), (knn, "--allow_finetuned=true")):
        line = fails(capsys, *args)
        assert "is a classifier of 10 classes" in line
        assert "allow_finetuned" in line
        assert main([*args, flag]) == 0
    with pytest.raises(UserError, match="is a classifier"):
        load_encoder(finetuned)
    assert load_encoder(finetuned, allow_finetuned=True).norm.weight.eq(1).all()
    assert "is a classifier" in fails(
        capsys, "pretrain", *DIGITS, *TINY, f"--model.init={finetuned}", f"--run_dir={tmp_path / 'p'}"
    )
    assert "holds a classifier without decoder" in fails(
        capsys, "reconstruct", "x.png", f"--model={finetuned}", f"--out={tmp_path / 'x.png'}"
    )


def test_an_encoder_is_not_taken_for_a_classifier(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no classifier head" in fails(capsys, "evaluate", f"--model={pretrained}", "--data.dataset=digits")
    assert "has no classifier head" in fails(
        capsys, "predict", "x.png", f"--model={pretrained}", f"--out={tmp_path / 'x.csv'}"
    )
    with pytest.raises(UserError, match="has no classifier head"):
        read_weights(pretrained).require_classifier()


def test_fine_tuning_at_another_size_resamples_positions(pretrained: Path, tmp_path: Path) -> None:
    settings = ["--data.image_size=[35,42]", "--data.auto_augment=null", "--trainer.max_steps=2"]
    settings += ["--model.warmup_epochs=0.01", f"--model.encoder={pretrained}", "--model.drop_path=0"]
    assert main(["finetune", *ON_DIGITS, *settings, f"--run_dir={tmp_path / 'run'}"]) == 0
    network = load_classifier(tmp_path / "run").network
    assert network.patch_embed.grid_size == (5, 6)
    assert "positions resampled from 4x4 to 5x6" in (tmp_path / "run" / "recipe.txt").read_text()
    assert ImageData("digits").image_size == (28, 28)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--model.num_heads=5", "embed_dim 96 is not divisible by 4 and by --model.num_heads 5"),
        ("--model.depth=0", "depth 0"),
        ("--model.size=giant", "'giant' is none of"),
        ("--model.blocks=9", "blocks 9"),
        ("--model.lora_rank=0", "lora_rank 0"),
        ("--model.mixup=-1", "mixup -1"),
        ("--model.ema_decay=1", "ema_decay 1"),
        ("--model.layer_decay=1.5", "layer_decay 1.5"),
        ("--model.layer_decay=0", "layer_decay 0"),
        ("--model.lora_alpha=3", "lora_alpha 3.0 has no effect without lora_rank"),
        ("--trainer.limit_val_batches=3", "limit_val_batches 3"),
        ("--data.holdout=1", "holdout 1"),
    ],
)
def test_fine_tuning_that_cannot_be(setting: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["finetune", "--model.encoder=scratch", "--model.size=nano", "--model.patch_size=7", *ON_DIGITS]
    assert message in fails(capsys, *args, "--data.auto_augment=null", setting, "--run_dir=nowhere")
    assert not Path("nowhere").exists()


def test_a_cached_probe_needs_held_out_images(
    pretrained: Path, digit_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["probe", f"--model.encoder={pretrained}", f"--data.root={digit_files}", "--data.num_workers=0"]
    args += ["--mode=cached", "--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'run'}"]
    assert "needs labelled held-out images" in fails(capsys, *args)
    assert main([*args, "--data.holdout=0.2", "--cached.epochs=1"]) == 0
