"""Plans of whole expert blocks: from static shapes to the kernels of a call, how they are tiled, over which buffers.

Pointers are the kernels' only run-time parameters: every extent is a compile-time constant of the C++ types that are
spelled here.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_marlin_moe import reference
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.choose import invariant_scheme, predicted_scheme
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.facts import Pointer
from jax_marlin_moe.cuda.grouped_gemm import BIAS, gemm_kernel, gemm_shape, hosts, slices_of_columns
from jax_marlin_moe.cuda.kernels import wgmma_bytes
from jax_marlin_moe.cuda.kernels.align import align_kernels
from jax_marlin_moe.cuda.kernels.combine import IdentityExperts, combine_kernel
from jax_marlin_moe.cuda.kernels.epilogue import activated, packed_partials, slot_partials
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.quantize_rows import quantize_rows_kernel, row_stride
from jax_marlin_moe.cuda.kernels.token_tiles import (
    MOST_GROUPED_SLOTS,
    MOST_SLOTS_OF_A_BYTE,
    TAKEN_BYTES,
    TokenTiles,
    aligned_tiles,
    direct_tiles,
    grouped_tiles,
)
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.kernels.wgmma_bytes import WgmmaByteTile
from jax_marlin_moe.cuda.limits import check_counts, check_matrix, check_rows
from jax_marlin_moe.cuda.program import CountedRows, Kernel, Plan, counted_plan
from jax_marlin_moe.cuda.scheme import BatchInvariant, BlockScheme, Tile
from jax_marlin_moe.cuda.token_ranges import most_tokens
from jax_marlin_moe.operands import WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights


def block_key(gate_up: MarlinWeights, down: MarlinWeights, top_k: int, shared: int = 0) -> tables.BlockKey:
    """The block's row in the tables of measured schemes, in which shared experts count as any others."""
    return tables.BlockKey(
        gate_up.num_experts + shared,
        top_k + shared,
        gate_up.k,
        down.k,
        gate_up.group_size,
        (gate_up.format.code.name, down.format.code.name),
    )


