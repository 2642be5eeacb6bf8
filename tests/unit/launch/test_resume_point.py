"""What a start reads of a run folder, and that it reads it once."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DIGITS, TINY

from mae.errors import TrainingFailed, UserError
from mae.launch.stages import PretrainCLI
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


def test_checkpoints_that_are_not_finite_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an earlier version may have left them."""
    settings = [*RUN, f"--run_dir={tmp_path}", "--checkpoint.every_n_steps=1"]
    PretrainCLI([*settings, "--trainer.max_steps=3"]).fit()
    for step, part in ((3, "weights"), (2, "optimiser's state"), (1, "weights")):
        content = torch.load(step_file(tmp_path, step), weights_only=True)
        state = content["state_dict"] if part == "weights" else content["optimizer_states"][0]["state"][0]
        state["model.mask_token" if part == "weights" else "exp_avg"].flatten()[0] = torch.nan
        checkpoint_files.write(content, step_file(tmp_path, step))
        if step == 1:
            break
        cli = PretrainCLI([*settings, "--trainer.max_steps=3"])
        assert cli.resume.step == step - 1
        assert f"going on from step_{step - 1:07d}.ckpt" in capsys.readouterr().out
    with pytest.raises(UserError, match="mask_token has numbers that are not finite"):
        PretrainCLI([*settings, "--trainer.max_steps=3"])
    with pytest.raises(UserError, match=r"step_0000002\.ckpt cannot be used: the optimiser's state has numbers"):
        PretrainCLI([*settings[:-1], "--trainer.max_steps=3", f"--ckpt_path={step_file(tmp_path, 2)}"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    settings = [*RUN, f"--run_dir={tmp_path}", "--checkpoint.every_n_steps=1", "--trainer.max_steps=3"]
    cli = PretrainCLI(settings)
    step = cli.model.on_before_zero_grad

    def spoil(*args: Any) -> None:
        step(*args)
        if cli.trainer.global_step == 1:  # what the step after the first one makes of finite gradients
            cli.model.model.decoder_pred.bias.data[0] = torch.inf

    cli.model.on_before_zero_grad = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingFailed, match=r"the weights are not finite after step 2 .*step_0000001.ckpt. Lower"):
        cli.fit()
    assert checkpoint_files.saved(tmp_path)[0] == step_file(tmp_path, 1)


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
