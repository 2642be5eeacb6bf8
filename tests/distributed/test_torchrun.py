"""Two agents of torchrun, as on two nodes, of two processes each; one agent is killed, with or without a new one."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DIGITS, SUPPORT, TINY, mae
from run_folders import require_same, rows

from mae.runtime.checkpoint_files import saved, step_file

pytestmark = pytest.mark.slow

TESTS = SUPPORT

# 30 steps of 32 images; held-out images at the end alone.
RUN = [
    *(*DIGITS, *TINY, "--data.batch_size_per_device=8", "--trainer.max_steps=30", "--trainer.log_every_n_steps=1"),
    *("--trainer.strategy=ddp", "--model.base_lr=0.01", "--checkpoint.every_n_steps=7", "--panels.images=2"),
    "--ckpt_path=last",
]
# Of torchrun's defaults, a dead agent is given up after 15 s, and a new round waits 30 s for more than the fewest.
QUICK = "keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=5,join_timeout=300,heartbeat_timeout=30"

# Else the first agent keeps the address of its first round to itself, and a new agent waits for it in vain.
ENVIRON = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def until(reached: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def processes(text: str) -> dict[int, int]:
    """Pid and parent's pid of each process with this in its command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "cmdline").read_bytes():  # empty, where it is a zombie
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


class Cluster:
    """Agents that meet at one port, and what they say."""

    def __init__(self, folder: Path, nodes: str, *settings: str):
        self.folder, self.run_dir, self.hold = folder, folder / "run", folder / "hold"
        self.hold.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "2"),
            *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
            *("--rdzv-id", "x", "--local-addr", "127.0.0.1"),
            *("--rdzv-conf", f"{QUICK},is_host=HOST"),
            *("-m", "mae.cli", "pretrain", *RUN, f"--run_dir={self.run_dir}", *settings),
            *("--trainer.callbacks+=run_callbacks.HoldAt", "--trainer.callbacks.step=10"),
            f"--trainer.callbacks.folder={self.hold}",
        ]
        self.agents: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **ENVIRON}
        # On one machine each of them could be the host of the meeting, which must not be the one that is killed.
        command = [word.replace("is_host=HOST", f"is_host={not self.agents}") for word in self.command]
        with self.log(len(self.agents)).open("wb") as log:
            self.agents.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ))
        return self.agents[-1]

    def log(self, agent: int) -> Path:
        return self.folder / f"agent_{agent}.log"

    def said(self) -> str:
        return "".join(f"== agent {i}\n{self.log(i).read_text()}" for i in range(len(self.agents)))

    def ranks_of(self, agent: subprocess.Popen[bytes]) -> set[int]:
        return {pid for pid, parent in processes(str(self.run_dir)).items() if parent == agent.pid}

    def lose_the_second_agent(self) -> None:
        """Both agents are started; the second is killed at step 10, and its processes end by themselves."""
        first, second = self.start(), self.start()
        until(lambda: len(list(self.hold.glob("rank_*"))) == 4 or not self.running(first, second), "ranks hold")
        assert self.running(first, second), self.said()
        orphans = self.ranks_of(second)
        assert len(orphans) == 2
        second.kill()
        second.wait(60)
        assert orphans <= processes(str(self.run_dir)).keys()
        until(lambda: not orphans & processes(str(self.run_dir)).keys(), "orphans end")
        assert saved(self.run_dir) == [step_file(self.run_dir, 7)]
        (self.hold / "go").touch()

    def running(self, *agents: subprocess.Popen[bytes]) -> bool:
        return all(agent.poll() is None for agent in agents)

    def end(self) -> None:
        for pid in processes(str(self.run_dir)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait(60)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(nodes: str, *settings: str) -> Cluster:
        made.append(Cluster(tmp_path, nodes, *settings))
        return made[0]

    yield make
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By four processes of one node, undisturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    done = mae("pretrain", *RUN, f"--run_dir={run_dir}", "--trainer.devices=4", timeout=500)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_node_that_is_lost_and_comes_back(cluster: Callable[..., Cluster], whole: Path) -> None:
    two = cluster("2", "--trainer.num_nodes=2", "--trainer.devices=2")
    two.lose_the_second_agent()
    two.start()
    for agent in (two.agents[0], two.agents[2]):
        assert agent.wait(400) == 0, two.said()
    assert "the process that started it" in two.log(1).read_text()
    assert "--ckpt_path last goes on from the last checkpoint" in two.log(0).read_text()  # of the ranks that were left
    require_same(two.run_dir, whole)
    assert not processes(str(two.run_dir))


@pytest.mark.soak
def test_a_node_that_is_lost_for_good(cluster: Callable[..., Cluster], whole: Path) -> None:
    # Nodes and devices are torchrun's to tell: they change from one start to the next.
    one = cluster("1:2")
    one.lose_the_second_agent()
    assert one.agents[0].wait(400) == 0, one.said()
    line = "2 devices instead of 4: 8 images a device x 2 accumulated, so that a step has 32 images as before"
    assert one.log(0).read_text().count(line) == 1
    for key in ("train/loss", "lr", "images_seen"):
        found, wanted = ([float(row[key]) for row in rows(run_dir)] for run_dir in (one.run_dir, whole))
        assert len(found) == 30
        assert found == pytest.approx(wanted, rel=1e-5), key
    assert not processes(str(one.run_dir))
