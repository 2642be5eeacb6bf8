"""Every shipped config: its header, that the real command takes it, and the published figures of the ImageNet runs."""

import contextlib
import functools
import io
import shlex
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from torch import nn

from mae.classify import SCRATCH
from mae.cli import main
from mae.finetune import Finetune
from mae.launch.stages import FinetuneCLI, LinearProbeCLI, PretrainCLI
from mae.linprobe import LinearProbe
from mae.pretrain import Pretrain
from mae.training.optim import scaled_lr

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TRAINING = [path for path in CONFIGS if not path.stem.startswith("report_")]
IMAGENET = [path for path in TRAINING if "_imagenet" in path.stem]
STAGES = {cli.command: cli for cli in (PretrainCLI, LinearProbeCLI, FinetuneCLI)}

PATCH = {"base": 16, "large": 16, "huge": 14}
ENCODER = {"base": 85.80, "large": 303.30, "huge": 630.76}  # million parameters, positions included, no head
AUTOENCODER = {"base": 111.91, "large": 329.54, "huge": 657.07}

# Of each run: images a step, peak learning rate, epochs. Paper: Tables 8 to 11; code: PRETRAIN.md, FINETUNE.md.
SCHEDULES = {
    **{f"pretrain_{size}_imagenet": (4096, 2.4e-3, 1600) for size in PATCH},
    **{f"probe_{size}_imagenet": (16384, 6.4, 90) for size in PATCH},
    "finetune_base_imagenet": (1024, 2e-3, 100),
    "finetune_large_imagenet": (1024, 4e-3, 50),
    "finetune_huge_imagenet": (1024, 4e-3, 50),
    "finetune_base_imagenet_paper": (1024, 4e-3, 100),
    "finetune_large_imagenet_paper": (1024, 4e-3, 50),
    "finetune_huge_imagenet_paper": (1024, 4e-3, 50),
    "scratch_base_imagenet": (4096, 1.6e-3, 300),
    "scratch_large_imagenet": (4096, 1.6e-3, 200),
    "scratch_huge_imagenet": (4096, 1.6e-3, 200),
}
# Of each fine-tuning: layer decay, drop path, random erasing, weight decay, second beta, warm-up epochs, decay of the
# moving average.
REGULARISATION = {
    "finetune_base_imagenet": (0.65, 0.1, 0.25, 0.05, 0.999, 5, None),
    "finetune_large_imagenet": (0.75, 0.2, 0.25, 0.05, 0.999, 5, None),
    "finetune_huge_imagenet": (0.75, 0.3, 0.25, 0.05, 0.999, 5, None),
    "finetune_base_imagenet_paper": (0.75, 0.1, 0, 0.05, 0.999, 5, None),
    "finetune_large_imagenet_paper": (0.75, 0.1, 0, 0.05, 0.999, 5, None),
    "finetune_huge_imagenet_paper": (0.75, 0.2, 0, 0.05, 0.999, 5, None),
    "scratch_base_imagenet": (1, 0.1, 0, 0.3, 0.95, 20, 0.9999),
    "scratch_large_imagenet": (1, 0.2, 0, 0.3, 0.95, 20, 0.9999),
    "scratch_huge_imagenet": (1, 0.2, 0, 0.3, 0.95, 20, 0.9999),
}


def header(path: Path) -> list[str]:
    return list(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))


def command_of(path: Path) -> list[str]:
    """The words of the header's command, the program's name left out."""
    lines = [line for line in header(path) if line.startswith("# mae ") and f"configs/{path.name}" in line]
    assert len(lines) == 1, f"{path.name}: the header must give one command that names this very file"
    return shlex.split(lines[0])[2:]


