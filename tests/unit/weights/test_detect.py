"""What a file of weights is: every kind that is read gives the numbers that were written; every other is one line."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign import (
    BAD,
    HEADS,
    KINDS,
    SCRIPT,
    SMALL,
    WIDE,
    State,
    autoencoder,
    bad_file,
    classifier,
    drawn,
    official,
    torch_file,
)
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer

import mae
from mae.errors import UserError
from mae.launch.stages import FinetuneCLI, LinearProbeCLI
from mae.models.mae import MaskedAutoencoder, sincos_positions
from mae.weights.classifier import build_classifier, load_classifier
from mae.weights.detect import detect_opened, usable_weights
from mae.weights.detect_architecture import ArchOverrides
from mae.weights.model_card import card_text
from mae.weights.read_file import open_weights
from mae.weights.state_dict_keys import dialect_of, from_ours, to_ours
from mae.weights.weights import Weights

IMAGENET = timm.data.ImageNetInfo("imagenet-1k").label_names()


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def images_for(network: MaskedAutoencoder, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masking scores."""
    draw = torch.Generator().manual_seed(1)
    shape = (count, network.in_chans, *network.image_size)
    return torch.rand(shape, generator=draw), torch.rand(count, network.num_patches, generator=draw)


def complains(src: Path, match: str, overrides: ArchOverrides = HEADS) -> str:
    with pytest.raises(UserError, match=match) as caught:
        usable_weights(src, overrides)
    assert "\n" not in str(caught.value)
    assert src.name in str(caught.value)
    return str(caught.value)


# ---- good ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_numbers_that_were_written(name: str, tmp_path: Path) -> None:
    kind, network = KINDS[name], autoencoder(norm_pix_loss=False)
    weights = usable_weights(kind.write(network, tmp_path), kind.overrides._replace(norm_pix_loss=False))
    assert (weights.format, weights.holds, weights.problems) == (kind.format, kind.holds, ())
    images, noise = images_for(network)
    with torch.no_grad():
        assert torch.equal(weights.encoder().forward_features(images), network.encode(images))
        if kind.holds == "encoder":
            assert same(weights.timm_state, dict(network.encoder.state_dict()))
            return
        assert same(weights.state, dict(network.state_dict()))
        assert weights.config == network.config
        assert torch.equal(weights.build()(images, noise).loss, network(images, noise).loss)


def test_the_order_of_names_does_not_matter(tmp_path: Path) -> None:
    state = official(autoencoder())
    turned = dict(reversed(state.items()))
    a = usable_weights(torch_file({"model": state}, tmp_path / "a.pth"), HEADS)
    b = usable_weights(torch_file({"model": turned}, tmp_path / "b.pth"), HEADS)
    assert same(a.state, b.state)
    assert a.config == b.config
    assert a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_used_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in official(autoencoder()).items()}
    weights = usable_weights(torch_file({"model": state}, tmp_path / "x.pth"), HEADS)
    assert all(torch.equal(weights.state["encoder." + key], state[key].float()) for key in ("cls_token", "norm.bias"))
    assert {value.dtype for value in weights.state.values()} == {torch.float32}
    assert f"stored as {str(dtype).removeprefix('torch.')}, used as float32" in weights.notes
    weights.build()


