"""Which folder is taken for which split, what is no class, what is left out: said in one line, the same in a tar."""

import os
import socket
import tarfile
from pathlib import Path

import fsspec
import pytest
from conftest import TINY, save_images

from mae.cli import main
from mae.data.image_files import Leftovers, find_images
from mae.data.labelled import LabelledData
from mae.data.layout import open_splits
from mae.data.sources import FolderSource, describe
from mae.data.tar_shards import scan_tar
from mae.errors import UserError
from mae.runtime.storage import Place

# By what it is: the files (/ at the end: an empty folder; * : cat/1.png and dog/2.png below it), and the line, in which
# R is the root and (2, 2) are 2 images and 2 classes; after a ! an error. Where a tar has another line, it comes third.
CASES: dict[str, tuple[str, ...]] = {
    "usual": ("train/* val/*", "train: R/train (2, 2), val: R/val (2, 2)"),
    "case": ("Train/* VAL/*", "train: R/Train (2, 2), val: R/VAL (2, 2)"),
    "validation": (
        "train/* validation/*",
        "train: R/train (2, 2), val: R/validation (2, 2)",
    ),
    "training": ("training/* Valid/*", "train: R/training (2, 2), val: R/Valid (2, 2)"),
    "test is held out": (
        "Train/* Test/*",
        "train: R/Train (2, 2), val: R/Test (2, 2); Test is held out, as there is no val",
    ),
    "test beside val": (
        "train/* val/a/1.png test/1.png unlabeled/1.png",
        "train: R/train (2, 2), val: R/val (1 image, 1 class); left out: test/, unlabeled/",
    ),
    "two for val": (
        "train/* val/* valid/*",
        "!R has both val/ and valid/: say which one is for val with --data.val_dir",
    ),
    "two for train": (
        "Train/* train/*",
        "!R has both Train/ and train/: say which one is for train with --data.train_dir",
    ),
    "one split": ("Train/*", "train: R/Train (2, 2)"),
    "held-out only": ("Val/*", "!R has a held-out folder Val/ but no train/; set --data.train_dir"),
    "test only": ("test/*", "!R has a held-out folder test/ but no train/; set --data.train_dir"),
    "held-out among classes": ("Val/1.png cat/1.png", "!R has a held-out folder Val/ but no train/"),
    "nested": (
        "data/Train/* data/val/* README.md",
        "train: R/data/Train (2, 2), val: R/data/val (2, 2)",
    ),
    "nested twice, zipped on a Mac": (
        "a/b/train/* a/b/test/* a/b/more/1.png __MACOSX/a/._1.png",
        "train: R/a/b/train (2, 2), val: R/a/b/test (2, 2); test is held out, as there is no val; left out: more/",
    ),
    "one folder that holds no splits": ("photos/2021/1.png photos/2022/1.png", "train: R (2 images, 1 class)"),
    "train beside classes": (
        "train/1.png bus/1.png car/1.png notes/a.txt",
        "train: R/train (1 image); left out: bus/, car/",
    ),
    "Train among classes": ("Train/1.png Bus/1.png Car/1.png", "train: R (3 images, 3 classes)"),
    "test among classes": ("test/1.png bus/1.png car/1.png", "train: R (3 images, 3 classes)"),
    "images beside splits": (
        "train/* val/* 1.png 2.png",
        "train: R/train (2, 2), val: R/val (2, 2); left out: 2 images beside the splits",
    ),
    "classes": ("*", "train: R (2, 2)"),
    "hidden and system folders": (
        "* .ipynb_checkpoints/1.png cat/@eaDir/1.png/t.jpg $RECYCLE.BIN/1.png .git/config lost+found/ Thumbs.db",
        "train: R (2, 2; left out: folder $RECYCLE.BIN, folder .ipynb_checkpoints, folder @eaDir)",
    ),
    "an empty class folder": ("* bird/", "train: R (2, 2; no image in bird)"),
    "an empty class folder in a split": (
        "train/* train/bird/notes.txt train/bat/ val/*",
        "train: R/train (2, 2; no image in bat, bird), val: R/val (2, 2)",
    ),
    "one class": ("cat/1.png cat/2.png", "train: R (2 images, 1 class)"),
    "unlabelled": ("1.png 2.png", "train: R (2 images)"),
    "unlabelled beside labelled": ("* x.png", "train: R (3 images; no labels, since x.png lies beside the folders)"),
    "other formats": (
        "Train/* Train/cat/3.psd Train/4.SVG Train/notes.txt Val/* Val/a.jxl",
        "train: R/Train (2, 2; left out: .psd 1, .svg 1), val: R/Val (2, 2; left out: "
        ".jxl 1 (pip install pillow-jxl-plugin))",
        "train: R/Train (2, 2), val: R/Val (2, 2); left out: .jxl 1 (pip install pillow-jxl-plugin), .psd 1, .svg 1",
    ),
    "nothing that is read": (
        "a.jxl cat/b.jxl",
        "!R holds no image that can be read; left out: .jxl 2 (pip install pillow-jxl-plugin)",
    ),
}


