"""The ways in which a product finds the slots of its token tiles. Twin of csrc/cuda/token_tiles.cuh."""

import dataclasses

from jax_marlin_moe.cuda.facts import Facts, Pointer, optional

MOST_GROUPED_SLOTS = 512
MOST_SLOTS_OF_16_BITS = 1 << 15
TAKEN_BYTES = 16  # of shared memory, where CTAs take work tiles
_MOST_FIRST_ROWS = 48  # of token tiles that are multiplied in part; those of most rows come first


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


def aligned_tiles(
    num_slots: int,
    num_experts: int,
    rows: int,
    list_block: int,
    list_length: int,
    buffers: tuple[int, int, int],
    from_previous: bool,
    first_rows: int | None = None,
    taken: Pointer | None = None,
) -> TokenTiles:
    """Token tiles off an aligned list.

    `first_rows` is the buffer of `FindFirstRows`, where the list may have a slot more than once; `taken` is what the
    CTAs of a wgmma kernel count work tiles in, which they take as they come to them: zero before the call.
    """
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "rows": rows,
        "list_block": list_block,
        "list_length": list_length,
        "from_previous_kernel": from_previous,
        "may_repeat": first_rows is not None,
        "taken": taken is not None,
    }
    sorted_token_ids, expert_ids, num_tokens_post_padded = (Pointer(buffer, "int32") for buffer in buffers)
    pointers = {
        "sorted_token_ids": sorted_token_ids,
        "expert_ids": expert_ids,
        "num_tokens_post_padded": num_tokens_post_padded,
        "first_rows": optional(first_rows, "int32"),
        "taken": taken,
    }
    most, shared_bytes = -(-list_length // rows), 0 if taken is None else TAKEN_BYTES
    return TokenTiles("AlignedTiles", facts, pointers, most, shared_bytes)


def direct_tiles(
    num_slots: int, num_experts: int, routed_experts: int, topk_ids: int, expert_map: int | None, from_previous: bool
) -> TokenTiles:
    """Every slot is a token tile of one row."""
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "routed_experts": routed_experts,
        "from_previous_kernel": from_previous,
        "mapped": expert_map is not None,
    }
    pointers = {"topk_ids": Pointer(topk_ids, "int32"), "expert_map": optional(expert_map, "int32")}
    return TokenTiles("DirectTiles", facts, pointers, num_slots)


def grouped_tiles(
    num_slots: int,
    num_experts: int,
    routed_experts: int,
    rows: int,
    topk_ids: int,
    expert_map: int | None,
    from_previous: bool = False,
    shared_slots: int = 0,
) -> TokenTiles:
    """Every CTA groups the slots by expert for itself: at most `MOST_GROUPED_SLOTS`, and those of shared experts."""
    facts: Facts = {
        "slots": num_slots,
        "experts": num_experts,
        "routed_experts": routed_experts,
        "from_previous_kernel": from_previous,
        "shared_slots": shared_slots,
        "rows": rows,
        "mapped": expert_map is not None,
    }
    pointers = {"topk_ids": Pointer(topk_ids, "int32"), "expert_map": optional(expert_map, "int32")}
    most, fours = min(num_slots, num_experts + num_slots // rows), -(-num_slots // 128)
    return TokenTiles(
        "GroupedTiles",
        facts,
        pointers,
        most,
        shared_bytes=-(-most // 2) * 16 + -(-num_slots // 8) * 16,
        scratch_bytes=-(-(num_experts * fours * 4 + 128 + num_experts * 2) // 16) * 16,
    )


def dispatch_tiles(
    num_rows: int, num_result_rows: int, num_dispatches: int, num_experts: int, rows: int, buffers: tuple[int, int, int]
) -> TokenTiles:
    """Every dispatch has token tiles of its own; buffers: the table, and what `ResolveDispatches` makes of it."""
    facts: Facts = {
        "dispatches": num_dispatches,
        "experts": num_experts,
        "source_rows": num_rows,
        "result_rows": num_result_rows,
        "rows": rows,
    }
    dispatches, tile_ends, owners = (Pointer(buffer, "int32") for buffer in buffers)
    pointers: dict[str, Pointer | None] = {"dispatches": dispatches, "tile_ends": tile_ends, "owners": owners}
    return TokenTiles("DispatchTiles", facts, pointers, num_dispatches * -(-min(num_rows, num_result_rows) // rows))


def one_expert_tiles(num_rows: int, num_experts: int, rows: int, expert: int | None) -> TokenTiles:
    """All rows are of one expert: the first, or the one that a buffer names."""
    facts: Facts = {"slots": num_rows, "experts": num_experts, "rows": rows, "named": expert is not None}
    return TokenTiles("OneExpertTiles", facts, {"named": optional(expert, "int32")}, -(-num_rows // rows))


def ragged_tiles(
    num_rows: int, num_experts: int, num_groups: int, rows: int, group_sizes: int, group_offset: int | None
) -> TokenTiles:
    """Rows sorted by group; every CTA finds from the sizes where the experts' begin and end."""
    facts: Facts = {
        "slots": num_rows,
        "experts": num_experts,
        "groups": num_groups,
        "rows": rows,
        "offset": group_offset is not None,
    }
    pointers = {"group_sizes": Pointer(group_sizes, "int32"), "group_offset": optional(group_offset, "int32")}
    most = min(num_rows, num_experts + num_rows // rows)
    last_of = num_experts if rows >= _MOST_FIRST_ROWS else 1
    table = 4 * (3 * num_experts + 4) + -(-last_of // 2) * 4
    return TokenTiles("RaggedTiles", facts, pointers, most, shared_bytes=-(-table // 16) * 16)
