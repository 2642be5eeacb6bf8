"""Own subclasses of a stage or of its data by class path: `--model my.module.MyPretrain`, `--data my.module.MyData`.

The class is found before the parser is built, and the parser is built for it: its arguments are settings like any
other, with help and an error for typos. A run records the class in config.yaml as `model_class` or `data_class`, and
its checkpoints do, too; a checkpoint never chooses a class.
"""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mae.errors import UserError
from mae.options import find_config
from mae.runtime.reading import YAML
from mae.runtime.run_files import read_text, read_yaml

CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def with_values(args: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each argument, its option, and the value, which stands behind a "=" or is the next argument."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):  # without arguments there is none
        option, equals, value = arg.partition("=")
        yield arg, option, value if equals else following


def with_class_options(args: Sequence[str]) -> list[str]:
    """The arguments, with `--model CLASS` written as `--model_class CLASS`, and so for --data.

    Raises:
        UserError: What follows is no class path.
    """
    out: list[str] = []
    for arg, option, value in with_values(args):
        if option in ("--model", "--data"):
            if not CLASS_PATH.fullmatch(value):
                raise UserError(
                    f"{option} {value}: wanted is a class, {option} my.module.MyClass; settings are {option}.KEY VALUE"
                )
            arg = arg.replace(option, f"{option}_class", 1)
        out.append(arg)
    return out


def chosen(args: Sequence[str], key: str) -> str | None:
    """The class path that the arguments give for `key`, or the last configuration file that has one."""
    path: str | None = None
    for _, option, value in with_values(args):
        if option == f"--{key}":
            return value
        if option == "--config":
            path = from_config(value, key) or path
    return path


def from_config(name: str, key: str) -> str | None:
    try:
        path = Path(find_config(name))
        value = read_yaml(path).get(key) if key in read_text(path, YAML) else None
    except (UserError, OSError):
        return None  # the parser says what is wrong with it
    return value if isinstance(value, str) else None


def resolve(args: Sequence[str], key: str, base: type) -> type:
    """The class for `key`, `model_class` or `data_class`: `base`, or the subclass that the arguments name.

    Modules are looked for in the current folder, too.

    Raises:
        UserError: It cannot be imported, or is no subclass of `base`.
    """
    path = chosen(args, key)
    if path is None:
        return base
    option = f"--{key.removesuffix('_class')} {path}"
    if not CLASS_PATH.fullmatch(path):
        raise UserError(f"{option}: wanted is a class, my.module.MyClass")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and not (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(f"{option}: the module {module} needs the module {error.name}, which is missing") from None
        raise UserError(
            f"{option}: there is no module {module} in {os.getcwd()} or on PYTHONPATH ({', '.join(sys.path[:3])}, ...)"
        ) from None
    except AttributeError:
        raise UserError(f"{option}: the module {module} has no class {name}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{option} is no subclass of {base.__module__}.{base.__qualname__}")
    return found
