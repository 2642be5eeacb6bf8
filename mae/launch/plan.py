"""`mae plan`: divide a global batch among devices of a given memory, and predict the peak memory of a device."""

import ctypes
import gc
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from torch import Tensor

from mae.classify import SCRATCH
from mae.data.datamodule import DEFAULTS
from mae.errors import UserError
from mae.finetune import Finetune
from mae.launch.stage_cli import StageCLI
from mae.launch.stages import FinetuneCLI, LinearProbeCLI, PretrainCLI
from mae.linprobe import LinearProbe
from mae.models.compilation import compile_blocks
from mae.models.mae import MaskedAutoencoder, as_pair
from mae.models.memory_estimate import MEANT_FOR, PRECISIONS, Footprint, largest_batch, predicted_peak, reserve, usable
from mae.models.meta_device import meta_parameters
from mae.models.vit import frozen_features
from mae.options import ToolParser, out_file, run_name
from mae.pretrain import Pretrain
from mae.runtime import memory
from mae.runtime.files import write_report
from mae.runtime.fresh_process import ProcessEnded, call_in_fresh_process
from mae.runtime.memory import GIB
from mae.runtime.run_files import read_yaml
from mae.training.optim import adamw, lars, scaled_lr
from mae.weights.load import read_weights

STAGES: dict[str, type[StageCLI]] = {"pretrain": PretrainCLI, "finetune": FinetuneCLI, "probe": LinearProbeCLI}

GROUPS = ("--model.", "--data.", "--trainer.")  # settings of the run, which override those of its config

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 3}  # a network to warm up with

SMALL_DECODER = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3}

CHECK_SECONDS = 900.0


class Run(NamedTuple):
    """The settings of a run that decide about its memory."""

    stage: str
    model: dict[str, Any]  # arguments of the stage's class, with sizes of images and classes
    image_shape: tuple[int, int, int]
    mask_ratio: float | None
    precision: str
    compiled: bool
    device: str
    averaged: bool  # a moving average of the weights is kept

    def build(self, **small: Any) -> Pretrain | Finetune | LinearProbe:
        """The stage, on the current device."""
        made = STAGES[self.stage].stage(**self.model | small)
        assert isinstance(made, Pretrain | Finetune | LinearProbe)
        return made

    def sketch(self) -> Pretrain | Finetune | LinearProbe:
        """The stage on the meta device: shapes without values or memory."""
        with meta_parameters():
            return self.build()


def plan_command(args: Sequence[str]) -> None:
    parser = ToolParser(
        prog="mae plan",
        description="Batch per device, accumulation, learning rate and peak memory for a global batch. Settings of the "
        "run (--model.*, --data.*, --trainer.*) override those of its config.",
    )
    parser.add_argument("--config", type=str, required=True, help="Of mae pretrain, finetune or probe.")
    parser.add_argument("--images_per_step", type=int | None, default=None, help="The global batch.")
    parser.add_argument("--device_memory_gib", type=float | None, default=None, help="Memory of one device, in GiB.")
    parser.add_argument("--devices", type=int, default=1, help="Number of devices on all nodes together.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Type of the devices.")
    parser.add_argument("--precision", type=str | None, default=None, help="As in training; default: the config's.")
    parser.add_argument("--compile", type=bool | None, default=None, help="Compiled blocks; default: the config's.")
    parser.add_argument("--stage", choices=[*STAGES, None], default=None, help="If the config does not say it.")
    parser.add_argument("--classes", type=int, default=1000, help="Number of classes, for a classifier.")
    parser.add_argument("--json", type=str | None, default=None, help="Also write the figures to this file.")
    parser.add_argument("--check", type=bool, default=False, help="Measure --check_batch images; plan nothing.")
    parser.add_argument("--check_batch", type=int, default=4, help="Images to measure the prediction with.")
    own, given = split_arguments(args)
    options = parser.parse_args(own)
    if options.json:
        out_file(options.json, "--json")
    for key in ("devices", "classes", "check_batch"):
        if options[key] < 1:
            raise UserError(f"--{key} {options[key]}: at least 1")
    stage, values = read_settings(options.config, options.stage, given)
    run = run_to_plan(stage, values, options)
    figures = check_prediction(run, options.check_batch) if options.check else plan(run, values.model, options)
    if options.json:
        write_report(options.json, json.dumps(figures, indent=1) + "\n")


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The planner's own arguments, and those of the run that is planned, with their values."""
    own: list[str] = []
    of_run: list[str] = []
    target = own
    for arg in args:
        if arg.startswith("--"):
            target = of_run if arg.startswith(GROUPS) else own
        target.append(arg)
    return own, of_run


