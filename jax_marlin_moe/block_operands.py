"""The arrays of an expert block, by the names that its op and its reference have for them."""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.weights import MarlinWeights


class BlockOperands(NamedTuple):
    """What a block computes with, x first; None where it has no such array.

    For the op and its reference matrices are as packed, and x has the padding of their rows.

    Attributes:
        x: a row for each token, or, where experts read its columns in orders of their own, one for each slot.
        gate_up: the first matrices.
        down: the second ones.
        topk_weights: router weights.
        topk_ids: experts, outside of [0, E) where a slot has none.
        expert_map: global to local expert.
        x_scale: what x is in units of, or is quantised by.
        intermediate: how the activation's result is quantised.
    """

    x: Float[Array, "rows H"]
    gate_up: MarlinWeights
    down: MarlinWeights
    topk_weights: Float32[Array, "tokens top_k"]
    topk_ids: Int32[Array, "tokens top_k"]
    expert_map: Int32[Array, " experts"] | None
    x_scale: Float32[Array, "1"] | None = None
    intermediate: IntermediateQuantizer | None = None
