"""Many images in few files: tar shards with an index, through which images are read in any order.

A split is a folder of WebDataset shards, `000000.tar` ..., each sample an image `00001234.jpg` and, where there are
labels, its class number `00001234.cls`. Beside them `index.safetensors` says where every image begins, so that
training sees the same batches as from the folder that was packed.
"""

import json
import math
import os
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy

from mae.data.bounds import MAX_MEMORY
from mae.data.decode import BadImage
from mae.data.image_files import IMAGE_SUFFIXES, Leftovers, find_images, is_hidden
from mae.data.sources import FileSource, FolderSource, class_labels, note_folders
from mae.errors import UserError
from mae.runtime import reading
from mae.runtime.files import atomic_write
from mae.runtime.reading import open_regular
from mae.runtime.storage import Place, Range

INDEX = "index.safetensors"

VERSION = 1

_ARRAYS = {
    "file": "uint32",
    "offset": "int64",
    "size": "int64",
    "crc32": "uint32",
    "label": "int32",
    "name_end": "int64",
}


class Index(NamedTuple):
    """Where the bytes of n images are.

    Attributes:
        files: Names of the shards, relative to the folder.
        file: (n,) uint32, the shard of each image.
        offset, size: (n,) int64, first byte in the shard and number of bytes.
        crc32: (n,) uint32 of those bytes; empty if they have not been read yet.
        label: (n,) int32; empty if there are no labels.
        names: All names one after the other, UTF-8, as uint8.
        name_end: (n,) int64, where each name ends in `names`.
        classes: Names of the classes, by label.
        about: Further facts: `mean` and `std` of the channels, `encoding`.
    """

    files: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    label: np.ndarray
    names: np.ndarray
    name_end: np.ndarray
    classes: list[str]
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offset)

    def name(self, i: int) -> str:
        start = self.name_end[i - 1] if i else 0
        return self.names[start : self.name_end[i]].tobytes().decode("utf-8", "surrogateescape")

    def checksum(self) -> int:
        """CRC-32 of everything in the index."""
        crc = zlib.crc32(json.dumps([self.files, self.classes, self.about], sort_keys=True).encode())
        for key in (*_ARRAYS, "names"):
            crc = zlib.crc32(np.ascontiguousarray(getattr(self, key)).data, crc)
        return crc


def make_index(
    files: Sequence[str],
    file: Sequence[int],
    offset: Sequence[int],
    size: Sequence[int],
    names: Sequence[str],
    crc32: Sequence[int] = (),
    labels: Sequence[int] | None = None,
    classes: Sequence[str] = (),
    about: dict[str, Any] | None = None,
) -> Index:
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    columns = dict(
        zip(_ARRAYS, (file, offset, size, crc32, labels or (), np.cumsum([len(e) for e in encoded])), strict=True)
    )
    arrays = {key: np.asarray(columns[key], dtype) for key, dtype in _ARRAYS.items()}
    text = np.frombuffer(b"".join(encoded), np.uint8)
    return Index(list(files), **arrays, names=text, classes=list(classes), about=about or {})


def write_index(index: Index, path: Path) -> None:
    """Write the index under a temporary name first: a folder that has an index is complete."""
    header = {"version": VERSION, "files": index.files, "classes": index.classes, "about": index.about}
    metadata = {"mae_shards": json.dumps(header | {"crc32": index.checksum()})}
    arrays = {key: getattr(index, key) for key in (*_ARRAYS, "names")}
    with atomic_write(path) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, metadata))


def read_index(place: Place) -> Index:
    """The index of a folder of shards.

    Raises:
        UserError: It cannot be read, is damaged, or belongs to a newer version.
    """
    where = place / INDEX
    try:
        data = where.read(reading.INDEX)
    except Exception as error:  # remote places raise errors of any type
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where} cannot be read: {reason}") from None
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["mae_shards"])
        if about["version"] > VERSION:
            raise UserError(f"{where} was written by a newer version of this package ({about['version']} > {VERSION})")
        index = Index(about["files"], **safetensors.numpy.load(data), classes=about["classes"], about=about["about"])
        intact = index.checksum() == about["crc32"] and makes_sense(index)
    except UserError:
        raise
    except Exception:  # json, safetensors and missing keys raise different types
        intact = False
    if not intact:
        raise UserError(f"{where} is damaged; `mae pack` writes the shards anew")
    return index


