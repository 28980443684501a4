"""Tensors of other tools' quantised linears, as they lie on disk, into `MarlinWeights`: bit for bit.

One `decode_*` function per packing turns the tensors of one linear into logical codes and scales (docs/checkpoints.md,
"Schemes"); the checkpoint loader calls it linear by linear. One `from_*` function per packing checks a stack of
experts, decodes and packs it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from jax_marlin_moe import layout
from jax_marlin_moe.arguments import check_array, check_rank
from jax_marlin_moe.formats import E4M3_SCALES, E8M0_SCALES, FLOAT_SCALES, WeightFormat, decode_e8m0, get_format
from jax_marlin_moe.packing import assemble, check_group_size, check_stack, pack_expert, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

FP8_BLOCK = 128  # rows of K under one scale of a block-quantised FP8 weight


class LogicalLinear(NamedTuple):
    """One linear (K, N) in logical order; what `packing.pack_expert` takes."""

    codes: UInt8[Array, "K N"]
    scales: Shaped[Array, "groups N"]
    zeros: Shaped[Array, "groups N"] | None = None
    global_scale: Float32[Array, ""] | None = None

    def columns(self, order: Int32[Array, "N"]) -> "LogicalLinear":
        """The same with columns taken in another order."""
        zeros = None if self.zeros is None else self.zeros[:, order]
        return self._replace(codes=self.codes[:, order], scales=self.scales[:, order], zeros=zeros)


# Decoders of one linear. K and N are its input and output features.


def decode_awq(qweight: Array, qzeros: Array | None, scales: Array, *, bits: int = 4) -> LogicalLinear:
    """AutoAWQ "gemm": words along N, columns interleaved; no `qzeros` where the format has its zero point baked in."""
    zeros = None if qzeros is None else layout.unpack_awq(qzeros, bits=bits)
    return LogicalLinear(layout.unpack_awq(qweight, bits=bits), scales, zeros)


def decode_gptq(
    qweight: Array, qzeros: Array | None, scales: Array, order: Array | None, *, bits: int, stored_less_one: bool
) -> LogicalLinear:
    """GPTQ: codes along K, zero points along N; no `qzeros` where the format has its zero point baked in."""
    codes = layout.unpack_along_k(qweight, bits=bits)
    zeros = None
    if qzeros is not None:
        zeros = layout.unpack_along_n(qzeros, bits=bits) + jnp.uint8(stored_less_one)
    return LogicalLinear(codes if order is None else codes[order], scales, zeros)


def decode_compressed_tensors(
    weight_packed: Array, weight_scale: Array, zero_point: Array | None, order: Array | None, *, bits: int, k: int
) -> LogicalLinear:
    """compressed-tensors pack-quantized: words along K of [N, K]; codes and zero points both offset by 2^(bits - 1)."""
    codes = layout.unpack_along_n(weight_packed, bits=bits)[:, :k].T
    zeros = None
    if zero_point is not None:  # packed along N, its first axis; N need not fill the last word
        zeros = layout.unpack_along_k(zero_point, bits=bits)[: weight_packed.shape[0]].T
    return LogicalLinear(codes if order is None else codes[order], weight_scale.T, zeros)


def decode_fp4(weight: Array, scale: Array, global_scale: Array | None = None) -> LogicalLinear:
    """MXFP4 and NVFP4: two e2m1 codes a byte of [N, K / 2], the low nibble first; scales [N, K / group] as bits."""
    codes = jnp.stack([weight & 15, weight >> 4], axis=-1).reshape(weight.shape[0], -1)
    return LogicalLinear(codes.T, scale.T, None, global_scale)


def decode_fp8(weight: Array, scale: Array) -> LogicalLinear:
    """FP8: bytes [N, K]; scales of a tensor, of a row of N, of groups of 128 in a row, or of blocks of 128 x 128.

    Scales may be floats, or e8m0 bit patterns as uint8; they become float32.
    """
    n = weight.shape[0]
    scale = decode_e8m0(scale) if scale.dtype == jnp.uint8 else scale.astype(jnp.float32)
    if scale.size == 1:
        rows = jnp.broadcast_to(scale.reshape(1, 1), (n, 1))
    elif scale.shape[0] == n:
        rows = scale.reshape(n, -1)
    else:
        rows = jnp.repeat(scale, fp8_block_rows(n, scale.shape[0]), axis=0)[:n]
    return LogicalLinear(weight.T, rows.T)


def decode_mxfp8(weight: Array, scale: Array) -> LogicalLinear:
    """MXFP8: bytes [N, K], e8m0 bit patterns [N, K / 32]."""
    return LogicalLinear(weight.T, scale.T)


def decode_hqq(w_q: Array, scale: Array, zero: Array, *, bits: int, k: int, n: int) -> LogicalLinear:
    """HQQ, axis 1: rows of a group each; 4 bit packs row r above row r + half in one byte."""
    rows = jnp.concatenate([w_q >> 4, w_q & 15]) if bits == 4 else w_q
    grouped = [array.reshape(n, -1).T for array in (scale, zero)]
    return LogicalLinear(rows.reshape(n, k).T, *grouped)


def fp8_scale_shapes(k: int, n: int) -> tuple[tuple[int, ...], ...]:
    """Shapes that the scales of an FP8 linear (k, n) may have."""
    groups = -(-k // FP8_BLOCK)
    return (), (1,), (1, 1), (n,), (n, 1), (n, groups), (-(-n // FP8_BLOCK), groups)


def fp8_scale_shapes_in_words(k: int, n: int) -> str:
    """The same for an error."""
    *_, channels, grouped, blocks = fp8_scale_shapes(k, n)
    return f"() (tensor), {channels} (channel), {grouped} (groups of 128) or {blocks} (blocks of 128 x 128)"


def fp8_block_rows(n: int, blocks: int) -> int:
    """Rows of N under one scale: 128, or less where all of N is one short block."""
    return n if blocks == 1 else FP8_BLOCK


# Checks of values. They read numbers, so they need concrete arrays.


def has_nan_codes(weight: np.ndarray) -> bool:
    """Whether e4m3 bit patterns hold NaN (0x7F or 0xFF)."""
    return bool(((weight & 0x7F) == 0x7F).any())


def bad_block_scales(scale: np.ndarray, *, exponent: bool) -> str | None:
    """What is wrong with block scales given as bit patterns (e8m0 if `exponent`, e4m3 otherwise), or None."""
    if exponent:
        return "NaN (e8m0 255)" if (scale == 255).any() else None
    if ((scale & 0x7F) == 0x7F).any():
        return "NaN (e4m3 0x7F or 0xFF)"
    return "negative values" if (scale > 0x80).any() else None


def is_zero_fp4(weight: np.ndarray, scale: np.ndarray) -> bool:
    """Whether all values of FP4 bytes with e4m3 scales are zero, so that no global scale matters."""
    return not (weight & 0x77).any() or not (scale & 0x7F).any()


def bad_float_scales(scale: np.ndarray) -> str | None:
    """What is wrong with float scales that may not be negative, or None."""
    if not np.isfinite(scale.astype(np.float32, copy=False)).all():
        return "infinities or NaN; every scale must be finite"
    return "negative values; no scale may be negative" if (scale < 0).any() else None


def row_order(index: np.ndarray, group_size: int) -> np.ndarray | None:
    """Rows sorted by their groups [..., K]; None where they already are.

    Raises:
        ValueError: a group has another number of rows than `group_size` (the last one: the rest).
    """
    k = index.shape[-1]
    natural = np.arange(k, dtype=np.int32) // group_size
    if (index == natural).all():
        return None
    order = np.argsort(index, axis=-1, kind="stable").astype(np.int32)
    if not (np.take_along_axis(index, order, axis=-1) == natural).all():
        raise ValueError(
            f"g_idx does not put exactly K / groups = {group_size} rows into each of {natural[-1] + 1} groups; such a "
            "matrix cannot be packed by groups: requantise it without desc_act or with static_groups"
        )
    return order


# Importers of stacks.


def from_awq(
    qweight: Int32[Array, "experts K N/8"],
    qzeros: Int32[Array, "experts groups N/8"] | None,
    scales: Float[Array, "experts groups N"],
    *,
    bits: int = 4,
    group_size: int | None = None,
) -> MarlinWeights:
    """Packs AutoAWQ tensors (version "gemm"), experts stacked in front; `(q - z) * s`, exact.

    The format is "int4_zp" or "int8_zp", without `qzeros` "int4" or "int8".

    Args:
        qweight: codes packed along N, interleaved as AutoAWQ does.
        qzeros: zero points, packed likewise; None where all are 8 (128 for 8 bit).
        scales: float16, bfloat16 or float32, kept as they are.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, bits is neither 4 nor 8, or the group size is not determined.
    """
    row = _integer_row(bits, zeros=qzeros is not None)
    check_array("qweight", qweight, ndim=3, dtype=jnp.int32)
    _check_scales("scales", scales, row)
    experts, k, n = qweight.shape[0], qweight.shape[1], qweight.shape[2] * row.codes_per_word
    groups = scales.shape[1]
    check_stack("scales", scales.shape, (experts, groups, n))
    if qzeros is not None:
        check_array("qzeros", qzeros, ndim=3, dtype=jnp.int32)
        check_stack("qzeros", qzeros.shape, (experts, groups, n // row.codes_per_word))
    size = resolve_group_size(group_size, k, groups, row)
    return _pack_stack(decode_awq, (qweight, qzeros, scales), row, k, n, size, options={"bits": bits})


def from_gptq(
    qweight: Int32[Array, "experts K/pf N"],
    qzeros: Int32[Array, "experts groups N/pf"],
    scales: Float[Array, "experts groups N"],
    *,
    g_idx: Int32[Array, "experts K"] | None = None,
    bits: int = 4,
    group_size: int | None = None,
    checkpoint_format: str = "gptq",
) -> MarlinWeights:
    """Packs GPTQ tensors, experts stacked in front; `(q - z) * s[g_idx]`, exact.

    Codes whose zero points are all 8 (128 for 8 bit) become format "int4" ("int8"), others "int4_zp" ("int8_zp").
    Where `g_idx` is not `k // group_size`, rows are sorted by group and the order is kept in `input_order`.

    v1 files store z - 1. The writers' own conversion to v2 adds 1 to every code of a word by one addition to the word
    (0x11111111), so a stored 15 (255) would carry into its neighbour; the zero point 16 (256) that it stands for has
    no code. Such files are refused: their writers do not agree on what they mean.

    Args:
        qweight: codes packed along K.
        qzeros: zero points packed along N.
        scales: float16, bfloat16 or float32, kept as they are.
        g_idx: group of each row, concrete values; None means `k // group_size`. Each group must have as many rows.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.
        checkpoint_format: "gptq" (v1: qzeros hold z - 1) or "gptq_v2" (they hold z).

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, groups are unequal or not determined, or a v1 zero point is 2^bits.
    """
    row = _integer_row(bits, zeros=True)
    check_array("qweight", qweight, ndim=3, dtype=jnp.int32)
    check_array("qzeros", qzeros, ndim=3, dtype=jnp.int32)
    _check_scales("scales", scales, row)
    experts, k, n = qweight.shape[0], qweight.shape[1] * row.codes_per_word, qweight.shape[2]
    groups = scales.shape[1]
    check_stack("scales", scales.shape, (experts, groups, n))
    check_stack("qzeros", qzeros.shape, (experts, groups, n // row.codes_per_word))
    size = resolve_group_size(group_size, k, groups, row)
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format is {checkpoint_format!r}; it must be 'gptq' or 'gptq_v2'")
    less_one = checkpoint_format == "gptq"
    stored = np.asarray(qzeros)
    check_gptq_zeros(stored, bits, less_one)
    baked = zeros_are_baked(stored, bits, less_one=less_one)
    if baked:
        row = _integer_row(bits, zeros=False)
    order = None
    if g_idx is not None:
        check_array("g_idx", g_idx, ndim=2, dtype=jnp.int32)
        check_stack("g_idx", g_idx.shape, (experts, k))
        order = row_order(np.asarray(g_idx), size)
    tensors = (qweight, None if baked else qzeros, scales, order)
    options = {"bits": bits, "stored_less_one": less_one}
    return _pack_stack(decode_gptq, tensors, row, k, n, size, order, options=options)


def check_gptq_zeros(qzeros: np.ndarray, bits: int, less_one: bool) -> None:
    """Raises ValueError where a v1 zero point has no code."""
    largest = 2**bits - 1
    stored = np.ascontiguousarray(qzeros).view(np.uint8)
    fields = (stored & 15, stored >> 4) if bits == 4 else (stored,)
    if less_one and any((field == largest).any() for field in fields):
        raise ValueError(
            f"qzeros holds {largest}, a v1 zero point of {largest + 1}, which {bits} bits cannot hold; if the file "
            "stores zero points as they are, pass checkpoint_format='gptq_v2'"
        )


def zeros_are_baked(qzeros: np.ndarray, bits: int, *, less_one: bool = False) -> bool:
    """Whether every zero point of packed ones is the middle code; `less_one` as GPTQ v1 stores them."""
    middle = 2 ** (bits - 1) - less_one
    word = np.uint32(sum(middle << shift for shift in range(0, 32, bits)))
    return bool((np.ascontiguousarray(qzeros).view(np.uint32) == word).all())


def from_compressed_tensors(
    weight_packed: Int32[Array, "experts N K/pf"],
    weight_scale: Float[Array, "experts N groups"],
    *,
    k: int,
    bits: int = 4,
    group_size: int | None = None,
    weight_zero_point: Int32[Array, "experts N/pf groups"] | None = None,
    weight_g_idx: Int32[Array, "experts K"] | None = None,
) -> MarlinWeights:
    """Packs compressed-tensors "pack-quantized" tensors, experts stacked in front; `(q - z) * s`, exact.

    The format is "int4" or "int8", with zero points "int4_zp" or "int8_zp".

    Args:
        weight_packed: codes packed along K (the last word may be filled in part).
        weight_scale: float16, bfloat16 or float32, kept as they are; one group is channel-wise.
        k: input features, the second number of `weight_shape`.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.
        weight_zero_point: zero points of asymmetric weights, packed along N.
        weight_g_idx: group of each row, concrete values. Each group must have as many rows.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or groups are unequal or not determined.
    """
    row = _integer_row(bits, zeros=weight_zero_point is not None)
    check_array("weight_packed", weight_packed, ndim=3, dtype=jnp.int32)
    _check_scales("weight_scale", weight_scale, row)
    experts, n, words = weight_packed.shape
    check_stack("weight_packed", (experts, n, words), (experts, n, -(-k // row.codes_per_word)))
    groups = weight_scale.shape[2]
    check_stack("weight_scale", weight_scale.shape, (experts, n, groups))
    size = resolve_group_size(group_size, k, groups, row)
    if weight_zero_point is not None:
        check_array("weight_zero_point", weight_zero_point, ndim=3, dtype=jnp.int32)
        check_stack("weight_zero_point", weight_zero_point.shape, (experts, -(-n // row.codes_per_word), groups))
    order = None
    if weight_g_idx is not None:
        check_array("weight_g_idx", weight_g_idx, ndim=2, dtype=jnp.int32)
        check_stack("weight_g_idx", weight_g_idx.shape, (experts, k))
        order = row_order(np.asarray(weight_g_idx), size)
    tensors = (weight_packed, weight_scale, weight_zero_point, order)
    return _pack_stack(decode_compressed_tensors, tensors, row, k, n, size, order, options={"bits": bits, "k": k})


def from_nvfp4(
    weight: UInt8[Array, "experts N K/2"],
    weight_scale: UInt8[Array, "experts N K/16"],
    global_scale: Float32[Array, "experts"],
    *,
    divides: bool = False,
) -> MarlinWeights:
    """Packs NVFP4 tensors, experts stacked in front; `e2m1 * e4m3 * global_scale`.

    Args:
        weight: two codes a byte, the low nibble first (ModelOpt `weight`, compressed-tensors `weight_packed`).
        weight_scale: float8_e4m3fn, or its bit patterns as uint8; concrete values.
        global_scale: ModelOpt's `weight_scale_2`; for gate and up with scales of their own, pack both and join them
            with `concatenate_columns`.
        divides: whether `global_scale` is a divisor: compressed-tensors' `weight_global_scale`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, a block scale is negative or NaN, or a global scale is not positive and finite
            (zero is allowed where the weights are zero, or it multiplies).
    """
    row = get_format("nvfp4")
    k, n = _check_fp4(weight)
    experts = weight.shape[0]
    weight_scale = _bits("weight_scale", weight_scale, "float8_e4m3fn")
    check_stack("weight_scale", weight_scale.shape, (experts, n, -(-k // 16)))
    _refuse("weight_scale", bad_block_scales(np.asarray(weight_scale), exponent=False))
    check_array("global_scale", global_scale, ndim=1, dtype=jnp.float32)
    check_stack("global_scale", global_scale.shape, (experts,))
    given, codes, scales = (np.asarray(array) for array in (global_scale, weight, weight_scale))
    dead = (given == 0) & [not divides or is_zero_fp4(codes[e], scales[e]) for e in range(experts)]
    with np.errstate(divide="ignore"):
        factors = np.where(dead, np.float32(0), np.float32(1) / given if divides else given)
    if not (dead | (np.isfinite(factors) & np.isfinite(given) & (given > 0))).all():
        raise ValueError("global_scale holds values that are not positive and finite; every expert needs one")
    return _pack_stack(decode_fp4, (weight, weight_scale, factors), row, k, n, 16)


def from_mxfp4(
    weight: UInt8[Array, "experts N K/2"], weight_scale: UInt8[Array, "experts N K/32"], *, bias: Array | None = None
) -> MarlinWeights:
    """Packs MXFP4 tensors, experts stacked in front; `e2m1 * 2^(e8m0 - 127)`, exact.

    gpt-oss: reshape `_blocks` [E, N, K / 32, 16] to [E, N, K / 2], and take rows 0::2 for gate and 1::2 for up (of
    blocks, scales and bias alike).

    Args:
        weight: two codes a byte, the low nibble first; uint8, or int8 with the same bits.
        weight_scale: e8m0 bit patterns as uint8, or float8_e8m0fnu; concrete values.
        bias: [experts, N], kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or a scale is NaN (255).
    """
    if hasattr(weight, "dtype") and weight.dtype == jnp.int8:
        weight = weight.view(jnp.uint8)
    k, n = _check_fp4(weight)
    weight_scale = _bits("weight_scale", weight_scale, "float8_e8m0fnu")
    check_stack("weight_scale", weight_scale.shape, (weight.shape[0], n, -(-k // 32)))
    _refuse("weight_scale", bad_block_scales(np.asarray(weight_scale), exponent=True))
    return _pack_stack(decode_fp4, (weight, weight_scale), get_format("mxfp4"), k, n, 32, bias=bias)


def from_fp8(
    weight: UInt8[Array, "experts N K"], weight_scale: Float[Array, "experts ..."], *, bias: Array | None = None
) -> MarlinWeights:
    """Packs FP8 (e4m3fn) tensors, experts stacked in front; `e4m3 * scale`, scales in float32.

    Args:
        weight: float8_e4m3fn, or its bit patterns as uint8; concrete values.
        weight_scale: a factor (also where the file calls it `weight_scale_inv`): [E] or [E, 1] of a tensor, [E, N] or
            [E, N, 1] of an output channel, [E, N, ceil(K / 128)] of groups of 128 in a channel,
            [E, ceil(N / 128), ceil(K / 128)] of blocks; floats, or e8m0 bit patterns as uint8 or float8_e8m0fnu.
        bias: [experts, N], kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, a code is NaN, or a scale is negative or not finite.
    """
    weight = _bits("weight", weight, "float8_e4m3fn")
    check_rank("weight", weight, 3)
    experts, n, k = weight.shape
    if has_nan_codes(np.asarray(weight)):
        raise ValueError("weight holds NaN (e4m3 0x7F or 0xFF)")
    if getattr(weight_scale, "dtype", None) == jnp.float8_e8m0fnu or weight_scale.dtype == jnp.uint8:
        weight_scale = _bits("weight_scale", weight_scale, "float8_e8m0fnu")
        _refuse("weight_scale", bad_block_scales(np.asarray(weight_scale), exponent=True))
    elif not jnp.issubdtype(weight_scale.dtype, jnp.floating):
        raise TypeError(f"weight_scale has dtype {weight_scale.dtype}; it must be floating point, or uint8 for e8m0")
    elif fault := bad_float_scales(np.asarray(weight_scale)):
        raise ValueError(f"weight_scale holds {fault}")
    shape = tuple(weight_scale.shape)
    if shape[:1] != (experts,) or shape[1:] not in fp8_scale_shapes(k, n):
        raise ValueError(
            f"weight_scale has shape {shape}; it must be {experts} times {fp8_scale_shapes_in_words(k, n)}"
        )
    grouped = len(shape) == 3 and shape[2] > 1
    size = FP8_BLOCK if grouped else k
    return _pack_stack(decode_fp8, (weight, weight_scale), get_format("fp8"), k, n, size, bias=bias)


def from_hqq(
    w_q: UInt8[Array, "experts rows cols"],
    scale: Float[Array, "experts ..."],
    zero: Float[Array, "experts ..."],
    *,
    shape: tuple[int, int],
    group_size: int | None,
    bits: int = 4,
) -> MarlinWeights:
    """Packs HQQ tensors (axis 1), experts stacked in front; `(q - zero) * scale` with float zero points, exact.

    The format is "int4_fzp" or "int8_fzp".

    Args:
        w_q: `W_q`, bytes of two codes (`4bit_u8`) or one (8 bit).
        scale: float16, bfloat16 or float32, one a group.
        zero: zero points in the dtype of the scales.
        shape: (N, K) of the linear, the tensor `shape`.
        group_size: rows of K under one scale; None means K.
        bits: 4 or 8.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or the format has no such groups.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    row = get_format(f"int{bits}_fzp")
    n, k = shape
    check_group_size("group_size", group_size, k, row)
    size = group_size or k
    if k % size:
        raise ValueError(f"group_size is {size}; HQQ groups must divide K = {k}")
    check_array("w_q", w_q, ndim=3, dtype=jnp.uint8)
    experts, groups = w_q.shape[0], k // size
    check_stack("w_q", (experts, w_q[0].size), (experts, n * k * bits // 8))
    for name, value in (("scale", scale), ("zero", zero)):
        if jnp.dtype(value.dtype).name not in row.scale_dtypes or value.dtype != scale.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}; it must be {' or '.join(row.scale_dtypes)}, both the same"
            )
        check_stack(name, (value.shape[0], value[0].size), (experts, n * groups))
    return _pack_stack(decode_hqq, (w_q, scale, zero), row, k, n, size, options={"bits": bits, "k": k, "n": n})


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
        row = _integer_row(bits, zeros=zero_point is not None)
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
    return _pack_stack(LogicalLinear, (codes, scales, zeros, factors), row, k, n, size, bias=bias)


