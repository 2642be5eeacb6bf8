"""A Lightning user's day: a plain Trainer, any DataLoader, parts of one's own, smoke tests, the functions."""

import copy
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchvision
import yaml
from conftest import DIGITS, ROOT, TINY, mae
from run_folders import few_digits, rows
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

import mae as package
from mae import Finetune, ImageData, LinearProbe, Pretrain, UserError
from mae.data.datasets import TrainSamples
from mae.launch.stages import PretrainCLI
from mae.training.module import Stage, own_arguments

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
CLASSES = ["cat", "dog", "eel"]


def stage(kind: type[Stage], **settings: Any) -> Stage:
    if kind is Pretrain:
        return Pretrain(**{"size": "nano", "warmup_epochs": 1, **SMALL, **DECODER, **settings})
    if kind is Finetune:
        settings = {"drop_path": 0.0, **settings}  # of a single block it would have no effect
    return kind(**{"encoder": "scratch", "classes": CLASSES, "warmup_epochs": 1, **SMALL, **settings})  # type: ignore[call-arg]


def trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{"max_epochs": 2, "default_root_dir": folder, **quiet, **settings})


def photographs(count: int = 32) -> Dataset[Any]:
    """torchvision's data set of made-up images, (uint8 image, label)."""
    to_uint8 = v2.Compose([v2.ToImage(), v2.Resize((16, 16))])
    return torchvision.datasets.FakeData(count, (3, 20, 20), len(CLASSES), to_uint8)


def arrow(folder: Path, count: int = 32) -> Any:
    """A data set of Hugging Face on disk."""
    datasets = pytest.importorskip("datasets")  # no version of it goes with our lowest versions of fsspec and pyarrow
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    rows = {"pixel_values": images.tolist(), "label": [i % 3 for i in range(count)]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    return datasets.load_from_disk(folder).with_format("torch", dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "origin"),
    [
        pytest.param(Pretrain, "hugging face", marks=pytest.mark.slow),
        (LinearProbe, "torchvision"),
        (Finetune, "torchvision"),
        pytest.param(Pretrain, "torchvision", marks=pytest.mark.slow),
        pytest.param(LinearProbe, "hugging face", marks=pytest.mark.slow),
        pytest.param(Finetune, "hugging face", marks=pytest.mark.slow),
    ],
)
def test_a_plain_trainer_fits_any_data_set_and_all_else_follows(kind: type[Stage], origin: str, tmp_path: Path) -> None:
    data = photographs() if origin == "torchvision" else arrow(tmp_path / "arrow")
    loader = DataLoader(data, batch_size=8)
    module, run = stage(kind), trainer(tmp_path)
    before = [p.detach().clone() for p in module.model.parameters()]
    run.fit(module, loader, loader)
    assert run.global_step == 8
    assert any(not torch.equal(a, b) for a, b in zip(before, module.model.parameters(), strict=True))
    assert {"train/loss", "val/loss"} <= run.callback_metrics.keys()
    (validated,) = run.validate(module, loader, verbose=False)
    (tested,) = run.test(module, loader, verbose=False)
    assert (
        validated["val/loss"]
        == pytest.approx(tested["test/loss"])
        == pytest.approx(float(run.callback_metrics["test/loss"]))
    )
    predicted = torch.cat(run.predict(module, loader))  # type: ignore[arg-type]
    assert predicted.shape == (32, 24 if kind is Pretrain else 3)
    # The encoder's file need not be there any more: the checkpoint has the weights.
    loaded = kind.load_from_checkpoint(run.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    assert loaded.hparams["image_size"] == 16
    assert torch.equal(predicted, torch.cat(trainer(tmp_path).predict(loaded, loader)))  # type: ignore[arg-type]


def test_it_validates_and_fits_with_our_data_module_and_resumes(tmp_path: Path) -> None:
    own = {"image_size": 28, "patch_size": 7, "in_chans": 1}
    with few_digits():
        data = ImageData(dataset="digits", num_workers=0, batch_size_per_device=100)
        data.load()
    (metrics,) = trainer(tmp_path).validate(stage(Pretrain, **own), datamodule=data, verbose=False)
    assert metrics["val/loss"] > 0
    lightning.seed_everything(0)
    whole = stage(Pretrain, **own)
    trainer(tmp_path / "whole", max_epochs=3).fit(whole, datamodule=data)
    lightning.seed_everything(0)
    first = trainer(tmp_path / "cut", max_epochs=3, limit_val_batches=0)
    cut = stage(Pretrain, **own)
    cut.on_train_epoch_end = lambda: setattr(first, "should_stop", True)  # type: ignore[method-assign]
    first.fit(cut, datamodule=data)
    path = first.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert first.global_step == 4
    again = stage(Pretrain, **own)
    trainer(tmp_path / "cut", max_epochs=3).fit(again, datamodule=data, ckpt_path=path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="of a plain Trainer goes on by its fit"):
        PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path}", f"--ckpt_path={path}"])


