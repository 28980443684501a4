"""From static shapes to the kernels of a custom call: which, how tiled, over which buffers.

Pointers are the kernels' only run-time parameters: every extent is a compile-time constant of the C++ types that are
spelled here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe import reference
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.choose import choose_tile, predicted_scheme
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.facts import Facts, Pointer
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.program import Kernel, render
from jax_marlin_moe.cuda.scheme import BlockScheme, Tile
from jax_marlin_moe.formats import FLOAT_SCALES
from jax_marlin_moe.operands import WEIGHT_LEAVES, WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights

_CPP_TYPES = {"float16": "jmm::Half", "bfloat16": "jmm::BFloat", "float32": "jmm::Float"}
_CPP_ZEROS = {"integer": "jmm::IntegerZeros", "float": "jmm::FloatZeros"}

MOST_GROUPED_SLOTS = 128  # of csrc/cuda/token_tiles.cuh

# Kernels count slots, experts, entries of the list and work tiles in int32, and look a little past the last one: a
# stride of the grid, twice, or a part of the list for each warp. Offsets into arrays are as wide as the arrays need.
MOST_COUNTED = 2**31 - 2**16
# Offsets inside a few rows of one expert's weights are int32: 16 rows of K of 8 bits, eight times.
MOST_COLUMNS = 2**22
_MOST_CTAS = 2**31 - 1  # of a grid

_PACKED, _SCALES, _ZEROS, _GLOBAL_SCALES, _BIAS = (
    WEIGHT_LEAVES.index(leaf) for leaf in ("packed", "scales", "zeros", "global_scales", "bias")
)


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
class TokenTiles:
    """How a product finds the slots of its token tiles: a type of csrc/cuda/token_tiles.cuh.

    Attributes:
        cpp: the C++ template.
        facts: that it is compiled with.
        pointers: of its members.
        most: token tiles, at most.
        shared_bytes: shared memory of its own in every CTA.
        scratch_bytes: of the product's shared memory, what it needs first.
    """

    cpp: str
    facts: Facts
    pointers: dict[str, Pointer | None]
    most: int
    shared_bytes: int = 0
    scratch_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of a product's sums: a type of csrc/cuda/epilogue.cuh.

    Attributes:
        cpp: the C++ template.
        facts: that it is compiled with.
        pointers: of its members.
    """

    cpp: str
    facts: Facts
    pointers: dict[str, Pointer | None]


def _optional(buffer: int | None, dtype: str) -> Pointer | None:
    """A pointer to read from, or None where there is no buffer."""
    return None if buffer is None else Pointer(buffer, dtype)


def _nested(member: str, pointers: dict[str, Pointer | None]) -> dict[str, Pointer | None]:
    """The pointers of a member that is a struct."""
    return {f"{member}.{name}": pointer for name, pointer in pointers.items()}


def _activation_type(activation: Activation) -> str:
    """The C++ spelling; parameters as the bits of float32 values. Raises ValueError where there is no such kernel."""
    if activation.cpp is None:
        raise ValueError(
            f"activation is {activation.name!r}, which the CUDA kernels lack; pass implementation='xla', or add it to "
            "csrc/cuda/activations.cuh"
        )
    bits = [f"0x{int(np.float32(value).view(np.uint32)):08X}u" for value in activation.parameters]
    return f"jmm::{activation.cpp}" + (f"<{', '.join(bits)}>" if bits else "")


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
    room = get_architecture(capability).most_shared_kib * 1024
    while warps > 1 and size(warps) > room:
        warps -= 1
    if size(warps) > room:
        most = (room // 4 - 1) // 2
        raise ValueError(
            f"num_experts is {num_experts}; the alignment kernel counts the slots of at most {most} in the shared "
            f"memory of compute capability {capability}: shard the experts, or pass implementation='xla'"
        )
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "block": block_size,
        "list_length": list_length,
        "warps": warps,
        "mapped": expert_map is not None,
    }
    listed = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
    return Kernel(
        name=f"jmm_align_m{block_size}",
        body="AlignBlockSize<Facts>",
        structs={"Facts": facts},
        pointers={
            "topk_ids": Pointer(topk_ids, "int32"),
            "expert_map": _optional(expert_map, "int32"),
            **{name: Pointer(buffer, "int32", written=True) for name, buffer in zip(listed, outputs, strict=True)},
        },
        threads=32 * warps,
        shared_bytes=size(warps),
        max_ctas=1,
    )


