"""Memory: how much a process has taken at most, how it is kept, and the error where it does not suffice."""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

import torch

GIB = 2**30

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def reset_peak(device: torch.device) -> None:
    """`peak` counts from here. On CPUs Linux alone can, and only if this process may write its own /proc entry."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: on CUDA of its tensors, at most; on CPUs of this process in physical memory, at most (0: not told)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def resident() -> int:
    """Bytes of physical memory that this process has now (0: the system does not tell)."""
    return status("VmRSS")


def status(key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return 1024 * int(line.split()[1])
    return 0


def keep_freed_memory() -> None:
    """Memory that tensors on the CPU have left is used again by the next ones, instead of going back to the system.

    By default glibc gives large pieces back at once, and a training step gets all of them anew, page by page, each
    filled with zeros: 7 to 8 % of the step on one core. Does nothing where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# Of torch, C++, CUDA's and the CPU's libraries; those of oneDNN do not say why, and hardly ever have another reason.
NO_MEMORY = (
    *("can't allocate memory", "out of memory", "std::bad_alloc", "Cannot allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"),
    *("could not create a memory object", "could not execute a primitive"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, Python or the system tells that a device or this machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and (
        any(words in text for words in NO_MEMORY) or text.strip() == "could not create a primitive"
    )


def shared_memory_message(error: BaseException) -> str:
    """What to do about an error in shared memory."""
    try:
        status = os.statvfs("/dev/shm")
        room = "{:.1f} of {:.1f} MiB are free".format(
            *(n * status.f_frsize / 2**20 for n in (status.f_bavail, status.f_blocks))
        )
    except OSError as missing:
        room = str(missing.strerror)
    reason = str(error).strip().splitlines()[-1]
    return (
        f"loader processes cannot hand over their batches in /dev/shm ({room}): give it more room, as by "
        f"`docker run --shm-size 8g`, or do without loader processes by num_workers 0 ({reason})"
    )
