"""Which slot of a stack holds which expert: stacks in an order of their own, with several copies of hot experts.

A placement is a table [slots] of experts. Balancing load is then a permutation of leaves: the table is an array, so
that a program need not be compiled again for another one of as many slots.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32


def check_placement(name: str, placement: object, experts: int) -> np.ndarray:
    """The table as a numpy array.

    Raises:
        TypeError: it is not a vector of integers.
        ValueError: it names an expert that there is not, or leaves one out.
    """
    table = np.asarray(placement)
    if table.ndim != 1 or table.dtype.kind not in "iu":
        raise TypeError(f"{name} is {table.dtype}{list(table.shape)}; it must be a vector of integers")
    outside = [value for value in table.tolist() if not 0 <= value < experts]
    if outside:
        raise ValueError(f"{name} names the expert {outside[0]}; experts lie in [0, {experts})")
    missing = sorted(set(range(experts)) - set(table.tolist()))
    if missing:
        raise ValueError(f"{name} has no slot for expert {missing[0]}; each of the {experts} experts must have one")
    return table.astype(np.int32)


def slots_of(
    ids: Int32[Array, "tokens top_k"], placement: Int32[Array, " slots"], experts: int
) -> Int32[Array, "tokens top_k"]:
    """A slot for each expert that a token has chosen: tokens take the copies of an expert in turn.

    Ids outside [0, experts), and those of experts without a slot, become -1.
    """
    order, starts, counts = _by_expert(placement, experts)
    known = (ids >= 0) & (ids < experts)
    expert = jnp.clip(ids, 0, experts - 1)
    copies = counts[expert]
    turn = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None] % jnp.maximum(copies, 1)
    slot = order[jnp.minimum(starts[expert] + turn, placement.shape[0] - 1)]
    return jnp.where(known & (copies > 0), slot, -1)


def first_slots(placement: Int32[Array, " slots"], experts: int) -> Int32[Array, " experts"]:
    """The first slot of each expert, an `expert_map`; -1 for experts without one."""
    order, starts, counts = _by_expert(placement, experts)
    return jnp.where(counts > 0, order[jnp.minimum(starts, placement.shape[0] - 1)], -1)


def _by_expert(placement: Array, experts: int) -> tuple[Array, Array, Array]:
    """Slots in the order of their experts, and for each expert where its slots begin in it, and their number."""
    order = jnp.argsort(placement, stable=True).astype(jnp.int32)
    every = jnp.arange(experts, dtype=placement.dtype)
    starts = jnp.searchsorted(placement[order], every, side="left").astype(jnp.int32)
    ends = jnp.searchsorted(placement[order], every, side="right").astype(jnp.int32)
    return order, starts, ends - starts


def take_experts(stack: jax.Array, table: np.ndarray) -> jax.Array:
    """The leaves of experts in the order of a table, along the first axis."""
    return stack[table] if isinstance(stack, np.ndarray) else jnp.take(stack, table, axis=0)
