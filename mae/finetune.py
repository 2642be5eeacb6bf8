"""Fine-tuning, end to end or partial (arXiv:2111.06377, Sec. 4.3, A.1)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.optim import Optimizer

from mae.classify import Classify
from mae.data.sampling import hashed, seeded
from mae.errors import UserError
from mae.evaluation.metrics import Scores
from mae.models.compilation import Choice
from mae.models.mae import Pair
from mae.models.vit import Head, Pool, add_lora, train_last
from mae.options import check_ranges
from mae.training.optim import adamw_by_layer
from mae.training.recipe_audit import ExpectedGroups
from mae.training.throughput import images_per_device


class Finetune(Classify):
    """End-to-end or partial fine-tuning (Table 9, Fig. 9), or supervised training from scratch (Table 11).

    The defaults are the paper's for ViT-B; configs/ has those of the official code and of other sizes.

    Args:
        encoder: What to start from: a run folder or file, official, timm's, Hugging Face's; `scratch`: random
            weights.
        pool: "mean": of the patch tokens, then a norm (fc_norm); "class": the class token.
        blocks: Train only so many of the last blocks, the norm after them and the head; 0.5: the last block's MLP.
            Default: everything. (0 is a linear classifier; mae linprobe has the paper's recipe for that.)
        lora_rank: Train low-rank updates of attention weights of this rank (LoRA, needs the package peft), norm and
            head, instead of the encoder's own weights.
        lora_alpha: The updates are scaled by lora_alpha / lora_rank.
        base_lr: Peak learning rate for 256 images an optimiser step; scaled linearly with the global batch.
        layer_decay: Each layer's learning rate over that of the layer above it; 1: the same rate for all.
        weight_decay: Of AdamW, on everything but biases, norms, class token and positions.
        betas: Of AdamW.
        warmup_epochs: Linear warm-up from 0, in epochs; may be fractional.
        min_lr: Learning rate at the end of the cosine, times layer scale.
        drop_path: Stochastic depth of the last block; it rises linearly from 0 at the first.
        mixup: Alpha of mixup; 0: none.
        cutmix: Alpha of cutmix; 0: none. With both, each batch takes one of them.
        mix_prob: Probability that a batch is mixed at all.
        switch_prob: Probability of cutmix where both are on.
        label_smoothing: Weight of the uniform distribution in the targets.
        ema_decay: Keep a moving average of the weights, evaluate it beside them, and export it; null: none.
        activation_checkpointing: Compute the blocks' activations again in the backward pass instead of keeping them:
            less memory, more time, the same bits.
        compile: Compile the blocks by torch.compile: true, false, or auto (where the run is long enough to save time by
            it and there is a compiler). The results are the same up to rounding.
        size: Encoder, as in pre-training; only needed with `scratch`, else it must agree with the encoder.
        patch_size: Pixels, a side or [height, width]; as size.
        embed_dim: Encoder width, where it differs from that of `size`.
        depth: Encoder blocks, where they differ from those of `size`.
        num_heads: Encoder attention heads, where they differ from those of `size`.
        allow_finetuned: Start from the encoder of a classifier, too.
        image_size: Of the data; set by it. Positions are resampled from the size of pre-training.
        in_chans: Of the data; set by it.
        classes: Names of the classes; of the data, set by it.
        mean: Of each channel in [0, 1], by which a plain DataLoader's integer images are normalised; set by the data.
        std: As mean.
        seed: Of drop path and mixing; follows seed_everything.
    """

    head: Head = "linear"
    recipe_keys = (
        *("encoder", "pool", "blocks", "lora_rank", "lora_alpha", "layer_decay", "betas", "drop_path", "mixup"),
        *("cutmix", "mix_prob", "switch_prob", "label_smoothing", "ema_decay"),
    )

    def __init__(
        self,
        encoder: str,
        pool: Pool = "mean",
        blocks: float | None = None,
        lora_rank: int | None = None,
        lora_alpha: float = 16,
        base_lr: float = 1e-3,
        layer_decay: float = 0.75,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_epochs: float = 5,
        min_lr: float = 1e-6,
        drop_path: float = 0.1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        ema_decay: float | None = None,
        activation_checkpointing: bool = False,
        compile: Choice = "auto",
        size: str | None = None,
        patch_size: int | Pair | None = None,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        allow_finetuned: bool = False,
        image_size: int | Pair = 224,
        in_chans: int = 3,
        classes: list[str] = [],  # noqa: B006  # never changed; a parser shows it
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ):
        super().__init__(base_lr, weight_decay, warmup_epochs, min_lr, seed, compile, mean=mean, std=std)
        self.blocks, self.lora_rank, self.lora_alpha = blocks, lora_rank, lora_alpha
        self.layer_decay, self.betas, self.drop_path = layer_decay, betas, drop_path
        self.mixup, self.cutmix, self.mix_prob, self.switch_prob = mixup, cutmix, mix_prob, switch_prob
        self.label_smoothing, self.ema_decay = label_smoothing, ema_decay
        self.check_settings()
        overrides = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        self.make_network(
            *(encoder, pool, classes, image_size, in_chans, size, overrides, allow_finetuned),
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        if blocks is not None:
            train_last(self.model, blocks)
        if lora_rank is not None:
            add_lora(self.model, lora_rank, lora_alpha)
            self.lora_scale = lora_alpha / lora_rank
        self.mixing = self.make_mixing(len(classes))
        if ema_decay is not None:
            self.ema = ModelEmaV3(self.model, decay=ema_decay).requires_grad_(False)  # DDP waits for what requires them
            self.scores["average"] = Scores(len(classes))

    def check_settings(self) -> None:
        """
        Raises:
            UserError: A setting is out of its range, or has no effect beside the others.
        """
        check_ranges("model", "[0, 1]", mix_prob=self.mix_prob, switch_prob=self.switch_prob)
        check_ranges("model", "[0, 1]", layer_decay=self.layer_decay)
        check_ranges("model", "[0, 1)", drop_path=self.drop_path, label_smoothing=self.label_smoothing)
        check_ranges("model", "[0, 1)", ema_decay=self.ema_decay, betas=list(self.betas))
        check_ranges("model", "[0, inf)", mixup=self.mixup, cutmix=self.cutmix)
        check_ranges("model", "[1, inf)", lora_rank=self.lora_rank)
        if self.layer_decay == 0:
            raise UserError("--model.layer_decay 0 would train the top layer alone: --model.blocks 0 does that")
        for key, default, partner, wanted in (
            ("mix_prob", 1, self.mixup or self.cutmix, "mixup or cutmix above 0"),
            ("switch_prob", 0.5, self.mixup and self.cutmix, "both mixup and cutmix above 0"),
            ("lora_alpha", 16, self.lora_rank, "lora_rank"),
        ):
            if getattr(self, key) != default and not partner:
                raise UserError(f"--model.{key} {getattr(self, key)} has no effect without {wanted}")
        if self.lora_rank is not None:
            check_ranges("model", "(0, inf)", lora_alpha=self.lora_alpha)
            if self.blocks is not None:
                raise UserError(
                    f"--model.lora_rank {self.lora_rank} and --model.blocks {self.blocks} exclude each other: give one"
                )

    def make_mixing(self, classes: int) -> Mixup | None:
        if not (self.mixup or self.cutmix) or not self.mix_prob:
            return None
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mix_prob,
            switch_prob=self.switch_prob,
            label_smoothing=self.label_smoothing,
            num_classes=classes,
        )

    def configure_model(self) -> None:
        if self.device_mesh is not None and self.ema is not None:
            raise UserError(
                "--trainer.strategy fsdp2 has no moving average of the weights: --model.ema_decay null, or ddp"
            )
        super().configure_model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.to_batch(batch, batch_idx)
        # A function of (seed, step, micro-batch, rank): a resumed run draws the same, and ranks, which share a seed
        # under Lightning, draw differently.
        accumulate = self.trainer.accumulate_grad_batches
        number = batch_idx % accumulate * self.trainer.world_size + self.global_rank
        torch.manual_seed(hashed(self.seed, self.global_step, number, "drop"))
        images, targets, weight, smoothing = batch.images, batch.labels, batch.weight, self.label_smoothing
        if self.mixing:
            with seeded(self.seed, self.global_step, number, "mix"):
                images, targets = self.mixing(images, targets)  # (B, classes), smoothed
            weight, smoothing = weight * weight.flip(0), 0.0  # an unreadable image spoils its partner
        logits = self.model(images).float()
        per_image = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        return self.mean_loss(per_image, batch, weight)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model)

    def make_optimizer(self, lr: float) -> Optimizer:
        return adamw_by_layer(self.model, lr, self.weight_decay, self.betas, self.layer_decay, self.fused)

    def expected_groups(self) -> ExpectedGroups:
        return ExpectedGroups(self.weight_decay, self.layer_decay, self.drop_path)

    def on_fit_start(self) -> None:
        batch = images_per_device(self.trainer)
        if self.mixing and batch % 2:
            raise UserError(f"--data.batch_size_per_device {batch}: mixup and cutmix mix pairs, so it must be even")
        super().on_fit_start()

    def recipe_notes(self) -> dict[str, str]:
        mixing = "none"
        if self.mixing:
            mixing = (
                f"mixup {self.mixing.mixup_alpha:g}, cutmix {self.mixing.cutmix_alpha:g}, probability "
                f"{self.mixing.mix_prob:g}, of cutmix {self.mixing.switch_prob:g}"
            )
        trained = "all" if self.blocks is None else f"the last {self.blocks:g} blocks, norm, head"
        if self.lora_rank is not None:
            trained = f"LoRA of rank {self.lora_rank} (scale {self.lora_scale:g}) on attention, norm, head"
        average = "none" if self.ema is None else f"moving average with decay {self.ema.decay:g}, evaluated and kept"
        return super().recipe_notes() | {
            "trained": trained,
            "mixing": f"{mixing}; label smoothing {self.label_smoothing:g}",
            "average": average,
        }
