"""From static shapes to the kernels of a call with products: which, how tiled, over which buffers.

Pointers are the kernels' only run-time parameters: every extent is a compile-time constant of the C++ types that are
spelled here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_marlin_moe import reference
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.choose import choose_listed_tile, choose_product_tile, predicted_scheme
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Facts, Pointer, nested, optional
from jax_marlin_moe.cuda.kernels.align import align_kernels
from jax_marlin_moe.cuda.kernels.combine import clear_kernel, combine_kernel, find_first_rows_kernel
from jax_marlin_moe.cuda.kernels.epilogue import Epilogue, activated, slot_partials, slot_rows
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.token_tiles import (
    MOST_GROUPED_SLOTS,
    MOST_SLOTS_OF_A_BYTE,
    TokenTiles,
    aligned_tiles,
    direct_tiles,
    grouped_tiles,
    ragged_tiles,
)
from jax_marlin_moe.cuda.kernels.transposed import TransposedTile, WgmmaTransposedTile
from jax_marlin_moe.cuda.limits import MOST_COUNTED, check_counts, check_matrix, check_rows, grid
from jax_marlin_moe.cuda.program import Kernel, Plan
from jax_marlin_moe.cuda.scheme import KERNELS, BlockScheme, Tile
from jax_marlin_moe.formats import FLOAT_SCALES
from jax_marlin_moe.operands import WEIGHT_LEAVES, WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights

_CPP_ZEROS = {"integer": "jmm::IntegerZeros", "float": "jmm::FloatZeros"}

_PACKED, _SCALES, _ZEROS, _GLOBAL_SCALES, _BIAS = (
    WEIGHT_LEAVES.index(leaf) for leaf in ("packed", "scales", "zeros", "global_scales", "bias")
)


def gemm_shape(weights: MarlinWeights, gated: bool, dtype: jnp.dtype) -> GemmShape:
    """The facts about a matrix that tiles depend on."""
    row = weights.format
    return GemmShape(
        k=weights.padded_k,
        n=weights.padded_n,
        num_experts=weights.num_experts,
        group_size=weights.rows_per_scale,
        gated=gated,
        code=row.code.name,
        bits=row.bits,
        scale=weights.scales.dtype.name if row.scale == FLOAT_SCALES else row.scale.name,
        zeros=row.zeros,
        dtype=dtype.name,
    )


def gemm_kernel(
    stage: str,
    shape: GemmShape,
    tile: Tile | TransposedTile,
    weights: MarlinWeights,
    dtype: jnp.dtype,
    *,
    slots_per_row: int,
    row_stride: int,
    x: int,
    first_operand: int,
    token_tiles: TokenTiles,
    epilogue: Epilogue,
    overlaps_predecessor: bool,
    transposed: bool = False,
    shared: int | None = None,
    shared_experts: int = 0,
) -> Kernel:
    """A grouped GEMM.

    `stage` names it, with the format and the rows of a tile: "gate_up" becomes `jmm_gate_up_int4_m16`. `x` is the
    buffer of the rows, `row_stride` elements apart; the matrix's operands follow from `first_operand`, and those of
    shared experts, packed alike, from `shared`.
    """
    work_tiles = token_tiles.most * tile.column_tiles(shape)
    if work_tiles > MOST_COUNTED:
        raise ValueError(
            f"{token_tiles.most} token tiles by {tile.column_tiles(shape)} of columns are {work_tiles} work "
            f"tiles; the CUDA kernels take at most {MOST_COUNTED}: split the tokens"
        )
    row = weights.format
    scale_dtype = weights.scales.dtype.name
    zeros_dtype = {None: None, "integer": "int32", "float": scale_dtype}[row.zeros]
    problem: Facts = {
        "element": ELEMENT_TYPES[dtype.name],
        "code": row.code.cpp,
        "scale": row.scale.cpp or ELEMENT_TYPES[scale_dtype],
        "zeros": _CPP_ZEROS[row.zeros] if row.zeros else f"jmm::BakedZero<{row.zero_point}>",
        "global_scales": row.has_global_scales,
        "k": shape.k,
        "n": shape.n,
        "experts": shape.num_experts,
        "shared_experts": shared_experts,
        "group": shape.group_size,
        "row_stride": row_stride,
        "slots_per_row": slots_per_row,
        "transposed": transposed,
    }

    def operands(first: int | None) -> dict[str, Pointer | None]:
        if first is None:
            return dict.fromkeys(("packed", "scales", "zeros", "global_scales"))
        return {
            "packed": Pointer(first + _PACKED, "int32"),
            "scales": Pointer(first + _SCALES, scale_dtype, element="ScaleElement"),
            "zeros": Pointer(first + _ZEROS, zeros_dtype, element="ZeroElement") if zeros_dtype else None,
            "global_scales": optional(first + _GLOBAL_SCALES if row.has_global_scales else None, "float32"),
        }

    found_tiles = f"jmm::{token_tiles.cpp}<TokenTiles>"
    constants = {
        f"{found_tiles}::kMaxTiles": token_tiles.most,
        f"{found_tiles}::kSharedBytes": token_tiles.shared_bytes,
        f"{found_tiles}::kScratchBytes": token_tiles.scratch_bytes,
    }
    if token_tiles.cpp == "GroupedTiles":
        constants["jmm::kMostGroupedSlots"] = MOST_GROUPED_SLOTS
    if isinstance(tile, (TransposedTile, WgmmaTransposedTile)):
        header = tile.header
    else:
        header = next(kernel.header for kernel in KERNELS.values() if kernel.tile is type(tile))
    return Kernel(
        name=f"jmm_{stage}_{row.name}_m{tile.tokens}",
        headers=(header, "epilogue.cuh", "token_tiles.cuh"),
        body=(f"{tile.kernel}<jmm::Problem<Problem>, {tile.cpp}<Tile>, {found_tiles}, jmm::{epilogue.cpp}<Epilogue>>"),
        structs={
            "Problem": problem,
            "Tile": tile.facts,
            "TokenTiles": token_tiles.facts,
            "Epilogue": epilogue.facts,
        },
        constants=constants,
        pointers={
            "operands.x": Pointer(x, dtype.name),
            **nested("operands", operands(first_operand)),
            **nested("operands", {f"shared_{name}": pointer for name, pointer in operands(shared).items()}),
            **nested("token_tiles", token_tiles.pointers),
            **nested("epilogue", epilogue.pointers),
        },
        threads=tile.threads,
        shared_bytes=tile.shared_bytes(shape) + token_tiles.shared_bytes,
        max_ctas=grid(max(1, work_tiles) * tile.cluster, "the product"),
        ctas_per_sm=tile.ctas_per_sm,
        cluster=tile.cluster,
        overlaps_predecessor=overlaps_predecessor,
    )


def _hosts(tile: Tile | TransposedTile, shape: GemmShape, token_tiles: TokenTiles, capability: int) -> bool:
    """Whether a multiprocessor has the shared memory to find token tiles in as many CTAs as the tile wants."""
    size = tile.shared_bytes(shape)
    ctas = max(1, tile.ctas_per_sm)
    resident = get_architecture(capability).fits_shared_memory(size + token_tiles.shared_bytes, ctas)
    return resident and token_tiles.scratch_bytes <= size


def plan_moe_gemm(
    x: jax.Array,
    weights: MarlinWeights,
    *,
    top_k: int,
    block_size: int,
    list_length: int,
    weighted: bool,
    architecture: str,
) -> Plan:
    """Buffers: x, the matrix (5), topk_weights, sorted ids, expert ids, count; y; scratch."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("weights", weights)
    num_slots = x.shape[0] * top_k
    check_counts(num_slots, weights.num_experts, list_length)
    shape = gemm_shape(weights, False, x.dtype)
    tile = choose_listed_tile(shape, num_slots, weights.num_experts, block_size, capability)
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
        bias=None if weights.bias is None else first_matrix + _BIAS,
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
) -> Plan:
    """Buffers: x, the matrix (5), experts, None; y, whose rows without an expert are not written; scratch.

    With `num_groups`, rows are sorted by group. Buffers: x, the matrix (5), group sizes, group offset; y, all of it.
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
    elif num_slots > MOST_GROUPED_SLOTS or not _hosts(tile, shape, token_tiles, capability):
        list_length = reference.padded_size(num_slots, num_experts, tile.tokens)
        listed = (y + 1, y + 2, y + 3)
        token_tiles = aligned_tiles(
            num_slots, num_experts, tile.tokens, tile.tokens, list_length, listed, from_previous=True
        )
        aligning, counts = align_kernels(
            num_slots,
            num_experts,
            tile.tokens,
            capability,
            topk_ids=experts,
            expert_map=None,
            outputs=listed,
            counts=y + 4,
        )
        kernels += aligning
        scratch += [jax.ShapeDtypeStruct(extents, jnp.int32) for extents in ((list_length,), (token_tiles.most,), (1,))]
        scratch += counts
    columns = shape.k if transposed else shape.n
    epilogue = (
        slot_partials(columns, out=y, bias=None, topk_weights=None)
        if dtype == jnp.float32
        else slot_rows(x.dtype.name, columns, out=y, bias=None, topk_weights=None)
    )
    kernels.append(
        gemm_kernel(
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
        )
    )
    return Plan(tuple(kernels), tuple(scratch))


def block_key(gate_up: MarlinWeights, down: MarlinWeights, top_k: int) -> tables.BlockKey:
    """The block's row in the tables of measured schemes."""
    return tables.BlockKey(
        gate_up.num_experts,
        top_k,
        gate_up.k,
        down.k,
        gate_up.group_size,
        (gate_up.format.code.name, down.format.code.name),
    )


