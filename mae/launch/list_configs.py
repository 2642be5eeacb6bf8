"""`mae configs`: the packaged configs, each with what it is for."""

from collections.abc import Sequence

from mae.commands import configs_parser
from mae.options import CONFIGS, config_names


def configs_command(args: Sequence[str]) -> None:
    configs_parser().parse_args(list(args))
    names = config_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {purpose(name)}")
    print(f"\nfor example: mae pretrain --config {names[0]} --data.root DIR; the files are in {CONFIGS}")


def purpose(name: str) -> str:
    """The first line of a packaged config, which is a comment that says what it is for."""
    with (CONFIGS / f"{name}.yaml").open() as file:
        return file.readline().removeprefix("#").strip()
