"""An encoder among other tensors: what is taken, what is left out, and which of several."""

from pathlib import Path

import pytest
import torch
from foreign import (
    HEADS,
    KINDS,
    MM_BLOCK,
    TORCHVISION_BLOCK,
    WIDE,
    State,
    autoencoder,
    classifier,
    official,
    prefixed,
    respelled,
    torch_file,
)
from torch.testing import assert_close

import mae
from mae.cli import main
from mae.errors import UserError
from mae.weights.classifier import build_classifier
from mae.weights.detect import usable_weights
from mae.weights.detect_architecture import ArchOverrides


def encoder(seed: int = 0) -> State:
    return official(autoencoder(seed), encoder=True)


HEAD = "its head is left out: pre-training does not use it"

SPT = ", ".join(f"model.{part}." for part in ("encoder.patch_embed", "decoder", "callbacks_modules"))


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        (
            "lightly",
            {"its head is left out: pre-training does not use it", "1 tensor is left out: backbone.mask_token"},
        ),
        ("lightly on torchvision", {"its head is left out: pre-training does not use it"}),
        ("solo-learn", {"2 tensors are left out: classifier."}),
        (
            "stable-pretraining",
            {f"5 tensors are left out: {SPT}"},
        ),
    ],
)
def test_what_is_left_out_is_said(kind: str, notes: set[str], tmp_path: Path) -> None:
    weights = usable_weights(KINDS[kind].write(autoencoder(), tmp_path), HEADS)
    assert {note for note in weights.notes if "left out" in note} == notes


def test_the_mean_and_std_among_the_tensors_of_mmpretrain(tmp_path: Path) -> None:
    weights = usable_weights(KINDS["mmpretrain"].write(autoencoder(), tmp_path), HEADS)
    assert_close(torch.tensor(weights.description["mean"]), torch.tensor([0.5, 0.2, 0.0]))
    assert_close(torch.tensor(weights.description["std"]), torch.tensor([0.2, 0.2, 0.1]))
    assert not any("mean" in note or "left out" in note for note in weights.notes)


