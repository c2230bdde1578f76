"""Ctrl-C and SIGTERM, deferred until the present step is finished and saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRun(KeyboardInterrupt):
    """Training was interrupted; everything up to `step` is in the checkpoint in `path`.

    Attributes:
      signum: The signal that interrupted it.
      step: Finished steps.
      path: Folder of the run.
    """

    def __init__(self, signum: int, step: int, path: str | os.PathLike[str]):
        super().__init__(f"interrupted after step {step}, which is saved in {path}")
        self.signum = signum
        self.step = step
        self.path = path


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in the list that is yielded; a second signal has its usual effect at once.

    Outside the main thread, where Python allows no handlers, the list stays empty. Each of several processes leaves SIGTERM to JAX's
    preemption service, which informs the others (`jpeft.distributed.stop_signal`), and sends itself SIGTERM when it receives SIGINT.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    several = jax.process_count() > 1
    before = {signum: signal.getsignal(signum) for signum in SIGNALS if not (several and signum == signal.SIGTERM)}

    def remember(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        restore()
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for signum in before:
        signal.signal(signum, remember)
    try:
        yield caught
    finally:
        restore()
