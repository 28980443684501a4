"""Four numbers in 64 bits, for shares that are sent between devices only to be added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin_moe.ops.four_numbers import pack_fours, unpack_fours


def there_and_back(y):
    return np.asarray(unpack_fours(*pack_fours(jnp.asarray(y, jnp.float32))))


def test_the_error_is_half_a_unit_of_the_largest_of_four():
    keys = jax.random.split(jax.random.key(0), 2)
    y = jax.random.normal(keys[0], (64, 256)) * jnp.exp(8 * jax.random.normal(keys[1], (64, 256)))
    largest = np.abs(np.asarray(y)).reshape(64, 4, 64).max(1)
    error = np.abs(there_and_back(y) - y).reshape(64, 4, 64).max(1)
    assert (error <= 2.0**-13 * largest).all()
    assert error.max() > 0


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 2.0**-100, 3.4e38, 1e-42])
def test_alike_numbers_of_any_size_keep_their_size(value):
    np.testing.assert_allclose(there_and_back(np.full((2, 8), value)), value, rtol=2**-13, atol=2.0**-125)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_four_numbers_nan(value):
    y = np.ones((2, 16), np.float32)
    y[1, 6] = value
    found = there_and_back(y)
    assert np.isnan(found[1, 2::4]).all()
    assert np.isfinite(np.delete(found, np.s_[2::4], axis=1)).all()
    assert np.isfinite(found[0]).all()
