"""One grouped GEMM as a launch: a matrix, a tile, who finds the rows of a token tile, and what becomes of the sums."""

import dataclasses

import jax.numpy as jnp

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Facts, Pointer, nested, optional
from jax_marlin_moe.cuda.kernels.epilogue import Epilogue
from jax_marlin_moe.cuda.kernels.problem import UNIT, GemmShape
from jax_marlin_moe.cuda.kernels.token_tiles import MOST_GROUPED_SLOTS, TokenTiles
from jax_marlin_moe.cuda.kernels.transposed import TransposedTile, WgmmaTransposedTile
from jax_marlin_moe.cuda.limits import MOST_COUNTED, grid
from jax_marlin_moe.cuda.program import Kernel
from jax_marlin_moe.cuda.scheme import KERNELS, Tile
from jax_marlin_moe.formats import FLOAT_SCALES
from jax_marlin_moe.operands import WEIGHT_LEAVES
from jax_marlin_moe.weights import MarlinWeights

_CPP_ZEROS = {"integer": "jmm::IntegerZeros", "float": "jmm::FloatZeros"}

_MOST_SLICES = 6  # a program has at most 16 kernels

# The places of a matrix's arrays among the operands, from its first one.
_PACKED, _SCALES, _ZEROS, _GLOBAL_SCALES, BIAS = (
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
    columns: range | None = None,
    in_order: bool = False,
    padding_bytes: int = 0,
    expert_rows: float | None = None,
) -> Kernel:
    """A grouped GEMM, or a slice of its columns, whose kernel is the same for all slices of as many.

    Args:
        stage: names it, with the format and the rows of a tile: "gate_up" becomes `jmm_gate_up_int4_m16`.
        shape: of the product.
        tile: how it is cut.
        weights: the matrix.
        dtype: of the rows.
        slots_per_row: slots that read one row.
        row_stride: elements from one row to the next.
        x: the buffer of the rows.
        first_operand: the first buffer of the matrix.
        token_tiles: how it finds the slots of its token tiles.
        epilogue: what becomes of the sums.
        overlaps_predecessor: whether it may start before the kernel before it has ended.
        transposed: whether the matrix is.
        shared: the first buffer of the shared experts' matrix, packed alike, or None.
        shared_experts: how many.
        columns: that it computes; None is all.
        in_order: whether a row's sums must be added up in one order, however many rows its token tile has.
        padding_bytes: that are asked for beside the shared memory of the tile.
        expert_rows: rows of an expert on average, where that is known.

    Raises:
        ValueError: there are more work tiles than the kernels count.
    """
    columns = range(shape.k if transposed else shape.n) if columns is None else columns
    work_tiles = _work_tiles(shape, tile, token_tiles, len(columns), transposed)
    found_tiles = f"jmm::{token_tiles.cpp}<TokenTiles>"
    constants = {
        f"{found_tiles}::kMaxTiles": token_tiles.most,
        f"{found_tiles}::kSharedBytes": token_tiles.shared_bytes,
        f"{found_tiles}::kScratchBytes": token_tiles.scratch_bytes,
    }
    if token_tiles.cpp == "GroupedTiles":
        constants["jmm::kMostGroupedSlots"] = MOST_GROUPED_SLOTS
    problem = _problem(shape, weights, dtype) | {
        "columns": len(columns),
        "shared_experts": shared_experts,
        "row_stride": row_stride,
        "slots_per_row": slots_per_row,
        "transposed": transposed,
        "in_order": in_order,
    }
    matrix, shared_matrix = (_matrix_pointers(weights, first, columns, transposed) for first in (first_operand, shared))
    return Kernel(
        name=f"jmm_{stage}_{weights.format.name}_m{tile.tokens}",
        headers=(_header_of(tile), "epilogue.cuh", "token_tiles.cuh"),
        body=(f"{tile.kernel}<jmm::Problem<Problem>, {tile.cpp}<Tile>, {found_tiles}, jmm::{epilogue.cpp}<Epilogue>>"),
        structs={
            "Problem": problem,
            "Tile": tile.facts(expert_rows, shape.k),
            "TokenTiles": token_tiles.facts,
            "Epilogue": epilogue.facts,
        },
        constants=constants,
        pointers={
            "operands.x": Pointer(x, dtype.name),
            **nested("operands", matrix),
            **nested("operands", {f"shared_{name}": pointer for name, pointer in shared_matrix.items()}),
            **nested("token_tiles", token_tiles.pointers),
            **nested("epilogue", epilogue.pointers),
        },
        threads=tile.threads,
        shared_bytes=tile.shared_bytes(shape) + token_tiles.shared_bytes,
        max_ctas=grid(max(1, work_tiles) * tile.cluster, "the product"),
        ctas_per_sm=tile.ctas_per_sm,
        cluster=tile.cluster,
        padding_bytes=padding_bytes,
        overlaps_predecessor=overlaps_predecessor,
    )