SEVERAL = {
    "student and teacher": (
        {"student": prefixed(encoder(1), "module.backbone."), "teacher": prefixed(encoder(2), "backbone."), "epoch": 1},
        ("student", "teacher"),
    ),
    "solo-learn with momentum": (
        prefixed(encoder(1), "backbone.") | prefixed(encoder(2), "momentum_backbone."),
        ("backbone", "momentum_backbone"),
    ),
    "a model and its average": ({"model": encoder(1), "ema": encoder(2)}, ("model", "ema")),
    "an average inside": ({"model": encoder(1) | prefixed(encoder(2), "ema.")}, ("", "ema.")),
    "far down": (
        prefixed(prefixed(encoder(1), "a.vit.") | prefixed(encoder(2), "b.vit."), "net."),
        ("net.a", "net.b.vit"),
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_encoders_one_is_asked_for(name: str, tmp_path: Path) -> None:
    content, prefixes = SEVERAL[name]
    path = torch_file(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds 2 encoders, behind the prefixes '.*' and '.*': state which") as caught:
        usable_weights(path, HEADS)
    assert "\n" not in str(caught.value)
    for seed, prefix in enumerate(prefixes, 1):
        weights = usable_weights(path, HEADS._replace(prefix=prefix))
        assert all(torch.equal(weights.timm_state[key], value) for key, value in encoder(seed).items())
        assert f"{len(encoder())} tensors are left out: " in " ".join(weights.notes)
    with pytest.raises(UserError, match=r"--prefix nowhere: .* has no encoder behind it; there is one behind '"):
        usable_weights(path, HEADS._replace(prefix="nowhere"))


def test_a_prefix_that_says_nothing_is_refused(tmp_path: Path) -> None:
    path = torch_file({"model": official(autoencoder())}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"--prefix backbone: .* has no encoder behind it; there is one behind ''"):
        usable_weights(path, HEADS._replace(prefix="backbone"))
    torch.save({"fc.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"--prefix backbone: .* has no encoder behind it; there is none at all"):
        usable_weights(path, HEADS._replace(prefix="backbone"))


def test_the_option_on_the_command_line_and_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = {name: autoencoder(seed, **WIDE) for seed, name in enumerate(("student", "teacher"))}
    path = torch_file({name: official(network) for name, network in networks.items()}, tmp_path / "x.pth")
    assert main(["inspect", str(path)]) == 2
    assert "take --prefix, mae.load and mae.load_encoder prefix=" in capsys.readouterr().err
    assert main(["inspect", str(path), "--prefix", "teacher"]) == 0
    out = capsys.readouterr().out
    assert "tensors are left out: student." in out
    assert "reconstruct: yes, after `mae convert` with --prefix" in " ".join(out.split())
    ours = tmp_path / "ours.safetensors"
    assert main(["convert", str(path), str(ours), "--format", "mae", "--prefix", "teacher"]) == 0
    with pytest.warns(UserWarning, match="left out: student"):
        loaded = mae.load(path, prefix="teacher")
    teacher = networks["teacher"].state_dict()
    for state in (dict(loaded.state_dict()), dict(mae.load(ours).state_dict())):
        assert all(torch.equal(state[key], value) for key, value in teacher.items())
    with pytest.warns(UserWarning, match="left out: teacher"):
        student = mae.load_encoder(path, prefix="student")
    assert torch.equal(student.norm.bias, networks["student"].encoder.norm.bias)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--prefix teacher: .* is a file of this project, which has one encoder"):
        usable_weights(ours, ArchOverrides(prefix="teacher"))


def test_classifiers_of_torchvision_and_mmpretrain(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 28, 28)
    mean, token = classifier("mean"), classifier("class")
    names = {"patch_embed.proj": "patch_embed.projection", "blocks.": "layers.", "fc_norm.": "ln2."}
    mm = prefixed(respelled(dict(mean.state_dict()), MM_BLOCK | names), "backbone.")
    names = {"patch_embed.proj": "conv_proj", "cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    names |= {"norm.": "encoder.ln.", "blocks.": "encoder.layers.encoder_layer_", "head.": "heads.head."}
    for state, network in (
        (respelled(mm, {"backbone.head.": "head.fc."}), mean),
        (respelled(dict(token.state_dict()), TORCHVISION_BLOCK | names), token),
    ):
        weights = usable_weights(torch_file(state, tmp_path / "x.pth"), HEADS)
        with torch.no_grad():
            assert_close(build_classifier(weights)(images), network(images), rtol=0, atol=1e-6)
        assert not any("pool" in note or "left out" in note for note in weights.notes)


def test_the_heads_of_solo_learn_are_not_those_of_others(tmp_path: Path) -> None:
    path = KINDS["solo-learn"].write(autoencoder(**WIDE), tmp_path)
    assert "if solo-learn wrote it, it has 12 heads: state --num_heads 12" in usable_weights(path).notes
    assert not any(
        "solo" in note for note in usable_weights(KINDS["lightly"].write(autoencoder(**WIDE), tmp_path)).notes
    )


def test_a_decoder_of_another_kind_is_left_out(tmp_path: Path) -> None:
    """A module of its own may be anything; among the official names something is missing."""
    for change in ("lacks", "unknown", "size"):
        state = torch.load(KINDS["solo-learn"].write(autoencoder(), tmp_path))["state_dict"]
        if change == "lacks":
            del state["decoder.decoder_norm.bias"]
        elif change == "unknown":
            state["decoder.decoder_blocks.0.ls1.gamma"] = torch.ones(16)
        else:
            state["decoder.decoder_pos_embed"] = torch.zeros(1, 16, 16)  # without a class token
        weights = usable_weights(torch_file(state, tmp_path / "y.pth"), HEADS)
        assert weights.holds == "encoder"
        assert (
            sum("its decoder (decoder.) is left out, since it is another one than here: " in n for n in weights.notes)
            == 1
        )
        assert not any("norm_pix_loss" in note for note in weights.notes)
