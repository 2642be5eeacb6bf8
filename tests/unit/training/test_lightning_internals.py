"""Each use of Lightning's internals does its job with the installed Lightning; if not, a sentence says what changed."""

import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.nn.parallel import DistributedDataParallel

from mae.training import lightning_internals as internals


class Recorder(Callback):
    """What happens, in order; `do` is called at the start of training, `each` after every micro-batch."""

    def __init__(self, do: Any = lambda trainer: None, each: Any = lambda trainer: None) -> None:
        self.do, self.each, self.events = do, each, list[str]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.do(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.events.append(f"step {trainer.global_step}")
        self.each(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append("validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append("epoch end")


def trained(recorder: Recorder, folder: Path, prepare: Any = lambda trainer: None, **settings: Any) -> Trainer:
    """A run of 4 micro-batches, unless settings say otherwise."""
    settings = {"max_steps": 4, "limit_train_batches": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0} | settings
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[recorder],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    prepare(trainer)
    trainer.fit(BoringModel())
    return trainer


pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_run_without_limits_goes_on_until_it_is_told_to_stop(tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        trainer.should_stop = trainer.global_step == 10

    recorder = Recorder(each=stop)
    trainer = trained(recorder, tmp_path, internals.remove_limits, max_epochs=1)
    assert trainer.global_step == 10, "Lightning limits training by more than fit_loop.max_epochs and max_steps"


def test_validation_comes_when_it_is_due(tmp_path: Path) -> None:
    recorder = Recorder()

    def prepare(trainer: Trainer) -> None:
        internals.validate_when(trainer, lambda: trainer.global_step == 2)

    trained(recorder, tmp_path, prepare)
    assert recorder.events == ["step 1", "step 2", "validation", "step 3", "step 4", "epoch end"], (
        "Lightning no longer asks the epoch loop's _should_check_val_fx whether validation is due"
    )


def test_lightning_leaves_signals_alone(tmp_path: Path) -> None:
    handlers: list[Any] = []

    def note(trainer: Trainer) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))

    usual = signal.getsignal(signal.SIGTERM)
    trained(Recorder(note), tmp_path)
    trained(Recorder(note), tmp_path, internals.disable_signal_handling)
    assert handlers[0] != usual, "Lightning no longer handles SIGTERM itself: disable_signal_handling may go"
    assert handlers[1] == usual, "Lightning installs signal handlers elsewhere than in register_signal_handlers"


def test_ranks_are_not_asked_about_sigterm_before_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: asked.append("broadcast"))
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", devices=1)
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor"), (
        "Lightning's epoch loop has no _broadcast_sigterm_tensor any more: see how it tells ranks of SIGTERM now"
    )
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert asked == ["broadcast"], "Lightning's _broadcast_sigterm_tensor no longer broadcasts"
    internals.disable_signal_handling(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert asked == ["broadcast"], "disable_signal_handling leaves Lightning's broadcast before each batch in place"
    names = _TrainingEpochLoop.advance.__code__.co_names
    assert "_broadcast_sigterm_tensor" in names, "Lightning's advance no longer calls _broadcast_sigterm_tensor"


def test_micro_batches_are_counted_within_an_epoch(tmp_path: Path) -> None:
    counts: list[int] = []
    recorder = Recorder(each=lambda trainer: counts.append(internals.micro_batches_begun(trainer)))
    trained(recorder, tmp_path, max_steps=4, accumulate_grad_batches=2)
    assert counts == [1, 2, 3, 4] * 2, "Lightning no longer counts micro-batches in batch_progress.current.ready"


def test_the_global_step_can_be_set(tmp_path: Path) -> None:
    recorder = Recorder(lambda trainer: internals.set_global_step(trainer, 7))
    trained(recorder, tmp_path, max_steps=9)
    assert recorder.events[:2] == ["step 8", "step 9"], (
        "trainer.global_step no longer is the progress of the optimiser in automatic_optimization"
    )


def test_the_end_of_an_epoch_can_be_made_up_for(tmp_path: Path) -> None:
    for validate, wanted in ((True, ["validation", "epoch end"]), (False, ["epoch end"])):
        recorder = Recorder(lambda trainer, validate=validate: internals.finish_epoch(trainer, validate))
        trained(recorder, tmp_path, max_steps=1)
        assert recorder.events[: len(wanted)] == wanted, (
            "Lightning no longer validates by val_loop.run(), or calls callbacks otherwise than by _call_callback_hooks"
        )
        assert recorder.events[len(wanted)] == "step 1", "after a validation out of turn training does not go on"


def test_options_reach_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, Any] = {}
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")], static_graph=True)
    internals.ddp_options(strategy)["gradient_as_bucket_view"] = True
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, **kwargs: passed.update(kwargs))
    strategy._setup_model(torch.nn.Linear(1, 1))
    assert passed.get("static_graph") is True, "DDPStrategy no longer keeps DDP's options in _ddp_kwargs"
    assert passed.get("gradient_as_bucket_view") is True, "DDPStrategy no longer passes _ddp_kwargs on to DDP"


