"""Sums over devices of what each has computed in float32."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.ops.packed_shares import add_shares, add_two_shares, pack_share

# Bytes in float32 from which rows are scattered and gathered: what that saves is then more than a second start costs.
_MANY_BYTES = 8 << 20
# Where so many are packed to be sent. On the host, where sending is copying, packing them would be the longer part.
_PACKING_PLATFORMS = ("cuda",)


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
    saves = jnp.dtype(dtype).itemsize < y.dtype.itemsize and _has_many_bytes(y.shape, y.dtype)
    if ranks == 1 or not saves or y.shape[0] % ranks:
        return lax.psum(y, axes, axis_index_groups=groups).astype(dtype)
    if sends_packed(y.shape, dtype, axes, groups):
        return _packed_sum(y, axes, _hashable(groups), dtype, False)
    return _sum_of_parts(y, axes, groups, dtype, False)


def scattered_sum(
    y: Float32[Array, "rows ..."],
    axes: str | tuple[str, ...],
    rounded_to: Any,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    dtype: Any = None,
) -> jax.Array:
    """Each device's equal part of the rows of the sum over devices.

    Cards send large rows with four numbers in 64 bits where the sum will be rounded to bfloat16.

    Args:
        y: shares.
        axes: of the mesh, over which devices have shares.
        rounded_to: what the caller rounds the sum to.
        groups: as for `rounded_sum`.
        dtype: of the result; None leaves it that of y, unrounded.
    """
    dtype = jnp.dtype(y.dtype if dtype is None else dtype)
    if y.dtype != jnp.float32 or not _packs(y.shape, rounded_to):
        return _scattered(y, axes, groups, dtype)
    return _packed_sum(y, axes, _hashable(groups), dtype, True)


def sends_packed(
    shape: tuple[int, ...],
    dtype: Any,
    axes: str | tuple[str, ...],
    groups: Sequence[Sequence[int]] | None = None,
    *,
    scattered: bool = False,
) -> bool:
    """Whether cards send float32 shares of this shape packed, to their sum as a dtype; of `sum_of_packed`."""
    ranks = _ranks(axes, groups)
    return _packs(shape, dtype) and (scattered or ranks > 1) and shape[0] % ranks == 0


def sum_of_packed(
    words: Int32[Array, "rows words"],
    axes: str | tuple[str, ...],
    dtype: Any,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    scattered: bool = False,
) -> Float[Array, "kept columns"]:
    """`rounded_sum`, or `scattered_sum`, of shares that are packed already."""
    if _ranks(axes, groups) == 2 and not scattered:
        # Whole shares are as many bytes as halves of them and rounded halves of the sum, and one collective less.
        pairs = [(0, 1)] if groups is None else groups
        other = lax.ppermute(words, axes, [pair for a, b in pairs for pair in ((a, b), (b, a))])
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        return add_two_shares(words, other, dtype, alike_over=names if groups is None else ())
    words = words.reshape(_ranks(axes, groups), -1, words.shape[-1])
    part = add_shares(lax.all_to_all(words, axes, 0, 0, axis_index_groups=groups), dtype)
    return part if scattered else _gathered(part, axes, groups)


def where_packed(packed: Callable[..., Array], plain: Callable[..., Array], *operands: Any) -> Array:
    """The first function of the operands on platforms that send shares packed, the second elsewhere."""
    return lax.platform_dependent(*operands, **dict.fromkeys(_PACKING_PLATFORMS, packed), default=plain)


def _has_many_bytes(shape, dtype):
    return math.prod(shape) * jnp.dtype(dtype).itemsize >= _MANY_BYTES


def _packs(shape, rounded_to):
    return _has_many_bytes(shape, jnp.float32) and rounded_to == jnp.bfloat16 and shape[-1] % 4 == 0


def _scattered(y, axes, groups, dtype):
    return lax.psum_scatter(y, axes, axis_index_groups=groups, tiled=True).astype(dtype)


def _gathered(part, axes, groups):
    # Without groups types say what varies; the devices of groups belong to a program that is partitioned already.
    if groups is None:
        return lax.all_gather(part, axes, tiled=True, to="invarying")
    return lax.all_gather(part, axes, axis_index_groups=groups, tiled=True)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _packed_sum(y, axes, groups, dtype, scattered):
    return where_packed(
        lambda y: sum_of_packed(pack_share(y), axes, dtype, groups=groups, scattered=scattered),
        partial(_sum_of_parts, axes=axes, groups=groups, dtype=dtype, scattered=scattered),
        y,
    )


@_packed_sum.defjvp
def _(axes, groups, dtype, scattered, primals, tangents):
    (y,), (dot,) = primals, tangents
    return _packed_sum(y, axes, groups, dtype, scattered), _sum_of_parts(dot, axes, groups, dtype, scattered)


def _sum_of_parts(y, axes, groups, dtype, scattered):
    part = _scattered(y, axes, groups, dtype)
    return part if scattered else _gathered(part, axes, groups)


def _hashable(groups):
    return None if groups is None else tuple(tuple(group) for group in groups)


def _ranks(axes: str | tuple[str, ...], groups: Sequence[Sequence[int]] | None) -> int:
    return lax.axis_size(axes) if groups is None else len(groups[0])
