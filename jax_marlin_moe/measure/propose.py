"""Which schemes of a block are worth timing: a function of shapes and architecture, with neither card nor clock."""

from operator import methodcaller

from jax_marlin_moe.cuda.choose import block_sizes, candidates, expected_blocks
from jax_marlin_moe.cuda.kernels.mma import TOKEN_TILES
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.token_tiles import MOST_GROUPED_SLOTS
from jax_marlin_moe.cuda.scheme import BlockScheme, SlotRouting, kernels_of

_MOST_DIRECT_SLOTS = 32  # beyond one token: with more of them, slots of one expert are worth a common token tile


def propose(
    first: GemmShape,
    second: GemmShape,
    *,
    tokens: int,
    top_k: int,
    experts_hit: float,
    capability: int,
    tiles_per_product: int,
    shared: int = 0,
) -> list[list[BlockScheme]]:
    """Schemes to time, in groups of the same way to find slots and the same token tile.

    In each group the tiles of either product are those of least predicted time, so the first scheme is what the cost
    model would take.

    Args:
        first: the first product.
        second: the second one.
        tokens: rows of x.
        top_k: experts per token.
        experts_hit: distinct experts of the routings that are timed, on average.
        capability: compute capability times ten.
        tiles_per_product: at most that many tiles of each product in a group.
        shared: experts that every token visits beside those, behind the products' own.

    Returns:
        The groups that have tiles for both products; none where no tile fits.
    """
    slots, experts = tokens * (top_k + shared), first.num_experts + shared
    groups = []
    for routing, size in _token_tiles(tokens, top_k, shared, first, capability):
        blocks = slots if routing == "direct" else max(experts_hit, expected_blocks(slots, experts, experts, size))
        ranked = []
        for shape in (first, second):
            cost = methodcaller("predicted_microseconds", shape, blocks, slots / blocks, capability, uniform=True)
            ranked.append(sorted(candidates(shape, size, capability), key=cost)[:tiles_per_product])
        if all(ranked):
            count = max(map(len, ranked))
            groups.append([BlockScheme(routing, *(tiles[i % len(tiles)] for tiles in ranked)) for i in range(count)])
    return groups


def _token_tiles(
    tokens: int, top_k: int, shared: int, shape: GemmShape, capability: int
) -> list[tuple[SlotRouting, int]]:
    """Ways to find slots, each with the rows of a token tile."""
    slots = tokens * (top_k + shared)
    direct: tuple[SlotRouting, int] = ("direct", TOKEN_TILES[0])
    if tokens == 1:
        return [direct]
    routing: SlotRouting = "grouped" if tokens * top_k <= MOST_GROUPED_SLOTS else "aligned"
    sizes = set(block_sizes(slots, shape.num_experts + shared, shape, capability))
    if shared and "mma" in kernels_of(shape, capability):  # their rows are many where others have few
        sizes |= {size for size in TOKEN_TILES if max(sizes) < size <= tokens and size <= 2 * max(sizes)}
    found = [(routing, size) for size in sorted(sizes)]
    return [*found, direct] if slots <= _MOST_DIRECT_SLOTS else found
