"""`mae report`: the whole experiment over several seeds, on one page beside the published figures."""

import contextlib
import html
import io
import json
import math
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mae.commands import report_parser
from mae.errors import TrainingFailed, UserError
from mae.evaluation import knn
from mae.evaluation.metrics import top5_tells
from mae.launch import stages as stages_module
from mae.options import find_config, flatten_settings, run_name
from mae.runtime.checkpoint_files import last_checkpoint
from mae.runtime.files import atomic_write, atomic_write_text
from mae.runtime.machine import available_cores, cpu_name
from mae.runtime.run_files import read_metrics, read_text, read_yaml, settings_in
from mae.runtime.text import printable, printable_lines

Settings = dict[str, Any]

Points = list[tuple[float, float]]

# In the order in which the stages run; the keys are the names of the commands and of the config's sections.
TITLES = {"pretrain": "pre-training", "knn": "k-NN", "probe": "linear probe", "finetune": "fine-tuning"}

# Data settings that a plain pre-training config shares with the later stages.
IDENTITY = ("dataset", "root", "train_dir", "val_dir", "image_size", "in_chans", "mean", "std", "num_workers")

PER_RUN = ("run_dir", "ckpt_path", "seed_everything")  # set for each run here; a run's config.yaml has them, too

STOP_SECONDS = 30.0  # in which a stage that is to stop may end by itself


def report_command(args: Sequence[str]) -> None:
    config = report_parser().parse_args(list(args))
    seeds, out = config.seeds, Path(config.out)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: wanted are different numbers, 0 or more")
    plan = read_plan(Path(config.config), config.root)
    chosen = config.stages or list(plan.stages)
    if left_out := [stage for stage in chosen if stage not in plan.stages]:
        raise UserError(f"--stages {left_out[0]}: {plan.path} leaves this stage out")
    jobs = [StageRun(stage, seed, out / f"seed_{seed}", plan.stages[stage]) for seed in seeds for stage in plan.stages]
    check_settings(plan, jobs[: len(plan.stages)])
    check_finished(jobs)
    try:
        for job in jobs:
            if job.stage in chosen and run_stage(job):
                write_page(plan, seeds, jobs, out)  # a look at a long report need not wait for its end
        write_page(plan, seeds, jobs, out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    print(f"wrote {out / 'report.md'}", flush=True)


# ---- the config ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    path: Path
    stages: dict[str, Settings]  # the stages to run, in order, each as a config of its command
    published: list[Settings]  # stage, value (top-1 in percent), source


def read_plan(path: Path, root: str | None = None) -> Plan:
    """Read a report's config, or a plain pre-training config, whose later stages run with their default recipes.

    A stage's settings are, each over the one before: its `config` file, the section `data`, its own section, `root`.
    An absent section is the stage's default recipe; null or false leaves the stage out.

    Raises:
        UserError: Names the file, section or key.
    """
    config = read_yaml(path)
    if not {*TITLES, "published"} & config.keys():
        data = mapping(config.get("data"), path, "data")
        config = {"pretrain": config, "data": {key: data[key] for key in IDENTITY if key in data}}
    known = ("data", *TITLES, "published")
    if unknown := [key for key in config if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; the keys of a report are {', '.join(known)}")
    shared = {"data": mapping(config.get("data"), path, "data")}
    stages = {}
    for stage in TITLES:
        section = config.get(stage, {})
        if section is None or section is False:
            continue
        section = dict(mapping(section, path, stage))
        base: Settings = {}
        if (name := section.pop("config", None)) is not None:
            beside = path.parent / str(name)
            base = read_yaml(beside if beside.exists() else Path(find_config(str(name))))
        settings = merge(merge(base, shared), section)
        if root is not None:
            settings = merge(settings, {"data": {"root": root}})
        stages[stage] = {key: value for key, value in settings.items() if key not in PER_RUN}
    for stage, settings in stages.items():
        if "pretrain" not in stages and not has_encoder(stage, settings):
            key = "encoder" if stage == "knn" else "model.encoder"
            raise UserError(f"{path}: {stage} has no encoder, as pretrain is left out: set {key} in its section")
    published = config.get("published") or []
    for entry in published if isinstance(published, list) else [published]:
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"stage", "value", "source"}
            or entry["stage"] not in ("knn", "probe", "finetune")
            or type(entry["value"]) not in (int, float)
        ):
            wanted = "{stage: knn, probe or finetune, value: top-1 in percent, source: text}"
            raise UserError(f"{path}: published: {entry!r} is not {wanted}")
    return Plan(path, stages, published)


