"""The direction of imports that docs/design.md draws."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mae"
ALLOWED = {
    "errors": set(),
    "randomness": set(),
    "model": set(),
    "optim": set(),
    "images": {"errors"},
    "tracking": set(),
    "data": {"errors", "images", "randomness"},
    "checkpoint": {"errors", "model"},
    "pictures": {"model"},
    "pretrain": {"data", "errors", "model", "optim", "randomness"},
    "features": {"data"},
    "callbacks": {"data", "errors", "pictures", "pretrain", "randomness", "tracking"},
    "runs": {"callbacks", "checkpoint", "data", "errors", "model", "pretrain", "tracking"},
    "tools": {"checkpoint", "data", "errors", "features", "images", "model", "pictures", "randomness", "runs"},
    "demo": {"features", "model", "pictures", "runs"},
    "cli": {"demo", "errors", "runs", "tools"},
    "__init__": {"checkpoint", "errors", "model"},
}


def test_modules_import_what_the_design_allows_and_nothing_else() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ALLOWED)
    for path in PACKAGE.glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mae":
                module = (node.module or "").split(".")
                found |= {module[1]} if len(module) > 1 else {name.name for name in node.names}
        assert found == ALLOWED[path.stem], path.name
