"""Adapters on disk: the adapter alone, through Orbax, with what it takes to refuse the wrong base.

A directory holds ``adapter/`` (Orbax) and ``jpeft.json``: the method and its options, every leaf's shape and dtype, checksums of the
files, and a fingerprint of the base. It is written beside its place and moved there when it is complete.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import registry, tree
from jpeft.checkpoint.files import replace_folder
from jpeft.checkpoint.fingerprint import damaged_files, file_checksums, fingerprint, leaf_table
from jpeft.core.method import Method
from jpeft.core.peft import Peft, check_peft
from jpeft.distributed import gather_to_host, on_first_process
from jpeft.hosts.registry import unwrap

_RECORD, _LEAVES, _FORMAT = "jpeft.json", "adapter", 1


class WrongBaseError(ValueError):
    """The parameters are not those that an adapter was trained on."""


def save(path: str | os.PathLike[str], peft: Peft, *, overwrite: bool = False) -> None:
    """Save an adapter, without its base. Of several processes all call it, with one path, which they all see.

    Args:
      path: A new directory.
      peft: What to save.
      overwrite: Replace what is at `path`.

    Raises:
      ValueError: if `path` exists and `overwrite` is not set.

    >>> import tempfile, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4))}}
    >>> folder = tempfile.mkdtemp() + "/out"
    >>> jpeft.save(folder, jpeft.apply(params, method="lora", rank=2))
    >>> jpeft.load(folder, params).method
    jpeft.lora(alpha=16.0, axes=None, dropout=0.0, head='auto', init='kaiming', rank=2, rslora=False, target='(.*/)?kernel', view='auto')
    """
    import orbax.checkpoint as ocp

    check_peft(peft, "save")
    target = Path(path).absolute()
    if on_first_process(target.exists) and not overwrite:
        raise ValueError(f"'{path}' exists already. Choose another place, or replace it: jpeft.save(..., overwrite=True).")
    record = {
        "format": _FORMAT,
        "method": _config(peft.method),
        "base": fingerprint(peft.params, skip=_replaced(peft.params, peft.adapter, peft.method)),
        "leaves": leaf_table(peft.adapter),
    }
    partial = target.parent / f".{target.name}.{on_first_process(lambda: uuid.uuid4().hex)}.partial"

    def finish() -> None:
        record["files"] = file_checksums(partial / _LEAVES)
        (partial / _RECORD).write_text(json.dumps(record, indent=1))
        replace_folder(partial, target)

    try:
        on_first_process(lambda: partial.mkdir(parents=True))
        if record["leaves"]:
            with ocp.StandardCheckpointer() as checkpointer:
                # Whole from several processes: it will be opened by one that has not all their devices.
                checkpointer.save(partial / _LEAVES, gather_to_host(peft.adapter))
        else:  # which Orbax would refuse: a frozen base without a head
            on_first_process((partial / _LEAVES).mkdir)
        on_first_process(finish)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(path: str | os.PathLike[str], params: tree.Params, *, method: Method | None = None, check_base: bool = True) -> Peft:
    """Load an adapter onto the base that it was trained on.

    Args:
      path: A directory that `save` wrote.
      params: The base. Leaves that the adapter replaces whole, such as a fresh head, may differ from those of the time of saving.
      method: For a method made by hand; a named method is built from the file.
      check_base: Set False to load onto other parameters on purpose, such as the same model in another dtype. Shapes must fit all the same.

    Raises:
      ValueError: if there is no adapter, it is damaged, lacks leaves or has some to spare, or belongs to another base.

    >>> import tempfile, jax.numpy as jnp, jpeft
    >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
    >>> folder = tempfile.mkdtemp() + "/out"
    >>> jpeft.save(folder, jpeft.apply(params, method="bitfit"))
    >>> jpeft.load(folder, params).adapter["dense"]["bias"].shape
    (4,)
    """
    import orbax.checkpoint as ocp

    params = unwrap(params)
    source = Path(path).absolute()
    if not (source / _RECORD).is_file():
        there = sorted(p.name for p in source.iterdir()) if source.is_dir() else "nothing"
        raise ValueError(f"'{path}' holds no adapter: {_RECORD} is missing; there is {there}.")
    try:
        record = json.loads((source / _RECORD).read_text())
        leaves, files, config = record["leaves"], record["files"], record["method"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"'{source / _RECORD}' is damaged ({type(e).__name__}: {e}); save the adapter again.") from e
    if record.get("format") != _FORMAT:
        raise ValueError(f"'{path}' has format {record.get('format')}, this jpeft reads format {_FORMAT}; update jpeft.")
    method = _method(config, method, path)
    # Looked at before Orbax opens anything: its other reads go on in the background when one fails.
    if damaged := damaged_files(source / _LEAVES, files):
        raise ValueError(f"The adapter in '{path}' is damaged: {damaged[0]} is not as it was saved ({len(damaged)} such files).")
    shapes = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for name, (shape, dtype) in leaves.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            adapter = checkpointer.restore(source / _LEAVES, target=tree.unflatten(shapes)) if shapes else {}
    except Exception as e:
        raise ValueError(f"The adapter in '{path}' is damaged or incomplete, Orbax says: {type(e).__name__}: {str(e)[:300]}") from e
    _check_fit(params, adapter, method, path)
    if check_base and fingerprint(params, skip=_replaced(params, adapter, method)) != record["base"]:
        raise WrongBaseError(
            f"The adapter in '{path}' was trained on another base: its fingerprint is {record['base'][:12]}, that of these parameters is "
            "not. Load the checkpoint that it was trained on, in the same dtype; or, if you know better, jpeft.load(..., check_base=False)."
        )
    return Peft(params, adapter, method)


def _config(method: Method) -> dict[str, Any]:
    """The method as plain data. A class of the user's own cannot be made from a file, so its name alone is recorded."""
    parts = [part for _, part in method.parts] or [method]
    return method.config() if all(registry.is_known(part) for part in parts) else {"method": method.name, "custom": True}