@pytest.mark.parametrize("width", [192, 768])
def test_heads_are_told_by_the_width(width: int, tmp_path: Path) -> None:
    network = autoencoder(**(WIDE | {"embed_dim": width, "num_heads": width // 64, "decoder_embed_dim": 512}))
    weights = usable_weights(torch_file({"model": official(network)}, tmp_path / "x.pth"))
    assert weights.config == network.config
    assert any(f"num_heads is not recorded: assumed to be {width // 64}" in note for note in weights.notes)
    assert any("decoder_num_heads is not recorded: assumed to be 16" in note for note in weights.notes)


@pytest.mark.parametrize("key", ["num_heads", "decoder_num_heads"])
def test_heads_that_nothing_tells_are_asked_for(key: str, tmp_path: Path) -> None:
    path = torch_file({"model": official(autoencoder())}, tmp_path / "x.pth")
    complains(path, f"does not record how many attention heads .*--{key}", HEADS._replace(**{key: None}))
    complains(path, f"{key} 3 does not divide its width", HEADS._replace(**{key: 3}))
    complains(path, f"{key} 0 does not divide its width", HEADS._replace(**{key: 0}))


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("mae_pretrain_vit_base_full.pth", True),
        ("mae_visualize_vit_large.pth", False),
        ("mae_visualize_vit_large_ganloss.pth", False),
        ("checkpoint.pth", True),
    ],
)
def test_the_target_by_the_names_of_published_files(name: str, normalised: bool, tmp_path: Path) -> None:
    path = torch_file({"model": official(autoencoder())}, tmp_path / name)
    weights = usable_weights(path, HEADS)
    assert weights.config["norm_pix_loss"] == normalised
    assert sum("what its decoder predicts is not recorded" in note for note in weights.notes) == 1
    assert "non-commercial" in weights.description["licence"] or "BY-NC" in weights.description["licence"]
    told = usable_weights(path, HEADS._replace(norm_pix_loss=not normalised))
    assert told.config["norm_pix_loss"] == (not normalised)
    assert not any("what its decoder predicts" in note for note in told.notes)


@pytest.mark.parametrize("normalised", [True, False])
def test_settings_of_the_official_script_count(normalised: bool, tmp_path: Path) -> None:
    network = autoencoder(embed_dim=48, num_heads=12, depth=1, decoder_num_heads=16)
    args = argparse.Namespace(**(vars(SCRIPT) | {"norm_pix_loss": normalised, "mask_ratio": 0.6}))
    weights = usable_weights(torch_file({"model": official(network), "args": args, "epoch": 2}, tmp_path / "x.pth"))
    assert weights.config == network.config | {"norm_pix_loss": normalised}
    assert weights.description["mask_ratio"] == 0.6


def test_a_prefix_in_the_midst_is_left_out(tmp_path: Path) -> None:
    state = {key.replace("blocks.0.", "blocks.0._orig_mod."): v for key, v in official(autoencoder()).items()}
    assert any("._orig_mod." in key for key in state)
    assert same(usable_weights(torch_file(state, tmp_path / "x.pth"), HEADS).state, dict(autoencoder().state_dict()))


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(14, 28), (28, 14), (21, 35), (7, 21), (28, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fixed_positions_tell_the_grid(size: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    network = autoencoder(image_size=size)
    state = {key: value.to(dtype) for key, value in official(network).items()}
    assert usable_weights(torch_file(state, tmp_path / "x.pth"), HEADS).config["image_size"] == list(size)


def learned(grid: tuple[int, int], path: Path, **beside: Any) -> Path:
    network = autoencoder(image_size=(7 * grid[0], 7 * grid[1]))
    network.pos_embed.copy_(torch.randn_like(network.pos_embed))
    return torch_file({"model": official(network), **beside}, path)


@pytest.mark.parametrize("grid", [(2, 4), (3, 5)])  # 3 x 5 and the class token are 4 x 4
def test_learned_positions_of_an_oblong_grid_must_be_told(grid: tuple[int, int], tmp_path: Path) -> None:
    path = learned(grid, tmp_path / "x.pth")
    complains(path, f"{grid[0] * grid[1]} patches, which do not form a square: state --grid")
    weights = usable_weights(path, HEADS._replace(grid=grid))
    assert weights.grid == grid
    assert weights.config["image_size"] == [7 * grid[0], 7 * grid[1]]
    complains(path, f"--grid 3 3: .* has {grid[0] * grid[1]} patches", HEADS._replace(grid=(3, 3)))
    complains(path, "--grid -2 -4", HEADS._replace(grid=(-2, -4)))


def test_a_square_is_assumed_of_learned_positions(tmp_path: Path) -> None:
    path = learned((2, 8), tmp_path / "x.pth")
    assert usable_weights(path, HEADS).grid == (4, 4)
    assert usable_weights(path, HEADS._replace(grid=(2, 8))).grid == (2, 8)


# ---- this project's own ----------------------------------------------------------------------------------------------


def test_our_run_is_the_same_in_all_its_files(pretrained: Path) -> None:
    folder, export = usable_weights(pretrained), usable_weights(pretrained / "model.safetensors")
    checkpoint, encoder = (
        usable_weights(pretrained / "checkpoints" / "last.ckpt"),
        usable_weights(pretrained / "encoder.safetensors"),
    )
    assert [w.holds for w in (folder, export, checkpoint, encoder)] == ["autoencoder"] * 3 + ["encoder"]
    assert [w.format for w in (folder, export, checkpoint, encoder)] == ["mae"] * 4
    assert same(folder.state, export.state)
    assert same(export.state, checkpoint.state)
    assert same(encoder.timm_state, export.timm_state)
    assert export.description["model"] == checkpoint.description["model"] == encoder.description["model"]
    assert not folder.notes + checkpoint.notes + encoder.notes
    images, noise = images_for(folder.build())
    with torch.no_grad():
        losses = [w.build()(images, noise).loss for w in (folder, export, checkpoint)]
        features = [w.encoder().forward_features(images) for w in (folder, checkpoint, encoder)]
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


@pytest.mark.parametrize("stage", [LinearProbeCLI, FinetuneCLI])
def test_our_classifiers(stage: Any, pretrained: Path, tmp_path: Path) -> None:
    settings = ["--data.dataset=digits", "--data.num_workers=0", "--trainer.accelerator=cpu", "--wandb.mode=disabled"]
    settings += ["--model.warmup_epochs=0.01", "--data.crop_scale=null", "--trainer.max_steps=3"]
    settings += ["--data.auto_augment=null", "--model.drop_path=0"] if stage is FinetuneCLI else []
    stage([*settings, f"--model.encoder={pretrained}", f"--run_dir={tmp_path / 'run'}"]).fit()
    weights = usable_weights(tmp_path / "run")
    assert (weights.format, weights.holds, weights.notes) == ("mae", "classifier", ())
    assert same(weights.state, usable_weights(tmp_path / "run" / "checkpoints" / "last.ckpt").state)
    assert weights.require_classifier()["classes"] == [str(i) for i in range(10)]
    if stage is LinearProbeCLI:  # which trains the head alone
        own = usable_weights(pretrained).timm_state
        assert all(torch.equal(value, own[key]) for key, value in weights.timm_state.items() if "head" not in key)


# ---- classifiers of others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "head"), [("mean", "linear"), ("class", "linear"), ("class", "batchnorm")])
def test_classifiers_compute_what_they_were_trained_for(pool: str, head: str, tmp_path: Path) -> None:
    network = classifier(pool, head)
    path = torch_file({"model": network.state_dict(), "epoch": 9}, tmp_path / "x.pth")
    weights = usable_weights(path, HEADS)
    assert (weights.format, weights.holds) == ("official", "classifier")
    about = weights.require_classifier()
    assert (about["pool"], about["head"], about["classes"]) == (pool, head, ["0", "1", "2", "3", "4"])
    assert same(weights.timm_state, dict(network.state_dict()))


def test_a_classifier_of_timm_gives_the_same_logits(tmp_path: Path) -> None:
    for avg in (False, True):
        kwargs: dict[str, Any] = {"depth": 1, "img_size": 32, "global_pool": "avg" if avg else "token"}
        network = timm.create_model("vit_tiny_patch16_224", **kwargs).eval()
        path = torch_file(network.state_dict(), tmp_path / "x.pth")
        loaded = load_classifier(path)
        assert loaded.classes == IMAGENET
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(loaded.network(images), network(images))


def test_names_of_classes_in_a_folder_of_timm(tmp_path: Path) -> None:
    save_file(classifier().state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 5,
        "model_args": {"num_heads": 2, "img_size": 28},
        "pretrained_cfg": {"label_names": list("abcde"), "crop_pct": 0.9, "license": "cc-by-nc-4.0", "mean": [0.5] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = usable_weights(tmp_path)
    about = weights.require_classifier()
    assert (about["classes"], about["crop_pct"]) == (list("abcde"), 0.9)
    assert weights.description["licence"] == "cc-by-nc-4.0"
    assert weights.config["num_heads"] == 2


# ---- transformers itself ---------------------------------------------------------------------------------------------


def theirs(kind: str) -> Any:
    """A small network of transformers, every number of it drawn."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64}
    if kind == "ViTForImageClassification":
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=5)).eval()
        return drawn(network, 3)
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {f"decoder_{key}": value for key, value in decoder.items()}
    network = getattr(transformers, kind)(transformers.ViTMAEConfig(**sizes, norm_pix_loss=True)).eval()
    for key, value in network.state_dict().items():
        if "pos" in key:
            value.copy_(sincos_positions(value.shape[2], (4, 4)))
    return drawn(network, 3)


@pytest.mark.parametrize("parts", [False, True])
def test_what_transformers_saves_has_its_loss(parts: bool, tmp_path: Path) -> None:
    network = theirs("ViTMAEForPreTraining")
    network.save_pretrained(tmp_path, max_shard_size="20KB" if parts else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == parts
    model = usable_weights(tmp_path).build()
    images, noise = images_for(model)
    with torch.no_grad():
        expected = network(images, noise=noise).loss
        assert model(images, noise).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_encoder_that_transformers_saves_has_its_features(tmp_path: Path) -> None:
    network = theirs("ViTMAEModel")
    network.save_pretrained(tmp_path)
    weights = usable_weights(tmp_path)
    assert (weights.format, weights.holds) == ("hf", "encoder")
    whole = theirs("ViTMAEForPreTraining")
    whole.vit.load_state_dict(network.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    assert same(weights.timm_state, usable_weights(tmp_path / "whole").timm_state)


def test_a_classifier_that_transformers_saves_has_its_logits(tmp_path: Path) -> None:
    network = theirs("ViTForImageClassification")
    network.config.id2label = dict(enumerate("abcde"))
    network.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path)
    assert loaded.classes == list("abcde")
    images = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(images), network(images).logits, rtol=1e-4, atol=1e-5)


def test_the_processor_beside_it_tells_mean_and_std(tmp_path: Path) -> None:
    KINDS["hub .bin"].write(autoencoder(), tmp_path)
    about = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    weights = usable_weights(tmp_path)
    assert (weights.description["mean"], weights.description["std"]) == (about["image_mean"], about["image_std"])
    assert weights.description["mask_ratio"] == 0.6
    assert not any("mean and std" in note for note in weights.notes)
    assert any("1e-12" in note for note in weights.notes)


@pytest.mark.parametrize("dialect", ["mae", "official", "hf"])
def test_names_there_and_back(dialect: Any) -> None:
    state = dict(autoencoder().state_dict())
    there = from_ours(state, dialect)
    assert dialect_of(there) == dialect
    assert same(to_ours(there, dialect), state)


# ---- bad ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_line_and_nothing_is_run(name: str, tmp_path: Path) -> None:
    complains(bad_file(name, tmp_path), BAD[name][2])
    assert not (tmp_path / "boom").exists()


def test_problems_are_found_without_an_error(tmp_path: Path) -> None:
    weights = detect_opened(open_weights(bad_file("a wrong shape", tmp_path)), HEADS)
    assert weights.problems == ("encoder.blocks.1.attn.proj.weight is (32, 31), wanted (32, 32)",)


@pytest.mark.parametrize("begin", [b"\x80", b"PK"])
def test_a_safetensors_file_whose_length_looks_like_another_kind(begin: bytes, tmp_path: Path) -> None:
    path, state, padding = tmp_path / "x.safetensors", official(autoencoder()), 0
    for _ in range(2):  # the header's length is a number of eights
        save_file(state, path, {"padding": "." * padding})
        length = int.from_bytes(path.read_bytes()[:8], "little")
        padding = (
            padding or int.from_bytes(b"PK", "little") // 8 * 8 - length if begin == b"PK" else -(length - 128) % 256
        )
    assert path.read_bytes().startswith(begin)
    assert same(usable_weights(path, HEADS).state, dict(autoencoder().state_dict()))


def test_what_is_no_file(tmp_path: Path) -> None:
    complains(tmp_path / "nowhere.pth", "does not exist")
    complains(tmp_path, "no run folder and no saved model")


def test_an_index_that_names_what_is_not_there(tmp_path: Path) -> None:
    KINDS["hub in parts"].write(autoencoder(), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors does not exist"):
        usable_weights(tmp_path)
    for bad in ("../x.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {key: bad for key in names["weight_map"]}}))
        with pytest.raises(UserError, match="which is not beside it"):
            usable_weights(tmp_path)
    for text in ("", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json (cannot be read|names 3)"):
            usable_weights(tmp_path)


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    KINDS["timm folder"].write(autoencoder(), tmp_path)
    for text in ("{", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json "):
            usable_weights(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("image_size", "x"), ("num_attention_heads", [1]), ("layer_norm_eps", "x"), ("norm_pix_loss", "x")),
        *(("mask_ratio", 2), ("id2label", 3), ("processor", 3), ("hidden_act", "relu")),
    ],
)
def test_settings_of_a_wrong_kind_are_one_line(key: str, value: Any, tmp_path: Path) -> None:
    KINDS["hub .bin"].write(autoencoder(), tmp_path)
    path = tmp_path / "config.json"
    if key == "processor":
        key, value, path = "image_mean", [0.5, 0.5], tmp_path / "preprocessor_config.json"
        path.write_text("{}")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"cannot be used|does not fit its own description|with relu") as caught:
        usable_weights(tmp_path, HEADS)
    assert "\n" not in str(caught.value)


def test_settings_that_are_null_are_not_told(tmp_path: Path) -> None:
    KINDS["hub .bin"].write(autoencoder(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value if key == "model_type" else None for key, value in config.items()}))
    weights = usable_weights(tmp_path, HEADS)
    assert weights.config == autoencoder().config
    assert any("norm_pix_loss true" in note for note in weights.notes)


@pytest.mark.parametrize("key", ["image_size", "depth", "num_heads"])
def test_a_description_of_ours_that_lacks_a_size(key: str, tmp_path: Path) -> None:
    network = autoencoder()
    config = {name: value for name, value in network.config.items() if name != key}
    metadata = {"mae": json.dumps({"model": config, "mean": [0.5] * 3, "std": [0.5] * 3})}
    save_file(dict(network.state_dict()), tmp_path / "x.safetensors", metadata)
    complains(tmp_path / "x.safetensors", f"does not fit its own description: {key} is missing")


# ---- other images ----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return usable_weights(torch_file({"model": official(autoencoder())}, tmp_path / "x.pth"), HEADS)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels_by_the_rule_of_timm(channels: int, tmp_path: Path) -> None:
    three = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    path = torch_file(three.state_dict(), tmp_path / "x.pth")
    kwargs: dict[str, Any] = {
        "pretrained": True,
        "pretrained_cfg_overlay": {"file": str(path), "num_classes": 0, "custom_load": False},
    }
    expected = timm.create_model(
        "vit_tiny_patch16_224.augreg_in21k", depth=1, num_classes=0, in_chans=channels, **kwargs
    )
    adapted = usable_weights(path).adapted(in_chans=channels)
    assert same(adapted.timm_state, dict(expected.state_dict()))
    assert adapted.encoder()(torch.rand(1, channels, 224, 224)).shape == (1, 192)
    assert len(adapted.description["mean"]) == len(adapted.description["std"]) == channels
    assert any(f"{channels} channels from 3" in note for note in adapted.notes)


def test_channels_leave_the_decoder_out_and_the_rest_alone(weights: Weights) -> None:
    before = {key: value.clone() for key, value in weights.state.items()}
    adapted = weights.adapted(in_chans=4)
    stem = "encoder.patch_embed.proj.weight"
    assert torch.equal(adapted.state[stem], adapt_input_conv(4, weights.state[stem].clone()))
    assert adapted.holds == "encoder"
    assert any("decoder is left out" in note for note in adapted.notes)
    mean = weights.description["mean"]
    assert adapted.description["mean"] == [*mean, mean[0]]
    assert weights.adapted(in_chans=1).description["mean"] == [pytest.approx(sum(mean) / 3)]
    assert same(weights.state, before)
    assert weights.config["in_chans"] == 3
    assert weights.adapted(in_chans=3) == weights


@pytest.mark.parametrize("size", [42, (14, 35)])
def test_image_sizes_by_the_resampling_of_timm(size: Any, weights: Weights) -> None:
    weights.state["encoder.pos_embed"] = torch.rand_like(weights.state["encoder.pos_embed"])
    adapted = weights.adapted(size)
    pair = [size, size] if isinstance(size, int) else list(size)
    grid = [pair[0] // 7, pair[1] // 7]
    for key in ("encoder.pos_embed", "decoder_pos_embed"):
        expected = resample_abs_pos_embed(weights.state[key], grid, [4, 4], antialias=False)
        assert torch.equal(adapted.state[key], expected)
    assert adapted.config["image_size"] == pair
    assert weights.config["image_size"] == [28, 28]
    images, noise = images_for(adapted.build())
    assert adapted.build()(images, noise).loss.isfinite()
    assert any("positions resampled from 4x4" in note for note in adapted.notes)
    assert weights.adapted(28) == weights


def test_images_that_do_not_go(weights: Weights) -> None:
    for size in (30, (28, 30), 0, -7):
        with pytest.raises(UserError, match="not divisible by the patch size 7x7"):
            weights.adapted(size)
    with pytest.raises(UserError, match="in_chans 0"):
        weights.adapted(in_chans=0)
    with pytest.raises(UserError, match=r"in_chans 3: .* takes 4; only 3 channels can be adapted"):
        weights.adapted(in_chans=4).adapted(in_chans=3)


def test_load_and_load_encoder_take_what_is_not_told(tmp_path: Path) -> None:
    network = autoencoder(norm_pix_loss=False)
    path = torch_file({"model": official(network)}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="mean and std"):
        model = mae.load(path, num_heads=2, decoder_num_heads=2, norm_pix_loss=False)
    assert model.config == network.config
    assert same(dict(model.state_dict()), dict(network.state_dict()))
    assert not model.pos_embed.requires_grad
    with pytest.warns(UserWarning, match="resampled|mean and std"):
        encoder = mae.load_encoder(
            torch_file(official(network, encoder=True), tmp_path / "e.pth"), image_size=14, in_chans=1, num_heads=2
        )
    assert encoder(torch.rand(1, 1, 14, 14)).shape == (1, SMALL["embed_dim"])


# ---- what must not be guessed in silence -----------------------------------------------------------------------------


def classifier_of_timm(**settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3}
    network = VisionTransformer(**sizes, num_classes=5, **settings)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape)
    return network.eval()


def test_the_pool_of_a_classifier_is_asked_for_where_no_tensor_tells_it(tmp_path: Path) -> None:
    network = classifier_of_timm(global_pool="avg", fc_norm=False)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    weights = usable_weights(tmp_path / "x.pth")
    assert "its pool is not recorded: its head is assumed to take the class token (pool class)" in weights.notes
    told = usable_weights(tmp_path / "x.pth", ArchOverrides(pool="mean"))
    assert not any("pool" in note for note in told.notes)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(build_classifier(told)(images), network(images), rtol=0, atol=1e-5)
        assert (build_classifier(weights)(images) - network(images)).abs().max() > 0.1
    torch.save(classifier_of_timm(global_pool="avg", fc_norm=True).state_dict(), tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"pool class: .* has mean"):
        usable_weights(tmp_path / "y.pth", ArchOverrides(pool="class"))


def test_an_official_probe_of_the_mean_of_tokens(tmp_path: Path) -> None:
    """Its norm comes after the pool, as in fine-tuning, and BatchNorm after that."""
    network = classifier_of_timm(global_pool="avg", fc_norm=True)
    norm = torch.nn.BatchNorm1d(192, affine=False, eps=1e-6)
    norm.running_mean, norm.running_var = torch.randn(192), torch.rand(192) + 0.5
    network.head = torch.nn.Sequential(norm.eval(), network.head)  # type: ignore[assignment]
    torch.save({"model": network.state_dict()}, tmp_path / "checkpoint-89.pth")
    weights = usable_weights(tmp_path / "checkpoint-89.pth")
    assert any("BatchNorm is folded" in note for note in weights.notes)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(build_classifier(weights)(images), network(images), rtol=1e-5, atol=1e-5)


def test_numbers_that_are_not_finite_are_not_used(tmp_path: Path) -> None:
    state = classifier_of_timm().state_dict()
    state["blocks.0.mlp.fc1.bias"][3] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"x.pth cannot be used: encoder.blocks.0.mlp.fc1.bias has numbers that are not"
    ):
        usable_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "more", "licence"),
    [
        ("mae_finetuned_vit_base.pth", {}, "CC BY-NC 4.0"),
        ("x.pth", {}, "not recorded: CC BY-NC 4.0, if the authors of the paper published these weights"),
        ("checkpoint-799.pth", {"optimizer": {}}, None),
    ],
)
def test_licences_are_not_made_up(tmp_path: Path, name: str, more: dict[str, Any], licence: str | None) -> None:
    torch.save({"model": classifier_of_timm().state_dict(), **more}, tmp_path / name)
    weights = usable_weights(tmp_path / name)
    assert weights.description.get("licence") == licence
    head = card_text(weights, "timm", "x", True, [], []).split("---")[1]
    assert ("license: cc-by-nc-4.0" in head) == (licence == "CC BY-NC 4.0")


def test_graphs_and_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt2").write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=r"x.pt2 is a graph, which is run and not read back"):
        usable_weights(tmp_path / "x.pt2")
    torch.save({}, tmp_path / "x.pth")
    monkeypatch.setattr(
        "mae.weights.read_file.open_regular", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(UserError, match=r"x.pth cannot be read: Permission denied"):
        usable_weights(tmp_path / "x.pth")
