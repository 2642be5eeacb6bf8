"""What `mae embed` has computed so far, chunk by chunk in a folder beside the output file, and the file made of it.

A chunk is complete or absent, and names the settings it was computed with: chunks of different settings never mix.
"""

import hashlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mae.errors import UserError
from mae.options import out_file, require_utf8
from mae.runtime.environment import is_first_rank
from mae.runtime.files import (
    atomic_write,
    atomic_write_text,
    clear_partial,
    exclusive_lock,
    open_own_file,
    os_errors_as_user_errors,
    sync,
)
from mae.runtime.reading import SETTINGS, open_regular, read_regular
from mae.runtime.run_files import settings_in

ABOUT, LOCK = "about.json", "lock"  # beside the chunks: their settings; the lock of the process that writes them

CHUNKS = "[0-9]*.safetensors"

one_line_errors = partial(
    os_errors_as_user_errors, hint="what is there is kept for the next start", also=SafetensorError
)


def checked_out(path: str, force: bool) -> Path:
    """The file to write, checked before there is any work for it.

    Raises:
        UserError: The format is unknown, or the file cannot be written or exists already.
    """
    require_utf8(path, "--out")
    out = out_file(path)
    if out.suffix not in WRITERS:
        raise UserError(f"--out {out}: the suffix names the format, which must be {' or '.join(WRITERS)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f'--out {out}: Parquet needs the package pyarrow: pip install "vit-mae-lightning[embed]", or give a .npz'
        )
    # Settings in the folder are those of an earlier start, which was allowed to write the file.
    if is_first_rank() and out.exists() and not force and not (chunk_folder(out) / ABOUT).exists():
        raise UserError(f"--out {out} exists already: --force true replaces it")
    return out


def chunk_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


class Images(Protocol):
    """Names and labels of the images, by number."""

    labelled: bool

    def path(self, index: int) -> str: ...

    def label(self, index: int) -> str | None: ...


