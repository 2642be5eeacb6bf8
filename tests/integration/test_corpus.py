"""A folder of what real data sets hold, through the pipeline: right pixels or a stated reason, and nothing else moves.

Also what a run must survive or end with: headers that lie, files that vanish, loader processes that are killed.
"""

import csv
import io
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, save_images
from conftest import mae as command
from forked import ForkedCommand
from image_files import become_nobody, encoded, in_child, on_white, png16, png_chunk, public_folder, smooth
from PIL import Image, ImageOps

from mae.cli import main
from mae.data.crops import resized_crop
from mae.data.datamodule import ImageData
from mae.data.datasets import Batch, worker_death_message
from mae.data.decode import BadImage, open_image
from mae.data.loaders import with_worker_errors

RGB = Image.fromarray(smooth(37, 53))
GREY = RGB.convert("L")
# What decoders do with the rest of a file that is full of zeros: where there is no end marker, no one can tell.
CUT = {
    "baseline.jpg": ("JPEG", RGB, {}),
    "progressive.jpg": ("JPEG", RGB, {"progressive": True}),
    "cut.png": ("PNG", RGB, {}),
    "cut.gif": ("GIF", RGB.quantize(200), {}),
    "cut.webp": ("WEBP", RGB, {}),
    "lossless.webp": ("WEBP", RGB, {"lossless": True}),
    "cut.tif": ("TIFF", RGB, {}),
    "lzw.tif": ("TIFF", RGB, {"compression": "tiff_lzw"}),
    "cut.bmp": ("BMP", RGB, {}),
}
WITH_END = ("baseline.jpg", "progressive.jpg", "cut.png", "cut.gif", "lzw.tif")