def _method(config: dict[str, Any], given: Method | None, path: Any) -> Method:
    if config.get("custom"):
        if given is None:
            raise ValueError(
                f"The adapter in '{path}' belongs to the hand-made method {config['method']!r}: pass it, jpeft.load(..., method=...)."
            )
        return given
    made = registry.make(config)
    if given is not None and given != made:
        raise ValueError(f"The adapter in '{path}' was made by {made!r}, not by {given!r}.")
    return made


def _replaced(params: tree.Params, adapter: tree.Adapter, method: Method) -> frozenset[str]:
    """The base leaves that the adapter replaces whole, so that their values in the base do not matter."""
    base = tree.flatten(params)
    parts = [tree.flatten(part) for part in method.to_collections(adapter).values()]
    return frozenset(path for part in parts for path, leaf in part.items() if path in base and leaf.shape == base[path].shape)


def _check_fit(params: tree.Params, adapter: tree.Adapter, method: Method, path: Any) -> None:
    """Compare the adapter with the one that its method would make for these parameters."""
    try:
        expected = leaf_table(method.expected(params, adapter))
    except (ValueError, TypeError) as e:
        raise WrongBaseError(f"The adapter in '{path}' does not fit these parameters: {e}") from e
    found = leaf_table(adapter)
    missing, spare = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or spare:
        raise WrongBaseError(
            f"The adapter in '{path}' does not fit these parameters: {len(missing)} leaves are missing, such as {sorted(missing)[:3]}, and "
            f"{len(spare)} are left over, such as {sorted(spare)[:3]}."
        )
    wrong = {name: (found[name][0], expected[name][0]) for name in expected if found[name][0] != expected[name][0]}
    if wrong:
        name, (got, want) = next(iter(wrong.items()))
        raise WrongBaseError(f"The adapter in '{path}' does not fit these parameters: '{name}' has shape {got}, the base needs {want}.")