def mapping(value: Any, path: Path, name: str) -> Settings:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {name} holds {value!r}; wanted are settings as `key: value`")
    return value or {}


def merge(base: Settings, over: Settings) -> Settings:
    """Nested settings of both; where they disagree, those of `over`."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def has_encoder(stage: str, settings: Settings) -> bool:
    """Whether the settings name the encoder that the stage starts from, in place of the one pre-trained here."""
    return flatten_settings(settings).get("encoder" if stage == "knn" else "model.encoder") is not None


# ---- the stages ----------------------------------------------------------------------------------------------------


class StageRun(NamedTuple):
    """One stage of one seed."""

    stage: str
    seed: int
    folder: Path  # of the seed
    settings: Settings

    @property
    def run_dir(self) -> Path:
        return self.folder / self.stage

    @property
    def settings_file(self) -> Path:
        return self.folder / f"{self.stage}.yaml"

    @property
    def follows(self) -> bool:
        """Whether the stage starts from the encoder that this seed pre-trains."""
        return self.stage != "pretrain" and not has_encoder(self.stage, self.settings)

    def arguments(self, config: str) -> list[str]:
        """Arguments of the stage's command."""
        args = ["--config", config]
        if self.stage == "knn":
            args += ["--out", str(self.folder / "knn.json")]
        else:
            args += ["--run_dir", str(self.run_dir), "--seed_everything", str(self.seed), "--ckpt_path", "last"]
        if self.follows:
            args += ["--encoder" if self.stage == "knn" else "--model.encoder", str(self.folder / "pretrain")]
        return args

    def figures(self) -> dict[str, float]:
        """Results by name; empty if the stage is not finished."""
        if self.stage == "pretrain":
            if not (self.run_dir / "encoder.safetensors").is_file():
                return {}
            curves = {"held-out loss": self.curve("val/loss"), "loss": self.curve("train/loss")}
            return next(({name: points[-1][1]} for name, points in curves.items() if points), {})
        files = {"": self.folder / "knn.json" if self.stage == "knn" else self.run_dir / "results.json"}
        if self.stage == "probe" and (mode := self.settings.get("mode", "recipe")) != "recipe":
            fast = {" (cached features)": self.run_dir / "cached" / "results.json"}
            files = fast if mode == "cached" else files | fast
        figures: dict[str, float] = {}
        for suffix, path in files.items():
            try:
                result = settings_in(read_text(path))
            except (UserError, ValueError):  # absent, or damaged: the stage runs again
                return {}
            names = {"top-1": "acc1", "top-5": "acc5"}
            if self.stage == "knn":
                if "knn" not in result:  # a file of before, with one figure, of whitened features
                    return {}
                names = {f"top-1 ({name})": name for name in ("knn", "knn_whitened")}
                names |= {f"untrained ({name})": f"untrained_{name}" for name in ("knn", "knn_whitened")}
            elif not top5_tells(classes_of(path)):
                del names["top-5"]
            names["images"] = "images"
            figures |= {f"{name}{suffix}": result[key] for name, key in names.items() if key in result}
        return figures

    def curve(self, key: str) -> Points:
        """(images seen, value) of a metric of the run."""
        _, rows = read_metrics(self.run_dir / "metrics.csv")
        return [(float(row["images_seen"]), float(row[key])) for row in rows if row.get(key) and row.get("images_seen")]

    def difference(self) -> str | None:
        """A sentence about the first setting in which the config differs from the run's; None if they agree."""
        then = flatten_settings(read_yaml(self.settings_file)) if self.settings_file.is_file() else {}
        now = flatten_settings(self.settings)
        for key in sorted(then.keys() | now.keys()):
            if (key in then) != (key in now) or then.get(key) != now.get(key):
                old, new = (repr(each[key]) if key in each else "not set" for each in (then, now))
                return f"{key} is {new}, but {old} in {self.settings_file}"
        return None


def check_settings(plan: Plan, jobs: Sequence[StageRun]) -> None:
    """Check each stage's settings with its own parser, so that a mistake does not show after days of pre-training."""
    commands: dict[str, Callable[[Sequence[str]], object]] = {
        "pretrain": stages_module.PretrainCLI,
        "knn": knn.knn_command,
        "probe": stages_module.LinearProbeCLI,
        "finetune": stages_module.FinetuneCLI,
    }
    for job in jobs:
        args = [*job.arguments(json.dumps(job.settings)), "--print_config"]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                commands[job.stage](args)
        except UserError as error:
            raise UserError(f"{plan.path}, settings of {job.stage}: {error}") from None


