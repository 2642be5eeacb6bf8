"""`mae demo`, the real command, shortened."""

from pathlib import Path

from conftest import mae
from PIL import Image


def test_demo_gives_the_same_table_twice(tmp_path: Path) -> None:
    tables = []
    for name in ("first", "second"):
        done = mae("demo", "--steps", 60, "--run_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        table = (tmp_path / name / "table.txt").read_text()
        assert table in done.stdout
        tables.append(table)
        for path in (*(tmp_path / name / "reconstructions").glob("*.png"), tmp_path / name / "loss.png"):
            assert min(Image.open(path).size) > 100
    assert tables[0] == tables[1]
    header, *rows = tables[0].splitlines()
    assert header.split() == ["features", "linear", "probe", "k-NN"]
    scores = {row.split()[0]: [float(x) for x in row.split()[1:]] for row in rows}
    assert list(scores) == ["raw", "random", "mae"]
    assert 88 < scores["raw"][0] < 94
    assert scores["mae"][0] > scores["random"][0]  # even after 60 steps


def test_a_folder_that_the_user_named_is_never_removed(tmp_path: Path) -> None:
    assert mae("demo", "--steps", 10, "--run_dir", tmp_path / "mine").returncode == 0
    again = mae("demo", "--steps", 10, "--run_dir", tmp_path / "mine")
    assert again.returncode == 2
    assert "holds a run" in again.stderr
    assert (tmp_path / "mine" / "encoder.safetensors").exists()
