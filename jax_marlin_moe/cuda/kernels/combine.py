"""The sum over a token's experts, and what clears and finds rows for a product. Twin of csrc/cuda/combine.cuh."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Bound, Facts, Pointer, optional, token_count
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel


@dataclasses.dataclass(frozen=True)
class IdentityExperts:
    """Experts without weights, which return their input.

    Attributes:
        experts: how many; their ids follow those of the others.
        x: the buffer of the layer's input.
        dtype: of x.
        columns: of x.
        topk_weights: the buffer of the slots' weights.
    """

    experts: int
    x: int
    dtype: jnp.dtype
    columns: int
    topk_weights: int


@dataclasses.dataclass(frozen=True)
class SlotSums:
    """Sums over the slots of each token: extents, and the numbers of buffers.

    Attributes:
        tokens: rows of the result.
        top_k: slots of a token.
        columns: of a row of the result.
        num_experts: of the matrices.
        routed_experts: that ids may name.
        dtype: of the result.
        partials: buffer of the slots' rows.
        topk_ids: buffer of the ids.
        expert_map: buffer of the map, or None.
        out: buffer of the result.
        overlaps_predecessor: whether the kernel may start before the one before it has ended.
        counted: whether a call may have fewer tokens.
    """

    tokens: int
    top_k: int
    columns: int
    num_experts: int
    routed_experts: int
    dtype: jnp.dtype
    partials: int
    topk_ids: int
    expert_map: int | None
    out: int
    overlaps_predecessor: bool
    counted: bool = False

    @property
    def _facts(self) -> Facts:
        """What either kernel is compiled with."""
        return {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "experts": self.num_experts,
            "routed_experts": self.routed_experts,
            "mapped": self.expert_map is not None,
            "counted": self.counted,
        }

    def kernel(
        self,
        body: str,
        facts: Facts,
        partials: Pointer,
        of_input: dict[str, Bound],
        result: Pointer,
        *,
        columns: int,
        columns_of_thread: int,
    ) -> Kernel:
        """The kernel that sums `columns` of the slots' rows, `columns_of_thread` of one token in each thread.

        `facts` are those that the body has beside the common ones.
        """
        threads = self.tokens * (columns // columns_of_thread)
        return Kernel(
            name=f"jmm_combine_m{self.tokens}",
            headers=("combine.cuh",),
            body=body,
            structs={"Facts": {"element": result.cpp_element} | self._facts | facts},
            pointers={
                "partials": partials,
                "topk_ids": Pointer(self.topk_ids, "int32"),
                "expert_map": optional(self.expert_map, "int32"),
                **of_input,
                "out": result,
                **token_count(self.counted),
            },
            threads=128,
            shared_bytes=0,
            max_ctas=grid(-(-threads // 128), "the sum over a token's experts"),
            overlaps_predecessor=self.overlaps_predecessor,
        )


def combine_kernel(
    sums: SlotSums,
    *,
    identity: IdentityExperts | None = None,
    partial_dtype: str = "float32",
    columns_of: range | None = None,
    places: bool = False,
) -> Kernel:
    """Sums each token's slots, and what identity experts return.

    Partials have the columns of `columns_of` alone, and the sums go to these; None is all. `places` says whether they
    have the columns of a unit in the order of its scales, as rows of 8 bits leave them.
    """
    columns_of = range(sums.columns) if columns_of is None else columns_of
    partials = Pointer(sums.partials, partial_dtype)
    result = Pointer(sums.out, sums.dtype.name, written=True, offset=columns_of.start * sums.dtype.itemsize)
    rows = None if identity is None else Pointer(identity.x, identity.dtype.name)
    facts: Facts = {
        "partial": partials.cpp_element,
        "columns": len(columns_of),
        "result_columns": sums.columns,
        "input": "jmm::Half" if rows is None else rows.cpp_element,
        "identity_experts": 0 if identity is None else identity.experts,
        "input_columns": 0 if identity is None else identity.columns,
        "places": places,
    }
    of_input: dict[str, Bound] = {
        "x": rows,
        "topk_weights": optional(None if identity is None else identity.topk_weights, "float32"),
    }
    return sums.kernel(
        "Combine<Facts>",
        facts,
        partials,
        of_input,
        result,
        columns=len(columns_of),
        columns_of_thread=16 // jnp.dtype(partial_dtype).itemsize,
    )


def combine_four_columns_kernel(sums: SlotSums, pairs: bool) -> Kernel:
    """Sums each token's slots, whose rows are those of `packed_partials`, `pairs` as there."""
    result = Pointer(sums.out, sums.dtype.name, written=True)
    facts: Facts = {"columns": sums.columns, "pairs": pairs}
    partials = Pointer(sums.partials, "float32")
    return sums.kernel(
        "CombineFourColumns<Facts>", facts, partials, {}, result, columns=sums.columns, columns_of_thread=8
    )


def clear_kernel(num_slots: int, columns: int, dtype: jnp.dtype, *, out: int, first_rows: int) -> Kernel:
    """Clears a product's result, and what is known about the first rows of slots."""
    return Kernel(
        name=f"jmm_clear_m{num_slots}",
        headers=("combine.cuh",),
        body="Clear<Facts>",
        structs={"Facts": {"element": ELEMENT_TYPES[dtype.name], "slots": num_slots, "columns": columns}},
        pointers={
            "out": Pointer(out, dtype.name, written=True),
            "first_rows": Pointer(first_rows, "int32", written=True),
        },
        threads=256,
        shared_bytes=0,
        max_ctas=grid(-(-num_slots * columns * dtype.itemsize // 16 // 256), "clearing the result"),
    )


def find_first_rows_kernel(
    num_slots: int,
    num_experts: int,
    list_block: int,
    list_length: int,
    *,
    pointers: Mapping[str, Bound],
    first_rows: int,
    overlaps_predecessor: bool,
) -> Kernel:
    """Finds where an aligned list, of these pointers, has each slot first."""
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "list_block": list_block,
        "list_length": list_length,
    }
    return Kernel(
        name=f"jmm_first_rows_m{num_slots}",
        headers=("combine.cuh",),
        body="FindFirstRows<Facts>",
        structs={"Facts": facts},
        pointers={
            **{name: pointers[name] for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")},
            "first_rows": Pointer(first_rows, "int32", written=True),
        },
        threads=256,
        shared_bytes=0,
        max_ctas=max(1, -(-list_length // 256)),
        overlaps_predecessor=overlaps_predecessor,
    )
