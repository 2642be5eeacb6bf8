"""Which folder is which split: of a folder, of a tar file, and as far as it goes of a remote store."""

import os
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from mae.data.image_files import IMAGE_SUFFIXES, holds_images, is_dir, is_hidden
from mae.data.sources import FileSource, describe
from mae.data.tar_shards import INDEX, TarImages, open_images
from mae.errors import UserError
from mae.options import plural
from mae.runtime.storage import Place
from mae.runtime.text import printable

# What folders of a split are called, in any case. Test images are held out where there is nothing else to validate on.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


MAX_NAMES = 5  # of folders that are left out, in a note


def split_of(folder: str) -> str | None:
    """Which of SPLIT_NAMES a folder's name stands for."""
    return next((split for split, names in SPLIT_NAMES.items() if folder.lower() in names), None)


class Tree(Protocol):
    """Folders, by their path below a root."""

    def folders(self, path: str) -> list[str]:
        """Names of the folders in a folder, without hidden and system folders."""

    def images(self, path: str) -> int:
        """The number of images right in a folder."""

    def holds_images(self, path: str) -> bool:
        """Whether there is an image at any depth, as far as that is known soon."""


class FolderTree:
    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self, path: str) -> list[str]:
        try:
            with os.scandir(self.root / path) as entries:
                return sorted(entry.name for entry in entries if is_dir(entry) and not is_hidden(entry.name))
        except OSError as error:
            raise UserError(f"cannot list the folder {self.root / path}: {error.strerror}") from error

    def images(self, path: str) -> int:
        names = (name for name in os.listdir(self.root / path) if not name.startswith("."))
        return sum(os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES for name in names)

    def holds_images(self, path: str) -> bool:
        return holds_images(self.root / path)


