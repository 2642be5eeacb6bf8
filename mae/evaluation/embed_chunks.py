"""What `mae embed` has computed so far, part by part, in a folder beside the file that it will be.

A part is complete or not there, and says what it was computed with: parts of other settings never mix.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae.errors import UserError
from mae.options import out_file
from mae.runtime.environment import is_first_rank
from mae.runtime.storage import sync

SUFFIXES = (".parquet", ".npz")

ABOUT, LOCK, FINAL, FINISHED = "about.json", "lock", "final", "finished.json"  # beside the parts

PARTS = "[0-9]*.safetensors"


def checked_out(path: str, force: bool) -> Path:
    """The file to write, before there is any work for it.

    Raises:
        UserError: It is of neither format, cannot be written, or is there already.
    """
    out = out_file(path)
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: the name says what is written: wanted is {' or '.join(SUFFIXES)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f'--out {out}: Parquet needs the package pyarrow: pip install "vit-mae-lightning[embed]", or give a .npz'
        )
    if is_first_rank() and out.exists() and not force and not (parts_of(out) / FINISHED).exists():
        raise UserError(f"--out {out} is there already: --force true replaces it")
    return out


def parts_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


class FeatureChunk(NamedTuple):
    """Features of some images that follow each other.

    Attributes:
        rows: (n,) int64, the numbers of those that could be read.
        columns: By name (n, D) each.
        bad: Number and reason of the others.
    """

    rows: Tensor
    columns: dict[str, Tensor]
    bad: list[tuple[int, str]]


class FeatureChunks:
    """What is computed so far, and what it is computed with."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about, self.folder = out, about, parts_of(out)
        self.text = json.dumps(about)
        self.size = about["batch_size"] * about["batches_per_part"]
        self.count = -(-about["images"] // self.size)
        self.key = hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()
        layers = about["layers"]
        self.columns = ["features"] if len(layers) == 1 else [f"features_{layer}" for layer in layers]

    @property
    def bad_list(self) -> Path:
        return self.out.with_name(f"{self.out.name}.bad.txt")

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def begin(self, force: bool) -> bool:
        """Make the folder fit for these settings; whether there is anything to do.

        Raises:
            UserError: It holds parts of other settings, and they are not to be thrown away.
        """
        with os_errors_as_user_errors(self.folder):
            for path in self.folder.glob("*.partial"):
                path.unlink()
            if (self.folder / FINISHED).exists():
                if (self.folder / FINAL).exists():  # killed before the file was in its place
                    (self.folder / FINISHED).replace(self.folder / ABOUT)
                else:  # or after that, before all parts were gone
                    same = self.known(FINISHED) == self.about
                    self.clear()
                    if same and not force:
                        print(f"{self.out} is complete: an earlier start has finished it", flush=True)
                        return False
                    checked_out(str(self.out), force)
            known = self.known(ABOUT)
            if known != self.about and any(self.folder.glob(PARTS)):
                keys = [key for key in self.about | known if known.get(key) != self.about.get(key)]
                if not force:
                    differ = "; ".join(f"{key} {known.get(key)}, here {self.about.get(key)}" for key in keys)
                    raise UserError(
                        f"{self.folder} holds parts of an unfinished `mae embed` with other settings ({differ}): the "
                        "same settings again complete it, --force true starts over"
                    )
                self.clear()
            atomic_write_text(self.folder / ABOUT, self.text)
        return True

    def known(self, name: str) -> dict[str, Any]:
        """The settings that the folder is said to be of; none where nothing is said."""
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def missing(self) -> list[int]:
        return [number for number in range(self.count) if not self.holds(number)]

    def batches(self, number: int) -> list[range]:
        """The images of a part."""
        size = self.about["batch_size"]
        first, end = number * self.size, min((number + 1) * self.size, self.about["images"])
        return [range(start, min(start + size, end)) for start in range(first, end, size)]

    def images(self, numbers: list[int]) -> int:
        return sum(len(batch) for number in numbers for batch in self.batches(number))

    def holds(self, number: int) -> bool:
        """Whether a part is there, whole, and of these settings."""
        try:
            with safe_open(self.path(number), "pt") as file:
                return bool((file.metadata() or {}).get("key") == self.key)
        except (FileNotFoundError, SafetensorError):
            return False

    def write(self, number: int, part: FeatureChunk) -> None:
        unfinished = self.folder / f"{number:06d}.{os.getpid()}.partial"
        metadata = {"key": self.key, "bad": json.dumps(part.bad)}
        with os_errors_as_user_errors(unfinished):
            save_file({"rows": part.rows, **part.columns}, unfinished, metadata)
            sync(unfinished)
            unfinished.replace(self.path(number))

    def read(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each part the rows (n,) and one of its tensors."""
        for number in range(self.count):
            with safe_open(self.path(number), "np") as file:
                yield file.get_tensor("rows"), file.get_tensor(name)

    def bad(self) -> list[tuple[int, str]]:
        """Number and reason of the unreadable images in the parts that are there."""
        found: list[tuple[int, str]] = []
        for number in range(self.count):
            if self.holds(number):
                with safe_open(self.path(number), "np") as file:
                    found += json.loads(file.metadata()["bad"])
        return found

    def clear(self) -> None:
        """Remove what this command has written, the sign that it is finished last."""
        for pattern in (PARTS, "*.partial", ABOUT, FINAL, FINISHED):
            for path in self.folder.glob(pattern):
                path.unlink()


@contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """A full disk and the like as one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path} cannot be written: {reason}; what is there is kept for the next start") from None


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """The folder is this process's alone; it is removed in the end if nothing is left in it.

    Raises:
        UserError: Another process has it, or it cannot be made.
    """
    with os_errors_as_user_errors(folder):
        folder.mkdir(exist_ok=True)
        lock = open(folder / LOCK, "a")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it up when this process ends
        except (BlockingIOError, PermissionError):  # systems differ in which of them
            raise UserError(f"another mae embed is writing to {folder}: wait for it, or give another --out") from None
        except OSError:
            pass  # a file system that knows no locks
        if not (folder / LOCK).exists() or os.fstat(lock.fileno()).st_ino != (folder / LOCK).stat().st_ino:
            raise UserError(f"another mae embed has just finished in {folder}")
        try:
            yield
        finally:
            with suppress(OSError):
                if os.listdir(folder) == [LOCK]:
                    (folder / LOCK).unlink()
                    folder.rmdir()


def atomic_write_text(path: Path, text: str) -> None:
    """Whole or not there."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(text)
    sync(unfinished)
    unfinished.replace(path)
