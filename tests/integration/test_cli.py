"""The real command: help, every kind of bad input as one line and exit code 2, and the tools around a run."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, TINY, fresh_mae, save_images
from conftest import mae as command
from forked import ForkedCommand
from PIL import Image

import mae
from mae.cli import COMMANDS, TRAINING, main
from mae.data.datamodule import DEFAULTS
from mae.errors import UserError


@pytest.fixture
def finished(pretrained: Path) -> Path:
    """The folder of a short run on the digits."""
    return pretrained


def fails(args: list[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run the command, which must fail with one line; returns that line."""
    assert main([str(arg) for arg in args]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mae: error: ")
    return lines[0]


def train(tmp_path: Path, root: Path, *settings: str) -> list[object]:
    return [
        "pretrain", *TINY, f"--data.root={root}", "--data.image_size=14", "--data.num_workers=0",
        "--data.batch_size_per_device=4", "--trainer.max_steps=2", f"--run_dir={tmp_path / 'run'}", *settings,
    ]  # fmt: skip


def test_a_mistake_in_a_real_process_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    settings = [*TINY, "--data.root", tmp_path / "nowhere", "--run_dir", tmp_path / "run"]
    for done, wrong in ((command("pretrain", *settings), "nowhere"), (fresh_mae("pretrian"), "pretrian")):
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("mae: error: ")
        assert wrong in done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("--trainer.max_epochs=ten", "--trainer.max_epochs ten: it must be a whole number or null"),
        ("--wandb.mode=off", "--wandb.mode off: it must be auto, online, offline, disabled"),
        ("--model.patch_size=x", "--model.patch_size x: it must be a whole number or a list of 2 numbers"),
        ("--model.base_lr=x", "--model.base_lr x: it must be a number"),
        ("--model.mask=0.5", "did you mean --model.mask_ratio?"),
    ],
)
def test_values_of_another_type_and_abbreviations(setting: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in fails(["pretrain", *TINY, setting], capsys)


def test_wrong_folders(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    assert "empty holds no image" in fails(train(tmp_path, tmp_path / "empty"), capsys)
    assert "text holds no image" in fails(train(tmp_path, tmp_path / "text"), capsys)
    save_images(image_folder / "val" / "bird", 1)
    assert "a class that" in fails(train(tmp_path, image_folder), capsys)
    assert not (tmp_path / "run").exists()


def test_unreadable_images(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (image_folder / "train" / "cat" / "000.png").read_bytes()
    (image_folder / "train" / "cat" / "000.png").write_bytes(whole[: len(whole) // 2])
    said = fails(train(tmp_path, image_folder, "--trainer.max_epochs=1", "--trainer.max_steps=-1"), capsys)
    assert "cat/000.png" in said
    assert "--data.max_bad_images is 0" in said
    tolerant = train(
        tmp_path, image_folder, "--data.max_bad_images=1", "--trainer.log_every_n_steps=1", "--trainer.max_steps=4"
    )
    assert main([str(arg) for arg in tolerant]) == 0
    assert "warning: unreadable image" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].count("bad_images") == 1


def test_unreadable_held_out_image(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (image_folder / "val" / "dog" / "002.png").write_text("<html>")
    settings = ["--trainer.max_epochs=1", "--trainer.max_steps=-1", "--data.max_bad_images=9", "--panels.images=1"]
    assert "dog/002.png" in fails(train(tmp_path, image_folder, *settings), capsys)


def test_misspelt_keys(tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "mask_ration" in fails(train(tmp_path, image_folder, "--model.mask_ration=0.5"), capsys)
    config = tmp_path / "wrong.yaml"
    config.write_text("model: {mask_ration: 0.5}\n")
    assert "mask_ration" in fails(["pretrain", "--config", config], capsys)
    assert "nowhere.yaml" in fails(["pretrain", "--config", tmp_path / "nowhere.yaml"], capsys)
    assert "'pretrian' is not a command; did you mean pretrain?" in fails(["pretrian"], capsys)
    assert "--model.size 'giant'" in fails(train(tmp_path, image_folder, "--model.size=giant"), capsys)


def test_sizes_and_ratios_that_cannot_be(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "14x14 is not divisible by patch_size 4x4" in fails(
        train(tmp_path, image_folder, "--model.patch_size=4"), capsys
    )
    assert "leaves 0 of 4" in fails(train(tmp_path, image_folder, "--model.mask_ratio=0.99"), capsys)
    assert "leaves 4 of 4" in fails(train(tmp_path, image_folder, "--model.mask_ratio=0"), capsys)


def test_runs_and_numbers_that_cannot_be(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "shorten with --trainer.max_steps" in fails(
        train(tmp_path, image_folder, "--trainer.limit_train_batches=2"), capsys
    )
    for setting in (
        "--trainer.accumulate_grad_batches=0",
        "--trainer.enable_checkpointing=false",
        "--trainer.log_every_n_steps=0",
        "--checkpoint.every_n_steps=0",
        "--panels.images=0",
        "--model.patch_size=0",
        "--model.decoder_num_heads=0",
        "--model.depth=0",
        "--model.base_lr=-1",
        "--trainer.strategy=nonsense",
        "--trainer.max_steps=-1 --trainer.max_epochs=-1",
        "--seed_everything=-1",
    ):
        assert main(list(map(str, train(tmp_path, image_folder, *setting.split())))) == 2, setting
        assert capsys.readouterr().err.startswith("mae: error: "), setting
    assert "fewer than one" in fails(train(tmp_path, image_folder, "--data.batch_size_per_device=17"), capsys)


def test_a_run_folder_in_use_and_checkpoints_that_are_not_there(
    tmp_path: Path, finished: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["pretrain", *DIGITS, *TINY, f"--run_dir={finished}", "--trainer.max_steps=3"]
    assert "add --ckpt_path last" in fails(again, capsys)
    deeper = ["pretrain", *DIGITS, *TINY, f"--run_dir={finished}", "--ckpt_path=last", "--model.depth=2"]
    assert "another architecture: depth 1, here 2" in fails(deeper, capsys)
    assert "gone.ckpt does not exist" in fails(train(tmp_path, image_folder, "--ckpt_path=gone.ckpt"), capsys)
    assert "image_size" in fails(
        ["knn", "--encoder", finished, "--data.root", image_folder, "--data.image_size=14"], capsys
    )


def test_files_that_hold_no_weights(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.ckpt").write_text("no weights")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    image = save_images(tmp_path, 1)[0]

    def reconstruct(src: Path) -> str:
        return fails(["reconstruct", image, "--model", src, "--out", tmp_path / "out.png"], capsys)

    assert "text.ckpt" in reconstruct(tmp_path / "text.ckpt")
    assert "foreign.ckpt holds no tensors" in reconstruct(tmp_path / "foreign.ckpt")
    assert "no run folder" in reconstruct(tmp_path)
    assert "an encoder without decoder" in reconstruct(finished / "encoder.safetensors")


def test_help_lists_commands_and_settings_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert main(["bench", "--help"]) == 0
    assert "mae bench WHAT" in capsys.readouterr().out
    for name in [*(COMMANDS.keys() - {"bench"}), "bench data", "bench run"]:
        everything = ["all"] if name in TRAINING else []
        with pytest.raises(SystemExit) as stop:
            main([*name.split(), "--help", *everything])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert f"usage: mae {name}" in said
        assert {"pretrain": "Fraction of patches to hide", "stats": "Folder of the data."}.get(name, "") in said


def test_the_weights_of_a_run_load_by_every_name(finished: Path) -> None:
    images = torch.randn(2, 1, 28, 28)
    whole = mae.load(finished)
    assert not whole.training
    for src in (finished / "checkpoints" / "last.ckpt", finished / "model.safetensors", str(finished)):
        assert torch.equal(mae.load(src).encode(images), whole.encode(images))
    for src in (finished, finished / "encoder.safetensors"):
        encoder = mae.load_encoder(src)
        assert torch.equal(encoder.forward_features(images), whole.encode(images))
        assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(UserError, match="without decoder"):
        mae.load(finished / "encoder.safetensors")


def test_exported_encoder_is_timms(finished: Path) -> None:
    import timm
    from safetensors.torch import load_file

    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=28, patch_size=7, in_chans=1, num_classes=0, embed_dim=32, depth=1, num_heads=2
    )
    plain.load_state_dict(load_file(finished / "encoder.safetensors"))  # strict


def test_knn_and_probe(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "digits"
    from mae.data.sources import load_digits

    for split, source in zip(("train", "val"), load_digits(), strict=True):
        for i in range(0, len(source), 20):
            folder = root / split / source.classes[source.labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[i, 0].numpy()).save(folder / f"{i}.png")
    data = [f"--data.root={root}", "--data.num_workers=0"]
    assert main(["knn", f"--encoder={finished}", *data]) == 0
    said = capsys.readouterr().out
    assert "200 training images, 50 test images" in said
    for setting in ("--k=200", "--temperature=5", "--pool=class"):
        assert main(["knn", f"--encoder={finished}", *data, setting]) == 0
        assert capsys.readouterr().out != said
    assert float(said.split("top-1 ")[1].split(" %")[0]) > 20  # of ten classes; the encoder is all but random
    cached = ["--mode=cached", f"--run_dir={tmp_path / 'probe'}", "--trainer.accelerator=cpu"]
    assert main(["probe", f"--model.encoder={finished}", *data, *cached]) == 0
    assert float(capsys.readouterr().out.split("top-1 ")[1].split(" %")[0]) > 40


def test_stats_can_be_pasted_and_are_those_of_doctor(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tall = np.zeros((90, 12, 3), np.uint8)
    tall[30:60] = 255  # a centre crop would be white
    Image.fromarray(tall).save(next((image_folder / "train").glob("*/*.png")).with_name("tall.png"))
    assert main(["stats", f"--data.root={image_folder}", "--data.image_size=12", "--data.num_workers=0"]) == 0
    mean, std = capsys.readouterr().out.strip().splitlines()
    assert mean.startswith("--data.mean '[0.4")
    assert std.startswith("--data.std '[0.")
    assert main(["doctor", str(image_folder), "--num_workers=0"]) == 0
    assert f"\n{mean} {std}\n" in capsys.readouterr().out
    (image_folder / "train" / "broken.png").write_bytes(b"not an image")
    bad = fails(["stats", f"--data.root={image_folder}", "--data.num_workers=0"], capsys)
    assert "broken.png" in bad
    assert "mae doctor" in bad


def test_stats_of_a_bundled_data_set_are_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--data.dataset=digits"]) == 0
    values = [float(line.split("[")[1].split("]")[0]) for line in capsys.readouterr().out.splitlines()]
    assert values == pytest.approx([*DEFAULTS["digits"].mean, *DEFAULTS["digits"].std], abs=5e-4)


def test_reconstruct_hides_what_the_mask_says(finished: Path, tmp_path: Path) -> None:
    image = save_images(tmp_path, 1, size=(28, 28))[0]
    out = tmp_path / "out.png"
    mask = np.zeros((4, 4), np.uint8)
    mask[1, 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert (
        main(["reconstruct", str(image), f"--model={finished}", f"--out={out}", f"--mask={tmp_path / 'mask.png'}"]) == 0
    )
    small = np.asarray(Image.open(out))
    Image.fromarray(mask).resize((28, 28), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    assert (
        main(["reconstruct", str(image), f"--model={finished}", f"--out={out}", f"--mask={tmp_path / 'mask.png'}"]) == 0
    )
    assert np.array_equal(small, np.asarray(Image.open(out)))
    original, masked = small[:, :116], small[:, 116:232]  # 28 pixels, enlarged 4 times, 2 of border
    different = (original != masked).any(axis=2)[36:148, 2:114]
    assert different[28:56, 56:84].mean() > 0.9
    different[28:56, 56:84] = False
    assert not different.any()


def test_reconstruct_settings_have_an_effect(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_images(tmp_path, 2, size=(40, 30))

    def draw(*settings: str) -> bytes:
        out = tmp_path / "out.png"
        assert main(["reconstruct", *map(str, images), f"--model={finished}", f"--out={out}", *settings]) == 0
        return out.read_bytes()

    usual = draw()
    assert draw("--seed=0") == usual
    assert draw("--seed=1") != usual
    assert draw("--mask_ratio=0.5") != usual
    args = ["reconstruct", images[0], "--model", finished, "--out", tmp_path / "x.png"]
    assert "leaves 16 of 16" in fails([*args, "--mask_ratio=0"], capsys)
    assert "exclude each other" in fails([*args, "--mask_ratio=0.5", "--mask", images[0]], capsys)
    assert "gone.png" in fails(["reconstruct", "gone.png", "--model", finished, "--out", "x.png"], capsys)


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    import signal

    args = [
        "pretrain",
        *DIGITS,
        *TINY,
        f"--run_dir={tmp_path / 'run'}",
        "--trainer.max_steps=1000000",
        "--trainer.log_every_n_steps=1",
    ]
    process = ForkedCommand(args, tmp_path)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(120) == 130
    finally:
        process.kill()
    said, complaints = process.communicate()
    assert "there is no checkpoint yet" in said or "--ckpt_path last goes on from" in said
    assert "Traceback" not in complaints


@pytest.mark.slow
def test_pretraining_without_an_account_is_recorded_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from mae.callbacks.wandb_file import read_records

    settings = [*DIGITS, *TINY, "--wandb.mode=auto", "--trainer.log_every_n_steps=2", "--trainer.max_steps=5"]
    monkeypatch.delenv("WANDB_MODE")
    done = command("pretrain", *settings, "--run_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("W&B:") == 1
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(read_records(file))
    config = {item.key: json.loads(item.value_json) for r in records for item in r.run.config.update}
    assert config["model"]["embed_dim"] == 32
    assert config["seed_everything"] == 0
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    logged = [row for row in rows if "train/loss" in row]
    assert [(row["trainer/global_step"], row["images_seen"]) for row in logged] == [(2, 128), (4, 256), (5, 320)]
    assert all(row["lr"] > 0 for row in logged)
    assert any("reconstructions/filenames" in row for row in rows)

    settings = ["--data.dataset=digits", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.max_steps=4"]
    settings += [f"--model.encoder={tmp_path}", "--model.warmup_epochs=0.01"]
    done = command("probe", *settings, "--run_dir", tmp_path / "probe")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "probe").glob("wandb/offline-run-*/*.wandb")
    keys = {
        "/".join(item.nested_key) or item.key
        for record in read_records(file)
        if record.HasField("history")
        for item in record.history.item
    }
    assert {"val/acc1", "val/acc5", "confusion/filenames"} <= keys
    assert list((tmp_path / "reconstructions").glob("*.png"))
