"""`moe_gemm`: one grouped product over packed experts, with the classic contract of aligned slots."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from jax_marlin_moe import arguments, native, reference
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan_products import plan_moe_gemm
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.cuda.scheme import check_invariant_product, check_undivided
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.operand_types import replicated_type, shard_rows_like
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes, or_empty, weight_operands
from jax_marlin_moe.ops.align import BlockAlignment
from jax_marlin_moe.ops.division import Division
from jax_marlin_moe.ops.frozen import check_not_only_frozen
from jax_marlin_moe.ops.grouped_product import float32_product, product_dots
from jax_marlin_moe.ops.input_order import gather_input_order
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op, map_batch
from jax_marlin_moe.weights import MarlinWeights, as_packed, drop_column_padding, pad_rows


def moe_gemm(
    x: Float[Array, "tokens K"],
    weights: MarlinWeights,
    alignment: BlockAlignment,
    *,
    top_k: int,
    topk_weights: Float32[Array, "tokens top_k"] | None = None,
    mul_topk_weights: bool = False,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    batch_invariant: bool = False,
) -> Float[Array, "tokens*top_k N"]:
    """Multiplies each routed slot's row of x by its expert's matrix.

    Row `s = token * top_k + j` of the result is `x[token] @ W[e] + bias[e]`, times `topk_weights[token, j]` if
    `mul_topk_weights`, accumulated in float32 and rounded once; e is the expert of the block that lists s. Rows of
    slots that no block lists are zero.

    Args:
        x: bfloat16 or float16 rows; float32 ones are multiplied as bfloat16, and the result is float32. With further
            leading dimensions, tokens count through all of them, and the result is [..., tokens * top_k, N].
        weights: packed experts.
        alignment: of `moe_align_block_size` over ids of shape (tokens, top_k).
        top_k: slots per row of x; 1 where x already has a row for each slot.
        topk_weights: router weights, (tokens, top_k) or flat, float32 or rounded to fewer bits; needed if
            `mul_topk_weights`.
        mul_topk_weights: whether to multiply by them.
        preferred_element_type: of the result: that of x, which is the default, or float32, which is not rounded.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        batch_invariant: whether a row has the same bits whatever other rows there are. On CUDA that takes a tile whose
            sums depend on the matrix alone. On CPUs it is always so; "xla" does not have it.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    if arguments.has_batch(x):
        y = moe_gemm(
            x.reshape(-1, x.shape[-1]),
            weights,
            alignment,
            top_k=top_k,
            topk_weights=topk_weights,
            mul_topk_weights=mul_topk_weights,
            preferred_element_type=preferred_element_type,
            implementation=implementation,
            batch_invariant=batch_invariant,
        )
        return y.reshape(*x.shape[:-2], x.shape[-2] * top_k, y.shape[-1])
    x, dtype = arguments.as_rows("x", x, preferred_element_type)
    arguments.check_rank("x", x, 2)
    arguments.check_weights("weights", weights)
    arguments.check_shape("x", x, (x.shape[0], weights.k), "(tokens, K)")
    if not isinstance(alignment, BlockAlignment):
        raise TypeError(f"alignment has type {type(alignment).__name__}; it must come from moe_align_block_size")
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
        topk_weights = arguments.as_router_weights("topk_weights", topk_weights)
        if topk_weights.size != slots:
            raise ValueError(
                f"topk_weights has shape {tuple(topk_weights.shape)}; it must hold tokens * top_k = {slots} values"
            )
    if batch_invariant:
        check_invariant_product(x, dtype, implementation)
    return _product(
        x,
        weights,
        topk_weights if mul_topk_weights else None,
        alignment,
        top_k=top_k,
        dtype=dtype,
        implementation=implementation,
        batch_invariant=batch_invariant,
    )


