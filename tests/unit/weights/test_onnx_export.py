"""Networks as graphs: the same numbers as in PyTorch, for any batch, and any size where that is asked for."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae.errors import UserError
from mae.models.mae import SIZES, MaskedAutoencoder
from mae.models.vit import build
from mae.weights import onnx_export
from mae.weights.onnx_export import Encoder, Graph, Logits, Reconstruction
from mae.weights.weights import resample_positions

CLOSE = 1e-4  # in float32, of outputs around 1
CONFIG: dict[str, Any] = {
    **{"image_size": [32, 24], "patch_size": [8, 8], "in_chans": 3, "mlp_ratio": 4.0},
    **{"embed_dim": 48, "depth": 1, "num_heads": 3},
}
ABOUT = {"kind": "encoder", "mean": [0.5], "model": CONFIG}
KINDS = ("encoder", "any size", "reconstruction", "mean", "batchnorm")


def some_fast(*fast: str, of: tuple[str, ...] = KINDS) -> list[Any]:
    """All kinds, of which those that are not named are for the slow tests: an export takes seconds."""
    return [*fast, *(pytest.param(kind, marks=pytest.mark.slow) for kind in of if kind not in fast)]


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def network(**changes: Any) -> MaskedAutoencoder:
    """With positions and biases that a wrong order would show in."""
    torch.manual_seed(0)
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    model = MaskedAutoencoder(**{**CONFIG, **decoder, **changes})
    for value in model.parameters():
        value.add_(0.05 * torch.randn_like(value))
    return model.eval()


def classifier(pool: Any, head: Any) -> Logits:
    torch.manual_seed(0)
    made = build(CONFIG, 10, pool, head)
    for value in made.parameters():
        value.add_(0.05 * torch.randn_like(value))
    return Logits(made)


def graph(kind: str) -> Graph:
    if kind == "encoder":
        return Encoder(network().encoder)
    if kind == "any size":
        return Encoder(network().encoder, free_size=True)
    if kind == "reconstruction":
        return Reconstruction(network())
    return classifier("mean", "linear") if kind == "mean" else classifier("class", kind)


class Files(dict[str, Path]):
    """ONNX files by kind, each written once, when it is asked for: that takes seconds."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, kind: str) -> Path:
        path = self[kind] = self.folder / f"{kind}.onnx"
        assert onnx_export.to_onnx(graph(kind), path, ABOUT) == [path]
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    return Files(tmp_path_factory.mktemp("onnx"))


def tokens(model: MaskedAutoencoder, images: Tensor) -> Tensor:
    """Of images of any size, by the network's own code and resampled positions."""
    height, width = images.shape[2:]
    other = network(image_size=[height, width])
    state = model.encoder.state_dict()
    state["pos_embed"] = resample_positions(state["pos_embed"], model.grid, other.grid)
    other.encoder.load_state_dict(state)
    return other.encode(images)


def test_an_encoder_is_the_networks_own() -> None:
    model = network()
    (images,) = (one := Encoder(model.encoder)).example(3)
    assert torch.equal(one(images), model.encode(images))
    assert one(images).shape == (3, 1 + 12, 48)


