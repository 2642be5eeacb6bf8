"""`mae attention`: the picture shows what the maps say."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import mae
from PIL import Image

from mae.cli import main
from mae.data.sources import load_digits
from mae.evaluation.plots import BORDER
from mae.models.attention_maps import attention_maps
from mae.weights.load import load_encoder, read_weights


def test_the_picture_shows_the_maps_in_one_scale_over_the_image(pretrained: Path, tmp_path: Path) -> None:
    digit = load_digits()[1].open(0).pixels()
    Image.fromarray(digit[0].numpy()).save(tmp_path / "digit.png")
    out = tmp_path / "attention.png"
    done = mae("attention", tmp_path / "digit.png", "--model", pretrained, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "original, mean of heads, head 0, head 1" in done.stdout
    picture = np.asarray(Image.open(out))
    about = read_weights(str(pretrained)).description
    image = (digit[None].float() / 255 - about["mean"][0]) / about["std"][0]
    heads = attention_maps(load_encoder(pretrained), image)[0]
    factor = 112 // 28
    width = 28 * factor + 2 * BORDER
    weights = (heads[1] / heads.max()).sqrt().repeat_interleave(7, 0).repeat_interleave(7, 1)
    colours = matplotlib.colormaps["magma"]((weights * 255).round().int().numpy())[..., :3]
    wanted = torch.tensor(0.8 * 255 * colours + 0.2 * digit[0][..., None].numpy()).float()
    strip = picture[34 + BORDER : 34 + BORDER + 28 * factor : factor, 3 * width + BORDER : 4 * width - BORDER : factor]
    assert torch.allclose(torch.tensor(strip.copy()).float(), wanted, atol=1.5)


def test_what_cannot_be_shown_is_one_line(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    args = ["attention", str(tmp_path / "a.png"), "--model", str(pretrained), "--out", str(tmp_path / "o.png")]
    assert main([*args, "--block", "7"]) == 2
    assert "--block 7: block 7 must be in 0 to" in capsys.readouterr().err
    assert main([args[0], str(tmp_path), *args[2:]]) == 2
    assert f"{tmp_path} is a folder: name the images to show, such as {tmp_path}/*.jpg" in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(b"no image")
    assert main(args) == 2
    assert "a.png" in capsys.readouterr().err
