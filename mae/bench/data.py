"""`mae bench data`: the input pipeline stage by stage beside the official one, and batches from loader processes."""

import io
import itertools
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from jsonargparse import Namespace
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate
from torchvision import transforms
from torchvision.transforms import functional

from mae.bench.figures import Figure, figure, machine, one_thread, ratio, write_json
from mae.data import crops, datasets, jpeg, sources
from mae.data import decode as decode_module
from mae.data.crops import Box
from mae.data.datamodule import ImageData, raise_errors
from mae.data.datasets import Batch, TrainSamples
from mae.data.decode import BadImage, open_image
from mae.data.sampling import Key, generator
from mae.data.sources import FileSource, FolderSource, spread
from mae.errors import UserError
from mae.options import ToolParser, out_file
from mae.runtime.device_clock import wait_for
from mae.runtime.storage import Place

T = TypeVar("T")


STAGES = ("read", "decode", "crop", "full pipeline")

UNUSED = {"num_workers", "device_resident", "max_bad_images", "val_dir", "crop_pct"}


def data_command(args: Sequence[str]) -> None:
    parser = ToolParser(
        prog="mae bench data",
        description="Images/s of reading, decoding and cropping beside the official MAE pipeline (PIL, torchvision), "
        "and of batches from loader processes.",
    )
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(ImageData, "data", skip=UNUSED)
    parser.add_argument("--workers", type=int, default=[1, 2], nargs="+", help="Numbers of loader processes.")
    parser.add_argument("--rounds", type=int, default=8, help="Parts that are measured one by one, for the spread.")
    parser.add_argument("--images", type=int, default=400, help="How many, spread over the data set.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Of each measurement of loader processes, at least.")
    parser.add_argument("--json", type=str | None, default=None, help="Write all figures to this file, too.")
    config = parser.parse_args(list(args))
    if min(config.rounds, config.images) < 1 or min(config.workers, default=-1) < 0 or config.seconds <= 0:
        raise UserError("--rounds and --images must be at least 1, --workers at least 0, --seconds above 0")
    if config.json:
        out_file(config.json, "--json")
    module = ImageData(**config.data.as_dict())
    module.setup("fit")
    with one_thread():
        figures = bench_data(module, config)
    write_json(config.json, figures)


def bench_data(module: ImageData, config: Namespace) -> dict[str, Any]:
    """Measures and prints."""
    source = module.train_source
    if not isinstance(source, FileSource):
        raise UserError(f"--data.dataset {module.dataset} lies in memory: nothing is decoded; try `mae bench run`")
    if module.crop is None or module.in_chans != 3:
        raise UserError("the official pipeline crops RGB images at random: leave --data.crop_scale and in_chans alone")
    chosen = spread(source, config.images)
    rounds = min(config.rounds, len(chosen))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"machine": machine(device), "images": len(chosen), "rounds": rounds}
    figures |= {"image_size": list(module.image_size), "batch": module.batch_size, "jpeg_scaling": module.jpeg_scaling}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(module, source)
        official = Official(module, source, chosen, Path(folder))
        figures |= (said := decoders(ours.samples, chosen))
        by = ", ".join(f"{count} by {name}" for name, count in said["decoders"].items())
        print(f"{len(chosen)} of {len(source)} images of {module.root}, median {said['size']}; decoded: {by}")
        figures["stages"] = stages(ours, official, chosen, rounds)
        figures["difference"] = compare(ours, official, chosen)
    figures["parts"] = parts(ours, chosen)
    print_stages(figures, module.jpeg_scaling)
    figures["workers"] = loaders(module, source, chosen, config, rounds, device)
    print_workers(figures["workers"], device)
    name, share = max(figures["parts"].items(), key=lambda item: item[1])
    print(f"{NAMES[name]} takes {share:.0%} of the full pipeline")
    return figures


class Pipeline(Protocol):
    """From a file to a batch; single stages, and all of it as training does it."""

    def read(self, index: int) -> bytes: ...
    def decode(self, data: bytes, index: int) -> Any: ...
    def crop(self, pixels: Any, box: Box) -> Any: ...
    def full(self, indices: Sequence[int]) -> Any: ...


