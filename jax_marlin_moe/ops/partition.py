"""Calls over the automatic axes of a mesh: each device computes with the rows, experts and matrices that it has.

XLA knows nothing of custom calls and would gather their operands on every device. A `custom_partitioning` tells it
which dimensions belong together, by a rule for Shardy; where the program is partitioned it asks what to do, and gets
the call traced again with what one device has, and the collectives between the devices.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh
from jaxlib.xla_client import OpSharding

from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.division import EXPERTS, ROWS, Labels, Part

# What a partitioning has in place of the whole call: types. There is no lowering, since it is never run.
_unpartitioned = Primitive("unpartitioned")
_unpartitioned.multiple_results = True
_unpartitioned.def_abstract_eval(lambda *leaves, types: list(types))

# For each of the program's devices, by their positions in it, which part it has.
_Table = np.ndarray


def with_devices(ctx: mlir.LoweringRuleContext, platform: str) -> mlir.LoweringRuleContext | None:
    """A lowering context that names the devices of a program over several; None where a call is not to be partitioned.

    Programs that are exported keep the plain call: a partitioning is a function of this process. So do those lowered
    without devices, for another platform, and the inside of `jax.shard_map`, where arrays are local already. JAX names
    the devices only to primitives that then cannot be lowered for an abstract mesh. Here they carry XLA's shardings to
    the partitioning and back, and any do.
    """
    module = ctx.module_context
    axes: Any = module.axis_context
    if getattr(axes, "num_devices", 1) == 1 or module.lowering_parameters.for_export or len(module.platforms) != 1:
        return None
    if axes.device_assignment is not None:
        return ctx
    try:
        devices = jax.devices(platform)
    except RuntimeError:  # a program that is compiled for devices of another machine
        devices = jax.devices()
    if len(devices) < axes.num_devices:
        devices = [devices[0]] * axes.num_devices
    axes = dataclasses.replace(axes, device_assignment=tuple(devices[: axes.num_devices]))
    return ctx.replace(module_context=module.replace(axis_context=axes))


def over_devices(
    call: Callable[..., list[jax.Array]],
    share: Callable[..., list[jax.Array]],
    types: Sequence[jax.core.ShapedArray],
    leaves: Sequence[jax.Array],
    labels: Labels,
    summed: Sequence[str],
    *,
    op: str,
    identity: Any,
) -> list[jax.Array]:
    """The results of `call(*leaves)`, of which each device computes what it has operands for.

    Args:
        call: gets leaves as one device has them.
        share: `(part, *leaves)`, what a device adds to sums of several.
        types: of the results, one at least.
        leaves: the operands.
        labels: of their dimensions.
        summed: the labels over which results are sums, beside the experts.
        op: the name, for messages.
        identity: what beside shapes distinguishes the call, by its `repr`.
    """
    if not labels.units:
        return call(*leaves)
    types = [replicated_type(type_, type_.shape, type_.dtype) for type_ in types]

    def partition(mesh: Mesh, arguments: Sequence[Any], found: Sequence[Any]) -> tuple:
        plan = _plan(op, labels, summed, arguments, found)
        devices = Mesh(np.asarray(found[0].sharding._device_assignment), ("devices",))

        def local(*leaves: jax.Array) -> list[jax.Array]:
            # Arrays of one device have no mesh, whichever is that of the program.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                part = plan.part(labels)
                return call(*leaves) if part is None else share(part, *leaves)

        operands = zip(arguments, labels.operands, strict=True)
        placed = tuple(plan.sharding(argument, dims, plan.rows) for argument, dims in operands)
        results = zip(found, labels.results, strict=True)
        return devices, local, [plan.sharding(result, dims, plan.kept) for result, dims in results], placed

    partitioned = custom_partitioning(partial(_unpartitioned.bind, types=tuple(types)))
    rule, sizes, whole = _sharding_rule(leaves, types, labels)
    partitioned.def_partition(
        partition=partition, sharding_rule=rule, need_replication_factors=whole, decode_shardings=False, **sizes
    )
    # XLA's text of the program has no trace of the function, and JAX's cache of compiled programs knows the text alone.
    shapes = [tuple(leaf.shape) for leaf in leaves]
    text = re.sub(r" at 0x[0-9a-f]+", "", repr((identity, [type_.shape for type_ in types], shapes)))
    with set_xla_metadata(jax_marlin_moe=hashlib.sha256(text.encode()).hexdigest()):
        return list(partitioned(*leaves))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which part of each dimension a device has.

    Attributes:
        tables: by label, but for rows.
        rows: of operands.
        kept: of results.
        groups: devices that have the parts of one sum, where there is more than one.
        first_sums: of each device, whether it has the first parts of products; None where these are whole.
    """

    tables: dict[str, _Table]
    rows: _Table
    kept: _Table
    groups: list[list[int]] | None
    first_sums: np.ndarray | None

    def part(self, labels: Labels) -> Part | None:
        """That of this device in sums; in the function that is traced for one."""
        if self.groups is None:
            return None
        device = jax.lax.axis_index("devices")

        def here(table: np.ndarray) -> jax.Array:
            return jax.numpy.asarray(table)[device]

        experts = self.tables.get(EXPERTS)
        scattered = self.kept is not self.rows
        count = None if experts is None else labels.units[EXPERTS]
        each = 0 if experts is None else labels.units[EXPERTS] // _parts(experts)
        places = np.empty(len(self.rows), np.int32)
        for group in self.groups:
            places[group] = range(len(group))
        return Part(
            axis="devices",
            groups=self.groups,
            experts=count,
            first_expert=None if experts is None else here((experts * each).astype(np.int32)),
            first_sums=None if self.first_sums is None else here(self.first_sums),
            kept=here(places) if scattered else None,
            shares=len(self.groups[0]),
        )

    def sharding(self, array: Any, dims: Sequence[str | None], rows: _Table) -> Any:
        """That of an array, its own where that is it."""
        whole = np.zeros(len(self.rows), np.int64)
        tables = [rows if name == ROWS else self.tables.get(name or "", whole) for name in dims]
        own = _tables(array)
        if all(np.array_equal(table, found) for table, found in zip(tables, own, strict=True)):
            return array.sharding
        parts = [_parts(table) for table in tables]
        kind, devices = type(array.sharding), array.sharding._device_assignment
        if math.prod(parts) == 1:
            return kind.get_replicated(devices)
        order = np.lexsort([np.arange(len(rows)), *tables[::-1]])
        rest = len(rows) // math.prod(parts)
        tiles = np.ascontiguousarray(order.reshape(*parts, *([rest] if rest > 1 else [])), np.int64)
        replicated = [OpSharding.Type.REPLICATED] if rest > 1 else []
        hlo = type(array.sharding._to_xla_hlo_sharding(len(dims)))
        return kind(devices, hlo.subgroup_with_device_ordering(tiles, subgroup_types=replicated))


