"""The products with the transposed matrices: tiles. Twin of csrc/cuda/gemm/transposed and wgmma/transposed.cuh."""

import dataclasses
import itertools

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import Facts
from jax_marlin_moe.cuda.kernels.problem import UNIT, GemmShape
from jax_marlin_moe.cuda.kernels.wgmma import OTHER_CONSUMER_REGISTERS, WgmmaTile
from jax_marlin_moe.layout import TILE_K

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

    header = "gemm/transposed/kernel.cuh"
    kernel = "TransposedGemm"
    cpp = "jmm::TransposedTile"
    cluster = 1
    ctas_per_sm = 0  # a CTA for each work tile

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    def facts(self, expert_rows: float | None, k: int) -> Facts:
        """As for `WgmmaTile`, whatever the rows of an expert."""
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


@dataclasses.dataclass(frozen=True)
class WgmmaTransposedTile(WgmmaTile):
    """A tile of the wgmma kernel the other way round: tokens x (warpgroups_n * sub_tiles * 64) rows of W.

    Its k-blocks are of N. Weights are always scaled, since scales vary along N.
    """

    header = "gemm/wgmma/kernel.cuh"

    @property
    def rows(self) -> int:
        """Rows of W of a work tile."""
        return UNIT * self.warpgroups_n * self.sub_tiles

    def stage_bytes(self, shape: GemmShape) -> int:
        """Tokens, weights, scales and zero points of one stage."""
        groups = 1 if shape.group_size >= shape.k else max(1, self.rows // shape.group_size)
        bits = self.rows * shape.bits + groups * shape.group_bits
        return self.block_k * self.tokens * 2 + self.block_k * bits // 8

    def column_tiles(self, shape: GemmShape) -> int:
        """Work tiles along the rows of W."""
        return shape.k // self.rows

    def registers(self, shape: GemmShape) -> int:
        """Of a thread that multiplies: sums, weights being made and in use, a unit's scales, the rest."""
        shares = shape.group_size >= self.sub_tiles * TILE_K
        scaling = 8 * (1 + (shape.scale != shape.dtype) + 2 * (shape.zeros is not None) + (shape.zeros == "float"))
        sums = self.sub_tiles * self.tokens // 2
        scaling *= 1 if shares else self.sub_tiles
        return sums + 8 * self.sub_tiles + scaling + OTHER_CONSUMER_REGISTERS

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and its CTAs fit the multiprocessor."""
        whole = shape.k % self.rows == 0 and shape.n % self.block_k == 0
        grouped = shape.group_size >= shape.k or shape.group_size % self.rows == 0 or self.rows % shape.group_size == 0
        card = get_architecture(capability)
        return (
            "wgmma" in card.kernels
            and whole
            and grouped
            and self.scales_weights
            and self.warpgroups_k == 1
            and card.fits_shared_memory(self.shared_bytes(shape), self.ctas_per_sm)
            and self.registers(shape) <= self.consumer_registers
        )


# By the most rows of a token tile: (warpgroups_n, sub_tiles, block_k, ctas_per_sm), the fastest first. Measured on an
# H200 with Qwen3-30B's first matrix, int4 and nvfp4: larger tiles of W where sums leave room for them.
_WGMMA_CUTS = {
    16: ((2, 2, 64, 2), (2, 1, 64, 2), (1, 1, 64, 2)),
    64: ((2, 2, 128, 1), (2, 2, 64, 1), (2, 1, 128, 1), (2, 1, 64, 1), (1, 1, 64, 1)),
    128: ((2, 2, 64, 1), (2, 1, 64, 1), (1, 1, 64, 1)),
    256: ((2, 1, 64, 1), (1, 1, 64, 1)),
    288: ((2, 1, 64, 1),),  # registers may not suffice: then it is 256
}
_WGMMA_TOKENS = (16, 32, 64, 128, 256, 288)


def choose(shape: GemmShape, rows: float, capability: int) -> TransposedTile | WgmmaTransposedTile:
    """The tile for that many rows of an expert, with as many stages as there is room for.

    Raises:
        ValueError: none fits.
    """
    likely = rows + 2 * rows**0.5
    if "wgmma" in get_architecture(capability).kernels:
        fitting = next((t for t in _WGMMA_TOKENS if likely <= t), _WGMMA_TOKENS[-1])
        for tokens in (288, 256) if fitting == 288 else (fitting,):
            cuts = next(cuts for most, cuts in _WGMMA_CUTS.items() if tokens <= most)
            for (warpgroups, sub_tiles, block_k, ctas), stages in itertools.product(cuts, range(8, 2, -1)):
                tile = WgmmaTransposedTile(tokens, sub_tiles, warpgroups, 1, block_k, stages, ctas, True)
                if tile.fits(shape, capability):
                    return tile
    tokens = next((t for t in TOKEN_TILES if rows <= t), TOKEN_TILES[-1])
    for steps, stages in ((2, 4), (1, 4), (1, 3), (1, 2)):
        if steps > 1 and (tokens > 32 or shape.k < 4 * steps * TILE_K):
            continue
        plain = TransposedTile(tokens, 4, steps, stages)
        if plain.fits(shape, capability) and get_architecture(capability).fits_shared_memory(
            plain.shared_bytes(shape), 2
        ):
            return plain
    raise ValueError(f"no tile of {tokens} rows supports {shape} transposed on compute capability {capability}")
