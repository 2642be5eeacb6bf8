"""Everything that this project uses of Lightning and that Lightning does not promise to keep, in one place.

Each function says what it is for. tests/unit/training/test_lightning_internals.py runs each against the installed
Lightning and says what has changed where one no longer does its job.
"""

import inspect
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.parsing import save_hyperparameters
from torch import nn

from mae.models.timm_encoder import A_MODULE
from mae.runtime.watchdog import write_to_stderr


def save_arguments(module: LightningModule) -> None:
    """As `module.save_hyperparameters()` in a constructor that the constructors of subclasses call, and always plain.

    Lightning's command line would put its own instantiator into the hyper-parameters, which needs jsonargparse and
    leaves out what is linked to the data; `load_from_checkpoint` then builds another network or none.
    """
    frame = inspect.currentframe()
    assert frame is not None
    module._log_hyperparams = True
    save_hyperparameters(module, frame=frame.f_back)
    for arguments in vars(module)["_hparams"], vars(module)["_hparams_initial"]:
        for name, value in arguments.items():
            if isinstance(value, nn.Module):  # its weights are in the state_dict, its code in no file
                arguments[name] = f"{A_MODULE}{type(value).__name__}"


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer of a module, None where it has none: `module.trainer` raises then."""
    return module._trainer


def training_batches(trainer: Trainer) -> float:
    """Micro-batches of an epoch on this rank, infinite where the loader has no length; sets up the loader."""
    trainer.fit_loop.setup_data()
    return float(trainer.num_training_batches)


def remove_limits(trainer: Trainer) -> None:
    """Let the training loop run until `trainer.should_stop`.

    The end of a run is a number of optimiser steps and is decided by `Stage`. Lightning's count of epochs starts again
    from 0 at each restart, and a run that is resumed after its last step must still enter the loop, because the
    validation of that step may not have been done.
    """
    trainer.fit_loop.max_epochs = trainer.fit_loop.epoch_loop.max_steps = -1


def validate_when(trainer: Trainer, due: Callable[[], bool]) -> None:
    """Have `due` decide, after each micro-batch, whether validation follows.

    Lightning decides by the number of batches since the start or restart, which in a run that was resumed in the middle
    of an epoch is another place than in a run that was never stopped.
    """
    trainer.fit_loop.epoch_loop._should_check_val_fx = lambda data_fetcher: due()  # type: ignore[method-assign]


def disable_signal_handling(trainer: Trainer) -> None:
    """Keep Lightning from installing signal handlers and from asking all ranks about SIGTERM.

    Its handlers save and broadcast inside the handler, where ranks can wait for each other forever. Its training loop
    broadcasts a flag before each micro-batch, which makes the device wait. `mae.runtime.signals` takes their place.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def micro_batches_begun(trainer: Trainer) -> int:
    """How many micro-batches of the current epoch have been started, to know whether an accumulation window is open."""
    ready: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return ready


def set_global_step(trainer: Trainer, step: int) -> None:
    """Set `trainer.global_step`, a read-only property, to the optimiser step of a checkpoint.

    Lightning would restore it with the state of its loops, which our checkpoints leave out: the place in a run is its
    number of optimiser steps and nothing else.
    """
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.ready = progress.completed = step


def finish_epoch(trainer: Trainer, validate: bool) -> None:
    """Do what Lightning's loop does after the last step of an epoch.

    For a run that was stopped exactly there and is resumed: Lightning would start with the next epoch.
    """
    if validate:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
    call._call_callback_hooks(trainer, "on_train_epoch_end")


def ddp_options(strategy: DDPStrategy) -> dict[str, Any]:
    """The keyword arguments that the strategy will pass to `DistributedDataParallel`; changes to them take effect.

    Lightning takes them from the settings only, and our defaults depend on the number of accumulated micro-batches.
    """
    options: dict[str, Any] = strategy._ddp_kwargs
    return options


def child_processes(trainer: Trainer) -> "list[subprocess.Popen[bytes]]":
    """The processes of the other ranks, where Lightning's own launcher started them from this one; else none.

    Lightning holds this list, too, and its observer thread kills this process as soon as one of them is gone. Emptying
    the list ends that.
    """
    children: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    return children


def end_with_lost_ranks(hint: Callable[[], str] = lambda: "") -> None:
    """End this process with one line and exit code 1, or a failed rank's 2, where a rank that it has started fails.

    Lightning's observer, a thread, would kill this process: without a word, and with another exit code (-9).

    Args:
        hint: How to go on, for the end of the line.
    """

    def end(observer: subprocess_script._ChildProcessObserver) -> None:
        codes = {rank: process.returncode for rank, process in enumerate(observer._child_processes, start=1)}
        rank, code = next((rank, code) for rank, code in codes.items() if code)
        for process in observer._child_processes:
            process.kill()
        if code < 0:  # else it has said itself what is wrong
            line = (
                f"mae: error: another process of the run is gone (rank {rank}, by {signal.Signals(-code).name}){hint()}"
            )
            write_to_stderr(f"{line}\n".encode())
        os._exit(2 if code == 2 else 1)

    observers: Any = subprocess_script._ChildProcessObserver
    observers._terminate_all = end


def set_parallel_sizes(strategy: ModelParallelStrategy, data: int, tensor: int) -> None:
    """Set the shape of the device mesh: Lightning's defaults divide by node, ours by all processes of the run."""
    strategy._data_parallel_size, strategy._tensor_parallel_size = data, tensor


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """What `trainer.save_checkpoint` would write, without writing it, to measure what a copy of it costs."""
    state: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return state
