"""`grouped_product_op`: rows times the matrix of their expert, or times its transpose, from the same packed weights.

It is linear in the rows, and its transpose is itself the other way round: derivatives of all products are made of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan_products import plan_grouped_product
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.layer_slice import is_slice
from jax_marlin_moe.layout import TILE_N
from jax_marlin_moe.operand_types import alike, replicated_type
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes, weight_operands
from jax_marlin_moe.ops.division import Division
from jax_marlin_moe.ops.frozen import check_not_only_frozen
from jax_marlin_moe.ops.primitive import Op
from jax_marlin_moe.weights import MarlinWeights, as_packed


def multiplied(weights: MarlinWeights) -> MarlinWeights:
    """The matrix as `grouped_product_op` takes it: padding included, rows in packed order, no bias."""
    return dataclasses.replace(as_packed(weights), bias=None)


def _result(rows, weights, experts, transposed, dtype):
    slots = rows.shape[0] if experts is None else experts.shape[0]
    return (slots, weights.padded_k if transposed else weights.padded_n), jnp.dtype(dtype)


# Parameters: `transposed`, `dtype` of the result, `summed`: neighbouring slots that are added, after each is rounded to
# `dtype`, and `unwritten`: whether rows of slots without an expert may hold anything; else they are zero.


def _shape_rule(rows, weights, experts, group_sizes, group_offset, *, transposed, dtype, summed=1, unwritten=False):
    (slots, columns), dtype = _result(rows, weights, experts, transposed, dtype)
    return [replicated_type(rows, (slots // summed, columns), dtype)]


def _reference(rows, weights, experts, group_sizes, group_offset, *, transposed, dtype, summed=1, unwritten=False):
    y = reference.grouped_product(rows, weights, experts, group_sizes, group_offset, transposed=transposed, dtype=dtype)
    return sum_slots(y, y.shape[0] // summed)


def _cpu(rows, weights, experts, group_sizes, group_offset, *, transposed, dtype, summed=1, unwritten=False):
    if summed > 1:
        (y,) = _cpu(rows, weights, experts, group_sizes, group_offset, transposed=transposed, dtype=dtype)
        return [sum_slots(y, y.shape[0] // summed)]
    if experts is None:
        experts = row_experts(group_sizes, group_offset, rows, weights)
    return custom_call(
        "grouped_product",
        native.TARGETS["grouped_product", "cpu"],
        [rows, *cpu_weight_operands(weights), experts],
        [jax.ShapeDtypeStruct(*_result(rows, weights, experts, transposed, dtype))],
        transposed=transposed,
        slots_per_row=reference.slots_per_row(experts.shape[0], rows.shape[0]),
        **format_attributes("", weights),
    )


def _cuda(rows, weights, experts, group_sizes, group_offset, *, transposed, dtype, summed=1, unwritten=False):
    (slots, columns), dtype = _result(rows, weights, experts, transposed, dtype)
    result = jax.ShapeDtypeStruct((slots // summed, columns), dtype)
    if slots == 0:
        return [jnp.zeros(result.shape, result.dtype)]
    architecture = target_architecture()
    plan = plan_grouped_product(
        rows,
        weights,
        slots,
        num_groups=None if experts is not None else group_sizes.shape[0],
        offset=group_offset is not None,
        transposed=transposed,
        dtype=result.dtype,
        architecture=architecture,
        summed=summed,
    )
    operands = [rows, *weight_operands(weights), experts if group_sizes is None else group_sizes, group_offset]
    (y,) = call_program("grouped_product", operands, [result], plan, architecture)
    if experts is None or summed > 1 or unwritten:
        return [y]
    # Of slots without an expert, the kernels write nothing. What comes next usually takes the selection in.
    return [jnp.where(_have_experts(experts, weights)[:, None], y, 0)]


def _have_experts(experts, weights):
    return (experts >= 0) & (experts < weights.num_experts)


def _jvp(op, primals, tangents, **params):
    (rows, weights, *row_map), (d_rows, d_weights, *_) = primals, tangents
    check_not_only_frozen("grouped_product", {"weights": d_weights}, d_rows, d_weights.global_scales)
    results, dots = op(*primals, **params), []
    if d_rows is not None:
        dots += op(d_rows, weights, *row_map, **params)
    if d_weights.global_scales is not None:
        dots.append(_along_global_scales(op, rows, weights, row_map, d_weights.global_scales, **params))
    return results, [sum(dots[1:], dots[0])]


def _along_global_scales(op, rows, weights, row_map, moving, *, transposed, dtype, summed=1, **params):
    """The product with `moving` in the place of the global scales."""
    experts, *groups = row_map
    if experts is None:
        experts = row_experts(*groups, rows, weights)
    of_slots = slot_columns(moving, experts, TILE_N)
    unscaled = dataclasses.replace(weights, global_scales=jnp.ones_like(weights.global_scales))
    params |= {"transposed": transposed}
    if not transposed:
        (y,) = op(rows, unscaled, *row_map, dtype="float32", **params)
        return sum_slots(y * of_slots, y.shape[0] // summed).astype(dtype)
    slots = jnp.repeat(rows, reference.slots_per_row(experts.shape[0], rows.shape[0]), axis=0)
    params |= {"summed": summed}
    return op((slots * of_slots).astype(rows.dtype), unscaled, experts, None, None, dtype=dtype, **params)[0]


def _transpose(op, cotangents, operands, *, transposed, dtype, summed=1, **params):
    (cotangent,), (rows, weights, *row_map) = cotangents, operands
    if cotangent is None or not ad.is_undefined_primal(rows):
        return (None,) * len(operands)
    aval = rows.aval
    params |= {"transposed": not transposed, "dtype": aval.dtype.name}
    found = summed_product(op, cotangent.astype(aval.dtype), weights, row_map, aval.shape[0], **params)
    return found, *(None,) * (len(operands) - 1)


def summed_product(
    op: Op,
    rows: Float[Array, "rows C"],
    weights: MarlinWeights,
    row_map: Sequence[jax.Array | None],
    num_rows: int,
    **params: Any,
) -> Float[Array, "{num_rows} D"]:
    """The product of slots, added to `num_rows` rows of as many neighbours each."""
    experts = row_map[0]
    if experts is None or num_rows == 0:
        return op(rows, weights, *row_map, **params)[0][:num_rows]
    summed = experts.shape[0] // num_rows
    if isinstance(summed, int):
        return op(rows, weights, *row_map, summed=summed, **params)[0]
    return sum_slots(op(rows, weights, *row_map, **params)[0], num_rows)


def row_experts(
    group_sizes: jax.Array, group_offset: jax.Array | None, rows: jax.Array, weights: MarlinWeights
) -> Int32[Array, " rows"]:
    """The expert of each of rows that are sorted by group."""
    return reference.ragged_experts(group_sizes, group_offset, num_rows=rows.shape[0], num_experts=weights.num_experts)


def product_dots(
    x: jax.Array,
    d_x: jax.Array | None,
    weights: MarlinWeights,
    d_weights: MarlinWeights,
    experts: Int32[Array, " slots"],
    implementation: str | None,
) -> list[Float32[Array, "slots N"]]:
    """What the tangents of the rows, the global scales and the bias add to that of a product, in float32."""
    matrix, dots = multiplied(weights), []

    def product(rows, matrix):
        params = {"transposed": False, "dtype": "float32", "implementation": implementation}
        return grouped_product_op(rows, matrix, experts, None, None, **params)[0]

    if d_x is not None:
        dots.append(product(d_x, matrix))
    if d_weights.global_scales is not None:

        def scaled(global_scales):
            return product(x, dataclasses.replace(matrix, global_scales=global_scales))

        dots.append(jax.jvp(scaled, (matrix.global_scales,), (d_weights.global_scales,))[1])
    if d_weights.bias is not None:
        dots.append(slot_columns(d_weights.bias, experts))
    return dots


def float32_product(
    rows: Float[Array, "rows K"], weights: MarlinWeights, experts: Int32[Array, " slots"], implementation: str | None
) -> Float32[Array, "slots N"]:
    """The product of each slot with its expert's matrix, and the bias, not rounded; zeros where there is no expert.

    Rows have the padding and the order of the packed matrices.
    """
    (y,) = grouped_product_op(
        rows,
        multiplied(weights),
        experts,
        None,
        None,
        transposed=False,
        dtype="float32",
        implementation=implementation,
    )
    return with_bias(y, weights, experts)


def with_bias(
    products: Float32[Array, "slots N"], weights: MarlinWeights, experts: Int32[Array, " slots"]
) -> Float32[Array, "slots N"]:
    """Products and the bias of each slot's expert, where there is one."""
    return products if weights.bias is None else products + slot_columns(weights.bias, experts)


