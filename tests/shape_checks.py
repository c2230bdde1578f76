"""Checks the types and shapes in jpeft's signatures while the tests run: an import hook for the packages it is given.

jaxtyping has such a hook. It checks functions inside of functions as well, and makes the checks of those anew in each call, which took a
fifth of the suite's time. This one checks functions and methods of modules: with beartype, and through jaxtyping where an annotation has a
shape.
"""

import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

import beartype
import jaxtyping

_NAME = "__check_signature__"
# As those of jaxtyping, its errors are TypeErrors, which is what a wrong argument is without the checks.
_checked = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))


def install(package: str) -> None:
    """Check what is imported of a package from now on.

    Raises:
      RuntimeError: if it is imported already.
    """
    if package in sys.modules:
        raise RuntimeError(f"{package} is imported already, so its functions cannot be checked.")
    sys.meta_path.insert(0, _Finder(package))


def checked(defined: Any) -> Any:
    """A function, method or dataclass that checks its arguments, and a function's result, when it is called."""
    if isinstance(defined, classmethod | staticmethod):
        return type(defined)(checked(defined.__func__))
    if isinstance(defined, property):
        return property(*(function and checked(function) for function in (defined.fget, defined.fset, defined.fdel)))
    if inspect.isclass(defined):
        # An `__init__` that a decorator has wrapped may take other arguments than its signature says.
        is_plain = dataclasses.is_dataclass(defined) and not hasattr(defined.__init__, "__wrapped__")
        return jaxtyping.jaxtyped(defined, typechecker=beartype.beartype) if is_plain else defined
    if not isinstance(defined, FunctionType) or getattr(defined, "__no_type_check__", False):
        return defined
    hints = [_resolved(hint, defined) for hint in defined.__annotations__.values()]
    if any(map(_has_shape, hints)) or Unknown in hints:
        return jaxtyping.jaxtyped(defined, typechecker=beartype.beartype)
    return _checked(defined) if hints else defined


class Unknown:
    """The hint that cannot be read while its module is imported; jaxtyping then takes anything."""


def _resolved(hint: Any, function: FunctionType) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, function.__globals__)
    except Exception:
        return Unknown


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = typing.get_args(hint)
    return any(_has_shape(part) for part in parts)


class _Transformer(ast.NodeTransformer):
    """Decorates classes, and functions outside of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        # At the end of the list, where it is the first to see the function: `jax.custom_vjp` and others return no function.
        node.decorator_list.append(_decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        # At the start, where `dataclass` has been before.
        node.decorator_list.insert(0, _decorator(node))
        self.generic_visit(node)
        return node


def _decorator(node: ast.FunctionDef | ast.ClassDef) -> ast.expr:
    return ast.copy_location(ast.Name(_NAME, ast.Load()), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        # Past the cache of compiled files, which holds them without checks.
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:
        tree = _Transformer().visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_NAME] = checked
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self.package = package

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.package and not fullname.startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
