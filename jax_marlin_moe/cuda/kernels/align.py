"""The kernels that group slots by expert, and the call of them alone. Twin of csrc/cuda/align.cuh."""

import jax
import jax.numpy as jnp

from jax_marlin_moe import reference
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.facts import Bound, Facts, Pointer, nested, optional, token_count
from jax_marlin_moe.cuda.limits import check_counts
from jax_marlin_moe.cuda.program import Kernel, Plan

# Up to here one CTA is done before two kernels are (6 us on an H200, 8 and 5.5 at twice as many).
MOST_SLOTS_OF_ONE_CTA = 2048
_SLOTS_OF_A_CTA, _MOST_CTAS, _WARPS_OF_A_CTA = 2048, 64, 16


def align_kernels(
    num_slots: int,
    num_experts: int,
    block_size: int,
    capability: int,
    *,
    topk_ids: int,
    expert_map: int | None,
    outputs: tuple[int, int, int],
    counts: int,
    ids_from_previous: bool = False,
    slots_of_token: int | None = None,
    products: int = 0,
) -> tuple[tuple[Kernel, ...], tuple[jax.ShapeDtypeStruct, ...]]:
    """What groups the slots by expert: one CTA, or for many slots a kernel that counts before one that places.

    Args:
        num_slots: of the ids.
        num_experts: that ids may name.
        block_size: of the list.
        capability: of the card.
        topk_ids: the buffer of the ids.
        expert_map: of the map, or None.
        outputs: of the list, the experts of its blocks, and its length.
        counts: of the scratch that is asked for.
        ids_from_previous: whether the kernel before writes the ids.
        slots_of_token: where a call may have fewer tokens, and slots.
        products: that follow, whose CTAs take work tiles as they come to them.

    Returns:
        The kernels, and the scratch that they need at `counts`: an array or none, and behind it, if there are
        `products`, the number of work tiles that were taken of each, which is zero then.

    Raises:
        ValueError: there are more slots or experts than the kernels count.
    """
    list_length = reference.padded_size(num_slots, num_experts, block_size)
    check_counts(num_slots, num_experts, list_length)
    ctas = 1 if num_slots <= MOST_SLOTS_OF_ONE_CTA else min(_MOST_CTAS, -(-num_slots // _SLOTS_OF_A_CTA))
    # Of one CTA: a lane for every slot, within what a CTA has room for; 8 warps to clear the list.
    wanted = max(8, min(32, -(-num_slots // 32))) if ctas == 1 else _WARPS_OF_A_CTA
    warps = _most_warps(wanted, num_experts, capability)
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "block": block_size,
        "list_length": list_length,
        "warps": warps,
        "ctas": ctas,
        "mapped": expert_map is not None,
        "counted": slots_of_token is not None,
        "slots_of_token": slots_of_token or 1,
        "products": products,
    }
    parts = nested(
        "parts",
        {
            "topk_ids": Pointer(topk_ids, "int32"),
            "expert_map": optional(expert_map, "int32"),
            **token_count(slots_of_token is not None),
        },
    )
    listed = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
    written = {name: Pointer(buffer, "int32", written=True) for name, buffer in zip(listed, outputs, strict=True)}

    def kernel(stage: str, body: str, pointers: dict[str, Bound], size: int, overlaps: bool) -> Kernel:
        return Kernel(
            name=f"jmm_{stage}_m{block_size}",
            headers=("align.cuh",),
            body=body,
            structs={"Facts": facts},
            pointers={**parts, **pointers},
            threads=32 * warps,
            shared_bytes=size,
            max_ctas=ctas,
            overlaps_predecessor=overlaps and capability >= 90,
        )

    def align(counted: Pointer | None, overlaps: bool) -> Kernel:
        size = _shared_bytes(warps, num_experts)
        taken = Pointer(counts + (ctas > 1), "int32", written=True) if products else None
        pointers: dict[str, Bound] = {"counts": counted, **written, "taken": taken}
        return kernel("align", "AlignBlockSize<Facts>", pointers, size, overlaps)

    of_products = (jax.ShapeDtypeStruct((products,), jnp.int32),) if products else ()
    if ctas == 1:
        return (align(None, ids_from_previous),), of_products
    found: dict[str, Bound] = {
        "sorted_token_ids": written["sorted_token_ids"],
        "counts": Pointer(counts, "int32", written=True),
    }
    count = kernel("count_slots", "CountSlots<Facts>", found, 4 * num_experts, ids_from_previous)
    scratch = jax.ShapeDtypeStruct((ctas * num_experts,), jnp.int32)
    return (count, align(Pointer(counts, "int32"), True)), (scratch, *of_products)


def _shared_bytes(warps: int, num_experts: int) -> int:
    return 4 * (warps * num_experts + warps + num_experts)


def _most_warps(wanted: int, num_experts: int, capability: int) -> int:
    """As many of them as a CTA has room for."""
    warps = wanted
    room = get_architecture(capability).most_shared_kib * 1024
    while warps > 1 and _shared_bytes(warps, num_experts) > room:
        warps -= 1
    if _shared_bytes(warps, num_experts) > room:
        most = (room // 4 - 1) // 2
        raise ValueError(
            f"num_experts is {num_experts}; the alignment kernel counts the slots of at most {most} in the shared "
            f"memory of compute capability {capability}: shard the experts, or pass implementation='xla'"
        )
    return warps


def plan_align(num_slots: int, num_experts: int, block_size: int, mapped: bool, architecture: str) -> Plan:
    """Buffers: topk_ids, expert_map; sorted_token_ids, expert_ids, num_tokens_post_padded; scratch."""
    kernels, scratch = align_kernels(
        num_slots,
        num_experts,
        block_size,
        compute_capability(architecture),
        topk_ids=0,
        expert_map=1 if mapped else None,
        outputs=(2, 3, 4),
        counts=5,
    )
    return Plan(kernels, scratch)
