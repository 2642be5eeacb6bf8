"""Writing shards: tar files of a fixed form, in a folder that is either complete or marked as unfinished."""

import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from types import TracebackType

from mae.data.tar_shards import INDEX, Index, write_index
from mae.errors import UserError
from mae.runtime.files import atomic_write, clear_partial, exclusive_lock, open_own_file, os_errors_as_user_errors, sync

ASIDE = ".replaced"  # folder for the shards that are being replaced

MARK = "pack.partial"  # exists while a folder is being packed; the shards beside it may be removed

one_line_errors = partial(os_errors_as_user_errors, hint="nothing is packed")

_SHARD = re.compile(r"\d{6,}\.tar")


def member(name: str, size: int) -> tarfile.TarInfo:
    """A file in a tar, without time and owner, so that the same images make the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def key(index: int) -> str:
    """The name that all members of a sample share, before their suffix."""
    return f"{index:08d}"


def image_suffix(name: str) -> str:
    """Suffix of an image's member, without the dot."""
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
        self.shard = ExitStack()  # closes and names the current one

    def add(self, index: int, suffix: str, data: bytes, label: int | None) -> tuple[int, int]:
        """Write one image; returns the number of its shard and the offset of its bytes in there."""
        members = [(suffix, data)] + ([] if label is None else [("cls", str(label).encode())])
        needed = sum(tarfile.BLOCKSIZE + padded(len(content)) for _, content in members) + 2 * tarfile.BLOCKSIZE
        if self.tar is not None and padded(self.tar.offset + needed, tarfile.RECORDSIZE) > self.limit:
            self.close()
        if self.tar is None:
            self.files.append(f"{len(self.files):06d}.tar")
        with one_line_errors(self.path):
            if self.tar is None:
                partial = self.shard.enter_context(atomic_write(self.path))
                self.tar = self.shard.enter_context(tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT))
            offset = self.tar.offset + tarfile.BLOCKSIZE
            for extension, content in members:
                self.tar.addfile(member(f"{key(index)}.{extension}", len(content)), BytesIO(content))
            self.tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them in memory
        return len(self.files) - 1, offset

    @property
    def path(self) -> Path:
        return self.folder / self.files[-1]

    def close(self) -> None:
        """Complete the current shard, and wait until it is on disk."""
        if self.tar is None:
            return
        with one_line_errors(self.path):
            self.shard.close()
        self.tar = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            with suppress(OSError):  # the disk may still be full
                self.shard.__exit__(kind, error, at)


def padded(size: int, unit: int = tarfile.BLOCKSIZE) -> int:
    return -(-size // unit) * unit


def write_final_index(folder: Path, index: Index) -> None:
    """Write the index, which comes last: with it the folder is complete."""
    with one_line_errors(folder / INDEX):
        sync(folder)
        write_index(index, folder / INDEX)
        sync(folder)


def written_files(folder: Path) -> list[Path]:
    """Shards and index; none where there is no folder.

    Raises:
        OSError: The folder cannot be listed.
    """
    names = os.listdir(folder) if folder.exists() else []
    return sorted(folder / name for name in names if name == INDEX or _SHARD.fullmatch(name))


def check_free(folder: Path, overwrite: bool) -> None:
    """Check that shards may be written to a folder; those of an interrupted run do not count.

    Raises:
        UserError: It holds shards or an index that are not to be overwritten.
    """
    present = written_files(folder)
    if present and not overwrite and not (folder / MARK).exists():
        raise UserError(f"{folder} already holds {present[-1].name}: --overwrite true replaces the shards there")


@contextmanager
def exclusive_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """A folder without shards that only this process writes to. An error restores what was there before."""
    with one_line_errors(folder):
        interrupted = (folder / MARK).exists()
        folder.mkdir(parents=True, exist_ok=True)
        os.close(open_own_file(folder / MARK))
    with exclusive_lock(folder / MARK, "mae pack"):
        with one_line_errors(folder):
            left = clear_partial(folder)
            if (folder / ASIDE).is_symlink():
                raise UserError(f"{folder / ASIDE} is a link, where shards are put aside: remove it")
            if interrupted and (removed := remove(folder) + len(left)):
                print(f"removed {removed} files that an interrupted run left in {folder}", flush=True)
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
        with one_line_errors(folder):
            shutil.rmtree(folder / ASIDE, ignore_errors=True)
            (folder / MARK).unlink()


def set_aside(folder: Path) -> None:
    """Move the shards that are to be replaced; the index first, since without it they do not pass for complete."""
    for path in reversed(written_files(folder)):
        (folder / ASIDE).mkdir(exist_ok=True)
        path.rename(folder / ASIDE / path.name)


def bring_back(folder: Path) -> None:
    """Move back what was set aside, the index last."""
    if (folder / ASIDE).exists():
        for path in written_files(folder / ASIDE):
            path.rename(folder / path.name)
        (folder / ASIDE).rmdir()


def remove(folder: Path) -> int:
    """Remove shards and index; returns how many files."""
    paths = written_files(folder)
    for path in reversed(paths):  # the index first: without it the folder does not pass for complete
        path.unlink()
    return len(paths)