def makes_sense(index: Index) -> bool:
    """Whether every image has a place, a name and, where there are labels, a class. A right checksum does not say so.

    Whether the shards are so long is not looked at here: records behind the end of a shard are bad images.
    """
    n, names, about = len(index), index.files + index.classes, index.about
    arrays = {key: getattr(index, key) for key in _ARRAYS}
    if not all(isinstance(text, str) for text in names) or not all(map(is_file_name, index.files)):
        return False
    if any(array.dtype != _ARRAYS[key] or array.ndim != 1 for key, array in arrays.items()):
        return False
    if index.names.dtype != np.uint8 or index.names.ndim != 1 or not n:
        return False
    lengths = {key: len(array) for key, array in arrays.items()}
    if any(length != n and (length or key not in ("crc32", "label")) for key, length in lengths.items()):
        return False
    statistics = [value for key in ("mean", "std") for value in about.get(key) or ()]
    return bool(
        index.file[-1] < len(index.files)
        and ascending(index.file)
        and index.offset.min() >= 0
        and index.size.min() >= 0
        and index.size.max() <= MAX_MEMORY
        and index.offset.max() <= 2**62
        and index.name_end[0] >= 0
        and ascending(index.name_end)
        and index.name_end[-1] == len(index.names)
        and (not len(index.label) or 0 <= index.label.min() <= index.label.max() < len(index.classes))
        and all(type(value) in (int, float) and math.isfinite(value) for value in statistics)
        and min(about.get("std") or [0]) >= 0  # 0: of images that are all of one colour
    )


def is_file_name(name: str) -> bool:
    return bool(name) and "/" not in name and "\0" not in name and name not in (".", "..")


def ascending(numbers: np.ndarray) -> bool:
    return bool((numbers[1:] >= numbers[:-1]).all())


class RecordSource(FileSource):
    """Images in a few large files, found by an index.

    Attributes:
        inside: Folder in a tar file that names are relative to, with a slash at its end; else "".
    """

    inside = ""

    def __init__(self, place: Place, index: Index, in_chans: int):
        self.place, self.index, self.in_chans = place, index, in_chans
        self.classes = list(index.classes)
        self.labels: list[int] | None = None
        if len(index.label):
            # One int object per class, not per image: a million of them take 32 MB, again in every loader process.
            numbers = {int(label): int(label) for label in np.unique(index.label)}
            self.labels = [numbers[label] for label in index.label.tolist()]

    def __len__(self) -> int:
        return len(self.index)

    def name(self, index: int) -> str:
        return self.index.name(index)

    def where(self, index: int) -> str:
        return f"{self.place}/{self.index.files[self.index.file[index]]}: {self.inside}{self.name(index)}"

    def read(self, index: int) -> bytes:
        data = next(self.read_all([index]))
        if isinstance(data, BadImage):
            raise data
        return data

    def read_all(self, indices: Sequence[int]) -> Iterator[bytes | BadImage]:
        # From a remote place all at once; on this machine one by one, so that they are not in memory together.
        for chunk in [indices] if self.place.remote else [[index] for index in indices]:
            ranges = [self._range(index) for index in chunk]
            contents = self.place.read_ranges([(name, start, min(size, MAX_MEMORY)) for name, start, size in ranges])
            for index, (_, _, size), data in zip(chunk, ranges, contents, strict=True):
                if size > MAX_MEMORY:
                    data = ValueError(f"it has {size:,} bytes, over the limit of {MAX_MEMORY:,}")
                yield BadImage(self.where(index), str(data)) if isinstance(data, Exception) else data

    def _range(self, index: int) -> Range:
        table = self.index
        return table.files[table.file[index]], int(table.offset[index]), int(table.size[index])


