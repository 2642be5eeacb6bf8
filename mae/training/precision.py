"""The device and the precision of a run; a setting that Lightning would change without a word is refused."""

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
    """What `--trainer.accelerator` means on this machine: cpu, cuda, or the name as it is in the settings."""
    name = str(accelerator).lower()  # which may be a class path
    if "cpu" in name:
        return "cpu"
    if any(word in name for word in ("auto", "gpu", "cuda")) and torch.cuda.is_available():
        return "cuda"
    return "cpu" if name == "auto" and not torch.backends.mps.is_available() else name


def cuda_has_bfloat16() -> bool:
    """Whether the GPU has products in bfloat16; older ones emulate them, slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def usual_precision(device: str, sharded: bool) -> str:
    """The precision where `--trainer.precision` is not set.

    On CPUs it is always the same: the results of a run must not depend on the machine that it happens to get.

    Args:
        device: Its type.
        sharded: Whether the strategy is fsdp2, which has no scaler for 16-mixed.
    """
    if device != "cuda":
        return "32-true"
    if cuda_has_bfloat16():
        return "bf16-mixed"
    return "32-true" if sharded else "16-mixed"


def check_precision(setting: str | int | None, device: str) -> str:
    """Advice about the precision of a run, in one line; empty where there is none.

    Args:
        setting: `--trainer.precision`.
        device: Its type.

    Raises:
        UserError: There is no such precision, or this device does not compute in it.
    """
    if setting is None:
        if device == "cpu" and cpu_has_bfloat16():
            return "float32; this CPU has products in bfloat16: --trainer.precision bf16-mixed would be faster"
        return ""
    precision = SHORT.get(str(setting), str(setting))
    if precision not in PRECISIONS:
        raise UserError(f"--trainer.precision {setting} is none of {', '.join(PRECISIONS)}")
    if device == "cpu" and precision.startswith(("16-", "transformer-engine")):
        usable = "bf16-mixed or 32-true" if cpu_has_bfloat16() else "32-true"
        raise UserError(f"--trainer.precision {setting} is not for CPUs: use --trainer.precision {usable}")
    if precision.startswith("bf16"):
        if device == "cuda" and not cuda_has_bfloat16():
            raise UserError(
                f"--trainer.precision {setting}: {torch.cuda.get_device_name()} has no bfloat16; use "
                "--trainer.precision 16-mixed or 32-true"
            )
        if device == "cpu" and not cpu_has_bfloat16():
            return (
                f"mae: warning: --trainer.precision {setting}: this CPU has no products in bfloat16; they are emulated "
                "and slow, 32-true is faster"
            )
    return ""
