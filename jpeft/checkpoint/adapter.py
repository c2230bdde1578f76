"""Adapters on disk: the adapter alone, through Orbax, with what it takes to refuse the wrong base.

A directory holds ``adapter/`` (Orbax) and ``jpeft.json``: the method and its options, every leaf's shape and dtype, checksums of the
files, and a fingerprint of the base. It is written beside its place and moved there when it is complete.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import registry, tree
from jpeft.checkpoint.arrays import check_arrays, indexed
from jpeft.checkpoint.background import QuietOrbax, in_short
from jpeft.checkpoint.files import check_output, read_steadily, replace_folder
from jpeft.checkpoint.fingerprint import damaged_files, file_checksums, fingerprint, fingerprint_of, leaf_table
from jpeft.checkpoint.forms import Blocks, Lazy, OneFormError, convert, other_form
from jpeft.checkpoint.heads import as_saved
from jpeft.checkpoint.plain_paths import PlainPath, check_path
from jpeft.checkpoint.records import check_record, sealed
from jpeft.checkpoint.temporary import Temporary, remove_leftovers
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
    >>> jpeft.load(folder, params).method == jpeft.lora(rank=2)
    True
    """
    save_adapter(path, peft, overwrite=overwrite)


def save_adapter(path: str | os.PathLike[str], peft: Peft, *, overwrite: bool = False, run: str | None = None) -> None:
    """Do what `save` does.

    Args:
      path: As for `save`.
      peft: As for `save`.
      overwrite: As for `save`.
      run: Checksum of the configuration of the run that the adapter belongs to.

    Raises:
      ValueError: as `save`.
      OSError: if it could not be written; what was at `path` is still there.
    """
    check_peft(peft, "save")
    target = Path(path).absolute()
    on_first_process(lambda: _check_target(path, target, overwrite=overwrite))
    record = {
        "format": _FORMAT,
        "method": _config(peft.method),
        "base": fingerprint(peft.params, skip=replaced_paths(peft.params, peft.adapter, peft.method), exact_dtypes=False),
        "leaves": leaf_table(peft.adapter),
    } | ({} if run is None else {"run": run})
    temporary = Temporary(target)

    def finish() -> None:
        record["files"] = file_checksums(partial / _LEAVES)
        (partial / _RECORD).write_text(json.dumps(sealed(record), indent=1, allow_nan=False))
        try:
            replace_folder(partial, target, overwrite=overwrite)
        except FileExistsError as error:
            raise ValueError(_exists(path)) from error

    try:
        partial = Path(on_first_process(lambda: str(temporary.make_folder())))
        if record["leaves"]:
            # Whole from several processes: it will be opened by one that has not all their devices. A part of a chain without leaves, an
            # empty dict, is left out: `load` knows only leaves.
            with PlainPath(partial) as plain:
                try:
                    _write_arrays(plain / _LEAVES, gather_to_host(tree.unflatten(tree.flatten(peft.adapter))))
                except Exception as error:  # Orbax and the library below it raise errors of many types
                    raise OSError(f"The adapter could not be written to '{path}': {in_short(error)}.") from error
        else:  # which Orbax would refuse: a frozen base without a head
            on_first_process((partial / _LEAVES).mkdir)
        on_first_process(finish)
    finally:
        temporary.remove()


def _write_arrays(folder: Path, adapter: tree.Adapter) -> None:
    """Write arrays with Orbax, and read them back.

    Raises:
      OSError: if they are not what was written.
    """
    import orbax.checkpoint as ocp

    with QuietOrbax(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, adapter)
        checkpointer.wait_until_finished()
        on_first_process(lambda: check_arrays(folder, len(jax.tree.leaves(adapter))))
        written = jax.device_get(adapter)
        read = checkpointer.restore(folder, target=written)
    same = jax.tree.map(lambda one, two: np.asarray(one).tobytes() == np.asarray(two).tobytes(), written, read)
    if not all(jax.tree.leaves(same)):
        raise OSError(f"The adapter that was written to {folder} is not what is read from there.")


def _check_target(path: str | os.PathLike[str], target: Path, *, overwrite: bool) -> None:
    """Raise a ValueError if an adapter cannot be written to `target`, or something else would be lost."""
    check_path(target)
    if os.path.lexists(target) and not overwrite:
        raise ValueError(_exists(path))
    if target.is_dir() and not target.is_symlink() and (there := {p.name for p in target.iterdir()}) and not there & {_RECORD, _LEAVES}:
        raise ValueError(f"'{path}' holds no adapter but {', '.join(sorted(there)[:3])}, so it is not replaced. Choose another place.")
    check_output(target, folder=True)


def _exists(path: str | os.PathLike[str]) -> str:
    return f"'{path}' exists already. Choose another place, or replace it: jpeft.save(..., overwrite=True)."


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
    params = unwrap(params)
    source = Path(path).absolute()
    remove_leftovers(source)
    record, arrays = read_steadily(source, lambda: _read(path, source))
    method = _method(record["method"], method, path)
    adapter = {name: {} for name, _ in method.parts} | arrays
    method = as_saved(method, params, adapter)
    try:
        _check_fit(params, adapter, method, path)
        found = _has_fingerprint(params, None, adapter, method, record["base"]) if check_base else True
        error = None
    except WrongBaseError as misfit:
        found, error = False, misfit
    if not found and (other := other_form(params)) is not None:
        adapter = _from_other_form(path, params, other, adapter, method, record["base"] if check_base else None, error)
    elif not found:
        raise error or _wrong_base(path, record["base"])
    return Peft(params, adapter, method)


