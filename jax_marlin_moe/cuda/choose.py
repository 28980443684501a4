"""The choice of tiles and of whole block schemes where no table has a measured one: the least predicted time."""

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.kernels import mma, mma_bytes, transposed, wgmma, wgmma_bytes
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.scheme import KERNELS, BlockScheme, SlotRouting, Tile, kernels_of

# Over 143 pairs of tiles, timed with and without an overlap (benchmarks/NOTES.md), what `overlaps` chooses loses 0.2 %
# to the better way on average; an overlap everywhere loses 0.5 %, and 11 % once.
_LONGEST_OVERLAPPED_MICROSECONDS = 250

# Rows of a token tile that pay in one product of very many rows; a block's tiles are measured without them. Work tiles
# have at least so many results there: smaller ones read a row, or a weight, from L2 too often.
_LARGE_TOKEN_TILES = (192, 256, 288)
_LEAST_RESULTS = 128 * 256


def choose_token_tile(num_slots: int, num_experts: int) -> int:
    """The smallest block that holds nearly every expert's rows under uniform routing."""
    mean = num_slots / num_experts
    rows = mean + 2 * math.sqrt(mean)
    return next((t for t in mma.TOKEN_TILES if rows <= t), mma.TOKEN_TILES[-1])


def block_sizes(num_slots: int, num_experts: int, shape: GemmShape, capability: int) -> list[int]:
    """Rows of a block worth considering: the smallest that holds nearly every expert's rows, and its neighbours."""
    mean = num_slots / num_experts
    rows = mean + 2 * math.sqrt(mean)
    likely = mma.TOKEN_TILES.index(choose_token_tile(num_slots, num_experts))
    kernels = kernels_of(shape, capability)
    sizes = {mma.TOKEN_TILES[likely], mma.TOKEN_TILES[max(0, likely - 1)]} if "mma" in kernels else set()
    for name in set(kernels) - {"mma"}:
        larger = KERNELS[name].token_tiles
        fitting = next((i for i, t in enumerate(larger) if rows <= t), len(larger))
        sizes |= set(larger[max(0, fitting - 4) : fitting + 1])
    return sorted(sizes)


def expected_blocks(num_slots: int, routed_experts: int, num_experts: int, tokens: int) -> float:
    """Blocks of `tokens` rows that `num_experts` of the routed experts fill under uniform routing."""
    mean = num_slots / routed_experts
    blocks = 1 - (1 - 1 / routed_experts) ** num_slots  # an expert has a row
    for full in range(tokens, int(mean + 6 * math.sqrt(mean)) + 1, tokens):  # and more than that many
        blocks += math.erfc((full + 0.5 - mean) / math.sqrt(2 * mean)) / 2
    return num_experts * blocks


@functools.lru_cache(maxsize=256)  # programs of one block for different numbers of rows have the same
def candidates(shape: GemmShape, tokens: int, capability: int) -> tuple[Tile, ...]:
    """Every tile of any kernel of the architecture worth considering: it fits."""
    return tuple(
        tile for name in kernels_of(shape, capability) for tile in KERNELS[name].candidates(shape, tokens, capability)
    )


