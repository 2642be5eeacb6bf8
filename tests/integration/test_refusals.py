"""A start that is refused leaves nothing behind: the file system is as it was."""

import shutil
from pathlib import Path

import pytest
from conftest import DIGITS, TINY, save_images

from mae.cli import main

SHORT = [*(word for word in TINY if not word.startswith("--wandb")), "--trainer.max_steps=3"]
PRETRAIN = ["pretrain", *DIGITS, *SHORT]
PROBE = [
    "linprobe",
    "--data.dataset=digits",
    "--data.num_workers=0",
    "--trainer.accelerator=cpu",
    "--model.encoder=enc",
]
FINETUNE = ["finetune", *PROBE[1:], "--data.auto_augment=null", "--trainer.max_steps=3"]

# By what is wrong: the command, and words of the message. `old` is a run of three steps, `enc` and `new` are not there.
REFUSALS: dict[str, tuple[list[str], str]] = {
    "no such setting": ([*PRETRAIN, "--model.mask=0.5"], "did you mean"),
    "out of range": ([*PRETRAIN, "--model.mask_ratio=1.5"], "mask_ratio"),
    "a rate that the stage refuses": ([*PRETRAIN, "--model.base_lr=-1"], "base_lr"),
    "no such data": (["pretrain", *SHORT, "--data.root=nowhere"], "nowhere"),
    "an unreadable held-out image": (["pretrain", *SHORT, "--data.root=broken", "--data.image_size=14"], "broken.png"),
    "no such weights": ([*PRETRAIN, "--model.init=enc"], "enc does not exist"),
    "a trainer that is not there": ([*PRETRAIN, "--trainer.strategy=fsdp"], "--trainer.strategy"),
    "nodes that nobody starts": ([*PRETRAIN, "--trainer.num_nodes=2"], "num_nodes"),
    "a run is there": ([*PRETRAIN, "--run_dir=old"], "old holds a run"),
    "damaged checkpoint": ([*PRETRAIN, "--run_dir=old", "--ckpt_path=torn.ckpt"], "damaged"),
    "other recipe": ([*PRETRAIN, "--run_dir=old", "--ckpt_path=last", "--model.mask_ratio=0.5"], "mask_ratio is 0.5"),
    "other network": ([*PRETRAIN, "--run_dir=old", "--ckpt_path=last", "--model.depth=2"], "depth"),
    "shorter run": ([*PRETRAIN, "--run_dir=old", "--ckpt_path=last", "--trainer.max_steps=2"], "2 optimiser steps"),
    "another run's checkpoint": (
        [*PRETRAIN, "--run_dir=new", "--ckpt_path=old/checkpoints/last.ckpt", "--data.crop_scale=[0.3,1]"],
        "crop_scale",
    ),
    "probe without its encoder": (PROBE, "enc does not exist"),
    "probe of other images": ([*PROBE[:-1], "--model.encoder=old", "--data.dataset=cifar10"], "channels"),
    "cached probe out of range": ([*PROBE[:-1], "--model.encoder=old", "--mode=cached", "--cached.epochs=0"], "epochs"),
    "cached probe without the layer": (
        [*PROBE[:-1], "--model.encoder=old", "--mode=cached", "--cached.layers=[-9]"],
        "layers",
    ),
    "fine-tuning of too many blocks": ([*FINETUNE, "--model.encoder=old", "--model.blocks=9"], "blocks"),
    "drop path without effect": ([*FINETUNE, "--model.encoder=old", "--model.drop_path=0.1"], "drop_path"),
    "fine-tuning on no such data": ([*FINETUNE, "--model.encoder=old", "--data.subset_file=list"], "list"),
}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Each path below a folder, with when it was changed and what it holds; a lock says who has had it."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        if path.name != ".lock"
        else (0, b"")
        for path in folder.rglob("*")
    }


# The others differ in the check that refuses them, not in what has been done by then.
AT_EVERY_COMMIT = ("no such data", "shorter run", "drop path without effect")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in AT_EVERY_COMMIT else pytest.mark.slow) for what in REFUSALS]
)
def test_a_refused_start_leaves_nothing_behind(
    what: str, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pretrained, "old", symlinks=True)
    (tmp_path / "torn.ckpt").write_bytes(next(Path("old/checkpoints").glob("step_*.ckpt")).read_bytes()[:-50])
    save_images(tmp_path / "broken" / "train" / "cat", 64, (14, 14))
    (tmp_path / "broken" / "val" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "val" / "cat" / "broken.png").write_bytes(b"")
    before = contents(tmp_path)
    args, words = REFUSALS[what]
    assert main(args) == 2
    assert words in capsys.readouterr().err
    assert contents(tmp_path) == before
