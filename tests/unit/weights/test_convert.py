"""Weights in other formats and back: the same bits, and the same numbers by the software they are for."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import REFERENCE
from image_files import smooth
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

import mae
from mae.cli import main
from mae.errors import TrainingFailed, UserError
from mae.models.mae import SIZES, MaskedAutoencoder
from mae.models.vit import build
from mae.weights import convert, load
from mae.weights.classifier import load_classifier
from mae.weights.detect import usable_weights
from mae.weights.weights import Weights

SMALL = {
    **{"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4},
}
ABOUT = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "mask_ratio": 0.6, "step": 3, "images_seen": 96}


def autoencoder(**settings: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = MaskedAutoencoder(**{**SMALL, **settings}).eval()
    for parameter in model.parameters():  # positions, biases and norms too: no two tensors are alike
        parameter.data = 0.1 * torch.randn(parameter.shape)
    return model


def saved(folder: Path, model: MaskedAutoencoder) -> Path:
    load.export_autoencoder(model.state_dict(), {"model": model.config, **ABOUT}, folder)
    return folder / "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    return saved(tmp_path / "src", autoencoder())


def converted(src: Path, dst: Path, format: str, *more: object) -> Weights:
    convert.convert_command([str(src), str(dst), "--format", format, *map(str, more)])
    return usable_weights(dst)


def local_dir(folder: Path) -> Any:
    """As people load a folder into timm."""
    if Version(timm.__version__) < Version("1.0.26"):
        pytest.skip("older versions of timm read no .safetensors file by local-dir:")
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def require_same(one: Weights, other: Weights) -> None:
    assert one.config == other.config
    assert one.state.keys() == other.state.keys()
    assert all(torch.equal(value, other.state[key]) for key, value in one.state.items())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(
    ("format", "name"), [("official", "x.pth"), ("hf", "x"), ("mae", "x.safetensors"), ("mae", "x")]
)
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, format: str, name: str, norm_pix_loss: bool) -> None:
    src = saved(tmp_path, autoencoder(norm_pix_loss=norm_pix_loss))
    there = converted(src, tmp_path / name, format)
    require_same(there, usable_weights(src))
    assert (there.format, there.holds, there.notes) == (format, "autoencoder", ())
    back = converted(tmp_path / name, tmp_path / "back.safetensors", "mae")
    require_same(back, usable_weights(src))
    assert {key: back.description[key] for key in ABOUT} == ABOUT


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
def test_timm_computes_the_same_features(tmp_path: Path, source: Path, name: str) -> None:
    there = converted(source, tmp_path / name, "timm")
    own = usable_weights(source)
    assert {key: v for key, v in own.state.items() if key.startswith("encoder.")}.keys() == there.state.keys()
    assert all(torch.equal(value, own.state[key]) for key, value in there.state.items())
    if name == "x":
        network = local_dir(tmp_path / name)
        assert list(network.pretrained_cfg["mean"]) == ABOUT["mean"]
    else:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
        network = timm.create_model("vit_base_patch16_224", checkpoint_path=str(tmp_path / name), **sizes)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = network.eval().forward_features(images)
        torch.testing.assert_close(found, mae.load(source).encode(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_transformers_compute_the_same(tmp_path: Path, norm_pix_loss: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = autoencoder(norm_pix_loss=norm_pix_loss)
    converted(saved(tmp_path, model), tmp_path / "hf", "hf")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf").eval()
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        found = theirs(images, noise=noise)
        wanted = model(images, noise, ABOUT["mask_ratio"])
        assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
        torch.testing.assert_close(found.logits, model.predict(images, noise, 0.6).pred, rtol=0, atol=1e-5)
        assert torch.equal(found.mask.bool(), wanted.mask)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    photo, transform = Image.fromarray(smooth(40, 60)), mae.transform(tmp_path / "hf")
    given = processor(photo, return_tensors="pt")["pixel_values"][0]
    assert (given - transform(photo)).abs().max() <= 2.1 / 255 / min(ABOUT["std"])
    theirs.save_pretrained(tmp_path / "again")  # under the names of this version of transformers, not those of its hub
    require_same(usable_weights(tmp_path / "again"), usable_weights(tmp_path / "hf"))

    converted(tmp_path / "encoder.safetensors", tmp_path / "vit", "hf")
    vit = transformers.AutoModel.from_pretrained(tmp_path / "vit").eval()
    with torch.no_grad():
        found = vit(images).last_hidden_state
    torch.testing.assert_close(found, model.encode(images), rtol=0, atol=1e-5)


def probe_or_classifier(folder: Path, pool: str, head: str) -> Path:
    model = autoencoder()
    network = build(model.config, 4, pool, head)  # type: ignore[arg-type]
    torch.manual_seed(1)
    state = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    about = {"classes": ["a", "b", "c", "d"], "pool": pool, "head": head, "crop_pct": 0.9, "lora_scale": 1.0}
    encoder = {key: model.config[key] for key in ("image_size", "patch_size", "in_chans", "embed_dim", "depth")}
    encoder |= {key: model.config[key] for key in ("num_heads", "mlp_ratio")}
    return load.export_classifier(state, {"model": encoder, "classifier": about, **ABOUT}, folder)[0]


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_classifiers(tmp_path: Path, pool: str, head: str) -> None:
    src = probe_or_classifier(tmp_path, pool, head)
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = load_classifier(src).network(images)
    for format, name in (("official", "o.pth"), ("mae", "m.safetensors"), ("timm", "t"), ("hf", "hf")):
        refused = {"hf": "classifies by the mean of tokens"} if pool == "mean" else {}
        if (pool, head) == ("mean", "batchnorm"):
            refused["official"] = "takes the mean of tokens after their norm"
        if format in refused:
            with pytest.raises(UserError, match=refused[format]):
                converted(src, tmp_path / name, format)
            continue
        there = converted(src, tmp_path / name, format)
        assert there.holds == "classifier"
        found = load_classifier(tmp_path / name)
        assert found.classes == ["a", "b", "c", "d"]
        with torch.no_grad():
            torch.testing.assert_close(found.network(images), wanted, rtol=1e-4, atol=1e-4)
    # Without what this package wrote beside the tensors, from timm's configuration alone.
    torch.save(load_file(tmp_path / "t" / "model.safetensors"), tmp_path / "t" / "pytorch_model.bin")
    (tmp_path / "t" / "model.safetensors").unlink()
    with torch.no_grad():
        torch.testing.assert_close(load_classifier(tmp_path / "t").network(images), wanted, rtol=1e-4, atol=1e-4)
    network = local_dir(tmp_path / "t")
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), wanted, rtol=1e-4, atol=1e-4)


def test_a_file_that_does_not_tell_its_heads(tmp_path: Path) -> None:
    tensors = load_file(REFERENCE / "mae_tiny.safetensors")
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    torch.save({"model": state}, tmp_path / "tiny.pth")
    src, dst = tmp_path / "tiny.pth", tmp_path / "out.safetensors"
    with open(REFERENCE / "mae_tiny.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    facts = json.loads(header["__metadata__"]["json"])
    with pytest.raises(UserError, match=r"tiny.pth does not record how many attention heads.*--num_heads"):
        converted(src, dst, "mae")
    heads, decoder_heads = facts["num_heads"], facts["decoder_num_heads"]
    told = ("--num_heads", heads, "--decoder_num_heads", decoder_heads, "--norm_pix_loss", "true")
    converted(src, dst, "mae", *told)
    images, noise = tensors["imgs"], tensors["noise"]
    with torch.no_grad():
        pred = mae.load(dst).predict(images, noise).pred
    torch.testing.assert_close(pred, tensors["norm_pix.pred"], rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="mean and std"):
        found = mae.load(src, num_heads=heads, decoder_num_heads=decoder_heads, norm_pix_loss=False)
    assert not found.norm_pix_loss
    with pytest.raises(UserError, match=rf"num_heads {2 * heads}: .*out.safetensors has {heads}"):
        converted(dst, tmp_path / "again.safetensors", "mae", "--num_heads", 2 * heads)
    with pytest.raises(UserError, match=r"norm_pix_loss False: .*out.safetensors has True"):
        mae.load(dst, norm_pix_loss=False)


def test_nothing_is_overwritten_and_nothing_is_left_half_done(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst = tmp_path / "x.pth"
    converted(source, dst, "official")
    before = dst.read_bytes()
    with pytest.raises(UserError, match=r"x.pth is there already: --force"):
        converted(source, dst, "official")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"folder is there already: --force"):
        converted(source, tmp_path / "folder", "hf")
    converted(source, tmp_path / "folder", "hf", "--force")
    assert (tmp_path / "folder" / "mine.txt").read_text() == "keep me"
    listed = sorted(os.listdir(tmp_path))

    monkeypatch.setattr(convert, "timm_outputs", lambda *_: {"features": torch.zeros(2, 17, 32)})
    with pytest.raises(TrainingFailed, match="timm computes other features"):
        converted(source, tmp_path / "y.safetensors", "timm")
    monkeypatch.setattr(load, "save_file", lambda tensors, *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"y2.safetensors cannot be written: disk full"):
        converted(source, tmp_path / "y2.safetensors", "mae")
    assert sorted(os.listdir(tmp_path)) == listed
    assert dst.read_bytes() == before


def test_a_writer_that_changes_a_number_is_found_out(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(state: dict[str, Tensor], dialect: str) -> dict[str, Tensor]:
        return {key.removeprefix("encoder."): value + 1e-7 for key, value in state.items()}

    monkeypatch.setattr(convert, "from_ours", wrong)
    with pytest.raises(TrainingFailed, match="does not read back as it was written: nothing is kept"):
        converted(source, tmp_path / "x.pth", "official")
    assert not (tmp_path / "x.pth").exists()


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    wide = saved(tmp_path, autoencoder(image_size=(32, 48)))
    with pytest.raises(UserError, match=r"image_size 32x48 .* only squares; --format timm or mae holds it"):
        converted(wide, tmp_path / "hf", "hf")
    assert converted(wide, tmp_path / "t", "timm").config["image_size"] == [32, 48]
    require_same(converted(wide, tmp_path / "o.pth", "official"), usable_weights(wide))
    for args, said in (
        (["x.bin", "--format", "official"], r"x.bin: --format official wants .pth"),
        (["nowhere/x.pth", "--format", "official"], "there is no folder"),
        (["x.pth", "--format", "official", "--output", "tokens"], "--output does nothing here"),
        (["x.pth", "--format", "official", "--quantize", "true"], "--quantize does nothing here"),
        (["x.onnx", "--format", "onnx", "--mask_ratio", "0.5"], "--mask_ratio does nothing here"),
        (["x.onnx", "--format", "onnx", "--push", "me/x"], "--push does nothing here"),
        (["x.pth", "--format", "official", "--image_size", "33"], "not divisible by the patch size"),
        (["x.pth", "--format", "official", "--num_heads", "4"], r"num_heads 4: .*model.safetensors has 2"),
        (["model.safetensors", "--format", "hf"], "--format hf wants no suffix"),
    ):
        with pytest.raises(UserError, match=said):
            convert.convert_command([str(wide), str(tmp_path / args[0]), *args[1:]])


def test_switches_that_other_software_lacks(tmp_path: Path) -> None:
    for key, value, said in (("encoder_mask_tokens", True, "mask tokens"), ("pca_target", 6, "principal components")):
        (tmp_path / key).mkdir()
        source = saved(tmp_path / key, autoencoder(**{key: value}))
        for format, name in (("official", "x.pth"), ("hf", "x")):
            with pytest.raises(
                UserError, match=f"--format {format}: .*model.safetensors has {said}.*encoder.safetensors"
            ):
                converted(source, tmp_path / name, format)
        require_same(converted(source, tmp_path / key / "back", "mae"), usable_weights(source))
        assert (
            converted(source.with_name("encoder.safetensors"), tmp_path / key / "o.pth", "official").holds == "encoder"
        )
    (tmp_path / "visible").mkdir()
    weighted = saved(tmp_path / "visible", autoencoder(visible_loss_weight=0.5))  # of training alone
    assert converted(weighted, tmp_path / "o.pth", "official").holds == "autoencoder"
    pytest.importorskip("transformers")
    converted(weighted, tmp_path / "hf", "hf")


def test_a_folder_holds_what_was_written_last(tmp_path: Path, source: Path) -> None:
    dst = tmp_path / "v1.5"
    converted(source, dst, "hf")
    encoder = source.with_name("encoder.safetensors")
    assert converted(encoder, dst, "mae", "--force").holds == "encoder"
    assert sorted(os.listdir(dst)) == ["README.md", "encoder.safetensors"]
    assert (converted(source, dst, "timm", "--force").format, usable_weights(dst).holds) == ("timm", "encoder")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run is a run folder"):
        converted(source, run, "timm", "--force")
    (tmp_path / "x.pth").mkdir()
    with pytest.raises(UserError, match=r"x.pth is a folder, but a file is to be written"):
        converted(source, tmp_path / "x.pth", "official", "--force")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file, but a folder is to be written"):
        converted(source, tmp_path / "file", "hf", "--force")


def test_a_signal_leaves_nothing_behind(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "check_same_tensors", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    listed = sorted(os.listdir(tmp_path))
    with pytest.raises(SystemExit) as stop:
        converted(source, tmp_path / "x.pth", "official")
    assert stop.value.code == 143
    assert sorted(os.listdir(tmp_path)) == listed


def test_others_may_read_what_is_written(tmp_path: Path, source: Path) -> None:
    (tmp_path / "plain").touch()
    converted(source, tmp_path / "x.safetensors", "mae")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_other_sizes_and_channels(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = converted(source, tmp_path / "x.safetensors", "mae", "--image_size", 48, "--in_chans", 4)
    said = capsys.readouterr().out
    assert "positions resampled from 4x4 patches to 6x6" in said
    assert "the decoder is left out" in said
    assert (there.config["image_size"], there.config["in_chans"], there.holds) == ([48, 48], 4, "encoder")
    assert mae.load_encoder(tmp_path / "x.safetensors").forward_features(torch.randn(2, 4, 48, 48)).shape == (2, 37, 32)
    assert there.description["mean"] == [0.5, 0.4, 0.3, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("whole.onnx", ["--output", "reconstruction", "--mask_ratio", "0.5"]),
        pytest.param("tokens.onnx", ["--free_size", "true"], marks=pytest.mark.slow),
        pytest.param("int8.onnx", ["--quantize", "true"], marks=pytest.mark.slow),
    ],
)
def test_graphs(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], name: str, more: list[str]) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    convert.convert_command([str(source), str(tmp_path / name), "--format", "onnx", *more])
    assert "run in ONNX Runtime" in capsys.readouterr().out
    assert (tmp_path / f"{name}.md").exists()
    if name != "whole.onnx":
        return
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    model = mae.load(source)
    session = runtime.InferenceSession(tmp_path / "whole.onnx")
    pred, mask = session.run(None, {"images": images.numpy(), "noise": noise.numpy()})
    with torch.no_grad():
        wanted = model.predict(images, noise, 0.5)
    torch.testing.assert_close(torch.from_numpy(pred), wanted.pred, rtol=0, atol=1e-4)
    assert torch.equal(torch.from_numpy(mask), wanted.mask)
    told = json.loads(session.get_modelmeta().custom_metadata_map["mae"])["preprocessing"]
    assert (told["input_size"], told["mean"], told["crop_pct"]) == ([3, 32, 32], ABOUT["mean"], 1.0)


@pytest.mark.slow
def test_an_exported_program_gives_the_features(tmp_path: Path, source: Path) -> None:
    convert.convert_command([str(source), str(tmp_path / "x.pt2"), "--format", "export"])
    images = torch.randn(3, 3, 32, 32)
    found = torch.export.load(tmp_path / "x.pt2").module()(images)
    torch.testing.assert_close(found, mae.load(source).encode(images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_card_stands_beside_everything(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("transformers")
    model = local_dir(converted(source, tmp_path / "first", "timm").source.parent)
    theirs, ours = (create_transform(**resolve_model_data_config(m)) for m in (model, mae.load_encoder(source)))
    assert repr(theirs) == repr(ours)
    for format, name, card in (
        *(("hf", "hf", "hf/README.md"), ("timm", "t", "t/README.md"), ("timm", "t.pth", "t.pth.md")),
        *(("official", "o.pth", "o.pth.md"), ("mae", "m.safetensors", "m.safetensors.md"), ("mae", "m", "m/README.md")),
    ):
        there = converted(source, tmp_path / name, format)
        text = (tmp_path / card).read_text()
        assert f"{sum(value.numel() for value in there.state.values()):,}" in text
        code = text.split("```python\n")[1].split("```")[0]
        scope = {"images": torch.zeros(1, 3, 32, 32)}
        exec(code, scope)  # as somebody would who copies it
        assert isinstance(scope["model"], torch.nn.Module)


def test_the_card_of_a_classifier_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    converted(probe_or_classifier(tmp_path, "class", "linear"), tmp_path / "m.safetensors", "mae")
    scope: dict[str, Any] = {}
    exec((tmp_path / "m.safetensors.md").read_text().split("```python\n")[1].split("```")[0], scope)
    assert scope["model"].classes == ["a", "b", "c", "d"]


class Hub:
    """What `huggingface_hub` would send, up to the network."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **more: Any) -> None:
        self.calls.append((repo_id, more))

    def upload_folder(self, repo_id: str, folder_path: Path, **more: Any) -> str:
        assert all((Path(folder_path) / name).stat().st_size for name in more["allow_patterns"])
        self.calls.append((repo_id, more))
        return f"https://hub/{repo_id}"


