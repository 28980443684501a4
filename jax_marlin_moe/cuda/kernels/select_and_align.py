"""The choice of experts and the list of its slots in one kernel. Twin of csrc/cuda/router/select_and_align.cuh."""

import dataclasses

from jax_marlin_moe.cuda.facts import Facts, Pointer, nested
from jax_marlin_moe.cuda.kernels.align import shared_bytes
from jax_marlin_moe.cuda.program import Kernel

# A CTA of the choice has few warps. Up to here its last one is done before a CTA with a lane for every slot begins.
_MOST_SLOTS = 1024


def may_align(kernel: Kernel) -> bool:
    """Whether a kernel is one that the CTAs that choose experts may be, too."""
    is_align = kernel.name.startswith("jmm_align_") and kernel.max_ctas == 1
    return is_align and int(kernel.structs["Facts"]["slots"]) <= _MOST_SLOTS


def select_and_align_kernel(select: Kernel, align: Kernel, finished: int) -> Kernel:
    """Both in one.

    Args:
        select: of `select_kernel`.
        align: the kernel that reads its ids, which `may_align` has taken.
        finished: buffer of one int32, which the kernel before clears.
    """
    facts: Facts = {**align.structs["Facts"], "warps": select.threads // 32, "fresh": True}
    listed = {name: align.pointers[name] for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")}
    return dataclasses.replace(
        select,
        headers=("router/select_and_align.cuh",),
        body="SelectAndAlign<Facts, AlignFacts>",
        structs={**select.structs, "AlignFacts": facts},
        pointers={
            **nested("select", select.pointers),
            "expert_map": align.pointers["parts.expert_map"],
            "finished": Pointer(finished, "int32", written=True),
            **listed,
        },
        shared_bytes=max(select.shared_bytes, shared_bytes(select.threads // 32, int(facts["experts"]))),
    )
