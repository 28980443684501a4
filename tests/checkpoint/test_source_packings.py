"""Words of other tools against the formulas of docs/formats.md, "Source packings", one element at a time."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_marlin_moe.checkpoint.schemes.awq import unpack_awq
from jax_marlin_moe.checkpoint.schemes.words import unpack_along_k, unpack_along_n

AWQ_ORDER = {4: [0, 4, 1, 5, 2, 6, 3, 7], 8: [0, 2, 1, 3]}
ASCENDING = {4: list(range(8)), 8: list(range(4))}


def along_last(codes, bits, order):
    """Code `n % pf` of a word at bit `bits * order[n % pf]`."""
    pf = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // pf), np.uint32)
    for k, n in np.ndindex(codes.shape):
        words[k, n // pf] |= np.uint32(codes[k, n]) << np.uint32(bits * order[bits][n % pf])
    return words.view(np.int32)


def along_first(codes, bits, order):
    return np.ascontiguousarray(along_last(codes.T, bits, order).T)


PACKINGS = [(unpack_awq, along_last, AWQ_ORDER), (unpack_along_n, along_last, ASCENDING),
            (unpack_along_k, along_first, ASCENDING)]  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("unpack", "pack", "order"), PACKINGS)
def test_unpacking_is_the_closed_form(unpack, pack, order, bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (32, 64), dtype=np.uint8)
    found = unpack(jnp.asarray(pack(codes, bits, order)), bits=bits)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, codes)


@given(shape=st.sampled_from([(16, 8), (2, 16, 8), (2, 3, 8, 16)]), bits=st.sampled_from([4, 8]), seed=st.integers(0))
def test_every_word_is_a_packing_of_something(shape, bits, seed):
    """Unpacking loses no bit of a checkpoint, whatever dimensions come first."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, shape, dtype=np.int32)
    for unpack, pack, order in PACKINGS:
        codes = np.asarray(unpack(jnp.asarray(words), bits=bits))
        assert codes.size * bits == words.size * 32
        for at in np.ndindex(shape[:-2]):
            np.testing.assert_array_equal(pack(codes[at], bits, order), words[at])
