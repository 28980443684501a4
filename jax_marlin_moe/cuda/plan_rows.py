"""Plans of the products whose rows follow each other in memory: through a table of dispatches, and of one expert."""

import jax
import jax.numpy as jnp

from jax_marlin_moe.cuda.choose import choose_rows_tile, invariant_rows_tile
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.grouped_gemm import gemm_kernel, gemm_shape
from jax_marlin_moe.cuda.kernels.dispatches import resolve_kernel
from jax_marlin_moe.cuda.kernels.epilogue import slot_rows
from jax_marlin_moe.cuda.kernels.token_tiles import dispatch_tiles, one_expert_tiles
from jax_marlin_moe.cuda.limits import check_counts, check_matrix, check_rows
from jax_marlin_moe.cuda.program import Plan
from jax_marlin_moe.operands import WEIGHT_LEAVES, WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights

_BIAS = 1 + WEIGHT_LEAVES.index("bias")  # its buffer


def plan_expert_gemm(
    x: jax.Array, weights: MarlinWeights, *, num_dispatches: int, num_out_rows: int, architecture: str
) -> Plan:
    """Buffers: x, the matrix (5), dispatches; y, skipped; scratch."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("stack", weights)
    num_rows, experts = x.shape[0], weights.num_experts
    check_counts(max(num_rows, num_out_rows), experts, num_dispatches)
    shape = gemm_shape(weights, False, x.dtype)
    tile = choose_rows_tile(shape, num_out_rows, num_dispatches, capability)
    table = 1 + WEIGHT_OPERANDS
    y, skipped, tile_ends, owners = (table + place for place in (1, 2, 3, 4))
    resolve = resolve_kernel(
        num_rows,
        num_out_rows,
        num_dispatches,
        experts,
        tile.tokens,
        shape.n,
        x.dtype,
        dispatches=table,
        tile_ends=tile_ends,
        owners=owners,
        skipped=skipped,
        out=y,
    )
    gemm = gemm_kernel(
        "expert_gemm",
        shape,
        tile,
        weights,
        x.dtype,
        slots_per_row=1,
        row_stride=shape.k,
        x=0,
        first_operand=1,
        token_tiles=dispatch_tiles(
            num_rows, num_out_rows, num_dispatches, experts, tile.tokens, (table, tile_ends, owners)
        ),
        epilogue=slot_rows(
            x.dtype.name, shape.n, out=y, bias=None if weights.bias is None else _BIAS, topk_weights=None
        ),
        overlaps_predecessor=capability >= 90,
    )
    scratch = tuple(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (num_dispatches, num_out_rows))
    return Plan((resolve, gemm), scratch)


def plan_linear(
    x: jax.Array, weights: MarlinWeights, *, named: bool, architecture: str, batch_invariant: bool = False
) -> Plan:
    """Buffers: x, the matrix (5), the expert's number; y."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("weights", weights)
    num_rows = x.shape[0]
    check_counts(num_rows, weights.num_experts, num_rows)
    shape = gemm_shape(weights, False, x.dtype)
    if batch_invariant:
        tile = invariant_rows_tile(shape, num_rows, capability)
    else:
        tile = choose_rows_tile(shape, num_rows, 1, capability)
    expert = 1 + WEIGHT_OPERANDS
    y = expert + 1
    gemm = gemm_kernel(
        "linear",
        shape,
        tile,
        weights,
        x.dtype,
        slots_per_row=1,
        row_stride=shape.k,
        x=0,
        first_operand=1,
        token_tiles=one_expert_tiles(num_rows, weights.num_experts, tile.tokens, expert if named else None),
        epilogue=slot_rows(
            x.dtype.name, shape.n, out=y, bias=None if weights.bias is None else _BIAS, topk_weights=None
        ),
        overlaps_predecessor=False,
        in_order=batch_invariant,
    )
    return Plan((gemm,))
