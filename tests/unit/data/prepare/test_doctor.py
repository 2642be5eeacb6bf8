"""mae doctor: figures and findings of folders with every kind of problem, of tar files and of shards."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from conftest import save_images
from forked import in_process
from PIL import Image

from mae.cli import main
from mae.data import image_files
from mae.data.decode import Picture
from mae.data.image_files import IMAGE_SUFFIXES
from mae.data.layout import Splits
from mae.data.prepare import doctor
from mae.data.prepare.survey import CHUNK, COLOURS, FORMATS, format_codes
from mae.data.sources import FileSource, class_labels
from mae.data.tar_shards import INDEX, make_index, scan_tar, write_index
from mae.runtime.storage import Place


def draw(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/{cat,dog,none} and val/{bird,cat} with every kind of problem."""
    root = tmp_path_factory.mktemp("data") / "sick"
    for name in ("train/cat", "train/dog", "train/none", "val/cat", "val/bird"):
        (root / name).mkdir(parents=True)
    cat, dog, val = root / "train" / "cat", root / "train" / "dog", root / "val"

    for seed, path in enumerate((cat / "a.png", cat / "b.png", dog / "c.png", val / "cat" / "v.png")):
        draw(40, 48, seed).save(path)
    draw(300, 260, 10).save(val / "bird" / "x.png")
    shutil.copy(cat / "a.png", cat / "again.png")
    shutil.copy(cat / "b.png", dog / "contrary.png")
    shutil.copy(cat / "a.png", val / "cat" / "leak.png")

    draw(40, 48, 20).convert("L").save(cat / "grey.jpg")
    draw(40, 48, 21).convert("CMYK").save(cat / "cmyk.jpg")
    draw(40, 48, 22).save(cat / "progressive.JPEG", progressive=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    draw(40, 48, 23).save(cat / "turned.jpg", exif=exif)
    draw(40, 48, 24).convert("RGBA").save(dog / "alpha.png")
    draw(40, 48, 25).quantize(8).save(dog / "palette.gif")
    Image.fromarray(np.random.default_rng(26).integers(0, 65536, (40, 48), dtype=np.uint16)).save(dog / "sixteen.png")
    draw(20, 48, 27).save(dog / "tiny.png")
    draw(40, 48, 28).save(dog / "wrong.jpg", format="PNG")

    (dog / "page.jpg").write_text("<html>Not found</html>")
    draw(40, 48, 29).save(dog / "cut.jpg")
    (dog / "cut.jpg").write_bytes((dog / "cut.jpg").read_bytes()[:-200])
    (dog / "zero.png").touch()
    (dog / "gone.png").symlink_to("nowhere.png")
    (dog / "lost.txt").symlink_to("nowhere.txt")
    for name in ("cat/notes.txt", "dog/photo.psd", "none/notes.txt", ".hidden.txt", "README"):
        (root / "train" / name).write_text("no image")
    return root


BAD = {"dog/cut.jpg", "dog/gone.png", "dog/page.jpg", "dog/zero.png"}


def images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.*") if path.suffix.lower() in IMAGE_SUFFIXES)


def diagnosed(tmp_path: Path, *args: object, code: int = 0) -> dict[str, Any]:
    """What --json says."""
    assert main(["doctor", *map(str, args), "--num_workers=0", f"--json={tmp_path / 'figures.json'}"]) == code
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found


def test_formats_are_those_that_training_reads() -> None:
    assert set().union(*FORMATS.values()) == IMAGE_SUFFIXES
    assert tuple(FORMATS) == (*image_files.FORMATS, "NPY")


def test_figures_of_a_folder_with_every_problem(sick: Path, tmp_path: Path) -> None:
    found = diagnosed(tmp_path, sick, code=2)
    train, val = found["splits"]["train"], found["splits"]["val"]
    reasons = train.pop("unreadable")
    assert set(reasons) == BAD
    assert reasons["dog/gone.png"] == "dangling link to nowhere.png"
    assert reasons["dog/page.jpg"].startswith("not an image")
    assert reasons["dog/zero.png"] == "empty file"
    for split in (train, val):
        assert len(split.pop("mean")) == len(split.pop("std")) == 3
    assert len(val.pop("extent")) == 3
    assert train == {
        "place": str(sick / "train"),
        "images": 18,
        "bytes": sum(path.stat().st_size for path in images(sick / "train") if path.exists()),
        "classes": {"cat": 7, "dog": 11},
        "per_class": {"fewest": 7, "median": 9.0, "most": 11, "ratio": 11 / 7},
        "empty_classes": ["none"],
        "beside_classes": 0,
        "formats": {"PNG": 9, "JPEG": 4, "GIF": 1},
        "colours": {"RGB": 10, "grey": 2, "CMYK": 1, "palette": 1},
        "marks": {"alpha": 1, "16 bits": 1, "turned by EXIF": 1, "progressive JPEG": 1, "other suffix": 1},
        "decoders": {"Pillow": 11, "libjpeg-turbo": 3},
        "sizes": {"smallest": [20, 48], "median": [40, 48], "largest": [40, 48]},
        "small": {"224": 14, "32": 1},
        "extent": [[0.0, 1.0]] * 3,
        "top": 65407,
        "copies": 2,
        "other_files": {".txt": 2, ".psd": 1, "": 1},
        "dangling_links": ["dog/gone.png", "dog/lost.txt"],
    }
    assert val == {
        "place": str(sick / "val"),
        "images": 3,
        "bytes": sum(path.stat().st_size for path in images(sick / "val")),
        "unreadable": {},
        "classes": {"bird": 1, "cat": 2},
        "per_class": {"fewest": 1, "median": 1.5, "most": 2, "ratio": 2.0},
        "empty_classes": [],
        "beside_classes": 0,
        "formats": {"PNG": 3},
        "colours": {"RGB": 3},
        "marks": {},
        "decoders": {"Pillow": 3},
        "sizes": {"smallest": [40, 48], "median": [40, 48], "largest": [300, 260]},
        "small": {"224": 2, "32": 0},
        "top": 0,
        "copies": 0,
        "other_files": {},
        "dangling_links": [],
    }


def test_findings_are_said_most_serious_first(sick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosed(tmp_path, sick, code=2)
    findings = found["findings"]
    assert found["same_bytes"] == {"groups": 2, "held_out_in_train": 1, "under_several_classes": 1}
    printed = capsys.readouterr()
    assert [(finding["stops"], finding["what"], finding["names"]) for finding in findings] == [
        (True, "1 class in val that train lacks", ["bird"]),
        (True, "4 unreadable images in train", []),
        (True, "1 empty class folder in train", ["none"]),
        (False, "1 image of val in train, too", ["train: cat/a.png = val: cat/leak.png"]),
        (False, "1 image under several classes", ["train: cat/b.png = train: dog/contrary.png"]),
        (False, "2 copies of other images in train", []),
        (False, "1 class with fewer than 10 images in train", ["cat 7"]),
        (False, "1 class in train that val lacks", ["dog"]),
        (False, "1 image in train with a side below 32 pixels", ["dog/tiny.png"]),
        (False, "1 file in train in formats that are not read", [".psd"]),
        (False, "1 image in train under another format's suffix", ["dog/wrong.jpg"]),
        (False, "2 dangling links in train", ["dog/gone.png", "dog/lost.txt"]),
    ]
    for line in (
        "    dog/zero.png: empty file",
        "  formats     PNG 9, JPEG 4, GIF 1",
        "12 findings; the first 3 would stop a training",
    ):
        assert f"\n{line}" in printed.out
    assert "--data.max_bad_images 4" in printed.out
    assert printed.err.splitlines() == [
        f"mae: error: {sick} has 1 class in val that train lacks, 4 unreadable images in train, "
        "1 empty class folder in train"
    ]


def test_list_names_every_problem(sick: Path, tmp_path: Path) -> None:
    diagnosed(tmp_path, sick, f"--list={tmp_path / 'list.csv'}", code=2)
    with (tmp_path / "list.csv").open(newline="") as file:
        header, *listed = csv.reader(file)
    assert header == ["path", "problem"]
    train, val = sick / "train", sick / "val"
    problems = {path: problem for path, problem in listed if path not in {str(train / name) for name in BAD}}
    assert len(listed) == len(problems) + len(BAD)
    assert problems == {
        str(train / "none"): "class folder without images",
        str(train / "dog" / "lost.txt"): "dangling link",
        str(train / "dog" / "wrong.jpg"): "holds PNG, unlike its suffix",
        str(train / "dog" / "tiny.png"): "20 x 48 pixels",
        str(train / "cat" / "again.png"): f"same bytes as {train / 'cat' / 'a.png'}",
        str(val / "cat" / "leak.png"): f"same bytes as {train / 'cat' / 'a.png'}",
        str(train / "dog" / "contrary.png"): f"same bytes as {train / 'cat' / 'b.png'}, under another class",
        str(val / "bird"): "class that train lacks",
    }


def test_a_clean_folder_has_no_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, split in enumerate(("train", "val")):
        for j, name in enumerate(("cat", "dog")):
            save_images(tmp_path / "clean" / split / name, 10, (32, 40), seed=2 * i + j)
    assert diagnosed(tmp_path, tmp_path / "clean")["findings"] == []
    assert capsys.readouterr().out.splitlines()[-2:] == ["nothing wrong was found", f"wrote {tmp_path}/figures.json"]


def tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as file:
        for image in images(folder):
            file.add(image, image.relative_to(folder).as_posix())
    return path


def pack(folder: Path, shards: Path) -> None:
    shards.mkdir(parents=True)
    found = sorted(scan_tar(tar(folder, shards / "000000.tar")))
    names, offsets, sizes = zip(*found, strict=True)
    labels, classes = class_labels(names)
    index = make_index(["000000.tar"], [0] * len(names), offsets, sizes, names, labels=labels, classes=classes)
    write_index(index, shards / INDEX)


def test_tar_files_and_shards_give_the_figures_of_the_folder(sick: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sick, folder, symlinks=True)
    (folder / "train" / "dog" / "gone.png").unlink()
    for split in ("train", "val"):
        tar(folder / split, tmp_path / f"{split}.tar")
        pack(folder / split, tmp_path / "shards" / split)
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "shards"), "/store", recursive=True)

    def figures(*args: object) -> dict[str, Any]:
        splits: dict[str, Any] = diagnosed(tmp_path, *args, code=2)["splits"]
        for split in splits.values():
            for key in ("place", "other_files", "dangling_links", "empty_classes"):  # of folders only
                del split[key]
        return splits

    expected = figures(folder)
    assert set(expected["train"]["unreadable"]) == BAD - {"dog/gone.png"}
    assert figures(tmp_path, "--train_dir=train.tar", "--val_dir=val.tar") == expected
    assert figures(tmp_path / "shards") == expected
    assert figures("memory://store") == expected
    assert figures(tmp_path / "train.tar") == {"train": expected["train"]}


