"""Networks as graphs that run without this package: ONNX files, torch.export programs, int8 weights.

Shapes: B images of C channels and H x W pixels; N patches per image, of P values each; D encoder width. B is free in
every graph; H and W are those of the network or, on request, any multiples of the patch.
"""

import json
import tempfile
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim

from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder, Pair, patchify, random_masking, take

BATCHES = (1, 2, 5)  # batch sizes that checks compare

SMALLEST = 2  # patches per side where sizes are free: torch.export takes lengths of 1 for constants


class Graph(nn.Module):
    """A network to export: `forward` takes tensors named by `takes` and returns tensors named by `gives`.

    The network inside is put into eval mode.

    Attributes:
        free_size: Whether H and W are free: multiples of the patch, at least two patches per side.
        encoder: The encoder, whose grid and patch size are the graph's.
    """

    takes: tuple[str, ...] = ("images",)
    gives: tuple[str, ...]
    free_size = False
    encoder: VisionTransformer

    @property
    def grid(self) -> Pair:
        rows, columns = self.encoder.patch_embed.grid_size
        return rows, columns

    @property
    def patch_size(self) -> Pair:
        height, width = self.encoder.patch_embed.patch_size
        return height, width

    def example(self, batch: int, grid: Pair | None = None, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs, for images of `grid` rows and columns of patches; None: the network's own grid."""
        (rows, columns), (height, width) = grid or self.grid, self.patch_size
        generator = torch.Generator().manual_seed(seed)
        channels = self.encoder.patch_embed.proj.in_channels
        return (torch.randn(batch, channels, rows * height, columns * width, generator=generator),)

    def shapes(self) -> tuple[dict[int, Any], ...]:
        """The free dimensions of each input, as torch.export expects them."""
        images: dict[int, Any] = {0: Dim("batch")}
        if self.free_size:
            height, width = self.patch_size
            images |= {2: height * Dim("rows", min=SMALLEST), 3: width * Dim("columns", min=SMALLEST)}
        return (images,)

    def grids(self) -> list[Pair]:
        """The image sizes that checks compare, in patches; where they are free also smaller, larger and oblong ones."""
        rows, columns = self.grid
        if not self.free_size:
            return [self.grid]
        return [self.grid, (SMALLEST, columns + 3), (rows + 2, max(SMALLEST, columns // 2))]


class Encoder(Graph):
    """(B, C, H, W) float, normalised -> tokens (B, 1 + N, D) after the final norm, class token first; never masked.

    Args:
        free_size: Positions are resampled in the graph, as in fine-tuning at another size: bicubic, without
            align_corners and antialiasing, the class token's row kept.
    """

    gives = ("tokens",)

    def __init__(self, encoder: VisionTransformer, free_size: bool = False) -> None:
        super().__init__()
        self.encoder, self.free_size = encoder, free_size
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        if not self.free_size:
            fixed: Tensor = encoder.forward_features(images)
            return fixed
        assert encoder.pos_embed is not None  # timm has encoders without them
        assert encoder.cls_token is not None
        x = encoder.patch_embed.proj(images)  # (B, D, rows, columns)
        positions = encoder.pos_embed
        table = positions[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        table = F.interpolate(table, size=x.shape[2:], mode="bicubic", align_corners=False)
        x = (x + table).flatten(2).transpose(1, 2)
        cls = (encoder.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        tokens: Tensor = encoder.norm(encoder.blocks(torch.cat([cls, x], dim=1)))
        return tokens


class Reconstruction(Graph):
    """Images (B, C, H, W) and noise (B, N) -> pred (B, N, P) of every patch and mask (B, N), as `predict` gives them.

    The caller decides the mask: the int(N * (1 - mask_ratio)) patches of lowest noise stay visible, and mask is True
    for the others. Any mask that hides this number of patches can be given as noise of 0 and 1. Results equal those of
    `predict` up to rounding: decoder tokens are put into raster order before the decoder, which takes one gather in
    the graph instead of three.

    Raises:
        ValueError: The ratio would leave no patch visible or none hidden.
    """

    takes = ("images", "noise")
    gives = ("pred", "mask")

    def __init__(self, model: MaskedAutoencoder, mask_ratio: float = 0.75) -> None:
        super().__init__()
        self.model, self.mask_ratio = model, mask_ratio
        random_masking(torch.zeros(1, model.num_patches), mask_ratio)
        self.eval()

    @property
    def encoder(self) -> VisionTransformer:  # type: ignore[override]
        return self.model.encoder

    def example(self, batch: int, grid: Pair | None = None, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed + 1)
        return *super().example(batch, grid, seed), torch.rand(batch, self.model.num_patches, generator=generator)

    def shapes(self) -> tuple[dict[int, Any], ...]:
        (images,) = super().shapes()
        return images, {0: images[0]}

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        # Nothing here may use len() of a tensor, which torch.export takes for a constant.
        model = self.model
        keep, hide, mask = masking = random_masking(noise, self.mask_ratio)
        latent = model.encode_visible(take(patchify(images, model.patch_size), keep), keep, hide)  # (B, 1 + K, D)
        x = model.decoder_embed(latent)
        tokens = x[:, 1:]
        if not model.encoder_mask_tokens:
            tokens = torch.cat([tokens, model.mask_token.expand(x.shape[0], hide.shape[1], -1)], dim=1)
        patches = take(tokens, masking.ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + model.decoder_pos_embed  # (B, 1 + N, E)
        for block in model.decoder_blocks:
            x = block(x)
        return model.target_pixels(model.decoder_pred(model.decoder_norm(x[:, 1:]))), mask


class Logits(Graph):
    """(B, C, H, W) float, normalised -> logits (B, classes) of a timm VisionTransformer with a head."""

    gives = ("logits",)

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.encoder = network
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.encoder(images)
        return logits


def import_onnx_package(package: str) -> Any:
    """Import a package of the extra "onnx".

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise UserError(f'ONNX files need the package {name}: pip install "vit-mae-lightning[onnx]"') from None


def program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph, traced by torch.export."""
    # Two images, because a batch of one would be taken for a constant.
    with torch.no_grad():
        exported = torch.export.export(graph, graph.example(2), dynamic_shapes=graph.shapes())
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it shows paths of this machine
    return exported


def to_onnx(graph: Graph, path: Path, description: dict[str, Any]) -> list[Path]:
    """Write an ONNX file; returns what was written.

    Up to 1.5 GiB of weights there is one file. Larger weights lie beside it in NAME.data, since protobuf is limited to
    2 GB. The graph refers to that file by name, so write to another folder, not under another name, to be safe from
    half-written files.

    Args:
        description: Of the weights and of how images become their input; stored as JSON in the file's metadata, under
            the key "mae".

    Raises:
        UserError: The packages that ONNX needs are missing.
    """
    for package in ("onnx", "onnxscript"):
        import_onnx_package(package)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*The axis name: batch will not be used")  # it is the same length
        onnx_program = torch.onnx.export(
            program(graph),
            dynamo=True,
            input_names=list(graph.takes),
            output_names=list(graph.gives),
            dynamic_shapes=graph.shapes(),  # here only the names count: the program has them already
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    assert onnx_program is not None
    for node in onnx_program.model.graph:
        node.metadata_props.clear()  # names of classes, for debugging the exporter
    onnx_program.model.metadata_props["mae"] = json.dumps(description)
    onnx_program.save(path, external_data=False)  # above torch's limit the data are external all the same
    return [file for file in (path, external_data_path(path)) if file.exists()]


def external_data_path(path: Path) -> Path:
    """The file for weights that are too large for the ONNX file."""
    return path.with_name(f"{path.name}.data")


def stable_sort(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """torch's stable sort, which its exporter does not know, as TopK, which keeps equal values in index order.

    Returns:
        Sorted values and their indices.
    """
    op = import_onnx_package("onnxscript").opset18
    length = op.Shape(values, start=dim, end=dim + 1 or None)
    return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)


def session(path: Path, threads: int = 1) -> Any:
    """An onnxruntime.InferenceSession on the CPU."""
    runtime = import_onnx_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Otherwise its threads keep spinning between two runs and take cores from whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(onnx_session: Any, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a `session`; returns its outputs."""
    feed = {node.name: value.numpy() for node, value in zip(onnx_session.get_inputs(), inputs, strict=True)}
    return tuple(torch.from_numpy(value) for value in onnx_session.run(None, feed))


def check_onnx(path: Path, graph: Graph) -> float:
    """The greatest absolute difference of any output between ONNX Runtime and PyTorch, both on the CPU.

    The inputs are random, in several batch sizes and, where they are free, several image sizes. A patch that differs
    in a mask is a difference of 1.
    """
    onnx_session = session(path)
    return max(difference(run_onnx(onnx_session, x), graph(*x)) for x in check_inputs(graph))


def check_export(path: Path, graph: Graph) -> float:
    """As `check_onnx`, for a .pt2 file."""
    loaded = torch.export.load(path).module()
    return max(difference(loaded(*x), graph(*x)) for x in check_inputs(graph))


def check_inputs(graph: Graph) -> list[tuple[Tensor, ...]]:
    return [graph.example(n, grid, seed) for seed, grid in enumerate(graph.grids()) for n in BATCHES]


def difference(outputs: Any, expected: Any) -> float:
    """Greatest absolute difference of outputs, one tensor or several; infinite where shapes or types differ."""
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (outputs, expected)), strict=True)
    gaps = []
    for output, reference in pairs:
        if output.shape != reference.shape or output.dtype != reference.dtype:
            return float("inf")
        gap = (output.double() - reference.double()).abs().max()
        gaps.append(float("inf") if gap.isnan() else float(gap))
    return max(gaps)


def to_export(graph: Graph, path: Path, description: dict[str, Any]) -> list[Path]:
    """Write a .pt2 file, for `torch.export.load`; returns what was written.

    Args:
        path: Ends in .pt2.
        description: As in `to_onnx`; torch.export.load(path, extra_files=files) gives it, of files = {"mae": ""}.
    """
    torch.export.save(program(graph), path, extra_files={"mae": json.dumps(description)})
    return [path]


def quantize(src: Path, dst: Path) -> list[Path]:
    """Write a copy of a float32 ONNX file whose linear layers have int8 weights; returns what was written.

    Weights have one scale per output. They use seven of their eight bits, because processors without VNNI add pairs of
    products in 16 bits, which the eighth bit would overflow. Activations become uint8 at run time, with one scale for
    the whole tensor: the result for an image therefore depends on the other images in the batch, about as much as on
    the rounding itself. The patch embedding (a convolution), attention's own products, norms and positions stay
    float32: they hold few weights or none.

    Raises:
        UserError: The packages that ONNX needs are missing.
    """
    for package in ("onnx", "onnxruntime"):
        import_onnx_package(package)
    quantization = import_onnx_package("onnxruntime.quantization")
    shapes = import_onnx_package("onnxruntime.quantization.shape_inference")
    large = external_data_path(src).exists()
    with tempfile.TemporaryDirectory(dir=dst.parent) as folder:
        # Only infer shapes: there is nothing to simplify, and ONNX Runtime's own operators would bind the file to it.
        prepared = Path(folder) / "prepared.onnx"
        shapes.quant_pre_process(
            src,
            prepared,
            skip_symbolic_shape=True,
            skip_optimization=True,
            save_as_external_data=large,
            all_tensors_to_one_file=large,
        )
        quantization.quantize_dynamic(
            prepared,
            dst,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )
    return [dst]
