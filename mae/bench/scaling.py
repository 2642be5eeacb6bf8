"""`mae bench step --processes`: the training step by 1, 2, ... processes, beside so many times the rate of one."""

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing import parent_process
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae.bench.figures import Figure, alternate, figure, plural, ratio, steps_per_turn, torch_threads
from mae.bench.variants import Setting, Variant
from mae.errors import TrainingFailed, UserError
from mae.runtime import signals
from mae.runtime.device_clock import wait_for
from mae.runtime.machine import available_cores
from mae.runtime.memory import is_out_of_memory, keep_freed_memory

WARM_UP = 2  # steps; the last one says how many fill a turn

PATIENCE = timedelta(minutes=30)  # with processes that compile, or take their turn

Case = tuple[int, bool]  # the number of processes, and whether they exchange gradients

Rates = dict[Case, list[float]]  # images/s in each round


class Job(NamedTuple):
    """What each process has to know; plain values."""

    variant: str
    setting: Setting  # the batch is that of one process and micro-batch
    accumulate: int
    threads: int
    rounds: int
    turn_seconds: float
    counts: list[int]  # sizes of the groups of processes, ascending

    @property
    def cases(self) -> list[Case]:
        return [(count, exchange) for count in self.counts for exchange in (True, False) if exchange or count > 1]

    @property
    def backend(self) -> str:
        return "nccl" if self.setting.device.startswith("cuda") else "gloo"


