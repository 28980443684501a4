"""Rows between the ranks of an axis, inside `jax.shard_map`: all-to-alls of ragged rows, with sizes that are static.

CPUs, for which XLA has no ragged all-to-all, and cards, on which it is slow and refused between processes, exchange
equal blocks; other platforms use it.

All ranks gather the ids of all tokens (4 bytes for each choice), and from them know every count and offset: no sizes
are exchanged. A token goes once to each rank that has one of its experts, and one row comes back, of the shares' dtype.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Route:
    """Who sends which rows to whom, as one rank sees it.

    Attributes:
        axis: of the ranks.
        sent: rows that I send to each rank.
        send_at: where they begin among the rows that I send.
        got: rows that each rank sends to me.
        take_at: where they begin among the rows that I get.
        lands_at: where mine begin at each rank.
        returns_at: where those that each rank sent me began at it.
        rows: of mine, those that I send, by rank; as many as tokens where there is none.
        place: [ranks, tokens]: where the copy of a token for a rank is among those that I send.
        mine: [ranks, tokens]: whether there is one.
        who: of the tokens of all ranks, those that I get; their number where there is none.
        tokens: of each rank.
        largest: rows that one rank sends another, at most.
    """

    axis: str
    sent: Int32[Array, " ranks"]
    send_at: Int32[Array, " ranks"]
    got: Int32[Array, " ranks"]
    take_at: Int32[Array, " ranks"]
    lands_at: Int32[Array, " ranks"]
    returns_at: Int32[Array, " ranks"]
    rows: Int32[Array, " sent"]
    place: Int32[Array, "ranks tokens"]
    mine: Bool[Array, "ranks tokens"]
    who: Int32[Array, " received"]
    tokens: int
    largest: int


def find_route(
    wanted: Bool[Array, "ranks ranks tokens"], axis: str, top_k: int, capacity: int | None
) -> tuple[Route, Bool[Array, "ranks tokens"]]:
    """The route of rows.

    Args:
        wanted: by destination, source and token, whether the token goes there.
        axis: of the ranks.
        top_k: experts of a token, at most.
        capacity: rows that a rank gets at most; None for as many as there are tokens, so that none is dropped.

    Returns:
        The route, and which tokens do not reach me, by source.
    """
    ranks, _, tokens = wanted.shape
    me = lax.axis_index(axis)
    received = ranks * tokens if capacity is None else min(capacity, ranks * tokens)
    flat = wanted.reshape(ranks, -1)
    before = jnp.cumsum(flat, axis=1, dtype=jnp.int32) - flat
    kept = (flat & (before < received)).reshape(wanted.shape)
    counts = kept.sum(-1, dtype=jnp.int32)  # [destination, source]
    into = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts
    out_of = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
    mine = kept[:, me]
    sent_bound = min(tokens * min(ranks, top_k), ranks * received)
    flat_mine = mine.reshape(-1)
    pairs = jnp.flatnonzero(flat_mine, size=sent_bound, fill_value=flat_mine.shape[0]).astype(jnp.int32)
    place = (jnp.cumsum(flat_mine, dtype=jnp.int32) - flat_mine).reshape(mine.shape)
    who = jnp.flatnonzero(kept[me].reshape(-1), size=received, fill_value=ranks * tokens).astype(jnp.int32)
    route = Route(
        axis=axis,
        sent=counts[:, me],
        send_at=out_of[:, me],
        got=counts[me],
        take_at=into[me],
        lands_at=into[:, me],
        returns_at=out_of[me],
        rows=jnp.where(pairs < flat_mine.shape[0], pairs % tokens, tokens),
        place=place,
        mine=mine,
        who=who,
        tokens=tokens,
        largest=min(tokens, received),
    )
    return route, wanted[me] & ~kept[me]


def take_rows(values: Array, rows: Int32[Array, " n"], fill: Any) -> Any:
    """Rows of an array, `fill` where there are none."""
    there = rows < values.shape[0]
    found = values[jnp.minimum(rows, values.shape[0] - 1)]
    return jnp.where(there.reshape(-1, *[1] * (values.ndim - 1)), found, jnp.asarray(fill, values.dtype))


def send(route: Route, x: Float[Array, "tokens H"]) -> Float[Array, "received H"]:
    """The rows that I get, zeros behind them."""
    return _exchange(
        route.axis,
        take_rows(x, route.rows, 0),
        route.who.shape[0],
        route.largest,
        (route.send_at, route.sent, route.lands_at, route.take_at, route.got),
    )


def send_back(route: Route, y: Float[Array, "received H"]) -> Float32[Array, "tokens H"]:
    """The float32 sums, in the order of the ranks, of what they computed of my tokens."""
    back = _exchange(
        route.axis,
        y,
        route.rows.shape[0],
        route.largest,
        (route.take_at, route.got, route.returns_at, route.send_at, route.sent),
    )
    last = max(route.rows.shape[0] - 1, 0)
    parts = [
        jnp.where(there[:, None], back[jnp.minimum(place, last)].astype(jnp.float32), 0)
        for there, place in zip(route.mine, route.place, strict=True)
    ]
    return sum(parts[1:], parts[0])


def _exchange(axis: str, rows: Array, size: int, largest: int, sizes: tuple[Array, ...]) -> Array:
    """Rows by destination to `size` rows by source.

    Args:
        axis: of the ranks.
        rows: what I send.
        size: of the result.
        largest: rows from one rank to another, at most.
        sizes: by rank, where my rows for it begin, their number, where they land there; where its rows land here, and
            their number.
    """
    dense = partial(_dense, axis, size, largest)
    return lax.platform_dependent(rows, *sizes, cpu=dense, cuda=dense, default=partial(_ragged, axis, size))


def _ragged(axis, size, rows, send_at, sent, lands_at, take_at, got):
    out = _varying(jnp.zeros((size, rows.shape[1]), rows.dtype), rows)
    return lax.ragged_all_to_all(rows, out, send_at, sent, lands_at, got, axis_name=axis)


def _dense(axis, size, largest, rows, send_at, sent, lands_at, take_at, got):
    """The same by an all-to-all of equal blocks, as long as the longest can be."""
    ranks, each = send_at.shape[0], jnp.arange(largest, dtype=jnp.int32)
    index = send_at[:, None] + each
    blocks = take_rows(rows, jnp.where(each < sent[:, None], index, rows.shape[0]).reshape(-1), 0)
    blocks = lax.all_to_all(blocks.reshape(ranks, largest, rows.shape[1]), axis, 0, 0)
    # Rows are read from where they are, not written to where they go: XLA's scatter would clear the result first.
    place = jnp.arange(size, dtype=jnp.int32)
    source = jnp.sum(place[:, None] >= take_at + got, axis=1, dtype=jnp.int32)
    first = take_at[jnp.minimum(source, ranks - 1)]
    found = jnp.where(source < ranks, source * largest + place - first, ranks * largest)
    return take_rows(blocks.reshape(-1, rows.shape[1]), found, 0)


def _varying(value: Array, like: Array) -> Array:
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(value).manual_axis_type.varying
    return lax.pcast(value, tuple(sorted(axes)), to="varying") if axes else value
