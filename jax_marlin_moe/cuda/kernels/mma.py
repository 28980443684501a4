"""The GEMM on mma.sync, for few token rows per expert: its tiles and their cost. Twin of csrc/cuda/gemm/mma."""

import dataclasses
import itertools
import math
from typing import TypeVar

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import Facts
from jax_marlin_moe.cuda.kernels.problem import LAUNCH_MICROSECONDS, UNIT, GemmShape, word_instructions
from jax_marlin_moe.layout import TILE_K

TOKEN_TILES = (8, 16, 24, 32)

_MOST_UNEVEN = 1.15  # the longest share of K over the mean one, of tiles worth considering

_K_BLOCK_INSTRUCTIONS = 50  # of a warp, beside its words
_MMA_INSTRUCTIONS = 1.8  # an MMA, as often as it keeps the warp
_CYCLES_PER_INSTRUCTION = 2.5  # of a warp alone
_K_BLOCK_LATENCY = 144
_ISSUE_RATE = 0.42  # of the four schedulers, when all warps compete
_BYTES_IN_FLIGHT = 24e3  # of a multiprocessor, below which the memory waits
_TILE_CYCLES = 829
_CLUSTER_CYCLES = 1000  # two barriers of a cluster, reads of another CTA's memory


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """`jmm::MmaTile` of csrc/cuda/gemm/mma/tile.cuh: tokens x (warps_n * units * 64) columns per cluster.

    Attributes:
        tokens: rows of a token tile.
        units: of 64 columns, of a warp.
        warps_n: side by side along the columns.
        warps_k: that share K.
        block_k: rows of K in one stage of the ring.
        stages: of the ring.
        ctas_per_sm: resident CTAs.
        cluster: CTAs that share K.
        has_slabs: whether results have the columns of each unit in the order of its scales, and rows of a second
            product must have them so, too.
        packed_pairs: whether four results in 64 bits are two pairs of columns (csrc/cuda/four_columns.cuh); None where
            there is no such epilogue.
        takes_tiles: whether CTAs may take work tiles from a list when they are done with others.
        waits_for_rows: whether scales of rows are read after the wait for the kernel that writes them.
    """

    tokens: int
    units: int
    warps_n: int
    warps_k: int
    block_k: int
    stages: int
    ctas_per_sm: int
    cluster: int = 1

    kernel = "GroupedGemm"
    cpp = "jmm::MmaTile"
    has_slabs = False
    packed_pairs = None
    takes_tiles = False
    waits_for_rows = False

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps_n * self.warps_k

    def facts(self, expert_rows: float | None, k: int) -> Facts:
        """As for `WgmmaTile`, whatever the rows of an expert."""
        return dataclasses.asdict(self)

    @property
    def shares_k(self) -> int:
        """Parts of K."""
        return self.warps_k * self.cluster

    def longest_share(self, shape: GemmShape) -> int:
        """K-blocks that the busiest warp has; the last one of K may be shorter."""
        k_blocks = -(-shape.k // self.block_k)
        return -(-k_blocks // self.shares_k)

    def weight_stage_bytes(self, shape: GemmShape) -> int:
        """One stage of one warp's ring: weights, scales, zero points."""
        scale_rows = max(1, self.block_k // shape.group_size)
        weights = self.block_k * self.units * UNIT * shape.bits // 8
        shared = scale_rows * self.units * UNIT * shape.group_bits // 8
        return weights + shared

    def token_stage_bytes(self, shape: GemmShape) -> int:
        """One stage of the tokens that warps_n warps share."""
        return self.tokens * self.block_k * (1 if shape.has_byte_rows else 2)

    def partials_bytes(self, shape: GemmShape) -> int:
        """The float32 sums that the warps exchange at the end of a tile."""
        if self.shares_k == 1 and (not shape.gated or self.units == 2):
            return 0
        return self.warps_k * self.warps_n * self.units * (UNIT // 16) * (self.tokens // 8) * 512

    def shared_bytes(self, shape: GemmShape) -> int:
        """Dynamic shared memory of a CTA."""
        rings = self.warps_n * self.weight_stage_bytes(shape) + self.token_stage_bytes(shape)
        return self.warps_k * self.stages * rings + self.partials_bytes(shape)

    def column_tiles(self, shape: GemmShape) -> int:
        """Tiles along the columns of the product."""
        return shape.n // (UNIT * self.warps_n * self.units)

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and its CTAs fit the multiprocessor."""
        if self.cluster > 1 and not get_architecture(capability).has_clusters:
            return False
        whole = shape.k >= self.shares_k * self.block_k and shape.n % (UNIT * self.warps_n * self.units) == 0
        paired = not shape.gated or (self.warps_n * self.units) % 2 == 0
        resident = get_architecture(capability).fits_shared_memory(self.shared_bytes(shape), self.ctas_per_sm)
        return whole and paired and resident and self.multiplies(shape, capability)

    def multiplies(self, shape: GemmShape, capability: int) -> bool:
        """Whether k-blocks are parts of groups or whole ones, of a product whose rows and weights the kernel takes."""
        del capability  # rows of 16 bits are multiplied everywhere
        grouped = shape.group_size % self.block_k == 0 or self.block_k % shape.group_size == 0
        return grouped and not shape.has_byte_rows

    def unevenness(self, shape: GemmShape) -> float:
        """The longest share of K over the mean one."""
        return self.longest_share(shape) * self.shares_k * self.block_k / shape.k

    def step_instructions(self, shape: GemmShape) -> float:
        """Of a warp in 16 rows of K and a unit's 64 columns: dequantisation and MMAs."""
        return 4 * (word_instructions(shape.code) + self.tokens // 8 * _MMA_INSTRUCTIONS)

    def predicted_microseconds(
        self, shape: GemmShape, expected_blocks: float, rows: float | None, capability: int, uniform: bool = False
    ) -> float:
        """Time of one product: its busiest slot's k-blocks, each as long as latency, issue or memory makes it.

        Rows that are padding cost as much as others, and how they are spread over experts does not matter.
        """
        card = get_architecture(capability)
        warps, token_tiles = self.warps_n * self.warps_k, self.tokens // 8
        tiles = max(1.0, expected_blocks * self.column_tiles(shape))
        ctas = tiles * self.cluster
        busy = min(self.ctas_per_sm, max(1.0, ctas / card.multiprocessors))  # CTAs at work on a multiprocessor
        k_blocks = self.longest_share(shape)
        columns = UNIT * self.warps_n * self.units
        steps = self.block_k / TILE_K

        closing = self.block_k / min(shape.group_size, 128) * self.units * 16 * token_tiles * 3
        instructions = steps * self.units * self.step_instructions(shape)
        instructions += _K_BLOCK_INSTRUCTIONS + 2 * steps * token_tiles + closing
        latency = instructions * _CYCLES_PER_INSTRUCTION + _K_BLOCK_LATENCY
        issue = busy * warps * instructions / (4 * _ISSUE_RATE)

        bytes_read = shape.k * columns * shape.bytes_per_weight / k_blocks
        in_flight = busy * warps * (self.stages - 1) * self.block_k * self.units * UNIT * shape.bits / 8
        memory = busy * bytes_read / card.bytes_per_cycle * max(1.0, _BYTES_IN_FLIGHT / in_flight)

        longest = max(latency, issue, memory)
        k_block = longest + 0.15 * (latency + issue + memory - longest)
        ends = _TILE_CYCLES * (1.0 if self.partials_bytes(shape) else 0.4) + _CLUSTER_CYCLES * (self.cluster > 1)
        rounds = math.ceil(ctas / (card.multiprocessors * self.ctas_per_sm))
        return LAUNCH_MICROSECONDS + rounds * (k_blocks * k_block + ends) / card.cycles_per_microsecond


_Kind = TypeVar("_Kind", bound=MmaTile)


def adds_in_order(tile: MmaTile) -> bool:
    """Whether the tile is one of those that give a row the same bits, however many rows there are: no shares of K."""
    return tile.shares_k == 1


def candidates(shape: GemmShape, tokens: int, capability: int) -> list[MmaTile]:
    """Every tile worth considering: it fits."""
    return candidates_of(MmaTile, (16, 32, 64, 128, 256), shape, tokens, capability)


def candidates_of(
    kind: type[_Kind], blocks_k: tuple[int, ...], shape: GemmShape, tokens: int, capability: int
) -> list[_Kind]:
    """Those of a kind, with such k-blocks."""
    card = get_architecture(capability)
    found: list[_Kind] = []
    if tokens not in TOKEN_TILES:
        return found
    clusters = (1, 2, 4) if tokens == TOKEN_TILES[0] and card.has_clusters else (1,)
    for units, warps_n, warps_k, block_k in itertools.product((1, 2), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 8), blocks_k):
        warps = warps_n * warps_k
        if warps > 8 or units * tokens > 48:  # more sums than a thread has registers
            continue
        # Two sets of sums, and what the main loop holds; as NVRTC 13 allots them for sm_90a.
        registers = min(255, 80 + 5 * units * tokens // 2)
        resident = min(12, 65536 // (registers * 32 * warps))
        # Stages and resident CTAs only add shared memory: where the smallest tile does not fit, none does.
        fitting = []
        for cluster in clusters:
            smallest = kind(tokens, units, warps_n, warps_k, block_k, 2, 1, cluster)
            if smallest.unevenness(shape) <= _MOST_UNEVEN and smallest.fits(shape, capability):
                fitting.append(cluster)
        for stages, ctas_per_sm, cluster in itertools.product((2, 3, 4, 5, 6), range(1, resident + 1), fitting):
            tile = kind(tokens, units, warps_n, warps_k, block_k, stages, ctas_per_sm, cluster)
            if card.fits_shared_memory(tile.shared_bytes(shape), ctas_per_sm):
                found.append(tile)
    return found
