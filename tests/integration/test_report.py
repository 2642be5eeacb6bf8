"""`mae report`: its config, its statistics, its page; and the whole of it on the bundled digits."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DIGITS, ROOT, TINY, mae
from PIL import Image

from mae.cli import main
from mae.errors import UserError
from mae.evaluation import plots
from mae.launch import report

CONFIG = ROOT / "configs" / "report" / "cifar10.yaml"


def nested(settings: list[str]) -> dict[str, Any]:
    """Settings of the command line as a config holds them."""
    found: dict[str, Any] = {}
    for setting in settings:
        keys, value = setting.removeprefix("--").split("=")
        section, key = keys.split(".")
        found.setdefault(section, {})[key] = yaml.safe_load(value)
    return found


TRAINER = {"accelerator": "cpu", "log_every_n_steps": 5}
TINY_REPORT = {
    "data": {"dataset": "digits", "num_workers": 0},
    "pretrain": report.merge(
        nested([*TINY, *DIGITS]),
        {"data": {"batch_size_per_device": 400}, "trainer": {**TRAINER, "max_epochs": 2}, "panels": {"images": 2}},
    ),
    "knn": {"k": 10},
    "probe": {
        "mode": "both",
        "cached": {"epochs": 2, "rates": [0.1, 1.0]},
        "data": {"batch_size_per_device": 400},
        "model": {"warmup_epochs": 0.1},
        "trainer": {**TRAINER, "max_epochs": 1},
    },
    "finetune": {
        "data": {"auto_augment": None, "batch_size_per_device": 200},
        "model": {"warmup_epochs": 0.1, "drop_path": 0},
        "trainer": {**TRAINER, "max_steps": 12},
    },
    "published": [{"stage": "knn", "value": 50, "source": "A & <B> | C"}],
}


def write(path: Path, settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def finish(out: Path, plan: report.Plan, seed: int, **top1: float) -> None:
    """What a seed's stages leave, as far as a report reads it."""
    for stage, settings in plan.stages.items():
        folder = out / f"seed_{seed}"
        (folder / stage).mkdir(parents=True)
        (folder / f"{stage}.yaml").write_text(f"# mae {stage}\n# a machine\n{yaml.safe_dump(settings)}")
        score = top1.get(stage, 0)
        result = json.dumps(
            {"knn": score, "knn_whitened": score + 5} if stage == "knn" else {"acc1": score, "images": 10}
        )
        (folder / ("knn.json" if stage == "knn" else f"{stage}/results.json")).write_text(result)
        (folder / stage / "metrics.csv").write_text(
            "step,images_seen,train/loss,val/loss,val/acc1\n5,50,0.9,,\n10,100,0.8,0.75,61.5\n"
        )
    (out / f"seed_{seed}" / "pretrain" / "encoder.safetensors").touch()
    panel = out / f"seed_{seed}" / "pretrain" / "reconstructions" / "step_0000010.png"
    panel.parent.mkdir()
    Image.new("RGB", (8, 8)).save(panel)


def jobs_of(plan: report.Plan, seeds: list[int], out: Path) -> list[report.StageRun]:
    return [report.StageRun(s, seed, out / f"seed_{seed}", plan.stages[s]) for seed in seeds for s in plan.stages]


# ---- the config ----------------------------------------------------------------------------------------------------


def test_settings_come_from_file_shared_data_section_and_root_in_this_order(tmp_path: Path) -> None:
    write(tmp_path / "below" / "fine.yaml", {"data": {"val_dir": "a", "hflip": 0, "crop_pct": 0.5}, "run_dir": "x"})
    settings = {
        "data": {"val_dir": "b", "crop_pct": 0.7, "root": "left"},
        "probe": None,
        "finetune": {"config": "fine.yaml", "data": {"crop_pct": 0.9}, "model": {"base_lr": 1}},
    }
    plan = report.read_plan(write(tmp_path / "below" / "report.yaml", settings), root="here")
    shared = {"val_dir": "b", "crop_pct": 0.7, "root": "here"}
    assert list(plan.stages) == ["pretrain", "knn", "finetune"]
    assert plan.stages["pretrain"] == plan.stages["knn"] == {"data": shared}
    assert plan.stages["finetune"] == {"data": {**shared, "crop_pct": 0.9, "hflip": 0}, "model": {"base_lr": 1}}


