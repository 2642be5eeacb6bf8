"""`mae pack --verify`: compare shards with their index byte by byte, decode every image, and name what is damaged."""

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from mae.data.datasets import WorkerProgress, default_workers
from mae.data.decode import BadImage
from mae.data.loaders import Loader
from mae.data.prepare.survey import CHUNK
from mae.data.prepare.tar_writer import MARK, image_suffix, key, member, padded, written_files
from mae.data.tar_shards import INDEX, Index, RecordSource, read_index
from mae.errors import UserError
from mae.runtime.reading import open_regular
from mae.runtime.storage import Place

BLOCK = tarfile.BLOCKSIZE


class DecodedRecords(Dataset[Any]):
    """Why images of shards cannot be decoded whole, by index. Items are ranges of indices."""

    def __init__(self, source: RecordSource, workers: int) -> None:
        self.source, self.progress = source, WorkerProgress(source, workers)

    def __getitem__(self, indices: range) -> dict[int, str]:
        errors = {}
        for index in indices:
            self.progress.set(index)
            try:
                self.source.open(index).pixels()
            except BadImage as error:
                errors[index] = error.reason
        return errors


def verify_shards(dst: Path, in_chans: int = 3, num_workers: int | None = None) -> None:
    """Read all shards of a folder, or of the folders in it, and name each damaged record.

    Args:
        in_chans: Channels of images whose index does not tell.
        num_workers: Loader processes that decode; None: one a spare core.

    Raises:
        UserError: A record is damaged, more images cannot be decoded than when they were packed, or there is no shard.
    """
    if not dst.is_dir():
        raise UserError(f"--verify {dst} does not exist or is not a folder")
    folders = {"": dst} if begun(dst) else {f"{path.name}/": path for path in sorted(dst.glob("*"))}
    folders = {title: folder for title, folder in folders.items() if begun(folder)}
    if not folders:
        raise UserError(f"--verify {dst} holds no shards")
    damaged = undecoded = known = total = shards = broken = 0
    workers = default_workers() if num_workers is None else num_workers
    for title, folder in folders.items():
        try:
            index = read_index(Place(folder))
        except UserError as error:
            tqdm.write(str(error))
            broken += 1
            continue
        total, shards = total + len(index), shards + len(index.files)

        def name(i: int, wrong: str, title: str = title, index: Index = index) -> None:
            tqdm.write(str(BadImage(f"{title}{index.files[index.file[i]]}: {index.name(i)}", wrong)))

        found = set()
        with tqdm(total=len(index), desc=title or None, unit="image", disable=None, dynamic_ncols=True) as bar:
            for i, damage in find_damage(folder, index, bar.update):
                name(i, damage)
                found.add(i)
        damaged, known = damaged + len(found), known + index.about.get("bad_images", 0)
        source = RecordSource(Place(folder), index, len(index.about.get("mean") or [0] * in_chans))
        chunks = [range(start, min(start + CHUNK, len(index))) for start in range(0, len(index), CHUNK)]
        loader = Loader(DecodedRecords(source, workers), sampler=chunks, batch_size=None, num_workers=workers)
        with tqdm(total=len(index), desc=f"{title}decoded", unit="image", disable=None, dynamic_ncols=True) as bar:
            for errors in loader:
                for i in sorted(errors.keys() - found):
                    name(i, f"cannot be decoded: {errors[i]}")
                    undecoded += 1
                bar.update(CHUNK)
    problems = [f"{damaged} of {total} records are damaged"] if damaged else []
    problems += [f"{undecoded} of {total} images cannot be decoded"] if undecoded > known else []
    problems += [f"{broken} of {len(folders)} folders have no index that can be used"] if broken else []
    if problems:
        raise UserError(f"{' and '.join(problems)} in {dst}: pack or copy the shards anew")
    unreadable = f", {undecoded} of them unreadable since they were packed" if undecoded else ""
    print(f"{total} records in {shards} shards: intact{unreadable}", flush=True)


def begun(folder: Path) -> bool:
    """Whether shards have been written here, or an interrupted run was about to."""
    return bool(written_files(folder)) or (folder / MARK).exists()


def find_damage(folder: Path, index: Index, progress: Callable[[], Any] = lambda: None) -> Iterator[tuple[int, str]]:
    """The number of every damaged record and what is wrong with it; `progress` is called after every record."""
    if len(index.crc32) != len(index):
        raise UserError(f"{folder / INDEX} holds no checksums: `mae pack` writes them")
    ends = np.searchsorted(index.file, np.arange(len(index.files)), side="right").tolist()
    for name, start, end in zip(index.files, [0, *ends], ends, strict=False):
        try:
            file = open_regular(folder / name)
        except OSError as error:
            for i in range(start, end):
                yield i, f"the shard cannot be opened: {error.strerror}"
                progress()
            continue
        with file:
            for i in range(start, end):
                try:
                    damage = record_damage(file, index, i)
                    if not damage and i == end - 1 and not has_valid_end(file):
                        damage = ["the end of the tar file after it is damaged"]
                except OSError as error:
                    damage = [f"cannot be read: {error.strerror}"]
                if damage:
                    yield i, ", ".join(damage)
                progress()


def record_damage(file: BinaryIO, index: Index, i: int) -> list[str]:
    """What is wrong with a record of a shard; leaves the file at the end of the record."""
    size, start = int(index.size[i]), int(index.offset[i]) - BLOCK
    left = os.fstat(file.fileno()).st_size - start
    if left < BLOCK + size:  # before memory is taken for it
        return ["the shard ends within it" if left > 0 else "the shard ends before it"]
    file.seek(max(0, start))
    header, data = file.read(BLOCK), file.read(size)
    # An image that was encoded anew has another suffix than its name.
    damage = header_damage(header, [f"{key(i)}.{suffix}" for suffix in (image_suffix(index.name(i)), "jpg")], size)
    if zlib.crc32(data) != index.crc32[i]:
        damage.append("its bytes differ from the checksum")
    if any(file.read(padded(size) - size)):
        damage.append("the padding after it is damaged")
    if len(index.label):
        label = str(index.label[i]).encode()
        damage += [f".cls: {text}" for text in header_damage(file.read(BLOCK), [f"{key(i)}.cls"], len(label))]
        if (content := file.read(BLOCK)) != label.ljust(BLOCK, b"\0"):
            damage.append(f".cls: holds {content.rstrip(bytes(1))[:20]!r}, the index says {index.label[i]}")
    return damage


def header_damage(header: bytes, names: Sequence[str], size: int) -> list[str]:
    """What is wrong with the tar header of a member that should have one of these names."""
    if header in [member(name, size).tobuf(tarfile.USTAR_FORMAT) for name in names]:
        return []
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return [f"its tar header is damaged ({error})"]
    if info.name not in names or info.size != size:
        return [f"its tar header says {info.name!r} of {info.size} bytes, the index {names[0]!r} of {size}"]
    return ["its tar header is damaged"]


def has_valid_end(file: BinaryIO) -> bool:
    """Whether a tar file, whose last record has been read, ends with the right number of zeros."""
    position = file.tell()
    zeros = padded(position + 2 * BLOCK, tarfile.RECORDSIZE) - position
    return file.read(zeros + 1) == bytes(zeros)
