"""Files that appear whole or not at all, and locks on files that end with the process that holds them."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mae.errors import UserError

PARTIAL = ".partial"  # ends the name of a file that is still being written


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which replaces `path` once it is on disk; an error removes it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def atomic_write_text(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
    with open(path, "a") as file:
        locked = True
        with suppress(OSError):
            locked = try_lock(file.fileno())
        if not locked:
            raise UserError(f"another {command} is writing to {path.parent}{hint}")
        if not names_open_file(path, file.fileno()):
            raise UserError(f"another {command} has just finished in {path.parent}")
        yield
