"""Calls over the explicit axes of a mesh: types say what each device has, and a `jax.shard_map` computes with it.

What devices may divide is as for automatic axes (`division`), and results are sharded as those of a product would be:
rows as the rows of operands, columns as those of matrices. Derivatives are those of `jax.shard_map`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_marlin_moe.ops.division import EXPERTS, ROWS, Labels, Part

_Axes = tuple[str, ...]


def explicit_mesh(leaves: Sequence[jax.Array]) -> Any | None:
    """The mesh of arrays of which one at least is sharded over an explicit axis; None if there is none."""
    for leaf in leaves:
        sharding = jax.typeof(leaf).sharding
        if any(axes is not None for axes in sharding.spec):
            return sharding.mesh
    return None


def over_explicit_axes(
    call: Callable[..., list[jax.Array]],
    share: Callable[..., list[jax.Array]],
    leaves: Sequence[jax.Array],
    labels: Labels,
    summed: Sequence[str],
    mesh: Any,
    *,
    op: str,
) -> list[jax.Array]:
    """The results of `call(*leaves)`, of which each device computes what it has operands for.

    Args:
        call: gets leaves as one device has them.
        share: `(part, *leaves)`, what a device adds to sums of several.
        leaves: the operands.
        labels: of their dimensions.
        summed: the labels over which results are sums, beside the experts.
        mesh: of their types.
        op: the name, for messages.

    Raises:
        ValueError: packed weights are divided as the op cannot use them.
    """
    plan = _plan(op, labels, summed, leaves, mesh)

    def local(*leaves: jax.Array) -> list[jax.Array]:
        part = plan.part(labels)
        return list(call(*leaves) if part is None else share(part, *leaves))

    operands = [plan.spec(dims, plan.rows) for dims in labels.operands]
    results = [plan.spec(dims, plan.kept) for dims in labels.results]
    placed = [
        jax.sharding.reshard(leaf, NamedSharding(mesh, spec)) for leaf, spec in zip(leaves, operands, strict=True)
    ]
    axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    found = jax.shard_map(local, mesh=mesh, in_specs=tuple(operands), out_specs=results, axis_names=axes)(*placed)
    if plan.kept == plan.wanted:
        return found
    specs = [plan.spec(dims, plan.wanted) for dims in labels.results]
    return [jax.sharding.reshard(y, NamedSharding(mesh, spec)) for y, spec in zip(found, specs, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The axes over which each dimension is divided.

    Attributes:
        axes: by label, but for rows.
        rows: of operands.
        kept: of results as devices compute them.
        wanted: of results.
        sums: over which results are sums, in the order of the rows that devices keep.
        products: those of them over which products are.
        mesh: whose axes they are.
    """

    axes: dict[str, _Axes]
    rows: _Axes
    kept: _Axes
    wanted: _Axes
    sums: _Axes
    products: _Axes
    mesh: Any

    def spec(self, dims: Sequence[str | None], rows: _Axes) -> PartitionSpec:
        """That of an array."""
        found = [rows if name == ROWS else self.axes.get(name or "", ()) for name in dims]
        return PartitionSpec(*[axes if len(axes) > 1 else axes[0] if axes else None for axes in found])

    def part(self, labels: Labels) -> Part | None:
        """That of this device in sums; in the body of the `jax.shard_map`.

        Also where only columns are divided: results that have none must not vary over the axes.
        """
        if not self.axes:
            return None
        experts = self.axes.get(EXPERTS)
        count = None if experts is None else labels.units[EXPERTS]
        first = None
        if experts is not None:
            each = labels.units[EXPERTS] // _size(self.mesh, experts)
            first = (jax.lax.axis_index(experts) * each).astype(jnp.int32)
        scattered = self.kept != self.rows
        return Part(
            axis=self.sums,
            groups=None,
            experts=count,
            first_expert=first,
            first_sums=jax.lax.axis_index(self.products) == 0 if self.products else None,
            kept=jax.lax.axis_index(self.sums) if scattered else None,
            shares=_size(self.mesh, self.sums),
        )


def _plan(op: str, labels: Labels, summed: Sequence[str], leaves: Sequence[jax.Array], mesh: Any) -> _Plan:
    axes: dict[str, _Axes] = {}
    wanted: _Axes = ()
    for place, (leaf, dims) in enumerate(zip(leaves, labels.operands, strict=True)):
        for dimension, (name, found) in enumerate(zip(dims, _axes_of(leaf), strict=True)):
            if not found:
                continue
            if labels.weights[place] is None:
                if name == ROWS and not wanted and labels.units[ROWS] % _size(mesh, found) == 0:
                    wanted = found
                continue
            if name is None:
                labels.check_whole(op, place, dimension)
            else:
                labels.check_parts(op, place, dimension, _size(mesh, found))
                if axes.setdefault(name, found) != found:
                    raise ValueError(
                        f"{labels.weights[place]} is sharded over {found} along its dimension {dimension}, and other "
                        f"arrays of the weights of {op} over {axes[name]}: shard them alike"
                    )
    used = [axis for found in axes.values() for axis in found]
    if len(used) > len(set(used)):
        raise ValueError(
            f"{op} has packed weights with several dimensions sharded over {sorted(set(used))}: shard each dimension "
            "over mesh axes of its own"
        )
    products = tuple(axis for name in summed for axis in axes.get(name, ()))
    sums = axes.get(EXPERTS, ()) + products
    rows = tuple(axis for axis in wanted if axis not in used)
    tail, kept = wanted[len(rows) :], rows
    if tail and wanted[: len(rows)] == rows and set(tail) == set(sums):
        sums, kept = tail, wanted
    return _Plan(axes, rows, kept, wanted, sums, products, mesh)


def _axes_of(leaf: jax.Array) -> list[_Axes]:
    """Those of each dimension."""
    spec = jax.typeof(leaf).sharding.spec
    named = [() if axes is None else axes if isinstance(axes, tuple) else (axes,) for axes in spec]
    return named + [()] * (leaf.ndim - len(named))


def _size(mesh: Any, axes: _Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