def test_workers_change_nothing(sick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path / "many" / "train", 2 * CHUNK + 3)
    save_images(tmp_path / "many" / "val", 5, seed=1)
    for root, code in ((sick, 2), (tmp_path / "many", 0)):
        alone = diagnosed(tmp_path, root, code=code), capsys.readouterr()
        assert (diagnosed(tmp_path, root, "--num_workers=2", code=code), capsys.readouterr()) == alone


def test_mean_and_std_count_every_image_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "images"
    root.mkdir()
    pixels = [np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8) // (i + 1) for i in range(3)]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{i}.png")
    train = diagnosed(tmp_path, root)["splits"]["train"]
    parts = [image.reshape(-1, 3) / 255 for image in pixels]
    mean = np.mean([part.mean(0) for part in parts], axis=0)
    std = np.sqrt(np.mean([(part**2).mean(0) for part in parts], axis=0) - mean**2)
    np.testing.assert_allclose(train["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(train["std"], std, rtol=1e-12)
    as_settings = [f"'[{', '.join(f'{value:.4f}' for value in values)}]'" for values in (mean, std)]
    assert f"--data.mean {as_settings[0]} --data.std {as_settings[1]}\n" in capsys.readouterr().out


def test_npy_of_any_channels(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for i, dtype in enumerate((np.uint8, np.uint16)):
        np.save(root / f"{i}.npy", np.full((32, 40, 5), np.iinfo(dtype).max, dtype))
    train = diagnosed(tmp_path, root, "--in_chans=5")["splits"]["train"]
    assert (train["formats"], train["colours"], train["decoders"]) == ({"NPY": 2}, {"other": 2}, {"numpy": 2})
    assert (train["marks"], train["mean"], train["std"]) == ({"16 bits": 1}, [1.0] * 5, [0.0] * 5)


def test_images_beside_folders_are_told(tmp_path: Path) -> None:
    save_images(tmp_path / "images" / "cat", 3, (32, 32))
    save_images(tmp_path / "images", 2, (32, 32), seed=1)
    found = diagnosed(tmp_path, tmp_path / "images")
    assert found["splits"]["train"]["beside_classes"] == 2
    assert [finding["what"] for finding in found["findings"]] == ["2 images beside the folders in train"]


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    save_images(tmp_path / "images" / "cat", 3, (32, 32))
    (tmp_path / "images" / "cat" / "notes.txt").touch()
    (tmp_path / "images" / "cat" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "self").symlink_to("self")
    train = diagnosed(tmp_path, tmp_path / "images")["splits"]["train"]
    assert (train["images"], train["other_files"], train["dangling_links"]) == (3, {".txt": 1}, ["self"])


def test_one_picture_of_several_images_is_a_jpeg(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    draw(40, 48, 0).save(root / "0.jpg", format="MPO", save_all=True, append_images=[draw(40, 48, 1)])
    train = diagnosed(tmp_path, root)["splits"]["train"]
    assert (train["formats"], train["marks"]) == ({"JPEG": 1}, {})


def test_a_readable_image_that_pillow_refuses_is_a_jpeg() -> None:
    kind, colour, marks = format_codes(b"", ".jpg", Picture(torch.zeros(3, 1, 1, dtype=torch.uint8)))
    assert (list(FORMATS)[kind - 1], COLOURS[colour], marks) == ("JPEG", "other", 0)


def test_nothing_but_unreadable_images(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(2):
        (root / f"{i}.png").touch()
    found = diagnosed(tmp_path, root, code=2)
    train = found["splits"]["train"]
    assert (train["sizes"], train["copies"], train["mean"], train["std"]) == ({}, 0, [], [])
    assert [finding["what"] for finding in found["findings"]] == ["2 unreadable images in train"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["."], "holds no image"),
        (["held_out"], "held_out has a held-out folder val/ but no train/; set --train_dir"),
        (["held_out", "--train_dir=fit"], "held_out/fit does not exist"),
        ([".", "--in_chans=0"], "--in_chans 0: it must be at least 1"),
        ([".", "--list=nowhere/list.csv"], "--list nowhere/list.csv: there is no folder nowhere"),
    ],
)
def test_wrong_arguments_are_one_line(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "held_out" in args:
        save_images(tmp_path / "held_out" / "val", 1)
    assert main(["doctor", *args, "--num_workers=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_names_that_cannot_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "images"
    root.mkdir()
    name = os.fsdecode(b"caf\xe9\n.png")
    (root / name).touch()
    diagnosed(tmp_path, root, f"--list={tmp_path / 'list.csv'}", code=2)
    assert "    caf\\xe9\\n.png: empty file\n" in capsys.readouterr().out
    assert b"caf\\xe9\\n.png" in (tmp_path / "list.csv").read_bytes()


class Pixels(FileSource):
    """Images of one pixel, made when they are read: nothing of them lies in memory."""

    labels, classes = None, []

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index}.ppm"

    def read(self, index: int) -> bytes:
        return b"P6 1 1 255\n" + index.to_bytes(3, "big")


def test_a_dead_loader_process_names_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Deadly(Pixels):
        def read(self, index: int) -> bytes:
            if index == 70:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(index)

    splits = Splits({"train": Deadly(100)}, {"train": Place(tmp_path)}, [])
    monkeypatch.setattr(doctor, "open_splits", lambda *_: splits)
    assert main(["doctor", str(tmp_path), "--num_workers=1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the last file it read: 70.ppm" in line


def peak_memory(folder: Path) -> tuple[list[int], str]:
    """Bytes after 2,000 images and after 20,000, and what was printed; of this process, which should be a new one."""
    peaks = []
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for count in (2_000, 20_000):
            splits = Splits({"train": Pixels(count)}, {"train": Place(folder)}, [])
            doctor.open_splits = lambda *_, splits=splits: splits  # type: ignore[assignment, misc]
            doctor.doctor_command([str(folder), "--num_workers=0"])
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return peaks, out.getvalue()


@pytest.mark.slow
def test_memory_grows_by_less_than_100_bytes_an_image(tmp_path: Path) -> None:
    (small, large), printed = in_process(peak_memory, tmp_path)
    assert "train: 20,000 images" in printed
    assert large - small < 100 * 18_000 + 2_000_000
