"""Four float32 numbers in 64 bits, as csrc/cuda/four_columns.cuh has them, for rows that are sent only to be added up.

14 bits of each, in units of one power of two, which follows from the largest of them: the error is at most half a unit,
2^-13 of the largest. A number that is not finite makes all four NaN.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt32

_BITS, _NOT_FINITE = 14, 255


def pack_fours(y: Float32[Array, "*rows columns"]) -> tuple[UInt32[Array, "*rows fours"], UInt32[Array, "*rows fours"]]:
    """The low and the high words; the four are a quarter of the columns apart."""
    parts = jnp.split(y, 4, axis=-1)
    largest = jnp.maximum(
        jnp.maximum(jnp.abs(parts[0]), jnp.abs(parts[1])), jnp.maximum(jnp.abs(parts[2]), jnp.abs(parts[3]))
    )
    # Of the power of two above, rounded as the numbers will be: no number rounds to 2^13 units.
    exponent = (lax.bitcast_convert_type(largest, jnp.uint32) + jnp.uint32(1 << (24 - _BITS))) >> 23
    exponent = jnp.clip(exponent, _BITS, _NOT_FINITE)
    units = lax.bitcast_convert_type((252 + _BITS - exponent) << 23, jnp.float32)  # of one
    a, b, c, d = (
        lax.bitcast_convert_type(jnp.round(part * units).astype(jnp.int32), jnp.uint32) & ((1 << _BITS) - 1)
        for part in parts
    )
    return a | b << _BITS | (exponent & 15) << 28, c | d << _BITS | (exponent >> 4) << 28


def unpack_fours(
    low: UInt32[Array, "*rows fours"], high: UInt32[Array, "*rows fours"]
) -> Float32[Array, "*rows columns"]:
    """What `pack_fours` has packed."""
    exponent = low >> 28 | (high >> 28) << 4
    unit = lax.bitcast_convert_type((exponent + 2 - _BITS) << 23, jnp.float32)
    unit = jnp.where(exponent == _NOT_FINITE, jnp.nan, unit)
    return jnp.concatenate([_signed(word, place) * unit for word in (low, high) for place in (0, _BITS)], axis=-1)


def _signed(word: jax.Array, place: int) -> jax.Array:
    """The number of 14 bits at a place of a word."""
    above = 32 - _BITS
    return (lax.bitcast_convert_type(word << (above - place), jnp.int32) >> above).astype(jnp.float32)
