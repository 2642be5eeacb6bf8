"""What a file of weights claims is checked before memory or time is spent on it: the error is one line."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import HEADS, autoencoder, classifier, hub, hub_config, hub_parts, official, timm_folder, torch_file
from forked import in_process, little_memory
from safetensors.torch import save_file

from mae.errors import UserError
from mae.runtime import memory
from mae.weights.detect import usable_weights

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**9


def refused(src: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        raise AssertionError(f"{match}: {usable_weights(src, HEADS)}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def described(state: dict[str, torch.Tensor], path: Path, text: str) -> Path:
    save_file(state, path, {"mae": text})
    return path


def nested(settings: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The settings with another value in this place."""
    first, *rest = keys
    return settings | {first: nested(settings[first], tuple(rest), value) if rest else value}


def our_claims() -> Iterator[tuple[tuple[str, ...], Any]]:
    no_sizes = (HUGE, 10**400, 0, -1, "12", True, None, float("nan"), 1.5, [1, 2, 3], {}, [[1], [2]])
    for key in ("depth", "embed_dim", "num_heads", "image_size", "patch_size", "in_chans", "decoder_depth"):
        yield from ((("model", key), value) for value in no_sizes)
    yield from ((("model", "mlp_ratio"), value) for value in (1e30, -1, "4", True, float("nan"), None))
    yield from ((("model",), value) for value in (None, [], "vit", 3))
    yield from ((("model", "norm_pix_loss"), value) for value in (1, "true", None))
    yield from ((("model", "timm_encoder"), value) for value in (1, None, "no_such_network"))
    yield from ((("std",), value) for value in ([0.5, 0, 0.5], [0.5, -1, 0.5], [0.5] * 2, ["1"] * 3, 1, [True] * 3))
    yield from ((("mean",), value) for value in ([float("nan")] * 3, [0.5] * 4, "abc", [[0.5]] * 3))
    yield from ((("mask_ratio",), value) for value in (0, 1, -3, "0.75", True, float("inf")))


def test_a_description_of_ours_that_makes_no_sense(tmp_path: Path) -> None:
    network = autoencoder()
    whole = {"model": network.config, "mean": [0.5] * 3, "std": [0.5] * 3, "mask_ratio": 0.75}
    path = described(network.state_dict(), tmp_path / "x.safetensors", json.dumps(whole))
    assert usable_weights(path).config == network.config
    for keys, value in our_claims():
        described(network.state_dict(), path, json.dumps(nested(whole, keys, value)))
        refused(path, r"x\.safetensors (does not fit its own description|cannot be used)")
    for text, said in {
        DEEP: "nested too deeply",
        f'{{"a": {DEEP}}}': "nested too deeply",
        '{"model": 1, "model": 2}': "it holds 'model' twice",
        '{"model": 1e400}': "1e400 is not a finite number",
        '{"model": "' + "x" * 2**22 + '"}': "over the limit of 4,194,304",
        "[]": "a list instead of settings",
    }.items():
        refused(described(network.state_dict(), path, text), f"x.safetensors .*cannot be read: .*{said}")


def test_a_description_of_a_classifier_that_makes_no_sense(tmp_path: Path) -> None:
    state = {f"encoder.{key}": value for key, value in classifier().state_dict().items()}
    about = {"classes": list("abcde"), "pool": "mean", "head": "linear", "lora_scale": 1.0, "crop_pct": 0.875}
    whole = {"model": {**autoencoder().config}, "mean": [0.5] * 3, "std": [0.5] * 3, "classifier": about}
    path = described(state, tmp_path / "x.safetensors", json.dumps(whole))
    assert usable_weights(path).holds == "classifier"
    values: dict[str, list[Any]] = {
        "classes": [5, "abcde", [1, 2, 3, 4, 5], [], {"0": "a"}, list("abcd")],
        "pool": [None, "max", 3],
        "head": [None, "x"],
        "lora_scale": ["1", float("nan"), None],
        "crop_pct": [0, 2, "1", float("nan")],
    }
    for key, wrong in values.items():
        for value in wrong:
            described(state, path, json.dumps(nested(whole, ("classifier", key), value)))
            refused(path, r"x\.safetensors (does not fit its own description|cannot be used)")
    # The same from a run's checkpoint, whose adapters are merged before anything else is looked at.
    for about_it in (None, [], {"classes": 5}, about | {"lora_scale": "x"}):
        content = {"mae": whole | {"classifier": about_it}, "mae_format": "1", "state_dict": state}
        if about_it is not None:
            refused(torch_file(content, tmp_path / "x.ckpt"), r"x\.ckpt (does not fit its own|cannot be used)")


