"""The data of a finished run, read again, and whether it is what the run was trained on."""

import os
import warnings
from collections.abc import Mapping

from jpeft import data
from jpeft.checkpoint.fingerprint import fingerprint
from jpeft.data import Table
from jpeft.training.build import read_columns
from jpeft.training.run import Run


def read_tables(run: Run) -> dict[str, Table]:
    """Return the splits of a run's data; a file is split as in training.

    Raises:
      ValueError: if the data is not there, or cannot be read.
    """
    place = run.config.data
    if not place.startswith(("builtin", "hub:")) and not os.path.exists(place):
        raise ValueError(f"The data of the run in {run.folder.path} was in {place}, and there is nothing now: say where it is with --data.")
    return data.splits(place, **read_columns(run.config, run.task))


def changed_splits(run: Run, tables: Mapping[str, Table]) -> list[str]:
    """Return the names of the splits that are not those that the run was trained and evaluated on."""
    recorded = run.folder.read_config()["data"]
    return [name for name, table in tables.items() if _digest(run, table) != recorded.get(name)]


def _digest(run: Run, table: Table) -> str | None:
    """Return what the run's configuration records of a split; None for one without rows, or with other labels."""
    if not len(table):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what `encode` says of the rows is said where they are used
            return fingerprint(run.task.identity(run.encode(table, run.labels)))
    except ValueError:
        return ""


def check_run_data(run: Run) -> None:
    """Check that the data in `run.config.data` is what the run was trained on.

    Raises:
      ValueError: naming the splits that differ.
    """
    if changed := changed_splits(run, read_tables(run)):
        raise ValueError(f"{run.config.data} is not the data of the run in {run.folder.path}: another {', '.join(changed)} split.")
