"""`mae pack`: images into tar shards with an index."""

import zlib
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse import Namespace
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mae.commands import pack_parser
from mae.data.channel_stats import as_option, constant_channels, mean_and_std, moments
from mae.data.crops import resized_crop
from mae.data.datasets import Samples, WorkerProgress, default_workers
from mae.data.decode import BadImage, open_image
from mae.data.layout import Splits, open_splits, split_places
from mae.data.loaders import Loader, unchanged
from mae.data.prepare.imagenet_archives import TRAIN, VAL, holds_archives, open_archives
from mae.data.prepare.tar_writer import ShardWriter, check_free, exclusive_folder, image_suffix, write_final_index
from mae.data.prepare.verify import verify_shards
from mae.data.sources import FileSource, relabel
from mae.data.tar_shards import Index, RecordSource, make_index
from mae.errors import UserError
from mae.options import check_ranges
from mae.runtime.storage import Place

ORIGINAL = "original bytes"

JPEG_SIDE = 65500  # libjpeg's limit


def pack_command(args: Sequence[str]) -> None:
    config = pack_parser().parse_args(list(args))
    if config.verify is not None:
        if config.src is not None:
            raise UserError(f"--verify {config.verify} packs nothing: leave out {config.src}")
        try:
            verify_shards(local_path(config.verify, "--verify"), config.in_chans, config.num_workers)
        except OSError as error:
            raise UserError(f"--verify {error.filename or config.verify}: {error.strerror or error}") from None
    elif config.src is None or config.dst is None:
        raise UserError("wanted are two folders, mae pack SRC DST, or mae pack --verify DST")
    else:
        try:
            pack_images(config)
        except OSError as error:  # such as a folder without permissions, or a name that is too long
            raise UserError(f"{error.filename or config.dst}: {error.strerror or error}") from None


def local_path(path: str, argument: str) -> Path:
    """A path on this machine.

    Raises:
        UserError: It is a remote place.
    """
    place = Place(path)
    if place.remote:
        raise UserError(f"{argument} {path} is not on this machine: pack and verify here, then copy the folder there")
    return place.path


class Encoding(NamedTuple):
    """Images with a shorter side above `short_side` are resized and encoded as JPEG; None keeps all as they are."""

    short_side: int | None
    quality: int

    def __str__(self) -> str:
        if self.short_side is None:
            return ORIGINAL
        return f"short side {self.short_side}, JPEG quality {self.quality}"


class Record(NamedTuple):
    """An image ready to be written.

    Attributes:
        data: The bytes of its file; None if they cannot be read.
        suffix: Suffix of its member in the tar, without the dot.
        moments: (C, 2) mean and mean square of the channels in [0, 1]; None if it cannot be decoded.
        error: Why `data` or `moments` is None.
    """

    data: bytes | None
    suffix: str
    crc32: int
    moments: list[tuple[float, float]] | None
    error: BadImage | None


class Records(Samples):
    """The records of the images of a source, made by loader processes. Items are indices."""

    def __init__(self, source: FileSource, encoding: Encoding) -> None:
        super().__init__(source)
        self.files, self.encoding = source, encoding

    def __getitem__(self, index: int) -> Record:
        if self.progress:
            self.progress.set(index)
        suffix, where = image_suffix(self.files.name(index)), self.files.where(index)
        try:
            data = self.files.read(index)
            check_crc(self.files, index, data)
        except BadImage as error:
            return Record(None, suffix, 0, None, error)
        try:
            pixels = open_image(data, where, self.files.in_chans).pixels()
            if size := self.target_size(pixels):
                if pixels.dtype != torch.uint8:
                    raise BadImage(where, "is not of 8 bits, which JPEG needs: leave out --short_side")
                data, suffix = encode(pixels, size, self.encoding.quality), "jpg"
                pixels = open_image(data, f"{where} encoded anew", self.files.in_chans).pixels()
        except BadImage as error:
            return Record(data, suffix, zlib.crc32(data), None, error)
        return Record(data, suffix, zlib.crc32(data), moments(pixels), None)

    def target_size(self, pixels: Tensor) -> tuple[int, int] | None:
        """The (height, width) at which an image is encoded anew; None to keep its bytes."""
        height, width = pixels.shape[1:]
        short = self.encoding.short_side
        if short is None or min(height, width) <= short:
            return None
        scale = short / min(height, width)
        size = round(height * scale), round(width * scale)
        return size if max(size) <= JPEG_SIDE else None


