"""Change files at random and have them read: an error of one line or what they hold, never anything else.

    python tests/soak/fuzz.py --minutes 60 --seed 0
    python tests/soak/fuzz.py --case image 4711       # one case again; its files stay in --keep

Each case is the name of a target and a number, from which the file and its changes follow. A case that raises anything
but the error meant for users, takes longer than SECONDS, grows by more than its target's bound, or ends the process is
reported with its number, and ends the script with exit code 1. Linux only.
"""

import argparse
import contextlib
import itertools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1] / "support"))

import numpy as np
import safetensors.numpy
import torch
from foreign import KINDS, SMALL, autoencoder
from image_files import encoded, png16, smooth
from PIL import Image

from mae.callbacks.metrics_csv import MetricsCSV
from mae.data.decode import BadImage, decode_image, open_image, read_file
from mae.data.tar_shards import INDEX, RecordSource, make_index, read_index, tar_source, write_index
from mae.errors import UserError
from mae.runtime import checkpoint_files
from mae.runtime.memory import resident, status
from mae.runtime.run_files import load_yaml
from mae.runtime.storage import Place
from mae.weights.load import read_weights

SECONDS = 10  # for one file
MIB = 1 << 20
NUMBERS = [0, 1, 2, 127, 128, 255, 256, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1]
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    10**9,
    10**30,
    1e308,
    float("nan"),
    "",
    "x",
    "9" * 5000,
    [],
    {},
    [[[[[]]]]],
    [0] * 99,
]


