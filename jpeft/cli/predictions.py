"""Output of predictions: one JSON object a line, printed or in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft import data
from jpeft.checkpoint import files


def check_output(output: str | None, *, overwrite: bool) -> None:
    """Check that the output file is new or may be replaced, and can be written.

    Raises:
      ValueError: if the file exists and `overwrite` is False, or it cannot be written.
    """
    if output is None:
        return
    if Path(output).exists() and not overwrite:
        raise ValueError(f"The output file {output} is there already: choose another, or replace it with --overwrite.")
    files.check_output(output, folder=False)


def write_predictions(output: str | None, table: data.Table, predictions: Sequence[Mapping[str, Any]]) -> None:
    """Write each text with its prediction as a line of JSON, to the file or, if it is None, to standard output."""
    lines = []
    for row, prediction in enumerate(predictions):
        pair = {} if table.pair is None else {"pair": table.pair[row]}
        lines.append(json.dumps({"text": table.text[row], **pair, **prediction}, ensure_ascii=False, allow_nan=False) + "\n")
    if output is None:
        print("".join(lines), end="")
    else:
        files.write_atomically(output, "".join(lines))
        print(f"{len(lines)} predictions in {output}")
