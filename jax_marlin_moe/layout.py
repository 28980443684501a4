"""The Marlin order as closed forms: packed words to and from logical codes.

Every function is jittable, takes any leading batch dimensions (experts) and is exact. Codes are uint8 arrays, or uint16
where they have 16 bits, of the logical matrix (K, N); words are int32 bit patterns. The index formulas are those of
docs/formats.md, "Marlin layout" and "Scales, zero points and bias".
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped, UInt8

TILE_K = 16  # rows of a Marlin tile, one MMA contraction step
TILE_N = 64  # columns of a Marlin tile, one 16-byte load a lane

# Bit position, in units of a code, of the i-th code in MMA-fragment order. The interleave lets one mask extract
# the two halves of a 16-bit pair.
_PAIR_ORDER = {4: (0, 4, 1, 5, 2, 6, 3, 7), 8: (0, 2, 1, 3), 16: (0, 1)}


def _fold_words(codes: Array, order: tuple[int, ...], bits: int) -> Array:
    """ORs the last axis of `codes` into one int32 word, entry i at bit `bits * order[i]`."""
    shifts = jnp.asarray([bits * position for position in order], jnp.uint32)
    words = jnp.bitwise_or.reduce(codes.astype(jnp.uint32) << jnp.expand_dims(shifts, range(codes.ndim - 1)), axis=-1)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def split_words(words: Array, order: tuple[int, ...], bits: int) -> Array:
    """The inverse of `_fold_words`: appends an axis of codes, uint8 or, of 16 bits, uint16."""
    shifts = jnp.asarray([bits * position for position in order], jnp.uint32)
    unsigned = jax.lax.bitcast_convert_type(words, jnp.uint32)
    return ((unsigned[..., None] >> jnp.expand_dims(shifts, range(words.ndim))) & (2**bits - 1)).astype(
        jnp.uint8 if bits <= 8 else jnp.uint16
    )


@partial(jax.jit, static_argnames="bits")
def pack(codes: Shaped[Array, "*batch K N"], bits: int = 4) -> Int32[Array, "*batch K/16 N*16*bits/32"]:
    """Marlin packing for 16-bit activations: tiles of 16 (k) x 64 (n), docs/formats.md, "Marlin layout".

    Raises:
        ValueError: if K is not a multiple of 16 or N of 64.
    """
    *batch, k, n = codes.shape
    _check_tile(k, n)
    d = len(batch)
    # k = (kt, k_half, t, k_odd); n = (nt, w, b, col)
    tiles = codes.reshape(*batch, k // 16, 2, 4, 2, n // 64, 4, 2, 8)
    # 4 bit: word = (col, t, w), code = (b, k_half, k_odd); 8 bit: word = (col, t, w, b), code = (k_half, k_odd);
    # 16 bit: word = (col, t, w, b, k_half), code = (k_odd)
    tiles = tiles.transpose(*range(d), *(d + a for a in (0, 4, 7, 2, 5, 6, 1, 3)))
    fields = tiles.reshape(*batch, k // 16, n * 16 * bits // 32, 32 // bits)
    return _fold_words(fields, _PAIR_ORDER[bits], bits)


@partial(jax.jit, static_argnames="bits")
def unpack(packed: Int32[Array, "*batch K/16 words"], bits: int = 4) -> Shaped[Array, "*batch K N"]:
    """The codes of a Marlin-packed matrix: the inverse of `pack`."""
    *batch, k_tiles, words = packed.shape
    n = words * 32 // (16 * bits)
    d = len(batch)
    codes = split_words(packed, _PAIR_ORDER[bits], bits)
    # (kt, nt, col, t, w, b, k_half, k_odd) -> (kt, k_half, t, k_odd, nt, w, b, col)
    codes = codes.reshape(*batch, k_tiles, n // 64, 8, 4, 4, 2, 2, 2)
    codes = codes.transpose(*range(d), *(d + a for a in (0, 6, 3, 7, 1, 4, 5, 2)))
    return codes.reshape(*batch, k_tiles * 16, n)


def permute_scales(scales: Shaped[Array, "*batch N"]) -> Shaped[Array, "*batch N"]:
    """Logical to Marlin grouped order: column c of each 64 goes to `8 * (c % 8) + c // 8`.

    See docs/formats.md, "Scales, zero points and bias".
    """
    *batch, n = scales.shape
    return scales.reshape(*batch, n // 64, 8, 8).swapaxes(-1, -2).reshape(*batch, n)


# The 8 x 8 transposition is its own inverse.
unpermute_scales = permute_scales


@partial(jax.jit, static_argnames="bits")
def pack_zeros(zeros: UInt8[Array, "*batch N"], bits: int = 4) -> Int32[Array, "*batch N*bits/32"]:
    """Integer zero points in Marlin order: docs/formats.md, "Scales, zero points and bias"."""
    *batch, n = zeros.shape
    # column = (unit, t, col) -> word (unit, col[, t // 4]), code t
    fields = zeros.reshape(*batch, n // 64, 8, 8).swapaxes(-1, -2)
    return _fold_words(fields.reshape(*batch, n * bits // 32, 32 // bits), _PAIR_ORDER[bits], bits)


@partial(jax.jit, static_argnames="bits")
def unpack_zeros(words: Int32[Array, "*batch words"], bits: int = 4) -> UInt8[Array, "*batch N"]:
    """The inverse of `pack_zeros`."""
    *batch, count = words.shape
    n = count * 32 // bits
    codes = split_words(words, _PAIR_ORDER[bits], bits)
    return codes.reshape(*batch, n // 64, 8, 8).swapaxes(-1, -2).reshape(*batch, n)


def _check_tile(k: int, n: int) -> None:
    if k % TILE_K:
        raise ValueError(f"codes has K = {k} rows; Marlin packing needs a multiple of {TILE_K}")
    if n % TILE_N:
        raise ValueError(f"codes has N = {n} columns; Marlin packing needs a multiple of {TILE_N}")
