"""Experts over the devices of a mesh, for `jax.shard_map`: partition specs, and the layout of tensor parallelism.

Expert parallelism needs the specs alone: `partition_specs(weights, "experts", axis)`. Tensor parallelism cuts columns
of gate and up and rows of down. Cut as it is stored, [gate | up] would give gate to some ranks and up to the others,
and each rank would add the bias of down to the sum, so `tensor_parallel` lays both out first. A rank's result is then
its share of the sum: `jax.lax.psum` it over the axis.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.arguments import check_weights
from jax_marlin_moe.layout import TILE_K, TILE_N
from jax_marlin_moe.weights import LEAVES, MarlinWeights, concatenate_columns

_PAD_BEFORE = (
    "append zeros to the intermediate dimension of the dense gate, up (columns) and down (rows) before they are "
    "packed; they change no result"
)


def partition_specs(
    weights: MarlinWeights,
    over: Literal["experts", "columns", "rows"],
    axis: str | tuple[str, ...],
    *,
    ranks: int | None = None,
) -> MarlinWeights:
    """A partition spec in the place of every leaf, for `in_specs` of `jax.shard_map` or for `NamedSharding`.

    Args:
        weights: for "columns" and "rows" what `tensor_parallel` returned.
        over: the dimension that is cut. Scales that all rows share stay whole over "rows".
        axis: of the mesh.
        ranks: devices along the axis; where it is given, the dimension must fall into as many equal shares, of whole
            packed tiles and whole groups.

    Raises:
        ValueError: there is no such dimension, or the matrix cannot be cut along it: the rows have an order of their
            own, padding is where the cut would be, or the size has no such shares.
    """
    if over not in ("experts", "columns", "rows"):
        raise ValueError(f"over is {over!r}; it must be 'experts', 'columns' or 'rows'")
    if over == "rows" and weights.input_order is not None:
        raise ValueError(
            "weights.input_order is not None: its rows read x from anywhere, so they cannot be cut; fold it into the "
            "columns of gate_up first, with jax_marlin_moe.fold_input_order(gate_up, down)"
        )
    padding = {"experts": 0, "columns": weights.column_padding, "rows": weights.row_padding}[over]
    if padding:
        raise ValueError(
            f"weights has {'column' if over == 'columns' else 'row'}_padding {padding}, so shares of its {over} would "
            f"not be equal: {_PAD_BEFORE}"
        )
    if ranks is not None:
        _check_ranks(weights, over, ranks)
    whole, experts = PartitionSpec(), PartitionSpec(axis)
    second, third = PartitionSpec(None, axis), PartitionSpec(None, None, axis)
    of_groups = whole if weights.num_groups == 1 else second
    specs = {  # in the order of LEAVES
        "experts": [experts] * 6,
        "columns": [third, third, third, second, whole, second],
        "rows": [second, of_groups, of_groups, second, whole, whole],
    }[over]
    placed: dict[str, Any] = dict(zip(LEAVES, specs, strict=True))
    return dataclasses.replace(weights, **{name: placed[name] for name in LEAVES if getattr(weights, name) is not None})


def tensor_parallel(
    gate_up: MarlinWeights, down: MarlinWeights, ranks: int, *, activation: str | Activation = "silu"
) -> tuple[MarlinWeights, MarlinWeights]:
    """Lays a block out for ranks that each have a share of the intermediate dimension, all experts and all tokens.

    Columns of gate and up alternate in shares, [gate 0 | up 0 | gate 1 | up 1 | ...]. The bias of down is as wide as
    that of all ranks together: the first has it, the others zeros. So the results are for `jax.shard_map` alone, with
    the specs `partition_specs(gate_up, "columns", axis)` and `partition_specs(down, "rows", axis)`, not for one device.

    Args:
        gate_up: E matrices (H, 2 I), columns [gate | up]; (H, I) where the activation is not gated.
        down: E matrices (I, H).
        ranks: devices along the axis.
        activation: as for `jax_marlin_moe.fused_moe`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: I does not fall into as many shares of whole tiles and groups, the matrices do not fit each other,
            or down has a row order.
    """
    check_weights("gate_up", gate_up)
    check_weights("down", down)
    if down.input_order is not None:
        raise ValueError(
            "down.input_order is not None; fold it into the columns of gate_up first, with "
            "jax_marlin_moe.fold_input_order(gate_up, down)"
        )
    act = get_activation(activation)
    halves = 2 if act.gated else 1
    if gate_up.n != halves * down.k:
        raise ValueError(
            f"gate_up has N = {gate_up.n} columns and down K = {down.k} rows; activation {act.name!r} needs "
            f"N = {halves} * K"
        )
    group = _group_rows(down)
    _check_shares(
        f"down has K = {down.k} rows",
        down.k,
        ranks,
        math.lcm(TILE_N, group),
        f"whole tiles of {TILE_N} columns of gate_up and whole groups of {group} rows of down",
        hint=_PAD_BEFORE,
    )
    share = down.k // ranks
    parts = [
        gate_up.columns(half * down.k + rank * share, half * down.k + (rank + 1) * share)
        for rank in range(ranks)
        for half in range(halves)
    ]
    bias = down.bias
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, (ranks - 1) * bias.shape[1])))
    group_size = share if down.num_groups == 1 else down.group_size
    return concatenate_columns(parts), dataclasses.replace(down, bias=bias, group_size=group_size)


def _group_rows(weights: MarlinWeights) -> int:
    """The rows that a cut must leave together."""
    return TILE_K if weights.num_groups == 1 else math.lcm(TILE_K, weights.group_size)


def _check_ranks(weights: MarlinWeights, over: str, ranks: int) -> None:
    """Raises ValueError unless the dimension that is cut falls into equal shares."""
    if over == "experts":
        _check_shares(
            f"weights has E = {weights.num_experts} experts",
            weights.num_experts,
            ranks,
            1,
            "as many experts each",
            hint="append experts that no id names",
        )
    elif over == "columns":
        _check_shares(
            f"weights has N = {weights.n} columns",
            weights.n,
            ranks,
            TILE_N,
            f"whole tiles of {TILE_N} columns",
            hint=_PAD_BEFORE,
        )
    else:
        group = _group_rows(weights)
        _check_shares(
            f"weights has K = {weights.k} rows",
            weights.k,
            ranks,
            group,
            f"whole groups of {group} rows",
            hint=_PAD_BEFORE,
        )


def _check_shares(what: str, size: int, ranks: int, step: int, shares: str, *, hint: str) -> None:
    """Raises ValueError unless `size` is `ranks` times a multiple of `step`."""
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
    unit = ranks * step
    if size % unit == 0:
        return
    below = size // unit * unit
    nearest = f"{below} and {below + unit}" if below else f"{unit}"
    fitting = [count for count in range(1, size // step + 1) if size % (count * step) == 0]
    raise ValueError(
        f"{what}; {ranks} ranks need a multiple of {unit}, shares of {shares}: the nearest are {nearest}"
        + (f"; {size} falls into shares for {' or '.join(map(str, fitting))} ranks" if fitting else "")
        + f"; otherwise {hint}"
    )
