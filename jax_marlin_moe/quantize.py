"""Dense weights into `MarlinWeights`: codes and scales chosen by rounding to nearest."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jax_marlin_moe.arguments import as_dtype, check_rank
from jax_marlin_moe.formats import FLOAT_SCALES, WeightFormat, get_format
from jax_marlin_moe.ops.each_expert import define_each_expert
from jax_marlin_moe.packing import assemble, check_group_size, pack_expert
from jax_marlin_moe.rounding import round_to
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

    Integer codes: symmetric formats have `scale = max|w| / (zero_point - 1)` per group; those with zero points map the
    range [min(w, 0), max(w, 0)] to all codes, with a rounded ("_zp") or an exact zero point ("_fzp"). "fp8": `scale =
    max|w| / 448` per group. "nvfp4": a global scale `max|w| / (448 * 6)` per expert, then e4m3 block scales
    `max|w| / 6` in units of it. "mxfp4" and "mxfp8": the power of two that brings the largest value of a block into the
    top binade of the code (OCP microscaling formats 1.0, section 6.3). "bf16" and "fp16" keep the weights, rounded to
    16 bits where they have more; their scales are 1.

    Infinities and NaN are refused. In traced weights, which cannot be looked at, they make the scale of their group NaN
    or infinite ("nvfp4": that of their expert).

    Experts that are sharded over the devices of a mesh are quantised where they are, and the result is sharded alike.

    Weights that change, such as those of a policy in training, are packed again without compiling anything and into the
    memory of the old ones by `jax.jit(lambda old, dense: quantize(dense, ...), donate_argnums=0, keep_unused=True)`.

    Args:
        dense: weights with the input dimension second. Any K and N: the packed matrix is padded to whole tiles.
        weight_format: a name of `jax_marlin_moe.FORMATS`.
        group_size: rows of K that share a scale, None for one group; by default the format's customary size.
        scale_dtype: of float scales; by default that of `dense`, float32 for "fp8", and bfloat16 for float32.
        bias: added after scaling, kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: the format has no such group size, a shape does not fit, or `dense` holds infinities or NaN.
    """
    check_rank("dense", dense, 3)
    row, size, dtype = _choice("dense", dense, weight_format, group_size, scale_dtype)
    _, k, n = dense.shape
    leaves, are_finite = _quantize_and_pack(dense, row, size, dtype)
    if not isinstance(are_finite, jax.core.Tracer) and not are_finite:
        raise ValueError("dense holds infinities or NaN; such weights cannot be quantised")
    return assemble(leaves, k, n, row, size, bias=bias)


