"""Stop training runs in every way at any moment, go on, and compare the end with an uninterrupted run bit by bit.

    python tests/soak/kill_soak.py --kills 25 --seed 0

`mae pretrain` and `mae finetune` (with mixup, cutmix, random erasing, stochastic depth and a moving average of the
weights) are run as a user would run them, in processes of their own, on a small network and real digits.
For each configuration there is one run that nothing disturbs, and one that is stopped again and again and started
again with the same command. One line a stop; the first promise that is broken ends it with exit code 1:

- SIGTERM, SIGUSR1 and SIGINT save and end with 143, 143 and 130; the run goes on at the very step that it said.
- SIGKILL, of all or of one process, also after SIGSTOP and SIGCONT, leaves nothing running and costs no more than a
  checkpoint interval.
- Every checkpoint in the folder can be read, at any time.
- At the end weights, optimiser, schedule, metrics.csv (but for its speeds) and pictures are those of the other run.

Needs Linux: processes are found in /proc.
"""

import argparse
import contextlib
import csv
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

IMAGES, IMAGES_PER_STEP = 4000, 256  # of the digits, for training; of an optimiser step, about
STEPS_PER_EPOCH = IMAGES // IMAGES_PER_STEP
SAVED_EVERY = 7  # steps; besides at the end of each epoch
ENCODER = [
    *("--model.size=nano", "--model.embed_dim=64", "--model.depth=2", "--model.num_heads=2", "--model.patch_size=7"),
    *("--model.base_lr=0.002", "--model.warmup_epochs=1"),
]
NETWORK = [*ENCODER, "--model.decoder_embed_dim=32", "--model.decoder_depth=1", "--model.decoder_num_heads=2"]
RUN = [
    *("--data.dataset=digits", "--data.crop_scale=[0.5,1]", "--trainer.accelerator=cpu", "--trainer.strategy=auto"),
    *("--trainer.log_every_n_steps=1", f"--checkpoint.every_n_steps={SAVED_EVERY}", "--wandb.mode=disabled"),
    "--ckpt_path=last",
]
OF_STAGE = {
    "pretrain": [
        *NETWORK,
        *("--panels.every_n_epochs=2", "--panels.images=2", "--online.every_n_epochs=3", "--online.train_images=300"),
        "--online.held_out_images=200",
    ],
    "finetune": [*ENCODER, "--model.encoder=scratch", "--model.ema_decay=0.9", "--data.auto_augment=null"],
}
EXPORTS = {"pretrain": ("model.safetensors", "encoder.safetensors"), "finetune": ("model.safetensors", "confusion.csv")}
EXIT_CODE = {"TERM": 143, "USR1": 143, "INT": 130}
WALL_CLOCK = re.compile(r"(_s|seconds|mfu|data_wait|peak_memory_gib)$")  # columns of metrics.csv that no two runs share

PATIENCE = 120.0  # seconds without any news until a run counts as hanging
TO_END = 60.0  # seconds in which the last process of a run must have ended after the first
SAVES_TO_WATCH = 2  # a small file may be written faster than one can look
STEPS_TO_STOP = 3  # the one under way when the signal came, and two in which all processes agree

Moment = Literal["random", "saving", "epoch", "start-up", "twice", "then KILL", "after STOP"]


class Violation(Exception):
    """A promise that was broken."""


@dataclass(frozen=True)
class Case:
    """A configuration: processes, loader workers in each, micro-batches a step, optimiser steps in all; the stage."""

    processes: int
    workers: int
    accumulate: int
    steps: int
    stage: str = "pretrain"

    def __str__(self) -> str:
        return f"{self.stage} {self.processes} x {self.workers} workers x {self.accumulate} accumulated"

    def command(self, folder: Path) -> list[str]:
        batch = IMAGES_PER_STEP // (self.processes * self.accumulate)
        own = {
            "--run_dir": folder,
            "--trainer.devices": self.processes,
            "--trainer.accumulate_grad_batches": self.accumulate,
            "--trainer.max_steps": self.steps,
            "--data.batch_size_per_device": batch,
            "--data.num_workers": self.workers,
        }
        settings = [*OF_STAGE[self.stage], *RUN, *(f"{key}={value}" for key, value in own.items())]
        return [sys.executable, "-m", "mae.cli", self.stage, *settings]


