"""Tile choice: how a grouped GEMM is cut for an architecture. The cost model and its limits, in one place."""

import dataclasses
import functools
import itertools
import math
from typing import Literal

from jax_marlin_moe.cuda.facts import Facts

# Shared memory of a multiprocessor and the most that one block may have, in bytes, by compute capability
# (CUDA C++ programming guide, technical specifications). 1 KB of each block is the system's.
_SHARED_BYTES = {75: (64, 64), 80: (164, 163), 86: (100, 99), 87: (164, 163), 89: (100, 99), 90: (228, 227)}
_SHARED_BYTES |= {100: (228, 227), 103: (228, 227), 110: (228, 227), 120: (100, 99), 121: (100, 99)}

CAPABILITIES = tuple(sorted(_SHARED_BYTES))  # compute capabilities, times ten, that the kernels are made for

_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "e4m3": 8, "e8m0": 8}

_UNIT = 64  # columns
_TILE_K = 16
TOKEN_TILES = (8, 16, 24, 32)
_MOST_CONSUMER_REGISTERS = 240  # of a thread of csrc/cuda/gemm/wgmma/kernel.cuh that multiplies
_OTHER_CONSUMER_REGISTERS = 40  # of these, beside sums and weights
_MOST_UNEVEN = 1.15  # the longest share of K over the mean one, of tiles worth considering
WGMMA_TOKEN_TILES = (8, 16, 24, 32, 48, 64, 96, 128, 144)

