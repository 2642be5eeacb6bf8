"""The notebook as it is committed and on a fresh model; the attention maps that it draws."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from conftest import ROOT, TINY, mae, save_images
from torch import Tensor, nn

from mae.models.attention_maps import attention_maps
from mae.models.mae import MaskedAutoencoder

ROOM = ROOT / "notebooks"
NOTEBOOK = ROOM / "reconstructions.ipynb"
PICTURES = 3
needs_jupyter = pytest.mark.skipif(
    not all(importlib.util.find_spec(module) for module in ("nbclient", "ipykernel")),
    reason="nbclient or ipykernel is not installed",
)


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text())
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook: dict[str, Any]) -> list[str]:
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def texts(notebook: dict[str, Any]) -> list[str]:
    """All that can be read: sources, and outputs but for pictures."""
    found = ["".join(cell["source"]) for cell in notebook["cells"]]
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            shown = {"text": output.get("text", ""), **output.get("data", {})}
            found += ["".join(value) for kind, value in shown.items() if kind != "image/png"]
    return found


def check_outputs(notebook: dict[str, Any]) -> None:
    """Every cell has run, in order and in silence, and what prints or draws has done so."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream", "display_data"}, source
        assert all(output.get("name", "stdout") == "stdout" for output in cell["outputs"]), source
        assert ("stream" in kinds) == ("print(" in source), source
        assert ("display_data" in kinds) == ("plt.show()" in source), source
    assert len(pictures(notebook)) == PICTURES


def execute(folder: Path, src: Path, data: str | None = None) -> subprocess.CompletedProcess[str]:
    """A copy of the notebook, run in `folder`."""
    shutil.copy(NOTEBOOK, folder)
    environ = {k: v for k, v in os.environ.items() if k not in ("MAE_DATA", "MPLBACKEND")}
    environ |= {"MAE_SRC": str(src), "OMP_NUM_THREADS": "1"} | ({"MAE_DATA": data} if data else {})
    command = [sys.executable, str(ROOM / "execute.py"), str(folder / NOTEBOOK.name)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, check=False)


# The notebook as it is committed.


def test_the_committed_notebook_has_run_from_top_to_bottom() -> None:
    notebook = read(NOTEBOOK)
    check_outputs(notebook)
    assert {"nbformat": notebook["nbformat"], "metadata": notebook["metadata"]} == {
        "nbformat": 4,
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    }
    assert all(not cell["metadata"] for cell in notebook["cells"])
    assert NOTEBOOK.stat().st_size < 1.5e6


def test_the_committed_notebook_tells_nothing_of_the_machine_that_ran_it() -> None:
    for text in texts(read(NOTEBOOK)):
        assert not re.search(r"(?<![\w.*~/)])/\w|[A-Za-z]:\\|(?<!\w)~/", text), text
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text), text


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("task", [["check"], ["format", "--check"]], ids=lambda task: task[0])
def test_ruff_passes(task: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *task, "--no-cache", str(ROOM)],
        capture_output=True,
        text=True,
        cwd=ROOM.parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Run on other models.


