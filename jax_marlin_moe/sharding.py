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
from jax_marlin_moe.layout import TILE_K, TILE_N
from jax_marlin_moe.ops.arguments import check_weights
from jax_marlin_moe.weights import MarlinWeights, concatenate_columns


def partition_specs(
    weights: MarlinWeights, over: Literal["experts", "columns", "rows"], axis: str | tuple[str, ...]
) -> MarlinWeights:
    """A partition spec in the place of every leaf, for `in_specs` of `jax.shard_map` or for `NamedSharding`.

    Args:
        weights: for "columns" and "rows" what `tensor_parallel` returned.
        over: the dimension that is cut. Scales that all rows share stay whole over "rows".
        axis: of the mesh.

    Raises:
        ValueError: there is no such dimension, or the rows have an order of their own, which cannot be cut.
    """
    if over not in ("experts", "columns", "rows"):
        raise ValueError(f"over is {over!r}; it must be 'experts', 'columns' or 'rows'")
    if over == "rows" and weights.input_order is not None:
        raise ValueError(
            "weights.input_order is not None: its rows read x from anywhere, so they cannot be cut; fold it into the "
            "columns of gate_up first, with jax_marlin_moe.fold_input_order(gate_up, down)"
        )
    whole, experts = PartitionSpec(), PartitionSpec(axis)
    second, third = PartitionSpec(None, axis), PartitionSpec(None, None, axis)
    of_groups = whole if weights.num_groups == 1 else second
    specs = {
        # packed, scales, zeros, bias, input_order, global_scales
        "experts": [experts] * 6,
        "columns": [third, third, third, second, whole, second],
        "rows": [second, of_groups, of_groups, second, whole, whole],
    }[over]
    names = ("packed", "scales", "zeros", "bias", "input_order", "global_scales")
    placed: dict[str, Any] = dict(zip(names, specs, strict=True))
    return dataclasses.replace(weights, **{name: placed[name] for name in names if getattr(weights, name) is not None})


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
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; it must be at least 1")
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
    group = TILE_K if down.num_groups == 1 else down.group_size
    _check_shares(down.k, ranks, math.lcm(TILE_N, group), group)
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


def _check_shares(size: int, ranks: int, step: int, group: int) -> None:
    """Raises ValueError unless `size` is `ranks` times a multiple of `step`."""
    unit = ranks * step
    if size % unit == 0:
        return
    below = size // unit * unit
    nearest = f"{below} and {below + unit}" if below else f"{unit}"
    fitting = [count for count in range(1, size // step + 1) if size % (count * step) == 0]
    raise ValueError(
        f"down has K = {size} rows; {ranks} ranks need a multiple of {unit}, shares of whole tiles of {TILE_N} columns "
        f"of gate_up and whole groups of {group} rows of down: the nearest are {nearest}"
        + (f"; {size} rows fall into shares for {' or '.join(map(str, fitting))} ranks" if fitting else "")
    )
