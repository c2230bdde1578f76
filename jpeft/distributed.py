"""Several processes that run one program, one on each host of a slice or for each GPU of a cluster: what they must know of each other.

All run the same code on the same files and take the same decisions, so what is computed on the mesh needs nothing from here. Here is the
rest: files that one of them writes, values that all must share, arrays that no process has whole, and stopping at the same step. Alone,
a process does all of it without any communication. Everything but `is_first` and `initialize` is to be called by all processes.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

T = TypeVar("T")

# Counts the calls of `stop_signal`, which are as many in every process.
_asked = itertools.count(1)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes, if there are to be any; before anything else is done with JAX.

    Args:
        coordinator: Address of the first process, HOST:PORT.
        num_processes: How many there are.
        process_id: Which of them this is, from 0.

    With none of these given, JAX finds out by itself on Cloud TPU and under SLURM (`srun`); elsewhere this process is alone.

    Raises:
        ValueError: if only some are given.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)}: missing; to start the processes by hand, give all of {', '.join(given)}")
    if not missing:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _expected(os.environ):
        jax.distributed.initialize()


def _expected(environment: Mapping[str, str]) -> bool:
    """Whether this looks like one of several processes."""
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 or "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return jax.process_index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make()` gives in the first process, in all of them, and not before it is done there. It is called in no other.

    Args:
        make: Gives anything that JSON can hold. What reads or writes files belongs here: other hosts may see them later, or half-written.

    Raises:
        ValueError: where `make` raises one, in all processes.
        RuntimeError: in the other processes, where it raises something else.

    >>> from_first(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return make()
    failure, message = None, {}
    if is_first():
        try:
            message = {"value": make()}
        except Exception as error:  # the others wait: they must be told
            failure, message = error, {"error": str(error), "kind": type(error).__name__}
    message = _broadcast(message)
    if failure is not None:
        raise failure
    if "error" in message:
        raise (ValueError if message["kind"] == "ValueError" else RuntimeError)(message["error"])
    return message["value"]


def _broadcast(value: Any) -> Any:
    """The first process's value in all of them."""
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    # A power of two, for few compilations.
    padded = np.zeros(1 << max(size - 1, 63).bit_length(), np.uint8)
    if is_first():
        padded[:size] = content
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)[:size]))


def check_done(failure: Exception | None) -> None:
    """Makes sure that all processes have done what each did by itself: one that fails alone would leave the others waiting.

    Args:
        failure: What kept this process from it, None if nothing did.

    Raises:
        Exception: `failure`, in its own process.
        RuntimeError: in the others, that says where it is to be found.

    >>> check_done(None)
    """
    failed = np.array([failure is not None])
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(failed).reshape(-1)
    if failure is not None:
        raise failure
    if failed.any():
        raise RuntimeError(f"process {int(failed.argmax())} failed; its own message says why")


def check_equal(values: Mapping[str, Any]) -> None:
    """Makes sure that all processes were started alike: with different data they would train something, but nothing of use.

    Args:
        values: What must be the same, by name, as JSON can hold it. The names are those of every process.

    Raises:
        ValueError: in all processes, that says what differs and where.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in values.values()]
    every = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1))
    if found := differences(tuple(values), every):
        raise ValueError(f"{found}: start all processes with the same flags and versions, on the same files")


def differences(names: Sequence[str], every: np.ndarray) -> str:
    """Which processes differ from the first in what; empty if none does.

    Args:
        names: Of the values.
        every: A digest of each value in each process, [processes, values, bytes].

    >>> differences(("data", "model"), np.array([[[1], [2]], [[1], [3]], [[1], [2]]]))
    'process 1 differs from process 0 in its model'
    """
    differ = (every != every[:1]).any(-1)
    parts = [
        f"process {process} differs from process 0 in its {', '.join(name for name, other in zip(names, row, strict=True) if other)}"
        for process, row in enumerate(differ)
        if row.any()
    ]
    return "; ".join(parts[:4]) + ("; ..." if len(parts) > 4 else "")


def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has whole, put where it belongs; each takes its own parts of it."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Unlike `device_put`, which compares the arrays of all processes first.
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def whole(tree: PyTree) -> PyTree:
    """Arrays on the mesh as NumPy arrays in every process."""
    gather = lambda leaf: leaf if _is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(jax.tree.map(gather, tree))


def within_reach(tree: PyTree) -> PyTree:
    """Arrays that this process can read: as they are if it is alone, else `whole`. For files, and for choices made on the host."""
    return tree if jax.process_count() == 1 else whole(tree)


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def stop_signal(caught: Sequence[int]) -> int | None:
    """The signal that ends training, in all processes after the same step; None if it goes on. To be asked at every step.

    Several processes leave SIGTERM to JAX's preemption service: it tells all of them, and they agree on a step that none has passed yet.

    Args:
        caught: The signals that this process has caught by itself; see `jpeft.training.interrupt.deferred_signals`.
    """
    if jax.process_count() == 1:
        return caught[0] if caught else None
    # The service agrees on a number that none has asked with yet. Steps would not do: those of a continued run begin beyond it.
    return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(next(_asked)) else None