def check_crc(source: FileSource, index: int, data: bytes) -> None:
    """Compare an image from shards with its checksum: damaged bytes must not get a new checksum that fits them."""
    if isinstance(source, RecordSource) and len(source.index.crc32) and source.index.crc32[index] != zlib.crc32(data):
        raise BadImage(source.where(index), "its bytes differ from the checksum in the index")


def encoding_history(source: FileSource, encoding: Encoding) -> str:
    """How the bytes were encoded: by this run and, for images from shards, by those before."""
    before = source.index.about.get("encoding", ORIGINAL) if isinstance(source, RecordSource) else ORIGINAL
    if before == ORIGINAL:
        return str(encoding)
    return str(before) if encoding.short_side is None else f"{before}, then {encoding}"


def encode(pixels: Tensor, size: tuple[int, int], quality: int) -> bytes:
    """(1 or 3, H, W) uint8 -> the bytes of a JPEG of another size, without chroma subsampling."""
    small = resized_crop(pixels, (0, 0, *pixels.shape[1:]), size)
    rows = small[0] if len(small) == 1 else small.permute(1, 2, 0).contiguous()
    stream = BytesIO()
    Image.fromarray(rows.numpy()).save(stream, "JPEG", quality=quality, subsampling="4:4:4")
    return stream.getvalue()


def pack_images(config: Namespace) -> None:
    src, dst = local_path(config.src, "SRC"), local_path(config.dst, "DST")
    workers = default_workers(1) if config.num_workers is None else config.num_workers
    check_ranges("", "(0, inf)", shard_mb=config.shard_mb)
    check_ranges("", "[1, inf)", in_chans=config.in_chans, short_side=config.short_side)
    check_ranges("", "[0, inf)", max_bad_images=config.max_bad_images, num_workers=workers)
    check_ranges("", "[1, 100]", quality=config.quality)
    if config.quality is not None and config.short_side is None:
        raise UserError(f"--quality {config.quality} has no effect: images are encoded only with --short_side")
    if config.short_side is not None and config.in_chans not in (1, 3):
        raise UserError(f"--short_side {config.short_side} encodes as JPEG, which has 1 or 3 channels (--in_chans)")
    encoding = Encoding(config.short_side, config.quality or 95)

    sources, places, _ = open_sources(src, config)
    folders = {split: dst / split for split in sources}
    check_apart(src, dst, folders, places)
    for folder in folders.values():
        check_free(folder, config.overwrite)
    if config.short_side is not None:
        check_jpegs(sources)

    packed: dict[str, Index] = {}
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(exclusive_folder(folder, config.overwrite))
        allowed = config.max_bad_images
        for split, source in sources.items():
            records = Records(source, encoding)
            packed[split] = write_shards(records, folders[split], split, workers, config.shard_mb, allowed)
            allowed -= packed[split].about["bad_images"]
        for split, index in packed.items():  # all at the end: packing into a folder with an index is refused
            write_final_index(folders[split], index)
    for split, index in packed.items():
        size, count, encoded = int(index.size.sum()) / 2**20, len(index.files), index.about["encoding"]
        print(f"wrote {folders[split]}: {len(index):,} images, {size:,.1f} MiB, in {count} shards; {encoded}")
    for key in ("mean", "std"):
        if values := packed["train"].about[key]:
            print(as_option(key, values), flush=True)
    about = packed["train"].about
    if about["std"] and (warning := constant_channels(about["mean"], about["std"])):
        print(warning, flush=True)


