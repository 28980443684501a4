"""`StackedMoELayer`: equal layers of a model as one pytree, for loops that are compiled once."""

import dataclasses
from collections.abc import Iterable, Iterator, Sized
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from jax_marlin_moe.layer import STATIC, MoELayer
from jax_marlin_moe.layer_slice import count_layers, take_layer
from jax_marlin_moe.weights import refuse_hash, summary


@dataclasses.dataclass(frozen=True, repr=False)
class StackedMoELayer:
    """L layers with leaves [L, ...]. A pytree. `stacked[l]` is a `MoELayer` that copies no weights when it is called.

    In a loop, take the layer where it is called:

        y, _ = jax.lax.scan(lambda h, l: (h + stacked[l](h), None), x, jnp.arange(len(stacked)))

    Passing `stacked` as the scanned array would hand each step a slice of every leaf, that is, a copy.

    Attributes:
        layers: a `MoELayer` whose arrays have the layers in front; it cannot be called itself.
    """

    layers: MoELayer

    def __repr__(self) -> str:
        """One line: dtypes, shapes and bytes."""
        return summary(self)

    def __hash__(self) -> int:
        """Refused, since arrays have no hash."""
        refuse_hash(self)

    def __len__(self) -> int:
        """L."""
        return count_layers(self.layers)

    def __getitem__(self, index: int | Int32[Array, ""]) -> MoELayer:
        """A layer whose leaves are `LayerSlice`s: calls read the weights in the stack.

        Args:
            index: a number, or a traced one, which is clamped to the layers there are.

        Raises:
            IndexError: a number that is no layer.
            TypeError: the index is no integer.
        """
        return take_layer(self.layers, index)

    def __iter__(self) -> Iterator[MoELayer]:
        """All layers, as by their numbers."""
        return (self[index] for index in range(len(self)))


jax.tree_util.register_dataclass(StackedMoELayer, data_fields=["layers"], meta_fields=[])


def stack_layers(layers: Iterable[MoELayer], count: int | None = None) -> StackedMoELayer:
    """Stacks layers of equal structure.

    Each is copied into its place as it comes: of an iterator that makes them one by one, such as `load_moe_layers`
    returns, one layer exists beside the stack.

    Args:
        layers: at least one.
        count: how many, for iterables without a length.

    Raises:
        TypeError: an element is no `MoELayer`, or there is no count.
        ValueError: a layer differs from the first in a static field, an array or its shape or dtype, which the message
            names; or there are other than `count` layers.
    """
    if count is None:
        if not isinstance(layers, Sized):
            raise TypeError(f"count is None, and layers has type {type(layers).__name__} without a length; pass count")
        count = len(layers)
    stack, first, number = None, None, -1
    for number, layer in enumerate(layers):
        if not isinstance(layer, MoELayer):
            raise TypeError(f"layers[{number}] has type {type(layer).__name__}; it must be a MoELayer")
        if number == count:
            raise ValueError(f"count is {count}; there are more layers")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), layer)
        if stack is None or first is None:
            first = shapes
            stack = jax.tree.map(partial(_zeros, count), layer)
        _check_equal(number, shapes, first)
        stack = _put(stack, layer, jnp.int32(number))
    if number + 1 != count or stack is None:
        raise ValueError(f"count is {count}; there are {number + 1} layers, and there must be at least one")
    return StackedMoELayer(stack)


def _zeros(count: int, leaf: Array) -> Array:
    """The stack of a leaf, over the same devices of a mesh."""
    sharding = getattr(leaf, "sharding", None)
    over = None
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        over = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jnp.zeros((count, *leaf.shape), leaf.dtype, device=over)


@partial(jax.jit, donate_argnums=0)
def _put(stack: MoELayer, layer: MoELayer, number: Int32[Array, ""]) -> MoELayer:
    return jax.tree.map(lambda leaves, leaf: jax.lax.dynamic_update_index_in_dim(leaves, leaf, number, 0), stack, layer)


def _check_equal(number: int, layer: MoELayer, first: MoELayer) -> None:
    """Raises ValueError, with what differs, unless shapes and static fields are those of the first layer."""
    for name in STATIC:
        found, wanted = getattr(layer, name), getattr(first, name)
        if found != wanted:
            raise ValueError(f"layers[{number}].{name} is {found}; it must be {wanted}, as in layers[0]")
    arrays, wanted = (dict(_named(part)) for part in (layer, first))
    for name in arrays | wanted:
        if arrays.get(name) != wanted.get(name):
            raise ValueError(
                f"layers[{number}]{name} is {arrays.get(name)}; it must be {wanted.get(name)}, as in layers[0]: stack "
                "the layers that are alike, each kind by itself"
            )
    structure: Any = jax.tree.structure(layer)
    if structure != jax.tree.structure(first):  # formats, groups and paddings
        raise ValueError(f"layers[{number}] is {layer}; it must have the formats and paddings of layers[0]: {first}")


def _named(layer: MoELayer) -> Iterator[tuple[str, str]]:
    for path, leaf in jax.tree.leaves_with_path(layer):
        yield jax.tree_util.keystr(path), f"{leaf.dtype}{list(leaf.shape)}"