def process_counts(requested: list[int], device: torch.device, threads: int) -> list[int]:
    """Sizes of the groups, ascending, 1 always among them; by default powers of two, as many as there are devices.

    Raises:
        UserError: There are not enough devices or cores.
    """
    available = torch.cuda.device_count() if device.type == "cuda" else max(1, available_cores() // threads)
    if not requested:
        return [2**i for i in range(available.bit_length())]
    if min(requested) < 1:
        raise UserError(f"--processes {min(requested)}: at least 1")
    if (most := max(requested)) > available:
        if device.type == "cuda":
            raise UserError(f"--processes {most}: torch sees {plural(available, 'GPU')}, and each process needs one")
        raise UserError(
            f"--processes {most}: each needs {plural(threads, 'core')} (--threads {threads}), and this process may use "
            f"{available_cores()}"
        )
    return sorted({1, *requested})


def measure_scaling(job: Job) -> dict[str, Any]:
    """One table: figures by number of processes."""
    return {
        "variant": job.variant,
        "setting": job.setting._asdict(),
        "threads": job.threads,
        "accumulate": job.accumulate,
        "backend": job.backend,
        "processes": scaling_figures(run_processes(job), job.counts),
    }


def run_processes(job: Job) -> Rates:
    """Start the processes of a job and wait for their rates; none of them outlives this function.

    Raises:
        UserError: The memory does not suffice, or the network cannot be built.
        TrainingFailed: A process failed for another reason, or was killed.
    """
    results: Any = mp.get_context("spawn").SimpleQueue()
    outcome: Rates | UserError | None = None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (job, f"file://{folder}/store", results)
        processes = mp.start_processes(
            run_rank, arguments, job.counts[-1], join=False, daemon=True, start_method="spawn"
        )
        assert processes is not None
        try:
            while not processes.join(timeout=0.1):
                # Not only at the end: a process that has more to send than a pipe holds waits until it is read.
                outcome = outcome if results.empty() else results.get()
        except mp.ProcessRaisedException as error:
            reason = str(error).strip().splitlines()[-1]
            raise TrainingFailed(f"process {error.error_index} of the bench failed: {reason}") from None
        except mp.ProcessExitedException as error:
            outcome = outcome if results.empty() else results.get()
            if outcome is None and error.signal_name == "SIGKILL":  # Linux ends processes that take too much memory so
                outcome = out_of_memory_error(job)
            if not isinstance(outcome, UserError):
                raise TrainingFailed(
                    f"process {error.error_index} of the bench ended with exit code {error.exit_code}"
                ) from None
        finally:
            for process in processes.processes:
                process.kill()
            for process in processes.processes:
                process.join()
            signal.signal(signal.SIGTERM, before)
    outcome = outcome if results.empty() else results.get()
    if isinstance(outcome, UserError):
        raise outcome
    assert outcome is not None
    return outcome


def out_of_memory_error(job: Job) -> UserError:
    return UserError(
        f"out of memory at --batch {job.setting.batch} in {plural(job.counts[-1], 'process', 'es')}: take a smaller "
        "one, or fewer --processes"
    )


def scaling_figures(rates: Rates, counts: Sequence[int]) -> dict[int, dict[str, Figure]]:
    """Figures by number of processes.

    Efficiency is the rate over so many times the rate of one process. Without the exchange of gradients it shows what
    is lost to everything else, such as memory bandwidth that processes share.
    """
    one = figure(rates[1, True])
    rows = {}
    for count in counts:
        ideal, rate = figure([count * value for value in one.rounds]), figure(rates[count, True])
        rows[count] = {"images_per_s": rate, "efficiency": ratio(rate, ideal)}
        if count > 1:
            no_sync = figure(rates[count, False])
            rows[count] |= {
                "images_per_s_no_sync": no_sync,
                "efficiency_no_sync": ratio(no_sync, ideal),
                "all_reduce": figure([1 - share for share in ratio(rate, no_sync).rounds]),
            }
    return rows


def print_scaling(table: dict[str, Any]) -> None:
    setting = table["setting"]
    print(
        f"{table['variant']}, {setting['size']}, {setting['image_size']} px, {setting['dtype']}; each process: batch "
        f"{setting['batch']} x {table['accumulate']} a step, {plural(table['threads'], 'thread')}; gradients by "
        f"{table['backend']}"
    )
    print(f"{'processes':<11}{'images/s':<28}{'efficiency':<22}{'without all-reduce':<22}all-reduce, of the step")
    for count, row in table["processes"].items():
        line = f"{count:<11}{row['images_per_s']!s:<28}{row['efficiency']!s:<22}"
        if count > 1:
            cost = row["all_reduce"]
            line += f"{row['efficiency_no_sync']!s:<22}{cost.median:.1%} ({cost.low:.1%} to {cost.high:.1%})"
        print(line.rstrip())
    print(flush=True)


# ---- in each of the processes ----------------------------------------------------------------------------------------


def run_rank(rank: int, job: Job, store: str, results: Any) -> None:
    """The work of one process; the first sends the rates, one that the user can help sends why it stops."""
    signals.die_with_parent()
    parent = parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before the kernel knew what to do then
        sys.exit(1)
    try:
        keep_freed_memory()
        with torch_threads(job.threads):
            rates = Rank(rank, job, store).measure()
        if rank == 0:
            results.put(rates)
        dist.destroy_process_group()
    except UserError as error:
        results.put(error)
        sys.exit(1)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        results.put(out_of_memory_error(job))
        sys.exit(1)


class Rank:
    """One process, and the groups that it belongs to: the group of n consists of the first n processes."""

    def __init__(self, rank: int, job: Job, store: str):
        self.rank, self.job = rank, job
        cuda = job.backend == "nccl"
        self.device = torch.device("cuda", rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        # Turns go by gloo, wherever gradients go: a process that waits then uses neither core nor GPU.
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.counts[-1], timeout=PATIENCE)
        self.variants: dict[int, Variant] = {}
        for count in job.counts:
            group = dist.new_group(list(range(count)), backend=job.backend, timeout=PATIENCE) if count > 1 else None
            if rank < count:
                # Each group has its own network: one cannot be in two instances of DDP.
                variant = self.variants[count] = Variant(job.variant, job.setting._replace(device=str(self.device)))
                if group is not None:
                    variant.module = self.data_parallel(variant.network, group)
        torch.manual_seed(rank)  # other masks than in other processes

    def data_parallel(self, network: nn.Module, group: Any) -> nn.Module:
        """As in training."""
        return DistributedDataParallel(
            network,
            device_ids=[self.rank] if self.device.type == "cuda" else None,
            process_group=group,
            gradient_as_bucket_view=True,
            static_graph=self.job.accumulate == 1,
        )

    def measure(self) -> Rates:
        job, steps = self.job, dict[Case, int]()
        for case in job.cases:
            seconds = [self.turn(case, 1) for _ in range(WARM_UP)]
            number = [steps_per_turn(seconds[-1], job.turn_seconds)]
            dist.broadcast_object_list(number, 0)  # the first process decides
            steps[case] = number[0]
        rates: Rates = {case: [] for case in job.cases}
        for turn in range(job.rounds):
            for case in alternate(job.cases, turn):
                images = case[0] * job.setting.batch * job.accumulate * steps[case]
                rates[case].append(images / self.turn(case, steps[case]))
        return rates

    def turn(self, case: Case, steps: int) -> float:
        """Seconds until all processes of a case have done so many optimiser steps, while the others wait."""
        dist.barrier()
        start = time.perf_counter()
        if variant := self.variants.get(case[0]):
            for _ in range(steps):
                self.backward(variant, case[1])
                variant.update()
            wait_for(self.device)
        dist.barrier()
        return time.perf_counter() - start

    def backward(self, variant: Variant, exchange: bool) -> None:
        """All micro-batches of a step; gradients are exchanged at the last one, or never."""
        module = variant.module
        for micro in range(self.job.accumulate):
            last = micro == self.job.accumulate - 1
            alone = isinstance(module, DistributedDataParallel) and not (exchange and last)
            with module.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                variant.backward()
