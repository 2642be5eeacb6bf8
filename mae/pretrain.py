"""Pre-training: hide patches, reconstruct them (arXiv:2111.06377, Table 8)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.data.datamodule import ImageData
from mae.data.datasets import Batch
from mae.data.sampling import MaskSampling, mask_scores
from mae.errors import UserError
from mae.models.compilation import Choice
from mae.models.mae import SIZES, MaskedAutoencoder, Pair, hidden_patches, random_masking
from mae.options import check_ranges
from mae.runtime.processes import all_reduce, gather
from mae.training.module import Stage
from mae.training.optim import adamw
from mae.training.plain_batch import NOT_REPLAYED
from mae.training.recipe_audit import ExpectedGroups

PCA_IMAGES = 1024  # on whose patches the principal components are found: 200,000 at 224 pixels

HELD_OUT_SEED = 0  # of the masks in validation: the same in every run, so that runs can be compared


class Pretrain(Stage):
    """MAE pre-training of a ViT.

    Args:
        size: Encoder: nano or micro (for small images), or tiny to huge (ViT-Ti, S, B, L, H).
        patch_size: Pixels, a side or [height, width]; divides the image size.
        mask_ratio: Fraction of patches to hide, in (0, 1).
        mask_sampling: `random`; `block`: rectangles are hidden, by BEiT's rule; `grid`: one of every 2 x 2 patches is
            visible, at a mask_ratio of 0.75 (Table 1f).
        visible_loss_weight: Weight of a visible patch in the loss, from 0 to 1; a hidden one has 1. At 1 the loss is on
            all patches, which costs the paper 0.5 points (Sec. 3, footnote 1). Above 0 the decoder predicts all.
        pca_target: Reconstruct so many principal components of a patch instead of its pixels (Table 1d: 96, without
            norm_pix_loss); 0: pixels. They are found on training images before the first step, and stored.
        encoder_mask_tokens: Let the encoder process mask tokens in the place of hidden patches: more than twice the
            work, and worse (Table 1c).
        norm_pix_loss: Reconstruct pixels normalised within each patch, else pixels of the normalised image.
        decoder_embed_dim: Decoder width.
        decoder_depth: Decoder blocks.
        decoder_num_heads: Decoder attention heads.
        embed_dim: Encoder width, where it differs from that of `size`.
        depth: Encoder blocks, where they differ from those of `size`.
        num_heads: Encoder attention heads, where they differ from those of `size`.
        timm_encoder: Another encoder than the paper's, with its own size, positions and initial weights: the name of a
            timm model that can see a subset of its patches, such as vit_small_patch16_rope_224 (in Python, or the
            model).
        timm_args: Arguments of the timm model of that name, such as {reg_tokens: 4, embed_dim: 320, patch_size: 8}.
        base_lr: Peak learning rate for 256 images an optimiser step; scaled linearly with the global batch.
        weight_decay: Of AdamW, for everything but biases and norms.
        betas: Of AdamW.
        warmup_epochs: Linear warm-up from 0, in epochs; may be fractional.
        min_lr: Learning rate at the end of the cosine.
        activation_checkpointing: Compute the blocks' activations again in the backward pass instead of keeping them:
            less memory, more time, the same bits.
        compile: Compile the blocks by torch.compile: true, false, or auto (where the run is long enough to save time by
            it and there is a compiler). The results are the same up to rounding.
        cuda_graphs: Replay the compiled kernels as CUDA graphs, for networks so small that launching takes longer.
        init: Weights to start from: a run folder or file, or the official code's, timm's, Hugging Face's. Not a resume:
            that is --ckpt_path.
        image_size: Of the data; set by it.
        in_chans: Of the data; set by it.
        mean: Of each channel in [0, 1], by which a plain DataLoader's integer images are normalised; set by the data.
        std: As mean.
        seed: Of the masks; follows seed_everything.
    """

    model: MaskedAutoencoder
    network: type[MaskedAutoencoder] = MaskedAutoencoder  # a subclass may have its own target, loss or decoder
    recipe_keys = ("mask_ratio", "mask_sampling", "betas")

    def __init__(
        self,
        size: str = "base",
        patch_size: int | Pair = 16,
        mask_ratio: float = 0.75,
        mask_sampling: MaskSampling = "random",
        visible_loss_weight: float = 0.0,
        pca_target: int = 0,
        encoder_mask_tokens: bool = False,
        norm_pix_loss: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        timm_encoder: Any = None,
        timm_args: dict[str, Any] | None = None,
        base_lr: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_epochs: float = 40,
        min_lr: float = 0.0,
        activation_checkpointing: bool = False,
        compile: Choice = "auto",
        cuda_graphs: bool = False,
        init: str | None = None,
        image_size: int | Pair = 224,
        in_chans: int = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int = 0,
    ):
        super().__init__(base_lr, weight_decay, warmup_epochs, min_lr, seed, compile, cuda_graphs, mean, std)
        if size not in SIZES:
            raise UserError(f"--model.size {size!r} is none of {', '.join(SIZES)}")
        check_ranges("model", "[0, 1)", betas=list(betas))
        widths = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        self.check_encoder(timm_encoder, timm_args, size, widths)
        own = SIZES[size]
        try:
            self.model = self.network(
                image_size=image_size,
                patch_size=patch_size,
                in_chans=in_chans,
                embed_dim=own.embed_dim if embed_dim is None else embed_dim,
                depth=own.depth if depth is None else depth,
                num_heads=own.num_heads if num_heads is None else num_heads,
                decoder_embed_dim=decoder_embed_dim,
                decoder_depth=decoder_depth,
                decoder_num_heads=decoder_num_heads,
                norm_pix_loss=norm_pix_loss,
                activation_checkpointing=activation_checkpointing,
                timm_encoder=timm_encoder,
                timm_args=timm_args,
                visible_loss_weight=visible_loss_weight,
                encoder_mask_tokens=encoder_mask_tokens,
                pca_target=pca_target,
            )
        except ValueError as error:
            if str(error).startswith(("visible_loss_weight", "encoder_mask_tokens", "pca_target")):
                raise UserError(f"--model.{error}") from None
            if timm_encoder is not None:
                name = timm_encoder if isinstance(timm_encoder, str) else type(timm_encoder).__name__
                raise UserError(f"--model.timm_encoder {name}: {error}") from None
            options = "--model.*embed_dim, *num_heads" if "num_heads" in str(error) or "width" in str(error) else ""
            raise UserError(f"{error} ({options or '--data.image_size, --model.patch_size'})") from None
        try:
            random_masking(torch.zeros(1, self.model.num_patches), mask_ratio)
        except ValueError as error:
            raise UserError(f"--model.{error}; some must be visible and some hidden") from None
        rows, columns = self.model.grid
        if mask_sampling == "grid" and (rows % 2 or columns % 2 or mask_ratio != 0.75):
            raise UserError(
                f"--model.mask_sampling grid keeps one of every 2 x 2 patches: wanted are even numbers of rows and "
                f"columns and mask_ratio 0.75, not {rows} x {columns} and {mask_ratio}"
            )
        self.mask_ratio, self.mask_sampling, self.betas = mask_ratio, mask_sampling, betas

    def check_encoder(self, encoder: Any, arguments: dict[str, Any] | None, size: str, widths: dict[str, Any]) -> None:
        """Refuse settings that an encoder of timm's would leave without effect, and arguments without an encoder."""
        if encoder is None:
            if arguments:
                raise UserError("--model.timm_args are those of --model.timm_encoder NAME, which is not set")
            return
        if not isinstance(encoder, str | nn.Module):
            raise UserError(f"--model.timm_encoder {encoder}: it is the name of a timm model (in Python, or the model)")
        if arguments and not isinstance(encoder, str):
            raise UserError("--model.timm_args are for a model by name, not for one that is made already")
        set_too = [f"size {size}"] if size != "base" else [f"{k} {v}" for k, v in widths.items() if v is not None]
        if set_too:
            raise UserError(f"--model.{set_too[0]}: --model.timm_encoder has a size; --model.timm_args can change it")

    def mask_noise(self, seed: int, epochs: list[int], indices: list[int]) -> Tensor:
        """(B, N) float on the CPU: a score per patch, of which the highest are hidden; override it for own masks.

        Args:
            seed: Of the run, or of the fixed masks of validation.
            epochs: Of each image.
            indices: Of each image in its data set. A mask should depend on these three alone, so that it is replayed.
        """
        hidden = hidden_patches(self.model.num_patches, self.mask_ratio)
        return mask_scores(self.mask_sampling, seed, epochs, indices, self.model.grid, hidden)

    def with_noise(self, batch: Batch, epochs: list[int], indices: list[int]) -> Batch:
        # On the CPU whatever the device: a CUDA run hides the same patches as a CPU run.
        seed = self.seed if self.trainer.training else HELD_OUT_SEED
        return batch._replace(noise=self.mask_noise(seed, epochs, indices))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if not isinstance(batch, Batch):
            return batch
        return self.with_noise(batch, batch.epochs.tolist(), batch.indices.tolist())

    def to_batch(self, batch: Any, batch_idx: int) -> Batch:
        batch = super().to_batch(batch, batch_idx)
        if batch.noise is not None:
            return batch
        epochs, indices = batch.epochs.tolist(), batch.indices.tolist()
        if epochs and epochs[0] == NOT_REPLAYED:  # the loader does not say which images these are
            accumulate = self.trainer.accumulate_grad_batches
            place = self.global_step * accumulate + batch_idx % accumulate if self.trainer.training else batch_idx
            first = (place * self.trainer.world_size + self.global_rank) * len(indices)
            epochs, indices = [NOT_REPLAYED] * len(indices), [first + row for row in indices]
        batch = self.with_noise(batch, epochs, indices)
        assert batch.noise is not None
        return batch._replace(noise=batch.noise.to(batch.images.device))

    def on_train_start(self) -> None:
        if self.model.pca_target and not self.model.target_basis.any():  # else a checkpoint or weights brought them
            self.fit_target()
        super().on_train_start()

    def fit_target(self) -> None:
        """Find the principal components that are the target.

        Raises:
            UserError: The images come from a loader of one's own, which cannot be asked for some of them.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageData):
            raise UserError(
                "pca_target: call model.fit_target(batches of training images, normalised) of the network, "
                "Pretrain.model, before the trainer starts"
            )
        if self.trainer.is_global_zero:
            self.model.fit_target(data.first_crops(PCA_IMAGES))
        for buffer in (self.model.target_mean, self.model.target_basis):
            buffer.copy_(self.trainer.strategy.broadcast(buffer.cpu()))

    def loss_for_flops(self, network: Callable[..., Any], images: Tensor) -> Tensor:
        noise = images.new_empty(len(images), self.model.num_patches)
        loss: Tensor = network(images, noise, self.mask_ratio).loss
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.to_batch(batch, batch_idx)
        out = self.model(batch.images, batch.noise, self.mask_ratio)
        return self.mean_loss(out.per_image, batch)

    def on_validation_epoch_start(self) -> None:
        self.val_sum = torch.zeros(2, device=self.device, dtype=torch.float64)  # loss, images
        self.val_error = ""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.to_batch(batch, batch_idx)
        if batch.errors:
            self.val_error = str(batch.errors[0])
        else:
            per_image = self.model(batch.images, batch.noise, self.mask_ratio).per_image
            self.val_sum += torch.stack([per_image.sum(), per_image.new_tensor(len(per_image))])

    def on_validation_epoch_end(self) -> None:
        if errors := gather(self.val_error):
            raise UserError(f"held-out images must all be readable: {errors[0]}")
        all_reduce(self.val_sum)
        loss, images = self.val_sum.tolist()
        self.log_row({f"{self.split}/loss": loss / images})

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """(B, D): the encoder's class token for unmasked images; the mean of patch tokens where it has none."""
        tokens = self.model.encode(self.to_batch(batch, batch_idx).images)
        return tokens.mean(dim=1) if self.model.encoder.num_prefix_tokens == 0 else tokens[:, 0]

    def make_optimizer(self, lr: float) -> Optimizer:
        undecayed: set[str] = set()
        if self.model.is_timms:
            undecayed = {f"encoder.{name}" for name in self.model.encoder.no_weight_decay()}
        return adamw(self.model, lr, self.weight_decay, self.betas, self.fused, undecayed)

    def expected_groups(self) -> ExpectedGroups:
        return ExpectedGroups(weight_decay=self.weight_decay)

    def recipe_notes(self) -> dict[str, str]:
        encoder = sum(p.numel() for p in self.model.encoder.parameters())
        name = f"timm's {self.model.config['timm_encoder']}, " if self.model.is_timms else ""
        hidden = f"{self.mask_ratio:.0%} of the patches hidden"
        hidden += "" if self.mask_sampling == "random" else f" ({self.mask_sampling}-wise)"
        return {"encoder": f"{name}{encoder / 1e6:.2f} M parameters; {hidden}"}

    def architecture(self) -> dict[str, Any]:
        return self.model.config

    def describe(self) -> dict[str, Any]:
        sampling = {} if self.mask_sampling == "random" else {"mask_sampling": self.mask_sampling}
        return {"model": self.model.config, "mask_ratio": self.mask_ratio, **sampling}
