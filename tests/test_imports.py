"""The direction of imports that docs/design.md draws."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mae"
ALLOWED: dict[str, set[str]] = {
    "crops": set(),
    "errors": set(),
    "jpeg": set(),
    "model": set(),
    "optim": set(),
    "page": set(),
    "randomness": set(),
    "scores": set(),
    "tracking": set(),
    "audit": {"errors", "optim"},
    "checkpoint": {"errors", "model"},
    "heads": {"errors"},
    "images": {"crops", "errors", "jpeg"},
    "pictures": {"model"},
    "storage": {"errors"},
    "classifier": {"checkpoint", "errors", "model"},
    "sources": {"errors", "images"},
    "samples": {"crops", "images", "randomness", "sources"},
    "shards": {"errors", "images", "sources", "storage"},
    "data": {"crops", "errors", "images", "randomness", "samples", "shards", "sources", "storage"},
    "features": {"data", "samples"},
    "labelled": {"data", "errors", "images", "randomness", "samples", "sources"},
    "training": {"audit", "data", "errors", "optim", "samples"},
    "cached": {"errors", "features", "heads", "labelled", "scores"},
    "classify": {
        "audit",
        "checkpoint",
        "classifier",
        "data",
        "errors",
        "model",
        "optim",
        "randomness",
        "samples",
        "scores",
        "training",
    },
    "pretrain": {"audit", "errors", "model", "optim", "randomness", "samples", "training"},
    "callbacks": {
        "data",
        "errors",
        "features",
        "heads",
        "labelled",
        "pictures",
        "pretrain",
        "randomness",
        "samples",
        "sources",
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
        "samples",
        "scores",
        "tracking",
        "training",
    },
    "demo": {"features", "model", "pictures", "runs"},
    "evaluate": {
        "classifier",
        "data",
        "errors",
        "images",
        "pictures",
        "runs",
        "samples",
        "scores",
        "shards",
        "sources",
        "training",
    },
    "tools": {
        "checkpoint",
        "crops",
        "data",
        "errors",
        "features",
        "images",
        "labelled",
        "model",
        "pictures",
        "randomness",
        "runs",
        "samples",
    },
    "report": {"errors", "page", "runs", "tools", "training"},
    "cli": {"demo", "errors", "evaluate", "report", "runs", "samples", "tools"},
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
