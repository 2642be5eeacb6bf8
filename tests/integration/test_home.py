"""`~` in every option, file of settings and function that takes a path."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import DIGITS, save_images

import mae
from mae.bench.commands import BENCHES
from mae.cli import COMMANDS, main
from mae.errors import UserError
from mae.launch.api import as_yaml
from mae.options import ToolParser

NO_PATHS = ("wandb.entity", "wandb.name", "wandb.project")  # what W&B calls things
TEXTS = (str, str | None)


class Built(Exception):
    """A command has built its parser."""


def parser_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> ToolParser:
    def stop(parser: ToolParser, *args: Any, **settings: Any) -> None:
        raise Built(parser)

    with monkeypatch.context() as patch:
        patch.setattr(ToolParser, "parse_args", stop)
        with pytest.raises(Built) as built:
            main(words)
    parser: ToolParser = built.value.args[0]
    return parser


def test_every_text_option_of_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config", "again"):
        (tmp_path / name).write_text("{}")
    commands = [[name] for name in COMMANDS if name != "bench"] + [["bench", name] for name in BENCHES]
    seen = set()
    for words in commands:
        parser = parser_of(words, monkeypatch)
        args, keys, needed = [], [], []
        for action in parser._actions:
            kind = getattr(action, "_typehint", action.type)
            if kind in TEXTS and not action.choices:
                value = f"~/{action.dest}"
                args.append(value if not action.option_strings else f"{action.option_strings[0]}={value}")
                keys.append(action.dest)
            elif action.required and action.option_strings:
                needed.append(action.dest)
        args += ["--format=mae"] if "format" in needed else []
        found = parser.parse_args(args)
        for key in keys:
            wanted = f"~/{key}" if key in NO_PATHS else str(tmp_path / key)
            assert found[key] in (wanted, [wanted]), f"{words} {key}"
        seen |= set(keys)
    assert seen >= {
        *("run_dir", "ckpt_path", "data.root", "data.train_dir", "data.val_dir", "data.subset_file", "model.init"),
        *("model.encoder", "encoder", "out", "config", "json", "list", "images", "mask", "src", "dst", "dir", "root"),
    }


def test_settings_in_files_packaged_names_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data": {"root": "~/images", "val_dir": "s3://~/val"}, "run_dir": "runs/~/x"}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}]
    logger = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "~/logs"}}]
    settings["trainer"] = {"callbacks": callbacks, "logger": logger}  # type: ignore[assignment]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    found = parser_of(["pretrain"], monkeypatch).parse_args(["--config=~/mine.yaml", "--model.init=~nobody-here/x"])
    assert found.data.root == f"{tmp_path}/images"
    assert (found.data.val_dir, found.run_dir) == ("s3://~/val", "runs/~/x")
    assert found.trainer.logger[0].init_args.save_dir == f"{tmp_path}/logs"
    assert found.model.init == "~nobody-here/x"
    with pytest.raises(UserError, match=f"{tmp_path}/none.yaml cannot be read"):
        parser_of(["pretrain"], monkeypatch).parse_args(["--config", "~/none.yaml"])


def test_python(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").symlink_to(pretrained)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert mae.load_encoder("~/run").embed_dim == 32
    for split in ("a", "b"):
        save_images(tmp_path / "images" / split / "x", 4)
    data = mae.ImageData(root="~/images", train_dir="~/images/a", val_dir="~/images/b", image_size=16, num_workers=0)
    data.setup("fit")
    found = mae.embed_images("~/run", "~/images")
    assert len(found.paths) == 8
    assert np.isfinite(found.features).all()
    settings = dict(word.removeprefix("--").split("=") for word in DIGITS[1:])
    own = {key.replace(".", "__"): yaml.safe_load(value) for key, value in settings.items()}
    with pytest.raises(UserError, match=f"{tmp_path}/none does not exist"):
        mae.run_pretrain("digits", Path("~/new"), size="nano", model__init="~/none", model__patch_size=7, **own)
    assert as_yaml(Path("~/new")) == "~/new"
    assert list((tmp_path / "here").iterdir()) == []
