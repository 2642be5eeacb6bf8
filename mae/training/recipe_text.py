"""The text that a run prints at its start and keeps as recipe.txt, to be read before days are spent on it."""

from pathlib import Path

from lightning.pytorch import Trainer
from torch import nn

from mae.data.datamodule import ImageData
from mae.models.flops import least_seconds
from mae.runtime.files import atomic_write_text
from mae.runtime.text import printable_lines
from mae.training import recipe_audit
from mae.training.optim import WarmupCosine, scaled_lr
from mae.training.throughput import images_per_device, images_per_step, product_dtype


def report_recipe(
    trainer: Trainer,
    network: nn.Module,
    schedule: WarmupCosine,
    base_lr: float,
    flops: float,
    notes: dict[str, str],
    folder: str | None,
) -> None:
    """Print the recipe; first rank only.

    Args:
        flops: Of an image, forward and backward.
        notes: Lines that belong to this stage alone, by their first word.
        folder: Where recipe.txt is written, which also has the name of every tensor; None: nowhere.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    batch, per_epoch = images_per_step(trainer), schedule.steps_per_epoch
    steps = round(schedule.epochs * per_epoch)
    parameters = [p.numel() for p in network.parameters()]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    left_out = ""
    if isinstance(data, ImageData):
        assert data.train_source is not None
        images = len(data.train_source)
        held_out = f"{len(data.val_source)} held out" if data.val_source else "none held out (--data.holdout 0.1 would)"
        held_out += f"; {data.layout}" if data.layout else ""
        about = {"images": f"{images} for training, {held_out}", "augmentation": "; ".join(data.augmentations())}
        left_out = f"; {images - per_epoch * batch} images of each epoch's order left out"
    else:
        about = {
            "images": "as the DataLoader gives them: masks are replayed by (seed, step, rank, row), images are not"
        }
    lines = {
        **about,
        "batch": f"{images_per_device(trainer)} a device x {trainer.accumulate_grad_batches} accumulated x "
        f"{trainer.world_size} devices = {batch} an optimiser step",
        "epoch": f"{per_epoch} optimiser steps{left_out}",
        "learning rate": f"{base_lr:g} x {batch} / 256 = {scaled_lr(base_lr, batch):g} at its peak, after "
        f"{schedule.warmup_epochs * per_epoch:g} steps of warm-up; {steps} steps in all",
        "parameters": f"{sum(parameters) / 1e6:.2f} M, of which {trained / 1e6:.2f} M are trained",
        **notes,
        "work": f"{flops / 1e9:.4g} GFLOP an image, forward and backward, in matrix products; "
        f"{flops * batch * steps:.2g} FLOP in all",
    }
    groups = recipe_audit.groups(network, trainer.optimizers[0], schedule)
    rates = " ".join(f"{rate:.3g}" for rate in recipe_audit.drop_paths(network))
    arithmetic = "\n".join(f"{key:<13} {text}" for key, text in lines.items())
    text = f"{arithmetic}\n\n{recipe_audit.table(groups)}\ndrop path by block: {rates}\n"
    print(text, flush=True)
    if cost := cost_text(trainer, flops * batch * steps):
        print(cost, flush=True)
    names = ("\n".join([f"group {i}", *(f"  {name}" for name in group.names)]) for i, group in enumerate(groups))
    if folder is None:
        return
    path = Path(folder) / "recipe.txt"
    try:
        atomic_write_text(path, printable_lines(text + "\n" + "\n\n".join(names) + "\n"))
    except OSError as error:  # it has been printed, at least
        print(f"mae: warning: {path} cannot be written: {error.strerror}", flush=True)


SLOWEST = 1e10  # FLOP/s, of any device

LONG = 3600  # seconds: what takes less is not worth a line

UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60}


def cost_text(trainer: Trainer, work: float) -> str:
    """How long a run of so many FLOP takes at least, to be read before it starts; empty for short runs.

    It is not in recipe.txt, since it depends on the machine.
    """
    device = trainer.lightning_module.device
    if work < LONG * SLOWEST:
        return ""
    seconds = least_seconds(work, device, product_dtype(trainer))
    if seconds is None or seconds / trainer.world_size < LONG:
        return ""
    seconds /= trainer.world_size
    unit = next(name for name, size in UNITS.items() if seconds >= 2 * size)
    small = ""
    if device.type == "cpu" and seconds > UNITS["days"]:
        small = "; a CPU trains small networks on small images: `mae pretrain --config pretrain/small`"
    return f"this run takes {seconds / UNITS[unit]:.0f} {unit} at least, by the rate of matrix products now{small}\n"
