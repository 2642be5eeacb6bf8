"""`mae bench data`: the input pipeline stage by stage beside the official one, and batches from loader processes."""

import io
import itertools
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.transforms import functional

from mae.bench.figures import (
    Figure,
    add_json_option,
    alternate,
    check_options,
    figure,
    ratio,
    torch_threads,
    write_json,
)
from mae.data import crops
from mae.data.crops import Box, Crop
from mae.data.datamodule import ImageData, raise_errors
from mae.data.datasets import Batch, TrainSamples, stack
from mae.data.decode import BadImage, Picture, open_image
from mae.data.sampling import Key, generator
from mae.data.sources import FileSource, FolderSource, spread
from mae.errors import UserError
from mae.options import ToolParser
from mae.runtime.device_clock import wait_for
from mae.runtime.machine import machine_details

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
    parser.add_argument(
        "--rounds", type=int, default=8, help="Groups of images that are measured one by one, for the spread."
    )
    parser.add_argument("--images", type=int, default=400, help="Number of images, spread over the data set.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Shortest measurement of loader processes.")
    add_json_option(parser)
    config = parser.parse_args(list(args))
    check_options(config, "rounds", "images")
    if min(config.workers, default=-1) < 0 or config.seconds <= 0:
        raise UserError("--workers must be at least 0, --seconds above 0")
    module = ImageData(**config.data.as_dict())
    module.setup("fit")
    with torch_threads(1):
        figures = bench_data(module, config)
    write_json(config.json, figures)


def bench_data(module: ImageData, config: Namespace) -> dict[str, Any]:
    """Measure both pipelines and the loaders; print and return the figures."""
    source = module.train_source
    if not isinstance(source, FileSource):
        raise UserError(f"--data.dataset {module.dataset} lies in memory: nothing is decoded; try `mae bench run`")
    if not isinstance(module.crop, Crop) or module.in_chans != 3:
        raise UserError("the official pipeline crops RGB images at random: leave --data.crop_scale and in_chans alone")
    chosen = spread(source, config.images)
    rounds = min(config.rounds, len(chosen))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, Any] = {"machine": machine_details(device), "images": len(chosen), "rounds": rounds}
    figures |= {"image_size": list(module.image_size), "batch": module.batch_size, "jpeg_scaling": module.jpeg_scaling}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(module, source)
        official = Official(module, source, chosen, Path(folder))
        figures |= decoder_counts(ours.samples, chosen)
        by = ", ".join(f"{count} by {name}" for name, count in figures["decoders"].items())
        print(f"{len(chosen)} of {len(source)} images of {module.root}, median {figures['size']}; decoded: {by}")
        figures["stages"] = stage_figures(ours, official, chosen, rounds)
        figures["difference"] = pixel_difference(ours, official, chosen)
        figures["parts"] = time_shares(ours, chosen)
    print_stages(figures, module.jpeg_scaling)
    figures["workers"] = loader_rates(module, source, chosen, config, rounds, device)
    print_workers(figures["workers"], device)
    name, share = max(figures["parts"].items(), key=lambda item: item[1])
    print(f"{SHARES[name]} takes {share:.0%} of the full pipeline")
    return figures


class Ours:
    """Our pipeline from a file to a batch: single stages, and the whole as training does it."""

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
    """The paper's published pipeline (main_pretrain.py): PIL decodes whole images, torchvision transforms them.

    Args:
        chosen: The images that will be asked for; those that are not files of their own are copied to `folder`.
    """

    def __init__(self, module: ImageData, source: FileSource, chosen: Sequence[int], folder: Path) -> None:
        assert isinstance(module.crop, Crop)
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


