"""Reading one file as a table."""

from collections.abc import Sequence
from pathlib import Path

from jpeft.data.columns import from_columns
from jpeft.data.readers import read_content
from jpeft.data.tables import Table


def read(
    path: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str | None = "label",
    target: str | None = None,
    tags: str | None = None,
    tag_names: Sequence[str] = (),
) -> Table:
    """Read one file of texts.

    A value means the same in every format (`jpeft.data.values`). Null, NaN and a string of spaces are missing. A label is a string or a
    whole number; `1`, `1.0` and `"1"` are one label, `true` and `"True"` too. Numbers and truth values become texts as JSON spells them.

    Args:
      path: A `.csv`, `.tsv` (both with a header line), `.jsonl` (an object a line), `.json` (a list of objects), `.parquet` or `.txt`
        file, UTF-8. A `.txt` file has one column, "text"; blank lines separate the texts.
      text: Column of the texts; with tags, of the lists of words.
      pair: Column of the second texts of sentence pairs; None for single texts.
      label: Column of the classes; None for rows to be predicted and for data without classes.
      target: Column of the texts to generate; None for none.
      tags: Column of lists with a tag for each word (or of texts, "B-PER O O"); None for none.
      tag_names: Names of the tags 0, 1, ..., if the tags are numbers.

    Returns:
      The table, with its rows in the order of the file.

    Raises:
      ValueError: for a missing or empty file, an unknown suffix, a missing column, a row without text, label or target,
        and a file whose content does not fit its suffix. Rows are counted from 1, without the header; lines from 1, with it.

    >>> import pathlib, tempfile
    >>> from jpeft.data import read
    >>> path = pathlib.Path(tempfile.mkdtemp(), "reviews.csv")
    >>> _ = path.write_text("text,label\\ngood,1\\nbad,0\\n")
    >>> read(path).label
    ['1', '0']
    """
    path = Path(path)
    content = read_content(path)
    return from_columns(
        content.columns,
        str(path),
        text=text,
        pair=pair,
        label=label,
        target=target,
        tags=tags,
        tag_names=tag_names,
        lines=content.lines,
    )
