"""Into and out of `MarlinWeights`: dense weights, AutoAWQ and GPTQ tensors, and back to dense."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import layout, reference
from jax_marlin_moe.formats import WeightFormat, get_format
from jax_marlin_moe.ops.arguments import check_array, check_rank, check_weights
from jax_marlin_moe.weights import MarlinWeights

dequantize = jax.jit(reference.dequantize)


def quantize(
    dense: Float[Array, "experts K N"],
    weight_format: str = "int4",
    *,
    group_size: int | None = 128,
    scale_dtype: DTypeLike | None = None,
    bias: Float[Array, "experts N"] | None = None,
) -> MarlinWeights:
    """Quantises dense experts by rounding to nearest.

    Symmetric ("int4"): `scale = max|w| / 7` a group, `code = round(w / scale) + 8`. Asymmetric ("int4_zp"): the
    range [min(w, 0), max(w, 0)] is mapped to 0..15. Codes are chosen for the scale as stored.

    Args:
        dense: weights with the input dimension second.
        weight_format: "int4" or "int4_zp".
        group_size: 16, 32, 64 or 128 rows of K, or None for one group.
        scale_dtype: float16 or bfloat16; by default that of `dense`, bfloat16 for float32.
        bias: added after scaling, kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit the group size or the 16 x 64 tile.
    """
    row = get_format(weight_format)
    check_rank("dense", dense, 3)
    if not jnp.issubdtype(dense.dtype, jnp.floating):
        raise TypeError(f"dense has dtype {dense.dtype}; it must be floating point")
    if scale_dtype is None:
        scale_dtype = dense.dtype if jnp.dtype(dense.dtype).name in row.scale_dtypes else jnp.bfloat16
    _check_matrix("dense", dense.shape[1], dense.shape[2], group_size, row)
    packed, scales, zeros = _quantize(dense, row, group_size or dense.shape[1], jnp.dtype(scale_dtype))
    weights = MarlinWeights(packed, scales, zeros, None if bias is None else bias.astype(jnp.float32), None, row)
    check_weights("weights", weights)
    return weights


@partial(jax.jit, static_argnames=("row", "group_size", "scale_dtype"))
def _quantize(dense, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    def one_expert(w):
        groups = w.astype(jnp.float32).reshape(-1, group_size, w.shape[1])  # [G, g, N]
        if row.has_zero_points:
            low, high = jnp.minimum(groups.min(1), 0.0), jnp.maximum(groups.max(1), 0.0)
            scales = _rounded((high - low) / row.max_code, scale_dtype)
            step = jnp.where(scales == 0, 1.0, scales)
            zeros = jnp.clip(jnp.round(-low / step), 0, row.max_code)
        else:
            scales = _rounded(jnp.abs(groups).max(1) / (row.zero_point - 1), scale_dtype)
            step = jnp.where(scales == 0, 1.0, scales)
            zeros = jnp.full_like(step, row.zero_point)
        codes = jnp.clip(jnp.round(groups / step[:, None]) + zeros[:, None], 0, row.max_code)
        codes = codes.astype(jnp.uint8).reshape(w.shape)
        packed_zeros = layout.pack_zeros(zeros.astype(jnp.uint8), bits=row.bits) if row.has_zero_points else None
        return layout.pack(codes, bits=row.bits), layout.permute_scales(scales.astype(scale_dtype)), packed_zeros

    # Expert by expert: the float32 intermediates of one matrix, not of all.
    return jax.lax.map(one_expert, dense)


def _rounded(scales: Array, dtype: jnp.dtype) -> Array:
    """Non-negative float32 values that `dtype` stores exactly.

    A cast there and back is not enough: XLA keeps the excess precision, and codes would be chosen for another scale.
    """
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(scales, info.nexp, info.nmant)
    if dtype == jnp.float16:  # reduce_precision flushes its subnormals, multiples of 2^-24
        rounded = jnp.where(scales < info.smallest_normal, jnp.round(scales * 2.0**24) * 2.0**-24, rounded)
    return rounded


def from_awq(
    qweight: Int32[Array, "experts K N/8"],
    qzeros: Int32[Array, "experts groups N/8"],
    scales: Float[Array, "experts groups N"],
    *,
    bits: int = 4,
) -> MarlinWeights:
    """Packs AutoAWQ tensors (version "gemm"), experts stacked in front; `(q - z) * s`, exact.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or bits is not 4.
    """
    row = _row_for(bits)
    check_array("qweight", qweight, ndim=3, dtype=jnp.int32)
    check_array("qzeros", qzeros, ndim=3, dtype=jnp.int32)
    _check_scales(scales, row)
    experts, k, n = qweight.shape[0], qweight.shape[1], qweight.shape[2] * row.codes_per_word
    _check_stack("scales", scales.shape, (experts, scales.shape[1], n))
    _check_stack("qzeros", qzeros.shape, (experts, scales.shape[1], n // row.codes_per_word))
    _check_groups("qweight", k, n, scales.shape[1], row)
    packed, scales, zeros = _pack_awq(qweight, qzeros, scales, bits)
    return MarlinWeights(packed, scales, zeros, None, None, row)


@partial(jax.jit, static_argnames="bits")
def _pack_awq(qweight, qzeros, scales, bits: int):
    def one_expert(tensors):
        weight, zeros, scale = tensors
        return (
            layout.pack(layout.unpack_awq(weight, bits=bits), bits=bits),
            layout.permute_scales(scale),
            layout.pack_zeros(layout.unpack_awq(zeros, bits=bits), bits=bits),
        )

    return jax.lax.map(one_expert, (qweight, qzeros, scales))


def from_gptq(
    qweight: Int32[Array, "experts K/8 N"],
    qzeros: Int32[Array, "experts groups N/8"],
    scales: Float[Array, "experts groups N"],
    *,
    g_idx: Int32[Array, "experts K"] | None = None,
    bits: int = 4,
    checkpoint_format: str = "gptq",
) -> MarlinWeights:
    """Packs GPTQ tensors, experts stacked in front; `(q - z) * s[g_idx]`, exact.

    Codes whose zero points are all 8 become format "int4", others "int4_zp". Where `g_idx` is not `k // group_size`,
    rows are sorted by group and the order is kept in `input_order`.

    Args:
        qweight: codes packed along K.
        qzeros: zero points packed along N.
        scales: float16 or bfloat16.
        g_idx: group of each row, concrete values; None means `k // group_size`. Each group must have as many rows.
        bits: 4.
        checkpoint_format: "gptq" (v1: qzeros hold z - 1) or "gptq_v2" (they hold z).

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, groups are unequal, or a v1 zero point is 16, which 4 bits cannot hold.
    """
    row = _row_for(bits)
    check_array("qweight", qweight, ndim=3, dtype=jnp.int32)
    check_array("qzeros", qzeros, ndim=3, dtype=jnp.int32)
    _check_scales(scales, row)
    experts, k, n = qweight.shape[0], qweight.shape[1] * row.codes_per_word, qweight.shape[2]
    groups = scales.shape[1]
    _check_stack("scales", scales.shape, (experts, groups, n))
    _check_stack("qzeros", qzeros.shape, (experts, groups, n // row.codes_per_word))
    _check_groups("qweight", k, n, groups, row)
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}; it must be 'gptq' or 'gptq_v2'")

    zeros = layout.unpack_along_n(qzeros, bits=bits)
    if checkpoint_format == "gptq":
        if bool(jnp.any(zeros == row.max_code)):
            raise ValueError(
                f"qzeros holds {row.max_code}, a v1 zero point of {row.max_code + 1}, which {bits} bits cannot hold; "
                "if the file stores zero points as they are, pass checkpoint_format='gptq_v2'"
            )
        zeros = zeros + 1
    order = None if g_idx is None else _row_order(g_idx, experts, k, groups)
    packed = _pack_gptq(qweight, order, bits)
    scales = layout.permute_scales(scales)
    symmetric = get_format("int4")
    if bool(jnp.all(zeros == symmetric.zero_point)):
        return MarlinWeights(packed, scales, None, None, order, symmetric)
    return MarlinWeights(packed, scales, layout.pack_zeros(zeros, bits=bits), None, order, row)


@partial(jax.jit, static_argnames="bits")
def _pack_gptq(qweight, order, bits: int):
    def one_expert(tensors):
        weight, rows = tensors
        codes = layout.unpack_along_k(weight, bits=bits)
        return layout.pack(codes if rows is None else codes[rows], bits=bits)

    return jax.lax.map(one_expert, (qweight, order))


def _row_order(g_idx: Array, experts: int, k: int, groups: int) -> Int32[Array, "experts K"] | None:
    """Rows sorted by group; None where they already are."""
    check_array("g_idx", g_idx, ndim=2, dtype=jnp.int32)
    _check_stack("g_idx", g_idx.shape, (experts, k))
    index = np.asarray(g_idx)
    natural = np.arange(k) // (k // groups)
    if (index == natural).all():
        return None
    order = np.argsort(index, axis=1, kind="stable").astype(np.int32)
    if not (np.take_along_axis(index, order, axis=1) == natural).all():
        raise ValueError(
            f"g_idx does not put exactly K / groups = {k // groups} rows into each of {groups} groups; such a matrix "
            "cannot be packed by groups: requantise it without desc_act or with static_groups"
        )
    return jnp.asarray(order)


def fold_input_order(gate_up: MarlinWeights, down: MarlinWeights) -> tuple[MarlinWeights, MarlinWeights]:
    """Moves the row order of `down` into the columns of `gate_up`, where it costs nothing.

    The i-th input of down's packed rows is intermediate column `down.input_order[e, i]`, so gate and up columns are
    permuted alike, expert by expert, and down reads them in sequence.

    Args:
        gate_up: columns [gate | up].
        down: with `input_order` set; without, both are returned as they are.
    """
    check_weights("gate_up", gate_up)
    check_weights("down", down)
    if down.input_order is None:
        return gate_up, down
    if gate_up.n != 2 * down.k:
        raise ValueError(f"gate_up has N = {gate_up.n} columns; it must be 2 * K of down = {2 * down.k}")
    columns = jnp.concatenate([down.input_order, down.input_order + down.k], axis=1)  # [E, 2 I]

    def one_expert(arrays):
        packed, scales, zeros, bias, order = arrays
        bits = gate_up.format.bits
        return (
            layout.pack(layout.unpack(packed, bits=bits)[:, order], bits=bits),
            layout.permute_scales(layout.unpermute_scales(scales)[:, order]),
            None if zeros is None else layout.pack_zeros(layout.unpack_zeros(zeros, bits=bits)[:, order], bits=bits),
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


def _row_for(bits: int) -> WeightFormat:
    if bits != 4:
        raise ValueError(f"bits is {bits}; it must be 4")
    return get_format("int4_zp")


def _check_scales(scales: Array, row: WeightFormat) -> None:
    if jnp.dtype(scales.dtype).name not in row.scale_dtypes:
        raise TypeError(f"scales has dtype {scales.dtype}; it must be {' or '.join(row.scale_dtypes)}")
    check_rank("scales", scales, 3)


def _check_stack(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}; with the other tensors it must be {expected}")


def _check_groups(name: str, k: int, n: int, groups: int, row: WeightFormat) -> None:
    if groups < 1 or k % groups:
        raise ValueError(f"scales has {groups} groups, which do not divide K = {k} of {name}")
    _check_matrix(name, k, n, None if groups == 1 else k // groups, row)


def _check_matrix(name: str, k: int, n: int, group_size: int | None, row: WeightFormat) -> None:
    if k == 0 or k % layout.TILE_K:
        raise ValueError(f"{name} has K = {k}; it must be a positive multiple of {layout.TILE_K}")
    if n == 0 or n % layout.TILE_N:
        raise ValueError(f"{name} has N = {n}; it must be a positive multiple of {layout.TILE_N}")
    if group_size is not None and group_size != k and (group_size not in row.group_sizes or k % group_size):
        raise ValueError(
            f"group_size is {group_size}; it must be None (one group) or one of {row.group_sizes} that divides K = {k}"
        )
