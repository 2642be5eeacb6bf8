"""`mae doctor`: what is in a data folder and what is wrong with it."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from mae.commands import doctor_parser
from mae.data.channel_stats import as_option, as_text
from mae.data.datasets import default_workers
from mae.data.decode import SCALES
from mae.data.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from mae.data.layout import open_splits
from mae.data.prepare.survey import (
    FORMATS,
    TINY,
    DuplicateGroups,
    SplitSurvey,
    find_duplicates,
    suffix_of,
    summarise_split,
    survey_split,
)
from mae.errors import UserError
from mae.options import check_ranges, out_file, plural
from mae.runtime.files import write_report
from mae.runtime.storage import Place
from mae.runtime.text import csv_row, escaped, printable

# The most names that are printed: of unreadable images, of other examples, of copies of one image.
MAX_UNREADABLE, MAX_EXAMPLES, MAX_COPIES = 20, 5, 3

TWELVE_BITS = 4095  # the largest value that 12 bits hold

FEW = 10  # images; classes with fewer are named


@dataclass
class Finding:
    """A problem.

    Attributes:
        stops: Whether it stops a training run.
        count: The number of images, files or classes with this problem.
        what: This number and what it counts.
        names: Their names, or examples.
        advice: The consequence and the way out.
    """

    stops: bool
    count: int
    what: str
    names: list[str]
    advice: str


def doctor_command(args: Sequence[str]) -> None:
    config = doctor_parser().parse_args(list(args))
    workers = default_workers(1) if config.num_workers is None else config.num_workers
    check_ranges("", "[1, inf)", in_chans=config.in_chans)
    check_ranges("", "[0, inf)", num_workers=workers)
    for key in ("json", "list"):
        if config[key]:
            out_file(config[key], f"--{key}")
    sources, places, notes = open_splits(Place(config.dir), config.in_chans, config.train_dir, config.val_dir, "--")
    splits = {key: survey_split(key, places[key], source, config.in_chans, workers) for key, source in sources.items()}
    groups = find_duplicates(list(splits.values()))
    summaries = {key: summarise_split(split, groups.copies(key)) for key, split in splits.items()}
    problems = chain(stopping_problems(splits, summaries), other_problems(splits, summaries, groups))
    findings = [finding for finding in problems if finding.count]
    lines = [*notes, *report_lines(summaries, findings)]
    if config.json:
        report = {
            "splits": summaries,
            "same_bytes": groups.counts(),
            "findings": [asdict(finding) for finding in findings],
        }
        write_report(config.json, json.dumps(report, indent=1) + "\n")
        lines.append(f"wrote {config.json}")
    if config.list:
        table = io.StringIO(newline="")
        rows = chain([("path", "problem")], problem_rows(splits, groups))
        csv.writer(table).writerows(csv_row(map(escaped, row)) for row in rows)
        write_report(config.list, table.getvalue())
        lines.append(f"wrote {config.list}")
    elif findings:
        lines.append("--list FILE writes the path of every one")
    print("\n".join(map(printable, lines)), flush=True)
    if stops := [finding.what for finding in findings if finding.stops]:
        raise UserError(f"{config.dir} has {', '.join(stops)}")


def new_finding(
    count: int, noun: str, rest: str, advice: str, names: Iterable[str] = (), stops: bool = False
) -> Finding:
    return Finding(stops, count, f"{plural(count, noun)} {rest}", list(names), advice)


def stopping_problems(splits: dict[str, SplitSurvey], summaries: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    unknown = unknown_classes(splits, "val", "train")
    advice = "every command stops; remove from val, or add such images to train"
    yield new_finding(len(unknown), "class", "in val that train lacks", advice, unknown, stops=True)
    for key, summary in summaries.items():
        bad = len(summary["unreadable"])
        advice = f"mae pretrain stops; remove or replace, or set --data.max_bad_images {bad}"
        if key == "val":
            advice = "every training and evaluation stops; remove or replace"
        yield new_finding(bad, "unreadable image", f"in {key}", advice, stops=True)
    for key, summary in summaries.items():
        known = summaries["train"]["classes"] if key == "val" else {}
        empty = [name for name in summary["empty_classes"] if name not in known]
        advice = "mae knn, linprobe, finetune and evaluate stop; fill or remove"
        yield new_finding(len(empty), "empty class folder", f"in {key}", advice, empty, stops=True)


def other_problems(
    splits: dict[str, SplitSurvey], summaries: dict[str, dict[str, Any]], groups: DuplicateGroups
) -> Iterator[Finding]:
    train, counts = summaries["train"], groups.counts()
    advice = "scores come out too good; remove from one of the two"
    names = duplicate_examples(splits, groups, groups.leaked)
    yield new_finding(counts["held_out_in_train"], "image", "of val in train, too", advice, names)
    advice = "at most one of its labels is right; keep one"
    names = duplicate_examples(splits, groups, groups.contradictory)
    yield new_finding(counts["under_several_classes"], "image", "under several classes", advice, names)
    advice = "so no image has a label; for more than mae pretrain, move into a class"
    yield new_finding(train["beside_classes"], "image", "beside the folders in train", advice)
    for key, summary in summaries.items():
        advice = "such images count twice; remove the copies"
        yield new_finding(summary["copies"], "copy", f"of other images in {key}", advice)
    few = [f"{name} {count}" for name, count in train["classes"].items() if count < FEW]
    advice = "little to learn from, and below 2 mae linprobe and mae finetune stop; add images, or remove the class"
    yield new_finding(len(few), "class", f"with fewer than {FEW} images in train", advice, few)
    missing = unknown_classes(splits, "train", "val")
    advice = "no score tells how well these are known; add images to val"
    yield new_finding(len(missing), "class", "in train that val lacks", advice, missing)
    for key, summary in summaries.items():
        split = splits[key]
        what = f"in {key} with a side below {TINY} pixels"
        advice = "perhaps thumbnails or icons; remove, unless the model is for such sizes"
        yield new_finding(summary["small"][TINY], "image", what, advice, example_names(split, split.below(TINY)))
        left = split.source.leftovers
        what = f"in {key} in formats that are not read"
        remedies = sorted({UNREAD_SUFFIXES[suffix] for suffix in left.suffixes} - {""})
        advice = f"images by their suffix, left out; {', or '.join([*remedies, 'convert to PNG, TIFF or JPEG'])}"
        yield new_finding(sum(left.suffixes.values()), "file", what, advice, sorted(left.suffixes))
        advice = "pipes, sockets and devices, left out; remove, or rename"
        kinds = [f"{kind} {count:,}" for kind, count in sorted(left.specials.items())]
        yield new_finding(sum(left.specials.values()), "entry", f"in {key} that is no file", advice, kinds)
        advice = "of systems and programs, left out with the images in them; rename what is wanted"
        yield new_finding(len(left.hidden), "hidden folder", f"with images in {key}", advice, sorted(left.hidden))
        misnamed = split.marked("other suffix")
        what = f"in {key} under another format's suffix"
        advice = "read by content here, but not by every program; rename"
        yield new_finding(int(misnamed.sum()), "image", what, advice, example_names(split, misnamed))
        frames = split.marked("several frames")
        what, advice = f"in {key} with more than one frame or page", "the first is read; save each as a file"
        yield new_finding(int(frames.sum()), "image", what, advice, example_names(split, frames))
        constant = [f"{i} (always {low:.4g})" for i, (low, high) in enumerate(summary["extent"]) if low == high]
        advice = "nothing to learn from, and no std to divide by; leave it out, or look at how the files were made"
        yield new_finding(len(constant), "channel", f"of std 0 in {key}", advice, constant)
        if 0 < summary["top"] <= TWELVE_BITS:
            wide = split.records["top"] > 0
            what = f"in {key} with 12-bit values in 16 bits: the largest is {summary['top']:,}"
            advice = "a sixteenth of the range; multiply the files' values by 16, or set the mean and std above"
            yield new_finding(int(wide.sum()), "image", what, advice, example_names(split, wide))
        for kind in ("int16", "float32"):
            signed = split.marked(kind)
            advice = f"scaled to {SCALES[kind]}; ImageNet's mean and std are wrong for them: set those above"
            yield new_finding(int(signed.sum()), "image", f"in {key} of {kind}", advice, example_names(split, signed))
        links = summary["dangling_links"]
        yield new_finding(len(links), "dangling link", f"in {key}", "remove, or restore what it points to", links)


def example_names(split: SplitSurvey, which: np.ndarray) -> list[str]:
    return [escaped(split.source.name(int(i))) for i in np.flatnonzero(which)[:MAX_EXAMPLES]]


def unknown_classes(splits: dict[str, SplitSurvey], key: str, other: str) -> list[str]:
    """Classes of one split that the other split lacks; none if the other has no classes at all."""
    if len(splits) < 2 or not splits[other].source.classes:
        return []
    return sorted(set(splits[key].source.classes) - set(splits[other].source.classes))


def duplicate_examples(splits: dict[str, SplitSurvey], groups: DuplicateGroups, which: np.ndarray) -> list[str]:
    """Some groups of duplicates by name: of each group, the first image in each split and class."""
    examples = []
    for group in islice(groups.select(which), MAX_EXAMPLES):
        names: dict[tuple[str, str | None], str] = {}
        for key, index in (locate(splits, number) for number in group):
            names.setdefault((key, splits[key].class_of(index)), f"{key}: {escaped(splits[key].source.name(index))}")
        examples.append(" = ".join(islice(names.values(), MAX_COPIES)))
    return examples


def locate(splits: dict[str, SplitSurvey], number: int) -> tuple[str, int]:
    """Split and index of an image, by its number through the splits."""
    before = len(splits["train"].records)
    return ("train", number) if number < before else ("val", number - before)


def problem_rows(splits: dict[str, SplitSurvey], groups: DuplicateGroups) -> Iterator[tuple[str, str]]:
    """(path, problem) for every image, folder and link with a problem."""
    for split in splits.values():
        where = split.source.where
        yield from ((where(index), reason) for index, reason in split.errors.items())
        yield from ((f"{split.place / name}", "class folder without images") for name in split.empty_classes)
        for name in split.dangling_links:
            if suffix_of(name) not in IMAGE_SUFFIXES:  # links to images are among the errors
                yield f"{split.place / name}", "dangling link"
        for index in np.flatnonzero(split.marked("other suffix")).tolist():
            yield where(index), f"holds {list(FORMATS)[split.records[index]['format'] - 1]}, unlike its suffix"
        for index in np.flatnonzero(split.marked("several frames")).tolist():
            yield where(index), "more than one frame or page, of which the first is read"
        for index in np.flatnonzero(split.below(TINY)).tolist():
            yield where(index), f"{split.records[index]['height']} x {split.records[index]['width']} pixels"
    for group in groups.select(groups.sizes > 1):
        (key, index), *copies = (locate(splits, number) for number in group)
        original = splits[key].source.where(index)
        for other, copy in copies:
            classes = {splits[key].class_of(index), splits[other].class_of(copy)} - {None}
            note = ", under another class" if len(classes) == 2 else ""
            yield splits[other].source.where(copy), f"same bytes as {original}{note}"
    for name in unknown_classes(splits, "val", "train"):
        yield f"{splits['val'].place / name}", "class that train lacks"


def report_lines(summaries: dict[str, dict[str, Any]], findings: list[Finding]) -> Iterator[str]:
    """The printed report, line by line."""
    for key, summary in summaries.items():
        yield f"{key}: {plural(summary['images'], 'image')}, {format_bytes(summary['bytes'])} in {summary['place']}"
        yield from (f"  {title:<11} {text}" for title, text in summary_rows(summary) if text)
        yield from (f"    {name}: {reason}" for name, reason in islice(summary["unreadable"].items(), MAX_UNREADABLE))
        if len(summary["unreadable"]) > MAX_UNREADABLE:
            yield f"    and {len(summary['unreadable']) - MAX_UNREADABLE:,} more"
        yield ""
    if "val" not in summaries:
        yield "val: none; --data.holdout 0.1 holds out a tenth of the images, the same ones in every command"
        yield ""
    train = summaries["train"]
    if train["sizes"]:
        yield "mean and std of the training images, each counting the same, as settings:"
        yield f"{as_option('mean', train['mean'])} {as_option('std', train['std'])}"
        yield ""
    stops = sum(finding.stops for finding in findings)
    first = "the first" if stops == 1 else f"the first {stops}" if stops else "none"
    total = plural(len(findings), "finding")
    yield f"{total}; {first} would stop a training" if findings else "nothing wrong was found"
    for number, finding in enumerate(findings, 1):
        names, rest = finding.names[:MAX_EXAMPLES], max(finding.count, len(finding.names)) - MAX_EXAMPLES
        names += [f"and {rest:,} more"] if len(names) == MAX_EXAMPLES and rest > 0 else []
        title = f"{number:>3}. {finding.what}"
        line = f"{title} ({', '.join(names)})" if names else title
        yield from [line] if len(line) <= 120 else [title, *(f"       {name}" for name in names)]
        yield f"     {finding.advice}"


def summary_rows(split: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and text of the lines about a split; a line without text is not printed."""
    if split["classes"]:
        by_count = sorted(split["classes"].items(), key=lambda item: item[1])
        (fewest, least), (most, top) = by_count[0], by_count[-1]
        median, ratio = split["per_class"]["median"], split["per_class"]["ratio"]
        spread = f"{least:,} ({fewest}) to {top:,} ({most}) images each, median {median:,g}, ratio {ratio:.3g}"
        yield "classes", f"{len(by_count):,}; {spread if least < top else plural(top, 'image') + ' each'}"
    yield "formats", format_counts(split["formats"])
    yield "colours", format_counts(split["colours"])
    yield "special", format_counts(split["marks"])
    yield "decoded by", format_counts(split["decoders"])
    if split["sizes"]:
        sizes = ", ".join(f"{key} {height} x {width}" for key, (height, width) in split["sizes"].items())
        yield "sizes", f"height x width: {sizes}"
        small = " and ".join(f"{count:,} below {side}" for side, count in split["small"].items())
        yield "", f"{small} pixels on the short side"
        yield "mean, std", f"{as_text(split['mean'])}; {as_text(split['std'])}"
        low, high = np.transpose(split["extent"]).tolist()
        if {"16 bits", "float32"} & set(split["marks"]):
            yield "range", f"{as_text(low)} to {as_text(high)}"
    yield "same bytes", f"{plural(split['copies'], 'copy')} of other images" if split["copies"] else ""
    yield "other files", format_counts({suffix or "no suffix": count for suffix, count in split["other_files"].items()})
    yield "unreadable", f"{len(split['unreadable']):,}" if split["unreadable"] else ""


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count / 1000:,.3g} TB"
