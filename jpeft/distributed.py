"""Several processes that run one program, one on each host of a TPU slice or one for each GPU of a cluster.

All processes run the same code on the same files and take the same decisions, so computation on the mesh needs nothing from this file. It
has the rest: files that one process writes, values that all processes must share, arrays that no process holds whole, and a common last
step. A process that is alone does all of it without communication. All processes must call each function except `is_first` and
`initialize` together.
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

from jpeft.deprecation import renamed_members

T = TypeVar("T")
Tree = Any  # a pytree of arrays

# Number of the next call of `stop_signal`. It is the same in every process, because each asks once a step. JAX's preemption service itself
# is one for the whole process, so the counter cannot belong to a run.
_calls_of_stop_signal = itertools.count(1)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connect to the other processes, if there are any. Call this before anything else is done with JAX.

    Without arguments, JAX finds the other processes by itself on Cloud TPU and under SLURM (`srun`); elsewhere this process is alone.

    Args:
      coordinator: Address of the first process, HOST:PORT.
      num_processes: Number of processes.
      process_id: Number of this process, from 0.

    Raises:
      ValueError: if only some of the arguments are given.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)}: missing. To start the processes by hand, give all of {', '.join(given)}.")
    if not missing:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif _expects_others(os.environ):
        jax.distributed.initialize()


def _expects_others(environment: Mapping[str, str]) -> bool:
    """Return whether this looks like one of several processes."""
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1 or "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def is_first() -> bool:
    """Return whether this process is the one that writes files and reports progress."""
    return jax.process_index() == 0


# --- values and files ---------------------------------------------------------------------------------------------------------------


def on_first_process(make: Callable[[], T]) -> T:
    """Call `make()` in the first process only, and return its result in all of them, once the call is done.

    Reading and writing of files belongs into `make`: other hosts may see files later, or half-written.

    Args:
      make: Returns anything that JSON can hold.

    Raises:
      ValueError: in all processes, if `make` raises one.
      RuntimeError: in the other processes, if `make` raises anything else.

    >>> on_first_process(lambda: {"step": 3})
    {'step': 3}
    """
    if jax.process_count() == 1:
        return make()
    failure, message = None, {}
    if is_first():
        try:
            message = {"value": make()}
        except Exception as error:  # the other processes wait for a message, so they must be told
            failure, message = error, {"error": str(error), "kind": type(error).__name__}
    message = _broadcast(message)
    if failure is not None:
        raise failure
    if "error" in message:
        raise (ValueError if message["kind"] == "ValueError" else RuntimeError)(message["error"])
    return message["value"]


def _broadcast(value: Any) -> Any:
    """Return the first process's value in all processes."""
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
    # Sizes are padded to powers of two, because each new size is compiled anew.
    padded = np.zeros(1 << max(size - 1, 63).bit_length(), np.uint8)
    if is_first():
        padded[:size] = content
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)[:size]))


def check_done(failure: Exception | None) -> None:
    """Raise an error in all processes if one of them failed: otherwise the others would wait for it.

    Args:
      failure: The error of this process; None if it succeeded.

    Raises:
      Exception: `failure`, in the process that failed.
      RuntimeError: in the others, naming the process that failed.

    >>> check_done(None)
    """
    failed = np.array([failure is not None])
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(failed).reshape(-1)
    if failure is not None:
        raise failure
    if failed.any():
        raise RuntimeError(f"Process {int(failed.argmax())} failed; its own message says why.")


def check_equal(values: Mapping[str, Any]) -> None:
    """Raise an error if the processes were started with different values, such as different data.

    Args:
      values: Values by name, as JSON can hold them. The names are the same in every process.

    Raises:
      ValueError: in all processes, naming the values and the processes that differ.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for value in values.values()]
    # [processes, values, 32]
    every = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1))
    if found := differences(tuple(values), every):
        raise ValueError(f"{found[0].upper()}{found[1:]}: start all processes with the same flags and versions, on the same files.")


def differences(names: Sequence[str], every: np.ndarray) -> str:
    """Return which processes differ from the first one, and in which values; an empty string if none does.

    Args:
      names: Names of the values.
      every: A digest of each value in each process, [processes, values, bytes].

    >>> differences(("data", "model"), np.array([[[1], [2]], [[1], [3]], [[1], [2]]]))
    'process 1 differs from process 0 in its model'
    """
    differ = (every != every[:1]).any(-1)  # [processes, values]
    parts = [
        f"process {process} differs from process 0 in its {', '.join(name for name, other in zip(names, row, strict=True) if other)}"
        for process, row in enumerate(differ)
        if row.any()
    ]
    return "; ".join(parts[:4]) + ("; ..." if len(parts) > 4 else "")


# --- arrays -------------------------------------------------------------------------------------------------------------------------


def place(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put an array that every process holds whole onto the mesh; each process contributes the parts of its own devices."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Not `device_put`, which first compares the arrays of all processes.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_numpy(tree: Tree) -> Tree:
    """Return arrays on the mesh as whole NumPy arrays, in every process."""
    gather = lambda leaf: leaf if _is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(jax.tree.map(gather, tree))


def gather_to_host(tree: Tree) -> Tree:
    """Return arrays that this process can read, to be written to files or examined: `to_numpy`, or as they are if it is alone."""
    return tree if jax.process_count() == 1 else to_numpy(tree)


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


# --- stopping -----------------------------------------------------------------------------------------------------------------------


def stop_signal(caught: Sequence[int]) -> int | None:
    """Return the signal that ends training, in all processes after the same step; None to continue. Call this at every step.

    Several processes leave SIGTERM to JAX's preemption service: it informs all of them, and they agree on a step that none has passed yet.

    Args:
      caught: The signals that this process has caught itself; see `jpeft.training.interrupt.deferred_signals`.
    """
    if jax.process_count() == 1:
        return caught[0] if caught else None
    # The service agrees on a number that no process has asked with yet. The number of the step would not do: a continued run begins at a
    # later one.
    return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(next(_calls_of_stop_signal)) else None


__getattr__ = renamed_members(__name__, from_first="on_first_process", within_reach="gather_to_host", whole="to_numpy")
