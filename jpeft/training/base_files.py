"""The files of a pretrained model that are no weights, as part of a run's fingerprint: its configuration and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.checkpoint.adapter import WrongBaseError

_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Who wrote a file last, and from where: without meaning for the model.
_WITHOUT_MEANING = ("transformers_version", "_name_or_path", "name_or_path", "_commit_hash")


def base_files(folder: Path) -> dict[str, str]:
    """Return a digest of each such file in a model's folder. The order and spacing of JSON do not count."""
    return {name: _digest(folder / name) for name in _FILES if (folder / name).is_file()}


def changed_files(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """Return the names of the files that differ; none if it is not known what they were.

    >>> changed_files({"config.json": "1", "vocab.txt": "2"}, {"config.json": "1", "tokenizer.json": "3"})
    ['tokenizer.json', 'vocab.txt']
    """
    if before is None:
        return []
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def check_base_files(before: Mapping[str, str] | None, folder: Path, run: Path) -> None:
    """Check that configuration and tokenizer of a model are those that a run was trained with.

    Raises:
      WrongBaseError: naming the files that are not.
    """
    if changed := changed_files(before, base_files(folder)):
        raise WrongBaseError(
            f"The model in {folder} is not the one that the run in {run} was trained on: its {', '.join(changed)} changed since then."
        )


def _digest(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            values: Any = json.loads(content)
            if isinstance(values, dict):
                values = {name: value for name, value in values.items() if name not in _WITHOUT_MEANING}
            content = json.dumps(values, sort_keys=True).encode()
        except (ValueError, RecursionError):
            pass  # the loader will say so
    return hashlib.sha256(content).hexdigest()
