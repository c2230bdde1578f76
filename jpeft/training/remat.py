"""Recomputing activations only as far as a device's memory asks for it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from jpeft.core.summary import readable_bytes

Remat = bool | Literal["dots"]

# From the fastest to the one that needs the least memory.
_IN_ORDER: tuple[Remat, ...] = (False, "dots", True)
_NAMES = {False: "none", "dots": "dots", True: "full"}
_SHARE = 0.95  # of the memory that a step may take: an allocator leaves gaps


class Choice(NamedTuple):
    """How activations are recomputed.

    Attributes:
      remat: The choice, for `ModelConfig.remat`.
      compiled: The step that was compiled with it.
      reason: In words; empty if there was nothing to choose by.
    """

    remat: Remat
    compiled: Any
    reason: str

    @property
    def line(self) -> str:
        """The choice in one line; empty without a reason."""
        return f"{_NAMES[self.remat]}: {self.reason}" if self.reason else ""


def with_remat(model: Any, remat: Remat) -> Any:
    """Return a model of `jpeft.models` that recomputes its activations in this way; its parameters are the same."""
    config = model.config
    return model if config.remat == remat else model.clone(config=dataclasses.replace(config, remat=remat))


def choose_remat(asked: Remat | Literal["auto"], compile_with: Callable[[Remat], Any], limit: int | None) -> Choice:
    """Compile a step, with the first way of recomputing whose step fits into the memory if that is asked for.

    Args:
      asked: The setting.
      compile_with: Compiles the step.
      limit: Bytes of one device; None where it does not tell.

    >>> choose_remat("auto", lambda remat: None, None).remat
    False
    """
    if asked != "auto":
        return Choice(asked, compile_with(asked), "")
    if limit is None:
        return Choice(False, compile_with(False), "")
    for remat in _IN_ORDER:
        last = remat == _IN_ORDER[-1]
        try:
            compiled = compile_with(remat)
        except jax.errors.JaxRuntimeError as error:
            if last or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        needed = bytes_of(compiled)
        if needed is None:
            return Choice(remat, compiled, "the compiler does not tell how much memory a step takes")
        said = f"a step takes {readable_bytes(needed)} of {readable_bytes(limit)}"
        if needed <= _SHARE * limit:
            return Choice(remat, compiled, said)
        if last:
            return Choice(remat, compiled, f"{said}, and no other way takes less; make batch_size or max_length smaller if it fails")
    raise AssertionError("the loop returns")


def memory_limit() -> int | None:
    """Return how many bytes arrays may take on one of this process's devices; None where it does not tell, as on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return (stats or {}).get("bytes_limit")


def bytes_of(compiled: Any) -> int | None:
    """Return the bytes that one device needs for a compiled function: arguments, results and what lives in between."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(total - memory.alias_size_in_bytes)
