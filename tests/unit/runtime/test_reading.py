"""Only regular files are opened, and only as much is read as such a file can hold."""

import os
import socket
from pathlib import Path

import pytest

from mae.runtime.reading import open_regular, read_regular


def test_a_file_is_read_whole_or_refused_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, over the limit of 4"):
        read_regular(tmp_path / "a", 4)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, said in {"pipe": "pipe or device", "zero": "pipe or device", "socket": "a socket"}.items():
            with pytest.raises(OSError, match=said):
                open_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