def _plan(op: str, labels: Labels, summed: Sequence[str], arguments: Sequence[Any], found: Sequence[Any]) -> _Plan:
    """Raises ValueError where packed weights are divided as the op cannot use them."""
    tables: dict[str, _Table] = {}
    whole = np.zeros(len(found[0].sharding._device_assignment), np.int64)
    rows = whole
    for place, (argument, dims) in enumerate(zip(arguments, labels.operands, strict=True)):
        for dimension, (name, table) in enumerate(zip(dims, _tables(argument), strict=True)):
            parts = _parts(table)
            if parts == 1:
                continue
            if labels.weights[place] is None:
                if name == ROWS and rows is whole and labels.units[ROWS] % parts == 0:
                    rows = table
                continue
            if name is None:
                labels.check_whole(op, place, dimension)
            else:
                labels.check_parts(op, place, dimension, parts)
                tables.setdefault(name, table)
    wanted = whole
    if labels.results[0] and labels.results[0][0] == ROWS:
        wanted = _tables(found[0])[0]
        if labels.units[ROWS] % _parts(wanted):
            wanted = whole
    sums = [table for name, table in tables.items() if name == EXPERTS or name in summed]
    others = [table for name, table in tables.items() if not (name == EXPERTS or name in summed)]
    if not _are_balanced([*sums, *others]):
        raise ValueError(
            f"{op} has packed weights with several dimensions sharded over the same devices: shard all arrays of a "
            "matrix alike, each dimension over mesh axes of its own"
        )
    first, second = (rows, wanted) if sums else (wanted, rows)
    rows = _coarsened(first if _parts(first) > 1 else second, [*sums, *others])
    if not sums:
        return _Plan(tables, rows, rows, None, None)
    groups, kept = _groups(sums, [rows, *others]), rows
    scattered = _scattered(groups, rows, wanted)
    if scattered is not None:
        groups, kept = scattered, wanted
    first_sums = None
    for name in summed:
        if name in tables:
            first_sums = tables[name] == 0 if first_sums is None else first_sums & (tables[name] == 0)
    return _Plan(tables, rows, kept, groups, first_sums)


