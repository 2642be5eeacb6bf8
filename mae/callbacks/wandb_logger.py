"""Weights & Biases: record a run as one curve over all its restarts, without ever stopping the training."""

import atexit
import os
import queue
import re
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from mae.callbacks.wandb_file import cut_torn_tail, last_step
from mae.callbacks.wandb_settings import Mode, WandbSettings, wandb_mode
from mae.runtime.files import atomic_write_text
from mae.runtime.run_files import read_text
from mae.runtime.text import DRAWING_THREAD, printable

T = TypeVar("T")


# Limits in seconds.
INIT_SECONDS = 30.0  # for the server to create the run, once it has accepted the key
START_SECONDS = 3 * INIT_SECONDS  # for the whole start: the helper process, the server, and offline where that fails
FINISH_SECONDS = 60.0  # for the last uploads; what is left stays on disk for `wandb sync`
KILL_SECONDS = 5.0  # for threads to notice that the helper process has been killed

RUN_ID = r"[^/\\#?%:\s]+"  # as W&B takes it

QUEUE = 1000  # rows that may wait for the helper process
PATIENCE_SECONDS = 5.0  # that a full queue is waited for, before the helper process is given up


class _Recorder:
    """The only thread that calls W&B, so that training never waits for W&B's helper process without a limit.

    The helper process may die or freeze at any moment, and a call that waits for it then does not return.
    """

    def __init__(self) -> None:
        self.jobs: queue.Queue[tuple[int, Callable[[], None]] | None] = queue.Queue(QUEUE)
        self.lost = False
        self.process = os.getpid()  # in a fork, `finish` does nothing
        self.helper: subprocess.Popen[bytes] | None = None
        self.thread = threading.Thread(target=self._work, name=DRAWING_THREAD, daemon=True)
        self.thread.start()
        atexit.register(self.finish)

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            step, do = job
            try:
                if not self.lost:
                    do()
            except Exception as error:
                self.lose(step, _one_line(error))
        import wandb

        # The second removes W&B's own exit handler, which waits without a limit, even if it fails after that.
        for end in (wandb.finish, wandb.teardown):
            with suppress(Exception, SystemExit):
                end()
        wandb.run = None  # still set if the end failed, and then it would be taken for the next run

    def start(self, begin: Callable[[], T], seconds: float) -> T:
        """Call `begin` and return its result; TimeoutError if it takes longer than `seconds`."""
        results: queue.Queue[T | Exception] = queue.Queue()

        def do() -> None:
            try:
                results.put(begin())
            except Exception as error:
                results.put(error)

        self.jobs.put((0, do))
        try:
            result = results.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"W&B does not start within {seconds:g} s") from None
        finally:
            self.helper = _helper()
        if isinstance(result, Exception):
            raise result
        return result

    def hand(self, step: int, do: Callable[[], None]) -> None:
        """Queue a call that records the row of `step`; blocks once for PATIENCE_SECONDS if the helper is frozen."""
        if self.lost:
            return
        try:
            self.jobs.put((step, do), timeout=PATIENCE_SECONDS)
        except queue.Full:
            self.lose(step, f"{QUEUE} rows wait for W&B's helper process")

    def lose(self, step: int, reason: str) -> None:
        if not self.lost:
            self.lost = True  # for good: after a gap, the last recorded step would not say which rows are missing
            print(f"W&B: recording stops at step {step}, {reason}; a restart sends what is missing", flush=True)

    def finish(self, seconds: float | None = None) -> None:
        """End the run and W&B's helper process, and kill that if it has not ended after `seconds`."""
        global _open
        if os.getpid() != self.process:
            return
        atexit.unregister(self.finish)
        if _open is self:
            _open = None
        if self._end(FINISH_SECONDS if seconds is None else seconds):
            return
        print("W&B: does not end in time and is left; what is not uploaded is in the run folder", flush=True)
        if self.helper is not None:
            self.helper.kill()  # then calls that wait for it fail; if frozen, it would also keep our stdout open
        self._end(KILL_SECONDS)

    def _end(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with suppress(queue.Full):
            self.jobs.put(None, timeout=seconds)
        self.thread.join(max(deadline - time.monotonic(), 0.01))
        return not self.thread.is_alive()


_open: _Recorder | None = None  # one for each process: W&B has one run at a time


def _helper() -> "subprocess.Popen[bytes] | None":
    """W&B's helper process, for which there is no public API."""
    from wandb.sdk import wandb_setup

    try:
        process = wandb_setup.singleton()._connection._proc._process  # type: ignore[union-attr]
    except AttributeError:
        return None
    return process if isinstance(process, subprocess.Popen) else None


class RunLogger(WandbLogger):
    """Records each optimiser step as one row under its number, in order and once, over all starts of the run.

    The newest row is held back until a later one comes, since its figures come in several calls, before and after a
    validation. A row that is held back when the run stops is sent by the next start, from metrics.csv or measured anew.

    Nothing is recorded, and nothing is on disk, before `start`; nor where W&B is disabled or does not start.

    Args:
        run_dir: The run folder.
        settings: Where to record.

    Attributes:
        recorder: None where nothing is recorded, as on all ranks but the first.
        recorded: Step of the last row that W&B has.
    """

    def __init__(self, run_dir: Path, settings: WandbSettings):
        project = settings.project or os.environ.get("WANDB_PROJECT") or "mae"
        name = settings.name or os.environ.get("WANDB_NAME") or run_dir.resolve().name
        super().__init__(save_dir=run_dir, project=project, name=printable(name))
        self.run_dir, self.settings, self.started = run_dir, settings, False
        self.recorder: _Recorder | None = None
        self.recorded = -1
        self.held: dict[int, dict[str, Any]] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run; None before `start`, for which Lightning would not wait."""
        return self._experiment

    @rank_zero_only
    def start(self, config: dict[str, Any], resumed_at: int | None = None, rows: Sequence[dict[str, Any]] = ()) -> None:
        """Start or continue the W&B run and print one line that says where it is recorded; once.

        Args:
            config: All settings of the run.
            resumed_at: Optimiser step of the checkpoint; None for a new run.
            rows: Rows of metrics.csv up to that step, each with its "step"; values are text or numbers, "" for none.
        """
        global _open
        if self.started:
            return
        self.started = True
        recorder = None
        try:
            # Otherwise offline runs connect to W&B's error tracker, and wait for it at exit.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            mode, reason = wandb_mode(self.settings)
            if mode == "disabled":
                print(f"W&B: {reason}, recording nothing", flush=True)
                return
            if _open is not None:
                _open.finish()  # the run of an earlier stage in this process
            run_id = _run_id(self.run_dir, new=resumed_at is None)
            folder = Path(os.environ.get("WANDB_DIR") or self.run_dir)
            (folder / "wandb").mkdir(parents=True, exist_ok=True)  # or W&B would record in a temporary folder
            earlier = {segment: last_row(segment) for segment in segments(folder, run_id)}
            recorder = _open = _Recorder()
            about = {"project": self._project, "name": self._name, "entity": self.settings.entity}
            resume = "allow" if resumed_at is not None or "WANDB_RESUME" not in os.environ else None
            begin = partial(_start, mode, reason, folder, resume, id=run_id, config=_printable(config), **about)
            run, reason = recorder.start(begin, START_SECONDS)
            # The server knows which rows it has; of an offline run it will get those that are on this disk.
            self.recorded = max(earlier.values(), default=-1) if run.offline else run.starting_step - 1
            self.recorder, self._experiment = recorder, run
            continued = _continued(run_id, resumed_at, self.recorded)
            if resumed_at is not None:
                self.resend(rows, _pictures(self.run_dir, resumed_at))
        except Exception as error:
            if recorder is not None:
                recorder.finish(KILL_SECONDS)
            self.recorder = None
            print(f"W&B: not recording, {_one_line(error)}", flush=True)
            return

        unsent = _to_upload(earlier)
        if run.offline:
            command = _sync_command([*unsent, Path(run.dir).parent], append=resumed_at is not None)
            print(f"W&B: {reason}, recording offline{continued}; upload with: {command}", flush=True)
        else:
            needless = "; it gets what was recorded offline, too: that needs no upload" if unsent else ""
            print(f"W&B: {reason}, recording at {run.url}{continued}{needless}", flush=True)

    @rank_zero_only
    def log_image(self, *args: Any, **kwargs: Any) -> None:
        if self.recorder is not None:
            super().log_image(*args, **kwargs)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # log_image comes here too
        if self.recorder is None:
            return
        if step is None:
            step = max(self.held, default=self.recorded + 1)
        if step > self.recorded:
            self.held.setdefault(step, {}).update(metrics)
            self._hand(sorted(self.held)[:-1])

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Do nothing: the settings are recorded at the start."""

    def resend(self, rows: Sequence[dict[str, Any]], pictures: dict[int, Path]) -> None:
        """Record rows of metrics.csv, and pictures by their step, that W&B does not have; the last is held back."""
        import wandb

        for row in rows:
            if (step := int(row["step"])) > self.recorded:
                measured = {k: _number(v) for k, v in row.items() if k != "step" and v not in ("", None)}
                self.held.setdefault(step, {}).update(measured)
        for step, path in pictures.items():
            if step > self.recorded:
                self.held.setdefault(step, {})["reconstructions"] = [wandb.Image(str(path))]
        self._hand(sorted(self.held)[:-1])

    def _hand(self, steps: list[int]) -> None:
        if self.recorder is None or not steps:
            return
        rows = [(step, self.held.pop(step)) for step in steps]
        run, self.recorded = self._experiment, steps[-1]

        def do() -> None:
            for step, row in rows:
                run.log({**row, "trainer/global_step": step}, step=step, commit=True)  # type: ignore[union-attr]

        self.recorder.hand(steps[0], do)

    @rank_zero_only
    def complete(self) -> None:
        """Record the newest row too: the run has come to its natural end, and nothing more is logged."""
        self._hand(sorted(self.held))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Do nothing: Lightning calls this wherever a run stops, also where it is to go on."""

    @rank_zero_only
    def finish(self, seconds: float | None = None) -> None:
        """End W&B within FINISH_SECONDS or `seconds`; called at exit if it has not been called before."""
        if self.recorder is not None:
            self.recorder.finish(seconds)


def _number(value: Any) -> Any:
    """The number that a text of metrics.csv stands for."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _continued(run_id: str, resumed_at: int | None, recorded: int) -> str:
    """What a start adds to an earlier one, as a part of the line; empty for a new run."""
    if resumed_at is not None:
        other = os.environ.get("WANDB_RUN_ID", run_id) != run_id
        ignored = " (not WANDB_RUN_ID, which is for new runs)" if other else ""
        return f", run {run_id}{ignored} continued from step {resumed_at}"
    return f", run {run_id}, which has rows up to step {recorded} that are not sent again" if recorded >= 0 else ""


def _printable(value: Any) -> Any:
    """Settings whose texts W&B can store."""
    if isinstance(value, dict):
        return {key: _printable(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(_printable, value))
    return printable(value) if isinstance(value, str) else value


def _run_id(run_dir: Path, new: bool) -> str:
    """The id of the run in W&B, which is kept in the run folder: a run that goes on has the one that it had."""
    path = run_dir / "wandb" / "id"
    if not new and path.is_file() and re.fullmatch(RUN_ID, run_id := read_text(path).strip()):
        return run_id
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(5)
    atomic_write_text(path, run_id)
    return run_id


def segments(folder: Path, run_id: str) -> list[Path]:
    """The folders that W&B made below this one for the run, one for each start, in the order of time."""
    name = re.compile(rf"(offline-)?run-\d+_\d+-{re.escape(run_id)}")
    folders = (path for path in (folder / "wandb").glob("*run-*") if name.fullmatch(path.name))
    return sorted(folders, key=lambda folder: folder.name.removeprefix("offline-"))


def last_row(segment: Path) -> int:
    """The last step that an earlier segment holds on this disk, -1 if none; a torn file is repaired."""
    last = -1
    for path in segment.glob("*.wandb"):
        with suppress(OSError, ValueError):
            cut_torn_tail(path)
            last = max(last, last_step(path))
    return last


def _pictures(run_dir: Path, last: int) -> dict[int, Path]:
    """Reconstructions by their step, up to the step `last`."""
    paths = sorted((run_dir / "reconstructions").glob("step_[0-9]*.png"))
    return {step: path for path in paths if (step := int(path.stem.removeprefix("step_"))) <= last}


def _to_upload(earlier: dict[Path, int]) -> list[Path]:
    """Offline segments with rows that the server may lack: an online one sends again what was recorded before it."""
    folders: list[Path] = []
    for folder, last in earlier.items():
        if not folder.name.startswith("offline-"):
            folders = []
        elif last >= 0 and not list(folder.glob("*.wandb.synced")):
            folders.append(folder)
    return folders


def _replaces() -> bool:
    """Whether this version's `wandb sync` replaces what an earlier segment has sent unless it has --append."""
    return find_spec("wandb.sync") is not None


def _sync_command(folders: list[Path], append: bool) -> str:
    return shlex.join(["wandb", "sync", *(["--append"] if append and _replaces() else []), *map(str, folders)])


def _start(mode: Mode, reason: str, dir: Path, resume: str | None, **kwargs: Any) -> tuple[Any, str]:
    """Call `wandb.init`, offline if online fails. Returns the run and the reason for its mode."""
    import wandb

    wandb.finish()  # a run that is still open would be continued
    before = set(segments(dir, kwargs["id"]))
    settings = wandb.Settings(
        silent=mode == "offline",
        init_timeout=INIT_SECONDS,
        finish_timeout=0.8 * FINISH_SECONDS,  # the rest is for the helper process to end
        git_root=str(Path(__file__).parent),  # the commit of this code, not of the working directory
    )
    # For offline runs, newer versions keep `resume` for `wandb sync`; older ones warn that they do not.
    kept: Any = None if mode == "offline" and _replaces() else resume
    try:
        run = wandb.init(dir=str(dir), mode=mode, resume=kept, settings=settings, **kwargs)
    except Exception as error:
        if mode == "offline":
            raise
        # The helper process would keep the run's id occupied, and the folder would look like an online run's.
        if (helper := _helper()) is not None:
            helper.kill()
        with suppress(Exception, SystemExit):
            wandb.teardown()
        for folder in set(segments(dir, kwargs["id"])) - before:
            shutil.rmtree(folder, ignore_errors=True)
        return _start("offline", f"online failed ({_one_line(error)})", dir, resume, **kwargs)
    # Over images seen, curves of different batch sizes compare. Rows that lack the number get the last one logged.
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen", step_sync=True)
    return run, reason


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
