"""Features of folders of images as files: what is in them, and that neither kills nor processes change a byte."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_images
from PIL import Image
from safetensors.torch import save_file

from mae.data.datamodule import ImageData
from mae.data.prepare.pack import pack_command as pack
from mae.data.sources import load_digits
from mae.errors import UserError
from mae.evaluation import embed, embed_chunks
from mae.evaluation.embed_chunks import FeatureChunks
from mae.evaluation.features import POOLS
from mae.models.mae import MaskedAutoencoder
from mae.runtime import files
from mae.weights import load
from mae.weights.load import load_encoder

FORK = multiprocessing.get_context("fork")
MAE = ["-m", "mae.cli", "embed"]
MEAN, STD = 0.13, 0.31


def save_encoder(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """A random encoder of 28 x 28 grey images, as a run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    small = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    model = MaskedAutoencoder(28, 7, 1, embed_dim=width, depth=2, num_heads=2, **small)
    load.export_autoencoder(model.state_dict(), {"model": model.config, "mean": [MEAN], "std": [STD]}, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/CLASS/*.png, 30 of the digits 0 to 2."""
    root = tmp_path_factory.mktemp("digits")
    source, _ = load_digits()
    for i in range(30):
        index = 400 * (i % 3) + i
        label = source.classes[source.labels[index]]  # type: ignore[index]
        (root / label).mkdir(exist_ok=True)
        Image.fromarray(source.images[index, 0].numpy()).save(root / label / f"{i:02d}.png")
    return root


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART_ROWS", 8)


def settings(encoder: Path, root: Path, out: Path, *more: object) -> list[str]:
    given = [f"--encoder={encoder}", f"--data.root={root}", f"--out={out}", "--batch_size=4", "--num_workers=0"]
    return [*given, "--accelerator=cpu", *map(str, more)]


def read(path: Path) -> dict[str, np.ndarray]:
    """Either format, as arrays."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    found: dict[str, Any] = {name: table[name].to_pylist() for name in table.column_names}
    found = {name: np.array([x or "" for x in v] if name in ("path", "label") else v) for name, v in found.items()}
    return found | {"about": np.array(table.schema.metadata[b"about"].decode())}


def run(*args: str) -> dict[str, np.ndarray]:
    embed.embed_command(args)
    out = next(Path(arg.removeprefix("--out=")) for arg in args if arg.startswith("--out="))
    assert not embed_chunks.chunk_folder(out).exists()
    return read(out)


def test_a_row_an_image_with_the_features_of_the_whole_image(encoder: Path, digits: Path, tmp_path: Path) -> None:
    found = run(*settings(encoder, digits, tmp_path / "x.npz"))
    paths = sorted(str(path.relative_to(digits)) for path in digits.rglob("*.png"))
    assert found["path"].tolist() == paths
    assert found["label"].tolist() == [path[0] for path in paths]
    # By hand, from the pixels: nothing is hidden.
    pixels = np.stack([np.asarray(Image.open(digits / path)) for path in paths])
    images = (torch.from_numpy(pixels)[:, None] / 255 - MEAN) / STD
    with torch.no_grad():
        tokens = load.load(encoder).encode(images)
    assert found["features"].shape == (30, 32)
    assert found["features"].dtype == np.float32
    assert np.allclose(found["features"], tokens[:, 1:].mean(dim=1).numpy(), atol=1e-5)
    # By the library, in the same batches: to the bit.
    data = ImageData(root=str(digits), image_size=28, in_chans=1, mean=[MEAN], std=[STD], num_workers=0)
    data.load()
    data.batch_size = 4
    network, same = load_encoder(encoder), []
    with torch.no_grad():
        for batch in data.whole(data.train_source):  # type: ignore[arg-type]
            same.append(POOLS["mean"](network.forward_features(data.prepare(batch).images)))
    assert np.array_equal(found["features"], torch.cat(same).numpy())


def test_pools_layers_and_types(encoder: Path, digits: Path, tmp_path: Path) -> None:
    plain = run(*settings(encoder, digits, tmp_path / "a.npz"))
    both = run(*settings(encoder, digits, tmp_path / "b.npz", "--pool=both", "--layers=[-1,-2]"))
    assert set(both) == {"path", "label", "features_-2", "features_-1", "about"}
    assert both["features_-1"].shape == (30, 64)
    assert np.array_equal(both["features_-1"][:, :32], plain["features"])
    token = run(*settings(encoder, digits, tmp_path / "c.npz", "--pool=class", "--layers", "-2"))
    assert np.array_equal(token["features"], both["features_-2"][:, 32:])
    half = run(*settings(encoder, digits, tmp_path / "d.npz", "--dtype=float16"))
    assert half["features"].dtype == np.float16
    assert np.array_equal(half["features"], plain["features"].astype(np.float16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_both_formats_hold_the_same(encoder: Path, digits: Path, tmp_path: Path, dtype: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    more = ("--layers=[-1,-2]", f"--dtype={dtype}")
    npz = run(*settings(encoder, digits, tmp_path / "x.npz", *more))
    table = run(*settings(encoder, digits, tmp_path / "x.parquet", *more))
    assert list(npz) == ["path", "label", "features_-2", "features_-1", "about"]
    assert list(table) == list(npz)
    for key, values in npz.items():
        assert np.array_equal(table[key], values), key
    file = parquet.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8, 8, 8, 6]
    kind = file.schema_arrow.field("features_-1").type
    assert (kind.list_size, str(kind.value_type)) == (32, {"float32": "float", "float16": "halffloat"}[dtype])
    about = json.loads(str(npz["about"]))
    assert about["encoder"] == load.read_weights(encoder).fingerprint()
    assert (about["pool"], about["layers"], about["image_size"]) == ("mean", [-2, -1], [28, 28])


def test_the_file_does_not_depend_on_time_place_or_random_state(encoder: Path, digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    found = []
    for seed, root in enumerate((digits, digits, copy)):
        torch.manual_seed(seed)
        run(*settings(encoder, root, tmp_path / f"{seed}.npz"))
        found.append((tmp_path / f"{seed}.npz").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["cat/a.png", "dog/b.png"], ["cat", "dog"]),
        (["cat/a.png", "dog/x/b.png", "c.png"], None),
        (["train/dog/a.png", "val/cat/b.png"], ["dog", "cat"]),
        (["test/c.png", "train/dog/a.png", "val/b.png"], ["", "dog", ""]),
        (["train/a.png", "val/b.png"], None),
        (["car/a.png", "train/b.png"], ["car", "train"]),
        (["data/Train/dog/a.png", "data/valid/cat/b.png"], ["dog", "cat"]),
        (["Bus/a.png", "Train/b.png"], ["Bus", "Train"]),
    ],
)
def test_labels_are_folders(files: list[str], labels: list[str] | None, encoder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28)).save(root / name)
    found = run(*settings(encoder, root, tmp_path / "x.npz"))
    assert found["path"].tolist() == sorted(files)
    assert (found["label"].tolist() if "label" in found else None) == labels


def test_names_of_any_bytes(encoder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "Käse").mkdir(parents=True)
    (root / "long" / ("x" * 100)).mkdir(parents=True)
    for name in (b"K\xc3\xa4se/a.png", b"K\xc3\xa4se/b\xff.png", b"long/" + b"x" * 100 + b"/c.png"):
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            Image.new("L", (9, 9)).save(file, "PNG")
    names = ["Käse/a.png", "Käse/b\\xff.png", f"long/{'x' * 100}/c.png"]
    assert run(*settings(encoder, root, tmp_path / "x.npz"))["path"].tolist() == names
    pytest.importorskip("pyarrow")
    assert run(*settings(encoder, root, tmp_path / "x.parquet"))["path"].tolist() == names


def test_shards_and_tar_files_are_read_as_their_folder(encoder: Path, digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(digits, root / "train")
    shutil.copytree(digits, root / "val")
    pack([str(root), str(tmp_path / "shards"), "--in_chans=1", "--num_workers=0"])
    run(*settings(encoder, root, tmp_path / "a.npz"))
    run(*settings(encoder, tmp_path / "shards", tmp_path / "b.npz"))
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        tar.add(root, ".")
    run(*settings(encoder, tmp_path / "root.tar", tmp_path / "c.npz"))
    assert len({(tmp_path / f"{name}.npz").read_bytes() for name in "abc"}) == 1


def test_unreadable_images_are_named_or_left_out_and_listed(
    encoder: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = run(*settings(encoder, digits, tmp_path / "good.npz"))
    root, out = tmp_path / "root", tmp_path / "x.npz"
    shutil.copytree(digits, root)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    wrong = [names[5], *names[8:12], names[29]]  # one among others, a batch of them, the last
    for name in wrong:
        (root / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=re.escape(wrong[0]) + ".*--max_bad_images"):
        embed.embed_command(settings(encoder, root, out))
    with pytest.raises(UserError, match="--max_bad_images"):
        embed.embed_command(settings(encoder, root, out, "--max_bad_images=5"))
    assert not out.exists()
    capsys.readouterr()
    found = run(*settings(encoder, root, out, "--max_bad_images=6"))
    said = capsys.readouterr().out.splitlines()
    assert "parts are there" in said[0]
    assert said[-1].endswith(f"6 unreadable images are left out, listed in {out}.bad.txt")
    listed = [line.split("\t") for line in Path(f"{out}.bad.txt").read_text().splitlines()]
    assert [name for name, _ in listed] == wrong
    assert all("not an image" in reason for _, reason in listed)
    kept = [name not in wrong for name in names]
    assert np.array_equal(found["path"], good["path"][kept])
    assert np.allclose(found["features"], good["features"][kept], atol=1e-5)
    # In one go, the same bytes; and once all are readable, no list.
    run(*settings(encoder, root, tmp_path / "y.npz", "--max_bad_images=6"))
    assert (tmp_path / "y.npz").read_bytes() == out.read_bytes()
    run(*settings(encoder, digits, out, "--force=true"))
    assert out.read_bytes() == (tmp_path / "good.npz").read_bytes()
    assert not Path(f"{out}.bad.txt").exists()


def test_no_image_can_be_read(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(b"")
    found = run(*settings(encoder, tmp_path / "root", tmp_path / "x.npz", "--max_bad_images=1"))
    assert found["features"].shape == (0, 32)
    pytest.importorskip("pyarrow")
    assert len(run(*settings(encoder, tmp_path / "root", tmp_path / "x.parquet", "--max_bad_images=1"))["path"]) == 0


def killed(args: list[str], prepare: Callable[[], None]) -> None:
    """The command in a process that `prepare` has made to kill itself."""

    def action() -> None:
        prepare()
        embed.embed_command(args)

    child = FORK.Process(target=action)
    child.start()
    child.join(60)
    child.kill()
    assert child.exitcode == -signal.SIGKILL


def die_at_sync(number: int) -> Callable[[], None]:
    """Before the given one of all calls of `sync`: for the settings, each chunk, the list of bad images, the file."""

    def prepare() -> None:
        real, count = files.sync, 0

        def sync(path: Path) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(path)

        files.sync = embed_chunks.sync = sync

    return prepare


def die_while_tidying() -> None:
    def clear(of: embed_chunks.FeatureChunks) -> None:
        of.path(0).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    embed_chunks.FeatureChunks.clear = clear  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_killed_anywhere_and_started_again_it_is_the_same_file(
    encoder: Path, digits: Path, tmp_path: Path, suffix: str
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    whole = tmp_path / f"whole{suffix}"
    (digits / "2" / "zz.png").write_bytes(b"nothing")
    try:
        run(*settings(encoder, digits, whole, "--max_bad_images=1"))
        for at in range(1, 10):  # 1 settings, 2 to 5 chunks, 6 list, 7 file, 8 its name; then tidying up
            out = tmp_path / f"{at}{suffix}"
            args = settings(encoder, digits, out, "--max_bad_images=1")
            killed(args, die_at_sync(at) if at < 9 else die_while_tidying)
            left = {path.name for path in embed_chunks.chunk_folder(out).glob("*.safetensors")}
            assert len(left) == (max(0, at - 2) if at < 6 else 4 if at < 9 else 3)
            assert out.exists() == (at >= 8)
            run(*args)
            assert out.read_bytes() == whole.read_bytes(), at
        assert {path.suffix for path in tmp_path.iterdir()} == {suffix, ".txt"}
    finally:
        (digits / "2" / "zz.png").unlink()


def test_only_missing_parts_are_computed(
    encoder: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.npz"
    args = settings(encoder, digits, out)
    killed(args, die_at_sync(5))  # three parts are there
    damaged = embed_chunks.chunk_folder(out) / "000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    numbers = []
    real = embed_chunks.FeatureChunks.write
    monkeypatch.setattr(
        embed_chunks.FeatureChunks,
        "write",
        lambda self, number, *part: (numbers.append(number), real(self, number, *part)),
    )
    run(*args)
    assert numbers == [1, 3]


def test_parts_of_other_settings_are_not_mixed_in(encoder: Path, digits: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "x.npz", save_encoder(tmp_path / "other", seed=1)
    killed(settings(encoder, digits, out), die_at_sync(4))
    more = tmp_path / "more"
    shutil.copytree(digits, more)
    (more / "0" / "zz.png").write_bytes((more / "0" / "00.png").read_bytes())
    for args, said in (
        (settings(other, digits, out), "encoder weights"),
        (settings(encoder, digits, out, "--pool=class"), "pool mean, here class"),
        (settings(encoder, digits, out, "--layers=-2"), r"layers \[-1\], here \[-2\]"),
        (settings(encoder, digits, out, "--dtype=float16"), "dtype float32, here float16"),
        (settings(encoder, digits, out, "--batch_size=5"), "batch_size 4, here 5"),
        (settings(encoder, more, out), "images 30, here 31"),
    ):
        with pytest.raises(UserError, match=f"{said}.*--force"):
            embed.embed_command(args)
    assert len(list(embed_chunks.chunk_folder(out).glob("*.safetensors"))) == 2
    found = run(*settings(other, digits, out, "--force=true"))
    assert np.array_equal(found["features"], run(*settings(other, digits, tmp_path / "y.npz"))["features"])
    # A part that some process of an earlier start leaves later is not taken either.
    killed(settings(encoder, digits, tmp_path / "z.npz"), die_at_sync(4))
    stray = (embed_chunks.chunk_folder(tmp_path / "z.npz") / "000000.safetensors").read_bytes()
    shutil.rmtree(embed_chunks.chunk_folder(tmp_path / "z.npz"))
    killed(settings(other, digits, tmp_path / "z.npz"), die_at_sync(4))
    (embed_chunks.chunk_folder(tmp_path / "z.npz") / "000000.safetensors").write_bytes(stray)
    run(*settings(other, digits, tmp_path / "z.npz"))
    assert (tmp_path / "z.npz").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("what", ["rows", "width", "bad", "name", "key"])
def test_parts_that_hold_something_else_are_computed_again(what: str, tmp_path: Path) -> None:
    about = {"images": 5, "batch_size": 2, "batches_per_part": 2, "layers": ["last"], "width": 3, "dtype": "float32"}
    chunks = FeatureChunks(tmp_path / "x.npz", about)
    chunks.folder.mkdir()
    chunks.begin(force=False)
    chunks.write(0, torch.arange(4), {"features": torch.zeros(4, 3)}, [])
    chunks.write(1, torch.zeros(0, dtype=torch.int64), {"features": torch.zeros(0, 3)}, [(4, "broken")])
    assert chunks.missing() == []
    assert chunks.bad() == [(4, "broken")]
    metadata = {"key": chunks.key, "bad": "[]"}
    metadata |= {"bad": {"bad": "[" * 10_000}, "key": {"key": "other"}}.get(what, {})
    tensors = {"rows": torch.arange(4 - (what == "rows")), "features": torch.zeros(4, 3 + (what == "width"))}
    if what == "name":
        tensors["other"] = tensors.pop("features")
    save_file(tensors, chunks.path(0), metadata)
    assert chunks.missing() == [0]
    for path in (chunks.path(0), chunks.folder / "about.json"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"000000.safetensors cannot be read: it is a pipe or device, not a file; re"):
        chunks.missing()
    with pytest.raises(UserError, match=r"npz.parts cannot be written: it is a pipe or device, not a file"):
        chunks.begin(force=False)


def test_a_file_that_is_there_stays_unless_forced(encoder: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match="--force true replaces it"):
        embed.embed_command(settings(encoder, digits, out))
    killed(settings(encoder, digits, out, "--force=true"), die_at_sync(6))
    assert out.read_bytes() == b"precious"
    run(*settings(encoder, digits, out, "--force=true"))


def test_two_commands_do_not_write_one_file(encoder: Path, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    folder = embed_chunks.chunk_folder(out)
    folder.mkdir()
    ours, theirs = FORK.Pipe()

    def hold() -> None:
        with embed_chunks.exclusive_lock(folder / embed_chunks.LOCK, "mae embed"):
            theirs.send("mine")
            time.sleep(60)

    child = FORK.Process(target=hold, daemon=True)
    child.start()
    try:
        assert ours.poll(30)
        with pytest.raises(UserError, match="another mae embed is writing"):
            embed.embed_command(settings(encoder, digits, out))
    finally:
        child.kill()
        child.join()
    run(*settings(encoder, digits, out))


def test_mistakes_are_told_before_any_work(
    encoder: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*args: str) -> str:
        with pytest.raises(UserError) as error:
            embed.embed_command(args)
        return str(error.value)

    nowhere = tmp_path / "nowhere"
    assert "must be .parquet or .npz" in said(*settings(nowhere, nowhere, tmp_path / "x.csv"))
    assert "there is no folder" in said(*settings(nowhere, nowhere, nowhere / "x.npz"))
    assert "nowhere does not exist" in said(*settings(nowhere, digits, tmp_path / "x.npz"))
    assert "--data.root" in said(*settings(encoder, nowhere, tmp_path / "x.npz"))
    (tmp_path / "empty").mkdir()
    assert "holds no image" in said(*settings(encoder, tmp_path / "empty", tmp_path / "x.npz"))
    assert "--layers: layers [-3]" in said(*settings(encoder, digits, tmp_path / "x.npz", "--layers=-3"))
    assert "--batch_size 0" in said(*settings(encoder, digits, tmp_path / "x.npz", "--batch_size=0"))
    assert "--max_bad_images -1" in said(*settings(encoder, digits, tmp_path / "x.npz", "--max_bad_images=-1"))
    assert "--devices 0" in said(*settings(encoder, digits, tmp_path / "x.npz", "--devices=0"))
    assert "pool" in said(*settings(encoder, digits, tmp_path / "x.npz", "--pool=max"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "vit-mae-lightning[embed]"' in said(*settings(nowhere, nowhere, tmp_path / "x.parquet"))
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_a_full_disk_is_one_line(encoder: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "x.npz"
    for where, name, said in (
        (embed_chunks, "save_file", r"x\.npz\.parts.*: No space left"),
        (embed_chunks, "add_array", "x.npz cannot be .*: No space"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(where, name, fails)
            with pytest.raises(UserError, match=said):
                embed.embed_command(settings(encoder, digits, out))
    run(*settings(encoder, digits, tmp_path / "x.npz"))


def many_images(root: Path, count: int) -> Path:
    """Hard links to a few images, a thousand a folder."""
    kinds = save_images(root.parent / f"{root.name}-kinds", 10, (28, 28))
    for i in range(count):
        folder = root / f"{i // 1000:03d}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(kinds[i % 10], folder / f"{i % 1000:03d}.png")
    return root


def command(program: list[str], args: list[str], timeout: float = 200) -> str:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *program, *args], capture_output=True, text=True, timeout=timeout, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.soak
def test_ten_thousand_images_killed_half_way(encoder: Path, tmp_path: Path) -> None:
    root = many_images(tmp_path / "root", 10_000)
    more = ["--batch_size=64", "--num_workers=1"]
    command(MAE, [*settings(encoder, root, tmp_path / "whole.npz"), *more])
    out = tmp_path / "x.npz"
    args = [*settings(encoder, root, out), *more]
    process = subprocess.Popen([sys.executable, *MAE, *args], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while len(list(embed_chunks.chunk_folder(out).glob("*.safetensors"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    left = len(list(embed_chunks.chunk_folder(out).glob("*.safetensors")))
    assert 4 <= left < 10
    assert not out.exists()
    assert f"; {left} of 10 parts are there" in command(MAE, args)
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """A program that a launcher can start again for other processes; of small parts."""
    lines = [
        "import sys",
        "import mae.evaluation.embed",
        "mae.evaluation.embed.PART_ROWS = 8",
        "mae.evaluation.embed.embed_command(sys.argv[1:])",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines))
    return [str(tmp_path / "script.py")]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npz", pytest.param(".parquet", marks=pytest.mark.soak)])
def test_two_processes_write_what_one_does(
    encoder: Path, digits: Path, tmp_path: Path, suffix: str, script: list[str]
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    run(*settings(encoder, digits, one))
    killed(settings(encoder, digits, two), die_at_sync(3))  # one part is there, three are to be shared
    said = command(script, settings(encoder, digits, two, "--devices=2"))
    assert said.count("wrote") == said.count("30 images; 1 of 4 parts") == 1
    assert two.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_what_one_of_two_processes_finds_wrong_ends_both(
    encoder: Path, digits: Path, tmp_path: Path, script: list[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(digits, root)
    wrong = sorted(root.rglob("*.png"))[9]  # in the second part, which the second process computes
    wrong.write_bytes(b"nothing")
    args = settings(encoder, root, tmp_path / "x.npz", "--devices=2")
    done = subprocess.run(
        [sys.executable, *script, *args], capture_output=True, text=True, timeout=120, env=os.environ, check=False
    )
    assert done.returncode != 0
    assert f"UserError: {wrong}: not an image" in done.stderr
    assert "wrote" in command(script, [*args, "--max_bad_images=1"])


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [pytest.param(".npz", marks=pytest.mark.soak), ".parquet"])
def test_memory_holds_no_features_but_those_of_a_part(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    network = save_encoder(tmp_path / "encoder", width=96)
    # Not ru_maxrss, which begins with the peak of the process that started this one.
    program = "import sys; from mae.evaluation.embed import embed_command; embed_command(sys.argv[1:])"
    report = "; print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    peaks = []
    for count in (1000, 30_000):
        root, out = many_images(tmp_path / f"{count}", count), tmp_path / f"{count}{suffix}"
        more = ["--batch_size=64", "--num_workers=1", "--pool=both", "--layers=[-1,-2]"]
        said = command(["-c", program + report], [*settings(network, root, out), *more])
        peaks.append(int(said.split("peak")[1]) / 1024)
    print(f"peak memory of 1,000 and 30,000 images, {suffix}: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    assert peaks[1] - peaks[0] < 30  # MiB; their features are 44, names and the reading of them some 6