def sum_slots(slots: jax.Array, num_rows: int) -> jax.Array:
    """The sums of the slots of each row, in float32, rounded once."""
    if slots.shape[0] == num_rows or num_rows == 0:
        return slots[:num_rows]
    return slots.reshape(num_rows, -1, slots.shape[1]).astype(jnp.float32).sum(1).astype(slots.dtype)


def slot_columns(
    by_expert: Float32[Array, "E N"], experts: Int32[Array, " slots"], repeats: int = 1
) -> Float32[Array, "slots N"]:
    """The row of each slot's expert, its entries repeated; zeros where there is no expert."""
    columns = _explicit_columns(by_expert) if repeats == 1 else None
    if columns is None:
        by_expert, experts = alike((by_expert, experts))
    else:
        by_expert, experts = jax.sharding.reshard(by_expert, columns), alike(experts)
    has_expert = (experts >= 0) & (experts < by_expert.shape[0])
    chosen = jnp.where(has_expert, experts, 0)
    rows = by_expert[chosen] if columns is None else by_expert.at[chosen].get(out_sharding=columns)
    found = jnp.where(has_expert[:, None], rows, 0)
    return jnp.repeat(found, repeats, axis=1) if repeats > 1 else found


def _explicit_columns(by_expert: jax.Array) -> NamedSharding | None:
    """A sharding of the columns alone, where they are over explicit axes."""
    if is_slice(by_expert):
        return None
    sharding = jax.typeof(by_expert).sharding
    columns = sharding.spec[1] if len(sharding.spec) > 1 else None
    return None if columns is None else NamedSharding(sharding.mesh, PartitionSpec(None, columns))


