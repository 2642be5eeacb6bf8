"""What a run computes on and in which precision; a setting that Lightning would bend is refused."""

from typing import Any

import torch

from mae.errors import UserError
from mae.models.blocks import cpu_has_bfloat16

PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16"),
)

SHORT = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def device_type(accelerator: Any) -> str:
    """What `--trainer.accelerator` comes to on this machine: cpu, cuda, or the name as it was given."""
    name = str(accelerator).lower()  # a class path says it, too
    if "cpu" in name:
        return "cpu"
    if any(word in name for word in ("auto", "gpu", "cuda")) and torch.cuda.is_available():
        return "cuda"
    return "cpu" if name == "auto" and not torch.backends.mps.is_available() else name


def cuda_has_bfloat16() -> bool:
    """Whether the GPU multiplies bfloat16 by itself; older ones accept it and take longer than in float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def usual_precision(device: str, sharded: bool) -> str:
    """What is taken where `--trainer.precision` is not given.

    On CPUs always the same: a run must not have other results by the machine it happens to get.

    Args:
        device: Type.
        sharded: The strategy is fsdp2, which has no scaler for 16-mixed.
    """
    if device != "cuda":
        return "32-true"
    if cuda_has_bfloat16():
        return "bf16-mixed"
    return "32-true" if sharded else "16-mixed"


def check_precision(given: str | int | None, device: str) -> str:
    """What is to be said about the precision of a run, in one line; empty: nothing.

    Args:
        given: `--trainer.precision`.
        device: Type.

    Raises:
        UserError: It is none, or this device does not compute in it.
    """
    if given is None:
        if device == "cpu" and cpu_has_bfloat16():
            return "float32; this CPU multiplies bfloat16 by itself: --trainer.precision bf16-mixed would be faster"
        return ""
    precision = SHORT.get(str(given), str(given))
    if precision not in PRECISIONS:
        raise UserError(f"--trainer.precision {given} is none of {', '.join(PRECISIONS)}")
    if device == "cpu" and precision.startswith(("16-", "transformer-engine")):
        way = "bf16-mixed or 32-true" if cpu_has_bfloat16() else "32-true"
        raise UserError(f"--trainer.precision {given} is not for CPUs: use --trainer.precision {way}")
    if precision.startswith("bf16"):
        if device == "cuda" and not cuda_has_bfloat16():
            raise UserError(
                f"--trainer.precision {given}: {torch.cuda.get_device_name()} has no bfloat16; use --trainer.precision "
                "16-mixed or 32-true"
            )
        if device == "cpu" and not cpu_has_bfloat16():
            return (
                f"mae: warning: --trainer.precision {given}: this CPU has no products in bfloat16; they are emulated "
                "and slow, 32-true is faster"
            )
    return ""
