"""The recipe audit: with what each parameter will really be trained, and a refusal where a setting has no effect.

Everything here is read from the optimiser, the schedule and the network, never from the settings: a table of the
settings would look right where the training is wrong.
"""

import re
from typing import NamedTuple

from timm.layers import DropPath
from torch import nn
from torch.optim import Optimizer

from mae.errors import UserError
from mae.training.optim import WarmupCosine


class ExpectedGroups(NamedTuple):
    """What the settings promise of the parameter groups and of the blocks."""

    weight_decay: float = 0.0  # some parameters have it
    layer_decay: float = 1.0  # below 1: learning rates fall from head to stem
    drop_path: float = 0.0  # of the deepest block that is trained
    trust_ratio: bool = False  # LARS: on matrices and on nothing else


class Group(NamedTuple):
    """One parameter group of an optimiser, as it is."""

    names: list[str]
    parameters: int
    lr: float  # now
    peak: float  # at the top of the schedule
    weight_decay: float
    scale: float  # what the schedule is multiplied by


def groups(network: nn.Module, optimizer: Optimizer, schedule: WarmupCosine) -> list[Group]:
    names = {id(p): name for name, p in network.named_parameters()}
    result = []
    for group, peak in zip(optimizer.param_groups, schedule.peaks(), strict=True):
        parameters = group["params"]
        count = sum(p.numel() for p in parameters)
        scale = group.get("lr_scale", 1.0)
        result.append(Group([names[id(p)] for p in parameters], count, group["lr"], peak, group["weight_decay"], scale))
    return result


def table(audited: list[Group]) -> str:
    lines = ["group  tensors  parameters   lr now  lr peak  weight decay  layer scale  which"]
    for i, g in enumerate(audited):
        lines.append(
            f"{i:>5}  {len(g.names):>7}  {g.parameters / 1e6:>8.3f} M  {g.lr:>7.1e}  {g.peak:>7.1e}  "
            f"{g.weight_decay:>12g}  {g.scale:>11.5f}  {shorten(g.names)}"
        )
    return "\n".join(lines)


def shorten(names: list[str], width: int = 60) -> str:
    """As many names as fit into `width` characters, with the numbers of blocks as ranges."""
    patterns: dict[str, list[int]] = {}
    for name in names:
        numbers = re.search(r"blocks\.(\d+)\.", name)
        key = re.sub(r"blocks\.\d+\.", "blocks.#.", name)
        patterns.setdefault(key, []).extend([int(numbers[1])] if numbers else [])
    texts = []
    for pattern, blocks in patterns.items():
        span = f"{min(blocks)}-{max(blocks)}" if len(set(blocks)) > 1 else "".join(map(str, set(blocks)))
        texts.append(pattern.replace("#", span))
    shown = ""
    for i, text in enumerate(texts):
        longer = f"{shown}, {text}" if shown else text
        if len(longer) > width and shown:
            return f"{shown} and {len(texts) - i} more"
        shown = longer
    return shown


def drop_paths(network: nn.Module) -> list[float]:
    """The rate at which each block of the encoder drops its branches; 0 where it has no such layer."""
    encoder = getattr(network, "encoder", network)
    rates = []
    for block in getattr(encoder, "blocks", ()):
        probabilities = {
            module.drop_prob for module in block.modules() if isinstance(module, DropPath) and module.training
        }
        rates.append(max(probabilities, default=0.0))
    return rates


def check(network: nn.Module, optimizer: Optimizer, schedule: WarmupCosine, expected: ExpectedGroups) -> None:
    """Refuse a run in which a setting would have no effect.

    Raises:
        UserError: Names the setting and what is missing.
    """
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    frozen = {id(p): name for name, p in network.named_parameters() if not p.requires_grad}
    if len(grouped) != len(set(grouped)):
        raise UserError("a parameter is in two groups of the optimiser")
    if forgotten := [name for key, name in trained.items() if key not in set(grouped)]:
        raise UserError(f"{forgotten[0]} is to be trained, but no group of the optimiser has it")
    if wrong := [frozen.get(key, "a foreign parameter") for key in grouped if key not in trained]:
        raise UserError(f"{wrong[0]} is in a group of the optimiser, but is frozen")

    audited = groups(network, optimizer, schedule)
    if expected.weight_decay and {g.weight_decay for g in audited} != {0.0, expected.weight_decay}:
        raise UserError(
            f"--model.weight_decay {expected.weight_decay} has no effect: the groups have "
            f"{sorted({g.weight_decay for g in audited})}; set it to 0"
        )
    if not expected.weight_decay and any(g.weight_decay for g in audited):
        raise UserError("a group of the optimiser decays its weights, but --model.weight_decay is 0")
    scales = {g.scale for g in audited}
    if (expected.layer_decay < 1) != (min(scales) < 1):
        raise UserError(
            f"--model.layer_decay {expected.layer_decay} has no effect: every group that is trained has the scale "
            f"{max(scales):g}; set it to 1"
        )
    # The scale must reach the rate: a group that carries one which the schedule does not read is the classic mistake.
    top = max(g.peak / g.scale for g in audited)
    for g in audited:
        if abs(g.peak - top * g.scale) > 1e-9 * top:
            raise UserError(f"the layer scale {g.scale:g} of {g.names[0]} is not in its learning rate {g.peak:g}")
    rates = drop_paths(network)
    if abs(max(rates, default=0.0) - expected.drop_path) > 1e-6:  # timm's rates are float32
        raise UserError(
            f"--model.drop_path {expected.drop_path} has no effect: the blocks that are trained have {rates}; "
            "set it to 0"
        )
    for group in optimizer.param_groups:
        matrices = {p.ndim > 1 for p in group["params"]}
        if expected.trust_ratio and matrices != {bool(group.get("always_adapt"))}:
            raise UserError("LARS would not scale the weight, or would scale the bias, by its trust ratio")


def check_gradients(network: nn.Module) -> None:
    """Check, after a backward pass, that trained parameters have a gradient and frozen ones have none.

    Raises:
        UserError: Names the parameter.
    """
    for name, p in network.named_parameters():
        if p.requires_grad and p.grad is None:
            raise UserError(f"{name} is to be trained, but the loss does not depend on it")
        if not p.requires_grad and p.grad is not None:
            raise UserError(f"{name} is frozen, but has a gradient")
