"""From static shapes to the kernels of a custom call: which, how tiled, over which buffers.

Pointers are the kernels' only run-time parameters: every extent is a compile-time constant of the C++ types that are
spelled here.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe import reference
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.program import Kernel, render
from jax_marlin_moe.cuda.tiles import (
    TOKEN_TILES,
    BlockScheme,
    GemmShape,
    Tile,
    WgmmaTile,
    block_sizes,
    choose_tile,
    expected_blocks,
    fits_shared_memory,
    predicted_microseconds,
    shared_memory,
)
from jax_marlin_moe.formats import FLOAT_SCALES
from jax_marlin_moe.operands import WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights

_CPP_TYPES = {"float16": "jmm::Half", "bfloat16": "jmm::BFloat", "float32": "jmm::Float"}
_CPP_TYPES |= {"e4m3": "jmm::E4M3Scale", "e8m0": "jmm::E8M0Scale"}  # scales of one byte
_CPP_ZEROS = {"integer": "jmm::IntegerZeros", "float": "jmm::FloatZeros"}
_CPP_ACTIVATIONS = {"silu": "Silu", "gelu_tanh": "GeluTanh", "relu2": "Relu2", "swiglu": "Swiglu"}

_INT, _INTS = "const int32_t*", "int32_t*"
_WORDS, _HALVES, _BYTES = "const uint32_t*", "const uint16_t*", "const unsigned char*"

MOST_GROUPED_SLOTS = 128  # of csrc/cuda/token_tiles.cuh

# Kernels count slots, experts, entries of the list and work tiles in int32, and look a little past the last one: a
# stride of the grid, twice, or a part of the list for each warp. Offsets into arrays are as wide as the arrays need.
MOST_COUNTED = 2**31 - 2**16
# Offsets inside a few rows of one expert's weights are int32: 16 rows of K of 8 bits, eight times.
MOST_COLUMNS = 2**22
_MOST_CTAS = 2**31 - 1  # of a grid
# Over 143 pairs of tiles, timed with and without an overlap (benchmarks/NOTES.md), what `_overlaps` chooses loses 0.2 %
# to the better way on average; an overlap everywhere loses 0.5 %, and 11 % once.
_LONGEST_OVERLAPPED_MICROSECONDS = 250

# The fields of `WEIGHT_OPERANDS` by their place.
_PACKED, _SCALES, _ZEROS, _GLOBAL_SCALES, _BIAS = range(WEIGHT_OPERANDS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call and what they need.

    Attributes:
        kernels: in launch order.
        scratch: buffers that follow the results, in this order.
        includes: headers of csrc/cuda.
        preamble: C++ that the kernels' types need beside the headers.
    """

    kernels: tuple[Kernel, ...]
    scratch: tuple[jax.ShapeDtypeStruct, ...]
    includes: tuple[str, ...] = ("align.cuh", "combine.cuh", "gemm/mma/kernel.cuh", "gemm/wgmma/kernel.cuh")
    preamble: str = ""

    @property
    def source(self) -> str:
        """The translation unit."""
        return render(self.kernels, self.includes, self.preamble)

    def position(self, stage: str) -> int:
        """The place among `kernels` of a stage.

        Args:
            stage: "align", "gate_up", "down", "combine"; "clear", "first_rows", "moe_gemm".

        Raises:
            ValueError: if the plan has no such stage.
        """
        for position, kernel in enumerate(self.kernels):
            if kernel.name.startswith(f"jmm_{stage}_"):
                return position
        raise ValueError(f"stage is {stage!r}; the kernels are {', '.join(kernel.name for kernel in self.kernels)}")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a product knows the rows of its blocks of tokens: a type of csrc/cuda/token_tiles.cuh.

    Attributes:
        cpp: the C++ type.
        buffers: of its int32 members; None for an absent one.
        max_blocks: blocks of tokens, at most.
        shared_bytes: shared memory of its own in every block of threads.
        scratch_bytes: of the product's shared memory, what it needs first.
    """

    cpp: str
    buffers: tuple[int | None, ...]
    max_blocks: int
    shared_bytes: int = 0
    scratch_bytes: int = 0


class _Parameters:
    """Collects the pointers of a kernel and hands out their C++ names."""

    def __init__(self) -> None:
        self.items: list[tuple[int, str]] = []

    def add(self, buffer: int | None, pointer: str) -> str:
        if buffer is None:
            return "nullptr"
        self.items.append((buffer, pointer))
        return f"p{len(self.items) - 1}"


def _activation_type(activation: Activation) -> str:
    """The C++ spelling; parameters as the bits of float32 values."""
    bits = [f"0x{int(np.float32(value).view(np.uint32)):08X}u" for value in activation.parameters]
    return f"jmm::{_CPP_ACTIVATIONS[activation.name]}" + (f"<{', '.join(bits)}>" if bits else "")


def _boolean(value: object) -> str:
    return "true" if value else "false"


def check_rows(x: jax.Array, capability: int) -> None:
    """Raises ValueError where the architecture cannot multiply the type."""
    if capability < 80 and x.dtype == jnp.bfloat16:
        raise ValueError(f"x has dtype bfloat16, which compute capability {capability} lacks; pass float16")


def check_counts(num_slots: int, num_experts: int, list_length: int) -> None:
    """Raises ValueError where slots, experts or the entries of the aligned list are more than int32 counts."""
    if num_experts > MOST_COUNTED:
        raise ValueError(f"num_experts is {num_experts}; the CUDA kernels take at most {MOST_COUNTED}")
    if max(num_slots, list_length) > MOST_COUNTED:
        raise ValueError(
            f"topk_ids has {num_slots} ids, {list_length} with the padding of their blocks; the CUDA kernels take at "
            f"most {MOST_COUNTED}: split the tokens"
        )


def check_matrix(name: str, weights: MarlinWeights) -> None:
    """Raises ValueError where one expert's matrix is larger than the kernels' offsets inside of it reach."""
    for axis, extent in (("K", weights.padded_k), ("N", weights.padded_n)):
        if extent > MOST_COLUMNS:
            raise ValueError(
                f"{name} is packed with {axis} = {extent}; the CUDA kernels take at most {MOST_COLUMNS}: split the "
                "matrix"
            )


def _grid(blocks: int, what: str) -> int:
    """`blocks`, or ValueError where a grid has no room for them."""
    if blocks > _MOST_CTAS:
        raise ValueError(f"{what} takes {blocks} CTAs; a grid has at most {_MOST_CTAS}: split the tokens")
    return blocks


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


def align_kernel(
    num_slots: int,
    num_experts: int,
    block_size: int,
    capability: int,
    *,
    topk_ids: int,
    expert_map: int | None,
    outputs: tuple[int, int, int],
) -> Kernel:
    """One block of threads that groups the slots by expert.

    Raises:
        ValueError: there are more slots or experts than the kernel counts.
    """
    list_length = reference.padded_size(num_slots, num_experts, block_size)
    check_counts(num_slots, num_experts, list_length)

    def size(warps: int) -> int:
        return 4 * (warps * num_experts + warps + num_experts)

    # A lane for every slot, within what a block and its per-warp counters leave room for; 8 warps to clear the list.
    warps = max(8, min(32, -(-num_slots // 32)))
    while warps > 1 and size(warps) > shared_memory(capability)[1]:
        warps -= 1
    if size(warps) > shared_memory(capability)[1]:
        most = (shared_memory(capability)[1] // 4 - 1) // 2
        raise ValueError(
            f"num_experts is {num_experts}; the alignment kernel counts the slots of at most {most} in the shared "
            f"memory of compute capability {capability}: shard the experts, or pass implementation='xla'"
        )
    p = _Parameters()
    ids = p.add(topk_ids, _INT)
    mapped = p.add(expert_map, _INT)
    members = ", ".join([ids, mapped, *(p.add(buffer, _INTS) for buffer in outputs)])
    template = (num_slots, num_experts, block_size, list_length, warps, _boolean(expert_map is not None))
    return Kernel(
        name=f"jmm_align_m{block_size}",
        body=f"AlignBlockSize<{', '.join(map(str, template))}>",
        members=members,
        parameters=tuple(p.items),
        threads=32 * warps,
        shared_bytes=size(warps),
        max_blocks=1,
    )


def gemm_kernel(
    stage: str,
    shape: GemmShape,
    tile: Tile | WgmmaTile,
    weights: MarlinWeights,
    dtype: jnp.dtype,
    *,
    slots_per_row: int,
    row_stride: int,
    x: int,
    first_operand: int,
    routing: Routing,
    epilogue: Callable[[_Parameters], tuple[str, str]],
    overlaps_predecessor: bool,
) -> Kernel:
    """A grouped GEMM; `epilogue` gives its C++ type and members.

    `stage` names it, with the format and the rows of a tile: "gate_up" becomes `jmm_gate_up_int4_m16`. `x` is the
    buffer of the rows, `row_stride` elements apart; the matrix's operands follow from `first_operand`.
    """
    work_tiles = routing.max_blocks * tile.column_tiles(shape)
    if work_tiles > MOST_COUNTED:
        raise ValueError(
            f"{routing.max_blocks} blocks of tokens by {tile.column_tiles(shape)} of columns are {work_tiles} work "
            f"tiles; the CUDA kernels take at most {MOST_COUNTED}: split the tokens"
        )
    p, row = _Parameters(), weights.format
    pointers = [
        p.add(x, _HALVES),
        p.add(first_operand + _PACKED, _WORDS),
        p.add(first_operand + _SCALES, _BYTES),
        p.add(first_operand + _ZEROS if row.zeros else None, _BYTES),
        p.add(first_operand + _GLOBAL_SCALES if row.has_global_scales else None, "const float*"),
    ]
    routing_members = ", ".join(p.add(buffer, _INT) for buffer in routing.buffers)
    epilogue_type, epilogue_members = epilogue(p)
    problem = (
        _CPP_TYPES[dtype.name],
        row.code.cpp,
        _CPP_TYPES[shape.scale],
        _CPP_ZEROS[row.zeros] if row.zeros else f"jmm::BakedZero<{row.zero_point}>",
        _boolean(row.has_global_scales),
        shape.k,
        shape.n,
        shape.num_experts,
        shape.group_size,
        row_stride,
        slots_per_row,
    )
    return Kernel(
        name=f"jmm_{stage}_{row.name}_m{tile.tokens}",
        body=(
            f"{tile.kernel}<jmm::Problem<{', '.join(map(str, problem))}>, {tile.cpp}, {routing.cpp}, {epilogue_type}>"
        ),
        members=f"{', '.join(pointers)}, {{{routing_members}}}, {{{epilogue_members}}}",
        parameters=tuple(p.items),
        threads=tile.threads,
        shared_bytes=tile.shared_bytes(shape) + routing.shared_bytes,
        max_blocks=_grid(max(1, work_tiles) * tile.cluster, "the product"),
        blocks_per_sm=tile.blocks_per_sm,
        cluster=tile.cluster,
        overlaps_predecessor=overlaps_predecessor,
    )


def _sorted_routing(
    num_slots: int,
    num_experts: int,
    block: int,
    list_block: int,
    list_length: int,
    buffers: tuple[int, int, int],
    from_previous: bool,
    first_rows: int | None = None,
) -> Routing:
    """`first_rows` is the buffer of `FindFirstRows`, where the list may have a slot more than once."""
    flags = _boolean(from_previous), _boolean(first_rows is not None)
    template = (num_slots, num_experts, block, list_block, list_length, *flags)
    return Routing(
        f"jmm::AlignedTiles<{', '.join(map(str, template))}>", (*buffers, first_rows), -(-list_length // block)
    )


def _direct_routing(
    num_slots: int, num_experts: int, routed_experts: int, topk_ids: int, expert_map: int | None
) -> Routing:
    template = (num_slots, num_experts, routed_experts, _boolean(expert_map is not None))
    return Routing(f"jmm::DirectTiles<{', '.join(map(str, template))}>", (topk_ids, expert_map), num_slots)


def _grouped_routing(
    num_slots: int, num_experts: int, routed_experts: int, block: int, topk_ids: int, expert_map: int | None
) -> Routing:
    template = (num_slots, num_experts, routed_experts, block, _boolean(expert_map is not None))
    blocks, words = min(num_slots, num_experts + num_slots // block), -(-num_slots // 32)
    return Routing(
        f"jmm::GroupedTiles<{', '.join(map(str, template))}>",
        (topk_ids, expert_map),
        blocks,
        shared_bytes=-(-blocks * block // 16) * 16 + -(-blocks // 8) * 16 + 32 * words + 16,
        scratch_bytes=num_experts * words * 4,
    )


def _hosts(tile: Tile | WgmmaTile, shape: GemmShape, routing: Routing, capability: int) -> bool:
    """Whether a multiprocessor has the shared memory for the routing in as many blocks as the tile wants."""
    size = tile.shared_bytes(shape)
    resident = fits_shared_memory(size + routing.shared_bytes, tile.blocks_per_sm, capability)
    return resident and routing.scratch_bytes <= size


def plan_align(num_slots: int, num_experts: int, block_size: int, mapped: bool, architecture: str) -> Plan:
    """Buffers: topk_ids, expert_map; sorted_token_ids, expert_ids, num_tokens_post_padded."""
    kernel = align_kernel(
        num_slots,
        num_experts,
        block_size,
        compute_capability(architecture),
        topk_ids=0,
        expert_map=1 if mapped else None,
        outputs=(2, 3, 4),
    )
    return Plan((kernel,), ())


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
    block = {8: 8, 16: 16, 32: 32, 48: 24, 64: 32}[block_size]
    first_matrix, router = 1, 1 + WEIGHT_OPERANDS
    listed, y = (router + 1, router + 2, router + 3), router + 4
    first_rows = y + 1
    routing = _sorted_routing(
        num_slots,
        weights.num_experts,
        block,
        block_size,
        list_length,
        listed,
        from_previous=False,
        first_rows=first_rows,
    )
    tile = choose_tile(shape, block, min(num_slots, routing.max_blocks), capability)
    size = num_slots * weights.padded_n * x.dtype.itemsize
    clear = Kernel(
        name=f"jmm_clear_m{num_slots}",
        body=f"Clear<{size}, {num_slots}>",
        members="p0, p1",
        parameters=((y, "int4*"), (first_rows, _INTS)),
        threads=256,
        shared_bytes=0,
        max_blocks=_grid(-(-size // 16 // 256), "clearing the result"),
    )
    find = Kernel(
        name=f"jmm_first_rows_m{num_slots}",
        body=f"FindFirstRows<{num_slots}, {weights.num_experts}, {block_size}, {list_length}>",
        members="p0, p1, p2, p3",
        parameters=(*((buffer, _INT) for buffer in listed), (first_rows, _INTS)),
        threads=256,
        shared_bytes=0,
        max_blocks=max(1, -(-list_length // 256)),
        overlaps_predecessor=capability >= 90,
    )

    def epilogue(p: _Parameters) -> tuple[str, str]:
        has_bias = weights.bias is not None
        template = (_CPP_TYPES[x.dtype.name], weights.padded_n, _boolean(has_bias), _boolean(weighted))
        members = [
            p.add(y, "uint16_t*"),
            p.add(first_matrix + _BIAS if has_bias else None, "const float*"),
            p.add(router if weighted else None, "const float*"),
        ]
        return f"jmm::SlotRows<{', '.join(map(str, template))}>", ", ".join(members)

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
        routing=routing,
        epilogue=epilogue,
        overlaps_predecessor=capability >= 90,
    )
    return Plan((clear, find, gemm), (jax.ShapeDtypeStruct((num_slots,), jnp.int32),))


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


def _overlaps(shape: GemmShape, tile: Tile | WgmmaTile, microseconds: float, capability: int) -> bool:
    """Whether the second product, of this shape and tile, had better begin beside the first one's end.

    That hides some two microseconds. It costs a part of the block where the second's blocks of threads land unevenly:
    where many small ones find room for more of them than their share, and at times in pieces of memory.
    """
    crowds = tile.blocks_per_sm > 8 and fits_shared_memory(
        tile.shared_bytes(shape), tile.blocks_per_sm * 7 // 5, capability
    )
    return microseconds < _LONGEST_OVERLAPPED_MICROSECONDS and not crowds


def _predicted_scheme(
    first: GemmShape, second: GemmShape, num_slots: int, top_k: int, routed_experts: int, capability: int
) -> BlockScheme:
    """The cost model's choice: slots by themselves where hardly two share an expert, aligned blocks elsewhere."""

    def fastest(tokens: int, blocks: float, rows: float | None, direct: bool) -> tuple[float, BlockScheme]:
        tiles = [choose_tile(shape, tokens, blocks, capability, rows) for shape in (first, second)]
        microseconds = sum(
            predicted_microseconds(shape, tile, blocks, rows)
            for shape, tile in zip((first, second), tiles, strict=True)
        )
        # A thread that has one slot to group does so in less than an alignment kernel takes.
        groups = num_slots <= min(tile.threads for tile in tiles)
        overlaps = _overlaps(second, tiles[1], microseconds, capability)
        return microseconds, BlockScheme(
            "direct" if direct else "grouped" if groups else "aligned", *tiles, overlaps=overlaps
        )

    if num_slots == top_k or num_slots * num_slots <= 8 * routed_experts:
        return fastest(TOKEN_TILES[0], num_slots, rows=None, direct=True)[1]
    found = []
    for tokens in block_sizes(num_slots, routed_experts, first, capability):
        blocks = expected_blocks(num_slots, routed_experts, first.num_experts, tokens)
        rows = num_slots * first.num_experts / routed_experts / blocks
        with contextlib.suppress(ValueError):  # no tile of this size serves one of the shapes
            found.append(fastest(tokens, blocks, rows, direct=False))
    if not found:
        raise ValueError(f"no kernel tile serves {first} and {second} on compute capability {capability}")
    return min(found, key=lambda predicted: predicted[0])[1]


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
) -> Plan:
    """Buffers: x, gate_up (5), down (5), topk_weights, topk_ids, expert_map; y; scratch."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("gate_up", gate_up)
    check_matrix("down", down)
    num_slots, num_experts = tokens * top_k, gate_up.num_experts
    check_counts(num_slots, max(num_experts, routed_experts), num_slots)
    first_matrix, second_matrix = 1, 1 + WEIGHT_OPERANDS
    topk_weights = second_matrix + WEIGHT_OPERANDS
    topk_ids, expert_map, y = topk_weights + 1, topk_weights + 2 if mapped else None, topk_weights + 3
    columns = gate_up.padded_n // (2 if activation.gated else 1)  # of the activation, padding included
    overlap = capability >= 90
    first, second = gemm_shape(gate_up, activation.gated, x.dtype), gemm_shape(down, False, x.dtype)

    if scheme is None:
        scheme = tables.lookup(block_key(gate_up, down, top_k), tokens, architecture)
        if scheme is None or not scheme.fits(first, second, capability):
            scheme = _predicted_scheme(first, second, num_slots, top_k, routed_experts, capability)
    elif not scheme.fits(first, second, capability):
        raise ValueError(
            f"cuda_scheme is {scheme}, which does not fit {first} and {second} on compute capability {capability}; "
            "pass None, or what autotune finds"
        )
    block = scheme.gate_up.tokens
    intermediate = jax.ShapeDtypeStruct((num_slots, columns), x.dtype)
    partials = jax.ShapeDtypeStruct((num_slots, down.padded_n), jnp.float32)

    kernels: list[Kernel] = []
    scratch = [intermediate, partials]
    h, sums = y + 1, y + 2
    grouped = _grouped_routing(num_slots, num_experts, routed_experts, block, topk_ids, expert_map)
    if scheme.routing == "direct":
        routing = second_routing = _direct_routing(num_slots, num_experts, routed_experts, topk_ids, expert_map)
    elif (
        scheme.routing == "grouped"
        and num_slots <= MOST_GROUPED_SLOTS
        and _hosts(scheme.gate_up, first, grouped, capability)
        and _hosts(scheme.down, second, grouped, capability)
    ):
        routing = second_routing = grouped
    else:
        list_length = reference.padded_size(num_slots, routed_experts, block)
        listed = (y + 3, y + 4, y + 5)
        routing = _sorted_routing(num_slots, num_experts, block, block, list_length, listed, from_previous=True)
        second_routing = _sorted_routing(num_slots, num_experts, block, block, list_length, listed, from_previous=False)
        scratch += [
            jax.ShapeDtypeStruct((list_length,), jnp.int32),
            jax.ShapeDtypeStruct((routing.max_blocks,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ]
        kernels.append(
            align_kernel(
                num_slots, routed_experts, block, capability, topk_ids=topk_ids, expert_map=expert_map, outputs=listed
            )
        )

    def activate(p: _Parameters) -> tuple[str, str]:
        has_bias = gate_up.bias is not None
        template = (_CPP_TYPES[x.dtype.name], _activation_type(activation), columns, _boolean(has_bias))
        members = [p.add(h, "uint16_t*"), p.add(first_matrix + _BIAS if has_bias else None, "const float*")]
        return f"jmm::Activated<{', '.join(map(str, template))}>", ", ".join(members)

    def weigh(p: _Parameters) -> tuple[str, str]:
        has_bias = down.bias is not None
        members = [
            p.add(sums, "float*"),
            p.add(second_matrix + _BIAS if has_bias else None, "const float*"),
            p.add(topk_weights, "const float*"),
        ]
        return f"jmm::SlotPartials<{down.padded_n}, {_boolean(has_bias)}>", ", ".join(members)

    kernels.append(
        gemm_kernel(
            "gate_up",
            first,
            scheme.gate_up,
            gate_up,
            x.dtype,
            slots_per_row=num_slots // x.shape[0],
            row_stride=first.k,
            x=0,
            first_operand=first_matrix,
            routing=routing,
            epilogue=activate,
            overlaps_predecessor=overlap and bool(kernels),
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
            first_operand=second_matrix,
            routing=second_routing,
            epilogue=weigh,
            overlaps_predecessor=overlap and scheme.overlaps,
        )
    )
    p = _Parameters()
    template = (_CPP_TYPES[x.dtype.name], tokens, top_k, down.padded_n, num_experts, routed_experts, _boolean(mapped))
    members = [p.add(sums, "const float4*"), p.add(topk_ids, _INT), p.add(expert_map, _INT), p.add(y, "uint2*")]
    kernels.append(
        Kernel(
            name=f"jmm_combine_m{tokens}",
            body=f"Combine<{', '.join(map(str, template))}>",
            members=", ".join(members),
            parameters=tuple(p.items),
            threads=128,
            shared_bytes=0,
            max_blocks=_grid(-(-tokens * (down.padded_n // 4) // 128), "the sum over a token's experts"),
            overlaps_predecessor=overlap,
        )
    )
    return Plan(tuple(kernels), tuple(scratch))