def check_finished(jobs: Sequence[StageRun]) -> None:
    """Check that what is finished belongs to this config and to the encoder of its seed.

    Raises:
        UserError: Names the first setting that differs, or the stage whose encoder is gone.
    """
    encoders = {job.seed: job for job in jobs if job.stage == "pretrain"}
    for job in jobs:
        if not job.figures():
            continue
        way_out = f"give another --out, or delete {job.folder}"
        if difference := job.difference():
            # The later stages started from the encoder, so they must be deleted with it.
            way_out += {"pretrain": "", "knn": "/knn.json"}.get(job.stage, f"/{job.stage}")
            raise UserError(f"{difference}, which is finished: {way_out}")
        if job.follows and not (encoder := encoders[job.seed]).figures():
            if not last_checkpoint(encoder.run_dir).is_file() or encoder.difference():
                raise UserError(f"the encoder that {job.stage} of seed {job.seed} started from is gone: {way_out}")


def run_stage(job: StageRun) -> bool:
    """Run a stage in a process of its own unless it is finished, and print one line. Returns whether it ran.

    Raises:
        UserError: The stage ended because of a mistake in the settings, or without figures.
        TrainingFailed: It ended with any other error.
    """
    log, args = job.folder / f"{job.stage}.log", [job.stage, *job.arguments(str(job.settings_file))]
    print(f"seed {job.seed}  {TITLES[job.stage]:<13}", end=" ", flush=True)
    if done := job.figures():
        print(f"{summary(done)} (finished before)", flush=True)
        return False
    print(f"log: {log} ... ", end="", flush=True)
    start = time.perf_counter()
    job.folder.mkdir(parents=True, exist_ok=True)
    head = f"# mae {printable(shlex.join(args))}\n# {machine()}\n"  # for the page
    atomic_write_text(job.settings_file, head + yaml.safe_dump(job.settings, sort_keys=False))
    with log.open("ab") as file:
        before = file.tell()  # the output of earlier attempts stays
        try:
            command = [sys.executable, "-m", "mae.cli", *args]
            code = wait(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file))
        except (KeyboardInterrupt, SystemExit):
            print("stopped; the same command goes on from here", flush=True)
            raise
    figures = {} if code else job.figures()
    print(f"{summary(figures)}, {time.perf_counter() - start:.0f} s" if figures else "failed", flush=True)
    if figures:
        return True
    output = log.read_bytes()[before:].decode(errors="replace").splitlines()
    reasons = [line.removeprefix("mae: error: ") for line in output if line.startswith("mae: error: ")]
    reason = reasons[-1] if reasons else f"it ended with exit code {code}"
    if code == 0:
        reason = "it has no figures: are there held-out images (val/CLASS/* below data.root, or data.val_dir)?"
    message = f"seed {job.seed}, {job.stage}: {reason} (log: {log})"
    raise UserError(message) if code in (0, 2) else TrainingFailed(message)


def wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for a stage and return its exit code; Ctrl-C or SIGTERM of this process stop the stage, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
        signal.signal(signal.SIGTERM, before)