SlotRouting = Literal["direct", "grouped", "aligned"]  # of BlockScheme


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """One grouped product, as the kernel is compiled for it.

    Attributes:
        k: contraction extent.
        n: columns of the packed matrix, gate and up counted both.
        num_experts: E.
        group_size: rows that share a scale.
        gated: whether gate and up columns are combined in the epilogue.
        code: the type of the codes.
        bits: of a code.
        scale: the type of the scales: a float dtype, "e4m3" or "e8m0".
        zeros: "integer" or "float" where each group has a zero point of its own.
        dtype: of the activations.
    """

    k: int
    n: int
    num_experts: int
    group_size: int
    gated: bool
    code: str
    bits: int
    scale: str
    zeros: str | None
    dtype: str

    @property
    def group_bits(self) -> int:
        """What the rows of a group share in a column: a scale and a zero point."""
        scale_bits = _SCALE_BITS[self.scale]
        return scale_bits + {None: 0, "integer": self.bits, "float": scale_bits}[self.zeros]

    @property
    def bytes_per_weight(self) -> float:
        """Codes and what a group shares."""
        return (self.bits + self.group_bits / self.group_size) / 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """`jmm::MmaTile` of csrc/cuda/gemm/mma/kernel.cuh: tokens x (warps_n * units * 64) columns per cluster."""

    tokens: int
    units: int
    warps_n: int
    warps_k: int
    block_k: int
    stages: int
    ctas_per_sm: int
    cluster: int = 1  # blocks that share K

    kernel = "GroupedGemm"
    cpp = "jmm::MmaTile"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_n * self.warps_k

    @property
    def facts(self) -> Facts:
        """What the kernel is compiled with."""
        return dataclasses.asdict(self)

    @property
    def shares_k(self) -> int:
        """Parts of K."""
        return self.warps_k * self.cluster

    def longest_share(self, shape: GemmShape) -> int:
        """Chunks of K that the busiest warp has; the last one of K may be shorter."""
        chunks = -(-shape.k // self.block_k)
        return -(-chunks // self.shares_k)

    def weight_stage_bytes(self, shape: GemmShape) -> int:
        """One stage of one warp's ring: weights, scales, zero points."""
        scale_rows = max(1, self.block_k // shape.group_size)
        weights = self.block_k * self.units * _UNIT * shape.bits // 8
        shared = scale_rows * self.units * _UNIT * shape.group_bits // 8
        return weights + shared

    def token_stage_bytes(self) -> int:
        """One stage of the tokens that warps_n warps share."""
        return self.tokens * self.block_k * 2

    def partials_bytes(self, shape: GemmShape) -> int:
        """The float32 sums that the warps exchange at the end of a tile."""
        if self.shares_k == 1 and (not shape.gated or self.units == 2):
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
        if self.cluster > 1 and capability != 90:
            return False
        whole = shape.k >= self.shares_k * self.block_k and shape.n % (_UNIT * self.warps_n * self.units) == 0
        grouped = shape.group_size % self.block_k == 0 or self.block_k % shape.group_size == 0
        paired = not shape.gated or (self.warps_n * self.units) % 2 == 0
        resident = fits_shared_memory(self.shared_bytes(shape), self.ctas_per_sm, capability)
        return whole and grouped and paired and resident


@dataclasses.dataclass(frozen=True)
class WgmmaTile:
    """`jmm::WgmmaTile` of csrc/cuda/gemm/wgmma/kernel.cuh: tokens x (warpgroups_n * sub_tiles * 64 packed columns).

    Attributes:
        tokens: rows of a block of tokens, a column count of the instruction.
        sub_tiles: 64-row products of a warpgroup.
        warpgroups_n: that multiply, side by side along the columns.
        warpgroups_k: that share K; one warpgroup more copies.
        block_k: rows of K in one stage of the ring.
        stages: stages of the ring, a multiple of warpgroups_k.
        ctas_per_sm: resident blocks of threads.
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

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (self.warpgroups_n * self.warpgroups_k + 1)

    @property
    def producer_registers(self) -> int:
        """Registers of a thread that copies."""
        return 56 if self.tokens <= 32 else 80

    @property
    def consumer_registers(self) -> int:
        """Registers of a thread that multiplies: it gets what those that copy do not need of their equal share."""
        warpgroups = self.warpgroups_n * self.warpgroups_k
        entry = 65536 // (self.ctas_per_sm * self.threads) // 8 * 8
        spared = (entry * (warpgroups + 1) - self.producer_registers) // warpgroups // 8 * 8
        return min(_MOST_CONSUMER_REGISTERS, spared)

    @property
    def facts(self) -> Facts:
        """What the kernel is compiled with."""
        return dataclasses.asdict(self) | {
            "producer_registers": self.producer_registers,
            "consumer_registers": self.consumer_registers,
            "other_registers": _OTHER_CONSUMER_REGISTERS,
        }

    def stage_bytes(self, shape: GemmShape) -> int:
        """Tokens, weights, scales and zero points of one stage."""
        columns = _UNIT * self.warpgroups_n * self.sub_tiles
        scale_rows = max(1, self.block_k // shape.group_size)
        shared = scale_rows * columns * shape.group_bits // 8
        return self.tokens * self.block_k * 2 + self.block_k * columns * shape.bits // 8 + shared

    def shared_bytes(self, shape: GemmShape) -> int:
        """Dynamic shared memory of a block: the ring, two notes about tiles, shares of sums, barriers."""
        notes = 2
        partials = (self.warpgroups_k - 1) * self.warpgroups_n * self.sub_tiles * self.tokens // 2 * 128 * 4
        ring = self.stages * self.stage_bytes(shape)
        size = ring + notes * (6 * 4 + self.tokens * 8) + partials + 8 * 2 * (self.stages + notes)
        return -(-size // 16) * 16

    def column_tiles(self, shape: GemmShape) -> int:
        """Tiles along the columns of the product."""
        return shape.n // (_UNIT * self.warpgroups_n * self.sub_tiles)

    def registers(self, shape: GemmShape) -> int:
        """Of a thread that multiplies: sums, weights being made and in use, the rest."""
        two_sums = not self.scales_weights and shape.group_size < shape.k
        sums = self.sub_tiles * self.tokens // 2 * (2 if two_sums else 1)
        return sums + 8 * self.sub_tiles + _OTHER_CONSUMER_REGISTERS

    def fits(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel compiles for this shape and its blocks fit the multiprocessor."""
        if capability != 90 or not (_weights_can_be_scaled if self.scales_weights else _sums_can_be_scaled)(shape):
            return False
        chunks = -(-shape.k // self.block_k)  # the last one may repeat rows of the one before
        whole = shape.k >= self.block_k and chunks >= self.warpgroups_k and self.stages % self.warpgroups_k == 0
        whole = whole and shape.n % (_UNIT * self.warpgroups_n * self.sub_tiles) == 0
        part_of_group = shape.group_size % self.block_k == 0 or shape.group_size >= shape.k
        whole_groups = self.block_k % shape.group_size == 0 and shape.k % shape.group_size == 0
        paired = not shape.gated or self.sub_tiles % 2 == 0
        return (
            whole
            and (part_of_group or whole_groups)
            and paired
            and fits_shared_memory(self.shared_bytes(shape), self.ctas_per_sm, capability)
            and self.registers(shape) <= self.consumer_registers
        )


def _weights_can_be_scaled(shape: GemmShape) -> bool:
    """Whether a weight in 16 bits keeps its range.

    bfloat16 has float32's. In float16 an integer times a scale of float16 does, and e2m1 times e4m3 is exact; other
    scales would lose small weights.
    """
    return shape.dtype == "bfloat16" or shape.scale == "e4m3" or (shape.code[:3], shape.scale) == ("int", "float16")


def _sums_can_be_scaled(shape: GemmShape) -> bool:
    """Whether codes less their zero point are exact in 16 bits, and a group long enough to close its sums."""
    return shape.zeros != "float" and shape.scale != "e4m3"


@dataclasses.dataclass(frozen=True)
class BlockScheme:
    """How a whole expert block is cut.

    Attributes:
        routing: who finds the slots of a block of tokens. "direct": each slot is a block of its own, read straight off
            topk_ids. "grouped": every block of threads groups the slots by expert for itself, where slots are few and
            the tiles leave room for them; "aligned" otherwise. "aligned": a kernel before the products.
        gate_up: tile of the first product; `tokens` is the most slots of a block.
        down: tile of the second; the same `tokens`.
        overlaps: whether the second product's blocks of threads come in while the first one's leave, and fetch weights
            meanwhile. They come to the multiprocessors that are free first: more of them than their share where there
            is room, fewer where what the first ones leave is in pieces.
    """

    routing: SlotRouting
    gate_up: Tile | WgmmaTile
    down: Tile | WgmmaTile
    overlaps: bool = dataclasses.field(default=True, kw_only=True)

    def fits(self, first: GemmShape, second: GemmShape, capability: int) -> bool:
        """Whether both tiles fit the products, and each other."""
        alike = self.gate_up.tokens == self.down.tokens
        return alike and self.gate_up.fits(first, capability) and self.down.fits(second, capability)


@functools.cache
def shared_memory(capability: int) -> tuple[int, int]:
    """Bytes of shared memory (of a multiprocessor, of a block)."""
    known = max((c for c in _SHARED_BYTES if c <= capability), default=75)
    per_sm, per_block = _SHARED_BYTES[known]
    return per_sm * 1024, per_block * 1024


def fits_shared_memory(size: int, blocks: int, capability: int) -> bool:
    """Whether a multiprocessor holds so many blocks of so many bytes; the system takes 1024 more for each."""
    per_sm, per_block = shared_memory(capability)
    return size <= per_block and (size + 1024) * blocks <= per_sm


def choose_token_tile(num_slots: int, num_experts: int) -> int:
    """The smallest block that holds nearly every expert's rows under uniform routing."""
    mean = num_slots / num_experts
    rows = mean + 2 * math.sqrt(mean)
    return next((t for t in TOKEN_TILES if rows <= t), TOKEN_TILES[-1])


def block_sizes(num_slots: int, num_experts: int, shape: GemmShape, capability: int) -> list[int]:
    """Rows of a block worth considering: the smallest that holds nearly every expert's rows, and its neighbours."""
    mean = num_slots / num_experts
    rows = mean + 2 * math.sqrt(mean)
    likely = TOKEN_TILES.index(choose_token_tile(num_slots, num_experts))
    sizes = {TOKEN_TILES[likely], TOKEN_TILES[max(0, likely - 1)]}
    if capability == 90:
        fitting = next((i for i, t in enumerate(WGMMA_TOKEN_TILES) if rows <= t), len(WGMMA_TOKEN_TILES))
        sizes |= set(WGMMA_TOKEN_TILES[max(0, fitting - 3) : fitting + 1])
    return sorted(sizes)


def expected_blocks(num_slots: int, routed_experts: int, num_experts: int, tokens: int) -> float:
    """Blocks of `tokens` rows that `num_experts` of the routed experts fill under uniform routing."""
    mean = num_slots / routed_experts
    blocks = 1 - (1 - 1 / routed_experts) ** num_slots  # an expert has a row
    for full in range(tokens, int(mean + 6 * math.sqrt(mean)) + 1, tokens):  # and more than so many
        blocks += math.erfc((full + 0.5 - mean) / math.sqrt(2 * mean)) / 2
    return num_experts * blocks


def candidates(shape: GemmShape, tokens: int, capability: int) -> list[Tile | WgmmaTile]:
    """Every tile of either kind worth considering: it fits."""
    found: list[Tile | WgmmaTile] = [*_wgmma_candidates(shape, tokens, capability)]
    if tokens not in TOKEN_TILES:
        return found
    clusters = (1, 2, 4) if tokens == TOKEN_TILES[0] and capability == 90 else (1,)
    for units, warps_n, warps_k, block_k in itertools.product(
        (1, 2), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 8), (16, 32, 64, 128, 256)
    ):
        warps = warps_n * warps_k
        if warps > 8 or units * tokens > 48:  # more sums than a thread has registers
            continue
        # Two sets of sums, and what the main loop holds; as NVRTC 13 allots them for sm_90a.
        registers = min(255, 80 + 5 * units * tokens // 2)
        resident = min(12, 65536 // (registers * 32 * warps))
        # Whether a tile fits, and how evenly it shares K, mostly depends on what is known by now.
        fitting = []
        for cluster in clusters:
            smallest = Tile(tokens, units, warps_n, warps_k, block_k, 2, 1, cluster)
            uneven = smallest.longest_share(shape) * smallest.shares_k * block_k / shape.k
            if uneven <= _MOST_UNEVEN and smallest.fits(shape, capability):
                fitting.append(cluster)
        for stages, ctas_per_sm, cluster in itertools.product((2, 3, 4, 5, 6), range(1, resident + 1), fitting):
            tile = Tile(tokens, units, warps_n, warps_k, block_k, stages, ctas_per_sm, cluster)
            if fits_shared_memory(tile.shared_bytes(shape), ctas_per_sm, capability):
                found.append(tile)
    return found


def _wgmma_candidates(shape: GemmShape, tokens: int, capability: int) -> list[WgmmaTile]:
    found = []
    exact = shape.scale in ("e4m3", "e8m0")
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


@functools.lru_cache(maxsize=1024)
def choose_tile(
    shape: GemmShape, tokens: int, expected_blocks: float, capability: int, rows: float | None = None
) -> Tile | WgmmaTile:
    """The tile of least predicted time.

    Args:
        shape: the product.
        tokens: rows of a block of tokens.
        expected_blocks: blocks of tokens that have work.
        capability: compute capability times ten.
        rows: of a block that are no padding, on average; all of them by default.
    """
    found = candidates(shape, tokens, capability)
    if tokens == TOKEN_TILES[0]:
        # With eight rows a block `mma.sync` was ahead wherever both were measured: wgmma is left to tables there.
        found = [tile for tile in found if isinstance(tile, Tile)]
    if not found:
        raise ValueError(f"no kernel tile serves {shape} with {tokens}-row blocks on compute capability {capability}")
    return min(found, key=lambda tile: predicted_microseconds(shape, tile, expected_blocks, rows))


# The cost model's constants, fitted to 1100 timed kernels on an H200 (Qwen3-30B and Mixtral, 1 to 64 tokens): 17 %
# root mean square error, and tiles chosen with it were 7 % slower than the best timed ones on average. (Integer codes
# took more instructions then; the other constants are as they were.) Cycles at 1.9 GHz. Measured tables come
# before it.
_MULTIPROCESSORS = 132
_CYCLES_PER_MICROSECOND = 1900
_BYTES_PER_CYCLE = 4.65e6 / _MULTIPROCESSORS / _CYCLES_PER_MICROSECOND  # a multiprocessor's part of the memory
_CHUNK_INSTRUCTIONS = 50  # of a warp, beside its words
_WORD_INSTRUCTIONS = {"int4": 5, "int8": 6, "e2m1": 15, "e4m3": 14}  # dequantisation of 8 weights
_MMA_INSTRUCTIONS = 1.8  # an MMA, as often as it keeps the warp
_CYCLES_PER_INSTRUCTION = 2.5  # of a warp alone
_CHUNK_LATENCY = 144
_ISSUE_RATE = 0.42  # of the four schedulers, when all warps compete
_BYTES_IN_FLIGHT = 24e3  # of a multiprocessor, below which the memory waits
_TILE_CYCLES = 829
_CLUSTER_CYCLES = 1000  # two barriers of a cluster, reads of another block's memory
_LAUNCH_MICROSECONDS = 2.2


def word_instructions(code: str) -> int:
    """Instructions that make eight weights of codes.

    Raises:
        ValueError: nobody has counted them.
    """
    if code not in _WORD_INSTRUCTIONS:
        raise ValueError(
            f"no cost is known for codes of {code}; it must be one of {', '.join(sorted(_WORD_INSTRUCTIONS))}"
        )
    return _WORD_INSTRUCTIONS[code]


def predicted_microseconds(
    shape: GemmShape, tile: Tile | WgmmaTile, expected_blocks: float, rows: float | None = None
) -> float:
    """Time of one product: its busiest slot's chunks, each as long as latency, issue or memory makes it."""
    if isinstance(tile, WgmmaTile):
        return _predicted_wgmma_microseconds(shape, tile, expected_blocks, rows)
    warps, token_tiles = tile.warps_n * tile.warps_k, tile.tokens // 8
    tiles = max(1.0, expected_blocks * tile.column_tiles(shape))
    blocks = tiles * tile.cluster
    busy = min(tile.ctas_per_sm, max(1.0, blocks / _MULTIPROCESSORS))  # blocks at work on a multiprocessor
    chunks = tile.longest_share(shape)
    columns = _UNIT * tile.warps_n * tile.units
    steps = tile.block_k / _TILE_K

    words = steps * tile.units * 4
    closing = tile.block_k / min(shape.group_size, 128) * tile.units * 16 * token_tiles * 3
    instructions = words * (word_instructions(shape.code) + token_tiles * _MMA_INSTRUCTIONS)
    instructions += _CHUNK_INSTRUCTIONS + 2 * steps * token_tiles + closing
    latency = instructions * _CYCLES_PER_INSTRUCTION + _CHUNK_LATENCY
    issue = busy * warps * instructions / (4 * _ISSUE_RATE)

    chunk_bytes = shape.k * columns * shape.bytes_per_weight / chunks
    in_flight = busy * warps * (tile.stages - 1) * tile.block_k * tile.units * _UNIT * shape.bits / 8
    memory = busy * chunk_bytes / _BYTES_PER_CYCLE * max(1.0, _BYTES_IN_FLIGHT / in_flight)

    longest = max(latency, issue, memory)
    chunk = longest + 0.15 * (latency + issue + memory - longest)
    ends = _TILE_CYCLES * (1.0 if tile.partials_bytes(shape) else 0.4) + _CLUSTER_CYCLES * (tile.cluster > 1)
    rounds = math.ceil(blocks / (_MULTIPROCESSORS * tile.ctas_per_sm))
    return _LAUNCH_MICROSECONDS + rounds * (chunks * chunk + ends) / _CYCLES_PER_MICROSECOND


# The same for wgmma: within 10 % of Mixtral at 64 and 256 tokens and Qwen3-30B at 4096 on an H200, 14 to 19 % too fast
# for Qwen3-30B at 1024.
_WGMMA_RATE = 0.75  # of 2048 multiply-adds a cycle
_WGMMA_ISSUE_RATE = 0.55
_WGMMA_CHUNK_INSTRUCTIONS = 120  # of a scheduler: barriers, descriptors, copies
_WGMMA_TILE_CYCLES = 700  # and _WGMMA_STORE_CYCLES for each sum of a thread
_WGMMA_STORE_CYCLES = 12


def _predicted_wgmma_microseconds(
    shape: GemmShape, tile: WgmmaTile, expected_blocks: float, rows: float | None
) -> float:
    tiles = max(1.0, expected_blocks * tile.column_tiles(shape))
    busy = min(tile.ctas_per_sm, max(1.0, tiles / _MULTIPROCESSORS))
    units = tile.warpgroups_n * tile.sub_tiles  # of 64 columns
    quarter = tile.tokens / 4
    multiplied = min(tile.tokens, math.ceil((tile.tokens if rows is None else rows) / quarter) * quarter)

    tensor = _UNIT * units * multiplied * tile.block_k / 2048 / _WGMMA_RATE
    # A unit of 16 rows of K is a sub-tile for each of the four schedulers.
    word = word_instructions(shape.code) + 4
    groups = tile.block_k / min(shape.group_size, 128)
    if tile.scales_weights:
        word += 4 if shape.scale in (shape.dtype, "e4m3", "e8m0") else 8
        instructions = tile.block_k / _TILE_K * units * word + units * 8 * groups
    else:
        instructions = tile.block_k / _TILE_K * units * word + units * multiplied / 2 * groups
    issue = (instructions + _WGMMA_CHUNK_INSTRUCTIONS) / _WGMMA_ISSUE_RATE
    if busy * tile.warpgroups_n * tile.warpgroups_k < 3:
        issue *= 1.15  # too few warps to fill each other's gaps
    memory = tile.block_k * units * _UNIT * shape.bytes_per_weight / _BYTES_PER_CYCLE

    longest = max(tensor, issue, memory)
    chunk = busy * (longest + 0.15 * (tensor + issue + memory - longest))
    ends = _WGMMA_TILE_CYCLES + _WGMMA_STORE_CYCLES * tile.sub_tiles * multiplied / 2
    rounds = math.ceil(tiles / (_MULTIPROCESSORS * tile.ctas_per_sm))
    cycles = rounds * (math.ceil(shape.k / tile.block_k) * chunk + ends)
    return _LAUNCH_MICROSECONDS + cycles / _CYCLES_PER_MICROSECOND
