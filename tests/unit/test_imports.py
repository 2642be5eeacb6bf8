"""The direction of imports that docs/design.md draws: each line may import the lines above it, and no other."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

from conftest import ROOT

FLOORS = [
    ["errors"],
    ["runtime"],
    ["options"],
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


MODULES = {
    ".".join(path.relative_to(ROOT / "mae").with_suffix("").parts): path for path in (ROOT / "mae").rglob("*.py")
}


def imports() -> Iterator[tuple[str, str]]:
    """(module, what it imports of ours), both as dotted names below `mae`; of a folder, the modules in it."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "mae":
                source = node.module[4:]
                for name in node.names:
                    inner = f"{source}.{name.name}".lstrip(".")
                    yield module, inner if inner in MODULES or not source else source
            elif isinstance(node, ast.Import):
                yield from ((module, name.name[4:]) for name in node.names if name.name.startswith("mae."))


def test_imports_go_down() -> None:
    for module, imported in imports():
        importer, target = module.partition(".")[0], imported.partition(".")[0]
        if importer in ADDRESSES or importer == target or target == "__version__":
            continue
        assert target in FLOOR, f"{module} imports mae.{imported}: not in FLOORS"
        assert FLOOR[target] < FLOOR[importer], f"{module} imports mae.{imported}, which is not below it"


def test_there_are_no_circles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, imported in imports():
        graph[module].add(imported)
    tuple(TopologicalSorter(graph).static_order())  # raises a CycleError that names the circle
