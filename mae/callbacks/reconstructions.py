"""Pictures of reconstructions while a run trains."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae.data.datamodule import ImageData, raise_errors
from mae.data.datasets import WholeSamples
from mae.data.sampling import HELD_OUT_EPOCH
from mae.data.sources import spread
from mae.evaluation.plots import panel, reconstruction_columns
from mae.options import check_ranges
from mae.pretrain import HELD_OUT_SEED, Pretrain
from mae.training.fsdp import whole


class Panels(Callback):
    """Draws reconstructions of the same images under the same masks during the whole run, as PNG files and in W&B.

    Args:
        every_n_epochs: Draw at the end of each so many epochs; the end of training is always drawn.
        images: How many images, spread over the held-out images (or the training images where there are none).
    """

    def __init__(self, every_n_epochs: int = 20, images: int = 8):
        check_ranges("panels", "[1, inf)", every_n_epochs=every_n_epochs, images=images)
        self.every_n_epochs, self.images = every_n_epochs, images
        self.drawn = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        model = pl_module.model
        if not model.pca_target and model.target_values != model.patch_values:
            self.batches = []
            if trainer.is_global_zero:
                print("no pictures of reconstructions: the target of this network is not a patch's pixels", flush=True)
            return
        source = data.val_source or data.train_source
        assert source is not None
        samples = WholeSamples(source, data.image_size, data.crop_pct)
        loaded = [samples[[index]] for index in spread(source, self.images)]
        if data.val_source:
            for batch in loaded:
                raise_errors(batch)
        # Of training images some may be unreadable, and tolerated.
        self.batches = [data.prepare(batch) for batch in loaded if not batch.errors]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        if trainer.global_step % (self.every_n_epochs * pl_module.steps_per_epoch) == 0:
            self.draw_whole(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Pretrain)
        self.draw_whole(trainer, pl_module)

    def draw_whole(self, trainer: Trainer, module: Pretrain) -> None:
        with whole(module.model):
            self.draw(trainer, module)

    @rank_zero_only
    def draw(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Pretrain)
        data: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        assert data.mean is not None
        assert data.std is not None
        path = Path(trainer.default_root_dir) / "reconstructions" / f"step_{trainer.global_step:07d}.png"
        if self.drawn == trainer.global_step or not self.batches:
            return  # drawn a moment ago, at the end of the last epoch; or nothing to draw
        self.drawn = trainer.global_step
        indices = [int(batch.indices) for batch in self.batches]
        noise = module.mask_noise(HELD_OUT_SEED, [HELD_OUT_EPOCH] * len(indices), indices)
        model = module.model
        was_training = model.training
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            images = torch.cat([batch.images for batch in self.batches]).to(module.device)
            columns = reconstruction_columns(
                model, images, noise.to(module.device), module.mask_ratio, data.mean, data.std
            )
        model.train(was_training)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            panel(columns, path)
        except OSError as error:  # a picture is not worth a run
            print(f"mae: warning: {path} cannot be written: {error.strerror}", flush=True)
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("reconstructions", [str(path)], trainer.global_step, caption=["; ".join(columns)])
