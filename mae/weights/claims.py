"""What a description of weights claims, checked before anything is built by it: no tensor has to be looked at."""

from typing import Any

MOST = 1 << 16  # pixels, channels, widths, blocks, heads: what a network here may have of each at most

FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # what nonsense can raise

# Of timm's `create_model`, which would read other files or the network.
NOT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def shown(value: Any) -> str:
    """A value for an error, cut off where it is long."""
    text = repr(value[:10] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def is_number(value: Any) -> bool:
    """Whether it is a finite number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


def is_size(value: Any, pair: bool = False) -> bool:
    """Whether it is a whole number from 1 to MOST; with `pair` also two of these."""
    if pair and isinstance(value, list | tuple):
        return len(value) == 2 and all(map(is_size, value))
    return type(value) is int and 1 <= value <= MOST


def check_arguments(arguments: Any, tensors: int) -> None:
    """Check the arguments with which timm is to build a network.

    Args:
        tensors: How many there are: every block has some.

    Raises:
        ValueError: They are none, ask for other files, or for more than a network can have.
    """
    if arguments is None:
        return
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments are {shown(arguments)}")
    if asked := [key for key in NOT_ARGUMENTS if key in arguments]:
        raise ValueError(f"{asked[0]} is no argument of a network")
    for key, value in arguments.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= (tensors if key == "depth" else MOST):
                raise ValueError(f"{key} is {shown(value)}")


def check_recorded(recorded: dict[str, Any]) -> None:
    """Check the settings that other software records.

    Raises:
        ValueError: One has a value that it cannot have.
    """
    for key, value in recorded.items():
        fits = True
        if key in ("num_heads", "decoder_num_heads", "image_size"):
            fits = is_size(value, pair=key == "image_size")
        elif key in ("mask_ratio", "crop_pct", "eps"):
            fits = is_number(value) and 0 <= value <= 1
        elif key in ("mean", "std"):
            fits = isinstance(value, list | tuple) and all(map(is_number, value)) and (key == "mean" or min(value) > 0)
        elif key == "norm_pix_loss":
            fits = isinstance(value, bool)
        elif key == "classes":
            fits = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        elif key in ("pool", "activation"):
            fits = isinstance(value, str)
        if not fits:
            raise ValueError(f"{key} is {shown(value)}")
