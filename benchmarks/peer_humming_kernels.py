"""Triton kernels of what a block needs beside the products of `humming-kernels`: the alignment and the weighted sum."""

try:
    import torch
    import triton
    import triton.language as tl
except ImportError:
    torch = triton = tl = None

_jit = triton.jit if triton else lambda function: function
constexpr = tl.constexpr if triton else int


def _power_of_two(value: int) -> int:
    """The least power of two that is not below a positive value."""
    return 1 << (value - 1).bit_length()


def quotient(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


@_jit
def _count_experts(ids, counts, slots, experts: constexpr, chunk: constexpr, bins: constexpr):
    """How many of one chunk's slots go to each expert; what lies past the end is counted as expert `experts`."""
    program = tl.program_id(0)
    slot = program * chunk + tl.arange(0, chunk)
    expert = tl.load(ids + slot, mask=slot < slots, other=experts)
    tl.store(counts + program * bins + tl.arange(0, bins), tl.histogram(expert, bins))


@_jit
def _place_slots(
    ids,
    counts,
    cursors,
    sorted_ids,
    expert_ids,
    padded_slots,
    slots,
    sorted_stride,
    expert_stride,
    tile_0,
    tile_1,
    experts: constexpr,
    chunk: constexpr,
    bins: constexpr,
    chunks_bound: constexpr,
):
    """Slots in the order of their experts, each expert padded to whole tiles, and the expert of every tile.

    Program (i, j) places the slots of chunk i in table j, whose tiles have tile_j rows. With one chunk it counts for
    itself, else it reads what `_count_experts` left.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    table = tl.program_id(1)
    tile = tl.where(table == 0, tile_0, tile_1)
    sorted_ids += table * sorted_stride
    expert_ids += table * expert_stride
    cursors += (table * programs + program) * bins
    each = tl.arange(0, bins)
    slot = program * chunk + tl.arange(0, chunk)
    expert = tl.load(ids + slot, mask=slot < slots, other=experts)
    if chunks_bound == 1:
        total = tl.histogram(expert, bins)
        before = tl.zeros((bins,), tl.int32)
    else:
        row = tl.arange(0, chunks_bound)[:, None]
        every = tl.load(counts + row * bins + each[None, :], mask=row < programs, other=0)
        total = tl.sum(every, 0)
        before = tl.sum(tl.where(row < program, every, 0), 0)
    total = tl.where(each < experts, total, 0)
    padded = (total + tile - 1) // tile * tile
    first = tl.cumsum(padded, 0) - padded
    tl.store(cursors + each, first + before)
    if program == 0:
        tl.store(padded_slots + table, tl.sum(padded, 0))
    # The chunks share out the padding and the tiles' experts.
    for i in range(program, tile, programs):
        tl.store(sorted_ids + first + total + i, tl.zeros_like(each) + slots, mask=total + i < padded)
    for i in range(program, tl.max(padded, 0) // tile, programs):
        tl.store(expert_ids + first // tile + i, each, mask=i * tile < padded)
    tl.debug_barrier()
    place = tl.atomic_add(cursors + expert, 1, mask=slot < slots)
    tl.store(sorted_ids + place, slot, mask=slot < slots)


@_jit
def _sum_slots(rows, weights, out, hidden, top_k: constexpr, width: constexpr):
    """Each token's rows, weighted and summed."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < hidden
    total = tl.zeros((width,), tl.float32)
    for i in tl.static_range(top_k):
        row = tl.load(rows + (token * top_k + i) * hidden + column, mask=inside, other=0.0)
        total += tl.load(weights + token * top_k + i) * row.to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)


def sum_rows(rows, weights, out, top_k: int) -> None:
    """Launches the weighted sum of rows [tokens * top_k, hidden] into out [tokens, hidden]."""
    tokens, hidden = out.shape
    _sum_slots[(tokens, quotient(hidden, 512))](rows, weights, out, hidden, top_k=top_k, width=512, num_warps=2)


class Alignment:
    """The tables that the library's indexed products read, for one routing.

    Its heuristics may choose tiles of different heights for the two products: then there are two tables, from the same
    launch.

    Attributes:
        tables: for each product, the slots by expert, the expert of every tile, and the number of padded slots.
    """

    def __init__(self, ids, experts: int, tiles: tuple[int, int]) -> None:
        self._ids = ids
        self._experts = experts
        slots = ids.numel()
        # One chunk where that is enough for a single program, else as many as one program can add up.
        self._chunk = max(128, _power_of_two(min(slots, max(1024, quotient(slots, 64)))))
        self._chunks = quotient(slots, self._chunk)
        self._bins = max(128, _power_of_two(experts + 1))
        heights = sorted(set(tiles), reverse=True)
        used = min(experts, slots)
        # Rows of the tables start at whole vectors of the products' loads.
        sorted_stride = quotient(slots + used * (heights[0] - 1), 32) * 32
        expert_stride = quotient(sorted_stride // heights[-1] + 1, 32) * 32
        empty = {"dtype": torch.int32, "device": ids.device}
        self._sorted = torch.empty((len(heights), sorted_stride), **empty)
        self._expert_of = torch.empty((len(heights), expert_stride), **empty)
        self._padded = torch.empty((len(heights),), **empty)
        self._counts = torch.empty((self._chunks, self._bins), **empty)
        self._cursors = torch.empty((len(heights), self._chunks, self._bins), **empty)
        self._heights = heights
        self.tables = [
            {
                "sorted_ids": self._sorted[i],
                "expert_ids": self._expert_of[i],
                "num_tokens_padded": self._padded[i : i + 1],
            }
            for i in (heights.index(tile) for tile in tiles)
        ]

    def __call__(self) -> None:
        """Launches one kernel, or two for many slots."""
        slots = self._ids.numel()
        sizes = {"experts": self._experts, "chunk": self._chunk, "bins": self._bins}
        if self._chunks > 1:
            _count_experts[(self._chunks,)](self._ids, self._counts, slots, **sizes, num_warps=8)
        _place_slots[(self._chunks, len(self._heights))](
            self._ids,
            self._counts,
            self._cursors,
            self._sorted,
            self._expert_of,
            self._padded,
            slots,
            self._sorted.stride(0),
            self._expert_of.stride(0),
            self._heights[0],
            self._heights[-1],
            **sizes,
            chunks_bound=_power_of_two(self._chunks),
            num_warps=4 if self._chunk < 512 else 16,
        )
