"""What a command loads before it answers, and what it says: on `sys.modules`, never on the clock."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import yaml
from conftest import ROOT
from safetensors.torch import save_file

import mae
from mae import cli, commands, options
from mae.launch.short_help import HELP_TEXTS

HEAVY = ["torch", "lightning", "timm", "torchvision", "torchmetrics", "numpy"]
UNUSED = ["lightning", "torchmetrics", "sklearn", "matplotlib", "wandb", "transformers", "scipy", "pandas"]

# Runs commands in one process; prints which of the modules each has loaded that were not loaded before.
SCRIPT = """
import contextlib, io, json, sys
loaded = {}
for args, modules in json.loads(sys.argv[1]):
    from mae.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(args)
        except SystemExit as stop:
            code = stop.code
    loaded = {name for name in modules if name in sys.modules}
    result = {"args": args, "code": code, "loaded": sorted(loaded)}
    print(json.dumps({**result, "out": out.getvalue(), "err": err.getvalue()}))
"""


def run_commands(*jobs: list[str], modules: list[str]) -> list[dict[str, Any]]:
    """Run these commands one after another in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([(job, modules) for job in jobs])],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help_versions_and_mistakes_load_nothing_heavy() -> None:
    jobs = [
        *([], ["--help"], ["--version"], ["pretrian"], ["configs"], ["inspect", "a.pth", "--jsno=b"]),
        *([name, "--help"] for name in [*commands.PARSERS, *cli.TRAINING]),
    ]
    for done in run_commands(*jobs, modules=HEAVY):
        assert done["loaded"] == [], done["args"]
        assert done["code"] == (2 if done["args"] in (["pretrian"], ["inspect", "a.pth", "--jsno=b"]) else 0), done[
            "args"
        ]
        if done["args"] == ["pretrian"]:
            assert "did you mean pretrain?" in done["err"]
        elif done["args"][-1:] == ["--jsno=b"]:
            assert "did you mean --json?" in done["err"]
        elif done["args"][-1:] == ["--help"]:
            assert f"usage: mae {done['args'][0] if len(done['args']) > 1 else 'COMMAND'}" in done["out"]
        else:
            assert not done["err"], done["args"]
    only_start = run_commands([], ["--version"], ["pretrian"], ["pretrain", "--help"], modules=["jsonargparse", "yaml"])
    assert not any(done["loaded"] for done in only_start)


def test_tools_load_only_what_they_use(tmp_path: Path, image_folder: Path) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=28, patch_size=7, depth=1, num_classes=0)
    weights = str(tmp_path / "encoder.safetensors")
    save_file(encoder.state_dict(), weights)
    jobs = [
        ["doctor", str(image_folder), "--num_workers=0"],
        ["pack", str(image_folder), str(tmp_path / "shards"), "--num_workers=0"],
        ["pack", "--verify", str(tmp_path / "shards")],
        ["inspect", weights],
        ["convert", weights, str(tmp_path / "official.pth"), "--format=official"],
    ]
    for done in run_commands(*jobs, modules=UNUSED):
        assert (done["code"], done["loaded"]) == (0, []), (done["args"], done["err"])


def test_import_mae_is_light_and_lists_its_names() -> None:
    code = "import sys, mae; print(sorted({'torch', 'lightning', 'jsonargparse'} & {*sys.modules}), *dir(mae))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("[] ")
    assert {*mae.__all__, "__version__"} <= {*done.stdout.split()}
    assert {*mae.__all__} <= {*dir(mae)}
    with pytest.raises(AttributeError, match="module 'mae' has no attribute 'laod'"):
        mae.laod  # noqa: B018


