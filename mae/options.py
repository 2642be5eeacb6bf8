"""What commands share: a parser whose errors are one line, packaged configs by name, and checks of files to write.

Nothing heavy is imported here: `--help` and a mistyped option are answered before torch is loaded.
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from mae.errors import UserError, did_you_mean
from mae.runtime.files import is_written_in_place
from mae.runtime.run_files import load_yaml, read_yaml

CONFIGS = Path(__file__).parent / "configs"

# Of packaged configs: one for each command that has some, and what is laid over a config of pre-training.
CONFIG_FOLDERS = ("pretrain", "linprobe", "finetune", "report", "ablations")

CONFIG_OPTIONS = ("--config", "-c")

SRC_HELP = "Weights: a run folder or file, or the official code's, timm's, Hugging Face's."


class ToolParser(ArgumentParser):
    """A parser whose errors are UserErrors, of one line, and which finds packaged configs by their names."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        # `--model.mask 0.5` is a typo and not --model.mask_ratio.
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        config = super().parse_args(with_config_paths(words, self.prog.removeprefix("mae ")), *more, **settings)
        return expand_home(config)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self.readable(message))

    def readable(self, message: str) -> str:
        """The parser's message, with options named as they are typed."""
        if match := re.fullmatch(r"the following arguments are required: (.*)", message, re.DOTALL):
            positional = {action.dest: action.metavar for action in self._actions if not action.option_strings}
            missing = [str(positional.get(key, f"--{key}")) for key in match[1].split(", ")]
            verb = "is" if len(missing) == 1 else "are"
            return f"{', '.join(missing)} {verb} missing; `{self.prog} --help` says what each one is"
        if match := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            return message + did_you_mean(match[1], [option for a in self._actions for option in a.option_strings])
        return wrong_type(message) or message


