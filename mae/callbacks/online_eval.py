"""k-NN, a linear probe and the spread of the features while pre-training."""

import itertools
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mae.data.datamodule import ImageData
from mae.data.sources import Source, Subset, spread
from mae.errors import UserError
from mae.evaluation import features, linear_heads
from mae.options import check_ranges
from mae.pretrain import Pretrain
from mae.runtime import watchdog
from mae.runtime.processes import gather
from mae.training.fsdp import whole


class Online(Callback):
    """Evaluates the features during pre-training: k-NN, a linear probe and their spread, in `metrics.csv` and W&B.

    Features are the mean of the patch tokens; the encoder sees whole images, unmasked, in eval mode. No gradient and no
    random number of the training is touched.

    `online/effective_rank` (RankMe) and `online/class_token_variance` (its mean over the dimensions) are of training
    images and need no labels; k-NN and the probe need them in both splits, and more than one class.

    `online/knn` and `online/knn_whitened` are the figures of these names of `mae knn`. In a run that was started when
    `online/knn` was of whitened features it stays that, the only one, so that its curve keeps one meaning.

    Args:
        every_n_epochs: Evaluate at the end of each so many epochs.
        train_images: How many of the training images are encoded, which vote in k-NN and fit the probe; they are spread
            over all of them.
        held_out_images: How many of the held-out images are classified; they are spread over all of them.
    """

    RATE = 0.1  # of the probe; a choice would need labels held out of the few that there are
    EPOCHS = 20

    def __init__(self, every_n_epochs: int = 20, train_images: int = 10_000, held_out_images: int = 5_000):
        check_ranges("online", "[1, inf)", every_n_epochs=every_n_epochs, train_images=train_images)
        check_ranges("online", "[1, inf)", held_out_images=held_out_images)
        self.every_n_epochs, self.train_images, self.held_out_images = every_n_epochs, train_images, held_out_images
        self.knn_is_plain = True

    def state_dict(self) -> dict[str, Any]:
        return {"knn_is_plain": self.knn_is_plain}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Checkpoints of before hold no state of this callback, which load_state_dict would not hear of.
        self.knn_is_plain = checkpoint["callbacks"].get(self.state_key, {}).get("knn_is_plain", False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.global_step % (self.every_n_epochs * pl_module.steps_per_epoch):
            return
        assert data.train_source is not None
        sources = (data.train_source, data.val_source)
        classes = len(data.train_source.classes)
        labelled = all(source is not None and source.labels is not None for source in sources) and classes > 1
        start = time.perf_counter()
        train, class_tokens, labels = self.encoded(trainer, pl_module, data, data.train_source, self.train_images)
        figures = {}
        if trainer.is_global_zero:
            figures = {"effective_rank": features.effective_rank(train)}
            if class_tokens.shape[1]:
                figures["class_token_variance"] = class_tokens.var(dim=0).mean().item()
        if labelled:
            assert data.val_source is not None
            test, _, test_labels = self.encoded(trainer, pl_module, data, data.val_source, self.held_out_images)
            if trainer.is_global_zero:
                knn = features.knn_scores(features.Features(train, labels, test, test_labels, classes))
                figures |= knn if self.knn_is_plain else {"knn": knn["knn_whitened"]}
                figures["probe"] = linear_heads.fit_and_score(
                    train, labels, test, test_labels, classes, self.RATE, self.EPOCHS, device=pl_module.device
                )
        if trainer.is_global_zero:
            pl_module.step_metrics.write({f"online/{name}": figure for name, figure in figures.items()})
        pl_module.step_metrics.exclude(time.perf_counter() - start)

    def encoded(
        self, trainer: Trainer, module: Pretrain, data: ImageData, source: Source, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of `count` images, in the same order whatever the number of processes.

        Returns:
            Features (n, D), class tokens (n, D), or (n, 0) of an encoder without one, and labels (n,), -1 without any.
        """
        part = Subset(source, spread(source, count))
        was_training = module.model.training
        module.model.eval()
        mine, errors = [], list[str]()
        prefix = module.model.encoder.num_prefix_tokens
        pool = features.POOLS["both" if prefix else "mean"]
        with whole(module.model), trainer.precision_plugin.forward_context(), torch.no_grad():
            for batch in data.whole(part, trainer.global_rank, trainer.world_size):
                watchdog.beat(f"step {trainer.global_step}, in the online evaluation")
                errors += map(str, batch.errors)
                if not len(batch.images):
                    continue
                found, labels = features.extract_features(
                    lambda images: pool(module.model.encode(images.to(module.dtype)), prefix),
                    data,
                    [batch._replace(errors=[])],
                    module.device,
                )
                mine.append((batch.indices, found, labels))
        module.model.train(was_training)
        # Of training images some may be unreadable: the training counts them, and tolerates them or not.
        if source is data.val_source and (bad := gather(errors)):
            raise UserError(f"held-out images must all be readable: {bad[0][0]}")
        parts = list(itertools.chain(*gather(mine)))
        if not parts:
            raise UserError("online evaluation found no readable training image: look at them with `mae doctor`")
        indices, found, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        order = indices.argsort()
        width = module.model.encoder.embed_dim
        return found[order, :width], found[order, width:], labels[order]
