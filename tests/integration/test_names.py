"""File names that hold bytes outside UTF-8, line breaks, quotes and escape sequences, through every command."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import DIGITS, TINY, save_images
from pyarrow import parquet as pq
from safetensors.torch import save_file

from mae.cli import main
from mae.runtime.text import csv_row, escaped

NAMES = [
    *(b"a\xff.png", b"a\\xff.png", b"two\nlines.png", b"quo\"te,comma'.png", b"\x1b[31mred\x1b]0;title\x07.png"),
    *(b"back\rspace\t.png", "\u00e9\u202ebidi.png".encode(), b"$x_$ {y}: [z].png", b"=cmd.png", b"~tilde.png"),
]
CLASSES = [
    *(b"cat\xfe\n$a", b'dog\x1b[2J,"', b"cat\\xfe", b"=1+1", "a\u202etxt<script>".encode(), b"@" + 249 * b"x"),
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """train/ and val/ with such names of folders and files below a folder of such a name."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ro\xffo\x1b[31mt\n"))
    for split in ("train", "val"):
        for seed, name in enumerate(map(os.fsdecode, CLASSES)):
            files = zip(save_images(root / split / name, len(NAMES), (28, 28), seed), NAMES, strict=True)
            for path, wanted in files:
                path.rename(path.with_name(os.fsdecode(wanted)))
    return root


