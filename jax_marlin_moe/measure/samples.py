"""What the times of schemes say: which of them go on, and which one wins. Functions of samples alone."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from jax_marlin_moe.cuda.scheme import BlockScheme, Tile

# Tiles of either product that are tried together with as many of the other.
_PAIRED_TILES = 3


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A scheme and its device times in microseconds."""

    scheme: BlockScheme
    block_us: float
    gate_up_us: float
    down_us: float


def fastest_pairs(measured: Sequence[Measurement]) -> list[BlockScheme]:
    """The fastest tiles of either product in pairs, of a group that has the same token tile.

    What is fastest alone need not be in a block: how a product ends decides how the next one begins.
    """
    (routing,) = {m.scheme.routing for m in measured}
    tiles = itertools.product(_fastest_tiles(measured, "gate_up"), _fastest_tiles(measured, "down"))
    return [BlockScheme(routing, *pair) for pair in tiles]


def _fastest_tiles(measured: Sequence[Measurement], product: str) -> list[Tile]:
    """The tiles of "gate_up" or "down" that took the least time alone, best first."""
    ranked = sorted(measured, key=lambda m: getattr(m, f"{product}_us"))
    return list(dict.fromkeys(getattr(m.scheme, product) for m in ranked))[:_PAIRED_TILES]


def fastest_block(measured: Sequence[Measurement]) -> BlockScheme:
    """The scheme whose block took the least time."""
    return min(measured, key=lambda m: m.block_us).scheme


def with_and_without_overlap(schemes: Iterable[BlockScheme]) -> list[BlockScheme]:
    """Each scheme with and without an overlap of its products, once."""
    return list(dict.fromkeys(dataclasses.replace(s, overlaps=overlaps) for s in schemes for overlaps in (True, False)))


def rivals(best: BlockScheme) -> list[BlockScheme]:
    """What is left to compare the best scheme with: a kernel that aligns, where each CTA groups the slots so far."""
    return [dataclasses.replace(best, routing="aligned")] if best.routing == "grouped" else []


def winner(block_us: Mapping[BlockScheme, float]) -> BlockScheme:
    """The scheme of least time; the first of equals."""
    return min(block_us, key=block_us.__getitem__)
