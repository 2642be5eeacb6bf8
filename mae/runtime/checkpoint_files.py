"""A run's checkpoints as files: each is complete or does not exist, and is verified before it is used.

A checkpoint is one file as torch writes it, a zip archive of tensors and plain types, with the SHA-256 of all its bytes
in the comment of the archive: torch reads it like any other, and a truncated or altered file is recognised.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mae.errors import UserError
from mae.runtime.files import atomic_write, clear_partial, sync
from mae.runtime.reading import open_regular
from mae.runtime.run_files import read_text

FORMAT = 1  # raised when older versions of this package could no longer resume from a checkpoint

LAST = "last.ckpt"  # a link to the newest

NEWEST = ".newest"  # in the run folder: the name of the newest checkpoint, to notice where all are gone

SUPERSEDED = ".superseded"

STEP_FILE = re.compile(r"step_(\d+)\.ckpt")

RETRY_SECONDS = 60.0  # failures that follow each other faster have one cause

COMMENT = b"mae sha256 "

SEALED = len(COMMENT) + 64  # bytes of a comment

CHUNK = 1 << 22


def folder_of(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def last_checkpoint(run_dir: str | Path) -> Path:
    """The newest checkpoint of a run, by the name that stays."""
    return folder_of(run_dir) / LAST


def step_file(run_dir: str | Path, step: int) -> Path:
    return folder_of(run_dir) / f"step_{step:07d}.ckpt"


def saved(run_dir: str | Path) -> list[Path]:
    """All checkpoints of a run, the newest first, damaged ones included."""
    folder = folder_of(run_dir)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:  # not to be taken for a run without checkpoints
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    paths = sorted((folder / name for name in names if STEP_FILE.fullmatch(name)), key=step_of, reverse=True)
    last = folder / LAST
    return paths if last.is_symlink() or not last.exists() else [*paths, last]  # a copy whose link became a file


def ever_saved(run_dir: str | Path) -> str | None:
    """The name of the newest checkpoint that there has been; None: there has been none."""
    path = Path(run_dir) / NEWEST
    if not os.path.lexists(path):
        return None
    with contextlib.suppress(UserError):
        if STEP_FILE.fullmatch(name := read_text(path)):
            return name
    return f"unknown, as {path} is damaged"


def step_of(path: Path) -> int:
    match = STEP_FILE.fullmatch(path.name)
    assert match
    return int(match[1])


def seal_of(file: IO[bytes], size: int) -> bytes | None:
    file.seek(max(0, size - SEALED))
    comment = file.read()
    return comment if len(comment) == SEALED and comment.startswith(COMMENT) else None


def is_sealed(path: Path) -> bool:
    """Whether a file ends with our checksum; weights from elsewhere do not."""
    with open_regular(path) as file:
        return seal_of(file, path.stat().st_size) is not None


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint; None if they are those that were written. Reads the whole file."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            if (comment := seal_of(file, size)) is None:
                return "it is torn: its checksum is missing"
            file.seek(0)
            digest, left = hashlib.sha256(), size - SEALED - 2
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
            length = file.read(2)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    digest.update(b"\0\0")  # the comment's length, as it was when the sum was taken
    same = length == SEALED.to_bytes(2, "little") and digest.hexdigest().encode() == comment[len(COMMENT) :]
    return None if same else "its checksum differs"


def all_finite(value: Any) -> Tensor:
    """Whether all numbers in the tensors of a nested value are finite, (): bool, on the device of the tensors."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or not value.numel():
            return torch.tensor(True)
        return torch.linalg.vector_norm(value.detach(), torch.inf).isfinite()  # reads it once, and NaN wins
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    found = [all_finite(part) for part in parts]
    device = next((flag.device for flag in found if flag.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([flag.to(device) for flag in found]).all() if found else torch.tensor(True)


def newest(run_dir: str | Path, than: Path | None = None) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, None if it has none yet; and what is wrong with newer ones.

    Args:
        than: Only of those that are older than this one.

    Raises:
        UserError: There are checkpoints, and all are damaged. Starting over would silently lose the run.
    """
    complaints: list[str] = []
    paths = saved(run_dir)
    for path in (paths := paths[paths.index(than) + 1 :] if than else paths):
        if (wrong := damage(path)) is None:
            return path, complaints
        complaints.append(f"{path} is damaged: {wrong}")
    if paths:
        raise UserError(f"{'; '.join(complaints)}; there is no other checkpoint: another --run_dir starts anew")
    return None, complaints


class Sealing:
    """A file that computes the checksum of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        """Write the checksum as the comment of the archive, in place of the comment's length, 0 so far, at its end."""
        self.file.seek(-2, os.SEEK_END)
        comment = COMMENT + self.digest.hexdigest().encode()
        self.file.write(len(comment).to_bytes(2, "little") + comment)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint under a temporary name, flush it to the disk, and only then give it its name.

    Raises:
        OSError: The disk is full or cannot be written to; nothing of this checkpoint is left then.
    """
    with atomic_write(path) as unfinished, unfinished.open("w+b") as file:
        sealing = Sealing(file)
        try:
            torch.save(checkpoint, sealing)  # type: ignore[arg-type]  # it asks for no more than this
        except RuntimeError as error:  # torch's writer hides what the file has raised
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        sealing.seal()
    sync(path.parent)  # a rename outlives a crash of the machine once its folder is on the disk


def point_last_at(path: Path) -> None:
    with atomic_write(path.with_name(LAST)) as link:
        link.symlink_to(path.name)


def supersede(run_dir: str | Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps than a run goes on from, so that they are not taken for its own."""
    later = [path for path in saved(run_dir) if path.name != LAST and step_of(path) > step]
    for path in later:
        path.rename(path.with_name(path.name + SUPERSEDED))
    if left := [path for path in saved(run_dir) if path.name != LAST]:
        point_last_at(left[0])
    return later


def clear_unfinished(run_dir: str | Path) -> list[Path]:
    """Remove what a killed run was writing; only the process of the run that writes may call it."""
    return [path for folder in (folder_of(run_dir), Path(run_dir)) for path in clear_partial(folder, locked=True)]