class FeatureChunks:
    """The chunks of one output file.

    Args:
        out: The output file.
        about: All settings that the features depend on.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about, self.folder = out, about, chunk_folder(out)
        self.text = json.dumps(about)
        self.size = about["batch_size"] * about["batches_per_part"]
        self.count = -(-about["images"] // self.size)
        self.key = hashlib.blake2b(self.text.encode(), digest_size=8).hexdigest()
        layers = about["layers"]
        self.columns = ["features"] if len(layers) == 1 else [f"features_{layer}" for layer in layers]
        self.bad_list = out.with_name(f"{out.name}.bad.txt")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes off the folder, which is removed at the end if it is empty.

        Raises:
            UserError: Another process works in it, or it cannot be made.
        """
        with one_line_errors(self.folder):
            if self.folder.is_symlink():
                raise UserError(f"{self.folder} is a link, where our own folder is wanted: remove it")
            self.folder.mkdir(exist_ok=True)
            os.close(open_own_file(self.folder / LOCK))
        with exclusive_lock(self.folder / LOCK, "mae embed", ": wait for it, or give another --out"):
            try:
                yield
            finally:
                with suppress(OSError):
                    if [path.name for path in self.folder.iterdir()] == [LOCK]:
                        (self.folder / LOCK).unlink()
                        self.folder.rmdir()

    def begin(self, force: bool) -> None:
        """Prepare the folder for these settings.

        Raises:
            UserError: It holds chunks of other settings, and they are not to be thrown away.
        """
        with one_line_errors(self.folder):
            clear_partial(self.folder)
            earlier: dict[str, Any] = {}
            with suppress(FileNotFoundError, ValueError):
                earlier = settings_in(read_regular(self.folder / ABOUT, SETTINGS))
            if earlier != self.about and any(self.folder.glob(CHUNKS)):
                if not force:
                    keys = [key for key in self.about | earlier if earlier.get(key) != self.about.get(key)]
                    changes = "; ".join(f"{key} {earlier.get(key)}, here {self.about.get(key)}" for key in keys)
                    raise UserError(
                        f"{self.folder} holds parts of an unfinished `mae embed` with other settings ({changes}): the "
                        "same settings again complete it, --force true starts over"
                    )
                self.clear()
            atomic_write_text(self.folder / ABOUT, self.text)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def missing(self) -> list[int]:
        return [number for number in range(self.count) if self._bad_images(number) is None]

    def batches(self, number: int) -> list[range]:
        """Numbers of the images of a chunk, batch by batch."""
        size = self.about["batch_size"]
        first, end = number * self.size, min((number + 1) * self.size, self.about["images"])
        return [range(start, min(start + size, end)) for start in range(first, end, size)]

    def images(self, numbers: list[int]) -> int:
        return sum(len(batch) for number in numbers for batch in self.batches(number))

    def _bad_images(self, number: int) -> list[tuple[int, str]] | None:
        """Unreadable images of a chunk; None if it is absent, damaged or of other settings."""
        expected = sum(map(len, self.batches(number)))
        try:
            open_regular(self.path(number)).close()  # a pipe would be waited for
            with safe_open(self.path(number), "np") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                bad = [(int(index), str(reason)) for index, reason in json.loads(metadata["bad"])]
                shapes = [file.get_slice(name).get_shape() for name in ("rows", *self.columns)]
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            return None
        except OSError as error:
            raise UserError(f"{self.path(number)} cannot be read: {error.strerror}; remove it") from None
        rows = expected - len(bad)
        return bad if shapes == [[rows], *([rows, self.about["width"]] for _ in self.columns)] else None

    def bad(self) -> list[tuple[int, str]]:
        """Number and reason of the unreadable images in the chunks so far."""
        return [image for number in range(self.count) for image in self._bad_images(number) or []]

    def write(self, number: int, rows: Tensor, columns: dict[str, Tensor], bad: list[tuple[int, str]]) -> None:
        """Write the (n, D) features by name of the images `rows`, (n,) int64; `bad`: those left out, and why."""
        path, metadata = self.path(number), {"key": self.key, "bad": json.dumps(bad)}
        with one_line_errors(path), atomic_write(path) as partial:
            save_file({"rows": rows, **columns}, partial, metadata)

    def read(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (n,) and one of the tensors of each chunk."""
        for number in range(self.count):
            with safe_open(self.path(number), "np") as file:
                yield file.get_tensor("rows"), file.get_tensor(name)

    def finish(self, images: Images, bad_list: str) -> None:
        """Make the output file of the chunks, and a file beside it that lists the unreadable images, if any."""
        with one_line_errors(self.out):
            if bad_list:
                atomic_write_text(self.bad_list, bad_list)
            else:
                self.bad_list.unlink(missing_ok=True)
            with atomic_write(self.out) as partial:
                WRITERS[self.out.suffix](partial, self, images)
            sync(self.out.parent)

    def clear(self) -> None:
        """Remove the chunks, and then their settings."""
        for pattern in (CHUNKS, ABOUT):
            for path in self.folder.glob(pattern):
                path.unlink()


def write_npz(path: Path, chunks: FeatureChunks, images: Images) -> None:
    """Arrays path, label where there are labels ("" for none), the features, and about (JSON)."""
    rows = np.concatenate([rows for rows, _ in chunks.read("rows")])
    texts: dict[str, Callable[[int], str]] = {"path": images.path}
    if images.labelled:
        texts["label"] = lambda row: images.label(row) or ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in texts.items():
            dtype = np.dtype(f"<U{max(1, max(map(len, map(text, rows)), default=0))}")
            values = (np.array([text(row) for row in some], dtype) for some, _ in chunks.read("rows"))
            add_array(archive, name, dtype, (len(rows),), values)
        dtype, shape = np.dtype(chunks.about["dtype"]).newbyteorder("<"), (len(rows), chunks.about["width"])
        for name in chunks.columns:
            add_array(archive, name, dtype, shape, (values.astype(dtype) for _, values in chunks.read(name)))
        about = np.array(chunks.text)
        add_array(archive, "about", about.dtype, (), iter([about]))


def add_array(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], chunks: Iterator[np.ndarray]
) -> None:
    """Add an array whose rows come in chunks, as a member that `numpy.load` reads."""
    member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same bytes whenever they are written
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        for chunk in chunks:
            file.write(chunk.tobytes())


def write_parquet(path: Path, chunks: FeatureChunks, images: Images) -> None:
    """Columns path, label where there are labels, the features; a row group per chunk; `about` in the metadata."""
    import pyarrow as pa  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from pyarrow import parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]

    width, texts = chunks.about["width"], ["path", "label"] if images.labelled else ["path"]
    value = {"float32": pa.float32(), "float16": pa.float16()}[chunks.about["dtype"]]
    fields = [pa.field(name, pa.string()) for name in texts]
    fields += [pa.field(name, pa.list_(value, width)) for name in chunks.columns]
    schema = pa.schema(fields, metadata={"about": chunks.text})
    settings = {"compression": "zstd", "use_dictionary": ["label"], "write_statistics": ["path", "label"]}
    with parquet.ParquetWriter(path, schema, **settings) as writer:
        for tensors in zip(*(chunks.read(name) for name in chunks.columns), strict=True):
            rows = tensors[0][0].tolist()
            columns = [[images.path(row) for row in rows], [images.label(row) for row in rows]][: len(texts)]
            columns += [pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width) for _, values in tensors]
            if rows:
                writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))


WRITERS: dict[str, Callable[[Path, FeatureChunks, Images], None]] = {".parquet": write_parquet, ".npz": write_npz}
