"""Files that appear whole or not at all, and locks on files that end with the process that holds them."""

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mae.errors import UserError

PARTIAL = ".partial"  # ends the name of a folder in which a file is being written

_LOCK = ".in_use"  # in such a folder


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` once it is on disk; an error removes it.

    It has the name of `path`, in a new folder NAME.RANDOM.partial beside it that only its owner can enter: nobody's
    file is overwritten, and no link is followed. A killed write is cleared away by the next one of that name.

    Whatever is at `path` is replaced: a link itself, not the file that it points to. The permissions are those of any
    new file. Names in /dev and /proc, such as /dev/stdout, are written to directly.

    Raises:
        OSError: It cannot be written; `filename` is `path`, whichever step failed.
    """
    if is_written_in_place(path):
        yield path
        return
    name = os.fsdecode(os.fsencode(path.name)[:200])  # the folder's name is longer, and 255 bytes are allowed
    clear_partial(path.parent, re.escape(name))
    try:
        folder, lock = _private_folder(path.parent, name)
    except OSError as error:
        error.filename = str(path)
        raise
    partial = folder / path.name
    try:
        yield partial
        if not partial.is_symlink():
            wanted = stat.S_IMODE(os.fstat(lock).st_mode)
            if stat.S_IMODE(partial.stat().st_mode) != wanted:  # safetensors lets only the owner read
                partial.chmod(wanted)
            sync(partial)
        partial.replace(path)
    except OSError as error:
        if str(error.filename) in (str(partial), str(folder)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def is_written_in_place(path: Path) -> bool:
    """Whether it is a name in /dev or /proc, such as /dev/stdout, and no file that could be replaced."""
    parent = os.path.realpath(path.parent)
    return parent == "/dev" or parent.startswith("/proc/")


def atomic_write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_report(path: str | Path, text: str) -> None:
    """Write a file that an option names.

    Raises:
        UserError: It cannot be written.
    """
    with os_errors_as_user_errors(Path(path), "give another name or make room"):
        atomic_write_text(Path(path), text)


def _private_folder(parent: Path, name: str) -> tuple[Path, int]:
    """A new folder, and the open file in it by whose lock others see that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(PARTIAL, f"{name}.", parent))
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another process has taken it for abandoned
            continue
        except OSError:
            folder.rmdir()
            raise
        if _flock(descriptor) is not False and names_open_file(folder / _LOCK, descriptor):
            return folder, descriptor
        os.close(descriptor)


def clear_partial(folder: Path, name: str = ".*", locked: bool = False) -> list[Path]:
    """Remove what processes of this user were writing by `atomic_write` when they were killed; returns what it was.

    Args:
        name: A regular expression for the name of the file.
        locked: Nobody else writes here, as the caller knows by another lock; where the file system has no locks, what
            is being written cannot be told from what was, and stays otherwise.
    """
    form = re.compile(rf"{name}\.[a-z0-9_]{{8}}{re.escape(PARTIAL)}", re.DOTALL)
    removed = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not form.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid() and _abandoned(Path(entry), locked):
                    shutil.rmtree(entry)
                    removed.append(Path(entry))
    return sorted(removed)


def _abandoned(folder: Path, locked: bool) -> bool:
    """Whether this is a folder of `atomic_write`, and no process writes in there any more."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        folder.rmdir()  # killed, or still at work, between its first two steps; only an empty folder goes
        return False
    try:
        return locked or _flock(descriptor) is True
    finally:
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """Lock an open file, not the process's right to it: libraries may open and close it; None where there are no locks.

    False if another process holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def try_lock(descriptor: int, start: int = 0, length: int = 0) -> bool:
    """Lock bytes of an open file (length 0: to its end, wherever that is); False if another process holds one.

    These are POSIX record locks. The kernel releases them when the process ends, forked processes do not inherit
    them, and they hold over NFS. A process loses them when it closes any descriptor of the file.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # systems differ in which of them
            return False
        raise
    return True


def open_own_file(path: Path) -> int:
    """Open a file for reading and writing, which is made where there is none.

    Raises:
        OSError: It is a link, which might lead to somebody's file, or no file at all; or it cannot be opened.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a link there, not a file; remove it", str(path))
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is a pipe or device there, not a file; remove it", str(path))
    return descriptor


def names_open_file(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`, and not one that has been removed or replaced."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


@contextmanager
def os_errors_as_user_errors(path: Path, hint: str, also: type[Exception] = OSError) -> Iterator[None]:
    """Report a full disk and the like in one line.

    Args:
        hint: What becomes of the work, for the end of the message.
        also: A library's own exception for such errors.
    """
    try:
        yield
    except (OSError, also) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written: {reason}; {hint}") from None


@contextmanager
def exclusive_lock(path: Path, command: str, hint: str = "") -> Iterator[None]:
    """Create the file `path` and lock it; nothing is locked where the file system has no locks.

    Args:
        command: Who takes this lock, for the message.
        hint: The way out, appended to the message.

    Raises:
        UserError: Another process has the lock, or has just removed the file.
        OSError: The file cannot be created.
    """
    descriptor = open_own_file(path)
    try:
        locked = True
        with suppress(OSError):
            locked = try_lock(descriptor)
        if not locked:
            raise UserError(f"another {command} is writing to {path.parent}{hint}")
        if not names_open_file(path, descriptor):
            raise UserError(f"another {command} has just finished in {path.parent}")
        yield
    finally:
        os.close(descriptor)
