"""The tokenizer of a model's folder."""

import json
from pathlib import Path
from typing import Any

from jpeft.models.checkpoints.folder import import_transformers, read_json

# Each of these sets of files makes a tokenizer.
_COMPLETE = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("sentencepiece.bpe.model",),
    ("spiece.model",),
    ("tokenizer.model",),
)
_SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LARGE = ("tokenizer.json", "vocab.json")


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder. No code of the folder is run.

    Raises:
      ValueError: if it has none, or one of its files is missing or damaged.
    """
    present = [all((folder / name).is_file() for name in files) for files in _COMPLETE]
    if not any(present):
        if (folder / "vocab.json").is_file():
            raise ValueError(f"{folder} holds no whole tokenizer: vocab.json needs merges.txt beside it, or take tokenizer.json.")
        raise ValueError(f"{folder} holds no tokenizer (tokenizer.json, vocab.txt, or vocab.json and merges.txt).")
    for name in _SMALL:
        if (folder / name).exists():
            read_json(folder / name, f"{folder / name} is not a file.")
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        longest = tokenizer.model_max_length
        if isinstance(longest, int | float):  # checked below
            tokenizer("a \N{SNOWMAN}")  # some damage shows only when a text is encoded
    except Exception as error:  # the libraries raise errors of many types, and the tokenizers' own is no subclass of ValueError
        text = " ".join(str(error).split())[:400]
        raise ValueError(f"{folder}: its tokenizer cannot be read{_blame(folder)}: {type(error).__name__}: {text}") from error
    _check_kind(folder, tokenizer)
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest > 0:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: model_max_length must be a positive number, not {longest!r}.")
    if not len(tokenizer):
        raise ValueError(f"{folder}: its tokenizer knows no tokens: one of its files is empty or missing.")
    return tokenizer


def _check_kind(folder: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer of another kind than tokenizer.json says.

    Where no file names its class, `transformers` takes the class of the model type, which may make another tokenizer of the same words.
    """
    file, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    named = about.is_file() and read_json(about, "").get("tokenizer_class")
    if named or not file.is_file() or not getattr(tokenizer, "is_fast", False):
        return
    kind, made = ((read.get("model") or {}).get("type") for read in (read_json(file, ""), json.loads(tokenizer.backend_tokenizer.to_str())))
    if kind and kind != made:
        raise ValueError(
            f"{folder}: tokenizer.json holds a {kind} tokenizer, but {type(tokenizer).__name__}, the class for this model, makes a {made} "
            'one: write "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json.'
        )


def _blame(folder: Path) -> str:
    """Return which file is to blame, as far as that can be found out.

    Raises:
      ValueError: naming a file that is no JSON.
    """
    from tokenizers import Tokenizer

    for name in _LARGE:
        if (folder / name).is_file():
            read_json(folder / name, "")
    if (file := folder / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception:
            return f" ({file.name} is damaged)"
    names = [name for files in _COMPLETE for name in files if (folder / name).is_file()]
    return f" (of {', '.join([*names, *(['tokenizer_config.json'] if (folder / 'tokenizer_config.json').is_file() else [])])})"
