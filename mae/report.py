"""`mae report`: the whole experiment over several seeds, and one page that shows it beside the published figures."""

import base64
import contextlib
import csv
import html
import io
import json
import os
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

from mae import runs, tools
from mae.errors import TrainingFailed, UserError
from mae.training import last_checkpoint

Settings = dict[str, Any]
Block = tuple[str, Any]  # of the page: (kind, content), see `markdown`

# In the order in which they run; the names are those of the commands and of the config's sections.
TITLES = {"pretrain": "pre-training", "knn": "k-NN", "probe": "linear probe", "finetune": "fine-tuning"}
# What a plain pre-training config shares with the later stages.
IDENTITY = ("dataset", "root", "train_dir", "val_dir", "image_size", "in_chans", "mean", "std", "num_workers")
PER_RUN = ("run_dir", "ckpt_path", "seed_everything")  # given to each run; a saved config.yaml has them, too
STOP_SECONDS = 30.0  # that a stopped stage has to end by itself


def run(args: Sequence[str]) -> None:
    parser = runs.ToolParser(prog="mae report", description=__doc__)
    parser.add_argument(
        "--config", type=str, required=True, help="Sections data, pretrain, knn, probe, finetune, published (YAML)."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="One run of every stage for each.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the runs, report.md and report.html.")
    parser.add_argument("--root", type=str | None, default=None, help="Folder of the data: data.root of every stage.")
    parser.add_argument("--stages", type=str, nargs="+", choices=list(TITLES), help="Run only these (default: all).")
    config = parser.parse_args(list(args))
    seeds, out = config.seeds, Path(config.out)
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: wanted are different numbers, 0 or more")
    plan = read_plan(Path(config.config), config.root)
    chosen = config.stages or list(plan.stages)
    if left_out := [stage for stage in chosen if stage not in plan.stages]:
        raise UserError(f"--stages {left_out[0]}: {plan.path} leaves this stage out")
    jobs = [Job(stage, seed, out / f"seed_{seed}", plan.stages[stage]) for seed in seeds for stage in plan.stages]
    check_settings(plan, jobs)
    check_finished(jobs)
    for seed in seeds:
        for job in jobs:
            if job.seed == seed and job.stage in chosen:
                perform(job)
        try:
            write_page(plan, seeds, jobs, out)  # after each seed: a look at a long report need not wait for its end
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    print(f"wrote {out / 'report.md'} and {out / 'report.html'}", flush=True)


# ---- the config ----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    path: Path
    stages: dict[str, Settings]  # those that run, in order, each as a config of its command
    published: list[Settings]  # stage, value (top-1 in percent), source


def read_plan(path: Path, root: str | None = None) -> Plan:
    """Read a report's config, or a plain pre-training config, whose later stages run with their default recipes.

    A stage's settings are, each over the one before: its `config` file, the section `data`, its own section, `root`.
    An absent section is the stage's default recipe; null or false leaves the stage out.

    Raises:
        UserError: Names the file, section or key.
    """
    given = read_yaml(path)
    if not {*TITLES, "published"} & given.keys():
        data = mapping(given.get("data"), path, "data")
        given = {"pretrain": given, "data": {key: data[key] for key in IDENTITY if key in data}}
    known = ("data", *TITLES, "published")
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; the keys of a report are {', '.join(known)}")
    shared = {"data": mapping(given.get("data"), path, "data")}
    stages = {}
    for stage in TITLES:
        section = given.get(stage, {})
        if section is None or section is False:
            continue
        section = dict(mapping(section, path, stage))
        base = {}
        if (name := section.pop("config", None)) is not None:
            beside = path.parent / str(name)
            base = read_yaml(beside if beside.exists() else Path(str(name)))
        settings = merge(merge(base, shared), section)
        if root is not None:
            settings = merge(settings, {"data": {"root": root}})
        stages[stage] = {key: value for key, value in settings.items() if key not in PER_RUN}
    for stage, settings in stages.items():
        if stage != "pretrain" and "pretrain" not in stages and own_encoder(stage, settings) is None:
            key = "encoder" if stage == "knn" else "model.encoder"
            raise UserError(f"{path}: {stage} has no encoder, as pretrain is left out: set {key} in its section")
    return Plan(path, stages, read_published(path, given.get("published") or []))


def read_published(path: Path, entries: Any) -> list[Settings]:
    wanted = "{stage: knn, probe or finetune, value: top-1 in percent, source: text}"
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or entry.keys() != {"stage", "value", "source"}:
            raise UserError(f"{path}: published: {entry!r} is not {wanted}")
        if entry["stage"] not in ("knn", "probe", "finetune") or type(entry["value"]) not in (int, float):
            raise UserError(f"{path}: published: {entry!r} is not {wanted}")
    return list(entries)