@one_program("top_k", "dtype", "batch_invariant", saved_as="moe_gemm")
def _product(x, weights, topk_weights, alignment, *, top_k, dtype, implementation, batch_invariant):
    rows, slots_per_row = x, top_k
    if weights.input_order is not None:
        rows, slots_per_row = _reordered_rows(x, weights, alignment, top_k), 1
    if dtype != x.dtype:
        experts = _experts(x, weights, alignment, top_k)
        y = float32_product(pad_rows(rows, weights), weights, experts, implementation)
        if topk_weights is not None:
            y = _weighted(y, topk_weights.reshape(-1), experts)
        return shard_rows_like(drop_column_padding(y, weights), x)
    (y,) = moe_gemm_op(
        pad_rows(rows, weights),
        as_packed(weights),
        None if topk_weights is None else topk_weights.reshape(-1),
        alignment.sorted_token_ids,
        alignment.expert_ids,
        alignment.num_tokens_post_padded,
        top_k=slots_per_row,
        block_size=alignment.block_size,
        implementation=implementation,
        batch_invariant=batch_invariant,
    )
    return shard_rows_like(drop_column_padding(y, weights), x)


def _reordered_rows(x, weights, alignment, top_k):
    """One row per slot, columns in the packed order of the slot's expert."""
    return gather_input_order(jnp.repeat(x, top_k, axis=0), weights, _experts(x, weights, alignment, top_k))


def _experts(x, weights, alignment, top_k):
    """The expert of each slot, -1 where no block lists it."""
    return reference.listed_experts(
        alignment.sorted_token_ids,
        alignment.expert_ids,
        alignment.num_tokens_post_padded,
        num_slots=x.shape[0] * top_k,
        num_experts=weights.num_experts,
        block_size=alignment.block_size,
    )


def _weighted(y, of_slots, experts):
    """Each row times its slot's weight; zero where there is no expert, whatever the weight."""
    return y * jnp.where(experts >= 0, of_slots, 0)[:, None]


def _shape_rule(x, weights, *_, top_k, block_size):
    return [replicated_type(x, (x.shape[0] * top_k, weights.padded_n), x.dtype)]


def _cpu(x, weights, topk_weights, *alignment, top_k, block_size):
    result = jax.ShapeDtypeStruct((x.shape[0] * top_k, weights.padded_n), x.dtype)
    return custom_call(
        "moe_gemm",
        native.TARGETS["moe_gemm", "cpu"],
        [x, *cpu_weight_operands(weights), or_empty(topk_weights, jnp.float32), *alignment],
        [result],
        top_k=top_k,
        block_size=block_size,
        mul_topk_weights=topk_weights is not None,
        **format_attributes("", weights),
    )


def _cuda(x, weights, topk_weights, sorted_ids, expert_ids, count, *, top_k, block_size, batch_invariant):
    operands = [x, *weight_operands(weights), topk_weights, sorted_ids, expert_ids, count]
    result = jax.ShapeDtypeStruct((x.shape[0] * top_k, weights.padded_n), x.dtype)
    if x.shape[0] == 0:
        return [jnp.zeros(result.shape, result.dtype)]
    architecture = target_architecture()
    plan = plan_moe_gemm(
        x,
        weights,
        top_k=top_k,
        block_size=block_size,
        list_length=sorted_ids.shape[0],
        weighted=topk_weights is not None,
        architecture=architecture,
        batch_invariant=batch_invariant,
    )
    return call_program("moe_gemm", operands, [result], plan, architecture)