class Ours:
    def __init__(self, module: ImageData, source: FileSource) -> None:
        self.source, self.size, self.samples = source, module.image_size, module.samples(source)
        self.batch_size = module.batch_size

    def read(self, index: int) -> bytes:
        return self.source.read(index)

    def decode(self, data: bytes, index: int) -> Tensor:
        return open_image(data, self.source.where(index), self.source.in_chans).pixels()

    def crop(self, pixels: Tensor, box: Box) -> Tensor:
        return crops.resized_crop(pixels, box, self.size)

    def full(self, indices: Sequence[int]) -> Batch:
        batch = self.samples[[(0, index) for index in indices]]
        raise_errors(batch)
        return batch

    def box(self, index: int) -> Box:
        picture = open_image(self.read(index), self.source.where(index), self.source.in_chans)
        return self.samples.draw((0, index), picture.height, picture.width)[1]


class Official:
    """As published with the paper (main_pretrain.py): PIL decodes whole images, torchvision's transforms do the rest.

    Args:
        chosen: The images that are asked for; where they are not files of their own, they are copied to `folder`.
    """

    def __init__(self, module: ImageData, source: FileSource, chosen: Sequence[int], folder: Path) -> None:
        assert module.crop is not None
        self.size, self.paths = module.image_size, dict[int, str]()
        for index in chosen:
            if isinstance(source, FolderSource):
                self.paths[index] = source.where(index)
                continue
            self.paths[index] = str(folder / f"{index}{Path(source.name(index)).suffix}")
            try:
                Path(self.paths[index]).write_bytes(source.read(index))
            except BadImage as error:
                raise UserError(str(error)) from None
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    self.size, module.crop.scale, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(module.hflip),
                transforms.ToTensor(),
                transforms.Normalize(module.mean, module.std),
            ]
        )

    def read(self, index: int) -> bytes:
        with open(self.paths[index], "rb") as file:
            return file.read()

    def decode(self, data: bytes, index: int) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def crop(self, pixels: Image.Image, box: Box) -> Image.Image:
        return functional.resized_crop(pixels, *box, self.size, transforms.InterpolationMode.BICUBIC)

    def full(self, indices: Sequence[int]) -> Any:
        items = []
        for index in indices:
            with open(self.paths[index], "rb") as file:
                items.append((self.transform(Image.open(file).convert("RGB")), 0))
        return default_collate(items)


def decoders(ours: TrainSamples, chosen: Sequence[int]) -> dict[str, Any]:
    """How many images each decoder takes, and their median size.

    Raises:
        UserError: One of them cannot be read, or PIL does not know its format.
    """
    assert isinstance(ours.source, FileSource)
    counts, sides = Counter[str](), []
    for index in chosen:
        try:
            picture = ours.source.open(index)
            picture.pixels()
        except BadImage as error:
            raise UserError(str(error)) from None
        if picture.decoder == "numpy":
            raise UserError(f"{ours.source.where(index)}: the official pipeline knows no .npy files")
        counts[picture.decoder] += 1
        sides.append((picture.width, picture.height))
    width, height = (round(statistics.median(side)) for side in zip(*sides, strict=True))
    return {"decoders": dict(counts.most_common()), "size": f"{width} x {height}"}


def stages(ours: Ours, official: Official, chosen: Sequence[int], rounds: int) -> dict[str, dict[str, Figure]]:
    """Images per second of CPU time, of both pipelines by turns on the same images."""
    both: dict[str, Pipeline] = {"ours": ours, "official": official}
    for pipeline in both.values():
        rates(pipeline, chosen[:4], [ours.box(index) for index in chosen[:4]], 4)  # imports and tables of the first use
    found: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    for turn in range(rounds):
        part = chosen[turn::rounds]
        boxes = [ours.box(index) for index in part]
        for name in list(both)[:: -1 if turn % 2 else 1]:
            found[name].append(rates(both[name], part, boxes, ours.batch_size))
    table: dict[str, dict[str, Figure]] = {}
    for stage in STAGES:
        table[stage] = {name: figure([one[stage] for one in found[name]]) for name in both}
        table[stage]["ratio"] = ratio(table[stage]["ours"], table[stage]["official"])
    return table


