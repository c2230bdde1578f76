"""Parameter trees by path: flatten, unflatten, replace, count.

Everything in jpeft names a parameter by its path, the '/'-joined keys that lead to it (``encoder/layer/0/query/kernel``). Nested dicts,
``FrozenDict``, dataclass modules and NNX states have paths of the same form. An NNX state wraps each array in an ``nnx.Variable``; the
wrapper's own key, ``value``, is not part of the path.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Any  # a pytree of arrays
Path = str


def path_str(keys: tuple[Any, ...]) -> Path:
    """The '/'-joined form of a JAX key path.

    >>> jax.tree_util.tree_flatten_with_path({"a": [1, 2]})[0][1][0], path_str(jax.tree_util.tree_flatten_with_path({"a": [1, 2]})[0][1][0])
    ((DictKey(key='a'), SequenceKey(idx=1)), 'a/1')
    """
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_variable(node: Any) -> bool:
    """Whether a node is an ``nnx.Variable``, told by name so that jpeft need not import NNX."""
    return _is_variable_class(type(node))


@functools.cache
def _is_variable_class(cls: type) -> bool:
    return any(base.__name__ == "Variable" and base.__module__.startswith("flax.nnx") for base in cls.__mro__)


def paths(tree: Params) -> list[Path]:
    """The path of each leaf, in the order of `jax.tree.leaves`.

    >>> paths({"b": {"kernel": 1, "bias": 2}, "a": 3})
    ['a', 'b/bias', 'b/kernel']
    """
    out: list[Path] = []
    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]:
        inner = jax.tree_util.tree_flatten_with_path(node)[0] if _is_variable(node) else [((), node)]
        out += [path_str(keys)] if len(inner) == 1 else [path_str((*keys, *more)) for more, _ in inner]
    return out


def flatten(tree: Params) -> dict[Path, Any]:
    """All leaves of any pytree by path, in tree order.

    >>> list(flatten({"b": {"kernel": 1, "bias": 2}, "a": 3}))
    ['a', 'b/bias', 'b/kernel']
    """
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict with these paths: the inverse of `flatten` for nested dicts.

    >>> unflatten({"a": 3, "b/bias": 2})
    {'a': 3, 'b': {'bias': 2}}
    """
    out: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return out


def replace(params: Params, leaves: Mapping[Path, Any]) -> Params:
    """`params` with some leaves exchanged, of the same type and structure; untouched leaves are the very same objects.

    >>> replace({"a": 1, "b": {"bias": 2}}, {"b/bias": 5})
    {'a': 1, 'b': {'bias': 5}}
    """
    old, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [leaves.get(path, leaf) for path, leaf in zip(paths(params), old, strict=True)])


def key_for(key: jax.Array, path: Path) -> jax.Array:
    """The random key of one leaf. It depends on the path alone, so what is drawn for a leaf does not depend on the other leaves."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def copy(leaf: Any) -> Any:
    """A fresh array with the leaf's value: an adapter must own its buffers, or donating it to a jitted step would delete the base's."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)


def trained_copy(leaf: Any) -> Any:
    """A copy of a base leaf to be trained: float32 beside a base in half precision, whose rounding would swallow small steps.

    >>> trained_copy(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    wide = trained_dtype(leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, wide) if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, wide, copy=True)


def trained_dtype(dtype: Any) -> Any:
    """The dtype in which numbers beside or in place of a leaf of `dtype` are trained: float32 or wider; that of integers stays."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def like(tree: Params, base: Params) -> Params:
    """A tree with the dtypes of another that has its paths; leaves that have them already are the very same objects.

    >>> like({"a": jnp.ones(2)}, {"a": jnp.ones(2, jnp.bfloat16)})["a"].dtype
    dtype(bfloat16)
    """
    dtypes = {path: leaf.dtype for path, leaf in flatten(base).items() if hasattr(leaf, "dtype")}
    other = {path: leaf for path, leaf in flatten(tree).items() if path in dtypes and leaf.dtype != dtypes[path]}
    return replace(tree, {path: leaf.astype(dtypes[path]) for path, leaf in other.items()}) if other else tree


def size(tree: Params) -> int:
    """Number of scalars in all leaves, abstract ones included."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree: Params) -> int:
    """Bytes of all leaves, abstract ones included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def first_few(paths: Iterable[str] | Mapping[str, Any], count: int = 5) -> str:
    """The first few paths, for an error message."""
    names = list(paths)
    return ", ".join(f"'{name}'" for name in names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")