def measured_scheme(
    gate_up: MarlinWeights, down: MarlinWeights, top_k: int, tokens: int, architecture: str, shared: int = 0
) -> BlockScheme | None:
    """The scheme of a table; where none has the block with its shared experts, that of the block without them."""
    keys = dict.fromkeys(block_key(gate_up, down, top_k, count) for count in (shared, 0))
    found = (tables.lookup(key, tokens, architecture) for key in keys)
    return next((scheme for scheme in found if scheme is not None), None)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a product reads.

    Attributes:
        buffer: of the rows.
        stride: elements from one to the next.
        scales: the buffer of a scale for each, or None.
    """

    buffer: int
    stride: int
    scales: int | None = None


class _Quantised(NamedTuple):
    """Rows in 8 bits: what makes them, and its results."""

    kernel: Kernel
    rows: Rows
    scratch: tuple[jax.ShapeDtypeStruct, ...]


def _quantize(
    stage: str,
    rows: int,
    source_stride: int,
    source: int,
    source_dtype: str,
    shape: GemmShape,
    matrix: MarlinWeights,
    target: int,
    overlaps_predecessor: bool,
    *,
    places: bool,
    fixed: int | None = None,
    in_units: bool = False,
) -> _Quantised:
    """Rows from buffer `source` to `target`, and their scales behind them, for a product of this shape.

    `places`, `fixed` and `in_units` are those of `quantize_rows_kernel`.
    """
    # Of codes that have a zero point to subtract; the integers of int8 products are less that of the format already.
    sums = bool(matrix.format.zeros or (matrix.format.zero_point and shape.dtype != "int8"))
    stride = row_stride(shape.k, sums=sums)
    kernel = quantize_rows_kernel(
        stage,
        rows,
        shape.k,
        source_stride,
        source_dtype,
        shape.dtype,
        halves_apart=wgmma_bytes.halves_apart(shape),
        sums=sums,
        places=places,
        in_units=in_units,
        from_previous=stage == "hidden",
        x=source,
        fixed=fixed,
        out=target,
        scales=target + 1,
        overlaps_predecessor=overlaps_predecessor,
    )
    quantised = jax.ShapeDtypeStruct((rows, stride), shape.dtype)
    if in_units:
        return _Quantised(kernel, Rows(target, stride), (quantised,))
    return _Quantised(kernel, Rows(target, stride, target + 1), (quantised, jax.ShapeDtypeStruct((rows,), jnp.float32)))


def _check_byte_rows(
    activation_dtype: str, matrices: dict[str, tuple[MarlinWeights, GemmShape]], architecture: str
) -> None:
    """Raises ValueError, by the name of the matrix, where there is no kernel for such rows."""
    capability = compute_capability(architecture)
    if "wgmma_bytes" not in get_architecture(capability).kernels:
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}, which the CUDA kernels multiply on compute capability 9.0 "
            f"alone; this is {capability / 10:.1f}: pass None, or implementation='xla'"
        )
    for name, (weights, shape) in matrices.items():
        if not wgmma_bytes.multiplies(shape):
            raise ValueError(
                f"activation_dtype is {activation_dtype!r} and {name} has format {weights.format.name!r}, groups of "
                f"{shape.group_size}, K = {shape.k} and N = {shape.n}; the CUDA kernels take "
                f"{wgmma_bytes.FORMATS[activation_dtype]}, groups of 128 or one group, multiples of 32 from 128 on for "
                "K, and of 128 for N: pass None, or implementation='xla'"
            )


def _packed_pairs(tile: Tile, token_tiles: TokenTiles, rounded_to: jnp.dtype) -> bool | None:
    """Whether the second product packs pairs of columns (csrc/cuda/four_columns.cuh); None where its rows are float32.

    float32 rows are for results that end in more bits than bfloat16 has, and for few rows, which stay in L2.
    """
    if tile.tokens <= 32 or token_tiles.cpp != "AlignedTiles" or rounded_to != jnp.bfloat16:
        return None
    if isinstance(tile, WgmmaByteTile):
        return False
    return tile.sub_tiles == 1 if isinstance(tile, WgmmaTile) else None


def _takes_tiles(tile: Tile, shape: GemmShape, capability: int) -> bool:
    """Whether CTAs take work tiles as they come to them: of many rows, whose number differs from tile to tile.

    Not with slices of the columns: they would share a counter, and one may begin while the one before ends.
    """
    many = isinstance(tile, WgmmaTile) and tile.tokens > 32
    size = tile.shared_bytes(shape) + TAKEN_BYTES
    return many and get_architecture(capability).fits_shared_memory(size, tile.ctas_per_sm)


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
        identity: experts that return their input, or None.
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
    identity: IdentityExperts | None = None


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
    scheme: BlockScheme | BatchInvariant | None = None,
    scaled: bool = False,
    intermediate: str | None = None,
    out_dtype: jnp.dtype | None = None,
    rounded_to: jnp.dtype | None = None,
    activation_dtype: ByteDtype | None = None,
    sliced: bool = False,
) -> Plan:
    """Buffers: x, gate_up (5), down (5), topk_weights, topk_ids, expert_map, x_scale, intermediate scales; y; scratch.

    `scaled` says whether there is an x_scale, `intermediate` how the intermediate is quantised. Many tokens get the
    program of a range of numbers.
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
    many = tokens * top_k > MOST_GROUPED_SLOTS and activation_dtype is None and not sliced
    most = most_tokens(tokens) if many else None
    rows_of_token = x.shape[0] // tokens
    plan = plan_block(
        x if most is None else jax.ShapeDtypeStruct((rows_of_token * most, x.shape[1]), x.dtype),
        gate_up,
        down,
        buffers,
        tokens=tokens if most is None else most,
        top_k=top_k,
        routed_experts=routed_experts,
        activation=activation,
        architecture=architecture,
        scheme=scheme,
        intermediate=intermediate,
        out_dtype=out_dtype,
        rounded_to=rounded_to,
        activation_dtype=activation_dtype,
        sliced=sliced,
        counted=most is not None,
    )
    if most is None:
        return plan
    rows = {buffers.x: rows_of_token, buffers.topk_weights: 1, buffers.topk_ids: 1, buffers.y: 1}
    rows |= {buffers.scratch: top_k, buffers.scratch + 1: top_k}
    return counted_plan(plan, CountedRows(tokens, most, rows), buffers.scratch)


