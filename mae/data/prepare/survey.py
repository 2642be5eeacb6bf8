"""What the images of a data set are: each read and decoded once, a few bytes kept of it, and figures made of these."""

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mae.data.datasets import WorkerProgress
from mae.data.decode import IMAGE_SUFFIXES, BadImage, moments, open_image
from mae.data.sources import FileSource, FolderSource
from mae.errors import UserError
from mae.runtime.storage import Place

# Formats by content, and the suffixes that promise them; Pillow is asked in this order, as in training.
FORMATS = {
    "JPEG": {".jpg", ".jpeg"},
    "PNG": {".png"},
    "WEBP": {".webp"},
    "BMP": {".bmp"},
    "GIF": {".gif"},
    "TIFF": {".tif", ".tiff"},
    "PPM": {".ppm", ".pgm", ".pbm"},
    "NPY": {".npy"},
}

COLOURS = ("RGB", "grey", "CMYK", "palette", "other")

DECODERS = ("libjpeg-turbo", "Pillow", "numpy")

MARKS = ("alpha", "16 bits", "turned by EXIF", "progressive JPEG", "other suffix")

USUAL, TINY = 224, 32  # images with fewer pixels than these on the short side are counted

CHUNK = 32  # images that a loader process fetches at once from afar and hands back at once

_FIELDS = {"digest": "S16", "height": "u4", "width": "u4", "format": "u1", "colour": "u1", "decoder": "u1"}

RECORD = np.dtype([*_FIELDS.items(), ("marks", "u1")])  # format 0: unreadable, else 1 + place in FORMATS; marks: bits

_MAY_TURN = re.compile(rb"e[Xx]if|Exif|xmp")


class Found(NamedTuple):
    """What a loader process found in some images."""

    records: np.ndarray  # (n,) RECORD
    moments: np.ndarray  # (2, C) float64: mean and mean square of the pixels in [0, 1], summed over the images
    bytes: int
    errors: dict[int, str]  # by index, why it cannot be read


class Examined(Dataset[Found]):
    """Images read once and decoded whole. Items are ranges of indices."""

    def __init__(self, source: FileSource, in_chans: int, workers: int) -> None:
        self.source, self.in_chans, self.progress = source, in_chans, WorkerProgress(source, workers)

    def __getitem__(self, indices: range) -> Found:
        records, sums, size = np.zeros(len(indices), RECORD), np.zeros((2, self.in_chans)), 0
        errors = {}
        files = self.source.read_all(indices)
        for row, index in enumerate(indices):
            self.progress.set(index)
            data = next(files)
            try:
                if isinstance(data, BadImage):
                    raise data
                size += len(data)
                picture = open_image(data, self.source.where(index), self.in_chans)
                pixels = picture.pixels()
            except BadImage as error:
                errors[index] = " ".join(error.reason.split())
                continue
            digest, decoder = hashlib.blake2b(data, digest_size=16).digest(), DECODERS.index(picture.decoder)
            kind, colour, marks = described(data, suffix_of(self.source.name(index)), pixels)
            records[row] = (digest, picture.height, picture.width, kind, colour, decoder, marks)
            sums += np.transpose(moments(pixels))
        return Found(records, sums, size, errors)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def described(data: bytes, suffix: str, pixels: Tensor) -> tuple[int, int, int]:
    """Codes of a readable image's format, colours and marks."""
    if suffix == ".npy":
        name, colour = "NPY", {1: "grey", 3: "RGB"}.get(len(pixels), "other")
        marks = {"16 bits": pixels.dtype == torch.uint16}
    else:
        try:
            name, colour, marks = described_by_pillow(data)
        except Exception:  # of many types: what is readable and not for Pillow is a JPEG that libjpeg-turbo forgave
            name, colour, marks = "JPEG", "other", {}
    marks["other suffix"] = suffix not in FORMATS[name]
    bits = sum(1 << bit for bit, mark in enumerate(MARKS) if marks.get(mark))
    return 1 + list(FORMATS).index(name), COLOURS.index(colour), bits


def described_by_pillow(data: bytes) -> tuple[str, str, dict[str, bool]]:
    """Format, colours and marks from the header of an image file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(BytesIO(data), formats=[name for name in FORMATS if name != "NPY"])
        # Asked for its EXIF, a PNG without any would be decoded to its end in search of some.
        turned = bool(image.format != "PNG" or _MAY_TURN.search(data)) and is_turned(image)
    marks = {
        "alpha": image.has_transparency_data,
        "16 bits": image.mode.startswith("I") or ";16" in str(image.tile),  # how Pillow will unpack the samples
        "turned by EXIF": turned,
        "progressive JPEG": "progressive" in image.info,
    }
    name = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: several JPEGs in one file
    return name, colour_of(image.mode), marks


def is_turned(image: Image.Image) -> bool:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1)) in range(2, 9)
    except Exception:  # of many types where EXIF is damaged: such an image is left as it is
        return False


def colour_of(mode: str) -> str:
    """Of a mode of Pillow."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "grey"
    if mode.startswith("P"):
        return "palette"
    return "CMYK" if mode == "CMYK" else "RGB" if mode.startswith("RGB") else "other"


