"""Survey of a data set: every image is read and decoded once, and statistics are made from a few bytes about each."""

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from mae.data import image_files
from mae.data.channel_stats import extremes, mean_and_std, moments
from mae.data.datasets import WorkerProgress
from mae.data.decode import BadImage, Picture, is_turned, open_image, read_pillow_header
from mae.data.image_files import IMAGE_SUFFIXES, walk_files
from mae.data.loaders import Loader, unchanged
from mae.data.sources import FileSource, FolderSource
from mae.errors import UserError
from mae.runtime.storage import Place
from mae.runtime.text import escaped, printable

FORMATS = {**image_files.FORMATS, "NPY": {".npy"}}  # by content, with the suffixes of each

COLOURS = ("RGB", "grey", "CMYK", "palette", "other")

DECODERS = ("libjpeg-turbo", "Pillow", "numpy", "tifffile")

MARKS = (
    *("alpha", "16 bits", "turned by EXIF", "progressive JPEG", "other suffix", "several frames"),
    *("int16", "float32"),  # of samples, as in `Picture.kind`
)

USUAL, TINY = 224, 32  # pixels; images with a shorter short side are counted

NO_EXTENT = (np.inf, -np.inf)  # of no images

CHUNK = 32  # images that a loader process fetches and returns at once

# Of one image. format: 0 if unreadable, else 1 + its place in FORMATS; marks: one bit for each of MARKS; top: the
# largest sample of unsigned 16 bits, 0 of other images.
RECORD = np.dtype(
    [("digest", "S16"), ("height", "u4"), ("width", "u4"), ("top", "u2")]
    + [(key, "u1") for key in ("format", "colour", "decoder", "marks")]
)

_MAY_TURN = re.compile(rb"e[Xx]if|Exif|xmp")


class SurveyedImages(Dataset[Any]):
    """Images, each read once and decoded whole. Items are ranges of indices.

    Of each range it gives the (n,) RECORDs, the (C, 2) sum of the moments of its images, the (C, 2) smallest and
    largest sample of each channel, their bytes, and by index why an image cannot be read.
    """

    def __init__(self, source: FileSource, in_chans: int, workers: int) -> None:
        self.source, self.in_chans, self.progress = source, in_chans, WorkerProgress(source, workers)

    def __getitem__(self, indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, dict[int, str]]:
        records, sums, size = np.zeros(len(indices), RECORD), np.zeros((self.in_chans, 2)), 0
        extent = np.full((self.in_chans, 2), NO_EXTENT)
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
            image_format, colour, marks = format_codes(data, suffix_of(self.source.name(index)), picture)
            low, high = extremes(pixels)
            top = largest_sample(picture.kind, high.max()) if marks >> MARKS.index("16 bits") & 1 else 0
            records[row] = (digest, picture.height, picture.width, top, image_format, colour, decoder, marks)
            sums += moments(pixels)
            extent = join_extents(extent, np.stack([low, high], axis=1))
        return records, sums, extent, size, errors


def largest_sample(kind: str, top: float) -> int:
    """The largest sample of a file of unsigned 16 bits, by that of the decoded image in [0, 1].

    Where it was rounded to 8 bits, it is the least that became this value.
    """
    if kind == "int16":
        return 0
    return round(top * 65535) if kind == "uint16" else max(0, round(top * 65535) - 128)


