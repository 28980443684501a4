"""How a whole expert block is cut on CUDA."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.kernels import mma, mma_bytes, wgmma, wgmma_bytes
from jax_marlin_moe.cuda.kernels.problem import GemmShape

SlotRouting = Literal["direct", "grouped", "aligned"]  # of BlockScheme
# In place of a scheme: tiles that add up K in one order, whatever the number of rows.
BatchInvariant = Literal["batch_invariant"]


@dataclasses.dataclass(frozen=True)
class GemmKernel:
    """A GEMM kernel, from its twin in cuda/kernels.

    Attributes:
        header: in csrc/cuda.
        tile: the type of its tiles.
        token_tiles: rows of a token tile that it has, ascending.
        candidates: (shape, rows of a token tile, capability) to the tiles worth considering.
        byte_rows: whether its rows have 8 bits.
    """

    header: str
    tile: type["Tile"]
    token_tiles: tuple[int, ...]
    candidates: Callable[[GemmShape, int, int], Sequence["Tile"]]
    byte_rows: bool = False


Tile = mma.MmaTile | mma_bytes.MmaByteTile | wgmma.WgmmaTile | wgmma_bytes.WgmmaByteTile
# By the names that architectures and tables have for their tiles.
KERNELS = {
    "wgmma": GemmKernel("gemm/wgmma/kernel.cuh", wgmma.WgmmaTile, wgmma.TOKEN_TILES, wgmma.candidates),
    "wgmma_bytes": GemmKernel(
        "gemm/wgmma/kernel.cuh", wgmma_bytes.WgmmaByteTile, wgmma_bytes.TOKEN_TILES, wgmma_bytes.candidates, True
    ),
    "mma": GemmKernel("gemm/mma/kernel.cuh", mma.MmaTile, mma.TOKEN_TILES, mma.candidates),
    "mma_bytes": GemmKernel("gemm/mma/kernel.cuh", mma_bytes.MmaByteTile, mma.TOKEN_TILES, mma_bytes.candidates, True),
}


def kernels_of(shape: GemmShape, capability: int) -> list[str]:
    """The names of the kernels that an architecture has for rows of the shape's type."""
    kernels = get_architecture(capability).kernels
    return [name for name, row in KERNELS.items() if name in kernels and row.byte_rows == shape.has_byte_rows]


@dataclasses.dataclass(frozen=True)
class BlockScheme:
    """How a whole expert block is cut.

    Attributes:
        routing: what finds the slots of a token tile. "direct": each slot is a token tile of its own, read from
            topk_ids. "grouped": every CTA groups the slots by expert for itself, where slots are few and the tiles
            leave room for them; "aligned" otherwise. "aligned": a kernel before the products.
        gate_up: tile of the first product; `tokens` is the most slots of a token tile.
        down: tile of the second; the same `tokens`, or a multiple or a part of them where they are "aligned".
        overlaps: whether the second product's CTAs start while the first one's finish, and fetch weights meanwhile.
            They start on the multiprocessors that are free first: more of them than their share where there is room,
            fewer where the shared memory that the first ones free is fragmented.
    """

    routing: SlotRouting
    gate_up: Tile
    down: Tile
    overlaps: bool = dataclasses.field(default=True, kw_only=True)

    def fits(self, first: GemmShape, second: GemmShape, capability: int) -> bool:
        """Whether both tiles fit the products, and each other."""
        fewer, more = sorted((self.gate_up.tokens, self.down.tokens))
        alike = fewer == more or (self.routing == "aligned" and more % fewer == 0)
        alike = alike and self.gate_up.has_slabs == self.down.has_slabs
        return alike and self.gate_up.fits(first, capability) and self.down.fits(second, capability)


def requested_scheme(
    cuda_scheme: BlockScheme | None, batch_invariant: bool, implementation: str | None
) -> BlockScheme | BatchInvariant | None:
    """What a call asks of the plan of its block.

    Raises:
        ValueError: `batch_invariant` does not go with the other arguments.
    """
    if not batch_invariant:
        return cuda_scheme
    if cuda_scheme is not None:
        raise ValueError("cuda_scheme is given and batch_invariant is True, which chooses one itself; pass one of them")
    check_invariant_implementation(implementation)
    return "batch_invariant"


def check_invariant_implementation(implementation: str | None) -> None:
    """Raises ValueError where results of `batch_invariant=True` would depend on the batch."""
    if implementation == "xla":
        raise ValueError(
            "batch_invariant is True and implementation 'xla', whose products add up in orders that XLA chooses by "
            "shape; pass 'cuda' or 'cpu'"
        )


def check_invariant_product(x: jax.Array, dtype: DTypeLike, implementation: str | None) -> None:
    """Raises ValueError where a single product of `batch_invariant=True` would depend on the batch."""
    check_invariant_implementation(implementation)
    if x.dtype != dtype:
        raise ValueError(
            f"batch_invariant is True and the result has dtype {jnp.dtype(dtype).name}; it must be rounded to that of "
            f"the multiplied rows, {x.dtype}: pass such rows, and leave preferred_element_type out"
        )


def check_undivided(batch_invariant: bool, op: str) -> None:
    """Raises ValueError where devices share the rows of a matrix, whose sums they add in float32."""
    if batch_invariant:
        raise ValueError(
            f"batch_invariant is True and the rows of {op}'s weights are sharded; they must be whole on each device: "
            "shard the columns instead"
        )