def _problem(shape: GemmShape, weights: MarlinWeights, dtype: jnp.dtype) -> Facts:
    """What a product is compiled with that follows from the matrix and the type of the rows."""
    row = weights.format
    problem: Facts = {
        "element": ELEMENT_TYPES[dtype.name],
        "code": row.code.cpp,
        "scale": row.scale.cpp or ELEMENT_TYPES[weights.scales.dtype.name],
        "zeros": _CPP_ZEROS[row.zeros] if row.zeros else f"jmm::BakedZero<{row.zero_point}>",
        "global_scales": row.has_global_scales,
        "k": shape.k,
        "n": shape.n,
        "experts": shape.num_experts,
        "group": shape.group_size,
    }
    if shape.has_byte_rows:
        problem["row_groups"] = shape.row_groups
    return problem


def _work_tiles(
    shape: GemmShape, tile: Tile | TransposedTile, token_tiles: TokenTiles, columns: int, transposed: bool
) -> int:
    """Token tiles times tiles of that many columns; raises ValueError where they are more than the kernels count."""
    column_tiles = tile.column_tiles(
        dataclasses.replace(shape, k=columns) if transposed else dataclasses.replace(shape, n=columns)
    )
    work_tiles = token_tiles.most * column_tiles
    if work_tiles > MOST_COUNTED:
        raise ValueError(
            f"{token_tiles.most} token tiles by {column_tiles} of columns are {work_tiles} work "
            f"tiles; the CUDA kernels take at most {MOST_COUNTED}: split the tokens"
        )
    return work_tiles


def _header_of(tile: Tile | TransposedTile) -> str:
    if isinstance(tile, (TransposedTile, WgmmaTransposedTile)):
        return tile.header
    return next(kernel.header for kernel in KERNELS.values() if kernel.tile is type(tile))


def _matrix_pointers(
    weights: MarlinWeights, first: int | None, columns: range, transposed: bool
) -> dict[str, Pointer | None]:
    """Of a matrix whose operands follow from `first`, to the first of the columns; of None, of no matrix."""
    if first is None:
        return dict.fromkeys(("packed", "scales", "zeros", "global_scales"))
    row, scale_dtype = weights.format, weights.scales.dtype.name
    zeros_dtype = {None: None, "integer": "int32", "float": scale_dtype}[row.zeros]
    found = {
        "packed": Pointer(first + _PACKED, "int32"),
        "scales": Pointer(first + _SCALES, scale_dtype, element="ScaleElement"),
        "zeros": Pointer(first + _ZEROS, zeros_dtype, element="ZeroElement") if zeros_dtype else None,
        "global_scales": optional(first + _GLOBAL_SCALES if row.has_global_scales else None, "float32"),
    }
    if columns.start == 0:
        return found
    return {
        name: pointer and dataclasses.replace(pointer, offset=_slice_offset(weights, name, columns, transposed))
        for name, pointer in found.items()
    }


def slices_of_columns(shape: GemmShape, transposed: bool, tile: Tile | TransposedTile, most: int) -> list[range]:
    """The columns of a product in as few equal slices as have at most `most`; one where they cannot be cut so."""
    columns = shape.k if transposed else shape.n
    sizes = [columns // count for count in range(1, _MOST_SLICES + 1) if columns % count == 0]
    cut = [size for size in sizes if _begins_slices(shape, transposed, tile, size)]
    size = next((size for size in cut if size <= most), min(cut, default=columns))
    return [range(first, first + size) for first in range(0, columns, size)]


def _begins_slices(shape: GemmShape, transposed: bool, tile: Tile | TransposedTile, size: int) -> bool:
    """Whether work tiles, and what is packed together, begin at multiples of `size` columns."""
    if not transposed:
        whole = tile.column_tiles(shape) * size % shape.n == 0
        return whole and size % UNIT == 0
    assert isinstance(tile, (TransposedTile, WgmmaTransposedTile))
    return size % tile.rows == 0 and (shape.group_size >= shape.k or size % shape.group_size == 0)


def _slice_offset(weights: MarlinWeights, leaf: str, columns: range, transposed: bool) -> int:
    """Bytes of an array of a matrix before the first of the columns of a product."""
    array = getattr(weights, leaf)
    row_bytes = array.shape[-1] * array.dtype.itemsize
    if not transposed:
        return row_bytes * columns.start // weights.padded_n
    if leaf == "global_scales":
        return 0
    return array.shape[1] * columns.start // weights.padded_k * row_bytes


def hosts(tile: Tile | TransposedTile, shape: GemmShape, token_tiles: TokenTiles, capability: int) -> bool:
    """Whether a multiprocessor has the shared memory to find token tiles in as many CTAs as the tile wants."""
    size = tile.shared_bytes(shape)
    ctas = max(1, tile.ctas_per_sm)
    resident = get_architecture(capability).fits_shared_memory(size + token_tiles.shared_bytes, ctas)
    return resident and token_tiles.scratch_bytes <= size
