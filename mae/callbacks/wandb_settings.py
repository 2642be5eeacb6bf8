"""Where a run is recorded by Weights & Biases: the settings, and the choice between online and offline."""

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

Mode = Literal["online", "offline", "disabled"]

PROBE_SECONDS = 5.0  # for the server to accept the key before training starts


@dataclass
class WandbSettings:
    """Where the run is recorded. W&B's own variables (WANDB_PROJECT, WANDB_RUN_GROUP, ...) say what is not set here.

    Args:
        mode: "auto" obeys WANDB_MODE, else uploads if the server accepts an API key, and otherwise records on disk for
            a later `wandb sync`. "online" is "auto" without a look at WANDB_MODE. "disabled" writes nothing.
        project: W&B project; else WANDB_PROJECT, else mae.
        entity: W&B user or team; else WANDB_ENTITY, else the account's default.
        name: Name of the run; else WANDB_NAME, else the run folder's name.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    name: str | None = None


def wandb_mode(settings: WandbSettings, environ: Mapping[str, str] = os.environ) -> tuple[Mode, str]:
    """Decide without asking the user, within PROBE_SECONDS of network. Returns the mode and the reason in words."""
    mode, reason = requested_mode(settings, environ)
    if mode in ("offline", "disabled"):
        return mode, reason

    import wandb

    with redirect_stderr(io.StringIO()):  # where it announces the settings files that it reads
        session = wandb.setup().settings
    if mode == "auto" and session.mode in ("offline", "disabled"):
        return session.mode, f"`wandb {session.mode}` was run here"

    base_url = (environ.get("WANDB_BASE_URL") or session.base_url).rstrip("/")
    hosts = [urlsplit(base_url).netloc]
    if base_url == wandb.Settings().base_url:
        hosts.append("api.wandb.ai")  # the former name of the default
    key = environ.get("WANDB_API_KEY") or _netrc_key(hosts, environ) or session.api_key
    if not key:
        return "offline", "no API key"
    if problem := _probe(base_url, key):
        return "offline", problem
    return "online", f"{base_url} accepts the API key"


def requested_mode(settings: WandbSettings, environ: Mapping[str, str]) -> tuple[Any, str]:
    """The mode that the settings or WANDB_MODE ask for, or "auto", and where that stands."""
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
    """Ask the server about the key; returns what is wrong, or None if it accepts the key."""
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

    # The timeout above covers neither a name look-up that hangs nor a reply that trickles in: then the thread is left.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"{base_url} does not answer within {PROBE_SECONDS:g} s"
