"""`LayerSlice`: one layer of a stack of arrays, as an operand that is not copied.

A slice of an array is a copy wherever a custom call reads it. So the ops of this package take the whole stack and the
index of a layer, and their kernels add the offset. To everything else a `LayerSlice` is an array of the layer's shape,
which is read, that is copied, when it is used.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class LayerSlice:
    """An array of one layer. A pytree, whose leaves are the stack and the index.

    Attributes:
        stack: all layers' arrays.
        index: which layer, clamped to those there are. None in what `share_indices` returns, where another slice of
            the same group has it.
        group: equal for slices of one index, where `share_indices` has numbered them; else None.
    """

    stack: Shaped[Array, " layers *shape"]
    index: Int32[Array, ""] | None
    group: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the layer's array."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> Any:
        """Of the elements."""
        return self.stack.dtype

    @property
    def ndim(self) -> int:
        """Dimensions of the layer's array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements of the layer's array."""
        return int(np.prod(self.shape))

    def read(self) -> Array:
        """The layer's array, copied out of the stack."""
        assert self.index is not None
        return jax.lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False)

    def __jax_array__(self) -> Array:
        """What functions of jax.numpy take the slice for."""
        return self.read()

    def astype(self, dtype: jax.typing.DTypeLike) -> Array:
        """A copy in another dtype."""
        return self.read().astype(dtype)

    def reshape(self, *shape: Any) -> Array:
        """A copy in another shape."""
        return self.read().reshape(*shape)

    def __getitem__(self, place: Any) -> Array:
        """The elements at `place` of the layer's array, gathered from the stack where `place` is an array of ids."""
        if isinstance(place, jax.Array) and self.index is not None:
            layer = jnp.clip(self.index, 0, self.stack.shape[0] - 1)
            return self.stack[layer, place]
        return self.read()[place]


jax.tree_util.register_dataclass(LayerSlice, data_fields=["stack", "index"], meta_fields=["group"])


def is_slice(node: Any) -> bool:
    """Whether a node of a pytree is a `LayerSlice`: `is_leaf` of the functions of `jax.tree`."""
    return isinstance(node, LayerSlice)


def take_layer(stacked: Tree, index: int | Int32[Array, ""]) -> Tree:
    """One layer of a pytree of stacks, such as a `MarlinWeights` or `MoELayer` whose leaves begin with a layer axis.

    The weights are not copied: pass what it returns to a function of this package (`fused_moe` and others), or call it,
    in a `jax.lax.scan` over the index, say. Take the layer in the function that is compiled, and all weights of a call
    with one index.

    Args:
        stacked: arrays with a leading axis for the layers, the same for all.
        index: a number, or a traced one, which is clamped to the layers there are.

    Raises:
        IndexError: a number that is no layer.
        TypeError: the index is no integer.
        ValueError: the arrays disagree about the number of layers.
    """
    layers = count_layers(stacked)
    # One object for all slices: by that, a call knows that they are of one layer.
    if isinstance(index, int | np.integer) and not isinstance(index, bool):
        if not -layers <= index < layers:
            raise IndexError(f"index is {index}; it must lie in [{-layers}, {layers}), for {layers} layers")
        one = jax.device_put(np.asarray(index % layers, np.int32))
    elif isinstance(index, np.ndarray | jax.Array) and jnp.issubdtype(index.dtype, jnp.integer) and index.shape == ():
        one = jnp.asarray(index, jnp.int32)
    else:
        found = f"{index.dtype}{list(index.shape)}" if isinstance(index, jax.Array) else type(index).__name__
        raise TypeError(f"index has type {found}; it must be an integer, or an array of one")
    return jax.tree.map(lambda leaf: LayerSlice(leaf, one), stacked)


def count_layers(stacked: Any) -> int:
    """The leading extent of all arrays of a pytree.

    Raises:
        ValueError: they disagree, or there is none; the message names an array.
    """
    found: dict[int, str] = {}
    for path, leaf in jax.tree.leaves_with_path(stacked):
        if not leaf.shape:
            raise ValueError(f"stacked{jax.tree_util.keystr(path)} has no dimensions; the first must be the layers")
        found.setdefault(leaf.shape[0], f"stacked{jax.tree_util.keystr(path)}")
    if len(found) != 1 or 0 in found:
        counts = ", ".join(f"{layers} in {name}" for layers, name in found.items()) or "no arrays"
        raise ValueError(
            f"stacked has {counts}; all arrays must have the same number of layers, at least one, in front"
        )
    return next(iter(found))


def share_indices(operands: Tree) -> Tree:
    """The operands with each index once: in the first slice that has it, the others refer to it by their group.

    Pytrees have no shared leaves: without this, a call would have as many index operands as weights.
    """
    groups: dict[int, int] = {}
    seen: set[int] = set()

    def once(node: Any) -> Any:
        if not isinstance(node, LayerSlice) or node.group is not None:
            return node
        group = groups.setdefault(id(node.index), len(groups))
        first = group not in seen
        seen.add(group)
        return LayerSlice(node.stack, node.index if first else None, group)

    return jax.tree.map(once, operands, is_leaf=is_slice)


def spread_indices(operands: Tree) -> Tree:
    """The inverse of `share_indices`: every slice with its index."""
    nodes = jax.tree.leaves(operands, is_leaf=is_slice)
    slices = [node for node in nodes if isinstance(node, LayerSlice) and node.group is not None]
    indices = {node.group: node.index for node in slices if node.index is not None}

    def whole(node: Any) -> Any:
        if not isinstance(node, LayerSlice) or node.group is None:
            return node
        return LayerSlice(node.stack, indices[node.group])

    return jax.tree.map(whole, operands, is_leaf=is_slice)


def read_slices(operands: Tree) -> Tree:
    """The operands with arrays in place of slices, which copies them."""
    return jax.tree.map(lambda node: node.read() if isinstance(node, LayerSlice) else node, operands, is_leaf=is_slice)


def with_index_operands(operands: Sequence[Any]) -> tuple[list[Any], dict[int, int]]:
    """The operands of a custom call: stacks in place of slices and, behind them, each index once.

    Returns:
        The list, and for the places of stacks those of their indices.
    """
    indices: list[Any] = []
    places: dict[int, int] = {}
    for place, operand in enumerate(operands):
        if isinstance(operand, LayerSlice):
            known = [at for at, index in enumerate(indices) if index is operand.index]
            if not known:
                indices.append(operand.index)
            places[place] = len(operands) + (known[0] if known else len(indices) - 1)
    stacks = [operand.stack if isinstance(operand, LayerSlice) else operand for operand in operands]
    return stacks + indices, places