def gemm_kernel(
    stage: str,
    shape: GemmShape,
    tile: Tile,
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
) -> Kernel:
    """A grouped GEMM.

    `stage` names it, with the format and the rows of a tile: "gate_up" becomes `jmm_gate_up_int4_m16`. `x` is the
    buffer of the rows, `row_stride` elements apart; the matrix's operands follow from `first_operand`.
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
        "element": _CPP_TYPES[dtype.name],
        "code": row.code.cpp,
        "scale": row.scale.cpp or _CPP_TYPES[scale_dtype],
        "zeros": _CPP_ZEROS[row.zeros] if row.zeros else f"jmm::BakedZero<{row.zero_point}>",
        "global_scales": row.has_global_scales,
        "k": shape.k,
        "n": shape.n,
        "experts": shape.num_experts,
        "group": shape.group_size,
        "row_stride": row_stride,
        "slots_per_row": slots_per_row,
    }
    found_tiles = f"jmm::{token_tiles.cpp}<TokenTiles>"
    constants = {
        f"{found_tiles}::kMaxTiles": token_tiles.most,
        f"{found_tiles}::kSharedBytes": token_tiles.shared_bytes,
        f"{found_tiles}::kScratchBytes": token_tiles.scratch_bytes,
    }
    if token_tiles.cpp == "GroupedTiles":
        constants["jmm::kMostGroupedSlots"] = MOST_GROUPED_SLOTS
    return Kernel(
        name=f"jmm_{stage}_{row.name}_m{tile.tokens}",
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
            "operands.packed": Pointer(first_operand + _PACKED, "int32"),
            "operands.scales": Pointer(first_operand + _SCALES, scale_dtype, element="ScaleElement"),
            "operands.zeros": Pointer(first_operand + _ZEROS, zeros_dtype, element="ZeroElement")
            if zeros_dtype
            else None,
            "operands.global_scales": _optional(
                first_operand + _GLOBAL_SCALES if row.has_global_scales else None, "float32"
            ),
            **_nested("token_tiles", token_tiles.pointers),
            **_nested("epilogue", epilogue.pointers),
        },
        threads=tile.threads,
        shared_bytes=tile.shared_bytes(shape) + token_tiles.shared_bytes,
        max_ctas=_grid(max(1, work_tiles) * tile.cluster, "the product"),
        ctas_per_sm=tile.ctas_per_sm,
        cluster=tile.cluster,
        overlaps_predecessor=overlaps_predecessor,
    )


def _aligned_tiles(
    num_slots: int,
    num_experts: int,
    rows: int,
    list_block: int,
    list_length: int,
    buffers: tuple[int, int, int],
    from_previous: bool,
    first_rows: int | None = None,
) -> TokenTiles:
    """`first_rows` is the buffer of `FindFirstRows`, where the list may have a slot more than once."""
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "rows": rows,
        "list_block": list_block,
        "list_length": list_length,
        "from_previous_kernel": from_previous,
        "may_repeat": first_rows is not None,
    }
    sorted_token_ids, expert_ids, num_tokens_post_padded = (Pointer(buffer, "int32") for buffer in buffers)
    pointers = {
        "sorted_token_ids": sorted_token_ids,
        "expert_ids": expert_ids,
        "num_tokens_post_padded": num_tokens_post_padded,
        "first_rows": _optional(first_rows, "int32"),
    }
    return TokenTiles("AlignedTiles", facts, pointers, -(-list_length // rows))


def _direct_tiles(
    num_slots: int, num_experts: int, routed_experts: int, topk_ids: int, expert_map: int | None
) -> TokenTiles:
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "routed_experts": routed_experts,
        "mapped": expert_map is not None,
    }
    pointers = {"topk_ids": Pointer(topk_ids, "int32"), "expert_map": _optional(expert_map, "int32")}
    return TokenTiles("DirectTiles", facts, pointers, num_slots)


def _grouped_tiles(
    num_slots: int, num_experts: int, routed_experts: int, rows: int, topk_ids: int, expert_map: int | None
) -> TokenTiles:
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "routed_experts": routed_experts,
        "rows": rows,
        "mapped": expert_map is not None,
    }
    pointers = {"topk_ids": Pointer(topk_ids, "int32"), "expert_map": _optional(expert_map, "int32")}
    most, words = min(num_slots, num_experts + num_slots // rows), -(-num_slots // 32)
    return TokenTiles(
        "GroupedTiles",
        facts,
        pointers,
        most,
        shared_bytes=-(-most * rows // 16) * 16 + -(-most // 8) * 16 + 32 * words + 16,
        scratch_bytes=num_experts * words * 4,
    )


def _hosts(tile: Tile, shape: GemmShape, token_tiles: TokenTiles, capability: int) -> bool:
    """Whether a multiprocessor has the shared memory to find token tiles in as many CTAs as the tile wants."""
    size = tile.shared_bytes(shape)
    resident = get_architecture(capability).fits_shared_memory(size + token_tiles.shared_bytes, tile.ctas_per_sm)
    return resident and token_tiles.scratch_bytes <= size


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
    token_tiles = _aligned_tiles(
        num_slots,
        weights.num_experts,
        block,
        block_size,
        list_length,
        listed,
        from_previous=False,
        first_rows=first_rows,
    )
    tile = choose_tile(shape, block, min(num_slots, token_tiles.most), capability)
    element = _CPP_TYPES[x.dtype.name]
    clear = Kernel(
        name=f"jmm_clear_m{num_slots}",
        body="Clear<Facts>",
        structs={"Facts": {"element": element, "slots": num_slots, "columns": weights.padded_n}},
        pointers={
            "out": Pointer(y, x.dtype.name, written=True),
            "first_rows": Pointer(first_rows, "int32", written=True),
        },
        threads=256,
        shared_bytes=0,
        max_ctas=_grid(-(-num_slots * weights.padded_n * x.dtype.itemsize // 16 // 256), "clearing the result"),
    )
    find = Kernel(
        name=f"jmm_first_rows_m{num_slots}",
        body="FindFirstRows<Facts>",
        structs={
            "Facts": {
                "slots": num_slots,
                "experts": weights.num_experts,
                "list_block": block_size,
                "list_length": list_length,
            }
        },
        pointers=token_tiles.pointers | {"first_rows": Pointer(first_rows, "int32", written=True)},
        threads=256,
        shared_bytes=0,
        max_ctas=max(1, -(-list_length // 256)),
        overlaps_predecessor=capability >= 90,
    )
    has_bias = weights.bias is not None
    epilogue = Epilogue(
        "SlotRows",
        {"element": element, "columns": weights.padded_n, "bias": has_bias, "weighted": weighted},
        {
            "out": Pointer(y, x.dtype.name, written=True),
            "bias": _optional(first_matrix + _BIAS if has_bias else None, "float32"),
            "topk_weights": _optional(router if weighted else None, "float32"),
        },
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
            scheme = predicted_scheme(first, second, num_slots, top_k, routed_experts, capability)
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
    grouped = _grouped_tiles(num_slots, num_experts, routed_experts, block, topk_ids, expert_map)
    if scheme.routing == "direct":
        first_tiles = second_tiles = _direct_tiles(num_slots, num_experts, routed_experts, topk_ids, expert_map)
    elif (
        scheme.routing == "grouped"
        and num_slots <= MOST_GROUPED_SLOTS
        and _hosts(scheme.gate_up, first, grouped, capability)
        and _hosts(scheme.down, second, grouped, capability)
    ):
        first_tiles = second_tiles = grouped
    else:
        list_length = reference.padded_size(num_slots, routed_experts, block)
        listed = (y + 3, y + 4, y + 5)
        first_tiles, second_tiles = (
            _aligned_tiles(num_slots, num_experts, block, block, list_length, listed, from_previous=from_previous)
            for from_previous in (True, False)
        )
        scratch += [
            jax.ShapeDtypeStruct((list_length,), jnp.int32),
            jax.ShapeDtypeStruct((first_tiles.most,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ]
        kernels.append(
            align_kernel(
                num_slots, routed_experts, block, capability, topk_ids=topk_ids, expert_map=expert_map, outputs=listed
            )
        )

    element = _CPP_TYPES[x.dtype.name]
    activate = Epilogue(
        "Activated",
        {
            "element": element,
            "activation": _activation_type(activation),
            "columns": columns,
            "bias": gate_up.bias is not None,
        },
        {
            "out": Pointer(h, x.dtype.name, written=True),
            "bias": _optional(first_matrix + _BIAS if gate_up.bias is not None else None, "float32"),
        },
    )
    weigh = Epilogue(
        "SlotPartials",
        {"columns": down.padded_n, "bias": down.bias is not None},
        {
            "out": Pointer(sums, "float32", written=True),
            "bias": _optional(second_matrix + _BIAS if down.bias is not None else None, "float32"),
            "topk_weights": Pointer(topk_weights, "float32"),
        },
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
            x=0,
            first_operand=first_matrix,
            token_tiles=first_tiles,
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
            token_tiles=second_tiles,
            epilogue=weigh,
            overlaps_predecessor=overlap and scheme.overlaps,
        )
    )
    facts: Facts = {
        "element": element,
        "tokens": tokens,
        "top_k": top_k,
        "columns": down.padded_n,
        "experts": num_experts,
        "routed_experts": routed_experts,
        "mapped": mapped,
    }
    kernels.append(
        Kernel(
            name=f"jmm_combine_m{tokens}",
            body="Combine<Facts>",
            structs={"Facts": facts},
            pointers={
                "partials": Pointer(sums, "float32"),
                "topk_ids": Pointer(topk_ids, "int32"),
                "expert_map": _optional(expert_map, "int32"),
                "out": Pointer(y, x.dtype.name, written=True),
            },
            threads=128,
            shared_bytes=0,
            max_ctas=_grid(-(-tokens * (down.padded_n // 4) // 128), "the sum over a token's experts"),
            overlaps_predecessor=overlap,
        )
    )
    return Plan(tuple(kernels), tuple(scratch))
