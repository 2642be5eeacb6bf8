"""Stop a Slurm job in every way that Slurm has, again and again, and compare its end with an uninterrupted job's.

    python tests/soak/slurm_soak.py --signals 20 --seed 0

Submits scripts/slurm/train_8x8.sbatch, with other numbers of nodes and devices, to a real Slurm of emulated nodes that
tests/local-slurm starts on this machine (Debian or Ubuntu, root), on CPUs over gloo. Rank 1 is slower by half a second
a step, so that signals find the ranks in different places. One line a signal; the first promise that is broken ends it
with exit code 1:

- After each way to stop it the job is in the queue again by itself, and goes on at the step that it has saved; a task
  that was killed costs no more than what came after the last checkpoint.
- Nothing hangs.
- At the end weights, optimiser, schedule and metrics.csv (but for its speeds) are those of the uninterrupted job.
"""

import argparse
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_soak import NETWORK, Violation, compare, read_rows
from lightning.pytorch.callbacks import Callback

ROOT = Path(__file__).parents[2]
SCRIPT = "scripts/slurm/train_8x8.sbatch"
LOCAL_SLURM = ROOT / "tests" / "local-slurm"
NODES = 2
SAVED_EVERY = 5  # steps; besides at the end of each epoch, of 15 steps
RUN = [
    *("--data.dataset=digits", "--data.crop_scale=[0.5,1]", "--data.num_workers=2", "--data.batch_size_per_device=128"),
    *("--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", f"--checkpoint.every_n_steps={SAVED_EVERY}"),
    *("--trainer.callbacks+=slurm_soak.SlowRank", "--panels.every_n_epochs=100", "--panels.images=2"),
]
PATIENCE = 180.0  # seconds without any news until a job counts as hanging
KINDS = ("usr1", "kill", "preemption", "requeue", "node", "term", "limit")


