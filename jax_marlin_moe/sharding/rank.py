"""What one rank of a mesh computes of a layer: its share of the experts, and of the shared one."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jax_marlin_moe import arguments, reference_layer
from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.expert_placement import slots_of
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.layer_slice import spread_indices
from jax_marlin_moe.ops.fused_moe import share_of_block
from jax_marlin_moe.ops.layer_composition import shared_beside
from jax_marlin_moe.sharding.block_sum import BlockSum, Experts
from jax_marlin_moe.sharding.tensor_parallel import local_matrix
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import MarlinWeights


class RowQuantization(NamedTuple):
    """How a rank quantises the rows of its experts, as for `fused_moe`; scales are those of its experts."""

    activation_dtype: ByteDtype | None = None
    x_scale: Float32[Array, ""] | None = None
    intermediate: IntermediateQuantizer | None = None


def layer_of_rank(
    layer,
    x,
    token_ids,
    router_input,
    *,
    expert,
    tensor,
    tokens,
    exchange,
    capacity,
    share,
    activation_dtype,
    implementation,
):
    """`parallel_layer` of the tokens and weights of one rank."""
    layer = spread_indices(layer)
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    router_rows = x if router_input is None else router_input.reshape(x.shape)
    weights, ids = layer.route(router_rows, None if token_ids is None else token_ids.reshape(-1))
    rows, _ = arguments.as_rows("x", x)
    kept = None
    if layer.routing.identity_experts:
        kept = reference_layer.identity_sum(rows, weights, ids, layer.num_experts, rows.shape[1])
    if layer.placement is not None:
        ids = slots_of(ids, jnp.asarray(layer.placement), layer.num_experts)
    elif layer.routing.identity_experts:
        ids = jnp.where(ids < layer.num_experts, ids, -1)
    block = BlockSum(expert, tensor, tokens, exchange, capacity, share, jnp.dtype(x.dtype))
    on_input = layer.routing.apply_on_input
    input_scale = None if on_input else layer.expert_input_scale
    quantization = _quantization_of_rank(layer, block, activation_dtype)
    matrices = layer.gate_up, layer.down
    experts = experts_of_rank(block, *matrices, layer.activation, implementation, input_scale, quantization)
    shared = partial(_shared_of_rank, layer, block, activation_dtype, implementation)
    if on_input:
        # Each slot is a row of its own, with weight 1.
        top_k = ids.shape[1]
        each = reference_layer.weighted_rows(layer.expert_input(rows), weights)
        y, dropped = block.sum(experts, each, jnp.ones((each.shape[0], 1)), ids.reshape(-1, 1))
        y = y.reshape(rows.shape[0], top_k, y.shape[1]).sum(1)
        if layer.shared is not None:
            ones, none = jnp.ones((rows.shape[0], 1)), jnp.full((rows.shape[0], 1), -1, jnp.int32)
            alone = dataclasses.replace(block, expert=(), exchange="gather", capacity=None)
            y += alone.sum(None, rows, ones, none, shared)[0]
    else:
        extra = None if layer.shared is None else shared
        # What is added to something is not rounded before.
        dtype = x.dtype if kept is None else jnp.float32
        y, dropped = block.sum(experts, rows, weights, ids, extra, dtype)
    if kept is not None:
        y = y + kept
    y = layer.normalized(y.astype(x.dtype)).reshape(shape)
    return y if capacity is None else (y, block.total(dropped))


def experts_of_rank(
    block: BlockSum,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    activation: str | Activation,
    implementation: str | None,
    input_scale: Float[Array, " H"] | None = None,
    quantization: RowQuantization | None = None,
) -> Experts:
    """This rank's share of the experts, by the specs of a `MoESharding`; they read rows times `input_scale`."""
    quantization = RowQuantization() if quantization is None else quantization
    gate_up = local_matrix(gate_up)
    count = gate_up.num_experts
    slots = count * block.size(block.expert)

    def compute(operands, x, weights, ids, *, out_dtype):
        *matrices, scale = operands
        # As many ids as there are experts of all ranks: kernels are chosen by the rows that an expert gets of them.
        here = jnp.arange(slots, dtype=jnp.int32)
        return share_of_block(
            reference_layer.scaled_rows(x, scale), *matrices, weights, ids,
            activation=activation,
            expert_map=jnp.where(here < count, here, -1),
            out_dtype=out_dtype,
            rounded_to=block.rounded_to,
            implementation=implementation,
            columns_over=block.tensor,
            **quantization._asdict(),
        )  # fmt: skip

    return Experts(compute, (gate_up, down, input_scale), slots, packs=all(one is None for one in quantization))


def _quantization_of_rank(layer: MoELayer, block: BlockSum, activation_dtype: ByteDtype | None) -> RowQuantization:
    """How this rank quantises the rows of its experts, with its part of the fixed scales, which are by slot."""
    x_scale, intermediate = layer.fixed_scales(activation_dtype)
    if intermediate is not None and block.expert:
        count = layer.gate_up.num_experts
        first = lax.axis_index(block.expert) * count
        scales = lax.dynamic_slice_in_dim(intermediate.scales, first, count)
        intermediate = dataclasses.replace(intermediate, scales=scales)
    return RowQuantization(activation_dtype, x_scale, intermediate)


def _shared_of_rank(
    layer: MoELayer, block: BlockSum, activation_dtype: ByteDtype | None, implementation: str | None, x: Array
) -> Array:
    """float32 share of the shared expert: what is not cut is the first rank's alone."""
    shared = layer.shared
    assert shared is not None
    activation = get_activation(layer.activation if layer.shared_activation is None else layer.shared_activation)
    whole = [axis for axis in block.summed if axis in block.expert]
    gate = None if shared.gate is None else jnp.asarray(shared.gate)
    if isinstance(shared.gate_up, MarlinWeights):
        here = SharedExpert(local_matrix(shared.gate_up), shared.down, gate)
    else:
        here = SharedExpert(jnp.asarray(shared.gate_up), jnp.asarray(shared.down), gate)
        whole += block.tensor
    y = shared_beside(
        x, here, activation,
        implementation=implementation,
        activation_dtype=activation_dtype,
        rounded_to=block.rounded_to,
        columns_over=block.tensor,
    )  # fmt: skip
    first = jnp.bool_(True)
    for axis in whole:
        first = first & (lax.axis_index(axis) == 0)
    return jnp.where(first, y, 0) if whole else y
