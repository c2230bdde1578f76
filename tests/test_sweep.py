"""Adapters trained at once by `vmap` are those that separate runs give."""

import runpy
import sys
from pathlib import Path

import chex
import jax
import numpy as np


def test_eight_adapters_at_once_equal_eight_runs(monkeypatch):
    """Of the example as it is: four learning rates and two seeds."""
    path = str(Path(__file__).parents[1] / "examples" / "sweep.py")
    monkeypatch.setattr(sys, "argv", [path, "--rates", "1e-4", "3e-4", "1e-3", "3e-3", "--seeds", "0", "1", "--steps", "8"])
    sweep = runpy.run_path(path)
    one, made = jax.jit(sweep["step"]), []
    for i, (rate, seed) in enumerate(zip(sweep["rate"], sweep["seed"], strict=True)):
        adapter = sweep["make"](seed)
        trained, losses, _ = sweep["fit"](one, adapter, sweep["init"](adapter, rate))
        together = jax.tree.map(lambda leaf, i=i: leaf[i], sweep["trained"])
        chex.assert_trees_all_close(together, trained, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(sweep["losses"][i], losses, atol=1e-5)
        made.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trained)]))
    assert one._cache_size() == 1
    # Eight different ones, by far more than the tolerance.
    assert len(made) == 8
    assert min(np.abs(a - b).max() for i, a in enumerate(made) for b in made[:i]) > 1e-3
