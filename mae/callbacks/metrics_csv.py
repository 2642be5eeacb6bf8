"""metrics.csv, the record of a run."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mae.runtime.files import atomic_write, sync
from mae.runtime.run_files import read_metrics


class MetricsCSV(Logger):
    """Writes `metrics.csv`: one row for each optimiser step that is logged, one column for each metric.

    Args:
        path: The file.
        step: The optimiser step that the run goes on from: rows up to it are kept, later ones will be measured again.

    Raises:
        UserError: The file is not as it was written.

    Attributes:
        rows: All rows of the file, the kept ones included.
        behind: Why the file lacks rows; None where it holds all of them.
    """

    def __init__(self, path: Path, step: int = 0):
        super().__init__()
        self.path = path
        self.behind: OSError | None = None
        columns, rows = read_metrics(path)
        self.columns = columns or ["step"]
        self.rows: list[dict[str, Any]] = [row for row in rows if int(row["step"]) <= step]

    def cut_back(self) -> None:
        """Remove the rows of later steps than the run goes on from.

        Raises:
            OSError: It cannot be written.
        """
        if self.path.exists():
            self.rewrite()

    def sync(self) -> None:
        """Flush the file to the disk.

        Raises:
            OSError: The file lacks rows, or cannot be flushed.
        """
        if self.behind:
            raise OSError(self.behind.errno, self.behind.strerror, str(self.path))
        if self.path.exists():
            sync(self.path)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: settings are in config.yaml."""

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