def test_a_plain_pretraining_config_shares_what_its_data_are(tmp_path: Path) -> None:
    plain = {"data": {"val_dir": "test", "mean": [0.1], "hflip": 0}, "model": {"size": "nano"}, "seed_everything": 7}
    plan = report.read_plan(write(tmp_path / "plain.yaml", plain))
    assert plan.stages["pretrain"] == {"data": plain["data"], "model": {"size": "nano"}}
    assert plan.published == []
    for stage in ("knn", "probe", "finetune"):
        assert plan.stages[stage] == {"data": {"val_dir": "test", "mean": [0.1]}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pretrian": {}, "knn": {}}, "unknown key 'pretrian'"),
        ({"pretrain": {"model": {"mask_ration": 0.5}}}, "mask_ration"),
        ({"pretrain": {}, "finetune": {"model": {"layer_decai": 0.5}}}, "settings of finetune.*layer_decai"),
        ({"pretrain": {}, "knn": {"neighbours": 3}}, "settings of knn.*neighbours"),
        ({"model": {"size": "nano"}, "trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"pretrain": None, "knn": {}, "probe": None, "finetune": None}, "knn has no encoder.*set encoder"),
        ({"pretrain": {"config": "gone.yaml"}}, "gone.yaml cannot be read"),
        ({"pretrain": "micro.yaml"}, "pretrain holds 'micro.yaml'"),
        ({"pretrain": {}, "published": [{"stage": "probe", "value": "68"}]}, "published: .*'68'.* is not"),
        ([1, 2], "holds list where settings are wanted"),
    ],
)
def test_wrong_configs(
    settings: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "wrong.yaml", settings)
    assert main(["report", "--config", "wrong.yaml", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "report.yaml", {"pretrain": {}, "probe": False})
    for options, said in (
        (["--seeds", "1", "1"], "different numbers"),
        (["--seeds", "-1"], "0 or more"),
        (["--stages", "probe"], "leaves this stage out"),
        (["--stages", "train"], "train"),
        (["--config", str(tmp_path / "gone.yaml")], "gone.yaml cannot be read"),
    ):
        assert main(["report", f"--config={config}", f"--out={tmp_path / 'out'}", *options]) == 2, options
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_the_shipped_config_is_taken_by_every_stage() -> None:
    plan = report.read_plan(CONFIG, root="images")
    assert list(plan.stages) == list(report.TITLES)
    assert all(settings["data"]["val_dir"] == "test" for settings in plan.stages.values())
    assert plan.stages["finetune"]["data"]["labels_per_class"] is None
    report.check_settings(plan, jobs_of(plan, [0], Path("out")))


# ---- what is finished ----------------------------------------------------------------------------------------------


def test_a_finished_stage_with_other_settings_is_refused_by_key(tmp_path: Path) -> None:
    settings = {"pretrain": {"model": {"size": "nano", "depth": 1}}, "knn": {"k": 5}}
    plan = report.read_plan(write(tmp_path / "report.yaml", settings))
    finish(tmp_path, plan, seed=0)
    report.check_finished(jobs_of(plan, [0, 1], tmp_path))
    plan.stages["knn"]["k"] = 6
    with pytest.raises(UserError, match=r"^k is 6, but 5 in .*knn.yaml, .*delete .*seed_0/knn.json$"):
        report.check_finished(jobs_of(plan, [0], tmp_path))
    del plan.stages["pretrain"]["model"]["depth"]
    with pytest.raises(UserError, match=r"^model.depth is not set, but 1 in .*pretrain.yaml, .*delete .*seed_0$"):
        report.check_finished(jobs_of(plan, [0], tmp_path))


def test_results_of_an_encoder_that_is_gone_are_refused(tmp_path: Path) -> None:
    plan = report.read_plan(write(tmp_path / "report.yaml", {"pretrain": {}, "finetune": {}}))
    plan.stages["finetune"]["model"] = {"encoder": "scratch"}
    finish(tmp_path, plan, seed=0)
    (tmp_path / "seed_0" / "pretrain" / "encoder.safetensors").unlink()
    jobs = jobs_of(plan, [0], tmp_path)
    with pytest.raises(UserError, match=r"the encoder that knn of seed 0 started from is gone"):
        report.check_finished(jobs)
    report.check_finished([job for job in jobs if job.stage in ("pretrain", "finetune")])  # of random weights
    checkpoint = tmp_path / "seed_0" / "pretrain" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    report.check_finished(jobs)  # going on from there makes the same encoder again


def test_figures_of_both_probes_and_of_half_written_files(tmp_path: Path) -> None:
    plan = report.read_plan(write(tmp_path / "report.yaml", {"pretrain": {}}))
    finish(tmp_path, plan, seed=0, probe=61)
    cached = tmp_path / "seed_0" / "probe" / "cached" / "results.json"
    cached.parent.mkdir()

    def figures(mode: str) -> dict[str, float]:
        return report.StageRun("probe", 0, tmp_path / "seed_0", {"mode": mode}).figures()

    assert figures("recipe") == {"top-1": 61, "images": 10}
    assert figures("both") == figures("cached") == {}
    cached.write_text('{"acc1": 62, "im')
    assert figures("cached") == {}
    cached.write_text('{"acc1": 62, "acc5": 99, "images": 10}')
    fast = {"top-1 (cached features)": 62, "top-5 (cached features)": 99, "images (cached features)": 10}
    assert figures("cached") == fast
    assert figures("both") == figures("recipe") | fast
    names = "class,images,acc1\n" + "a,2,50\n" * 5
    cached.with_name("per_class.csv").write_text(names)
    assert figures("cached") == {key: value for key, value in fast.items() if "top-5" not in key}  # of five classes
    cached.with_name("per_class.csv").write_text(names + "f,2,50\n")
    assert figures("cached") == fast
    of_knn = report.StageRun("knn", 0, tmp_path / "seed_0", {})
    assert of_knn.figures() == {"top-1 (knn)": 0, "top-1 (knn_whitened)": 5}
    (tmp_path / "seed_0" / "knn.json").write_text('{"acc1": 62, "images": 10}')  # one figure, of whitened features
    assert of_knn.figures() == {}


@pytest.mark.parametrize("points", [1, 2])
def test_a_curve_of_one_point_can_be_seen(points: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    styles = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, style, **more: styles.append(style) or [])
    monkeypatch.setattr(Axes, "legend", lambda self, **more: None)
    values = [(50.0 * i, 1.0) for i in range(points)]
    report.draw([("seed 0 train/loss", values, 0)], "loss", tmp_path / "loss.png")
    rows = "".join(f"{i},{seen},{loss},\n" for i, (seen, loss) in enumerate(values))
    (tmp_path / "metrics.csv").write_text(f"step,images_seen,train/loss,val/loss\n{rows}")
    plots.loss_curve(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert all(("o" in style) == (points == 1) for style in styles)
    assert len(styles) == 2


# ---- the page ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_a_pocket_calculator(tmp_path: Path) -> None:
    # Squared differences from 64: 4, 1, 9; their sum 14 over n - 1 = 2 is 7, whose root is 2.6458.
    assert report.mean_std([62.0, 65.0, 67.0], 2) == "64.67 ± 2.52"
    assert report.mean_std([62.0, 63.0, 67.0], 4) == "64.0000 ± 2.6458"
    assert report.mean_std([62.0], 2) == "62.00 (one seed)"
    plan = report.Plan(
        tmp_path,
        {"knn": {}, "probe": {}},
        [{"stage": "knn", "value": 60, "source": "a"}, {"stage": "knn", "value": 70.5, "source": "b"}],
    )
    finished = {
        ("knn", 3): {"top-1 (knn)": 62.0, "images": 9.0},
        ("knn", 5): {"top-1 (knn)": 64.0, "top-1 (knn_whitened)": 66.0, "images": 9.0},
    }
    finished["probe", 4] = {"top-1": 60.0}
    header, plain, whitened, probe = report.figure_rows(plan, [3, 4, 5, 6], finished)
    assert header == ["stage", "figure", "seed 3", "seed 4", "seed 5", "mean ± std", "published", "difference"]
    assert plain == ["k-NN", "top-1 (knn)", "62.00", "–", "64.00", "63.00 ± 1.41", "60 (a); 70.5 (b)", "+3.00; -7.50"]
    assert whitened == ["k-NN", "top-1 (knn_whitened)", "–", "–", "66.00", "66.00 (one seed)", "", ""]
    assert probe == ["linear probe", "top-1", "–", "60.00", "–", "60.00 (one seed)", "", ""]
    # What was not run, or not published, has neither row nor column.
    del finished["probe", 4]
    header, *rows = report.figure_rows(plan._replace(published=[]), [3, 4, 5], finished)
    assert header == ["stage", "figure", "seed 3", "seed 5", "mean ± std"]
    assert [row[0] for row in rows] == ["k-NN", "k-NN"]


def test_the_page_is_escaped_and_its_pictures_are_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    published = [{"stage": "finetune", "value": 83.6, "source": "<script>alert('|')</script> & more"}]
    plan = report.read_plan(write(tmp_path / "a<b>&c.yaml", {"pretrain": {}, "published": published}))
    finish(out, plan, seed=0, finetune=81.25)
    finish(out, plan, seed=2, finetune=83.25)
    report.write_page(plan, [0, 2], jobs_of(plan, [0, 2], out), out)
    markdown = (out / "report.md").read_text()
    assert "<script" not in markdown
    assert "&lt;script&gt;" in markdown
    assert markdown.startswith("# a&lt;b&gt;&amp;c: ")
    assert "| fine-tuning | top-1 | 81.25 | 83.25 | 82.25 ± 1.41 | 83.6 (" in markdown
    assert "held-out loss | 0.7500 | 0.7500 | 0.7500 ± 0.0000" in markdown
    names = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown)
    assert names == ["loss.png", "accuracy.png", "seed_0/pretrain/reconstructions/step_0000010.png"]
    for name in names:
        Image.open(out / name).verify()
    columns = {line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert columns == {8}


# ---- the real command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_report_and_that_it_goes_on(tmp_path: Path) -> None:
    out, config = tmp_path / "out", write(tmp_path / "tiny.yaml", TINY_REPORT)

    def go(*options: object) -> str:
        done = mae("report", "--config", config, "--out", out, *options, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def times() -> dict[Path, float]:
        return {path: path.stat().st_mtime for path in (out / "seed_0").rglob("*.*")}

    def page(seeds: int) -> tuple[str, dict[tuple[str, str], list[float]]]:
        markdown = (out / "report.md").read_text()
        rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
        return markdown, {(row[0], row[1]): [float(cell) for cell in row[2 : 2 + seeds]] for row in rows[2:]}

    go("--stages", "pretrain", "knn", "--seeds", 0, 1)
    partial, figures = page(2)
    assert partial.startswith("# tiny: pre-training, k-NN\n")
    assert "linear probe" not in partial
    assert "fine-tuning" not in partial.lower()
    results = [json.loads((out / f"seed_{seed}" / "knn.json").read_text())["knn"] for seed in (0, 1)]
    assert figures["k-NN", "top-1 (knn)"] == [round(result, 2) for result in results]
    assert f"| {sum(results) / 2:.2f} ± {abs(results[0] - results[1]) / 2**0.5:.2f} |" in partial
    assert results[0] != results[1]

    said = go("--seeds", 0)
    assert said.count("(finished before)") == 2
    assert said.count("log: ") == 2
    markdown, figures = page(1)
    for stage, name, key, file in (
        ("k-NN", "top-1 (knn)", "knn", "knn.json"),
        ("k-NN", "top-1 (knn_whitened)", "knn_whitened", "knn.json"),
        ("k-NN", "untrained (knn)", "untrained_knn", "knn.json"),
        ("linear probe", "top-1", "acc1", "probe/results.json"),
        ("linear probe", "top-1 (cached features)", "acc1", "probe/cached/results.json"),
        ("fine-tuning", "top-1", "acc1", "finetune/results.json"),
        ("fine-tuning", "top-5", "acc5", "finetune/results.json"),
    ):
        result = json.loads((out / "seed_0" / file).read_text())[key]
        assert figures[stage, name] == [round(result, 2)], (stage, name)
    assert f"mae finetune --config {out}/seed_0/finetune.yaml" in markdown
    assert markdown.count("\n![") == 3

    before = times()
    assert go("--seeds", 0).count("(finished before)") == 4
    assert times() == before

    (out / "seed_0" / "finetune" / "results.json").unlink()
    (out / "seed_0" / "pretrain" / "encoder.safetensors").unlink()
    assert go("--seeds", 0).count("(finished before)") == 2
    after = times()
    touched = {path.relative_to(out / "seed_0").parts[0] for path in after if after[path] != before.get(path)}
    assert {name for name in touched if "." not in name} == {"finetune", "pretrain"}
    # The runs were at their end: nothing was trained again.
    for stage in ("finetune", "pretrain"):
        checkpoint = out / "seed_0" / stage / "checkpoints" / "last.ckpt"
        assert after[checkpoint] == before[checkpoint]
    assert (out / "report.md").read_text() == markdown

    wrong = write(tmp_path / "tiny.yaml", report.merge(TINY_REPORT, {"knn": {"k": 7}}))
    done = mae("report", "--config", wrong, "--out", out, "--seeds", 0)
    assert done.returncode == 2
    assert "k is 7, but 10 in" in done.stderr


@pytest.mark.slow
def test_a_failing_stage_is_one_line_with_its_reason_and_log(tmp_path: Path) -> None:
    config = write(tmp_path / "tiny.yaml", report.merge(TINY_REPORT, {"pretrain": {"model": {"base_lr": 1e20}}}))
    for root, code, reason in (("nowhere", 2, "nowhere"), (None, 1, "the loss is not finite")):
        settings = yaml.safe_load(config.read_text())
        settings["data"] = {"root": root} if root else settings["data"]
        if root:
            settings["pretrain"]["data"].pop("dataset")
        done = mae("report", "--config", write(tmp_path / "now.yaml", settings), "--out", tmp_path / f"out{code}")
        assert done.returncode == code, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("mae: error: seed 0, pretrain: ")
        assert reason in line
        assert line.endswith(f"(log: {tmp_path / f'out{code}' / 'seed_0' / 'pretrain.log'})")


@pytest.mark.slow
def test_ctrl_c_stops_the_stage_too_and_the_same_command_goes_on(tmp_path: Path) -> None:
    long = report.merge(
        TINY_REPORT,
        {"pretrain": {"trainer": {"max_epochs": 3000}}, "knn": None, "probe": None, "finetune": None},
    )
    out, config = tmp_path / "out", write(tmp_path / "tiny.yaml", long)
    args = ["report", "--config", str(config), "--out", str(out), "--seeds", "0"]
    checkpoint = out / "seed_0" / "pretrain" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, "-m", "mae.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A test run in the background of a script ignores Ctrl-C, and what it starts would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 240
        while not checkpoint.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # to the report alone, as `kill` would
        assert process.wait(120) == 130
    finally:
        process.kill()
    said, complaints = (stream.decode() for stream in process.communicate())
    assert "the same command goes on" in said
    assert complaints == ""
    rows = (out / "seed_0" / "pretrain" / "metrics.csv").read_text()
    time.sleep(2)
    assert (out / "seed_0" / "pretrain" / "metrics.csv").read_text() == rows  # nobody writes any more
    steps = int(rows.splitlines()[-1].split(",")[0])
    long["pretrain"]["trainer"]["max_epochs"] = steps // 10 + 3
    long["pretrain"]["allow_changes"] = True  # a shorter schedule is another one
    write(config, long)
    done = mae(*args)
    assert done.returncode == 0, done.stderr
    first = (out / "seed_0" / "pretrain" / "metrics.csv").read_text().splitlines()[1]
    assert first == rows.splitlines()[1]  # the row of the run that was stopped
