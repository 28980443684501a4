"""Codes in words and bytes, ascending in their bits, as most tools have them: docs/formats.md, "Source packings"."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt8

from jax_marlin_moe.layout import split_words


@partial(jax.jit, static_argnames="bits")
def unpack_along_n(words: Int32[Array, "*batch N/pf"], bits: int = 4) -> UInt8[Array, "*batch N"]:
    """Codes packed along the last axis in ascending order: GPTQ `qzeros`."""
    return split_words(words, tuple(range(32 // bits)), bits).reshape(*words.shape[:-1], -1)


@partial(jax.jit, static_argnames="bits")
def unpack_along_k(words: Int32[Array, "*batch K/pf N"], bits: int = 4) -> UInt8[Array, "*batch K N"]:
    """Codes packed along K in ascending order: GPTQ `qweight`, compressed-tensors after transposition."""
    *batch, rows, n = words.shape
    codes = split_words(words, tuple(range(32 // bits)), bits)  # (..., K/pf, N, pf)
    return codes.swapaxes(-1, -2).reshape(*batch, rows * 32 // bits, n)


def unpack_nibbles(data: UInt8[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    """The two codes of 4 bits of each byte, side by side along an axis, that of the low nibble first."""
    codes = jnp.stack([data & 15, data >> 4], axis=axis + 1)
    return codes.reshape(*data.shape[:axis], 2 * data.shape[axis], *data.shape[axis + 1 :])


def zeros_are_baked(qzeros: np.ndarray, bits: int, *, less_one: bool = False) -> bool:
    """Whether every zero point of packed ones is the middle code; `less_one` as GPTQ v1 stores them."""
    middle = 2 ** (bits - 1) - less_one
    word = np.uint32(sum(middle << shift for shift in range(0, 32, bits)))
    return bool((np.ascontiguousarray(qzeros).view(np.uint32) == word).all())
