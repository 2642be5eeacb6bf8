"""Read a `.wandb` file, which holds what a W&B run has recorded on this machine and `wandb sync` would upload.

The framing is LevelDB's log format after a header of 7 bytes; each record is a protobuf message.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mae.runtime.reading import RECORDED, read_regular

FILE_HEADER = 7  # b":W&B", uint16 magic, uint8 version

BLOCK = 32 * 1024  # counted from the start of the file

CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, type

FULL, FIRST, LAST = 1, 2, 4  # 3 is a chunk in the middle of a record


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records, W&B's protobuf messages, in order, up to the end or to where a kill has cut the file off.

    Raises:
        ValueError: It is not a `.wandb` file.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for record, _ in _records(path):
        yield Record.FromString(record)


def last_step(path: Path) -> int:
    """The last step that has a row in this file; -1 if none has."""
    return max((r.history.step.num for r in read_records(path) if r.HasField("history")), default=-1)


def cut_torn_tail(path: Path) -> None:
    """Cut the file after its last whole record: `wandb sync` stops at a torn one, and sends no later segment."""
    end = max((end for _, end in _records(path)), default=0)
    if 0 < end < path.stat().st_size:
        os.truncate(path, end)


def _records(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each record and where it ends."""
    raw = read_regular(path, RECORDED)
    if not b":W&B".startswith(raw[:4]):
        raise ValueError(f"{path} is not a .wandb file, it begins with {raw[:FILE_HEADER]!r}")
    record: bytes | None = None
    at = FILE_HEADER
    while at < len(raw):
        if (left := BLOCK - at % BLOCK) < CHUNK_HEADER.size:  # no room for a chunk: zeros up to the next block
            at += left
            continue
        if len(raw) - at < CHUNK_HEADER.size:
            return
        checksum, length, kind = CHUNK_HEADER.unpack_from(raw, at)
        at += CHUNK_HEADER.size + length
        chunk = raw[at - length : at]
        # The checksum is neither masked nor CRC-32C, unlike LevelDB's own.
        if zlib.crc32(bytes([kind]) + chunk) != checksum or (kind in (FULL, FIRST)) != (record is None):
            return
        record = (record or b"") + chunk
        if kind in (FULL, LAST):
            yield record, at
            record = None
