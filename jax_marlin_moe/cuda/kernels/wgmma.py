"""The GEMM on Hopper's wgmma, for many rows per expert: its tiles and their cost. Twin of csrc/cuda/gemm/wgmma."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import Facts
from jax_marlin_moe.cuda.kernels.problem import LAUNCH_MICROSECONDS, UNIT, GemmShape, word_instructions
from jax_marlin_moe.layout import TILE_K

TOKEN_TILES = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160)

_MOST_CONSUMER_REGISTERS = 240  # of a thread that multiplies
OTHER_CONSUMER_REGISTERS = 40  # of these, beside sums and weights
_MOST_COLUMNS = 256  # of one instruction
_LEAST_K_OF_MORE_COUNTS = 1024  # of `likely_row_counts`

# Fitted to 91 products of four blocks with 128 to 16384 tokens on an H200 (benchmarks/NOTES.md, "Tiles for many rows,
# and one FMA for a weight").
_TENSOR_RATE = 1.05  # of 2048 multiply-adds a cycle, at the cycles of the card's table
_ISSUE_RATE = 0.74
_LESSER_SHARE = 0.86  # of the shorter of products and instructions: they hardly hide each other
_MEMORY_SHARE = 0.11  # of the shorter of these and memory
_K_BLOCK_INSTRUCTIONS = 133  # of a scheduler: barriers, descriptors, copies
_K_BLOCK_CYCLES = 117  # between k-blocks
_TILE_CYCLES = 1740  # and _STORE_CYCLES for each sum of a thread
_STORE_CYCLES = 19
_LAST_ROUND = 0.04  # of a tile, which CTAs take unevenly
_LOST_ROWS = 82  # in whose time a weight is dequantised, in tiles with more rows than TOKEN_TILES, at the full rate


@dataclasses.dataclass(frozen=True)
class WgmmaTile:
    """`jmm::WgmmaTile` of csrc/cuda/gemm/wgmma/tile.cuh: tokens x (warpgroups_n * sub_tiles * 64 packed columns).

    Attributes:
        tokens: rows of a token tile, a column count of one instruction, or of two beyond 256.
        sub_tiles: 64-row products of a warpgroup.
        warpgroups_n: that multiply, side by side along the columns.
        warpgroups_k: that share K; one warpgroup more copies.
        block_k: rows of K in one stage of the ring.
        stages: stages of the ring, a multiple of warpgroups_k: two or more for each of them.
        ctas_per_sm: resident CTAs.
        scales_weights: whether the 16-bit weights are scaled, rather than the sums of each group.
    """

    tokens: int
    sub_tiles: int
    warpgroups_n: int
    warpgroups_k: int
    block_k: int
    stages: int
    ctas_per_sm: int
    scales_weights: bool

    kernel = "WgmmaGroupedGemm"
    cpp = "jmm::WgmmaTile"
    cluster = 1
    has_slabs = False
    waits_for_rows = True

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.warpgroups_n * self.warpgroups_k + 1)

    @property
    def packed_pairs(self) -> bool:
        """As for `MmaTile`: a warp with one sub-tile has two columns of a row in a lane."""
        return self.sub_tiles == 1

    @property
    def takes_tiles(self) -> bool:
        """As for `MmaTile`: where token tiles have many rows, and their number differs from tile to tile."""
        return self.tokens > 32

    @property
    def producer_registers(self) -> int:
        """Registers of a thread that copies."""
        if self.tokens == 160:  # whose sums leave no more, and no fewer suffice for larger ones
            return 64
        return 56 if self.tokens <= 32 else 80

    @property
    def consumer_registers(self) -> int:
        """Registers of a thread that multiplies."""
        return consumer_registers(self.warpgroups_n * self.warpgroups_k, self.ctas_per_sm, self.producer_registers)

    def facts(self, expert_rows: float | None, k: int) -> Facts:
        """What the kernel is compiled with, for rows of `k` columns, `expert_rows` of an expert if that is known."""
        counts = row_counts(self.tokens)
        if expert_rows:
            counts += likely_row_counts(self.tokens, expert_rows, k)
        return dataclasses.asdict(self) | {
            "producer_registers": self.producer_registers,
            "consumer_registers": self.consumer_registers,
            "other_registers": OTHER_CONSUMER_REGISTERS,
            "row_counts": row_counts_fact(counts),
        }

    def stage_bytes(self, shape: GemmShape) -> int:
        """Tokens, weights, scales and zero points of one stage."""
        columns = UNIT * self.warpgroups_n * self.sub_tiles
        scale_rows = max(1, self.block_k // shape.group_size)
        shared = scale_rows * columns * shape.group_bits // 8
        return self.tokens * self.block_k * 2 + self.block_k * columns * shape.bits // 8 + shared

    def shared_bytes(self, shape: GemmShape) -> int:
        """Dynamic shared memory of a CTA: the ring, two records of work tiles, shares of sums, barriers."""
        records = 2
        partials = (self.warpgroups_k - 1) * self.warpgroups_n * self.sub_tiles * self.tokens // 2 * 128 * 4
        ring = self.stages * self.stage_bytes(shape)
        size = ring + records * (6 * 4 + self.tokens * 8) + partials + 8 * 2 * (self.stages + records)
        return -(-size // 16) * 16

    def column_tiles(self, shape: GemmShape) -> int:
        """Tiles along the columns of the product."""
        return shape.n // (UNIT * self.warpgroups_n * self.sub_tiles)

    def registers(self, shape: GemmShape) -> int:
        """Of a thread that multiplies: sums, weights being made and in use, the rest."""
        two_sums = not self.scales_weights and shape.group_size < shape.k
        sums = self.sub_tiles * self.tokens // 2 * (2 if two_sums else 1)
        return sums + 8 * self.sub_tiles + OTHER_CONSUMER_REGISTERS

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and its CTAs fit the multiprocessor."""
        exact = _weights_can_be_scaled if self.scales_weights else _sums_can_be_scaled
        if "wgmma" not in get_architecture(capability).kernels or shape.has_byte_rows or not exact(shape):
            return False
        k_blocks = -(-shape.k // self.block_k)  # the last one may repeat rows of the one before
        whole = shape.k >= self.block_k and k_blocks >= self.warpgroups_k and self.stages % self.warpgroups_k == 0
        # A warpgroup waits for its next stage before it releases the one that it reads: of one stage, for ever.
        whole = whole and self.stages >= 2 * self.warpgroups_k
        whole = whole and shape.n % (UNIT * self.warpgroups_n * self.sub_tiles) == 0
        part_of_group = shape.group_size % self.block_k == 0 or shape.group_size >= shape.k
        whole_groups = self.block_k % shape.group_size == 0 and shape.k % shape.group_size == 0
        paired = not shape.gated or self.sub_tiles % 2 == 0
        return (
            whole
            and (part_of_group or whole_groups)
            and paired
            and get_architecture(capability).fits_shared_memory(self.shared_bytes(shape), self.ctas_per_sm)
            and self.registers(shape) <= self.consumer_registers
        )

    def predicted_microseconds(
        self, shape: GemmShape, expected_blocks: float, rows: float | None, capability: int, uniform: bool = False
    ) -> float:
        """Time of one product.

        Args:
            shape: the product.
            expected_blocks: token tiles that have work.
            rows: of such a tile that are not padding, on average; None for all.
            capability: compute capability times ten.
            uniform: whether they are those of a block under uniform routing, whose numbers for each expert are known
                to vary about their mean.
        """
        card = get_architecture(capability)
        tiles = max(1.0, expected_blocks * self.column_tiles(shape))
        busy = min(self.ctas_per_sm, max(1.0, tiles / card.multiprocessors))
        shares = self._multiplied(shape, expected_blocks, rows, uniform)
        rounds = tiles / (card.multiprocessors * self.ctas_per_sm)
        rounds = rounds + _LAST_ROUND if rounds > 1 else 1.0
        cycles = rounds * sum(share * self._cycles(shape, multiplied, busy, capability) for multiplied, share in shares)
        return LAUNCH_MICROSECONDS + cycles / card.cycles_per_microsecond

    def _multiplied(
        self, shape: GemmShape, expected_blocks: float, rows: float | None, uniform: bool
    ) -> Sequence[tuple[float, float]]:
        """Numbers of rows that token tiles multiply, each with the share of the tiles that multiply so many."""
        if rows is None:
            return [(self.tokens, 1.0)]
        expert_rows = rows * expected_blocks / shape.num_experts
        if uniform and expert_rows >= 1 and self.tokens <= _MOST_COLUMNS:
            return multiplied_rows(self.tokens, round(expert_rows, 2), shape.k)
        # An expert's last tile multiplies half of the step between counts too many, on average: a quarter of a tile is
        # the step, and an eighth where a tile has two instructions.
        spare = self.tokens / (8 if self.tokens <= _MOST_COLUMNS else 16)
        return [(min(self.tokens, rows + spare * min(1.0, shape.num_experts / expected_blocks)), 1.0)]

    def _cycles(self, shape: GemmShape, multiplied: float, busy: float, capability: int) -> float:
        """Cycles of a work tile that multiplies so many rows, with `busy` CTAs at work on its multiprocessor."""
        card = get_architecture(capability)
        units = self.warpgroups_n * self.sub_tiles  # of 64 columns
        tensor = UNIT * units * multiplied * self.block_k / 2048 / _TENSOR_RATE
        # A unit of 16 rows of K is a sub-tile for each of the four schedulers.
        word = word_instructions(shape.code) + 4  # and an FMA for each pair
        groups = self.block_k / min(shape.group_size, 128)
        if self.scales_weights:
            if not _fuses_zero(shape):
                word += 4 if shape.scale in (shape.dtype, "e4m3", "e8m0") else 8
            instructions = self.block_k / TILE_K * units * word + units * 8 * groups
        else:
            instructions = self.block_k / TILE_K * units * word + units * multiplied / 2 * groups
        issue = (instructions + _K_BLOCK_INSTRUCTIONS) / _ISSUE_RATE
        if busy * self.warpgroups_n * self.warpgroups_k < 3:
            issue *= 1.15  # too few warps to fill each other's gaps
        memory = self.block_k * units * UNIT * shape.bytes_per_weight / card.bytes_per_cycle

        computed, between = max(tensor, issue) + _LESSER_SHARE * min(tensor, issue), _K_BLOCK_CYCLES
        if self.tokens > TOKEN_TILES[-1]:
            computed, between = tensor * _TENSOR_RATE * (1 + _LOST_ROWS / self.tokens), 0
        k_block = busy * (max(computed, memory) + _MEMORY_SHARE * min(computed, memory)) + between
        ends = _TILE_CYCLES + _STORE_CYCLES * self.sub_tiles * multiplied / 2
        return math.ceil(shape.k / self.block_k) * k_block + ends


def row_counts(tokens: int, *, byte_rows: bool = False) -> tuple[int, ...]:
    """Numbers of rows below `tokens` that a token tile can multiply, ascending: it takes the least that holds its rows.

    They are quarters of the tile, rounded up to a multiple of 8, or of 16 for rows of bytes and for instructions with
    more than 128 columns. There are further eighths too, as the rows of an expert differ from the mean by about its
    root, and tiles are chosen to hold most of them: five and seven of small tiles, seven of others; for rows of bytes
    seven alone, and only where a tile is multiplied by parts.
    """
    few, every = (tokens <= 128, 8) if byte_rows else (tokens <= 64, 4)
    every_eighth_from = every if few else 6
    eighths = [*range(2, every_eighth_from, 2), *range(every_eighth_from, 8)]
    counts = set()
    for rows in (tokens * eighth // 8 for eighth in eighths):
        step = 16 if byte_rows or tokens > _MOST_COLUMNS or rows > 128 else 8
        counts.add(-(-rows // step) * step)
    return tuple(sorted(count for count in counts if count < tokens))


def likely_row_counts(tokens: int, expert_rows: float, k: int) -> tuple[int, ...]:
    """Further counts, near what an expert of about so many rows leaves for its last token tile.

    Each makes the kernel larger, and compile longer: at most three of them. There are none for small tiles, which have
    every eighth; where an expert has more than two tiles, as they would save half a percent; and for a short K, where
    tiles of other counts follow each other so fast that their instructions have to be fetched anew.
    """
    if not 64 < tokens <= _MOST_COLUMNS or expert_rows > 2 * tokens or k < _LEAST_K_OF_MORE_COUNTS:
        return ()
    last, deviation = expert_rows % tokens, math.sqrt(expert_rows)
    near = (rows for rows in range(8, tokens, 8) if abs(rows - last) <= deviation and (rows <= 136 or rows % 16 == 0))
    return tuple(sorted(set(near) - {*row_counts(tokens)}, key=lambda rows: abs(rows - last))[:3])


def row_counts_fact(counts: Iterable[int]) -> int:
    """A bit for each count in eights, the lowest for eight rows."""
    return sum(1 << count // 8 - 1 for count in counts)


@functools.lru_cache(maxsize=4096)
def multiplied_rows(tokens: int, expert_rows: float, k: int) -> tuple[tuple[int, float], ...]:
    """Numbers of rows that token tiles multiply, each with its share of the tiles, under uniform routing.

    The rows of an expert then have a Poisson distribution, of mean `expert_rows`.
    """
    counts = sorted({*row_counts(tokens), *likely_row_counts(tokens, expert_rows, k), tokens})
    tiles = dict.fromkeys(counts, 0.0)
    deviation = math.sqrt(expert_rows)
    for rows in range(max(1, int(expert_rows - 6 * deviation)), int(expert_rows + 6 * deviation) + 2):
        likely = math.exp(rows * math.log(expert_rows) - expert_rows - math.lgamma(rows + 1))
        full, last = divmod(rows, tokens)
        tiles[tokens] += likely * full
        if last:
            tiles[next(count for count in counts if count >= last)] += likely
    total = sum(tiles.values())
    return tuple((rows, number / total) for rows, number in tiles.items() if number)


def consumer_registers(warpgroups: int, ctas_per_sm: int, producer_registers: int) -> int:
    """Registers of a thread of `warpgroups` that multiply, beside one that copies.

    It gets what those that copy do not need of their equal share.
    """
    entry = 65536 // (ctas_per_sm * 128 * (warpgroups + 1)) // 8 * 8
    spared = (entry * (warpgroups + 1) - producer_registers) // warpgroups // 8 * 8
    return min(_MOST_CONSUMER_REGISTERS, spared)


def _weights_can_be_scaled(shape: GemmShape) -> bool:
    """Whether a weight in 16 bits keeps its range.

    bfloat16 has float32's. In float16 an integer times a scale of float16 does, and e2m1 times e4m3 is exact; other
    scales would lose small weights. Codes of 16 bits of another type have been rounded once already.
    """
    if shape.bits == 16 and not shape.code.startswith({"bfloat16": "bf", "float16": "fp"}[shape.dtype]):
        return False
    return shape.dtype == "bfloat16" or shape.scale == "e4m3" or (shape.code[:3], shape.scale) == ("int", "float16")


def _fuses_zero(shape: GemmShape) -> bool:
    """Whether one FMA makes a pair of scaled weights (csrc/cuda/weights/fragments_fused.cuh)."""
    return shape.code == "int4" and shape.zeros is None and shape.scale == shape.dtype == "bfloat16"


def _sums_can_be_scaled(shape: GemmShape) -> bool:
    """Whether codes less their zero point are exact in 16 bits, and a group long enough to close its sums."""
    return shape.zeros != "float" and shape.scale != "e4m3"


def adds_in_order(shape: GemmShape, tile: WgmmaTile) -> bool:
    """Whether the tile is one of those that give a row the same bits, however many rows there are.

    One warpgroup goes through K, and what is scaled depends on the shape alone: weights, which leaves room for sums of
    many rows, unless a single scale closes the sums once.
    """
    scales_weights = _weights_can_be_scaled(shape) and not (shape.group_size >= shape.k and _sums_can_be_scaled(shape))
    return tile.warpgroups_k == 1 and tile.scales_weights == scales_weights


def candidates(shape: GemmShape, tokens: int, capability: int, *, all_scaling: bool = False) -> list[WgmmaTile]:
    """Every tile worth considering: it fits. With `all_scaling` also those that scale what costs more."""
    found = []
    exact = all_scaling or shape.scale in ("e4m3", "e8m0")
    for sub_tiles, (warpgroups_n, warpgroups_k), block_k, ctas_per_sm, scales_weights in itertools.product(
        (1, 2, 4), ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)), (64, 128), (1, 2), (False, True)
    ):
        if scales_weights and tokens < 48 and not exact:  # scaling the sums is cheaper, and exact
            continue
        if scales_weights and shape.group_size >= shape.k and _sums_can_be_scaled(shape):  # once, at the end
            continue
        for stages in range(8, 2, -1):  # as many as there is room for
            tile = WgmmaTile(
                tokens, sub_tiles, warpgroups_n, warpgroups_k, block_k, stages, ctas_per_sm, scales_weights
            )
            if tile.fits(shape, capability):
                found.append(tile)
                break
    return found
