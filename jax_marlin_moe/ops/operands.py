"""The operand list of the custom calls: an optional array that is absent travels as a zero-size vector."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_marlin_moe.formats import WeightFormat
from jax_marlin_moe.weights import MarlinWeights

WEIGHT_OPERANDS = 4  # packed, scales, zeros, bias


def or_absent(array: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`array`, or its stand-in when it is None."""
    return jnp.zeros((0,), dtype) if array is None else array


def or_none(array: jax.Array) -> jax.Array | None:
    """The inverse of `or_absent`."""
    return None if array.shape == (0,) else array


def weight_operands(weights: MarlinWeights) -> tuple[jax.Array, ...]:
    """The operands of one matrix; its row order has been applied to x before."""
    return (
        weights.packed,
        weights.scales,
        or_absent(weights.zeros, jnp.int32),
        or_absent(weights.bias, jnp.float32),
    )


def weights_from_operands(operands: tuple[jax.Array, ...], weight_format: WeightFormat) -> MarlinWeights:
    """The inverse of `weight_operands`."""
    packed, scales, zeros, bias = operands
    return MarlinWeights(packed, scales, or_none(zeros), or_none(bias), None, weight_format)