def read_settings(config: str, stage: str | None, given: Sequence[str]) -> tuple[str, Any]:
    """A run's stage and settings, checked as the run itself would; data and weights need not exist."""
    stage = stage or stage_of(Path(config), given)
    cli: Any = STAGES[stage]

    class Parsed(cli):  # type: ignore[misc]
        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    # Required, though it does not matter where sizes come from the settings; one on the command line wins.
    scratch = [] if stage == "pretrain" else [f"--model.encoder={SCRATCH}"]
    return stage, Parsed([*scratch, "--config", config, *given]).config


def stage_of(path: Path, given: Sequence[str]) -> str:
    """The stage that knows all settings of the model; of several, the one that the file's name begins with.

    Raises:
        UserError: No stage or several stages fit.
    """
    model = read_yaml(path).get("model")
    keys = set(model) if isinstance(model, dict) else set()
    keys |= {arg.split("=")[0].removeprefix("--model.") for arg in given if arg.startswith("--model.")}
    known = {name: set(inspect.signature(cli.stage).parameters) for name, cli in STAGES.items()}
    fit = [name for name in STAGES if keys <= known[name]]
    if not fit:
        unknown = sorted(keys.difference(*known.values()))
        which = unknown[0] if unknown else f"{', '.join(sorted(keys))} together"
        raise UserError(f"--config {path}: no stage knows model.{which}; it must be one of mae {', '.join(STAGES)}")
    named = {"linprobe": "probe", "scratch": "finetune"}.get(first := run_name(path).split("_")[0], first)
    if len(fit) > 1 and named not in fit:
        raise UserError(f"--config {path} could be of {' or '.join(fit)}: say which by --stage")
    return fit[0] if len(fit) == 1 else named


