"""Shards as they are written: tar files of a fixed form, in a folder that is complete or taken for unfinished."""

import errno
import fcntl
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType

from mae.data.tar_shards import INDEX, Index, write_index
from mae.errors import UserError
from mae.runtime.storage import sync

ASIDE = ".replaced"  # folder for the shards that are being replaced

MARK = "pack.partial"  # in a folder whose packing has begun and not ended: what lies beside it is ours to remove

_SHARD = re.compile(r"\d{6,}\.tar(\.partial)?")


def member(name: str, size: int) -> tarfile.TarInfo:
    """A file in a tar, without time and owner: the same images make the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def key(index: int) -> str:
    """What the members of a sample are called before their suffix."""
    return f"{index:08d}"


def suffix_of(name: str) -> str:
    """Of an image's member, without the dot."""
    suffix = os.path.splitext(name)[1].lower().removeprefix(".")
    return "jpg" if suffix == "jpeg" else suffix


class ShardWriter:
    """Writes samples into tar files in a folder, each under a temporary name until it is complete.

    Args:
        limit: Bytes that a shard does not exceed, unless one image does.

    Attributes:
        files: Names of the shards so far.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.files: list[str] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, index: int, suffix: str, data: bytes, label: int | None) -> tuple[int, int]:
        """Write one image; returns the number of its shard and where in there its bytes begin."""
        members = [(suffix, data)] + ([] if label is None else [("cls", str(label).encode())])
        needed = sum(tarfile.BLOCKSIZE + padded(len(content)) for _, content in members) + 2 * tarfile.BLOCKSIZE
        if self.tar is not None and padded(self.tar.offset + needed, tarfile.RECORDSIZE) > self.limit:
            self.close()
        if self.tar is None:
            self.files.append(f"{len(self.files):06d}.tar")
        with os_errors_as_user_errors(self.path):
            if self.tar is None:
                self.tar = tarfile.open(self.unfinished, "w", format=tarfile.USTAR_FORMAT)
            offset = self.tar.offset + tarfile.BLOCKSIZE
            for kind, content in members:
                self.tar.addfile(member(f"{key(index)}.{kind}", len(content)), BytesIO(content))
            self.tar.members.clear()  # type: ignore[attr-defined]  # it remembers them all
        return len(self.files) - 1, offset

    @property
    def path(self) -> Path:
        return self.folder / self.files[-1]

    @property
    def unfinished(self) -> Path:
        return self.folder / f"{self.files[-1]}.partial"

    def close(self) -> None:
        """Complete the shard under way, on disk."""
        if self.tar is None:
            return
        with os_errors_as_user_errors(self.path):
            self.tar.close()
            sync(self.unfinished)
            self.unfinished.replace(self.path)
        self.tar = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif self.tar is not None and self.tar.fileobj is not None:
            with suppress(OSError):  # a full disk again
                self.tar.fileobj.close()


def padded(size: int, unit: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // unit) * unit


@contextmanager
def os_errors_as_user_errors(path: Path) -> Iterator[None]:
    """A full disk and the like as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; nothing is packed") from None


def finish(folder: Path, index: Index) -> None:
    """The index last: with it the folder is complete."""
    with os_errors_as_user_errors(folder / INDEX):
        sync(folder)
        write_index(index, folder / INDEX)
        sync(folder)


def written_files(folder: Path) -> list[Path]:
    """Shards and index, finished or not; none where there is no folder.

    Raises:
        OSError: The folder cannot be looked into.
    """
    known = {INDEX, Path(INDEX).with_suffix(".partial").name}
    names = os.listdir(folder) if folder.exists() else []
    return sorted(folder / name for name in names if name in known or _SHARD.fullmatch(name))


def check_free(folder: Path, overwrite: bool) -> None:
    """Whether shards may be written there; those of an interrupted run are no hindrance.

    Raises:
        UserError: It holds shards or an index, and they are not to be overwritten.
    """
    held = written_files(folder)
    if held and not overwrite and not (folder / MARK).exists():
        raise UserError(f"{folder} already holds {held[-1].name}: --overwrite true replaces the shards there")


@contextmanager
def exclusive_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """A folder without shards that only this process writes to. If an error ends that, it is as it was before."""
    interrupted = (folder / MARK).exists()
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        mark = open(folder / MARK, "a")
    with mark:
        try:
            fcntl.lockf(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system gives it up when this process ends
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # not: a file system that knows no locks
                raise UserError(f"another mae pack is writing to {folder}") from None
        if not (folder / MARK).exists() or os.fstat(mark.fileno()).st_ino != (folder / MARK).stat().st_ino:
            raise UserError(f"another mae pack has just finished in {folder}")
        with os_errors_as_user_errors(folder):
            if interrupted and (left := remove(folder)):
                print(f"removed {left} files that an interrupted run left in {folder}", flush=True)
            bring_back(folder)
            if not interrupted:
                check_free(folder, overwrite)
            set_aside(folder)
        try:
            yield
        except BaseException:
            with suppress(OSError):
                remove(folder)
                bring_back(folder)
                (folder / MARK).unlink()
            raise
        with os_errors_as_user_errors(folder):
            shutil.rmtree(folder / ASIDE, ignore_errors=True)
            (folder / MARK).unlink()


def set_aside(folder: Path) -> None:
    """Shards that are to be replaced, the index first: without it they are not taken for complete."""
    for path in reversed(written_files(folder)):
        (folder / ASIDE).mkdir(exist_ok=True)
        path.rename(folder / ASIDE / path.name)


def bring_back(folder: Path) -> None:
    """What was set aside, the index last."""
    if (folder / ASIDE).exists():
        for path in written_files(folder / ASIDE):
            path.rename(folder / path.name)
        (folder / ASIDE).rmdir()


def remove(folder: Path) -> int:
    paths = written_files(folder)
    for path in reversed(paths):  # the index first: without it the folder is not taken for complete
        path.unlink()
    return len(paths)
