"""Run a notebook and keep its outputs, and nothing of this machine: python notebooks/execute.py NOTEBOOK.

Needs nbclient and ipykernel. The notebook runs in its own folder and sees the environment (MAE_SRC, MAE_DATA).
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def execute(path: Path) -> None:
    """Run all cells in order and write the notebook back; where a cell fails, nothing is written.

    Raises:
        nbclient.exceptions.CellExecutionError: Holds the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel adds its Python's version
    nbformat.write(notebook, path)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