def _batching_rule(op, leaves, dims, *, structure, top_k, block_size, **params):
    """Batched tokens become one call over all of them; batched weights one call each."""
    params |= {"top_k": top_k, "block_size": block_size}
    x, weights, router, *alignment = jax.tree.unflatten(structure, leaves)
    x_dim, weights_dims, router_dim, *alignment_dims = jax.tree.unflatten(structure, dims)
    if jax.tree.leaves(weights_dims):
        return map_batch(op, leaves, dims, structure=structure, **params)
    batch = next(leaf.shape[dim] for leaf, dim in zip(leaves, dims, strict=True) if dim is not None)

    def batched(operand: jax.Array, dim: int | None) -> jax.Array:
        if dim is None:
            return jnp.broadcast_to(operand, (batch, *operand.shape))
        return jnp.moveaxis(operand, dim, 0)

    x = batched(x, x_dim)
    sorted_ids, expert_ids, count = map(batched, alignment, alignment_dims)
    tokens, slots = x.shape[1], x.shape[1] * top_k
    # Element b's slots follow those of b - 1. Its blocks past the end lose their expert, so one count covers all.
    size, blocks = sorted_ids.shape[1], expert_ids.shape[1]
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * slots
    listed = (sorted_ids >= 0) & (sorted_ids < slots) & (jnp.arange(size)[None] < count)
    sorted_ids = jnp.where(listed, sorted_ids + first, batch * slots)
    sorted_ids = jnp.pad(sorted_ids, ((0, 0), (0, blocks * block_size - size)), constant_values=batch * slots)
    expert_ids = jnp.where(jnp.arange(blocks)[None] * block_size < count, expert_ids, -1)
    (y,) = op(
        x.reshape(batch * tokens, x.shape[2]),
        weights,
        None if router is None else batched(router, router_dim).reshape(-1),
        sorted_ids.reshape(-1),
        expert_ids.reshape(-1),
        jnp.full((1,), batch * blocks * block_size, jnp.int32),
        **params,
    )
    return [y.reshape(batch, slots, y.shape[1])], [0]


def _jvp(op, primals, tangents, *, top_k, block_size, implementation, batch_invariant):
    x, weights, router, *alignment = primals
    d_x, d_weights, d_router, *_ = tangents
    check_not_only_frozen("moe_gemm", {"weights": d_weights}, d_x, d_weights.bias, d_weights.global_scales, d_router)
    options = {"implementation": implementation, "batch_invariant": batch_invariant}
    results = op(*primals, top_k=top_k, block_size=block_size, **options)
    experts = reference.listed_experts(
        *alignment, num_slots=x.shape[0] * top_k, num_experts=weights.num_experts, block_size=block_size
    )
    dots = product_dots(x, d_x, weights, d_weights, experts, implementation)
    if router is not None:
        dots = [_weighted(dot, router, experts) for dot in dots]
    if d_router is not None:
        dots.append(_weighted(float32_product(x, weights, experts, implementation), d_router, experts))
    return results, [sum(dots[1:], dots[0]).astype(x.dtype)]


def _division(*, top_k, block_size):
    return Division(matrices={"weights": ("k", "n")}, share=_share, columns={"x": "k"}, results=("n",), summed=("k",))


def _share(
    call,
    part,
    x,
    weights,
    topk_weights,
    sorted_ids,
    expert_ids,
    count,
    *,
    top_k,
    block_size,
    implementation,
    batch_invariant=False,
):
    expert_ids = part.local(expert_ids, weights.num_experts)
    weights = part.with_bias_once(weights)
    if not part.divides_products:
        return [part.total(*call(x, weights, topk_weights, sorted_ids, expert_ids, count), x.dtype)]
    check_undivided(batch_invariant, "moe_gemm")
    experts = reference.listed_experts(
        sorted_ids,
        expert_ids,
        count,
        num_slots=x.shape[0] * top_k,
        num_experts=weights.num_experts,
        block_size=block_size,
    )
    y = float32_product(x, weights, experts, implementation)
    return [part.total(y if topk_weights is None else _weighted(y, topk_weights, experts), x.dtype)]


moe_gemm_op = Op(
    "moe_gemm",
    shape_rule=_shape_rule,
    reference=reference.moe_gemm,
    cpu=_cpu,
    cuda=_cuda,
    batching_rule=_batching_rule,
    cuda_options=("batch_invariant",),
    jvp=_jvp,
    division=_division,
)
