"""Image files of many kinds, and a process without rights to read them."""

import contextlib
import io
import os
import pickle
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A photograph-like (H, W, C) uint8 picture: every value occurs, neighbours are alike."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 6), dtype=np.uint8)) for _ in range(channels)]
    return np.stack([np.asarray(band.resize((width, height), Image.Resampling.BICUBIC)) for band in coarse], axis=2)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(samples: np.ndarray, transparent: np.ndarray | None = None) -> bytes:
    """A PNG of 16 bits a channel, (H, W, 1 to 4); Pillow writes the grey ones only."""
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    key = b"" if transparent is None else png_chunk(b"tRNS", transparent.astype(">u2").tobytes())
    chunks = png_chunk(b"IHDR", header) + key + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def on_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The definition, in whole numbers: round((a * x + (255 - a) * 255) / 255)."""
    a = alpha.astype(np.int64)
    return ((2 * (a * values + (255 - a) * 255) + 255) // 510).astype(np.uint8)


def in_child(action: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Any:
    """What `action` returns in a process of its own, after `prepare` there; skips where that is not permitted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found: tuple[str, Any] = "not permitted", None
            with contextlib.suppress(OSError):
                prepare()
                found = "failed", None
            if found[0] == "failed":
                try:
                    found = "done", action()
                except BaseException as error:
                    found = "failed", repr(error)
            os.write(writer, pickle.dumps(found))  # short enough to fit into a pipe
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read()
    os.waitpid(child, 0)
    outcome, value = pickle.loads(said)
    if outcome == "not permitted":
        pytest.skip("this user may not do that")
    assert outcome == "done", value
    return value


def become_nobody() -> None:
    """Root may read every file; another user has to be asked."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setegid(65534)
        os.seteuid(65534)


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that other users may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
