"""`mae demo`, the real command, shortened."""

from pathlib import Path

import pytest
from conftest import mae
from PIL import Image


def demo(run_dir: Path, steps: int) -> str:
    """Its table, after the run has been seen to end well."""
    done = mae("demo", "--steps", steps, "--run_dir", run_dir)
    assert done.returncode == 0, done.stderr
    table = (run_dir / "table.txt").read_text()
    assert table in done.stdout
    return table


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    demo(run_dir, 60)
    return run_dir


@pytest.mark.slow
def test_demo_ends_with_a_table_and_pictures(first: Path) -> None:
    header, *rows = (first / "table.txt").read_text().splitlines()
    assert header.split() == ["features", "linear", "probe", "k-NN"]
    scores = {row.split()[0]: [float(x) for x in row.split()[1:]] for row in rows}
    assert list(scores) == ["raw", "random", "mae"]
    assert 88 < scores["raw"][0] < 94
    assert scores["mae"][0] > scores["random"][0]  # even after 60 steps
    for path in (*(first / "reconstructions").glob("*.png"), first / "loss.png"):
        assert min(Image.open(path).size) > 100


@pytest.mark.slow
def test_demo_gives_the_same_figures_again_and_removes_no_folder_that_the_user_named(
    first: Path, tmp_path: Path
) -> None:
    assert demo(tmp_path / "second", 60) == (first / "table.txt").read_text()
    again = mae("demo", "--steps", 60, "--run_dir", first)
    assert again.returncode == 2
    assert "holds a run" in again.stderr
    assert (first / "encoder.safetensors").exists()


@pytest.mark.soak
def test_full_demo_beats_raw_pixels_and_the_random_encoder(tmp_path: Path) -> None:
    done = mae("demo", "--run_dir", tmp_path / "demo", timeout=3000)  # one thread: others would wait for cores
    assert done.returncode == 0, done.stderr
    _, raw, random, trained = (
        [float(x) for x in line.split()[1:]] if i else []
        for i, line in enumerate((tmp_path / "demo" / "table.txt").read_text().splitlines())
    )
    assert trained[0] >= raw[0] + 2
    assert trained[0] >= random[0] + 15
    assert trained[1] >= random[1] + 20