def rates(pipeline: Pipeline, indices: Sequence[int], boxes: Sequence[Box], batch_size: int) -> dict[str, float]:
    seconds, now = dict.fromkeys(STAGES, 0.0), time.process_time
    for index, box in zip(indices, boxes, strict=True):
        start = now()
        data = pipeline.read(index)
        read = now()
        pixels = pipeline.decode(data, index)
        decoded = now()
        pipeline.crop(pixels, box)
        seconds["crop"] += now() - decoded
        seconds["decode"] += decoded - read
        seconds["read"] += read - start
    start = now()
    for first in range(0, len(indices), batch_size):
        pipeline.full(indices[first : first + batch_size])
    seconds["full pipeline"] = now() - start
    return {stage: len(indices) / max(spent, 1e-9) for stage, spent in seconds.items()}


def compare(ours: Ours, official: Official, chosen: Sequence[int]) -> dict[str, Any]:
    """How far our crops are from PIL's of the same boxes, in levels of 255; PIL's images are turned upright first."""
    means, largest, turned, apart = [], 0.0, 0, 0
    for index in chosen:
        with Image.open(official.paths[index]) as image:
            if image.has_transparency_data or image.mode.startswith(("I", "F")):
                apart += 1  # laid on white by us, or of 16 bits: other pixels on purpose
                continue
            turned += image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            upright = ImageOps.exif_transpose(image).convert("RGB")
        theirs = functional.pil_to_tensor(official.crop(upright, ours.box(index)))
        difference = (ours.full([index]).images[0].int() - theirs.int()).abs()
        means.append(difference.double().mean().item())
        largest = max(largest, difference.max().item())
    return {
        "images": len(means),
        "mean": statistics.fmean(means) if means else 0.0,
        "worst_image": max(means, default=0.0),
        "worst_pixel": largest,
        "turned_upright": turned,
        "not_compared": apart,
    }


# Functions of ours by the name of what they do, and where they are looked up when called.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "read": ((sources, "read_file"), (Place, "read_ranges")),
    "open": ((sources, "open_image"),),
    "decode": ((jpeg, "decode"), (decode_module, "_open_with_pillow")),
    "draw": ((TrainSamples, "draw"),),
    "resize": ((decode_module, "resized_crop"),),
    "stack": ((datasets, "stack"),),
}

NAMES = {
    "read": "reading files",
    "open": "reading headers",
    "decode": "the decoder",
    "draw": "drawing boxes",
    "resize": "cropping and resizing",
    "stack": "stacking batches",
    "rest": "everything else",
}


def parts(ours: Ours, chosen: Sequence[int]) -> dict[str, float]:
    """What share of our full pipeline's time goes where."""
    with Stopwatch() as watch:
        start = time.process_time()
        for first in range(0, len(chosen), ours.batch_size):
            ours.full(chosen[first : first + ours.batch_size])
        whole = time.process_time() - start
    found = {name: watch.spent[name] / whole for name in PARTS}
    return found | {"rest": 1 - sum(found.values())}


class Stopwatch:
    """Counts CPU seconds in the functions of `PARTS`, those within each other once.

    The profilers of Python would make the many small functions look expensive beside the decoder.
    """

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.inner: list[float] = []  # of each function under way: seconds of those that it called

    def __enter__(self) -> Self:
        self.originals = [
            (place, name, getattr(place, name), part) for part, found in PARTS.items() for place, name in found
        ]
        for place, name, original, part in self.originals:
            setattr(place, name, self.timed(original, part))
        return self

    def __exit__(self, *error: object) -> None:
        for place, name, original, _ in self.originals:
            setattr(place, name, original)

    def timed(self, function: Callable[..., T], part: str) -> Callable[..., T]:
        def timed(*args: Any, **kwargs: Any) -> T:
            self.inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - start
                self.spent[part] += took - self.inner.pop()
                if self.inner:
                    self.inner[-1] += took

        return timed


