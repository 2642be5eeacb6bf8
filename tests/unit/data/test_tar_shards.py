"""Images from shards, here and from afar: the same batches as from the folder, or errors; and the index."""

import io
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientTimeout
from forked import in_process, little_memory
from PIL import Image

from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.decode import BadImage
from mae.data.prepare import pack
from mae.data.prepare.verify import find_damage
from mae.data.sources import FolderSource
from mae.data.tar_shards import (
    INDEX,
    Index,
    RecordSource,
    make_index,
    open_images,
    read_index,
    scan_tar,
    tar_source,
    write_index,
)
from mae.errors import UserError
from mae.runtime import memory, reading, storage
from mae.runtime.storage import Place

SETTINGS: dict[str, Any] = {"image_size": 16, "batch_size_per_device": 6, "seed": 5}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/{cat,dog}/*: 12 each, val/{cat,dog}/*: 3 each; JPEG and PNG."""
    root = tmp_path_factory.mktemp("data") / "images"
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for i in range(2 * count):
            path = root / split / ("cat", "dog")[i // count] / f"{i:02d}.{'png' if i % 5 == 0 else 'JPEG'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            coarse.resize((48, 40), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def shards(images: Path) -> Path:
    pack.pack_command([str(images), str(images.parent / "shards"), "--shard_mb=0.03", "--num_workers=0"])
    return images.parent / "shards"


def loaded(root: object, **settings: object) -> ImageData:
    data = ImageData(root=str(root), **{"num_workers": 0, **SETTINGS, **settings})
    data.setup("fit")
    return data


def batches(data: ImageData) -> list[Batch]:
    """Two epochs of training, then all held-out images."""
    loader = data.train_dataloader()
    found: list[Batch] = []
    for epoch in (0, 1):
        loader.sampler.seek(epoch * len(loader))  # type: ignore[attr-defined]
        found += loader
    return [*found, *data.val_dataloader()]  # type: ignore[list-item]


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted) == 9
    for one, other in zip(found, wanted, strict=True):
        assert not one.errors
        for key in ("images", "labels", "indices", "epochs", "flip", "weight"):
            assert getattr(one, key).equal(getattr(other, key)), key


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(images: Path, shards: Path, workers: int) -> None:
    folder, packed = loaded(images), loaded(shards, num_workers=workers)
    assert isinstance(packed.train_source, RecordSource)
    assert len(packed.train_source.index.files) > 2
    assert_same(batches(packed), batches(folder))
    for one, other in zip(packed.require_labels(), folder.require_labels(), strict=True):
        assert (one.labels, list(one.classes)) == (other.labels, list(other.classes))
        assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]


# From afar


class Store(SimpleHTTPRequestHandler):
    """Files of a folder, and parts of them.

    Attributes:
        ranges: Whether it knows of parts; else it sends the whole file.
        failing: Requests for shards that it still has to answer with an error.
        closed: How paths begin that it never answers but with an error.
        endless: It sends zeros for ever ("yes"; "lying" of its length, too), or nothing at all ("silent").
        sent: So many bytes of these.
        asked: What was asked for.
    """

    ranges = True
    failing = 0
    closed = "-"
    endless = ""
    sent = 0
    asked: list[str]

    def do_GET(self) -> None:
        if self.path.startswith(self.closed):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        if "tar" in self.path and type(self).failing > 0:
            type(self).failing -= 1
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.endless:
            self.send_response(HTTPStatus.OK)
            if self.endless == "lying":
                self.send_header("Content-Length", str(2**50))
            self.end_headers()
            while self.endless != "silent":
                self.wfile.write(bytes(1 << 16))
                type(self).sent += 1 << 16
            threading.Event().wait(1)
            return
        path = Path(self.translate_path(self.path))
        self.asked.append(f"{path.name} {part[0] if part else 'whole'}")
        if not part or not path.is_file() or not self.ranges:
            super().do_GET()
            return
        first, last = int(part[1]), int(part[2])
        data = path.read_bytes()
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None: ...  # a client that hung up


@pytest.fixture
def store() -> Iterator[Callable[..., str]]:
    """Serve a folder; gives its address."""
    servers = []

    def serve(folder: Path, **behaviour: object) -> str:
        kind = type("Behaviour", (Store,), {"asked": [], **behaviour})
        server = Server(("127.0.0.1", 0), lambda *args: kind(*args, directory=str(folder)))
        server.kind = kind  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        serve.kind = kind  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that a place would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    return waited


def test_batches_over_http_are_those_of_the_folder(
    images: Path, shards: Path, store: Callable[..., str], pauses: list[float]
) -> None:
    wanted, where = batches(loaded(images)), store(shards)
    assert_same(batches(loaded(where)), wanted)
    assert_same(batches(loaded(f"{where}/", num_workers=2)), wanted)  # forked, with connections open
    assert pauses == []
    asked = store.kind.asked  # type: ignore[attr-defined]
    # Is it there at all? And then all of it, up to the limit.
    assert {request.split()[1] for request in asked if INDEX in request} == {"bytes=0-0", f"bytes=0-{reading.INDEX}"}
    parts = [request for request in asked if ".tar bytes=" in request]
    assert len(parts) == 2 * (2 * 24 + 6)  # each image once an epoch, and nothing else of the shards
    assert not [request for request in asked if request.endswith(".tar whole")]


def test_an_address_of_one_split_is_a_root_too(shards: Path, store: Callable[..., str]) -> None:
    data = loaded(f"{store(shards)}/train")
    assert len(data.train_source or ()) == 24
    assert data.val_source is None


def test_a_server_without_ranges_makes_errors_and_no_pixels(
    shards: Path, store: Callable[..., str], pauses: list[float]
) -> None:
    data = loaded(store(shards, ranges=False), max_bad_images=100)
    for batch in data.train_dataloader():
        assert len(batch.errors) == 6
        assert batch.weight.sum() == 0
        assert not batch.images.any()
        assert re.search(r"train/00000\d.tar: (cat|dog)/\S+: \d+ bytes came instead of \d+", str(batch.errors[0]))
    assert pauses == [1, 2] * 4
    with pytest.raises(BadImage, match="bytes came instead of"):
        data.val_source.open(0)  # type: ignore[union-attr]


def test_a_server_that_stumbles_is_asked_again(
    images: Path, shards: Path, store: Callable[..., str], pauses: list[float]
) -> None:
    wanted = batches(loaded(images))
    assert_same(batches(loaded(store(shards, failing=9))), wanted)  # the first batch, and half of it once more
    assert pauses == [1, 2]
    bad = next(iter(loaded(store(shards, failing=100), max_bad_images=100).train_dataloader()))
    assert (len(bad.errors), bad.images.any().item()) == (6, False)
    assert "503" in str(bad.errors[0])


def test_held_out_images_do_not_vanish_with_a_server_in_trouble(
    shards: Path, store: Callable[..., str], pauses: list[float]
) -> None:
    data = ImageData(root=store(shards, closed="/val"))
    with pytest.raises(UserError, match=r"val/index\.safetensors cannot be reached: 503"):
        data.load()
    assert len(pauses) == 3


@pytest.mark.slow
def test_a_shard_that_is_not_there_makes_errors(
    images: Path, shards: Path, tmp_path: Path, store: Callable[..., str], pauses: list[float]
) -> None:
    (tmp_path / INDEX).write_bytes((shards / "train" / INDEX).read_bytes())
    (tmp_path / "000001.tar").write_bytes((shards / "train" / "000001.tar").read_bytes())
    for where in (str(tmp_path), store(tmp_path)):
        source = open_images(Place(where), 3)
        assert isinstance(source, RecordSource)
        for i, data in enumerate(source.read_all(range(24))):
            if source.index.file[i] == 1:
                assert data == FolderSource(images / "train", 3).read(i)
            else:
                assert isinstance(data, BadImage)


@pytest.mark.slow
def test_no_index_from_afar_is_one_line(tmp_path: Path, store: Callable[..., str]) -> None:
    where = store(tmp_path)
    with pytest.raises(UserError, match=rf"{where}/index.safetensors does not exist: from afar only shards"):
        loaded(where)
    with pytest.raises(UserError, match=r"index.safetensors (does not exist|cannot be reached)"):
        loaded("http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(UserError, match=r"nosuch://bucket"):
        loaded("nosuch://bucket")


@pytest.mark.parametrize("endless", ["yes", "lying", "silent"])
def test_an_index_without_end_is_read_to_its_limit(
    endless: str, tmp_path: Path, store: Callable[..., str], monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setattr(reading, "INDEX", 1 << 20)
    patience = {**storage.OPTIONS["http"]["client_kwargs"], "timeout": ClientTimeout(sock_connect=1, sock_read=0.05)}
    monkeypatch.setitem(storage.OPTIONS, "http", {"client_kwargs": patience, "skip_instance_cache": True})
    where = store(tmp_path, endless=endless)
    said = "reached" if endless == "silent" else "read: it has more bytes than the limit of 1,048,576"
    with pytest.raises(UserError, match=rf"index.safetensors cannot be {said}"):
        open_images(Place(where), 3)
    source = RecordSource(Place(where), make_index(["000000.tar"], [0], [0], [3], ["a"]), 3)
    assert isinstance(next(source.read_all([0])), BadImage)
    assert store.kind.sent < 64 << 20  # type: ignore[attr-defined]  # of 5 answers, what sockets hold included


def test_empty_records_over_http(tmp_path: Path, store: Callable[..., str]) -> None:
    (tmp_path / "000000.tar").write_bytes(b"abc" + bytes(100))
    source = RecordSource(Place(store(tmp_path)), make_index(["000000.tar"], [0, 0], [0, 3], [3, 0], ["a", "b"]), 3)
    assert list(source.read_all([0, 1])) == [b"abc", b""]
    assert store.kind.asked == ["000000.tar bytes=0-2"]  # type: ignore[attr-defined]


def test_batches_from_s3_are_those_of_the_folder(images: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    try:
        fs = s3fs.S3FileSystem(skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(str(shards), "bucket/shards", recursive=True)
        wanted = batches(loaded(images))
        for workers in (0, 2):
            assert_same(batches(loaded("s3://bucket/shards", num_workers=workers)), wanted)
        with pytest.raises(UserError, match=r"s3://bucket/nowhere/index.safetensors does not exist"):
            loaded("s3://bucket/nowhere")
    finally:
        server.stop()


# Places


def test_places_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    place = Place(tmp_path)
    first, short, behind, missing, empty = place.read_ranges(
        [("a", 10, 5), ("a", 90, 20), ("a", 200, 1), ("b", 0, 1), ("a", 5, 0)]
    )
    assert (first, empty) == (bytes(range(10, 15)), b"")
    assert str(short) == "10 bytes came instead of 20"
    assert str(behind) == "0 bytes came instead of 1"
    assert isinstance(missing, FileNotFoundError)
    assert (place / "a").read_ranges([("", 1, 2)]) == [bytes([1, 2])]
    assert (Place(f"file://{tmp_path}").path, (place / "a").name, (place / "b").exists()) == (tmp_path, "a", False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(Place("~/images")) == "/home/someone/images"
    assert str(Place("s3://bucket/a/") / "b") == "s3://bucket/a/b"
    with pytest.raises(UserError, match="s3://bucket is not on this machine"):
        _ = Place("s3://bucket").path


# The index


def test_an_index_comes_back_as_it_was(tmp_path: Path) -> None:
    names = ["cat/ä.jpg", "cat/\udcff.jpg", "", "dog/x y.png"]
    about = {"mean": [0.1, 1 / 3], "encoding": "original bytes"}
    index = make_index(
        ["a.tar", "b.tar"], [0, 0, 1, 1], [512, 2**40, 512, 9], [1, 2, 0, 2**30], names, [0, 2**32 - 1, 5, 6],
        [0, 0, 2, 1], ["cat", "dog", "none"], about,
    )  # fmt: skip
    write_index(index, tmp_path / INDEX)
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]
    found = read_index(Place(tmp_path))
    assert [found.name(i) for i in range(4)] == names
    assert (found.files, found.classes, found.about) == (index.files, index.classes, about)
    for key in ("file", "offset", "size", "crc32", "label"):
        assert getattr(found, key).tolist() == getattr(index, key).tolist()
        assert getattr(found, key).dtype == getattr(index, key).dtype
    source = RecordSource(Place(tmp_path), found, 3)
    assert source.labels == [0, 0, 2, 1]
    assert all(type(label) is int for label in source.labels)


def test_an_index_without_labels(tmp_path: Path) -> None:
    write_index(make_index(["a.tar"], [0], [512], [7], ["x.jpg"]), tmp_path / INDEX)
    source = open_images(Place(tmp_path), 3)
    assert (source.labels, list(source.classes), len(source), source.name(0)) == (None, [], 1, "x.jpg")


def test_a_damaged_index_is_refused_whatever_byte_it_is(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "val" / INDEX).read_bytes()
    path = tmp_path / INDEX
    for at in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"index.safetensors (is damaged|was written by a newer version)"):
            read_index(Place(tmp_path))
    for data in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], b"no index at all"):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"index.safetensors is damaged; `mae pack` writes"):
            loaded(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"index.safetensors cannot be read"):
        read_index(Place(tmp_path))


def changed(index: Index, **columns: Any) -> Index:
    return Index(**(index._asdict() | columns))  # `_replace` would ask for its length


def damaged_columns(index: Index) -> Iterator[tuple[str, Index]]:
    """An index of three images in two shards, with one thing wrong at a time."""
    columns: dict[str, list[list[int]]] = {
        "file": [[0, 0, 2], [1, 0, 0], [0, 0]],
        "offset": [[-1, 512, 512], [2**63 - 1, 0, 0], [0, 0]],
        "size": [[-1, 1, 1], [1, 2**62, 1], [1, 1, 1, 1]],
        "crc32": [[1, 2]],
        "label": [[0, 1, 2], [-1, 0, 0], [0, 1]],
        "name_end": [[2, 1, 3], [1, 2, 4], [1, 2, 2], [-1, 2, 3]],
    }
    for key, values in columns.items():
        column = getattr(index, key)
        yield from ((f"{key} {value}", changed(index, **{key: np.array(value, column.dtype)})) for value in values)
        for what, other in (("floats", column.astype("float64")), ("matrix", column[None]), ("number", column[0])):
            yield f"{key}: {what}", changed(index, **{key: np.asarray(other)})
    yield "names of another type", changed(index, names=index.names.astype("int16"))
    nested: list[Any] = []
    for _ in range(500):
        nested = [nested]
    others: dict[str, list[Any]] = {
        "files": [["a.tar", "../b.tar"], ["a.tar", "/etc/passwd"], ["a.tar", 7], ["a.tar", ""], "ab", None, {"a": 0}],
        "classes": [[1, 2], ["cat"], None, [["cat"], ["dog"]]],
        "about": [{"mean": ["0.5"]}, {"mean": 0.5}, {"std": [-1.0]}, {"std": [np.nan]}, {"std": [True]}, [], None],
    }
    others["about"].append({"std": nested})
    for key, values in others.items():
        yield from ((f"{key} {str(value)[:50]}", changed(index, **{key: value})) for value in values)
    arrays = ("file", "offset", "size", "crc32", "label", "name_end", "names")
    yield "no images", changed(index, **{key: getattr(index, key)[:0] for key in arrays})


def test_an_index_with_a_right_checksum_and_wrong_contents_is_damaged(tmp_path: Path) -> None:
    labels, about = [0, 1, 1], {"mean": [0.5], "std": [0.0]}
    columns = [0, 0, 1], [512, 1024, 512], [1, 2, 3], ["x", "y", "z"], [7, 8, 9]
    whole = make_index(["a.tar", "b.tar"], *columns, labels, ["cat", "dog"], about)
    write_index(whole, tmp_path / INDEX)
    assert len(open_images(Place(tmp_path), 3)) == 3
    for what, index in damaged_columns(whole):
        write_index(index, tmp_path / INDEX)
        with pytest.raises(UserError, match=r"index.safetensors is damaged; `mae pack` writes the shards anew$"):
            raise AssertionError(f"{what}: {open_images(Place(tmp_path), 3)}")


def read_in_little_memory(folder: Path) -> list[str]:
    source = open_images(Place(folder), 3)
    assert isinstance(source, RecordSource)
    with little_memory(64):
        return [*map(str, source.read_all([0, 1])), *(damage for _, damage in find_damage(folder, source.index))]


@pytest.mark.slow
def test_records_behind_the_end_of_a_shard_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(2048))
    write_index(make_index(["a.tar"], [0] * 2, [512, 2**50], [2**30, 9], ["x", "y"], [7, 8]), tmp_path / INDEX)
    assert in_process(read_in_little_memory, tmp_path) == [
        f"{tmp_path}/a.tar: x: 1536 bytes came instead of {2**30}",
        f"{tmp_path}/a.tar: y: 0 bytes came instead of 9",
        "the shard ends within it",
        "the shard ends before it",
    ]


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, zeros])
def test_shards_indexes_and_tar_files_that_are_no_files(make: Callable[[Path], None], tmp_path: Path) -> None:
    write_index(make_index(["a.tar"], [0], [512], [9], ["x"], [7]), tmp_path / INDEX)
    make(tmp_path / "a.tar")
    said = "it is a pipe or device, not a file"
    with pytest.raises(BadImage, match=said):
        open_images(Place(tmp_path), 3).read(0)
    assert [damage for _, damage in find_damage(tmp_path, read_index(Place(tmp_path)))] == [
        f"the shard cannot be opened: {said}"
    ]
    with pytest.raises(UserError, match=said):
        list(scan_tar(tmp_path / "a.tar"))
    (tmp_path / INDEX).unlink()
    make(tmp_path / INDEX)
    with pytest.raises(UserError, match=rf"index.safetensors cannot be read: {said}"):
        open_images(Place(tmp_path), 3)


def test_an_index_of_a_newer_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr("mae.data.tar_shards.VERSION", 2)
        write_index(make_index(["a.tar"], [0], [512], [7], ["x.jpg"]), tmp_path / INDEX)
    with pytest.raises(UserError, match=r"written by a newer version of this package \(2 > 1\)"):
        open_images(Place(tmp_path), 3)


def opened_index(folder: Path) -> tuple[int, int, int, int]:
    """Images, the last label, classes, and by how many bytes this process has grown by opening them."""
    before = memory.resident()
    source = open_images(Place(folder), 3)
    assert source.labels is not None
    return len(source), source.labels[-1], len(source.classes), memory.resident() - before


@pytest.mark.slow
def test_an_index_of_a_million_images_is_light(tmp_path: Path) -> None:
    n = 1_000_000
    i = np.arange(n)
    index = make_index(
        [f"{k:06d}.tar" for k in range(500)], i // 2000, i % 2000 * 110_592 + 512, np.full(n, 110_000),
        [f"n{k // 1000:08d}/n{k // 1000:08d}_{k}.JPEG" for k in range(n)], i, (i // 1000).tolist(),
        [f"n{k:08d}" for k in range(1000)],
    )  # fmt: skip
    write_index(index, tmp_path / INDEX)
    *numbers, grown = in_process(opened_index, tmp_path)
    assert numbers == [n, 999, 1000]
    assert grown < 200 * 2**20


# Tar files


def tar_of(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_a_tar_file_holds(tmp_path: Path, form: int) -> None:
    long = f"dog/{'x' * 60}/{'y' * 80}.jpg"
    members = {"./cat/b.JPG": b"one", "cat/a.png": b"three", "notes.txt": b"no", "cat/.c.jpg": b"hidden", long: b"two"}
    path = tar_of(tmp_path / "images.tar", members, form)
    source = tar_source(path, 3)
    assert [source.name(i) for i in range(3)] == ["cat/a.png", "cat/b.JPG", long]
    assert [source.read(i) for i in range(3)] == [b"three", b"one", b"two"]
    assert (source.labels, source.classes) == ([0, 0, 1], ["cat", "dog"])

    with tarfile.open(path, "a") as tar:  # another version, as of a backup: unpacking would leave this one
        tar.addfile(info := tarfile.TarInfo("cat/a.png"))
        info.size = 5
        tar.addfile(info, io.BytesIO(b"later"))
    source = tar_source(path, 3)
    assert (len(source), source.read(0)) == (3, b"later")


def test_a_tar_file_inside_another(tmp_path: Path) -> None:
    inner = tar_of(tmp_path / "inner.tar", {"a.jpg": b"aa", "b.jpg": b"bbb"}).read_bytes()
    outer = tar_of(tmp_path / "outer.tar", {"inner.tar": inner, "other.tar": b"no tar file, whatever its name is"})
    (_, start, size), (_, bad, bad_size) = scan_tar(outer, suffixes=frozenset([".tar"]))
    data = outer.read_bytes()
    found = list(scan_tar(outer, start, size))
    assert [(name, data[at : at + n]) for name, at, n in found] == [("a.jpg", b"aa"), ("b.jpg", b"bbb")]
    with pytest.raises(UserError, match=r"outer.tar is not a tar file that can be read"):
        list(scan_tar(outer, bad, bad_size))
    with pytest.raises(UserError, match=r"outer.tar is not a tar file that can be read"):
        list(scan_tar(outer, start, 1024 + 2))  # ends within a.jpg's padding


def test_names_in_a_tar_file_are_those_of_the_unpacked_folder(tmp_path: Path) -> None:
    def tar_of(name: str) -> Path:
        with tarfile.open(tmp_path / "odd.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(name))
        return tmp_path / "odd.tar"

    for name in ("/cat/1.png", "./cat/1.png", "././cat//1.png", "cat/1.png"):
        assert tar_source(tar_of(name), 3).name(0) == "cat/1.png"
    with pytest.raises(UserError, match=r"\.\./1\.png would lie outside"):
        tar_source(tar_of("cat/../../1.png"), 3)


def test_tar_files_that_would_lose_images_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "images.tar", {f"{i}.jpg": bytes(700) for i in range(4)})
    whole = path.read_bytes()
    cut = tmp_path / "cut.tar"
    for size in (100, 600, 1536 + 20, 1536 + 512 + 300, 4 * 1536 - 600):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut.tar is not a tar file that can be read"):
            tar_source(cut, 3)
    for at in (3, 1536 + 3, 3 * 1536 + 130):  # in headers: the first, one in the middle, the last
        cut.write_bytes(whole[:at] + b"#" + whole[at + 1 :])
        with pytest.raises(UserError, match=r"cut.tar is not a tar file that can be read"):
            tar_source(cut, 3)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"images.tar: link.jpg is a link .*unpack the archive"):
        tar_source(path, 3)
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    (tmp_path / "images.tar.gz").rename(tmp_path / "packed.tar")
    with pytest.raises(UserError, match=r"packed.tar is not a tar file .*unpack it if it is compressed"):
        tar_source(tmp_path / "packed.tar", 3)


def header(name: bytes = b"a.jpg", size: bytes = b"00000000003\0", kind: bytes = b"0") -> bytes:
    """The 512 bytes of a header, with a right checksum."""
    block = name.ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0" + size + b"00000000000\0" + b" " * 8 + kind
    block = (block.ljust(257, b"\0") + b"ustar\x0000").ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def extended(*texts: bytes) -> bytes:
    """An extended header, PAX, with these records."""
    data = b""
    for text in texts:
        data += next(r for n in range(len(text) + 9) if len(r := b"%d %s\n" % (n, text)) == n)
    return header(b"pax", octal(len(data)), b"x") + padded(data)


IMAGE, END, BIG = header() + padded(b"abc"), bytes(1024), octal(8**11 - 1)
SPARSE = extended(b"GNU.sparse.major=1", b"GNU.sparse.minor=0") + header(size=octal(512))
HOSTILE_TARS = {
    "a negative size": header(size=b"\xff" * 12) + END,
    "a size that leads back": IMAGE + header(size=b"\xff" * 10 + b"\xf6\x00") + END,
    "a size beyond the file": header(size=BIG) + END,
    "a size of 2^86": header(size=b"\x80" + b"\x7f" * 11) + END,
    "PAX: size -512": extended(b"size=-512") + IMAGE + END,
    "PAX: size -1536": extended(b"size=-1536") + IMAGE + END,
    "PAX: size of 5,000 digits": extended(b"size=" + b"9" * 5000) + IMAGE + END,
    "PAX: 8 GB": header(b"pax", BIG, b"x") + END,
    "PAX: negative": header(b"pax", b"\xff" * 10 + b"\xfe\0", b"x") + IMAGE + END,
    "PAX: a record of no length": header(b"pax", octal(6), b"x") + padded(b"0 a=b\n") + IMAGE + END,
    "PAX: digits": header(b"pax", octal(200_000), b"x") + padded(b"9" * 200_000) + IMAGE + END,
    "PAX: a chain": extended(b"path=b.jpg") * 2000 + IMAGE + END,
    "long names: a chain": (header(b"l", octal(6), b"L") + padded(b"b.jpg\0")) * 2000 + IMAGE + END,
    "long name: 8 GB": header(b"l", BIG, b"L") + END,
    "sparse map without end": SPARSE + padded(b"999999999\n1\n"),
    "sparse map of words": SPARSE + padded(b"many\n"),
    "sparse map, long": extended(b"GNU.sparse.map=" + b"1,1," * 70_000) + IMAGE + END,
    "no header": IMAGE + b"x" * 512 + END,
}


def test_tar_files_that_no_program_writes_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for what, data in HOSTILE_TARS.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"x.tar is not a tar file that can be read: ") as caught:
            raise AssertionError(f"{what}: {list(scan_tar(path))}")
        assert "\n" not in str(caught.value)
    path.write_bytes(extended(b"path=b\0.jpg") + IMAGE + header(name=b"") + padded(b"abc") + END)
    assert [name for name, _, _ in scan_tar(path)] == ["b\0.jpg"]
