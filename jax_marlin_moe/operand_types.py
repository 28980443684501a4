"""What JAX's types say of an op's operands beside shape and dtype: manual axes and explicit shardings, made equal.

Under `jax.shard_map` a type names the manual axes over which a value varies. A result varies over the axes of all
operands, whichever of them it gets its shape from, so they are cast to the union before an op sees them.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def alike(tree: Any) -> Any:
    """The arrays of a pytree, varying over the union of their manual axes, and replicated over explicit axes."""
    return vary_alike(jax.tree.map(_replicated, tree))


def vary_alike(tree: Any) -> Any:
    """The arrays of a pytree, varying over the union of their manual axes."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _vary_alike(leaves))


def replicated_type(aval: Any, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """The type of a result of this shape, where `aval` is that of any operand that `alike` has returned."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=jax.numpy.dtype(dtype), weak_type=False, sharding=sharding)


def shard_rows_like(y: jax.Array, x: jax.Array) -> jax.Array:
    """`y` with its rows over the explicit axes that the rows of x are over; its columns stay where they are."""
    sharding = jax.typeof(x).sharding
    if not sharding.spec or sharding.spec[0] is None:
        return y
    _, *columns = [*jax.typeof(y).sharding.spec, *[None] * y.ndim][: y.ndim]
    return jax.sharding.reshard(y, NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], *columns)))


def _replicated(leaf: jax.Array) -> jax.Array:
    sharding = jax.typeof(leaf).sharding
    if not sharding.spec.unreduced and all(axis is None for axis in sharding.spec):
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, PartitionSpec(*[None] * leaf.ndim)))


def _vary_alike(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    types = [jax.typeof(leaf).manual_axis_type for leaf in leaves]
    unreduced = sorted(axis for type_ in types for axis in type_.unreduced)
    if unreduced:
        raise TypeError(f"an operand is unreduced over {unreduced}; sum it with jax.lax.psum before the call")
    union = frozenset[str]().union(*(type_.varying for type_ in types))
    return [
        jax.lax.pcast(leaf, tuple(sorted(union - type_.varying)), to="varying") if union - type_.varying else leaf
        for leaf, type_ in zip(leaves, types, strict=True)
    ]
