"""The kernels of an expert block: which ones, over which buffers, once its shapes and its scheme are known."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.cuda.aligned_list import AlignedList, aligned_list
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.grouped_gemm import BIAS, gemm_kernel, hosts, slices_of_columns
from jax_marlin_moe.cuda.kernels.combine import (
    IdentityExperts,
    SlotSums,
    combine_four_columns_kernel,
    combine_kernel,
)
from jax_marlin_moe.cuda.kernels.epilogue import activated, packed_partials, slot_partials
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.token_tiles import (
    MOST_GROUPED_SLOTS,
    MOST_SLOTS_OF_16_BITS,
    TAKEN_BYTES,
    TokenTiles,
    direct_tiles,
    grouped_tiles,
)
from jax_marlin_moe.cuda.plan_byte_rows import QuantizedRows, Rows, quantized_rows
from jax_marlin_moe.cuda.program import Kernel, Plan
from jax_marlin_moe.cuda.scheme import BlockScheme, Tile
from jax_marlin_moe.weights import MarlinWeights

# Rows of slots in float32, where token tiles have few rows. On an H200, whose L2 has 50 MB, blocks whose rows are 17 MB
# lose 2 % by four columns in 64 bits, 24 MB lose and gain nothing, 29 to 59 MB gain 2 to 5 %, 117 MB 3 to 12 %.
_MOST_FLOAT_BYTES = 24 << 20


@dataclasses.dataclass(frozen=True)
class BlockBuffers:
    """Where an expert block has its arrays among a call's buffers.

    Attributes:
        x: a row for each token, or for each slot.
        gate_up: the first operand of the matrix.
        down: likewise.
        topk_weights: a weight for each slot.
        topk_ids: an expert for each slot.
        expert_map: or None.
        y: the result.
        scratch: the first of those that the block needs for itself.
        ids_from_previous: whether the kernel before the block writes ids and weights.
        shared_gate_up: the first operand of the shared experts' matrix, or None.
        shared_down: likewise.
        x_scale: of rows in FP8, or None.
        intermediate_scales: of a quantised intermediate, or None.
        identity: experts that return their input, or None.
    """

    x: int
    gate_up: int
    down: int
    topk_weights: int
    topk_ids: int
    expert_map: int | None
    y: int
    scratch: int
    ids_from_previous: bool = False
    shared_gate_up: int | None = None
    shared_down: int | None = None
    x_scale: int | None = None
    intermediate_scales: int | None = None
    identity: IdentityExperts | None = None

    def rows_of_scratch(self, slots: int) -> dict[int, int]:
        """Rows that buffers of the scratch have for each token of that many slots, by the buffer."""
        return {self.scratch: slots, self.scratch + 1: slots}


@dataclasses.dataclass(frozen=True)
class BlockKernels:
    """A block whose shapes and scheme fit each other. Attributes are the arguments of `plan_block`, but for these.

    Attributes:
        first: the shape of the product with `gate_up`.
        second: of that with `down`.
        routed_experts: that ids may name, shared ones among them.
        scheme: how the block is cut.
        in_order: whether sums are added up in one order, however many rows there are.
        dtype: of the result.
        rounded_to: what the caller rounds it to.
    """

    x: jax.Array | jax.ShapeDtypeStruct
    gate_up: MarlinWeights
    down: MarlinWeights
    first: GemmShape
    second: GemmShape
    buffers: BlockBuffers
    _: dataclasses.KW_ONLY
    tokens: int
    top_k: int
    shared: int
    routed_experts: int
    activation: Activation
    capability: int
    scheme: BlockScheme
    in_order: bool
    intermediate: str | None
    dtype: jnp.dtype
    rounded_to: jnp.dtype
    activation_dtype: ByteDtype | None
    sliced: bool
    counted: bool

    @property
    def slots(self) -> int:
        """Of a token."""
        return self.top_k + self.shared

    @property
    def num_slots(self) -> int:
        """Of all tokens."""
        return self.tokens * self.slots

    @property
    def num_experts(self) -> int:
        """Of the matrices, and those shared."""
        return self.gate_up.num_experts + self.shared

    @property
    def hidden(self) -> jax.ShapeDtypeStruct:
        """What the activation leaves, padding included."""
        columns = self.gate_up.padded_n // self.activation.halves
        return jax.ShapeDtypeStruct((self.num_slots, columns), self.x.dtype)

    @property
    def overlaps(self) -> bool:
        """Whether kernels may start before the ones before them have ended."""
        return self.capability >= 90

    def overlaps_rows(self, tile: Tile) -> bool:
        """Whether a product may start so: those of mma.sync fetch scales of rows before they wait."""
        return self.overlaps and (self.activation_dtype is None or tile.waits_for_rows)

    def plan(self) -> Plan:
        """The kernels, and the scratch: `hidden`, the rows of the second product, rows in 8 bits, a list of slots."""
        buffers = self.buffers
        hidden = buffers.scratch
        of_x, of_hidden = self._quantized_rows(hidden, first_scratch=hidden + 2)
        reads = (
            Rows(buffers.x, self.first.k) if of_x is None else of_x.rows,
            Rows(hidden, self.hidden.shape[1]) if of_hidden is None else of_hidden.rows,
        )
        quantized = [scratch for rows in (of_x, of_hidden) if rows is not None for scratch in rows.scratch]

        kernels: list[Kernel] = []
        lists: tuple[jax.ShapeDtypeStruct, ...] = ()
        tiles = self._tiles_without_list()
        if tiles is None:
            listed = self._aligned_list(hidden + 2 + len(quantized))
            first_tiles, second_tiles = listed.tiles
            kernels, lists = [*listed.kernels], listed.scratch
        else:
            first_tiles, second_tiles = tiles

        overlaps_first = self.overlaps and (bool(kernels) or buffers.ids_from_previous)
        if of_x is not None:  # beside alignment
            kernels.append(dataclasses.replace(of_x.kernel, overlaps_predecessor=overlaps_first))
            overlaps_first = self.overlaps_rows(self.scheme.gate_up)
        kernels.append(self._first_product(reads[0], first_tiles, hidden, overlaps_first))
        if of_hidden is not None:
            kernels.append(of_hidden.kernel)
        second_kernels, partials = self._second_product(reads[1], second_tiles, hidden + 1)
        return Plan((*kernels, *second_kernels), (self.hidden, partials, *quantized, *lists))

    def _quantized_rows(self, hidden: int, first_scratch: int) -> tuple[QuantizedRows | None, QuantizedRows | None]:
        """The rows of both products in 8 bits, unless those that there are will do."""
        if self.activation_dtype is None:
            return None, None
        of_x = quantized_rows(
            "x",
            self.x,
            self.buffers.x,
            self.first,
            self.scheme.gate_up,
            self.gate_up,
            first_scratch,
            self.activation_dtype,
            overlaps_predecessor=False,
            fixed=self.buffers.x_scale,
        )
        in_units = self.intermediate is not None
        if in_units and not self.second.has_byte_rows:
            return of_x, None
        of_hidden = quantized_rows(
            "hidden",
            self.hidden,
            hidden,
            self.second,
            self.scheme.down,
            self.down,
            first_scratch + len(of_x.scratch),
            self.activation_dtype,
            overlaps_predecessor=self.overlaps,
            in_units=in_units,
        )
        return of_x, of_hidden

    def _tiles_without_list(self) -> tuple[TokenTiles, TokenTiles] | None:
        """How the products find their slots from the ids themselves; None where they read an aligned list.

        The second product may read at once what the kernel before the block has written: the first one lets it in only
        when it has waited for that kernel.
        """
        counts = self.num_slots, self.num_experts, self.routed_experts
        ids, expert_map, waits = self.buffers.topk_ids, self.buffers.expert_map, self.buffers.ids_from_previous
        scheme = self.scheme
        if scheme.routing == "direct":
            return direct_tiles(*counts, ids, expert_map, waits), direct_tiles(*counts, ids, expert_map, False)
        few = self.tokens * self.top_k <= MOST_GROUPED_SLOTS and self.num_slots <= MOST_SLOTS_OF_16_BITS
        if scheme.routing == "aligned" or not few or self.counted:
            return None
        first, second = (
            grouped_tiles(*counts, scheme.gate_up.tokens, ids, expert_map, previous, self.tokens * self.shared)
            for previous in (waits, False)
        )
        hosted = hosts(scheme.gate_up, self.first, first, self.capability)
        return (first, second) if hosted and hosts(scheme.down, self.second, second, self.capability) else None

    def _aligned_list(self, scratch: int) -> AlignedList:
        tiles = (self.scheme.gate_up, self.first), (self.scheme.down, self.second)
        return aligned_list(
            self.num_slots,
            self.num_experts,
            self.routed_experts,
            (self.scheme.gate_up.tokens, self.scheme.down.tokens),
            self.capability,
            topk_ids=self.buffers.topk_ids,
            expert_map=self.buffers.expert_map,
            scratch=scratch,
            takes_tiles=all(self._takes_tiles(tile, shape) for tile, shape in tiles),
            ids_from_previous=self.buffers.ids_from_previous,
            slots_of_token=self.slots if self.counted else None,
        )

    def _takes_tiles(self, tile: Tile, shape: GemmShape) -> bool:
        """Whether the CTAs of a product take work tiles as they come to them.

        Not with slices of the columns: they would share a counter, and one may begin while the one before ends.
        """
        size = tile.shared_bytes(shape) + TAKEN_BYTES
        room = get_architecture(self.capability).fits_shared_memory(size, tile.ctas_per_sm)
        return tile.has_slabs or (tile.takes_tiles and not self.sliced and room)

    def _first_product(self, reads: Rows, tiles: TokenTiles, out: int, overlaps_predecessor: bool) -> Kernel:
        """Up to the activation, whose result goes to `out`."""
        tile, buffers, slots_per_row = self.scheme.gate_up, self.buffers, self.num_slots // self.x.shape[0]
        activate = activated(
            self.activation,
            self.x.dtype.name,
            self.hidden.shape[1],
            out=out,
            bias=None if self.gate_up.bias is None else buffers.gate_up + BIAS,
            x_scale=None if self.activation_dtype is not None else buffers.x_scale,  # else it is that of each row
            intermediate=self.intermediate,
            intermediate_scales=buffers.intermediate_scales,
            row_scales=reads.scales,
            slots_per_row=slots_per_row,
        )
        padding = 0
        if overlaps_predecessor and isinstance(tile, MmaTile):
            # CTAs that come in while another kernel runs fill one multiprocessor after the other.
            own = tile.shared_bytes(self.first) + tiles.shared_bytes
            padding = get_architecture(self.capability).padding(own, tile.ctas_per_sm)
        return gemm_kernel(
            "gate_up",
            self.first,
            tile,
            self.gate_up,
            jnp.dtype(self.first.dtype),
            slots_per_row=slots_per_row,
            row_stride=reads.stride,
            x=reads.buffer,
            first_operand=buffers.gate_up,
            token_tiles=tiles,
            epilogue=activate,
            overlaps_predecessor=overlaps_predecessor,
            shared=buffers.shared_gate_up,
            shared_experts=self.shared,
            in_order=self.in_order,
            padding_bytes=padding,
            expert_rows=self.num_slots / self.routed_experts,
        )

    def _second_product(
        self, reads: Rows, tiles: TokenTiles, partials: int
    ) -> tuple[list[Kernel], jax.ShapeDtypeStruct]:
        """Into buffer `partials`, and the sums over slots: of slices of the columns, one after the other."""
        buffers, tile, columns = self.buffers, self.scheme.down, self.second.n
        slices, packed_pairs = self._slices(tiles)
        sums = SlotSums(
            self.tokens,
            self.slots,
            columns,
            self.num_experts,
            self.routed_experts,
            self.dtype,
            partials=partials,
            topk_ids=buffers.topk_ids,
            expert_map=buffers.expert_map,
            out=buffers.y,
            overlaps_predecessor=self.overlaps,
            counted=self.counted,
        )
        kernels = []
        for part in slices:
            weigh = slot_partials(
                columns,
                out=partials,
                bias=None if self.down.bias is None else buffers.down + BIAS,
                topk_weights=buffers.topk_weights,
                intermediate_scales=buffers.intermediate_scales,
                row_scales=reads.scales,
                columns_of=part,
            )
            product = gemm_kernel(
                "down",
                self.second,
                tile,
                self.down,
                jnp.dtype(self.second.dtype),
                slots_per_row=1,
                row_stride=reads.stride,
                x=reads.buffer,
                first_operand=buffers.down,
                token_tiles=tiles,
                epilogue=weigh if packed_pairs is None else packed_partials(weigh, packed_pairs),
                overlaps_predecessor=self.overlaps_rows(tile) and (self.scheme.overlaps or tile.has_slabs),
                shared=buffers.shared_down,
                shared_experts=self.shared,
                columns=part,
                in_order=self.in_order,
                expert_rows=self.num_slots / self.routed_experts,
            )
            if packed_pairs is None:
                combine = combine_kernel(sums, identity=buffers.identity, columns_of=part, places=tile.has_slabs)
            else:  # of whole rows
                combine = combine_four_columns_kernel(sums, packed_pairs)
            kernels += [product, combine]
        row_words = len(slices[0]) if packed_pairs is None else columns // 2
        return kernels, jax.ShapeDtypeStruct((self.num_slots, row_words), jnp.float32)

    def _slices(self, tiles: TokenTiles) -> tuple[list[range], bool | None]:
        """The columns that the second product has at once, and what `_packed_pairs` says of its rows."""
        columns, whole = self.second.n, [range(self.second.n)]
        if self.buffers.identity is not None:
            return whole, None
        float_bytes = 4 * self.num_slots * columns
        packed_pairs = None if self.in_order else _packed_pairs(self.scheme.down, tiles, self.rounded_to, float_bytes)
        most_columns = 3 * self.hidden.shape[1] * self.x.dtype.itemsize // 4
        if not self.sliced or (packed_pairs is not None and columns // 2 <= most_columns):
            return whole, packed_pairs
        slices = slices_of_columns(self.second, False, self.scheme.down, most_columns)
        return slices, packed_pairs if len(slices) == 1 else None


def _packed_pairs(tile: Tile, token_tiles: TokenTiles, rounded_to: jnp.dtype, float_bytes: int) -> bool | None:
    """Whether the second product packs pairs of columns (csrc/cuda/four_columns.cuh); None where its rows are float32.

    float32 rows, of so many bytes, are for results that end in more bits than bfloat16 has, and for few rows, which
    stay in L2.
    """
    few = (tile.tokens <= 32 and float_bytes <= _MOST_FLOAT_BYTES) or token_tiles.cpp != "AlignedTiles"
    return None if few or rounded_to != jnp.bfloat16 else tile.packed_pairs
