"""Rows of x in the packed order of an expert's rows, where the experts have orders of their own."""

import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from jax_marlin_moe.weights import MarlinWeights


def gather_input_order(
    rows: Shaped[Array, "slots K"], weights: MarlinWeights, expert: Int32[Array, " slots"]
) -> Shaped[Array, "slots K"]:
    """Row s of `rows` with its columns in the packed order of `expert[s]`; experts out of range read anything."""
    assert weights.input_order is not None
    order = weights.input_order[jnp.clip(expert, 0, weights.num_experts - 1)]
    return jnp.take_along_axis(rows, order, axis=1)
