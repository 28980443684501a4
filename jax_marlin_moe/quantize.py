"""Dense weights into `MarlinWeights`: codes and scales chosen by rounding to nearest."""

import itertools
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_marlin_moe.arguments import check_rank
from jax_marlin_moe.formats import (
    E2M1,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3,
    E4M3_MAX,
    E4M3_SCALES,
    E8M0_SCALES,
    FLOAT_SCALES,
    WeightFormat,
    get_format,
)
from jax_marlin_moe.packing import assemble, check_group_size, pack_expert
from jax_marlin_moe.weights import MarlinWeights


def quantize(
    dense: Float[Array, "experts K N"],
    weight_format: str = "int4",
    *,
    group_size: int | Literal["customary"] | None = "customary",
    scale_dtype: DTypeLike | None = None,
    bias: Float[Array, "experts N"] | None = None,
) -> MarlinWeights:
    """Quantises dense experts by rounding to nearest. Codes are chosen for the scale as stored.

    Integer codes: symmetric formats have `scale = max|w| / (zero_point - 1)` a group; those with zero points map the
    range [min(w, 0), max(w, 0)] to all codes, with a rounded ("_zp") or an exact zero point ("_fzp"). "fp8":
    `scale = max|w| / 448`. "nvfp4": a global scale `max|w| / (448 * 6)` an expert, then e4m3 block scales
    `max|w| / 6`. "mxfp4" and "mxfp8": the power of two that brings the largest value of a block into the top binade
    of the code (OCP microscaling formats 1.0, section 6.3).

    Args:
        dense: weights with the input dimension second. Any K and N: the packed matrix is padded to whole tiles.
        weight_format: a name of `jax_marlin_moe.FORMATS`.
        group_size: rows of K that share a scale, None for one group; by default the format's customary size.
        scale_dtype: of float scales; by default that of `dense`, float32 for "fp8", and bfloat16 for float32.
        bias: added after scaling, kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: the format has no such group size, or a shape is off.
    """
    row = get_format(weight_format)
    check_rank("dense", dense, 3)
    if not hasattr(dense, "dtype") or not jnp.issubdtype(dense.dtype, jnp.floating):
        raise TypeError(f"dense has dtype {getattr(dense, 'dtype', type(dense))}; it must be floating point")
    if group_size == "customary":
        group_size = row.group_sizes[-1]
    _, k, n = dense.shape
    check_group_size("group_size", group_size, k, row)
    if 0 in dense.shape:
        raise ValueError(f"dense has shape {dense.shape}; it must not be empty")
    if row.scale != FLOAT_SCALES:
        dtype = jnp.dtype(jnp.uint8)
    elif scale_dtype is not None:
        dtype = jnp.dtype(scale_dtype)
    elif row.code == E4M3 or dense.dtype == jnp.float32:
        dtype = jnp.dtype(jnp.float32 if row.code == E4M3 else jnp.bfloat16)
    else:
        dtype = jnp.dtype(dense.dtype)
        if dtype.name not in row.scale_dtypes:
            raise TypeError(
                f"dense has dtype {dtype}, which the scales of format {row.name} cannot have; it must be "
                f"{' or '.join(row.scale_dtypes)}: cast it, or pass scale_dtype"
            )
    if dtype.name not in row.scale_dtypes:
        raise TypeError(f"scale_dtype is {dtype}; format {row.name} takes {' or '.join(row.scale_dtypes)}")
    size = group_size or k
    return assemble(_quantize_and_pack(dense, row, size, dtype), k, n, row, size, bias=bias)


@partial(jax.jit, static_argnames=("row", "group_size", "scale_dtype"))
def _quantize_and_pack(dense, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    def one_expert(w):
        codes, scales, zeros, global_scale = quantize_expert(w, row, group_size, scale_dtype)
        return pack_expert(codes, scales, zeros, global_scale, row)

    return jax.lax.map(one_expert, dense)  # the float32 intermediates of one matrix, not of all


def quantize_expert(w: Array, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    """Codes [K, N], scales [G, N], zero points [G, N] or None, global scale [] or None of one expert."""
    k, n = w.shape
    groups = jnp.pad(w.astype(jnp.float32), ((0, -k % group_size), (0, 0))).reshape(-1, group_size, n)  # [G, g, N]
    largest = jnp.abs(groups).max(1)
    zeros = global_scale = None
    shift = jnp.float32(row.zero_point or 0)
    if row.scale == E8M0_SCALES:
        # floor(log2(max)) from the exponent field, less that of the code's largest value: 4 = 2^2, 256 = 2^8.
        exponent = (jax.lax.bitcast_convert_type(largest, jnp.uint32) >> 23).astype(jnp.int32)
        scales = jnp.clip(exponent - (2 if row.code == E2M1 else 8), 0, 254).astype(jnp.uint8)
        step = row.decode_scales(scales)
    elif row.scale == E4M3_SCALES:
        most = largest.max()
        global_scale = jnp.where(most == 0, 1.0, most / (E4M3_MAX * E2M1_MAX))
        scales = _to_e4m3(largest / E2M1_MAX / global_scale)
        step = row.decode_scales(scales) * global_scale
    else:
        if row.zeros is not None:
            low, high = jnp.minimum(groups.min(1), 0.0), jnp.maximum(groups.max(1), 0.0)
            scales = _rounded((high - low) / row.max_code, scale_dtype)
            step = jnp.where(scales == 0, 1.0, scales)
            zeros = -low / step
            if row.zeros == "integer":
                zeros = jnp.clip(jnp.round(zeros), 0, row.max_code)
            else:
                zeros = _rounded(zeros, scale_dtype)
            shift = zeros[:, None]
        else:
            extent = E4M3_MAX if row.code == E4M3 else row.max_code // 2
            step = scales = _rounded(largest / extent, scale_dtype)
        scales = scales.astype(scale_dtype)
    values = groups / jnp.where(step == 0, 1.0, step)[:, None]
    if row.code == E2M1:
        codes = _to_e2m1(values)
    elif row.code == E4M3:
        codes = _to_e4m3(values)
    else:
        codes = jnp.clip(jnp.round(values + shift), 0, row.max_code).astype(jnp.uint8)
    if zeros is not None:
        zeros = zeros.astype(jnp.uint8 if row.zeros == "integer" else scale_dtype)
    return codes.reshape(-1, n)[:k], scales, zeros, global_scale


def _to_e4m3(values: Array) -> Array:
    """Nearest e4m3fn as bit patterns, saturating: the cast itself gives NaN above 464."""
    saturated = jnp.clip(values, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(saturated, jnp.uint8)


def _to_e2m1(values: Array) -> Array:
    """Nearest e2m1 codes, ties to the even code, saturating."""
    magnitude = jnp.abs(values)
    code = jnp.zeros(values.shape, jnp.uint8)
    for index, (low, high) in enumerate(itertools.pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        # A tie goes up where the upper code is even.
        above = magnitude >= middle if index % 2 else magnitude > middle
        code += above.astype(jnp.uint8)
    return code | (jnp.signbit(values).astype(jnp.uint8) << 3)


def _rounded(scales: Array, dtype: jnp.dtype) -> Array:
    """Non-negative float32 values that `dtype` stores exactly.

    A cast there and back is not enough: XLA keeps the excess precision, and codes would be chosen for another scale.
    """
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(scales, info.nexp, info.nmant)
    if dtype == jnp.float16:  # reduce_precision flushes its subnormals, multiples of 2^-24
        rounded = jnp.where(scales < info.smallest_normal, jnp.round(scales * 2.0**24) * 2.0**-24, rounded)
    return rounded
