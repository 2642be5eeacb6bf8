"""Weights & Biases: record the run where that can be done, and never stop the training over it."""

import io
import os
import threading
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

Mode = Literal["online", "offline", "disabled"]

PROBE_SECONDS = 5.0  # for the server to accept the key before training starts
INIT_SECONDS = 30.0  # for the server to create the run, once it has accepted the key
FINISH_SECONDS = 60.0  # for the last uploads; what is left stays on disk and `wandb sync` takes it from there


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


class _RunLogger(WandbLogger):
    """Records until W&B's helper process dies or the disk is full, then says so once; the training goes on."""

    lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # log_image comes here too
        if self.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except OSError as error:
            self.lost = True
            print(f"W&B: recording stops at step {step}, {_one_line(error)}", flush=True)


def wandb_logger(run_dir: Path, settings: WandbSettings, config: dict[str, Any]) -> WandbLogger | None:
    """Start the W&B run in `run_dir` and print one line that says where it is recorded.

    Only global rank 0 decides, records and prints. The other ranks get a logger that does nothing, so that Lightning
    sees the same loggers everywhere. None means that the run is not recorded: disabled, or W&B failed to start.
    """
    kwargs: dict[str, Any] = {"project": settings.project, "name": settings.name or run_dir.resolve().name}
    try:
        if getattr(rank_zero_only, "rank", 0) > 0:
            disabled = _asked(settings, os.environ)[0] == "disabled"
            return None if disabled else _RunLogger(save_dir=run_dir, **kwargs)

        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else offline runs call home too, and wait at exit
        mode, reason = wandb_mode(settings)
        if mode == "disabled":
            print(f"W&B: {reason}, recording nothing", flush=True)
            return None
        run, reason = _start(mode, reason, dir=run_dir, entity=settings.entity, config=config, **kwargs)
        # Against images, curves of different batch sizes compare. Rows that lack the number get the last one logged.
        run.define_metric("images_seen")
        run.define_metric("*", step_metric="images_seen", step_sync=True)
        logger = _RunLogger(save_dir=run_dir, experiment=run, **kwargs)
    except Exception as error:
        print(f"W&B: not recording, {_one_line(error)}", flush=True)
        return None

    if run.offline:
        print(f"W&B: {reason}, recording offline; upload with: wandb sync {Path(run.dir).parent}", flush=True)
    else:
        print(f"W&B: {reason}, recording at {run.url}", flush=True)
    return logger


def _start(mode: Mode, reason: str, dir: Path, **kwargs: Any) -> tuple[Any, str]:
    """`wandb.init`, offline if online fails. Returns the run and the reason for its mode."""
    import wandb

    dir.mkdir(parents=True, exist_ok=True)  # else wandb records in the system's temporary folder
    wandb.finish()  # a run that is still open, of an earlier stage, would be continued
    settings = wandb.Settings(
        silent=mode == "offline",
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        git_root=str(Path(__file__).parent),  # the commit of this code, wherever the run folder or the shell is
    )
    try:
        return wandb.init(dir=str(dir), mode=mode, settings=settings, **kwargs), reason
    except Exception as error:
        if mode == "offline":
            raise
        return _start("offline", f"online failed ({_one_line(error)})", dir, **kwargs)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def log_panel(logger: WandbLogger | None, key: str, png: Path, caption: str, step: int) -> None:
    """Log a PNG file at optimiser step `step`; nothing happens without a logger or on ranks other than 0."""
    if logger is not None:
        logger.log_image(key, [str(png)], step=step, caption=[caption])