def print_stages(figures: dict[str, Any], reduced: bool) -> None:
    print("one process, one thread, images per second of CPU time; official: PIL and torchvision, to float32")
    print(f"{'':<14}{'ours':>9}{'official':>10}   ours / official")
    for stage, row in figures["stages"].items():
        print(f"{stage:<14}{row['ours'].median:>9,.0f}{row['official'].median:>10,.0f}   {row['ratio']}")
    print("decode and crop are of whole images; the full pipeline decodes what its crop needs", end="")
    print(", at reduced size where that is enough" if reduced else "")
    off = figures["difference"]
    print(
        f"difference from PIL in the same boxes: {off['mean']:.4f} levels of 255, in the worst image "
        f"{off['worst_image']:.4f}, in the worst pixel {off['worst_pixel']:.0f} ({off['images']} images"
        + (f", {off['turned_upright']} turned upright" if off["turned_upright"] else "")
        + (f"; {off['not_compared']} transparent or of 16 bits left out" if off["not_compared"] else "")
        + ")"
    )
    whole = 1e6 / figures["stages"]["full pipeline"]["ours"].median
    said = ", ".join(f"{name} {share * whole:.0f}" for name, share in figures["parts"].items())
    print(f"of our {whole:.0f} µs an image: {said}", flush=True)


# ---- loader processes ------------------------------------------------------------------------------------------------


class Endless(Sampler[list[Key]]):
    """Batches of some images, shuffled anew each time round, without end."""

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int) -> None:
        self.indices, self.batch_size, self.seed = torch.tensor(indices), batch_size, seed

    def __iter__(self) -> Iterator[list[Key]]:
        keys = self.keys()
        while True:
            yield list(itertools.islice(keys, self.batch_size))

    def keys(self) -> Iterator[Key]:
        for epoch in itertools.count():
            order = torch.randperm(len(self.indices), generator=generator(self.seed, epoch, 0, "order"))
            for index in self.indices[order].tolist():
                yield epoch, index


def loaders(
    module: ImageData, source: FileSource, chosen: Sequence[int], config: Namespace, rounds: int, device: torch.device
) -> dict[int, dict[str, Figure]]:
    """Batches that the main process gets, as wall-clock images/s, by number of loader processes."""
    received, prepared = ({count: list[float]() for count in config.workers} for _ in range(2))
    for turn in range(rounds):
        for count in list(received)[:: -1 if turn % 2 else 1]:
            module.num_workers = count
            for rate, work in ((received, False), (prepared, True)):
                sampler = Endless(chosen, module.batch_size, module.seed)
                loader = module.loader(DataLoader, module.samples(source), sampler)
                rate[count].append(delivered(module, loader, config.seconds, device if work else None))
    table = {
        count: {"received": figure(received[count]), "prepared": figure(prepared[count])} for count in config.workers
    }
    first = table[config.workers[0]]["received"]
    for row in table.values():
        row["ratio"] = ratio(row["received"], first)
    return table


def delivered(module: ImageData, loader: DataLoader[Batch], seconds: float, device: torch.device | None) -> float:
    """Images/s in the steady state; on a device, flipped, scaled and normalised there."""
    workers, count = max(1, loader.num_workers), 0
    start = math.inf
    for count, batch in enumerate(loader, 1 - 2 * workers):
        raise_errors(batch)
        if device is not None:
            module.prepare(batch._replace(images=batch.images.to(device), flip=batch.flip.to(device)))
        if count == 0:
            wait_for(device)
            start = time.perf_counter()
        # Batches come in bursts of one a worker: whole bursts are counted.
        if count > 0 and count % workers == 0 and time.perf_counter() - start >= seconds:
            break
    wait_for(device)
    return count * module.batch_size / (time.perf_counter() - start)


def print_workers(table: dict[int, dict[str, Figure]], device: torch.device) -> None:
    first = next(iter(table))
    print(f"uint8 batches in the main process, images per second of wall clock; prepared: normalised on {device} there")
    print(f"{'workers':<14}{'received':>9}{'prepared':>10}   received / {first} worker{'s' if first != 1 else ''}")
    for count, row in table.items():
        print(f"{count:<14}{row['received'].median:>9,.0f}{row['prepared'].median:>10,.0f}   {row['ratio']}")
