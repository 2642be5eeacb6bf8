"""Requeueing this job in Slurm."""

import os
import re
import subprocess
from collections.abc import Mapping

SECONDS = 30.0  # for the controller to answer


def job_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The id of this job for scontrol; None outside Slurm. In an array, SLURM_JOB_ID may be that of another task."""
    if array := environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def requeue(environ: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Ask Slurm to start this job again, if this is a Slurm job and nobody has cancelled it.

    Returns:
        Whether it will be started again, and a message of how, or why not; empty outside Slurm.
    """
    job = job_id(environ)
    if job is None:
        return False, ""
    try:
        job_state = state(scontrol("show", "job", "-o", job))
        if int(job_state.get("Restarts", 0)) > int(environ.get("SLURM_RESTART_COUNT", 0)):
            return True, f"Slurm has put job {job} back into the queue"
        cancelled = job_state.get("JobState") not in ("RUNNING", "PREEMPTED", "TIMEOUT")
        if cancelled and seconds(job_state.get("RunTime", "")) < seconds(job_state.get("TimeLimit", "")):
            return False, f"job {job} has been cancelled"
        scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        return False, f"Slurm does not requeue job {job}: {' '.join(reason.split())}"
    return True, f"job {job} is back in Slurm's queue"


def scontrol(*args: str) -> str:
    done = subprocess.run(
        ["scontrol", *args], capture_output=True, text=True, timeout=SECONDS, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout


def state(line: str) -> dict[str, str]:
    """The fields of `scontrol show job -o`."""
    return dict(re.findall(r"(\w+)=(\S*)", line))


def seconds(text: str) -> float:
    """Seconds of a duration `days-hours:minutes:seconds`; infinite for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
