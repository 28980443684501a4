"""Tile choice: how a grouped GEMM is cut for an architecture. The cost model and its limits, in one place."""

import dataclasses
import math

# Shared memory of a multiprocessor and the most that one block may have, in bytes, by compute capability
# (CUDA C++ programming guide, technical specifications). 1 KB of each block is the system's.
_SHARED_BYTES = {75: (64, 64), 80: (164, 163), 86: (100, 99), 87: (164, 163), 89: (100, 99), 90: (228, 227)}
_SHARED_BYTES |= {100: (228, 227), 103: (228, 227), 110: (228, 227), 120: (100, 99), 121: (100, 99)}

_UNIT = 64  # columns
_TILE_K = 16
TOKEN_TILES = (8, 16, 24, 32)


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """One grouped product, as the kernel is compiled for it.

    Attributes:
        k: contraction extent.
        n: columns of the packed matrix, gate and up counted both.
        num_experts: E.
        group_size: rows that share a scale.
        gated: whether gate and up columns are combined in the epilogue.
        has_zeros: whether groups have zero points of their own.
    """

    k: int
    n: int
    num_experts: int
    group_size: int
    gated: bool
    has_zeros: bool


@dataclasses.dataclass(frozen=True)
class Tile:
    """`jmm::Tile` of csrc/cuda/gemm_mma.cuh: tokens x (warps_n * units * 64) columns for one block of threads."""

    tokens: int
    units: int
    warps_n: int
    warps_k: int
    chunk_k: int
    stages: int
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_k

    @property
    def cpp(self) -> str:
        """The C++ spelling."""
        fields = (self.tokens, self.units, self.warps_n, self.warps_k, self.chunk_k, self.stages, self.blocks_per_sm)
        return f"jmm::Tile<{', '.join(map(str, fields))}>"

    def weight_stage_bytes(self, shape: GemmShape) -> int:
        """One stage of one warp's ring: weights, scales, zero points."""
        scale_rows = max(1, self.chunk_k // shape.group_size)
        weights = self.chunk_k // _TILE_K * self.units * 512
        scales = scale_rows * self.units * _UNIT * 2
        zeros = scale_rows * self.units * _UNIT // 2 if shape.has_zeros else 0
        return weights + scales + zeros

    def token_stage_bytes(self) -> int:
        """One stage of the tokens that warps_n warps share."""
        return self.tokens * self.chunk_k * 2

    def partials_bytes(self, shape: GemmShape) -> int:
        """The float32 sums that the warps exchange at the end of a tile."""
        if self.warps_k == 1 and (not shape.gated or self.units == 2):
            return 0
        return self.warps_k * self.warps_n * self.units * (_UNIT // 16) * (self.tokens // 8) * 512

    def shared_bytes(self, shape: GemmShape) -> int:
        """Dynamic shared memory of a block."""
        rings = self.warps_n * self.weight_stage_bytes(shape) + self.token_stage_bytes()
        return self.warps_k * self.stages * rings + self.partials_bytes(shape)

    def column_tiles(self, shape: GemmShape) -> int:
        """Tiles along the columns of the product."""
        return shape.n // (_UNIT * self.warps_n * self.units)

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and its blocks fit the multiprocessor."""
        per_sm, per_block = shared_memory(capability)
        whole = shape.k % (self.warps_k * self.chunk_k) == 0 and shape.n % (_UNIT * self.warps_n * self.units) == 0
        grouped = shape.group_size % self.chunk_k == 0 or (
            self.chunk_k % shape.group_size == 0 and (shape.k // self.warps_k) % shape.group_size == 0
        )
        paired = not shape.gated or (self.warps_n * self.units) % 2 == 0
        size = self.shared_bytes(shape)
        return whole and grouped and paired and size <= per_block and (size + 1024) * self.blocks_per_sm <= per_sm


def shared_memory(capability: int) -> tuple[int, int]:
    """Bytes of shared memory (of a multiprocessor, of a block)."""
    known = max((c for c in _SHARED_BYTES if c <= capability), default=75)
    per_sm, per_block = _SHARED_BYTES[known]
    return per_sm * 1024, per_block * 1024


def choose_token_tile(num_slots: int, num_experts: int) -> int:
    """The smallest block that holds nearly every expert's rows under uniform routing."""
    mean = num_slots / num_experts
    rows = mean + 2 * math.sqrt(mean)
    return next((t for t in TOKEN_TILES if rows <= t), TOKEN_TILES[-1])


def choose_tile(shape: GemmShape, tokens: int, expected_blocks: float, capability: int) -> Tile:
    """The tile for a product whose blocks of tokens number about `expected_blocks`."""
    best: tuple[float, Tile] | None = None
    for units in (2, 1):
        if units * (tokens // 8) > 6:
            continue  # the two sets of accumulators would spill
        for warps_n in (1, 2):
            for warps_k in (1, 2, 3, 4, 5, 6, 8):
                if not 1 <= warps_n * warps_k <= 8:
                    continue
                tile = _largest_ring(shape, tokens, units, warps_n, warps_k, capability)
                if tile is None:
                    continue
                cost = _cost(shape, tile, expected_blocks)
                if best is None or cost < best[0]:
                    best = (cost, tile)
    if best is None:
        raise ValueError(f"no kernel tile serves {shape} with {tokens}-row blocks on compute capability {capability}")
    return best[1]


def _largest_ring(
    shape: GemmShape, tokens: int, units: int, warps_n: int, warps_k: int, capability: int
) -> Tile | None:
    """The deepest ring, in the most resident blocks, that fits; None if none does."""
    registers = 96 + 32 * units * (tokens // 8)  # measured: about 122 for 8 tokens x 2 units
    warps = warps_n * warps_k
    resident = max(1, min(16 // warps, 65536 // (min(registers, 255) * 32 * warps)))
    for blocks_per_sm in range(resident, 0, -1):
        for stages in (6, 5, 4, 3, 2):
            for chunk_k in (64, 32, 16):
                tile = Tile(tokens, units, warps_n, warps_k, chunk_k, stages, blocks_per_sm)
                if tile.fits(shape, capability) and (stages >= 3 or blocks_per_sm == 1):
                    return tile
    return None


def _cost(shape: GemmShape, tile: Tile, expected_blocks: float) -> float:
    """Relative time: the stream of weights, stretched by idle slots, and a fixed price for each tile's ends."""
    multiprocessors = 132
    tiles = max(1.0, expected_blocks * tile.column_tiles(shape))
    slots = multiprocessors * tile.blocks_per_sm
    waves = math.ceil(tiles / slots)
    # Bytes in flight while every slot works; 40 KB a multiprocessor keep the memory busy.
    in_flight = tile.blocks_per_sm * tile.warps_n * tile.warps_k * (tile.stages - 1) * tile.chunk_k * tile.units * 32
    starved = max(1.0, 40 * 1024 / in_flight / min(1.0, tiles / multiprocessors))
    steps = waves * (shape.k / tile.warps_k / tile.chunk_k + 2)  # 2: the price of a tile's ends, in chunks
    work = steps * tile.chunk_k * tile.units * tile.warps_n * tile.warps_k * slots
    return work * starved * (1 + tile.tokens / 64 / tile.units)
