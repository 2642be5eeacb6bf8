"""What can go wrong while a run trains, as errors of one line that name the cause and how to go on."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mae.data.datasets import worker_death_message
from mae.errors import LoaderDied, PeerLost, Stopped, TrainingFailed, UserError
from mae.runtime.environment import is_first_rank
from mae.runtime.memory import is_out_of_memory
from mae.runtime.processes import lost_peer
from mae.training.lightning_internals import child_processes, end_with_lost_ranks


@contextmanager
def translated_errors(
    trainer: Trainer, resume_hint: Callable[[], str], out_of_memory: Callable[[], str]
) -> Iterator[None]:
    """Translate the errors of Lightning, torch and the loader processes that training inside is known to end with.

    Args:
        resume_hint: How to go on with the run, as a part of a sentence.
        out_of_memory: The message where the device has no memory left.

    Raises:
        UserError: The settings of the trainer do not fit, or memory does not suffice.
        LoaderDied, PeerLost: Another process that the run needs is gone.
        KeyboardInterrupt: After a second Ctrl-C, which Lightning turns into exit code 1.
    """
    end_with_lost_ranks(lambda: f"; {resume_hint()}")
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(f"--trainer: {error}") from None
    except SystemExit:
        if trainer.interrupted:  # by a second Ctrl-C, before the first was obeyed
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        # Every rank ends by itself with an error. Lightning's observer would end this one in the middle of its message,
        # as soon as it sees another one gone.
        child_processes(trainer).clear()
        if isinstance(error, UserError | TrainingFailed | Stopped):
            raise
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold the activations
            message = out_of_memory()
            if trainer.global_rank and not is_first_rank():
                print(f"mae: error: rank {trainer.global_rank}: {message}", file=sys.stderr, flush=True)
            raise UserError(message) from None
        if message := worker_death_message(error) or "":
            raise LoaderDied(f"{message}; {resume_hint()}") from None
        if trainer.world_size > 1 and (message := lost_peer(error) or ""):
            raise PeerLost(f"rank {trainer.global_rank}: {message}; {resume_hint()}") from None
        raise