@functools.cache
def settings_of(path: Path) -> dict[str, Any]:
    """All settings of a run, as the header's command with --print_config says them."""
    args = [str(path) if word == f"configs/{path.name}" else word for word in command_of(path)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    settings: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return settings


def size_of(path: Path) -> str:
    return path.stem.split("_")[1]


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_how_to_run_it_on_what_how_long_and_what_comes_out(path: Path) -> None:
    assert command_of(path)
    for label in ("Hardware", "Time", "Score"):
        assert [line for line in header(path) if line.startswith(f"# {label}: ")], f"{path.name} lacks '# {label}: '"


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_the_headers_command_is_taken(path: Path) -> None:
    settings = settings_of(path)
    given = yaml.safe_load(path.read_text())
    for section, values in given.items():
        for key, value in values.items():
            assert settings[section][key] == value, f"{section}.{key}"
    data = STAGES[command_of(path)[0]].data(**settings["data"])
    assert data.batch_size == given["data"]["batch_size_per_device"]
    if settings["model"].get("encoder", SCRATCH) != SCRATCH:
        start = settings["model"]["encoder"]  # the folder of a run of another shipped config
        assert Path(start).parent == Path("runs")
        assert Path(start).name in {other.stem for other in CONFIGS if other.stem.startswith("pretrain_")}


def test_all_published_imagenet_runs_have_a_config() -> None:
    assert {path.stem for path in IMAGENET} == set(SCHEDULES)


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_batch_rate_and_length_are_the_published_ones(path: Path) -> None:
    settings = settings_of(path)
    trainer, model, data = settings["trainer"], settings["model"], settings["data"]
    given = yaml.safe_load(path.read_text())  # what the batch is made of stands in the file, not in a default
    processes = given["trainer"]["devices"] * given["trainer"]["num_nodes"]
    batch = given["data"]["batch_size_per_device"] * processes * given["trainer"]["accumulate_grad_batches"]
    epochs = trainer["max_epochs"]
    assert (batch, scaled_lr(model["base_lr"], batch), epochs) == pytest.approx(SCHEDULES[path.stem], rel=1e-9)
    assert model["warmup_epochs"] < epochs
    assert trainer["precision"] is None
    assert data["image_size"] in (None, 224)
    if path.stem.startswith("pretrain_"):
        assert (model["betas"], model["weight_decay"], model["warmup_epochs"]) == ([0.9, 0.95], 0.05, 40)
        assert (model["mask_ratio"], model["norm_pix_loss"], data["crop_scale"]) == (0.75, True, [0.2, 1.0])
    elif path.stem.startswith("probe_"):
        assert (model["momentum"], model["trust_coefficient"], model["warmup_epochs"]) == (0.9, 0.001, 10)
        assert (model["pool"], data["crop_scale"]) == ("class", [0.08, 1.0])
    else:
        found = [model["layer_decay"], model["drop_path"], data["erase_prob"], model["weight_decay"]]
        found += [model["betas"][1], model["warmup_epochs"], model["ema_decay"]]
        assert tuple(found) == REGULARISATION[path.stem]
        assert model["pool"] == ("mean" if path.stem.endswith("_imagenet") and "finetune" in path.stem else "class")
        mixing = ("mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")
        assert [model[key] for key in mixing] == [0.8, 1.0, 1.0, 0.5, 0.1]
        assert (data["auto_augment"], data["crop_scale"]) == ("rand-m9-mstd0.5-inc1", [0.08, 1.0])
        assert model["min_lr"] == (1e-6 if model["pool"] == "mean" else 0)


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_the_network_has_the_published_number_of_parameters(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = settings_of(path)["model"], size_of(path)
    # Named in the file, so that a probe or fine-tuning of a wrong encoder is refused.
    assert (model["size"], model["patch_size"]) == (size, PATCH[size])
    stage = STAGES[command_of(path)[0]].stage
    # Older versions of timm read drop-path rates off a tensor, which the meta device cannot give.
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **settings: linspace(*args, **{**settings, "device": "cpu"}))
    with torch.device("meta"):
        if stage is Pretrain:
            pretrain = Pretrain(**model, image_size=224)
            assert millions(pretrain.model) == pytest.approx(AUTOENCODER[size], abs=0.005)
            encoder = millions(pretrain.model.encoder)
        else:
            assert issubclass(stage, LinearProbe | Finetune)
            classes = [f"class {number}" for number in range(1000)]
            model = model | {"encoder": SCRATCH, "image_size": 224, "classes": classes}
            if stage is Finetune:
                model["ema_decay"] = None  # timm's ModelEmaV3 makes a generator, of which the meta device has none
            classifier = stage(**model)
            encoder = millions(classifier.model) - millions(classifier.model.head)
    assert encoder == pytest.approx(ENCODER[size], abs=0.005)