class Keyed(Dataset[dict[str, Tensor]]):
    """The crops of our data module as items of a plain data set, which says of each (epoch, index)."""

    def __init__(self, samples: TrainSamples, keys: list[tuple[int, int]]) -> None:
        self.samples, self.keys = samples, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        batch = self.samples[[self.keys[i]]]
        image = batch.images[0].flip(2) if batch.flip[0] else batch.images[0]
        return {"image": image, "epoch": batch.epochs[0], "index": batch.indices[0]}


def test_the_same_images_by_a_plain_loader_give_the_same_losses_to_the_bit(tmp_path: Path) -> None:
    own = {"image_size": 28, "patch_size": 7, "in_chans": 1, "mean": [0.1305], "std": [0.3079]}
    data = ImageData(dataset="digits", num_workers=0, batch_size_per_device=400)

    def losses(**source: Any) -> list[Tensor]:
        lightning.seed_everything(0)
        module, kept = stage(Pretrain, **own), []
        step = module.training_step
        module.training_step = lambda *args: kept.append(step(*args)) or kept[-1]  # type: ignore[method-assign, func-returns-value]
        trainer(tmp_path, max_epochs=1).fit(module, **source)
        return [loss.detach() for loss in kept]

    wanted = losses(datamodule=data)
    assert data.train_source is not None
    keys = [key for batch in data.train_sampler() for key in batch]
    plain = losses(train_dataloaders=DataLoader(Keyed(data.samples(data.train_source), keys), batch_size=400))
    assert len(wanted) == 10
    assert torch.equal(torch.stack(wanted), torch.stack(plain))


def test_without_keys_masks_are_replayed_by_step_and_row(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    masks: list[list[Tensor]] = []
    for _ in range(2):
        module, drawn = stage(Pretrain), []
        module.model.register_forward_pre_hook(lambda _, args, drawn=drawn: drawn.append(args[1]))
        trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, DataLoader(images, batch_size=4))
        masks.append([noise for noise in drawn if noise.device.type == "cpu"])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
    rows = torch.cat(masks[0])
    assert len(rows.unique(dim=0)) == 16  # no two images of a run hide the same patches


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(3, 16, 16)


