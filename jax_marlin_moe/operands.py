"""The operands and attributes of one matrix in the custom calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.weights import MarlinWeights

# The leaves of a `MarlinWeights` in the order of the custom calls.
WEIGHT_LEAVES = ("packed", "scales", "zeros", "global_scales", "bias")
WEIGHT_OPERANDS = len(WEIGHT_LEAVES)
_EMPTY_DTYPES = (jnp.int32, jnp.float32, jnp.int32, jnp.float32, jnp.float32)


def weight_operands(weights: MarlinWeights) -> tuple[jax.Array | None, ...]:
    """The arrays of one matrix in the order of the custom calls, None where absent; x has its row order and padding."""
    return tuple(getattr(weights, leaf) for leaf in WEIGHT_LEAVES)


def or_empty(array: jax.Array | None, dtype: DTypeLike) -> jax.Array:
    """`array`, or the vector of no elements by which the CPU handlers know that it is absent."""
    return jnp.zeros((0,), dtype) if array is None else array


def cpu_weight_operands(weights: MarlinWeights) -> tuple[jax.Array, ...]:
    """`weight_operands` for a CPU handler, whose operands are all there."""
    leaves = zip(weight_operands(weights), _EMPTY_DTYPES, strict=True)
    return tuple(or_empty(leaf, dtype) for leaf, dtype in leaves)


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