@needs_jupyter
@pytest.mark.slow
def test_the_notebook_runs_on_a_fresh_demo(tmp_path: Path) -> None:
    done = mae("demo", "--steps", 20, "--run_dir", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    done = execute(tmp_path, tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    notebook = read(tmp_path / NOTEBOOK.name)
    check_outputs(notebook)
    assert notebook["metadata"] == read(NOTEBOOK)["metadata"]
    assert "1000 queries among 4000 images" in " ".join(texts(notebook))
    assert pictures(notebook) != pictures(read(NOTEBOOK))  # of this model, not those that were there


@needs_jupyter
@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
def test_the_notebook_runs_on_a_folder_of_images(tmp_path: Path, labelled: bool) -> None:
    """Wide RGB images, and patches that are predicted normalised."""
    root = tmp_path / "images"
    places = ["train/a cat", "train/dog", "val/a cat", "val/dog"] if labelled else [""]
    for seed, place in enumerate(places):
        save_images(root / place, 12, size=(32, 48), seed=seed)
    size = ["--data.image_size=[28,42]", "--data.num_workers=0", "--data.batch_size_per_device=8"]
    settings = [*TINY, *size, f"--data.root={root}", "--trainer.max_steps=2", "--trainer.max_epochs=-1"]
    done = mae("pretrain", *settings, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = execute(tmp_path, tmp_path / "run", str(root))
    assert done.returncode == 0, done.stderr
    notebook = read(tmp_path / NOTEBOOK.name)
    check_outputs(notebook)
    said = " ".join(texts(notebook))
    assert "4 x 6 patches" in said
    assert ("24 queries among 24 images" if labelled else "12 training images, none held out") in said


@needs_jupyter
@pytest.mark.slow
def test_without_a_model_the_notebook_says_how_to_make_one(tmp_path: Path) -> None:
    done = execute(tmp_path, tmp_path / "nothing")
    assert done.returncode != 0
    assert re.search(r"SystemExit.* There is no model at .*/nothing: `make demo` ", done.stderr)
    assert "stderr" not in done.stderr  # the cell says this one line and warns of nothing
    assert (tmp_path / NOTEBOOK.name).read_text() == NOTEBOOK.read_text()  # what was there is kept


# Attention maps.


def small(block: type[nn.Module] | None = None, **settings: Any) -> timm_vit.VisionTransformer:
    """Of a 2 x 3 grid; ours or timm's blocks, with weights that attend unevenly."""
    torch.manual_seed(0)
    if block is None:
        sizes = {"depth": 3, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
        encoder = MaskedAutoencoder((8, 12), 4, embed_dim=32, num_heads=4, **sizes).encoder
    else:
        sizes = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
        encoder = timm_vit.VisionTransformer((8, 12), 4, **sizes, block_fn=block, **settings)
    with torch.no_grad():
        for name, values in encoder.named_parameters():
            if "qkv" in name:
                values.normal_(std=0.5)
    return encoder.eval()


ENCODERS = {
    "ours": {},
    "timm's": {"block": timm_vit.Block},
    "timm's with norms of queries and keys, and registers": {
        "block": timm_vit.Block,
        "qk_norm": True,
        "reg_tokens": 2,
        "init_values": 0.1,
    },
}


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> timm_vit.VisionTransformer:
    return small(**ENCODERS[request.param])


def tokens_before(encoder: timm_vit.VisionTransformer, images: Tensor, block: int) -> Tensor:
    """What goes into a block, by timm's public means; of the first one, by its parts."""
    if block:
        found = encoder.forward_intermediates(
            images, [block - 1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        patches, prefix = found[0]
        return torch.cat([prefix, patches], dim=1)
    return encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1, 2])
def test_maps_are_the_class_tokens_softmax(encoder: timm_vit.VisionTransformer, block: int) -> None:
    images = torch.randn(2, 3, 8, 12)
    maps = attention_maps(encoder, images, block)
    assert maps.shape == (2, 4, 2, 3)
    torch.testing.assert_close(maps, attention_maps(encoder, images, block - 3))
    attn = encoder.blocks[block].attn
    tokens = encoder.blocks[block].norm1(tokens_before(encoder, images, block))
    for i in range(2):
        for head in range(4):
            parts = attn.qkv(tokens[i])  # (tokens, 3 x 32): queries, keys, values, each head by head
            query = attn.q_norm(parts[0, 8 * head : 8 * head + 8])
            keys = attn.k_norm(parts[:, 32 + 8 * head : 40 + 8 * head])
            exps = torch.tensor([torch.exp(query @ key / 8**0.5) for key in keys])
            expected = exps / exps.sum()
            torch.testing.assert_close(maps[i, head].flatten(), expected[encoder.num_prefix_tokens :])


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("whose", [None, timm_vit.Block])
def test_weights_times_values_are_timms_attention(whose: type[nn.Module] | None, block: int) -> None:
    encoder, images = small(whose), torch.randn(2, 3, 8, 12)
    chosen = encoder.blocks[block]
    tokens = chosen.norm1(tokens_before(encoder, images, block))
    weights = attention_maps(encoder, images, block).flatten(2)  # (B, heads, N)
    weights = torch.cat([1 - weights.sum(dim=2, keepdim=True), weights], dim=2)  # the class token has the rest
    values = chosen.attn.qkv(tokens)[:, :, 64:].unflatten(2, (4, 8)).transpose(1, 2)  # (B, heads, 1 + N, d)
    mixed = (weights[:, :, None] @ values).flatten(1)  # (B, heads x d)
    torch.testing.assert_close(chosen.attn.proj(mixed), chosen.attn(tokens)[:, 0])


def test_the_network_is_left_as_it_was(encoder: timm_vit.VisionTransformer) -> None:
    images = torch.randn(1, 3, 8, 12)
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    before, attributes = encoder.forward_features(images), [set(vars(module)) for module in encoder.modules()]
    assert not attention_maps(encoder, images).requires_grad
    with pytest.raises(AssertionError):
        attention_maps(encoder, torch.randn(1, 3, 9, 12))  # fails inside of the network
    assert torch.equal(encoder.forward_features(images), before)
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    assert [set(vars(module)) for module in encoder.modules()] == attributes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in encoder.modules())


def test_what_has_no_such_map_is_refused() -> None:
    encoder, images = small(), torch.randn(1, 3, 8, 12)
    for block in (3, -4):
        with pytest.raises(ValueError, match=f"block {block} must be in 0 to 2"):
            attention_maps(encoder, images, block)
    with pytest.raises(ValueError, match=r"encoder\.eval\(\)"):
        attention_maps(encoder.train(), images)
    with pytest.raises(ValueError, match="ResPostBlock"):
        attention_maps(small(timm_vit.ResPostBlock), images)
    with pytest.raises(ValueError, match="no class token"):
        attention_maps(small(timm_vit.Block, class_token=False, global_pool="avg"), images)
