"""What AdamW must do to every tensor, worked out beside it: also a program, for runs of several processes."""

import sys
from typing import Any

import torch
from torch import Tensor

from mae.launch.stages import FinetuneCLI


class AdamWatch:
    """Before each optimiser step of a fine-tuning, what it must do; after it, whether it did.

    A tensor moves by -lr x scale x (m / (sqrt(v) + eps) + weight decay x p), with m and v corrected for their start,
    and lr the schedule's at that step.
    """

    steps = 0

    def watched(self, cli_type: type[FinetuneCLI]) -> type[FinetuneCLI]:
        watch = self

        class Watched(cli_type):  # type: ignore[valid-type, misc]
            def start(self) -> None:
                watch.attach(self.model)

        return Watched

    def attach(self, module: Any) -> None:
        self.module = module
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        take_step = module.optimizer_step

        def optimizer_step(*args: Any, **kwargs: Any) -> None:
            take_step(*args, **kwargs)
            self.compare()

        def on_before_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
            type(module).on_before_optimizer_step(module, optimizer)
            self.expect()

        module.optimizer_step = optimizer_step
        module.on_before_optimizer_step = on_before_optimizer_step

    def expect(self) -> None:
        module, number = self.module, self.steps + 1
        lr = module.schedule.lr_at(self.steps, module.peak_lr)
        depth, (first, second) = len(module.model.blocks), module.betas
        self.wanted = {}
        for name, p in module.model.named_parameters():
            assert p.grad is not None
            m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = first * m + (1 - first) * p.grad, second * v + (1 - second) * p.grad**2
            self.moments[name] = m, v
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
            if name.startswith(("fc_norm", "head")):
                layer = depth + 1
            scale = module.layer_decay ** (depth + 1 - layer)
            decay = 0.0 if p.ndim == 1 or name in ("cls_token", "pos_embed") else module.weight_decay
            update = (m / (1 - first**number)) / ((v / (1 - second**number)).sqrt() + 1e-8) + decay * p
            self.wanted[name] = (p.detach().clone(), -lr * scale * update.detach())

    def compare(self) -> None:
        for name, p in self.module.model.named_parameters():
            before, move = self.wanted[name]
            assert p.dtype == torch.float64  # in float32 late, small steps drown in the rounding of the weights
            error = (p.detach() - before - move).norm()
            assert error <= 1e-5 * move.norm(), (self.steps, name, float(error), float(move.norm()))
        self.steps += 1


if __name__ == "__main__":
    watch = AdamWatch()
    watch.watched(FinetuneCLI)(sys.argv[1:]).fit()
    print(f"{watch.steps} steps as they should be", flush=True)
