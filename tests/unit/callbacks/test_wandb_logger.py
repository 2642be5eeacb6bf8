"""W&B really runs here, offline or against a small server on this machine; nothing leaves it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import ROOT
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from mae.callbacks import wandb_logger as wandb_logger_module
from mae.callbacks import wandb_settings
from mae.callbacks.wandb_file import cut_torn_tail, read_records
from mae.callbacks.wandb_logger import RunLogger
from mae.callbacks.wandb_settings import WandbSettings, wandb_mode

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


def wandb_logger(
    run_dir: Path,
    settings: WandbSettings,
    config: dict[str, Any],
    resumed_at: int | None = None,
    rows: Sequence[dict[str, Any]] = (),
) -> RunLogger | None:
    """A logger that has started; None where it records nothing."""
    logger = RunLogger(run_dir, settings)
    logger.start(config, resumed_at, rows)
    return logger if logger.recorder is not None else None


def end(logger: RunLogger | None = None) -> None:
    """The natural end of a run, or of all: until W&B's helper process has gone, the records may not be on disk."""
    if logger is not None:
        logger.complete()
        logger.finish()
    elif wandb_logger_module._open is not None:
        wandb_logger_module._open.finish()
    wandb.teardown()  # forgets the environment's settings


class FakeServer(ThreadingHTTPServer):
    """Enough of W&B's API for online runs; `requests` holds what was asked, `history` the rows by run and line."""

    status = 200
    never_opens_a_run = False
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.viewer: Any = {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        self.requests: list[str] = []
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that gave up

    def resume_status(self, run_id: str) -> dict[str, Any]:
        if (rows := self.history.get(run_id)) is None:
            return {"model": None}
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "eventsTail": "[]"}
        config = {"seed": {"value": 1}}
        about = {"summaryMetrics": "{}", "config": json.dumps(config), "wandbConfig": json.dumps({"t": 1}), "tags": []}
        return {"model": {"id": "p", "name": "mae", "bucket": {"id": "b", "name": run_id, **counts, **tails, **about}}}

    def receive(self, run_id: str, lines: dict[str, Any]) -> None:
        rows = self.history.setdefault(run_id, [])
        rows[lines["offset"] :] = [json.loads(line) for line in lines["content"]]


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.server.requests.append(f"{self.path} {self.headers['Authorization']} {query}")
        if "upsertBucket" in query:
            if self.server.never_opens_a_run:
                time.sleep(10)
            project = {"id": "p", "name": "mae", "entity": {"id": "e", "name": "me"}}
            name = json.loads(query)["variables"]["name"] or "r1"
            self.server.history.setdefault(name, [])
            bucket = {"id": "b", "name": name, "displayName": "r1", "project": project, "config": "{}"}
            data: dict[str, Any] = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif "RunResumeStatus" in query:
            data = self.server.resume_status(json.loads(query)["variables"]["name"])
        elif self.path.endswith("/file_stream"):
            if history := json.loads(query).get("files", {}).get("wandb-history.jsonl"):
                self.server.receive(self.path.split("/")[-2], history)
            data = {}
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
    monkeypatch.setattr(wandb_logger_module, "__file__", str(checkout / "tracking.py"))
    Image.new("RGB", (8, 8)).save(tmp_path / "panel.png")
    run_dir = tmp_path / "runs" / "first"

    logger = wandb_logger(run_dir, WandbSettings(), CONFIG)
    assert logger is not None
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 1 / step, "images_seen": 64 * step}, step=step)
    logger.log_image("val/panel", [str(tmp_path / "panel.png")], 3, caption=["original | masked | reconstruction"])
    logger.finalize("success")
    end(logger)

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
    monkeypatch.setattr(wandb_logger_module, "__file__", str(tmp_path / "tracking.py"))
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


# W&B's own variables


def offline_record(folder: Path) -> Any:
    end()
    (file,) = offline_run(folder).glob("*.wandb")
    return next(r.run for r in read_records(file) if r.HasField("run"))