# The formats of float values, by the rows of K in a tile; None for all other sizes.
_FLOAT_TILES: dict[str, dict[int | None, str]] = {
    "float8_e4m3fn": {32: "mxfp8", None: "fp8"},
    "float4_e2m1fn": {16: "nvfp4", None: "mxfp4"},
}


def _exact_bits(name: str, scales: Array, row: WeightFormat) -> np.ndarray:
    """Bit patterns of float scales in the 8-bit type of a format; raises ValueError where it does not hold them."""
    dtype = np.dtype({E4M3_SCALES: jnp.float8_e4m3fn, E8M0_SCALES: jnp.float8_e8m0fnu}[row.scale])
    values = np.asarray(scales).astype(np.float32)
    stored = values.astype(dtype)
    if not (stored.astype(np.float32) == values).all():
        raise ValueError(f"{name} holds values that {dtype.name} does not, the type of the scales of format {row.name}")
    bits = stored.view(np.uint8)
    _refuse(name, bad_block_scales(bits, exponent=row.scale == E8M0_SCALES))
    return bits


def _pack_stack(
    decode: Callable[..., LogicalLinear],
    tensors: tuple[Any, ...],
    row: WeightFormat,
    k: int,
    n: int,
    group_size: int,
    order: np.ndarray | None = None,
    bias: Array | None = None,
    options: Mapping[str, int] = MappingProxyType({}),
) -> MarlinWeights:
    """Decodes, with the keyword arguments `options`, and packs a stack."""
    parts = _decode_and_pack(tensors, decode, tuple(options.items()), row)
    input_order = None if order is None else jnp.asarray(order)
    return assemble(parts, k, n, row, group_size, bias=bias, input_order=input_order)


