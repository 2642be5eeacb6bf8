"""Fine-tuning and linear probe: the official runs step by step, through the code that the commands run."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import reference
from torch import Tensor

import mae.data
from mae.data import ArraySource
from mae.randomness import EpochSampler
from mae.runs import FinetuneCLI, ProbeCLI, StageCLI

CPU = ["--trainer.accelerator=cpu", "--wandb.mode=disabled", "--data.num_workers=0"]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def official_run(
    name: str, cli_type: type[StageCLI], run_dir: Path, monkeypatch: pytest.MonkeyPatch, *settings: str
) -> tuple[StageCLI, dict[str, Tensor], dict[str, Any]]:
    """Train on the images of an official run, in their order, from its initial weights."""
    tensors, facts = reference(name)
    source = ArraySource(tensors["images_u8"], tensors["labels"].tolist(), [f"class {i}" for i in range(10)])
    monkeypatch.setattr(mae.data, "load_torchvision", lambda *_: (source, None))
    steps, size = facts["steps_per_epoch"], facts["batch_size"]

    def stored_order(self: EpochSampler) -> Any:
        return ([(self.step // steps, size * step + i) for i in range(size)] for step in range(steps))

    monkeypatch.setattr(EpochSampler, "__iter__", stored_order)
    cli = cli_type(
        [
            *CPU,
            *("--data.dataset=cifar10", f"--data.root={run_dir.parent}", "--data.crop_scale=null", "--data.hflip=0"),
            *("--data.mean=[0.485,0.456,0.406]", "--data.std=[0.229,0.224,0.225]"),
            *(f"--data.batch_size_per_device={size}", "--model.encoder=scratch", "--model.patch_size=4"),
            *("--model.embed_dim=48", f"--model.depth={facts['depth']}", "--model.num_heads=3"),
            *(f"--model.base_lr={facts['base_lr']}", f"--model.warmup_epochs={facts['warmup_epochs']}"),
            *(f"--trainer.max_epochs={facts['epochs']}", "--trainer.log_every_n_steps=1", f"--run_dir={run_dir}"),
            *settings,
        ]
    )
    cli.model.model.load_state_dict({k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")})
    cli.fit()
    return cli, tensors, facts


def follows(cli: StageCLI, run_dir: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    logged = rows(run_dir)
    for row, loss in zip(logged, facts["losses"], strict=True):
        assert float(row["train/loss"]) == pytest.approx(loss, rel=1e-4)
    whole = torch.cat([v.flatten().float() for k, v in tensors.items() if k.startswith("final.")]).norm()
    for name, value in cli.model.model.state_dict().items():
        wanted = tensors["final." + name]
        if name.endswith("qkv.bias"):
            # The key bias' gradient is zero in theory, so Adam makes steps of rounding noise: held against the whole.
            keys = slice(len(value) // 3, 2 * len(value) // 3)
            assert (value[keys] - wanted[keys]).norm() <= 1e-3 * whole, name
            value, wanted = (torch.cat(t.chunk(3)[::2]) for t in (value, wanted))
        assert (value - wanted).float().norm() <= 1e-3 * wanted.float().norm(), name


def test_thirty_steps_of_the_official_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--data.auto_augment=null", "--data.erase_prob=0", "--model.mixup=0", "--model.cutmix=0"]
    settings += ["--model.layer_decay=0.65", "--model.drop_path=0", "--model.label_smoothing=0.1"]
    run = official_run("finetune_30_steps", FinetuneCLI, tmp_path / "run", monkeypatch, *settings)
    follows(run[0], tmp_path / "run", *run[1:])


def test_forty_steps_of_the_official_linear_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = official_run("linprobe_40_steps", ProbeCLI, tmp_path / "run", monkeypatch)
    follows(run[0], tmp_path / "run", *run[1:])