@dataclasses.dataclass(frozen=True)
class BlockBuffers:
    """Where an expert block has its arrays among a call's buffers.

    Attributes:
        x: a row for each token, or for each slot.
        gate_up: the first operand of the matrix.
        down: likewise.
        topk_weights: a weight for each slot.
        topk_ids: an expert for each slot.
        expert_map: or None.
        y: the result.
        scratch: the first of those that the block needs for itself.
        ids_from_previous: whether the kernel before the block writes ids and weights.
        shared_gate_up: the first operand of the shared experts' matrix, or None.
        shared_down: likewise.
        x_scale: of rows in FP8, or None.
        intermediate_scales: of a quantised intermediate, or None.
    """

    x: int
    gate_up: int
    down: int
    topk_weights: int
    topk_ids: int
    expert_map: int | None
    y: int
    scratch: int
    ids_from_previous: bool = False
    shared_gate_up: int | None = None
    shared_down: int | None = None
    x_scale: int | None = None
    intermediate_scales: int | None = None


def plan_fused_moe(
    x: jax.Array,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    *,
    tokens: int,
    top_k: int,
    routed_experts: int,
    mapped: bool,
    activation: Activation,
    architecture: str,
    scheme: BlockScheme | None = None,
    scaled: bool = False,
    intermediate: str | None = None,
    out_dtype: jnp.dtype | None = None,
) -> Plan:
    """Buffers: x, gate_up (5), down (5), topk_weights, topk_ids, expert_map, x_scale, intermediate scales; y; scratch.

    `scaled` says whether there is an x_scale, `intermediate` how the intermediate is quantised.
    """
    router = 1 + 2 * WEIGHT_OPERANDS
    buffers = BlockBuffers(
        x=0,
        gate_up=1,
        down=1 + WEIGHT_OPERANDS,
        topk_weights=router,
        topk_ids=router + 1,
        expert_map=router + 2 if mapped else None,
        x_scale=router + 3 if scaled else None,
        intermediate_scales=None if intermediate is None else router + 4,
        y=router + 5,
        scratch=router + 6,
    )
    return plan_block(
        x,
        gate_up,
        down,
        buffers,
        tokens=tokens,
        top_k=top_k,
        routed_experts=routed_experts,
        activation=activation,
        architecture=architecture,
        scheme=scheme,
        intermediate=intermediate,
        out_dtype=out_dtype,
    )


