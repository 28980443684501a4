"""Matrices over the devices of a mesh, of which each process has read its share alone."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.checkpoint.linears import Cut
from jax_marlin_moe.formats import WeightFormat
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.sharding.moe_sharding import MoESharding
from jax_marlin_moe.sharding.placement import put
from jax_marlin_moe.sharding.shares import inner_share
from jax_marlin_moe.sharding.specs import check_experts, matrix_specs
from jax_marlin_moe.sharding.tensor_parallel import block_share, fill_share
from jax_marlin_moe.weights import MarlinWeights

Block = tuple[MarlinWeights, MarlinWeights]
_PIECE = 1 << 24  # bytes that are copied at a time


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank has of a block.

    Attributes:
        experts: its experts.
        rank: its place among the ranks of the intermediate dimension.
        columns: its part of that dimension, logical; empty where all it has is padding.
        width: the same with padding.
    """

    experts: range
    rank: int
    columns: tuple[int, int]
    width: int


def load_block(
    load: Callable[[Share], Block],
    sharding: MoESharding,
    *,
    experts: int,
    size: int,
    row: WeightFormat,
    group_size: int,
    activation: str | Activation,
) -> tuple[Block, Block]:
    """A block over the devices of a mesh.

    Args:
        load: the matrices of a share, of its columns and with the padding of their tiles; down with its bias.
        sharding: over a mesh of devices.
        experts: E.
        size: the intermediate dimension.
        row: the format of down.
        group_size: rows of down that share a scale; any number from `size` on where one covers all of them.
        activation: of the block.

    Returns:
        The block as `place` lays it out, and the shapes of the matrices of one rank's columns and all experts.

    Raises:
        ValueError: experts or the intermediate dimension do not fall into equal shares.
    """
    check_experts(experts, sharding.expert_ranks)
    ranks = sharding.tensor_ranks
    group = None if group_size >= size and row.per_channel else min(group_size, size)
    width = inner_share(size, group, ranks, pad=sharding.pad) if ranks > 1 else size
    each = experts // sharding.expert_ranks
    placed: dict[tuple[int, int], list[jax.Device]] = {}
    for device, place in _places(sharding):
        if device.process_index == jax.process_index():
            placed.setdefault(place, []).append(device)

    def local(expert_rank: int, tensor_rank: int) -> Block:
        members = range(expert_rank * each, (expert_rank + 1) * each)
        if ranks == 1:
            return load(Share(members, 0, (0, size), width))
        columns = min(tensor_rank * width, size), min((tensor_rank + 1) * width, size)
        if columns[0] == columns[1]:  # padding alone: of the shapes of the first rank's share
            return jax.tree.map(jnp.zeros_like, local(expert_rank, 0))
        gate_up, down = load(Share(members, tensor_rank, columns, width))
        gate_up, down = fill_share(gate_up, down, width, get_activation(activation).halves)
        if tensor_rank and down.bias is not None:
            down = dataclasses.replace(down, bias=jnp.zeros_like(down.bias))
        return gate_up, down

    shards: dict[jax.Device, list[jax.Array]] = {}
    structure: Any = None
    for place, devices in placed.items():
        leaves, structure = jax.tree.flatten(local(*place))
        shapes = [jax.ShapeDtypeStruct((experts, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        for device in devices:
            shards[device] = [jax.device_put(leaf, device) for leaf in leaves]
        jax.block_until_ready([shards[device] for device in devices])
        del leaves
    one = jax.tree.unflatten(structure, shapes)
    gate_up, down = one
    if ranks > 1:
        gate_up = dataclasses.replace(gate_up, layout=f"a16/{gate_up.padded_n}")
    rows = sharding.tensor_axes
    specs = (
        matrix_specs(gate_up, sharding.expert_axes, sharding.tensor_axes),
        matrix_specs(down, sharding.expert_axes, (), rows, grouped=group is not None),
    )
    named = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    whole = [
        _whole_leaf(sharding, spec, {device: leaves[index] for device, leaves in shards.items()})
        for index, spec in enumerate(named)
    ]
    return jax.tree.unflatten(jax.tree.structure((gate_up, down)), whole), one


def cut_of(share: Share, k: int, *, down: bool) -> Cut:
    """Of the linears of gate and up with k rows, or of down with k columns."""
    return Cut(share.columns, (0, k)) if down else Cut((0, k), share.columns)


def share_of_views(layer: MoELayer, share: Share, drop_pages: Callable[[], None]) -> Block:
    """A share of a layer whose leaves are views of a file, copied expert by expert."""
    cut = share.columns != (0, layer.down.k)

    def of_expert(expert: int) -> Block:
        gate_up, down = jax.tree.map(lambda leaf: leaf[expert : expert + 1], (layer.gate_up, layer.down))
        if not cut:
            return gate_up, down
        return block_share(gate_up, down, share.rank, share.width, activation=layer.activation)

    first = of_expert(share.experts[0])
    if len(share.experts) == 1:
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), first)
    block = jax.tree.map(lambda leaf: jnp.empty((len(share.experts), *leaf.shape[1:]), leaf.dtype), first)
    copied = 0
    for place, expert in enumerate(share.experts):
        one = of_expert(expert)
        block = _put(block, one, np.int32(place))
        copied += sum(leaf.nbytes for leaf in jax.tree.leaves(one))
        if copied > _PIECE:
            jax.block_until_ready(block)
            drop_pages()
            copied = 0
    jax.block_until_ready(block)
    drop_pages()
    return block


def put_rest(layer: MoELayer, sharding: MoESharding) -> MoELayer:
    """A layer whose routed experts are placed, with the rest of it placed too."""
    laid_out = sharding.lay_out_shared(layer)
    placed = jax.tree.map(put, without_experts(laid_out), without_experts(sharding.shardings(laid_out)))
    return dataclasses.replace(placed, gate_up=layer.gate_up, down=layer.down)


def without_experts(layer: MoELayer) -> MoELayer:
    """The rest of a layer, a pytree."""
    nothing: Any = None
    return dataclasses.replace(layer, gate_up=nothing, down=nothing)


def add_bias(down: MarlinWeights, bias: jax.Array, sharding: MoESharding) -> MarlinWeights:
    """The matrices down with a bias [E, N], which the first rank of the intermediate dimension adds."""
    wide = jnp.pad(bias, ((0, 0), (0, (sharding.tensor_ranks - 1) * bias.shape[1])))
    spec = matrix_specs(dataclasses.replace(down, bias=wide), sharding.expert_axes, (), sharding.tensor_axes).bias
    return dataclasses.replace(down, bias=put(wide, NamedSharding(sharding.mesh, spec)))


def _whole_leaf(sharding: MoESharding, spec: PartitionSpec, shards: Mapping[jax.Device, jax.Array]) -> jax.Array:
    """The array of which each device of this process has its shard."""
    placing = NamedSharding(sharding.mesh, spec)
    pieces = [shards[device] for device in placing.addressable_devices]
    shape = tuple(
        extent * sharding.size(() if axes is None else (axes,) if isinstance(axes, str) else axes)
        for extent, axes in itertools.zip_longest(pieces[0].shape, spec)
    )
    return jax.make_array_from_single_device_arrays(shape, placing, pieces)


def _places(sharding: MoESharding) -> Iterator[tuple[jax.Device, tuple[int, int]]]:
    """The devices of the mesh, with their ranks among the experts and in the intermediate dimension."""
    mesh = sharding.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    for at in np.ndindex(mesh.devices.shape):
        coordinates = dict(zip(mesh.axis_names, at, strict=True))
        expert, tensor = (_rank(mesh, axes, coordinates) for axes in (sharding.expert_axes, sharding.tensor_axes))
        yield mesh.devices[at], (expert, tensor)


def _rank(mesh: jax.sharding.Mesh, axes: Sequence[str], coordinates: Mapping[str, int]) -> int:
    """Of a device, along axes of which the first is the outermost."""
    rank = 0
    for axis in axes:
        rank = rank * mesh.shape[axis] + coordinates[axis]
    return rank


@partial(jax.jit, donate_argnums=0)
def _put(block: Any, one: Any, place: jax.Array) -> Any:
    def write(leaves: jax.Array, leaf: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(leaves, leaf, place, 0)

    return jax.tree.map(write, block, one)
