"""`mae embed`: features of a folder of any images, to a file.

Images are divided into chunks of whole batches, by their numbers alone. Each chunk is computed by one process and
waits in the folder `OUT.parts` until all are there; then OUT is put together from them. So memory holds the features of
one chunk only, a command that was killed goes on with the chunks that are missing, and the file depends neither on
where it was killed nor on the number of processes.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm

from mae.commands import embed_parser
from mae.data.crops import RESIZED_THEN_CROPPED
from mae.data.datamodule import ImageData
from mae.data.datasets import Batch, WholeSamples
from mae.data.decode import BadImage
from mae.data.layout import NameTree, find_layout, split_of, tree_of
from mae.data.loaders import Loader
from mae.data.sources import FileSource
from mae.data.tar_shards import INDEX, open_images
from mae.errors import PeerLost, UserError
from mae.evaluation import features
from mae.evaluation.embed_chunks import FeatureChunks, checked_out
from mae.runtime import signals
from mae.runtime.environment import is_first_rank, torchrun_sizes
from mae.runtime.processes import gather, lost_peer
from mae.runtime.rank_flags import Agreement
from mae.runtime.storage import Place
from mae.runtime.text import escaped, printable
from mae.training.lightning_internals import end_with_lost_ranks
from mae.weights.load import read_weights, trained_data_settings

PART_ROWS = 1024  # images per chunk, about: some MB of features, and a good size for a row group of Parquet

MORE = "a larger --max_bad_images leaves unreadable images out, lists them, and goes on from here"

Encode = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, F, D)


def embed_command(args: Sequence[str]) -> None:
    config = embed_parser().parse_args(list(args))
    if not is_first_rank():
        signals.die_with_parent()  # left alone, a rank would go on for hours, and nobody would use its chunks
    out = checked_out(config.out, config.force)
    for key, least in (("batch_size", 1), ("max_bad_images", 0)):
        if config[key] < least:
            raise UserError(f"--{key} {config[key]}: at least {least}")
    weights = read_weights(config.encoder)
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
        **trained_data_settings(weights.description),
    )
    source = EveryImage(data.require_root(), data.in_chans)
    end_with_lost_ranks()
    try:
        fabric = Fabric(**{"devices": config.devices, "accelerator": config.accelerator} | torchrun_sizes())
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--devices {config.devices}, --accelerator {config.accelerator}: {error}") from None
    about = {
        "encoder": weights.fingerprint(),
        "num_heads": weights.config["num_heads"],  # not visible in its tensors
        "pool": config.pool,
        "layers": layers,
        "width": encoder.embed_dim * (2 if config.pool == "both" else 1),
        "dtype": config.dtype,
        "image_size": list(data.image_size),
        **{key: getattr(data, key) for key in ("in_chans", "mean", "std", "crop_pct")},
        "evaluation_pixels": RESIZED_THEN_CROPPED,
        "images": len(source),
        "list_of_images": source.fingerprint(),
        "batch_size": config.batch_size,
        "batches_per_part": max(1, PART_ROWS // config.batch_size),
        "device": fabric.device.type,
        "torch": str(torch.__version__),
    }
    chunks = FeatureChunks(out, about)
    encoder.to(fabric.device)
    if not is_first_rank():
        compute(chunks, encode, data, source, fabric, config.max_bad_images)
        return
    with chunks.lock():
        checked_out(config.out, config.force)  # again, since another command may have written it in the meantime
        chunks.begin(config.force)
        compute(chunks, encode, data, source, fabric, config.max_bad_images)
        write_output(chunks, source, config.max_bad_images)
        chunks.clear()


class EveryImage(FileSource):
    """All images below a root, in the order of their paths.

    Attributes:
        sources: By the prefix of their names: one source, or shards for each split.
        starts: The number of the first image of each source, and at the end the number of all images.
    """

    def __init__(self, root: Place, in_chans: int) -> None:
        """
        Raises:
            UserError: There is no image.
        """
        prefixes = [""]
        indexed = (root / INDEX).exists()
        if not indexed and (root.remote or root.path.is_dir()):
            tree = tree_of(root)
            shards = {name for name in tree.folders("") if (root / name / INDEX).exists()}
            if shards:
                prefixes = [f"{name}/" for name in tree.folders("") if name in shards or tree.holds_images(name)]
        self.in_chans = in_chans
        self.sources = {prefix: open_images(root / prefix if prefix else root, in_chans) for prefix in prefixes}
        if prefixes == [""] and not indexed:
            source = self.sources[""]
            source.labels, source.classes = folder_labels(source)
        self.starts = np.cumsum([0, *map(len, self.sources.values())])
        self.labelled = any(source.classes for source in self.sources.values())
        self.classes = []  # unused: rows hold the names of classes

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _locate(self, index: int) -> tuple[str, FileSource, int]:
        """Prefix and source of an image, and its number there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        prefix = list(self.sources)[number]
        return prefix, self.sources[prefix], index - int(self.starts[number])

    def name(self, index: int) -> str:
        prefix, source, i = self._locate(index)
        return prefix + source.name(i)

    def path(self, index: int) -> str:
        """The name as the file holds it, see `escaped`."""
        return escaped(self.name(index))

    def label(self, index: int) -> str | None:
        _, source, i = self._locate(index)
        if source.labels is None or source.labels[i] < 0:
            return None
        return source.classes[source.labels[i]]

    def where(self, index: int) -> str:
        _, source, i = self._locate(index)
        return source.where(i)

    def read(self, index: int) -> bytes:
        _, source, i = self._locate(index)
        return source.read(i)

    def read_all(self, indices: Sequence[int]) -> Iterator[bytes | BadImage]:
        for prefix, group in itertools.groupby(indices, lambda index: self._locate(index)[0]):
            yield from self.sources[prefix].read_all([self._locate(index)[2] for index in group])

    def fingerprint(self) -> str:
        """Hash of the names and labels, in order."""
        digest = hashlib.blake2b(digest_size=8)
        for index in range(len(self)):
            digest.update(f"{self.path(index)}\0{self.label(index) or ''}\n".encode())
        return digest.hexdigest()


