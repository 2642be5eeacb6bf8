"""mae pack: what it writes, what it refuses, what is left when it fails; and --verify."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets.imagenet
from PIL import Image, JpegImagePlugin

from mae.cli import main
from mae.data.crops import resized_crop
from mae.data.datamodule import ImageData
from mae.data.decode import decode_image
from mae.data.prepare import pack, tar_writer
from mae.data.prepare.stats import stats_command
from mae.data.prepare.verify import find_damage
from mae.data.sources import FolderSource
from mae.data.tar_shards import INDEX, Index, RecordSource, open_images, read_index, write_index
from mae.errors import UserError
from mae.runtime.storage import Place


def photo(path: Path, seed: int, size: tuple[int, int] = (40, 48), **settings: object) -> None:
    """A smooth RGB picture of (height, width) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path, **settings)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """train/{cat,dog}/*: 12 each, val/{cat,dog}/*: 4 each; JPEG and PNG of two sizes."""
    root = tmp_path / "images"
    for split, count in (("train", 12), ("val", 4)):
        for i in range(2 * count):
            suffix = "png" if i % 5 == 0 else "JPEG" if i % 2 else "jpg"
            photo(root / split / ("cat", "dog")[i // count] / f"{i:02d}.{suffix}", i, (40, 48) if i % 3 else (90, 70))
    return root


def packed(src: Path, dst: Path, *args: str) -> Path:
    pack.pack_command([str(src), str(dst), "--num_workers=0", *args])
    return dst


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def damaged(dst: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The lines of --verify, and its last word."""
    capsys.readouterr()
    with pytest.raises(UserError) as error:
        pack.pack_command(["--verify", str(dst), "--num_workers=0"])
    return capsys.readouterr().out.splitlines(), str(error.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_shards_are_plain_tar_files_in_the_order_of_the_folder(images: Path, tmp_path: Path) -> None:
    dst = packed(images, tmp_path / "out", "--shard_mb=0.03")
    for split in ("train", "val"):
        source, index = FolderSource(images / split, 3), read_index(Place(dst / split))
        assert [index.name(i) for i in range(len(index))] == [source.name(i) for i in range(len(source))]
        assert (index.label.tolist(), index.classes) == (source.labels, ["cat", "dog"])
        members = []
        for name in index.files:
            with tarfile.open(dst / split / name, "r:") as tar:
                for member in tar.getmembers():
                    assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                    members.append((member.name, tar.extractfile(member).read()))  # type: ignore[union-attr]
        wanted = []
        for i in range(len(source)):
            suffix = "png" if source.name(i).endswith("png") else "jpg"
            wanted.append((f"{i:08d}.{suffix}", source.read(i)))
            wanted.append((f"{i:08d}.cls", str(source.labels[i]).encode()))  # type: ignore[index]
        assert members == wanted
        assert index.crc32.tolist() == [zlib.crc32(source.read(i)) for i in range(len(source))]


def test_the_same_images_make_the_same_bytes_whoever_loads_them(images: Path, tmp_path: Path) -> None:
    first = contents(packed(images, tmp_path / "a", "--shard_mb=0.03"))
    assert len(first) > 5
    assert contents(packed(images, tmp_path / "b", "--shard_mb=0.03")) == first
    assert contents(packed(images, tmp_path / "c", "--shard_mb=0.03", "--num_workers=2")) == first


def test_webdataset_reads_them(images: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    dst, source = packed(images, tmp_path / "out", "--shard_mb=0.03"), FolderSource(images / "train", 3)
    shards = [str(path) for path in sorted((dst / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(24)]
    assert [int(sample["cls"]) for sample in samples] == source.labels
    for i, sample in enumerate(samples):
        assert sample.get("jpg", sample.get("png")) == source.read(i)


def test_shards_do_not_exceed_their_size(images: Path, tmp_path: Path) -> None:
    limit = 0.03 * 2**20
    sizes = [
        path.stat().st_size for path in (packed(images, tmp_path / "a", "--shard_mb=0.03") / "train").glob("*.tar")
    ]
    assert len(sizes) > 2
    assert max(sizes) <= limit
    assert len(list((packed(images, tmp_path / "b") / "train").glob("*.tar"))) == 1
    assert len(list((packed(images, tmp_path / "c", "--shard_mb=0.0001") / "train").glob("*.tar"))) == 24


def test_statistics_are_of_every_pixel(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = read_index(Place(packed(images, tmp_path / "out") / "train"))
    pixels = [decode_image(path).double() / 255 for path in sorted((images / "train").rglob("*.*"))]
    mean = np.mean([p.mean((1, 2)).numpy() for p in pixels], axis=0)
    std = np.sqrt(np.mean([p.square().mean((1, 2)).numpy() for p in pixels], axis=0) - mean**2)
    assert index.about["mean"] == pytest.approx(mean, abs=1e-9)
    assert index.about["std"] == pytest.approx(std, abs=1e-9)
    assert index.about["images"] == 24
    assert index.about["encoding"] == "original bytes"
    said = capsys.readouterr().out
    assert f"--data.mean '[{', '.join(f'{value:.4f}' for value in mean)}]'" in said
    assert f"--data.std '[{', '.join(f'{value:.4f}' for value in std)}]'" in said
    assert "24 images" in said
    assert "original bytes" in said


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_npy_of_thirteen_channels(tmp_path: Path, dtype: type) -> None:
    full = np.iinfo(dtype).max
    (tmp_path / "images").mkdir()
    for i in range(4):
        np.save(tmp_path / "images" / f"{i}.npy", np.full((8, 8, 13), full * i // 3, dtype))
    dst = packed(tmp_path / "images", tmp_path / "out", "--in_chans=13")
    index = read_index(Place(dst / "train"))
    assert index.about["mean"] == pytest.approx([0.5] * 13, abs=1e-4)
    source = open_images(Place(dst / "train"), 13)
    assert (source.labels, source.open(3).pixels().unique().item()) == (None, full)
    with tarfile.open(dst / "train" / "000000.tar") as tar:
        assert tar.getnames() == [f"{i:08d}.npy" for i in range(4)]  # no labels, no .cls
    with pytest.raises(UserError, match=r"encodes as JPEG, which .*0.npy cannot become"):
        packed(tmp_path / "images", tmp_path / "small", "--short_side=4")


def test_short_side_encodes_only_what_is_larger(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned = images / "train" / "cat" / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    photo(turned, 50, (60, 90), exif=exif, quality=95)
    dst = packed(images, tmp_path / "out", "--short_side=48")
    label = "short side 48, JPEG quality 95"
    assert label in capsys.readouterr().out
    before, after = FolderSource(images / "train", 3), open_images(Place(dst / "train"), 3)
    assert isinstance(after, RecordSource)
    assert after.index.about["encoding"] == label
    for i in range(len(before)):
        old = before.open(i).pixels()
        height, width = old.shape[1:]
        if min(height, width) <= 48:
            assert after.read(i) == before.read(i)
            continue
        size = (48, round(width * 48 / height)) if height < width else (round(height * 48 / width), 48)
        new = after.open(i).pixels()
        assert new.shape == (3, *size)
        assert (new.int() - resized_crop(old, (0, 0, height, width), size).int()).abs().float().mean() < 2
        jpeg = Image.open(io.BytesIO(after.read(i)))
        assert isinstance(jpeg, JpegImagePlugin.JpegImageFile)
        assert JpegImagePlugin.get_sampling(jpeg) == 0  # 4:4:4
        assert not jpeg.getexif()
    assert after.open(list(map(before.name, range(len(before)))).index("cat/turned.jpg")).pixels().shape == (3, 72, 48)
    with tarfile.open(dst / "train" / "000000.tar") as tar:
        assert tar.getnames()[0] == "00000000.jpg"  # was a large PNG
        assert tar.getnames()[10] == "00000005.png"  # is a small one
    pack.pack_command(["--verify", str(dst), "--num_workers=0"])


def test_quality_of_what_is_encoded_anew(images: Path, tmp_path: Path) -> None:
    def size(folder: Path) -> int:
        return int(read_index(Place(folder / "train")).size.sum())

    best = packed(images, tmp_path / "a", "--short_side=32", "--quality=100")
    usual = packed(images, tmp_path / "b", "--short_side=32")
    poor = packed(images, tmp_path / "c", "--short_side=32", "--quality=30")
    assert size(best) > size(usual) > size(poor)
    assert read_index(Place(poor / "val")).about["encoding"] == "short side 32, JPEG quality 30"
    with pytest.raises(UserError, match="only with --short_side"):
        packed(images, tmp_path / "d", "--quality=80")


def test_a_tar_file_and_shards_are_sources_too(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images / "train", arcname=".")
    first = contents(packed(images, tmp_path / "a") / "train")
    assert contents(packed(tmp_path / "images.tar", tmp_path / "b") / "train") == first
    assert contents(packed(tmp_path / "a", tmp_path / "c") / "train") == first
    small = packed(tmp_path / "a", tmp_path / "small", "--short_side=32")
    for args, label in (([], ""), (["--short_side=16", "--quality=50"], ", then short side 16, JPEG quality 50")):
        index = read_index(Place(packed(small, tmp_path / f"again{len(args)}", *args) / "train"))
        assert index.about["encoding"] == f"short side 32, JPEG quality 95{label}"
    flip(tmp_path / "a" / "train" / "000000.tar", 600)
    with pytest.raises(UserError, match=r"000000.tar: cat/00.png: its bytes differ from the checksum"):
        packed(tmp_path / "a", tmp_path / "d")


def test_splits_have_the_names_that_settings_give(images: Path, tmp_path: Path) -> None:
    first = contents(packed(images, tmp_path / "a"))
    (images / "train").rename(images / "fit")
    with pytest.raises(UserError, match=r"held-out folder val/ but no train/; set --train_dir"):
        packed(images, tmp_path / "b")
    assert contents(packed(images, tmp_path / "b", "--train_dir=fit")) == first
    with pytest.raises(UserError, match=r"--val_dir .*holdout does not exist"):
        packed(images, tmp_path / "c", "--train_dir=fit", "--val_dir=holdout")
    shutil.rmtree(images / "val" / "cat")  # the held-out labels stay those of training
    index = read_index(Place(packed(images, tmp_path / "d", "--train_dir=fit") / "val"))
    assert (index.label.tolist(), index.classes) == ([1] * 4, ["cat", "dog"])


def test_unreadable_images_stop_it_unless_they_are_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, empty = images / "train" / "cat" / "01.JPEG", images / "train" / "dog" / "13.JPEG"
    half.write_bytes(half.read_bytes()[:-100])
    empty.write_bytes(b"")
    with pytest.raises(UserError, match=r"cat/01.JPEG: file is truncated.*a higher --max_bad_images"):
        packed(images, tmp_path / "out")
    with pytest.raises(UserError, match=r"dog/13.JPEG: empty file; a higher --max_bad_images"):
        packed(images, tmp_path / "out", "--max_bad_images=1")
    assert contents(tmp_path / "out") == {}
    capsys.readouterr()
    dst = packed(images, tmp_path / "out", "--max_bad_images=2")
    said = capsys.readouterr().out
    assert (said.count("cat/01.JPEG"), said.count("dog/13.JPEG")) == (1, 1)
    assert read_index(Place(dst / "train")).about["bad_images"] == 2
    pack.pack_command(["--verify", str(dst), "--num_workers=0"])
    assert open_images(Place(dst / "train"), 3).read(1) == half.read_bytes()

    batches = []
    for root in (images, dst):
        data = ImageData(root=str(root), image_size=16, batch_size_per_device=24, num_workers=0, max_bad_images=2)
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    folder, shards = batches
    assert folder.weight.sum() == 22
    for a, b in zip(folder[:6], shards[:6], strict=True):
        assert a.equal(b)
    assert [error.reason for error in folder.errors] == [error.reason for error in shards.errors]


def test_bytes_that_cannot_be_had_are_never_tolerated(images: Path, tmp_path: Path) -> None:
    (images / "train" / "dog" / "99.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"dog/99.jpg: No such file.*its bytes cannot be read"):
        packed(images, tmp_path / "out", "--max_bad_images=5")


def test_what_is_there_is_replaced_only_when_asked(images: Path, tmp_path: Path) -> None:
    dst = packed(images, tmp_path / "out", "--shard_mb=0.03")
    with pytest.raises(UserError, match=r"train already holds index.safetensors: --overwrite true"):
        packed(images, dst)
    (dst / "train" / INDEX).unlink()  # somebody's shards
    shutil.rmtree(dst / "val")
    with pytest.raises(UserError, match=r"train already holds 0000\d\d.tar: --overwrite true"):
        packed(images, dst)
    (dst / "train" / "notes.txt").write_text("mine")
    packed(images, dst, "--overwrite=true")
    assert sorted(contents(dst / "train")) == ["000000.tar", INDEX, "notes.txt"]
    pack.pack_command(["--verify", str(dst), "--num_workers=0"])


def test_source_and_destination_lie_apart(images: Path, tmp_path: Path) -> None:
    for dst in (images, images / "shards", images / "train" / "x"):
        with pytest.raises(UserError, match=r"DST .* lies in SRC"):
            packed(images, dst)
    with pytest.raises(UserError, match=r"would be written and .* is read"):
        packed(images / "train", images)
    (tmp_path / "link").symlink_to(images)
    with pytest.raises(UserError, match=r"DST .* lies in SRC"):
        packed(images, tmp_path / "link" / "shards")
    dst = packed(images, tmp_path / "out")
    with pytest.raises(UserError, match=r"would be written and .*000000.tar is read"):
        packed(dst / "train" / "000000.tar", dst, "--overwrite=true")
    assert len(contents(dst)) == 4


def test_wrong_arguments_are_one_line(images: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for args, said in [
        ([str(images)], "wanted are two folders"),
        ([str(tmp_path / "nowhere"), out], "SRC .*nowhere does not exist"),
        ([str(images), "s3://bucket/out"], "DST s3://bucket/out is not on this machine"),
        (["http://host/images", out], "SRC http://host/images is not on this machine"),
        (["--verify", "s3://bucket/out"], "--verify s3://bucket/out is not on this machine"),
        (["--verify", str(tmp_path / "nowhere")], "nowhere does not exist"),
        (["--verify", str(images)], "holds no shards"),
        ([str(images), "--verify", out], "packs nothing"),
        ([str(images), out, "--shard_mb=0"], "--shard_mb 0.0: it must be above 0"),
        ([str(images), out, "--short_side=0"], "--short_side 0"),
        ([str(images), out, "--short_side=8", "--quality=0"], "--quality 0"),
        ([str(images), out, "--short_side=8", "--in_chans=4"], "1 or 3 channels"),
    ]:
        with pytest.raises(UserError, match=said):
            pack.pack_command(args)
    assert not Path(out).exists()


def die_at(count: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen before an image is written."""
    add = tar_writer.ShardWriter.add

    def add_or_die(self: tar_writer.ShardWriter, index: int, *args: object) -> tuple[int, int]:
        nonlocal count
        if (count := count - 1) < 0:
            how()
        return add(self, index, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(tar_writer.ShardWriter, "add", add_or_die)


@pytest.mark.parametrize("count", [0, 15, 28])  # before anything, in train, in val
def test_a_killed_pack_is_not_taken_for_complete_and_begins_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "out"
    args = (images, dst, "--shard_mb=0.03")
    with monkeypatch.context() as patch:
        die_at(count, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
        process = multiprocessing.get_context("fork").Process(target=packed, args=args)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not list(dst.rglob(INDEX))
    assert (dst / "train" / tar_writer.MARK).exists()
    if count == 28:
        with pytest.raises(UserError, match="2 of 2 folders have no index that can be used"):
            pack.pack_command(["--verify", str(dst), "--num_workers=0"])
    packed(*args)
    assert ("files that an interrupted run left" in capsys.readouterr().out) == (count > 0)
    assert contents(dst) == contents(packed(images, tmp_path / "whole", "--shard_mb=0.03"))


def test_nothing_is_left_after_an_interrupt(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    die_at(27, interrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        packed(images, tmp_path / "out", "--shard_mb=0.03")
    assert contents(tmp_path / "out") == {}


def test_a_full_disk_is_one_line_and_leaves_no_index(images: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(UserError, match=r"train/000000.tar cannot be written: File too large; nothing is packed"):
            packed(images, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "out") == {}
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/train cannot be written: Not a directory"):
        packed(images, tmp_path / "file")


@pytest.mark.slow
def test_two_at_once_do_not_write_into_one_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "out"

    def another() -> None:
        process = multiprocessing.get_context("fork").Process(target=refused)
        process.start()
        process.join(60)
        assert process.exitcode == 0

    def refused() -> None:
        monkeypatch.undo()
        with pytest.raises(UserError, match="another mae pack is writing to"):
            packed(images, dst)

    die_at(3, another, monkeypatch)
    packed(images, dst, "--max_bad_images=0")
    monkeypatch.undo()
    pack.pack_command(["--verify", str(dst), "--num_workers=0"])


# --verify


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    return packed(images, tmp_path / "shards", "--shard_mb=0.03")


def at(shards: Path, i: int) -> tuple[Path, int, int]:
    """Shard, first byte and size of a training image."""
    index = read_index(Place(shards / "train"))
    return shards / "train" / index.files[index.file[i]], int(index.offset[i]), int(index.size[i])


def test_an_image_that_cannot_be_decoded_is_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bytes are those of the index: a part of a JPEG, with the end mark of a whole one."""
    path = sorted((images / "train").rglob("*.JPEG"))[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + b"\xff\xd9")
    dst = packed(images, tmp_path / "shards", "--max_bad_images=1")
    capsys.readouterr()
    pack.pack_command(["--verify", str(dst)])  # known to the index
    assert capsys.readouterr().out.splitlines()[-1].endswith("intact, 1 of them unreadable since they were packed")
    index = read_index(Place(dst / "train"))
    write_index(Index(**{**index._asdict(), "about": index.about | {"bad_images": 0}}), dst / "train" / INDEX)
    lines, said = damaged(dst, capsys)
    assert said.startswith("1 of 32 images cannot be decoded in ")
    assert [line for line in lines if "cannot be decoded: file is truncated" in line]


def test_intact_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    pack.pack_command(["--verify", str(shards)])
    count = len(list(shards.rglob("*.tar")))
    assert capsys.readouterr().out == f"32 records in {count} shards: intact\n"
    pack.pack_command(["--verify", str(shards / "val")])
    assert capsys.readouterr().out.startswith("8 records in ")


def test_every_damaged_record_is_named_and_no_other(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (2, 3, 17):
        path, offset, size = at(shards, i)
        flip(path, offset + size // 2)
    path, offset, _ = at(shards, 5)
    flip(path, offset - 512 + 3)  # the name in its header
    path, offset, size = at(shards, 9)
    flip(path, offset + -(-size // 512) * 512 + 512)  # the class number
    path, offset, size = at(shards, 11)
    flip(path, offset + -(-size // 512) * 512 + 130)  # the size in the class number's header
    lines, last = damaged(shards, capsys)
    assert last.startswith("6 of 32 records are damaged in ")
    index = read_index(Place(shards / "train"))
    for line, (i, what) in zip(
        lines,
        [
            (2, "its bytes differ from the checksum"),
            (3, "its bytes differ from the checksum"),
            (5, "its tar header is damaged (bad checksum)"),
            (9, ".cls: holds b' ', the index says 0"),
            (11, ".cls: its tar header is damaged (bad checksum)"),
            (17, "its bytes differ from the checksum"),
        ],
        strict=True,
    ):
        assert line == f"train/{index.files[index.file[i]]}: {index.name(i)}: {what}"


def owner(index: Index, file: int, at: int) -> int:
    """The record that a byte of a shard belongs to."""
    mine = np.flatnonzero(index.file == file)
    return int(mine[max(0, np.searchsorted(index.offset[mine] - 512, at, side="right") - 1)])


def test_any_byte_of_a_shard_counts(shards: Path) -> None:
    index = read_index(Place(shards / "train"))
    draw = random.Random(0)
    for file in (0, len(index.files) - 1):
        path = shards / "train" / index.files[file]
        whole = path.read_bytes()
        for where in [0, 511, 512, len(whole) - 1, *draw.sample(range(len(whole)), 60)]:
            flip(path, where)
            assert [i for i, _ in find_damage(shards / "train", index)] == [owner(index, file, where)], where
            path.write_bytes(whole)
        path.write_bytes(whole + b"\0")
        assert [i for i, _ in find_damage(shards / "train", index)] == [owner(index, file, len(whole))]
        path.write_bytes(whole)
    assert not list(find_damage(shards / "train", index))


def test_truncated_and_missing_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = read_index(Place(shards / "train"))
    first, second = (np.flatnonzero(index.file == file).tolist() for file in (0, 1))
    path, offset, _ = at(shards, second[1])
    os.truncate(path, offset + 10)
    (shards / "train" / "000000.tar").unlink()
    lines, last = damaged(shards, capsys)
    assert last.startswith(f"{len(first) + len(second) - 1} of 32 records are damaged")
    assert lines == (
        [f"train/000000.tar: {index.name(i)}: the shard cannot be opened: No such file or directory" for i in first]
        + [f"train/000001.tar: {index.name(second[1])}: the shard ends within it"]
        + [f"train/000001.tar: {index.name(i)}: the shard ends before it" for i in second[2:]]
    )


def test_shards_that_are_another_packs(images: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "train" / "cat" / "00.png").unlink()  # everything moves up by one
    other = packed(images, shards.parent / "other", "--shard_mb=0.03")
    shutil.copy(other / "train" / "000000.tar", shards / "train" / "000000.tar")
    lines, _ = damaged(shards, capsys)
    count = int((read_index(Place(shards / "train")).file == 0).sum())
    assert len(lines) == count
    assert "its tar header says '00000000.jpg'" in lines[0]


def test_a_damaged_index(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, offset, _ = at(shards, 4)
    flip(path, offset)
    flip(shards / "val" / INDEX, (shards / "val" / INDEX).stat().st_size - 3)
    lines, last = damaged(shards, capsys)
    assert [line.split(": ")[0].endswith("000000.tar") for line in lines] == [True, False]
    assert "val/index.safetensors is damaged" in lines[1]
    assert last.startswith("1 of 24 records are damaged and 1 of 2 folders have no index that can be used in ")
    (shards / "train" / INDEX).unlink()
    lines, last = damaged(shards, capsys)
    assert "train/index.safetensors cannot be read" in lines[0]
    assert last.startswith("2 of 2 folders have no index")


def test_the_command_and_its_exit_codes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "out"
    assert main(["pack", str(images), str(dst), "--num_workers", "2"]) == 0
    taken, wrote, *_ = capsys.readouterr().out.splitlines()
    assert taken == f"train: {images}/train (24 images, 2 classes), val: {images}/val (8 images, 2 classes)"
    assert wrote.startswith(f"wrote {dst}/train: 24 images, ")
    flip(dst / "val" / "000000.tar", 600)
    assert main(["pack", "--verify", str(dst)]) == 2
    said = capsys.readouterr()
    assert said.out == "val/000000.tar: cat/00.png: its bytes differ from the checksum\n"
    assert said.err == f"mae: error: 1 of 32 records are damaged in {dst}: pack or copy the shards anew\n"


# The archives of ILSVRC 2012

WNIDS = {1: "n02110185", 2: "n01440764", 3: "n03888257"}  # as in the devkit, not in the order of names
TRUTH = [3, 1, 2, 2, 3, 1, 1]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def jpeg(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC).save(stream, "JPEG")
    return stream.getvalue()


def devkit(path: Path, wnids: dict[int, str], truth: list[int]) -> None:
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("gloss", object)]
    rows = [(i, wnid, f"word {i}, other", "gloss", 0.0) for i, wnid in wnids.items()]
    rows.append((max(wnids) + 1, "n00001740", "entity", "a group of classes", 3.0))
    stream = io.BytesIO()
    scipy.io.savemat(stream, {"synsets": np.array(rows, [*kinds, ("num_children", object)])})
    with tarfile.open(path, "w:gz") as tar:
        folder = "ILSVRC2012_devkit_t12/data"
        add(tar, f"{folder}/meta.mat", stream.getvalue())
        text = "".join(f"{i}\n" for i in truth)
        add(tar, f"{folder}/ILSVRC2012_validation_ground_truth.txt", text.encode())


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    root = tmp_path / "ilsvrc"
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for i, wnid in WNIDS.items():
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w") as inner:
                for number in (10026, 2, 311)[: i + 1]:
                    add(inner, f"{wnid}_{number}.JPEG", jpeg(1000 * i + number))
            add(outer, f"{wnid}.tar", stream.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for i in (3, 1, 2, 7, 6, 5, 4):
            add(tar, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(i))
    devkit(root / "ILSVRC2012_devkit_t12.tar.gz", WNIDS, TRUTH)
    return root


def test_archives_give_what_the_unpacked_folder_gives(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(archives)
    first = packed(archives, tmp_path / "a", "--num_workers=2")
    assert contents(archives) == before
    unpacker = torchvision.datasets.imagenet
    monkeypatch.setattr(unpacker, "_verify_archive", lambda *args: None)
    unpacker.parse_devkit_archive(archives)
    unpacker.parse_train_archive(archives)
    unpacker.parse_val_archive(archives)
    assert contents(packed(archives, tmp_path / "b")) == contents(first)
    index = read_index(Place(first / "train"))
    assert [index.name(i) for i in range(3)] == [f"n01440764/n01440764_{i}.JPEG" for i in ("10026", "2", "311")]
    assert index.label.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    index = read_index(Place(first / "val"))
    assert [index.name(i) for i in range(2)] == [f"n01440764/ILSVRC2012_val_0000000{i}.JPEG" for i in (3, 4)]
    assert index.classes == sorted(WNIDS.values())


def test_the_training_archive_alone(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()
    whole = packed(archives, tmp_path / "a")
    assert "no ILSVRC2012_img_val.tar: only train is packed" in capsys.readouterr().out
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert contents(packed(archives, tmp_path / "b")) == contents(whole)
    assert not (whole / "val").exists()


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_a_missing_archive_is_named(archives: Path, tmp_path: Path, name: str) -> None:
    (archives / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
        packed(archives, tmp_path / "out")


def test_archives_that_do_not_fit_together(archives: Path, tmp_path: Path) -> None:
    path = archives / "ILSVRC2012_devkit_t12.tar.gz"
    good = path.read_bytes()
    for wnids, truth, said in [
        (WNIDS, TRUTH[:-1], r"val_00000007.JPEG is none of the 6 images that ILSVRC2012_devkit"),
        (WNIDS, [*TRUTH, 1], r"img_val.tar holds 7 images, ILSVRC2012_devkit\S* has classes for 8"),
        (WNIDS, [9, *TRUTH[1:]], r"devkit_t12.tar.gz is damaged: its ground truth has the class number 9"),
        (WNIDS | {4: "n09999999"}, TRUTH, r"img_train.tar lacks the class n09999999 that ILSVRC2012_devkit\S* has"),
        ({1: WNIDS[1], 3: WNIDS[3]}, [1] * 7, r"devkit_t12.tar.gz lacks the class n01440764 that ILSVRC2012_img_train"),
        (WNIDS | {4: WNIDS[1]}, TRUTH, r"devkit_t12.tar.gz is damaged: two classes share"),
    ]:
        devkit(path, wnids, truth)
        with pytest.raises(UserError, match=said):
            packed(archives, tmp_path / "out")
    for data in (good[:-40], b"no archive", good[:200] + bytes([good[200] ^ 1]) + good[201:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"devkit_t12.tar.gz is damaged or another devkit"):
            packed(archives, tmp_path / "out")
    path.write_bytes(good)
    train = archives / "ILSVRC2012_img_train.tar"
    os.truncate(train, train.stat().st_size // 2)
    with pytest.raises(UserError, match=r"img_train.tar is not a tar file that can be read"):
        packed(archives, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_says_how_it_came_to_be(shards: Path) -> None:
    data = (shards / "train" / INDEX).read_bytes()
    said = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["mae_shards"])
    assert said["version"] == 1
    assert set(said["about"]) == {"mean", "std", "images", "bad_images", "encoding"}


def test_shards_that_cannot_be_replaced_stay_as_they_were(image_folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "shards"
    pack.pack_command([str(image_folder), str(dst), "--num_workers=0"])
    before = {path: path.read_bytes() for path in sorted(dst.rglob("*")) if path.is_file()}
    broken = image_folder / "val" / "dog" / "003.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    with pytest.raises(UserError, match=r"dog/003\.png"):
        pack.pack_command([str(image_folder), str(dst), "--num_workers=0", "--overwrite=true"])
    assert {path: path.read_bytes() for path in sorted(dst.rglob("*")) if path.is_file()} == before
    broken.write_bytes(whole)
    (image_folder / "train" / "cat" / "000.png").unlink()
    pack.pack_command([str(image_folder), str(dst), "--num_workers=0", "--overwrite=true"])
    assert len(read_index(Place(dst / "train"))) == 15
    assert {path.name for path in dst.rglob("*") if path.is_file()} == {"000000.tar", "index.safetensors"}


def test_a_channel_of_one_value_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 7), (40 * i, 111, 7)).save(tmp_path / "images" / f"{i}.png")
    pack.pack_command([str(tmp_path / "images"), str(tmp_path / "shards"), "--num_workers=0"])
    stats_command([f"--data.root={tmp_path / 'images'}", "--data.num_workers=0"])
    out, err = capsys.readouterr()
    warning = "mae: warning: std 0 of channels 1, 2, by which nothing can be divided: leave out, or set another"
    assert warning in out.splitlines()
    assert warning in err.splitlines()
    pack.verify_shards(tmp_path / "shards")
