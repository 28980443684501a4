"""Tangents and cotangents of operands that are pytrees: None in the places of leaves that do not move."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_marlin_moe.layer_slice import is_slice, spread_indices


def jvp_of(function: Callable, operands: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """`jax.jvp` of a function of pytrees whose tangents have None in the places of leaves that do not move.

    Slices of stacks do not: those that have tangents have been read.
    """
    structure: Any
    leaves, structure = jax.tree.flatten(tuple(operands), is_leaf=is_slice)
    moving = structure.flatten_up_to(tuple(tangents))
    places = [place for place, tangent in enumerate(moving) if tangent is not None]

    def of_moving(*values: jax.Array) -> Any:
        filled = dict(zip(places, values, strict=True))
        return function(*jax.tree.unflatten(structure, [filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(of_moving, [leaves[place] for place in places], [moving[place] for place in places])


def read_moving(operands: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    """Operands and tangents with arrays in place of slices that have a tangent; that of other slices is None."""
    structure: Any
    nodes, structure = jax.tree.flatten(spread_indices(operands), is_leaf=is_slice)
    dots = structure.flatten_up_to(tangents)
    for place, node in enumerate(nodes):
        if is_slice(node):
            moves = dots[place].stack is not None
            dots[place] = dataclasses.replace(node, stack=dots[place].stack).read() if moves else None
            nodes[place] = node.read() if moves else node
    return jax.tree.unflatten(structure, nodes), jax.tree.unflatten(structure, dots)


def flat_cotangents(structure: Any, cotangents: Any) -> list[Any]:
    """Those of the leaves of an operand; slices, in which no op is linear, have none."""
    operand = jax.tree.unflatten(structure, range(structure.num_leaves))
    nodes_structure: Any
    nodes, nodes_structure = jax.tree.flatten(operand, is_leaf=is_slice)
    found = []
    for node, value in zip(nodes, nodes_structure.flatten_up_to(cotangents), strict=True):
        found += [None] * len(jax.tree.leaves(node)) if is_slice(node) else [value]
    return found
