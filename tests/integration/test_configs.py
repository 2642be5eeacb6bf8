"""Every packaged config: its name and header, that the command takes it, and the published figures of ImageNet runs."""

import contextlib
import functools
import io
import shlex
import shutil
import subprocess
import sys
import zipfile
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
from mae.errors import UserError
from mae.finetune import Finetune
from mae.launch.stages import FinetuneCLI, LinearProbeCLI, PretrainCLI
from mae.linprobe import LinearProbe
from mae.options import CONFIGS, config_names, find_config, run_name
from mae.pretrain import Pretrain
from mae.training.optim import scaled_lr

NAMES = config_names()
ABLATIONS = [name for name in NAMES if name.startswith("ablations/")]
TRAINING = [name for name in NAMES if not name.startswith("report/") and name not in ABLATIONS]
IMAGENET = [name for name in TRAINING if "_in1k" in name]
STAGES = {cli.command: cli for cli in (PretrainCLI, LinearProbeCLI, FinetuneCLI)}

PATCH = {"base": 16, "large": 16, "huge": 14}
SHORT = {"base": "vitb16", "large": "vitl16", "huge": "vith14"}  # the size and the patch in the name of a config
ENCODER = {"base": 85.80, "large": 303.30, "huge": 630.76}  # million parameters, positions included, no head
AUTOENCODER = {"base": 111.91, "large": 329.54, "huge": 657.07}

# Of each run: images a step, peak learning rate, epochs. Paper: Tables 8 to 11; code: PRETRAIN.md, FINETUNE.md.
SCHEDULES = {
    **{f"pretrain/{short}_in1k": (4096, 2.4e-3, 1600) for short in SHORT.values()},
    **{f"linprobe/{short}_in1k": (16384, 6.4, 90) for short in SHORT.values()},
    "finetune/vitb16_in1k": (1024, 2e-3, 100),
    "finetune/vitl16_in1k": (1024, 4e-3, 50),
    "finetune/vith14_in1k": (1024, 4e-3, 50),
    "finetune/vitb16_in1k_paper": (1024, 4e-3, 100),
    "finetune/vitl16_in1k_paper": (1024, 4e-3, 50),
    "finetune/vith14_in1k_paper": (1024, 4e-3, 50),
    "finetune/vitb16_in1k_scratch": (4096, 1.6e-3, 300),
    "finetune/vitl16_in1k_scratch": (4096, 1.6e-3, 200),
    "finetune/vith14_in1k_scratch": (4096, 1.6e-3, 200),
}
# Of each fine-tuning: layer decay, drop path, random erasing, weight decay, second beta, warm-up epochs, decay of the
# moving average.
REGULARISATION = {
    "finetune/vitb16_in1k": (0.65, 0.1, 0.25, 0.05, 0.999, 5, None),
    "finetune/vitl16_in1k": (0.75, 0.2, 0.25, 0.05, 0.999, 5, None),
    "finetune/vith14_in1k": (0.75, 0.3, 0.25, 0.05, 0.999, 5, None),
    "finetune/vitb16_in1k_paper": (0.75, 0.1, 0, 0.05, 0.999, 5, None),
    "finetune/vitl16_in1k_paper": (0.75, 0.1, 0, 0.05, 0.999, 5, None),
    "finetune/vith14_in1k_paper": (0.75, 0.2, 0, 0.05, 0.999, 5, None),
    "finetune/vitb16_in1k_scratch": (1, 0.1, 0, 0.3, 0.95, 20, 0.9999),
    "finetune/vitl16_in1k_scratch": (1, 0.2, 0, 0.3, 0.95, 20, 0.9999),
    "finetune/vith14_in1k_scratch": (1, 0.2, 0, 0.3, 0.95, 20, 0.9999),
}


def header(name: str) -> list[str]:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))