class SlowRank(Callback):
    """Keeps the ranks out of step by SLOW seconds."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(float(os.environ.get("SLOW", "0")))


# ---- a cluster and its jobs ----------------------------------------------------------------------------------------


class NoCluster(Exception):
    """This machine cannot have one, or it did not start."""


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A Slurm of its own on this machine; yields the environment of its commands and jobs.

    Raises:
        NoCluster: With the reason.
    """
    folder = tempfile.mkdtemp(prefix="slurm_", dir="/tmp")  # short: names of sockets begin with it
    own = {"LOCAL_SLURM_DIR": folder, "LOCAL_SLURM_NODES": str(NODES), "LOCAL_SLURM_PORT": str(ports())}
    environ = {**os.environ, **own}
    try:
        up = subprocess.run([LOCAL_SLURM, "up"], env=environ, capture_output=True, text=True, timeout=300, check=False)
        if up.returncode != 0:
            raise NoCluster((up.stderr + up.stdout).strip() or f"local-slurm: exit code {up.returncode}")
        yield {
            **environ,
            "SLURM_CONF": f"{folder}/etc/slurm.conf",
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "tests" / "soak"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            "PYTHONFAULTHANDLER": "1",
        }
    finally:
        subprocess.run(
            [LOCAL_SLURM, "down"],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        shutil.rmtree(folder, ignore_errors=True)


def ports() -> int:
    """The first of a range for Slurm's daemons and srun, below those that the system hands out."""
    for first in random.sample(range(20000, 32000, 500), 24):
        try:
            for port in range(first, first + 10):
                with socket.socket() as tried:
                    tried.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise NoCluster("no free ports between 20000 and 32000")


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port


@dataclass
class Start:
    """What the log says of one of a job's starts."""

    first: int | None  # step
    stopped: int | None  # at which step, as it said


@dataclass
class Job:
    """A job that runs the shipped script, with these settings of `mae pretrain` in `folder / name`."""

    environ: Mapping[str, str]
    folder: Path
    name: str
    settings: Sequence[str]
    options: Sequence[str] = ()
    own_environ: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def submit(self) -> None:
        environ = {**self.environ, "RUNS": str(self.folder), "MASTER_PORT": str(free_port()), **self.own_environ}
        options = [
            *(f"--job-name={self.name}", f"--nodes={NODES}", "--ntasks-per-node=1", "--gpus-per-node=0"),
            *("--cpus-per-task=1", f"--output={self.folder / self.name}.log", "--time=UNLIMITED", *self.options),
        ]
        done = subprocess.run(
            ["sbatch", *options, SCRIPT, "pretrain", *self.settings],
            cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        found = re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)
        if not found:
            raise Violation(f"sbatch: {done.stdout}{done.stderr}")
        self.id = found[1]

    def command(self, *args: str) -> str:
        """Of Slurm's."""
        done = subprocess.run(args, env=self.environ, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            raise Violation(f"{' '.join(args)}: {done.stdout}{done.stderr}")
        return done.stdout

    def state(self) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "-o", self.id)))

    def over(self) -> bool:
        """For good, and all its processes are gone."""
        return self.id not in self.command("squeue", "--noheader", "--format=%A").split()

    def log(self) -> str:
        path = self.folder / f"{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def starts(self) -> list[Start]:
        parts = re.split(r"^run\.sh: .*, start \d+, .*$", self.log(), flags=re.MULTILINE)[1:]
        found = []
        for part in parts:
            steps = [int(number) for number in re.findall(r"^step (\d+)/", part, re.MULTILINE)]
            stops = [int(number) for number in re.findall(r"^stopped at step (\d+)", part, re.MULTILINE)]
            found.append(Start(min(steps, default=None), max(stops, default=None)))
        return found

    def step(self) -> int:
        """The last that this start has taken; 0 before its first."""
        starts = self.starts()
        if not starts or (first := starts[-1].first) is None:
            return 0
        rows = read_rows(path) if (path := self.run / "metrics.csv").exists() else []
        return max(first, *(int(row["step"]) for row in rows[-1:]), 0)

    def kept(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        names = [path.stem for path in self.run.glob("checkpoints/step_*.ckpt")]
        return max((int(name.removeprefix("step_")) for name in names), default=0)

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """
        Raises:
            Violation: Nothing has happened for PATIENCE seconds, or the job is over.
        """
        news, since = None, time.monotonic()
        while not ready():
            state, now = self.state(), time.monotonic()
            seen = (state["JobState"], state.get("Restarts"), len(self.log()), self.step())
            if seen != news:
                news, since = seen, now
            if now - since > PATIENCE:
                raise Violation(f"nothing has happened for {PATIENCE:.0f} s, waiting for {what}\n{self.said()}")
            if self.over() and not ready():
                raise Violation(f"{state['JobState']} while waiting for {what}\n{self.said()}")
            time.sleep(0.3)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait_for_start(self, number: int) -> Start:
        """Until the job has taken a step of its start of this number, counted from 1, or of a later one.

        On a busy machine Slurm may send a start the SIGTERM that was meant for the one before it.
        """
        self.wait(lambda: any(start.first for start in self.starts()[number - 1 :]), f"start {number}")
        return next(start for start in self.starts()[number - 1 :] if start.first)

    def wait_for_the_end(self) -> str:
        """Returns the state it ends in."""
        self.wait(self.over, "the end")
        return self.state()["JobState"]

    def said(self) -> str:
        return "\n".join(self.log().splitlines()[-60:])

    def cancel(self) -> None:
        if self.id and not self.over():
            self.command("scancel", self.id)

    def pid(self, rank: int) -> int:
        """Of the task, on this machine."""
        for folder in Path("/proc").iterdir():
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(environment) and (
                    f"SLURM_CONF={self.environ['SLURM_CONF']}".encode() in environment
                    and Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd"
                    and b"mae.cli" in (folder / "cmdline").read_bytes()
                ):
                    return int(folder.name)
            except OSError:  # not a process, or gone
                continue
        raise Violation(f"job {self.id} has no task of rank {rank}")


# ---- a signal ------------------------------------------------------------------------------------------------------


def strike(job: Job, kind: str, draw: random.Random) -> None:
    """Have a running job stopped."""
    match kind:
        case "usr1":
            job.command("scancel", "--signal=USR1", job.id)
        case "term":
            job.command("scancel", "--signal=TERM", job.id)
        case "kill":
            os.kill(job.pid(draw.randrange(NODES)), signal.SIGKILL)
        case "requeue":
            job.command("scontrol", "requeue", job.id)
        case "node":
            job.command("scontrol", "update", "nodename=node2", "state=down", "reason=soak")
        case "preemption":
            urgent = ("--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null")
            job.command("sbatch", *urgent, "--wrap=sleep 1")
        case "limit":  # in whole minutes; with the signal at 55 s before, Slurm sends it within 30 s
            hours, minutes, seconds = map(int, job.state()["RunTime"].split(":"))
            limit = hours * 60 + minutes + (1 if seconds < 30 else 2)
            job.command("scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}")


def struck(job: Job, kind: str, draw: random.Random) -> None:
    """One signal: send, wait for the next start, check, say.

    Raises:
        Violation: A promise was broken.
    """
    number = len(job.starts())
    kept, step, begin = job.kept(), job.step(), time.monotonic()
    strike(job, kind, draw)
    job.wait(lambda: len(job.starts()) > number, "the next start")
    took = time.monotonic() - begin
    if kind == "limit":
        job.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")
    again, before = job.wait_for_start(number + 1), job.starts()[number - 1]
    said = "did not say" if before.stopped is None else f"stopped at step {before.stopped}"
    print(
        f"{kind:<10} | at step {step} | {said} | running again after {took:.0f} s, with step {again.first} | "
        f"start {len(job.starts())}",
        flush=True,
    )
    assert again.first is not None
    if before.stopped is not None and again.first != before.stopped + 1:
        raise Violation(f"saved at step {before.stopped}, but the next start began with {again.first}\n{job.said()}")
    if again.first <= kept:
        raise Violation(f"step {kept} was saved, but the next start began with {again.first}\n{job.said()}")
    if before.stopped is None and kind not in ("kill", "node"):
        raise Violation(f"it did not say at which step it has stopped\n{job.said()}")


def soak(environ: Mapping[str, str], folder: Path, kinds: Sequence[str], draw: random.Random) -> None:
    """An uninterrupted job and one with these signals, each one to five steps after its start.

    Raises:
        Violation: A promise was broken.
    """
    pauses = [draw.randint(1, 5) for _ in kinds]
    # A signal is heard within three steps, but Slurm looks at limits every half a minute only.
    steps = sum(pauses) + 3 * len(kinds) + 70 * kinds.count("limit") + 2 * SAVED_EVERY
    settings = [*NETWORK, *RUN, f"--trainer.max_steps={steps}"]
    reference = Job(environ, folder, "uninterrupted", settings)
    job = Job(environ, folder, "stopped", settings, ["--signal=USR1@55"], {"SLOW": "0.5"})
    try:
        begin = time.monotonic()
        reference.submit()
        if (state := reference.wait_for_the_end()) != "COMPLETED":
            raise Violation(f"the job that nothing interrupts ends {state}\n{reference.said()}")
        print(f"uninterrupted: {steps} steps in {time.monotonic() - begin:.0f} s", flush=True)
        job.submit()
        for kind, pause in zip(kinds, pauses, strict=True):
            first = job.wait_for_start(len(job.starts()) or 1).first
            assert first is not None
            job.wait_for_step(first + pause - 1)
            struck(job, kind, draw)
        if (state := job.wait_for_the_end()) != "COMPLETED":
            raise Violation(f"it ends {state}\n{job.said()}")
        compare(reference.run, job.run)
    finally:
        for each in (reference, job):
            each.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--signals", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of moments and targets")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="taken in turn")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken down, too
    kinds = [args.kinds[i % len(args.kinds)] for i in range(args.signals)]
    folder, begin = Path(tempfile.mkdtemp(prefix="slurm_soak_")), time.monotonic()
    try:
        with cluster() as environ:
            soak(environ, folder, kinds, random.Random(args.seed))
    except NoCluster as error:
        print(f"no Slurm on this machine: {error}", file=sys.stderr)
        return 2
    except Violation as broken:
        print(f"VIOLATION: {broken}\nruns and logs: {folder}; seed {args.seed}", flush=True)
        return 1
    print(f"{len(kinds)} signals, {time.monotonic() - begin:.0f} s: no violation, the same end to the bit", flush=True)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
