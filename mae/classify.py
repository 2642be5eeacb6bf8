"""Linear probe and fine-tuning of an encoder, as in the paper (arXiv:2111.06377, Sec. A.1, Tables 9 to 11)."""

from typing import Any

from lightning.pytorch import Trainer
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.labelled import require_classes
from mae.errors import UserError
from mae.evaluation.metrics import Report, Scores
from mae.models.mae import Pair
from mae.models.vit import Head, Pool, build
from mae.runtime.processes import gather
from mae.training.fsdp import full_state
from mae.training.module import Stage
from mae.training.throughput import images_per_device
from mae.weights.classifier import encoder_config, load_pretrained
from mae.weights.load import read_weights

SCRATCH = "scratch"  # instead of SRC: random weights


class Classify(Stage):
    """A classifier in training: its network from SRC, and its scores on held-out images."""

    model: VisionTransformer
    head: Head
    elastic = False  # BatchNorm, mixing and drop path act on the images of one micro-batch on one rank

    def make_network(
        self,
        encoder: str,
        pool: Pool,
        classes: list[str],
        image_size: int | Pair,
        in_chans: int,
        size: str | None,
        overrides: dict[str, Any],
        allow_finetuned: bool,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        require_classes(classes)
        weights = None if encoder == SCRATCH else read_weights(encoder)
        if weights:
            weights.require_pretrained(allow_finetuned, "--model.allow_finetuned true")
        self.encoder = SCRATCH if weights is None else weights.fingerprint()
        self.pool, self.classes = pool, list(classes)
        self.config = encoder_config(weights, image_size, in_chans, size, overrides)
        self.model = build(self.config, len(classes), pool, self.head, drop_path, activation_checkpointing)
        self.start_note = "random weights" if weights is None else load_pretrained(self.model, weights)
        self.scores = nn.ModuleDict({"model": Scores(len(classes))})
        self.report: Report | None = None  # of the last validation
        self.report_step = -1
        self.ema: ModelEmaV3 | None = None  # a moving average of the network, which is evaluated beside it
        self.lora_scale = 1.0

    def on_validation_epoch_start(self) -> None:
        self.val_error = ""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.to_batch(batch, batch_idx)
        if batch.errors:
            self.val_error = str(batch.errors[0])
            return
        self.scores["model"].update(self.model(batch.images), batch.labels)  # type: ignore[operator]
        if self.ema is not None:
            self.scores["average"].update(self.ema.module(batch.images), batch.labels)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        if errors := gather(self.val_error):
            raise UserError(f"held-out images must all be readable: {errors[0]}")
        metrics: dict[str, float] = {}
        for name, scores in self.scores.items():
            assert isinstance(scores, Scores)
            suffix = "_ema" if name == "average" else ""
            # Where there is an average, its scores come last: it is the model that is kept, and so is its report.
            self.report = scores.report(self.classes)
            values = {"acc1": self.report.acc1, "acc5": self.report.acc5, "loss": self.report.loss}
            metrics |= {f"{self.split}/{key}{suffix}": value for key, value in values.items()}
        self.report_step = self.global_step
        self.log_row(metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """(B, classes): the logits, of the moving average of the weights where there is one."""
        network = self.model if self.ema is None else self.ema.module
        logits: Tensor = network(self.to_batch(batch, batch_idx).images)
        return logits

    def to_batch(self, batch: Any, batch_idx: int) -> Batch:
        first = not self.first_batch_shown and not self.trainer.predicting
        made = super().to_batch(batch, batch_idx)
        if first and self.first_batch_shown:  # of a plain DataLoader; to look at each would make the device wait
            low, high = int(made.labels.min()), int(made.labels.max())
            if low < 0 or high >= len(self.classes):
                raise UserError(
                    f"the batch's labels are {low} to {high} (-1: it has none), the classes 0 to "
                    f"{len(self.classes) - 1}: let the data set return (image, label)"
                )
        return made

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if "timm_encoder" in self.config:
            return  # sizes do not tell how to build one of timm's: its file is needed
        # Whoever loads the checkpoint has the weights, and need not have the file that the encoder came from.
        own = {key: self.config[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        checkpoint["hyper_parameters"] |= {"encoder": SCRATCH, "size": None, **own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.encoder = checkpoint["mae"]["recipe"]["model.encoder"]
        self.start_note = "weights of a checkpoint"

    def metric_names(self) -> list[str]:
        suffixes = [""] if self.ema is None else ["", "_ema"]
        scores = [f"val/{key}{suffix}" for suffix in suffixes for key in ("acc1", "acc5", "loss")]
        return list(dict.fromkeys([*super().metric_names(), *scores]))

    def recipe_notes(self) -> dict[str, str]:
        return {"start": self.start_note, "pool": f"{self.pool}; {len(self.classes)} classes"}

    def architecture(self) -> dict[str, Any]:
        return {**self.config, "pool": self.pool, "classes": self.classes}

    def describe(self) -> dict[str, Any]:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        # Of images that a plain DataLoader has cropped nothing is known.
        crop_pct = data.crop_pct if isinstance(data, ImageData) else 1.0
        about = {
            "classes": self.classes,
            "pool": self.pool,
            "head": self.head,
            "crop_pct": crop_pct,
            "lora_scale": self.lora_scale,
        }
        return {"model": self.config, "classifier": about}

    def settings(self, trainer: Trainer, data: Any) -> dict[str, Any]:
        # Unlike in pre-training, results depend on how a step is divided: see `elastic`.
        split = {
            "number of devices": trainer.world_size,
            "data.batch_size_per_device": images_per_device(trainer, data),
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        }
        return split | super().settings(trainer, data)

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that are kept at the end, on the first process; all processes call it together."""
        return full_state(self.model if self.ema is None else self.ema.module)
