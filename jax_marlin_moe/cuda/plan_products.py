"""Plans of single products: over an aligned list, over slots with experts, over rows sorted by group."""

import jax
import jax.numpy as jnp

from jax_marlin_moe.cuda.aligned_list import aligned_list
from jax_marlin_moe.cuda.choose import choose_listed_tile, choose_product_tile, invariant_listed_tile
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.grouped_gemm import BIAS, gemm_kernel, gemm_shape, hosts, slices_of_columns
from jax_marlin_moe.cuda.kernels.combine import SlotSums, clear_kernel, combine_kernel, find_first_rows_kernel
from jax_marlin_moe.cuda.kernels.epilogue import slot_partials, slot_rows
from jax_marlin_moe.cuda.kernels.token_tiles import MOST_GROUPED_SLOTS, aligned_tiles, grouped_tiles, ragged_tiles
from jax_marlin_moe.cuda.limits import check_counts, check_matrix, check_rows
from jax_marlin_moe.cuda.program import Kernel, Plan
from jax_marlin_moe.operands import WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights

_SLICED_BYTES = 64 << 20  # of rows that are added; smaller ones are made at once


def plan_moe_gemm(
    x: jax.Array,
    weights: MarlinWeights,
    *,
    top_k: int,
    block_size: int,
    list_length: int,
    weighted: bool,
    architecture: str,
    batch_invariant: bool = False,
) -> Plan:
    """Buffers: x, the matrix (5), topk_weights, sorted ids, expert ids, count; y; scratch."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("weights", weights)
    num_slots = x.shape[0] * top_k
    check_counts(num_slots, weights.num_experts, list_length)
    shape = gemm_shape(weights, False, x.dtype)
    choose = invariant_listed_tile if batch_invariant else choose_listed_tile
    tile = choose(shape, num_slots, weights.num_experts, block_size, capability)
    first_matrix, router = 1, 1 + WEIGHT_OPERANDS
    listed, y = (router + 1, router + 2, router + 3), router + 4
    first_rows = y + 1
    token_tiles = aligned_tiles(
        num_slots,
        weights.num_experts,
        tile.tokens,
        block_size,
        list_length,
        listed,
        from_previous=False,
        first_rows=first_rows,
    )
    clear = clear_kernel(num_slots, weights.padded_n, x.dtype, out=y, first_rows=first_rows)
    find = find_first_rows_kernel(
        num_slots,
        weights.num_experts,
        block_size,
        list_length,
        pointers=token_tiles.pointers,
        first_rows=first_rows,
        overlaps_predecessor=capability >= 90,
    )
    epilogue = slot_rows(
        x.dtype.name,
        weights.padded_n,
        out=y,
        bias=None if weights.bias is None else first_matrix + BIAS,
        topk_weights=router if weighted else None,
    )
    # The list comes from before this call, so only the store, and which of the rows are stored, wait for the kernels
    # before; the wait sits before the tokens are read, which is early enough.
    gemm = gemm_kernel(
        "moe_gemm",
        shape,
        tile,
        weights,
        x.dtype,
        slots_per_row=top_k,
        row_stride=shape.k,
        x=0,
        first_operand=first_matrix,
        token_tiles=token_tiles,
        epilogue=epilogue,
        overlaps_predecessor=capability >= 90,
        in_order=batch_invariant,
    )
    return Plan((clear, find, gemm), (jax.ShapeDtypeStruct((num_slots,), jnp.int32),))


def plan_grouped_product(
    x: jax.Array,
    weights: MarlinWeights,
    num_slots: int,
    *,
    transposed: bool,
    dtype: jnp.dtype,
    architecture: str,
    num_groups: int | None = None,
    offset: bool = False,
    summed: int = 1,
) -> Plan:
    """Buffers: x, the matrix (5), experts, None; y, whose rows without an expert are not written; scratch.

    With `num_groups`, rows are sorted by group. Buffers: x, the matrix (5), group sizes, group offset; y, all of it.

    With `summed` above 1, y has the sums of that many neighbouring slots, all of it; a slot without an expert adds
    nothing. The slots' rows, in the dtype of y, are made and added in slices of the columns.
    """
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("weights", weights)
    num_experts = weights.num_experts
    check_counts(num_slots, num_experts, num_slots)
    shape = gemm_shape(weights, False, x.dtype)
    routed = num_experts if num_groups is None else num_groups
    tile = choose_product_tile(shape, num_slots, routed, capability, transposed)
    first_matrix, experts = 1, 1 + WEIGHT_OPERANDS
    y = experts + 2
    kernels: list[Kernel] = []
    scratch: list[jax.ShapeDtypeStruct] = []
    token_tiles = grouped_tiles(num_slots, num_experts, num_experts, tile.tokens, experts, None)
    if num_groups is not None:
        group_offset = experts + 1 if offset else None
        token_tiles = ragged_tiles(num_slots, num_experts, num_groups, tile.tokens, experts, group_offset)
    elif num_slots > MOST_GROUPED_SLOTS or not hosts(tile, shape, token_tiles, capability):
        listed = aligned_list(
            num_slots,
            num_experts,
            num_experts,
            (tile.tokens,),
            capability,
            topk_ids=experts,
            expert_map=None,
            scratch=y + 1,
        )
        (token_tiles,) = listed.tiles
        kernels += listed.kernels
        scratch += listed.scratch

    def product(columns: range, out: int, out_columns: int) -> Kernel:
        """Of these columns of the slots' rows, into rows of `out_columns`."""
        epilogue = (
            slot_partials(out_columns, out=out, bias=None, topk_weights=None)
            if dtype == jnp.float32
            else slot_rows(x.dtype.name, out_columns, out=out, bias=None, topk_weights=None)
        )
        return gemm_kernel(
            "transposed" if transposed else "product",
            shape,
            tile,
            weights,
            x.dtype,
            slots_per_row=num_slots // x.shape[0],
            row_stride=shape.n if transposed else shape.k,
            x=0,
            first_operand=first_matrix,
            token_tiles=token_tiles,
            epilogue=epilogue,
            overlaps_predecessor=capability >= 90 and bool(kernels),
            transposed=transposed,
            columns=columns,
        )

    columns = shape.k if transposed else shape.n
    if summed == 1:
        kernels.append(product(range(columns), y, columns))
        return Plan(tuple(kernels), tuple(scratch))
    slices = slices_of_columns(shape, transposed, tile, _most_columns(x, num_slots, dtype))
    slots, width = y + 1 + len(scratch), len(slices[0])
    scratch.append(jax.ShapeDtypeStruct((num_slots, width), dtype))
    sums = SlotSums(
        num_slots // summed,
        summed,
        columns,
        num_experts,
        num_experts,
        dtype,
        partials=slots,
        topk_ids=experts,
        expert_map=None,
        out=y,
        overlaps_predecessor=capability >= 90,
    )
    for part in slices:
        kernels.append(product(part, slots, width))
        kernels.append(combine_kernel(sums, partial_dtype=dtype.name, columns_of=part))
    return Plan(tuple(kernels), tuple(scratch))


def _most_columns(x: jax.Array, num_slots: int, dtype: jnp.dtype) -> int:
    """Of the slots' rows before they are added: they take no more memory than x, or than nobody minds."""
    return max(x.size * x.dtype.itemsize, _SLICED_BYTES) // (num_slots * dtype.itemsize)