def plan_block(
    x: jax.Array | jax.ShapeDtypeStruct,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    buffers: BlockBuffers,
    *,
    tokens: int,
    top_k: int,
    routed_experts: int,
    activation: Activation,
    architecture: str,
    scheme: BlockScheme | BatchInvariant | None,
    shared: int = 0,
    intermediate: str | None = None,
    out_dtype: jnp.dtype | None = None,
    rounded_to: jnp.dtype | None = None,
    activation_dtype: ByteDtype | None = None,
    sliced: bool = False,
    counted: bool = False,
) -> Plan:
    """The kernels of an expert block, over these buffers. Each token visits `shared` experts beside `top_k` others.

    `rounded_to`: what the caller rounds results of `out_dtype` to; None for the same.

    `sliced`: the second product's rows take at most three times the memory of its input: where they need more, even
    with four columns in 64 bits, they are made and summed in slices of the columns. With `counted`, `tokens`, and the
    rows of x, are the most that a call may have; there are many.
    """
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
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    multiplied = jnp.dtype(x.dtype if activation_dtype is None else activation_dtype)
    first, second = gemm_shape(gate_up, activation.gated, multiplied), gemm_shape(down, False, multiplied)

    in_order = scheme == "batch_invariant"
    if activation_dtype is not None:
        _check_byte_rows(activation_dtype, {"gate_up": (gate_up, first), "down": (down, second)}, architecture)
        if scheme is None or scheme == "batch_invariant":  # all schemes of bytes add up in one order
            scheme = predicted_scheme(first, second, num_slots, slots, routed_experts, capability)
    if scheme == "batch_invariant":
        scheme = invariant_scheme(first, second, num_slots, slots, routed_experts, capability)
    elif scheme is None:
        scheme = measured_scheme(gate_up, down, top_k, tokens, architecture, shared)
        if scheme is None or not scheme.fits(first, second, capability):
            scheme = predicted_scheme(first, second, num_slots, slots, routed_experts, capability)
    elif not scheme.fits(first, second, capability):
        raise ValueError(
            f"cuda_scheme is {scheme}, which does not fit {first} and {second} on compute capability {capability}; "
            "pass None, or what autotune finds"
        )
    if counted and scheme.routing == "direct":  # whose slots are those of the call, not of a list
        scheme = dataclasses.replace(scheme, routing="aligned")
    block = scheme.gate_up.tokens
    activations = jax.ShapeDtypeStruct((num_slots, columns), x.dtype)
    kernels: list[Kernel] = []
    scratch = [activations, jax.ShapeDtypeStruct((num_slots, down.padded_n), jnp.float32)]
    h, sums = buffers.scratch, buffers.scratch + 1
    reads = Rows(buffers.x, first.k), Rows(h, columns)  # of the products
    if activation_dtype is not None:
        for_x = _quantize(
            "x",
            x.shape[0],
            x.shape[1],
            reads[0].buffer,
            x.dtype.name,
            first,
            gate_up,
            sums + 1,
            False,
            places=False,
            fixed=buffers.x_scale,
        )
        for_hidden = _quantize(
            "hidden",
            num_slots,
            columns,
            h,
            x.dtype.name,
            second,
            down,
            sums + 3,
            overlap,
            places=True,
            in_units=intermediate is not None,
        )
        scratch += [*for_x.scratch, *for_hidden.scratch]
        reads = for_x.rows, for_hidden.rows
    lists = buffers.scratch + len(scratch)
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
        and hosts(scheme.gate_up, first, grouped[0], capability)
        and hosts(scheme.down, second, grouped[1], capability)
    ):
        first_tiles, second_tiles = grouped
    else:
        list_length = reference.padded_size(num_slots, routed_experts, block)
        listed = (lists, lists + 1, lists + 2)
        takes = activation_dtype is not None or (
            not sliced
            and _takes_tiles(scheme.gate_up, first, capability)
            and _takes_tiles(scheme.down, second, capability)
        )
        aligning, counts = align_kernels(
            num_slots,
            routed_experts,
            block,
            capability,
            topk_ids=topk_ids,
            expert_map=expert_map,
            outputs=listed,
            counts=lists + 3,
            ids_from_previous=buffers.ids_from_previous,
            slots_of_token=slots if counted else None,
            products=2 if takes else 0,
        )
        taken = [
            Pointer(lists + 2 + len(counts), "int32", written=True, offset=4 * product) if takes else None
            for product in range(2)
        ]
        first_tiles, second_tiles = (
            aligned_tiles(num_slots, num_experts, block, block, list_length, listed, product == 0, taken=taken[product])
            for product in range(2)
        )
        kernels += aligning
        scratch += [
            jax.ShapeDtypeStruct((list_length,), jnp.int32),
            jax.ShapeDtypeStruct((first_tiles.most,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            *counts,
        ]

    if activation_dtype is not None:  # beside alignment
        overlaps_first = overlap and (bool(kernels) or buffers.ids_from_previous)
        kernels.append(dataclasses.replace(for_x.kernel, overlaps_predecessor=overlaps_first))
    activate = activated(
        activation,
        x.dtype.name,
        columns,
        out=h,
        bias=None if gate_up.bias is None else buffers.gate_up + BIAS,
        x_scale=buffers.x_scale if activation_dtype is None else None,  # else it is that of each row
        intermediate=intermediate,
        intermediate_scales=buffers.intermediate_scales,
        row_scales=reads[0].scales,
        slots_per_row=num_slots // x.shape[0],
    )
    overlaps_first = overlap and (bool(kernels) or buffers.ids_from_previous)
    padding = 0
    if overlaps_first and isinstance(scheme.gate_up, MmaTile):
        # CTAs that come in while another kernel runs fill one multiprocessor after the other.
        own = scheme.gate_up.shared_bytes(first) + first_tiles.shared_bytes
        padding = get_architecture(capability).padding(own, scheme.gate_up.ctas_per_sm)
    kernels.append(
        gemm_kernel(
            "gate_up",
            first,
            scheme.gate_up,
            gate_up,
            multiplied,
            slots_per_row=num_slots // x.shape[0],
            row_stride=reads[0].stride,
            x=reads[0].buffer,
            first_operand=buffers.gate_up,
            token_tiles=first_tiles,
            epilogue=activate,
            overlaps_predecessor=overlaps_first,
            shared=buffers.shared_gate_up,
            shared_experts=shared,
            in_order=in_order,
            padding_bytes=padding,
        )
    )
    if activation_dtype is not None:
        kernels.append(for_hidden.kernel)
    packed_pairs = None
    if not in_order and buffers.identity is None:
        packed_pairs = _packed_pairs(scheme.down, second_tiles, dtype if rounded_to is None else jnp.dtype(rounded_to))
    slices, most_columns = [range(down.padded_n)], 3 * columns * x.dtype.itemsize // 4
    if sliced and buffers.identity is None and (packed_pairs is None or down.padded_n // 2 > most_columns):
        slices = slices_of_columns(second, False, scheme.down, most_columns)
        packed_pairs = packed_pairs if len(slices) == 1 else None
    row_words = len(slices[0]) if packed_pairs is None else down.padded_n // 2
    scratch[1] = jax.ShapeDtypeStruct((num_slots, row_words), jnp.float32)
    for part in slices:
        weigh = slot_partials(
            down.padded_n,
            out=sums,
            bias=None if down.bias is None else buffers.down + BIAS,
            topk_weights=buffers.topk_weights,
            intermediate_scales=buffers.intermediate_scales,
            row_scales=reads[1].scales,
            columns_of=part,
        )
        if packed_pairs is not None:
            weigh = packed_partials(weigh, packed_pairs)
        kernels.append(
            gemm_kernel(
                "down",
                second,
                scheme.down,
                down,
                multiplied,
                slots_per_row=1,
                row_stride=reads[1].stride,
                x=reads[1].buffer,
                first_operand=buffers.down,
                token_tiles=second_tiles,
                epilogue=weigh,
                overlaps_predecessor=overlap and (scheme.overlaps or activation_dtype is not None),
                shared=buffers.shared_down,
                shared_experts=shared,
                columns=part,
                in_order=in_order,
            )
        )
        kernels.append(
            combine_kernel(
                tokens,
                slots,
                down.padded_n,
                num_experts,
                routed_experts,
                dtype,
                partials=sums,
                topk_ids=topk_ids,
                expert_map=expert_map,
                out=buffers.y,
                overlaps_predecessor=overlap,
                identity=buffers.identity,
                columns_of=part,
                places=activation_dtype is not None,
                counted=counted,
                packed_pairs=packed_pairs,
            )
        )
    return Plan(tuple(kernels), tuple(scratch))
