"""The GEMM on Hopper's wgmma with rows of 8 bits: its tiles and their cost. Twin of csrc/cuda/gemm/wgmma/bytes.cuh."""

import dataclasses
import itertools
import math

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import Facts
from jax_marlin_moe.cuda.kernels.problem import LAUNCH_MICROSECONDS, UNIT, GemmShape
from jax_marlin_moe.cuda.kernels.token_tiles import TAKEN_BYTES
from jax_marlin_moe.cuda.kernels.wgmma import consumer_registers, row_counts, row_counts_fact

TOKEN_TILES = (16, 32, 48, 64, 96, 128, 144)
BLOCK_K = 128  # rows of K in one stage: those whose sums are made before they are scaled

# (type of rows, type of codes) that there are fragments for, in groups of whole k-blocks.
_MULTIPLIED = {
    ("float8_e4m3fn", "int4"),
    ("float8_e4m3fn", "e4m3"),
    ("int8", "int4"),
    ("int8", "int8"),
}

# Codes of which a fragment has a group of 32, with a power of two as its scale, for rows of e4m3.
_OF_SMALL_GROUPS = ("e2m1", "e4m3")

_OTHER_CONSUMER_REGISTERS = 8  # of a thread that multiplies, beside sums and fragments
_PRODUCER_REGISTERS = 24
_FRAGMENT_REGISTERS = 32  # two sets for a slab and a k-block
# Rows whose sums a slab holds for a k-block; larger tiles make theirs by thirds, and hold two of them.
_MOST_AT_ONCE = 128

_LEAST_ROWS = 32  # of an expert, with which products of e4m3 rows are ahead of their values in 16 bits

# Fitted to 50 products of Mixtral, Qwen3-30B and DeepSeek-V3 with 256 to 16384 tokens on an H200, to 6 %. Cycles of a
# k-block: for each unit of 64 columns, and for each row of a unit, at least 24 of them; times a factor where rows are
# multiplied by parts, and one where no other warpgroup fills the waits.
_UNIT_CYCLES, _ROW_CYCLES = 197, 1.9
_LEAST_TIMED_ROWS = 24
_BY_PARTS = 1.075
_ALONE = 1.4
# Cycles of the end of a work tile, and of that for each sum of a thread.
_TILE_CYCLES = 2200
_GATED_CYCLES, _STORE_CYCLES = 3.4, 32
_COUNTED_ROUNDS, _LAST_ROUND = 4, 0.9  # beyond so many, CTAs end that part of a work tile after the average one


