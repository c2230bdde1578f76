"""`jpeft cloze`: classify with a language model, without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jpeft import data, models
from jpeft.cli.command import Command
from jpeft.cli.predictions import check_output, write_predictions
from jpeft.cli.tables import print_metrics
from jpeft.cli.texts import check_one_source, read_file_or_split
from jpeft.data.texts import texts_table
from jpeft.data.values import as_label
from jpeft.tasks.cloze import Cloze
from jpeft.tasks.sequence_classification import SequenceClassification
from jpeft.tasks.token_ids import check_token_ids


@dataclasses.dataclass(frozen=True)
class ClozeArgs:
    """Classify without training, by the words that a masked or causal language model predicts for a gap.

    Prints metrics if the data has labels. Writes predictions, one JSON object a line, if the data has no labels or --output is given.
    """

    # Folder or hub id of a language model.
    model: str
    # The text around the gap, such as "{text} It was {mask}."; for pairs also {pair}. For a causal model it ends with {mask}.
    template: str
    # The words of each label, each a single token: positive=great,good negative=terrible,bad
    words: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LABEL=WORD,WORD ...")]
    # Branch, tag or commit of the model on the hub; none for its main branch.
    revision: str | None = None
    # Data to classify: a file (all of its rows), a folder, "builtin[:name]" or "hub:name[/config]".
    data: str | None = None
    # Texts, each an argument, instead of data.
    text: tuple[str, ...] = ()
    # Second texts, for a template of pairs: one for each text.
    pair: tuple[str, ...] = ()
    # Name of the split; none for all rows of a file, and for the test split of other data.
    split: str | None = None
    # Column that holds the text.
    text_column: str = "text"
    # Column that holds the second text, for a template of pairs.
    pair_column: str = "pair"
    # Column that holds the label; none for data without labels.
    label_column: str | None = "label"
    # JSONL file to write; none prints.
    output: str | None = None
    # Replace the output file.
    overwrite: bool = False
    # Tokens per text together with the template. Longer texts are cut; the template is not.
    max_length: int = 128
    # Examples per batch.
    batch_size: int = 32


def _run(args: ClozeArgs) -> None:
    check_one_source(args.text, args.data, "data with --data")
    check_output(args.output, overwrite=args.overwrite)
    cloze = Cloze(args.template, _parse_words(args.words))
    table = _read_table(args, pairs="{pair}" in args.template)
    if unknown := sorted(set(table.label or ()) - set(cloze.labels)):
        raise ValueError(f"--words has none for the label {unknown[0]!r} of the data; it has words for {', '.join(cloze.labels)}.")
    loaded = _load_language_model(args)
    arrays = cloze.encode(loaded.tokenizer, table.text, table.pair, max_length=args.max_length)
    check_token_ids(arrays, loaded)
    batch_size = min(args.batch_size, len(table))
    scores = cloze.classify(loaded.model.apply, {"params": loaded.params}, loaded.tokenizer, arrays, batch_size=batch_size)
    if args.data is not None and table.label is not None:
        expected = np.array([cloze.labels.index(label) for label in table.label], np.int32)
        name = args.split or (args.data if Path(args.data).is_file() else "test")
        print_metrics({name: SequenceClassification().metrics(scores, {"label": expected}, cloze.labels)})
    if table.label is None or args.output is not None:
        write_predictions(args.output, table, SequenceClassification().predictions(scores, cloze.labels, loaded.tokenizer))


def _parse_words(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return each label with its words, from arguments such as `positive=great,good`."""
    out: dict[str, tuple[str, ...]] = {}
    for argument in words:
        label, equals, listed = argument.partition("=")
        label = as_label(label) or label  # spelled as the labels of data are
        if not equals or not label:
            raise ValueError(f"{argument!r} in --words is not of the form LABEL=WORD,WORD, such as positive=great,good.")
        if label in out:
            raise ValueError(f"The label {label!r} is given twice in --words: list all of its words after one {label}=.")
        out[label] = tuple(word.strip() for word in listed.split(",") if word.strip())
    if len(out) < 2:
        raise ValueError(f"To choose between labels, --words needs at least two of them, got {', '.join(out) or 'none'}.")
    return out


def _read_table(args: ClozeArgs, *, pairs: bool) -> data.Table:
    if args.data is None:
        return texts_table(args.text, args.pair, needs_pairs=pairs, reader="template", names=("--text", "--pair"))
    if args.pair:
        raise ValueError("--pair holds the second texts of --text; the second texts of --data are in the column --pair-column.")
    names = {"text": args.text_column, "pair": args.pair_column if pairs else None, "label": args.label_column}
    return read_file_or_split(args.data, args.split, **names)


def _load_language_model(args: ClozeArgs) -> models.Loaded:
    loaded = models.load(args.model, task="language-model", revision=args.revision)
    if args.max_length > loaded.config.max_length:
        raise ValueError(f"max_length={args.max_length} is more than the model's {loaded.config.max_length} positions.")
    if loaded.initialised:
        missing = ", ".join(sorted(loaded.initialised)[:3])
        raise ValueError(
            f"{args.model} is not a language model: it lacks {missing}, which predicts the word in the gap. "
            "Give a checkpoint with its language modelling head."
        )
    return loaded


COMMAND = Command("cloze", ClozeArgs, _run, names={name: f"--{name}-column" for name in ("text", "pair", "label")}, whole=("words",))
