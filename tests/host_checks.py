"""What every host promises, as a check that a test of a host can run."""

import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
from tables import noised

import jpeft
from jpeft.core.method import Method


def noisy(params: Any, method: Any, **options: Any) -> jpeft.Peft:
    peft = jpeft.apply(params, method=method, **options)
    return peft.replace(adapter=noised(peft.adapter))


def check_host(fn: Any, params: Any, x: jax.Array, method: Method, host: Any, atol: float = 1e-5) -> jpeft.Peft:
    """What every host promises for a method that begins as the base and merges: identity, merge, gradients, jit and vmap."""
    peft = jpeft.apply(params, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the dense host says what it costs
        forward = jpeft.wrap(fn, host=host)
        chex.assert_trees_all_close(forward(peft, x), fn(params, x), atol=atol)
        peft = peft.replace(adapter=noised(peft.adapter))
        want = fn(jpeft.merge(peft), x)
        assert jnp.abs(want - fn(params, x)).max() > 1e-3
        chex.assert_trees_all_close(forward(peft, x), want, atol=atol)
        chex.assert_trees_all_close(jax.jit(forward)(peft, x), want, atol=atol)
        grads = jax.grad(lambda adapter: jnp.square(forward(peft.replace(adapter=adapter), x)).sum())(peft.adapter)
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
        stacked = jpeft.stack([peft, peft.replace(adapter=noised(peft.adapter, seed=4))])
        many = jpeft.ensemble(forward)(stacked, x)
        chex.assert_trees_all_close(many[0], want, atol=atol)
        assert jnp.abs(many[0] - many[1]).max() > 1e-3
    chex.assert_trees_all_equal_structs(jpeft.merge(peft), params)
    return peft
