"""`mae bench`: that its figures are there and fit together; never how large they are."""

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DIGITS, TINY
from figure_checks import check_figure
from PIL import Image

from mae.bench import run
from mae.bench.figures import consecutive_groups, figure, ratio
from mae.bench.run import find_bottleneck, steps_of
from mae.cli import main
from mae.data.datamodule import ImageData
from mae.data.tar_shards import INDEX, tar_source, write_index
from mae.runtime.machine import available_cores, machine_details

QUICK = ["--data.image_size=28", "--data.batch_size_per_device=4"]


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test works in an empty folder, with one for temporary files, and both are empty afterwards."""
    here, temporary = tmp_path / "here", Path(tempfile.mkdtemp())  # short, as sockets lie in there
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    left = [path for folder in (here, temporary) for path in folder.iterdir()]
    # Of Python, until the process ends; and where torch keeps compiled programs.
    assert not [path for path in left if not path.name.startswith(("pymp-", "torchinductor_"))]


def smooth(height: int, width: int, phase: float) -> Image.Image:
    rows = torch.linspace(0, 3, height)[:, None, None] + phase
    columns = torch.linspace(0, 4, width)[None, :, None] * torch.tensor([1.0, 0.7, 0.4])
    return Image.fromarray((127 + 100 * torch.sin(rows + columns)).round().to(torch.uint8).numpy())


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """photographs/*.jpg: 12 of several sizes, one grey, one of CMYK, one to be turned upright."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(12):
        image = smooth(60 + 20 * i, 300 - 15 * i, i)
        mode = {3: "L", 5: "CMYK"}.get(i, "RGB")
        image.convert(mode).save(folder / f"{i:02d}.jpg", quality=95, exif=turned if i == 7 else Image.Exif())
    return folder


@pytest.fixture
def one_size(tmp_path: Path) -> Path:
    """small/*.jpg: 16 of the same size."""
    folder = tmp_path / "small"
    folder.mkdir()
    for i in range(16):
        smooth(40, 36, i).save(folder / f"{i:02d}.jpg")
    return folder


def packed(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, folder.name)
    return path


def measured(tmp_path: Path, *args: object) -> dict[str, Any]:
    """The figures that a command has written."""
    out = tmp_path / "figures.json"
    assert main(["bench", *map(str, args), f"--json={out}"]) == 0
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["bench", *map(str, args)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mae: error: ")
    return lines[0]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_data(tmp_path: Path, photographs: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = photographs if kind == "folder" else packed(photographs)
    threads = torch.get_num_threads()
    scaling = ["--data.jpeg_scaling=true"] if kind == "tar" else []
    found = measured(
        tmp_path, "data", f"--data.root={root}", *QUICK, *scaling, "--rounds=3", "--seconds=0.01", "--workers", 0, 2
    )
    assert torch.get_num_threads() == threads
    assert (found["images"], found["rounds"]) == (12, 3)
    assert found["decoders"] == {"libjpeg-turbo": 11, "Pillow": 1}
    assert {"cpu", "cores", "torch", "torchvision", "pillow", "simplejpeg", "device"} <= set(found["machine"])
    assert found["machine"]["threads"] == 1
    assert list(found["stages"]) == ["read", "decode", "crop", "full pipeline"]
    for row in found["stages"].values():
        for one in row.values():
            check_figure(one, 3)
        quotients = [a / b for a, b in zip(row["ours"]["rounds"], row["official"]["rounds"], strict=True)]
        assert row["ratio"]["rounds"] == pytest.approx(quotients)
    assert sum(found["parts"].values()) == pytest.approx(1)
    assert min(found["parts"].values()) >= 0
    assert list(found["workers"]) == ["0", "2"]
    for row in found["workers"].values():
        for one in row.values():
            check_figure(one)
    assert found["workers"]["0"]["ratio"]["rounds"] == [1, 1, 1]

    off = found["difference"]
    assert (off["images"], off["turned_upright"], off["not_compared"]) == (12, 1, 0)
    assert 0 < off["mean"] <= off["worst_image"] <= off["worst_pixel"]
    assert off["mean"] <= (2 if scaling else 0.5)  # of smooth images
    said = capsys.readouterr().out
    assert "decoded: 11 by libjpeg-turbo, 1 by Pillow" in said
    assert "12 images, 1 turned upright" in said
    assert "full pipeline" in said.splitlines()[-1]


def test_data_takes_images_from_all_over_the_set(tmp_path: Path, photographs: Path) -> None:
    found = measured(
        tmp_path, "data", f"--data.root={photographs}", *QUICK, "--images=4", "--seconds=0.01", "--workers", 0
    )
    assert (found["images"], found["rounds"]) == (4, 4)


def test_transparent_images_are_not_compared(tmp_path: Path) -> None:
    for i in range(3):
        smooth(40, 40, i).convert("RGBA" if i else "RGB").save(tmp_path / f"{i}.png")
    found = measured(tmp_path, "data", f"--data.root={tmp_path}", *QUICK, "--seconds=0.01", "--workers", 0)
    assert (found["difference"]["images"], found["difference"]["not_compared"]) == (1, 2)
    assert found["decoders"] == {"Pillow": 3}


def test_what_cannot_be_measured(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data", f"--data.root={photographs}"]
    assert "needs the name of a bench: step, data, run, save" in fails(capsys)
    assert "'dta' is not a bench; the benches are step, data, run, save" in fails(capsys, "dta")
    for removed in ("export", "growth", "scaling"):
        assert f"'{removed}' is not a bench" in fails(capsys, removed, "--threads", 2)
    assert "--rounds" in fails(capsys, *data, "--rounds=0")
    assert "--json" in fails(capsys, *data, f"--json={tmp_path / 'nowhere' / 'figures.json'}")
    assert "--data.crop_scale" in fails(capsys, *data, "--data.crop_scale=null")
    assert "digits lies in memory" in fails(capsys, "data", "--data.dataset=digits")
    assert "num_workers" in fails(capsys, *data, "--data.num_workers=2")
    assert "nowhere" in fails(capsys, "data", f"--data.root={tmp_path / 'nowhere'}")
    (photographs / "05.jpg").write_bytes((photographs / "05.jpg").read_bytes()[:-500])
    assert "05.jpg: " in fails(capsys, *data)
    assert "--seconds" in fails(capsys, "run", *DIGITS, *TINY, "--seconds=0")
    assert "--rounds" in fails(capsys, "save", *DIGITS, *TINY, "--rounds=0")
    assert "--json" in fails(capsys, "run", *DIGITS, *TINY, f"--json={tmp_path / 'nowhere' / 'figures.json'}")
    assert "mask_ration" in fails(capsys, "run", *DIGITS, *TINY, "--model.mask_ration=1")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert {"data", "run", "save"} <= set(capsys.readouterr().out.split())
    for command, option in (("data", "--rounds"), ("run", "--trainer.precision"), ("save", "--rounds")):
        with pytest.raises(SystemExit) as ended:
            main(["bench", command, "--help"])
        assert ended.value.code == 0
        assert option in capsys.readouterr().out


def check_run(found: dict[str, Any], batch: int, workers: int) -> None:
    assert (found["batch"], found["workers"], found["precision"]) == (batch, workers, "32-true")
    for key in ("loader", "step", "full_loop"):
        check_figure(found[key])
    assert 0 <= found["data_wait"]["low"] <= found["data_wait"]["high"] <= 1
    assert min(found["steps"].values()) >= 3
    slower = found["loader"]["median"] < found["step"]["median"]
    assert found["bottleneck"] == ("loader" if slower else "step")
    assert f"the {found['bottleneck']} is the bottleneck" in found["advice"][0]


def test_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(tmp_path, "save", *DIGITS, *TINY, "--rounds=2", "--trainer.accumulate_grad_batches=2")
    for key in ("clone", "write", "plain", "saving", "deterministic"):
        check_figure(found[key])
    assert [len(found[key]["rounds"]) for key in ("plain", "saving", "deterministic", "write")] == [4, 2, 4, 2]
    assert found["bound"] == pytest.approx(found["plain"]["high"] + 1.5 * found["clone"]["median"])
    assert found["bytes"] > 50_000
    said = capsys.readouterr().out
    assert ("OVER it" in said) == (found["saving"]["high"] > found["bound"])
    kept = tmp_path / "kept"
    measured(tmp_path, "save", *DIGITS, *TINY, "--rounds=1", f"--run_dir={kept}")
    assert not list(kept.glob("checkpoints/*"))


def test_run_with_workers_and_accumulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "digits.yaml"
    config.write_text("trainer: {max_steps: 1, accumulate_grad_batches: 2}\npanels: {every_n_epochs: 1}\n")
    found = measured(
        tmp_path, "run", f"--config={config}", *DIGITS, *TINY, "--data.num_workers=1", "--seconds=0.2",
        "--data.batch_size_per_device=32", "--run_dir=kept", "--ckpt_path=last",
    )  # fmt: skip
    check_run(found, batch=64, workers=1)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:3]] == ["loader", "step", "full"]
    assert "(1 worker)" in said[0]
    assert "data wait" in said[2]
    assert said[3:] == found["advice"]


@pytest.mark.parametrize("kind", ["folder", "resident", "shards"])
def test_run_on_files(tmp_path: Path, one_size: Path, kind: str) -> None:
    root = one_size
    if kind == "shards":
        root = packed(one_size).parent / "shards"
        root.mkdir()
        tar = one_size.with_suffix(".tar").rename(root / "000000.tar")
        write_index(tar_source(tar, 3).index, root / INDEX)
    own = ["--data.device_resident=true"] if kind == "resident" else ["--data.num_workers=0"]
    # 4 steps an epoch: the loop goes round several times.
    found = measured(tmp_path, "run", f"--data.root={root}", *QUICK, *TINY, *own, "--seconds=0.2")
    check_run(found, batch=4, workers=0)
    assert found["device_resident"] is (kind == "resident")


def test_steps_wait_for_data_only_while_the_device_is_idle() -> None:
    # Two batches a step. The first came before the device was done with what it had, the last 2 s after that.
    done = [10.0, 11, 13, 14, 20]
    waits = [(9.0, 9.5), (11.0, 11.5), (12.0, 12.5), (12.5, 16.0)]
    assert steps_of(done, waits, 2) == [(3, 0.5), (7, 2)]
    assert steps_of(done, waits, 1)[3] == (6, 2)


def test_figures() -> None:
    assert figure([3, 1, 2])[:3] == (2, 1, 3)
    assert ratio(figure([2, 6]), figure([1, 2])).rounds == [2, 3]
    assert consecutive_groups(range(10), 4) == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert consecutive_groups("ab") == [["a"], ["b"]]


def test_advice(one_size: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(loader: float, step: float, loop: float, wait: float, workers: int, **settings: Any) -> tuple[str, str]:
        data = ImageData(root=str(settings.pop("root", one_size)), **settings)
        data.setup("fit")
        name, lines = find_bottleneck(loader, step, loop, wait, workers, True, data)
        return name, "\n".join(lines)

    monkeypatch.setattr(run, "available_cores", lambda: 8)
    limit, text = said(1200, 60, 58, 0.01, 4)
    assert limit == "step"
    assert "20.0 times its rate, so more workers would do nothing (1 would do)" in text
    assert "share 8 cores" in said(600, 60, 40, 0.01, 4)[1]
    assert "do other programs use this machine?" in said(6000, 60, 40, 0.01, 4)[1]
    assert "--data.num_workers 1 would load during the step" in said(100, 60, 40, 0.4, 0)[1]
    assert "--data.num_workers 5 would smooth it" in said(63, 60, 40, 0.3, 4)[1]
    assert "take turns on the device" in said(100, 60, 40, 0.4, 0, device_resident=True)[1]

    limit, text = said(100, 240, 95, 0.6, 2)
    assert limit == "loader"
    assert "5 workers of 50 images/s each: --data.num_workers 5 (8 cores)" in text
    assert "--data.device_resident true" in text
    assert (
        "12 workers of 20 images/s each, but there are 8 cores, which the step needs, too"
        in said(20, 240, 20, 0.9, 1)[1]
    )
    assert "are on the device already" in said(20, 240, 20, 0.9, 0, device_resident=True)[1]

    assert "--data.jpeg_scaling true decodes large photographs faster" in text
    assert "jpeg_scaling" not in said(20, 240, 20, 0.9, 1, jpeg_scaling=True)[1]
    assert "`mae pack`" in text
    assert "mae pack" not in said(20, 240, 20, 0.9, 1, root=packed(photographs))[1]


def test_the_machine_is_told() -> None:
    found = machine_details(torch.device("cpu"))
    assert found["cpu"]
    assert found["cores"] == available_cores()
    assert found["torch"] == torch.__version__.split("+")[0]