def through_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def without_adobe_marker(data: bytes) -> bytes:
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def good_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """File by name, and its pixels (H, W, 3)."""
    files = {
        "one.png": encoded(RGB.crop((0, 0, 1, 1)), "PNG"),
        "one.jpg": encoded(RGB.crop((0, 0, 1, 1)), "JPEG"),
        "wide.png": encoded(RGB.resize((20000, 10)), "PNG"),
        "wide.jpg": encoded(RGB.resize((20000, 10)), "JPEG"),
        "tall.jpg": encoded(RGB.resize((10, 20000)), "JPEG"),
        "a_png.jpg": encoded(RGB, "PNG"),
        "a_jpeg.png": encoded(RGB, "JPEG"),
        "a_gif.webp": encoded(RGB.quantize(30), "GIF"),
        "a_webp.tif": encoded(RGB, "WEBP", lossless=True),
        "a_tiff.bmp": encoded(RGB, "TIFF"),
        "a_bmp.JPEG": encoded(RGB, "BMP"),
        "a_ppm.gif": encoded(RGB, "PPM"),
        "animated.gif": encoded(
            RGB.quantize(30), "GIF", save_all=True, append_images=[Image.new("P", RGB.size)], duration=50
        ),
        "cmyk.jpg": encoded(RGB.convert("CMYK"), "JPEG"),
        "cmyk_without_adobe.jpg": without_adobe_marker(encoded(RGB.convert("CMYK"), "JPEG")),
        "grey.jpg": encoded(GREY, "JPEG"),
        "grey.png": encoded(GREY, "PNG"),
        "bits.png": encoded(RGB.convert("1"), "PNG"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"exif{orientation}.jpg"] = encoded(RGB, "JPEG", exif=exif)
    found = {name: (data, through_pillow(data)) for name, data in files.items()}

    rgba = smooth(37, 53, 4)
    found["alpha.png"] = encoded(Image.fromarray(rgba), "PNG"), on_white(rgba[..., :3], rgba[..., 3:])
    palette = encoded(RGB.quantize(8), "PNG", transparency=3)
    with_alpha = np.asarray(Image.open(io.BytesIO(palette)).convert("RGBA"))
    found["palette.png"] = palette, on_white(with_alpha[..., :3], with_alpha[..., 3:])
    samples = np.random.default_rng(0).integers(0, 65536, (37, 53, 4), dtype=np.uint16)
    narrow = np.floor(samples / 257 + 0.5).astype(np.uint8)
    found["grey16.png"] = png16(samples[..., :1]), narrow[..., :1].repeat(3, axis=2)
    found["rgb16.png"] = png16(samples[..., :3]), narrow[..., :3]
    found["rgba16.png"] = png16(samples), on_white(narrow[..., :3], narrow[..., 3:])
    return found


def bad_files() -> dict[str, tuple[bytes, str]]:
    """File by name, and what the reason must hold."""
    found: dict[str, tuple[bytes, str]] = {
        "nothing.jpg": (b"", "empty file"),
        "zeros.jpg": (bytes(5000), "known format"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 30, "known format"),
        "a_jpeg.npy": (encoded(RGB, "JPEG"), "magic"),
        "an_array.jpg": (b"\x93NUMPY\x01\0" + bytes(120), "known format"),
    }
    for name, (kind, picture, options) in CUT.items():
        whole = encoded(picture, kind, **options)  # type: ignore[arg-type]
        for tenth in range(1, 10):
            found[f"{tenth}0_percent_of_{name}"] = whole[: len(whole) * tenth // 10], ""
        if name in WITH_END:
            half = len(whole) // 2
            found[f"half_of_{name}"] = whole[:half] + bytes(len(whole) - half), ""
    return found


GOOD, BAD = good_files(), bad_files()
LINKS = {"dangling.jpg": "No such file", "loop.jpg": "symbolic links"}


def write_corpus(root: Path, broken: bool = True) -> None:
    """All files in two class folders, and links that lead nowhere; not broken: a good image in each bad one's place."""
    spare = encoded(RGB, "PNG")
    for label in ("cat", "dog"):
        (root / "train" / label).mkdir(parents=True)
    for i, (name, (data, _)) in enumerate([*GOOD.items(), *BAD.items()]):
        path = root / "train" / ("cat", "dog")[i % 2] / name
        if broken or name in GOOD:
            path.write_bytes(data)
        elif path.suffix == ".npy":
            np.save(path, np.asarray(RGB))
        else:
            path.write_bytes(spare)
    for name in LINKS:
        path = root / "train" / "cat" / name
        if broken:
            path.symlink_to(name if name == "loop.jpg" else "nowhere.jpg")
        else:
            path.write_bytes(spare)
    if broken:
        (root / "train" / "dog" / "up").symlink_to(root / "train")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With and without the bad files; the same names in the same order."""
    folders = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("intact")
    for folder, broken in zip(folders, (True, False), strict=True):
        write_corpus(folder, broken)
    return folders


def data_of(root: Path, **settings: object) -> ImageData:
    usual = {"image_size": 14, "batch_size_per_device": 6, "num_workers": 0, "max_bad_images": 1000}
    data = ImageData(root=str(root), **{**usual, **settings})  # type: ignore[arg-type]
    data.setup("fit")
    return data


def base(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def test_every_file_gives_the_right_pixels_or_the_stated_reason(
    corpora: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    source = data_of(corpora[0]).train_source
    assert source is not None
    assert len(source) == len(GOOD) + len(BAD) + len(LINKS)  # and none twice, through the link to the folder above
    for i in range(len(source)):
        name = base(source.name(i))
        if name in GOOD:
            pixels = source.open(i).pixels().permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels, GOOD[name][1], err_msg=name)
            continue
        with pytest.raises(BadImage) as caught:
            source.open(i).pixels()
        assert caught.value.path == source.where(i)
        assert (LINKS[name] if name in LINKS else BAD[name][1]) in caught.value.reason
        assert caught.value.reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [name for name in CUT if name not in WITH_END])
def test_zeros_that_no_marker_ends_are_pillows_pixels(name: str) -> None:
    kind, picture, options = CUT[name]
    whole = encoded(picture, kind, **options)  # type: ignore[arg-type]
    half = len(whole) // 2
    data = whole[:half] + bytes(len(whole) - half)
    np.testing.assert_array_equal(open_image(data, "x").pixels().permute(1, 2, 0).numpy(), through_pillow(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_costs_its_own_slot_and_no_other(corpora: tuple[Path, Path], workers: int) -> None:
    data, intact = (data_of(root, num_workers=workers) for root in corpora)
    source = data.train_source
    assert source is not None
    assert intact.train_source is not None
    assert [source.name(i) for i in range(len(source))] == [intact.train_source.name(i) for i in range(len(source))]
    told: set[str] = set()
    seen: list[int] = []
    for batch, other in zip(data.train_dataloader(), intact.train_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[1:4], other[1:4], strict=True))  # labels, indices, epochs
        assert not other.errors
        names = [base(source.name(i)) for i in batch.indices.tolist()]
        is_bad = torch.tensor([name not in GOOD for name in names])
        assert torch.equal(batch.weight, (~is_bad).float())
        assert torch.equal(batch.images[~is_bad], other.images[~is_bad])
        assert torch.equal(batch.flip[~is_bad], other.flip[~is_bad])
        assert not batch.images[is_bad].any()
        assert not batch.flip[is_bad].any()
        assert [base(error.path) for error in batch.errors] == [name for name in names if name not in GOOD]
        assert sum(batch.decoders.values()) == len(names) - len(batch.errors)
        told.update(base(error.path) for error in batch.errors)
        seen += batch.indices.tolist()
    assert len(seen) == len(set(seen)) == len(source) - len(source) % 6
    left_out = {base(source.name(i)) for i in set(range(len(source))) - set(seen)}
    assert told == {*BAD, *LINKS} - left_out


def test_a_training_image_is_the_crop_of_its_own_pixels(corpora: tuple[Path, Path]) -> None:
    data = data_of(corpora[0], seed=5)
    source = data.train_source
    assert source is not None
    samples, found = data.samples(source), 0
    for batch in data.train_dataloader():
        for image, index, flip, weight in zip(
            batch.images, batch.indices.tolist(), batch.flip, batch.weight, strict=True
        ):
            if not weight:
                continue
            pixels = torch.from_numpy(GOOD[base(source.name(index))][1].copy()).permute(2, 0, 1)
            drawn, box = samples.draw((0, index), *pixels.shape[1:])
            assert drawn == bool(flip)
            assert torch.equal(image, resized_crop(pixels, box, (14, 14))), source.name(index)
            found += 1
    assert found > len(GOOD) - 6


# --- the command


def settings(root: Path, run_dir: Path, *more: str) -> list[str]:
    return ["pretrain", *TINY, f"--data.root={root}", f"--run_dir={run_dir}", "--data.image_size=14", *more]


def test_a_run_over_the_corpus(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    count = len(BAD) + len(LINKS)
    usual = ["--data.batch_size_per_device=9", "--data.num_workers=2", "--trainer.max_epochs=1", "--panels.images=1"]
    done = command(*settings(corpora[0], tmp_path, *usual, f"--data.max_bad_images={count}"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stdout.splitlines() if "warning: unreadable image" in line]
    names = {base(line.split(": ")[3]) for line in told}
    assert len(told) == len(names) > count - 9  # each once; less than a batch is left out of an epoch
    assert names <= {*BAD, *LINKS}
    with (tmp_path / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["bad_images"]) == len(told)
    assert np.isfinite(float(last["train/loss"]))


def test_a_run_over_the_corpus_that_tolerates_nothing(
    corpora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--data.batch_size_per_device=9", "--data.num_workers=0", "--trainer.max_epochs=1"]
    assert main(settings(corpora[0], tmp_path, *usual)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mae: error: ")
    assert "--data.max_bad_images is 0" in line
    assert not (tmp_path / "checkpoints").exists()


def test_a_file_removed_while_training(tmp_path: Path) -> None:
    paths = save_images(tmp_path, 40)
    intact = list(data_of(tmp_path, num_workers=1, batch_size_per_device=4).train_dataloader())
    data = data_of(tmp_path, num_workers=1, batch_size_per_device=4)
    gone = intact[-1].indices[1].item()
    batches = []
    for batch in data.train_dataloader():
        paths[gone].unlink(missing_ok=True)  # after the listing, and before its turn: only two batches wait
        batches.append(batch)
    (error,) = batches[-1].errors
    assert str(error) == f"{paths[gone]}: No such file or directory"
    assert batches[-1].weight.tolist() == [1, 0, 1, 1]
    assert not batches[-1].images[1].any()
    for batch, other in zip(batches[:-1], intact[:-1], strict=True):
        assert torch.equal(batch.images, other.images)
    assert torch.equal(batches[-1].images[[0, 2, 3]], intact[-1].images[[0, 2, 3]])


def test_a_file_that_may_not_be_read() -> None:
    with public_folder() as folder:
        paths = save_images(folder, 4)

        def batch() -> Batch:
            return next(iter(data_of(folder, batch_size_per_device=4).train_dataloader()))

        intact = batch()
        paths[2].chmod(0)
        seen = in_child(lambda: (*batch()[:6], str(*batch().errors)), become_nobody)
    images, _, indices, _, _, weight, told = seen
    assert told == f"{paths[2]}: Permission denied"
    assert torch.equal(weight, (indices != 2).float())
    assert torch.equal(images, intact.images * (indices != 2)[:, None, None, None])


# --- headers that claim 60,000 x 60,000 pixels, or as much as the format can


def bombs() -> dict[str, bytes]:
    side = 60_000
    both = struct.pack(">HH", side, side), struct.pack("<HH", side, side)

    def edited(data: bytes, at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    def jpeg(mode: str, frame: bytes, **options: object) -> bytes:
        data = encoded(RGB.convert(mode), "JPEG", **options)
        return edited(data, data.index(frame) + 5, both[0])

    def tiff(compression: int) -> bytes:
        tags = [(256, side), (257, side), (258, 8), (259, compression), (262, 1), (273, 200), (277, 1), (278, side)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, 1000)])
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags) + 1) + entries + bytes(2000)

    def webp(flags: int, *chunks: bytes) -> bytes:
        canvas = struct.pack("<I", side - 1)[:3] * 2
        body = b"WEBPVP8X" + struct.pack("<IB", 10, flags) + bytes(3) + canvas + b"".join(chunks)
        return b"RIFF" + struct.pack("<I", len(body)) + body

    small, gif, bmp = encoded(RGB, "WEBP"), encoded(RGB.quantize(20), "GIF"), encoded(RGB, "BMP")
    lossless = encoded(RGB, "WEBP", lossless=True)
    frame = bytes(6) + struct.pack("<I", 52)[:3] + struct.pack("<I", 36)[:3] + bytes(4) + small[12:]
    animation = b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    return {
        "JPEG": jpeg("RGB", b"\xff\xc0"),
        "progressive JPEG": jpeg("RGB", b"\xff\xc2", progressive=True),
        "CMYK JPEG": jpeg("CMYK", b"\xff\xc0"),
        "PNG": b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b""),
        "GIF": edited(gif, 6, both[1]),
        "GIF frame": edited(gif, gif.index(b",\0\0\0\0") + 5, both[1]),
        "BMP": edited(bmp, 18, struct.pack("<II", side, side)),
        "TIFF": tiff(1),
        "TIFF, LZW": tiff(5),
        "PPM": b"P6 60000 60000 255\n" + bytes(99),
        "WebP": webp(0, small[12:]),
        "animated WebP": webp(2, animation),
        "lossy WebP": edited(small, 26, struct.pack("<HH", 16383, 16383)),
        "lossless WebP": edited(lossless, 21, b"\xff\xff\xff" + bytes([lossless[24] | 15])),
    }


@pytest.mark.parametrize("kind", bombs())
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(kind: str) -> None:
    data = bombs()[kind]

    def tell() -> tuple[str, float, float]:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            said = str(open_image(data, "x").pixels().shape)
        except BadImage as error:
            said = str(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return said, grown / 1024, time.monotonic() - start

    said, megabytes, seconds = in_child(tell)
    assert said.startswith("x: ")
    assert "limit of 178956970" in said
    assert megabytes < 50
    assert seconds < 5


# --- loader processes that are killed


def loaders(pid: int) -> list[int]:
    """The loader processes of a command, by the name that torch gives them."""

    def text(process: int, name: str) -> bytes:
        try:
            return Path(f"/proc/{process}/{name}").read_bytes()
        except OSError:  # gone
            return b""

    children = (int(child) for child in text(pid, f"task/{pid}/children").split())
    return [child for child in children if text(child, "comm") == b"pt_data_worker\n"]


def wait_for(process: ForkedCommand, reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def killed(process: ForkedCommand, loader: int) -> str:
    """Kill it; the line that the command must end with, soon."""
    os.kill(loader, signal.SIGKILL)
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1, said
    # Raised in the midst of a queue's start, of which Python's thread complains by itself.
    said = re.sub(r"Exception ignored in thread started by.*?\nKeyError:.*?\n", "", said, flags=re.DOTALL)
    assert said.startswith(f"mae: error: a loader process (pid {loader}) "), said
    assert said.count("\n") == 1, said
    return said


def test_a_dead_loader_is_known_behind_the_errors_that_follow() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ConnectionResetError

    assert worker_death_message(RuntimeError("CUDA out of memory")) is None

    def tidying_up() -> None:
        try:
            raise RuntimeError("DataLoader worker (pid(s) 11, 12) exited unexpectedly")
        finally:
            raise ValueError("nothing to tidy up")

    with pytest.raises(ValueError, match="tidy up") as caught:
        tidying_up()
    assert str(worker_death_message(caught.value)).startswith("a loader process (pid 11, 12) exited unexpectedly; ")

    # A connection ends a moment before its process does; then torch's handler of the signal raises.
    def told(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 13) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, told)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(RuntimeError) as dead:
            list(with_worker_errors(failing()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "(pid 13) is killed by signal: Killed; the last file" in str(worker_death_message(dead.value))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images to be at it for a while: a hundred links to one folder."""
    root = tmp_path_factory.mktemp("many")
    save_images(root / "pictures", 20, (200, 300))
    for split, count in (("train", 100), ("val", 4)):
        (root / split).mkdir()
        for i in range(count):
            (root / split / f"{i:03d}").symlink_to(root / "pictures")
    return root


@pytest.mark.parametrize(
    "moment",
    [
        "busy",
        pytest.param("idle", marks=pytest.mark.slow),
        pytest.param("starting", marks=pytest.mark.slow),
        pytest.param("any", marks=pytest.mark.slow),
    ],
)
def test_a_killed_loader_ends_the_run_with_one_line(many: Path, tmp_path: Path, moment: str) -> None:
    more = ["--data.num_workers=2", "--data.batch_size_per_device=4", "--trainer.log_every_n_steps=1"]
    args = settings(many, tmp_path / "run", *more, "--trainer.max_steps=1000000", "--panels.images=1")
    process = ForkedCommand(args, tmp_path)
    try:
        wait_for(process, lambda: len(loaders(process.pid)) >= 2)
        if moment == "any":
            time.sleep(random.Random().random() * 5)
        elif moment != "starting":
            wait_for(process, (tmp_path / "run" / "metrics.csv").exists)
        if moment == "idle":
            process.send_signal(signal.SIGSTOP)
            time.sleep(2)  # until the loaders have filled their queues and wait
        said = killed(process, random.choice(loaders(process.pid)))
    finally:
        process.kill()
    assert "the last file it read: " in said
    if moment in ("busy", "idle"):
        assert f"{many}/" in said
        assert ".png" in said


@pytest.mark.slow
def test_a_killed_loader_ends_other_commands_with_one_line(many: Path, tmp_path: Path) -> None:
    args = ["stats", f"--data.root={many}", "--data.num_workers=2", "--data.batch_size_per_device=1"]
    process = ForkedCommand(args, tmp_path)
    try:
        wait_for(process, lambda: len(loaders(process.pid)) >= 2)
        assert "the last file it read: " in killed(process, loaders(process.pid)[0])
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("mount", ["size=64k", "size=400k", "ro"])  # at 400k the images fit, and not all the rest
def test_shared_memory_that_does_not_suffice_is_one_line(pretrained: Path, mount: str) -> None:
    unshare = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {mount} tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    options = [f"--encoder={pretrained}", "--data.dataset=digits", "--data.num_workers=2"]
    done = subprocess.run(
        [*unshare, sys.executable, "-m", "mae.cli", "knn", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "cannot hand over their batches in /dev/shm" in line
    assert "--shm-size" in line


@pytest.mark.slow
def test_no_error_leaves_loaders_behind() -> None:
    program = """
from mae.data.datamodule import ImageData
data = ImageData(dataset="digits", num_workers=2, batch_size_per_device=4)
data.setup("fit")
for batch in data.train_dataloader():
    raise ArithmeticError("nobody foresaw this")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ArithmeticError: nobody foresaw this")
