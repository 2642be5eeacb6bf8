"""Reading data from a path on this machine, or from an address that fsspec supports (s3://, http://, ...)."""

import errno
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientResponse, ClientTimeout
from fsspec.core import url_to_fs

from mae.errors import UserError
from mae.runtime.reading import open_regular, read_regular

ATTEMPTS = 3  # at reading remote bytes, with growing pauses: networks fail now and then, and a run lasts for days


class BoundedResponse(ClientResponse):
    """An answer over HTTP that is read to just above what was asked for: some servers send all, and some never end."""

    async def read(self) -> bytes:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        if asked is None:
            return await super().read()
        data, size = bytearray(), 1 + int(asked[2]) - int(asked[1])
        async for chunk in self.content.iter_any():
            data += chunk
            if len(data) > size:
                self.close()
                break
        return bytes(data)


# Seconds without an answer.
_HTTP = {"client_kwargs": {"timeout": ClientTimeout(sock_connect=10, sock_read=30), "response_class": BoundedResponse}}

OPTIONS: dict[str, dict[str, Any]] = {
    "http": _HTTP,
    "https": _HTTP,
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30}},
}

Range = tuple[str, int, int]  # name of a file in the folder, first byte, number of bytes


class Place:
    """A folder or a file, local or remote. Remote folders cannot be listed: an index must say what is in them.

    A store's own settings (endpoint, credentials) come from its environment variables: for S3 those of botocore, such
    as AWS_ENDPOINT_URL, or fsspec's, FSSPEC_S3_ENDPOINT_URL.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where).removeprefix("file://")
        self.remote = "://" in self.where
        if not self.remote:
            self.where = os.path.expanduser(self.where)
        self._opened: tuple[int, Any, str] = (0, None, "")

    def __str__(self) -> str:
        return self.where

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.where.rstrip('/')}/{name}" if self.remote else Path(self.where) / name)

    @property
    def path(self) -> Path:
        """The path of a local place.

        Raises:
            UserError: The place is remote.
        """
        if self.remote:
            raise UserError(f"{self.where} is not on this machine: only shards can be read from afar (`mae pack`)")
        return Path(self.where)

    @property
    def name(self) -> str:
        return self.where.rstrip("/").rsplit("/", 1)[-1]

    def exists(self) -> bool:
        if not self.remote:
            return os.path.exists(self.where)
        fs, path = self._fs()
        for attempt in range(ATTEMPTS):
            try:
                # Not fs.exists: over HTTP it takes any error for a no, and held-out images would be left out silently.
                fs.cat_file(path, start=0, end=1)
                return True
            except FileNotFoundError:
                return False
            except Exception as error:  # stores have exception types of their own
                reason = str(error) or type(error).__name__
                time.sleep(attempt)
        raise UserError(f"{self.where} cannot be reached: {reason}")

    def read(self, limit: int) -> bytes:
        """The whole file.

        Args:
            limit: In bytes.

        Raises:
            OSError: The file cannot be read or is larger; for remote places also exceptions of other types.
        """
        if not self.remote:
            return read_regular(self.where, limit)
        fs, path = self._fs()
        data: bytes = fs.cat_file(path, start=0, end=limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"it has more bytes than the limit of {limit:,}", self.where)
        return data

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """Read parts of files in this folder, remote ones all at once; each result is the bytes or an exception."""
        if not self.remote:
            return [self._read_local(*one) for one in ranges]
        fs, path = self._fs()
        results: list[Any] = [b""] * len(ranges)
        missing = [i for i, (_, _, size) in enumerate(ranges) if size]  # an empty range cannot be requested
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(attempt)
            wanted = [ranges[i] for i in missing]
            try:
                answers: Sequence[Any] = fs.cat_ranges(
                    [f"{path}/{name}" for name, _, _ in wanted],
                    [start for _, start, _ in wanted],
                    [start + size for _, start, size in wanted],
                    on_error="return",
                )
            except Exception as error:  # stores have exception types of their own
                answers = [error] * len(wanted)
            for i, answer in zip(missing, answers, strict=True):
                results[i] = checked(answer, ranges[i][2])
            missing = [i for i in missing if isinstance(results[i], Exception)]
            if not missing:
                break
        return results

    def _read_local(self, name: str, start: int, size: int) -> bytes | Exception:
        try:
            with open_regular(f"{self.where}/{name}" if name else self.where) as file:
                there = max(0, os.fstat(file.fileno()).st_size - start)  # memory is not taken for more than that
                return checked(os.pread(file.fileno(), min(size, there), start), size)
        except OSError as error:
            return error

    def _fs(self) -> tuple[Any, str]:
        # Once per process: connections and threads of a store do not survive the fork of a loader process.
        if self._opened[0] != os.getpid():
            try:
                protocol = self.where.split("://")[0].split("::")[-1]
                options = {protocol: OPTIONS[protocol]} if protocol in OPTIONS else {}
                self._opened = (os.getpid(), *url_to_fs(self.where, **options))
            except (ImportError, ValueError) as error:
                raise UserError(f"{self.where}: {error}") from None
        return self._opened[1:]


def checked(answer: Any, size: int) -> bytes | Exception:
    if isinstance(answer, Exception):
        return answer
    if len(answer) != size:  # a truncated file, or a server without range requests that sends everything
        return OSError(f"{len(answer)} bytes came instead of {size}")
    return bytes(answer)
