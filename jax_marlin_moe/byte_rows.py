"""Rows of activations in 8 bits: what `activation_dtype` means (docs/formats.md, "8-bit activations")."""

import contextlib
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jax_marlin_moe.formats import E4M3
from jax_marlin_moe.intermediate import INT8_LARGEST, in_integer_units, in_units, nearest, nearest_integer, usable

ByteDtype = Literal["float8_e4m3fn", "float8_e4m3fn_g128", "int8"]

GROUP = 128  # columns that share a scale, where rows have several

_NUMBERS = {"float8_e4m3fn": "float8_e4m3fn", "float8_e4m3fn_g128": "float8_e4m3fn", "int8": "int8"}
_LARGEST = {"float8_e4m3fn": E4M3.largest, "int8": INT8_LARGEST}
_LEAST_EXTENT = 2.0**-100  # of a row: the inverse of its scale is finite


def as_byte_dtype(activation_dtype: Any) -> ByteDtype | None:
    """Its name, where it is a dtype; raises ValueError unless it is None or one that rows are quantised to."""
    if activation_dtype is None:
        return None
    name: Any = activation_dtype
    if not isinstance(name, str):
        with contextlib.suppress(TypeError):  # it is no dtype
            name = jnp.dtype(name).name
    if not isinstance(name, str) or name not in _NUMBERS:
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}; it must be None (activations are multiplied in 16 bits) or one "
            f"of {', '.join(map(repr, _NUMBERS))}"
        )
    return cast(ByteDtype, name)


def number_type(activation_dtype: ByteDtype) -> str:
    """The type of the numbers, "float8_e4m3fn" or "int8"."""
    return _NUMBERS[activation_dtype]


def has_groups(activation_dtype: ByteDtype | None) -> bool:
    """Whether each `GROUP` columns of a row have a scale of their own."""
    return activation_dtype == "float8_e4m3fn_g128"


def scales_whole_rows(activation_dtype: ByteDtype | None, fixed: object | None) -> bool:
    """Whether the scale of a row follows from all of its columns; `fixed` is the scale that calibration has fixed."""
    return activation_dtype is not None and fixed is None and not has_groups(activation_dtype)


def quantize_rows(
    rows: Float[Array, "rows columns"],
    dtype: ByteDtype,
    scale: Float32[Array, "1"] | None = None,
    columns_over: tuple[str, ...] = (),
) -> tuple[Float32[Array, "rows columns"], Float32[Array, "rows groups"]]:
    """The values of a row in units of its scale, as numbers of 8 bits, and the scales, one for each row.

    With L the largest number of the type and m the row's largest magnitude, at least 2^-100, the scale is `m * (1 / L)`
    and the values are the nearest of the type to `row * (L / m)`, ties to even, in float32. A row with an infinite
    value or NaN has a scale that is not finite, and products that are NaN. With "float8_e4m3fn_g128" all this is so for
    each 128 columns of a row, the last of which may be fewer, and there are as many scales.

    With a `scale`, it is that of all rows: values are the nearest of the type to `row / scale`, zero where the scale is
    not positive and finite. "float8_e4m3fn_g128" has none.

    Along the manual mesh axes `columns_over` devices have other columns of the same rows, whose scale is that of all;
    it is for scales of whole rows alone.
    """
    largest = _LARGEST[_NUMBERS[dtype]]
    rows = rows.astype(jnp.float32)
    if has_groups(dtype):
        count, columns = rows.shape
        groups = -(-columns // GROUP)
        padded = jnp.pad(rows, ((0, 0), (0, groups * GROUP - columns))).reshape(-1, GROUP)
        values, scales = quantize_rows(padded, "float8_e4m3fn")
        return values.reshape(count, -1)[:, :columns], scales.reshape(count, groups)
    if scale is not None:
        scales = jnp.broadcast_to(usable(scale), (rows.shape[0], 1))
        return (in_integer_units if dtype == "int8" else in_units)(rows, scales), scales
    extent = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True, initial=0), _LEAST_EXTENT)
    if columns_over:
        # Without a derivative, as the numbers are, whose error says so.
        extent = jax.lax.pmax(jax.lax.stop_gradient(extent), columns_over)
    scales = extent * jnp.float32(1 / largest)
    # Behind a barrier: XLA would turn the division and the product into one division.
    values = rows * jax.lax.optimization_barrier(largest / extent)
    if dtype == "int8":
        return jnp.clip(nearest_integer(values), -largest, largest), scales
    return nearest(values, E4M3), scales


def dequantize_rows(
    values: Float32[Array, "rows columns"], scales: Float32[Array, "rows groups"]
) -> Float32[Array, "rows columns"]:
    """What quantised rows stand for."""
    return values * (scales if scales.shape[1] == 1 else jnp.repeat(scales, GROUP, axis=1)[:, : values.shape[1]])
