"""`MarlinWeights`: the packed weights of all experts of one matrix, as a pytree.

Slices by expert, by column and by row are slices of the leaves: the packing never has to be undone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_marlin_moe.formats import WeightFormat
from jax_marlin_moe.layout import TILE_K, TILE_N


@dataclasses.dataclass(frozen=True)
class MarlinWeights:
    """E quantised matrices of shape (K, N), K the input dimension.

    Attributes:
        packed: codes in Marlin order.
        scales: one per group of K and column, float16 or bfloat16, columns in Marlin grouped order (also when
            there is one group).
        zeros: integer zero points in Marlin order, for formats that have them.
        bias: float32, logical column order, or None.
        input_order: where groups were sorted at load (act-order): row k of the packed matrix multiplies
            `x[:, input_order[e, k]]`. None means the identity.
        format: the row of the format registry.
        layout: "a16", the packing for 16-bit activations; weights packed for another mode are refused.
    """

    packed: Int32[Array, "E K//16 words"]
    scales: Float[Array, "E G N"]
    zeros: Int32[Array, "E G N//pf"] | None
    bias: Float[Array, "E N"] | None
    input_order: Int32[Array, "E K"] | None
    format: WeightFormat
    layout: str = "a16"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.packed.shape[-3]

    @property
    def k(self) -> int:
        """Rows of the logical matrix: the input dimension."""
        return self.packed.shape[-2] * TILE_K

    @property
    def n(self) -> int:
        """Columns of the logical matrix: the output dimension."""
        return self.packed.shape[-1] * self.format.codes_per_word // TILE_K

    @property
    def num_groups(self) -> int:
        """Groups of K that share scales."""
        return self.scales.shape[-2]

    @property
    def group_size(self) -> int:
        """Rows that share a scale; K when channel-wise."""
        return self.k // self.num_groups

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def expert(self, index: int) -> "MarlinWeights":
        """The weights of one expert, as a stack of one: a dense quantised linear."""
        if not 0 <= index < self.num_experts:
            raise IndexError(f"index is {index}; it must lie in [0, {self.num_experts})")
        return jax.tree.map(lambda leaf: leaf[index : index + 1], self)

    def columns(self, start: int, stop: int) -> "MarlinWeights":
        """Output columns [start, stop), multiples of 64: a tensor-parallel shard, or gate or up of a pair."""
        _check_slice("columns", start, stop, self.n, TILE_N)
        words = TILE_K // self.format.codes_per_word  # packed words per column
        pf = self.format.codes_per_word
        return dataclasses.replace(
            self,
            packed=self.packed[..., words * start : words * stop],
            scales=self.scales[..., start:stop],
            zeros=None if self.zeros is None else self.zeros[..., start // pf : stop // pf],
            bias=None if self.bias is None else self.bias[..., start:stop],
        )

    def rows(self, start: int, stop: int) -> "MarlinWeights":
        """Input rows [start, stop): whole groups (any multiple of 16 when channel-wise); without the bias.

        Refused where the rows have an order of their own, which names columns of the whole x.
        """
        if self.input_order is not None:
            raise ValueError("input_order is not None: its rows read x from anywhere, so they have no input slice")
        step = TILE_K if self.num_groups == 1 else self.group_size
        _check_slice("rows", start, stop, self.k, step)
        groups = slice(None) if self.num_groups == 1 else slice(start // step, stop // step)
        return dataclasses.replace(
            self,
            packed=self.packed[..., start // TILE_K : stop // TILE_K, :],
            scales=self.scales[..., groups, :],
            zeros=None if self.zeros is None else self.zeros[..., groups, :],
            bias=None,
        )


jax.tree_util.register_dataclass(
    MarlinWeights,
    data_fields=["packed", "scales", "zeros", "bias", "input_order"],
    meta_fields=["format", "layout"],
)


def concatenate_columns(parts: Sequence[MarlinWeights]) -> MarlinWeights:
    """Joins matrices with equal E, K, groups and format side by side: [gate | up].

    Raises:
        TypeError: if their scales have different dtypes.
        ValueError: if the parts disagree in format, shape, grouping, row order or in having a bias.
    """
    first, *rest = parts
    for number, part in enumerate(rest, start=1):
        _check_alike("parts", number, part, first, ("format", "layout", "num_experts", "k", "num_groups"))
        if first.input_order is not None and not _equal_arrays(first.input_order, part.input_order):
            raise ValueError(
                f"parts[{number}].input_order differs from parts[0].input_order; matrices that read the same "
                "input through different row orders cannot be joined: keep them apart, or requantise"
            )

    def join(name: str) -> Any:  # optional leaves are there in all parts or in none
        leaves = [getattr(part, name) for part in parts]
        return None if leaves[0] is None else jnp.concatenate(leaves, axis=-1)

    return dataclasses.replace(
        first, packed=join("packed"), scales=join("scales"), zeros=join("zeros"), bias=join("bias")
    )


def stack_experts(experts: Sequence[MarlinWeights]) -> MarlinWeights:
    """Stacks along the expert axis.

    Raises:
        TypeError: if the scales of the experts have different dtypes.
        ValueError: if the experts disagree in format, shape, grouping or in having a bias or a row order.
    """
    first, *rest = experts
    for number, part in enumerate(rest, start=1):
        _check_alike("experts", number, part, first, ("format", "layout", "k", "n", "num_groups"))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *experts)


def _check_alike(
    what: str, number: int, part: MarlinWeights, first: MarlinWeights, properties: tuple[str, ...]
) -> None:
    for name in properties:
        ours, theirs = getattr(first, name), getattr(part, name)
        if ours != theirs:
            raise ValueError(f"{what}[{number}].{name} is {theirs}; it must equal {what}[0].{name} = {ours}")
    if part.scales.dtype != first.scales.dtype:  # joining them would widen both to float32
        raise TypeError(
            f"{what}[{number}].scales has dtype {part.scales.dtype}; it must be {first.scales.dtype}, as in {what}[0]"
        )
    for name in ("bias", "input_order"):
        if (getattr(first, name) is None) != (getattr(part, name) is None):
            raise ValueError(f"{what}[{number}].{name} must be given exactly where {what}[0].{name} is")


def _equal_arrays(a: Array, b: Array | None) -> bool:
    return a is b or (b is not None and (a.shape == b.shape and bool(jnp.array_equal(a, b))))


def _check_slice(what: str, start: int, stop: int, size: int, step: int) -> None:
    if not 0 <= start < stop <= size or start % step or stop % step:
        raise ValueError(
            f"{what} [{start}, {stop}) must be a non-empty range inside [0, {size}) with both ends multiples of {step}"
        )