def test_the_processes_of_other_ranks_are_known(tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", devices=2, strategy="ddp")
    launcher = trainer.strategy.launcher
    assert isinstance(launcher, _SubprocessScriptLauncher), "Lightning starts the ranks by another launcher"
    assert internals.child_processes(trainer) is getattr(launcher, "procs", None), (
        "Lightning's launcher no longer keeps the processes that it has started in `procs`"
    )
    assert "procs" in _SubprocessScriptLauncher.launch.__code__.co_names, "Lightning watches another list than `procs`"
    alone = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", devices=1)
    assert internals.child_processes(alone) == []


@pytest.mark.parametrize("how", ["exit 2", "exit 3", "kill -SEGV $$"])
def test_a_lost_rank_ends_the_first_one_by_our_rule(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    def first_rank() -> None:
        internals.end_with_lost_ranks(lambda: "; start it again")
        rank = subprocess.Popen(["sh", "-c", how])
        rank.wait()
        _ChildProcessObserver(os.getpid(), [rank])._run()

    process = multiprocessing.get_context("fork").Process(target=first_rank)
    process.start()
    process.join(60)
    said = "Lightning's observer no longer calls _terminate_all where a rank has failed"
    assert process.exitcode == (2 if how == "exit 2" else 1), said
    line = "mae: error: another process of the run is gone (rank 1, by SIGSEGV); start it again\n"
    assert capfd.readouterr().err == (line if "SEGV" in how else "")


def test_the_device_mesh_has_the_sizes_that_are_set() -> None:
    strategy = ModelParallelStrategy()
    names = ModelParallelStrategy.setup_environment.__code__.co_names
    for name in ("_data_parallel_size", "_tensor_parallel_size"):
        assert hasattr(strategy, name), f"ModelParallelStrategy has no {name} any more: where are its sizes now?"
        assert name in names, f"ModelParallelStrategy.setup_environment does not make its mesh by {name} any more"
    internals.set_parallel_sizes(strategy, data=3, tensor=1)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (3, 1)


def test_the_state_of_a_run_can_be_had_without_a_file(tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    trained(Recorder(each=lambda trainer: states.append(internals.dump_checkpoint(trainer))), tmp_path, max_steps=1)
    wanted = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "callbacks"}
    assert wanted <= states[0].keys(), "Lightning's dump_checkpoint leaves out what a run needs to go on"


class Base(LightningModule):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        internals.save_arguments(self)


class Derived(Base):
    def __init__(self, depth: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_the_arguments_of_all_constructors_are_saved_whoever_calls_them() -> None:
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

    with _given_hyperparameters_context({"width": 9, "_instantiator": "x"}, "x"):  # as the command line does
        module = Derived(depth=3, width=4)
    assert dict(module.hparams) == {"depth": 3, "width": 4}, "save_hyperparameters() no longer takes given_hparams=None"


def test_a_module_without_trainer_has_none_attached(tmp_path: Path) -> None:
    assert internals.attached_trainer(BoringModel()) is None, "a module keeps its trainer under another name"
    trainer = trained(Recorder(), tmp_path)
    assert internals.attached_trainer(trainer.lightning_module) is trainer


def test_micro_batches_of_an_epoch_are_known_before_it_begins(tmp_path: Path) -> None:
    found = []

    class Counting(BoringModel):
        def configure_optimizers(self) -> Any:
            found.append(internals.training_batches(self.trainer))
            return super().configure_optimizers()

    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, max_steps=1, limit_train_batches=7)
    trainer.fit(Counting())
    assert found == [7.0], "trainer.fit_loop.setup_data() no longer counts the batches of an epoch"