def test_the_configuration_of_transformers(tmp_path: Path) -> None:
    network = autoencoder()
    whole = hub_config(network)
    torch.save(hub(network), tmp_path / "pytorch_model.bin")
    path, processor = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    wrong: dict[str, list[Any]] = {
        "num_attention_heads": [HUGE, "2", -2, True, 0, 2.5, [2]],
        "decoder_num_attention_heads": [HUGE, "2", 0],
        "image_size": [HUGE, "28", -28, [28], [28, HUGE], {"height": 28}],
        "norm_pix_loss": ["yes", 1],
        "mask_ratio": ["0.6", 7, float("nan"), True],
        "layer_norm_eps": ["x", float("inf"), -1],
        "hidden_act": [7, ["gelu"], "relu"],
        "id2label": [{"a": "cat"}, {"0": 7}, "ab", [1], {"0": {"1": "x"}}],
    }
    for key, values in wrong.items():
        for value in values:
            path.write_text(json.dumps(whole | {key: value}))
            refused(tmp_path, "config.json cannot be used|computes with")
    for text, said in {DEEP: "too deeply", '{"a": 1, "a": 1}': "'a' twice", "\xff\xfe": "", "{": ""}.items():
        path.write_text(text, encoding="latin-1")
        refused(tmp_path, rf"config\.json cannot be read: .*{said}")
    path.write_text(json.dumps(whole))
    for content in (
        {"image_std": [0.5, 0, 0.5]},
        {"image_std": -1},
        {"image_mean": ["a", "b", "c"]},
        {"rescale_factor": 0, "image_std": [0.5] * 3},
        {"size": {"shortest_edge": "many"}},
        {"size": HUGE, "do_center_crop": True, "crop_size": "x"},
        {"crop_pct": "x", "size": {"shortest_edge": 28}},
    ):
        processor.write_text(json.dumps(content))
        refused(tmp_path, r"pytorch_model\.bin: the settings .*config\.json cannot be used")


def test_the_configuration_of_timm(tmp_path: Path) -> None:
    timm_folder(autoencoder(), tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text()) | {"architecture": "vit_tiny_patch16_224"}
    for key, value in {
        "depth": HUGE,
        "embed_dim": HUGE,
        "img_size": [HUGE, HUGE],
        "num_classes": HUGE,
        "reg_tokens": -HUGE,
        "checkpoint_path": "/dev/zero",
        "pretrained": True,
        "mlp_ratio": 1e30,
    }.items():
        path.write_text(json.dumps(whole | {"model_args": {key: value}}))
        refused(tmp_path, rf"config\.json cannot be used \({key} is")
    path.write_text(json.dumps(whole | {"model_args": [1]}))
    refused(tmp_path, "config.json cannot be used")
    path.write_text(json.dumps(whole | {"pretrained_cfg": {"std": [0, 1, 1]}, "architecture": "own"}))
    refused(tmp_path, r"config\.json cannot be used \(std is \[0, 1, 1\]\)")


