"""Text files of a run folder that something else has changed: one line that names the file, and nothing is changed."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DIGITS, TINY

from mae.callbacks.checkpointing import Checkpoints
from mae.callbacks.metrics_csv import MetricsCSV
from mae.cli import main
from mae.errors import UserError
from mae.launch.run_folder import RunFolder
from mae.options import ToolParser
from mae.runtime.checkpoint_files import ever_saved, step_file
from mae.runtime.run_files import read_metrics, read_yaml
from mae.training.checkpoint_io import CheckpointFiles

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


# Ten times nine references to the list above: 3.5 billion values.
GROWING = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11))

NO_YAML = {
    b"\xff\xfe\x00": "is not a text file in UTF-8",
    b"a: [1": "is not YAML",
    b"a: \x00": "is not YAML .*special characters",
    b"a: 2025-13-45": "is not YAML .*month must be in 1..12",
    b"a: " + b"9" * 5000: "is not YAML .*Exceeds the limit",
    b"[" * 60_000: "is not YAML .*nests too deeply",
    b"a: " + b"[" * 60 + b"]" * 60: r"is not YAML .*line 1: it nests deeper than 50",
    b"a: " + b"x" * 70_000: r"cannot be read: it has 70,003 bytes, over the limit of 65,536",
    b"a: 1\n---\na: 2": "is not YAML .*single document",
    b"a: !!python/object/apply:os.system [true]": "is not YAML .*could not determine a constructor",
    b"a: &a {b: *a}": "is not YAML .*line 1: the value holds itself",
    b"a: 1\na: 2": "is not YAML .*line 2: the key a comes twice",
    b"? [1, 2]\n: 3": "is not YAML .*line 1: a key is no plain text",
    GROWING.encode(): r"is not YAML .*line 6: it has more than 50,000 values",
    b"- 1": "holds list where settings are wanted",
}


@pytest.mark.parametrize("content", NO_YAML, ids=range(len(NO_YAML)))
def test_settings_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.yaml {NO_YAML[content]}"):
        read_yaml(path)
    with pytest.raises(UserError, match=rf"config\.yaml {NO_YAML[content]}"):  # before the parser sees it
        ToolParser(prog="mae knn").parse_args([f"--config={path}"])


def test_settings_by_reference_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 3}\n")
    same = {"b": [1, 2]}
    assert read_yaml(tmp_path / "config.yaml") == {"a": same, "c": same, "d": {**same, "e": 3}}


def test_a_config_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: it is a pipe or device"):
        ToolParser(prog="mae knn").parse_args(["--config", str(path)])
    (group := tmp_path / "group.yml").write_text("[" * 60_000)
    with pytest.raises(UserError, match=r"group\.yml is not YAML"):
        ToolParser(prog="mae pretrain").parse_args([f"--trainer={group}"])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "metrics.csv": lambda path: path.write_text(path.read_text().replace(",", ";")),
    "config.yaml": lambda path: (path.unlink(), path.mkdir()),
    "model.safetensors": lambda path: (path.unlink(), path.mkdir()),  # else it would show when training has ended
    ".newest": lambda path: (path.unlink(), path.mkdir()),
}


def test_a_run_does_not_go_on_with_damaged_files_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["pretrain", *DIGITS, *TINY, "--panels.images=1"]
    assert main([*args, f"--run_dir={tmp_path / 'whole'}", "--trainer.max_steps=1"]) == 0
    for name, damage in DAMAGE.items():
        shutil.copytree(tmp_path / "whole", run := tmp_path / f"without {name}", symlinks=True)
        damage(run / name)
        before = {path: path.lstat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
        capsys.readouterr()
        assert main([*args, f"--run_dir={run}", "--trainer.max_steps=2", "--ckpt_path=last"]) == 2
        said = capsys.readouterr()
        (line,) = [line for line in said.err.splitlines() if line.startswith("mae: error")]
        assert f"/{name}" in line
        assert "goes on from" not in said.out
        assert {path: path.lstat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nobody may not pass the folders above
    (checkpoints := Path("checkpoints")).mkdir()
    run_folder = RunFolder(SimpleNamespace(run_dir=Path()), None, None, None)  # type: ignore[arg-type]

    def refused_to_nobody() -> bool:
        if (pid := os.fork()) == 0:
            with contextlib.suppress(PermissionError):  # nobody is who runs this, if not root
                os.setuid(65534)
            try:
                run_folder.check_writable()
            except PermissionError:
                os._exit(13)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 13

    for path in (Path(), checkpoints):
        path.chmod(0o777)
    assert not refused_to_nobody()
    for path in (Path(), checkpoints):
        path.chmod(0o555)
        assert refused_to_nobody()
        path.chmod(0o777)


def test_metrics_that_cannot_be_written_are_to_blame_for_a_missing_checkpoint(tmp_path: Path) -> None:
    metrics = MetricsCSV(tmp_path / "metrics.csv")
    metrics.log_metrics({"loss": 1.0}, 1)
    metrics.path.unlink()
    metrics.path.mkdir()
    metrics.log_metrics({"loss": 1.0}, 2)
    checkpoints = Checkpoints()
    checkpoints.files = files = CheckpointFiles(3)
    files.alongside = [metrics.sync]
    files.save_checkpoint({"global_step": 2}, step_file(tmp_path, 2))
    files.wait()
    said = f": {metrics.path}: Is a directory; there is none yet; make room or repair {tmp_path}"
    assert checkpoints.why() == said


def test_the_newest_checkpoint_by_a_damaged_name(tmp_path: Path) -> None:
    assert ever_saved(tmp_path) is None
    (tmp_path / ".newest").write_text("step_0000007.ckpt")
    assert ever_saved(tmp_path) == "step_0000007.ckpt"
    for content in (b"", b"\xff", b"/etc/passwd", b"x" * 100_000_000):
        (tmp_path / ".newest").write_bytes(content)
        assert ever_saved(tmp_path) == f"unknown, as {tmp_path / '.newest'} is damaged"