def decoder_counts(ours: TrainSamples, chosen: Sequence[int]) -> dict[str, Any]:
    """How many images each decoder takes, and the median size.

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


def stage_figures(ours: Ours, official: Official, chosen: Sequence[int], rounds: int) -> dict[str, dict[str, Figure]]:
    """Images per second of CPU time, of both pipelines in turns on the same images."""
    pipelines: dict[str, Ours | Official] = {"ours": ours, "official": official}
    for pipeline in pipelines.values():
        stage_rates(pipeline, chosen[:4], [ours.box(index) for index in chosen[:4]], 4)  # imports and first-use tables
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in pipelines}
    for turn in range(rounds):
        indices = chosen[turn::rounds]
        boxes = [ours.box(index) for index in indices]
        for name in alternate(list(pipelines), turn):
            rates[name].append(stage_rates(pipelines[name], indices, boxes, ours.batch_size))
    table: dict[str, dict[str, Figure]] = {}
    for stage in STAGES:
        table[stage] = {name: figure([rate[stage] for rate in rates[name]]) for name in pipelines}
        table[stage]["ratio"] = ratio(table[stage]["ours"], table[stage]["official"])
    return table


def stage_rates(pipeline: Any, indices: Sequence[int], boxes: Sequence[Box], batch_size: int) -> dict[str, float]:
    """Images per second of CPU time, by stage."""
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


def pixel_difference(ours: Ours, official: Official, chosen: Sequence[int]) -> dict[str, Any]:
    """How far our crops are from PIL's of the same boxes, in levels of 255; PIL's images are turned upright first."""
    means, largest, turned, excluded = [], 0.0, 0, 0
    for index in chosen:
        with Image.open(official.paths[index]) as image:
            if image.has_transparency_data or image.mode.startswith(("I", "F")):
                excluded += 1  # laid on white by us, or of 16 bits: other pixels on purpose
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
        "not_compared": excluded,
    }


SHARES = {
    "read": "reading files",
    "open": "reading headers",
    "decode": "the decoder",
    "draw": "drawing boxes",
    "resize": "cropping and resizing",
    "stack": "stacking batches",
    "rest": "everything else",
}


def time_shares(ours: Ours, chosen: Sequence[int]) -> dict[str, float]:
    """What share of our full pipeline's CPU time goes where: its steps one by one on the same batches."""
    seconds, whole, now = dict.fromkeys(SHARES, 0.0), 0.0, time.process_time
    samples, source = ours.samples, ours.source
    for first in range(0, len(chosen), ours.batch_size):
        indices, crops_ = chosen[first : first + ours.batch_size], []
        start = now()
        ours.full(indices)
        whole += (read := now()) - start
        files = list(source.read_all(indices))
        seconds["read"] += now() - read
        for index, data in zip(indices, files, strict=True):
            if isinstance(data, BadImage):
                raise UserError(str(data))
            start = now()
            picture = open_image(data, source.where(index), source.in_chans)
            opened = now()
            _, box = samples.draw((0, index), picture.height, picture.width)
            drawn = now()
            crops_.append(picture.resized_crop(box, samples.size, samples.reduced))
            cropped = now()
            # The decoder works within these two: Pillow's when an image is opened, libjpeg-turbo's when it is cropped.
            resizing = min(resize_seconds(picture, box, samples), cropped - drawn)
            seconds["decode" if picture.decoder == "Pillow" else "open"] += opened - start
            seconds["draw"] += drawn - opened
            seconds["decode"] += cropped - drawn - resizing
            seconds["resize"] += resizing
        start = now()
        stack(crops_)
        seconds["stack"] += now() - start
    whole = max(whole, sum(seconds.values()))
    shares = {name: seconds[name] / whole for name in SHARES if name != "rest"}
    return shares | {"rest": max(0.0, 1 - sum(shares.values()))}


def resize_seconds(picture: Picture, box: Box, samples: TrainSamples) -> float:
    """CPU seconds to resize a box of pixels that are decoded already, at the size that the decoder gives them."""
    shrink = 1
    while samples.reduced and picture.decoder != "Pillow" and shrink < 8:
        if any(length < 2 * shrink * wanted for length, wanted in zip(box[2:], samples.size, strict=True)):
            break
        shrink *= 2
    pixels = picture.pixels().permute(1, 2, 0)[::shrink, ::shrink].contiguous().permute(2, 0, 1)
    top, left, height, width = (value // shrink for value in box)
    start = time.process_time()
    crops.resized_crop(pixels, (top, left, max(1, height), max(1, width)), samples.size)
    return time.process_time() - start


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
    shares = ", ".join(f"{name} {share * whole:.0f}" for name, share in figures["parts"].items())
    print(f"of our {whole:.0f} µs an image: {shares}", flush=True)


# ---- loader processes ------------------------------------------------------------------------------------------------


def endless_batches(indices: Sequence[int], batch_size: int, seed: int) -> Iterator[list[Key]]:
    """Batches of some images, shuffled anew in each epoch, without end."""
    keys: list[Key] = []
    for epoch in itertools.count():
        order = torch.randperm(len(indices), generator=generator(seed, epoch, 0, "order"))
        keys += [(epoch, indices[i]) for i in order.tolist()]
        while len(keys) >= batch_size:
            yield keys[:batch_size]
            keys = keys[batch_size:]


def loader_rates(
    module: ImageData, source: FileSource, chosen: Sequence[int], config: Namespace, rounds: int, device: torch.device
) -> dict[int, dict[str, Figure]]:
    """Wall-clock images/s that reach the main process, by number of loader processes."""
    received, prepared = ({count: list[float]() for count in config.workers} for _ in range(2))
    for turn in range(rounds):
        for count in alternate(list(received), turn):
            module.num_workers = count
            for rate, work in ((received, False), (prepared, True)):
                batches = endless_batches(chosen, module.batch_size, module.seed)
                loader = module.loader(DataLoader, module.samples(source), batches)
                rate[count].append(loader_rate(module, loader, config.seconds, device if work else None))
    table = {
        count: {"received": figure(received[count]), "prepared": figure(prepared[count])} for count in config.workers
    }
    first = table[config.workers[0]]["received"]
    for row in table.values():
        row["ratio"] = ratio(row["received"], first)
    return table


def loader_rate(module: ImageData, loader: DataLoader[Batch], seconds: float, device: torch.device | None) -> float:
    """Images/s in the steady state; with a device, flipped, scaled and normalised on it."""
    workers, count = max(1, loader.num_workers), 0
    start = math.inf
    for count, batch in enumerate(loader, 1 - 2 * workers):
        raise_errors(batch)
        if device is not None:
            module.prepare(batch._replace(images=batch.images.to(device), flip=batch.flip.to(device)))
        if count == 0:
            wait_for(device)
            start = time.perf_counter()
        # Batches arrive in bursts of one per worker, and only whole bursts count.
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
