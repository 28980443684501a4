"""Into and out of `MarlinWeights`: dense weights, logical codes, and back to dense."""

import dataclasses
import itertools
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from jax_marlin_moe import layout, reference
from jax_marlin_moe.arguments import check_array, check_rank, check_weights
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
from jax_marlin_moe.weights import MarlinWeights, drop_column_padding


@jax.jit
def dequantize(weights: MarlinWeights) -> Float32[Array, "*experts K N"]:
    """The float32 weights, rows in packed order, without padding."""
    return drop_column_padding(reference.dequantize(weights)[..., : weights.k, :], weights)


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
    return assemble(_quantize_and_pack(dense, row, size, dtype), k, n, row, size, bias)


@partial(jax.jit, static_argnames=("row", "group_size", "scale_dtype"))
def _quantize_and_pack(dense, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    def one_expert(w):
        codes, scales, zeros, global_scale = quantize_expert(w, row, group_size, scale_dtype)
        return pack_expert(codes, scales, zeros, global_scale, row)

    return jax.lax.map(one_expert, dense)  # the float32 intermediates of one matrix, not of all


@partial(jax.jit, static_argnames="row")
def _pack(leaves, row: WeightFormat):
    def one_expert(leaf):
        codes, scales, zeros, global_scale = leaf
        return pack_expert(codes, scales, zeros, global_scale, row)

    return jax.lax.map(one_expert, leaves)


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


def pack_expert(codes, scales, zeros, global_scale, row: WeightFormat):
    """The leaves of one expert in Marlin order, padded to whole tiles; the global scale may be one per 64 columns."""
    k, n = codes.shape
    rows, columns = -k % layout.TILE_K, -n % layout.TILE_N
    groups, blocks = scales.shape[0], (n + columns) // layout.TILE_N
    # Scales of zero make the padding columns zero, whatever their codes; the padding of x does it for rows.
    codes = jnp.pad(codes, ((0, rows), (0, columns)), constant_values=row.zero_point or 0)
    scales = layout.permute_scales(jnp.pad(scales, ((0, 0), (0, columns))))
    if zeros is not None:
        zeros = jnp.pad(zeros, ((0, 0), (0, columns)))
        packs = row.zeros == "integer"
        zeros = layout.pack_zeros(zeros, bits=row.bits) if packs else layout.permute_scales(zeros)
    if global_scale is not None:
        global_scale = jnp.broadcast_to(jnp.asarray(global_scale, jnp.float32), (blocks,))
    assert scales.shape == (groups, n + columns)
    return layout.pack(codes, bits=row.bits), scales, zeros, global_scale


def assemble(parts, k: int, n: int, row: WeightFormat, group_size: int, bias: Array | None) -> MarlinWeights:
    """`MarlinWeights` from the stacked leaves of `pack_expert`."""
    packed, scales, zeros, global_scales = parts
    rows, columns = -k % layout.TILE_K, -n % layout.TILE_N
    if bias is not None:
        check_rank("bias", bias, 2)
        bias = jnp.pad(jnp.asarray(bias).astype(jnp.float32), ((0, 0), (0, columns)))
    weights = MarlinWeights(
        packed,
        scales,
        zeros,
        bias,
        None,
        row,
        min(group_size, k),
        global_scales=global_scales,
        row_padding=rows,
        column_padding=(columns,) if columns else (),
    )
    check_weights("weights", weights)
    return weights


def pack_logical(
    codes: UInt8[Array, "experts K N"],
    scales: Shaped[Array, "experts groups N"],
    weight_format: str,
    *,
    group_size: int | None = None,
    zeros: Shaped[Array, "experts groups N"] | None = None,
    global_scales: Float32[Array, "experts"] | Float32[Array, "experts N/64"] | None = None,
    bias: Float[Array, "experts N"] | None = None,
) -> MarlinWeights:
    """Packs codes and scales that are already chosen, bit for bit; what every importer ends in.

    Args:
        codes: one byte a code, of any K and N.
        scales: in a dtype that the format allows; bit patterns (e4m3, e8m0) as uint8.
        weight_format: a name of `jax_marlin_moe.FORMATS`.
        group_size: rows of K that share a scale. May be None where the shapes leave no choice: with one group, groups
            that divide K, and formats of one group size.
        zeros: zero points, uint8 or, for float ones, in the dtype of the scales.
        global_scales: float32, one an expert or one for each 64 columns (rounded up).
        bias: added after scaling, kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, the format has no such group size, or the shapes do not determine it.
    """
    row = get_format(weight_format)
    check_array("codes", codes, ndim=3, dtype=jnp.uint8)
    check_rank("scales", scales, 3)
    experts, k, n = codes.shape
    check_stack("scales", scales.shape, (experts, scales.shape[1], n))
    size = resolve_group_size(group_size, k, scales.shape[1], row)
    return assemble(_pack((codes, scales, zeros, global_scales), row), k, n, row, size, bias)


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


def fold_input_order(gate_up: MarlinWeights, down: MarlinWeights) -> tuple[MarlinWeights, MarlinWeights]:
    """Moves the row order of `down` into the columns of `gate_up`, where it costs nothing.

    The i-th input of down's packed rows is intermediate column `down.input_order[e, i]`, so gate and up columns are
    permuted alike, expert by expert, and down reads them in sequence.

    Args:
        gate_up: columns [gate | up], or of one matrix where the activation is not gated.
        down: with `input_order` set; without, both are returned as they are.
    """
    check_weights("gate_up", gate_up)
    check_weights("down", down)
    if down.input_order is None:
        return gate_up, down
    halves = 1 if gate_up.n == down.k else 2
    if gate_up.n != halves * down.k:
        raise ValueError(
            f"gate_up has N = {gate_up.n} columns; it must be 2 * K of down = {2 * down.k}, or K where not gated"
        )
    if gate_up.global_scales is not None:
        raise ValueError(
            "gate_up.global_scales is not None: they belong to blocks of 64 columns, which the row order of down would "
            "break up; quantise down without one"
        )
    width = gate_up.padded_n // halves
    padding = jnp.broadcast_to(jnp.arange(down.k, width), (down.num_experts, width - down.k))
    one_half = jnp.concatenate([down.input_order, padding], axis=1)
    columns = jnp.concatenate([one_half + width * half for half in range(halves)], axis=1)  # [E, padded_n]
    row = gate_up.format

    def permuted(scales: Array, order: Array) -> Array:
        return layout.permute_scales(layout.unpermute_scales(scales)[:, order])

    def one_expert(arrays):
        packed, scales, zeros, bias, order = arrays
        if row.zeros == "integer":
            zeros = layout.pack_zeros(layout.unpack_zeros(zeros, bits=row.bits)[:, order], bits=row.bits)
        elif row.zeros == "float":
            zeros = permuted(zeros, order)
        return (
            layout.pack(layout.unpack(packed, bits=row.bits)[:, order], bits=row.bits),
            permuted(scales, order),
            zeros,
            None if bias is None else bias[order],
        )

    arrays = (gate_up.packed, gate_up.scales, gate_up.zeros, gate_up.bias, columns)
    packed, scales, zeros, bias = jax.lax.map(one_expert, arrays)
    gate_up = dataclasses.replace(gate_up, packed=packed, scales=scales, zeros=zeros, bias=bias)
    return gate_up, dataclasses.replace(down, input_order=None)


def dense_weights(weights: MarlinWeights) -> Float32[Array, "experts K N"]:
    """`dequantize`, with rows back in the order of the checkpoint."""
    dense = dequantize(weights)
    if weights.input_order is None:
        return dense
    inverse = jnp.argsort(weights.input_order, axis=1)
    return jnp.take_along_axis(dense, inverse[:, :, None], axis=1)


def check_stack(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError where a stack of tensors does not have the shape that the others ask for."""
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}; with the other tensors it must be {expected}")


def check_group_size(name: str, group_size: int | None, k: int, row: WeightFormat) -> None:
    """Raises ValueError unless the format has such groups over K rows; None is one group."""
    if group_size is None or group_size == k:
        allowed = row.per_channel or group_size in row.group_sizes
    else:
        allowed = group_size in row.group_sizes
    if not allowed:
        one_group = "None (one group) or " if row.per_channel else ""
        raise ValueError(f"{name} is {group_size}; format {row.name} takes {one_group}one of {row.group_sizes}")


def resolve_group_size(group_size: int | None, k: int, groups: int, row: WeightFormat) -> int:
    """Rows under one scale of a stack with `groups` groups, K for one; None where they divide K or the format has one.

    Raises:
        ValueError: the format has no such groups, `groups` is another number, or nothing determines the size.
    """
    if group_size is None and groups == 1:
        group_size = k
    if group_size is None and len(row.group_sizes) == 1:
        group_size = row.group_sizes[0]
    if group_size is None:
        if groups < 1 or k % groups:
            raise ValueError(
                f"group_size is None, and {groups} groups over K = {k} do not determine it; pass the rows of K that "
                "share a scale"
            )
        group_size = k // groups
    if not (groups == 1 and group_size >= k and (row.per_channel or k <= max(row.group_sizes))):
        check_group_size("group_size", group_size, k, row)
    if groups != -(-k // group_size):
        raise ValueError(
            f"scales has {groups} groups over K = {k}; group_size {group_size} makes {-(-k // group_size)}"
        )
    return group_size
