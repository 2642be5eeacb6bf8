"""A callback for runs in processes of their own: what they tell each other, and when.

By class path, as in run_callbacks: `--trainer.callbacks+=ddp_watch.Exchanges`.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


class Exchanges(Callback):
    """Leaves a file `rank_R.json`.

    `static_graph` is DDP's; `views` whether every gradient has lain in a bucket. `gradients`, `others` and `signals`
    are the micro-batches, counted from 0, in which a bucket, another tensor, or the ranks' agreement was exchanged.

    Args:
        folder: Of the files; is made.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.found: dict[str, Any] = {"gradients": [], "others": [], "signals": [], "views": True}
        self.micro_batch = -1  # none yet
        self.buckets: set[int] = set()

    def note(self, kind: str) -> None:
        if self.micro_batch >= 0:
            self.found[kind].append(self.micro_batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ddp = trainer.strategy.model
        assert isinstance(ddp, DistributedDataParallel)
        self.found["static_graph"] = ddp.static_graph

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.note("gradients")
            self.buckets.add(bucket.buffer().untyped_storage().data_ptr())
            return allreduce_hook(state, bucket)

        ddp.register_comm_hook(None, hook)
        usual = dist.all_reduce

        def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
            self.note("others" if group is None else "signals")
            return usual(tensor, op, group, async_op)

        dist.all_reduce = all_reduce  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.micro_batch += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        places = {p.grad.untyped_storage().data_ptr() for p in pl_module.parameters() if p.grad is not None}
        self.found["views"] &= places <= self.buckets

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(self.found))
