"""From static shapes to the kernels of a custom call: which, how tiled, over which buffers.

Pointers are the kernels' only run-time parameters: every extent is a compile-time constant of the C++ types that are
spelled here.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_marlin_moe import reference
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda import tuned
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.program import Kernel, render
from jax_marlin_moe.cuda.tiles import BlockScheme, GemmShape, Tile, WgmmaTile, choose_tile, choose_token_tile, shared_memory
from jax_marlin_moe.weights import MarlinWeights

_CPP_TYPES = {"float16": "jmm::Half", "bfloat16": "jmm::BFloat"}
_CPP_CODES = {("int4", 4): "jmm::Int4", ("int4_zp", 4): "jmm::Int4"}
_CPP_ACTIVATIONS = {"silu": "jmm::Silu"}

_INT, _INTS = "const int32_t*", "int32_t*"
_WORDS, _HALVES = "const uint32_t*", "const uint16_t*"


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
    includes: tuple[str, ...] = ("align.cuh", "combine.cuh", "gemm_mma.cuh", "gemm_wgmma.cuh")
    preamble: str = ""

    @property
    def source(self) -> str:
        """The translation unit."""
        return render(self.kernels, self.includes, self.preamble)


class _Parameters:
    """Collects the pointers of a kernel and hands out their C++ names."""

    def __init__(self) -> None:
        self.items: list[tuple[int, str]] = []

    def add(self, buffer: int | None, pointer: str) -> str:
        if buffer is None:
            return "nullptr"
        self.items.append((buffer, pointer))
        return f"p{len(self.items) - 1}"


def _boolean(value: object) -> str:
    return "true" if value else "false"


def check_rows(x: jax.Array, capability: int) -> None:
    """Raises ValueError where the architecture cannot multiply the type, or offsets into x exceed 32 bits."""
    if capability < 80 and x.dtype == jnp.bfloat16:
        raise ValueError(f"x has dtype bfloat16, which compute capability {capability} lacks; pass float16")
    if x.size >= 2**32:
        raise ValueError(f"x has {x.size} elements; the CUDA kernels take fewer than 2**32: split the tokens")


def gemm_shape(weights: MarlinWeights, gated: bool) -> GemmShape:
    """The facts about a matrix that tiles depend on."""
    return GemmShape(
        weights.k, weights.n, weights.num_experts, weights.group_size, gated, weights.format.has_zero_points
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
    """One block of threads that groups the slots by expert."""
    list_length = reference.padded_size(num_slots, num_experts, block_size)

    def size(warps: int) -> int:
        return 4 * (warps * num_experts + warps + num_experts)

    # A lane for every slot, within what a block and its per-warp counters leave room for; 8 warps to clear the list.
    warps = max(8, min(32, -(-num_slots // 32)))
    while warps > 1 and size(warps) > shared_memory(capability)[1]:
        warps -= 1
    p = _Parameters()
    ids = p.add(topk_ids, _INT)
    mapped = p.add(expert_map, _INT)
    members = ", ".join([ids, mapped, *(p.add(buffer, _INTS) for buffer in outputs)])
    template = (num_slots, num_experts, block_size, list_length, warps, _boolean(expert_map is not None))
    return Kernel(
        body=f"AlignBlockSize<{', '.join(map(str, template))}>",
        members=members,
        parameters=tuple(p.items),
        threads=32 * warps,
        shared_bytes=size(warps),
        max_blocks=1,
    )


def gemm_kernel(
    shape: GemmShape,
    tile: Tile | WgmmaTile,
    weights: MarlinWeights,
    dtype: jnp.dtype,
    *,
    slots_per_row: int,
    x: int,
    operands: tuple[int, int, int | None],
    routing: Callable[[_Parameters], tuple[str, str]],
    epilogue: Callable[[_Parameters], tuple[str, str]],
    max_blocks: int,
    overlaps_predecessor: bool,
) -> Kernel:
    """A grouped GEMM; `routing` and `epilogue` give their C++ type and members."""
    p = _Parameters()
    packed, scales, zeros = operands
    pointers = [p.add(x, _HALVES), p.add(packed, _WORDS), p.add(scales, _HALVES), p.add(zeros, _WORDS)]
    routing_type, routing_members = routing(p)
    epilogue_type, epilogue_members = epilogue(p)
    problem = (
        _CPP_TYPES[dtype.name],
        _CPP_TYPES[jnp.dtype(weights.scales.dtype).name],
        _CPP_CODES[weights.format.name, weights.format.bits],
        shape.k,
        shape.n,
        shape.num_experts,
        shape.group_size,
        slots_per_row,
        _boolean(shape.has_zeros),
    )
    return Kernel(
        body=(
            f"{tile.kernel}<jmm::Problem<{', '.join(map(str, problem))}>, {tile.cpp}, {routing_type}, {epilogue_type}>"
        ),
        members=f"{', '.join(pointers)}, {{{routing_members}}}, {{{epilogue_members}}}",
        parameters=tuple(p.items),
        threads=tile.threads,
        shared_bytes=tile.shared_bytes(shape),
        max_blocks=max(1, max_blocks * tile.column_tiles(shape)),
        blocks_per_sm=tile.blocks_per_sm,
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
) -> Callable[[_Parameters], tuple[str, str]]:
    def routing(p: _Parameters) -> tuple[str, str]:
        template = (num_slots, num_experts, block, list_block, list_length, _boolean(from_previous))
        return (
            f"jmm::SortedRouting<{', '.join(map(str, template))}>",
            ", ".join(p.add(buffer, _INT) for buffer in buffers),
        )

    return routing


def _direct_routing(
    num_slots: int, num_experts: int, routed_experts: int, topk_ids: int, expert_map: int | None
) -> Callable[[_Parameters], tuple[str, str]]:
    def routing(p: _Parameters) -> tuple[str, str]:
        template = (num_slots, num_experts, routed_experts, _boolean(expert_map is not None))
        return (
            f"jmm::DirectRouting<{', '.join(map(str, template))}>",
            f"{p.add(topk_ids, _INT)}, {p.add(expert_map, _INT)}",
        )

    return routing


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
    """Buffers: x, packed, scales, zeros, bias, topk_weights, sorted ids, expert ids, count; y."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    num_slots = x.shape[0] * top_k
    shape = gemm_shape(weights, gated=False)
    block = {8: 8, 16: 16, 32: 32, 48: 24, 64: 32}[block_size]
    max_blocks = -(-list_length // block)
    tile = choose_tile(shape, block, min(num_slots, max_blocks), capability)
    size = num_slots * weights.n * x.dtype.itemsize
    clear = Kernel(
        body=f"Clear<{size}>",
        members="p0",
        parameters=((9, "int4*"),),
        threads=256,
        shared_bytes=0,
        max_blocks=-(-size // 16 // 256),
    )

    def epilogue(p: _Parameters) -> tuple[str, str]:
        has_bias = weights.bias is not None
        template = (_CPP_TYPES[x.dtype.name], weights.n, _boolean(has_bias), _boolean(weighted))
        members = [
            p.add(9, "uint16_t*"),
            p.add(4 if has_bias else None, "const float*"),
            p.add(5 if weighted else None, "const float*"),
        ]
        return f"jmm::SlotRows<{', '.join(map(str, template))}>", ", ".join(members)

    # The list comes from before this call, so only the store waits for the clearing kernel; the wait sits before the
    # tokens are read, which is early enough.
    gemm = gemm_kernel(
        shape,
        tile,
        weights,
        x.dtype,
        slots_per_row=top_k,
        x=0,
        operands=(1, 2, 3 if shape.has_zeros else None),
        routing=_sorted_routing(
            num_slots, weights.num_experts, block, block_size, list_length, (6, 7, 8), from_previous=False
        ),
        epilogue=epilogue,
        max_blocks=max_blocks,
        overlaps_predecessor=capability >= 90,
    )
    return Plan((clear, gemm), ())


def block_key(gate_up: MarlinWeights, down: MarlinWeights, top_k: int) -> tuned.BlockKey:
    """The block's row in the tables of measured schemes."""
    return tuned.BlockKey(
        gate_up.num_experts, top_k, gate_up.k, down.k, gate_up.group_size, (gate_up.format.bits, down.format.bits)
    )


def _predicted_scheme(
    first: GemmShape, second: GemmShape, num_slots: int, top_k: int, routed_experts: int, capability: int
) -> BlockScheme:
    """The cost model's choice: slots by themselves where hardly two share an expert, aligned blocks elsewhere."""
    direct = num_slots == top_k or num_slots * num_slots <= 8 * routed_experts
    block = 8 if direct else choose_token_tile(num_slots, routed_experts)
    # Experts hit under uniform routing, each filling one block or more.
    hit = first.num_experts * (1 - (1 - 1 / routed_experts) ** num_slots)
    expected_blocks = num_slots if direct else max(hit, num_slots / block)
    return BlockScheme(
        direct,
        choose_tile(first, block, expected_blocks, capability),
        choose_tile(second, block, expected_blocks, capability),
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
    """Buffers: x, gate_up (4), down (4), topk_weights, topk_ids, expert_map; y; scratch."""
    capability = compute_capability(architecture)
    check_rows(x, capability)
    num_slots, num_experts = tokens * top_k, gate_up.num_experts
    topk_weights, topk_ids, expert_map, y = 9, 10, 11 if mapped else None, 12
    overlap = capability >= 90
    first, second = gemm_shape(gate_up, activation.gated), gemm_shape(down, gated=False)

    if scheme is None:
        scheme = tuned.lookup(block_key(gate_up, down, top_k), tokens, architecture)
    if scheme is None or not (scheme.gate_up.fits(first, capability) and scheme.down.fits(second, capability)):
        scheme = _predicted_scheme(first, second, num_slots, top_k, routed_experts, capability)
    direct, block = scheme.direct, scheme.gate_up.tokens
    intermediate = jax.ShapeDtypeStruct((num_slots, down.k), x.dtype)
    partials = jax.ShapeDtypeStruct((num_slots, down.n), jnp.float32)

    kernels: list[Kernel] = []
    scratch = [intermediate, partials]
    h, sums = y + 1, y + 2
    if direct:
        max_blocks = num_slots
        routing = second_routing = _direct_routing(num_slots, num_experts, routed_experts, topk_ids, expert_map)
    else:
        list_length = reference.padded_size(num_slots, routed_experts, block)
        max_blocks = -(-list_length // block)
        listed = (y + 3, y + 4, y + 5)
        scratch += [
            jax.ShapeDtypeStruct((list_length,), jnp.int32),
            jax.ShapeDtypeStruct((max_blocks,), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        ]
        kernels.append(
            align_kernel(
                num_slots, routed_experts, block, capability, topk_ids=topk_ids, expert_map=expert_map, outputs=listed
            )
        )
        routing = _sorted_routing(num_slots, num_experts, block, block, list_length, listed, from_previous=True)
        second_routing = _sorted_routing(num_slots, num_experts, block, block, list_length, listed, from_previous=False)

    def activate(p: _Parameters) -> tuple[str, str]:
        template = (
            _CPP_TYPES[x.dtype.name],
            _CPP_ACTIVATIONS[activation.name],
            down.k,
            _boolean(gate_up.bias is not None),
        )
        members = [p.add(h, "uint16_t*"), p.add(4 if gate_up.bias is not None else None, "const float*")]
        return f"jmm::GatedActivation<{', '.join(map(str, template))}>", ", ".join(members)

    def weigh(p: _Parameters) -> tuple[str, str]:
        has_bias = down.bias is not None
        members = [
            p.add(sums, "float*"),
            p.add(8 if has_bias else None, "const float*"),
            p.add(topk_weights, "const float*"),
        ]
        return f"jmm::SlotPartials<{down.n}, {_boolean(has_bias)}>", ", ".join(members)

    kernels.append(
        gemm_kernel(
            first,
            scheme.gate_up,
            gate_up,
            x.dtype,
            slots_per_row=num_slots // x.shape[0],
            x=0,
            operands=(1, 2, 3 if first.has_zeros else None),
            routing=routing,
            epilogue=activate,
            max_blocks=max_blocks,
            overlaps_predecessor=overlap and not direct,
        )
    )
    kernels.append(
        gemm_kernel(
            second,
            scheme.down,
            down,
            x.dtype,
            slots_per_row=1,
            x=h,
            operands=(5, 6, 7 if second.has_zeros else None),
            routing=second_routing,
            epilogue=weigh,
            max_blocks=max_blocks,
            overlaps_predecessor=overlap,
        )
    )
    p = _Parameters()
    template = (_CPP_TYPES[x.dtype.name], tokens, top_k, down.n, num_experts, routed_experts, _boolean(mapped))
    members = [p.add(sums, "const float4*"), p.add(topk_ids, _INT), p.add(expert_map, _INT), p.add(y, "uint2*")]
    kernels.append(
        Kernel(
            body=f"Combine<{', '.join(map(str, template))}>",
            members=", ".join(members),
            parameters=tuple(p.items),
            threads=256,
            shared_bytes=0,
            max_blocks=-(-tokens * (down.n // 4) // 256),
            overlaps_predecessor=overlap,
        )
    )
    return Plan(tuple(kernels), tuple(scratch))
