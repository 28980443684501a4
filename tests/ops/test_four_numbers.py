"""Four numbers in 64 bits, for shares that are sent between devices only to be added up."""

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin_moe.ops import four_numbers, packed_shares
from jax_marlin_moe.ops.four_numbers import WORDS

# As calls have them: op by op, one of them compiles twenty programs for each shape.
pack_fours, unpack_fours = jax.jit(four_numbers.pack_fours), jax.jit(four_numbers.unpack_fours)
pack_share, add_shares = jax.jit(packed_shares.pack_share), jax.jit(packed_shares.add_shares, static_argnums=1)


def there_and_back(y):
    return np.asarray(unpack_fours(pack_fours(np.asarray(y, np.float32))))


def test_the_error_is_half_a_unit_of_the_largest_of_four():
    rng = np.random.default_rng(0)
    y = (rng.normal(size=(64, 256)) * np.exp(8 * rng.normal(size=(64, 256)))).astype(np.float32)
    largest = np.abs(y).reshape(64, 64, 4).max(2)
    error = np.abs(there_and_back(y) - y).reshape(64, 64, 4).max(2)
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
    assert np.isnan(found[1, 4:8]).all()
    assert np.isfinite(np.delete(found, np.s_[4:8], axis=1)).all()
    assert np.isfinite(found[0]).all()


def words_of(fours):
    """As csrc/cuda/four_columns.cuh has them, number by number."""
    found = []
    for four in fours.tolist():
        exponent = max(13, int(np.float32(max(map(abs, four))).view(np.uint32) + (1 << 10)) >> 23)
        a, b, c, d = (round(number * 2.0 ** (139 - exponent)) for number in four)
        found += [(a % 2**14 + (b << 14) + (exponent << 28)), (c % 2**14 + (d << 14) + (exponent >> 4 << 28))]
    return np.asarray([word % 2**32 for word in found], np.uint32).view(np.int32)


def test_words_are_those_of_the_kernels():
    y = np.float32([[1, -1, 0.5, -0.25], [-3.4e38, 1e38, 0, 7e37], [0, 0, 0, 0], [-1e-30, 2e-30, -3e-30, 4e-30]])
    np.testing.assert_array_equal(np.asarray(pack_fours(y)).reshape(-1), words_of(y))


def test_shares_are_added_in_float32_and_rounded_once():
    y = host_arrays.normal(0, (3, 4, 16))
    words = pack_share(y)
    assert (words.dtype, words.shape) == (WORDS, (3, 4, 8))
    wanted = sum(np.asarray(unpack_fours(words)))
    np.testing.assert_array_equal(add_shares(words, jnp.float32), wanted)
    np.testing.assert_array_equal(add_shares(words, jnp.bfloat16), wanted.astype(jnp.bfloat16))


def test_shares_are_packed_and_added_in_batches():
    y = host_arrays.normal(1, (2, 3, 4, 16))  # shares, batch, rows, columns
    words = jax.vmap(pack_share, in_axes=1, out_axes=2)(y)
    np.testing.assert_array_equal(words, np.moveaxis(pack_share(y), 1, 2))
    sums = jax.vmap(lambda one: add_shares(one, jnp.float32), in_axes=2)(words)
    np.testing.assert_array_equal(sums, [add_shares(pack_share(y[:, i]), jnp.float32) for i in range(3)])
