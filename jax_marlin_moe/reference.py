"""The specification: what every op computes, in plain jnp with float32 inside.

It is also the lowering on platforms that have no kernel of ours, and what every test compares with. It imports no
fast path. It is the executable form of docs/formats.md, "Block alignment", "Numerics" and "The expert block".
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.block_operands import BlockOperands
from jax_marlin_moe.byte_rows import ByteDtype, dequantize_rows, quantize_rows
from jax_marlin_moe.intermediate import usable
from jax_marlin_moe.layout import TILE_N, unpack, unpack_zeros, unpermute_scales
from jax_marlin_moe.operand_types import alike
from jax_marlin_moe.rounding import rounded
from jax_marlin_moe.weights import MarlinWeights, drop_column_padding, pad_rows


def dequantize(weights: MarlinWeights) -> Float32[Array, "*E padded_k padded_n"]:
    """`(value(code) - zero) * scale`, times the global scale, in float32; rows in packed order, padding included."""
    row = weights.format
    values = row.code.decode(unpack(weights.packed, row.bits))  # [*E, K, N]
    scales = unpermute_scales(row.decode_scales(weights.scales))  # [*E, G, N]
    group = jnp.arange(weights.padded_k) // weights.rows_per_scale
    if row.zeros == "integer":
        values -= unpack_zeros(weights.zeros, row.bits).astype(jnp.float32)[..., group, :]
    elif weights.zeros is not None:
        values -= unpermute_scales(weights.zeros.astype(jnp.float32))[..., group, :]
    elif row.zero_point:
        values -= jnp.float32(row.zero_point)
    dense = values * scales[..., group, :]
    if weights.global_scales is not None:
        dense *= jnp.repeat(weights.global_scales, TILE_N, axis=-1)[..., None, :]
    return dense


def padded_size(num_slots: int, num_experts: int, block_size: int) -> int:
    """P: the static length of `sorted_token_ids`, enough for any routing; either number of slots may be symbolic."""
    # Without padding, every slot of a few may have a block to itself.
    return jax.core.min_dim(num_slots * block_size, num_slots + num_experts * (block_size - 1))


def moe_align_block_size(
    topk_ids: Int32[Array, "tokens top_k"],
    expert_map: Int32[Array, " experts"] | None,
    *,
    block_size: int,
    num_experts: int,
) -> tuple[Int32[Array, " P"], Int32[Array, " blocks"], Int32[Array, "1"]]:
    """Groups the slots by expert, each group padded to whole blocks."""
    slots = topk_ids.reshape(-1)
    numel = slots.shape[0]
    size = padded_size(numel, num_experts, block_size)
    local_ids = jnp.arange(num_experts, dtype=jnp.int32) if expert_map is None else expert_map
    in_range = (slots >= 0) & (slots < num_experts)
    kept = in_range & (local_ids[jnp.clip(slots, 0, num_experts - 1)] >= 0)
    expert = jnp.where(kept, slots, num_experts)  # dropped slots sort last

    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    counts = jnp.zeros((num_experts + 1,), jnp.int32).at[expert].add(1)[:num_experts]
    padded_counts = -(-counts // block_size) * block_size
    padded_ends = jnp.cumsum(padded_counts, dtype=jnp.int32)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    ordered = expert[order]
    safe = jnp.clip(ordered, 0, num_experts - 1)
    position = (padded_ends - padded_counts)[safe] + jnp.arange(numel, dtype=jnp.int32) - starts[safe]
    position = jnp.where(ordered < num_experts, position, size)
    sorted_token_ids = jnp.full((size,), numel, jnp.int32).at[position].set(order, mode="drop")

    total = padded_ends[-1]
    first_rows = jnp.arange(-(-size // block_size), dtype=jnp.int32) * block_size
    owner = jnp.searchsorted(padded_ends, first_rows, side="right").clip(0, num_experts - 1)
    expert_ids = jnp.where(first_rows < total, local_ids[owner], -1).astype(jnp.int32)
    return sorted_token_ids, expert_ids, total.reshape(1).astype(jnp.int32)


def expert_products(
    rows: Float[Array, "slots padded_k"],
    weights: MarlinWeights,
    expert: Int32[Array, " slots"],
    *,
    block_size: int = 16,
    transposed: bool = False,
) -> Float32[Array, "slots padded_n"]:
    """`rows[s] @ W[expert[s]] + bias[expert[s]]` in float32; zero rows where the expert is not in [0, E).

    Transposed, `rows[s] @ W[expert[s]].T` of rows of padded_n, without bias.
    """
    num_slots = rows.shape[0]
    columns = weights.padded_k if transposed else weights.padded_n
    if num_slots == 0:
        return alike((jnp.zeros((0, columns), jnp.float32), rows, weights, expert))[0]
    sorted_ids, block_experts, _ = moe_align_block_size(
        expert[:, None], None, block_size=block_size, num_experts=weights.num_experts
    )
    blocks = block_experts.shape[0]
    unlisted = jnp.full((blocks * block_size,), num_slots, jnp.int32)
    block_slots = unlisted.at[: sorted_ids.shape[0]].set(sorted_ids).reshape(blocks, block_size)
    padded_rows = jnp.concatenate([rows.astype(jnp.float32), jnp.zeros((1, rows.shape[1]), jnp.float32)])
    out, nothing = (jnp.zeros((n, columns), jnp.float32) for n in (num_slots, block_size))
    # Both branches of a conditional, and what a loop carries, must vary over the same manual axes.
    padded_rows, weights, block_slots, block_experts, out, nothing = alike(
        (padded_rows, weights, block_slots, block_experts, out, nothing)
    )

    def add_block(out, block):
        slots, e = block

        def product():
            one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), weights)
            x = padded_rows[slots]
            if transposed:
                return jnp.matmul(x, dequantize(one).T, precision=jax.lax.Precision.HIGHEST)
            if one.input_order is not None:
                x = x[:, one.input_order]
            y = jnp.matmul(x, dequantize(one), precision=jax.lax.Precision.HIGHEST)
            return y if one.bias is None else y + one.bias.astype(jnp.float32)[None]

        y = jax.lax.cond(e >= 0, product, lambda: nothing)
        return out.at[slots].set(y, mode="drop"), None

    return jax.lax.scan(add_block, out, (block_slots, block_experts))[0]


def listed_experts(
    sorted_token_ids: Int32[Array, " P"],
    expert_ids: Int32[Array, " blocks"],
    num_tokens_post_padded: Int32[Array, "1"],
    *,
    num_slots: int,
    num_experts: int,
    block_size: int,
) -> Int32[Array, " slots"]:
    """The expert of the block that lists a slot, -1 where none does.

    Blocks with an expert outside [0, num_experts) list nothing; the first of several listings counts.
    """
    size = sorted_token_ids.shape[0]
    position = jnp.arange(size, dtype=jnp.int32)
    expert = expert_ids[position // block_size]
    lists = (position < num_tokens_post_padded[0]) & (expert >= 0) & (expert < num_experts) & (sorted_token_ids >= 0)
    slot = jnp.where(lists, sorted_token_ids, num_slots)
    first = jnp.full((num_slots,), size, jnp.int32).at[slot].min(position, mode="drop")
    return expert.at[first].get(mode="fill", fill_value=-1)


def grouped_product(
    rows: Float[Array, "rows C"],
    weights: MarlinWeights,
    experts: Int32[Array, " slots"] | None,
    group_sizes: Int32[Array, " groups"] | None = None,
    group_offset: Int32[Array, "1"] | None = None,
    *,
    transposed: bool,
    dtype: str,
) -> Float[Array, "slots D"]:
    """Row s is `rows[s // (slots // rows)] @ W[experts[s]]`, or `@ W.T`; zero where the expert is not in [0, E).

    W has its padding, and neither a bias nor an order of rows. Without `experts` rows are sorted by group.
    """
    if experts is None:
        experts = ragged_experts(group_sizes, group_offset, num_rows=rows.shape[0], num_experts=weights.num_experts)
    each = slots_per_row(experts.shape[0], rows.shape[0])
    y = expert_products(jnp.repeat(rows, each, axis=0), weights, experts, transposed=transposed)
    return y.astype(dtype)


def slots_per_row(num_slots: int, num_rows: int) -> int:
    """How many slots each row has, which is a number even where theirs are symbolic; 1 where there are no rows."""
    return 1 if num_rows == 0 else num_slots // num_rows


def ragged_experts(
    group_sizes: Int32[Array, " groups"] | None,
    group_offset: Int32[Array, "1"] | None,
    *,
    num_rows: int,
    num_experts: int,
) -> Int32[Array, " rows"]:
    """The expert of each row, where rows are sorted by group and expert e has those of group `group_offset + e`.

    -1 for rows of other groups and past the last one. Negative sizes count as 0.
    """
    assert group_sizes is not None
    sizes = jnp.clip(group_sizes, 0, num_rows).astype(jnp.uint32)
    limit = jnp.uint32(num_rows)  # sums stay below it, whatever the sizes are
    ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, limit), sizes).astype(jnp.int32)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    offset = 0 if group_offset is None else jnp.clip(group_offset[0], -num_experts, group_sizes.shape[0])
    expert = group - offset
    return jnp.where((group < group_sizes.shape[0]) & (expert >= 0) & (expert < num_experts), expert, -1)


def slot_experts(
    topk_ids: Int32[Array, "tokens top_k"], expert_map: Int32[Array, " experts"] | None, num_experts: int
) -> Int32[Array, " slots"]:
    """The local expert of each slot, -1 where it has none."""
    expert = topk_ids.reshape(-1)
    if expert_map is not None:
        known = (expert >= 0) & (expert < expert_map.shape[0])
        expert = jnp.where(known, expert_map[jnp.clip(expert, 0, expert_map.shape[0] - 1)], -1)
    return jnp.where((expert >= 0) & (expert < num_experts), expert, -1)


def moe_gemm(
    x: Float[Array, "tokens K"],
    weights: MarlinWeights,
    topk_weights: Float32[Array, " slots"] | None,
    sorted_token_ids: Int32[Array, " P"],
    expert_ids: Int32[Array, " blocks"],
    num_tokens_post_padded: Int32[Array, "1"],
    *,
    top_k: int,
    block_size: int,
) -> Float[Array, "slots N"]:
    """Row `s` is `(x[s // top_k] @ W[e] + bias[e]) * topk_weights[s]`, e of `listed_experts`; zero where there is none.

    A weight of NaN in such a slot is of no account.
    """
    expert = listed_experts(
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        num_slots=x.shape[0] * top_k,
        num_experts=weights.num_experts,
        block_size=block_size,
    )
    y = expert_products(jnp.repeat(pad_rows(x, weights), top_k, axis=0), weights, expert)
    if topk_weights is not None:
        y = y * jnp.where(expert >= 0, topk_weights, 0)[:, None]
    return drop_column_padding(y, weights).astype(x.dtype)


def are_in_range(
    dispatches: Int32[Array, "*batch 4"], *, num_rows: int, num_out_rows: int, num_experts: int
) -> Bool[Array, "*batch"]:
    """Whether a dispatch has an expert, and all of its rows."""
    expert, source, target, rows = jnp.moveaxis(dispatches, -1, 0)
    # Differences, since sums may be more than int32 holds.
    fits = (rows >= 0) & (source >= 0) & (source <= num_rows - rows) & (target >= 0) & (target <= num_out_rows - rows)
    return fits & (expert >= 0) & (expert < num_experts)


def dispatched_rows(
    dispatches: Int32[Array, "dispatches 4"], *, num_rows: int, num_out_rows: int, num_experts: int
) -> tuple[Int32[Array, " out_rows"], Int32[Array, " out_rows"], Int32[Array, ""]]:
    """Of each row of the result, the expert (-1: none) and the row of x; and how many dispatches are out of range.

    The last dispatch in range that has the row counts. Where there is none, the row of x is `num_rows`.
    """
    table = jnp.concatenate([dispatches, alike((jnp.zeros((1, 4), jnp.int32), dispatches))[0]])  # it is never empty
    in_range = are_in_range(table, num_rows=num_rows, num_out_rows=num_out_rows, num_experts=num_experts)
    _, _, target, rows = table.T
    row = jnp.arange(num_out_rows, dtype=jnp.int32)[:, None]
    has_row = in_range & (row >= target) & (row - target < rows)
    last = jnp.max(jnp.where(has_row, jnp.arange(table.shape[0], dtype=jnp.int32), -1), axis=1)
    found = table[jnp.maximum(last, 0)]
    experts = jnp.where(last >= 0, found[:, 0], -1)
    sources = jnp.where(last >= 0, row[:, 0] - found[:, 2] + found[:, 1], num_rows)
    return experts, sources, jnp.sum(~in_range & (rows != 0), dtype=jnp.int32)


def expert_gemm(
    x: Float[Array, "rows K"],
    stack: MarlinWeights,
    dispatches: Int32[Array, "dispatches 4"],
    *,
    num_out_rows: int,
) -> tuple[Float[Array, "out_rows N"], Int32[Array, "1"]]:
    """Rows of x through experts to where `dispatched_rows` says, zero elsewhere; and the dispatches out of range."""
    expert, source, skipped = dispatched_rows(
        dispatches, num_rows=x.shape[0], num_out_rows=num_out_rows, num_experts=stack.num_experts
    )
    rows = pad_rows(x, stack)
    rows = jnp.concatenate([rows, jnp.zeros_like(rows, shape=(1, rows.shape[1]))])[source]
    y = expert_products(rows, stack, expert)
    return drop_column_padding(y, stack).astype(x.dtype), skipped[None]


def linear(
    x: Float[Array, "rows K"], weights: MarlinWeights, expert: Int32[Array, "1"] | None
) -> Float[Array, "rows N"]:
    """`x @ W + bias` of the first matrix, or of the one that `expert` names, the nearest where it is out of range."""
    number = jnp.zeros((1,), jnp.int32) if expert is None else jnp.clip(expert, 0, weights.num_experts - 1)
    y = expert_products(pad_rows(x, weights), weights, jnp.broadcast_to(number, (x.shape[0],)), block_size=64)
    return drop_column_padding(y, weights).astype(x.dtype)


def fused_moe(
    *operands: Any,
    activation: Activation,
    activation_dtype: ByteDtype | None = None,
    out_dtype: jnp.dtype | None = None,
) -> Float[Array, "tokens H"]:
    """The expert block of docs/formats.md, "The expert block", "Quantised intermediates" and "8-bit activations".

    The operands are `BlockOperands`. The activation's result is rounded to the type of x, or quantised. x has a row for
    each token, or a row for each slot; its values are in units of `x_scale`. With `activation_dtype` the rows that both
    products read are quantised, those of x by `x_scale` if there is one, the others as `intermediate` says if that is
    there. A slot without an expert contributes nothing, whatever its weight. The result has the type of x, or
    `out_dtype`.
    """
    block = BlockOperands(*operands)
    y = weighted_sum(block, activation=activation, activation_dtype=activation_dtype)
    return drop_column_padding(y, block.down).astype(block.x.dtype if out_dtype is None else out_dtype)


def weighted_sum(
    block: BlockOperands, *, activation: Activation, activation_dtype: ByteDtype | None = None
) -> Float32[Array, "tokens padded_n"]:
    """The sum of `fused_moe` before it is rounded, column padding included."""
    x, gate_up, down, topk_weights, topk_ids, expert_map, x_scale, intermediate = block
    tokens, top_k = topk_ids.shape
    expert = slot_experts(topk_ids, expert_map, gate_up.num_experts)
    rows = pad_rows(x, gate_up)
    if activation_dtype is not None:
        rows = _quantized(rows, activation_dtype, x_scale)
    rows = jnp.repeat(rows, tokens * top_k // x.shape[0], axis=0) if tokens else rows
    if x_scale is not None and activation_dtype is None:
        rows = rows.astype(jnp.float32) * usable(x_scale)
    with jax.named_scope("gate_up"):
        h = expert_products(rows, gate_up, expert)
    # The halves of gate_up are padded to whole tiles of columns, the rows of down only to tiles of rows.
    a = activation.of_product(h)[:, : down.padded_k]
    if intermediate is None:
        a = rounded(a, x.dtype)
        a = a if activation_dtype is None else _quantized(a, activation_dtype)
    else:
        a = intermediate.apply(a, intermediate.scales[jnp.clip(expert, 0, gate_up.num_experts - 1)])
    with jax.named_scope("down"):
        y = expert_products(a, down, expert).reshape(tokens, top_k, down.padded_n)
    with jax.named_scope("combine"):
        return jnp.sum(y * jnp.where((expert >= 0).reshape(tokens, top_k), topk_weights, 0)[:, :, None], axis=1)


def _quantized(
    rows: Float[Array, "rows columns"], dtype: ByteDtype, scale: Float32[Array, "1"] | None = None
) -> Float32[Array, "rows columns"]:
    """The values that 8-bit rows stand for."""
    return dequantize_rows(*quantize_rows(rows, dtype, scale))
