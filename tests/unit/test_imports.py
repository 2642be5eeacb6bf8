"""The direction of imports that docs/design.md draws: each line may import the lines above it, and no other."""

import ast
from collections.abc import Iterator

from conftest import ROOT

FLOORS = [
    ["errors"],
    ["options", "runtime"],
    ["commands"],
    ["models", "data"],
    ["training", "weights"],
    ["evaluation", "pretrain"],
    ["callbacks", "classify"],
    ["linprobe", "finetune"],
    ["launch"],
    ["bench"],
    ["cli"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
ADDRESSES = {"__init__", "checkpoint"}  # nothing of their own, only names for users


def imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports of ours), both as dotted names below `mae`."""
    for path in (ROOT / "mae").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "mae").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "mae":
                prefix = node.module[4:]
                for name in node.names if not prefix else ():
                    yield module, name.name
                if prefix:
                    yield module, prefix
            elif isinstance(node, ast.Import):
                yield from ((module, name.name[4:]) for name in node.names if name.name.startswith("mae."))


def test_imports_go_down() -> None:
    for module, imported in imports():
        importer, target = module.partition(".")[0], imported.partition(".")[0]
        if importer in ADDRESSES or importer == target or target == "__version__":
            continue
        assert target in FLOOR, f"{module} imports mae.{imported}: not in FLOORS"
        assert FLOOR[target] < FLOOR[importer], f"{module} imports mae.{imported}, which is not below it"