def test_positions_are_resampled_as_in_fine_tuning() -> None:
    model = network()
    free = Encoder(model.encoder, free_size=True)
    for size in ((32, 24), (16, 16), (24, 64), (56, 40)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(free(images), tokens(model, images), rtol=0, atol=1e-5)


def test_a_reconstruction_is_what_predict_gives() -> None:
    model = network()
    for ratio in (0.5, 0.75):
        made = Reconstruction(model, ratio)
        images, noise = made.example(3)
        found, wanted = made(images, noise), model.predict(images, noise, ratio)
        torch.testing.assert_close(found[0], wanted.pred, rtol=0, atol=1e-5)
        assert torch.equal(found[1], wanted.mask)
    with pytest.raises(ValueError, match=r"mask_ratio 0\.99"):
        Reconstruction(model, 0.99)


def test_logits_are_the_classifiers() -> None:
    for pool, head in (("mean", "linear"), ("class", "linear"), ("class", "batchnorm")):
        made = classifier(pool, head)
        (images,) = made.example(3)
        assert torch.equal(made(images), made.encoder(images))
        assert made(images).shape == (3, 10)


def test_checks_use_what_is_free() -> None:
    one, free = Encoder(network().encoder), Encoder(network().encoder, free_size=True)
    assert one.grids() == [(4, 3)]
    assert len(set(free.grids())) == 3
    assert any(rows != columns for rows, columns in free.grids())
    assert [len(images) for (images,) in onnx_export.check_inputs(one)] == [1, 2, 5]


def test_difference_sees_what_is_wrong() -> None:
    one, mask = torch.zeros(2, 3), torch.tensor([True, False])
    assert onnx_export.difference(one, one + 0.5) == 0.5
    assert onnx_export.difference((one, mask), (one, ~mask)) == 1
    assert onnx_export.difference(one, one[:1]) == float("inf")
    assert onnx_export.difference(one, one.double()) == float("inf")
    assert onnx_export.difference(one, one + float("nan")) == float("inf")


@pytest.mark.parametrize("kind", some_fast())
def test_an_exported_program_gives_the_same_for_any_batch(kind: str, tmp_path: Path) -> None:
    made, path = graph(kind), tmp_path / "graph.pt2"
    assert onnx_export.to_export(made, path, ABOUT) == [path]
    assert onnx_export.check_export(path, made) <= 1e-6
    files = {"mae": ""}
    torch.export.load(path, extra_files=files)
    assert json.loads(files["mae"]) == ABOUT


def test_a_check_notices_other_weights(tmp_path: Path) -> None:
    made, path = graph("encoder"), tmp_path / "graph.pt2"
    onnx_export.to_export(made, path, ABOUT)
    made.encoder.norm.bias.add_(0.01)
    assert onnx_export.check_export(path, made) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_files_name_no_path_of_the_machine_that_wrote_them(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "graph.pt2"
    onnx_export.to_export(graph("encoder"), path, ABOUT)
    for file in (path, files["encoder"]):
        data = file.read_bytes()
        for place in (Path(onnx_export.__file__).parent, Path(torch.__file__).parents[1]):
            assert str(place).encode() not in data, file


@pytest.mark.parametrize("kind", some_fast("encoder"))
def test_onnx_runtime_gives_the_same_for_any_batch(kind: str, files: Files) -> None:
    assert onnx_export.check_onnx(files[kind], graph(kind)) <= CLOSE


@pytest.mark.parametrize("kind", some_fast("encoder", of=KINDS[:-1]))
def test_names_and_free_lengths_stand_in_the_file(kind: str, files: Files) -> None:
    onnx = pytest.importorskip("onnx")

    def lengths(values: Any) -> dict[str, list[Any]]:
        return {one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in values}

    wanted: dict[str, tuple[dict[str, list[Any]], dict[str, list[Any]]]] = {
        "encoder": ({"images": ["batch", 3, 32, 24]}, {"tokens": ["batch", 13, 48]}),
        "reconstruction": (
            {"images": ["batch", 3, 32, 24], "noise": ["batch", 12]},
            {"pred": ["batch", 12, 192], "mask": ["batch", 12]},
        ),
        "mean": ({"images": ["batch", 3, 32, 24]}, {"logits": ["batch", 10]}),
    }
    made = onnx.load(files[kind])
    if kind == "any size":
        assert lengths(made.graph.input) == {"images": ["batch", 3, "8*rows", "8*columns"]}
        return
    assert (lengths(made.graph.input), lengths(made.graph.output)) == wanted[kind]
    assert {one.key: json.loads(one.value) for one in made.metadata_props} == {"mae": ABOUT}
    assert not any(one.data_location == onnx.TensorProto.EXTERNAL for one in made.graph.initializer)
    onnx.checker.check_model(made, full_check=True)


@pytest.mark.slow
def test_any_mask_can_be_given_and_ties_go_to_the_first(files: Files) -> None:
    """Scores of 0 and 1 alone: torch sorts them stably, and so must the graph."""
    made, running = graph("reconstruction"), onnx_export.session(files["reconstruction"])
    images, _ = made.example(3)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    for row, seen in enumerate(([0, 1, 2], [5, 0, 11], [9, 10, 3])):
        mask[row] = True
        mask[row, seen] = False
    for scores in (mask.float(), torch.zeros(3, 12)):
        found, wanted = onnx_export.run_onnx(running, (images, scores)), made(images, scores)
        assert torch.equal(found[1], wanted[1])
        assert onnx_export.difference(found, wanted) <= CLOSE
    assert torch.equal(onnx_export.run_onnx(running, (images, mask.float()))[1], mask)


@pytest.mark.parametrize("kind", some_fast("encoder", of=KINDS[:-1]))
def test_int8_weights_are_a_quarter_and_nearly_as_good(kind: str, files: Files, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path, made = tmp_path / "small.onnx", graph(kind)
    assert onnx_export.quantize(files[kind], path) == [path]
    assert list(tmp_path.iterdir()) == [path]
    inputs = made.example(4)
    found, wanted = onnx_export.run_onnx(onnx_export.session(path), inputs), made(*inputs)
    first, second = found[0], wanted if isinstance(wanted, Tensor) else wanted[0]
    error = float((first - second).norm() / second.norm())
    assert 0 < error < 0.1, error
    assert path.stat().st_size < 0.6 * files[kind].stat().st_size  # of a network as small as this one
    content = onnx.load(path)
    about = {one.key: one.value for one in content.metadata_props}
    assert json.loads(about["mae"]) == ABOUT
    blocks = 2 if kind == "reconstruction" else 1
    others = {"reconstruction": 2, "mean": 1}.get(kind, 0)  # decoder_embed and decoder_pred; the head
    ops = [node.op_type for node in content.graph.node]
    assert ops.count("MatMulInteger") == 4 * blocks + others
    assert not {"ConvInteger", "Gemm"} & set(ops)


@pytest.mark.slow
def test_weights_that_no_single_file_holds_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 1000)
    made, path = graph("encoder"), tmp_path / "large" / "graph.onnx"
    path.parent.mkdir()
    assert onnx_export.to_onnx(made, path, ABOUT) == [path, path.with_name("graph.onnx.data")]
    moved = path.parent.rename(tmp_path / "moved") / path.name
    assert onnx_export.check_onnx(moved, made) <= CLOSE
    small = tmp_path / "small.onnx"
    assert onnx_export.quantize(moved, small) == [small]
    assert onnx_export.check_onnx(small, made) < 1


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_missing_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, package, None)
    words = rf'ONNX files need the package {package}: pip install "vit-mae-lightning\[onnx\]"'
    with pytest.raises(UserError, match=words):
        onnx_export.import_onnx_package(package)
    path = tmp_path / "graph.onnx"
    work = {
        "onnx": [lambda: onnx_export.to_onnx(graph("encoder"), path, ABOUT), lambda: onnx_export.quantize(path, path)],
        "onnxscript": [lambda: onnx_export.to_onnx(graph("encoder"), path, ABOUT)],
        "onnxruntime": [
            lambda: onnx_export.check_onnx(path, graph("encoder")),
            lambda: onnx_export.quantize(path, path),
        ],
    }
    for one in work[package]:
        with pytest.raises(UserError, match=words):
            one()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "patch", "free"),
    [("tiny", 16, True), ("small", 16, False), pytest.param("base", 16, True, marks=pytest.mark.soak)],
)
def test_the_papers_shapes(size: str, patch: int, free: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    encoder = network(image_size=224, patch_size=patch, **SIZES[size]._asdict()).encoder
    made, path = Encoder(encoder, free_size=free), tmp_path / "graph.onnx"
    onnx_export.to_onnx(made, path, ABOUT)
    assert onnx_export.check_onnx(path, made) <= CLOSE


@pytest.mark.soak
@pytest.mark.slow
def test_the_papers_reconstruction(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    made, path = Reconstruction(MaskedAutoencoder()), tmp_path / "graph.onnx"
    onnx_export.to_onnx(made, path, ABOUT)
    assert onnx_export.check_onnx(path, made) <= CLOSE