def open_sources(src: Path, config: Namespace) -> Splits:
    """The images of each split, with the labels that training would use."""
    if not src.exists():
        raise UserError(f"SRC {src} does not exist")
    root = Place(src)
    options = config.train_dir, config.val_dir, "--"
    if holds_archives(src):
        places, _ = split_places(root, *options)
        if places["train"].where == root.where:
            sources: dict[str, FileSource] = dict(open_archives(src, config.in_chans))
            if "val" not in sources:
                print(f"{src} holds {TRAIN} but no {VAL}: only train is packed", flush=True)
            return Splits(sources, dict.fromkeys(sources, root), [])
        print(f"{src} holds archives, too: the unpacked images in {places['train']} are packed", flush=True)
    splits = open_splits(root, config.in_chans, *options)
    print(splits, flush=True)
    sources, places = splits.sources, splits.places
    if "val" in sources and sources["train"].classes and sources["val"].classes:
        relabel(sources["val"], sources["train"].classes, str(places["train"]))
    return splits


def check_apart(src: Path, dst: Path, folders: dict[str, Path], places: dict[str, Place]) -> None:
    """Refuse to write into the folder that is read: shards would lie among its images, or replace what is read.

    Raises:
        UserError: Source or destination lies in the other.
    """
    source, target = src.resolve(), dst.resolve()
    if target == source or source in target.parents:
        raise UserError(f"DST {dst} lies in SRC {src}: choose a folder outside")
    for split, folder in folders.items():
        output = folder.resolve()
        for path in (source, places[split].path.resolve()):
            if path == output or path in output.parents or output in path.parents:
                raise UserError(f"{folder} would be written and {path} is read: choose another DST")


def check_jpegs(sources: dict[str, FileSource]) -> None:
    for source in sources.values():
        for i in range(len(source)):
            if source.name(i).lower().endswith(".npy"):
                raise UserError(f"--short_side encodes as JPEG, which {source.where(i)} cannot become: leave it out")


def write_shards(records: Records, folder: Path, split: str, workers: int, shard_mb: float, allowed: int) -> Index:
    """Write all images of a source into the shards of a folder; returns the index, which is not written yet.

    Args:
        allowed: The number of images that may be unreadable.

    Raises:
        UserError: An image cannot be read, or a shard cannot be written.
    """
    source, n = records.files, len(records.files)
    records.progress = WorkerProgress(source, workers)
    loader = Loader(records, batch_size=None, sampler=range(n), num_workers=workers, collate_fn=unchanged)
    columns = [array(kind) for kind in "IqqI"]  # shard, offset, size, crc32
    sums, bad = np.zeros((source.in_chans, 2)), 0
    with ShardWriter(folder, shard_mb * 2**20) as shards:
        for i, record in enumerate(tqdm(loader, split, n, unit="image", disable=None, dynamic_ncols=True)):
            if record.data is None:
                raise UserError(f"{record.error}: its bytes cannot be read, so nothing is packed")
            if record.error is not None:
                bad += 1
                if bad > allowed:
                    raise UserError(f"{record.error}; a higher --max_bad_images packs unreadable images as they are")
                tqdm.write(f"mae: warning: unreadable image, packed as it is: {record.error}")
            else:
                sums += record.moments
            place = shards.add(i, record.suffix, record.data, None if source.labels is None else source.labels[i])
            for column, value in zip(columns, (*place, len(record.data), record.crc32), strict=True):
                column.append(value)
    about: dict[str, Any] = {"images": n, "bad_images": bad, "encoding": encoding_history(source, records.encoding)}
    mean, std = mean_and_std(sums, n - bad) if n > bad else (None, None)
    about |= {"mean": mean, "std": std}
    file, offset, size, crc32 = columns
    names = [source.name(i) for i in range(n)]
    return make_index(shards.files, file, offset, size, names, crc32, source.labels, source.classes, about)
