"""What the ranks of a run tell each other at the end of every optimiser step, without making it wait."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mae.errors import UserError


class Agreement:
    """The largest value that any rank has said, the same on every rank after the same step.

    Over gloo, whatever the gradients go by: small numbers on the CPU, so that no step waits for the device. What is
    said after one step is heard after the next; where it must be heard at once, all ranks wait.
    """

    def __init__(self, size: int) -> None:
        """
        Args:
            size: How many values are said.

        Raises:
            UserError: gloo finds no way between the nodes.
        """
        self.size = size
        self.group: Any = None  # a process group, where there are others
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

    def hear(self, said: list[int], wait: bool) -> list[int]:
        """Say these values, and hear those of the last call; with `wait` those of this one, too.

        Every rank must call it after the same steps, with the same `wait`.
        """
        if self.group is None:
            return said
        heard = [torch.zeros(self.size, dtype=torch.int64)]
        if self.under_way is not None:
            values, work = self.under_way
            work.wait()
            heard.append(values)
            self.under_way = None
        values = torch.tensor(said)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, self.group, async_op=True)
        assert work is not None
        if wait:
            work.wait()
            heard.append(values)
        else:
            self.under_way = values, work
        most: list[int] = torch.stack(heard).amax(0).tolist()
        return most
