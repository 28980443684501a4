"""The derivatives of the expert block: one op, linear in the tangents, whose residuals are the inputs of the block.

Reverse mode keeps nothing but these inputs between the passes: the hidden activations are computed again. So nothing
is gained by `jax.checkpoint` around a block, and nothing lost. Packed weights are read as they are, in both passes.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_marlin_moe import reference
from jax_marlin_moe.no_derivative import NoDerivative
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.four_numbers import WORDS
from jax_marlin_moe.ops.frozen import check_not_only_frozen
from jax_marlin_moe.ops.grouped_product import (
    float32_product,
    grouped_product_op,
    multiplied,
    slot_columns,
    sum_by_expert,
    summed_product,
    with_bias,
)
from jax_marlin_moe.ops.hidden_cotangents import hidden_cotangents, hidden_cotangents_op
from jax_marlin_moe.ops.primitive import Op, map_batch
from jax_marlin_moe.ops.tangents import jvp_of


class Tangents(NamedTuple):
    """Of the operands of a block that have derivatives, None where one does not move."""

    x: Any
    gate_up_bias: Any
    gate_up_global_scales: Any
    down_bias: Any
    down_global_scales: Any
    topk_weights: Any


def block_jvp(op, primals, tangents, *, activation, activation_dtype=None, out_dtype, implementation, **options):
    """The `jvp` of `fused_moe`."""
    x, gate_up, down, topk_weights, *_ = tangents
    moving = Tangents(x, gate_up.bias, gate_up.global_scales, down.bias, down.global_scales, topk_weights)
    *operands, x_scale, intermediate = primals
    rounding = (("activation_dtype", activation_dtype), ("x_scale", x_scale), ("intermediate", intermediate))
    for name, value in rounding:
        if value is not None:
            error = NotImplementedError(
                f"fused_moe cannot be differentiated where {name} is not None: what it rounds has no derivative. Pass "
                "rows of bfloat16 or float16 without it, or put jax.lax.stop_gradient around arguments or results"
            )
            raise NoDerivative(error)
    assert out_dtype != WORDS, "words have no derivative: that of the sum is of what they stand for"
    check_not_only_frozen("fused_moe", {"gate_up": gate_up, "down": down}, *moving)
    params = {"activation": activation, "out_dtype": out_dtype, "implementation": implementation}
    # What trains wants memory: the slots' rows, the largest array of the forward pass, may have to go in slices.
    results = op(*primals, activation_dtype=activation_dtype, **params, **(options | {"cuda_sliced": True}))
    return results, fused_moe_tangent_op(moving, *operands, **params)


def _moving_operands(tangents: Tangents, operands: tuple) -> tuple:
    """Tangents in the places of the operands, None elsewhere."""
    nothing = jax.tree.map(lambda _: None, operands)
    _, gate_up, down, *_ = nothing
    return (
        tangents.x,
        dataclasses.replace(gate_up, bias=tangents.gate_up_bias, global_scales=tangents.gate_up_global_scales),
        dataclasses.replace(down, bias=tangents.down_bias, global_scales=tangents.down_global_scales),
        tangents.topk_weights,
        None,
        None,
    )


def _reference(tangents, x, gate_up, down, topk_weights, topk_ids, expert_map, *, activation, out_dtype):
    operands = (x, gate_up, down, topk_weights, topk_ids, expert_map)
    block = partial(reference.fused_moe, activation=activation, out_dtype=out_dtype)
    return jvp_of(block, operands, _moving_operands(tangents, operands))[1]


def _block(x, gate_up, down, topk_weights, topk_ids, expert_map, *, activation, out_dtype, implementation):
    """The block as a composition of grouped products."""
    experts = reference.slot_experts(topk_ids, expert_map, gate_up.num_experts)
    h = float32_product(x, gate_up, experts, implementation)
    a = activation.of_product(h)[:, : down.padded_k].astype(x.dtype)
    y = (
        float32_product(a, down, experts, implementation)
        * jnp.where(experts >= 0, topk_weights.reshape(-1), 0)[:, None]
    )
    return y.reshape(*topk_ids.shape, down.padded_n).sum(1).astype(out_dtype)


def _composed(tangents, *operands, implementation=None, **params):
    block = partial(_block, implementation=implementation, **params)
    return jvp_of(block, operands, _moving_operands(tangents, operands))[1]


def _form(tangents, *operands, **params):
    return [_composed(tangents, *operands, **params)]


def _shape_rule(tangents, x, gate_up, down, topk_weights, topk_ids, expert_map, *, activation, out_dtype):
    return [replicated_type(x, (topk_ids.shape[0], down.padded_n), out_dtype)]


def _jvp(op, primals, tangents, **params):
    if not jax.tree.leaves(tangents[1:]):
        zeros = jax.tree.map(
            lambda moving, tangent: jnp.zeros_like(moving) if tangent is None else tangent, primals[0], tangents[0]
        )
        return op(*primals, **params), op(zeros, *primals[1:], **params)
    results, dots = jvp_of(partial(_composed, **params), primals, tangents)
    return [results], [dots]


def _transpose(op, cotangents, operands, *, implementation, activation, out_dtype):
    (cotangent,), (tangents, *operands) = cotangents, operands
    if cotangent is None:
        return (None,) * (1 + len(operands))
    wanted = Tangents(*(ad.is_undefined_primal(tangent) for tangent in tangents))
    return (_cotangents(cotangent, wanted, *operands, activation=activation, implementation=implementation),) + (
        None,
    ) * len(operands)


def _cotangents(
    cotangent, wanted, x, gate_up, down, topk_weights, topk_ids, expert_map, *, activation, implementation
) -> Tangents:
    """The backward pass: a product with down transposed, the hidden activations again, one with gate_up transposed."""
    experts = reference.slot_experts(topk_ids, expert_map, gate_up.num_experts)
    top_k = topk_ids.shape[1]
    dtype = x.dtype.name
    router = jnp.where(experts >= 0, topk_weights.reshape(-1), 0)[:, None]
    first, second = multiplied(gate_up), multiplied(down)

    def product(rows, weights, **params):
        (y,) = grouped_product_op(
            rows, weights, experts, None, None, implementation=implementation, **({"transposed": False} | params)
        )
        return y

    def of_slots(rows):  # of the tokens
        return jnp.repeat(rows.astype(jnp.float32), top_k, axis=0)

    def global_scales(rows, weights, cotangent):
        def scaled(global_scales):
            return product(rows, dataclasses.replace(weights, global_scales=global_scales), dtype="float32")

        return jax.vjp(scaled, weights.global_scales)[1](cotangent)[0]

    found = dict.fromkeys(Tangents._fields)
    if wanted.down_bias:
        chosen = (
            (jax.nn.one_hot(experts, down.num_experts) * router)
            .reshape(topk_ids.shape[0], top_k, down.num_experts)
            .sum(1)
        )
        found["down_bias"] = jnp.matmul(chosen.T, cotangent.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if wanted.down_global_scales:
        h = with_bias(product(x, first, dtype=dtype).astype(jnp.float32), gate_up, experts)
        a = activation.of_product(h)[:, : down.padded_k].astype(x.dtype)
        found["down_global_scales"] = global_scales(a, second, of_slots(cotangent) * router)
    of_hidden = wanted.gate_up_bias or wanted.gate_up_global_scales
    if wanted.topk_weights or wanted.x or of_hidden:
        # Where gate and up belong together, rows are whole on every device. Others stay where their columns are.
        pull = partial(hidden_cotangents_op, implementation=implementation) if activation.gated else hidden_cotangents
        d_h, d_router = pull(
            product(x, first, dtype=dtype, unwritten=True),
            product(cotangent.astype(x.dtype), second, dtype=dtype, transposed=True, unwritten=True),
            experts,
            topk_weights.reshape(-1),
            gate_up.bias,
            num_experts=gate_up.num_experts,
            activation=activation,
            dtype="float32" if of_hidden else dtype,
        )
    if wanted.topk_weights:
        if down.bias is not None:
            d_router += (of_slots(cotangent) * slot_columns(down.bias, experts)).sum(1)
        found["topk_weights"] = jnp.where(experts >= 0, d_router, 0).reshape(topk_weights.shape)
    if wanted.gate_up_bias:
        found["gate_up_bias"] = sum_by_expert(d_h, experts, gate_up.num_experts)
    if wanted.gate_up_global_scales:
        found["gate_up_global_scales"] = global_scales(x, first, d_h)
    if wanted.x:
        # All else first: what it reads need not outlive the product, whose scratch may be the largest array of all.
        rounded, found = jax.lax.optimization_barrier((d_h.astype(x.dtype), found))
        row_map, options = (experts, None, None), {"dtype": dtype, "implementation": implementation}
        found["x"] = summed_product(grouped_product_op, rounded, first, row_map, x.shape[0], transposed=True, **options)
    return Tangents(**found)


fused_moe_tangent_op = Op(
    "fused_moe_tangent",
    shape_rule=_shape_rule,
    reference=_reference,
    cpu=_form,
    cuda=_form,
    batching_rule=map_batch,
    jvp=_jvp,
    transpose=_transpose,
)