VARIABLES = {
    **{"WANDB_PROJECT": "theirs", "WANDB_NAME": "called", "WANDB_RUN_GROUP": "seeds", "WANDB_ENTITY": "team"},
    **{"WANDB_TAGS": "a,b", "WANDB_NOTES": "a note", "WANDB_JOB_TYPE": "train", "WANDB_RUN_ID": "My-run_1"},
}


def test_variables_hold_unless_the_option_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    wandb_logger(tmp_path / "run", WandbSettings(mode="offline"), CONFIG)
    run = offline_record(tmp_path / "elsewhere")
    assert (run.project, run.display_name, run.run_group, run.entity) == ("theirs", "called", "seeds", "team")
    assert (list(run.tags), run.notes, run.job_type, run.run_id) == (["a", "b"], "a note", "train", "My-run_1")
    assert [path.name for path in (tmp_path / "run" / "wandb").iterdir()] == ["id"]

    monkeypatch.delenv("WANDB_DIR")
    wandb_logger(tmp_path / "own", WandbSettings("offline", project="p", entity="e", name="n"), CONFIG)
    run = offline_record(tmp_path / "own")
    assert (run.project, run.display_name, run.run_group, run.entity) == ("p", "n", "seeds", "e")


@pytest.mark.slow
def test_a_resumed_run_keeps_its_id_whatever_the_variables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "My-run_1")
    first = wandb_logger(tmp_path, WandbSettings(mode="offline"), CONFIG)
    assert first is not None
    log(first, range(1, 4))
    end(first)
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    monkeypatch.setenv("WANDB_RESUME", "never")
    new_second()
    second = wandb_logger(tmp_path, WandbSettings(mode="offline"), CONFIG, 2, csv_rows(1, 2))
    assert second is not None
    assert second.version == "My-run_1"
    assert "run My-run_1 (not WANDB_RUN_ID, which is for new runs) continued from step 2" in capfd.readouterr().out


