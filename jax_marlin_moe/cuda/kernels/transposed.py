"""The product with the transposed matrices on mma.sync: its tiles. Twin of csrc/cuda/gemm/transposed."""

import dataclasses

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import Facts
from jax_marlin_moe.cuda.kernels.problem import TILE_K, UNIT, GemmShape

HEADER = "gemm/transposed/kernel.cuh"
TOKEN_TILES = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class TransposedTile:
    """`jmm::TransposedTile` of csrc/cuda/gemm/transposed/kernel.cuh: tokens x (warps * steps * 16) rows of W.

    Attributes:
        tokens: rows of a token tile.
        warps: of a CTA.
        steps: of 16 rows of W, of a warp.
        stages: of the ring, each with 64 columns of W.
    """

    tokens: int
    warps: int
    steps: int
    stages: int

    kernel = "TransposedGemm"
    cpp = "jmm::TransposedTile"
    cluster = 1
    ctas_per_sm = 0  # a CTA for each work tile

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    @property
    def facts(self) -> Facts:
        """What the kernel is compiled with."""
        return dataclasses.asdict(self)

    @property
    def rows(self) -> int:
        """Rows of W of a work tile."""
        return self.warps * self.steps * TILE_K

    def shared_bytes(self, shape: GemmShape) -> int:
        """Dynamic shared memory of a CTA: the ring, and the slots and factors of the token tile."""
        groups = max(1, self.rows // shape.group_size)
        weights = self.rows * UNIT * shape.bits // 8 + groups * UNIT * shape.group_bits // 8
        return self.stages * (-(-weights // 128) * 128 + self.tokens * 128) + self.tokens * 8

    def column_tiles(self, shape: GemmShape) -> int:
        """Work tiles along the rows of W; the last one may be shorter."""
        return -(-shape.k // self.rows)

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and a CTA fits the multiprocessor."""
        grouped = shape.group_size >= shape.k or shape.group_size % self.rows == 0 or self.rows % shape.group_size == 0
        return grouped and get_architecture(capability).fits_shared_memory(self.shared_bytes(shape), 1)


def choose(shape: GemmShape, tokens: int, capability: int) -> TransposedTile:
    """The largest ring that leaves room for a second CTA; raises ValueError where there is none.

    Token tiles of many rows have more sums a step, and as many warps need fewer of W's rows.
    """
    for steps, stages in ((2, 4), (1, 4), (1, 3), (1, 2)):
        if steps > 1 and (tokens > 32 or shape.k < 4 * steps * TILE_K):
            continue
        tile = TransposedTile(tokens, 4, steps, stages)
        if tile.fits(shape, capability) and get_architecture(capability).fits_shared_memory(
            tile.shared_bytes(shape), 2
        ):
            return tile
    raise ValueError(f"no tile of {tokens} rows supports {shape} transposed on compute capability {capability}")
