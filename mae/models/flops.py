"""Work and rate: the matrix products of a training step, and how fast a device can do them.

One multiplication and addition are two FLOPs. Only matrix products count, as everywhere in the literature.
"""

import time
import warnings
from collections.abc import Callable

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mae.models.blocks import kernel
from mae.runtime.device_clock import wait_for

SIZES = (1024, 2048, 3072, 4096)  # of the square products whose best rate is a device's

TRIES = 3


def training_flops(network: nn.Module, loss: Callable[..., Tensor], *shape: int) -> int:
    """FLOPs of one image, forward and backward, as they are executed; what is not trained has no backward pass.

    Counted on a network without memory (torch's meta device), attention as its two products and their derivatives:
    activation checkpointing and fused kernels, which do some products twice, have the same count.

    Args:
        loss: From the network, called with images, to a tensor to be summed and derived.
        shape: Of an image: (C, H, W).
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {key: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for key, t in tensors.items()}
    modes = [(module, module.training) for module in network.modules()]
    network.eval()  # neither compiled nor computed twice
    try:
        with kernel("plain"), FlopCounterMode(display=False) as counter, torch.enable_grad():
            images = torch.empty(1, *shape, device="meta")
            call = lambda *args, **kwargs: functional_call(network, meta, args, kwargs)  # noqa: E731
            loss(call, images).sum().backward()
    finally:
        for module, mode in modes:
            module.training = mode
    total: int = counter.get_total_flops()
    return total


def product_rate(
    device: torch.device, dtype: torch.dtype, size: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """FLOP/s of one square matrix product, `size` by `size`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b  # takes its memory and chooses a kernel
    wait_for(device)
    start = clock()
    torch.mm(a, b, out=out)
    wait_for(device)
    return 2 * size**3 / (clock() - start)


def product_rates(
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = 2.0,
    tries: int = TRIES,
) -> list[float]:
    """FLOP/s of square products from 512 up to 4096, the best of some tries each; their maximum is the device's rate.

    Args:
        seconds: Sizes whose product would take longer are left out.
    """
    rates = [product_rate(device, dtype, 512, clock)]
    for size in SIZES:
        if 2 * size**3 / max(rates) > seconds:
            break
        rates.append(max(product_rate(device, dtype, size, clock) for _ in range(tries)))
    return rates


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products that the maker of a device names; None where Lightning does not know it, as of CPUs.

    Not measured in its place: what a CPU reaches in a moment depends on its neighbours and its clock, and a run's MFU
    came out above 1.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells which chips it does not know
        known = get_available_flops(device, dtype)
    return float(known) if known else None


def least_seconds(work: float, device: torch.device, dtype: torch.dtype) -> float | None:
    """How long so many FLOP take at least: at the maker's rate, or on a CPU at one that is measured now, in a moment.

    None where neither is known. torch's global generator is left as it is.
    """
    rate = peak_rate(device, dtype)
    if rate is None and device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            rate = max(product_rates(device, dtype, seconds=0.05))
    return None if rate is None else work / rate