def _read(path: str | os.PathLike[str], source: Path) -> tuple[dict[str, Any], tree.Adapter]:
    """Return the record of an adapter, and its arrays."""
    record = read_record(path)
    # Looked at before Orbax opens anything: its other reads go on in the background when one fails.
    if damaged := damaged_files(source / _LEAVES, record["files"]):
        which = f"{len(damaged)} such files; {source / _RECORD} lists {len(record['files'])}"
        raise ValueError(f"The adapter in '{path}' is damaged: {source / _LEAVES / damaged[0]} is not as it was saved ({which}).")
    return record, _read_arrays(path, source / _LEAVES, record["leaves"])


def _from_other_form(
    path: Any,
    params: tree.Params,
    other: tuple[tree.Params, Lazy, Blocks],
    adapter: tree.Adapter,
    method: Method,
    recorded: str | None,
    error: WrongBaseError | None,
) -> tree.Adapter:
    """An adapter that was saved on the other form of its base, with blocks numbered instead of stacked or the other way round.

    Args:
      path: Of the adapter, for the message.
      params: The base.
      other: Its other form.
      adapter: The adapter as it was saved.
      method: Its method.
      recorded: The fingerprint of its base; None if it does not matter.
      error: Why the adapter does not fit the base as it is; None if it fits.

    Raises:
      WrongBaseError: if it does not fit the other form either, or that is another base.
    """
    shapes, leaves, blocks = other
    try:
        _check_fit(shapes, adapter, method, path)
    except WrongBaseError:
        raise error or _wrong_base(path, recorded or "") from None
    if recorded is not None and not _has_fingerprint(shapes, leaves, adapter, method, recorded):
        raise _wrong_base(path, recorded)
    try:
        converted = convert(adapter, method, shapes, params, blocks)
    except OneFormError as reason:
        raise WrongBaseError(f"The adapter in '{path}' was made for the blocks of its base in another form: {reason}") from reason
    _check_fit(params, converted, method, path)
    return converted


def _has_fingerprint(shapes: tree.Params, leaves: Lazy | None, adapter: tree.Adapter, method: Method, recorded: str) -> bool:
    """Whether a base is the recorded one. Earlier versions took the base's own dtypes into account."""
    made = leaves or {path: lambda leaf=leaf: jnp.asarray(leaf) for path, leaf in tree.flatten(shapes).items()}
    skip = replaced_paths(shapes, adapter, method)
    return any(fingerprint_of(made, skip=skip, exact_dtypes=exact) == recorded for exact in (False, True))


def _wrong_base(path: Any, recorded: str) -> WrongBaseError:
    return WrongBaseError(
        f"The adapter in '{path}' was trained on another base: its fingerprint is {recorded[:12]}, that of these parameters is "
        "not. Load the checkpoint that it was trained on, in the same dtype; or, if you know better, jpeft.load(..., check_base=False)."
    )


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of an adapter's jpeft.json.

    Raises:
      ValueError: if there is none, it is damaged, or was changed after it was written.
    """
    source = Path(path).absolute()
    file = source / _RECORD
    if not file.is_file():
        there = sorted(p.name for p in source.iterdir()) if source.is_dir() else "nothing"
        raise ValueError(f"'{path}' holds no adapter: {_RECORD} is missing; there is {there}.")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"'{file}' is damaged ({type(e).__name__}: {e}); save the adapter again.") from e
    if isinstance(record, dict) and record.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"'{file}' has format {record.get('format')}, this jpeft reads format {_FORMAT}; update jpeft.")
    if damage := _damage_of_record(record):
        raise ValueError(f"'{file}' is damaged ({damage}); save the adapter again.")
    check_record(record, file)
    return record


def _damage_of_record(record: Any) -> str:
    """Return what a record lacks, or holds as another type than it should; an empty string if nothing."""
    if not isinstance(record, dict):
        return "it holds no JSON object"
    kinds = {"format": int, "method": dict, "base": str, "leaves": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            return f"it has no {name!r}" if name not in record else f"{name!r} is {str(record[name])[:40]!r}"
    for path, about in record["leaves"].items():
        try:
            shape, dtype = about
            jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)).size  # noqa: B018
        except (TypeError, ValueError):
            return f"the shape and type of {path!r} are {str(about)[:40]!r}"
    return ""


def _read_arrays(path: str | os.PathLike[str], folder: Path, leaves: dict[str, Any]) -> tree.Adapter:
    """Return the arrays in the files, which are as they were saved.

    Raises:
      ValueError: if they are not the arrays of the record.
    """
    import orbax.checkpoint as ocp

    if not leaves:
        return {}
    shapes = {name: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype)) for name, (shape, dtype) in leaves.items()}
    try:
        with QuietOrbax(), indexed(folder) as whole, PlainPath(whole) as plain, ocp.StandardCheckpointer() as checkpointer:
            check_arrays(plain, len(shapes))
            return checkpointer.restore(plain, target=tree.unflatten(shapes))
    except Exception as e:
        raise ValueError(f"The adapter in '{path}' is damaged or incomplete, Orbax says: {in_short(e)}.") from e


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


def replaced_paths(params: tree.Params, adapter: tree.Adapter, method: Method) -> frozenset[str]:
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