def read_yaml(path: Path) -> Settings:
    try:
        return mapping(yaml.safe_load(path.read_text()), path, "the file")
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None


def mapping(value: Any, path: Path, name: str) -> Settings:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {name} holds {value!r}; wanted are settings as `key: value`")
    return value or {}


def merge(base: Settings, over: Settings) -> Settings:
    """Both, nested; where they disagree, `over`."""
    both = dict(base)
    for key, value in over.items():
        old = both.get(key)
        both[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def flat(settings: Settings, prefix: str = "") -> Settings:
    """By keys of the command line: {"data": {"root": "x"}} is {"data.root": "x"}."""
    found: Settings = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def own_encoder(stage: str, settings: Settings) -> Any:
    """What a stage's settings say that it starts from; None: the encoder that this report pre-trains."""
    return flat(settings).get("encoder" if stage == "knn" else "model.encoder")


# ---- the stages ----------------------------------------------------------------------------------------------------


class Job(NamedTuple):
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
    def log(self) -> Path:
        return self.folder / f"{self.stage}.log"

    def arguments(self, config: str) -> list[str]:
        """Of the command `mae`."""
        args = [self.stage, "--config", config]
        if self.stage == "knn":
            args += ["--out", str(self.folder / "knn.json")]
        else:
            args += ["--run_dir", str(self.run_dir), "--seed_everything", str(self.seed), "--ckpt_path", "last"]
        if self.stage != "pretrain" and own_encoder(self.stage, self.settings) is None:
            key = "--encoder" if self.stage == "knn" else "--model.encoder"
            args += [key, str(self.folder / "pretrain")]
        return args

    def results(self) -> dict[str, Path]:
        """The files that a finished stage leaves, by how their figures were found ("" for the usual way)."""
        if self.stage == "knn":
            return {"": self.folder / "knn.json"}
        mode = self.settings.get("mode", "recipe")
        usual = {"": self.run_dir / "results.json"} if mode != "cached" else {}
        cached = {" (cached features)": self.run_dir / "cached" / "results.json"} if mode != "recipe" else {}
        return usual | cached if self.stage == "probe" else {"": self.run_dir / "results.json"}

    def figures(self) -> dict[str, float]:
        """By name; empty if the stage is not finished."""
        if self.stage == "pretrain":
            metrics = self.run_dir / "metrics.csv"
            if not (self.run_dir / "encoder.safetensors").is_file() or not metrics.is_file():
                return {}
            curves = {
                name: curve(metrics, key) for name, key in (("held-out loss", "val/loss"), ("loss", "train/loss"))
            }
            return next(({name: points[-1][1]} for name, points in curves.items() if points), {})
        found: dict[str, float] = {}
        for way, path in self.results().items():
            try:
                figures = json.loads(path.read_text())
            except (OSError, ValueError):  # not there, or cut off while it was written
                return {}
            names = {"top-1": "acc1", "top-5": "acc5", "images": "images"}
            found |= {f"{name}{way}": figures[key] for name, key in names.items() if key in figures}
        return found

    def difference(self) -> str | None:
        """The first setting in which the run in the folder differs from the config, in words."""
        then = flat(read_yaml(self.settings_file)) if self.settings_file.is_file() else {}
        now = flat(self.settings)
        for key in sorted(then.keys() | now.keys()):
            if (key in then) != (key in now) or then.get(key) != now.get(key):
                old, new = (repr(each[key]) if key in each else "not set" for each in (then, now))
                return f"{key} is {new}, but {old} in {self.settings_file}"
        return None


def check_settings(plan: Plan, jobs: Sequence[Job]) -> None:
    """A misspelt key of a late stage is found now, by that stage's own parser, and not after days of pre-training."""
    commands: dict[str, Callable[[Sequence[str]], object]] = {
        "pretrain": runs.PretrainCLI,
        "knn": tools.knn,
        "probe": runs.ProbeCLI,
        "finetune": runs.FinetuneCLI,
    }
    for job in jobs[: len(plan.stages)]:
        args = job.arguments(json.dumps(job.settings))[1:]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                commands[job.stage]([*args, "--print_config"])
        except UserError as error:
            raise UserError(f"{plan.path}, settings of {job.stage}: {error}") from None


def check_finished(jobs: Sequence[Job]) -> None:
    """What is finished belongs to this config and to the encoder of its seed.

    Raises:
        UserError: Names the first setting that differs, or the result whose encoder is gone.
    """
    for job in jobs:
        if job.figures() and (difference := job.difference()):
            others = job.folder if job.stage == "pretrain" else job.run_dir
            if job.stage == "knn":
                others = job.folder / "knn.json"
            raise UserError(f"{difference}, which is finished: give another --out, or delete {others}")
    encoders = {job.seed: job for job in jobs if job.stage == "pretrain"}
    for job in jobs:
        encoder = encoders.get(job.seed, job)
        if encoder is job or own_encoder(job.stage, job.settings) is not None or not job.figures():
            continue
        comes_back = last_checkpoint(encoder.run_dir).is_file() and not encoder.difference()
        if not encoder.figures() and not comes_back:
            raise UserError(f"the encoder that {job.folder} judged is gone: delete {job.folder}, or give another --out")


def perform(job: Job) -> None:
    """Run a stage unless it is finished, in a process of its own; one line on the terminal.

    Raises:
        UserError: The stage ended with the user's mistake.
        TrainingFailed: It ended otherwise than well.
    """
    print(f"seed {job.seed}  {TITLES[job.stage]:<13}", end="", flush=True)
    if done := job.figures():
        print(f"{spoken(done)} (finished before)", flush=True)
        return
    print(f"log: {job.log} ... ", end="", flush=True)
    args = job.arguments(str(job.settings_file))
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        head = f"# mae {shlex.join(args)}\n# {machine()}\n"
        job.settings_file.write_text(head + yaml.safe_dump(job.settings, sort_keys=False))
        start = time.perf_counter()
        with job.log.open("ab") as log:
            log.write(f"$ mae {shlex.join(args)}\n".encode())
            log.flush()
            before = log.tell()
            code = wait(subprocess.Popen([sys.executable, "-m", "mae.cli", *args], stdout=log, stderr=log))
    except OSError as error:
        print(flush=True)
        raise UserError(f"{job.folder} cannot be written: {error.strerror}") from None
    except BaseException:
        print("stopped; the same command goes on from here", flush=True)
        raise
    seconds = time.perf_counter() - start
    if code == 0 and (figures := job.figures()):
        print(f"{spoken(figures)}, {seconds:.0f} s", flush=True)
        return
    print("failed", flush=True)
    said = job.log.read_bytes()[before:].decode(errors="replace").splitlines()
    errors = [line.removeprefix("mae: error: ") for line in said if line.startswith("mae: error: ")]
    reason = errors[-1] if errors else f"it ended with exit code {code}"
    if code == 0:
        reason = "there are no figures: are there held-out images? (val/CLASS/* below data.root, or data.val_dir)"
    text = f"seed {job.seed}, {job.stage}: {reason} (log: {job.log})"
    raise UserError(text) if code in (0, 2) else TrainingFailed(text)


def wait(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a stage, which does not outlive this process's own Ctrl-C or SIGTERM."""
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
    models = [platform.processor() or platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")] or models
    parts = [f"{versions}, Python {platform.python_version()}", f"{models[0]}, {len(os.sched_getaffinity(0))} cores"]
    if shutil.which("nvidia-smi"):  # torch would take memory of the GPU to tell its name
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(asked, capture_output=True, text=True, check=False)
        if gpus.returncode == 0 and gpus.stdout.strip():
            parts.append(", ".join(gpus.stdout.split("\n")[:-1]))
    return "; ".join([*parts, time.strftime("%Y-%m-%d")])


# ---- the page ------------------------------------------------------------------------------------------------------


def write_page(plan: Plan, seeds: Sequence[int], jobs: Sequence[Job], out: Path) -> None:
    """report.md and report.html, of the stages that are finished."""
    finished = {(job.stage, job.seed): figures for job in jobs if (figures := job.figures())}
    done = [job for job in jobs if (job.stage, job.seed) in finished]
    images = sorted({int(figures["images"]) for figures in finished.values() if "images" in figures})
    heads = [[line[2:] for line in job.settings_file.read_text().splitlines()[:2]] for job in done]  # command, machine
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [
        ("title", f"{plan.path.stem}: {', '.join(TITLES[stage] for stage in plan.stages)}"),
        ("text", f"Config {plan.path.name}; seeds {', '.join(map(str, seeds))}. Run on:"),
        ("list", sorted({head[1] for head in heads})),
        ("heading", "Figures"),
        ("table", table(plan, seeds, finished)),
    ]
    if images:
        counted = " or ".join(map(str, images))
        blocks.append(("text", f"Top-1 and top-5 are percentages of {counted} held-out images."))
    blocks.append(("text", "± is the sample standard deviation (n - 1) over the seeds, of which – has not been run."))
    if plan.published:
        blocks.append(
            ("text", "Published figures are quoted, not run here; the difference is our mean less theirs, in points.")
        )
    losses = [(f"seed {job.seed} {key}", curve(job.run_dir / "metrics.csv", key), seeds.index(job.seed))
              for job in done if job.stage == "pretrain" for key in ("train/loss", "val/loss")]  # fmt: skip
    tops = [(f"seed {job.seed}", curve(job.run_dir / "metrics.csv", "val/acc1"), seeds.index(job.seed))
            for job in done if job.stage == "finetune"]  # fmt: skip
    for name, heading, lines, label in (
        ("loss.png", "Pre-training: loss over images seen", losses, "loss on hidden patches"),
        ("accuracy.png", "Fine-tuning: top-1 on held-out images", tops, "top-1 in percent"),
    ):
        if any(points for _, points, _ in lines):
            draw(lines, label, out / name)
            blocks += [("heading", heading), ("image", (out, name, heading))]
    if panels := sorted((out / f"seed_{seeds[0]}" / "pretrain" / "reconstructions").glob("*.png")):
        text = f"Reconstructions of held-out images, seed {seeds[0]}, {panels[-1].stem.replace('_', ' ')}"
        blocks += [("heading", text), ("image", (out, panels[-1].relative_to(out).as_posix(), text))]
    blocks += [("heading", "Commands"), ("code", "\n".join(head[0] for head in heads))]
    (out / "report.md").write_text(markdown(blocks))
    (out / "report.html").write_text(page(blocks))


def table(plan: Plan, seeds: Sequence[int], finished: dict[tuple[str, int], dict[str, float]]) -> list[list[str]]:
    """Header and a row a figure."""
    rows = [["stage", "figure", *(f"seed {s}" for s in seeds), "mean ± std", "published", "difference"]]
    for stage in plan.stages:
        names = {name: 0 for seed in seeds for name in finished.get((stage, seed), {}) if not name.startswith("images")}
        if not names:
            rows.append([TITLES[stage], "not run", *("–" for _ in seeds), "", "", ""])
        for name in names:
            values = [finished.get((stage, seed), {}).get(name) for seed in seeds]
            known, digits = [value for value in values if value is not None], 4 if "loss" in name else 2
            quoted = [entry for entry in plan.published if entry["stage"] == stage and name.startswith("top-1")]
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
    return rows


def mean_std(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean} (one seed)"


def spoken(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.4f}" if "loss" in name else f"{name} {value:.2f} %"
        for name, value in figures.items()
        if not name.startswith(("images", "top-5"))
    )


def curve(metrics: Path, key: str) -> list[tuple[float, float]]:
    """(images seen, value) in each row of metrics.csv that has the value."""
    with metrics.open(newline="") as file:
        return [(float(row["images_seen"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]


def draw(lines: Sequence[tuple[str, list[tuple[float, float]], int]], label: str, path: Path) -> None:
    """Save a PNG with a line each of (name, points, number of its colour); held-out values have dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points, colour in lines:
        if points:
            style = {"linewidth": 0.8, "alpha": 0.6} if "train/" in name else {"marker": "o", "markersize": 3.0}
            axes.plot(*zip(*points, strict=True), color=f"C{colour}", label=name, **style)
    axes.set_xlabel("images seen")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for kind, content in blocks:
        if kind == "table":
            cells = [[cell.replace("|", "\\|") for cell in row] for row in content]
            lines = [f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]
            parts.append("\n".join(lines))
        elif kind == "image":
            _, name, text = content
            parts.append(f"![{text}]({name})")
        elif kind == "list":
            parts.append("\n".join(f"- {item}" for item in content))
        elif kind == "code":
            parts.append(f"```bash\n{content}\n```")
        else:
            parts.append({"title": "# ", "heading": "## ", "text": ""}[kind] + content)
    return "\n\n".join(parts) + "\n"


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.3em .6em;"
    "text-align:left}th{background:#f3f3f3}img{max-width:100%}pre{background:#f3f3f3;padding:1em;overflow-x:auto}"
)


def page(blocks: Sequence[Block]) -> str:
    """One HTML file that needs no other: images are inside."""
    parts = []
    for kind, content in blocks:
        if kind == "table":
            rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in content]
            rows[0] = rows[0].replace("td>", "th>")
            parts.append("<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>")
        elif kind == "image":
            folder, name, text = content
            inside = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(text)}" src="data:image/png;base64,{inside}">')
        elif kind == "list":
            parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in content) + "</ul>")
        else:
            tag = {"title": "h1", "heading": "h2", "text": "p", "code": "pre"}[kind]
            parts.append(f"<{tag}>{html.escape(content)}</{tag}>")
    title = html.escape(str(blocks[0][1]))
    head = f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>'
    return "\n".join([head, *parts, "</html>"]) + "\n"
