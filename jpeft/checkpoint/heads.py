"""Adapters that were saved before heads under unknown names were found by their structure."""

from collections.abc import Mapping
from typing import Any

from jpeft import tree
from jpeft.core.chain import Chain
from jpeft.core.method import Method
from jpeft.tree.head import head_leaves, heads_by_structure


def as_saved(method: Method, params: tree.Params, adapter: Mapping[str, Any]) -> Method:
    """The method with ``head=None`` where the base has such a head and the adapter trains none of it whole, as was the case then.

    Args:
      method: As recorded in the file.
      params: The base.
      adapter: As it was saved.
    """
    found = heads_by_structure(params)
    if not found or head_leaves(params, "auto").keys() != set(found):
        return method
    trained = {path for part in method.to_collections(adapter).values() for path in tree.flatten(part)}
    if trained & set(found):
        return method
    before = lambda part: part.replace(head=None) if getattr(part, "head", None) == "auto" else part
    return Chain(methods=tuple((name, before(part)) for name, part in method.parts)) if method.parts else before(method)