def plan_block(
    x: jax.Array,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    buffers: BlockBuffers,
    *,
    tokens: int,
    top_k: int,
    routed_experts: int,
    activation: Activation,
    architecture: str,
    scheme: BlockScheme | None,
    shared: int = 0,
    intermediate: str | None = None,
    out_dtype: jnp.dtype | None = None,
) -> Plan:
    """The kernels of an expert block, over these buffers. Each token visits `shared` experts beside `top_k` others."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("gate_up", gate_up)
    check_matrix("down", down)
    slots, num_slots = top_k + shared, tokens * (top_k + shared)
    num_experts, routed_experts = gate_up.num_experts + shared, routed_experts + shared
    check_counts(num_slots, max(num_experts, routed_experts), num_slots)
    topk_ids, expert_map = buffers.topk_ids, buffers.expert_map
    columns = gate_up.padded_n // (2 if activation.gated else 1)  # of the activation, padding included
    overlap = capability >= 90
    first, second = gemm_shape(gate_up, activation.gated, x.dtype), gemm_shape(down, False, x.dtype)

    if scheme is None:
        scheme = tables.lookup(block_key(gate_up, down, top_k), tokens, architecture)
        if scheme is None or not scheme.fits(first, second, capability):
            scheme = predicted_scheme(first, second, num_slots, slots, routed_experts, capability)
    elif not scheme.fits(first, second, capability):
        raise ValueError(
            f"cuda_scheme is {scheme}, which does not fit {first} and {second} on compute capability {capability}; "
            "pass None, or what autotune finds"
        )
    block = scheme.gate_up.tokens
    activations = jax.ShapeDtypeStruct((num_slots, columns), x.dtype)
    partials = jax.ShapeDtypeStruct((num_slots, down.padded_n), jnp.float32)

    kernels: list[Kernel] = []
    scratch = [activations, partials]
    h, sums = buffers.scratch, buffers.scratch + 1
    # The second product may read at once what the kernel before the block has written: the first one lets it in only
    # when it has waited for that kernel.
    from_previous = (buffers.ids_from_previous, False)
    grouped = [
        grouped_tiles(num_slots, num_experts, routed_experts, block, topk_ids, expert_map, previous, tokens * shared)
        for previous in from_previous
    ]
    if scheme.routing == "direct":
        first_tiles, second_tiles = (
            direct_tiles(num_slots, num_experts, routed_experts, topk_ids, expert_map, previous)
            for previous in from_previous
        )
    elif (
        scheme.routing == "grouped"
        and tokens * top_k <= MOST_GROUPED_SLOTS
        and num_slots <= MOST_SLOTS_OF_A_BYTE
        and _hosts(scheme.gate_up, first, grouped[0], capability)
        and _hosts(scheme.down, second, grouped[1], capability)
    ):
        first_tiles, second_tiles = grouped
    else:
        list_length = reference.padded_size(num_slots, routed_experts, block)
        listed = (sums + 1, sums + 2, sums + 3)
        first_tiles, second_tiles = (
            aligned_tiles(num_slots, num_experts, block, block, list_length, listed, from_previous=from_previous)
            for from_previous in (True, False)
        )
        aligning, counts = align_kernels(
            num_slots,
            routed_experts,
            block,
            capability,
            topk_ids=topk_ids,
            expert_map=expert_map,
            outputs=listed,
            counts=sums + 4,
            ids_from_previous=buffers.ids_from_previous,
        )
        kernels += aligning
        scratch += [
            jax.ShapeDtypeStruct((list_length,), jnp.int32),
            jax.ShapeDtypeStruct((first_tiles.most,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            *counts,
        ]

    activate = activated(
        activation,
        x.dtype.name,
        columns,
        out=h,
        bias=None if gate_up.bias is None else buffers.gate_up + _BIAS,
        x_scale=buffers.x_scale,
        intermediate=intermediate,
        intermediate_scales=buffers.intermediate_scales,
    )
    weigh = slot_partials(
        down.padded_n,
        out=sums,
        bias=None if down.bias is None else buffers.down + _BIAS,
        topk_weights=buffers.topk_weights,
        intermediate_scales=buffers.intermediate_scales,
    )
    kernels.append(
        gemm_kernel(
            "gate_up",
            first,
            scheme.gate_up,
            gate_up,
            x.dtype,
            slots_per_row=num_slots // x.shape[0],
            row_stride=first.k,
            x=buffers.x,
            first_operand=buffers.gate_up,
            token_tiles=first_tiles,
            epilogue=activate,
            overlaps_predecessor=overlap and (bool(kernels) or buffers.ids_from_previous),
            shared=buffers.shared_gate_up,
            shared_experts=shared,
        )
    )
    kernels.append(
        gemm_kernel(
            "down",
            second,
            scheme.down,
            down,
            x.dtype,
            slots_per_row=1,
            row_stride=columns,
            x=h,
            first_operand=buffers.down,
            token_tiles=second_tiles,
            epilogue=weigh,
            overlaps_predecessor=overlap and scheme.overlaps,
            shared=buffers.shared_down,
            shared_experts=shared,
        )
    )
    kernels.append(
        combine_kernel(
            tokens,
            slots,
            down.padded_n,
            num_experts,
            routed_experts,
            x.dtype if out_dtype is None else out_dtype,
            partials=sums,
            topk_ids=topk_ids,
            expert_map=expert_map,
            out=buffers.y,
            overlaps_predecessor=overlap,
        )
    )
    return Plan(tuple(kernels), tuple(scratch))
