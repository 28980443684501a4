"""The operands and attributes of one matrix in the custom calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.weights import MarlinWeights

WEIGHT_OPERANDS = 5  # packed, scales, zeros, global_scales, bias


def weight_operands(weights: MarlinWeights) -> tuple[jax.Array | None, ...]:
    """The arrays of one matrix in the order of the custom calls, None where absent; x has its row order and padding."""
    return (weights.packed, weights.scales, weights.zeros, weights.global_scales, weights.bias)


def or_empty(array: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`array`, or the vector of no elements by which the CPU handlers know that it is absent."""
    return jnp.zeros((0,), dtype) if array is None else array


def cpu_weight_operands(weights: MarlinWeights) -> tuple[jax.Array, ...]:
    """`weight_operands` for a CPU handler, whose operands are all there."""
    packed, scales, zeros, global_scales, bias = weight_operands(weights)
    assert packed is not None
    assert scales is not None
    return (
        packed,
        scales,
        or_empty(zeros, jnp.int32),
        or_empty(global_scales, jnp.float32),
        or_empty(bias, jnp.float32),
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
