"""Sums over devices of what each has computed in float32."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float32

# Bytes in float32 from which rows are scattered and gathered: what that saves is then more than a second start costs.
_MANY_BYTES = 8 << 20


def rounded_sum(
    y: Float32[Array, "rows ..."],
    axes: str | tuple[str, ...],
    dtype: Any,
    *,
    groups: Sequence[Sequence[int]] | None = None,
) -> jax.Array:
    """The sum over devices, rounded once; all of them have all of it.

    An all-reduce sends float32 twice. Where rows are large and fall into equal parts, each device sums a part instead,
    and rounded parts are gathered: three quarters of the bytes for results of 16 bits.

    Args:
        y: float32 shares.
        axes: of the mesh, over which devices have shares.
        dtype: of the result.
        groups: of devices that have the shares of one sum; None for all.
    """
    ranks = lax.axis_size(axes) if groups is None else len(groups[0])
    saves = jax.numpy.dtype(dtype).itemsize < y.dtype.itemsize and y.size * y.dtype.itemsize >= _MANY_BYTES
    if ranks == 1 or not saves or y.shape[0] % ranks:
        return lax.psum(y, axes, axis_index_groups=groups).astype(dtype)
    part = lax.psum_scatter(y, axes, axis_index_groups=groups, tiled=True).astype(dtype)
    # Without groups types say what varies; the devices of groups belong to a program that is partitioned already.
    if groups is None:
        return lax.all_gather(part, axes, tiled=True, to="invarying")
    return lax.all_gather(part, axes, axis_index_groups=groups, tiled=True)