def run_to_plan(stage: str, values: Any, options: Namespace) -> Run:
    model, data = values.model.as_dict(), values.data
    defaults = DEFAULTS[data.dataset]
    image_size, in_chans = data.image_size, data.in_chans
    not_ours = "memory is computed for the paper's ViT, not for other encoders of timm's"
    if model.get("timm_encoder") is not None:
        raise UserError(f"--model.timm_encoder {model['timm_encoder']}: {not_ours}")
    if stage != "pretrain":
        if model["encoder"] != SCRATCH:
            weights = read_weights(model["encoder"])
            if "timm_encoder" in weights.config:
                raise UserError(f"--model.encoder {model['encoder']}: {not_ours}")
            image_size = image_size or weights.config["image_size"]
            in_chans = in_chans or weights.config["in_chans"]
            model |= {key: weights.config[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        elif model["size"] is None and model["embed_dim"] is None:
            raise UserError("the config does not say the encoder's size: add --model.encoder SRC, or --model.size")
        model |= {"encoder": SCRATCH, "classes": [str(i) for i in range(options.classes)]}
    image_size, in_chans = image_size or defaults.image_size, in_chans or defaults.in_chans
    model |= {"image_size": as_pair(image_size), "in_chans": in_chans}
    usual = "bf16-mixed" if options.device == "cuda" else "32-true"
    precision = options.precision or values.trainer.precision or usual
    compiled = model.get("compile") is True if options.compile is None else options.compile
    shape = (in_chans, *as_pair(image_size))
    averaged = model.get("ema_decay") is not None
    if averaged:
        model["ema_decay"] = None  # a copy of the weights, which cannot be built where there is no memory
    return Run(stage, model, shape, model.get("mask_ratio"), str(precision), compiled, options.device, averaged)


def plan(run: Run, model: Namespace, options: Namespace) -> dict[str, Any]:
    """Divide the global batch and print what follows from it; returns the same figures.

    Raises:
        UserError: Not even the smallest batch fits, or the images cannot be divided into equal batches.
    """
    images, gib, devices = options.images_per_step, options.device_memory_gib, options.devices
    if images is None or gib is None:
        raise UserError("mae plan needs --images_per_step and --device_memory_gib (or --check true, which measures)")
    if images < 1 or not gib > 0:
        raise UserError(f"--images_per_step {images}, --device_memory_gib {gib:g}: they must be at least 1 and above 0")
    if images % devices:
        near = sorted({max(1, images // devices), images // devices + 1})
        raise UserError(
            f"--images_per_step {images} cannot be divided among {devices} devices: take "
            f"{' or '.join(str(n * devices) for n in near)}, or another --devices"
        )
    batch, accumulate, largest, peak = divide(run, images, gib, devices)
    reserved, lr = reserve(int(gib * GIB), run.device), scaled_lr(model.base_lr, images)
    blocks = "compiled" if run.compiled else "not compiled"
    print(f"stage              {run.stage}, {run.precision}, blocks {blocks}, {run.device}")
    print(f"global batch       {batch} a device x {accumulate} accumulated x {devices} devices = {images}")
    print(f"                   --data.batch_size_per_device {batch} --trainer.accumulate_grad_batches {accumulate}")
    print(
        f"learning rate      0 to {lr:.6g} in {model.warmup_epochs:g} epochs of warm-up, then down to {model.min_lr:g}"
    )
    print(f"                   peak: --model.base_lr {model.base_lr:g} x {images} / 256")
    print_footprint(peak)
    print(f"reserve            {reserved / GIB:.2f} GiB of {gib:g}: {MEANT_FOR[run.device]}")
    print(f"largest batch      {largest[False]} a device; {largest[True]} with accumulation")
    return {
        **{key: getattr(run, key) for key in ("stage", "precision", "compiled", "device")},
        "batch_size_per_device": batch,
        "accumulate_grad_batches": accumulate,
        "devices": devices,
        "images_per_step": images,
        "lr": lr,
        "warmup_from": 0.0,
        "min_lr": model.min_lr,
        "peak_bytes": peak.total,
        **{f"{key}_bytes": value for key, value in peak._asdict().items()},
        "reserve_bytes": reserved,
        "largest_batch": largest[False],
        "largest_batch_accumulated": largest[True],
    }


def divide(run: Run, images: int, gib: float, devices: int) -> tuple[int, int, dict[bool, int], Footprint]:
    """The fewest micro-batches that fit.

    Args:
        images: The global batch, a multiple of `devices`.
        gib: Memory of a device.

    Returns:
        The batch per device, how many are accumulated, the largest batch without and with accumulation, and the peak.
    """
    stage = run.sketch()
    pairs = isinstance(stage, Finetune) and stage.mixing is not None
    least = 2 if pairs or run.stage == "probe" else 1
    total, per_device = int(gib * GIB), images // devices
    about = (stage.model, run.image_shape, run.mask_ratio)
    how = (run.precision, run.compiled, run.device)
    more: dict[str, Any] = {"devices": devices, "averaged": run.averaged}
    largest = {again: largest_batch(*about, total, *how, accumulated=again, **more) for again in (False, True)}
    if max(largest.values()) < least:
        needed = predicted_peak(*about, least, *how, accumulated=False, **more).total / GIB
        raise UserError(
            f"--device_memory_gib {gib:g}: {least} image{'s' * (least > 1)} a device would take {needed:.2f} GiB, and "
            f"{usable(total, run.device) / GIB:.2f} are free after the reserve; what helps: {remedies(run)}"
        )
    for accumulate in range(1, per_device + 1):
        batch, rest = divmod(per_device, accumulate)
        if not rest and least <= batch <= largest[accumulate > 1] and not (pairs and batch % 2):
            peak = predicted_peak(*about, batch, *how, accumulated=accumulate > 1, **more)
            return batch, accumulate, largest, peak
    raise UserError(
        f"--images_per_step {images}: {per_device} images a device cannot be divided into equal batches of {least} to "
        f"{largest[True]}{', even as mixup and cutmix want them' if pairs else ''}; take another number"
    )


def print_footprint(peak: Footprint) -> None:
    print(f"predicted peak     {peak.total / GIB:.3f} GiB a device, of which")
    for key, value in peak._asdict().items():
        print(f"    {key:<14} {value / GIB:.3f}")


def remedies(run: Run) -> str:
    ways = ["devices with more memory"]
    if run.stage != "probe":
        if not run.model.get("activation_checkpointing"):
            ways.append("--model.activation_checkpointing true")
        ways.append("--trainer.strategy fsdp2, which spreads weights over devices and is not planned here")
    if run.precision == "32-true" and run.device == "cuda":
        ways.append("--precision bf16-mixed")
    return ", ".join(ways)


# ---- is the prediction right? ----------------------------------------------------------------------------------------


def check_prediction(run: Run, batch: int) -> dict[str, Any]:
    """The predicted peak beside the measured one, of a few steps in a fresh process.

    Raises:
        UserError: There is no such device, the steps took too long, or the process failed.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--check true --device cuda: there is no CUDA device here; --device cpu")
    network, shape = run.sketch().model, run.image_shape
    predicted = predicted_peak(network, shape, run.mask_ratio, batch, run.precision, run.compiled, run.device)
    print_footprint(predicted)
    try:
        measured = call_in_fresh_process(measure_peak, run, batch, seconds=CHECK_SECONDS)
    except TimeoutError:
        raise UserError(f"--check_batch {batch}: not done after {CHECK_SECONDS:g} s; take fewer images") from None
    except ProcessEnded:
        raise UserError(f"--check_batch {batch}: the process that measures ended early; is memory enough?") from None
    ratio = predicted.total / measured
    print(f"measured peak      {measured / GIB:.3f} GiB with {batch} images; predicted / measured {ratio:.3f}")
    return {"batch": batch, "predicted_bytes": predicted.total, "measured_bytes": measured, "ratio": ratio}


def measure_peak(run: Run, batch: int) -> int:
    """Bytes that tensors take at most in three steps of training; to be called in a fresh process."""
    device = torch.device(run.device)
    if device.type == "cpu":
        # Each tensor in a mapping of its own: else holes in the C library's heap would be counted as well.
        ctypes.CDLL(None).mallopt(memory.M_MMAP_THRESHOLD, 1 << 16)
    train(run, 2, device, **SMALL, **(SMALL_DECODER if run.stage == "pretrain" else {}))  # libraries, the compiler
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        before = memory.resident()
    memory.reset_peak(device)
    train(run, batch, device)
    return memory.peak(device) - before


def train(run: Run, batch: int, device: torch.device, **small: Any) -> None:
    """Three optimiser steps on noise, in the order of Lightning: gradients go after the next forward pass."""
    with device:
        stage = run.build(**small)
    stage.to(device).train()
    network: Any = stage.model
    if run.compiled:
        compile_blocks(network)
    optimizer = lars(network.head, 1e-3) if isinstance(stage, LinearProbe) else adamw(network, 1e-4, 0.05, (0.9, 0.95))
    images = torch.randn(batch, *run.image_shape, device=device)
    half = PRECISIONS[run.precision]
    for _ in range(3):
        with torch.autocast(device.type, half, enabled=half != torch.float32):
            loss = loss_of(stage, images, run.mask_ratio)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        del loss


def loss_of(stage: Pretrain | Finetune | LinearProbe, images: Tensor, mask_ratio: float | None) -> Tensor:
    network: Any = stage.model
    if isinstance(network, MaskedAutoencoder):
        noise = torch.rand(len(images), network.num_patches, device=images.device)
        loss: Tensor = network(images, noise, mask_ratio).loss
        return loss
    logits = network.head(frozen_features(network, images)) if isinstance(stage, LinearProbe) else network(images)
    return F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.long, device=images.device))
