"""How a whole expert block is cut on CUDA."""

import dataclasses
from typing import Literal

from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile

SlotRouting = Literal["direct", "grouped", "aligned"]  # of BlockScheme

Tile = MmaTile | WgmmaTile

# By the names that architectures and tables have for them.
TILES: dict[str, type[MmaTile] | type[WgmmaTile]] = {"mma": MmaTile, "wgmma": WgmmaTile}


@dataclasses.dataclass(frozen=True)
class BlockScheme:
    """How a whole expert block is cut.

    Attributes:
        routing: what finds the slots of a token tile. "direct": each slot is a token tile of its own, read from
            topk_ids. "grouped": every CTA groups the slots by expert for itself, where slots are few and the tiles
            leave room for them; "aligned" otherwise. "aligned": a kernel before the products.
        gate_up: tile of the first product; `tokens` is the most slots of a token tile.
        down: tile of the second; the same `tokens`.
        overlaps: whether the second product's CTAs start while the first one's finish, and fetch weights meanwhile.
            They start on the multiprocessors that are free first: more of them than their share where there is room,
            fewer where the shared memory that the first ones free is fragmented.
    """

    routing: SlotRouting
    gate_up: Tile
    down: Tile
    overlaps: bool = dataclasses.field(default=True, kw_only=True)

    def fits(self, first: GemmShape, second: GemmShape, capability: int) -> bool:
        """Whether both tiles fit the products, and each other."""
        alike = self.gate_up.tokens == self.down.tokens
        return alike and self.gate_up.fits(first, capability) and self.down.fits(second, capability)
