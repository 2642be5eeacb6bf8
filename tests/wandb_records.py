"""Read a `.wandb` file, which holds what an offline run has recorded and `wandb sync` would upload.

The framing is LevelDB's log format after a header of 7 bytes; each record is a protobuf message.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER = 7  # b":W&B", uint16 magic, uint8 version
BLOCK = 32 * 1024  # counted from the start of the file
CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, type
FULL, FIRST, LAST = 1, 2, 4  # 3 is a chunk in the middle of a record


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records in order; ValueError if the framing or a checksum is wrong."""
    record: bytes | None = None
    for kind, chunk in _chunks(path.read_bytes()):
        if (kind in (FULL, FIRST)) != (record is None):
            raise ValueError(f"{path}: chunk of type {kind} out of place")
        record = (record or b"") + chunk
        if kind in (FULL, LAST):
            yield Record.FromString(record)
            record = None
    if record is not None:
        raise ValueError(f"{path}: ends inside a record")


def _chunks(raw: bytes) -> Iterator[tuple[int, bytes]]:
    if raw[:4] != b":W&B":
        raise ValueError(f"not a .wandb file, begins with {raw[:FILE_HEADER]!r}")
    at = FILE_HEADER
    while at < len(raw):
        if (left := BLOCK - at % BLOCK) < CHUNK_HEADER.size:  # no room for a chunk: zeros up to the next block
            at += left
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(raw, at)
        at += CHUNK_HEADER.size
        chunk = raw[at : at + length]
        if zlib.crc32(bytes([kind]) + chunk) != checksum:  # neither masked nor CRC-32C, unlike LevelDB's own
            raise ValueError(f"checksum of the chunk at byte {at} is wrong")
        yield kind, chunk
        at += length
