"""The direction of imports that docs/design.md draws."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mae"
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "randomness": set(),
    "model": set(),
    "optim": set(),
    "tracking": set(),
    "scores": set(),
    "images": {"errors"},
    "heads": {"errors"},
    "data": {"errors", "images", "randomness"},
    "labelled": {"data", "errors", "randomness"},
    "checkpoint": {"errors", "model"},
    "classifier": {"checkpoint", "errors", "model"},
    "pictures": {"model"},
    "audit": {"errors", "optim"},
    "training": {"audit", "data", "errors", "optim"},
    "pretrain": {"audit", "data", "errors", "model", "optim", "randomness", "training"},
    "classify": {
        "audit",
        "checkpoint",
        "classifier",
        "data",
        "errors",
        "model",
        "optim",
        "randomness",
        "scores",
        "training",
    },
    "features": {"data"},
    "cached": {"errors", "features", "heads", "labelled", "scores"},
    "callbacks": {
        "data",
        "errors",
        "features",
        "heads",
        "labelled",
        "pictures",
        "pretrain",
        "randomness",
        "tracking",
        "training",
    },
    "runs": {
        "cached",
        "callbacks",
        "checkpoint",
        "classify",
        "data",
        "errors",
        "labelled",
        "model",
        "pictures",
        "pretrain",
        "scores",
        "tracking",
        "training",
    },
    "tools": {
        "checkpoint",
        "data",
        "errors",
        "features",
        "images",
        "labelled",
        "model",
        "pictures",
        "randomness",
        "runs",
    },
    "evaluate": {"classifier", "data", "errors", "images", "pictures", "runs", "scores", "training"},
    "demo": {"features", "model", "pictures", "runs"},
    "page": set(),
    "report": {"errors", "page", "runs", "tools", "training"},
    "cli": {"demo", "errors", "evaluate", "report", "runs", "tools"},
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