def test_choices_of_light_parsers_are_those_of_the_code() -> None:
    from mae.evaluation import features
    from mae.models.vit import Pool
    from mae.weights import convert

    def choices(parser: options.ToolParser, dest: str) -> tuple[str, ...]:
        (action,) = (action for action in parser._actions if action.dest == dest)
        annotation = getattr(action, "_typehint", None)
        if annotation is None:
            return tuple(action.choices or ())
        literals = [annotation, *get_args(annotation)]
        return next(get_args(each) for each in literals if get_args(each) and isinstance(get_args(each)[0], str))

    assert tuple(features.POOLS) == tuple(commands.FEATURE_POOLS)
    assert choices(commands.inspect_parser(), "pool") == get_args(Pool)
    assert choices(commands.convert_parser(), "format") == tuple(convert.FORMATS)


def test_every_light_parser_belongs_to_a_command() -> None:
    assert commands.PARSERS.keys() <= cli.COMMANDS.keys()
    for name, parser in commands.PARSERS.items():
        assert parser().prog == f"mae {name}"


# ---- the short help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", HELP_TEXTS)
def test_the_short_help_is_short_and_true(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    settings = [setting for group in HELP_TEXTS[command].groups.values() for setting in group]
    assert 15 <= len(settings) <= 20
    assert len(shown.splitlines()) <= 45
    assert max(map(len, shown.splitlines())) <= 110
    assert "--help all" in shown
    assert "--print_config" in shown

    with pytest.raises(SystemExit):
        cli.main([command, "--help", "all"])
    full = capsys.readouterr().out
    assert len(full.splitlines()) > 300
    required = [] if command == "pretrain" else ["--model.encoder=x"]
    with pytest.raises(SystemExit):
        cli.main([command, *required, "--print_config"])
    values = options.flatten_settings(yaml.safe_load(capsys.readouterr().out))
    for option, default, _ in settings:
        assert f" {option} " in full, option
        if default is not None:
            assert values[option.removeprefix("--")] == yaml.safe_load(default), option
    for example in HELP_TEXTS[command].examples:
        assert example.split()[:2] == ["mae", command]
        with pytest.raises(SystemExit) as stop:
            cli.main([*example.split()[1:], "--print_config"])
        assert stop.value.code == 0
        capsys.readouterr()


# ---- messages of the parser ------------------------------------------------------------------------------------------


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_missing_arguments_are_named_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: --encoder, --data.root, --out are missing" in error_of(["embed"], capsys)
    assert "error: --data.root is missing" in error_of(["embed", "--encoder=a", "--out=b"], capsys)
    assert "error: SRC is missing; `mae inspect --help`" in error_of(["inspect"], capsys)
    assert "error: --encoder is missing" in error_of(["knn"], capsys)
    assert "error: --model.encoder is missing" in error_of(["linprobe"], capsys)


def test_mistyped_options_and_configs_get_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model.mask_ration=0.5; did you mean --model.mask_ratio?" in error_of(
        ["pretrain", "--model.mask_ration=0.5"], capsys
    )
    for args in (["--config", "pretrain/vitb16_in1"], ["--config=pretrain/vitb16_in1"]):
        assert "did you mean pretrain/vitb16_in1k?" in error_of(["pretrain", *args], capsys)
    assert "--config nowhere.yaml cannot be read: no such file" in error_of(["pretrain", "-c", "nowhere.yaml"], capsys)


def test_the_old_name_of_a_command_says_the_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    monkeypatch.setattr(cli, "command_function", lambda name: lambda args: called.append((name, args)))
    assert cli.main(["probe", "--mode=cached"]) == 0
    assert cli.main(["linprobe", "--mode=cached"]) == 0
    assert called == [("linprobe", ["--mode=cached"])] * 2
    shown = capsys.readouterr()
    assert shown.err == "mae: note: `mae probe` is an old name of `mae linprobe`\n"
    assert not shown.out


def test_a_hidden_module_is_there_again_afterwards() -> None:
    sys.modules.pop("antigravity", None)
    with cli.hidden_module("antigravity"), pytest.raises(ImportError):
        import antigravity  # noqa: F401
    assert "antigravity" not in sys.modules
    with cli.hidden_module("json"):
        assert sys.modules["json"] is json