@dataclasses.dataclass(frozen=True)
class WgmmaByteTile:
    """`jmm::WgmmaTile` as csrc/cuda/gemm/wgmma/bytes.cuh takes it: tokens x (warpgroups_n * sub_tiles * 64 columns).

    Attributes:
        tokens: rows of a token tile, a column count of the instruction.
        sub_tiles: slabs of 64 columns of a warpgroup, two or four.
        warpgroups_n: that multiply, side by side along the columns; one more copies.
        stages: stages of the ring, of 128 rows of K each.
        ctas_per_sm: resident CTAs.
        band: token tiles that are multiplied by a column tile before the next one is.
        keeps_weights: whether weights stay in L2 as anything else does, rather than leave it first.
    """

    tokens: int
    sub_tiles: int
    warpgroups_n: int
    stages: int
    ctas_per_sm: int = 1
    band: int = 8
    keeps_weights: bool = True

    kernel = "WgmmaGroupedGemm"
    cpp = "jmm::WgmmaTile"
    cluster = 1
    has_slabs = True
    packed_pairs = False
    takes_tiles = True
    waits_for_rows = True

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 128 * (self.warpgroups_n + 1)

    @property
    def consumer_registers(self) -> int:
        """Registers of a thread that multiplies."""
        return consumer_registers(self.warpgroups_n, self.ctas_per_sm, _PRODUCER_REGISTERS)

    def facts(self, expert_rows: float | None, k: int) -> Facts:
        """As for `WgmmaTile`, whatever the rows of an expert."""
        return dataclasses.asdict(self) | {
            "warpgroups_k": 1,
            "block_k": BLOCK_K,
            "scales_weights": False,
            "producer_registers": _PRODUCER_REGISTERS,
            "consumer_registers": self.consumer_registers,
            "other_registers": _OTHER_CONSUMER_REGISTERS,
            "row_counts": row_counts_fact(row_counts(self.tokens, byte_rows=True)),
        }

    def stage_bytes(self, shape: GemmShape) -> int:
        """Tokens, weights, scales and zero points of one stage, and scales of the tokens."""
        columns = UNIT * self.warpgroups_n * self.sub_tiles
        rows = self.tokens * (BLOCK_K + 4 * shape.row_groups)
        groups = max(1, BLOCK_K // shape.group_size)
        return rows + BLOCK_K * columns * shape.bits // 8 + groups * columns * shape.group_bits // 8

    def shared_bytes(self, shape: GemmShape) -> int:
        """Dynamic shared memory of a CTA: the ring, two records of work tiles, barriers."""
        records = 2
        size = self.stages * self.stage_bytes(shape) + records * (6 * 4 + self.tokens * 12)
        return -(-(size + 8 * 2 * (self.stages + records)) // 16) * 16

    def column_tiles(self, shape: GemmShape) -> int:
        """Tiles along the columns of the product, the last of which may have columns of the one before."""
        return -(-shape.n // (UNIT * self.warpgroups_n * self.sub_tiles))

    def registers(self, shape: GemmShape) -> int:
        """Of a thread that multiplies: sums of the tile and of a slab, fragments, the rest."""
        at_once = self.tokens if self.tokens <= _MOST_AT_ONCE else self.tokens * 2 // 3
        return (self.sub_tiles * self.tokens + at_once) // 2 + _FRAGMENT_REGISTERS + _OTHER_CONSUMER_REGISTERS

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and its CTAs fit the multiprocessor."""
        card = get_architecture(capability)
        return (
            "wgmma_bytes" in card.kernels
            and multiplies(shape)
            and self.tokens in TOKEN_TILES
            and (self.tokens <= _MOST_AT_ONCE or not shape.row_groups)  # one thread copies the scales of a row
            and shape.n >= UNIT * self.warpgroups_n * self.sub_tiles
            and card.fits_shared_memory(self.shared_bytes(shape) + TAKEN_BYTES, self.ctas_per_sm)
            and self.registers(shape) <= self.consumer_registers
        )

    def predicted_microseconds(
        self, shape: GemmShape, expected_blocks: float, rows: float | None, capability: int, uniform: bool = False
    ) -> float:
        """Time of one product, of whose token tiles that many `rows` are not padding on average; None for all.

        Whether rows are those of `uniform` routing does not matter.
        """
        card = get_architecture(capability)
        ctas = card.multiprocessors * self.ctas_per_sm
        tiles = max(1.0, expected_blocks * self.column_tiles(shape))
        busy = min(self.ctas_per_sm, max(1.0, tiles / card.multiprocessors))
        units = self.warpgroups_n * self.sub_tiles  # of 64 columns
        memory = BLOCK_K * units * UNIT * shape.bytes_per_weight / card.bytes_per_cycle

        def cycles(rows: float) -> float:
            """Cycles of a work tile that multiplies so many rows."""
            parts = 1 + (_BY_PARTS - 1) * rows / self.tokens if self.tokens > _MOST_AT_ONCE else 1
            alone = _ALONE if self.warpgroups_n * self.ctas_per_sm == 1 else 1
            products = units * (_UNIT_CYCLES + _ROW_CYCLES * max(rows, _LEAST_TIMED_ROWS)) * parts * alone
            k_block = max(memory, products)
            end = _TILE_CYCLES + (_GATED_CYCLES if shape.gated else _STORE_CYCLES) * self.sub_tiles * rows / 2
            return busy * math.ceil(shape.k / BLOCK_K) * k_block + end

        eighth = self.tokens / 8
        multiplied = min(self.tokens, math.ceil((self.tokens if rows is None else rows) / eighth) * eighth)
        # CTAs take work tiles as they come to them, so those of few rows go where there is time for them.
        rounds = tiles * cycles(multiplied) / cycles(self.tokens) / ctas
        rounds = max(1, math.ceil(rounds)) if rounds < _COUNTED_ROUNDS else rounds + _LAST_ROUND
        return LAUNCH_MICROSECONDS + rounds * cycles(self.tokens) / card.cycles_per_microsecond


def multiplies(shape: GemmShape) -> bool:
    """Whether there is a kernel for rows of 8 bits and such weights."""
    # Two slabs of a warpgroup, in a gated product one of gate and one of up.
    slabs = shape.n % (UNIT * (1 + shape.gated)) == 0 and shape.n >= 2 * UNIT
    return (has_fragments(shape) or _has_small_groups(shape)) and slabs


def pays(shape: GemmShape, rows: float) -> bool:
    """Whether to multiply bytes where experts have so many rows on average, rather than values in 16 bits.

    Rows of int8 always are, as their sums are exact, and so are rows whose groups have scales: 16 bits do not hold
    their values.
    """
    return rows >= _LEAST_ROWS or shape.dtype == "int8" or shape.row_groups


def has_fragments(shape: GemmShape) -> bool:
    """Whether there are fragments of bytes of such rows and weights, and scales for whole k-blocks."""
    groups = shape.group_size >= shape.k or shape.group_size % BLOCK_K == 0
    return (
        (shape.dtype, shape.code) in _MULTIPLIED
        and shape.zeros != "float"
        and shape.scale not in ("e4m3", "e8m0")
        and groups
        and _is_whole(shape)
    )


def _has_small_groups(shape: GemmShape) -> bool:
    """Whether a k-block has four groups, and bytes of their fragments."""
    return (
        (shape.dtype, shape.scale, shape.group_size) == ("float8_e4m3fn", "e8m0", 32)
        and shape.code in _OF_SMALL_GROUPS
        and not shape.row_groups
        and _is_whole(shape)
    )


def _is_whole(shape: GemmShape) -> bool:
    return shape.k >= BLOCK_K and shape.k % 32 == 0


def halves_apart(shape: GemmShape) -> bool:
    """Whether bytes of a fragment have the order of its own halves first (csrc/cuda/weights/fragments_bytes.cuh)."""
    return shape.code == "int4"


def _zero_stages(shape: GemmShape) -> int:
    """Stages of the ring that zero points have, behind those of the k-blocks (csrc/cuda/gemm/wgmma/zero_stages.cuh)."""
    has_zeros = shape.zeros is not None or (shape.code == "int4" and shape.dtype != "int8")
    return -(-shape.k // (16 * BLOCK_K)) if has_zeros else 0


def candidates(shape: GemmShape, tokens: int, capability: int, *, in_order: bool = False) -> list[WgmmaByteTile]:
    """Every tile worth considering: it fits.

    `in_order` leaves those that give a row the same bits, whatever the number of rows. Sums of zero points are added
    for as many of their stages at a time as half of the ring has, or for one where rows are multiplied by parts: so
    rings are chosen whose half is two stages, and no tiles by parts.
    """
    if in_order and tokens > _MOST_AT_ONCE:
        return []
    rings = (5, 4) if in_order and _zero_stages(shape) > 1 else range(8, 2, -1)
    found = []
    # Of four sub-tiles a lane's float32 results take two stores of half a sector each: slower wherever they were timed.
    for sub_tiles, warpgroups_n in itertools.product((2, 4) if shape.gated else (2,), (1, 2)):
        for stages in rings:  # as many as there is room for
            tile = WgmmaByteTile(tokens, sub_tiles, warpgroups_n, stages)
            if tile.fits(shape, capability):
                found.append(tile)
                break
    return found
