"""Arrays that qwix quantised, in memory: it has no files of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_marlin_moe.arguments import check_rank
from jax_marlin_moe.formats import E4M3_SCALES, E8M0_SCALES, FLOAT_SCALES, WeightFormat, get_format
from jax_marlin_moe.packing import pack_logical, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

# The formats of float values, by the rows of K in a tile; None for all other sizes.
_FLOAT_TILES: dict[str, dict[int | None, str]] = {
    "float8_e4m3fn": {32: "mxfp8", None: "fp8"},
    "float4_e2m1fn": {16: "nvfp4", None: "mxfp4"},
}


def from_qarray(array: Any, *, bias: Array | None = None) -> MarlinWeights:
    """Packs a stack of experts that qwix quantised: any object with `qvalue`, `scale` and `zero_point`.

    `qvalue` [E, K, N] is int4, int8, float8_e4m3fn or float4_e2m1fn, tiled along K alone: `scale` is [E or 1, groups or
    1, N or 1]; `zero_point` (integers like qvalue, or None) has the shape of the scale. The weight is `(qvalue -
    zero_point) * scale`, exact. Formats are "int4", "int4_zp", "int8", "int8_zp" and "fp8"; in tiles as long as theirs
    also "mxfp8", "mxfp4" (32) and "nvfp4" (16), whose scales must be concrete values that an e8m0 or e4m3 number holds,
    as qwix makes them.

    Raises:
        TypeError: a dtype that no format has.
        ValueError: shapes disagree, or a zero point or a scale has no code.
    """
    qvalue, scale, zero_point = array.qvalue, array.scale, getattr(array, "zero_point", None)
    check_rank("qvalue", qvalue, 3)
    experts, k, n = qvalue.shape
    dtype = jnp.dtype(qvalue.dtype).name
    check_rank("scale", scale, 3)
    groups = scale.shape[1]
    for axis, size in ((0, experts), (2, n)):
        if scale.shape[axis] not in (1, size):
            raise ValueError(f"scale has shape {scale.shape}; tiles may lie along K alone, axis 1 of {qvalue.shape}")
    if groups > 1 and k % groups:
        raise ValueError(f"scale has {groups} groups, which do not divide K = {k}")
    shape, zeros = (experts, groups, n), None
    if dtype in _FLOAT_TILES:
        if zero_point is not None:
            raise ValueError(f"zero_point is given; {dtype} values have none")
        tiles = _FLOAT_TILES[dtype]
        row = get_format(tiles.get(k // groups, tiles[None]))
        pattern = jnp.uint8 if row.bits == 8 else jnp.uint4
        codes = jax.lax.bitcast_convert_type(jnp.asarray(qvalue), pattern).astype(jnp.uint8)
        scale = scale.astype(jnp.float32) if row.scale == FLOAT_SCALES else _exact_bits("scale", scale, row)
    elif dtype in ("int4", "int8"):
        bits = 4 if dtype == "int4" else 8
        middle = 2 ** (bits - 1)
        row = get_format(f"int{bits}" if zero_point is None else f"int{bits}_zp")
        codes = (qvalue.astype(jnp.int16) + middle).astype(jnp.uint8)
        if zero_point is not None:
            shifted = np.asarray(zero_point).astype(np.int32) + middle
            if not ((shifted >= 0) & (shifted <= row.max_code)).all():
                raise ValueError(f"zero_point lies outside [{-middle}, {middle - 1}], the values of {dtype}")
            zeros = jnp.broadcast_to(jnp.asarray(shifted, jnp.uint8), shape)
    else:
        raise TypeError(f"qvalue has dtype {dtype}; it must be int4, int8, {' or '.join(_FLOAT_TILES)}")
    scales = jnp.broadcast_to(scale, shape)
    if jnp.dtype(scales.dtype).name not in row.scale_dtypes:
        raise TypeError(f"scale has dtype {scales.dtype}; it must be {' or '.join(row.scale_dtypes)}")
    size = resolve_group_size(None, k, groups, row)
    factors = jnp.ones(experts, jnp.float32) if row.has_global_scales else None
    return pack_logical(codes, scales, row.name, group_size=size, zeros=zeros, global_scales=factors, bias=bias)


def _exact_bits(name: str, scales: Array, row: WeightFormat) -> np.ndarray:
    """Bit patterns of float scales in the 8-bit type of a format; raises ValueError where it does not hold them."""
    dtype = np.dtype({E4M3_SCALES: jnp.float8_e4m3fn, E8M0_SCALES: jnp.float8_e8m0fnu}[row.scale])
    values = np.asarray(scales).astype(np.float32)
    stored = values.astype(dtype)
    if not (stored.astype(np.float32) == values).all():
        raise ValueError(f"{name} holds values that {dtype.name} does not, the type of the scales of format {row.name}")
    if (values < 0).any():
        raise ValueError(f"{name} holds negative values; every block scale must be a number that is not negative")
    return stored.view(np.uint8)
