"""Calls over the automatic axes of a mesh: each device computes the rows that it has.

XLA knows nothing of custom calls and would gather their operands on every device. A `custom_partitioning` tells it what
may be sharded (the rows, by a rule for Shardy), and traces the call again with what one device has.
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
from jax.sharding import Mesh

from jax_marlin_moe.operand_types import replicated_type

# What a partitioning has in place of the whole call: types. There is no lowering, since it is never run.
_unpartitioned = Primitive("unpartitioned")
_unpartitioned.multiple_results = True
_unpartitioned.def_abstract_eval(lambda *leaves, types: list(types))


def with_devices(ctx: mlir.LoweringRuleContext, platform: str) -> mlir.LoweringRuleContext | None:
    """A lowering context that names the devices of a program over several; None where a call is not to be partitioned.

    Programs that are exported keep the plain call: a partitioning is a function of this process. So do those lowered
    without devices, for another platform, and the inside of `jax.shard_map`, where arrays are local already. JAX names
    the devices only to primitives that then cannot be lowered for an abstract mesh. Here they carry XLA's shardings to
    the partitioning and back, and any of the platform do.
    """
    module = ctx.module_context
    axes: Any = module.axis_context
    if getattr(axes, "num_devices", 1) == 1 or module.lowering_parameters.for_export or len(module.platforms) != 1:
        return None
    if axes.device_assignment is not None:
        return ctx
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        return None
    if len(devices) < axes.num_devices:
        return None
    axes = dataclasses.replace(axes, device_assignment=tuple(devices[: axes.num_devices]))
    return ctx.replace(module_context=module.replace(axis_context=axes))


def over_rows(
    call: Callable[..., list[jax.Array]],
    types: Sequence[jax.core.ShapedArray],
    leaves: Sequence[jax.Array],
    rows: Sequence[int],
    *,
    identity: Any,
) -> list[jax.Array]:
    """The results of `call(*leaves)`, whose rows each device computes for its own rows.

    Args:
        call: gets leaves that have as many rows as one device has.
        types: of the results, one at least.
        leaves: the operands.
        rows: places of the leaves whose first dimension is that of rows, or of a fixed number of slots for each.
        identity: what beside shapes distinguishes the call, by its `repr`.
    """
    count = min(leaves[place].shape[0] for place in rows)
    shapes = {place: leaves[place].shape for place in rows}
    if count == 0 or any(shape[0] % count for shape in [*shapes.values(), *(type_.shape for type_ in types)]):
        return call(*leaves)

    def of_slots(leaves: Sequence[jax.Array]) -> list[jax.Array]:
        found = list(leaves)
        for place, (extent, *rest) in shapes.items():
            found[place] = found[place].reshape(extent // count * found[place].shape[0], *rest)
        return found

    def of_rows(*leaves: jax.Array) -> list[jax.Array]:
        local = leaves[rows[0]].shape[0]
        return [result.reshape(local, -1) for result in call(*of_slots(leaves))]

    def local(mesh: Mesh, arguments: Sequence[Any], found: Sequence[Any]) -> tuple:
        # Operands with rows and results are all matrices, so what shards the rows of one does so for the others.
        choices = [found[0], *(arguments[place] for place in rows)]
        whole = type(found[0].sharding).get_replicated(found[0].sharding._device_assignment)
        shared = next((choice.sharding for choice in choices if _only_rows(choice)), whole)
        placed = [shared if place in rows else whole for place in range(len(leaves))]
        devices = Mesh(np.asarray(found[0].sharding._device_assignment), ("devices",))
        return devices, of_rows, [shared] * len(types), tuple(placed)

    matrices = [leaf.reshape(count, -1) if place in rows else leaf for place, leaf in enumerate(leaves)]
    results = [replicated_type(type_, (count, math.prod(type_.shape) // count), type_.dtype) for type_ in types]
    partitioned = custom_partitioning(partial(_unpartitioned.bind, types=tuple(results)))
    rule, whole = _sharding_rule(matrices, rows, results)
    partitioned.def_partition(
        partition=local, sharding_rule=rule, need_replication_factors=whole, decode_shardings=False
    )
    # XLA's text of the program has no trace of the function, and JAX's cache of compiled programs knows the text alone.
    text = re.sub(r" at 0x[0-9a-f]+", "", repr((identity, [type_.shape for type_ in types], shapes)))
    with set_xla_metadata(jax_marlin_moe=hashlib.sha256(text.encode()).hexdigest()):
        found = partitioned(*matrices)
    return [result.reshape(type_.shape) for result, type_ in zip(found, types, strict=True)]


def _only_rows(choice: jax.ShapeDtypeStruct) -> bool:
    """Whether the rows of a matrix are sharded, in equal parts, and nothing else."""
    try:
        local = choice.sharding.shard_shape(choice.shape)
    except ValueError:  # parts that are not equal
        return False
    return local[0] < choice.shape[0] and local[1] == choice.shape[1]


def _sharding_rule(
    leaves: Sequence[jax.Array], rows: Sequence[int], types: Sequence[jax.core.ShapedArray]
) -> tuple[str, tuple[str, ...]]:
    """Shardy's rule, in which only the rows have a factor in common, and the factors that may not be sharded."""
    whole: list[str] = []

    def factors(array: jax.Array | jax.core.ShapedArray, has_rows: bool) -> str:
        names = ["t"] if has_rows else []
        for _ in range(array.ndim - has_rows):
            whole.append(f"w{len(whole)}")
            names.append(whole[-1])
        return " ".join(names)

    operands = ", ".join(factors(leaf, place in rows) for place, leaf in enumerate(leaves))
    return f"{operands} -> {', '.join(factors(type_, True) for type_ in types)}", tuple(whole)
