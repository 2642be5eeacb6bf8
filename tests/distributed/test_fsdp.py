"""Networks spread over processes: the numbers of one process, and checkpoints that any other run goes on from."""

import csv
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import DIGITS, TINY, mae
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mae import MaskedAutoencoder
from mae.training.fsdp import full_state, part_of, shard, whole


def network() -> MaskedAutoencoder:
    torch.manual_seed(0)
    # For 3 processes: some tensors have one row, and 3 does not divide the decoder's width of 20.
    return MaskedAutoencoder(
        15, 5, embed_dim=36, depth=2, num_heads=3, decoder_embed_dim=20, decoder_depth=2, decoder_num_heads=5
    )


def batch(rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(4, 3, 15, 15, generator=draw), torch.rand(4, 9, generator=draw)


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("data_parallel", "tensor_parallel"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield mesh_of_all()
    dist.destroy_process_group()


def test_a_network_that_is_not_sharded_is_left_alone() -> None:
    model = network()
    state = full_state(model)
    assert same(state, model.state_dict())
    assert next(iter(state.values())).data_ptr() == next(model.parameters()).data_ptr()  # no copy
    with whole(model):
        assert same(full_state(model), state)


def test_one_process_shards_too_and_twice_is_once(alone: DeviceMesh) -> None:
    model, plain = network(), network()
    shard(model, alone)
    first = list(model.parameters())
    shard(model, alone)
    assert all(p is q for p, q in zip(model.parameters(), first, strict=True))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert same(full_state(model), plain.state_dict())
    loss, wanted = (net(*batch(0)).loss for net in (model, plain))
    assert torch.equal(loss, wanted)


def one_of_them(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
    parts_make_up_the_whole()
    looks_around_first(rank)
    trains_as_one_process(rank, count)
    dist.destroy_process_group()


def trains_as_one_process(rank: int, count: int) -> None:
    sharded, plain = network(), network()
    numbers = sum(p.numel() for p in plain.parameters())
    shard(sharded, mesh_of_all())
    held = sum(p.to_local().numel() for p in sharded.parameters() if isinstance(p, DTensor))
    assert held < numbers * (1 / count + 0.05)
    # Not Adam, which makes steps of full size from gradients that are zero but for rounding, as the keys' biases' are.
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (sharded, plain)]
    for step in range(3):
        if step == 1:
            look_around(rank, sharded, plain)
        loss = sharded(*batch(rank)).loss
        loss.backward()
        wanted = torch.stack([plain(*batch(i)).loss for i in range(count)])
        wanted.mean().backward()
        torch.testing.assert_close(loss, wanted[rank])
        norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.1) for net in (sharded, plain)]
        assert isinstance(norms[0], DTensor)
        torch.testing.assert_close(norms[0].full_tensor(), norms[1])
        for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                assert p.grad is not None
                p.grad *= torch.tensor(2.0)  # as the training does, for images that could not be read
                q.grad *= 2
                assert isinstance(p.grad, DTensor)
                torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = full_state(sharded)
    assert bool(state) == (rank == 0)
    if rank == 0:
        torch.testing.assert_close(state, dict(plain.state_dict()), rtol=1e-4, atol=1e-6)


def look_around(rank: int, sharded: MaskedAutoencoder, plain: MaskedAutoencoder) -> None:
    """Forward passes of one process alone, in inference mode, by every way into the network."""
    images, noise = batch(7)
    with torch.inference_mode():
        for _ in range(2):
            with whole(sharded.eval()):
                assert not any(isinstance(p, DTensor) for p in sharded.parameters())
                if rank == 0:
                    torch.testing.assert_close(sharded.encode(images), plain.encode(images))
                    torch.testing.assert_close(sharded.predict(images, noise).pred, plain.predict(images, noise).pred)
                    torch.testing.assert_close(sharded(images, noise).loss, plain(images, noise).loss)
            assert all(isinstance(p, DTensor) for p in sharded.train().parameters())
        # Together it works without.
        torch.testing.assert_close(sharded.encode(images), plain.encode(images))


def looks_around_first(rank: int) -> None:
    sharded, plain = network(), network()
    shard(sharded, mesh_of_all())
    look_around(rank, sharded, plain)
    trained = sharded(*batch(0)).loss
    trained.backward()
    torch.testing.assert_close(trained, plain(*batch(0)).loss)


def parts_make_up_the_whole() -> None:
    model = network()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shard(model, mesh_of_all())
    for key, own in model.state_dict().items():
        part = part_of(state[key], own)
        assert isinstance(part, DTensor)
        assert isinstance(own, DTensor)
        assert torch.equal(part.to_local(), own.to_local()), key
        assert part.to_local().untyped_storage().nbytes() == part.to_local().nbytes  # not a view of the whole
        assert torch.equal(part.full_tensor(), state[key]), key
    assert part_of(3, own) == 3
    assert part_of(torch.ones(()), own).shape == ()


@pytest.mark.slow
def test_three_processes_hold_a_part_each_and_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_them, (3, tmp_path), nprocs=3)


SHARDED = "--trainer.strategy=fsdp2"