def folder_labels(source: FileSource) -> tuple[list[int] | None, list[str]]:
    """Labels (-1 for none) and names of the classes, which are the folders below those of splits, or else below root.

    Args:
        source: Its labels are the first folders of the names.
    """
    if source.labels is None:
        return None, []
    tree, prefixes = NameTree([source.name(i) for i in range(len(source))]), list[str]()
    with suppress(UserError):  # which of two folders is for training does not matter here
        splits = find_layout(tree, Place(".")).splits.values()
        # only those in which every image is in the folder of a class
        prefixes = [f"{split}/" for split in splits if not tree.images(split)]
    if not prefixes:
        return (None, []) if all(map(split_of, source.classes)) else (source.labels, source.classes)
    number: dict[str, int] = {}
    labels = []
    for name in tree.names:
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        folder = "" if prefix is None else name[len(prefix) :].split("/", 1)[0]
        labels.append(number.setdefault(folder, len(number)) if folder else -1)
    return labels, list(map(escaped, number))


def compute(
    chunks: FeatureChunks, encode: Encode, data: ImageData, source: EveryImage, fabric: Fabric, max_bad: int
) -> None:
    """Compute all chunks that are missing, shared among the processes.

    Args:
        max_bad: Unreadable images to tolerate.

    Raises:
        UserError: On every process, where one of them finds too many unreadable images, or cannot write.
        PeerLost: Another process is gone.
    """
    fabric.launch()
    first_view: tuple[str, list[int], int] = (chunks.key, [], 0)
    if is_first_rank():
        missing = chunks.missing()
        first_view = (chunks.key, missing, len(chunks.bad()))
        done = chunks.count - len(missing)
        said = [f"{len(source)} images", *(part.leftovers.note() for part in source.sources.values())]
        said += [f"{done} of {chunks.count} parts are there" if done else ""]
        print("; ".join(filter(None, said)), flush=True)
    key, missing, bad = fabric.broadcast(first_view)
    mine = missing[fabric.global_rank :: fabric.world_size]
    turns = -(-len(missing) // fabric.world_size)
    # With other files than the first process has, numbers would mean other images.
    error = "" if key == chunks.key else f"process {fabric.global_rank} has other images below {data.root} or settings"
    bar = tqdm(total=chunks.images(mine), unit=" images", disable=None if is_first_rank() else True)
    try:
        agreement = Agreement()
        computed = compute_chunks(mine, chunks, encode, data, source, fabric.device, max_bad - bad)
        for turn in range(turns):
            try:
                if not error:  # otherwise the chunk is not computed; the others hear of it in their next turn
                    bar.update(next(computed, 0))
            except UserError as wrong:
                error = str(wrong)
            if agreement.hear([int(bool(error))], wait=turn == turns - 1) != [0]:
                raise UserError(gather(error)[0])
    except RuntimeError as lost:
        if message := lost_peer(lost):
            raise PeerLost(f"{message}; the same command again goes on from {chunks.folder}") from None
        raise
    finally:
        bar.close()


def compute_chunks(
    numbers: list[int],
    chunks: FeatureChunks,
    encode: Encode,
    data: ImageData,
    source: EveryImage,
    device: torch.device,
    max_bad: int,
) -> Iterator[int]:
    """Compute and write one chunk after the other; yields the number of images of each.

    Raises:
        UserError: More than `max_bad` images cannot be read; a feature is not finite; a chunk cannot be written.
    """
    samples = WholeSamples(source, data.image_size, data.crop_pct)
    batches = [batch for number in numbers for batch in chunks.batches(number)]
    loaded: Iterator[Batch] = iter(data.loader(Loader, samples, batches) if numbers else ())
    dtype: torch.dtype = getattr(torch, chunks.about["dtype"])
    for number in numbers:
        rows: list[Tensor] = []
        values = [torch.zeros(0, len(chunks.columns), chunks.about["width"], dtype=dtype)]
        bad: list[tuple[int, str]] = []
        for indices in chunks.batches(number):
            batch = next(loaded)
            rows.append(batch.indices)
            left_out = sorted(set(indices) - set(batch.indices.tolist()))
            bad += [(index, error.reason) for index, error in zip(left_out, batch.errors, strict=True)]
            if batch.errors and (max_bad := max_bad - len(batch.errors)) < 0:
                raise UserError(f"{batch.errors[-1]}; {MORE}")
            if len(batch.images):
                moved = batch._replace(images=batch.images.to(device), flip=batch.flip.to(device))
                with torch.no_grad():
                    values.append(encode(data.prepare(moved).images).to(dtype).cpu())
            if not values[-1].isfinite().all():
                hint = "" if dtype == torch.float32 else ": use --dtype float32"
                raise UserError(f"features from {source.where(indices[0])} on are not finite in {dtype}{hint}")
        columns = {
            name: value.contiguous() for name, value in zip(chunks.columns, torch.cat(values).unbind(1), strict=True)
        }
        chunks.write(number, torch.cat(rows), columns, bad)
        yield chunks.images([number])


def write_output(chunks: FeatureChunks, source: EveryImage, max_bad: int) -> None:
    """Check the unreadable images of all processes together, and put the output file together.

    Raises:
        UserError: More than `max_bad` images are left out; or the file cannot be written.
    """
    bad = chunks.bad()
    if len(bad) > max_bad:
        raise UserError(f"{len(bad)} images cannot be read, among them {source.where(bad[0][0])}: {bad[0][1]}; {MORE}")
    chunks.finish(
        source, "".join(f"{source.path(index)}\t{printable(' '.join(reason.split()))}\n" for index, reason in bad)
    )
    left_out = f"; {len(bad)} unreadable images are left out, listed in {chunks.bad_list}" if bad else ""
    size = f"{' and '.join(chunks.columns)} of {chunks.about['width']} {chunks.about['dtype']} each"
    print(f"wrote {chunks.out}: {len(source) - len(bad)} images, {size}{left_out}", flush=True)
