"""`mae plan`: how an effective batch is divided for devices of so much memory, and what a device will hold at most."""

import ctypes
import gc
import inspect
import json
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from jsonargparse import Namespace
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
from mae.models.vit import frozen_features
from mae.options import ToolParser, out_file, run_name
from mae.pretrain import Pretrain
from mae.runtime import memory
from mae.runtime.memory import GIB
from mae.training.optim import adamw, lars, scaled_lr
from mae.weights import load

STAGES: dict[str, type[StageCLI]] = {"pretrain": PretrainCLI, "finetune": FinetuneCLI, "probe": LinearProbeCLI}

GROUPS = ("--model.", "--data.", "--trainer.")  # settings of the run itself, which go before those of its config

SMALL = {"embed_dim": 96, "depth": 2, "num_heads": 3}  # a network to warm up with

SMALL_DECODER = {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3}

CHECK_SECONDS = 900.0


class NumbersHere(TorchFunctionMode):
    """On the meta device some versions of timm look at the values of a `linspace`, of which there are none there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        return func(*args, **({"device": "cpu"} if func is torch.linspace else {}) | kwargs)


class Run(NamedTuple):
    """What of a run decides about its memory."""

    stage: str
    model: dict[str, Any]  # arguments of the stage's class, with sizes of images and classes
    image_shape: tuple[int, int, int]
    mask_ratio: float | None
    precision: str
    compiled: bool
    device: str
    averaged: bool  # the weights

    def build(self, **small: Any) -> Pretrain | Finetune | LinearProbe:
        """On the device that is current."""
        made = STAGES[self.stage].stage(**self.model | small)
        assert isinstance(made, Pretrain | Finetune | LinearProbe)
        return made

    def sketch(self) -> Pretrain | Finetune | LinearProbe:
        """Shapes without values: nothing is computed, and no memory taken."""
        with torch.device("meta"), NumbersHere():
            return self.build()


def plan_command(args: Sequence[str]) -> None:
    parser = ToolParser(
        prog="mae plan",
        description="Batch a device, accumulation, learning rate and peak memory for an effective batch. Settings of "
        "the run (--model.*, --data.*, --trainer.*) go before those of its config.",
    )
    parser.add_argument("--config", type=str, required=True, help="Of mae pretrain, finetune or probe.")
    parser.add_argument("--images_per_step", type=int | None, default=None, help="The effective batch.")
    parser.add_argument("--device_memory_gib", type=float | None, default=None, help="Of one device, in GiB.")
    parser.add_argument("--devices", type=int, default=1, help="Of all nodes together.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="What kind of device.")
    parser.add_argument("--precision", type=str | None, default=None, help="As in training; default: the config's.")
    parser.add_argument("--compile", type=bool | None, default=None, help="Compiled blocks; default: the config's.")
    parser.add_argument("--stage", choices=[*STAGES, None], default=None, help="Where the config does not tell it.")
    parser.add_argument("--classes", type=int, default=1000, help="Of a classifier.")
    parser.add_argument("--json", type=str | None, default=None, help="Write the figures to this file, too.")
    parser.add_argument("--check", type=bool, default=False, help="Measure --check_batch images; plan nothing.")
    parser.add_argument("--check_batch", type=int, default=4, help="Images to measure the prediction with.")
    own, given = divided(args)
    options = parser.parse_args(own)
    if options.json:
        out_file(options.json, "--json")
    for key in ("devices", "classes", "check_batch"):
        if options[key] < 1:
            raise UserError(f"--{key} {options[key]}: at least 1")
    settings = read(options.config, options.stage, given)
    job = described(settings, options)
    figures = check(job, options.check_batch) if options.check else plan(job, settings, options)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def divided(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those of the run that is planned, with their values."""
    own: list[str] = []
    given: list[str] = []
    target = own
    for arg in args:
        if arg.startswith("--"):
            target = given if arg.startswith(GROUPS) else own
        target.append(arg)
    return own, given


class Settings(NamedTuple):
    stage: str
    values: Namespace  # with defaults


def read(config: str, stage: str | None, given: Sequence[str]) -> Settings:
    """A run's settings, checked as the run itself would; nothing is built, no data or weights need be there."""
    stage = stage or stage_of(Path(config), given)
    cli: Any = STAGES[stage]

    class Parsed(cli):  # type: ignore[misc]
        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

    # Required, and where the sizes come from settings it does not matter; one that is given wins.
    scratch = [] if stage == "pretrain" else [f"--model.encoder={SCRATCH}"]
    values = Parsed([*scratch, "--config", config, *given]).config
    assert isinstance(values, Namespace)
    return Settings(stage, values)


