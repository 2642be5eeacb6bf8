"""Reading the ILSVRC 2012 archives as downloaded, without unpacking them."""

import gzip
import re
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np

from mae.data.tar_shards import RecordSource, record_source, scan_tar
from mae.errors import UserError
from mae.runtime import reading
from mae.runtime.reading import open_regular
from mae.runtime.storage import Place

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

_DATA = "ILSVRC2012_devkit_t12/data"


def holds_archives(src: Path) -> bool:
    return (src / TRAIN).is_file() or (src / VAL).is_file()


def open_archives(src: Path, in_chans: int) -> dict[str, RecordSource]:
    """The images of the archives in a folder by split, with the names and labels that they have when unpacked.

    `val` is left out if its archive is missing.

    Raises:
        UserError: Another archive is missing, one is damaged, or they do not fit together.
    """
    if not (src / TRAIN).is_file():
        raise UserError(f"{src} holds {VAL} but no {TRAIN}")
    has_val = (src / VAL).is_file()
    if has_val and not (src / DEVKIT).is_file():
        raise UserError(f"{src} holds no {DEVKIT}: without it {VAL} has no labels")
    train = _train(src, in_chans)
    if not (src / DEVKIT).is_file():
        return {"train": train}
    wnids, truth = read_devkit(src / DEVKIT)
    if unmatched := sorted(set(train.classes) ^ set(wnids.values())):
        lacks, has = (DEVKIT, TRAIN) if unmatched[0] in train.classes else (TRAIN, DEVKIT)
        raise UserError(f"{src}: {lacks} lacks the class {unmatched[0]} that {has} has ({len(unmatched)} such)")
    return {"train": train} | ({"val": _val(src, wnids, truth, in_chans)} if has_val else {})


def _train(src: Path, in_chans: int) -> RecordSource:
    """The training images, from a tar file that holds one tar file per class."""
    path = src / TRAIN
    records = {}
    for name, start, size in scan_tar(path, suffixes=frozenset([".tar"])):
        folder = name.rsplit("/", 1)[-1].removesuffix(".tar")
        for image, offset, length in scan_tar(path, start, size):
            records[f"{folder}/{image}"] = (0, offset, length)
    if not records:
        raise UserError(f"{path} holds no tar files of images: it is not the archive of ILSVRC 2012")
    return record_source(Place(src), [TRAIN], records, in_chans)


def _val(src: Path, wnids: dict[int, str], truth: list[int], in_chans: int) -> RecordSource:
    """The validation images, from a tar file of images numbered from 1; the devkit has the class of each."""
    path = src / VAL
    records = {}
    for name, offset, length in scan_tar(path):
        match = re.fullmatch(r"(?:.*/)?(ILSVRC2012_val_(\d{8})\.JPEG)", name)
        if not match or not 1 <= int(match[2]) <= len(truth):
            raise UserError(f"{path}: {name} is none of the {len(truth)} images that {DEVKIT} has classes for")
        records[f"{wnids[truth[int(match[2]) - 1]]}/{match[1]}"] = (0, offset, length)
    if len(records) != len(truth):
        raise UserError(f"{path} holds {len(records)} images, {DEVKIT} has classes for {len(truth)}")
    return record_source(Place(src), [VAL], records, in_chans)


def read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """WordNet ids of the classes by the devkit's number of them, and the number of each held-out image in order.

    Raises:
        UserError: It is damaged, or contradicts itself.
    """
    import scipy.io  # slow to import, and only these archives need it

    try:
        with open_regular(path) as packed, gzip.GzipFile(fileobj=packed) as stream:
            whole = stream.read(reading.DEVKIT + 1)  # to the end, where its checksum is
        if len(whole) > reading.DEVKIT:
            raise ValueError(f"unpacked it has more than {reading.DEVKIT:,} bytes")
        with tarfile.open(fileobj=BytesIO(whole)) as tar:
            meta, truth_file = (
                _member(tar, f"{_DATA}/{name}") for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = np.atleast_1d(scipy.io.loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = synsets[synsets["num_children"] == 0]  # the others are groups of classes
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]).strip() for row in leaves}
        truth = [int(line) for line in truth_file.split()]
    except Exception as error:  # gzip, tar, MATLAB and missing fields raise different types
        raise UserError(f"{path} is damaged or another devkit: {error or type(error).__name__}") from None
    if len(set(wnids.values())) != len(leaves):
        raise UserError(f"{path} is damaged: two classes share a number or a WordNet id")
    if unknown := sorted(set(truth) - set(wnids)):
        raise UserError(f"{path} is damaged: its ground truth has the class number {unknown[0]}, its synsets do not")
    return wnids, truth


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()
