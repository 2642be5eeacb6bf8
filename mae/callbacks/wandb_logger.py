"""Weights & Biases: record the run, as one curve over all restarts, and never stop the training over it."""

import atexit
import io
import os
import queue
import re
import secrets
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mae.callbacks.wandb_file import cut_torn_tail, last_step

Mode = Literal["online", "offline", "disabled"]

T = TypeVar("T")


PROBE_SECONDS = 5.0  # for the server to accept the key before training starts

INIT_SECONDS = 30.0  # for the server to create the run, once it has accepted the key

START_SECONDS = 3 * INIT_SECONDS  # for all of it: the helper process, the server, and offline where that fails

FINISH_SECONDS = 60.0  # for the last uploads; what is left stays on disk and `wandb sync` takes it from there

KILL_SECONDS = 5.0  # for threads to notice that the helper process has been killed

QUEUE = 1000  # rows that may wait for the helper process

PATIENCE_SECONDS = 5.0  # for the first of them to be taken, before the helper process is given up


@dataclass
class WandbSettings:
    """Where the run is recorded.

    Args:
        mode: "auto" obeys WANDB_MODE, else uploads if the server accepts an API key, and otherwise records on disk for
            a later `wandb sync`. "online" is "auto" without a look at WANDB_MODE. "disabled" writes nothing.
        project: W&B project.
        entity: W&B user or team; the account's default if not given.
        name: Name of the run; the run folder's name if not given.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "mae"
    entity: str | None = None
    name: str | None = None


def wandb_mode(settings: WandbSettings, environ: Mapping[str, str] = os.environ) -> tuple[Mode, str]:
    """Decide without asking anybody, and within PROBE_SECONDS of network. Returns the mode and the reason in words."""
    asked, reason = _asked(settings, environ)
    if asked in ("offline", "disabled"):
        return asked, reason

    import wandb

    with redirect_stderr(io.StringIO()):  # it announces the settings files that it reads
        session = wandb.setup().settings
    if asked == "auto" and session.mode in ("offline", "disabled"):
        return session.mode, f"`wandb {session.mode}` was run here"

    base_url = (environ.get("WANDB_BASE_URL") or session.base_url).rstrip("/")
    hosts = [urlsplit(base_url).netloc]
    if base_url == wandb.Settings().base_url:
        hosts.append("api.wandb.ai")  # the default has had another name
    key = environ.get("WANDB_API_KEY") or _netrc_key(hosts, environ) or session.api_key
    if not key:
        return "offline", "no API key"
    if problem := _probe(base_url, key):
        return "offline", problem
    return "online", f"{base_url} accepts the API key"


def _asked(settings: WandbSettings, environ: Mapping[str, str]) -> tuple[Any, str]:
    if settings.mode == "auto" and (mode := environ.get("WANDB_MODE")):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode), f"WANDB_MODE={mode}"
    return settings.mode, f"mode={settings.mode}"


def _netrc_key(hosts: list[str], environ: Mapping[str, str]) -> str | None:
    try:
        entries = netrc(Path(environ.get("NETRC") or "~/.netrc").expanduser())
    except (OSError, NetrcParseError):
        return None
    return next((entry[2] for host in hosts if (entry := entries.authenticators(host))), None)


def _probe(base_url: str, key: str) -> str | None:
    """Say what stands between this key and this server, or None if nothing does."""
    import requests  # wandb depends on it

    answers: list[str | None] = []

    def ask() -> None:
        try:
            query = {"query": "query Viewer { viewer { id } }"}
            # Proxies are taken from the environment.
            reply = requests.post(f"{base_url}/graphql", json=query, auth=("api", key), timeout=PROBE_SECONDS)
            refused = reply.status_code in (401, 403)
            if not refused:
                reply.raise_for_status()
                refused = reply.json()["data"]["viewer"] is None
            answers.append(f"{base_url} refuses the API key" if refused else None)
        except Exception as error:
            answers.append(f"{base_url} is out of reach ({type(error).__name__})")

    # The timeout above covers neither a name look-up that hangs nor a reply that trickles: the thread is left behind.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"{base_url} does not answer within {PROBE_SECONDS:g} s"


class Resumed(NamedTuple):
    """Where a run goes on.

    Args:
        step: Optimiser step of the checkpoint.
        rows: Of metrics.csv, up to and including that step, each with its "step"; text or numbers, "" where nothing was
            measured.
    """

    step: int
    rows: list[dict[str, Any]]


class _Recorder:
    """The one thread that speaks to W&B, so that nobody else ever waits for its helper process without a bound.

    The helper may die or freeze at any moment, and a call that waits for it then waits for ever.
    """

    def __init__(self) -> None:
        self.jobs: queue.Queue[tuple[int, Callable[[], None]] | None] = queue.Queue(QUEUE)
        self.ended = threading.Event()
        self.lost = False
        self.process = os.getpid()  # a fork of it ends nothing
        self.helper: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._work, name="wandb-recorder", daemon=True).start()
        atexit.register(self.finish)

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            step, do = job
            try:
                if not self.lost:
                    do()
            except Exception as error:
                self.lose(step, _one_line(error))
        try:
            import wandb

            # The second takes back W&B's own wait at the interpreter's exit, even where it fails after that.
            for end in (wandb.finish, wandb.teardown):
                with suppress(Exception, SystemExit):
                    end()
            wandb.run = None  # where the end failed it is still there, and would be taken for the next run
        finally:
            self.ended.set()

    def start(self, begin: Callable[[], T], seconds: float) -> T:
        """What `begin` returns, or raises; TimeoutError if it takes longer."""
        answer: Future[T] = Future()

        def do() -> None:
            # Too late where the answer is that it takes too long.
            try:
                found = begin()
            except Exception as error:
                with suppress(InvalidStateError):
                    answer.set_exception(error)
            else:
                with suppress(InvalidStateError):
                    answer.set_result(found)

        self.jobs.put((0, do))
        if not wait([answer], seconds).done:
            answer.set_exception(TimeoutError(f"W&B does not start within {seconds:g} s"))
        self.helper = _helper()
        return answer.result()

    def hand(self, step: int, do: Callable[[], None]) -> None:
        """Have something done for the row of `step`; waits PATIENCE_SECONDS at most, for a frozen helper only once."""
        if self.lost:
            return
        try:
            self.jobs.put((step, do), timeout=PATIENCE_SECONDS)
        except queue.Full:
            self.lose(step, f"{QUEUE} rows wait for W&B's helper process")

    def lose(self, step: int, reason: str) -> None:
        if not self.lost:
            self.lost = True  # for good: rows after a gap could not be told from rows without one
            print(f"W&B: recording stops at step {step}, {reason}; a restart sends what is missing", flush=True)

    def finish(self, seconds: float | None = None) -> None:
        """End the run and W&B's helper process, which is killed if it has not ended after `seconds`."""
        global _open
        if os.getpid() != self.process:
            return
        atexit.unregister(self.finish)
        if _open is self:
            _open = None
        deadline = time.monotonic() + (FINISH_SECONDS if seconds is None else seconds)
        if self._end(deadline):
            return
        print("W&B: does not end in time and is left; what is not uploaded is in the run folder", flush=True)
        if self.helper is not None:
            self.helper.kill()  # frozen, it would keep our output's pipe open; and calls that wait for it now fail
        self._end(time.monotonic() + KILL_SECONDS)

    def _end(self, deadline: float) -> bool:
        if self.ended.is_set():
            return True
        try:
            self.jobs.put(None, timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Full:
            return False
        return self.ended.wait(max(deadline - time.monotonic(), 0.01))


_open: _Recorder | None = None  # of this process: W&B has one run at a time


def _helper() -> "subprocess.Popen[bytes] | None":
    """W&B's helper process. There is no public way to it."""
    from wandb.sdk import wandb_setup

    try:
        process = wandb_setup.singleton()._connection._proc._process  # type: ignore[union-attr]
    except AttributeError:
        return None
    return process if isinstance(process, subprocess.Popen) else None


class RunLogger(WandbLogger):
    """Records each optimiser step as one row under its number, in order and once, whatever happened before.

    The newest row is held back until a later one comes, since its figures come in several calls, with a look at the
    held-out images between them. What a stop leaves held back comes again: from metrics.csv, or measured anew.
    """

    def __init__(self, recorder: _Recorder | None = None, recorded: int = -1, **kwargs: Any):
        super().__init__(**kwargs)
        self.recorder, self.recorded = recorder, recorded  # number of the last row that W&B has
        self.held: dict[int, dict[str, Any]] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # log_image comes here too
        if step is None:
            step = max(self.held, default=self.recorded + 1)
        if step > self.recorded:
            self.held.setdefault(step, {}).update(metrics)
            self._hand(sorted(self.held)[:-1])

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Settings are given at the start."""

    def resend(self, rows: list[dict[str, Any]], pictures: dict[int, Path]) -> None:
        """Hand over rows of metrics.csv, and pictures by their step, that W&B does not have; the last is held back."""
        import wandb

        for row in rows:
            if (step := int(row["step"])) > self.recorded:
                measured = {k: _value(v) for k, v in row.items() if k != "step" and v not in ("", None)}
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
        """Hand over the newest row, too: the run has come to its natural end, and nothing more is logged."""
        self._hand(sorted(self.held))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning calls this wherever a run stops, so it completes nothing."""

    @rank_zero_only
    def finish(self, seconds: float | None = None) -> None:
        """End W&B, in FINISH_SECONDS or `seconds` and never much more; it is called at exit where nobody else does."""
        if self.recorder is not None:
            self.recorder.finish(seconds)


def _value(value: Any) -> Any:
    """The number that a text stands for."""
    for kind in (int, float):
        if isinstance(value, str):
            with suppress(ValueError):
                value = kind(value)
    return value


def wandb_logger(
    run_dir: Path, settings: WandbSettings, config: dict[str, Any], resumed: Resumed | None = None
) -> RunLogger | None:
    """Start or continue the W&B run in `run_dir` and print one line that says where it is recorded.

    Only global rank 0 decides, records and prints. The other ranks get a logger that does nothing, so that Lightning
    sees the same loggers everywhere. None means that the run is not recorded: disabled, or W&B failed to start.

    Args:
        resumed: None is a new run.
    """
    global _open
    kwargs: dict[str, Any] = {"project": settings.project, "name": settings.name or run_dir.resolve().name}
    recorder = None
    try:
        if getattr(rank_zero_only, "rank", 0) > 0:
            disabled = _asked(settings, os.environ)[0] == "disabled"
            return None if disabled else RunLogger(save_dir=run_dir, **kwargs)

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else offline runs call home too, and wait at exit
        mode, reason = wandb_mode(settings)
        if mode == "disabled":
            print(f"W&B: {reason}, recording nothing", flush=True)
            return None
        if _open is not None:
            _open.finish()  # of an earlier stage in this process
        run_id = _run_id(run_dir, new=resumed is None)
        earlier = {folder: last_row(folder) for folder in segments(run_dir, run_id)}
        recorder = _open = _Recorder()
        begin = partial(_start, mode, reason, run_dir, id=run_id, entity=settings.entity, config=config, **kwargs)
        run, reason = recorder.start(begin, START_SECONDS)
        # The server knows what it has got; of an offline run, what is on this disk is what will get there.
        recorded = max(earlier.values(), default=-1) if run.offline else run.starting_step - 1
        logger = RunLogger(recorder, recorded, save_dir=run_dir, experiment=run, **kwargs)
        if resumed is not None:
            logger.resend(resumed.rows, _pictures(run_dir, resumed.step))
    except Exception as error:
        if recorder is not None:
            recorder.finish(KILL_SECONDS)
        print(f"W&B: not recording, {_one_line(error)}", flush=True)
        return None

    continued = f", run {run_id} continued from step {resumed.step}" if resumed is not None else ""
    unsent = _to_upload(earlier)
    if run.offline:
        command = _sync_command([*unsent, Path(run.dir).parent], append=resumed is not None)
        print(f"W&B: {reason}, recording offline{continued}; upload with: {command}", flush=True)
    else:
        needless = "; it gets what was recorded offline, too: that needs no upload" if unsent else ""
        print(f"W&B: {reason}, recording at {run.url}{continued}{needless}", flush=True)
    return logger


def _run_id(run_dir: Path, new: bool) -> str:
    """The id under which W&B knows the run; it stays in the run folder, beside what is recorded."""
    path = run_dir / "wandb" / "id"
    if not new and path.is_file() and re.fullmatch("[0-9a-f]+", found := path.read_text().strip()):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)  # without the run folder, W&B records in a temporary one
    run_id = secrets.token_hex(5)
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(run_id)
    unfinished.replace(path)
    return run_id


