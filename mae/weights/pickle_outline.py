"""What a file of torch asks for and claims, read from its pickle without running anything that it names."""

import contextlib
import pickle
import pickletools
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae.runtime.reading import PICKLE, open_regular


class Outline(NamedTuple):
    """What a file of torch asks for, found without running anything in it and without reading its tensors."""

    is_zip: bool
    classes: list[str]  # that its pickle would import
    wrong: str  # why it cannot be whole, or ""


class Stub:
    """Stands for every class and function that a pickle names. Whatever the pickle does with it, nothing happens."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _ignore(self, *args: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = __call__ = _ignore


class OutlineReader(pickle.Unpickler):
    """
    Attributes:
        classes: The classes that the pickles up to here name.
        storages: By key, how many bytes the tensors' memory takes, as the pickles have it.
    """

    def __init__(self, stream: BytesIO) -> None:
        super().__init__(stream)
        self.stream = stream
        self.classes: dict[str, None] = {}
        self.storages: dict[str, int] = {}

    def next(self) -> Any:
        """The next value of the stream."""
        start, wrong = self.stream.tell(), None
        with contextlib.suppress(Exception):  # of a damaged pickle, what comes before counts
            for i, (operation, number, _) in enumerate(pickletools.genops(self.stream)):
                if operation.name in ("PUT", "LONG_BINPUT") and int(number or 0) > i:
                    wrong = f"step {i} of its pickle stores value {number}"
                    break
        if wrong:  # the unpickler would take memory for all numbers below this one
            raise ValueError(wrong)
        self.stream.seek(start)
        return self.load()

    def find_class(self, module: str, name: str) -> Any:
        self.classes[f"{module}.{name}"] = None
        return type(name, (Stub,), {})

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, where, count = pid[:5]
        dtype = DTYPES.get(storage.__name__.removesuffix("Storage"), torch.uint8)
        if kind != "storage" or type(count) is not int:
            raise ValueError(f"{count!r} numbers in a tensor")
        self.storages[str(key)] = 0 if where == "meta" else count * dtype.itemsize
        return Stub()


# By how torch calls their memory: FloatStorage, ...
DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16},
}


def read_outline(path: Path) -> Outline:
    size, is_zip = path.stat().st_size, False
    wrong = ""
    try:
        with open_regular(path) as file:
            is_zip = file.read(2) == b"PK"
            file.seek(0)
            pickles = pickle_in(zipfile.ZipFile(file)) if is_zip else file.read(min(size, PICKLE))
    except Exception as error:  # whatever a damaged archive makes zipfile raise
        return Outline(is_zip, [], str(error) or type(error).__name__)
    outline = OutlineReader(BytesIO(pickles))
    try:
        first = outline.next()
        if not is_zip and first != torch.serialization.MAGIC_NUMBER:
            wrong = "it is a pickle, but not of torch"
        for _ in range(3 if not is_zip and not wrong else 0):  # the version, sizes of numbers, and the content
            outline.next()
    except Exception as error:  # whatever a damaged pickle raises; up to there it counts
        if not is_zip:  # whose tensors are mapped: torch may judge
            wrong = str(error) or type(error).__name__
    claimed = sum(outline.storages.values())
    if not wrong and claimed > size:
        wrong = f"its tensors take {claimed:,} bytes, the file has {size:,}"
    return Outline(is_zip, list(outline.classes), " ".join(wrong.split()))


def pickle_in(archive: zipfile.ZipFile) -> bytes:
    """The values in a checkpoint of torch, which is a zip archive."""
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError("a zip archive without data.pkl")
    if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"{packed[0]} is compressed, as torch does not write it")
    if (size := archive.getinfo(names[0]).file_size) > PICKLE:
        raise ValueError(f"{names[0]} has {size:,} bytes, over the limit of {PICKLE:,}")
    with contextlib.suppress(zipfile.BadZipFile):  # of a writer that leaves out checksums
        return archive.read(names[0])
    return b""
