"""What is in a data folder and what is wrong with it: mae doctor."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from mae.commands import doctor_parser
from mae.data.datasets import default_workers
from mae.data.decode import IMAGE_SUFFIXES
from mae.data.prepare.survey import FORMATS, TINY, Figures, Groups, Split, figures, gather, same_bytes, suffix_of
from mae.data.tar_shards import open_images, split_places
from mae.errors import UserError
from mae.options import out_file
from mae.runtime.storage import Place

SHOWN, EXAMPLES, EQUALS = 20, 5, 3  # what is printed at most: unreadable images, names of others, of the same bytes

FEW = 10  # images; classes with fewer are named

UNSEEN = {".avif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".tga"}  # pictures that training leaves out


@dataclass
class Finding:
    """Something that is wrong.

    Attributes:
        stops: It stops a training, or spoils it.
        count: How often.
        what: This number and what it counts.
        names: Whom it concerns, or examples.
        advice: What comes of it, and the way out.
    """

    stops: bool
    count: int
    what: str
    names: list[str]
    advice: str


def doctor_command(args: Sequence[str]) -> None:
    config = doctor_parser().parse_args(list(args))
    workers = default_workers() if config.num_workers is None else config.num_workers
    if config.in_chans < 1 or workers < 0:
        raise UserError(f"--in_chans {config.in_chans}, --num_workers {workers}: wanted are at least 1 and 0")
    for key in ("json", "list"):
        if config[key]:
            out_file(config[key], f"--{key}")
    places = split_places(Place(config.dir), config.train_dir, config.val_dir, "--")
    sources = {key: open_images(place, config.in_chans) for key, place in places.items()}
    splits = {key: gather(key, places[key], source, config.in_chans, workers) for key, source in sources.items()}
    groups = same_bytes(list(splits.values()))
    found = {key: figures(split, groups.copies(key)) for key, split in splits.items()}
    findings = judge(splits, found, groups)
    lines = list(text(found, findings))
    if config.json:
        said = {
            "splits": {key: asdict(split) for key, split in found.items()},
            "same_bytes": groups.counts(),
            "findings": [asdict(finding) for finding in findings],
        }
        Path(config.json).write_text(json.dumps(said, indent=1) + "\n")
        lines.append(f"wrote {config.json}")
    if config.list:
        with open(config.list, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "problem"])
            writer.writerows(problems(splits, groups))
        lines.append(f"wrote {config.list}")
    elif findings:
        lines.append("--list FILE writes the path of every one")
    # A file name may hold line breaks, or bytes that are not UTF-8 and cannot be printed.
    lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines]
    print("\n".join(lines), flush=True)
    if stops := [finding.what for finding in findings if finding.stops]:
        raise UserError(f"{config.dir} has {', '.join(stops)}")


def judge(splits: dict[str, Split], found: dict[str, Figures], groups: Groups) -> list[Finding]:
    """What is wrong, the most serious first."""
    findings = []

    def add(count: int, noun: str, rest: str, advice: str, names: Iterable[str] = (), stops: bool = False) -> None:
        if count:
            findings.append(Finding(stops, count, f"{many(count, noun)} {rest}", list(names), advice))

    def first(key: str, which: np.ndarray) -> list[str]:
        return [splits[key].source.name(int(i)) for i in np.flatnonzero(which)[:EXAMPLES]]

    train = found["train"]
    advice = "every command stops; remove from val, or add such images to train"
    unknown = strangers(splits, "val", "train")
    add(len(unknown), "class", "in val that train lacks", advice, unknown, stops=True)
    for key, split in found.items():
        bad = len(split.unreadable)
        advice = f"mae pretrain stops; remove or replace, or set --data.max_bad_images {bad}"
        if key == "val":
            advice = "every training and evaluation stops; remove or replace"
        add(bad, "unreadable image", f"in {key}", advice, stops=True)
    for key, split in found.items():
        advice = "mae probe and mae finetune stop; fill or remove"
        add(len(split.empty_classes), "empty class folder", f"in {key}", advice, split.empty_classes, stops=True)

    counts = groups.counts()
    advice = "scores come out too good; remove from one of the two"
    add(counts["held_out_in_train"], "image", "of val in train, too", advice, equals(splits, groups, groups.leaked))
    advice = "at most one of its labels is right; keep one"
    add(
        counts["under_several_classes"],
        "image",
        "under several classes",
        advice,
        equals(splits, groups, groups.contrary),
    )
    advice = "so no image has a label; for more than mae pretrain, move into a class"
    add(train.beside_classes, "image", "beside the folders in train", advice)
    for key, split in found.items():
        add(split.copies, "copy", f"of other images in {key}", "such images count twice; remove the copies")
    few = [f"{name} {count}" for name, count in train.classes.items() if count < FEW]
    advice = "little to learn from, and below 2 mae probe and mae finetune stop; add images, or remove the class"
    add(len(few), "class", f"with fewer than {FEW} images in train", advice, few)
    missing = strangers(splits, "train", "val")
    advice = "no score tells how well these are known; add images to val"
    add(len(missing), "class", "in train that val lacks", advice, missing)
    for key, split in found.items():
        tiny = splits[key].below(TINY)
        advice = "perhaps thumbnails or icons; remove, unless the model is for such sizes"
        add(split.small[TINY], "image", f"in {key} with a side below {TINY} pixels", advice, first(key, tiny))
        unseen = {suffix: count for suffix, count in split.other_files.items() if suffix in UNSEEN}
        advice = "pictures by their suffix, left out; convert to JPEG or PNG, and name JPEGs .jpg"
        add(sum(unseen.values()), "file", f"in {key} in formats that are not read", advice, unseen)
        advice = "read by content here, but not by every program; rename"
        misnamed = splits[key].marked("other suffix")
        what = f"in {key} under another format's suffix"
        add(int(misnamed.sum()), "image", what, advice, first(key, misnamed))
        links = split.dangling_links
        add(len(links), "dangling link", f"in {key}", "remove, or restore what it points to", links)
    return findings


def strangers(splits: dict[str, Split], key: str, other: str) -> list[str]:
    """Classes of a split that the other one, if it has classes as well, does not know."""
    if len(splits) < 2 or not splits[other].source.classes:
        return []
    return sorted(set(splits[key].source.classes) - set(splits[other].source.classes))


def equals(splits: dict[str, Split], groups: Groups, which: np.ndarray) -> list[str]:
    """Some groups of images of the same bytes, by name: of each split and class the first."""
    found = []
    for group in islice(groups.chosen(which), EXAMPLES):
        names: dict[tuple[str, str | None], str] = {}
        for key, index in (located(splits, number) for number in group):
            names.setdefault((key, splits[key].class_of(index)), f"{key}: {splits[key].source.name(index)}")
        found.append(" = ".join(islice(names.values(), EQUALS)))
    return found


def located(splits: dict[str, Split], number: int) -> tuple[str, int]:
    """Split and index of an image that is numbered through the splits."""
    before = len(splits["train"].records)
    return ("train", number) if number < before else ("val", number - before)


def problems(splits: dict[str, Split], groups: Groups) -> Iterator[tuple[str, str]]:
    """Path and problem of every image and folder with one."""
    for split in splits.values():
        where = split.source.where
        yield from ((where(index), reason) for index, reason in split.errors.items())
        yield from ((f"{split.place / name}", "class folder without images") for name in split.empty_classes)
        for name in split.dangling_links:
            if suffix_of(name) not in IMAGE_SUFFIXES:  # those are among the errors
                yield f"{split.place / name}", "dangling link"
        for index in np.flatnonzero(split.marked("other suffix")).tolist():
            yield where(index), f"holds {list(FORMATS)[split.records[index]['format'] - 1]}, unlike its suffix"
        for index in np.flatnonzero(split.below(TINY)).tolist():
            yield where(index), f"{split.records[index]['height']} x {split.records[index]['width']} pixels"
    for group in groups.chosen(groups.sizes > 1):
        (first, place), *rest = (located(splits, number) for number in group)
        for key, index in rest:
            classes = {splits[first].class_of(place), splits[key].class_of(index)} - {None}
            other = ", under another class" if len(classes) == 2 else ""
            yield splits[key].source.where(index), f"same bytes as {splits[first].source.where(place)}{other}"
    for name in strangers(splits, "val", "train"):
        yield f"{splits['val'].place / name}", "class that train lacks"


def text(found: dict[str, Figures], findings: list[Finding]) -> Iterator[str]:
    """What is printed, line by line."""
    for key, split in found.items():
        yield f"{key}: {many(split.images, 'image')}, {size_of(split.bytes)} in {split.place}"
        for title, said in rows(split):
            if said:
                yield f"  {title:<11} {said}"
        for name, reason in islice(split.unreadable.items(), SHOWN):
            yield f"    {name}: {reason}"
        if len(split.unreadable) > SHOWN:
            yield f"    and {len(split.unreadable) - SHOWN:,} more"
        yield ""
    if found["train"].sizes:
        yield "mean and std of the training images, each counting the same, as settings:"
        yield " ".join(f"--data.{key} '[{numbers(getattr(found['train'], key))}]'" for key in ("mean", "std"))
        yield ""
    stops = sum(finding.stops for finding in findings)
    first = "the first" if stops == 1 else f"the first {stops}" if stops else "none"
    yield f"{many(len(findings), 'finding')}; {first} would stop a training" if findings else "nothing wrong was found"
    for number, finding in enumerate(findings, 1):
        names, rest = finding.names[:EXAMPLES], max(finding.count, len(finding.names)) - EXAMPLES
        names += [f"and {rest:,} more"] if len(names) == EXAMPLES and rest > 0 else []
        line = f"{number:>3}. {finding.what}" + (f" ({', '.join(names)})" if names else "")
        yield from (
            [line] if len(line) <= 120 else [f"{number:>3}. {finding.what}", *(f"       {name}" for name in names)]
        )
        yield f"     {finding.advice}"


def rows(split: Figures) -> Iterator[tuple[str, str]]:
    """Title and text of the lines about a split; a line without text is left out."""
    if split.classes:
        by_count = sorted(split.classes.items(), key=lambda item: item[1])
        (fewest, least), (most, top) = by_count[0], by_count[-1]
        median, ratio = split.per_class["median"], split.per_class["ratio"]
        spread = f"{least:,} ({fewest}) to {top:,} ({most}) images each, median {median:,g}, ratio {ratio:.3g}"
        yield "classes", f"{len(by_count):,}; {spread if least < top else many(top, 'image') + ' each'}"
    yield "formats", counted(split.formats)
    yield "colours", counted(split.colours)
    yield "special", counted(split.marks)
    yield "decoded by", counted(split.decoders)
    if split.sizes:
        yield (
            "sizes",
            "height x width: " + ", ".join(f"{key} {height} x {width}" for key, (height, width) in split.sizes.items()),
        )
        yield "", " and ".join(f"{n:,} below {side}" for side, n in split.small.items()) + " pixels on the short side"
        yield "mean, std", f"{numbers(split.mean)}; {numbers(split.std)}"
    yield "same bytes", f"{many(split.copies, 'copy')} of other images" if split.copies else ""
    yield "other files", counted({suffix or "no suffix": count for suffix, count in split.other_files.items()})
    yield "unreadable", f"{len(split.unreadable):,}" if split.unreadable else ""


def many(count: int, noun: str) -> str:
    """3, "class" -> "3 classes"."""
    if count != 1:
        noun = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun}"


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def size_of(count: float) -> str:
    """Of bytes, in decimal units."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count / 1000:,.3g} TB"
