"""adapter_config.json: which keys there are, what they may hold, and which of them are refused."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jpeft.core.options import shown
from jpeft.models.checkpoints.folder import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Kind(NamedTuple):
    """What a key may hold.

    Attributes:
      words: For messages: "a number".
      fits: Whether a value is one.
    """

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_names(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_regex(value: Any) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_rules(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(_is_regex(key) and fits(item) for key, item in value.items()))


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(_is_whole(item) and item >= 0 for item in value)


ANY = Kind("anything", lambda value: True)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number of at least 1", lambda value: _is_whole(value) and 1 <= value <= 10**9)
COUNT_OR_NULL = Kind("a whole number of at least 1, or null", lambda value: value is None or COUNT.fits(value))
WHOLE = Kind("a whole number", _is_whole)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
RATE = Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
TEXT = Kind("a text or null", lambda value: value is None or isinstance(value, str))
NAMES = Kind("a list of names or null", lambda value: value is None or is_names(value))
TARGETS = Kind("a list of names, a regular expression or null", lambda value: value in (None, "") or is_names(value) or _is_regex(value))
LAYERS = Kind("a whole number, a list of them or null", lambda value: value is None or _is_whole(value) or _is_indices(value))
INDICES = Kind("a list of whole numbers", _is_indices)
COUNT_RULES = Kind("an object of names and whole numbers of at least 1", _is_rules(COUNT.fits))
POSITIVE_RULES = Kind("an object of names and numbers above 0", _is_rules(POSITIVE.fits))


def one_of(*choices: Any) -> Kind:
    """One of some values."""
    return Kind(f"one of {', '.join(map(repr, choices))}", lambda value: any(type(value) is type(c) and value == c for c in choices))


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
      default: HF PEFT's.
      kind: What it may hold.
    """

    default: Any
    kind: Kind = ANY


# Of all types. What is of the kind ANY says nothing about the numbers.
COMMON: dict[str, Key] = {
    "peft_type": Key(None, TEXT),
    "task_type": Key(None, TEXT),
    "base_model_name_or_path": Key(None),
    "revision": Key(None),
    "inference_mode": Key(False),
    "auto_mapping": Key(None),
    "peft_version": Key(None, TEXT),
    "modules_to_save": Key(None, NAMES),
}

# Of all types that choose modules.
TARGETING: dict[str, Key] = {
    "target_modules": Key(None, TARGETS),
    "exclude_modules": Key(None, TARGETS),
    "layers_to_transform": Key(None, LAYERS),
    "layers_pattern": Key(None, TARGETS),
    "fan_in_fan_out": Key(False),  # follows from the layer, as HF PEFT corrects it, too
    "init_weights": Key(True),  # how a new adapter begins
}


class Config(Mapping[str, Any]):
    """The content of an adapter_config.json, with the defaults of what it leaves out.

    Attributes:
      file: The file, for messages.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]):
        self.file = file
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def replace(self, **values: Any) -> "Config":
        """The configuration with other values."""
        return Config(self.file, {**self._values, **values})

    def error(self, text: str) -> ValueError:
        """An error about the file."""
        return ValueError(f"{self.file}: {text}")


def read_content(folder: Path) -> dict[str, Any]:
    """The content of the folder's adapter_config.json.

    Raises:
      ValueError: if there is none, or it holds no JSON object.
    """
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return read_json(folder / CONFIG, f"{folder} is no adapter of HF PEFT: it holds no {CONFIG}. There is {there}.")


def checked(file: Path, content: Mapping[str, Any], keys: Mapping[str, Key], peft_type: str) -> Config:
    """The configuration with the defaults of a type.

    Args:
      file: For messages.
      content: Of the file.
      keys: All that the type knows.
      peft_type: Its name.

    Raises:
      ValueError: for a value of another kind, or keys that are set and not known: they may change what the adapter computes.
    """
    unknown = {key: value for key, value in content.items() if key not in keys and not _is_unset(value)}
    if unknown:
        listed = ", ".join(f"{key}={shown(value)}" for key, value in unknown.items())
        raise ValueError(
            f"{file}: jpeft does not know {listed} of {peft_type}. Such options may change what the adapter computes, so they are not "
            "ignored. Remove those that do not."
        )
    for key, value in content.items():
        if key in keys and not keys[key].kind.fits(value):
            raise ValueError(f"{file}: {key} must be {keys[key].kind.words}, not {shown(value)}.")
    return Config(file, {key: content.get(key, about.default) for key, about in keys.items()})


def _is_unset(value: Any) -> bool:
    """Whether a key that is not known has the value that an option has when it is not used."""
    return value is None or value is False or value in ({}, [], "")


def names_in(value: Sequence[str] | str | None) -> list[str]:
    """A list of names, or one name, as a list."""
    return [] if not value else [value] if isinstance(value, str) else list(value)