class Target(NamedTuple):
    """A kind of file, and what reads it.

    Attributes:
        make: Writes whole files into an empty folder; returns those that are changed.
        read: Reads a changed file; what it raises other than `UserError` and `BadImage` is a finding.
        growth: MiB, at most, beyond what the process takes anyway.
        change: The new content of a file.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    growth: int
    change: Callable[[Path, random.Random], bytes]


# ---- changes ---------------------------------------------------------------------------------------------------------


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, removed, doubled, or cut off at the end; more often near the start, where headers are."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        near = draw.random() < 0.5
        at = min(int(draw.expovariate(1 / 80)) if near else draw.randrange(len(result) + 1), len(result))
        length = int(draw.expovariate(1 / 20)) + 1
        match draw.randrange(7):
            case 0:
                result[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                width = draw.choice((1, 2, 4, 8))
                number = draw.choice(NUMBERS) % 256**width
                result[at : at + width] = number.to_bytes(width, draw.choice(("big", "little")))
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = result[at : at + length] * draw.choice((1, 2, 100))
            case 4:
                result[at:at] = draw.randbytes(length)
            case 5:
                del result[at:]
                result += draw.choice((b"", b"\xff\xd9", b"\0" * 1000, data[-20:]))
            case 6:
                other = draw.randrange(len(data) + 1)
                result[at : at + length] = data[other : other + length]
    return bytes(result)


def value_changed(value: Any, draw: random.Random) -> Any:
    """A JSON value with something in it replaced, doubled or removed."""
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or draw.random() < 0.15:
        return draw.choice(VALUES)
    value, key = value.copy(), draw.choice(children)
    if draw.random() < 0.1:
        del value[key]
    else:
        value[key] = value_changed(value[key], draw)
    return value


def with_right_checksums(data: bytes) -> bytes:
    """A PNG with right checksums of its chunks, as far as its structure goes; so a tar file; others as they are."""
    result = bytearray(data)
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 12 <= len(result):
            end = at + 8 + int.from_bytes(result[at : at + 4])
            result[end : end + 4] = struct.pack(">I", zlib.crc32(result[at + 4 : end]))[: max(0, len(result) - end)]
            at = end + 4
    elif b"ustar" in data[:1024]:
        for at in range(0, len(result) - 511, 512):
            if b"ustar" in result[at + 256 : at + 265]:
                result[at + 148 : at + 156] = b" " * 8
                result[at + 148 : at + 156] = b"%06o\0 " % (sum(result[at : at + 512]) % 8**6)
    return bytes(result)


def plain(path: Path, draw: random.Random) -> bytes:
    data = bytes_changed(path.read_bytes(), draw)
    return with_right_checksums(data) if draw.random() < 0.5 else data


def inside(path: Path, draw: random.Random) -> bytes:
    """Weights with changed bytes, or changed settings in an intact file."""
    data = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.8:
        return json.dumps(value_changed(json.loads(data), draw)).encode()
    if draw.random() < 0.3:
        return plain(path, draw)
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        if "mae" in metadata and draw.random() < 0.6:
            metadata["mae"] = json.dumps(value_changed(json.loads(metadata["mae"]), draw))
        else:
            header = value_changed(header, draw)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if zipfile.is_zipfile(path) and draw.random() < 0.5:
        out = BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, bytes_changed(content, draw) if name.endswith("data.pkl") else content)
        return out.getvalue()
    with contextlib.suppress(Exception):
        content = torch.load(path, weights_only=True)
        if isinstance(content.get("mae"), dict):
            content["mae"] = value_changed(content["mae"], draw)
            torch.save(content, out := BytesIO())
            return out.getvalue()
    return plain(path, draw)


def index_changed(path: Path, draw: random.Random) -> bytes:
    """An index of shards with a right checksum and something wrong in it."""
    if draw.random() < 0.2:
        return plain(path, draw)
    index = read_index(Place(path.parent))
    values = index._asdict()
    if draw.random() < 0.3:
        key = draw.choice(("files", "classes", "about"))
        values[key] = value_changed(values[key], draw)
    else:
        key = draw.choice([key for key, value in values.items() if isinstance(value, np.ndarray)])
        column = values[key].copy()
        match draw.randrange(5):
            case 0 if len(column):
                number = draw.choice([-1, -(2**62), *NUMBERS])
                column[draw.randrange(len(column))] = number % 2 ** (8 * column.itemsize - 1)
            case 1 if len(column):
                column = column.view(np.dtype(f"i{column.itemsize}"))
                column[draw.randrange(len(column))] = -draw.choice((1, 2, 100))
            case 2:
                column = column.astype(draw.choice(("int8", "int64", "uint64", "float32", "bool")))
            case 3:
                column = column[: draw.randrange(len(column) + 1)]
            case _:
                column = draw.choice((column[None], np.concatenate([column, column]), column[:, None]))
        values[key] = column
    changed = type(index)(**values)
    header = {"version": 1, "files": changed.files, "classes": changed.classes, "about": changed.about}
    with contextlib.suppress(Exception):  # values that have no checksum
        header["crc32"] = changed.checksum()
    arrays = {key: np.ascontiguousarray(value) for key, value in values.items() if isinstance(value, np.ndarray)}
    return safetensors.numpy.save(arrays, {"mae_shards": json.dumps(header)})


# ---- targets ---------------------------------------------------------------------------------------------------------


def image_files(folder: Path) -> list[Path]:
    rgb, grey = Image.fromarray(smooth(70, 90)), Image.fromarray(smooth(50, 40, 1)[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = rgb.copy()
    rgba.putalpha(128)
    files = {
        "a.jpg": encoded(rgb, "JPEG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "grey.jpg": encoded(grey, "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "restarts.jpg": encoded(rgb, "JPEG", restart_marker_rows=1),
        "a.png": encoded(rgb, "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG"),
        "alpha.png": encoded(rgba, "PNG"),
        "deep.png": png16(smooth(30, 20, 4).astype(np.uint16) * 257),
        "a.gif": encoded(rgb, "GIF", save_all=True, append_images=[rgb, rgb]),
        "a.webp": encoded(rgb, "WEBP"),
        "a.bmp": encoded(rgb, "BMP"),
        "a.ppm": encoded(rgb, "PPM"),
        "a.jp2": encoded(rgb, "JPEG2000"),
        "a.tif": encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "lzw.tif": encoded(grey, "TIFF", compression="tiff_lzw"),
        "deep.tif": encoded(Image.fromarray(smooth(30, 20, 1)[..., 0].astype(np.uint16) * 257), "TIFF"),
        "float.tif": encoded(Image.fromarray(smooth(30, 20, 1)[..., 0].astype(np.float32)), "TIFF"),
    }
    np.save(file := BytesIO(), smooth(20, 30))
    files["a.npy"] = file.getvalue()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def read_image(path: Path) -> None:
    decode_image(path, 1 if "grey" in path.name else 3)
    image = open_image(read_file(path), path)
    image.resized_crop((image.height // 4, 0, -(-image.height // 2), image.width), (16, 16))


def weights_files(folder: Path) -> list[Path]:
    network, files = autoencoder(**SMALL), []
    for i, kind in enumerate(KINDS.values()):
        (own := folder / str(i)).mkdir()
        kind.write(network, own)
        files += [path for path in own.rglob("*") if path.is_file()]
    (run := folder / "run").mkdir()
    from mae.launch.stages import PretrainCLI

    small = [
        "--model.size=nano",
        "--model.embed_dim=32",
        "--model.depth=1",
        "--model.num_heads=2",
        "--model.patch_size=7",
    ]
    small += ["--model.decoder_embed_dim=16", "--model.decoder_depth=1", "--model.decoder_num_heads=2"]
    small += ["--data.dataset=digits", "--data.num_workers=0", "--trainer.accelerator=cpu", "--wandb.mode=disabled"]
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        PretrainCLI([*small, f"--run_dir={run}", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]).fit()
    return (
        files + [run / "model.safetensors", run / "encoder.safetensors", run / "checkpoints" / "step_0000001.ckpt"] * 4
    )


def read_any_weights(path: Path) -> None:
    folder = path.parent
    read_weights(folder if (folder / "config.json").is_file() else path)


def shards(folder: Path) -> list[Path]:
    files, sizes = image_files(folder)[:6], []
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for path in files:
            tar.add(path, path.name)
            sizes.append(path.stat().st_size)
            path.unlink()
        offsets = [member.offset_data for member in tar.getmembers()]
    names, labels = [path.name for path in files], [i % 2 for i in range(len(files))]
    about = {"mean": [0.5] * 3, "std": [0.2] * 3}
    index = make_index(["000000.tar"], [0] * 6, offsets, sizes, names, [0] * 6, labels, ["x", "y"], about)
    write_index(index, folder / INDEX)
    return [folder / INDEX]


def read_shards(path: Path) -> None:
    source = RecordSource(Place(path.parent), read_index(Place(path.parent)), 3)
    for i in range(min(len(source), 20)):
        source.where(i)
    list(source.open_all(range(min(len(source), 20))))


def tar_files(folder: Path) -> list[Path]:
    (loose := folder / "loose").mkdir()
    images = image_files(loose)
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    for name, kind in formats.items():
        with tarfile.open(folder / f"{name}.tar", "w", format=kind) as tar:
            for i, path in enumerate(images[:4]):
                long = "" if kind == tarfile.USTAR_FORMAT else "long/" * 40 + "ä"
                tar.add(path, f"train/{i % 2}/{long}{path.name}")
    shutil.rmtree(loose)
    return [folder / f"{name}.tar" for name in formats]


def read_tar(path: Path) -> None:
    source = tar_source(path, 3)
    list(source.open_all(range(min(len(source), 20))))


def run_files(folder: Path) -> list[Path]:
    metrics = MetricsCSV(folder / "metrics.csv")
    for step in range(1, 9):
        metrics.log_metrics({"train/loss": 1 / step, **({"val/loss": 0.5} if step % 4 == 0 else {})}, step)
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel:\n  size: base\n  betas: [0.9, 0.95]\ndata: &d {a: 1}\n"
    )
    (folder / ".newest").write_text("step_0000003.ckpt")
    (folder / "checkpoints").mkdir()
    checkpoint_files.write({"global_step": 3, "mae": {"step": 3}}, checkpoint_files.step_file(folder, 3))
    return [folder / "metrics.csv", folder / "config.yaml", folder / ".newest", checkpoint_files.step_file(folder, 3)]


def read_run_folder(path: Path) -> None:
    if path.suffix == ".ckpt":
        checkpoint_files.newest(path.parent.parent)
        return
    MetricsCSV(path.with_name("metrics.csv"), 5)
    load_yaml(path.with_name("config.yaml"))
    checkpoint_files.ever_saved(path.parent)


TARGETS = {
    "image": Target(image_files, read_image, 1536, plain),
    "weights": Target(weights_files, read_any_weights, 256, inside),
    "index": Target(shards, read_shards, 256, index_changed),
    "tar": Target(tar_files, read_tar, 256, plain),
    "run": Target(run_files, read_run_folder, 256, plain),
}


# ---- the attack ------------------------------------------------------------------------------------------------------


def try_case(name: str, number: int, files: Sequence[Path]) -> str:
    """Change a file, read it, put it back; returns "read", "refused", or what is wrong.

    Raises:
        BaseException: What the reader has raised and must not.
    """
    target, draw = TARGETS[name], random.Random(f"{name} {number}")
    path = draw.choice(files)
    whole = path.read_bytes()
    path.write_bytes(target.change(path, draw))
    before = resident()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    signal.alarm(SECONDS)
    try:
        target.read(path)
        outcome = "read"
    except (UserError, BadImage) as error:
        outcome = "refused"
        if "\n" in str(error):
            outcome = f"the error has several lines: {str(error)!r}"
    signal.alarm(0)
    growth = (status("VmHWM") - before) // MIB
    if growth > target.growth:
        outcome = f"it took {growth} MiB"
    if outcome in ("read", "refused"):
        path.write_bytes(whole)  # else the file stays to be looked at
    return outcome


def attack(
    name: str, numbers: Iterable[int], folder: Path, until: float = float("inf")
) -> tuple[Counter[str], list[str]]:
    """Try cases, in a process of its own that is replaced when a case ends it.

    Args:
        folder: Empty; files of findings stay there.
        until: No more cases after this time of `time.monotonic()`.

    Returns:
        How many were read and refused; the findings.
    """
    outcomes: Counter[str] = Counter()
    findings: list[str] = []
    torch.set_num_threads(1)
    numbers = iter(numbers)
    shared = mmap.mmap(-1, 24)  # the case under way; how many were read, and refused
    for part in itertools.count():
        (own := folder / f"{name}_{part}").mkdir(parents=True)
        files = TARGETS[name].make(own)
        shared[:] = bytes(24)
        chunk = list(itertools.islice(numbers, 1000)) if time.monotonic() < until else []
        while chunk:
            sys.stdout.flush()
            if (pid := os.fork()) == 0:
                os._exit(child(name, chunk, files, until, shared))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            number, *counts = struct.unpack("<3q", shared[:])
            if code == 0:
                break
            what = f"took over {SECONDS} s" if code == -signal.SIGALRM else f"ended the process with {code}"
            findings.append(f"{name} {number}: {what if code < 0 else 'see above'}; {own}")
            print(findings[-1], flush=True)
            chunk = chunk[chunk.index(number) + 1 :]
            (own := folder / f"{name}_{part}_{number}").mkdir()
            files = TARGETS[name].make(own)
        if not chunk:
            shutil.rmtree(own)
            return outcomes, findings
        outcomes.update(read=counts[0], refused=counts[1])
        shutil.rmtree(own)
    return outcomes, findings


def child(name: str, chunk: list[int], files: list[Path], until: float, shared: mmap.mmap) -> int:
    """Try the cases; 1 after the first finding, whose files are left as they are."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes what it finds
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 8 * 1024 * MIB,) * 2)  # the machine outlives a finding
    counts = list(struct.unpack("<2q", shared[8:]))
    for number in chunk:
        if time.monotonic() > until:
            break
        shared[:8] = struct.pack("<q", number)
        try:
            outcome = try_case(name, number, files)
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
            traceback_of(error)
        if outcome not in ("read", "refused"):
            print(f"{name} {number}: {outcome}", flush=True)
            return 1
        counts[outcome == "refused"] += 1
        shared[8:] = struct.pack("<2q", *counts)
    return 0


def traceback_of(error: BaseException) -> None:
    import traceback

    print("".join(traceback.format_exception(error)[-6:]), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="in all, shared out over the targets")
    parser.add_argument("--seed", type=int, default=0, help="cases from seed x 10 million on")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--case", nargs=2, metavar=("TARGET", "NUMBER"), help="only this one")
    parser.add_argument("--keep", type=Path, help="a new folder (default: a temporary one, kept after a finding)")
    args = parser.parse_args(argv)
    root = args.keep or Path(tempfile.mkdtemp(prefix="fuzz_"))
    found: list[str] = []
    for name in [args.case[0]] if args.case else args.targets:
        start = time.monotonic()
        numbers = [int(args.case[1])] if args.case else itertools.count(args.seed * 10_000_000)
        until = start + 60 * args.minutes / len(args.targets)
        outcomes, findings = attack(name, numbers, root / name, until)
        found += findings
        print(
            f"{name}: {outcomes['read']:,} read, {outcomes['refused']:,} refused, {len(findings)} findings, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    if found:
        print(f"{len(found)} findings; files in {root}")
    else:
        shutil.rmtree(root)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