def run(command: str, run_dir: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Two processes with the strategy of the settings; what is wrong with them is a failure of the test."""
    done = mae(command, *TINY, *DIGITS, f"--run_dir={run_dir}", "--trainer.log_every_n_steps=1", *settings, timeout=400)
    assert done.returncode == 0, done.stderr
    return done


def two(*settings: str) -> list[str]:
    return ["--trainer.devices=2", "--data.batch_size_per_device=32", *settings]


def column(run_dir: Path, name: str) -> list[float]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], marks=pytest.mark.soak),
        ["--trainer.accumulate_grad_batches=2", "--data.batch_size_per_device=16", "--trainer.gradient_clip_val=0.5"],
        ["--model.activation_checkpointing=true", "--trainer.precision=bf16-mixed"],
    ],
    ids=["plain", "accumulated and clipped", "bf16"],
)
def test_losses_are_those_of_ddp(tmp_path: Path, settings: list[str]) -> None:
    common = two("--trainer.max_steps=20", "--model.base_lr=0.01", *settings)
    for strategy in ("ddp", "fsdp2"):
        run("pretrain", tmp_path / strategy, *common, f"--trainer.strategy={strategy}")
    assert len(column(tmp_path / "ddp", "train/loss")) == 20
    for key in ("train/loss", "lr"):
        wanted = column(tmp_path / "ddp", key)
        assert column(tmp_path / "fsdp2", key) == pytest.approx(wanted, rel=1e-5), key
    ours, wanted_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("fsdp2", "ddp"))
    torch.testing.assert_close(ours, wanted_weights, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_checkpoints_are_those_of_any_other_run(tmp_path: Path) -> None:
    common = ["--trainer.max_steps=20", "--model.base_lr=0.01", "--checkpoint.every_n_steps=10"]
    alone = ["--trainer.devices=1", "--data.batch_size_per_device=64", "--trainer.strategy=auto"]
    ways = {"fsdp2": two(SHARDED), "one": alone}
    for name in ("fsdp2", "one"):
        run("pretrain", tmp_path / name, *common, *ways[name])
        shutil.copy(tmp_path / name / "checkpoints" / "step_0000010.ckpt", tmp_path / f"{name}.ckpt")
    shapes = []
    for name in ("fsdp2", "one"):
        stored = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        states = stored["optimizer_states"][0]
        plain = {key: (value.shape, value.dtype) for key, value in stored["state_dict"].items()}
        moments = {k: {n: (v.shape, v.dtype) for n, v in s.items()} for k, s in states["state"].items()}
        shapes.append((plain, moments, [group["params"] for group in states["param_groups"]]))
    assert shapes[0] == shapes[1]
    for saved, resumed in (("fsdp2", "fsdp2"), ("fsdp2", "one"), ("one", "fsdp2")):
        folder = tmp_path / f"{saved}_{resumed}"
        run("pretrain", folder, *common, *ways[resumed], f"--ckpt_path={tmp_path / f'{saved}.ckpt'}")
        wanted, found = (column(path, "train/loss")[-10:] for path in (tmp_path / saved, folder))
        if saved == resumed:
            assert found == wanted
            ends = [load_file(path / "model.safetensors") for path in (tmp_path / saved, folder)]
            assert same(*ends)
        else:
            assert found == pytest.approx(wanted, rel=1e-5), (saved, resumed)


@pytest.mark.slow
def test_held_out_images_pictures_and_online_evaluation(tmp_path: Path) -> None:
    # 1,000 held-out images are no whole batches, 201 are not the same number for both processes.
    settings = ["--trainer.max_epochs=1", "--model.base_lr=0.01", "--panels.every_n_epochs=1"]
    settings += ["--online.every_n_epochs=1", "--online.train_images=500", "--online.held_out_images=201"]
    settings += ["--data.batch_size_per_device=200", "--trainer.devices=2"]
    for strategy in ("ddp", "fsdp2"):
        run("pretrain", tmp_path / strategy, *settings, f"--trainer.strategy={strategy}")
    for key in ("val/loss", "online/knn", "online/probe"):
        wanted = column(tmp_path / "ddp", key)
        assert len(wanted) == 1
        assert column(tmp_path / "fsdp2", key) == pytest.approx(wanted, rel=1e-2 if key[0] == "o" else 1e-5), key
    pictures = [sorted(p.name for p in (tmp_path / name / "reconstructions").iterdir()) for name in ("ddp", "fsdp2")]
    assert pictures[0] == pictures[1] != []


FINETUNE: list[Any] = [
    *("--data.dataset=digits", "--data.auto_augment=null", "--data.num_workers=0", "--wandb.mode=disabled"),
    *("--model.encoder=scratch", "--model.size=nano", "--model.embed_dim=32", "--model.depth=2"),
    *("--model.num_heads=2", "--model.patch_size=7", "--model.warmup_epochs=0.01", "--model.base_lr=0.01"),
    *("--trainer.accelerator=cpu", "--trainer.devices=2", "--data.batch_size_per_device=16"),
]


@pytest.mark.slow
def test_fine_tuning_is_that_of_ddp(tmp_path: Path) -> None:
    settings = [*FINETUNE, "--trainer.max_steps=12", "--trainer.log_every_n_steps=1", "--model.drop_path=0.3"]
    for strategy in ("ddp", "fsdp2"):
        done = mae("finetune", *settings, f"--run_dir={tmp_path / strategy}", f"--trainer.strategy={strategy}")
        assert done.returncode == 0, done.stderr
    for key in ("train/loss", "val/loss", "val/acc1"):
        wanted = column(tmp_path / "ddp", key)
        assert column(tmp_path / "fsdp2", key) == pytest.approx(wanted, rel=1e-5), key
    shapes = [
        {key: value.shape for key, value in load_file(tmp_path / name / "model.safetensors").items()}
        for name in ("ddp", "fsdp2")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        ("probe", [], "the probe trains one linear layer"),
        ("finetune", ["--model.ema_decay=0.9"], "--model.ema_decay null"),
        ("finetune", ["--trainer.precision=64-true"], "64-true"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, command: str, settings: list[str], said: str) -> None:
    given = [*FINETUNE, f"--run_dir={tmp_path}", SHARDED, *settings]
    if command == "probe":
        given.remove("--data.auto_augment=null")
    done = mae(command, *given)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("mae: error")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in done.stderr