def sum_by_expert(
    slots: Float32[Array, "slots N"], experts: Int32[Array, " slots"], num_experts: int
) -> Float32[Array, "E N"]:
    """The transpose of `slot_columns`: sums in an order that does not change from run to run, unlike a scatter's."""
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32, axis=0)
    return jnp.matmul(chosen, slots.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _division(*, transposed, dtype, summed=1, unwritten=False):
    return Division(
        matrices={"weights": ("n", "k") if transposed else ("k", "n")},
        share=_share,
        columns={"rows": "k"},
        results=("n",),
        summed=("k",),
    )


def _share(
    call, part, rows, weights, experts, group_sizes, group_offset, *, dtype, summed=1, unwritten=False, **params
):
    if experts is not None:
        experts = part.local(experts, weights.num_experts)
    elif part.first_expert is not None:
        first = part.first_expert.reshape(1)
        group_offset = first if group_offset is None else group_offset + first
    operands = rows, weights, experts, group_sizes, group_offset
    exact = part.divides_products or summed > 1  # what other devices have of a sum is added to it
    return [part.total(*call(*operands, dtype="float32" if exact else dtype, unwritten=False), dtype)]


grouped_product_op = Op(
    "grouped_product",
    shape_rule=_shape_rule,
    reference=_reference,
    cpu=_cpu,
    cuda=_cuda,
    jvp=_jvp,
    transpose=_transpose,
    rows=("rows", "experts"),
    gathered_with=("group_sizes",),
    division=_division,
)