def machine() -> str:
    """Versions, processors and date."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "timm"))
    parts = [f"{versions}, Python {platform.python_version()}", f"{cpu_name()}, {available_cores()} cores"]
    if shutil.which("nvidia-smi"):  # asking torch would take memory of the GPU
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=False)
        parts += [", ".join(names.stdout.splitlines())] if names.returncode == 0 else []
    return "; ".join([*parts, time.strftime("%Y-%m-%d")])


def classes_of(results: Path) -> float:
    """The number of classes of which results.json tells, from the table beside it; infinity where there is none."""
    try:
        return len(read_text(results.with_name("per_class.csv")).splitlines()) - 1
    except UserError:
        return math.inf


# ---- the page ----------------------------------------------------------------------------------------------------


def write_page(plan: Plan, seeds: Sequence[int], jobs: Sequence[StageRun], out: Path) -> None:
    """Write report.md about the stages that are finished, and its curves."""
    finished = {(job.stage, job.seed): figures for job in jobs if (figures := job.figures())}
    done = [job for job in jobs if (job.stage, job.seed) in finished]
    heads = [[line[2:] for line in read_text(job.settings_file).splitlines()[:2]] for job in done]
    counts = sorted({int(figures[key]) for figures in finished.values() for key in figures if key.startswith("images")})
    notes = [f"Top-1 and top-5: percent of {' or '.join(map(str, counts))} held-out images."] if counts else []
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in figure_rows(plan, seeds, finished)]
    table = [header, ["---"] * len(header), *rows]
    if any(stage == "knn" for stage, _ in finished):
        notes.append("knn: weighted k-NN by cosines of the features as they are; knn_whitened: of whitened features.")
    notes.append("±: sample standard deviation (n - 1) over the seeds.")
    if any("–" in row for row in rows):
        notes.append("–: not run.")
    if "published" in header:
        notes.append("Published figures are quoted, not run here; the difference is our mean less theirs.")
    stages, ran = ({key[i] for key in finished} for i in (0, 1))
    blocks = [
        f"# {run_name(plan.path)}: {', '.join(TITLES[stage] for stage in plan.stages if stage in stages)}",
        f"Config {plan.path.name}; seeds {', '.join(str(seed) for seed in seeds if seed in ran)}. What ran, and where:",
        *sorted({head[1] for head in heads}),
        "## Figures",
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        " ".join(notes),
    ]
    out.mkdir(parents=True, exist_ok=True)
    for stage, keys, heading, label, name in (
        ("pretrain", ("train/loss", "val/loss"), "Pre-training: loss", "loss on hidden patches", "loss.png"),
        ("finetune", ("val/acc1",), "Fine-tuning: held-out top-1", "top-1 in percent", "accuracy.png"),
    ):
        curves = [(job, key, job.curve(key)) for job in done if job.stage == stage for key in keys]
        lines = [(f"seed {job.seed} {key}", points, seeds.index(job.seed)) for job, key, points in curves if points]
        if lines:
            draw(lines, label, out / name)
            blocks += [f"## {heading}", f"![{heading} over images seen]({name})"]
    if panels := sorted((out / f"seed_{seeds[0]}" / "pretrain" / "reconstructions").glob("*.png")):
        heading = f"Reconstructions: seed {seeds[0]}, step {int(panels[-1].stem.removeprefix('step_'))}"
        blocks += [f"## {heading}", f"![{heading}]({panels[-1].relative_to(out).as_posix()})"]
    commands = "\n".join(["## Commands\n", "```bash", *(head[0] for head in heads), "```"])
    text = html.escape("\n\n".join(blocks), quote=False) + f"\n\n{commands}\n"
    atomic_write_text(out / "report.md", printable_lines(text))


def draw(lines: Sequence[tuple[str, Points, int]], label: str, path: Path) -> None:
    """Save curves over images seen as a PNG; each curve is a name, points and the number of a colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points, colour in lines:
        style = "-" if "train/" in name and len(points) > 1 else "o-"  # a line of one point would not be seen
        axes.plot(*zip(*points, strict=True), style, color=f"C{colour}", ms=3, label=name)
    axes.set_xlabel("images seen")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)


def figure_rows(plan: Plan, seeds: Sequence[int], finished: dict[tuple[str, int], dict[str, float]]) -> list[list[str]]:
    """A header, and a row for each figure of each stage; stages, seeds and columns without any figure are left out."""
    seeds = [seed for seed in seeds if any(key[1] == seed for key in finished)]
    rows = [["stage", "figure", *(f"seed {seed}" for seed in seeds), "mean ± std", "published", "difference"]]
    for stage in plan.stages:
        of_seeds = [finished.get((stage, seed), {}) for seed in seeds]
        names = dict.fromkeys(name for figures in of_seeds for name in figures if not name.startswith("images"))
        for name in names:
            values = [figures.get(name) for figures in of_seeds]
            known, digits = [value for value in values if value is not None], 4 if "loss" in name else 2
            comparable = name.startswith("top-1") and "whitened" not in name
            quoted = [entry for entry in plan.published if entry["stage"] == stage and comparable]
            rows.append(
                [
                    TITLES[stage],
                    name,
                    *("–" if value is None else f"{value:.{digits}f}" for value in values),
                    mean_std(known, digits),
                    "; ".join(f"{entry['value']:g} ({entry['source']})" for entry in quoted),
                    "; ".join(f"{statistics.mean(known) - entry['value']:+.2f}" for entry in quoted),
                ]
            )
    return rows if any(row[-1] for row in rows[1:]) else [row[:-2] for row in rows]


def mean_std(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one seed)" if values else "–"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def summary(figures: dict[str, float]) -> str:
    """The main figures of a stage, for its line on the terminal."""
    texts = {name: f"{value:.4f}" for name, value in figures.items() if "loss" in name}
    texts |= {name: f"{value:.2f} %" for name, value in figures.items() if name.startswith("top-1")}
    return ", ".join(f"{name} {value}" for name, value in texts.items())
