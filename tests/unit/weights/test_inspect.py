"""mae inspect: what the table and the data say of good, odd and damaged weights; the verdict is the last line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DIGITS, TINY
from foreign import BAD, KINDS, WIDE, State, autoencoder, bad_file, classifier, official, torch_file

from mae.cli import main
from mae.errors import UserError
from mae.launch.stages import PretrainCLI
from mae.models.mae import SIZES, MaskedAutoencoder
from mae.weights.inspect import inspect_command

HEADS = ["--num_heads", "2", "--decoder_num_heads", "2"]
Look = Callable[..., tuple[list[str], dict[str, Any]]]


@pytest.fixture
def look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Look:
    """Inspect what can be used: the printed lines, and the data."""

    def look(src: object, *options: object) -> tuple[list[str], dict[str, Any]]:
        out = tmp_path / "facts" / "facts.json"
        out.parent.mkdir(exist_ok=True)
        capsys.readouterr()
        inspect_command([str(src), "--json", str(out), *map(str, options)])
        lines, facts = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
        assert lines[-1] == facts["verdict"] == "usable"
        assert facts["problems"] == []
        return lines, facts

    return look


def fails(src: Path, match: str, *options: object) -> dict[str, Any]:
    """Inspect what cannot be used; returns the data."""
    out = src.parent / "facts.json"
    with pytest.raises(UserError, match=match) as caught:
        inspect_command([str(src), "--json", str(out), *map(str, options)])
    assert "\n" not in str(caught.value)
    facts: dict[str, Any] = json.loads(out.read_text())
    assert facts["verdict"] == str(caught.value)
    assert facts["problems"]
    return facts


def row(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name)).removeprefix(name).strip()


def changed(tmp_path: Path, **tensors: Any) -> Path:
    """An official file; of tensors whose names contain a key, with __ for dots, every number is the value."""
    state = official(autoencoder())
    for part, value in tensors.items():
        for key in state:
            if part.replace("__", ".") in key:
                state[key] = torch.full_like(state[key], value)
    return torch_file({"model": state}, tmp_path / "x.pth")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_can_be_used(name: str, tmp_path: Path, look: Look) -> None:
    kind = KINDS[name]
    src = kind.write(autoencoder(), tmp_path)
    lines, facts = look(src, *(HEADS if kind.overrides.num_heads else []))
    assert (facts["format"], facts["holds"]) == (kind.format, kind.holds)
    assert facts["uses"]["probe, finetune, knn, embed"].startswith("yes")
    assert facts["uses"]["reconstruct"].startswith("yes" if kind.holds == "autoencoder" else "no, it has no decoder")
    assert facts["uses"]["evaluate, predict"] == "no, it has no classifier head"
    assert facts["uses"]["resume"].startswith("no")
    assert facts["positions"]["encoder.pos_embed"] == "sin-cos"
    assert row(lines, "architecture").startswith(
        "of its own size: width 32, depth 2, heads 2, mlp ratio 2; images 28x28"
    )
    weights = sum(file.stat().st_size for file in tmp_path.iterdir() if file.is_file() and file.name != "config.json")
    assert facts["bytes"] == weights


def test_the_table_of_an_autoencoder(tmp_path: Path, look: Look) -> None:
    network = autoencoder(**(WIDE | {"mlp_ratio": 4.0}))
    lines, facts = look(torch_file({"model": official(network)}, tmp_path / "mae_visualize_vit_x.pth"))
    encoder = sum(p.numel() for p in network.encoder.parameters())
    decoder = sum(p.numel() for p in network.parameters()) - encoder
    assert facts["parameters"] == {"encoder": encoder, "decoder": decoder}
    assert row(lines, "parameters") == f"encoder {encoder:,}, decoder {decoder:,}"
    assert row(lines, "decoder") == "width 512, depth 1, heads 16"
    assert row(lines, "target") == "plain pixels (not recorded: assumed from its file's name)"
    assert row(lines, "kind") == "encoder and decoder, in the format of the official code"
    assert row(lines, "mean, std") == "0.485 0.456 0.406; 0.229 0.224 0.225"
    assert row(lines, "numbers") == "float32 (38 tensors)"
    assert row(lines, "warning").startswith("not for commercial use: CC BY-NC 4.0")
    assert facts["model"] == network.config | {"norm_pix_loss": False}
    assert len(facts["notes"]) == 5


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_sizes_have_names(name: str, tmp_path: Path, look: Look) -> None:
    state = official(MaskedAutoencoder(32, 16, **SIZES[name]._asdict(), decoder_depth=1), encoder=True)
    state = {key: torch.full(value.shape, 0.5, dtype=torch.float16) for key, value in state.items()}
    lines, facts = look(torch_file({"model": state}, tmp_path / "x.pth"))
    assert facts["size"] == name
    assert row(lines, "architecture").startswith(f"{name}: width {SIZES[name].embed_dim}, depth {SIZES[name].depth}")
    assert facts["dtypes"] == {"float16": len(state)}


def test_our_own_run(tmp_path: Path, look: Look) -> None:
    run = tmp_path / "run"
    PretrainCLI([*DIGITS, *TINY, f"--run_dir={run}", "--trainer.max_steps=2"]).fit()
    lines, facts = look(run)
    assert row(lines, "kind") == "encoder and decoder, in the format of this project"
    assert row(lines, "target") == "pixels normalised within each patch"
    assert (facts["training_state"], facts["notes"], facts["warnings"]) == (None, [], [])
    last = run / "checkpoints" / "last.ckpt"
    assert facts["uses"]["resume"] == f"no, it holds only weights: {last} has the state of the training"
    lines, facts = look(last)
    assert facts["uses"]["resume"] == "yes"
    assert facts["training_state"]["step"] == 2
    assert "with the state of its training (step 2, epoch 0)" in row(lines, "kind")
    _, facts = look(run / "encoder.safetensors")
    assert facts["holds"] == "encoder"
    assert facts["uses"]["reconstruct"] == "no, it has no decoder"


def test_a_training_of_others_is_not_resumed(tmp_path: Path, look: Look) -> None:
    lines, facts = look(KINDS["official script"].write(autoencoder(), tmp_path), *HEADS)
    assert "with the state of its training (epoch 7)" in row(lines, "kind")
    assert facts["uses"]["resume"].startswith("no, other software's training")


@pytest.mark.parametrize(("pool", "head"), [("mean", "linear"), ("class", "batchnorm")])
def test_classifiers(pool: str, head: str, tmp_path: Path, look: Look) -> None:
    path = torch_file({"model": classifier(pool, head).state_dict()}, tmp_path / "x.pth")
    lines, facts = look(path, "--num_heads", 2)
    assert facts["classifier"] == {"classes": 5, "pool": pool, "head": head}
    assert facts["parameters"]["head"] == 5 * 32 + 5
    assert "classifier" in row(lines, "kind")
    assert "5 classes from the " in row(lines, "kind")
    assert facts["uses"]["evaluate, predict"].startswith("yes")
    assert "allow_finetuned true" in facts["uses"]["probe, finetune, knn, embed"]
    assert facts["uses"]["reconstruct"] == "no, it has no decoder"


def test_what_is_told_here_must_be_written_down_for_other_commands(tmp_path: Path, look: Look) -> None:
    path = torch_file({"model": official(autoencoder())}, tmp_path / "x.pth")
    fails(path, "--num_heads")
    _, facts = look(path, *HEADS, "--norm_pix_loss", "false", "--grid", 4, 4)
    assert facts["target"] == "plain pixels"
    for options in ("--num_heads", "--decoder_num_heads", "--norm_pix_loss", "--grid"):
        assert options in facts["uses"]["reconstruct"]
    wide = torch_file({"model": official(autoencoder(**WIDE))}, tmp_path / "wide.pth")
    assert look(wide, "--num_heads", 3)[1]["uses"]["reconstruct"] == "yes"
    assert "mae convert" in look(wide, "--norm_pix_loss", "false")[1]["uses"]["reconstruct"]


def test_a_licence_that_a_configuration_tells(tmp_path: Path, look: Look) -> None:
    lines, facts = look(KINDS["timm folder"].write(autoencoder(), tmp_path))
    assert facts["licence"] == row(lines, "licence") == "cc-by-nc-4.0"
    assert "not for commercial use: cc-by-nc-4.0" in facts["warnings"]
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "apache-2.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert look(tmp_path)[1]["warnings"] == []


# ---- odd numbers -----------------------------------------------------------------------------------------------------


def oddities(facts: dict[str, Any]) -> list[str]:
    return [warning for warning in facts["warnings"] if "commercial" not in warning]


def test_ordinary_weights_have_no_oddities(tmp_path: Path, look: Look) -> None:
    _, facts = look(changed(tmp_path), *HEADS)
    assert oddities(facts) == []
    assert facts["constant"] == facts["non_finite"] == {}


def test_a_network_before_its_first_step(tmp_path: Path, look: Look) -> None:
    fresh = MaskedAutoencoder(**autoencoder().config)
    _, facts = look(torch_file({"model": official(fresh)}, tmp_path / "x.pth"), *HEADS)
    assert facts["untrained"] == ["encoder", "decoder"]
    assert [warning.split("?")[0] for warning in oddities(facts)] == ["encoder never trained", "decoder never trained"]
    trained = official(autoencoder(), encoder=True)
    warm = torch_file({"model": official(fresh) | trained}, tmp_path / "warm.pth")
    assert look(warm, *HEADS)[1]["untrained"] == ["decoder"]


def test_a_fresh_network_of_transformers(tmp_path: Path, look: Look) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {
        "intermediate_size": 64,
        "decoder_intermediate_size": 32,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes)).save_pretrained(tmp_path)
    lines, facts = look(tmp_path)
    said = " ".join(oddities(facts))
    for words in ("encoder never trained?", "decoder never trained?", "class token never", "mask token never"):
        assert words in said
    assert "encoder.pos_embed is all zeros" in said
    assert set(facts["positions"].values()) == {"zeros"}
    assert "encoder.pos_embed all zeros" in row(lines, "positions")


def test_dead_tensors(tmp_path: Path, look: Look) -> None:
    path = changed(tmp_path, blocks__1__attn__proj__weight=0.0, decoder_pred__bias=0.25, blocks__0__norm1__bias=0.0)
    _, facts = look(path, *HEADS)
    assert facts["untrained"] == []
    assert facts["constant"] == {
        "encoder.blocks.1.attn.proj.weight": 0.0,
        "decoder_pred.bias": 0.25,
        "encoder.blocks.0.norm1.bias": 0.0,
        "decoder_blocks.0.norm1.bias": 0.0,
    }
    (said,) = oddities(facts)
    assert said.startswith("one value throughout: ")
    assert "encoder.blocks.1.attn.proj.weight (0)" in said


def test_learned_positions(tmp_path: Path, look: Look) -> None:
    network = autoencoder()
    network.pos_embed.add_(0.1 * torch.randn_like(network.pos_embed))
    _, facts = look(torch_file({"model": official(network)}, tmp_path / "x.pth"), *HEADS)
    assert facts["positions"] == {"encoder.pos_embed": "learned", "decoder_pos_embed": "sin-cos"}


# ---- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_the_verdict_of_bad_files_is_one_line(name: str, tmp_path: Path) -> None:
    src = bad_file(name, tmp_path)
    fails(src, BAD[name][2], *HEADS)
    assert not (tmp_path / "boom").exists()


def spoiled(tmp_path: Path, change: Callable[[State], Any]) -> Path:
    state = {key: value.clone() for key, value in official(autoencoder()).items()}
    change(state)
    return torch_file({"model": state}, tmp_path / "x.pth")


def test_numbers_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(state: State) -> None:
        state["blocks.0.attn.qkv.weight"][3, 4:7] = torch.nan
        state["cls_token"][0, 0, 0] = -torch.inf
        state["pos_embed"][0, 1, 0] = torch.inf

    src = spoiled(tmp_path, spoil)
    facts = fails(src, r"x\.pth cannot be used: it holds numbers that are NaN or infinite: .*qkv\.weight \(3\)", *HEADS)
    expected = {"encoder.blocks.0.attn.qkv.weight": 3, "encoder.cls_token": 1, "encoder.pos_embed": 1}
    assert facts["non_finite"] == expected
    assert set(facts["uses"].values()) == {"no, something is wrong with it"}
    printed = capsys.readouterr().out
    assert "problem" in printed
    assert "width 32" in printed
    assert "usable\n" not in printed


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    def spoil(state: State) -> None:
        del state["norm.weight"]
        state["blocks.0.mlp.fc9.weight"] = torch.zeros(3)
        state["decoder_pred.bias"] = torch.zeros(3)
        state["norm.bias"][0] = torch.nan

    facts = fails(spoiled(tmp_path, spoil), "cannot be used", *HEADS)
    said = "; ".join(facts["problems"])
    for words in ("lacks encoder.norm.weight", "unknown tensors: encoder.blocks.0.mlp.fc9.weight", "NaN"):
        assert words in said
    assert "decoder_pred.bias is (3,), wanted (147,)" in said


def test_positions_of_another_shape_are_no_traceback(tmp_path: Path) -> None:
    src = spoiled(tmp_path, lambda state: state.update(decoder_pos_embed=torch.zeros(5)))
    assert list(fails(src, r"decoder_pos_embed is \(5,\)", *HEADS)["positions"]) == ["encoder.pos_embed"]


def test_exit_codes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = torch_file({"model": official(autoencoder(**WIDE))}, tmp_path / "x.pth")
    assert main(["inspect", str(path)]) == 0
    done = capsys.readouterr()
    assert (done.out.splitlines()[-1], done.err) == ("usable", "")
    assert main(["inspect", str(changed(tmp_path, norm__bias=float("nan"))), *HEADS]) == 2
    done = capsys.readouterr()
    assert done.out.startswith("file ")
    assert done.err.startswith("mae: error: ")
    assert done.err.count("\n") == 1


def test_options_that_are_wrong(tmp_path: Path) -> None:
    src = torch_file({"model": official(autoencoder())}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="there is no folder"):
        inspect_command([str(src), "--json", str(tmp_path / "no" / "facts.json")])
    for options in (["--grid", "3"], ["--grid", "a", "b"], ["--num_heads", "two"], ["--what", "1"], []):
        with pytest.raises(UserError):
            inspect_command([str(src), *options])
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        inspect_command([str(tmp_path / "nowhere.pth")])
    with pytest.raises(UserError):
        inspect_command([])