def written(root: Path, files: str) -> Path:
    for entry in files.split():
        names = [f"{entry[:-1]}{name}" for name in ("cat/1.png", "dog/2.png")] if entry.endswith("*") else [entry]
        for path in map(root.joinpath, names):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if entry.endswith("/") else path.touch()
    return root


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_taken_for_what_is_said(kind: str, case: str, tmp_path: Path) -> None:
    files, line, *of_tar = CASES[case]
    root = written(tmp_path / "root", files)
    if kind == "tar":
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            tar.add(root, ".")
        root, line = tmp_path / "images.tar", (of_tar or [line])[0]
    expected = line.replace("R/", f"{root}/").replace("R ", f"{root} ").replace("(2, 2", "(2 images, 2 classes")
    if line.startswith("!"):
        with pytest.raises(UserError) as caught:
            open_splits(Place(root), 3)
        assert str(caught.value).startswith(expected[1:])
        return
    splits = open_splits(Place(root), 3)
    assert str(splits) == expected
    for source in splits.sources.values():  # and names, labels and where are those of a folder of the split
        names = [source.name(i) for i in range(len(source))]
        assert all(source.where(i).endswith(name) for i, name in enumerate(names))
        if source.labels is not None:
            assert [source.classes[label] for label in source.labels] == [name.split("/")[0] for name in names]


def test_options_come_first(tmp_path: Path) -> None:
    root = written(tmp_path, "Train/* train/* val/* valid/* part/1.png")

    def line(**options: str) -> str:
        return str(open_splits(Place(root), 3, **options)).replace(str(root), "R")

    both = "(2 images, 2 classes)"
    assert line(train_dir="Train", val_dir="valid") == f"train: R/Train {both}, val: R/valid {both}"
    with pytest.raises(UserError, match=r"both val/ and valid/: .* --data.val_dir"):
        line(train_dir="Train")
    with pytest.raises(UserError, match=r"--data.val_dir .*nothing does not exist"):
        line(train_dir="Train", val_dir="nothing")
    assert line(train_dir=".", val_dir="part").startswith("train: R (9 images, 5 classes), val: R/part")
    # What lies in the training folder is not held out, and folders that are splits are no classes.
    (root / "part" / "1.png").unlink()
    with pytest.raises(UserError, match=r"has the folders Train/, train/, val/, valid/, which are splits and no cl"):
        line(train_dir=".")


def test_shards_under_other_names_here_and_on_a_store(image_folder: Path, tmp_path: Path) -> None:
    assert main(["pack", str(image_folder), str(tmp_path / "shards"), "--num_workers=0"]) == 0
    (tmp_path / "shards" / "val").rename(tmp_path / "shards" / "Validation")
    (tmp_path / "shards" / "train").rename(tmp_path / "shards" / "Train")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "shards"), "/layouts", recursive=True)
    for root in (str(tmp_path / "shards"), "memory://layouts"):
        data = LabelledData(root=root, num_workers=0)
        train, val = data.require_labels()
        assert (len(train), len(val)) == (16, 8)
        assert data.layout == (
            f"train: {root}/Train (16 images, 2 classes), val: {root}/Validation (8 images, 2 classes)"
        )


def test_the_line_is_printed_where_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "images"
    for split in ("Train", "valid"):
        for seed, name in enumerate(("cat", "dog")):
            save_images(root / split / name, 3, seed=seed)
    (root / "Train" / "cat" / "a.jxl").touch()
    (root / "Train" / "cat" / "@eaDir").mkdir()
    (root / "Train" / "cat" / "@eaDir" / "a.png").touch()
    left = "left out: .jxl 1 (pip install pillow-jxl-plugin), folder @eaDir"
    line = f"train: {root}/Train (6 images, 2 classes; {left}), val: {root}/valid (6 images, 2 classes)"
    assert main(["stats", f"--data.root={root}", "--data.num_workers=0"]) == 0
    assert capsys.readouterr().err == f"{line}\n"
    assert main(["pack", str(root), str(tmp_path / "shards"), "--num_workers=0"]) == 0
    assert capsys.readouterr().out.startswith(f"{line}\n")
    assert main(["doctor", str(root), "--num_workers=0"]) == 0
    said = capsys.readouterr().out
    assert "1 file in train in formats that are not read (.jxl)" in said
    assert "1 hidden folder with images in train (@eaDir)" in said
    args = ["pretrain", f"--data.root={root}", *TINY, "--data.image_size=28", "--data.num_workers=0"]
    args += ["--data.batch_size_per_device=2", "--trainer.max_steps=1", "--data.holdout=0.5"]
    assert main([*args, f"--run_dir={tmp_path / 'run'}"]) == 0
    said = f"\nimages        2 for training, 4 held out; {line}; val is not used, as holdout is set\n"
    assert said in "\n" + capsys.readouterr().out
    (root / "train").mkdir()
    assert main(["doctor", str(root)]) == 2
    assert "has both Train/ and train/: say which one is for train with --train_dir" in capsys.readouterr().err


def test_pipes_and_sockets_are_named(tmp_path: Path) -> None:
    save_images(tmp_path / "cat", 2)
    os.mkfifo(tmp_path / "cat" / "x.jpg")
    os.mkfifo(tmp_path / "queue")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
    source = FolderSource(tmp_path, 3)
    assert describe(source) == "2 images, 1 class; left out: pipe 2, socket 1"


def test_leftovers_are_those_of_the_walk(tmp_path: Path) -> None:
    names = "a.jpg b.JFIF c.jpe d.heic e.avif f.jp2 g.psd .h.psd h/.i.png h/.trash/x/y.png h/.empty/notes.txt h/k.psd"
    root, here, packed = written(tmp_path / "root", names), Leftovers(), Leftovers()
    found = find_images(root, here)
    assert set(found) >= {"a.jpg", "b.JFIF", "c.jpe"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(root, ".")
    assert sorted(name for name, *_ in scan_tar(tmp_path / "x.tar", leftovers=packed)) == found
    assert here == packed
    assert (here.suffixes[".psd"], here.hidden, here.folders) == (2, {".trash"}, {"h"})
    assert len(found) + sum(here.suffixes.values()) == 8
