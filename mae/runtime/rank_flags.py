"""Small numbers that the ranks of a run exchange at the end of every optimiser step, without making it wait."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mae.errors import UserError


class Agreement:
    """The maximum over all ranks of a few integers, the same on every rank after the same step.

    The exchange is over gloo, on the CPU, whatever backend the gradients use, so that no step waits for the device.
    Values of one step arrive after the next one; where they must arrive at once, all ranks wait.
    """

    def __init__(self) -> None:
        """
        Raises:
            UserError: gloo cannot connect the nodes.
        """
        self.group: Any = None  # the process group, where there are other ranks
        self.under_way: tuple[Tensor, dist.Work] | None = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            try:
                self.group = dist.new_group(backend="gloo")
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"the processes of the run cannot reach each other over gloo: {reason}; set GLOO_SOCKET_IFNAME to "
                    "the network interface that connects the nodes"
                ) from None

    def hear(self, values: list[int], wait: bool) -> list[int]:
        """Send these values, and return the maximum of those of the last call; with `wait` also of this one.

        Every rank must call it after the same steps, with the same `wait`.
        """
        if self.group is None:
            return values
        received = [torch.zeros(len(values), dtype=torch.int64)]
        if self.under_way is not None:
            reduced, work = self.under_way
            work.wait()
            received.append(reduced)
            self.under_way = None
        reduced = torch.tensor(values)
        work = dist.all_reduce(reduced, dist.ReduceOp.MAX, self.group, async_op=True)
        assert work is not None
        if wait:
            work.wait()
            received.append(reduced)
        else:
            self.under_way = reduced, work
        most: list[int] = torch.stack(received).amax(0).tolist()
        return most
