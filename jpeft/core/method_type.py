"""The type of methods: it makes each class a frozen dataclass, whose options are checked when an instance is made."""

import abc
import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Any

from jpeft.core import options as opt


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, opt.option))
class MethodType(abc.ABCMeta):
    """Makes every class of a method a frozen dataclass of keyword options, and checks the options when an instance is made."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> Any:
        cls = super().__new__(mcs, name, bases, namespace, **kwargs)
        # Only the fields are needed. `Method` defines once what a frozen dataclass would compile for every class, which takes longer
        # than all else in `import jpeft`.
        make = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
        return make(cls)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @property
    def __signature__(cls) -> inspect.Signature:
        """The options, as `inspect.signature` and `help` show them."""
        own = opt.signature(cls)
        if not getattr(cls, "stage", ""):
            return own
        choose = inspect.Parameter("stage", inspect.Parameter.KEYWORD_ONLY, default=getattr(cls, "stage", ""), annotation="str")
        return own.replace(parameters=[*own.parameters.values(), choose])

    if not TYPE_CHECKING:  # a type checker reads the options off the fields

        def __call__(cls, *args: Any, **options: Any) -> Any:
            if not any(isinstance(base, MethodType) for base in cls.__bases__):  # `Method(...)`, the spelling of earlier versions
                from jpeft.core.function_method import FunctionMethod

                return FunctionMethod.deprecated(*args, **options)
            aliases = {field: name for name, field in opt.spellings(cls).items()}
            options = {aliases.get(name, name): value for name, value in options.items()}  # `dataclasses.replace` gives names of fields
            if "stage" in options and cls.stage:
                return cls.of_stage(options.pop("stage"))(**options)
            name = cls.name if isinstance(cls.name, str) else cls.__name__
            opt.refuse_unknown(name, inspect.signature(cls).parameters, args, options)
            method = super().__call__(**opt.checked_fields(cls, name, options))
            method.check()
            return method