@dataclass
class Split:
    """What was gathered of a split."""

    place: Place
    source: FileSource
    records: np.ndarray  # (n,) RECORD
    labels: np.ndarray | None  # (n,) int32
    moments: np.ndarray  # (2, C), of the readable images together
    bytes: int
    errors: dict[int, str]  # by index, why it cannot be read
    empty_classes: list[str]
    other_files: dict[str, int]  # that are not images by their suffix; "" is none
    dangling_links: list[str]

    def marked(self, mark: str) -> np.ndarray:
        """(n,) bool"""
        return (self.records["marks"] >> MARKS.index(mark) & 1).astype(bool)

    def below(self, side: int) -> np.ndarray:
        """(n,) bool, readable images with fewer pixels than this on the short side."""
        return (self.records["format"] > 0) & (np.minimum(self.records["height"], self.records["width"]) < side)

    def class_of(self, index: int) -> str | None:
        return None if self.labels is None else self.source.classes[self.labels[index]]


def gather(key: str, place: Place, source: FileSource, in_chans: int, workers: int) -> Split:
    """Read all images of a split, with a progress bar on a terminal.

    Raises:
        UserError: A label is none of the classes.
    """
    labels = None if source.labels is None else np.asarray(source.labels, np.int32)
    if labels is not None and (wrong := labels[(labels < 0) | (labels >= len(source.classes))]).size:
        raise UserError(f"{place}: an image has the label {wrong[0]}, outside its {len(source.classes)} classes")
    records, sums, size, errors = np.zeros(len(source), RECORD), np.zeros((2, in_chans)), 0, {}
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    examined = Examined(source, in_chans, workers)
    loader = DataLoader(examined, sampler=chunks, batch_size=None, num_workers=workers, collate_fn=as_it_is)
    with tqdm(total=len(source), desc=key, unit=" images", disable=None) as bar:
        for chunk, part in zip(chunks, loader, strict=True):
            records[chunk.start : chunk.stop] = part.records
            sums += part.moments
            size += part.bytes
            errors.update(part.errors)
            bar.update(len(chunk))
    other, dangling = Counter[str](), list[str]()
    if isinstance(source, FolderSource):
        other, dangling = rest_of(str(source.root))
        for index in errors:
            if is_dangling(path := source.where(index)):
                errors[index] = f"dangling link to {os.readlink(path)}"
                dangling.append(source.name(index))
    sums /= max(1, len(source) - len(errors))
    empty = empty_classes(source, labels)
    return Split(place, source, records, labels, sums, size, errors, empty, other, sorted(dangling))


def empty_classes(source: FileSource, labels: np.ndarray | None) -> list[str]:
    """Classes, and folders where those of classes lie, without images."""
    if labels is None:
        return []
    counts = np.bincount(labels, minlength=len(source.classes))
    empty = {name for name, count in zip(source.classes, counts, strict=True) if not count}
    if isinstance(source, FolderSource):
        root = source.root
        folders = {name for name in os.listdir(root) if not name.startswith(".") and os.path.isdir(root / name)}
        empty |= folders - set(source.classes)
    return sorted(empty)


def as_it_is(part: Any) -> Any:
    return part  # torch would make tensors of the arrays


