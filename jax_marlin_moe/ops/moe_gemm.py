"""`moe_gemm`: one grouped product over packed experts, with the classic contract of aligned slots."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_marlin_moe import native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan import plan_moe_gemm
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.ops import arguments
from jax_marlin_moe.ops.align import BlockAlignment
from jax_marlin_moe.ops.implementation import check_implementation, serves
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


def moe_gemm(
    x: Float[Array, "tokens K"],
    weights: MarlinWeights,
    alignment: BlockAlignment,
    *,
    top_k: int,
    topk_weights: Float32[Array, "tokens top_k"] | None = None,
    mul_topk_weights: bool = False,
    implementation: str | None = None,
) -> Float[Array, "tokens*top_k N"]:
    """Multiplies each routed slot's row of x by its expert's matrix.

    Row `s = token * top_k + j` of the result is `x[token] @ W[e] + bias[e]`, times `topk_weights[token, j]` if
    `mul_topk_weights`, accumulated in float32 and rounded once; e is the expert of the block that lists s. Rows of
    slots that no block lists are zero.

    Args:
        x: bfloat16 or float16 rows.
        weights: packed experts.
        alignment: of `moe_align_block_size` over ids of shape (tokens, top_k).
        top_k: slots per row of x; 1 where x already has a row for each slot.
        topk_weights: float32 router weights, (tokens, top_k) or flat; needed if `mul_topk_weights`.
        mul_topk_weights: whether to multiply by them.
        implementation: None (the best that works), "cuda", "cpu" or "xla".

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot serve.
    """
    arguments.check_rows("x", x)
    arguments.check_weights("weights", weights)
    arguments.check_shape("x", x, (x.shape[0], weights.k), "(tokens, K)")
    if not isinstance(alignment, BlockAlignment):
        raise TypeError(f"alignment is a {type(alignment).__name__}; it must come from moe_align_block_size")
    arguments.check_block_size(alignment.block_size)
    arguments.check_top_k(top_k, alignment.num_experts)
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded"):
        arguments.check_array(f"alignment.{name}", getattr(alignment, name), ndim=1, dtype=jnp.int32)
    blocks = -(-alignment.sorted_token_ids.shape[0] // alignment.block_size)
    arguments.check_shape("alignment.expert_ids", alignment.expert_ids, (blocks,), "(ceil(P / block_size),)")
    arguments.check_shape("alignment.num_tokens_post_padded", alignment.num_tokens_post_padded, (1,), "(1,)")
    slots = x.shape[0] * top_k
    if mul_topk_weights:
        if topk_weights is None:
            raise ValueError("topk_weights is None; it must be given where mul_topk_weights is True")
        arguments.check_array("topk_weights", topk_weights, ndim=topk_weights.ndim, dtype=jnp.float32)
        if topk_weights.size != slots:
            raise ValueError(
                f"topk_weights has shape {tuple(topk_weights.shape)}; it must hold tokens * top_k = {slots} values"
            )
    check_implementation(implementation)
    weights = jax.tree.map(jnp.asarray, weights)  # numpy leaves cannot be indexed by tracers
    if weights.input_order is not None:
        x, weights, top_k = _reordered_rows(x, weights, alignment, top_k)
    x = pad_rows(x, weights)
    router = topk_weights.reshape(-1) if mul_topk_weights and topk_weights is not None else None
    if implementation == "xla":
        y = reference.moe_gemm(
            x,
            weights_from_operands(weight_operands(weights), weights.format),
            router,
            alignment.sorted_token_ids,
            alignment.expert_ids,
            alignment.num_tokens_post_padded,
            top_k=top_k,
            block_size=alignment.block_size,
        )
        return drop_column_padding(y, weights)
    (y,) = moe_gemm_p.bind(
        x,
        *weight_operands(weights),
        or_absent(router, jnp.float32),
        alignment.sorted_token_ids,
        alignment.expert_ids,
        alignment.num_tokens_post_padded,
        weight_format=weights.format,
        top_k=top_k,
        block_size=alignment.block_size,
        implementation=implementation,
    )
    return drop_column_padding(y, weights)


def _reordered_rows(x, weights, alignment, top_k):
    """One row per slot, columns in the packed order of the slot's expert."""
    slots = x.shape[0] * top_k
    position = jnp.arange(alignment.sorted_token_ids.shape[0])
    listed = (alignment.sorted_token_ids >= 0) & (position < alignment.num_tokens_post_padded[0])
    expert = (
        jnp.zeros((slots,), jnp.int32)
        .at[jnp.where(listed, alignment.sorted_token_ids, slots)]
        .set(alignment.expert_ids[position // alignment.block_size], mode="drop")
    )
    return gather_input_order(jnp.repeat(x, top_k, axis=0), weights, expert), _without_order(weights), 1


def gather_input_order(rows: jax.Array, weights: MarlinWeights, expert: jax.Array) -> jax.Array:
    """Row s of `rows` with its columns in the packed order of `expert[s]`."""
    assert weights.input_order is not None
    order = weights.input_order[jnp.clip(expert, 0, weights.num_experts - 1)]
    return jnp.take_along_axis(rows, order, axis=1)


def _without_order(weights: MarlinWeights) -> MarlinWeights:
    return dataclasses.replace(weights, input_order=None)


def _shape_rule(
    x,
    packed,
    scales,
    zeros,
    global_scales,
    bias,
    topk_weights,
    sorted_ids,
    expert_ids,
    count,
    *,
    weight_format,
    top_k,
    block_size,
    implementation,
):
    columns = scales.shape[-1]
    return [x.update(shape=(x.shape[0] * top_k, columns), dtype=x.dtype)]


def _reference(x, *operands, weight_format, top_k, block_size, implementation):
    weights = weights_from_operands(operands[:WEIGHT_OPERANDS], weight_format)
    topk_weights, *alignment = operands[WEIGHT_OPERANDS:]
    return [reference.moe_gemm(x, weights, or_none(topk_weights), *alignment, top_k=top_k, block_size=block_size)]


def _cpu(x, *operands, weight_format, top_k, block_size, implementation):
    if not serves("cpu", implementation):
        return _reference(
            x, *operands, weight_format=weight_format, top_k=top_k, block_size=block_size, implementation=None
        )
    weights = weights_from_operands(operands[:WEIGHT_OPERANDS], weight_format)
    result = jax.ShapeDtypeStruct((x.shape[0] * top_k, weights.n), x.dtype)
    weighted = or_none(operands[WEIGHT_OPERANDS]) is not None
    return jax.ffi.ffi_call(native.MOE_GEMM_CPU, [result])(
        x,
        *operands,
        top_k=top_k,
        block_size=block_size,
        mul_topk_weights=weighted,
        **format_attributes("", weights),
    )


def _cuda(x, *operands, weight_format, top_k, block_size, implementation):
    weights = weights_from_operands(operands[:WEIGHT_OPERANDS], weight_format)
    topk_weights, sorted_ids, *_ = operands[WEIGHT_OPERANDS:]
    if x.shape[0] == 0 or not serves("cuda", implementation):
        return _reference(
            x, *operands, weight_format=weight_format, top_k=top_k, block_size=block_size, implementation=None
        )
    architecture = target_architecture()
    plan = plan_moe_gemm(
        x,
        weights,
        top_k=top_k,
        block_size=block_size,
        list_length=sorted_ids.shape[0],
        weighted=or_none(topk_weights) is not None,
        architecture=architecture,
    )
    result = jax.ShapeDtypeStruct((x.shape[0] * top_k, weights.n), x.dtype)
    return call_program([x, *operands], [result, *plan.scratch], plan.kernels, plan.source, architecture)[:1]


def _batching_rule(operands, dims, *, top_k, block_size, **params):
    """Batched tokens become one call over all of them; batched weights one call each."""
    bind = partial(moe_gemm_p.bind, top_k=top_k, block_size=block_size, **params)
    if any(dim is not None for dim in dims[1 : 1 + WEIGHT_OPERANDS]):
        return map_batch(bind, operands, dims)
    batch = next(o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None)

    def batched(index: int) -> jax.Array:
        operand, dim = operands[index], dims[index]
        if dim is None:
            return jnp.broadcast_to(operand, (batch, *operand.shape))
        return jnp.moveaxis(operand, dim, 0)

    x, (router, sorted_ids, expert_ids, count) = batched(0), map(batched, range(1 + WEIGHT_OPERANDS, len(operands)))
    tokens, slots = x.shape[1], x.shape[1] * top_k
    # Element b's slots follow those of b - 1. Its blocks past the end lose their expert, so one count covers all.
    size, blocks = sorted_ids.shape[1], expert_ids.shape[1]
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * slots
    listed = (sorted_ids >= 0) & (sorted_ids < slots) & (jnp.arange(size) < count)
    sorted_ids = jnp.where(listed, sorted_ids + first, batch * slots)
    sorted_ids = jnp.pad(sorted_ids, ((0, 0), (0, blocks * block_size - size)), constant_values=batch * slots)
    expert_ids = jnp.where(jnp.arange(blocks) * block_size < count, expert_ids, -1)
    outputs = bind(
        x.reshape(batch * tokens, x.shape[2]),
        *operands[1 : 1 + WEIGHT_OPERANDS],
        router.reshape(-1) if router.shape[1] else router[0],
        sorted_ids.reshape(-1),
        expert_ids.reshape(-1),
        jnp.full((1,), batch * blocks * block_size, jnp.int32),
    )
    return [y.reshape(batch, slots, -1) for y in outputs], [0]


moe_gemm_p = define_primitive(
    "moe_gemm", shape_rule=_shape_rule, reference=_reference, cpu=_cpu, cuda=_cuda, batching_rule=_batching_rule
)