def join_extents(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(C, 2): the smallest and the largest sample of each channel in two sets of images."""
    return np.stack([np.minimum(a[:, 0], b[:, 0]), np.maximum(a[:, 1], b[:, 1])], axis=1)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def format_codes(data: bytes, suffix: str, picture: Picture) -> tuple[int, int, int]:
    """The codes in RECORD of a readable image's format, colour and marks."""
    by_bands = {1: "grey", 3: "RGB"}.get(len(picture.pixels()), "other")
    marks: dict[str, bool] = {}
    if suffix == ".npy":
        name, colour = "NPY", by_bands
    elif picture.decoder == "tifffile":
        name, colour = "TIFF", by_bands
    else:
        try:
            name, colour, marks = read_format(data)
        except Exception:  # of any type: an image that only libjpeg-turbo can read is a JPEG
            name, colour = "JPEG", "other"
    if name == "TIFF":
        from mae.data import tiff  # as in `decode`

        marks["several frames"] = tiff.frames(data) > 1
    marks["16 bits"] = marks.get("16 bits", False) or picture.kind in ("uint16", "int16")
    marks |= {kind: picture.kind == kind for kind in ("int16", "float32")}
    marks["other suffix"] = suffix not in FORMATS[name]
    bits = sum(1 << bit for bit, mark in enumerate(MARKS) if marks.get(mark))
    return 1 + list(FORMATS).index(name), COLOURS.index(colour), bits


def read_format(data: bytes) -> tuple[str, str, dict[str, bool]]:
    """Format, colour and marks of an image file, from its header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = read_pillow_header(data)
        # To look for the EXIF of a PNG that has none, Pillow would decode it to its end.
        turned = bool(image.format != "PNG" or _MAY_TURN.search(data)) and is_turned(image)
    marks = {
        "alpha": image.has_transparency_data,
        # The second: how Pillow will unpack the samples.
        "16 bits": image.mode.startswith("I") or ";16" in str(getattr(image, "tile", "")),
        "turned by EXIF": turned,
        "progressive JPEG": "progressive" in image.info,
        "several frames": image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False),
    }
    name = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: several JPEGs in one file
    return name, colour_of(image.mode), marks


def colour_of(mode: str) -> str:
    """The colour of a Pillow mode, one of COLOURS."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "grey"
    if mode.startswith("P"):
        return "palette"
    return "CMYK" if mode == "CMYK" else "RGB" if mode.startswith("RGB") else "other"


@dataclass
class SplitSurvey:
    """What is known about the images of a split."""

    place: Place
    source: FileSource
    records: np.ndarray  # (n,) RECORD
    labels: np.ndarray | None  # (n,) int32
    moments: np.ndarray  # (C, 2), summed over the readable images
    extent: np.ndarray  # (C, 2), smallest and largest sample of each channel, scaled as for `moments`
    bytes: int
    errors: dict[int, str]  # by index, why the image cannot be read
    empty_classes: list[str]
    other_files: dict[str, int]  # by suffix ("" is none), the number of files that are not images
    dangling_links: list[str]

    def marked(self, mark: str) -> np.ndarray:
        """(n,) bool, images with one of MARKS."""
        return (self.records["marks"] >> MARKS.index(mark) & 1).astype(bool)

    def below(self, side: int) -> np.ndarray:
        """(n,) bool, readable images with fewer than `side` pixels on the short side."""
        return (self.records["format"] > 0) & (np.minimum(self.records["height"], self.records["width"]) < side)

    def class_of(self, index: int) -> str | None:
        return None if self.labels is None else self.source.classes[self.labels[index]]


def survey_split(key: str, place: Place, source: FileSource, in_chans: int, workers: int) -> SplitSurvey:
    """Read all images of a split, with a progress bar if this is a terminal.

    Raises:
        UserError: A label is none of the classes.
    """
    labels = None if source.labels is None else np.asarray(source.labels, np.int32)
    if labels is not None and (wrong := labels[(labels < 0) | (labels >= len(source.classes))]).size:
        raise UserError(f"{place}: an image has the label {wrong[0]}, outside its {len(source.classes)} classes")
    records, sums, size, errors = np.zeros(len(source), RECORD), np.zeros((in_chans, 2)), 0, {}
    extent = np.full((in_chans, 2), NO_EXTENT)
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    images = SurveyedImages(source, in_chans, workers)
    loader = Loader(images, sampler=chunks, batch_size=None, num_workers=workers, collate_fn=unchanged)
    with tqdm(total=len(source), desc=key, unit=" images", disable=None) as bar:
        for chunk, figures in zip(chunks, loader, strict=True):
            records[chunk.start : chunk.stop], chunk_sums, chunk_extent, chunk_size, chunk_errors = figures
            sums += chunk_sums
            extent = join_extents(extent, chunk_extent)
            size += chunk_size
            errors.update(chunk_errors)
            bar.update(len(chunk))
    other, dangling = Counter[str](), list[str]()
    if isinstance(source, FolderSource):
        other, dangling = find_other_files(source.root)
        for index in errors:
            if is_dangling(path := source.where(index)):
                errors[index] = f"dangling link to {os.readlink(path)}"
                dangling.append(source.name(index))
    empty = find_empty_classes(source, labels)
    return SplitSurvey(place, source, records, labels, sums, extent, size, errors, empty, other, sorted(dangling))


def find_empty_classes(source: FileSource, labels: np.ndarray | None) -> list[str]:
    """Classes without images, and folders without images among those of the classes."""
    if labels is None:
        return []
    counts = np.bincount(labels, minlength=len(source.classes))
    empty = {name for name, count in zip(source.classes, counts, strict=True) if not count}
    return sorted(empty.union(source.empty_folders))


def find_other_files(root: Path) -> tuple[Counter[str], list[str]]:
    """Files below a folder that are not images by their suffix: their number by suffix, and the dangling links."""
    other, dangling = Counter[str](), []
    for name, entry in walk_files(root):
        if suffix_of(name) in IMAGE_SUFFIXES:
            continue
        if is_dangling(entry.path):
            dangling.append(name)
        else:
            other[suffix_of(name)] += 1
    return other, dangling


def is_dangling(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


@dataclass
class DuplicateGroups:
    """Groups of readable images with the same bytes. Images are numbered through the splits, training images first.

    Attributes:
        members: (m,) int64, the images group by group, in ascending order within each.
        starts, sizes: (g,) int64, first place in `members` and number of images of each group.
        held_out: (g,) int64, number of images in the validation split.
        contradictory: (g,) bool, whether images of the group are under different classes.
    """

    members: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    held_out: np.ndarray
    contradictory: np.ndarray

    @property
    def leaked(self) -> np.ndarray:
        """(g,) bool, whether the group has images in both splits."""
        return (self.held_out > 0) & (self.held_out < self.sizes)

    def counts(self) -> dict[str, int]:
        """The number of groups, of validation images that are also training images, and of contradictory groups."""
        return {
            "groups": len(self.starts),
            "held_out_in_train": int(self.held_out[self.leaked].sum()),
            "under_several_classes": int(self.contradictory.sum()),
        }

    def copies(self, key: str) -> int:
        """The number of images of a split that repeat an earlier image of the same split."""
        inside = self.held_out if key == "val" else self.sizes - self.held_out
        return int(np.maximum(inside - 1, 0).sum())

    def select(self, which: np.ndarray) -> Iterator[list[int]]:
        """The members of each group for which `which`, (g,) bool, is True, in the order of their first members."""
        groups = np.flatnonzero(which)
        for group in groups[np.argsort(self.members[self.starts[groups]])]:
            yield self.members[self.starts[group] : self.starts[group] + self.sizes[group]].tolist()


def find_duplicates(splits: Sequence[SplitSurvey]) -> DuplicateGroups:
    """Groups of images with the same bytes, in one or two splits."""
    readable = np.flatnonzero(np.concatenate([split.records["format"] for split in splits]))
    digests = np.concatenate([split.records["digest"][split.records["format"] > 0] for split in splits])
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    repeats, repeated = np.zeros((2, len(order)), bool)
    repeats[1:] = repeated[:-1] = digests[1:] == digests[:-1]
    grouped = repeats | repeated
    members, starts = readable[order[grouped]], np.flatnonzero(~repeats[grouped])
    classes = sorted({name for split in splits for name in split.source.classes})
    label = np.concatenate([class_numbers(split, classes) for split in splits])[members]
    lowest, highest = np.minimum.reduceat(label, starts), np.maximum.reduceat(label, starts)
    held_out = np.add.reduceat((members >= len(splits[0].records)).astype(np.int64), starts)
    sizes = np.diff(starts, append=len(members))
    return DuplicateGroups(members, starts, sizes, held_out, (lowest != highest) & (lowest >= 0))


def class_numbers(split: SplitSurvey, classes: Sequence[str]) -> np.ndarray:
    """(n,) int32: the place in `classes` of each image's class, -1 if there are no labels."""
    if split.labels is None:
        return np.full(len(split.records), -1, np.int32)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in split.source.classes], np.int32)[split.labels]