@dataclass(frozen=True)
class Kill:
    """What is sent to whom, and when.

    Args:
        signal: KILL, TERM, USR1 or INT.
        target: `group`, `rank N` or `worker`.
        moment: `random`: in a step. `saving`: while a checkpoint is written. `epoch`: at its end. `start-up`: before
            the first step, as a rule. `twice`: the signal again 50 ms later. `then KILL`: SIGKILL up to 200 ms later.
            `after STOP`: SIGSTOP first, SIGCONT up to a second later, then the signal within 100 ms.
        step: Not before this one.
        chance: In [0, 1), where within the moment.
    """

    signal: str
    target: str
    moment: Moment
    step: int
    chance: float

    def signals(self) -> list[tuple[float, int]]:
        """Seconds to wait and what to send then, one after the other."""
        first = (0.0, signal.Signals[f"SIG{self.signal}"].value)
        if self.moment == "twice":
            return [first, (0.05, first[1])]
        if self.moment == "then KILL":
            return [first, (0.2 * self.chance, signal.SIGKILL.value)]
        if self.moment == "after STOP":
            paused = [(0.0, signal.SIGSTOP.value), (self.chance, signal.SIGCONT.value)]
            return [*paused, (0.1 * self.chance, first[1])]
        return [first]


def plan(case: Case, count: int, signals: Iterator[str], draw: random.Random) -> list[Kill]:
    """`count` stops of a run, in the order of their steps."""
    kills = []
    for step in sorted(draw.randrange(1, int(0.85 * case.steps)) for _ in range(count)):
        name = next(signals)
        moments: dict[Moment, int] = {"random": 4, "saving": 2, "epoch": 2, "start-up": 1}
        moments |= {"twice": 2, "then KILL": 1} if name != "KILL" else {"after STOP": 2}
        (moment,) = draw.choices(list(moments), list(moments.values()))
        targets = ["group", "rank 0"]
        if moment not in ("start-up", "then KILL"):
            targets += [f"rank {rank}" for rank in range(1, case.processes)]
            targets += ["worker"] if name == "KILL" and case.workers else []
        kills.append(Kill(name, draw.choice(targets), moment, step, draw.random()))
    return kills


# ---- a run and its processes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    local_rank: int  # as its launcher said; workers have that of their rank
    command: bytes


