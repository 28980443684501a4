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


def combine_kernel(
    tokens: int,
    top_k: int,
    columns: int,
    num_experts: int,
    routed_experts: int,
    dtype: jnp.dtype,
    *,
    partials: int,
    topk_ids: int,
    expert_map: int | None,
    out: int,
    overlaps_predecessor: bool,
    identity: IdentityExperts | None = None,
    partial_dtype: str = "float32",
    columns_of: range | None = None,
    places: bool = False,
    counted: bool = False,
    packed_pairs: bool | None = None,
) -> Kernel:
    """Sums each token's slots, and what identity experts return.

    Partials have the columns of `columns_of` alone, and the sums go to these; None is all. `places` says whether they
    have the columns of a unit in the order of its scales, as rows of 8 bits leave them. `counted` where a call may have
    fewer tokens, `packed_pairs` where rows are whole, and those of `packed_partials`: without experts that return their
    input.
    """
    columns_of = range(columns) if columns_of is None else columns_of
    added = Pointer(partials, partial_dtype)
    result = Pointer(out, dtype.name, written=True, offset=columns_of.start * dtype.itemsize)
    rows = None if identity is None else Pointer(identity.x, identity.dtype.name)
    facts: Facts = {
        "element": result.cpp_element,
        "tokens": tokens,
        "top_k": top_k,
        "partial": added.cpp_element,
        "columns": len(columns_of),
        "result_columns": columns,
        "experts": num_experts,
        "routed_experts": routed_experts,
        "mapped": expert_map is not None,
        "input": "jmm::Half" if rows is None else rows.cpp_element,
        "identity_experts": 0 if identity is None else identity.experts,
        "input_columns": 0 if identity is None else identity.columns,
        "places": places,
        "counted": counted,
    }
    of_input: dict[str, Bound] = {
        "x": rows,
        "topk_weights": optional(None if identity is None else identity.topk_weights, "float32"),
    }
    vector = 16 // jnp.dtype(partial_dtype).itemsize if packed_pairs is None else 8  # columns of a thread
    if packed_pairs is not None:
        of_input = {}
        others = ("partial", "result_columns", "input", "identity_experts", "input_columns", "places")
        facts = {name: fact for name, fact in facts.items() if name not in others} | {"pairs": packed_pairs}
    return Kernel(
        name=f"jmm_combine_m{tokens}",
        headers=("combine.cuh",),
        body="Combine<Facts>" if packed_pairs is None else "CombineFourColumns<Facts>",
        structs={"Facts": facts},
        pointers={
            "partials": added,
            "topk_ids": Pointer(topk_ids, "int32"),
            "expert_map": optional(expert_map, "int32"),
            **of_input,
            "out": result,
            **token_count(counted),
        },
        threads=128,
        shared_bytes=0,
        max_ctas=grid(-(-tokens * (len(columns_of) // vector) // 128), "the sum over a token's experts"),
        overlaps_predecessor=overlaps_predecessor,
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
