"""Blocks that are laid out for tensor parallelism, as blocks of as many times the experts.

What `jax_marlin_moe.sharding.tensor_parallel` returns has columns of gate and up in shares, [gate 0 | up 0 | gate 1 |
up 1 | ...]. A share of an expert is an expert with fewer rows of down, and the expert's result is the sum over its
shares. So shares are taken for experts of their own, which every choice of their expert chooses: where columns of gate
and up, and rows of down, are over devices, these experts are, and everything else is as for experts over devices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

from jax_marlin_moe.layout import TILE_K
from jax_marlin_moe.weights import LEAVES, MarlinWeights


def count_shares(gate_up: Any) -> int:
    """For how many ranks columns are laid out; 1 for an ordinary matrix, and for one rank's share of another."""
    layout = gate_up.layout if isinstance(gate_up, MarlinWeights) else ""
    share = layout.removeprefix("a16/")
    if share == layout or not share.isdecimal() or not int(share) or gate_up.padded_n % int(share):
        return 1
    return gate_up.padded_n // int(share)


def split_block(gate_up: MarlinWeights, down: MarlinWeights, shares: int) -> tuple[MarlinWeights, MarlinWeights]:
    """Both matrices with [shares, E] experts in place of E.

    Raises:
        ValueError: down is not laid out for as many ranks.
    """
    grouped = down.num_groups > 1
    step = shares * (TILE_K if not grouped else max(TILE_K, down.group_size))
    if down.padded_k % step or (down.bias is not None and down.bias.shape[-1] != shares * down.padded_n):
        raise ValueError(
            f"gate_up is laid out for {shares} ranks; down, with K = {down.k} rows, must be, too: pass both matrices "
            "that jax_marlin_moe.sharding.tensor_parallel returned"
        )
    columns = [name for name in LEAVES if name != "input_order"]
    rows = ["packed", "bias", *(["scales", "zeros"] if grouped else [])]
    first = {name: _split(getattr(gate_up, name), -1 if name in columns else None, shares) for name in LEAVES}
    second = {}
    for name in LEAVES:
        axis = None if name not in rows else -1 if name == "bias" else -2
        second[name] = _split(getattr(down, name), axis, shares)
    size = down.group_size if grouped else min(down.group_size, down.padded_k // shares)
    return (
        dataclasses.replace(gate_up, **first, layout="a16"),
        dataclasses.replace(down, **second, group_size=size),
    )


def choose_shares(
    topk_weights: Float32[Array, "tokens top_k"],
    topk_ids: Int32[Array, "tokens top_k"],
    expert_map: Int32[Array, " experts"] | None,
    experts: int,
    shares: int,
) -> tuple[Float32[Array, "tokens slots"], Int32[Array, "tokens slots"], Int32[Array, " shares*experts"] | None]:
    """Router weights, ids and expert map of blocks with [shares, E] experts, `experts` of which are here."""
    routed = experts if expert_map is None else expert_map.shape[0]
    share = jnp.arange(shares, dtype=jnp.int32)
    known = (topk_ids >= 0) & (topk_ids < routed)
    ids = jnp.where(known[..., None], topk_ids[..., None] + share * routed, -1)
    if expert_map is not None:
        here = (expert_map >= 0) & (expert_map < experts)
        expert_map = jnp.where(here, expert_map + share[:, None] * experts, -1).reshape(-1)
    slots = (topk_ids.shape[0], topk_ids.shape[1] * shares)
    return jnp.repeat(topk_weights, shares, axis=1), ids.reshape(slots), expert_map


def _split(leaf: Any, axis: int | None, shares: int) -> Any:
    """A leaf [E, ...] as [shares * E, ...]: in shares along an axis, or the same for all shares."""
    if leaf is None:
        return None
    leaf = jnp.asarray(leaf)
    sharding = jax.typeof(leaf).sharding
    spec = [*sharding.spec, *[None] * leaf.ndim][: leaf.ndim]
    shape = list(leaf.shape)
    if axis is None:
        parts, over = jnp.broadcast_to(leaf[None], (shares, *shape)), None
    else:
        place = leaf.ndim + axis
        over, spec[place] = spec[place], None
        shape[place] //= shares
        split = [*shape[:place], shares, *shape[place:]]
        parts = jnp.moveaxis(_reshape(leaf, split, [*spec[:place], over, *spec[place:]], sharding), place, 0)
    merged = [*_axes(over), *_axes(spec[0])]
    return _reshape(parts, [shares * shape[0], *shape[1:]], [tuple(merged) or None, *spec[1:]], sharding)


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _reshape(array: Array, shape: list[int], spec: list[Any], sharding: NamedSharding) -> Array:
    """In another shape; over explicit axes types say where its dimensions are."""
    explicit = any(entry is not None for entry in spec)
    return jax.lax.reshape(
        array, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)) if explicit else None
    )
