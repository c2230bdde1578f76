"""Fields of a configuration that carry their own help text and rules, so that a flag is one field.

    @configuration
    class Settings:
        batch_size: int = setting("Examples per optimizer step.", default=16, at_least=1)

The help text becomes the flag's, the range is checked by `check_ranges`, and `resume_safe` and `per_row` say where the value may differ.
"""

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from jpeft.core.limits import FINITE, LARGEST, is_finite
from jpeft.core.options import describe, fits, shown
from jpeft.deprecation import renamed_fields
from jpeft.extras import explained

with explained():
    import tyro

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of a field besides its type and default.

    Attributes:
      help: Help text of the flag.
      at_least: Smallest value allowed.
      at_most: Largest value allowed.
      above: Bound that the value must exceed.
      resume_safe: Whether a run may be continued with another value, because the value does not change what is trained.
      per_row: Whether the runs of one comparison may have different values.
      old_names: Former names of the field, which still work with a warning.
      unrecorded: What a configuration without the field means, which was recorded before there was one; by default the default.
      positional: Whether the command line takes the value without the flag's name.
      metavar: What the help shows in place of the value; by default the type.
      registry: What the value is a name in, where that may have grown since the type was made; it then replaces the type in the check.
    """

    help: str
    at_least: int | float | None = None
    at_most: int | float | None = None
    above: int | float | None = None
    resume_safe: bool = False
    per_row: bool = False
    old_names: tuple[str, ...] = ()
    unrecorded: Any = None
    positional: bool = False
    metavar: str | None = None
    registry: Mapping[str, Any] | None = None

    def allows(self, value: Any) -> bool:
        """Return whether a number is in the range; NaN never is."""
        return (
            is_finite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (isinstance(value, float) or value <= (LARGEST if self.at_most is None else self.at_most))
        )

    @property
    def range(self) -> str:
        """The range in words, as an error message has it.

        >>> Setting("", at_least=0, at_most=1).range
        'between 0 and 1'
        """
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least} and {self.at_most}"
        bounds = ((self.above, "above"), (self.at_least, "at least"), (self.at_most, "at most"))
        parts = [f"{word} {bound:g}" for bound, word in bounds if bound is not None]
        return "positive" if parts == ["above 0"] else " and ".join(parts)

    def range_for(self, value: int | float) -> str:
        """The range in words, with the largest number that can be computed with if that is what a value exceeds."""
        largest = FINITE if isinstance(value, float) else LARGEST
        if self.at_most is not None or not value > largest:
            return self.range
        return " and ".join(filter(None, (self.range, f"at most {largest:g}" if isinstance(value, float) else f"at most {largest:,}")))


def setting(help: str, *, default: Any = dataclasses.MISSING, **rules: Any) -> Any:
    """Declare a field of a `configuration`.

    Args:
      help: Help text of the flag.
      default: Default value; a field without one must be given.
      **rules: Any other field of `Setting`.

    Example: `warmup: float = setting("Share of the steps with a rising rate.", default=0.06, at_least=0, at_most=1)`.
    """
    return dataclasses.field(default=default, metadata={Setting: Setting(help, **rules)})


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def configuration(cls: type[T]) -> type[T]:
    """Make a class a frozen, keyword-only dataclass whose fields, declared by `setting`, become flags with help.

    >>> @configuration
    ... class Options:
    ...     rate: float = setting("Learning rate.", default=0.1, above=0, old_names=("speed",))
    >>> check_ranges(Options(rate=0.0))
    Traceback (most recent call last):
    ValueError: rate must be positive, got 0.0.
    """
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    hints = typing.get_type_hints(made, include_extras=True)
    # tyro reads flags off the annotations; those of inherited fields were replaced when their own class was made.
    made.__annotations__ = {
        name: Annotated[hints[name], *_markers(settings_of(made)[name])] if name in settings_of(made) else hints[name]
        for name in inspect.get_annotations(made)
    }
    return renamed_fields(**renamed(made))(made)


def settings_of(cls: type) -> dict[str, Setting]:
    """Return the `Setting` of each field that has one; a subclass that changes only a default keeps its parent's."""
    found: dict[str, Setting] = {}
    for parent in reversed(cls.__mro__):
        fields = parent.__dict__.get("__dataclass_fields__", {})
        found |= {name: field.metadata[Setting] for name, field in fields.items() if Setting in field.metadata}
    return found


def names_where(cls: type, rule: Callable[[Setting], Any]) -> frozenset[str]:
    """Return the names of the fields whose `Setting` meets a condition.

    >>> from jpeft.training.config import TrainConfig
    >>> sorted(names_where(TrainConfig, lambda setting: setting.per_row))
    ['learning_rate', 'method', 'options', 'seed']
    """
    return frozenset(name for name, about in settings_of(cls).items() if rule(about))


def unrecorded(cls: type) -> dict[str, Any]:
    """Return the value of each field that means something else than its default where it was not recorded.

    >>> from jpeft.training.config import TrainConfig
    >>> unrecorded(TrainConfig)["decay_biases"]
    True
    """
    return {name: about.unrecorded for name, about in settings_of(cls).items() if about.unrecorded is not None}


def optional_fields(cls: type) -> frozenset[str]:
    """Return the names of a dataclass's fields that may be None, such as `int | None`.

    >>> from jpeft.training.config import TrainConfig
    >>> "clip" in optional_fields(TrainConfig), "progress" in optional_fields(TrainConfig)
    (True, False)
    """
    hints = typing.get_type_hints(cls)
    return frozenset(field.name for field in dataclasses.fields(cls) if type(None) in typing.get_args(hints[field.name]))


def renamed(cls: type) -> dict[str, str]:
    """Return the present name of each former name of a field.

    >>> from jpeft.training.config import TrainConfig
    >>> renamed(TrainConfig)["accumulate"]
    'grad_accum'
    """
    return {old: name for name, about in settings_of(cls).items() for old in about.old_names}


def check_ranges(config: Any) -> None:
    """Raise a ValueError for the first field whose value is of another type or out of its range; None is in that of an optional field.

    Raises:
      ValueError: naming the field, its value and its range.
    """
    optional, hints = optional_fields(type(config)), typing.get_type_hints(type(config))
    for name, about in settings_of(type(config)).items():
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        value = os.fspath(value) if isinstance(value, os.PathLike) else getattr(value, "tolist", lambda value=value: value)()
        # Whether a real number is finite belongs to its range.
        hint = hints[name] if about.registry is None else Literal[tuple(about.registry)]
        if not fits(1.0 if isinstance(value, float) else value, hint):
            raise ValueError(f"{name} must be {describe(hint)}, got {shown(value)}.")
        if isinstance(value, int | float) and not isinstance(value, bool) and not about.allows(value):
            raise ValueError(f"{name} must be {about.range_for(value)}{' (or none)' if name in optional else ''}, got {shown(value)}.")


def _markers(about: Setting) -> tuple[Any, ...]:
    """Return what tyro is told about a field."""
    positional = (tyro.conf.Positional,) if about.positional else ()
    return (*positional, tyro.conf.arg(help=about.help, metavar=about.metavar))
