"""Evaluation pixels: the official two steps, the same in every command, in `mae.transform` and by timm's functions."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, png16, smooth
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.layers import PatchEmbed
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

import mae
from mae.cli import main
from mae.data.crops import evaluation_pixels
from mae.data.datamodule import ImageData
from mae.data.datasets import WholeSamples, normalize
from mae.data.sources import DatasetSource
from mae.errors import UserError
from mae.models.mae import MaskedAutoencoder
from mae.weights.load import export_autoencoder

SIZES = {"patch_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}


def chw(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.875), (384, 1.0), (448, 1.0), (64, 0.9)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (601, 333), (150, 131), (448, 448), (40, 600)])
def test_evaluation_pixels_are_those_of_the_official_two_steps(
    height: int, width: int, size: int, crop_pct: float
) -> None:
    picture = smooth(height, width)
    steps = Compose([Resize(int(size / crop_pct), InterpolationMode.BICUBIC), CenterCrop(size)])
    wanted = chw(np.array(steps(Image.fromarray(picture))))
    found = evaluation_pixels(chw(picture), (size, size), crop_pct)
    difference = (found.int() - wanted.int()).abs().float()
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_evaluation_pixels_of_other_shapes() -> None:
    image = chw(smooth(100, 300))
    assert torch.equal(evaluation_pixels(image, (100, 300)), image)  # nothing to resize
    assert torch.equal(evaluation_pixels(image, (80, 80), 0.8), image[:, 10:90, 110:190])  # nor here: 100 is covered
    assert evaluation_pixels(image, (50, 20), 0.5).shape == (3, 50, 20)
    # Of a strip only the middle is looked at: all of it, resized, would take gigabytes.
    strip = torch.arange(100_000).div(400).to(torch.uint8)
    for shape in ((1, 1, -1), (1, -1, 1)):
        assert (evaluation_pixels(strip.reshape(shape), (224, 224), 0.875).float() - 124.5).abs().max() <= 1
    for crop_pct in (0.0, 1.1, 87.5):
        with pytest.raises(ValueError, match="crop_pct"):
            evaluation_pixels(image, (4, 4), crop_pct)


def saved(folder: Path, image_size: int) -> Path:
    model = MaskedAutoencoder(**{**SIZES, "image_size": image_size})
    about = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "mask_ratio": 0.75}
    export_autoencoder(model.state_dict(), {"model": model.config, **about}, folder)
    return folder / "model.safetensors"


@pytest.fixture(params=[32, 128, 256])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(tmp_path, request.param)


def files(folder: Path) -> list[Path]:
    """Images of several kinds, all of them also read by Pillow."""
    picture = Image.fromarray(smooth(90, 130))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    content = {
        "photo.jpg": encoded(picture, "JPEG", quality=95),
        "lying.jpg": encoded(picture, "JPEG", exif=exif),
        "grey.png": encoded(picture.convert("L"), "PNG"),
        "clear.png": encoded(Image.fromarray(smooth(90, 130, 4)), "PNG"),
        "deep.png": png16((smooth(90, 130).astype(np.uint16) << 8) + 77),
        "palette.gif": encoded(picture.quantize(), "GIF"),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in sorted(content)]


def test_the_transform_gives_what_the_commands_give(weights: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "images").mkdir()
    paths = files(folder)
    encoder, transform = mae.load_encoder(weights), mae.transform(weights)
    size = encoder.patch_embed.img_size
    assert size is not None
    data = ImageData(root=str(folder), image_size=size, mean=transform.mean, std=transform.std)
    data.load()
    assert data.train_source is not None
    assert data.crop_pct == transform.crop_pct  # of every command that reads images for these weights
    batch = WholeSamples(data.train_source, size, data.crop_pct)[range(len(paths))]
    wanted = normalize(batch.images, torch.tensor(data.mean), torch.tensor(data.std))
    images = [Image.open(path) for path in paths]
    assert torch.equal(torch.stack([transform(image) for image in images]), wanted)

    arrays = [transform(chw(smooth(90, 130))), transform(Image.fromarray(smooth(90, 130)))]
    assert torch.equal(*arrays)
    theirs = create_transform(**resolve_model_data_config(encoder))
    found = theirs(Image.fromarray(smooth(90, 130)))
    assert (found - arrays[0]).abs().max() <= 2.1 / 255 / min(transform.std)

    class Opened(list[Any]):
        """As a data set of Hugging Face gives the same images: opened, but not decoded."""

        def __getitem__(self, index: int) -> Any:  # type: ignore[override]
            return {"image": Image.open(io.BytesIO(paths[index].read_bytes()))}

    source = DatasetSource(Opened(paths))
    assert torch.equal(WholeSamples(source, size, data.crop_pct)[range(len(paths))].images, batch.images)


def test_what_the_transform_refuses(weights: Path) -> None:
    for image, message in ((np.zeros((3, 8, 8)), "ndarray"), (torch.zeros(1, 8, 8, dtype=torch.uint8), "(1, 8, 8)")):
        with pytest.raises(UserError, match="the image") as caught:
            mae.transform(weights)(image)
        assert message in str(caught.value)


@pytest.mark.slow
def test_every_command_sees_these_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of the patch embedding in five commands, each of the same photographs."""
    for split, seeds in (("train", range(4)), ("val", range(4, 6))):
        for name in ("cat", "dog"):
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for seed in seeds:
                Image.fromarray(smooth(150, 200 + seed, seed=seed)).save(folder / f"{seed}.jpg")
    src = saved(tmp_path, 128)
    transform, val = mae.transform(src), sorted((tmp_path / "data" / "val").rglob("*.jpg"))
    wanted = [transform(Image.open(path)) for path in val]
    seen: list[Tensor] = []
    forward = PatchEmbed.forward

    def watched(self: PatchEmbed, images: Tensor) -> Tensor:
        seen.extend(() if images.is_meta else images)
        return forward(self, images)

    monkeypatch.setattr(PatchEmbed, "forward", watched)
    root, probe = f"--data.root={tmp_path / 'data'}", tmp_path / "probe"
    settings = [f"--run_dir={probe}", "--trainer.accelerator=cpu", "--wandb.mode=disabled", "--data.num_workers=0"]
    settings += ["--model.warmup_epochs=0", "--trainer.max_epochs=1", "--data.batch_size_per_device=4"]
    for command in (
        ["knn", f"--encoder={src}", root, "--k=1", "--baseline=false"],
        ["embed", f"--encoder={src}", root, f"--out={tmp_path / 'x.npz'}", "--num_workers=0"],
        ["probe", f"--model.encoder={src}", root, *settings],
        ["evaluate", f"--model={probe}", root, "--data.num_workers=0"],
        ["predict", *map(str, val), f"--model={probe}", f"--out={tmp_path / 'x.csv'}"],
    ):
        seen.clear()
        assert main(command) == 0, command
        for path, image in zip(val, wanted, strict=True):
            assert any(torch.equal(image, other) for other in seen), (command[0], path)
