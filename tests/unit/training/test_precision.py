"""What a run computes on, in which precision, and what it says where memory does not suffice."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, SUPPORT, TINY
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from mae.errors import UserError
from mae.launch import out_of_memory, stage_cli
from mae.launch.stages import PretrainCLI
from mae.launch.trainer_settings import set_ddp_options
from mae.runtime import memory
from mae.runtime.checkpoint_files import damage, saved, step_file
from mae.runtime.memory import is_out_of_memory
from mae.training import precision
from mae.training.lightning_internals import ddp_options

SHORT = [
    *(*DIGITS, *TINY, "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.limit_val_batches=0"),
    *("--trainer.max_steps=3", "--model.warmup_epochs=0", "--data.batch_size_per_device=8"),
]


@pytest.fixture
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with or without such products."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: request.param)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have a GPU, of an architecture with or without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    # Torch says that all of them can, some by emulation.
    own = request.param
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation)


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_the_device_is_what_the_accelerator_comes_to(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [precision.device_type(name) for name in ("auto", "gpu", "cuda", "cpu")] == ["cuda"] * 3 + ["cpu"]
    assert precision.device_type("lightning.pytorch.accelerators.CPUAccelerator") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert precision.device_type("auto") == "cpu"


@pytest.mark.parametrize(
    ("gpu", "sharded", "wanted"),
    [(True, False, "bf16-mixed"), (True, True, "bf16-mixed"), (False, False, "16-mixed"), (False, True, "32-true")],
    indirect=["gpu"],
)
def test_the_usual_precision_of_a_gpu_is_half_where_it_can(gpu: None, sharded: bool, wanted: str) -> None:
    assert precision.usual_precision("cuda", sharded) == wanted
    assert precision.usual_precision("cpu", sharded) == "32-true"


@pytest.mark.parametrize("gpu", [False], indirect=True)
def test_a_gpu_without_bfloat16_refuses_it(gpu: None) -> None:
    for name in ("bf16-mixed", "bf16", "bf16-true"):
        with pytest.raises(UserError, match=f"--trainer.precision {name}: Tesla V100 .*precision 16-mixed or 32-true$"):
            precision.check_precision(name, "cuda")
    assert [precision.check_precision(name, "cuda") for name in ("16-mixed", "32-true", None)] == [""] * 3


@pytest.mark.parametrize("bfloat16", [False, True], indirect=True)
def test_cpus_refuse_float16(bfloat16: None) -> None:
    for name in ("16-mixed", "16", 16, "16-true", "transformer-engine"):
        with pytest.raises(UserError, match=f"^--trainer.precision {name} is not for CPUs: use .*32-true$"):
            precision.check_precision(name, "cpu")
    assert [precision.check_precision(name, "cpu") for name in (32, "32-true", "64-true")] == [""] * 3


@pytest.mark.parametrize("bfloat16", [False, True], indirect=True)
def test_a_cpu_says_what_bfloat16_is_worth_on_it(bfloat16: None, request: pytest.FixtureRequest) -> None:
    said = {name: precision.check_precision(name, "cpu") for name in (None, "bf16-mixed")}
    if precision.cpu_has_bfloat16():
        assert "--trainer.precision bf16-mixed would be faster" in said[None]
        assert said["bf16-mixed"] == ""
    else:
        assert said[None] == ""
        assert "emulated and slow" in said["bf16-mixed"]


class Seen(Callback):
    """Precisions as they are in training."""

    matmul: str
    trainer: str

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        Seen.matmul, Seen.trainer = torch.get_float32_matmul_precision(), str(trainer.precision)


WATCHED = "--trainer.callbacks+=test_precision.Seen"


@pytest.mark.parametrize("bfloat16", [True], indirect=True)
@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_a_run_on_cpus_is_in_float32_wherever_it_is(
    tmp_path: Path, bfloat16: None, gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = PretrainCLI([*SHORT, f"--run_dir={tmp_path}"])
    cli.lock.release()
    assert cli.trainer.precision == "32-true"
    assert capsys.readouterr().out.count("bf16-mixed would be faster") == 1
    monkeypatch.setattr(stage_cli, "is_first_rank", lambda: False)
    PretrainCLI([*SHORT, f"--run_dir={tmp_path / 'other'}"])
    assert "faster" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["16-mixed", "16", "16-true", "foo", "transformer-engine"])
def test_a_precision_that_is_none_of_this_device_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--trainer\.precision {name} is (not for CPUs|none of 32-true, )"
    ) as refused:
        PretrainCLI([*SHORT, f"--run_dir={tmp_path}", f"--trainer.precision={name}"])
    assert len(str(refused.value)) < 200
    assert not list(tmp_path.glob("*.yaml"))


def test_products_of_float32_are_as_exact_as_the_setting_says(tmp_path: Path) -> None:
    settings = [*SHORT, f"--run_dir={tmp_path}", WATCHED]
    try:
        PretrainCLI([*settings, "--float32_matmul_precision=high", "--trainer.max_steps=2"]).fit()
        assert Seen.matmul == "high"
        assert Seen.trainer == "32-true"
        with pytest.raises(UserError, match="float32_matmul_precision is highest, but high in the run that"):
            PretrainCLI([*settings, "--ckpt_path=last"]).fit()
        PretrainCLI([*settings, "--ckpt_path=last", "--allow_changes=true"]).fit()
        assert Seen.matmul == "highest"
        with pytest.raises(UserError, match="float32_matmul_precision"):
            PretrainCLI([*settings, "--float32_matmul_precision=tf32"])
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_start_without_checkpoints_keeps_the_precision_of_products(tmp_path: Path) -> None:
    settings = [*SHORT, f"--run_dir={tmp_path}"]
    cli = PretrainCLI(settings)
    cli.write_config()
    cli.lock.release()
    try:
        with pytest.raises(UserError, match="float32_matmul_precision is medium, but highest in"):
            PretrainCLI([*settings, "--float32_matmul_precision=medium"])
    finally:
        torch.set_float32_matmul_precision("highest")


def test_ddp_is_told_what_it_need_not_do_unless_settings_say_otherwise() -> None:
    def options(accumulate: int, **settings: bool) -> dict[str, bool]:
        strategy = DDPStrategy(**settings)
        set_ddp_options(strategy, accumulate)
        return {key: value for key, value in ddp_options(strategy).items() if value}

    assert options(1) == {"gradient_as_bucket_view": True, "static_graph": True}
    assert options(2) == {"gradient_as_bucket_view": True}
    assert options(1, gradient_as_bucket_view=False) == {"static_graph": True}
    assert options(1, find_unused_parameters=True) == {"find_unused_parameters": True, "gradient_as_bucket_view": True}
    assert options(1, static_graph=False) == {"gradient_as_bucket_view": True}
    with pytest.raises(UserError, match=r"static_graph true does not go with --trainer.accumulate_grad_batches 2"):
        options(2, static_graph=True)


def test_errors_of_memory_are_told_from_others() -> None:
    told = ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "std::bad_alloc", "could not create a primitive"]
    told += ["[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"]
    errors = [
        *map(RuntimeError, told),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOMEM, ""),
    ]
    assert all(map(is_out_of_memory, errors))
    others = ["could not create a primitive descriptor for a matmul primitive", "shapes do not fit", ""]
    assert not any(
        map(is_out_of_memory, [*map(RuntimeError, others), OSError(errno.ENOSPC, ""), ValueError("out of memory")])
    )


@pytest.mark.parametrize(
    ("batch", "accumulate", "fits", "checkpointing", "said"),
    [
        (64, 1, 20, False, "--data.batch_size_per_device 16 --trainer.accumulate_grad_batches 4 needs less, "),
        (96, 2, 50, None, "--data.batch_size_per_device 48 --trainer.accumulate_grad_batches 4 needs less, "),
        (64, 1, 1000, True, "--data.batch_size_per_device 32 --trainer.accumulate_grad_batches 2 needs less, "),
        (7, 1, 6, True, "--data.batch_size_per_device 1 --trainer.accumulate_grad_batches 7 needs less, "),
        (64, 1, 0, False, "--model.activation_checkpointing true --data.batch_size_per_device 1 --trainer.accum"),
        (1, 64, 0, False, "--model.activation_checkpointing true needs less"),
        (1, 1, 9, False, "--model.activation_checkpointing true needs less"),
        (64, 1, 0, True, "smaller --model.size"),
        (64, 1, 0, None, "smaller --model.size"),
    ],
)
def test_the_way_out_keeps_the_effective_batch(
    batch: int, accumulate: int, fits: int, checkpointing: bool | None, said: str
) -> None:
    assert said in out_of_memory.settings_that_need_less(batch, accumulate, fits, checkpointing)


def test_memory_is_the_least_of_what_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(out_of_memory, "physical", lambda: 800)
    monkeypatch.setattr(out_of_memory, "address_space", lambda: None)
    monkeypatch.setattr(out_of_memory, "OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(memory, "resident", lambda: 7)
    assert out_of_memory.available_memory(cpu) == 807
    assert out_of_memory.available_memory(cpu, processes=2) == 407
    monkeypatch.setattr(out_of_memory, "address_space", lambda: 100)
    assert out_of_memory.available_memory(cpu, processes=2) == 107
    monkeypatch.setattr(out_of_memory, "cgroup", lambda processes: 90)
    assert out_of_memory.available_memory(cpu) == 97


@pytest.mark.parametrize(("version", "line"), [(1, "9:cpu,memory:/slurm/job_1"), (2, "0::/slurm/job_1")])
def test_limits_of_a_batch_system_count_wherever_they_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, line: str
) -> None:
    monkeypatch.setattr(out_of_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(out_of_memory, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"1:name=systemd:/\n{line}\n")
    assert out_of_memory.cgroup() is None
    top = tmp_path / "memory" if version == 1 else tmp_path
    limit, used, key = out_of_memory.CGROUP_FILES[version]
    for folder, most in (("slurm", "1000"), ("slurm/job_1", "max")):
        (top / folder).mkdir(parents=True)
        for name, text in ((limit, most), (used, "300"), ("memory.stat", f"anon 200\n{key} 100\n")):
            (top / folder / name).write_text(text)
    assert out_of_memory.cgroup() == 800
    assert out_of_memory.cgroup(processes=2) == 400


def little_memory(run_dir: Path, mib: int, rank: int, *settings: str) -> subprocess.CompletedProcess[str]:
    """Pre-training where one rank may have so many MiB besides Python and its libraries."""
    program = [sys.executable, str(SUPPORT / "limited.py"), str(mib), str(rank), "pretrain"]
    given = [
        *("--data.dataset=digits", "--data.num_workers=0", "--model.size=tiny", "--model.depth=4"),
        *("--model.patch_size=2", "--model.decoder_embed_dim=64", "--model.decoder_depth=1"),
        *("--model.decoder_num_heads=2", "--wandb.mode=disabled", "--trainer.accelerator=cpu"),
        *("--trainer.limit_val_batches=0", "--model.warmup_epochs=0", "--trainer.strategy=auto"),
        f"--run_dir={run_dir}",
    ]
    program += [*given, *settings]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(program, capture_output=True, text=True, timeout=300, env=environ, check=False)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("mae: error")]


@pytest.mark.slow
def test_a_run_without_memory_says_which_settings_need_less(tmp_path: Path) -> None:
    alone = ["--trainer.devices=1", "--ckpt_path=last", "--trainer.max_epochs=1"]
    done = little_memory(tmp_path, 700, 0, *alone, "--trainer.max_steps=1", *divided(16, 32))
    assert done.returncode == 0, done.stderr
    done = little_memory(tmp_path, 700, 0, *alone, "--trainer.max_steps=2", *divided(512, 1))
    assert done.returncode == 2, done.stderr
    (line,) = errors(done)
    assert "out of memory with 512 images a device (cpu, " in line
    assert line.endswith("; --ckpt_path last goes on from the last checkpoint")
    found = re.search(r"--data.batch_size_per_device (\d+) --trainer.accumulate_grad_batches (\d+) needs less", line)
    assert found
    batch, accumulate = int(found[1]), int(found[2])
    assert batch * accumulate == 512
    assert saved(tmp_path) == [step_file(tmp_path, 1)]
    assert damage(step_file(tmp_path, 1)) is None
    done = little_memory(tmp_path, 700, 0, *alone, "--trainer.max_steps=2", *divided(batch, accumulate))
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path)[0] == step_file(tmp_path, 2)


def divided(batch: int, accumulate: int) -> list[str]:
    return [f"--data.batch_size_per_device={batch}", f"--trainer.accumulate_grad_batches={accumulate}"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_the_rank_without_memory_says_so_and_the_others_end(tmp_path: Path, rank: int) -> None:
    done = little_memory(tmp_path, 700, rank, "--trainer.devices=2", "--trainer.max_steps=2", *divided(512, 1))
    own, *others = sorted(errors(done), key=lambda line: "out of memory" not in line)
    assert "out of memory with 512 images a device" in own
    assert own.startswith("mae: error: rank 1: " if rank else "mae: error: out")
    assert all("another process of the run is gone" in line for line in others)
    # Of the first rank; where another is gone, Lightning may end it before it hears of that by itself.
    assert done.returncode in ((1, 2) if rank else (2,)), done.stderr