def segments(run_dir: Path, run_id: str) -> list[Path]:
    """The folders that W&B made for this run, one a start, in the order of time."""
    folders = (run_dir / "wandb").glob(f"*run-*-{run_id}")
    return sorted(folders, key=lambda folder: folder.name.removeprefix("offline-"))


def last_row(segment: Path) -> int:
    """The last step that an ended segment holds on this disk, made whole if torn; -1 if none, or if unreadable."""
    last = -1
    for path in segment.glob("*.wandb"):
        with suppress(OSError, ValueError):
            cut_torn_tail(path)
            last = max(last, last_step(path))
    return last


def _pictures(run_dir: Path, last: int) -> dict[int, Path]:
    found = {int(path.stem[5:]): path for path in (run_dir / "reconstructions").glob("step_[0-9]*.png")}
    return {step: path for step, path in sorted(found.items()) if step <= last}


def _to_upload(earlier: dict[Path, int]) -> list[Path]:
    """Offline segments with rows that the server may lack: an online one sends again what was recorded before it."""
    found: list[Path] = []
    for folder, last in earlier.items():
        if not folder.name.startswith("offline-"):
            found = []
        elif last >= 0 and not list(folder.glob("*.wandb.synced")):
            found.append(folder)
    return found


def _replaces() -> bool:
    """Whether this W&B is one whose `wandb sync` replaces what an earlier segment has sent, unless told otherwise."""
    return find_spec("wandb.sync") is not None


