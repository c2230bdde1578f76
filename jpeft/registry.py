"""Methods by name. Every method whose class stands in a file of the packages below is found; there is no list to edit."""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jpeft import additive, reparameterized, selective
from jpeft.core.chain import chain
from jpeft.core.method import Method
from jpeft.core.options import shown
from jpeft.deprecation import warn_renamed

PACKAGES = (selective, additive, reparameterized)


class MethodInfo(NamedTuple):
    """What is known of a method by its name alone; all of it is declared by the method's class.

    Attributes:
      name: As in ``jpeft.apply(params, method=name)``.
      family: ``"selective"``, ``"additive"`` or ``"reparameterized"``.
      summary: One line.
      factory: The method's class: ``factory(**options)`` is a `Method`.
      learning_rate: Peak AdamW learning rate that suits the method's defaults on a classification task.
      head_lr_scale: Learning rate of a newly made head, as a multiple of the method's.
    """

    name: str
    family: str
    summary: str
    factory: Callable[..., Method]
    learning_rate: float
    head_lr_scale: float

    @property
    def head_rate(self) -> float:
        """The old name of `head_lr_scale`."""
        warn_renamed("MethodInfo.head_rate", "MethodInfo.head_lr_scale")
        return self.head_lr_scale


def _modules(package: Any) -> Iterator[str]:
    """The names of all modules in a package and below, in the order of their names."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.ispkg:
            yield from _modules(importlib.import_module(module.name))
        else:
            yield module.name


@functools.cache
def classes() -> dict[str, type[Method]]:
    """The class of every method by name; of a method in stages, that of its first stage."""
    found: dict[str, type[Method]] = {}
    for package in PACKAGES:
        for module in map(importlib.import_module, _modules(package)):
            own = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
            made = [cls for cls in own if issubclass(cls, Method) and not inspect.isabstract(cls)]
            later = {stage for cls in made for stage in cls.later_stages}
            found |= {cls.name: cls for cls in made if cls not in later}
    return found


def methods() -> dict[str, MethodInfo]:
    """All methods by name.

    >>> import jpeft
    >>> jpeft.methods()["lora"].family
    'reparameterized'
    """
    return {name: MethodInfo(name, cls.family, cls.summary, cls, cls.learning_rate, cls.head_lr_scale) for name, cls in classes().items()}


def is_known(method: Method) -> bool:
    """Whether `make` can build the method again from its configuration."""
    known = classes().get(method.name)
    return known is not None and type(method) in (known, *known.later_stages)


def make(method: str | Mapping[str, Any] | Method | type[Method], **options: Any) -> Method:
    """A `Method` from its name or class and options, or from the plain data that `Method.config` gives.

    Raises:
      ValueError: for an unknown name or option, or options given beside a finished `Method`.

    >>> import jpeft
    >>> jpeft.make("lora", rank=4) == jpeft.make({"method": "lora", "rank": 4}) == jpeft.make(jpeft.lora, rank=4) == jpeft.lora(rank=4)
    True
    """
    if isinstance(method, Method):
        if options:
            raise ValueError(f"{method!r} is finished: give the options {sorted(options)} to its class instead.")
        return method
    if isinstance(method, type) and issubclass(method, Method):
        return method(**options)
    if isinstance(method, Mapping):
        options = {**method, **options}
        name = options.pop("method", None)
        if name == "chain":
            parts, others = options.pop("parts", None), sorted(options)
            if not isinstance(parts, Mapping) or others:
                what = f"and has {others} besides" if isinstance(parts, Mapping) else f"and has parts={parts!r}"
                raise ValueError(f"The configuration of a chain holds {{'method': 'chain', 'parts': {{name: configuration}}}}, {what}.")
            return chain(**{str(part): make(config) for part, config in parts.items()})
    else:
        name = method
    known = classes()
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " Chain methods with jpeft.chain(a=..., b=...)." if name == "chain" else ""
        raise ValueError(f"There is no method {shown(name)}.{hint} Methods: {', '.join(known)}; or pass a jpeft.Method of your own.")
    return known[name](**options)