@pytest.mark.parametrize(
    ("kind", "loader", "settings", "words"),
    [
        (Pretrain, DataLoader(torch.zeros(8, 1, 16, 16), 4), {}, r"\(4, 1, 16, 16\): the network takes 3 channels"),
        (Pretrain, DataLoader(torch.zeros(8, 3, 8, 8), 4), {}, r"\(4, 3, 8, 8\), the network takes \(3, 16, 16\)"),
        (Pretrain, DataLoader([{"x": torch.zeros(1)}] * 8, 4), {}, "has the keys x: none of pixel_values, image"),
        (Pretrain, DataLoader(torch.zeros(8, 5), 4), {}, r"images are \(4, 5\): wanted is a tensor"),
        (Pretrain, DataLoader(Endless(), 4), {}, "no length.*set limit_train_batches=N"),
        (Finetune, DataLoader(torch.zeros(8, 3, 16, 16), 4), {}, r"labels are -1 to -1 .*\(image, label\)"),
        (
            Pretrain,
            DataLoader(torch.zeros(8, 2, 16, 16, dtype=torch.uint8), 4),
            {"in_chans": 2},
            r"uint8 of 2 channels: give the module mean=\[...\] and std=\[...\]",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(
    kind: type[Stage], loader: Any, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        trainer(tmp_path).fit(stage(kind, **settings), loader)


@pytest.mark.parametrize(("scale", "warned"), [(1.0, True), (4.0, False)])
def test_floats_that_look_unnormalised_are_pointed_out(
    scale: float, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, max_epochs=1).fit(stage(Pretrain), DataLoader(torch.rand(8, 3, 16, 16) * scale, 4))
    out = capsys.readouterr().out
    assert re.search(r"first batch +\(4, 3, 16, 16\), [-\d.e]+ to [\d.]+, mean [\d.]+, std [\d.]+", out)
    assert ("lie in [0, 1]" in out) == warned


# ---- parts of one's own ----------------------------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
PARTS = {name: code for code in EXAMPLES for name in re.findall(r"class (\w+)", code)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SquareMasks", ["--model=my_parts.SquareMasks", "--model.block=2"]),
        pytest.param("SmoothL1", ["--model", "my_parts.SmoothL1", "--model.beta=0.5"], marks=pytest.mark.slow),
        pytest.param("PredictMeans", ["--model=my_parts.PredictMeans"], marks=pytest.mark.slow),
        pytest.param("Dimmed", ["--data", "my_parts.Dimmed"], marks=pytest.mark.slow),
        (
            "MyImages",
            ["--data=my_parts.MyImages", "--data.dataset=folder", "--data.in_chans=1", "--data.image_size=28"],
        ),
    ],
)
def test_the_examples_of_the_guide_change_the_run(name: str, options: list[str], tmp_path: Path) -> None:
    code = PARTS[name]
    assert len([line for line in code.splitlines() if line and not line.startswith(("#", "import", "from"))]) <= 12
    (tmp_path / "my_parts.py").write_text(code)
    more = ["--data.mean=[0.5]", "--data.std=[0.5]", "--data.batch_size_per_device=16", "--trainer.max_steps=3"]
    more += ["--trainer.log_every_n_steps=1"]
    environ = {"PYTHONPATH": str(tmp_path)}
    done = mae("pretrain", *DIGITS, *TINY, *more, *options, f"--run_dir={tmp_path / 'own'}", **environ)
    assert done.returncode == 0, done.stderr
    stock = [option for option in options if option.startswith("--data.")]
    if name == "MyImages":
        stock = []
    done = mae("pretrain", *DIGITS, *TINY, *more, *stock, f"--run_dir={tmp_path / 'stock'}")
    assert done.returncode == 0, done.stderr
    own, packaged = ([row["train/loss"] for row in rows(tmp_path / run)] for run in ("own", "stock"))
    assert len(own) == len(packaged) == 3
    assert own != packaged
    recorded = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    assert f"my_parts.{name}" in (recorded.get("model_class"), recorded.get("data_class"))
    again = [*stock, f"--run_dir={tmp_path / 'own'}", "--ckpt_path=last", "--trainer.max_steps=6"]
    if name == "SmoothL1":
        done = mae("pretrain", *DIGITS, *TINY, *more, *again, *options[:2], "--model.beta=0.25", **environ)
        assert done.returncode == 2
        assert "model.beta is 0.25, but 0.5" in done.stderr
    done = mae("pretrain", *DIGITS, *TINY, *more, *again, **environ)
    assert done.returncode == 2
    assert "decoder_pred.weight is" in done.stderr if name == "PredictMeans" else f"my_parts.{name}" in done.stderr


class Brighter(ImageData):
    def __init__(self, gain: float = 2.0, **kwargs: Any):
        super().__init__(**kwargs)

    def augment(self, image: Tensor) -> Tensor:
        return image


class EvenBrighter(Brighter):
    def __init__(self, hflip: float = 0.0, offset: int = 1, **kwargs: Any):
        super().__init__(hflip=hflip, **kwargs)


def test_arguments_that_a_subclass_adds_are_found() -> None:
    assert own_arguments(EvenBrighter(dataset="digits")) == ["offset", "gain"]
    assert own_arguments(ImageData(dataset="digits")) == []


def test_a_setting_of_ones_own_data_cannot_change_in_a_run(tmp_path: Path) -> None:
    settings = [*DIGITS, *TINY, f"--run_dir={tmp_path}", "--data=test_lightning.Brighter", "--trainer.max_steps=2"]
    with few_digits():
        PretrainCLI([*settings, "--data.gain=3"]).fit()
        with pytest.raises(UserError, match=r"data\.gain is 4\.0, but 3\.0"):
            PretrainCLI([*settings, "--data.gain=4", "--ckpt_path=last"]).fit()


def test_the_guides_plain_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(code for code in EXAMPLES if "# plain.py" in code)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["features"].shape == (64, 96)


def test_a_module_as_encoder_trains_and_must_be_given_again(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(next(code for code in EXAMPLES if "# own_encoder.py" in code), names)
    module, run = names["module"], trainer(tmp_path, max_epochs=1)
    before = module.model.encoder.blocks[0].mlp.fc1.weight.detach().clone()
    run.fit(module, DataLoader(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), batch_size=8))
    assert not torch.equal(before, module.model.encoder.blocks[0].mlp.fc1.weight)
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    with pytest.raises(UserError, match="give such a module again"):
        Pretrain.load_from_checkpoint(path)
    again = Pretrain.load_from_checkpoint(path, timm_encoder=copy.deepcopy(module.model.encoder))
    assert torch.equal(again.model.encoder.blocks[0].mlp.fc1.weight, module.model.encoder.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model=no_such_module.My", "there is no module no_such_module"),
        ("--model=mae.pretrain.Nothing", "the module mae.pretrain has no class Nothing"),
        ("--model=mae.finetune.Finetune", "is no subclass of mae.pretrain.Pretrain"),
        ("--data=nonsense", "wanted is a class"),
    ],
)
def test_a_class_that_is_none_is_one_line(option: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path}", option])


# ---- smoke tests -----------------------------------------------------------------------------------------------------


def test_fast_dev_run_goes_through_everything_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = PretrainCLI([*DIGITS, *TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.fast_dev_run=2"])
    cli.fit()
    assert cli.trainer.global_step == 2
    assert not (tmp_path / "run").exists()
    assert "nothing is kept" in capsys.readouterr().out


def test_a_run_shorter_than_its_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*DIGITS, *TINY, f"--run_dir={tmp_path}", "--model.warmup_epochs=40", "--ckpt_path=last"]
    cli = PretrainCLI([*settings, "--trainer.max_steps=20"])
    cli.fit()
    assert (
        "the warm-up of 40 epochs is 2480 optimiser steps and the run has 20: shortened to 2" in capsys.readouterr().out
    )
    assert cli.model.schedule.lr_at(2, 1.0) == 1.0
    description = package.weights.load.read_weights(str(tmp_path)).description
    assert (description["step"], description["warmup_steps"]) == (20, 2)
    with pytest.raises(
        UserError, match=r"is to have 40 optimiser steps, and was to have 20; its warm-up was shortened"
    ):
        PretrainCLI([*settings, "--trainer.max_steps=40"]).fit()
    PretrainCLI([*settings, "--trainer.max_steps=40", "--allow_changes=true"]).fit()


# ---- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_main_jobs_as_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in pkgutil.walk_packages(package.__path__, "mae."):
        importlib.import_module(module.name)
    assert not {name for name in package.__all__ if f"mae.{name}" in sys.modules}
    own: dict[str, Any] = {f"model__{key}": value for key, value in DECODER.items()}
    own |= {"model__embed_dim": 24, "model__depth": 1, "model__num_heads": 2, "model__patch_size": 7}
    shared: dict[str, Any] = {"data__batch_size_per_device": 400, "data__num_workers": 0, "wandb__mode": "disabled"}
    run = package.run_pretrain("digits", tmp_path / "run", size="nano", epochs=1, **own, **shared)
    assert isinstance(run.module, Pretrain)
    assert run.metrics["train/loss"] > 0
    assert (
        package.run_pretrain("digits", tmp_path / "run", size="nano", epochs=1, **own, **shared).metrics == run.metrics
    )
    probe = package.run_linprobe(run.encoder, "digits", tmp_path / "probe", epochs=1, **shared)
    assert 0 < probe.metrics["val/acc1"] <= 100
    folder = tmp_path / "images" / "five"
    folder.mkdir(parents=True)
    torchvision.io.write_png(torch.randint(0, 256, (1, 40, 40), dtype=torch.uint8), str(folder / "a.png"))
    capsys.readouterr()
    features, paths, labels = package.embed_images(run.encoder, tmp_path / "images")
    assert capsys.readouterr().out == "1 images\n"
    assert (features.shape, paths, labels) == ((1, 24), ["five/a.png"], ["five"])
    with pytest.raises(UserError, match="image_size: wanted is group__setting, such as data__image_size"):
        package.run_pretrain("digits", tmp_path / "other", image_size=3)