def _sync_command(folders: list[Path], append: bool) -> str:
    return shlex.join(["wandb", "sync", *(["--append"] if append and _replaces() else []), *map(str, folders)])


def _start(mode: Mode, reason: str, dir: Path, **kwargs: Any) -> tuple[Any, str]:
    """`wandb.init`, offline if online fails. Returns the run and the reason for its mode."""
    import wandb

    wandb.finish()  # a run that is still open would be continued
    before = set(segments(dir, kwargs["id"]))
    settings = wandb.Settings(
        silent=mode == "offline",
        init_timeout=INIT_SECONDS,
        finish_timeout=0.8 * FINISH_SECONDS,  # some is left for the helper process to end
        git_root=str(Path(__file__).parent),  # the commit of this code, wherever the run folder or the shell is
    )
    # Of an offline run, newer versions keep it for `wandb sync`; older ones warn that they do not.
    resume: Literal["allow"] | None = None if mode == "offline" and _replaces() else "allow"
    try:
        run = wandb.init(dir=str(dir), mode=mode, resume=resume, settings=settings, **kwargs)
    except Exception as error:
        if mode == "offline":
            raise
        # The helper process would keep the run's id to itself, and the folder would pass for an upload.
        if (helper := _helper()) is not None:
            helper.kill()
        with suppress(Exception, SystemExit):
            wandb.teardown()
        for folder in set(segments(dir, kwargs["id"])) - before:
            shutil.rmtree(folder, ignore_errors=True)
        return _start("offline", f"online failed ({_one_line(error)})", dir, **kwargs)
    # Against images, curves of different batch sizes compare. Rows that lack the number get the last one logged.
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen", step_sync=True)
    return run, reason


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def log_panel(logger: WandbLogger | None, key: str, png: Path, caption: str, step: int) -> None:
    """Log a PNG file at optimiser step `step`; nothing happens without a logger or on ranks other than 0."""
    if logger is not None:
        logger.log_image(key, [str(png)], step=step, caption=[caption])
