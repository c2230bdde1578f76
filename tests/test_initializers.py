"""Initial values and dropout: the numbers of the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft.core.dropout import inverted_dropout
from jpeft.core.initializers import glorot_uniform, kaiming_uniform, normal, truncated_normal, zeros

KEY = jax.random.key(0)
SHAPE = (3, 100, 400)  # [stack, inputs, outputs]


@pytest.mark.parametrize(
    ("draw", "bound", "std"),
    [
        (normal(0.02), None, 0.02),
        (truncated_normal(0.02), 0.04, 0.0176),
        (kaiming_uniform, 0.1, 0.1 / 3**0.5),
        (glorot_uniform(2**0.5), (12 / 500) ** 0.5, (4 / 500) ** 0.5),
        (zeros, 0.0, 0.0),
    ],
)
def test_distributions(draw, bound, std):
    values = np.asarray(draw(KEY, SHAPE))
    assert values.shape == SHAPE
    assert values.dtype == np.float32
    assert np.std(values) == pytest.approx(std, rel=0.02)
    if bound is not None:
        assert np.abs(values).max() == pytest.approx(bound, rel=0.02)
        assert np.abs(values).max() <= np.float32(bound)


def test_a_bias_is_drawn_with_the_inputs_of_its_layer():
    want = jax.random.uniform(KEY, (50,), minval=-0.25, maxval=0.25)
    np.testing.assert_array_equal(kaiming_uniform(KEY, (50,), fan_in=16), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_dtype_and_mean(dtype):
    x = jnp.full((200, 200), 3, dtype)
    dropped = inverted_dropout(KEY, x, 0.25)
    assert dropped.dtype == dtype
    assert set(np.unique(np.asarray(dropped, np.float32))) == {0.0, 4.0}
    assert float(jnp.mean(dropped.astype(jnp.float32))) == pytest.approx(3, rel=0.02)
