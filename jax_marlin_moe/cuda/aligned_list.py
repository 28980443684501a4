"""Slots that are listed by expert before a product, or two, that read the list: kernels, token tiles and scratch."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_marlin_moe import reference
from jax_marlin_moe.cuda.facts import Pointer
from jax_marlin_moe.cuda.kernels.align import align_kernels
from jax_marlin_moe.cuda.kernels.token_tiles import TokenTiles, aligned_tiles
from jax_marlin_moe.cuda.program import Kernel


@dataclasses.dataclass(frozen=True)
class AlignedList:
    """A list that a call makes for its products.

    Attributes:
        kernels: which make it.
        scratch: buffers for it, in their order.
        tiles: how each product finds its token tiles.
    """

    kernels: tuple[Kernel, ...]
    scratch: tuple[jax.ShapeDtypeStruct, ...]
    tiles: tuple[TokenTiles, ...]


def aligned_list(
    num_slots: int,
    num_experts: int,
    routed_experts: int,
    rows: tuple[int, ...],
    capability: int,
    *,
    topk_ids: int,
    expert_map: int | None,
    scratch: int,
    takes_tiles: bool = False,
    ids_from_previous: bool = False,
    slots_of_token: int | None = None,
) -> AlignedList:
    """Lists the slots, with blocks of as many rows as the larger token tiles have.

    Args:
        num_slots: of the ids.
        num_experts: of the matrices.
        routed_experts: that ids may name.
        rows: of a token tile of each product that reads the list, one after the other; all divide the most.
        capability: of the card.
        topk_ids: the buffer of the ids.
        expert_map: of the map, or None.
        scratch: the first one of the scratch that is asked for.
        takes_tiles: whether their CTAs take work tiles as they come to them.
        ids_from_previous: whether the kernel before the list writes the ids.
        slots_of_token: where a call may have fewer tokens, and slots.

    Raises:
        ValueError: there are more slots or experts than the kernels count.
    """
    block, products = max(rows), len(rows)
    list_length = reference.padded_size(num_slots, routed_experts, block)
    listed = (scratch, scratch + 1, scratch + 2)
    kernels, counts = align_kernels(
        num_slots,
        routed_experts,
        block,
        capability,
        topk_ids=topk_ids,
        expert_map=expert_map,
        outputs=listed,
        counts=scratch + 3,
        ids_from_previous=ids_from_previous,
        slots_of_token=slots_of_token,
        products=products if takes_tiles else 0,
    )
    counters = scratch + 2 + len(counts)  # the last of them
    tiles = tuple(
        aligned_tiles(
            num_slots,
            num_experts,
            rows[product],
            block,
            list_length,
            listed,
            from_previous=product == 0,  # which lets the next one in only when it has waited for the list
            taken=Pointer(counters, "int32", written=True, offset=4 * product) if takes_tiles else None,
        )
        for product in range(products)
    )
    extents = (list_length,), (-(-list_length // block),), (1,)
    buffers = (*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in extents), *counts)
    return AlignedList(kernels, buffers, tiles)
