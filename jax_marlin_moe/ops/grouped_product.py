"""`grouped_product_op`: rows times the matrix of their expert, or times its transpose, from the same packed weights.

It is linear in the rows, and its transpose is itself the other way round: derivatives of all products are made of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jaxtyping import Array, Float32, Int32

from jax_marlin_moe import native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan import plan_grouped_product
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.layout import TILE_N
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes, weight_operands
from jax_marlin_moe.ops.frozen import check_not_only_frozen
from jax_marlin_moe.ops.primitive import define_op, map_batch
from jax_marlin_moe.weights import MarlinWeights, as_packed


def multiplied(weights: MarlinWeights) -> MarlinWeights:
    """The matrix as `grouped_product_op` takes it: padding included, rows in packed order, no bias."""
    return dataclasses.replace(as_packed(weights), bias=None)


def _result(rows, weights, experts, transposed, dtype):
    return (experts.shape[0], weights.padded_k if transposed else weights.padded_n), jnp.dtype(dtype)


def _shape_rule(rows, weights, experts, *, transposed, dtype):
    return [replicated_type(rows, *_result(rows, weights, experts, transposed, dtype))]


def _cpu(rows, weights, experts, *, transposed, dtype):
    return custom_call(
        "grouped_product",
        native.TARGETS["grouped_product", "cpu"],
        [rows, *cpu_weight_operands(weights), experts],
        [jax.ShapeDtypeStruct(*_result(rows, weights, experts, transposed, dtype))],
        transposed=transposed,
        slots_per_row=experts.shape[0] // max(1, rows.shape[0]) or 1,
        **format_attributes("", weights),
    )


def _cuda(rows, weights, experts, *, transposed, dtype):
    result = jax.ShapeDtypeStruct(*_result(rows, weights, experts, transposed, dtype))
    if experts.shape[0] == 0:
        return [jnp.zeros(result.shape, result.dtype)]
    architecture = target_architecture()
    plan = plan_grouped_product(
        rows,
        weights,
        experts.shape[0],
        transposed=transposed,
        dtype=result.dtype,
        architecture=architecture,
    )
    operands = [rows, *weight_operands(weights), experts]
    results = [result, *plan.scratch]
    y = call_program("grouped_product", operands, results, plan.kernels, plan.source, architecture)[0]
    has_expert = (experts >= 0) & (experts < weights.num_experts)
    return [jnp.where(has_expert[:, None], y, 0)]


def _batching_rule(op, leaves, dims, *, structure, **params):
    """Batched rows become one call over all of them; batched weights one call each."""
    rows, weights, experts = jax.tree.unflatten(structure, leaves)
    rows_dim, weights_dims, experts_dim = jax.tree.unflatten(structure, dims)
    if jax.tree.leaves(weights_dims):
        return map_batch(op, leaves, dims, structure=structure, **params)
    batch = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)

    def flat(operand: jax.Array, dim: int | None) -> jax.Array:
        operand = jnp.broadcast_to(operand, (batch, *operand.shape)) if dim is None else jnp.moveaxis(operand, dim, 0)
        return operand.reshape(batch * operand.shape[1], *operand.shape[2:])

    (y,) = op(flat(rows, rows_dim), weights, flat(experts, experts_dim), **params)
    return [y.reshape(batch, y.shape[0] // batch, y.shape[1])], [0]


def _jvp(op, primals, tangents, **params):
    (rows, weights, experts), (d_rows, d_weights, _) = primals, tangents
    check_not_only_frozen("grouped_product", {"weights": d_weights}, d_rows, d_weights.global_scales)
    results, dots = op(*primals, **params), []
    if d_rows is not None:
        dots += op(d_rows, weights, experts, **params)
    if d_weights.global_scales is not None:
        dots.append(_along_global_scales(op, rows, weights, experts, d_weights.global_scales, **params))
    return results, [sum(dots[1:], dots[0])]


def _along_global_scales(op, rows, weights, experts, moving, *, transposed, dtype, **params):
    """The product with `moving` in the place of the global scales."""
    of_slots = slot_columns(moving, experts, TILE_N)
    unscaled = dataclasses.replace(weights, global_scales=jnp.ones_like(weights.global_scales))
    params |= {"transposed": transposed}
    if not transposed:
        (y,) = op(rows, unscaled, experts, dtype="float32", **params)
        return (y * of_slots).astype(dtype)
    slots = jnp.repeat(rows, experts.shape[0] // max(1, rows.shape[0]), axis=0)
    return op((slots * of_slots).astype(rows.dtype), unscaled, experts, dtype=dtype, **params)[0]


def _transpose(op, cotangents, operands, *, transposed, dtype, **params):
    (cotangent,), (rows, weights, experts) = cotangents, operands
    if cotangent is None or not ad.is_undefined_primal(rows):
        return None, None, None
    return (
        pulled_back(op, cotangent, rows.aval, weights, experts, transposed=not transposed, **params),
        None,
        None,
    )


def pulled_back(
    op: Any, cotangent: jax.Array, rows: Any, weights: MarlinWeights, experts: jax.Array, **params: Any
) -> jax.Array:
    """The cotangent of rows of this type: slots that read one row are summed in float32."""
    (slots,) = op(cotangent.astype(rows.dtype), weights, experts, dtype=rows.dtype.name, **params)
    return sum_slots(slots, rows.shape[0])


def sum_slots(slots: jax.Array, num_rows: int) -> jax.Array:
    """The sums of the slots of each row, in float32, rounded once."""
    if slots.shape[0] == num_rows or num_rows == 0:
        return slots[:num_rows]
    return slots.reshape(num_rows, -1, slots.shape[1]).astype(jnp.float32).sum(1).astype(slots.dtype)


def slot_columns(
    by_expert: Float32[Array, "E N"], experts: Int32[Array, "slots"], repeats: int = 1
) -> Float32[Array, "slots N"]:
    """The row of each slot's expert, its entries repeated; zeros where there is no expert."""
    has_expert = (experts >= 0) & (experts < by_expert.shape[0])
    rows = by_expert[jnp.where(has_expert, experts, 0)]
    return jnp.repeat(jnp.where(has_expert[:, None], rows, 0), repeats, axis=1)


def sum_by_expert(
    slots: Float32[Array, "slots N"], experts: Int32[Array, "slots"], num_experts: int
) -> Float32[Array, "E N"]:
    """The transpose of `slot_columns`: sums in an order that does not change from run to run, unlike a scatter's."""
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32, axis=0)
    return jnp.matmul(chosen, slots.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


grouped_product_op = define_op(
    "grouped_product",
    shape_rule=_shape_rule,
    reference=reference.grouped_product,
    cpu=_cpu,
    cuda=_cuda,
    batching_rule=_batching_rule,
    jvp=_jvp,
    transpose=_transpose,
)