def succeeds(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a command that ends well prints; no name does harm in it."""
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert not set(out + err) & set("\x1b\x07\x9b\u202e")
    return (out + err).encode().decode()  # UTF-8


@pytest.mark.slow
def test_names_in_what_is_written(
    hostile: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    said = succeeds(
        capsys, *("doctor", hostile, "--num_workers=0", "--in_chans=1"), f"--list={out / 'list.csv'}",
        f"--json={out / 'figures.json'}",
    )  # fmt: skip
    assert "ro\\xffo\\x1b[31mt\\n/train" in said
    with (out / "list.csv").open(newline="", encoding="utf-8") as file:
        assert {row[0] for row in csv.reader(file)} >= {escaped(str(path)) for path in hostile.rglob("*.png")}
    classes = {escaped(os.fsdecode(name)) for name in CLASSES}
    assert set(json.loads((out / "figures.json").read_text())["splits"]["train"]["classes"]) == classes

    succeeds(capsys, "predict", hostile / "val", "--model", finetuned, f"--out={out / 'p.csv'}", "--num_workers=0")
    with (out / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows[1:]} == {escaped(str(path)) for path in (hostile / "val").rglob("*.png")}

    succeeds(capsys, "pack", hostile, out / "shards", "--num_workers=0", "--in_chans=1")
    succeeds(capsys, "pack", "--verify", out / "shards")
    found = []
    for data, file in ((hostile, "e.npz"), (out / "shards", "packed.npz")):
        options = ["--allow_finetuned=true", "--num_workers=0", "--out", out / file]
        succeeds(capsys, "embed", "--encoder", finetuned, f"--data.root={data}", *options)
        with np.load(out / file) as content:
            assert set(content["path"]) == {escaped(str(path.relative_to(hostile))) for path in hostile.rglob("*.png")}
            assert set(content["label"]) == classes
            found.append(content["features"])
    assert np.array_equal(*found)


def test_a_hostile_file_of_weights_and_a_refusal_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a\x1b[2J\nnote  all is well": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert main(["inspect", str(tmp_path / "w.safetensors")]) == 2
    assert main(["knn", "--encoder=\x1b[31mX", "--data.root=x"]) == 2
    for name in ("--run_dir", "--ckpt_path", "--model.init"):
        assert main(["pretrain", *DIGITS, *TINY, f"{name}={tmp_path}/\udcff\x1b[2J/x"]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert err.count("\n") == err.count("mae: error: ") == 5
    assert f"{tmp_path}/\\xff\\x1b[2J/x is not a UTF-8 name, as torch and safetensors need: rename it" in err


@pytest.mark.slow
def test_every_command_on_such_names(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "ou\nt\x1b[0m"
    out.mkdir()
    data, image = f"--data.root={hostile}", hostile / "val" / os.fsdecode(CLASSES[0]) / os.fsdecode(NAMES[4])
    pre, tuned = out / "pre", out / "tuned"
    tiny = [word for word in TINY if not word.startswith("--wandb")]
    short = ["--data.num_workers=0", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    short += ["--data.batch_size_per_device=8", "--trainer.log_every_n_steps=1"]
    pretrain = ["pretrain", data, "--data.image_size=28", *tiny, *short, f"--run_dir={pre}"]
    finetune = ["finetune", f"--model.encoder={pre}", *short, "--model.drop_path=0", "--data.auto_augment=null"]
    finetune += ["--model.mixup=0", "--model.cutmix=0"]
    succeeds(capsys, "stats", data, "--data.num_workers=0", "--data.image_size=28")
    assert "recording offline" in succeeds(capsys, *pretrain)
    succeeds(capsys, *pretrain, "--ckpt_path=last")
    succeeds(capsys, "knn", f"--encoder={pre}", data, "--data.num_workers=0", "--baseline=false")
    for mode in ("recipe", "cached"):
        probe = [f"--run_dir={out / mode}", f"--mode={mode}", "--cached.epochs=2"]
        succeeds(capsys, "linprobe", f"--model.encoder={pre}", data, *short, *probe)
    succeeds(capsys, *finetune, data, "--data.label_fraction=0.5", f"--run_dir={tuned}")
    succeeds(capsys, "pack", hostile, out / "shards", "--num_workers=0")
    subset = (tuned / "subset.txt").read_text(encoding="utf-8")
    for again, root in (("from_list", hostile), ("from_shards", out / "shards")):  # the list is read as it was written
        given = [f"--data.root={root}", f"--data.subset_file={tuned / 'subset.txt'}"]
        succeeds(capsys, *finetune, *given, f"--run_dir={out / again}")
        assert (out / again / "subset.txt").read_text(encoding="utf-8") == subset
    classes = [escaped(os.fsdecode(name)) for name in sorted(CLASSES)]
    succeeds(capsys, "evaluate", f"--model={tuned}", data, f"--out={out / 'scores'}", "--data.num_workers=0")
    with (out / "scores" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        assert sorted(row["class"] for row in csv.DictReader(file)) == sorted(csv_row(classes))
    for name in ("per_class.csv", "confusion.csv"):
        with (out / "scores" / name).open(newline="", encoding="utf-8") as file:
            assert not [cell for row in csv.reader(file) for cell in row if cell.startswith(("=", "@"))]
    succeeds(capsys, "embed", f"--encoder={pre}", data, f"--out={out / 'e.parquet'}", "--num_workers=0")
    table = pq.read_table(out / "e.parquet")
    paths = [str(path.relative_to(hostile)) for path in hostile.rglob("*.png")]
    assert sorted(table["path"].to_pylist()) == sorted(map(escaped, paths))
    for command in ("reconstruct", "attention"):
        succeeds(capsys, command, image, f"--model={pre}", f"--out={out / 'picture.png'}")
    assert "\nnote" not in succeeds(capsys, "inspect", tuned, f"--json={out / 'facts.json'}")
    succeeds(capsys, "convert", tuned, out / "timm.pth", "--format=timm")
    (tmp_path / "link").symlink_to(hostile)  # YAML cannot hold bytes that are not UTF-8
    (out / "report.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {"root": str(tmp_path / "link"), "image_size": 28, "num_workers": 0},
                "pretrain": {
                    "model": {"size": "nano", "depth": 1, "decoder_depth": 1, "patch_size": 7, "warmup_epochs": 0.01},
                    "data": {"batch_size_per_device": 8},
                    "trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1},
                },
                "probe": None,
                "finetune": None,
            }
        )
    )
    succeeds(capsys, "report", f"--config={out / 'report.yaml'}", "--seeds", 0, f"--out={out / 'report'}")
    page = (out / "report" / "report.md").read_bytes()
    assert b"\x1b" not in page
    assert b"ou\\nt\\x1b[0m" in page