class HeaderReader:
    """Gives the headers of a tar file to tarfile, which believes all sizes in them, and may wait for more for ever.

    What tarfile asks for between two calls of `renew` must not be more than `reading.TAR_HEADER`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell
        self.renew()

    def renew(self) -> None:
        self.left = reading.TAR_HEADER

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header of more than {reading.TAR_HEADER:,} bytes")
        data = self.file.read(size)
        if size > tarfile.BLOCKSIZE and re.search(rb"\d{200}", data):  # tarfile's patterns would take hours for these
            raise tarfile.ReadError("a header with a number of 200 digits")
        return data


@contextmanager
def tar_errors() -> Iterator[None]:
    """Whatever the headers of a tar file make tarfile raise, as its own error."""
    try:
        yield
    except (OSError, tarfile.TarError):
        raise
    except Exception as error:  # RecursionError, ValueError, OverflowError, ...
        raise tarfile.ReadError(f"a damaged header ({type(error).__name__})") from None


def next_member(tar: tarfile.TarFile, headers: HeaderReader) -> tarfile.TarInfo | None:
    """The next member; None at the end.

    Raises:
        tarfile.TarError: A header cannot be right.
    """
    headers.renew()
    with tar_errors():
        member = tar.next()
    tar.members.clear()  # type: ignore[attr-defined]  # it would keep a million of them in memory
    if member is not None and not (member.size >= 0 and member.offset < member.offset_data <= tar.offset):
        raise tarfile.ReadError(f"a size of {member.size:,} bytes at byte {member.offset}")  # it would lead back
    return member


def scan_tar(
    path: Path,
    start: int = 0,
    size: int | None = None,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    leftovers: Leftovers | None = None,
) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of every image in a tar file, without reading the images.

    Args:
        start: First byte of the tar in the file; it may be inside another one.
        size: Size of the tar in bytes (default: up to the end of the file).
        suffixes: Suffixes of the members to return, in lower case.
        leftovers: Gets what else is there, as for `find_images`.

    Raises:
        UserError: The file cannot be read, is damaged or compressed, or an image in it is a link.
    """
    try:
        with open_regular(path) as file:
            end = os.fstat(file.fileno()).st_size if size is None else start + size
            if start == end:
                raise tarfile.ReadError("empty file")
            file.seek(start)
            headers = HeaderReader(file)
            with tar_errors():
                tar = tarfile.open(fileobj=headers, mode="r:")  # type: ignore[call-overload]  # it needs no more
            with tar:
                while (member := next_member(tar, headers)) is not None and member.offset < end:
                    if tar.offset > end:
                        raise tarfile.ReadError("unexpected end of data")
                    name = posixpath.normpath(member.name).lstrip("/")  # as after unpacking
                    if name.startswith("../"):
                        raise UserError(f"{path}: {member.name} would lie outside the folder: unpack the archive")
                    suffix = os.path.splitext(name)[1].lower()
                    *above, last = name.split("/")
                    hidden = next((part for part in above if is_hidden(part)), "")
                    if last.startswith(".") or member.isdir() or hidden or suffix not in suffixes:
                        if leftovers is not None and not is_hidden(last):
                            leftovers.add_member(name, suffix, hidden, member.isdir())
                        continue
                    if not member.isreg() or member.issparse():
                        raise UserError(f"{path}: {member.name} is a link or a sparse file: unpack the archive")
                    yield name, member.offset_data, member.size
                # tarfile takes an unreadable header for the end of the archive and would omit all that follows.
                file.seek(tar.offset)
                if file.read(max(0, min(tarfile.BLOCKSIZE, end - tar.offset))).strip(b"\0"):
                    raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} is not a tar file that can be read: {error}; unpack it if it is compressed") from None


class TarImages:
    """The images in an uncompressed tar file: one scan, of which several sources can be made.

    Attributes:
        records: (0, first byte, size) of each image by its name, sorted. Of several members with one name the last
            counts, as in unpacking.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: There is no image, or as for `scan_tar`.
        """
        self.path, self.leftovers = path, Leftovers()
        found = {name: (0, offset, size) for name, offset, size in scan_tar(path, leftovers=self.leftovers)}
        if not found:
            raise self.leftovers.no_image(path)
        self.records = dict(sorted(found.items()))

    def source(self, in_chans: int, inside: str = "") -> RecordSource:
        """The images in a folder of the tar file, in the order that the unpacked folder would have."""
        prefix = f"{inside}/" if inside else ""
        records = {name[len(prefix) :]: place for name, place in self.records.items() if name.startswith(prefix)}
        leftovers = Leftovers() if inside else replace(self.leftovers)  # counts are of the whole file
        leftovers.folders = {name[len(prefix) :] for name in self.leftovers.folders if name.startswith(prefix)}
        source = record_source(Place(self.path.parent), [self.path.name], records, in_chans, leftovers)
        source.inside = prefix
        return source


def tar_source(path: Path, in_chans: int) -> RecordSource:
    """The images of an uncompressed tar file, in the order that the unpacked folder would have."""
    return TarImages(path).source(in_chans)


def record_source(
    place: Place,
    files: Sequence[str],
    records: dict[str, tuple[int, int, int]],
    in_chans: int,
    leftovers: Leftovers | None = None,
) -> RecordSource:
    """A source of images in files, sorted and labelled by their names as a folder of them would be.

    Args:
        records: By name, (number of the file, first byte, size) of each image.
    """
    names = sorted(records)
    file, offset, size = zip(*(records[name] for name in names), strict=True)
    labels, classes = class_labels(names)
    index = make_index(files, file, offset, size, names, labels=labels, classes=classes)
    source = RecordSource(place, index, in_chans)
    source.leftovers = leftovers or Leftovers()
    note_folders(source, names)
    return source


def open_images(place: Place, in_chans: int) -> FileSource:
    """The images at a place: a folder of shards, a tar file, or a folder of image files.

    Raises:
        UserError: There is none of these, or it holds no images.
    """
    if (place / INDEX).exists():
        return RecordSource(place, read_index(place), in_chans)
    if place.remote:
        raise UserError(f"{place / INDEX} does not exist: from afar only shards can be read (`mae pack` makes them)")
    if place.path.is_file():
        return tar_source(place.path, in_chans)
    if any(place.path.glob("*.tar")) and not find_images(place.path):
        raise UserError(f"{place} holds tar files but no {INDEX}: run the same `mae pack` again to complete the shards")
    return FolderSource(place.path, in_chans)
