"""What a start reads of a run folder, and that it reads it once."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DIGITS, TINY

from mae.errors import UserError
from mae.launch.resume import ResumePoint
from mae.launch.stages import PretrainCLI
from mae.options import check_ranges
from mae.runtime import checkpoint_files
from mae.runtime.checkpoint_files import step_file
from mae.weights import detect

RUN = [
    *(*DIGITS, *TINY, "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.limit_val_batches=0"),
    *("--model.warmup_epochs=0", "--data.batch_size_per_device=8", "--panels.images=1", "--ckpt_path=last"),
]


def test_a_checkpoint_is_hashed_opened_and_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*RUN, f"--run_dir={tmp_path}"]
    PretrainCLI([*settings, "--trainer.max_steps=1"]).fit()
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(checkpoint_files, "damage", counted("hashed", checkpoint_files.damage))
    monkeypatch.setattr(torch, "load", counted("opened", torch.load))
    monkeypatch.setattr(detect, "count_non_finite", counted("tensors looked through", detect.count_non_finite))
    cli = PretrainCLI([*settings, "--trainer.max_steps=2"])
    tensors = len(cli.model.model.state_dict())
    cli.fit()
    assert cli.model.global_step == 2
    assert cli.model.resumed_at == 1
    assert calls == {"hashed": 1, "opened": 1, "tensors looked through": tensors}


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    settings = [*RUN, f"--run_dir={tmp_path}"]
    cli = PretrainCLI([*settings, "--trainer.max_steps=1"])
    cli.fit()
    path = step_file(tmp_path, 1)
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.mask_token"].fill_(torch.nan)
    checkpoint_files.write(content, path)
    with pytest.raises(UserError, match="mask_token has numbers that are not finite"):
        PretrainCLI([*settings, "--trainer.max_steps=2"])


def test_weights_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors holds weights without the state of a run; --model.init"):
        ResumePoint(tmp_path, str(path), allow_changes=False)


@pytest.mark.parametrize(
    ("interval", "good", "bad", "words"),
    [
        ("[0, 1)", [0, 0.5, None, [0.1, 0.9]], [1, -0.1, [0.5, 1]], "at least 0 and below 1"),
        ("[0, 1]", [0, 1], [1.1], "at least 0 and at most 1"),
        ("(0, inf)", [1e-9, 1e9], [0, float("nan")], "above 0"),
    ],
)
def test_a_setting_out_of_its_range_is_named(interval: str, good: list[Any], bad: list[Any], words: str) -> None:
    for value in good:
        check_ranges("model", interval, key=value)
    for value in bad:
        with pytest.raises(UserError) as error:
            check_ranges("model", interval, key=value)
        assert str(error.value) == f"--model.key {value}: it must be {words}"


@pytest.mark.parametrize(("crop_pct", "refused"), [("0.9", True), ("1", False)])
def test_evaluation_pixels_of_a_run_stay_as_it_began(tmp_path: Path, crop_pct: str, refused: bool) -> None:
    """A run of the time before its checkpoints said how; digits that are not resized are the same either way."""
    settings = [*RUN, f"--run_dir={tmp_path}", f"--data.crop_pct={crop_pct}"]
    PretrainCLI([*settings, "--trainer.max_steps=1"]).fit()
    path = step_file(tmp_path, 1)
    content = torch.load(path, weights_only=True)
    del content["mae"]["recipe"]["evaluation pixels"]
    checkpoint_files.write(content, path)
    if refused:
        with pytest.raises(UserError, match="pixels is resized, then cropped, but cropped, then resized in the run"):
            PretrainCLI([*settings, "--trainer.max_steps=2"]).fit()
    cli = PretrainCLI([*settings, "--trainer.max_steps=2", *(["--allow_changes=true"] if refused else [])])
    cli.fit()
    assert cli.model.global_step == 2
