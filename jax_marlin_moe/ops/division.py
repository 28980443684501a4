"""What devices may divide of an op: its rows, the experts, and rows and columns of the matrices.

A dimension that operands and results have in common has one name: devices that divide one of them divide all. Two of
the names are fixed, `ROWS` (tokens, or whatever the op has a row for) and `EXPERTS`; those of matrices are the op's.
Results whose sums are over experts, or over rows of a matrix, are partial on each device, and added by `Part.total`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jax_marlin_moe.layer_slice import is_slice
from jax_marlin_moe.layout import TILE_K, TILE_N
from jax_marlin_moe.ops.sums import rounded_sum, scattered_sum, sends_packed, sum_of_packed
from jax_marlin_moe.weights import LEAVES, MarlinWeights

ROWS, EXPERTS = "t", "e"


@dataclasses.dataclass(frozen=True)
class Division:
    """The dimensions of an op that devices may divide, beside those of `rows`.

    Attributes:
        matrices: by the name of an operand, what its rows and its columns are called; None where they are whole.
        share: the op on a part of a sum: `(call, part, *operands, implementation, **params)` to results, where `call`
            is the op itself, of operands and of parameters that differ. Not called where only rows of the op and
            columns of results are divided.
        columns: by the name of an operand with rows, what its second dimension is called.
        results: what the second dimension of each result is called, None where it is whole, as all are in an empty one.
        summed: the names over which results are sums, beside the experts.
        vectors: operands whose leaves have an entry per expert.
        weights: operands whose arrays are refused where they are sharded, as packed weights are.
        reasons: why a dimension of a matrix is whole and what to do, by operand and "rows" or "columns".
    """

    matrices: Mapping[str, tuple[str | None, str | None]]
    share: Callable[..., list[jax.Array]]
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    results: Sequence[str | None] = ()
    summed: Sequence[str] = ()
    vectors: Sequence[str] = ()
    weights: Sequence[str] = ()
    reasons: Mapping[tuple[str, str], str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one of several devices has of a sum.

    Attributes:
        axis: the mesh axes over which devices have parts; there may be none.
        groups: devices along the axis that have the parts of one sum, in the order of the rows that they keep; None for
            all.
        experts: how many there are on all devices together; None where they are not divided.
        first_expert: the first on this device.
        first_sums: whether this device has the first parts of the sums that are products; None where these are not
            divided. Each row then has one device that adds something: the one with its expert.
        kept: which of as many equal shares of the rows of results this device keeps; None where it keeps all.
        shares: of rows.
        platform: "cuda" or "cpu" where the program is lowered for one already, so that nothing differentiates it.
    """

    axis: str | tuple[str, ...]
    groups: list[list[int]] | None
    experts: int | None
    first_expert: Int32[Array, ""] | None
    first_sums: Bool[Array, ""] | None
    kept: Int32[Array, ""] | None
    shares: int
    platform: str | None = None

    def local(self, ids: Int32[Array, "..."], count: int) -> Int32[Array, "..."]:
        """Experts by their numbers on this device, which has `count`; -1 for those elsewhere."""
        if self.first_expert is None:
            return ids
        local = ids - self.first_expert
        return jnp.where((ids >= 0) & (local >= 0) & (local < count), local, -1)

    @property
    def divides_products(self) -> bool:
        """Whether products are sums over devices, and not only what has several experts."""
        return self.first_sums is not None

    def local_map(self, expert_map: Int32[Array, " experts"] | None, count: int) -> Int32[Array, " experts"] | None:
        """An expert map of the experts of this device."""
        if self.experts is None:
            return expert_map
        return self.local(jnp.arange(self.experts, dtype=jnp.int32) if expert_map is None else expert_map, count)

    def with_bias_once(self, weights: MarlinWeights) -> MarlinWeights:
        """The matrices with a bias of zero on all devices but one of those that have rows of it."""
        if self.first_sums is None or weights.bias is None:
            return weights
        return dataclasses.replace(weights, bias=jnp.where(self.first_sums, jnp.asarray(weights.bias), 0))

    def sum(self, y: jax.Array, dtype: Any) -> jax.Array:
        """The whole sum on each device that has a part of it."""
        return rounded_sum(y, self.axis, dtype, groups=self.groups) if self.axis else y.astype(dtype)

    def total(self, y: jax.Array, dtype: Any) -> jax.Array:
        """The rows of the whole sum that this device keeps."""
        if self.kept is None:
            return self.sum(y, dtype)
        assert self.axis
        return scattered_sum(y, self.axis, dtype, groups=self.groups, dtype=dtype)

    def packs(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether shares of this shape are sent packed on their way to a sum of this dtype, where a card computes."""
        return bool(self.axis) and sends_packed(shape, dtype, self.axis, self.groups, scattered=self.kept is not None)

    def total_of_packed(self, words: jax.Array, dtype: Any) -> jax.Array:
        """`total` of packed shares."""
        assert self.axis
        return sum_of_packed(words, self.axis, dtype, groups=self.groups, scattered=self.kept is not None)

    def keep(self, y: jax.Array) -> jax.Array:
        """The same rows of what the devices have computed alike."""
        if self.kept is None:
            return y
        size = y.shape[0] // self.shares
        return jax.lax.dynamic_slice_in_dim(y, self.kept * size, size)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The names of the dimensions of arrays, None where one is whole.

    Attributes:
        operands: of each leaf of the operands.
        results: of each result.
        units: the smallest equal parts that each name falls into.
        weights: what packed leaves are called in messages, None for other leaves.
        wholes: by leaf and dimension, why it is whole.
    """

    operands: list[tuple[str | None, ...]]
    results: list[tuple[str | None, ...]]
    units: dict[str, int]
    weights: list[str | None]
    wholes: dict[tuple[int, int], str]

    def check_whole(self, op: str, place: int, dimension: int) -> None:
        """Raises ValueError for a leaf of packed weights that is divided along a dimension that must be whole."""
        name = self.weights[place]
        if name is not None:
            why = self.wholes.get((place, dimension), "the op needs it whole")
            raise ValueError(
                f"{name} is sharded along its dimension {dimension}; {op} divides experts, the first dimension of "
                f"packed weights, and here {why}. Weights are never gathered unasked: to ask for it, put them through "
                "jax.lax.with_sharding_constraint, or jax.sharding.reshard, with an empty PartitionSpec"
            )

    def check_parts(self, op: str, place: int, dimension: int, parts: int) -> None:
        """Raises ValueError for packed weights in parts that are not whole experts or tiles."""
        label = self.operands[place][dimension]
        assert label is not None
        units = self.units[label]
        if units % parts:
            what = "experts" if label == EXPERTS else "whole tiles and groups"
            fitting = [count for count in range(1, units + 1) if units % count == 0]
            raise ValueError(
                f"{self.weights[place]} is sharded in {parts} parts along its dimension {dimension}, which has {units} "
                f"{what}; {op} divides them in {', '.join(map(str, fitting))} parts"
            )


def label(
    division: Division,
    names: Sequence[str],
    operands: Sequence[Any],
    rows: Sequence[str],
    types: Sequence[jax.core.ShapedArray],
) -> Labels:
    """The labels of an op's operands, whose names are given, and results.

    Args:
        division: of the op.
        names: of the operands.
        operands: pytrees.
        rows: the operands whose first dimension is that of rows, none where rows cannot be divided.
        types: of the results.
    """
    by_name = dict(zip(names, operands, strict=True))
    columns_of_results = division.results or [None] * len(types)
    units = _units(division, by_name, rows, columns_of_results, types)
    labels: list[tuple[str | None, ...]] = []
    weights_of: list[str | None] = []
    wholes: dict[tuple[int, int], str] = {}
    for name, operand in by_name.items():
        for path, node in jax.tree.leaves_with_path(operand, is_leaf=is_slice):
            leaf = _leaf_name(path)
            found = _leaf_labels(division, name, operand, leaf, node, rows)
            known = [label if label in units else None for label in found]
            stacks = [None] * (node.stack.ndim - node.ndim) if is_slice(node) else []
            named = name in division.weights or _has_codes(path)
            weights_of.append(f"{name}.{leaf}" if named else None)
            if name in division.matrices:
                for dimension, which in ((1, "rows"), (2, "columns")):
                    if (name, which) in division.reasons:
                        at = len(stacks) + (dimension if leaf in ("packed", "scales", "zeros") else 1)
                        wholes[len(labels), at] = division.reasons[name, which]
            labels.append((*stacks, *known))
            if is_slice(node) and node.index is not None:  # what `share_indices` has left
                labels.append(())
                weights_of.append(None)
    of_rows = ROWS if ROWS in units else None
    results = [
        (of_rows, of_columns if of_columns in units else None)[: type_.ndim]
        for of_columns, type_ in zip(columns_of_results, types, strict=True)
    ]
    return Labels(labels, results, units, weights_of, wholes)


def _units(
    division: Division,
    by_name: Mapping[str, Any],
    rows: Sequence[str],
    columns_of_results: Sequence[str | None],
    types: Sequence[jax.core.ShapedArray],
) -> dict[str, int]:
    """By label, the units that devices may divide; labels whose dimensions do not agree on units have none."""
    sizes: dict[str, list[tuple[int, int]]] = {}  # extents, and what parts must be multiples of

    def use(name: str | None, extent: int, step: int = 1) -> None:
        if name is not None:
            sizes.setdefault(name, []).append((extent, step))

    for operand, (of_rows, of_columns) in division.matrices.items():
        weights = by_name[operand]
        use(EXPERTS, weights.num_experts)
        use(of_rows, weights.padded_k, _row_step(weights))
        use(of_columns, weights.padded_n, TILE_N)
    for operand, of_columns in division.columns.items():
        use(of_columns, by_name[operand].shape[1])
    for of_columns, type_ in zip(columns_of_results, types, strict=True):
        use(of_columns, type_.shape[1] if type_.ndim > 1 else 1)
    units = {}
    for name, uses in sizes.items():
        extents, step = {extent for extent, _ in uses}, math.lcm(*(step for _, step in uses))
        if len(extents) == 1 and min(extents) > 0 and min(extents) % step == 0:
            units[name] = min(extents) // step
    counts = [leaf.shape[0] for name in rows for leaf in jax.tree.leaves(by_name[name])]
    if counts:
        count = min(*counts, *(type_.shape[0] for type_ in types))
        if count and not any(extent % count for extent in [*counts, *(type_.shape[0] for type_ in types)]):
            units[ROWS] = count
    return units


def _row_step(weights: MarlinWeights) -> int:
    return TILE_K if weights.num_groups == 1 else math.lcm(TILE_K, weights.rows_per_scale)


def _leaf_name(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".")


def _has_codes(path: Any) -> bool:
    """Whether a leaf is as large as packed weights are, wherever they are in an operand."""
    return any(getattr(key, "name", None) in ("packed", "scales", "zeros") for key in path)


def _leaf_labels(
    division: Division, name: str, operand: Any, leaf: str, node: Any, rows: Sequence[str]
) -> list[str | None]:
    whole: list[str | None] = [None] * node.ndim
    if name in division.matrices:
        assert leaf in LEAVES
        of_rows, of_columns = division.matrices[name]
        of_groups = of_rows if operand.num_groups > 1 else None
        return {
            "packed": [EXPERTS, of_rows, of_columns],
            "scales": [EXPERTS, of_groups, of_columns],
            "zeros": [EXPERTS, of_groups, of_columns],
            "bias": [EXPERTS, of_columns],
            "global_scales": [EXPERTS, of_columns],
            "input_order": [EXPERTS, None],
        }[leaf]
    if name in division.vectors:
        return [EXPERTS, *whole[1:]]
    if name in rows:
        return [ROWS, division.columns.get(name), *whole[2:]][: node.ndim]
    return [None, division.columns[name]] if name in division.columns else whole
