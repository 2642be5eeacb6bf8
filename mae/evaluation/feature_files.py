"""The file that `mae embed` leaves, put together from its parts, one after the other: npz or Parquet."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from mae.evaluation.embed_chunks import FeatureChunks


class Rows(Protocol):
    """What is said of an image, by its number."""

    labelled: bool

    def path(self, index: int) -> str: ...

    def label(self, index: int) -> str | None: ...


def write_npz(path: Path, parts: FeatureChunks, source: Rows) -> None:
    """Arrays path, label where there are labels ("" for none), the features, and about (JSON)."""
    count, widest, longest = 0, 1, 1
    for rows, _ in parts.read("rows"):
        count += len(rows)
        widest = max([widest, *(len(source.path(row)) for row in rows)])
        longest = max([longest, *(len(source.label(row) or "") for row in rows)])

    def texts(text: Callable[[int], str], width: int) -> Iterator[np.ndarray]:
        for rows, _ in parts.read("rows"):
            yield np.array([text(row) for row in rows], f"<U{width}")

    with zipfile.ZipFile(path, "w") as archive:
        add_array(archive, "path", f"<U{widest}", (count,), texts(source.path, widest))
        if source.labelled:
            chunks = texts(lambda row: source.label(row) or "", longest)
            add_array(archive, "label", f"<U{longest}", (count,), chunks)
        for name in parts.columns:
            dtype = np.dtype(parts.about["dtype"]).newbyteorder("<")
            shape = (count, parts.about["width"])
            add_array(archive, name, dtype.str, shape, (values.astype(dtype) for _, values in parts.read(name)))
        about = np.array(parts.text)
        add_array(archive, "about", about.dtype.str, (), iter([about]))


def add_array(
    archive: zipfile.ZipFile, name: str, descr: str, shape: tuple[int, ...], chunks: Iterator[np.ndarray]
) -> None:
    """An array whose rows come in chunks, as a member that `numpy.load` knows."""
    member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same bytes whenever they are written
    with archive.open(member, "w", force_zip64=True) as file:
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        for chunk in chunks:
            file.write(chunk.tobytes())


def write_parquet(path: Path, parts: FeatureChunks, source: Rows) -> None:
    """Columns path, label where there are labels, the features; a row group a part; `about` in the metadata."""
    import pyarrow as pa  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from pyarrow import parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]

    width, texts = parts.about["width"], ["path", "label"] if source.labelled else ["path"]
    value = {"float32": pa.float32(), "float16": pa.float16()}[parts.about["dtype"]]
    fields = [pa.field(name, pa.string()) for name in texts]
    fields += [pa.field(name, pa.list_(value, width)) for name in parts.columns]
    schema = pa.schema(fields, metadata={"about": parts.text})
    settings = {"compression": "zstd", "use_dictionary": ["label"], "write_statistics": ["path", "label"]}
    with parquet.ParquetWriter(path, schema, **settings) as writer:
        for read in zip(*(parts.read(name) for name in parts.columns), strict=True):
            rows = read[0][0].tolist()
            columns = [[source.path(row) for row in rows], [source.label(row) for row in rows]][: len(texts)]
            columns += [pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width) for _, values in read]
            if rows:
                writer.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))


WRITERS: dict[str, Callable[[Path, FeatureChunks, Rows], None]] = {".parquet": write_parquet, ".npz": write_npz}
