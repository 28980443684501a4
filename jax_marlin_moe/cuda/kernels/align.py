"""The kernel that groups slots by expert, and the call of that kernel alone. Twin of csrc/cuda/align.cuh."""

from jax_marlin_moe import reference
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.facts import Facts, Pointer, optional
from jax_marlin_moe.cuda.limits import check_counts
from jax_marlin_moe.cuda.program import Kernel, Plan


def align_kernel(
    num_slots: int,
    num_experts: int,
    block_size: int,
    capability: int,
    *,
    topk_ids: int,
    expert_map: int | None,
    outputs: tuple[int, int, int],
    overlaps_predecessor: bool = False,
) -> Kernel:
    """One CTA that groups the slots by expert.

    Raises:
        ValueError: there are more slots or experts than the kernel counts.
    """
    list_length = reference.padded_size(num_slots, num_experts, block_size)
    check_counts(num_slots, num_experts, list_length)

    def size(warps: int) -> int:
        return 4 * (warps * num_experts + warps + num_experts)

    # A lane for every slot, within what a CTA and its per-warp counters leave room for; 8 warps to clear the list.
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
        headers=("align.cuh",),
        body="AlignBlockSize<Facts>",
        structs={"Facts": facts},
        pointers={
            "topk_ids": Pointer(topk_ids, "int32"),
            "expert_map": optional(expert_map, "int32"),
            **{name: Pointer(buffer, "int32", written=True) for name, buffer in zip(listed, outputs, strict=True)},
        },
        threads=32 * warps,
        shared_bytes=size(warps),
        max_ctas=1,
        overlaps_predecessor=overlaps_predecessor,
    )


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
    return Plan((kernel,))
