"""The layout of tensor parallelism: for each rank its columns of gate and up, and its rows of down.

A cut of [gate | up] as it is stored would give gate to some ranks and up to others, and each rank would add the bias
of down to the sum. So columns of gate and up alternate in shares, [gate 0 | up 0 | gate 1 | up 1 | ...], and the first
rank alone has the bias. `MarlinWeights.layout` says so, and ops refuse such a matrix as a whole.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.arguments import check_weights
from jax_marlin_moe.layout import TILE_K
from jax_marlin_moe.sharding.shares import group_rows, inner_share
from jax_marlin_moe.weights import LEAVES, MarlinWeights

_BY_COLUMNS = tuple(name for name in LEAVES if name != "input_order")


def tensor_parallel(
    gate_up: MarlinWeights,
    down: MarlinWeights,
    ranks: int,
    *,
    activation: str | Activation = "silu",
    pad: bool = False,
) -> tuple[MarlinWeights, MarlinWeights]:
    """Lays a block out for ranks that each have a share of the intermediate dimension, all experts and all tokens.

    Columns of gate and up alternate in shares, [gate 0 | up 0 | gate 1 | up 1 | ...]. The bias of down is as wide as
    that of all ranks together: the first has it, the others zeros. So the results are for `jax.shard_map` alone, with
    the specs `partition_specs(gate_up, "columns", axis)` and `partition_specs(down, "rows", axis)`, not for one device.
    The padding of a matrix is where the slice of the last rank ends.

    Args:
        gate_up: E matrices (H, 2 I), columns [gate | up]; (H, I) where the activation is not gated.
        down: E matrices (I, H).
        ranks: devices along the axis.
        activation: as for `jax_marlin_moe.fused_moe`.
        pad: whether zeros fill the shares of the last ranks where I has no equal ones. A rank may then have zeros
            alone.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: I does not fall into as many shares of whole tiles and groups, the matrices do not fit each other,
            they are laid out already, or down has a row order.
    """
    share = check_block(gate_up, down, ranks, activation=activation, pad=pad)
    shares = [block_share(gate_up, down, rank, share, activation=activation) for rank in range(ranks)]
    halves = get_activation(activation).halves
    first, second = shares[0]
    columns = {name: _join([getattr(one, name) for one, _ in shares], -1) for name in _BY_COLUMNS}
    grouped = group_rows(down) is not None
    return (
        dataclasses.replace(first, **columns, layout=f"a16/{halves * share}"),
        dataclasses.replace(
            second,
            packed=_join([one.packed for _, one in shares], -2),
            scales=_join([one.scales for _, one in shares], -2) if grouped else second.scales,
            zeros=_join([one.zeros for _, one in shares], -2) if grouped else second.zeros,
            bias=_join([one.bias for _, one in shares], -1),
        ),
    )


def check_block(
    gate_up: MarlinWeights, down: MarlinWeights, ranks: int, *, activation: str | Activation, pad: bool
) -> int:
    """The share of `inner_share`; errors as for `tensor_parallel`."""
    if not isinstance(ranks, int):
        raise TypeError(f"ranks is {ranks!r}; it must be an int")
    check_weights("gate_up", gate_up)
    check_weights("down", down)
    if down.input_order is not None:
        raise ValueError(
            "down.input_order is not None; fold it into the columns of gate_up first, with "
            "jax_marlin_moe.fold_input_order(gate_up, down)"
        )
    act = get_activation(activation)
    if gate_up.n != act.halves * down.k:
        raise ValueError(
            f"gate_up has N = {gate_up.n} columns and down K = {down.k} rows; activation {act.name!r} needs "
            f"N = {act.halves} * K"
        )
    return inner_share(down.k, group_rows(down), ranks, pad=pad)


def block_share(
    gate_up: MarlinWeights, down: MarlinWeights, rank: int, share: int, *, activation: str | Activation
) -> tuple[MarlinWeights, MarlinWeights]:
    """What one rank has: `share` columns of gate and of up, and as many rows of down; views where leaves are numpy's.

    Both are without padding: the zeros that fill them up to the share count as columns and rows.
    """
    start, halves = rank * share, get_activation(activation).halves
    width = gate_up.padded_n // halves
    first, last = min(start, width), min(start + share, width)
    parts = [_columns(gate_up, half * width + first, half * width + last) for half in range(halves)]
    mine = dataclasses.replace(
        gate_up,
        **{name: _join([getattr(part, name) for part in parts], -1) for name in _BY_COLUMNS},
        column_padding=(),
    )
    rows = _rows(down, min(start, down.padded_k), min(start + share, down.padded_k))
    if rank and rows.bias is not None:
        rows = dataclasses.replace(rows, bias=_like(rows.bias).zeros_like(rows.bias))
    return fill_share(mine, rows, share, halves)


def fill_share(
    gate_up: MarlinWeights, down: MarlinWeights, share: int, halves: int
) -> tuple[MarlinWeights, MarlinWeights]:
    """A rank's matrices with zeros up to the share, and no padding.

    Args:
        gate_up: some columns of gate and as many of up, whole tiles, padding included; there may be none.
        down: as many rows, or fewer by the padding of the last tile.
        share: of `inner_share`.
        halves: 2 for [gate | up].
    """
    width = gate_up.padded_n // halves
    filled: dict[str, Any] = {}
    if width < share:
        for name in _BY_COLUMNS:
            leaf = getattr(gate_up, name)
            if leaf is None:
                continue
            # Entries of a leaf for each column, as a fraction: words of codes and of zero points, blocks of 64.
            entries = share * _per_tile(gate_up, name) // 64
            halved = leaf.reshape(*leaf.shape[:-1], halves, leaf.shape[-1] // halves)
            value = _zero_word(gate_up) if name == "packed" else 0
            filled[name] = _pad(halved, -1, entries, value).reshape(*leaf.shape[:-1], halves * entries)
    gate_up = dataclasses.replace(gate_up, **filled, column_padding=())
    group = group_rows(down)
    filled = {"packed": _pad(down.packed, -2, share // TILE_K, _zero_word(down))}
    if group is not None:
        filled["scales"] = _pad(down.scales, -2, share // group, 0)
        filled["zeros"] = None if down.zeros is None else _pad(down.zeros, -2, share // group, 0)
    size = share if group is None else group
    return gate_up, dataclasses.replace(down, **filled, row_padding=0, group_size=size)


def local_matrix(weights: MarlinWeights) -> MarlinWeights:
    """A rank's share of a matrix that was laid out, inside `jax.shard_map`: an ordinary matrix.

    Raises:
        ValueError: it is more than one share, or another one than it was laid out for.
    """
    if weights.layout == "a16":
        return weights
    check_weights("gate_up", weights)
    return dataclasses.replace(weights, layout="a16")


def shares_of(weights: MarlinWeights) -> int | None:
    """For how many ranks a matrix is laid out; None where it is not."""
    if not weights.layout.startswith("a16/"):
        return None
    return weights.padded_n // int(weights.layout.removeprefix("a16/"))


def _per_tile(weights: MarlinWeights, name: str) -> int:
    """Entries of a leaf for 64 columns."""
    if name == "packed":
        return 64 * TILE_K // weights.format.codes_per_word
    if name == "zeros" and weights.format.zeros == "integer":
        return 64 // weights.format.codes_per_word
    return 1 if name == "global_scales" else 64


def _zero_word(weights: MarlinWeights) -> int:
    """A packed word whose codes are all the one for zero."""
    row = weights.format
    word = sum((row.zero_point or 0) << row.bits * place for place in range(row.codes_per_word))
    return word - (1 << 32) if word >= 1 << 31 else word


def _columns(weights: MarlinWeights, start: int, stop: int) -> MarlinWeights:
    """Columns of the matrix as packed, multiples of 64."""

    def cut(name: str) -> Any:
        leaf, per_tile = getattr(weights, name), _per_tile(weights, name)
        return None if leaf is None else leaf[..., start * per_tile // 64 : stop * per_tile // 64]

    return dataclasses.replace(weights, **{name: cut(name) for name in _BY_COLUMNS})


def _rows(weights: MarlinWeights, start: int, stop: int) -> MarlinWeights:
    """Rows of the matrix as packed, with the bias; `start` is a multiple of the group."""
    group = group_rows(weights)
    groups = slice(None) if group is None else slice(start // group, -(-stop // group))
    return dataclasses.replace(
        weights,
        packed=weights.packed[..., start // TILE_K : stop // TILE_K, :],
        scales=weights.scales[..., groups, :],
        zeros=None if weights.zeros is None else weights.zeros[..., groups, :],
    )


def _like(leaf: Any) -> Any:
    """The numpy of a leaf: numpy for arrays of its own, which may be views of a file; else `jax.numpy`."""
    return np if isinstance(leaf, np.ndarray) else jnp


def _join(leaves: Sequence[Any], axis: int) -> Any:
    if leaves[0] is None:
        return None
    return leaves[0] if len(leaves) == 1 else _like(leaves[0]).concatenate(leaves, axis=axis)


def _pad(leaf: Any, axis: int, extent: int, value: int) -> Any:
    shape = list(leaf.shape)
    shape[axis] = extent - shape[axis]
    return leaf if not shape[axis] else _join([leaf, _like(leaf).full(shape, value, leaf.dtype)], axis)
