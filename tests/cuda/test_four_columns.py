"""Rows of slots with four columns in 64 bits, on their way to a token's sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import block_kernels
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.ops.four_numbers import WORDS, pack_fours, unpack_fours
from jax_marlin_moe.ops.fused_moe import expert_block
from jax_marlin_moe.ops.packed_shares import add_shares, pack_share

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 4, 2, 512, 256, 200
FIRST = WgmmaTile(48, 2, 1, 1, 128, 3, 1, True)
# A lane of the second product has four columns of a row, or two, or eight of few rows.
SECOND = {
    "four": WgmmaTile(48, 2, 1, 1, 128, 3, 1, True),
    "pairs": WgmmaTile(48, 1, 1, 1, 128, 3, 1, True),
    "few rows": WgmmaTile(16, 4, 1, 1, 128, 4, 2, False),
}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def small_rows_are_packed(monkeypatch):
    monkeypatch.setattr(block_kernels, "_MOST_FLOAT_BYTES", 0)


def operands():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (EXPERTS, HIDDEN, 2 * INTERMEDIATE), (EXPERTS, INTERMEDIATE, HIDDEN)
    dense = [jax.random.normal(key, s, jnp.bfloat16) / s[1] ** 0.5 for key, s in zip(keys, shapes, strict=False)]
    gate_up, down = (jmm.quantize(w, "int4", group_size=128) for w in dense)
    ids = jnp.argsort(jax.random.uniform(keys[2], (TOKENS, EXPERTS)), axis=1)[:, :TOP_K].astype(jnp.int32)
    ids = jnp.where(jax.random.uniform(keys[3], ids.shape) < 0.1, -1, ids)
    weights = jax.random.uniform(keys[3], ids.shape, jnp.float32, 0.5, 1.5)
    return jax.random.normal(keys[4], (TOKENS, HIDDEN), jnp.bfloat16), gate_up, down, weights, ids


def blocks(arguments, second):
    """The sum of packed rows, and that of float32 rows: a float32 result has such."""
    scheme = BlockScheme("aligned", FIRST, SECOND[second])
    call = {"implementation": "cuda", "cuda_scheme": scheme}
    packed = jmm.fused_moe(*arguments, **call)
    exact = jmm.fused_moe(*arguments, preferred_element_type=jnp.float32, **call)
    return np.asarray(packed, np.float64), np.asarray(exact, np.float64)


@pytest.mark.parametrize("second", SECOND)
def test_packed_rows_cost_less_than_the_rounding_of_the_result(second):
    packed, exact = blocks(operands(), second)
    rounded = np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64)
    error, of_rounding = (np.linalg.norm(y - exact) for y in (packed, rounded))
    assert of_rounding < error < 1.05 * of_rounding
    # Half a unit of the largest of four columns, of each slot, and the rounding of the result.
    assert np.abs(packed - exact).max() <= 2**-8 * np.abs(exact).max()


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("factor", [2.0**60, 2.0**-60, 0.0])
def test_rows_of_any_size_keep_their_accuracy(second, factor):
    x, gate_up, down, weights, ids = operands()
    packed, exact = blocks((x, gate_up, down, weights * jnp.float32(factor), ids), second)
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed, exact, atol=2**-8 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("second", SECOND)
def test_what_is_not_a_number_stays_in_its_token(second):
    x, gate_up, down, weights, ids = operands()
    ids = ids.at[7, 0].set(1)
    packed, exact = blocks((x.at[7].set(jnp.nan), gate_up, down, weights, ids), second)
    assert np.isnan(packed[7]).all()
    assert np.isnan(exact[7]).all()
    others = np.arange(TOKENS) != 7
    assert np.isfinite(packed[others]).all()


@pytest.mark.parametrize("second", SECOND)
def test_shares_of_a_rounded_sum_have_packed_rows_and_results_of_float32(second):
    arguments = operands()
    call = {"cuda_scheme": BlockScheme("aligned", FIRST, SECOND[second]), "implementation": "cuda"}
    call |= {"activation": jmm.activations.get_activation("silu"), "out_dtype": jnp.dtype("float32")}
    share = expert_block(*arguments, None, rounded_to=jnp.dtype("bfloat16"), **call)
    packed, exact = blocks(arguments, second)
    assert share.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(share.astype(jnp.bfloat16), np.float64), packed)
    difference = np.linalg.norm(np.asarray(share, np.float64) - exact)
    assert 0 < difference < 0.2 * np.linalg.norm(packed - exact)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("rounded_to", ["bfloat16", "float16"])
def test_a_block_packs_the_numbers_that_it_would_return(second, rounded_to):
    """Rows of slots are packed, or float32 where the sum is rounded to more bits."""
    call = {"cuda_scheme": BlockScheme("aligned", FIRST, SECOND[second]), "implementation": "cuda"}
    call |= {"activation": jmm.activations.get_activation("silu"), "rounded_to": jnp.dtype(rounded_to)}
    arguments = operands()
    share, words = (expert_block(*arguments, None, out_dtype=dtype, **call) for dtype in (jnp.dtype("float32"), WORDS))
    np.testing.assert_array_equal(words, pack_fours(share))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shares", [2, 3, 9])
def test_shares_are_packed_and_added_as_specified(shares, dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    y = jax.random.normal(keys[0], (shares, 70, 40)) * jnp.exp(8 * jax.random.normal(keys[1], (shares, 70, 40)))
    y = y.at[1, 3, 5].set(jnp.inf).at[0, 4, 9].set(-0.0)
    words = pack_share(y)
    # Of four numbers that are NaN then, words have the exponent alone in common.
    np.testing.assert_array_equal(*(np.delete(np.asarray(found)[:, 3], [2, 3], 1) for found in (words, pack_fours(y))))
    np.testing.assert_array_equal(*(np.delete(np.asarray(found), 3, 1) for found in (words, pack_fours(y))))
    total = sum(unpack_fours(words))
    np.testing.assert_array_equal(add_shares(words, dtype).astype(jnp.float32), total.astype(dtype).astype(jnp.float32))
    assert np.isnan(np.asarray(total)[3, 4:8]).all()
