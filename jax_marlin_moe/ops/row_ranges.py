"""CUDA programs for a number of rows that is not known when they are exported.

Kernels are compiled for exact shapes. Where the number of rows is symbolic, a call becomes one for each of a few
numbers: rows are padded to the next, and the result is cut back. Above the last, runs of that many rows go one after
the other. `jax.export` puts the real number in before it compiles, so that XLA keeps the one branch that is taken.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

# Between neighbours, at most that many rows are computed for each that is there; padding has no expert.
_FACTOR = 4
_LAST = 4096


def is_symbolic(shape: Sequence[Any]) -> bool:
    """Whether an extent is not known."""
    return any(jax.export.is_symbolic_dim(extent) for extent in shape)


def over_ranges(
    call: Callable[..., list[jax.Array]],
    leaves: Sequence[jax.Array],
    rows: Sequence[int],
    results: Sequence[jax.core.ShapedArray],
    *,
    op: str,
) -> list[jax.Array]:
    """The results of `call(*leaves)`, which is traced for known numbers of rows.

    Args:
        call: gets leaves of known shapes, with padding at the end: ids of -1, zeros elsewhere.
        leaves: the operands.
        rows: places of those whose first dimension is that of rows, or of a fixed number of slots for each.
        results: types. All have rows.
        op: the name, for messages.

    Raises:
        ValueError: another extent is symbolic, or rows depend on each other.
    """
    parts = [leaves[place].shape for place in rows] + [type_.shape for type_ in results]
    count = next((shape[0] for shape in parts if all(_times(other[0], shape[0]) for other in parts)), None)
    others = [leaf.shape for place, leaf in enumerate(leaves) if place not in rows] + [shape[1:] for shape in parts]
    if count is None or not rows or any(map(is_symbolic, others)):
        found = ", ".join(str(tuple(leaf.shape)) for leaf in leaves if is_symbolic(leaf.shape))
        raise ValueError(
            f"{op} has operands of shape {found}, and its CUDA kernels are compiled for known shapes. Only the number "
            "of rows of fused_moe, moe_layer, linear and ragged_dot may be symbolic: export a program for each shape, "
            "export for platforms=['cpu'], or pass implementation='xla'"
        )
    slots = [_times(shape[0], count) or 0 for shape in parts]

    def resized(array: jax.Array, found: Any, wanted: Any) -> jax.Array:
        """With other rows at the end, or fewer."""
        fill = jnp.asarray(-1 if jnp.issubdtype(array.dtype, jnp.integer) else 0, array.dtype)
        return jax.lax.pad(array, fill, [(0, wanted - found, 0), *[(0, 0, 0)] * (array.ndim - 1)])

    def called(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        filled = dict(zip(rows, arrays, strict=True))
        return call(*(filled.get(place, leaf) for place, leaf in enumerate(leaves)))

    of_operands, of_results = slots[: len(rows)], slots[len(rows) :]

    def padded(size: int) -> Callable[..., list[jax.Array]]:
        def branch(*arrays: jax.Array) -> list[jax.Array]:
            found = called([resized(a, m * count, m * size) for a, m in zip(arrays, of_operands, strict=True)])
            return [resized(y, m * size, m * count) for y, m in zip(found, of_results, strict=True)]

        return branch

    def in_runs(*arrays: jax.Array) -> list[jax.Array]:
        number = (count + _LAST - 1) // _LAST
        runs = [
            resized(a, m * count, m * number * _LAST).reshape(number, m * _LAST, *a.shape[1:])
            for a, m in zip(arrays, of_operands, strict=True)
        ]
        found = jax.lax.map(called, runs)
        return [
            resized(y.reshape(m * number * _LAST, *y.shape[2:]), m * number * _LAST, m * count)
            for y, m in zip(found, of_results, strict=True)
        ]

    sizes: list[int] = []
    size = 1
    while size <= _LAST and not (sizes and _is_at_most(count, sizes[-1])):
        if not _is_at_least(count, size + 1):
            sizes.append(size)
        size *= _FACTOR
    branches = [padded(size) for size in sizes]
    if not sizes or not _is_at_most(count, sizes[-1]):
        branches.append(in_runs)
    index = sum(((jnp.asarray(count) > size).astype(jnp.int32) for size in sizes), jnp.int32(0))
    chosen = jnp.minimum(index, len(branches) - 1)
    return jax.lax.switch(chosen, branches, *(leaves[place] for place in rows))


def _times(extent: Any, count: Any) -> int | None:
    """How many times the one is the other, where that is a number."""
    if isinstance(count, int) and (count == 0 or not isinstance(extent, int)):
        return None
    times, rest = extent // count, extent % count
    return times if isinstance(times, int) and isinstance(rest, int) and rest == 0 else None


def _is_at_most(extent: Any, bound: int) -> bool:
    """Whether an extent has no more, as far as its constraints say."""
    try:
        return bool(extent <= bound)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def _is_at_least(extent: Any, bound: int) -> bool:
    """Whether an extent has no fewer, as far as its constraints say."""
    try:
        return bool(extent >= bound)
    except jax.errors.InconclusiveDimensionOperation:
        return False