def fake_quantize(
    w: Float[Array, "*batch K N"],
    weight_format: str = "int4",
    group_size: int | Literal["customary"] | None = "customary",
    *,
    scale_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch K N"]:
    """Weights rounded to what `quantize` would pack, with the derivative of the identity (straight-through).

    A float32 `w` becomes `dequantize(quantize(w, ...))`, bit for bit: what is trained is what is served. Other types
    are rounded once more, to their own.

    Args:
        w: weights with the input dimension last but one; any leading dimensions, each matrix by itself.
        weight_format: a name of `jax_marlin_moe.FORMATS`.
        group_size: as for `quantize`.
        scale_dtype: as for `quantize`.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: the format has no such group size, or a shape does not fit.
    """
    if getattr(w, "ndim", 0) < 2:
        check_rank("w", w, 2)
    return _straight_through(w, *_choice("w", w, weight_format, group_size, scale_dtype))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _straight_through(w, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    return _round_to_grid(w, row, group_size, scale_dtype)


@_straight_through.defjvp
def _identity(row, group_size, scale_dtype, primals, tangents):
    return _straight_through(*primals, row, group_size, scale_dtype), tangents[0]


@partial(jax.jit, static_argnames=("row", "group_size", "scale_dtype"))
def _round_to_grid(w, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    matrices = w[None] if w.ndim == 2 else w
    leading = matrices.shape[0], -1
    rounded = _round_each(
        matrices.reshape(*leading, *w.shape[-2:]), row=row, group_size=group_size, scale_dtype=scale_dtype
    )
    return rounded.reshape(w.shape)


def _round_matrices(w, *, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    k, n = w.shape[-2:]

    def one_expert(matrix):
        codes, scales, zeros, global_scale = quantize_expert(matrix, row, group_size, scale_dtype)
        values = row.code.decode(codes)
        if row.zeros == "integer":
            zeros = row.code.decode(zeros)
        elif zeros is None and row.zero_point:
            zeros = jnp.full_like(scales, row.zero_point, jnp.float32)
        group = jnp.arange(k) // group_size
        if zeros is not None:
            values -= zeros.astype(jnp.float32)[group]
        dense = values * row.decode_scales(scales)[group]
        return (dense if global_scale is None else dense * global_scale).astype(w.dtype)

    return jax.lax.map(one_expert, w.reshape(-1, k, n)).reshape(w.shape)


_round_each = define_each_expert("fake_quantize", _round_matrices)


def _choice(
    name: str, dense: Array, weight_format: str, group_size: int | str | None, scale_dtype: DTypeLike | None
) -> tuple[WeightFormat, int, jnp.dtype]:
    """The format, rows under one scale and the scales' dtype for weights whose last two dimensions are K and N."""
    row = get_format(weight_format)
    if not hasattr(dense, "dtype") or not jnp.issubdtype(dense.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {getattr(dense, 'dtype', type(dense).__name__)}; it must be floating point")
    if group_size == "customary":
        group_size = row.customary_group_size
    k = dense.shape[-2]
    check_group_size("group_size", group_size, k, row)  # type: ignore[arg-type]
    if 0 in dense.shape:
        raise ValueError(f"{name} has shape {dense.shape}; it must not be empty")
    if row.scale != FLOAT_SCALES:
        dtype = jnp.dtype(jnp.uint8)
    elif scale_dtype is not None:
        dtype = as_dtype("scale_dtype", scale_dtype)
    elif row.quantized_scale_dtype is not None:
        dtype = jnp.dtype(row.quantized_scale_dtype)
    elif dense.dtype == jnp.float32:
        dtype = jnp.dtype(jnp.bfloat16)
    else:
        dtype = jnp.dtype(dense.dtype)
        if dtype.name not in row.scale_dtypes:
            raise TypeError(
                f"{name} has dtype {dtype}, which the scales of format {row.name} cannot have; it must be "
                f"{' or '.join(row.scale_dtypes)}: cast it, or pass scale_dtype"
            )
    if dtype.name not in row.scale_dtypes:
        raise TypeError(f"scale_dtype is {dtype}; format {row.name} takes {' or '.join(row.scale_dtypes)}")
    return row, group_size or k, dtype  # type: ignore[return-value]


@partial(jax.jit, static_argnames=("row", "group_size", "scale_dtype"))
def _quantize_and_pack(dense, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    leaves = _pack_each(dense, row=row, group_size=group_size, scale_dtype=scale_dtype)
    return leaves, jnp.isfinite(dense).all()


def _pack_matrices(dense, *, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    def one_expert(w):
        codes, scales, zeros, global_scale = quantize_expert(w, row, group_size, scale_dtype)
        return pack_expert(codes, scales, zeros, global_scale, row)

    return jax.lax.map(one_expert, dense)  # the float32 intermediates of one matrix, not of all


_pack_each = define_each_expert("quantize", _pack_matrices)


def quantize_expert(w: Array, row: WeightFormat, group_size: int, scale_dtype: jnp.dtype):
    """Codes [K, N], scales [G, N], zero points [G, N] or None, global scale [] or None of one expert."""
    k, n = w.shape
    groups = jnp.pad(w.astype(jnp.float32), ((0, -k % group_size), (0, 0))).reshape(-1, group_size, n)  # [G, g, N]
    low, high = jnp.minimum(groups.min(1), 0.0), jnp.maximum(groups.max(1), 0.0)
    # What a group has to cover, and how far the codes reach for it.
    extents, reach = (jnp.abs(groups).max(1), row.reach) if row.zeros is None else (high - low, row.code.largest)
    global_scale = None
    if row.has_global_scales:
        most = extents.max()
        global_scale = jnp.where(most == 0, 1.0, most / (row.scale.largest * reach))
    unit = 1.0 if global_scale is None else global_scale
    if not row.code.is_scaled:
        return row.code.encode(w.astype(jnp.float32)), jnp.ones((len(groups), n), scale_dtype), None, None
    scales = row.scale.encode(extents, reach, unit, scale_dtype)
    step = row.decode_scales(scales) * unit
    finite = jnp.isfinite(groups).all(1)  # Most codes hold no NaN, and XLA's maxima may pass over one.
    if row.scale == FLOAT_SCALES:
        scales = jnp.where(finite, scales, jnp.nan)
    elif global_scale is None:
        scales = jnp.where(finite, scales, 255).astype(scales.dtype)
    else:
        global_scale = jnp.where(finite.all(), global_scale, jnp.nan)
    step = jnp.where(step == 0, 1.0, step)
    values, zeros = groups / step[:, None], None
    if row.zeros == "integer":
        zeros = row.code.encode(-low / step)
        values += row.code.decode(zeros)[:, None]
    elif row.zeros == "float":
        rounded = round_to(-low / step, scale_dtype)
        values += rounded[:, None]
        zeros = rounded.astype(scale_dtype)
    elif row.zero_point:  # adding 0 would take the sign of -0
        values += row.zero_point
    return row.code.encode(values).reshape(-1, n)[:k], scales, zeros, global_scale
