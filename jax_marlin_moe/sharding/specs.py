"""Partition specs of packed weights: which dimension of each leaf an axis of a mesh cuts."""

import dataclasses
import math
from typing import Any, Literal

from jax.sharding import PartitionSpec

from jax_marlin_moe.layout import TILE_K, TILE_N
from jax_marlin_moe.sharding.shares import APPEND_ZEROS, check_shares, group_rows
from jax_marlin_moe.sharding.tensor_parallel import shares_of
from jax_marlin_moe.weights import LEAVES, MarlinWeights

Axes = tuple[str, ...]


def partition_specs(
    weights: MarlinWeights,
    over: Literal["experts", "columns", "rows"],
    axis: str | tuple[str, ...],
    *,
    ranks: int | None = None,
    one_matrix: bool = False,
) -> MarlinWeights:
    """A partition spec in the place of every leaf, for `in_specs` of `jax.shard_map` or for `NamedSharding`.

    Args:
        weights: for "columns" and "rows" of a block what `tensor_parallel` returned.
        over: the dimension that is cut. Scales that all rows share stay whole over "rows".
        axis: of the mesh.
        ranks: devices along the axis; where it is given, the dimension must fall into as many equal shares, of whole
            packed tiles and whole groups.
        one_matrix: whether the columns are of one matrix, as those of a linear are, so that any of them may be apart;
            [gate | up] is not, and is cut over "columns" only as `tensor_parallel` has laid it out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no such dimension, or the matrix cannot be cut along it: gate and up would come apart, the
            rows have an order of their own, padding is where the cut would be, or the size has no such shares.
    """
    if over not in ("experts", "columns", "rows"):
        raise ValueError(f"over is {over!r}; it must be 'experts', 'columns' or 'rows'")
    if not isinstance(weights, MarlinWeights):
        raise TypeError(f"weights has type {type(weights).__name__}; it must be a MarlinWeights")
    axes = as_axes("axis", axis)
    laid_out = shares_of(weights)
    if over == "columns" and laid_out is None and not one_matrix:
        raise ValueError(
            "weights is not laid out for ranks: a cut of [gate | up] gives gate to some and up to others. Pass what "
            "jax_marlin_moe.sharding.tensor_parallel returned, or one_matrix=True for columns of one matrix"
        )
    if over == "columns" and ranks is not None and laid_out not in (None, ranks):
        raise ValueError(
            f"weights is laid out for {laid_out} ranks, and ranks is {ranks}; lay the matrices out for {ranks} ranks "
            "with jax_marlin_moe.sharding.tensor_parallel"
        )
    if over == "rows" and weights.input_order is not None:
        raise ValueError(
            "weights.input_order is not None: its rows read x from anywhere, so they cannot be cut; fold it into the "
            "columns of gate_up first, with jax_marlin_moe.fold_input_order(gate_up, down)"
        )
    padding = {"experts": 0, "columns": weights.column_padding, "rows": weights.row_padding}[over]
    if padding:
        raise ValueError(
            f"weights has {'column' if over == 'columns' else 'row'}_padding {padding}, so shares of its {over} would "
            f"not be equal: {APPEND_ZEROS}"
        )
    if ranks is not None:
        _check_ranks(weights, over, ranks)
    return matrix_specs(weights, *{"experts": (axes,), "columns": ((), axes), "rows": ((), (), axes)}[over])


def as_axes(name: str, axes: Any) -> Axes:
    """The name of an axis, or those of several, as a tuple; TypeError on anything else."""
    found = (axes,) if isinstance(axes, str) else axes
    if not isinstance(found, tuple | list) or not all(isinstance(axis, str) for axis in found):
        raise TypeError(f"{name} is {axes!r}; it must be the name of an axis of the mesh, or a tuple of names")
    return tuple(found)


def matrix_specs(
    weights: Any, expert: Axes = (), columns: Axes = (), rows: Axes = (), *, grouped: bool | None = None
) -> Any:
    """Specs for axes that cut experts and, of what `tensor_parallel` laid out, columns or rows.

    `grouped` says whether rows have scales of their own, where weights are those of one rank.
    """
    grouped = group_rows(weights) is not None if grouped is None else grouped
    groups = rows if grouped else ()
    specs = {
        "packed": spec(expert, rows, columns),
        "scales": spec(expert, groups, columns),
        "zeros": spec(expert, groups, columns),
        "bias": spec(expert, columns or rows),
        "input_order": spec(expert),
        "global_scales": spec(expert, columns),
    }
    return dataclasses.replace(weights, **{name: specs[name] for name in LEAVES if getattr(weights, name) is not None})


def spec(*dimensions: Axes) -> PartitionSpec:
    """The axes of each dimension, from the first on; those that are left out are whole."""
    entries = [None if not axes else axes[0] if len(axes) == 1 else axes for axes in dimensions]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def is_spec(node: Any) -> bool:
    """Whether a node of a pytree is a partition spec: `is_leaf` for trees of them."""
    return isinstance(node, PartitionSpec)


def _check_ranks(weights: MarlinWeights, over: str, ranks: int) -> None:
    """Raises ValueError unless the dimension that is cut falls into equal shares."""
    if over == "experts":
        check_experts(weights.num_experts, ranks)
    elif over == "columns":
        what, size, step, shares = "N", weights.n, TILE_N, f"whole tiles of {TILE_N} columns"
        check_shares(f"weights has {what} = {size} columns", size, ranks, step, shares, hint=APPEND_ZEROS)
    else:
        group = group_rows(weights)
        step = TILE_K if group is None else math.lcm(TILE_K, group)
        shares = f"whole groups of {step} rows"
        check_shares(f"weights has K = {weights.k} rows", weights.k, ranks, step, shares, hint=APPEND_ZEROS)


def check_experts(experts: int, ranks: int) -> None:
    """Raises ValueError unless all ranks have as many experts."""
    check_shares(
        f"weights has E = {experts} experts", experts, ranks, 1, "as many experts each",
        hint="append experts that no id names",
    )  # fmt: skip
