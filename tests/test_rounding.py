"""Rounding to 16 bits is that of a cast, and stays in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin_moe.rounding import rounded


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_values_are_those_of_a_cast(dtype):
    rng = np.random.default_rng(3)
    values = rng.normal(size=4096) * 2.0 ** rng.integers(-30, 20, 4096)
    values = np.concatenate([values, [0.0, -0.0, 2.0**-24, 3 * 2.0**-26, 65519.0, 65520.0, np.inf, -np.inf, np.nan]])
    values = values.astype(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    actual = np.asarray(jax.jit(rounded, static_argnums=1)(values, dtype))
    np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(np.float32))


def test_a_cast_back_does_not_undo_it():
    text = jax.jit(lambda values: rounded(values, jnp.dtype(jnp.bfloat16)).astype(jnp.float32)).lower(jnp.ones(8))
    assert "reduce-precision" in text.compile().as_text()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_its_derivative_is_that_of_a_cast(dtype):
    values = jnp.asarray([1e-6, 3e-5, 0.7, -300.0], jnp.float32)
    gradient = jax.grad(lambda values: jnp.sum(rounded(values, dtype).astype(jnp.float32) * 2))(values)
    np.testing.assert_array_equal(gradient, np.full(4, 2, np.float32))