def content(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return settings


def command_of(name: str) -> list[str]:
    """The words of the header's command, the program's name left out."""
    lines = [line for line in header(name) if line.startswith("# mae ") and f"--config {name}" in line]
    assert len(lines) == 1, f"{name}: the header must give one command that names this very config"
    return shlex.split(lines[0])[2:]


@functools.cache
def settings_of(name: str) -> dict[str, Any]:
    """All settings of a run, as the header's command with --print_config says them."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main([*command_of(name), "--print_config"])
    assert stop.value.code == 0
    settings: dict[str, Any] = yaml.safe_load(printed.getvalue())
    return settings


def size_of(name: str) -> str:
    (size,) = (size for size, short in SHORT.items() if f"/{short}_" in name)
    return size


def stage_of(name: str) -> str:
    return "pretrain" if name in ABLATIONS else name.partition("/")[0]


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_it_is_how_to_run_it_on_what_how_long_and_what_comes_out(name: str) -> None:
    assert header(name)[0].endswith(".")
    assert len(header(name)[0]) <= 110, "a line of `mae configs`"
    assert command_of(name)[0] == stage_of(name)
    assert name.startswith("ablations/") == ("--config ablations/baseline" in shlex.join(command_of(name)))
    for label in ("Hardware", "Time", "Score"):
        assert [line for line in header(name) if line.startswith(f"# {label}: ")], f"{name} lacks '# {label}: '"


@pytest.mark.parametrize("name", TRAINING)
def test_the_headers_command_is_taken(name: str) -> None:
    settings = settings_of(name)
    given = content(name)
    for section, values in given.items():
        for key, value in values.items():
            assert settings[section][key] == value, f"{section}.{key}"
    data = STAGES[command_of(name)[0]].data(**settings["data"])
    assert data.batch_size == given["data"]["batch_size_per_device"]
    if settings["model"].get("encoder", SCRATCH) != SCRATCH:
        start = settings["model"]["encoder"]  # the folder of a run of another packaged config
        assert Path(start).parent == Path("runs")
        assert Path(start).name in {run_name(f"{other}.yaml") for other in NAMES if stage_of(other) == "pretrain"}


def test_each_ablation_changes_what_its_name_says_of_the_baseline() -> None:
    """Each setting is one of pre-training and has another value than in the baseline; no two ablations are the same."""
    baseline = settings_of("ablations/baseline")
    assert (baseline["model"]["size"], baseline["model"]["norm_pix_loss"]) == ("large", False)
    assert baseline["trainer"]["max_epochs"] == 800
    changes = {name: content(name) for name in ABLATIONS if name != "ablations/baseline"}
    for name, change in changes.items():
        (*_, last) = ((section, key, value) for section, keys in change.items() for key, value in keys.items())
        for section, values in change.items():
            assert values.keys() <= baseline[section].keys(), name
        assert baseline[last[0]][last[1]] != last[2], name
    assert len({yaml.safe_dump(change) for change in changes.values()}) == len(changes)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("decoder_depth_1", (84.8, 65.5)),
        ("decoder_width_1024", (84.3, 73.1)),
        ("encoder_mask_tokens", (84.2, 59.6)),
        ("target_pca", (84.6, 72.3)),
        ("augment_none", (84.0, 65.7)),
        ("mask_block_75", (82.8, 63.9)),
    ],
)
def test_ablations_quote_table_1(name: str, table: tuple[float, float]) -> None:
    (line,) = (line for line in header(f"ablations/{name}") if line.startswith("# Score: "))
    assert f"fine-tuned {table[0]:.1f} %, linear probe {table[1]:.1f} % (paper, Table 1" in line


def test_all_published_imagenet_runs_have_a_config() -> None:
    assert set(IMAGENET) == set(SCHEDULES)


@pytest.mark.parametrize("name", IMAGENET)
def test_batch_rate_and_length_are_the_published_ones(name: str) -> None:
    settings = settings_of(name)
    trainer, model, data = settings["trainer"], settings["model"], settings["data"]
    given = content(name)  # what the batch is made of stands in the file, not in a default
    processes = given["trainer"]["devices"] * given["trainer"]["num_nodes"]
    batch = given["data"]["batch_size_per_device"] * processes * given["trainer"]["accumulate_grad_batches"]
    epochs = trainer["max_epochs"]
    assert (batch, scaled_lr(model["base_lr"], batch), epochs) == pytest.approx(SCHEDULES[name], rel=1e-9)
    assert model["warmup_epochs"] < epochs
    assert trainer["precision"] is None
    assert data["image_size"] in (None, 224)
    if stage_of(name) == "pretrain":
        assert (model["betas"], model["weight_decay"], model["warmup_epochs"]) == ([0.9, 0.95], 0.05, 40)
        assert (model["mask_ratio"], model["norm_pix_loss"], data["crop_scale"]) == (0.75, True, [0.2, 1.0])
    elif stage_of(name) == "linprobe":
        assert (model["momentum"], model["trust_coefficient"], model["warmup_epochs"]) == (0.9, 0.001, 10)
        assert (model["pool"], data["crop_scale"]) == ("class", [0.08, 1.0])
    else:
        found = [model["layer_decay"], model["drop_path"], data["erase_prob"], model["weight_decay"]]
        found += [model["betas"][1], model["warmup_epochs"], model["ema_decay"]]
        assert tuple(found) == REGULARISATION[name]
        assert model["pool"] == ("mean" if name.endswith("_in1k") else "class")
        mixing = ("mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")
        assert [model[key] for key in mixing] == [0.8, 1.0, 1.0, 0.5, 0.1]
        assert (data["auto_augment"], data["crop_scale"]) == ("rand-m9-mstd0.5-inc1", [0.08, 1.0])
        assert model["min_lr"] == (1e-6 if model["pool"] == "mean" else 0)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_network_has_the_published_number_of_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = settings_of(name)["model"], size_of(name)
    # Named in the file, so that a probe or fine-tuning of a wrong encoder is refused.
    assert (model["size"], model["patch_size"]) == (size, PATCH[size])
    stage = STAGES[command_of(name)[0]].stage
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


def test_packaged_configs_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(CONFIGS / "pretrain" / "vitb16_in1k.yaml")
    for name in ("pretrain/vitb16_in1k", "pretrain/vitb16_in1k.yaml", "configs/pretrain/vitb16_in1k.yaml"):
        assert find_config(name) == path
    assert find_config("vitb16_in1k", "pretrain") == path
    assert find_config("vitb16_in1k", "linprobe") == str(CONFIGS / "linprobe" / "vitb16_in1k.yaml")
    Path("vitb16_in1k").write_text("model: {}")  # a file that exists wins
    assert find_config("vitb16_in1k", "pretrain") == "vitb16_in1k"
    assert find_config("{model: {size: base}}") == "{model: {size: base}}"
    with pytest.raises(UserError, match=r"--config pretrain/vitb16_in1 cannot be read.*mean pretrain/vitb16_in1k\?"):
        find_config("pretrain/vitb16_in1")
    with pytest.raises(UserError, match="did you mean vitl16_in1k"):
        find_config("vitl16_ink", "finetune")


def test_runs_of_packaged_configs_have_different_names() -> None:
    assert len({run_name(CONFIGS / f"{name}.yaml") for name in NAMES}) == len(NAMES)
    assert run_name("configs/pretrain/vitb16_in1k.yaml") == "pretrain_vitb16_in1k"
    assert run_name("elsewhere/my.yaml") == "my"
    over = ["my.yaml", "configs/ablations/baseline.yaml", "configs/ablations/target_pca.yaml"]
    assert run_name("configs/pretrain/vitl16_in1k.yaml", *over) == "pretrain_vitl16_in1k_baseline_target_pca"


def test_mae_configs_lists_every_config_with_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in NAMES:
        assert [line for line in lines if line.split() == [name, *header(name)[0].split()[1:]]], name


def test_every_config_is_in_the_folder_that_readers_see() -> None:
    seen = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").glob("*/*")}
    assert seen == set(NAMES)


@pytest.mark.slow
def test_the_wheel_carries_the_configs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    source = shutil.copytree(
        ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
    )
    subprocess.run([*pip, str(source), "-w", str(tmp_path)], check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("mae/configs/") for name in archive.namelist() if name.startswith("mae/configs/")}
    assert packed == {f"{name}.yaml" for name in NAMES}
