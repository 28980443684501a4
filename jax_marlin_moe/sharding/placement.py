"""Layers onto the devices of a mesh."""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.sharding.moe_sharding import MoESharding
from jax_marlin_moe.stacked_layer import StackedMoELayer

Layer = TypeVar("Layer", MoELayer, StackedMoELayer)


def place(layer: Layer, sharding: MoESharding) -> Layer:
    """Lays a layer out for a sharding and puts each device's share on it.

    With several processes, each calls it with the same layer and keeps the shares of its devices. A layer that does not
    fit into one process's memory is loaded in shares: `load_moe_layer(..., sharding=)`.

    Args:
        layer: a `MoELayer`, or a `StackedMoELayer`; its leaves may be numpy's.
        sharding: over a mesh of devices.

    Raises:
        TypeError: the mesh has no devices, or `layer` is something else.
        ValueError: experts or the intermediate dimension do not fall into equal shares; the message names the nearest
            sizes that do.
    """
    check_devices(sharding)
    laid_out: Any
    if isinstance(layer, StackedMoELayer):
        laid_out = StackedMoELayer(jax.vmap(sharding.lay_out)(layer.layers))
    elif isinstance(layer, MoELayer):
        laid_out = sharding.lay_out(layer)
    else:
        raise TypeError(f"layer has type {type(layer).__name__}; it must be a MoELayer or StackedMoELayer")
    return jax.tree.map(put, laid_out, sharding.shardings(laid_out))


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array over the devices of a sharding, those of other processes included, which have the same leaf."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    local = np.asarray(leaf)
    return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])


def check_devices(sharding: MoESharding) -> None:
    """Raises TypeError unless a sharding has devices."""
    if not isinstance(sharding, MoESharding):
        raise TypeError(
            f"sharding has type {type(sharding).__name__}; it must be a jax_marlin_moe.sharding.MoESharding"
        )
    if not isinstance(sharding.mesh, Mesh):
        raise TypeError(
            f"sharding.mesh has type {type(sharding.mesh).__name__}; it must be a jax.sharding.Mesh of devices"
        )