class Run:
    """A run in a folder: start it as often as needed, look at it, end it.

    Every process that a start begets is known by a mark in its environment, whoever its parent is by then.
    """

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder, self.metrics = case, folder, folder / "metrics.csv"
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        self.log = self.folder.with_name(f"{self.folder.name}_{self.starts:03d}.log")
        self.before, self.mark, self.began = signature(self.metrics), uuid.uuid4().hex, time.monotonic()
        with self.log.open("wb") as log:
            self.main = subprocess.Popen(
                self.case.command(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "SOAK_MARK": self.mark},
                start_new_session=True,
                preexec_fn=as_in_a_shell,
            )

    def step(self) -> int:
        """The last step in `metrics.csv`; 0 until this start has touched it."""
        if signature(self.metrics) == self.before:
            return 0
        with self.metrics.open("rb") as file:
            file.seek(max(0, self.metrics.stat().st_size - 4096))
            lines = file.read().rpartition(b"\n")[0].splitlines()  # whole lines only
        number = lines[-1].partition(b",")[0] if lines else b""
        return int(number) if number.isdigit() else 0

    def ended(self) -> bool:
        return self.main.poll() is not None

    def processes(self) -> list[Process]:
        """All that still run, of this start."""
        found, mark = [], f"SOAK_MARK={self.mark}".encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes()
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # another's, or gone
                continue
            if mark in environment and state not in "ZX":
                ranks = [int(entry[11:]) for entry in environment if entry.startswith(b"LOCAL_RANK=")]
                found.append(Process(int(folder.name), int(parent), ranks[0] if ranks else 0, command))
        return found

    def pids(self, target: str) -> list[int]:
        """Of `rank N` and `worker` (one of them); none where there is none (yet)."""
        found = {process.pid: process for process in self.processes()}
        main = self.main.pid
        ranks = {0: main} | {p.local_rank: p.pid for p in found.values() if p.parent == main and p.local_rank > 0}
        if target != "worker":
            return [pid for rank, pid in ranks.items() if target == f"rank {rank}"]
        forked = [p.pid for p in found.values() if p.parent in found and p.command == found[p.parent].command]
        return [pid for pid in forked if pid not in ranks.values()][-1:]

    def send(self, number: int, target: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            if target == "group":
                os.killpg(self.main.pid, number)
            for pid in self.pids(target) if target != "group" else ():
                os.kill(pid, number)

    def wait(self, ready: Callable[[], bool], what: str, pause: float = 0.002) -> None:
        """Until then, or until the run ends.

        Raises:
            Violation: Nothing has happened for PATIENCE seconds.
        """
        news, since = None, time.monotonic()
        while not ready() and not self.ended():
            now = time.monotonic()
            seen = (signature(self.metrics), signature(self.log))
            if seen != news:
                news, since = seen, now
            if now - since > PATIENCE:
                self.stacks()
                raise Violation(f"nothing has happened for {PATIENCE:.0f} s, waiting for {what}\n{self.said(80)}")
            time.sleep(pause)

    def wait_for_the_end(self) -> float:
        """Until nothing of the run is left; returns the seconds.

        Raises:
            Violation: It hangs, or processes outlive the main one.
        """
        start = time.monotonic()
        self.wait(lambda: False, "the end", pause=0.02)
        deadline = time.monotonic() + TO_END
        while left := self.processes():
            if time.monotonic() > deadline:
                self.stacks()
                raise Violation(f"{TO_END:.0f} s after the main process {left} still run\n{self.said(80)}")
            time.sleep(0.05)
        return time.monotonic() - start

    def stacks(self) -> None:
        """Every process writes its stacks to the log, and dies."""
        self.send_all(signal.SIGABRT)
        time.sleep(3)

    def sweep(self) -> None:
        """Nothing stays behind, however this script ends."""
        if self.starts:
            self.send_all(signal.SIGKILL)
            self.main.wait()

    def send_all(self, number: int) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def said(self, lines: int | None = None) -> str:
        text = self.log.read_text(errors="replace")
        return text if lines is None else "\n".join(text.splitlines()[-lines:])


def as_in_a_shell() -> None:
    # What a script starts in the background ignores Ctrl-C, and so would we.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes with every write."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


# ---- a stop --------------------------------------------------------------------------------------------------------


def await_moment(run: Run, kill: Kill, start_up: float, resumed_at: int) -> bool:
    """Until the moment of the kill; False if the run has ended before. Arguments as in `strike`."""
    if kill.moment == "start-up":
        due = run.began + kill.chance * start_up
        run.wait(lambda: time.monotonic() >= due, "its start")
        return not run.ended()
    first = max(kill.step, resumed_at + 1)  # rows up to resumed_at may be there before training begins
    run.wait(lambda: run.step() >= first, f"step {first}")
    if kill.moment == "saving":
        folder, last = run.folder / "checkpoints", first + SAVES_TO_WATCH * SAVED_EVERY
        run.wait(
            lambda: any(folder.glob("*.partial")) or run.step() >= last, "a checkpoint that is being written", 0.0003
        )
        time.sleep(0.005 * kill.chance)
    elif kill.moment == "epoch":
        run.wait(lambda: run.step() % STEPS_PER_EPOCH == 0, "the end of an epoch", pause=0.001)
        time.sleep(0.3 * kill.chance)
    else:
        time.sleep(0.1 * kill.chance)
    return not run.ended()


def strike(run: Run, kill: Kill, start_up: float, resumed_at: int) -> int | None:
    """One stop of a running run: send, wait, check, say.

    Args:
        start_up: Seconds from start to first step.
        resumed_at: The step at which this start went on.

    Returns:
        The step at which the next start goes on; None if the run had ended before.

    Raises:
        Violation: A promise was broken.
    """
    if not await_moment(run, kill, start_up, resumed_at):
        if run.main.returncode != 0:
            raise Violation(f"it ended by itself with {run.main.returncode}\n{run.said(60)}")
        return None
    before = run.step()
    for pause, number in kill.signals():
        time.sleep(pause)
        run.send(number, kill.target)
    after = run.step()
    took = run.wait_for_the_end()
    code, kept = run.main.returncode, checkpoint_step(run.folder)
    print(
        f"{run.case} | SIG{kill.signal} to {kill.target} | {kill.moment} | at step {before} | exit code {code} after "
        f"{took:.1f} s | goes on at {kept}",
        flush=True,
    )
    complain = check_stop(run, kill, code, before, after, resumed_at, kept)
    if complain:
        raise Violation(f"{complain}\n{run.said(60)}")
    return kept


def check_stop(run: Run, kill: Kill, code: int, before: int, after: int, resumed_at: int, kept: int) -> str:
    """What is wrong with the way the run has ended; empty if nothing is.

    Args:
        code: Exit code.
        before: The step logged last, before the signal.
        after: The same, after it.
        resumed_at: The step at which this start went on.
        kept: The step at which the next start would go on.
    """
    if code == 0:
        return "" if kept == run.case.steps else f"exit code 0, but the last checkpoint is of step {kept}"
    least = max(resumed_at, kept_at_least(before))
    if kept < least:
        return f"step {before} was logged, but the last checkpoint is of step {kept}; at least {least} was to be kept"
    said = {int(number) for number in re.findall(r"stopped at step (\d+)", run.said())}
    if said and said != {kept}:
        return f"it said to have stopped at step {said}, but the last checkpoint is of step {kept}"
    if kill.moment == "start-up":  # nothing may be there yet to answer a signal
        return ""
    if kill.signal == "KILL":
        died = kill.target in ("group", "rank 0")  # the main process itself; else it is to say that another did
        return "" if code == -signal.SIGKILL or not died else f"exit code {code} of a killed process"
    if kill.moment == "then KILL" and code == -signal.SIGKILL:
        return ""
    if code != EXIT_CODE[kill.signal]:
        return f"exit code {code} instead of {EXIT_CODE[kill.signal]}"
    if not said:
        return "it did not say at which step it has stopped"
    return f"{kept - after} steps after the signal" if kept > after + STEPS_TO_STOP else ""


def kept_at_least(step: int) -> int:
    """The newest checkpoint that must be complete once a step is logged.

    Its own is written after its row, and the one before may be under way until then.
    """
    earlier = [number for number in range(1, step) if number % SAVED_EVERY == 0 or number % STEPS_PER_EPOCH == 0]
    return [0, 0, *earlier][-2]


def checkpoint_step(folder: Path) -> int:
    """Where `--ckpt_path last` goes on; 0 without a checkpoint.

    Raises:
        Violation: A checkpoint cannot be read.
    """
    return max((load(path)["global_step"] for path in folder.glob("checkpoints/*.ckpt")), default=0)


def load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Violation(f"{path} cannot be read: {type(error).__name__}: {error}") from None


# ---- the end -------------------------------------------------------------------------------------------------------


def compare(reference: Path, other: Path, exports: Sequence[str] = EXPORTS["pretrain"]) -> None:
    """The end of an uninterrupted run and of another, with the files that it leaves for others.

    Raises:
        Violation: They differ; the first place is named.
    """
    compare_metrics(reference / "metrics.csv", other / "metrics.csv")
    ends = [load(folder / "checkpoints" / "last.ckpt") for folder in (reference, other)]
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        if place := difference(ends[0][key], ends[1][key], key):
            raise Violation(f"last.ckpt differs from that of the uninterrupted run in {place}")
    for name in exports:
        if (reference / name).read_bytes() != (other / name).read_bytes():
            raise Violation(f"{name} is not the same bytes as that of the uninterrupted run")
    if left := sorted(path.name for path in other.rglob("*.partial")):
        raise Violation(f"unfinished files are left: {left}")
    pictures = [{path.name: path for path in folder.glob("reconstructions/*")} for folder in (reference, other)]
    if pictures[0].keys() != pictures[1].keys():
        raise Violation(f"pictures that only one run has: {sorted(pictures[0].keys() ^ pictures[1].keys())}")
    for name, path in pictures[0].items():
        if path.read_bytes() != pictures[1][name].read_bytes():
            raise Violation(f"reconstructions/{name} differs from that of the uninterrupted run")


def compare_metrics(reference: Path, other: Path) -> None:
    """The rows of two runs, but for their speeds.

    Raises:
        Violation: A row is missing, doubled, out of place or different; it is named.
    """
    wanted, found = read_rows(reference), read_rows(other)
    steps = [row["step"] for row in found]
    for step in (row["step"] for row in wanted):
        if (count := steps.count(step)) != 1:
            raise Violation(f"metrics.csv has {count} rows of step {step}")
    if steps != [row["step"] for row in wanted]:
        raise Violation("metrics.csv has rows that the uninterrupted run has not, or in another order")
    for row, expected in zip(found, wanted, strict=True):
        for key in sorted(expected.keys() | row.keys()):
            if not WALL_CLOCK.search(key) and row.get(key) != expected.get(key):
                raise Violation(
                    f"metrics.csv, step {row['step']}, column {key}: {row.get(key)!r}; uninterrupted: "
                    f"{expected.get(key)!r}"
                )


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def difference(a: Any, b: Any, place: str) -> str:
    """The first place in which two nests of lists, dictionaries and tensors are not the same to the bit; or ''."""
    if type(a) is not type(b):
        return f"{place}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{place}: the keys {sorted(map(str, a.keys() ^ b.keys()))}"
        pairs = [(a[key], b[key], f"{place}[{key!r}]") for key in a]
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{place}: {len(a)} and {len(b)} items"
        pairs = [(*both, f"{place}[{i}]") for i, both in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{place}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        if torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b))):
            return ""
        return f"{place}: by {(a.double() - b.double()).abs().max():g} at most"
    else:
        return "" if a == b else f"{place}: {a} and {b}"
    return next(filter(None, (difference(*pair) for pair in pairs)), "")