# Stacks of one kind and shape share a compilation: options travel as a tuple, which compares by value.
@partial(jax.jit, static_argnames=("decode", "options", "row"))
def _decode_and_pack(tensors: Any, decode: Callable, options: tuple[tuple[str, int], ...], row: WeightFormat) -> Any:
    def one_expert(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
        codes, scales, zeros, global_scale = decode(*leaves, **dict(options))
        return pack_expert(codes, scales, zeros, global_scale, row)

    # Expert by expert: the codes of one matrix, not of all, are in memory.
    return jax.lax.map(one_expert, tensors)


def _integer_row(bits: int, *, zeros: bool) -> WeightFormat:
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    return get_format(f"int{bits}_zp" if zeros else f"int{bits}")


def _check_scales(name: str, scales: Array, row: WeightFormat) -> None:
    assert row.scale == FLOAT_SCALES
    if jnp.dtype(scales.dtype).name not in row.scale_dtypes:
        raise TypeError(f"{name} has dtype {scales.dtype}; it must be {' or '.join(row.scale_dtypes)}")
    check_rank(name, scales, 3)


def _check_fp4(weight: Array) -> tuple[int, int]:
    """K and N of FP4 bytes [E, N, K / 2]."""
    check_array("weight", weight, ndim=3, dtype=jnp.uint8)
    return weight.shape[2] * 2, weight.shape[1]


def _bits(name: str, value: Array, dtype: str) -> Array:
    """Bit patterns as uint8 of an array that is that, or has the named 8-bit dtype."""
    found = getattr(value, "dtype", None)
    if found is not None and jnp.dtype(found).name == dtype:
        return value.view(jnp.uint8)
    if found != jnp.uint8:
        raise TypeError(f"{name} has dtype {found}; it must be {dtype}, or uint8 with its bit patterns")
    return value


def _refuse(name: str, fault: str | None) -> None:
    if fault:
        raise ValueError(f"{name} holds {fault}; every block scale must be a number that is not negative")
