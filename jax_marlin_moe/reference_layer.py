"""The specification of a whole layer: router, experts and shared expert, as docs/formats.md, "The layer", has it.

Like `jax_marlin_moe.reference`, it is what runs where no kernel does, and imports no fast path.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.block_operands import BlockOperands
from jax_marlin_moe.layer_operands import LayerOperands
from jax_marlin_moe.reference import weighted_sum
from jax_marlin_moe.rounding import rounded
from jax_marlin_moe.routing import Routing, route_rows
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import MarlinWeights, drop_column_padding


def moe_layer(
    *operands: Any,
    routing: Routing,
    activation: Activation,
    shared_activation: Activation,
    norm_epsilon: float,
    out_dtype: DTypeLike,
) -> tuple[Float[Array, "tokens H"], Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """`route_rows`, the experts that it chooses, and the shared one: one sum in float32, rounded once; the choice.

    The operands are `LayerOperands`. Weights on the input multiply it in float32, which is then rounded to the type of
    x. The router reads as many columns of x as it has rows. Its last experts may be those that return their input,
    which the matrices lack.
    """
    layer = LayerOperands(*operands)
    shared = layer.shared

    def block(rows: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array) -> jax.Array:
        routed = BlockOperands(rows, layer.gate_up, layer.down, topk_weights, topk_ids, layer.expert_map)
        return drop_column_padding(weighted_sum(routed, activation=activation), layer.down)

    return composed_layer(
        layer,
        routing=routing,
        norm_epsilon=norm_epsilon,
        out_dtype=out_dtype,
        block=block,
        shared=None if shared is None else lambda x: shared_sum(x, shared, shared_activation),
    )


def composed_layer(
    layer: LayerOperands,
    *,
    routing: Routing,
    norm_epsilon: float,
    out_dtype: DTypeLike,
    block: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    shared: Callable[[jax.Array], jax.Array] | None,
    expert_input_scale: Float[Array, " H"] | None = None,
    keep: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> tuple[Float[Array, "tokens H"], Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """`moe_layer` of a block and a shared expert that are given.

    Args:
        layer: x, and what chooses its experts.
        routing: the model's rule.
        norm_epsilon: of the norm that the router's input scale asks for.
        out_dtype: of the sum.
        block: rows, router weights and ids to the sums over experts, [rows, columns], not rounded where anything is
            added to them. Columns may have padding behind those of x.
        shared: rows to what the shared expert adds in float32, [rows, columns]; None where there is none.
        expert_input_scale: factors of the columns that `block` reads, or None.
        keep: those of all rows that `block` computes.
    """
    x = layer.x
    topk_weights, ids = choose(layer, routing, norm_epsilon)
    read = scaled_rows(x, expert_input_scale)
    if routing.apply_on_input:
        rows = weighted_rows(read, topk_weights)
        y = block(rows, jnp.ones((rows.shape[0], 1), jnp.float32), ids.reshape(-1, 1))
        y = y.reshape(y.shape[0] // routing.top_k, routing.top_k, y.shape[1]).sum(1)
    else:
        y = block(read, topk_weights, ids)
    x, topk_weights, ids = keep(x), keep(topk_weights), keep(ids)
    if routing.identity_experts:
        y = y + identity_sum(x, topk_weights, ids, layer.router.shape[1] - routing.identity_experts, y.shape[1])
    if shared is not None:
        y = y + padded_to(y, shared(x))
    return y.astype(out_dtype), topk_weights, ids


def choose(
    layer: LayerOperands, routing: Routing, norm_epsilon: float
) -> tuple[Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """Router weights and ids; of x, which may have padding, the router reads as many columns as it has rows."""
    return route_rows(
        layer.x[:, : layer.router.shape[0]] if layer.router_input is None else layer.router_input,
        layer.router,
        routing,
        router_bias=layer.router_bias,
        correction_bias=layer.correction_bias,
        expert_scale=layer.expert_scale,
        input_scale=layer.router_input_scale,
        norm_epsilon=norm_epsilon,
        ids=layer.topk_ids,
    )


def padded_to(y: Float32[Array, "rows columns"], extra: Float32[Array, "rows H"]) -> Float32[Array, "rows columns"]:
    """What is added to y, which may have columns of padding."""
    return jnp.pad(extra, ((0, 0), (0, y.shape[1] - extra.shape[1])))


def weighted_rows(x: Float[Array, "tokens H"], topk_weights: Float32[Array, "tokens top_k"]) -> Float[Array, "slots H"]:
    """A row of x for each slot, times the slot's weight, rounded to the type of x."""
    rows = x[:, None].astype(jnp.float32) * topk_weights[..., None]
    return rounded(rows, x.dtype).reshape(-1, x.shape[1])


def scaled_rows(x: Float[Array, "*batch H"], scale: Float[Array, " H"] | None) -> Float[Array, "*batch H"]:
    """Rows times a factor of each column in float32, rounded to the type of x; without factors, the rows."""
    if scale is None:
        return x
    return rounded(x.astype(jnp.float32) * scale.astype(jnp.float32), x.dtype)


def identity_sum(
    x: Float[Array, "tokens H"],
    topk_weights: Float32[Array, "tokens top_k"],
    topk_ids: Int32[Array, "tokens top_k"],
    first: int,
    columns: int,
) -> Float32[Array, "tokens columns"]:
    """What the experts from `first` on add, which return their input: x times the sum of their weights."""
    kept = jnp.sum(jnp.where(topk_ids >= first, topk_weights, 0), axis=-1, keepdims=True)
    rows = x.astype(jnp.float32)[:, :columns] * kept
    return jnp.pad(rows, ((0, 0), (0, columns - rows.shape[1])))


def shared_sum(
    x: Float[Array, "tokens H"], shared: SharedExpert, activation: Activation
) -> Float32[Array, "tokens padded_n"]:
    """The shared experts' results, times the sigmoid of the gate, before they are added and rounded."""
    gate_up, down = shared.gate_up, shared.down
    if isinstance(gate_up, MarlinWeights):
        assert isinstance(down, MarlinWeights)
        ids = every_expert(x.shape[0], gate_up.num_experts)
        every = BlockOperands(x, gate_up, down, jnp.ones(ids.shape, jnp.float32), ids, None)
        y = drop_column_padding(weighted_sum(every, activation=activation), down)
    else:
        assert not isinstance(down, MarlinWeights)
        rows = x[:, : gate_up.shape[0]]
        h = jnp.matmul(rows, gate_up.astype(x.dtype), preferred_element_type=jnp.float32)
        a = activation.of_product(h)
        y = jnp.matmul(rounded(a, x.dtype), down.astype(x.dtype), preferred_element_type=jnp.float32)
    return y if shared.gate is None else y * shared_gate(x, shared.gate)


def shared_gate(x: Float[Array, "tokens H"], gate: Float[Array, "H 1"]) -> Float32[Array, "tokens 1"]:
    """What multiplies the shared expert's result: the sigmoid of a product in float32."""
    rows = x[:, : gate.shape[0]].astype(jnp.float32)
    return jax.nn.sigmoid(jnp.matmul(rows, gate.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST))


def every_expert(tokens: int, experts: int) -> Int32[Array, "tokens experts"]:
    """Ids with which each token visits all of a stack."""
    return jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32), (tokens, experts))
