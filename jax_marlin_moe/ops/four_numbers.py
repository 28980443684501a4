"""Four float32 numbers in 64 bits, for rows that devices send each other only to be added up.

14 bits of each, in units of one power of two, which follows from the largest of them: the error is at most half a unit,
2^-13 of the largest. A number that is not finite makes all four NaN. csrc/cuda/four_columns.cuh says where the bits
are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

WORDS = jnp.dtype(jnp.int32)  # of packed numbers, and of no other result of an op that may have them
_BITS, _LEAST, _NOT_FINITE = 14, 13, 255
_SIGN = 1 << (2 * _BITS - 1)  # of the second number of a word, which borrows from the exponent above it


def pack_fours(y: Float32[Array, "*rows columns"]) -> Int32[Array, "*rows words"]:
    """Two words for each four neighbours."""
    fours = y.reshape(*y.shape[:-1], -1, 4)
    # Of the power of two above, rounded as the numbers will be: no number rounds to 2^13 units.
    largest = lax.bitcast_convert_type(jnp.abs(fours).max(-1), jnp.uint32)
    exponent = jnp.clip((largest + jnp.uint32(1 << (24 - _BITS))) >> 23, _LEAST, _NOT_FINITE)
    units = lax.bitcast_convert_type((252 + _BITS - exponent) << 23, jnp.float32)  # of one
    whole = lax.bitcast_convert_type(jnp.round(fours * units[..., None]).astype(jnp.int32), jnp.uint32)
    a, b, c, d = jnp.moveaxis(whole, -1, 0)
    first = jnp.uint32((1 << _BITS) - 1)
    words = [(a & first) + (b << _BITS) + (exponent << 28), (c & first) + (d << _BITS) + (exponent >> 4 << 28)]
    return lax.bitcast_convert_type(jnp.stack(words, -1), jnp.int32).reshape(*y.shape[:-1], -1)


def unpack_fours(words: Int32[Array, "*rows words"]) -> Float32[Array, "*rows columns"]:
    """What `pack_fours` has packed."""
    pairs = lax.bitcast_convert_type(words, jnp.uint32).reshape(*words.shape[:-1], -1, 2)
    low, high = pairs[..., 0], pairs[..., 1]
    exponent = (low + _SIGN) >> 28 | ((high + _SIGN) >> 28) << 4
    unit = lax.bitcast_convert_type((exponent + 2 - _BITS) << 23, jnp.float32)
    unit = jnp.where(exponent == _NOT_FINITE, jnp.nan, unit)
    numbers = jnp.stack([_signed(word, place) * unit for word in (low, high) for place in (0, _BITS)], -1)
    return numbers.reshape(*words.shape[:-1], -1)


def _signed(word: jax.Array, place: int) -> jax.Array:
    """The number of 14 bits at a place of a word."""
    above = 32 - _BITS
    return (lax.bitcast_convert_type(word << (above - place), jnp.int32) >> above).astype(jnp.float32)
