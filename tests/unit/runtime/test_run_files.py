"""Text files of a run folder that something else has changed: one line that names the file, and nothing is changed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DIGITS, TINY

from mae.cli import main
from mae.errors import UserError
from mae.runtime.run_files import read_metrics, read_yaml

GOOD = "step,train/loss,val/loss\n5,0.9,\n10,0.8,nan\n"


def test_metrics_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert read_metrics(path) == ([], [])
    path.write_text(f"{GOOD}15,0.")  # the last line is being written
    columns, rows = read_metrics(path)
    assert columns == ["step", "train/loss", "val/loss"]
    assert [row["step"] for row in rows] == ["5", "10"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"\ufeff{GOOD}", r"the first column is '\\ufeffstep' where step is wanted"),
        (GOOD.replace(",", ";"), "the first column is 'step;train/loss;val/loss'"),
        (GOOD.replace("5,0.9", "5.0,0.9"), r"line 2: invalid literal for int\(\) with base 10: '5.0'"),
        (f"{GOOD}garbage\n", r"line 4: it has not as many values as there are columns \(3\)"),
        (f"{GOOD}15,high,\n", "line 4: could not convert string to float: 'high'"),
        (f"{GOOD}7,0.7,0.7\n", "line 4: step 7 comes after step 10"),
        (f"{GOOD}15,1,2,3\n", "line 4: it has not as many values"),
    ],
)
def test_metrics_that_were_changed(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=rf"metrics\.csv was changed by something else: {said}.*move it away"):
        read_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        (b"a: [1", "is not YAML"),
        (b"a: 2025-13-45", "is not YAML: month must be in 1..12"),
        (b"[" * 100_000, "is not YAML"),
        (b"- 1", "holds list where settings are wanted"),
    ],
)
def test_settings_that_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.yaml {said}"):
        read_yaml(tmp_path / "config.yaml")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "spreadsheet": lambda path: path.write_text(path.read_text().replace(",", ";")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "bytes": lambda path: path.write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_does_not_go_on_with_changed_metrics_and_changes_nothing(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["pretrain", *DIGITS, *TINY, f"--run_dir={tmp_path / 'run'}", "--panels.images=1"]
    assert main([*args, "--trainer.max_steps=1"]) == 0
    DAMAGE[damage](tmp_path / "run" / "metrics.csv")

    def times() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}

    before = times()
    capsys.readouterr()
    assert main([*args, "--trainer.max_steps=2", "--ckpt_path=last"]) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("mae: error")]
    assert "metrics.csv" in line
    assert "goes on from" not in said.out
    assert times() == before