@pytest.mark.slow
def test_a_new_run_under_a_used_id_says_which_rows_are_not_sent(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.history["used"] = [{"_step": step} for step in range(5)]
    monkeypatch.setenv("WANDB_RUN_ID", "used")
    logger = wandb_logger(tmp_path, WandbSettings(), CONFIG)
    assert logger is not None
    assert ", run used, which has rows up to step 4 that are not sent again" in capfd.readouterr().out
    end(logger)


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


@pytest.mark.slow
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
    monkeypatch.setattr(wandb_settings, "PROBE_SECONDS", 0.5)
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


# Going on with a run


def log(logger: RunLogger, steps: range) -> None:
    for step in steps:
        logger.log_metrics({"train/loss": 1 / step, "images_seen": 64 * step}, step=step)


def csv_rows(*steps: int) -> list[dict[str, Any]]:
    """As metrics.csv holds them."""
    return [
        {"step": str(step), "train/loss": str(1 / step), "images_seen": str(64 * step), "val": ""} for step in steps
    ]


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The history rows of all segments, in the order of time."""
    files = sorted((run_dir / "wandb").glob("*run-*/*.wandb"), key=lambda file: file.parent.name)
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
        for file in files
        for r in read_records(file)
        if r.HasField("history")
    ]


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    assert all(row["_step"] == row["trainer/global_step"] for row in rows)
    return [row["_step"] for row in rows]


def begin(run_dir: Path, resumed_at: int | None = None, rows: Sequence[dict[str, Any]] = ()) -> RunLogger:
    logger = wandb_logger(run_dir, WandbSettings(), CONFIG, resumed_at, rows)
    assert logger is not None
    return logger


def new_second() -> None:
    """Segments are named by it."""
    time.sleep(1.1)


def test_a_row_is_recorded_when_a_later_step_comes_or_the_run_is_complete(tmp_path: Path) -> None:
    logger = begin(tmp_path)
    logger.log_metrics({"train/loss": 2.0, "images_seen": 64}, step=1)
    logger.log_metrics({"train/loss": 1.0, "images_seen": 128}, step=2)
    logger.log_metrics({"val/loss": 3.0, "images_seen": 128}, step=2)
    logger.finalize("success")
    logger.finish()
    (row,) = read_rows(tmp_path)
    assert (row["trainer/global_step"], row["train/loss"]) == (1, 2.0)
    new_second()
    logger = begin(tmp_path, 2, [{"step": 2, "train/loss": 1.0, "val/loss": "", "images_seen": 128}])
    logger.log_metrics({"val/loss": 3.0, "images_seen": 128}, step=2)
    end(logger)
    rows = read_rows(tmp_path)
    assert steps_of(rows) == [1, 2]
    assert (rows[1]["train/loss"], rows[1]["val/loss"], rows[1]["images_seen"]) == (1.0, 3.0, 128)


def test_replayed_rows_are_not_recorded_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = begin(tmp_path)
    log(logger, range(1, 6))  # 1 to 4 are recorded
    logger.finish()
    new_second()
    capfd.readouterr()
    logger = begin(tmp_path, 2, csv_rows(1, 2))
    run_id = logger.version
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [folder.name.split("-")[-1] for folder in folders] == [run_id, run_id]
    option = " --append" if find_spec("wandb.sync") else ""
    said = f"continued from step 2; upload with: wandb sync{option} {folders[0]} {folders[1]}"
    assert capfd.readouterr().out == f"W&B: no API key, recording offline, run {run_id} {said}\n"
    log(logger, range(3, 9))
    end(logger)
    assert steps_of(read_rows(tmp_path)) == list(range(1, 9))


def test_lost_rows_are_recorded_from_metrics_csv_with_their_pictures(tmp_path: Path) -> None:
    logger = begin(tmp_path)
    log(logger, range(1, 4))
    logger.finish()
    (tmp_path / "reconstructions").mkdir()
    for step in (2, 4, 5, 9):  # recorded; of a row; of no row; of a step that comes again
        Image.new("RGB", (8, 8), (step, 0, 0)).save(tmp_path / "reconstructions" / f"step_{step:07d}.png")
    new_second()
    logger = begin(tmp_path, 6, csv_rows(1, 2, 3, 4, 6))
    log(logger, range(7, 9))
    end(logger)
    rows = read_rows(tmp_path)
    assert steps_of(rows) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["_step"] for row in rows if "reconstructions/filenames" in row] == [4, 5]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1 / step for step in (1, 2, 3, 4, 6, 7, 8)]
    assert not any("val" in row for row in rows)
    (media,) = rows[3]["reconstructions/filenames"]
    assert any((folder / "files" / media).exists() for folder in (tmp_path / "wandb").glob("offline-run-*"))


def test_new_run_in_a_used_folder_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        logger = begin(tmp_path)
        log(logger, range(1, 4))
        ids.append(logger.version)
        end(logger)
    assert len(set(ids)) == 2
    assert steps_of(read_rows(tmp_path)) == [1, 2, 3, 1, 2, 3]


def test_torn_file_ends_where_it_is_torn(tmp_path: Path) -> None:
    logger = begin(tmp_path)
    log(logger, range(1, 2001))
    end(logger)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    raw = file.read_bytes()
    assert len(raw) > 3 * 32 * 1024
    last = None
    for cut in (0, 3, 7, 10, 2 * 32 * 1024 - 3, 2 * 32 * 1024, 2 * 32 * 1024 + 5, len(raw) - 1):
        file.write_bytes(raw[:cut])
        steps = steps_of(read_rows(tmp_path))
        cut_torn_tail(file)
        assert steps_of(read_rows(tmp_path)) == steps
        assert file.stat().st_size <= cut
        assert steps == list(range(1, len(steps) + 1))
        assert last is None or len(steps) >= last
        last = len(steps)
    assert last > 1900
    file.write_bytes(b"not of W&B")
    with pytest.raises(ValueError, match=r"not a \.wandb file"):
        list(read_records(file))


def test_online_run_is_continued(server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = begin(tmp_path)
    log(logger, range(1, 6))
    logger.finish()
    run_id = logger.version
    assert run_id is not None
    assert steps_of(server.history[run_id]) == [1, 2, 3, 4]
    del server.history[run_id][3:]  # and an upload was lost
    capfd.readouterr()
    new_second()
    logger = begin(tmp_path, 4, csv_rows(1, 2, 3, 4))
    assert f", run {run_id} continued from step 4\n" in capfd.readouterr().out
    log(logger, range(5, 8))
    end(logger)
    assert list(server.history) == [run_id]
    assert steps_of(server.history[run_id]) == [1, 2, 3, 4, 5, 6, 7]


def test_offline_then_online_sends_all(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        logger = begin(tmp_path)
        log(logger, range(1, 6))
        logger.finish()
    new_second()
    wandb.teardown()
    logger = begin(tmp_path, 3, csv_rows(1, 2, 3))
    assert "it gets what was recorded offline, too" in capfd.readouterr().out
    log(logger, range(4, 8))
    end(logger)
    assert logger.version is not None
    assert steps_of(server.history[logger.version]) == [1, 2, 3, 4, 5, 6, 7]


SEGMENT = """
import sys, time
from pathlib import Path
from mae.callbacks.wandb_logger import RunLogger, WandbSettings

def row(step):
    return {"train/loss": 1 / step, "images_seen": 64 * step, "padding": "x" * 300}

first, last, end = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rows = [{"step": s, **row(s)} for s in range(1, first + 1)]
logger = RunLogger(Path("run"), WandbSettings())
logger.start({}, first or None, rows)
for step in range(first + 1, last + 1):
    logger.log_metrics(row(step), step=step)
print("logged", flush=True)
if end == "kill":
    time.sleep(120)
if end == "complete":
    logger.complete()
    logger.finish()
"""


def helpers(pid: int) -> list[int]:
    """W&B's helper processes of a process."""
    found = subprocess.run(["pgrep", "-P", str(pid), "wandb-core"], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def newest(run_dir: Path) -> Path:
    return max((run_dir / "wandb").glob("offline-run-*"))


def segment(first: int, last: int, end: str) -> None:
    """Log steps after `first` in a process of its own; "kill" kills it and W&B's helper, with rows on disk and not."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SEGMENT, str(first), str(last), end]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            said = ""
            while "logged" not in said:
                said = process.stdout.readline()
                assert said
            if end == "kill":
                (file,) = newest(Path("run")).glob("*.wandb")
                while file.stat().st_size < 40_000:  # it is written in blocks of 32 KB
                    assert process.poll() is None
                    time.sleep(0.05)
                for helper in helpers(process.pid):
                    os.kill(helper, signal.SIGKILL)
            else:
                assert process.wait(200) == 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_three_kills_leave_one_curve(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("WANDB_API_KEY")
        segment(0, 400, "kill")
        recorded = steps_of(read_rows(tmp_path / "run"))
        assert recorded  # usually not all: some were not on disk yet
        segment(390, 700, "kill")  # more than was recorded
        assert len(steps_of(read_rows(tmp_path / "run"))) > len(recorded)
        segment(100, 1000, "kill")  # less than was recorded
        segment(900, 1100, "complete")
    rows = read_rows(tmp_path / "run")
    assert steps_of(rows) == list(range(1, 1101))
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(1, 1101)]
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    (run_id,) = {folder.name.split("-")[-1] for folder in folders}

    command = shlex.split(wandb_logger_module._sync_command(folders, append=True))
    subprocess.run([sys.executable, "-m", *command], capture_output=True, timeout=120, check=True)
    assert steps_of(server.history[run_id]) == list(range(1, 1101))


AFTER_A_SIGNAL = """
import os, signal, subprocess, sys
from pathlib import Path
from mae.callbacks import wandb_logger as tracking
from mae.callbacks.wandb_logger import RunLogger, WandbSettings

tracking.FINISH_SECONDS, tracking.PATIENCE_SECONDS, tracking.QUEUE = 3.0, 1.0, 100
logger = RunLogger(Path("run"), WandbSettings())
logger.start({})
logger.log_metrics({"a": 1.0}, step=0)
found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout
os.kill(int(found), int(sys.argv[1]))
for step in range(1, 5000):
    logger.log_metrics({"a": 1.0, "padding": "x" * 100}, step=step)
print("trained", flush=True)
if sys.argv[2] == "finish":
    logger.complete()
    logger.finish()
    second = RunLogger(Path("second"), WandbSettings())
    second.start({})
    second.log_metrics({"a": 1.0}, step=3)
    second.complete()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "end"),
    [
        (signal.SIGKILL, "finish"),
        (signal.SIGSTOP, "exit"),
        pytest.param(signal.SIGKILL, "exit", marks=pytest.mark.soak),
        pytest.param(signal.SIGSTOP, "finish", marks=pytest.mark.soak),
    ],
)
def test_dead_or_frozen_helper_process_stops_neither_training_nor_exit(
    tmp_path: Path, number: signal.Signals, end: str
) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AFTER_A_SIGNAL, str(int(number)), end]
    # A helper process that is left over keeps the pipe open: the time runs out then, too.
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0
    assert set(done.stderr.splitlines()) <= {"wandb: ERROR Problem finishing run"}
    assert "trained" in done.stdout
    assert done.stdout.count("W&B: recording stops at step ") == 1
    assert done.stdout.count("W&B: does not end in time") == (number == signal.SIGSTOP)
    assert steps_of(read_rows(tmp_path / "second")) == ([3] if end == "finish" else [])


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
    monkeypatch.setattr(wandb_logger_module, "FINISH_SECONDS", 1.0)
    logger = wandb_logger(tmp_path / "run", WandbSettings(), CONFIG)
    assert logger is not None
    out = capfd.readouterr().out
    assert out == f"W&B: {server.url} accepts the API key, recording at {logger.experiment.url}\n"
    assert any("upsertBucket" in request and "mask_ratio" in request for request in server.requests)

    server.shutdown()
    server.server_close()
    logger.log_metrics({"train/loss": 1.0, "images_seen": 64}, step=1)
    start = time.monotonic()
    end(logger)
    assert time.monotonic() - start < 8


