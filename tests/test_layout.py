"""Packings against the formulas of docs/formats.md, written here one element at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_marlin_moe import layout

PAIR_ORDER = {4: [0, 4, 1, 5, 2, 6, 3, 7], 8: [0, 2, 1, 3]}
BITS = pytest.mark.parametrize("bits", [4, 8])


def random_codes(rng, shape, bits):
    return rng.integers(0, 2**bits, shape, dtype=np.uint8)


def as_words(unsigned):
    return unsigned.astype(np.uint32).view(np.int32)


def marlin(codes, bits):
    """docs/formats.md, "Marlin layout"."""
    k_size, n_size = codes.shape
    words = np.zeros(k_size * n_size * bits // 32, np.uint32)
    for k in range(k_size):
        for n in range(n_size):
            kt, r = divmod(k, 16)
            nt, c = divmod(n, 64)
            w, b, col = c // 16, (c % 16) // 8, c % 8
            lane = 4 * col + (r % 8) // 2
            i = (r % 2) + 2 * (r // 8) + 4 * b
            tile = kt * (n_size // 64) + nt
            if bits == 4:
                word, shift = tile * 128 + lane * 4 + w, 4 * PAIR_ORDER[4][i]
            else:
                word, shift = tile * 256 + lane * 8 + 2 * w + b, 8 * PAIR_ORDER[8][i % 4]
            words[word] |= np.uint32(codes[k, n]) << np.uint32(shift)
    return as_words(words).reshape(k_size // 16, -1)


def marlin_zeros(zeros, bits):
    """docs/formats.md, "Scales, zero points and bias": integer zero points of one group."""
    words = np.zeros(len(zeros) * bits // 32, np.uint32)
    for n, zero in enumerate(zeros):
        unit, c = divmod(n, 64)
        t = c // 8
        if bits == 4:
            word, shift = unit * 8 + c % 8, 4 * PAIR_ORDER[4][t]
        else:
            word, shift = unit * 16 + 2 * (c % 8) + t // 4, 8 * PAIR_ORDER[8][t % 4]
        words[word] |= np.uint32(zero) << np.uint32(shift)
    return as_words(words)


@BITS
@pytest.mark.parametrize(("k", "n"), [(16, 64), (48, 192)])
def test_pack_is_the_closed_form(bits, k, n):
    codes = random_codes(np.random.default_rng(k), (k, n), bits)
    np.testing.assert_array_equal(layout.pack(codes, bits=bits), marlin(codes, bits))


@BITS
def test_zero_points_are_the_closed_form(bits):
    zeros = random_codes(np.random.default_rng(3), (192,), bits)
    np.testing.assert_array_equal(layout.pack_zeros(zeros, bits=bits), marlin_zeros(zeros, bits))


def test_the_order_of_scales_is_the_closed_form():
    scales = np.arange(192, dtype=np.float16)
    grouped = np.empty_like(scales)
    for n, scale in enumerate(scales):
        grouped[n - n % 64 + 8 * (n % 8) + n % 64 // 8] = scale
    np.testing.assert_array_equal(layout.permute_scales(scales), grouped)


# Few shapes, many contents: each new shape is a compilation.
shapes = st.sampled_from([(16, 64), (32, 128), (2, 16, 64), (2, 3, 48, 64)])
seeds = st.integers(0, 2**32 - 1)


@given(shape=shapes, bits=st.sampled_from([4, 8]), seed=seeds)
def test_every_packing_is_undone_by_its_inverse(shape, bits, seed):
    codes = random_codes(np.random.default_rng(seed), shape, bits)
    for pack, unpack in (
        (layout.pack, layout.unpack),
        (layout.pack_zeros, layout.unpack_zeros),
    ):
        words = pack(codes, bits=bits)
        assert words.dtype == jnp.int32
        assert words.size * 32 == codes.size * bits
        np.testing.assert_array_equal(unpack(words, bits=bits), codes)


@given(shape=shapes, bits=st.sampled_from([4, 8]), seed=seeds)
def test_every_word_is_a_packing_of_something(shape, bits, seed):
    """The packings are bijections of words too: no bit is lost."""
    *batch, k, n = shape
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (*batch, k // 16, n * bits // 2), dtype=np.int32)
    np.testing.assert_array_equal(layout.pack(layout.unpack(words, bits=bits), bits=bits), words)


@given(shape=shapes, seed=seeds)
def test_the_order_of_scales_is_undone_by_its_inverse(shape, seed):
    scales = np.random.default_rng(seed).normal(size=shape).astype(jnp.bfloat16)
    permuted = layout.permute_scales(scales)
    assert permuted.dtype == scales.dtype
    np.testing.assert_array_equal(layout.unpermute_scales(permuted), scales)


@BITS
def test_slices_of_a_packing_are_packings_of_slices(bits):
    codes = random_codes(np.random.default_rng(4), (64, 256), bits)
    packed = layout.pack(codes, bits=bits)
    words = 16 * bits // 32  # of a column, in a row of tiles
    for start, stop in ((0, 64), (64, 256), (128, 192)):
        columns = packed[:, words * start : words * stop]
        np.testing.assert_array_equal(columns, layout.pack(codes[:, start:stop], bits=bits))
    for start, stop in ((0, 16), (16, 64), (32, 48)):
        rows = packed[start // 16 : stop // 16]
        np.testing.assert_array_equal(rows, layout.pack(codes[start:stop], bits=bits))


@BITS
def test_joined_packings_are_packings_of_joined_columns(bits):
    rng = np.random.default_rng(5)
    left, right = random_codes(rng, (32, 64), bits), random_codes(rng, (32, 128), bits)
    joined = jnp.concatenate([layout.pack(left, bits=bits), layout.pack(right, bits=bits)], axis=1)
    np.testing.assert_array_equal(joined, layout.pack(np.concatenate([left, right], axis=1), bits=bits))


def test_leading_dimensions_are_a_stack():
    codes = random_codes(np.random.default_rng(6), (2, 3, 32, 64), 4)
    packed = layout.pack(codes)
    assert packed.shape == (2, 3, 2, 128)
    np.testing.assert_array_equal(packed[1, 2], layout.pack(codes[1, 2]))


def test_packing_traces():
    traced = jax.vmap(jax.jit(layout.pack))(jnp.zeros((2, 16, 64), jnp.uint8))
    np.testing.assert_array_equal(traced, np.zeros((2, 1, 128)))


@pytest.mark.parametrize(("k", "n", "message"), [(24, 64, "K = 24"), (16, 96, "N = 96")])
def test_a_matrix_off_the_tile_is_refused(k, n, message):
    with pytest.raises(ValueError, match=message):
        layout.pack(np.zeros((k, n), np.uint8))
