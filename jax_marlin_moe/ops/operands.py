"""The operands and attributes of one matrix in the custom calls.

An optional array that is absent travels as a zero-size vector.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.formats import WeightFormat
from jax_marlin_moe.weights import MarlinWeights

WEIGHT_OPERANDS = 5  # packed, scales, zeros, global_scales, bias


def or_absent(array: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`array`, or its stand-in when it is None."""
    return jnp.zeros((0,), dtype) if array is None else array


def or_none(array: jax.Array) -> jax.Array | None:
    """The inverse of `or_absent`."""
    return None if array.shape == (0,) else array


def weight_operands(weights: MarlinWeights) -> tuple[jax.Array, ...]:
    """The operands of one matrix; its row order and padding have been applied to x before."""
    return (
        weights.packed,
        weights.scales,
        or_absent(weights.zeros, jnp.int32),
        or_absent(weights.global_scales, jnp.float32),
        or_absent(weights.bias, jnp.float32),
    )


def weights_from_operands(operands: tuple[jax.Array, ...], weight_format: WeightFormat) -> MarlinWeights:
    """The inverse of `weight_operands`: the padded matrix, in packed row order."""
    packed, scales, zeros, global_scales, bias = operands
    return MarlinWeights(
        packed, scales, or_none(zeros), or_none(bias), None, weight_format, global_scales=or_none(global_scales)
    )


def format_attributes(prefix: str, weights: MarlinWeights) -> dict[str, Any]:
    """What the CPU handlers must know of the format: the types of codes, scales and zero points, and the group."""
    row = weights.format
    return {
        f"{prefix}code": row.code.name,
        f"{prefix}scale": row.scale.name,
        f"{prefix}zeros": row.zeros or "none",
        f"{prefix}zero_point": np.int64(row.zero_point or 0),
        f"{prefix}group_size": np.int64(weights.rows_per_scale),
    }