def test_online_start_that_fails_goes_offline(
    server: FakeServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.never_opens_a_run = True
    monkeypatch.setattr(wandb_logger_module, "INIT_SECONDS", 1.0)
    monkeypatch.setattr(wandb_logger_module, "FINISH_SECONDS", 1.0)
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
    for step in (7, 8, 9):
        logger.log_metrics({"train/loss": 1.0, "images_seen": 64}, step=step)
    end(logger)
    line = "W&B: recording stops at step 7, ConnectionResetError: Connection lost; a restart sends what is missing\n"
    assert capfd.readouterr().out == line


def test_start_that_takes_too_long_is_given_up(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(wandb_logger_module, "START_SECONDS", 0.2)
    monkeypatch.setattr(wandb_logger_module, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(wandb_logger_module, "_start", lambda *args, **kwargs: release.wait(30))
    assert wandb_logger(tmp_path / "run", WandbSettings(mode="offline"), CONFIG) is None
    release.set()
    assert "W&B: not recording, TimeoutError: W&B does not start within 0.2 s\n" in capfd.readouterr().out


def test_other_ranks_record_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RunLogger(tmp_path / "run", WandbSettings())
    logger.start(CONFIG)
    logger.log_metrics({"train/loss": 1.0, "images_seen": 64}, step=1)
    logger.log_hyperparams({"a": 1})
    logger.log_image("val/panel", [str(tmp_path / "none.png")], 1)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


TWO_PROCESSES = """
from pathlib import Path
import lightning as L, torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from mae.callbacks.wandb_logger import RunLogger, WandbSettings

class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        seen = 2.0 * (self.global_step + 1)
        self.log_dict({"train/loss": loss, "images_seen": seen}, on_step=True, on_epoch=True, sync_dist=True)
        self.trainer.logger.log_image("panel", ["panel.png"], self.global_step)
        return loss

logger = RunLogger(Path("run"), WandbSettings())
logger.start({"a": {"b": 1}})
trainer = L.Trainer(logger=logger, accelerator="cpu", devices=2, strategy="ddp", max_steps=4, log_every_n_steps=1,
                    callbacks=[LearningRateMonitor()], enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model())
logger.complete()
logger.finish()
"""


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "panel.png")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
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