# ---- the whole -----------------------------------------------------------------------------------------------------


def undisturbed(case: Case, folder: Path) -> float:
    """The run to compare with; returns the seconds from its start to its first step.

    Raises:
        Violation: It fails, or is not what its metrics should show.
    """
    run = Run(case, folder)
    try:
        run.start()
        run.wait(lambda: run.step() > 0, "the first step")
        start_up = time.monotonic() - run.began
        took = run.wait_for_the_end()
    finally:
        run.sweep()
    if run.main.returncode != 0:
        raise Violation(f"exit code {run.main.returncode} of a run that nothing has disturbed\n{run.said(60)}")
    steps = [int(row["step"]) for row in read_rows(run.metrics)]
    if steps != list(range(1, case.steps + 1)):
        raise Violation(f"metrics.csv of an undisturbed run has the steps {steps}")
    print(f"{case} | undisturbed: {start_up:.1f} s to start, {took:.1f} s for {case.steps} steps", flush=True)
    return start_up


def soak(case: Case, kills: Sequence[Kill], folder: Path) -> int:
    """An undisturbed run and one with these stops; returns how many stops there were.

    Raises:
        Violation: A promise was broken.
    """
    start_up = undisturbed(case, folder / "undisturbed")
    run, done, step = Run(case, folder / "disturbed"), 0, 0
    try:
        for kill in kills:
            run.start()
            if (kept := strike(run, kill, start_up, step)) is None:
                break
            done, step = done + 1, kept
        else:
            run.start()
            run.wait_for_the_end()
            if run.main.returncode != 0:
                raise Violation(f"exit code {run.main.returncode} of the last start\n{run.said(60)}")
        compare(folder / "undisturbed", run.folder, EXPORTS[case.stage])
    finally:
        run.sweep()
    print(f"{case} | {done} stops, {run.starts} starts, the same end to the bit", flush=True)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="stops in all, shared out over the configurations")
    parser.add_argument("--seed", type=int, default=0, help="of moments and targets")
    parser.add_argument("--signals", nargs="+", default=["KILL", "TERM", "USR1"], choices=["KILL", *EXIT_CODE])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="loader processes of each process")
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of a run")
    parser.add_argument("--finetune", action=argparse.BooleanOptionalAction, default=True, help="fine-tuning, too")
    parser.add_argument("--keep", type=Path, help="a new folder for runs and logs (default: kept after a failure only)")
    args = parser.parse_args(argv)
    if args.keep and args.keep.exists():
        parser.error(f"--keep {args.keep} exists; name a new folder")
    # So that what was started is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    draw, signals = random.Random(args.seed), itertools.cycle(args.signals)
    # A different accumulation on the diagonal, so that each value meets both kinds of loading.
    cases = [
        Case(processes, workers, 1 + (i + j + 1) % 2, args.steps)
        for i, processes in enumerate(args.processes)
        for j, workers in enumerate(args.workers)
    ]
    if args.finetune:
        cases += [replace(case, stage="finetune") for case in cases if case.accumulate == 1]
    root = args.keep or Path(tempfile.mkdtemp(prefix="soak_"))
    start, done = time.monotonic(), 0
    for i, case in enumerate(cases):
        folder = root / f"{case.stage}_{case.processes}x{case.workers}x{case.accumulate}"
        folder.mkdir(parents=True, exist_ok=False)
        kills = plan(case, args.kills // len(cases) + (i < args.kills % len(cases)), signals, draw)
        try:
            done += soak(case, kills, folder)
        except Violation as broken:
            print(f"{case} | VIOLATION: {broken}\nruns and logs: {folder}; seed {args.seed}", flush=True)
            return 1
    print(f"{done} stops in {len(cases)} configurations, {time.monotonic() - start:.0f} s: no violation", flush=True)
    if not args.keep:
        shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
