"""What files tell of pooling and of how images are made ready: followed, to the logits, or named."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign import HEADS, KINDS, autoencoder, classifier, torch_file
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch.testing import assert_close

from mae.errors import UserError
from mae.weights.classifier import build_classifier
from mae.weights.detect import usable_weights
from mae.weights.preprocessing import by_timm, by_transformers
from mae.weights.weights import Weights

SQUASH = "squashes images to {} without regard to their shape"
SHORT, CROP = {"size": {"shortest_edge": 256}}, {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
OLD_CROP = {"size": 256, "do_center_crop": True, "crop_size": 224}
CONVNEXT = {"crop_pct": 0.9, "feature_extractor_type": "ConvNextFeatureExtractor"}


@pytest.mark.parametrize(
    ("processor", "crop_pct", "notes"),
    [
        ({"size": 224, "resample": 2}, 1.0, [SQUASH.format("224x224"), "bilinearly"]),
        (OLD_CROP, 0.875, [SQUASH.format("256x256")]),
        (OLD_CROP | {"feature_extractor_type": "CLIPFeatureExtractor"}, 0.875, []),
        ({"size": [64, 64]}, 1.0, [SQUASH.format("64x64"), "makes images of 64x64, where this model takes 224x224"]),
        ({"size": {"height": 224, "width": 224}, "resample": 3}, 1.0, [SQUASH.format("224x224")]),
        ({**SHORT, **CROP, "resample": 3, "do_resize": None, "do_pad": None, "image_mean": None}, 0.875, []),
        ({**SHORT, **CROP, "crop_size": {"shortest_edge": 224}}, 0.875, []),
        ({**SHORT, **CROP, "do_center_crop": False}, 1.0, ["cuts nothing off", "makes images of 256x256"]),
        ({"size": {"shortest_edge": 200}, **CROP}, 1.0, ["adds borders to make 224x224"]),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.9}, 0.9, []),  # ConvNext's
        ({"size": 224, **CONVNEXT}, 0.9, []),
        ({"size": 384, **CONVNEXT}, 1.0, [SQUASH.format("384x384"), "makes images of 384x384"]),
        ({"size": {"shortest_edge": 224, "longest_edge": 400}}, 1.0, ["a size of a form that is not known"]),
        ({"size": {"max_height": 9, "max_width": 9}}, 1.0, ["a size of a form that is not known"]),
        ({"do_resize": False, **CROP, "resample": 0}, 1.0, ["does not resize images, but cuts 224x224"]),
        ({"do_resize": False}, 1.0, ["does not resize images, but takes them as they are"]),
        ({"size": 224, "do_pad": True, "resample": 1}, 1.0, [SQUASH.format("224x224"), "adds borders", "Lanczos"]),
    ],
)
def test_every_form_of_size_and_crop(processor: dict[str, Any], crop_pct: float, notes: list[str]) -> None:
    told = by_transformers(processor, (224, 224), 3)
    assert told.settings == {"crop_pct": crop_pct}
    assert len(told.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, told.notes, strict=True))
    assert all(note.startswith("preprocessor_config.json: it ") for note in told.notes)
    assert by_transformers({"do_rescale": True, "do_normalize": True}, (224, 224), 3) == ({}, [])  # nothing is told


@pytest.mark.slow
def test_pixels_of_the_processors_of_transformers() -> None:
    """Scaling, offset and normalisation become one mean and std: the same numbers reach the network."""
    transformers = pytest.importorskip("transformers")
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels = torch.tensor(list(image.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    for name, settings in (
        ("ViTImageProcessor", {}),
        ("ViTImageProcessor", {"image_mean": mean, "image_std": std}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "image_mean": mean, "image_std": std}),
        ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [50.0] * 3}),
        ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}),
        ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": mean}),
    ):
        size = {"height": 32, "width": 32}
        settings = {"size": size, "crop_size": size, "do_center_crop": False, **settings}
        if name.startswith("Eff"):
            settings["include_top"] = False
        processor = getattr(transformers, name)(**settings)
        theirs = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0], dtype=torch.float32)
        told = by_transformers(json.loads(processor.to_json_string()), (32, 32), 3).settings
        ours = (pixels - torch.tensor(told["mean"]).view(3, 1, 1)) / torch.tensor(told["std"]).view(3, 1, 1)
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=f"{name} {settings}")


def test_a_processor_beside_a_classifier(tmp_path: Path) -> None:
    save_file(classifier("class").state_dict(), tmp_path / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = {"size": {"height": 64, "width": 64}, "resample": 2, "image_mean": 0.5, "image_std": 0.5}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = usable_weights(tmp_path)
    assert weights.require_classifier()["crop_pct"] == 1.0
    assert weights.description["mean"] == [0.5] * 3
    text = "\n".join(weights.notes)
    assert f"preprocessor_config.json: it {SQUASH.format('64x64')}; here the short side is resized" in text
    assert "it makes images of 64x64, where this model takes 28x28" in text
    assert "it resizes bilinearly; here bicubically" in text
    assert not re.search("its crop is not|mean and std of", text)


def test_a_mask_ratio_of_zero_is_for_features(tmp_path: Path) -> None:
    KINDS["hub .bin"].write(autoencoder(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_ratio": 0.0}))
    weights = usable_weights(tmp_path)
    assert weights.description["mask_ratio"] == 0.75
    assert "its mask_ratio is 0, as for features: where patches are hidden, it is 0.75" in weights.notes
    assert weights.build()(torch.rand(1, 3, 28, 28)).loss.isfinite()


# ---- the official scripts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "size", "pool", "crop_pct", "assumed"),
    [
        (None, 28, "class", 0.875, {"pool", "crop"}),
        (None, 448, "class", 1.0, {"pool", "crop"}),
        ({"global_pool": False, "input_size": 448}, 448, "class", 1.0, set()),
        ({"global_pool": True, "input_size": 384}, 28, "mean", 1.0, set()),
        ({"global_pool": False}, 28, "class", 0.875, set()),  # the probe's script, which has one size
    ],
)
def test_arguments_of_the_official_scripts(
    args: dict[str, Any] | None, size: int, pool: str, crop_pct: float, assumed: set[str], tmp_path: Path
) -> None:
    state = classifier(pool).state_dict()
    state["pos_embed"] = torch.zeros(1, 1 + (size // 7) ** 2, 32)
    more = {} if args is None else {"args": argparse.Namespace(model="vit_own", **args)}
    weights = usable_weights(torch_file({"model": state, **more}, tmp_path / "x.pth"), HEADS)
    about = weights.require_classifier()
    assert (about["pool"], about["crop_pct"]) == (pool, crop_pct)
    assert {part for part in ("pool", "crop") if f"its {part} is not recorded" in "\n".join(weights.notes)} == assumed


# ---- timm ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4, "num_classes": 5}


def saved_by_timm(folder: Path, name: str = "vit_tiny_patch16_224", **arguments: Any) -> torch.nn.Module:
    """A model that timm has saved in a folder, every number of it drawn; what timm builds again from the folder."""
    arguments = SMALL | arguments
    torch.manual_seed(0)
    network = timm.create_model(name, **arguments)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape)
    save_for_hf(network, str(folder), model_args=arguments, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    again = timm.create_model(config["architecture"], **{"num_classes": config["num_classes"], **config["model_args"]})
    again.load_state_dict(load_file(folder / "model.safetensors"))
    return again.eval()


def test_a_folder_of_timm_gives_the_logits_that_timm_computes(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    followed = []
    for pool in ("token", "avg", "avgmax", "max", "map", ""):
        for fc_norm in (None, True, False) if pool in ("token", "avg") else (None,):
            folder = tmp_path / f"{pool}-{fc_norm}"
            network = saved_by_timm(folder, global_pool=pool, fc_norm=fc_norm)
            if pool not in ("token", "avg"):
                with pytest.raises(UserError, match=rf"its global_pool is '{pool}'; this network pools by 'avg' or"):
                    usable_weights(folder)
                continue
            weights = usable_weights(folder)
            assert not any("pool is not recorded" in note for note in weights.notes)
            with torch.no_grad():
                assert_close(build_classifier(weights)(images), network(images), rtol=0, atol=1e-5)
            followed.append((pool, fc_norm))
    assert len(followed) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, "leave none for a class token"),
        ({"no_embed_class": True}, "leave out the class token|leave none for a class token"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"pre_norm": True}, r"unknown tensors: encoder\.norm_pre"),
        ({"final_norm": False}, r"lacks encoder\.norm"),
        ({"init_values": 0.1}, r"unknown tensors: encoder\.blocks\.0\.ls1"),
        ({"qk_norm": True}, r"unknown tensors: encoder\.blocks\.0\.attn\.k_norm"),
        ({"qkv_bias": False}, r"lacks encoder\.blocks\.0\.attn\.qkv\.bias"),
        ({"pos_embed": "none"}, r"lacks encoder\.pos_embed"),
        ({"act_layer": "quick_gelu"}, "computes with QuickGELU"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "averages the class token, too"),
    ],
)
def test_what_this_network_lacks_is_refused_by_name(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_by_timm(tmp_path, **arguments)
    with pytest.raises(UserError, match=message) as caught:
        usable_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_kind_of_network_under_the_same_names_is_refused(tmp_path: Path) -> None:
    """RoPE has no tensors."""
    saved_by_timm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architecture": "vit_small_patch16_rope_224"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {}}))
    with pytest.raises(
        UserError, match="timm's vit_small_patch16_rope_224 is of the kind Eva, other than this network"
    ):
        usable_weights(tmp_path)


def weights_of_timm(folder: Path, cfg: dict[str, Any], **more: Any) -> Weights:
    saved_by_timm(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pretrained_cfg": config["pretrained_cfg"] | cfg, **more}))
    return usable_weights(folder)


def test_the_images_of_a_folder_of_timm(tmp_path: Path) -> None:
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.2] * 3, "crop_pct": 0.95, "interpolation": "bicubic"}
    for wrapped in ({}, {"model_type": "timm_wrapper"}):  # as transformers writes it
        weights = weights_of_timm(tmp_path, cfg, label_names=list("abcde"), **wrapped)
        assert (weights.description["mean"], weights.description["std"]) == (cfg["mean"], cfg["std"])
        assert weights.require_classifier()["crop_pct"] == 0.95
        assert weights.require_classifier()["classes"] == list("abcde")
        assert weights.config["num_heads"] == 4
        assert not [note for note in weights.notes if "stored" not in note]
    told = by_timm({"crop_mode": "squash", "interpolation": "bilinear", "input_size": [3, 64, 64]}, (32, 32))
    assert told.notes == [
        f"config.json: it {SQUASH.format('32x32')}; here the short side is resized and the centre cropped",
        "config.json: it resizes bilinearly; here bicubically",
        "config.json: it makes images of 64x64, where this model takes 32x32",
    ]
    assert by_timm({"crop_mode": "border"}, (32, 32)).notes[0].startswith("config.json: it adds borders to make 32x32")


def test_arguments_of_the_training_script_of_timm(tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="avg", fc_norm=False).eval()
    args = {
        "gp": "avg",
        "mean": None,
        "std": [0.5] * 3,
        "crop_pct": 0.9,
        "model_kwargs": {"depth": 1, "fc_norm": False},
    }
    content = {"state_dict": network.state_dict(), "arch": "vit_tiny_patch16_224", "args": argparse.Namespace(**args)}
    weights = usable_weights(torch_file(content, tmp_path / "x.tar"))
    about = weights.require_classifier()
    assert (about["pool"], about["head"], about["crop_pct"]) == ("mean", "plain", 0.9)
    assert weights.description["std"] == [0.5] * 3
