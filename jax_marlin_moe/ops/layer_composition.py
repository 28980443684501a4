"""A layer as a composition of ops: the router, `fused_moe`, and the shared expert, where one call cannot be all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import reference_layer
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.cuda.scheme import BatchInvariant, BlockScheme
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.layer_operands import LayerOperands
from jax_marlin_moe.ops.fused_moe import expert_block
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import MarlinWeights


def composition(
    *operands: Any,
    routing: Routing,
    activation: Activation,
    shared_activation: Activation,
    norm_epsilon: float,
    implementation: str | None,
    cuda_scheme: BlockScheme | BatchInvariant | None = None,
    activation_dtype: ByteDtype | None = None,
    x_scale: Float32[Array, ""] | None = None,
    intermediate: IntermediateQuantizer | None = None,
    expert_input_scale: Float[Array, " H"] | None = None,
    out_dtype: DTypeLike | None = None,
    block: Callable[..., jax.Array] = expert_block,
    keep: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> tuple[Float[Array, "tokens H"], Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """The layer of `route_rows` and `fused_moe`, each with its own derivative and partitioning, and the shared expert.

    The operands are `LayerOperands`, those of `moe_layer_op`, or, with orders of their rows and paddings, those of
    `moe_layer`. The result has the type of x, or `out_dtype`. `block` computes the routed experts, of rows times
    `expert_input_scale`; its rows are those that `keep` keeps.

    Raises:
        ValueError: the same bits in every batch are asked for: XLA chooses how the router's product adds up by shape.
    """
    if cuda_scheme == "batch_invariant":
        raise ValueError(
            "batch_invariant is True; a layer has it where one custom call is the whole layer, which is not so for "
            "this router, shared expert, order of columns, activation_dtype or derivative: route, then pass "
            "batch_invariant to fused_moe"
        )
    layer = LayerOperands(*operands)
    shared = layer.shared
    dtype = jnp.dtype(layer.x.dtype if out_dtype is None else out_dtype)
    # What is added to something is not rounded before.
    adds = routing.apply_on_input or routing.identity_experts > 0 or shared is not None
    options: dict[str, Any] = {"implementation": implementation, "activation_dtype": activation_dtype}
    routed = {**options, "activation": activation, "cuda_scheme": cuda_scheme, "rounded_to": dtype}
    routed["out_dtype"] = jnp.dtype(jnp.float32) if adds else dtype
    if activation_dtype is not None:
        routed |= {"x_scale": x_scale, "intermediate": intermediate}
    return reference_layer.composed_layer(
        layer,
        routing=routing,
        norm_epsilon=norm_epsilon,
        out_dtype=dtype,
        block=lambda rows, *choice: block(rows, layer.gate_up, layer.down, *choice, layer.expert_map, **routed),
        shared=None if shared is None else lambda x: shared_beside(x, shared, shared_activation, **options),
        expert_input_scale=expert_input_scale,
        keep=keep,
    )


def shared_beside(
    x: Float[Array, "tokens H"],
    shared: SharedExpert,
    activation: Activation,
    *,
    implementation: str | None,
    activation_dtype: ByteDtype | None = None,
    rounded_to: jnp.dtype | None = None,
    columns_over: tuple[str, ...] = (),
) -> Float32[Array, "tokens columns"]:
    """What the shared expert adds, from calls of its own; other options as for `expert_block`."""
    if not isinstance(shared.gate_up, MarlinWeights):
        return reference_layer.shared_sum(x, shared, activation)
    assert isinstance(shared.down, MarlinWeights)
    all_ids = reference_layer.every_expert(x.shape[0], shared.gate_up.num_experts)
    gate = jnp.float32(1) if shared.gate is None else reference_layer.shared_gate(x, shared.gate)
    return expert_block(
        x,
        shared.gate_up,
        shared.down,
        jnp.broadcast_to(gate, all_ids.shape),
        all_ids,
        None,
        activation=activation,
        activation_dtype=activation_dtype,
        out_dtype=jnp.dtype(jnp.float32),
        rounded_to=rounded_to,
        implementation=implementation,
        cuda_scheme=None,
        columns_over=columns_over,
    )