def stage_of(path: Path, given: Sequence[str]) -> str:
    """The stage that knows all settings of the model; where several do, the one that the file's name begins with.

    Raises:
        UserError: None or several.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    model = content.get("model") if isinstance(content, dict) else None
    keys = set(model) if isinstance(model, dict) else set()
    keys |= {arg.split("=")[0].removeprefix("--model.") for arg in given if arg.startswith("--model.")}
    known = {name: set(inspect.signature(cli.stage).parameters) for name, cli in STAGES.items()}
    all_known = {key for keys in known.values() for key in keys}
    fit = [name for name in STAGES if keys <= known[name]]
    if not fit:
        nobody = sorted(keys - all_known)
        what = (
            f"no stage knows model.{nobody[0]}" if nobody else f"no stage knows all of model.{', '.join(sorted(keys))}"
        )
        raise UserError(f"--config {path}: {what}; it must be one of mae {', '.join(STAGES)}")
    named = {"linprobe": "probe", "scratch": "finetune"}.get(first := run_name(path).split("_")[0], first)
    if len(fit) > 1 and named not in fit:
        raise UserError(f"--config {path} could be of {' or '.join(fit)}: say which by --stage")
    return fit[0] if len(fit) == 1 else named


def described(settings: Settings, options: Namespace) -> Run:
    stage, values = settings
    model, data = values.model.as_dict(), values.data
    defaults = DEFAULTS[data.dataset]
    image_size, in_chans = data.image_size or None, data.in_chans
    if stage != "pretrain":
        if model["encoder"] != SCRATCH:
            weights = load.read_weights(model["encoder"])
            image_size = image_size or weights.config["image_size"]
            in_chans = in_chans or weights.config["in_chans"]
            model |= {key: weights.config[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        elif model["size"] is None and model["embed_dim"] is None:
            raise UserError("the config does not say the encoder's size: add --model.encoder SRC, or --model.size")
        model |= {"encoder": SCRATCH, "classes": [str(i) for i in range(options.classes)]}
    image_size, in_chans = image_size or defaults.image_size, in_chans or defaults.in_chans
    model |= {"image_size": as_pair(image_size), "in_chans": in_chans}
    precision = options.precision or values.trainer.precision
    if precision is None:
        precision = "bf16-mixed" if options.device == "cuda" else "32-true"
    compiled = model.get("compile") is True if options.compile is None else options.compile
    shape = (in_chans, *as_pair(image_size))
    averaged = model.get("ema_decay") is not None
    if averaged:
        model["ema_decay"] = None  # a copy of the weights, which cannot be built where there is no memory
    return Run(stage, model, shape, model.get("mask_ratio"), str(precision), compiled, options.device, averaged)


def plan(job: Run, settings: Settings, options: Namespace) -> dict[str, Any]:
    images, gib, devices = options.images_per_step, options.device_memory_gib, options.devices
    if images is None or gib is None:
        raise UserError("mae plan needs --images_per_step and --device_memory_gib (or --check true, which measures)")
    if images < 1 or not gib > 0:
        raise UserError(f"--images_per_step {images}, --device_memory_gib {gib:g}: wanted are 1 or more and above 0")
    if images % devices:
        near = sorted({max(1, images // devices), images // devices + 1})
        raise UserError(
            f"--images_per_step {images} cannot be divided among {devices} devices: take "
            f"{' or '.join(str(n * devices) for n in near)}, or another --devices"
        )
    stage = job.sketch()
    pairs = isinstance(stage, Finetune) and stage.mixing is not None
    least = 2 if pairs or job.stage == "probe" else 1
    total = int(gib * GIB)
    about = (stage.model, job.image_shape, job.mask_ratio)
    how = (job.precision, job.compiled, job.device)

    def most(accumulated: bool) -> int:
        return largest_batch(*about, total, *how, accumulated=accumulated, devices=devices, averaged=job.averaged)

    def peak(batch: int, accumulated: bool) -> Footprint:
        more = {"accumulated": accumulated, "devices": devices, "averaged": job.averaged}
        return predicted_peak(*about, batch, *how, **more)

    room, whole = {True: most(True), False: most(False)}, images // devices
    if max(room.values()) < least:
        needed = peak(least, False).total / GIB
        raise UserError(
            f"--device_memory_gib {gib:g}: {least} image{'s' * (least > 1)} a device would take {needed:.2f} GiB, and "
            f"{usable(total, job.device) / GIB:.2f} are free after the reserve; what helps: {remedies(job)}"
        )
    divisors = (n for n in range(1, whole + 1) if whole % n == 0)
    fit = (n for n in divisors if least <= whole // n <= room[n > 1] and not (pairs and whole // n % 2))
    accumulate = next(fit, None)
    if accumulate is None:
        raise UserError(
            f"--images_per_step {images}: {whole} images a device cannot be divided into equal batches of {least} to "
            f"{room[True]}{', even as mixup and cutmix want them' if pairs else ''}; take another number"
        )
    batch = whole // accumulate
    found, model = peak(batch, accumulate > 1), settings.values.model
    lr = scaled_lr(model.base_lr, images)
    blocks = "compiled" if job.compiled else "not compiled"
    print(f"stage              {job.stage}, {job.precision}, blocks {blocks}, {job.device}")
    print(f"effective batch    {batch} a device x {accumulate} accumulated x {devices} devices = {images}")
    print(f"                   --data.batch_size_per_device {batch} --trainer.accumulate_grad_batches {accumulate}")
    print(
        f"learning rate      0 to {lr:.6g} in {model.warmup_epochs:g} epochs of warm-up, then down to {model.min_lr:g}"
    )
    print(f"                   peak: --model.base_lr {model.base_lr:g} x {images} / 256")
    tell(found)
    print(f"reserve            {reserve(total, job.device) / GIB:.2f} GiB of {gib:g}: {MEANT_FOR[job.device]}")
    print(f"largest batch      {room[False]} a device; {room[True]} with accumulation")
    return {
        "stage": job.stage,
        "precision": job.precision,
        "compiled": job.compiled,
        "device": job.device,
        "batch_size_per_device": batch,
        "accumulate_grad_batches": accumulate,
        "devices": devices,
        "images_per_step": images,
        "lr": lr,
        "warmup_from": 0.0,
        "min_lr": model.min_lr,
        "peak_bytes": found.total,
        **{f"{key}_bytes": value for key, value in found._asdict().items()},
        "reserve_bytes": reserve(total, job.device),
        "largest_batch": room[False],
        "largest_batch_accumulated": room[True],
    }


def tell(found: Footprint) -> None:
    print(f"predicted peak     {found.total / GIB:.3f} GiB a device, of which")
    for key, value in found._asdict().items():
        print(f"    {key:<14} {value / GIB:.3f}")


def remedies(job: Run) -> str:
    ways = ["devices with more memory"]
    if job.stage != "probe":
        ways.append("--model.activation_checkpointing true" * (not job.model.get("activation_checkpointing")))
        ways.append("--trainer.strategy fsdp2, which spreads weights over devices and is not planned here")
    if job.precision == "32-true" and job.device == "cuda":
        ways.append("--precision bf16-mixed")
    return ", ".join(way for way in ways if way)


# ---- is the prediction right? ----------------------------------------------------------------------------------------


def check(job: Run, batch: int) -> dict[str, Any]:
    """Predicted beside measured, of a few steps in a process of their own."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--check true --device cuda: there is no CUDA device here; --device cpu")
    stage = job.sketch()
    found = predicted_peak(stage.model, job.image_shape, job.mask_ratio, batch, job.precision, job.compiled, job.device)
    tell(found)
    took = measured(job, batch)
    print(f"measured peak      {took / GIB:.3f} GiB with {batch} images; predicted / measured {found.total / took:.3f}")
    return {"batch": batch, "predicted_bytes": found.total, "measured_bytes": took, "ratio": found.total / took}