@functools.lru_cache(maxsize=1024)
def choose_tile(
    shape: GemmShape,
    tokens: int,
    expected_blocks: float,
    capability: int,
    rows: float | None = None,
    least_results: int = 0,
    uniform: bool = False,
) -> Tile:
    """The tile of least predicted time.

    Args:
        shape: the product.
        tokens: rows of a token tile.
        expected_blocks: token tiles that have work.
        capability: compute capability times ten.
        rows: of a block that are not padding, on average; all of them by default.
        least_results: of a work tile.
        uniform: whether the rows are those of a block under uniform routing.

    Raises:
        ValueError: no kernel has such a tile for the shape.
    """
    found = candidates(shape, tokens, capability)
    if least_results:
        found = tuple(tile for tile in found if tokens * (shape.n // tile.column_tiles(shape)) >= least_results)
    if tokens == mma.TOKEN_TILES[0]:
        # With eight rows per block `mma.sync` was ahead wherever both were measured: only tables have others there.
        found = tuple(tile for tile in found if isinstance(tile, mma.MmaTile))
    elif uniform and any(isinstance(tile, wgmma.WgmmaTile) for tile in found):
        # With more rows per block, wgmma was ahead in expert blocks wherever both were measured.
        found = tuple(tile for tile in found if isinstance(tile, wgmma.WgmmaTile))
    if not found:
        raise ValueError(f"no kernel tile supports {shape} with {tokens}-row blocks on compute capability {capability}")
    return _cheapest(found, shape, expected_blocks, rows, capability, uniform=uniform)


def choose_rows_tile(shape: GemmShape, num_rows: int, parts: int, capability: int) -> Tile:
    """The tile of least predicted time for rows that come in that many parts, each of one expert, none of them known.

    Raises:
        ValueError: no kernel supports the shape.
    """
    sizes = block_sizes(num_rows, parts, shape, capability)
    return _fastest_tile(
        shape,
        {tokens: min(parts, num_rows) * -(-num_rows // (parts * tokens)) for tokens in sizes},
        num_rows,
        capability,
    )


def choose_product_tile(
    shape: GemmShape, num_slots: int, num_experts: int, capability: int, is_transposed: bool
) -> Tile | transposed.TransposedTile | transposed.WgmmaTransposedTile:
    """The tile of one product of slots that routing has spread over the experts.

    Raises:
        ValueError: no kernel supports the shape.
    """
    if is_transposed:
        return transposed.choose(shape, num_slots / num_experts, capability)
    sizes = set(block_sizes(num_slots, num_experts, shape, capability))
    if num_slots > num_experts * wgmma.TOKEN_TILES[-1]:
        with contextlib.suppress(ValueError):  # no kernel has such tiles for the shape
            blocks = _expected(sizes | set(_LARGE_TOKEN_TILES), num_slots, num_experts)
            return _fastest_tile(shape, blocks, num_slots, capability, _LEAST_RESULTS)
    return _fastest_tile(shape, _expected(sizes, num_slots, num_experts), num_slots, capability)


def choose_listed_tile(shape: GemmShape, num_slots: int, num_experts: int, list_block: int, capability: int) -> Tile:
    """The tile of a product whose slots are listed in blocks of that many: rows of a token tile divide them.

    Where experts have few rows, those of mma.sync.

    Raises:
        ValueError: no kernel supports the shape.
    """
    few = max(t for t in mma.TOKEN_TILES if list_block % t == 0)
    sizes = {few}
    if num_slots > num_experts * few:
        sizes |= {t for t in (*wgmma.TOKEN_TILES, *_LARGE_TOKEN_TILES) if t > few and list_block % t == 0}
    return _fastest_tile(shape, _expected(sizes, num_slots, num_experts), num_slots, capability)


def choose_invariant_tile(shape: GemmShape, blocks: Mapping[int, float], num_rows: int, capability: int) -> Tile:
    """The tile of least predicted time among those that give a row of one product the same bits always.

    `blocks` are as for `_fastest_tile`. Blocks of eight rows are among them: which kernel has those in order depends on
    the shape alone.

    Raises:
        ValueError: no kernel has such tiles for the shape.
    """
    least = min(mma.TOKEN_TILES)
    kernel = next((name for name in ("wgmma", "mma") if _tiles_in_order(name, shape, least, capability)), None)
    if kernel is None:
        raise ValueError(
            f"batch_invariant is True; no kernel of compute capability {capability} adds up {shape} in one order for "
            "all numbers of rows"
        )
    costs = {
        tile: tile.predicted_microseconds(shape, expected, num_rows / expected, capability)
        for tokens, expected in blocks.items()
        for tile in _tiles_in_order(kernel, shape, tokens, capability)
    }
    return min(costs, key=lambda tile: costs[tile])


def invariant_rows_tile(shape: GemmShape, num_rows: int, capability: int) -> Tile:
    """`choose_invariant_tile` for rows of one expert."""
    sizes = sorted({*mma.TOKEN_TILES, *wgmma.TOKEN_TILES})
    return choose_invariant_tile(shape, {t: -(-num_rows // t) for t in sizes}, num_rows, capability)


def invariant_listed_tile(shape: GemmShape, num_slots: int, num_experts: int, list_block: int, capability: int) -> Tile:
    """`choose_invariant_tile` for slots that are listed in blocks of that many."""
    sizes = [t for t in {*mma.TOKEN_TILES, *wgmma.TOKEN_TILES} if list_block % t == 0]
    return choose_invariant_tile(shape, _expected(sizes, num_slots, num_experts), num_slots, capability)


def _expected(sizes: Iterable[int], num_slots: int, num_experts: int) -> dict[int, float]:
    """Blocks of each size that uniform routing fills."""
    return {tokens: expected_blocks(num_slots, num_experts, num_experts, tokens) for tokens in sorted(sizes)}


def _fastest_tile(
    shape: GemmShape, blocks: Mapping[int, float], num_rows: int, capability: int, least_results: int = 0
) -> Tile:
    """The tile of least predicted time, where blocks of that many rows are as many as stated."""
    found: list[tuple[float, Tile]] = []
    for tokens, expected in blocks.items():
        rows = num_rows / expected
        with contextlib.suppress(ValueError):  # no tile of this size supports the shape
            tile = choose_tile(shape, tokens, expected, capability, rows, least_results)
            found.append((tile.predicted_microseconds(shape, expected, rows, capability), tile))
    if not found:
        raise ValueError(f"no kernel tile supports {shape} on compute capability {capability}")
    return min(found, key=lambda predicted: predicted[0])[1]


def overlaps(shape: GemmShape, tile: Tile, microseconds: float, capability: int) -> bool:
    """Whether the second product, of this shape and tile, should begin beside the first one's end.

    That hides about two microseconds. It costs a part of the block where the second's CTAs land unevenly: where many
    small ones find room for more of them than their share, and sometimes in fragmented memory.
    """
    crowds = tile.ctas_per_sm > 8 and get_architecture(capability).fits_shared_memory(
        tile.shared_bytes(shape), tile.ctas_per_sm * 7 // 5
    )
    return microseconds < _LONGEST_OVERLAPPED_MICROSECONDS and not crowds


def predicted_scheme(
    first: GemmShape, second: GemmShape, num_slots: int, top_k: int, routed_experts: int, capability: int
) -> BlockScheme:
    """The cost model's choice: slots by themselves where hardly two share an expert, aligned blocks elsewhere.

    Raises:
        ValueError: no kernel supports the shapes.
    """

    def fastest(tokens: int, blocks: float, rows: float | None, direct: bool) -> tuple[float, BlockScheme]:
        tiles = [choose_tile(shape, tokens, blocks, capability, rows, uniform=True) for shape in (first, second)]
        # A thread that has one slot to group does so in less than an alignment kernel takes.
        groups = num_slots <= min(tile.threads for tile in tiles)
        routing: SlotRouting = "direct" if direct else "grouped" if groups else "aligned"
        return _timed_scheme(routing, (first, second), tiles, blocks, rows, capability)

    few = num_slots == top_k or num_slots * num_slots <= 8 * routed_experts
    if few and not first.has_byte_rows:
        return fastest(mma.TOKEN_TILES[0], num_slots, rows=None, direct=True)[1]
    found = []
    for tokens in block_sizes(num_slots, routed_experts, first, capability):
        with contextlib.suppress(ValueError):  # no tile of this size supports one of the shapes
            found.append(fastest(tokens, *_filled(first, num_slots, routed_experts, tokens), direct=False))
    if not found:
        raise ValueError(f"no kernel tile supports {first} and {second} on compute capability {capability}")
    return min(found, key=lambda predicted: predicted[0])[1]


@functools.lru_cache(maxsize=1024)
def invariant_scheme(
    first: GemmShape, second: GemmShape, num_slots: int, routed_experts: int, capability: int
) -> BlockScheme:
    """The cost model's choice among schemes that give a row the same bits, whatever the number of rows.

    Instructions and their order along K depend on the shapes alone. Rows of a tile, columns and stages are free: no sum
    crosses them.

    Raises:
        ValueError: no kernel has such tiles for the shapes.
    """
    shapes = first, second
    for kernel in ("wgmma", "mma", "wgmma_bytes", "mma_bytes"):
        found = []
        for tokens in KERNELS[kernel].token_tiles:
            blocks, rows = _filled(first, num_slots, routed_experts, tokens)
            fitting = [_tiles_in_order(kernel, shape, tokens, capability) for shape in shapes]
            if all(fitting):
                pairs = zip(fitting, shapes, strict=True)
                tiles = [
                    _cheapest(of_shape, shape, blocks, rows, capability, uniform=True) for of_shape, shape in pairs
                ]
                found.append(_timed_scheme("grouped", shapes, tiles, blocks, rows, capability))
        # Which kernel has tiles depends on the shapes alone.
        if found:
            return min(found, key=lambda predicted: predicted[0])[1]
    raise ValueError(
        f"batch_invariant is True; no kernel of compute capability {capability} adds up {first} and {second} in one "
        "order for all numbers of rows"
    )


def _filled(shape: GemmShape, num_slots: int, routed_experts: int, tokens: int) -> tuple[float, float]:
    """Blocks of `tokens` rows that uniform routing fills for the experts of a product, and the rows of one."""
    blocks = expected_blocks(num_slots, routed_experts, shape.num_experts, tokens)
    return blocks, num_slots * shape.num_experts / routed_experts / blocks


def _cheapest(
    tiles: Sequence[Tile],
    shape: GemmShape,
    expected_blocks: float,
    rows: float | None,
    capability: int,
    *,
    uniform: bool,
) -> Tile:
    """The tile of least predicted time, the first of equals."""
    return min(tiles, key=lambda tile: tile.predicted_microseconds(shape, expected_blocks, rows, capability, uniform))


def _timed_scheme(
    routing: SlotRouting,
    shapes: tuple[GemmShape, GemmShape],
    tiles: Sequence[Tile],
    blocks: float,
    rows: float | None,
    capability: int,
) -> tuple[float, BlockScheme]:
    """The predicted microseconds of both products, and their scheme with or without an overlap."""
    microseconds = sum(
        tile.predicted_microseconds(shape, blocks, rows, capability, uniform=True)
        for shape, tile in zip(shapes, tiles, strict=True)
    )
    overlapping = overlaps(shapes[1], tiles[1], microseconds, capability)
    return microseconds, BlockScheme(routing, *tiles, overlaps=overlapping)


def _tiles_in_order(kernel: str, shape: GemmShape, tokens: int, capability: int) -> list[Tile]:
    if kernel not in kernels_of(shape, capability):
        return []
    if kernel == "wgmma":
        tiles = wgmma.candidates(shape, tokens, capability, all_scaling=True)
        return [tile for tile in tiles if wgmma.adds_in_order(shape, tile)]
    if kernel == "wgmma_bytes":
        return [*wgmma_bytes.candidates(shape, tokens, capability, in_order=True)]
    of_mma = (mma if kernel == "mma" else mma_bytes).candidates(shape, tokens, capability)
    return [tile for tile in of_mma if mma.adds_in_order(tile)]
