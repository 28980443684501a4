"""The arrays of a whole layer, by the names that its op, its reference and its composition of ops have for them."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import MarlinWeights


class LayerOperands(NamedTuple):
    """What a layer computes with, x first; None where the layer has no such array.

    For the op and its reference matrices are as packed, and x has the padding of their rows; the router and a dense
    shared expert have none.

    Attributes:
        x: bfloat16 or float16.
        router: any of those, or float32.
        gate_up: of the routed experts.
        down: likewise.
        shared: what every token visits.
        router_bias: added to the logits.
        correction_bias: added to the scores for the choice alone.
        expert_scale: factors of the router weights by expert.
        router_input: what the router reads, where it is not x.
        router_input_scale: of the rows that the router reads, normalised.
        topk_ids: experts that are chosen already.
        expert_map: global to local expert.
    """

    x: Float[Array, "tokens H"]
    router: Float[Array, "H experts"]
    gate_up: MarlinWeights
    down: MarlinWeights
    shared: SharedExpert | None
    router_bias: Float[Array, " experts"] | None
    correction_bias: Float[Array, " experts"] | None
    expert_scale: Float[Array, " experts"] | None
    router_input: Float[Array, "tokens H"] | None
    router_input_scale: Float[Array, " H"] | None
    topk_ids: Int32[Array, "tokens top_k"] | None
    expert_map: Int32[Array, " experts"] | None
