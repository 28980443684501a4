"""Experts in an order of their own over the ranks, with copies of hot ones."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.expert_placement import check_placement, take_experts
from jax_marlin_moe.layer import MoELayer


def place_experts(layer: MoELayer, experts: Sequence[int] | np.ndarray | jax.Array) -> MoELayer:
    """A layer whose packed experts are in another order, with hot ones more than once.

    The router stays as it is: the layer has the table, sends tokens to the copies of an expert in turn where it is
    called by `parallel_layer`, and to the first one where it is called itself. Results are the same. To balance load
    anew, call it again on the layer that it returned: with as many slots, no program is compiled.

    Args:
        layer: as loaded, or what this function returned.
        experts: for each slot, the expert that is in it; ranks have equal ranges of slots, in their order.

    Raises:
        TypeError: `layer` is no layer, or `experts` not a vector of integers.
        ValueError: a number is not that of an expert, or an expert has no slot.
    """
    if not isinstance(layer, MoELayer):
        raise TypeError(f"layer has type {type(layer).__name__}; it must be a MoELayer")
    count = layer.num_experts
    table = check_placement("experts", experts, count)
    if layer.placement is None:
        slots = table
    else:
        found = check_placement("layer.placement", layer.placement, count)
        first = {expert: slot for slot, expert in reversed(list(enumerate(found.tolist())))}
        slots = np.asarray([first[expert] for expert in table.tolist()], np.int32)
    gate_up, down = jax.tree.map(partial(take_experts, table=slots), (layer.gate_up, layer.down))
    return dataclasses.replace(layer, gate_up=gate_up, down=down, placement=jnp.asarray(table))
