"""W&B really runs here, offline or against a small server on this machine; nothing leaves it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from wandb_records import read_records

from mae import tracking
from mae.tracking import WandbSettings, log_panel, wandb_logger, wandb_mode

KEY = "0123456789" * 4
CONFIG = {"model": {"arch": "vit_tiny", "mask_ratio": 0.75}, "seed": 0}


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key, no settings files, no proxy, and a fresh W&B session."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    end()


def end() -> None:
    """End the run and W&B's helper process: until that has gone, the records may not be on disk."""
    wandb.finish()
    wandb.teardown()


class FakeServer(ThreadingHTTPServer):
    """Enough of W&B's API to open an online run; `requests` holds what was asked."""

    status = 200
    never_opens_a_run = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.viewer: Any = {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that gave up


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.server.requests.append(f"{self.path} {self.headers['Authorization']} {query}")
        if "upsertBucket" in query:
            if self.server.never_opens_a_run:
                time.sleep(10)
            project = {"id": "p", "name": "mae", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": "r1", "displayName": "r1", "project": project, "config": "{}"}
            data: dict[str, Any] = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif "createRunFiles" in query:
            data = {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        else:
            data = {"viewer": self.server.viewer}
        body = json.dumps({"data": data}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    server = FakeServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()


def git(*args: str, cwd: Path) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", *identity, *args], cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def offline_run(run_dir: Path) -> Path:
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    return folder


# What an offline run holds


def test_offline_run_holds_everything(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    git("init", "-q", cwd=checkout)
    git("commit", "-q", "--allow-empty", "-m", "first", cwd=checkout)
    monkeypatch.setattr(tracking, "__file__", str(checkout / "tracking.py"))
    Image.new("RGB", (8, 8)).save(tmp_path / "panel.png")
    run_dir = tmp_path / "runs" / "first"

    logger = wandb_logger(run_dir, WandbSettings(), CONFIG)
    assert logger is not None
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 1 / step, "images_seen": 64 * step}, step=step)
    log_panel(logger, "val/panel", tmp_path / "panel.png", "original | masked | reconstruction", step=3)
    logger.finalize("success")
    end()

    folder = offline_run(run_dir)
    out, err = capfd.readouterr()
    assert out.splitlines() == [f"W&B: no API key, recording offline; upload with: wandb sync {folder}"]
    assert err == ""

    (file,) = folder.glob("*.wandb")
    records = list(read_records(file))
    run = next(r.run for r in records if r.HasField("run"))
    assert (run.project, run.display_name) == ("mae", "first")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert git("rev-parse", "HEAD", cwd=checkout) in {run.git.commit} | {r.environment.git.commit for r in records}

    axes = {r.metric.name or r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["*"] == axes.get("train/loss", "images_seen") == "images_seen"  # older versions write the pattern out
    assert axes["images_seen"] == ""

    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    curve = [(row["train/loss"], row["images_seen"], row["trainer/global_step"]) for row in rows if "train/loss" in row]
    assert curve == [(1.0, 64, 1), (1 / 2, 128, 2), (1 / 3, 192, 3)]

    (panel,) = (row for row in rows if "val/panel/filenames" in row)
    assert panel["val/panel/captions"] == ["original | masked | reconstruction"]
    assert (panel["images_seen"], panel["trainer/global_step"]) == (192, 3)
    (media,) = panel["val/panel/filenames"]
    assert (folder / "files" / media).read_bytes() == (tmp_path / "panel.png").read_bytes()
    assert media in {item.path for r in records for item in r.files.files}

    for command in (["sync"], ["beta", "sync"]):  # older versions have the dry run under beta
        wandb_sync = [sys.executable, "-m", "wandb", *command, "--dry-run", str(folder)]
        sync = subprocess.run(wandb_sync, capture_output=True, text=True)
        if sync.returncode == 0:
            break
    assert "Would sync 1 run(s)" in sync.stdout + sync.stderr
    assert file.name in sync.stdout + sync.stderr


def test_no_git_and_name_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    logger = wandb_logger(tmp_path / "run", WandbSettings(mode="offline", name="mine", entity="us"), CONFIG)
    assert logger is not None
    end()
    (file,) = offline_run(tmp_path / "run").glob("*.wandb")
    run = next(r.run for r in read_records(file) if r.HasField("run"))
    assert (run.display_name, run.entity, run.git.commit) == ("mine", "us", "")


def test_second_stage_in_one_process_is_a_run_of_its_own(tmp_path: Path) -> None:
    runs = [wandb_logger(tmp_path / name, WandbSettings(mode="offline"), {}) for name in ("pretrain", "probe")]
    assert len({run.version for run in runs if run is not None}) == 2
    assert offline_run(tmp_path / "pretrain") != offline_run(tmp_path / "probe")


def test_panel_without_logger_does_nothing(tmp_path: Path) -> None:
    log_panel(None, "val/panel", tmp_path / "none.png", "", step=1)


# Where to record


def decide(settings: WandbSettings | None = None) -> tuple[str, str]:
    start = time.monotonic()
    mode, reason = wandb_mode(settings or WandbSettings())
    assert time.monotonic() - start < 10
    return mode, reason


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_no_key_is_offline(mode: Any) -> None:
    assert decide(WandbSettings(mode=mode)) == ("offline", "no API key")


def test_closed_port_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert decide() == ("offline", "http://127.0.0.1:9 is out of reach (ConnectionError)")


def test_server_that_never_answers_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as blackhole:
        url = f"http://127.0.0.1:{blackhole.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        mode, reason = decide()
    assert mode == "offline"
    assert url in reason


def test_name_lookup_that_hangs_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(30))
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 0.5)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert decide() == ("offline", "https://wandb.example does not answer within 0.5 s")


def test_key_in_netrc_under_the_old_name_of_the_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    mode, reason = decide()
    assert mode == "offline"
    assert reason.endswith("is out of reach (ProxyError)")


def test_key_in_netrc_goes_to_its_own_server_only(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert decide() == ("offline", "no API key")
    assert server.requests == []
    netrc.write_text(f"machine 127.0.0.1:{server.server_port}\n  login user\n  password {KEY}\n")
    assert decide() == ("online", f"{server.url} accepts the API key")


@pytest.mark.parametrize(("status", "viewer"), [(401, {"id": "V"}), (403, {"id": "V"}), (200, None)])
def test_refused_key_is_offline(server: FakeServer, status: int, viewer: Any) -> None:
    server.status, server.viewer = status, viewer
    assert decide() == ("offline", f"{server.url} refuses the API key")


def test_broken_server_is_offline(server: FakeServer) -> None:
    server.status = 500
    assert decide() == ("offline", f"{server.url} is out of reach (HTTPError)")


def test_wandb_mode_variable_is_obeyed_without_network(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, mode in [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]:
        monkeypatch.setenv("WANDB_MODE", value)
        assert decide() == (mode, f"WANDB_MODE={value}")
    assert decide(WandbSettings(mode="offline")) == ("offline", "mode=offline")
    assert server.requests == []
    assert decide(WandbSettings(mode="online"))[0] == "online"


def test_wandb_offline_command_is_obeyed(server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert decide() == ("offline", "`wandb offline` was run here")
    assert server.requests == []
    assert capfd.readouterr() == ("", "")


# Starting, failing, ending


@pytest.mark.parametrize("by_variable", [True, False])
def test_disabled_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    if by_variable:
        monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_logger(tmp_path / "run", WandbSettings(mode="auto" if by_variable else "disabled"), CONFIG) is None
    reason = "WANDB_MODE=disabled" if by_variable else "mode=disabled"
    assert capfd.readouterr() == (f"W&B: {reason}, recording nothing\n", "")
    assert list(tmp_path.iterdir()) == []


def test_online_run_and_loss_of_the_network(
    server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    logger = wandb_logger(tmp_path / "run", WandbSettings(), CONFIG)
    assert logger is not None
    out = capfd.readouterr().out
    assert out == f"W&B: {server.url} accepts the API key, recording at {logger.experiment.url}\n"
    assert any("upsertBucket" in request and "mask_ratio" in request for request in server.requests)

    server.shutdown()
    server.server_close()
    logger.log_metrics({"train/loss": 1.0, "images_seen": 64}, step=1)
    start = time.monotonic()
    logger.finalize("success")
    wandb.finish()
    assert time.monotonic() - start < 8


def test_online_start_that_fails_goes_offline(
    server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.never_opens_a_run = True
    monkeypatch.setattr(tracking, "INIT_SECONDS", 1.0)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 1.0)
    logger = wandb_logger(tmp_path / "run", WandbSettings(), CONFIG)
    assert logger is not None
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("W&B: online failed (")
    assert line.endswith(f"recording offline; upload with: wandb sync {offline_run(tmp_path / 'run')}")


def test_without_wandb_training_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_logger(tmp_path / "run", WandbSettings(), CONFIG) is None
    out, err = capfd.readouterr()
    assert out.startswith("W&B: not recording, ModuleNotFoundError")
    assert (out.count("\n"), err) == (1, "")


def test_death_of_the_helper_process_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = wandb_logger(tmp_path / "run", WandbSettings(mode="offline"), CONFIG)
    assert logger is not None

    def gone(*args: Any, **kwargs: Any) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(logger.experiment, "log", gone)
    capfd.readouterr()
    for step in (7, 8):
        logger.log_metrics({"train/loss": 1.0, "images_seen": 64}, step=step)
    assert capfd.readouterr().out == "W&B: recording stops at step 7, ConnectionResetError: Connection lost\n"


def test_other_ranks_record_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = wandb_logger(tmp_path / "run", WandbSettings(), CONFIG)
    assert logger is not None
    logger.log_metrics({"train/loss": 1.0, "images_seen": 64}, step=1)
    logger.log_hyperparams({"a": 1})
    log_panel(logger, "val/panel", tmp_path / "none.png", "", step=1)
    assert wandb_logger(tmp_path / "run", WandbSettings(mode="disabled"), CONFIG) is None
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


TWO_PROCESSES = """
from pathlib import Path
import lightning as L, torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from mae.tracking import WandbSettings, log_panel, wandb_logger

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        seen = 2.0 * (self.global_step + 1)
        self.log_dict({"train/loss": loss, "images_seen": seen}, on_step=True, on_epoch=True, sync_dist=True)
        log_panel(self.trainer.logger, "panel", Path("panel.png"), "", step=self.global_step)
        return loss

logger = wandb_logger(Path("run"), WandbSettings(), {"a": {"b": 1}})
trainer = L.Trainer(logger=logger, accelerator="cpu", devices=2, strategy="ddp", max_steps=4, log_every_n_steps=1,
                    callbacks=[LearningRateMonitor()], enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model())
"""


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "panel.png")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    env = os.environ | {"PYTHONPATH": str(Path(tracking.__file__).parents[1])}
    done = subprocess.run([sys.executable, "train.py"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("W&B: ") == 1

    (file,) = offline_run(tmp_path / "run").glob("*.wandb")
    rows = [
        {"/".join(item.nested_key): json.loads(item.value_json) for item in r.history.item}
        for r in read_records(file)
        if r.HasField("history")
    ]
    seen = [(row["trainer/global_step"], row["images_seen_step"]) for row in rows if "images_seen_step" in row]
    assert seen == [(0, 2.0), (1, 4.0), (2, 6.0), (3, 8.0)]
    assert sum("panel/filenames" in row for row in rows) == 4