def test_tensors_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = official(autoencoder())
    wide = torch.zeros(1).expand(10**6, 10**6)
    for name, value in {
        "pos_embed": torch.zeros(1, 10**6, 1),
        "norm.weight": wide,
        "x" * 2000: torch.zeros(1),
        "blocks.999999999.norm1.weight": torch.zeros(1),
    }.items():
        refused(torch_file({"model": state | {name: value}}, tmp_path / "x.pth"), r"x\.pth")
    network = hub(autoencoder())
    key = next(key for key in network if "attention.attention.key.weight" in key)
    refused(torch_file(network | {key: torch.zeros(3)}, tmp_path / "x.pth"), r"x\.pth cannot be used")
    head = classifier("class", "batchnorm").state_dict() | {"head.0.running_var": torch.zeros(7)}
    head = {f"{key}": value for key, value in head.items()} | {"fc_norm.weight": torch.ones(32)}
    refused(torch_file(head, tmp_path / "x.pth"), r"x\.pth")
    monkeypatch.setattr("mae.weights.read_file.MOST_TENSORS", 7)
    save_file({f"t{i}": torch.zeros(1) for i in range(8)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "8 tensors, over the limit of 7")
    (tmp_path / "x.safetensors").write_bytes((2**25).to_bytes(8, "little") + b"{" + bytes(100))
    refused(tmp_path / "x.safetensors", "a header of 33,554,432 bytes, over 16,777,216")


def test_what_is_no_file_is_told_at_once(tmp_path: Path) -> None:
    network = autoencoder()
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.pth"))
    for name in ("pipe.pth", "zero.pth", "socket.pth", "a" * 300):
        refused(tmp_path / name, f"{name} (is no file|cannot be read: File name too long)")
    folder = tmp_path / "parts"
    folder.mkdir()
    hub_parts(network, folder)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    part = folder / "model-00002-of-00003.safetensors"
    part.unlink()
    os.mkfifo(part)
    refused(folder, r"model-00002-of-00003.safetensors is no file")
    for wrong in ("../x.safetensors", "", index.name, 7, "a/b", DEEP):
        index.write_text(json.dumps({"weight_map": names | {"x": wrong}}))
        refused(folder, r"index\.json (names|cannot be read)")
    for text in (DEEP, '{"weight_map": [1]}', '{"weight_map": {"a": [1]}}', "[]", '{"weight_map": 1, "weight_map": 2}'):
        index.write_text(text)
        refused(folder, r"index\.json cannot be read")
    for file in (index, folder / "config.json"):
        file.unlink()
        os.mkfifo(file)
        refused(folder, r"(index\.json is no file|config.json cannot be read: it is a pipe)")


def sealed_off(paths: list[Path]) -> list[tuple[str, int]]:
    """What is said of each file, and by how many MiB this process has grown by it."""
    said = []
    for path in paths:
        before = memory.resident()
        try:
            # A safetensors file is mapped, which takes address space and no memory.
            with little_memory(48 + (path.stat().st_size // 2**20 if path.suffix == ".safetensors" else 0)):
                usable_weights(path)
        except UserError as error:
            said.append((str(error), (memory.resident() - before) // 2**20))
    return said


@pytest.mark.slow
def test_half_a_download_takes_no_memory(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": {"blocks.0.norm1.weight": torch.zeros(1 << 25)}}  # 128 MiB
    paths = [
        tmp_path / name for name in ("new.pth", "old.pth", "x.safetensors", "plain.pth", "claims.pth", "number.pth")
    ]
    torch_file(content, paths[0])
    torch_file(content, paths[1], _use_new_zipfile_serialization=False)
    save_file(content["model"], paths[2])
    paths[3].write_bytes(b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + bytes(1 << 27))  # a string of 1 TB
    small = torch_file({"a": torch.zeros(77)}, paths[4], _use_new_zipfile_serialization=False).read_bytes()
    paths[4].write_bytes(small.replace(b"K\x4d", b"J\xff\xff\xff\x7f", 1))  # of 77 numbers 2 billion
    paths[5].write_bytes(b"\x80\x02}r\xff\xff\xff\x07.")  # value 134 million
    for path in paths[:3]:
        os.truncate(path, 100 << 20)
    network = autoencoder()
    deep = {"model": network.config | {"depth": HUGE}, "mean": [0.5] * 3, "std": [0.5] * 3}
    claims = described(network.state_dict(), tmp_path / "deep.safetensors", json.dumps(deep))
    *said, (text, grown) = in_process(sealed_off, [*paths, claims])
    assert text.endswith("does not fit its own description: depth is 1000000000")
    assert grown < 64
    for (text, grown), path in zip(said, paths, strict=True):
        assert text.startswith(f"{path} is damaged or cut off: ")
        assert grown < 64
    assert "its tensors take 8,589,934,588 bytes" in said[4][0]
    assert "step 2 of its pickle stores value 134217727" in said[5][0]