def rest_of(root: str) -> tuple[Counter[str], list[str]]:
    """Files below a folder that are not images by their suffix, counted by it, and those of them that link to nothing.

    As among the images hidden ones are left out and links to folders are followed.
    """
    other, dangling, seen = Counter[str](), [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # by another link, or one that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith(".") or suffix_of(name) in IMAGE_SUFFIXES:
                continue
            if is_dangling(path := os.path.join(folder, name)):
                dangling.append(os.path.relpath(path, root))
            else:
                other[suffix_of(name)] += 1
    return other, dangling


def is_dangling(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


@dataclass
class Groups:
    """Readable images of the same bytes. Images are numbered through the splits, training first.

    Attributes:
        members: (m,) int64, group after group, ascending within.
        starts, sizes: (g,) int64, of each group in there.
        held_out: (g,) int64, images of the group that are held out.
        contrary: (g,) bool, the same bytes under different classes.
    """

    members: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    held_out: np.ndarray
    contrary: np.ndarray

    @property
    def leaked(self) -> np.ndarray:
        """(g,) bool, among training and held-out images."""
        return (self.held_out > 0) & (self.held_out < self.sizes)

    def counts(self) -> dict[str, int]:
        """Groups, held-out images that are training images as well, groups with several classes."""
        held_out, contrary = int(self.held_out[self.leaked].sum()), int(self.contrary.sum())
        return {"groups": len(self.starts), "held_out_in_train": held_out, "under_several_classes": contrary}

    def copies(self, key: str) -> int:
        """Images of a split that repeat an earlier one of it."""
        inside = self.held_out if key == "val" else self.sizes - self.held_out
        return int(np.maximum(inside - 1, 0).sum())

    def chosen(self, which: np.ndarray) -> Iterator[list[int]]:
        """The members of these groups, by their first."""
        found = np.flatnonzero(which)
        for group in found[np.argsort(self.members[self.starts[found]])]:
            yield self.members[self.starts[group] : self.starts[group] + self.sizes[group]].tolist()


def same_bytes(splits: Sequence[Split]) -> Groups:
    """Groups of images that are the same files; one or two splits."""
    readable = np.flatnonzero(np.concatenate([split.records["format"] for split in splits]))
    digests = np.concatenate([split.records["digest"][split.records["format"] > 0] for split in splits])
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    repeats, repeated = np.zeros((2, len(order)), bool)
    repeats[1:] = repeated[:-1] = digests[1:] == digests[:-1]
    grouped = repeats | repeated
    members, starts = readable[order[grouped]], np.flatnonzero(~repeats[grouped])
    classes = sorted({name for split in splits for name in split.source.classes})
    label = np.concatenate([numbered(split, classes) for split in splits])[members]
    lowest, highest = np.minimum.reduceat(label, starts), np.maximum.reduceat(label, starts)
    held_out = np.add.reduceat((members >= len(splits[0].records)).astype(np.int64), starts)
    sizes = np.diff(starts, append=len(members))
    return Groups(members, starts, sizes, held_out, (lowest != highest) & (lowest >= 0))


def numbered(split: Split, classes: Sequence[str]) -> np.ndarray:
    """(n,) int32: place in `classes` of each image's class, -1 where there are no labels."""
    if split.labels is None:
        return np.full(len(split.records), -1, np.int32)
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[name] for name in split.source.classes], np.int32)[split.labels]


@dataclass
class Figures:
    """What is in a split. Images, bytes and classes are of all its images, the rest of the readable ones."""

    place: str
    images: int
    bytes: int
    unreadable: dict[str, str]  # by name, why
    classes: dict[str, int]  # images of each; empty where there are no labels
    per_class: dict[str, float]  # fewest, median, most of these, and ratio of most to fewest
    empty_classes: list[str]
    beside_classes: int  # images beside folders of images: because of them there are no labels
    formats: dict[str, int]
    colours: dict[str, int]
    marks: dict[str, int]
    decoders: dict[str, int]
    sizes: dict[str, list[int]]  # [height, width]: smallest and largest by area; median of either
    small: dict[int, int]  # images with fewer pixels than this on the short side
    copies: int  # images that repeat the bytes of an earlier one
    mean: list[float]
    std: list[float]
    other_files: dict[str, int]
    dangling_links: list[str]


def figures(split: Split, copies: int) -> Figures:
    source, records = split.source, split.records[split.records["format"] > 0]
    counts = [] if split.labels is None else np.bincount(split.labels, minlength=len(source.classes)).tolist()
    filled = sorted(count for count in counts if count)
    per_class = {"fewest": filled[0], "median": float(np.median(filled)), "most": filled[-1]} if filled else {}
    top = 0 if split.labels is not None else sum("/" not in source.name(i) for i in range(len(source)))
    by_area = np.argsort(records["height"].astype(np.int64) * records["width"], kind="stable")
    sizes = {}
    if len(records):
        smallest, largest = ([int(records[i][side]) for side in ("height", "width")] for i in by_area[[0, -1]])
        median = [int(np.median(records[side])) for side in ("height", "width")]
        sizes = {"smallest": smallest, "median": median, "largest": largest}
    mean, square = split.moments if len(records) else np.zeros((2, 0))
    return Figures(
        place=str(split.place),
        images=len(source),
        bytes=split.bytes,
        unreadable={source.name(index): reason for index, reason in split.errors.items()},
        classes={name: count for name, count in zip(source.classes, counts, strict=True) if count},
        per_class=per_class | ({"ratio": filled[-1] / filled[0]} if filled else {}),
        empty_classes=split.empty_classes,
        beside_classes=top if top < len(source) else 0,
        formats=tally(("", *FORMATS), records["format"]),
        colours=tally(COLOURS, records["colour"]),
        marks={mark: count for mark in MARKS if (count := int(split.marked(mark).sum()))},
        decoders=tally(DECODERS, records["decoder"]),
        sizes=sizes,
        small={side: int(split.below(side).sum()) for side in (USUAL, TINY)},
        copies=copies,
        mean=mean.tolist(),
        std=np.sqrt(np.maximum(square - mean**2, 0)).tolist(),
        other_files=dict(split.other_files),
        dangling_links=split.dangling_links,
    )


def tally(names: Sequence[str], codes: np.ndarray) -> dict[str, int]:
    """How often each code occurs, the most frequent first."""
    counts = Counter(
        {name: int(n) for name, n in zip(names, np.bincount(codes, minlength=len(names)), strict=True) if n}
    )
    return dict(counts.most_common())