class NameTree:
    """The folders in the names of images, which are paths."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def _inside(self, path: str) -> Iterator[str]:
        prefix = f"{path}/" if path else ""
        return (name[len(prefix) :] for name in self.names if name.startswith(prefix))

    def folders(self, path: str) -> list[str]:
        return sorted({name.split("/", 1)[0] for name in self._inside(path) if "/" in name})

    def images(self, path: str) -> int:
        return sum("/" not in name for name in self._inside(path))

    def holds_images(self, path: str) -> bool:
        return any(self._inside(path))


class StoreTree:
    """A remote store, which cannot be listed: it is asked for shards under usual names, up to the first of a split."""

    def __init__(self, root: Place) -> None:
        self.root = root

    def folders(self, path: str) -> list[str]:
        def first(split: str) -> list[str]:
            names = (name for usual in SPLIT_NAMES[split] for name in (usual, usual.capitalize()))
            return list(islice((name for name in names if (self.root / path / name / INDEX).exists()), 1))

        if path:
            return []
        found = first("train") + first("val")
        return found if len(found) != 1 or split_of(found[0]) == "val" else found + first("test")

    def images(self, path: str) -> int:
        return 0

    def holds_images(self, path: str) -> bool:
        return False


class Layout(NamedTuple):
    """Where the splits of a root are.

    Attributes:
        splits: Paths below the root, by `train` and `val`; each only if it was found.
        notes: What was taken for what, and what was left out, where that is not plain.
    """

    splits: dict[str, str]
    notes: list[str]


def find_layout(
    tree: Tree, root: Place, train_dir: str | None = None, val_dir: str | None = None, option: str = "--data."
) -> Layout:
    """Find the splits of a root, or of the only folder in it.

    `train` and `val` always are splits; other names, and other cases, are where no class can be meant: where there are
    both splits, or no other folders.

    Args:
        option: Prefix of the options train_dir and val_dir, for messages.

    Raises:
        UserError: Two folders may be one split.
    """
    given = {split: name for split, name in (("train", train_dir), ("val", val_dir)) if name is not None}
    base, folders = "", tree.folders("")
    splits = _pick(folders, root, given, option)
    if not splits and not given:
        inner, inside = "", folders
        while len(inside) == 1 and not tree.images(inner):
            inner = f"{inner}/{inside[0]}".lstrip("/")
            inside = tree.folders(inner)
            if len(picked := _pick(inside, root / inner, given, option)) == 2:
                base, folders, splits = inner, inside, picked
                break
    notes = []
    if split_of(splits.get("val", "")) == "test" and "val" not in given:
        notes.append(f"{splits['val']} is held out, as there is no val")
    if splits and not given:
        others = sorted(set(folders) - set(splits.values()))
        left = [f"{name}/" for name in others if tree.holds_images(f"{base}/{name}".lstrip("/"))]
        left[MAX_NAMES:] = [f"{len(left) - MAX_NAMES:,} more folders"] if len(left) > MAX_NAMES else []
        loose = tree.images(base)
        left += [f"{plural(loose, 'image')} beside the splits"] if loose else []
        notes += [f"left out: {', '.join(left)}"] if left else []
    prefix = f"{base}/" if base else ""
    return Layout({split: prefix + name for split, name in splits.items()}, notes)


def _pick(folders: Collection[str], root: Place, given: dict[str, str], option: str) -> dict[str, str]:
    """The folder of each split among `folders`; those that options give are taken as they are."""
    found: dict[str, list[str]] = {split: [] for split in SPLIT_NAMES}
    others = False
    for name in folders:
        split = split_of(name)
        if split is None:
            others = True
        elif name not in given.values():
            found[split].append(name)
    found |= {split: [name] for split, name in given.items()}
    held_out = found["val"] or found["test"]
    if others and not held_out and "train" not in found["train"] and "train" not in given:
        found["train"] = []  # a vehicle among other classes
    if others and not found["train"]:
        held_out = found["val"]
    if "val" not in given and "train" in given:  # what lies in the training folder is not held out
        held_out = [name for name in held_out if not _contains(root, given["train"], name)]
    picked = {split: names for split, names in (("train", found["train"]), ("val", held_out)) if names}
    for split, names in picked.items():
        if len(names) > 1:
            raise UserError(
                f"{root} has both {names[0]}/ and {names[1]}/: say which one is for {split} with {option}{split}_dir"
            )
    return {split: names[0] for split, names in picked.items()}


def _contains(root: Place, outer: str, inner: str) -> bool:
    if root.remote:
        return outer == inner
    return (root / inner).path.resolve().is_relative_to((root / outer).path.resolve())


def tree_of(root: Place) -> Tree:
    return StoreTree(root) if root.remote else FolderTree(root.path)


class Splits(NamedTuple):
    """The images of the splits: `train`, and `val` if there is one.

    Attributes:
        places: Where they are; below a tar file for folders in it.
        notes: As in `Layout`.
    """

    sources: dict[str, FileSource]
    places: dict[str, Place]
    notes: list[str]

    def __str__(self) -> str:
        """What was taken for what, in one line."""
        splits = [f"{key}: {self.places[key]} ({describe(source)})" for key, source in self.sources.items()]
        return printable("; ".join([", ".join(splits), *self.notes]))


def split_places(
    root: Place, train_dir: str | None, val_dir: str | None, option: str = "--data."
) -> tuple[dict[str, Place], list[str]]:
    """The places of the splits, and the notes of their layout: `train` is the root itself if it has no splits.

    Raises:
        UserError: One of them does not exist, or as for `find_layout`.
    """
    if root.remote or root.path.is_dir():
        splits, notes = find_layout(tree_of(root), root, train_dir, val_dir, option)
    else:
        given = {"train": train_dir, "val": val_dir}
        splits, notes = {split: name for split, name in given.items() if name is not None}, []
    places = {split: root / name for split, name in sorted(splits.items())}
    places = with_train(places, root, option)
    for split, place in places.items():
        if not place.remote and not place.exists():
            raise UserError(
                f"{place} does not exist" if place is root else f"{option}{split}_dir {place} does not exist"
            )
    return places, notes


def with_train(places: dict[str, Place], root: Place, option: str) -> dict[str, Place]:
    if "val" in places and "train" not in places:
        held_out = places["val"].name
        raise UserError(
            f"{root} has a held-out folder {held_out}/ but no train/; set {option}train_dir (. is all of it)"
        )
    return places or {"train": root}


def open_splits(
    root: Place, in_chans: int, train_dir: str | None = None, val_dir: str | None = None, option: str = "--data."
) -> Splits:
    """The images of the splits of a folder, a tar file or a store; arguments as for `find_layout`.

    Raises:
        UserError: They cannot be found or opened, or folders that are splits would be taken for classes.
    """
    if not root.remote and train_dir is None and val_dir is None and root.path.is_file():
        images = TarImages(root.path)
        layout = find_layout(NameTree(images.records), root, option=option)
        places = with_train({split: root / name for split, name in sorted(layout.splits.items())}, root, option)
        sources: dict[str, FileSource] = {
            split: images.source(in_chans, layout.splits.get(split, "")) for split in places
        }
        notes = layout.notes + ([images.leftovers.note()] if layout.splits and images.leftovers.note() else [])
    else:
        places, notes = split_places(root, train_dir, val_dir, option)
        sources = {split: open_images(place, in_chans) for split, place in places.items()}
    for split, source in sources.items():
        kinds = {split_of(name) for name in source.classes}
        if len(kinds) > 1 and "train" in kinds and None not in kinds:
            names = ", ".join(f"{name}/" for name in source.classes)
            raise UserError(
                f"{places[split]} has the folders {names}, which are splits and no classes: name them with "
                f"{option}train_dir and {option}val_dir"
            )
    return Splits(sources, places, notes)


def open_held_out(
    root: Place, in_chans: int, val_dir: str | None, classes: Collection[str]
) -> tuple[FileSource, Place, list[str]]:
    """The held-out images, or all of a root that itself has a folder for each class; and the notes of the layout.

    Args:
        classes: A folder that is called like one of these is no split.
    """
    images = TarImages(root.path) if val_dir is None and not root.remote and root.path.is_file() else None
    name, notes = val_dir or "", list[str]()
    if val_dir is None and (images or root.remote or root.path.is_dir()):
        layout = find_layout(NameTree(images.records) if images else tree_of(root), root)
        held_out = layout.splits.get("val", "")
        if held_out and held_out not in classes:
            name, notes = held_out, layout.notes
    place = root / name if name else root
    return images.source(in_chans, name) if images else open_images(place, in_chans), place, notes
