"""What watches a run: metrics.csv, the progress bar, reconstruction pictures, features while they are learnt."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae.runtime.files import atomic_write, sync


class MetricsCSV(Logger):
    """`metrics.csv`: one row an optimiser step that was logged, one column a metric, empty where not measured.

    Args:
        path: The file.
        step: The optimiser step that the run goes on from: rows up to it are kept, later ones are measured again.
    """

    def __init__(self, path: Path, step: int = 0):
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: list[dict[str, Any]] = []
        self.behind: OSError | None = None  # why the file lacks rows
        if path.exists():
            # A line without an end was torn by a full disk, and no checkpoint knows of it.
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            reader = csv.DictReader(lines)
            self.rows = [row for row in reader if int(row["step"]) <= step]
            self.columns = list(reader.fieldnames or self.columns)

    def begin(self) -> None:
        """Cut the file back to where the run goes on.

        Raises:
            OSError: It cannot be written.
        """
        if self.path.exists():
            self.rewrite()

    def sync(self) -> None:
        """To the disk.

        Raises:
            OSError: Rows are missing in the file.
        """
        if self.behind:
            raise self.behind
        if self.path.exists():
            sync(self.path)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Settings are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        new_columns = [key for key in metrics if key not in self.columns]
        self.columns += new_columns
        same_row = bool(self.rows) and int(self.rows[-1]["step"]) == step
        if same_row:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
        try:
            if same_row or new_columns or self.behind:
                self.rewrite()
            else:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(self.rows[-1])
            self.behind = None
        except OSError as error:
            if not self.behind:
                print(f"mae: warning: {self.path} cannot be written: {error.strerror}; trying again", flush=True)
            self.behind = error

    def rewrite(self) -> None:
        with atomic_write(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