def test_push_sends_the_folder(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    hub = Hub()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("not for the world")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    converted(source, tmp_path / "hf", "hf", "--force", "--push", "me/my-mae", "--private", "false")
    assert hub.calls[0] == ("me/my-mae", {"private": False, "exist_ok": True})
    sent = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert hub.calls[1][1]["allow_patterns"] == sent
    assert "https://hub/me/my-mae" in capsys.readouterr().out


def test_a_hub_that_cannot_be_reached_loses_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    args = ["convert", str(source), str(tmp_path / "out"), "--format", "mae", "--push", "me/x"]
    assert main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mae: error: --push me/x: ")
    assert usable_weights(tmp_path / "out").holds == "autoencoder"


# ---- the sizes of the paper ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "patch", "more"),
    [
        pytest.param("tiny", 16, {"depth": 2, "decoder_depth": 1}, marks=pytest.mark.slow),
        pytest.param("base", 16, {}, marks=pytest.mark.soak),
        pytest.param("huge", 14, {"depth": 2, "decoder_depth": 1}, marks=pytest.mark.slow),  # whole, it takes 10 GB
    ],
)
def test_round_trips_of_real_sizes(tmp_path: Path, size: str, patch: int, more: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(224, patch, **{**SIZES[size]._asdict(), **more})
    src = saved(tmp_path, model)
    del model
    own = usable_weights(src)
    for format, name in (("official", "o.pth"), ("hf", "hf")):
        converted(src, tmp_path / name, format)
        require_same(converted(tmp_path / name, tmp_path / "back.safetensors", "mae", "--force"), own)
    there = converted(src, tmp_path / "timm", "timm")
    assert all(torch.equal(value, own.state[key]) for key, value in there.state.items())


LOADED = """
import sys, time
import torch
import mae
from mae.runtime import memory
mae.load, mae.load_encoder, torch.zeros(1)  # imports
device = torch.device("cpu")
memory.reset_peak(device)
before = memory.resident()
start = time.perf_counter()
model = getattr(mae, sys.argv[2])(sys.argv[1])
seconds = time.perf_counter() - start
sum(float(p.sum()) for p in model.parameters())  # all of it has come from the disk
print(seconds, memory.peak(device) - before)
"""


@pytest.mark.soak
@pytest.mark.slow
def test_vit_b_takes_little_more_memory_than_its_file(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    torch.manual_seed(0)
    src = saved(tmp_path, MaskedAutoencoder())
    converted(src, tmp_path / "o.pth", "official")
    converted(tmp_path / "o.pth", tmp_path / "m.safetensors", "mae")
    for name in ("o.pth", "m.safetensors"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path / name), "load"],
            capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        seconds, growth = map(float, done.stdout.split())
        size = (tmp_path / name).stat().st_size
        print(f"{name}: {seconds:.2f} s, memory {growth / size:.2f} of the file's {size / 2**20:.0f} MiB")
        assert growth <= 1.3 * size
