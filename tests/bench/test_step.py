"""`mae bench step`: that the contenders do the same, and that its figures fit together; never how large they are."""

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from figure_checks import check_figure
from torch import Tensor, nn

from mae.bench import figures as figures_module
from mae.bench import step, variants
from mae.bench.step import AXES, PAPER, axis_values
from mae.bench.variants import MASK_RATIO, Setting, Variant, build_network, enough_memory
from mae.cli import main
from mae.errors import UserError
from mae.models import compilation, flops
from mae.models.blocks import Block
from mae.models.meta_device import meta_parameters

SETTING = Setting("nano", 16, 4, 32, 2, 2, 4, "float32", "cpu")
SMALL = [
    *("--sizes", "nano", "--image_size=16", "--patch_size=4", "--decoder_embed_dim=32", "--decoder_depth=2"),
    *("--decoder_num_heads=2", "--batch=2", "--rounds=3", "--compile=false", "--device=cpu"),
]
WITHOUT_HF = ["--against", "plain"]
QUICK = ["--memory=false", "--threads", "1"]


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The figures that the command has written; matrix products are small ones, and a turn is one step."""
    monkeypatch.setattr(flops, "SIZES", ())
    monkeypatch.setattr(figures_module, "TURN_SECONDS", 0.0)

    def measured(*args: str) -> dict[str, Any]:
        out = tmp_path / "figures.json"
        assert main(["bench", "step", *SMALL, *args, f"--json={out}"]) == 0
        figures: dict[str, Any] = json.loads(out.read_text())
        return figures

    return measured


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Ours by Hugging Face's names; every one of them is given."""
    renamed: dict[str, Tensor] = {}
    names = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "encoder.blocks": "vit.layers",
        "decoder_blocks": "decoder.decoder_layers",
        "encoder.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "encoder.cls_token": "vit.embeddings.cls_token",
        "encoder.pos_embed": "vit.embeddings.position_embeddings",
        "encoder.norm": "vit.layernorm",
        **{name: f"decoder.{name}" for name in ("decoder_embed", "decoder_norm", "decoder_pred", "mask_token")},
        "decoder_pos_embed": "decoder.decoder_pos_embed",
    }
    for key, value in ours.state_dict().items():
        new = key
        for old, name in names.items():
            new = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\1{name}\2", new)
        if "attn.qkv" in new:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[new.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            renamed[new] = value
    theirs.load_state_dict(renamed, strict=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hugging_face_computes_the_same_loss_and_gradients(attention: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    ours, theirs = build_network("ours", SETTING), build_network(f"hf-{attention}", SETTING)
    for parameter in ours.parameters():  # as they are at first, swapped biases and norms would not be seen
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    copy_weights(ours, theirs)
    images, noise = torch.randn(5, 3, 16, 16), torch.rand(5, 16)
    loss, other = ours(images, noise).loss, theirs(images, noise=noise).loss
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    for value in (loss, other):
        value.backward()
    for key in ("patch_embed.proj", "blocks.0.mlp.fc1"):
        mine = ours.get_parameter(f"encoder.{key}.weight").grad
        name = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.0.mlp.fc1": "layers.0.mlp.fc1"}
        torch.testing.assert_close(mine, theirs.get_parameter(f"vit.{name[key]}.weight").grad, rtol=1e-4, atol=1e-5)


def test_contenders_train_the_same_parameters() -> None:
    pytest.importorskip("transformers")
    counts = {name: Variant(name, SETTING).parameters for name in ("ours", *variants.PEERS)}
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("name", ["ours", "ours-depth-1", "mask-tokens", *variants.PEERS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_trains_and_leaves_no_gradients(name: str, dtype: str) -> None:
    if name.startswith("hf-"):
        pytest.importorskip("transformers")
    variant = Variant(name, SETTING._replace(dtype=dtype))
    before = [p.detach().clone() for p in variant.trainable]
    variant.step()
    changed = [not torch.equal(p, old) for p, old in zip(variant.trainable, before, strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(p.grad is None for p in variant.trainable)
    assert all(p.dtype == torch.float32 for p in variant.trainable)


def test_fused_adamw_is_ours_alone() -> None:
    assert Variant("ours", SETTING).optimizer.defaults["fused"]
    assert not Variant("plain", SETTING).optimizer.defaults["fused"]


def test_plain_attends_by_products_and_ours_by_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    attend = Block.forward

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.kernel)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", noted)
    Variant("plain", SETTING).step()
    assert set(seen) == {"plain"}
    seen.clear()
    Variant("ours", SETTING).step()
    assert set(seen) == {None}


def test_figures_fit_together(measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    figures = measure(*QUICK, *WITHOUT_HF)
    assert {"cpu", "cores", "torch", "device"} <= set(figures["machine"])
    (table,) = figures["results"]
    assert table["setting"]["size"] == "nano"
    assert table["setting"]["patch_size"] == 4
    assert (table["threads"], table["clock"]) == (1, "CPU time")
    assert set(table["contenders"]) == {"ours", "plain"}
    assert set(table["ours_is_faster"]) == {"ours"}
    rows = table["contenders"]
    for row in rows.values():
        seconds = row["seconds"]
        assert len(seconds["rounds"]) == 3
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert row["images_per_second"] == pytest.approx(2 / seconds["median"])
        rate = row["flops_per_image"] * row["images_per_second"]
        assert row["share_of_product_rate"] == pytest.approx(rate / table["product_rate"])
        assert row["peak_bytes"] is None
    assert rows["ours"]["flops_per_image"] < rows["plain"]["flops_per_image"]
    mine, other = (rows[name]["seconds"]["rounds"] for name in ("ours", "plain"))
    faster = table["ours_is_faster"]["ours"]["plain"]
    assert faster["rounds"] == pytest.approx([b / a for a, b in zip(mine, other, strict=True)])
    assert faster["median"] == statistics.median(faster["rounds"])
    out = capsys.readouterr().out
    assert "CPU time" in out
    assert re.search(r"^plain .* \(.*\)", out, re.MULTILINE)


def test_every_size_has_a_table(measure: Callable[..., dict[str, Any]]) -> None:
    before = torch.get_num_threads()
    figures = measure("--sizes", "nano", "micro", "--memory=false", "--rounds=1", "--against")
    assert [table["setting"]["size"] for table in figures["results"]] == ["nano", "micro"]
    assert [list(table["contenders"]) for table in figures["results"]] == [["ours"]] * 2
    assert torch.get_num_threads() == before


def test_the_order_is_turned_round_every_other_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SIZES", ())
    order: list[str] = []
    monkeypatch.setattr(Variant, "step", lambda self: order.append(self.name))
    several = {name: Variant(name, SETTING) for name in ("ours", "plain")}
    ticks = iter(range(1000))
    seconds, products = step.time_in_turns(several, lambda: float(next(ticks)), rounds=3)
    assert order[2 * step.WARM_UP :] == ["ours", "plain", "plain", "ours", "ours", "plain"]
    assert all(figure.rounds == [1.0] * 3 for figure in seconds.values())
    assert len(products) == 4  # once before, and between rounds


def test_a_chip_without_bfloat16_is_told_before(
    measure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for known in (True, False):
        monkeypatch.setattr(step, "cpu_has_bfloat16", lambda known=known: known)
        measure(*QUICK, "--dtypes", "bfloat16", "--rounds=1", "--against")
        assert ("no bfloat16 products" in capsys.readouterr().out) is not known


def test_ablation_stands_beside_its_flops_and_the_paper(
    measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (table,) = measure(*QUICK, "--ablation=true")["results"]
    assert set(table["contenders"]) == {"mask-tokens", "ours", "ours-depth-1"}
    rows, found = table["contenders"], table["ablation"]
    assert set(found) == {"ours", "ours-depth-1"}
    for name, row in found.items():
        assert row["flops"] == rows["mask-tokens"]["flops_per_image"] / rows[name]["flops_per_image"]
        slow, fast = (rows[key]["seconds"]["rounds"] for key in ("mask-tokens", name))
        assert row["time"]["rounds"] == pytest.approx([a / b for a, b in zip(slow, fast, strict=True)])
        assert row["paper"] is None  # of this size it says nothing
    assert 1 < found["ours"]["flops"] < found["ours-depth-1"]["flops"]
    assert "times as fast; FLOPs" in capsys.readouterr().out


def test_a_sweep_varies_one_setting(measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    tables = measure("--threads", "1", "--rounds=2", "--sweep", "mask_ratio", "batch")["results"]
    assert torch.get_num_threads() == before
    shown = capsys.readouterr().out
    assert [table["sweep"] for table in tables] == ["mask_ratio", "batch"]
    for table in tables:
        axis, rows = table["sweep"], table["values"]
        base = Setting(**table["setting"])
        assert base == SETTING._replace(batch=2, depth=4)
        assert (table["variant"], table["threads"], table["clock"]) == ("ours", 1, "CPU time")
        assert list(rows) == [str(value) for value in axis_values(axis, base)]
        own = rows[str(getattr(base, axis))]
        assert own["flops_ratio"] == 1
        assert own["time_ratio"]["rounds"] == [1, 1]
        assert f"\n{getattr(base, axis)} (base) " in shown
        for value, row in rows.items():
            for key in ("seconds", "time_ratio"):
                check_figure(row[key], 2)
            assert row["flops_ratio"] == pytest.approx(row["flops_per_image"] / own["flops_per_image"])
            images = [float(value), base.batch] if axis == "batch" else [base.batch, base.batch]
            pairs = zip(row["seconds"]["rounds"], own["seconds"]["rounds"], strict=True)
            wanted = [a / images[0] / (b / images[1]) for a, b in pairs]
            assert row["time_ratio"]["rounds"] == pytest.approx(wanted)
            assert f"\n{value} " in shown


def test_values_go_around_the_base_and_can_be() -> None:
    base = Setting("small", 224, 16, 512, 8, 16, 8, "float32", "cpu")
    sizes = axis_values("image_size", base)
    assert sizes == [112, 160, 224, 320, 448]
    assert [base._replace(image_size=value).patches for value in sizes] == [49, 100, 196, 400, 784]
    assert axis_values("mask_ratio", base) == [0.25, 0.5, 0.75, 0.85, 0.9]
    assert axis_values("depth", base) == [3, 6, 12, 24]
    assert axis_values("decoder_depth", base) == [1, 2, 4, 8, 12]
    assert axis_values("batch", base) == [2, 4, 8, 16, 32]
    few = base._replace(image_size=32, batch=1, depth=1)  # 4 patches
    assert axis_values("mask_ratio", few) == [0.25, 0.5, 0.75]
    assert axis_values("image_size", few) == [32, 48, 64]
    assert axis_values("batch", few) == [1, 2, 4]
    assert axis_values("depth", few) == [1, 2]
    assert set(AXES) <= set(Setting._fields)


def test_flops_are_those_of_the_network_that_is_measured() -> None:
    def work(**settings: Any) -> int:
        return Variant("ours", SETTING._replace(**settings)).flops()

    for axis in ("depth", "decoder_depth"):  # each block costs the same
        first, second, fourth = (work(**{axis: value}) for value in (2, 3, 5))
        assert fourth - second == 2 * (second - first) > 0
    assert work(batch=1) == work()
    assert work(mask_ratio=0.25) > 1.5 * work(mask_ratio=MASK_RATIO)


def test_turns_are_filled_with_steps() -> None:
    assert [figures_module.steps_per_turn(seconds) for seconds in (10.0, 0.1, 1e-6)] == [1, 5, 50]
    assert figures_module.alternate([1, 2, 3], 0) == [1, 2, 3]
    assert figures_module.alternate([1, 2, 3], 1) == [3, 2, 1]


def test_compiled_networks_are_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = []

    def attempt(network: nn.Module, take_step: Callable[[], None]) -> str:
        networks.append(network)
        take_step()
        return ""

    monkeypatch.setattr(compilation, "attempt", attempt)
    variant = Variant("ours-compiled", SETTING)
    assert networks == [variant.network]
    assert all(p.grad is None for p in variant.network.parameters())
    monkeypatch.setattr(compilation, "attempt", lambda *_: "no working C++ compiler")
    with pytest.raises(UserError, match="compiler; --compile false measures without"):
        Variant("ours-compiled", SETTING)


def test_the_papers_sizes_save_flops_as_the_paper_saves_hours() -> None:
    """Table 2: of large, 2.8 and 3.7 times; of FLOPs alone, about as much."""
    names = ("mask-tokens", "ours", "ours-depth-1")
    setting = Setting("large", 224, 16, 512, 8, 16, 1, "float32", "cpu")
    work = {}
    for name in names:
        with meta_parameters():  # only shapes count
            network = build_network(name, setting)
        work[name] = flops.training_flops(network, lambda network, images: network(images).loss, 3, 224, 224)
    rows = {name: {"seconds": step.figure([1.0]), "flops_per_image": work[name]} for name in names}
    found = step.ablation(setting, rows)
    assert [row["paper"] for row in found.values()] == list(PAPER["large"])
    for row in found.values():
        assert row["flops"] == pytest.approx(row["paper"], rel=0.25)


def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for args, words in (
        (["--sizes", "giant"], "giant"),
        (["--dtypes", "float8"], "float8"),
        (["--dtypes", "float16"], "--dtypes float16"),
        (["--against", "fairseq"], "fairseq"),
        (["--threads", "0"], "--threads 0"),
        (["--threads", "100000"], "--threads 100000"),
        (["--rounds=0"], "--rounds 0"),
        (["--batch=0"], "--batch 0"),
        (["--sweep", "width"], "width"),
        (["--sweep", "batch", "--ablation", "true"], "take one of them"),
        (["--image_size=4", "--patch_size=4"], "--image_size 4 has 1 patches"),
        (["--compile=sometimes"], "sometimes"),
        (["--device=tpu"], "--device tpu"),
        (["--device=mps"], "--device mps"),
        (["--device=cuda:64"], "--device cuda:64"),
        ([*WITHOUT_HF, "--memory=false", "--patch_size=5"], "not divisible by patch_size"),
        ([*WITHOUT_HF, "--memory=false", "--decoder_num_heads=5"], "decoder_num_heads 5"),
        (["--json", str(tmp_path / "missing" / "out.json")], "there is no folder"),
    ):
        assert main(["bench", "step", *SMALL, *args]) == 2, args
        error = capsys.readouterr().err
        assert words in error, error
        assert len(error.strip().splitlines()) == 1, error


def test_without_transformers_it_is_said_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measure: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "step", *SMALL, *QUICK]) == 2
    error = capsys.readouterr().err
    for words in ("hf-eager", "pip install transformers", "--against plain"):
        assert words in error
    figures = measure(*QUICK, *WITHOUT_HF, "--rounds=1")
    assert "transformers" not in figures["machine"]


def test_too_little_memory_names_the_batch() -> None:
    with pytest.raises(UserError, match="plain, nano, float32: out of memory at --batch 4"):
        with enough_memory("plain", SETTING):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with pytest.raises(ValueError, match="another"):
        with enough_memory("plain", SETTING):
            raise ValueError("another")


@pytest.mark.slow
def test_peak_memory_is_that_of_a_fresh_process_and_grows_with_the_network() -> None:
    small, large = (
        variants.peak_memory("plain", SETTING._replace(size=size, batch=1), 1) for size in ("nano", "small")
    )
    if small is None or large is None:
        pytest.skip("this system does not tell")
    weights = 4 * sum(p.numel() for p in build_network("plain", SETTING._replace(size="small")).parameters())
    assert small < large
    assert 3 * weights < large < 8 * weights  # weights, two moments, gradients


@pytest.mark.slow
def test_an_error_in_the_process_that_measures_memory_is_told() -> None:
    with pytest.raises(UserError, match="decoder_num_heads 5"):
        variants.peak_memory("plain", SETTING._replace(decoder_num_heads=5), 1)


@pytest.mark.parametrize("memory", ["as told", pytest.param("measured", marks=pytest.mark.soak)])
def test_compiled_and_hugging_face_and_memory(
    measure: Callable[..., dict[str, Any]], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    if memory == "as told":
        monkeypatch.setattr(step, "peak_memory", lambda *_: 1000)
    (table,) = measure("--compile=both", "--threads", "1", "--rounds=1")["results"]
    rows = table["contenders"]
    assert list(rows) == ["ours-compiled", "ours", *variants.PEERS]
    assert set(table["ours_is_faster"]) == {"ours-compiled", "ours"}
    assert all(row["peak_bytes"] > 0 for row in rows.values())
    assert rows["ours-compiled"]["flops_per_image"] == rows["ours"]["flops_per_image"]
    assert rows["hf-eager"]["flops_per_image"] == rows["hf-sdpa"]["flops_per_image"]
    assert len({row["parameters"] for row in rows.values()}) == 1


@pytest.mark.slow
def test_ablation_compiled(measure: Callable[..., dict[str, Any]]) -> None:
    (table,) = measure("--compile=true", *QUICK, "--ablation=true")["results"]
    assert set(table["ablation"]) == {"ours-compiled", "ours-depth-1-compiled"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(measure: Callable[..., dict[str, Any]], dtype: str) -> None:
    (table,) = measure("--device=cuda", "--dtypes", dtype, *WITHOUT_HF, "--compile=both")["results"]
    assert table["clock"] == "wall clock"
    assert all(row["peak_bytes"] > 0 for row in table["contenders"].values())
