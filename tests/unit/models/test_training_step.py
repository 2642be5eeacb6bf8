"""What a training step leaves out, and that nobody can tell by the result."""

import csv
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from conftest import fresh_mae, mae
from torch import Tensor, nn

from mae import MaskedAutoencoder
from mae.bench.plain_models import SAVINGS, Plain
from mae.data.sources import ArraySource
from mae.errors import UserError
from mae.launch.stages import PretrainCLI
from mae.models import blocks, compilation
from mae.models.blocks import Block, attend, faster_kernel, kernel
from mae.models.flops import peak_rate, product_rates, training_flops
from mae.models.meta_device import meta_parameters
from mae.models.vit import build
from mae.pretrain import Pretrain
from mae.training import step_metrics
from mae.training.optim import adamw

SMALL = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3},
    **{"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 4},
}
CPU = torch.device("cpu")
TINY = (
    *("--data.dataset=digits", "--data.batch_size_per_device=8", "--data.num_workers=0", "--model.patch_size=7"),
    *("--model.size=nano", "--model.embed_dim=24", "--model.depth=2", "--model.num_heads=2"),
    *("--model.decoder_embed_dim=16", "--model.decoder_depth=2", "--model.decoder_num_heads=2"),
    *("--model.warmup_epochs=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
    *("--trainer.limit_val_batches=0", "--panels.every_n_epochs=100"),
)


def derived(network: nn.Module, *args: Tensor) -> dict[str, Tensor]:
    """The loss and all gradients."""
    network.zero_grad()
    loss = network(*args).loss
    loss.backward()
    return {"loss": loss} | {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert abs(found["loss"] - wanted["loss"]) <= 1e-6 * wanted["loss"]
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.rand(4, 64, generator=generator)


@pytest.mark.parametrize(
    "without", [*([name] for name in SAVINGS), ["last block", "head"], list(SAVINGS)], ids="+".join
)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_savings_change_neither_loss_nor_gradients(without: Collection[str], norm_pix_loss: bool) -> None:
    fast, plain = (build(**SMALL, norm_pix_loss=norm_pix_loss) for build in (MaskedAutoencoder, Plain))
    plain.load_state_dict(fast.state_dict())
    plain.without = without
    require_same(derived(plain, *batch()), derived(fast, *batch()))


@pytest.mark.parametrize("name", ["fused", "plain"])
def test_attention_kernels_change_neither_loss_nor_gradients(name: Any) -> None:
    network = MaskedAutoencoder(**SMALL)
    wanted = derived(network, *batch())
    with kernel(name):
        require_same(derived(network, *batch()), wanted)
    assert Block.kernel is None


@pytest.mark.slow
def test_each_saving_saves_what_it_says() -> None:
    def flops(network: nn.Module) -> float:
        return training_flops(network, lambda net, images: net(images).loss, 3, 224, 224) / 1e9

    # By hand, in multiplications: ViT-B/16, N 196, K 49, D 768, E 512; each product three times, forward and backward,
    # but the first, whose input needs no gradient.
    d, e, n, k = 768, 512, 196, 49
    block = lambda width, tokens: tokens * 12 * width**2 + 2 * tokens**2 * width  # noqa: E731
    ends = 2 / 3 * n * d * d + (1 + k) * d * e + n * e * d
    plain = 6 * (12 * block(d, 1 + k) + 8 * block(e, 1 + n) + ends) / 1e9
    with meta_parameters():  # only shapes count
        network, ours = Plain(), MaskedAutoencoder()
    assert flops(network) == pytest.approx(plain, rel=1e-12)
    last = (1 + k) * (10 * e**2 + 2 * (1 + n) * e)  # queries, projection, MLP, attention of what nobody asks for
    saved = {"embedding": 2 / 3 * (n - k) * d * d, "order": 0, "last block": last, "head": k * e * d}
    for name, multiplications in saved.items():
        network.without = [other for other in SAVINGS if other != name]
        if name == "last block":  # the head can only see what the block gives
            multiplications += saved["head"]
        assert plain - flops(network) == pytest.approx(6 * multiplications / 1e9, rel=1e-9, abs=1e-9), name
    assert flops(ours) == pytest.approx(plain - 6 * sum(saved.values()) / 1e9, rel=1e-12)


def test_work_is_what_is_trained_and_what_is_computed_once() -> None:
    network = build({**SMALL, "in_chans": 3, "mlp_ratio": 4.0}, 5, "mean", "linear")
    flops = lambda net: training_flops(net, lambda net, images: net(images), 3, 32, 32)  # noqa: E731
    whole = flops(network)
    assert flops(build({**SMALL, "in_chans": 3, "mlp_ratio": 4.0}, 5, "mean", "linear", 0.1, True)) == whole
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    assert network.training
    assert whole / 3 < flops(network) < whole / 2.9
    assert network.training
    assert all(p.device.type == "cpu" for p in network.parameters())


@pytest.mark.slow
def test_mask_tokens_in_the_encoder_cost_what_the_paper_leaves_out() -> None:
    network = MaskedAutoencoder(**SMALL, encoder_mask_tokens=True)
    images, noise = batch()
    derived(network, images, noise)
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    loss = lambda net, images: net(images).loss  # noqa: E731
    with meta_parameters():
        networks = MaskedAutoencoder(encoder_mask_tokens=True), Plain()
        tokens, plain = (training_flops(made, loss, 3, 224, 224) for made in networks)
    ratio = tokens / plain
    assert ratio == pytest.approx(2.34, abs=0.01)
    encoder = network.encoder.blocks[0]
    seen: list[torch.Size] = []
    encoder.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    network(images, noise)
    assert seen == [(4, 65, 48)]


def test_the_kernel_is_chosen_by_device_type_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert {faster_kernel(cuda, dtype, 50) for dtype in (torch.float32, torch.bfloat16)} == {"fused"}
    assert [faster_kernel(CPU, torch.float32, tokens) for tokens in (17, 50, 197)] == ["plain", "plain", "fused"]
    for has, wanted in ((True, "plain"), (False, "fused")):
        monkeypatch.setattr(blocks, "cpu_has_bfloat16", lambda has=has: has)
        assert {faster_kernel(CPU, torch.bfloat16, tokens) for tokens in (17, 197)} == {wanted}
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    assert (attend(q[:, :, 5:], k, v, "plain") - attend(q[:, :, 5:], k, v, "fused")).abs().max() < 1e-12


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_block_is_timms(drop: float) -> None:
    ours, timms = (kind(48, 3, qkv_bias=True, drop_path=drop).train() for kind in (Block, timm_vit.Block))
    ours.load_state_dict(timms.state_dict())
    x = torch.randn(16, 10, 48)
    torch.manual_seed(5)
    wanted = timms(x)
    torch.manual_seed(5)
    assert (ours(x) - wanted).abs().max() < 1e-6
    torch.manual_seed(5)
    assert (ours(x, first=4) - wanted[:, 4:]).abs().max() < 1e-6
    assert torch.equal(ours.eval()(x), ours(x))


def test_fused_adamw_follows_the_same_rule() -> None:
    ended = []
    for fused in (True, False):
        torch.manual_seed(0)
        network = MaskedAutoencoder(**SMALL)
        optimizer = adamw(network, 1e-3, 0.05, (0.9, 0.95), fused)
        for _ in range(5):
            network(*batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ended.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert (ended[0] - ended[1]).norm() <= 1e-5 * ended[1].norm()
    assert not torch.equal(ended[0], ended[1])  # or one of them is not what it is called


def test_rates_of_products() -> None:
    rates = product_rates(CPU, torch.float32, seconds=0.01, tries=1)
    assert all(rate > 1e8 for rate in rates)
    assert peak_rate(CPU, torch.float32) is None  # no maker's figure: no MFU


# ---- in a run --------------------------------------------------------------------------------------------------------


def logged(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_run_logs_its_speed_and_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, open_all, training_step = {}, ArraySource.open_all, Pretrain.training_step
    monkeypatch.setattr(step_metrics, "peak_rate", lambda device, dtype: 1e12)  # as if the maker named it
    now = 0.0

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    # By this clock reading takes the one time and computing the other, and nothing else takes any.
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(Pretrain, "training_step", lambda *args: (take(0.05), training_step(*args))[1])
    for slow in (False, True):
        seconds = 0.15 if slow else 0.0
        monkeypatch.setattr(ArraySource, "open_all", lambda *args: (take(seconds), open_all(*args))[1])  # noqa: B023
        run_dir = tmp_path / str(slow)
        settings = [*TINY, f"--run_dir={run_dir}", "--trainer.max_steps=6", "--trainer.log_every_n_steps=3"]
        cli = PretrainCLI([*settings, "--trainer.accumulate_grad_batches=2", "--data.batch_size_per_device=4"])
        cli.fit()
        for row in logged(run_dir):
            assert row["images_per_s"] == pytest.approx(4 / (0.05 + seconds), rel=0.5)  # the last batch is read ahead
            assert row["mfu"] == pytest.approx(row["images_per_s"] * cli.model.flops / 1e12, rel=1e-6)
            assert 0.05 < row["peak_memory_gib"] < 64
        waits[slow] = [row["data_wait"] for row in logged(run_dir)]
    assert waits[False] == [0, 0]
    assert waits[True] == pytest.approx([0.75, 0.75], abs=0.05)


def test_a_short_run_is_not_compiled_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = PretrainCLI([*TINY, f"--run_dir={tmp_path}", "--trainer.max_steps=1"])
    cli.fit()
    assert "torch.compile skipped: the run is too short to pay for it" in capsys.readouterr().out
    assert all(block._compiled_call_impl is None for block in compilation.blocks(cli.model))


def broken(network: nn.Module, graphs: bool = False) -> None:
    """A compiler that fails."""

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand much more")

    for block in compilation.blocks(network):
        block.compile(backend=fail)


@pytest.mark.slow
def test_where_compiling_fails_auto_goes_on_and_true_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PretrainCLI([*TINY, f"--run_dir={tmp_path / 'eager'}", "--trainer.max_steps=2", "--model.compile=false"]).fit()
    assert "compiled" not in capsys.readouterr().out
    monkeypatch.setattr(compilation, "compile_blocks", broken)
    monkeypatch.setitem(compilation.WORTHWHILE, "cpu", 0.0)
    PretrainCLI([*TINY, f"--run_dir={tmp_path / 'auto'}", "--trainer.max_steps=2"]).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if "torch.compile skipped" in line]
    wanted = "torch.compile needs a C++ compiler that works: install g++, or name one by CXX"
    assert lines == [f"torch.compile skipped: {wanted}"]
    weights = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"] for name in ("eager", "auto")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])  # the attempt leaves nothing
    with pytest.raises(UserError, match=r"--model.compile true: .*C\+\+"):
        PretrainCLI([*TINY, f"--run_dir={tmp_path / 'true'}", "--model.compile=true"]).fit()
    assert not (tmp_path / "true" / "config.yaml").exists()


def test_cuda_graphs_need_what_they_need(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --model"):
        Pretrain(compile=False, cuda_graphs=True)
    cli = PretrainCLI([*TINY, f"--run_dir={tmp_path}", "--trainer.max_steps=1", "--model.cuda_graphs=true"])
    with pytest.raises(UserError, match="there are none on cpu"):
        cli.fit()


@pytest.mark.slow
def test_no_compiler_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    settings = [*TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=1", "--model.compile=true"]
    missing = {"CXX": str(tmp_path / "missing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = fresh_mae("pretrain", *settings, **missing)  # torch reads the variables when it is imported
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("mae: error")]
    assert "install g++" in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_compiled_it_has_the_same_loss_and_gradients(checkpointing: bool) -> None:
    torch._dynamo.reset()
    network = MaskedAutoencoder(**SMALL, activation_checkpointing=checkpointing)
    wanted, keys = derived(network, *batch()), list(network.state_dict())
    torch._dynamo.utils.counters.clear()
    compilation.compile_blocks(network)
    require_same(derived(network, *batch()), wanted)
    assert list(network.state_dict()) == keys
    # Blocks of one shape share a program: encoder, decoder, its last block.
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames == 3
    with torch.no_grad():
        network(*batch())
        network.eval()(batch()[0][:1], batch()[1][:1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


@pytest.mark.slow
def test_drop_path_is_compiled_once_for_all_blocks() -> None:
    torch._dynamo.reset()
    network = build({**SMALL, "in_chans": 3, "mlp_ratio": 4.0}, 5, "mean", "linear", drop_path=0.5).train()
    torch.manual_seed(3)
    wanted = network(batch()[0])
    compilation.compile_blocks(network)
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(3)
    assert (network(batch()[0]) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first block has no rate


@pytest.mark.slow
def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    means = []
    for precision in ("32-true", "bf16-mixed"):
        run_dir = tmp_path / precision
        settings = [f"--run_dir={run_dir}", "--trainer.max_steps=200", "--trainer.log_every_n_steps=1"]
        PretrainCLI([*TINY, *settings, f"--trainer.precision={precision}", "--model.base_lr=0.02"]).fit()
        losses = [row["train/loss"] for row in logged(run_dir)]
        assert len(losses) == 200
        means.append(sum(losses[150:]) / 50)
        assert means[-1] < 0.9 * losses[0]
    assert means[1] == pytest.approx(means[0], rel=0.01)
    assert means[1] != means[0]


@pytest.mark.slow
def test_compiled_on_two_processes_it_trains_as_one_does_as_written(tmp_path: Path) -> None:
    losses = []
    for processes, batch_size, choice in ((1, 16, "false"), (2, 4, "true")):
        settings = [*TINY, f"--run_dir={tmp_path / choice}", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
        settings += [f"--data.batch_size_per_device={batch_size}", f"--trainer.devices={processes}"]
        settings += [f"--trainer.accumulate_grad_batches={processes}", f"--model.compile={choice}"]
        done = mae("pretrain", *settings, timeout=600, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert ("torch.compile took" in done.stdout) == (choice == "true")
        losses.append([row["train/loss"] for row in logged(tmp_path / choice)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_any_precision(tmp_path: Path, precision: str) -> None:
    moved = []
    for norm in (1e9, 1e-9):
        settings = [*TINY, f"--run_dir={tmp_path / str(norm)}", "--trainer.max_steps=2"]
        cli = PretrainCLI([*settings, f"--trainer.gradient_clip_val={norm}", f"--trainer.precision={precision}"])
        before = torch.cat([p.detach().flatten().clone() for p in cli.model.model.parameters()])
        cli.fit()
        moved.append((torch.cat([p.flatten() for p in cli.model.model.parameters()]) - before).norm().item())
    assert moved[1] < 0.1 * moved[0]  # Adam divides by the gradient's size, but not where its epsilon is larger