def expand_home(value: Any) -> Any:
    """Settings with `~` and `~user` replaced where a text begins with them, as the shell does for words of its own.

    Every text counts as a path, so that none can be forgotten, but for what W&B is to call a run.
    """
    if isinstance(value, Namespace):
        for key in list(vars(value)):
            if key != "wandb":
                value[key] = expand_home(value[key])
        return value
    if isinstance(value, dict):
        return {key: expand_home(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "settings {key: value}",
    "NoneType": "null",
}


def wrong_type(message: str) -> str | None:
    """The parser's message about a value of another type, in plain words; None where it is about something else."""
    text = " ".join(message.split())
    expected = r"Expected a (?P<type>.+?)\. Got value: (?P<value>.*)"
    union = r"Does not validate .* Subtypes: \[(?P<types>.*)\] Errors: .* Given value: (?P<given>.*)"
    match = re.fullmatch(rf'Parser key "(?P<key>[\w.]+)": (?:{expected}|{union})', text)
    if not match:
        return None
    names = []
    for name in re.split(r", (?![^\[]*\])", match["type"] or match["types"]):
        if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", name):
            names.append(literal[1].replace("'", ""))
        elif numbers := re.fullmatch(r"tuple\[((?:int|float)(?:, (?:int|float))*)\]", name):
            names.append(f"a list of {numbers[1].count(',') + 1} numbers")
        elif (plain := re.fullmatch(r"<class '(\w+)'>", name)) and plain[1] in TYPE_NAMES:
            names.append(TYPE_NAMES[plain[1]])
        else:
            return None
    value = match["value"] if match["type"] else match["given"]
    return f"--{match['key']} {value}: it must be {' or '.join(names)}"


# ---- packaged configs ----------------------------------------------------------------------------------------------


def with_config_paths(words: Sequence[str], command: str) -> list[str]:
    """Command-line words with the value of each `--config` replaced by a path, where it names a packaged config.

    Raises:
        UserError: There is no such config, or it cannot be read.
    """
    result: list[str] = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        is_config = option in CONFIG_OPTIONS if equals else bool(result) and result[-1] in CONFIG_OPTIONS
        if is_config and not is_yaml_text(value):
            value = find_config(value, command)
            read_yaml(Path(value))
        elif value.endswith((".yaml", ".yml")) and os.path.isfile(value):  # settings of a group, such as --trainer
            load_yaml(Path(value))
        word = option + equals + value
        result.append(word)
    return result


def config_names() -> list[str]:
    """Names of the packaged configs, such as pretrain/vitb16_in1k, in the order of the stages."""
    paths = sorted(path for folder in CONFIG_FOLDERS for path in (CONFIGS / folder).glob("*.yaml"))
    paths.sort(key=lambda path: CONFIG_FOLDERS.index(path.parent.name))
    return [f"{path.parent.name}/{path.stem}" for path in paths]


def is_yaml_text(config: str) -> bool:
    """Whether the value of --config is settings as YAML text, an option, or missing, rather than a file."""
    return not config or config.startswith("-") or (bool(re.search(r"[{:\n]", config)) and not os.path.lexists(config))


def find_config(config: str, command: str = "") -> str:
    """The path of a config.

    Args:
        config: A path; the name of a packaged config, pretrain/vitb16_in1k, `configs/` before and `.yaml` behind it
            allowed; or settings as YAML text, which are returned as they are. A file that exists wins.
        command: For which command, so that `mae pretrain` takes vitb16_in1k for pretrain/vitb16_in1k.

    Raises:
        UserError: There is neither a file nor a packaged config of this name.
    """
    config = os.path.expanduser(config)
    if is_yaml_text(config) or (os.path.lexists(config) and not os.path.isdir(config)):
        return config
    name = config.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    names = config_names()
    for candidate in (name, f"{command}/{name}"):
        if candidate in names:
            return str(CONFIGS / f"{candidate}.yaml")
    short = [each.partition("/")[2] for each in names if each.startswith(f"{command}/")]
    hint = did_you_mean(name, [*names, *short])
    raise UserError(f"--config {config} cannot be read: no such file or packaged config, see `mae configs`{hint}")


def run_name(config: str | Path, *over: str | Path) -> str:
    """What a run of this config is called: the file's name, behind its folder's where that is one of packaged configs.

    pretrain/vitb16_in1k.yaml gives pretrain_vitb16_in1k, my.yaml gives my.

    Args:
        over: Configs that are laid over it; the ablations among them are part of the name.
    """
    path = Path(config)
    name = f"{path.parent.name}_{path.stem}" if path.parent.name in CONFIG_FOLDERS else path.stem
    return "_".join([name, *(path.stem for path in map(Path, over) if path.parent.name == "ablations")])


# ---- settings and files --------------------------------------------------------------------------------------------


def flatten_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their keys on the command line."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten_settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def out_file(path: str, option: str = "--out") -> Path:
    """A file that can be written, checked before the work that fills it is done."""
    out = Path(path)
    if not out.parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"{option} {out} is a folder; wanted is a file")
    if not os.access(out if is_written_in_place(out) else out.parent, os.W_OK):  # other files are replaced
        raise UserError(f"{option} {out} cannot be written: no permission")
    return out


def require_utf8(path: str | Path, option: str = "") -> None:
    """Refuse a place for weights, or for chunks of features, that torch and safetensors could not open.

    Raises:
        UserError: Its name is not UTF-8.
    """
    if re.search("[\ud800-\udfff]", str(path)):
        raise UserError(f"{option} {path} is not a UTF-8 name, as torch and safetensors need: rename it".lstrip())


def check_ranges(group: str, interval: str, **values: Any) -> None:
    """Refuse settings that are outside an interval.

    Args:
        group: Of the settings on the command line: `--GROUP.KEY`; empty: `--KEY`.
        interval: As in mathematics: "[0, 1)" is 0 or more and below 1, "(0, inf)" is above 0.
        values: By key; numbers, sequences of them, or None, which is not looked at.

    Raises:
        UserError: Names the key, its value and what is wanted.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
    below = "" if high == math.inf else f" and at most {high:g}" if interval[-1] == "]" else f" and below {high:g}"
    for key, value in values.items():
        for number in [] if value is None else value if isinstance(value, list | tuple) else [value]:
            reached = low <= number if interval[0] == "[" else low < number
            if not (reached and (number <= high if interval[-1] == "]" else number < high)):
                option = f"--{group}.{key}" if group else f"--{key}"
                raise UserError(f"{option} {value}: it must be {above}{below}")


def plural(count: int, noun: str) -> str:
    """3, "class" -> "3 classes"."""
    if count != 1:
        noun = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun}"
