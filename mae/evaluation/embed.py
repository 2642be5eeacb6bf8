"""`mae embed`: features of a folder of any images, to a file.

Images are cut into parts of whole batches, by their numbers alone; each part is computed by one process and waits in
the folder `OUT.parts`. When all are there OUT is put together from them, one after the other. So memory holds no more
features than a part's, a command that was killed goes on at the first part that is missing, and the file does not
depend on where it was killed nor on how many processes there are.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from mae.commands import embed_parser
from mae.data.crops import center_box
from mae.data.datamodule import ImageData, Loader
from mae.data.datasets import Batch, WholeSamples, labels_of, stack
from mae.data.decode import BadImage
from mae.data.sampling import HELD_OUT_EPOCH
from mae.data.sources import FileSource
from mae.data.tar_shards import INDEX, holds_images, open_images
from mae.errors import PeerLost, UserError
from mae.evaluation import features
from mae.evaluation.embed_chunks import (
    ABOUT,
    FINAL,
    FINISHED,
    FeatureChunk,
    FeatureChunks,
    atomic_write_text,
    checked_out,
    exclusive_lock,
    os_errors_as_user_errors,
)
from mae.evaluation.feature_files import WRITERS
from mae.runtime import signals
from mae.runtime.environment import is_first_rank, torchrun_sizes
from mae.runtime.processes import gather, lost_peer
from mae.runtime.rank_flags import Agreement
from mae.runtime.storage import Place, sync
from mae.weights import load
from mae.weights.load import image_settings

PART_ROWS = 1024  # images of a part, about: some MB of features, and a row group that Parquet's readers like

SPLITS = ("train", "val")

MORE = "a larger --max_bad_images leaves unreadable images out, lists them, and goes on from here"

Encode = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, F, D)


def embed_command(args: Sequence[str]) -> None:
    config = embed_parser().parse_args(list(args))
    if not is_first_rank():
        signals.die_with_parent()  # a rank that is left alone would go on for hours, and nobody would take its parts
    out = checked_out(config.out, config.force)
    for key, least in (("batch_size", 1), ("max_bad_images", 0)):
        if config[key] < least:
            raise UserError(f"--{key} {config[key]}: at least {least}")
    weights = load.read_weights(config.encoder)
    weights.require_pretrained(config.allow_finetuned, "--allow_finetuned true")
    encoder = weights.encoder()
    layers = sorted({config.layers} if isinstance(config.layers, int) else set(config.layers))
    try:
        _, encode = features.multi_layer_features(encoder, layers, [config.pool])
    except ValueError as error:
        raise UserError(f"--layers: {error}") from None
    data = ImageData(
        root=config.data.root,
        batch_size_per_device=config.batch_size,
        num_workers=config.num_workers,
        **image_settings(weights.description),
    )
    source = EveryImage(data.require_root(), data.in_chans)
    try:
        fabric = Fabric(**{"devices": config.devices, "accelerator": config.accelerator} | torchrun_sizes())
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--devices {config.devices}, --accelerator {config.accelerator}: {error}") from None
    about = {
        "encoder": weights.fingerprint(),
        "num_heads": weights.config["num_heads"],  # which its tensors do not tell
        "pool": config.pool,
        "layers": layers,
        "width": encoder.embed_dim * (2 if config.pool == "both" else 1),
        "dtype": config.dtype,
        "image_size": list(data.image_size),
        "in_chans": data.in_chans,
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_pct,
        "images": len(source),
        "list_of_images": source.fingerprint(),
        "batch_size": config.batch_size,
        "batches_per_part": max(1, PART_ROWS // config.batch_size),
        "device": fabric.device.type,
        "torch": str(torch.__version__),
    }
    parts = FeatureChunks(out, about)
    encoder.to(fabric.device)
    if not is_first_rank():
        compute(parts, encode, data, source, fabric, config.max_bad_images)
        return
    with exclusive_lock(parts.folder):
        checked_out(config.out, config.force)  # again: another command may have written it until now
        if parts.begin(config.force):
            compute(parts, encode, data, source, fabric, config.max_bad_images)
            finish(parts, source, config.max_bad_images)
        parts.clear()


class EveryImage(FileSource):
    """All images below a root, in the order of their paths.

    Attributes:
        parts: What lies there, by the prefix of its names: one thing, or shards a split.
        starts: The number of each part's first image, and at the end of all images.
    """

    def __init__(self, root: Place, in_chans: int) -> None:
        """
        Raises:
            UserError: There is no image.
        """
        shards = not (root / INDEX).exists() and any((root / split / INDEX).exists() for split in SPLITS)
        prefixes = [f"{split}/" for split in SPLITS if holds_images(root / split)] if shards else [""]
        self.in_chans = in_chans
        self.parts = {prefix: open_images(root / prefix if prefix else root, in_chans) for prefix in prefixes}
        if not shards and not (root / INDEX).exists():
            part = self.parts[""]
            part.labels, part.classes = folder_labels(part)
        self.starts = np.cumsum([0, *map(len, self.parts.values())])
        self.labelled = any(part.classes for part in self.parts.values())
        self.classes = []  # numbers of classes are nobody's business here: rows hold names

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _part(self, index: int) -> tuple[str, FileSource, int]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        prefix = list(self.parts)[number]
        return prefix, self.parts[prefix], index - int(self.starts[number])

    def name(self, index: int) -> str:
        prefix, part, i = self._part(index)
        return prefix + part.name(i)

    def path(self, index: int) -> str:
        """The name as text that any reader takes: bytes that are not UTF-8 are written out, as \\xff."""
        return os.fsencode(self.name(index)).decode("utf-8", "backslashreplace")

    def label(self, index: int) -> str | None:
        _, part, i = self._part(index)
        if part.labels is None or part.labels[i] < 0:
            return None
        return part.classes[part.labels[i]]

    def where(self, index: int) -> str:
        _, part, i = self._part(index)
        return part.where(i)

    def read(self, index: int) -> bytes:
        _, part, i = self._part(index)
        return part.read(i)

    def read_all(self, indices: Sequence[int]) -> Iterator[bytes | BadImage]:
        for prefix, group in itertools.groupby(indices, lambda index: self._part(index)[0]):
            yield from self.parts[prefix].read_all([self._part(index)[2] for index in group])

    def fingerprint(self) -> str:
        """Of the names and labels, in order."""
        digest = hashlib.blake2b(digest_size=8)
        for index in range(len(self)):
            digest.update(f"{self.path(index)}\0{self.label(index) or ''}\n".encode())
        return digest.hexdigest()


def folder_labels(source: FileSource) -> tuple[list[int] | None, list[str]]:
    """Labels, -1 for none, and names of the classes: those of its folders, below train/ and val/ where there are such.

    Args:
        source: Labelled by the first folder of each name.
    """
    splits = set(source.classes) & set(SPLITS)
    if splits:  # of these, such as have no image outside of a class's folder
        names = map(source.name, range(len(source)))
        splits -= {name.split("/", 1)[0] for name in names if name.count("/") < 2}
    if not splits:
        return (None, []) if set(source.classes) <= set(SPLITS) else (source.labels, source.classes)
    number: dict[str, int] = {}
    labels = []
    for name in map(source.name, range(len(source))):
        split, folder, *_ = name.split("/", 2)
        labels.append(number.setdefault(folder, len(number)) if split in splits else -1)
    return labels, list(number)


class ReadableSamples(WholeSamples):
    """As its base, but an unreadable image is left out of its batch, which says why: only that one is lost."""

    def __getitem__(self, indices: list[int]) -> Batch:
        images, kept, errors = [], [], []
        for index, picture in zip(indices, self.opened(indices), strict=True):
            try:
                if isinstance(picture, BadImage):
                    raise picture
                box = center_box(picture.height, picture.width, self.size, self.crop_pct)
                images.append(picture.resized_crop(box, self.size))
                kept.append(index)
            except BadImage as error:
                errors.append(error)
        n = len(kept)
        return Batch(
            stack(images) if images else torch.zeros(0, 1, 1, 1),
            labels_of(self.source, kept),
            torch.tensor(kept, dtype=torch.long),
            torch.full((n,), HELD_OUT_EPOCH),
            torch.zeros(n, dtype=torch.bool),
            torch.ones(n),
            errors,
            {},
        )


class Batches(Sampler[list[int]]):
    """The images of some parts, batch by batch."""

    def __init__(self, numbers: list[int], parts: FeatureChunks) -> None:
        self.numbers, self.parts = numbers, parts

    def __len__(self) -> int:
        return sum(len(self.parts.batches(number)) for number in self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for number in self.numbers for batch in self.parts.batches(number))


def compute(
    parts: FeatureChunks, encode: Encode, data: ImageData, source: EveryImage, fabric: Fabric, most: int
) -> None:
    """All parts that are missing, shared among the processes.

    Args:
        most: Unreadable images to tolerate.

    Raises:
        UserError: On every process, where one finds an image too many that cannot be read, or cannot write.
        PeerLost: Another process is gone.
    """
    fabric.launch()
    begun: tuple[str, list[int], int] = (parts.key, [], 0)
    if is_first_rank():
        begun = (parts.key, parts.missing(), len(parts.bad()))
        there = parts.count - len(begun[1])
        print(f"{len(source)} images" + (f"; {there} of {parts.count} parts are there" if there else ""), flush=True)
    key, missing, bad = fabric.broadcast(begun)
    mine = missing[fabric.global_rank :: fabric.world_size]
    turns = -(-len(missing) // fabric.world_size)
    # Other files than the first process has found: numbers would mean other images.
    error = "" if key == parts.key else f"process {fabric.global_rank} has other images below {data.root} or settings"
    bar = tqdm(total=parts.images(mine), unit=" images", disable=None if is_first_rank() else True)
    try:
        agreement = Agreement(1)
        computed = part_by_part(mine, parts, encode, data, source, fabric.device, most - bad)
        for turn in range(turns):
            try:
                if not error:  # else the part stays away; the others hear of it in their next turn
                    bar.update(next(computed, 0))
            except UserError as wrong:
                error = str(wrong)
            if agreement.hear([int(bool(error))], wait=turn == turns - 1) != [0]:
                raise UserError(gather(error)[0])
    except RuntimeError as lost:
        if said := lost_peer(lost):
            raise PeerLost(f"{said}; the same command again goes on from {parts.folder}") from None
        raise
    finally:
        bar.close()


def part_by_part(
    mine: list[int],
    parts: FeatureChunks,
    encode: Encode,
    data: ImageData,
    source: EveryImage,
    device: torch.device,
    most: int,
) -> Iterator[int]:
    """Compute and write one part after the other; gives the number of images of each.

    Raises:
        UserError: More than `most` images cannot be read; a feature is not finite; a part cannot be written.
    """
    samples = ReadableSamples(source, data.image_size, data.crop_pct)
    loaded: Iterator[Batch] = iter(data.loader(Loader, samples, Batches(mine, parts)) if mine else ())
    dtype: torch.dtype = getattr(torch, parts.about["dtype"])
    for number in mine:
        rows: list[Tensor] = []
        values = [torch.zeros(0, len(parts.columns), parts.about["width"], dtype=dtype)]
        bad: list[tuple[int, str]] = []
        for asked in parts.batches(number):
            batch = next(loaded)
            rows.append(batch.indices)
            left_out = sorted(set(asked) - set(batch.indices.tolist()))
            bad += [(index, error.reason) for index, error in zip(left_out, batch.errors, strict=True)]
            if batch.errors and (most := most - len(batch.errors)) < 0:
                raise UserError(f"{batch.errors[-1]}; {MORE}")
            if len(batch.images):
                values.append(encoded(encode, data, batch, device).to(dtype).cpu())
            if not values[-1].isfinite().all():
                way = "" if dtype == torch.float32 else ": use --dtype float32"
                raise UserError(f"features from {source.where(asked[0])} on are not finite in {dtype}{way}")
        columns = {
            name: value.contiguous() for name, value in zip(parts.columns, torch.cat(values).unbind(1), strict=True)
        }
        parts.write(number, FeatureChunk(torch.cat(rows), columns, bad))
        yield parts.images([number])


@torch.no_grad()
def encoded(encode: Encode, data: ImageData, batch: Batch, device: torch.device) -> Tensor:
    return encode(data.prepare(batch._replace(images=batch.images.to(device), flip=batch.flip.to(device))).images)


def finish(parts: FeatureChunks, source: EveryImage, most: int) -> None:
    """Put the file together, and in its place.

    Raises:
        UserError: More than `most` images are left out, by all processes together; or it cannot be written.
    """
    bad = parts.bad()
    if len(bad) > most:
        raise UserError(f"{len(bad)} images cannot be read, among them {source.where(bad[0][0])}: {bad[0][1]}; {MORE}")
    final = parts.folder / FINAL
    with os_errors_as_user_errors(parts.out):
        WRITERS[parts.out.suffix](final, parts, source)
        sync(final)
        if bad:
            lines = [f"{source.path(index)}\t{' '.join(reason.split())}\n" for index, reason in bad]
            atomic_write_text(parts.bad_list, "".join(lines))
        else:
            parts.bad_list.unlink(missing_ok=True)
        (parts.folder / ABOUT).replace(parts.folder / FINISHED)
        sync(parts.folder)
        final.replace(parts.out)
        sync(parts.out.parent)
    left_out = f"; {len(bad)} unreadable images are left out, listed in {parts.bad_list}" if bad else ""
    size = f"{' and '.join(parts.columns)} of {parts.about['width']} {parts.about['dtype']} each"
    print(f"wrote {parts.out}: {len(source) - len(bad)} images, {size}{left_out}", flush=True)
