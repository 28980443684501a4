"""Sums over devices of what each has computed in float32."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from jax_marlin_moe.ops.four_numbers import pack_fours, unpack_fours

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
    and rounded parts are gathered: three quarters of the bytes for results of 16 bits, or half of them.

    Args:
        y: float32 shares.
        axes: of the mesh, over which devices have shares.
        dtype: of the result.
        groups: of devices that have the shares of one sum; None for all.
    """
    ranks = _ranks(axes, groups)
    saves = jnp.dtype(dtype).itemsize < y.dtype.itemsize and y.size * y.dtype.itemsize >= _MANY_BYTES
    if ranks == 1 or not saves or y.shape[0] % ranks:
        return lax.psum(y, axes, axis_index_groups=groups).astype(dtype)
    part = scattered_sum(y, axes, dtype, groups=groups).astype(dtype)
    # Without groups types say what varies; the devices of groups belong to a program that is partitioned already.
    if groups is None:
        return lax.all_gather(part, axes, tiled=True, to="invarying")
    return lax.all_gather(part, axes, axis_index_groups=groups, tiled=True)


def scattered_sum(
    y: Float32[Array, "rows ..."],
    axes: str | tuple[str, ...],
    rounded_to: Any,
    *,
    groups: Sequence[Sequence[int]] | None = None,
) -> jax.Array:
    """Each device's equal part of the rows of the sum over devices, unrounded.

    Cards send large rows with four numbers in 64 bits where the sum will be rounded to bfloat16.

    Args:
        y: shares.
        axes: of the mesh, over which devices have shares.
        rounded_to: what the caller rounds the sum to.
        groups: as for `rounded_sum`.
    """
    many = y.dtype == jnp.float32 and y.size * y.dtype.itemsize >= _MANY_BYTES
    if not many or rounded_to != jnp.bfloat16 or y.shape[-1] % 4:
        return lax.psum_scatter(y, axes, axis_index_groups=groups, tiled=True)
    return _packed_sum(y, axes, None if groups is None else tuple(tuple(group) for group in groups))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _packed_sum(y, axes, groups):
    return lax.platform_dependent(
        y,
        cuda=partial(sum_of_packed, axes=axes, groups=groups),
        default=partial(lax.psum_scatter, axis_name=axes, axis_index_groups=groups, tiled=True),
    )


@_packed_sum.defjvp
def _(axes, groups, primals, tangents):
    (y,), (dot,) = primals, tangents
    return _packed_sum(y, axes, groups), lax.psum_scatter(dot, axes, axis_index_groups=groups, tiled=True)


def sum_of_packed(
    y: Float32[Array, "rows columns"],
    axes: str | tuple[str, ...],
    groups: Sequence[Sequence[int]] | None,
) -> Float32[Array, "part columns"]:
    """`scattered_sum` of shares that are sent with four numbers in 64 bits."""
    words = jnp.concatenate(pack_fours(y.reshape(_ranks(axes, groups), -1, y.shape[-1])), axis=-1)
    words = lax.all_to_all(words, axes, 0, 0, axis_index_groups=groups)
    return unpack_fours(*jnp.split(words, 2, axis=-1)).sum(0)


def _ranks(axes: str | tuple[str, ...], groups: Sequence[Sequence[int]] | None) -> int:
    return lax.axis_size(axes) if groups is None else len(groups[0])