def summarise_split(split: SplitSurvey, copies: int) -> dict[str, Any]:
    """Statistics of a split. Images, bytes and classes count all its images, the rest only the readable ones."""
    source, records = split.source, split.records[split.records["format"] > 0]
    counts = [] if split.labels is None else np.bincount(split.labels, minlength=len(source.classes)).tolist()
    filled = sorted(count for count in counts if count)
    per_class = {"fewest": filled[0], "median": float(np.median(filled)), "most": filled[-1]} if filled else {}
    top = 0 if split.labels is not None else sum("/" not in source.name(i) for i in range(len(source)))
    by_area = np.argsort(records["height"].astype(np.int64) * records["width"], kind="stable")
    sizes = {}  # [height, width]
    if len(records):
        smallest, largest = ([int(records[i][side]) for side in ("height", "width")] for i in by_area[[0, -1]])
        median = [int(np.median(records[side])) for side in ("height", "width")]
        sizes = {"smallest": smallest, "median": median, "largest": largest}
    mean, std = mean_and_std(split.moments, len(records)) if len(records) else ([], [])
    return {
        "place": printable(str(split.place)),
        "images": len(source),
        "bytes": split.bytes,
        "unreadable": {escaped(source.name(index)): printable(reason) for index, reason in split.errors.items()},
        "classes": {name: count for name, count in zip(source.classes, counts, strict=True) if count},
        "per_class": per_class | ({"ratio": filled[-1] / filled[0]} if filled else {}),
        "empty_classes": split.empty_classes,
        "beside_classes": top if top < len(source) else 0,  # because of these images there are no labels
        "formats": count_codes(("", *FORMATS), records["format"]),
        "colours": count_codes(COLOURS, records["colour"]),
        "marks": {mark: count for mark in MARKS if (count := int(split.marked(mark).sum()))},
        "decoders": count_codes(DECODERS, records["decoder"]),
        "sizes": sizes,
        "small": {side: int(split.below(side).sum()) for side in (USUAL, TINY)},
        "copies": copies,
        "mean": mean,
        "std": std,
        "extent": split.extent.tolist() if len(records) else [],  # [smallest, largest] of each channel
        "top": int(records["top"].max()) if len(records) else 0,
        "other_files": {escaped(suffix): count for suffix, count in split.other_files.items()},
        "dangling_links": list(map(escaped, split.dangling_links)),
    }


def count_codes(names: Sequence[str], codes: np.ndarray) -> dict[str, int]:
    """The number of occurrences of each code, by name, the most frequent first."""
    counts = zip(names, np.bincount(codes, minlength=len(names)).tolist(), strict=True)
    return dict(Counter({name: n for name, n in counts if n}).most_common())
