"""`fused_moe`: the whole expert block, align to weighted sum, as one custom call (FORMATS section 7)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import native, reference
from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan import plan_fused_moe
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.cuda.tiles import BlockScheme
from jax_marlin_moe.layout import TILE_N
from jax_marlin_moe.ops import arguments
from jax_marlin_moe.ops.implementation import check_implementation, serves
from jax_marlin_moe.ops.moe_gemm import gather_input_order
from jax_marlin_moe.ops.operands import (
    WEIGHT_OPERANDS,
    format_attributes,
    or_absent,
    or_none,
    weight_operands,
    weights_from_operands,
)
from jax_marlin_moe.ops.primitive import define_primitive, map_batch
from jax_marlin_moe.weights import MarlinWeights, drop_column_padding, pad_rows


def fused_moe(
    x: Float[Array, "tokens H"],
    gate_up: MarlinWeights,
    down: MarlinWeights,
    topk_weights: Float32[Array, "tokens top_k"],
    topk_ids: Int32[Array, "tokens top_k"],
    *,
    activation: str | Activation = "silu",
    expert_map: Int32[Array, "experts"] | None = None,
    implementation: str | None = None,
    cuda_scheme: BlockScheme | None = None,
) -> Float[Array, "tokens H"]:
    """A mixture-of-experts block over packed experts.

    `out[t] = sum_j topk_weights[t, j] * (act(x[t] @ Wg[e] + bg[e], x[t] @ Wu[e] + bu[e]) @ Wd[e] + bd[e])` with
    `e = topk_ids[t, j]`. Products accumulate in float32; the activation's result is rounded to the type of x, the sum
    over j is in float32, in order, and rounded once. Experts named twice count twice.

    Args:
        x: bfloat16 or float16 tokens.
        gate_up: experts of shape (H, 2 I), columns [gate | up]; (H, I) where the activation is not gated.
        down: experts of shape (I, H).
        topk_weights: float32 router weights.
        topk_ids: int32 experts. Slots whose id is outside [0, E), or is mapped to -1, contribute nothing.
        activation: "silu" (`gate * sigmoid(gate) * up`), "gelu_tanh", "relu2" (not gated), or
            `jax_marlin_moe.swiglu(limit, alpha, beta)`.
        expert_map: int32, global to local expert, -1 for experts that live elsewhere.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        cuda_scheme: how CUDA cuts the block; None takes the measured or predicted best.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot serve.
    """
    arguments.check_rows("x", x)
    arguments.check_weights("gate_up", gate_up)
    arguments.check_weights("down", down)
    act = get_activation(activation)
    arguments.check_shape("x", x, (x.shape[0], gate_up.k), "(tokens, H)")
    halves = 2 if act.gated else 1
    if gate_up.n != halves * down.k:
        raise ValueError(
            f"gate_up has N = {gate_up.n} columns and down K = {down.k} rows; activation {act.name!r} needs "
            f"N = {halves} * K"
        )
    if gate_up.padded_n % (halves * TILE_N) or len(gate_up.column_padding or halves * (0,)) != halves:
        raise ValueError(
            f"gate_up has {gate_up.padded_n} columns, with column_padding = {gate_up.column_padding}; the block needs "
            f"gate and up in whole tiles of {TILE_N} columns each: pack them one by one and join them with "
            "jax_marlin_moe.concatenate_columns"
        )
    if down.n != gate_up.k:
        raise ValueError(f"down has N = {down.n} columns; it must be H = {gate_up.k}")
    if down.num_experts != gate_up.num_experts:
        raise ValueError(f"down has {down.num_experts} experts; it must have as many as gate_up: {gate_up.num_experts}")
    arguments.check_array("topk_ids", topk_ids, ndim=2, dtype=jnp.int32)
    arguments.check_array("topk_weights", topk_weights, ndim=2, dtype=jnp.float32)
    tokens, top_k = topk_ids.shape
    arguments.check_shape("topk_ids", topk_ids, (x.shape[0], top_k), "(tokens, top_k)")
    arguments.check_shape("topk_weights", topk_weights, (tokens, top_k), "(tokens, top_k)")
    arguments.check_expert_map(expert_map)
    routed_experts = gate_up.num_experts if expert_map is None else expert_map.shape[0]
    arguments.check_top_k(top_k, routed_experts)
    if down.input_order is not None:
        raise ValueError(
            "down.input_order is not None; fold it into the columns of gate_up first, with "
            "jax_marlin_moe.fold_input_order(gate_up, down)"
        )
    check_implementation(implementation)
    # numpy arrays cannot be indexed by tracers
    gate_up, down, expert_map = jax.tree.map(jnp.asarray, (gate_up, down, expert_map))
    if gate_up.input_order is not None:
        expert = topk_ids.reshape(-1)
        if expert_map is not None:
            expert = expert_map[jnp.clip(expert, 0, routed_experts - 1)]
        x = gather_input_order(jnp.repeat(x, top_k, axis=0), gate_up, expert)
    operands = (
        pad_rows(x, gate_up),
        *weight_operands(gate_up),
        *weight_operands(down),
        topk_weights,
        topk_ids,
        or_absent(expert_map, jnp.int32),
    )
    params = {"gate_up_format": gate_up.format, "down_format": down.format, "activation": act}
    if implementation == "xla":
        (y,) = _reference(*operands, **params, implementation=None, cuda_scheme=None)
    else:
        (y,) = fused_moe_p.bind(*operands, **params, implementation=implementation, cuda_scheme=cuda_scheme)
    return drop_column_padding(y, down)


# x has one row per token, or, where the experts read its columns in orders of their own, one per slot.


def _shape_rule(x, *operands, gate_up_format, down_format, activation, implementation, cuda_scheme):
    topk_ids, down_scales = operands[2 * WEIGHT_OPERANDS + 1], operands[WEIGHT_OPERANDS + 1]
    return [x.update(shape=(topk_ids.shape[0], down_scales.shape[-1]), dtype=x.dtype)]


def _matrices(operands, gate_up_format, down_format):
    gate_up = weights_from_operands(operands[:WEIGHT_OPERANDS], gate_up_format)
    down = weights_from_operands(operands[WEIGHT_OPERANDS : 2 * WEIGHT_OPERANDS], down_format)
    return gate_up, down, operands[2 * WEIGHT_OPERANDS :]


def _reference(x, *operands, gate_up_format, down_format, activation, implementation, cuda_scheme):
    gate_up, down, (topk_weights, topk_ids, expert_map) = _matrices(operands, gate_up_format, down_format)
    return [reference.fused_moe(x, gate_up, down, topk_weights, topk_ids, or_none(expert_map), activation=activation)]


def _cpu(x, *operands, gate_up_format, down_format, activation, implementation, cuda_scheme):
    gate_up, down, (_, topk_ids, _) = _matrices(operands, gate_up_format, down_format)
    if not serves("cpu", implementation):
        return _reference(
            x,
            *operands,
            gate_up_format=gate_up_format,
            down_format=down_format,
            activation=activation,
            implementation=None,
            cuda_scheme=None,
        )
    result = jax.ShapeDtypeStruct((topk_ids.shape[0], down.n), x.dtype)
    return jax.ffi.ffi_call(native.FUSED_MOE_CPU, [result])(
        x,
        *operands,
        activation=activation.name,
        activation_parameters=np.asarray(activation.parameters, np.float32),
        **format_attributes("gate_up_", gate_up),
        **format_attributes("down_", down),
    )


def _cuda(x, *operands, gate_up_format, down_format, activation, implementation, cuda_scheme):
    gate_up, down, (_, topk_ids, expert_map) = _matrices(operands, gate_up_format, down_format)
    tokens, top_k = topk_ids.shape
    if tokens == 0 or not serves("cuda", implementation):
        return _reference(
            x,
            *operands,
            gate_up_format=gate_up_format,
            down_format=down_format,
            activation=activation,
            implementation=None,
            cuda_scheme=None,
        )
    architecture = target_architecture()
    mapped = or_none(expert_map) is not None
    plan = plan_fused_moe(
        x,
        gate_up,
        down,
        tokens=tokens,
        top_k=top_k,
        routed_experts=expert_map.shape[0] if mapped else gate_up.num_experts,
        mapped=mapped,
        activation=activation,
        architecture=architecture,
        scheme=cuda_scheme,
    )
    result = jax.ShapeDtypeStruct((tokens, down.n), x.dtype)
    return call_program([x, *operands], [result, *plan.scratch], plan.kernels, plan.source, architecture)[:1]


def _batching_rule(operands, dims, **params):
    """Batched tokens become one call over all of them; batched weights or maps one call each."""
    bind = partial(fused_moe_p.bind, **params)
    router = 1 + 2 * WEIGHT_OPERANDS
    if any(dim is not None for dim in (*dims[1:router], dims[-1])):
        return map_batch(bind, operands, dims)
    batch = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)

    def flat(index: int) -> jax.Array:
        operand, dim = operands[index], dims[index]
        operand = jnp.broadcast_to(operand, (batch, *operand.shape)) if dim is None else jnp.moveaxis(operand, dim, 0)
        return operand.reshape(-1, operand.shape[-1])

    (y,) = bind(flat(0), *operands[1:router], flat(router), flat(router + 1), operands[-1])
    return [y.reshape(batch, -1, y.shape[-1])], [0]


fused_moe_p = define_primitive(
    "fused_moe", shape_rule=_shape_rule, reference=_reference, cpu=_cpu, cuda=_cuda, batching_rule=_batching_rule
)