def measured(job: Run, batch: int, seconds: float = CHECK_SECONDS) -> int:
    """Bytes that tensors take at most in three steps of training, in a fresh process.

    Raises:
        UserError: The steps took too long, or the process has failed, for want of memory for instance.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(theirs, job, batch), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise UserError(f"--check_batch {batch}: not done after {seconds:g} s; take fewer images")
        took: int = ours.recv()
        return took
    except EOFError:
        raise UserError(
            f"--check_batch {batch}: the process that measured has ended early; is memory enough?"
        ) from None
    finally:
        process.kill()
        process.join()


def measure(answer: Connection, job: Run, batch: int) -> None:
    device = torch.device(job.device)
    if device.type == "cpu":
        # Each tensor in a mapping of its own: else holes in the C library's heap would be counted as well.
        ctypes.CDLL(None).mallopt(memory.M_MMAP_THRESHOLD, 1 << 16)
    train(job, 2, device, **SMALL, **(SMALL_DECODER if job.stage == "pretrain" else {}))  # libraries, the compiler
    torch._dynamo.reset()
    before = settle(device)
    train(job, batch, device)
    answer.send(memory.peak(device) - before)


def settle(device: torch.device) -> int:
    """Bytes that are taken now, after all that can be given back has been; the peak counts from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        memory.reset_peak(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    memory.reset_peak(device)
    return memory.resident()


def train(job: Run, batch: int, device: torch.device, **small: Any) -> None:
    """Three optimiser steps on noise, in the order of Lightning: gradients go after the next forward pass."""
    with device:
        stage = job.build(**small)
    stage.to(device).train()
    network: Any = stage.model
    if job.compiled:
        compile_blocks(network)
    optimizer = lars(network.head, 1e-3) if isinstance(stage, LinearProbe) else adamw(network, 1e-4, 0.05, (0.9, 0.95))
    images = torch.randn(batch, *job.image_shape, device=device)
    half = PRECISIONS[job.precision]
    for _ in range(3):
        with torch.autocast(device.type, half, enabled=half != torch.float32):
            loss = loss_of(stage, images, job.mask_ratio)
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