def _tables(array: Any) -> list[_Table]:
    """Which part of each dimension a device has."""
    ndim = len(array.shape)
    devices = len(array.sharding._device_assignment)
    hlo = array.sharding._to_xla_hlo_sharding(ndim)
    if not hlo.is_tiled():
        return [np.zeros(devices, np.int64)] * ndim
    dims = hlo.tile_assignment_dimensions()
    positions = np.asarray(hlo.tile_assignment_devices())
    tables = []
    for place in np.indices(dims)[:ndim]:
        table = np.empty(devices, np.int64)
        table[positions] = place.reshape(-1)
        tables.append(table)
    return tables


def _parts(table: _Table) -> int:
    return int(table.max()) + 1


def _joined(tables: Sequence[_Table]) -> _Table:
    """One number for what a device has of several dimensions."""
    joined = np.zeros_like(tables[0])
    for table in tables:
        joined = joined * _parts(table) + table
    return joined


def _are_balanced(tables: Sequence[_Table]) -> bool:
    """Whether equally many devices have each combination of parts."""
    if not tables:
        return True
    counts = np.bincount(_joined(tables), minlength=math.prod(map(_parts, tables)))
    return bool((counts == counts[0]).all())


def _coarsened(rows: _Table, others: Sequence[_Table]) -> _Table:
    """The finest parts of rows, several of those given joined, that the devices of each part of the others all have."""
    parts = _parts(rows)
    joins = (size for size in range(1, parts + 1) if parts % size == 0)
    return next(joined for joined in (rows // size for size in joins) if _are_balanced([joined, *others]))


def _groups(sums: Sequence[_Table], alike: Sequence[_Table]) -> list[list[int]]:
    """Devices with different parts of one sum; where several have the same part, as many groups."""
    part, key = _joined(sums), _joined(alike)
    groups = []
    for one in np.unique(key):
        replicas = [np.flatnonzero((key == one) & (part == value)) for value in np.unique(part)]
        groups += [[int(device) for device in group] for group in zip(*replicas, strict=True)]
    return groups


def _scattered(groups: Sequence[Sequence[int]], rows: _Table, wanted: _Table) -> list[list[int]] | None:
    """The groups in the order of the rows that are wanted, if those of a group are its rows in as many parts."""
    size, rest = divmod(_parts(wanted), _parts(rows))
    if rest or size != len(groups[0]) or not np.array_equal(wanted // size, rows):
        return None
    ordered = [sorted(group, key=lambda device: wanted[device]) for group in groups]
    if any([int(wanted[device] % size) for device in group] != list(range(size)) for group in ordered):
        return None
    return ordered


def _sharding_rule(
    leaves: Sequence[jax.Array], types: Sequence[jax.core.ShapedArray], labels: Labels
) -> tuple[str, dict[str, int], tuple[str, ...]]:
    """Shardy's rule, the sizes of the factors that no dimension has alone, and the factors that may not be sharded.

    Packed weights may be, in every dimension: what cannot be used is refused where the program is partitioned, since
    XLA would gather it.
    """
    whole: list[str] = []
    alone: set[str] = set()
    compound: dict[str, int] = {}
    fresh = iter(range(10**6))

    def factor(name: str | None, extent: int, packed: bool) -> str:
        if name is None or labels.units[name] == 1:  # Shardy has no factors of one in compounds
            name = f"w{next(fresh)}"
            if not packed:
                whole.append(name)
            return name
        units = labels.units[name]
        if extent == units:
            alone.add(name)
            return name
        rest = f"r{next(fresh)}"
        compound.update({name: units, rest: extent // units})
        return f"({name} {rest})"

    def factors(shape: Sequence[int], dims: Sequence[str | None], packed: bool = False) -> str:
        return " ".join(factor(name, extent, packed) for name, extent in zip(dims, shape, strict=True))

    operands = zip(leaves, labels.operands, labels.weights, strict=True)
    left = ", ".join(factors(leaf.shape, dims, weights is not None) for leaf, dims, weights in operands)
    results = zip(types, labels.results, strict=True)
    right = ", ".join(factors(type_.shape, dims) for type_, dims in results)
    return f"{left} -> {right}", {name: size for name, size in compound.items() if name not in alone}, tuple(whole)
