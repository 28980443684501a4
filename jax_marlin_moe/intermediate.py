"""How the intermediate, which one product hands to the next, is quantised (docs/formats.md, "Quantised intermediates").

A quantiser is one function from float32 values to values in units of a scale. These are numbers of few bits that
16-bit types hold exactly, so the kernels store them as they are and multiply the sums of the second product by the
scale.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from jax_marlin_moe.formats import E2M1, E4M3, CodeType
from jax_marlin_moe.no_derivative import refused_tangents

BLOCK = 16  # columns of a dynamic block scale
INT8_LARGEST = 127.0  # of rows: -128 has no counterpart

_MANTISSA_BITS = {"e4m3": 3, "e2m1": 1}
_LEAST_EXPONENT = {"e4m3": -6, "e2m1": 0}  # of normal numbers


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def nearest(values: Float32[Array, "..."], code: CodeType) -> Float32[Array, "..."]:
    """The nearest value of a code, ties to even, saturating; NaN stays NaN.

    In arithmetic: XLA may drop a cast to a narrow type and back. The use of a derivative raises NotImplementedError,
    which is better than zeros without a word.
    """
    clipped = jnp.clip(values, -code.largest, code.largest)
    exponent = (jax.lax.bitcast_convert_type(clipped, jnp.uint32) >> 23 & 255).astype(jnp.int32) - 127
    exponent = jnp.clip(exponent, _LEAST_EXPONENT[code.name], 127) - _MANTISSA_BITS[code.name]
    unit = jax.lax.bitcast_convert_type(exponent + 127 << 23, jnp.float32)
    return jnp.round(clipped / unit) * unit


@nearest.defjvp
def _without_derivative(code: CodeType, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _refuse(code.name, nearest(*primals, code), tangents)


@jax.custom_jvp
def nearest_integer(values: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`jnp.round`, without a derivative as `nearest`."""
    return jnp.round(values)


@nearest_integer.defjvp
def _integer_without_derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _refuse("integers", nearest_integer(*primals), tangents)


def _refuse(of: str, result: Array, tangents: tuple) -> tuple[Array, Array]:
    error = NotImplementedError(
        f"rounding to {of} has no derivative: put jax.lax.stop_gradient around what is quantised, or around the result"
    )
    return result, refused_tangents(error, [result], tangents)[0]


def usable(scales: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Scales, and zero in place of those that are not positive and finite: what they scale is zero."""
    return jnp.where((scales > 0) & (scales < jnp.inf), scales, 0)


def _quotient(values: Float32[Array, "..."], divisor: Array | float) -> Float32[Array, "..."]:
    """`values / divisor`, zero where the divisor is.

    Behind a barrier: XLA multiplies by the reciprocal of what it knows to be equal for many values, and some of them
    would be rounded to the other of two codes.
    """
    safe = jnp.broadcast_to(jnp.where(divisor == 0, 1, jnp.float32(divisor)), values.shape)
    return jnp.where(divisor == 0, 0, values / jax.lax.optimization_barrier(safe))


def in_units(values: Float32[Array, "..."], scale: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The e4m3 values nearest to `values / scale`, zero where the scale is."""
    return nearest(_quotient(values, scale), E4M3)


def in_integer_units(values: Float32[Array, "..."], scale: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The integers from -127 to 127 that are nearest to `values / scale`, zero where the scale is."""
    return jnp.clip(nearest_integer(_quotient(values, scale)), -INT8_LARGEST, INT8_LARGEST)


def _dynamic_nvfp4(
    values: Float32[Array, "rows columns"], scale: Float32[Array, "rows 1"]
) -> Float32[Array, "rows columns"]:
    rows, columns = values.shape
    blocks = values.reshape(rows, columns // BLOCK, BLOCK)
    # A NaN in a block is that of its row in the end, so it may be that of the block.
    extent = _quotient(jnp.max(jnp.abs(blocks), axis=-1), E2M1.largest)
    block_scale = in_units(extent, scale)[..., None]
    codes = nearest(_quotient(blocks, block_scale * scale[..., None]), E2M1)
    return (codes * block_scale).reshape(rows, columns)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a name means.

    Attributes:
        cpp: its name in csrc/cuda/intermediate.cuh.
        apply: rows of the intermediate and their usable scales to values in units of these.
    """

    cpp: str
    apply: Callable[[Array, Array], Array]


KINDS = {
    "static_fp8": _Kind("StaticFp8", in_units),
    "static_int8": _Kind("StaticInt8", in_integer_units),
    "dynamic_nvfp4": _Kind("DynamicNvfp4", _dynamic_nvfp4),
}


@dataclasses.dataclass(frozen=True)
class IntermediateQuantizer:
    """How the input of the second product is quantised before it is multiplied. A pytree: the scales are a leaf.

    Made by `static_fp8`, `static_int8` and `dynamic_nvfp4`, which check the scales. Scales that are traced cannot be
    checked: an expert whose scale is not positive and finite has an intermediate of zero.

    Attributes:
        scales: float32, one per expert or one for all.
        kind: "static_fp8", "static_int8" or "dynamic_nvfp4".
    """

    scales: Float32[Array, " experts"] | Float32[Array, ""]
    kind: str

    @classmethod
    def static_fp8(cls, scale: ArrayLike) -> "IntermediateQuantizer":
        """`e4m3(a / scale) * scale`: nearest, ties to even, saturating at 448.

        Args:
            scale: one number, or one per expert.

        Raises:
            ValueError: a scale is not positive and finite, or there are several axes.
        """
        return cls(_checked_scales("scale", scale), "static_fp8")

    @classmethod
    def static_int8(cls, scale: ArrayLike) -> "IntermediateQuantizer":
        """`int8(a / scale) * scale`: nearest, ties to even, from -127 to 127. With `activation_dtype="int8"` alone.

        Args:
            scale: one number, or one per expert.

        Raises:
            ValueError: a scale is not positive and finite, or there are several axes.
        """
        return cls(_checked_scales("scale", scale), "static_int8")

    @classmethod
    def dynamic_nvfp4(cls, scale: ArrayLike) -> "IntermediateQuantizer":
        """e2m1 codes with a block scale for every 16 columns of a row, which is quantised itself, by `scale`.

        `s = e4m3(max|a| / 6 / scale)` of the block, then `e2m1(a / (s * scale)) * s * scale`, zero where s is.

        Args:
            scale: of the block scales, one number or one per expert.

        Raises:
            ValueError: a scale is not positive and finite, or there are several axes.
        """
        return cls(_checked_scales("scale", scale), "dynamic_nvfp4")

    def apply(self, values: Float32[Array, "rows columns"], scales: Float32[Array, " rows"]) -> Array:
        """Rows of the intermediate as the second product sees them, in float32; `scales` are those of the rows."""
        scales = usable(scales)[:, None]
        return KINDS[self.kind].apply(values, scales) * scales


jax.tree_util.register_dataclass(IntermediateQuantizer, data_fields=["scales"], meta_fields=["kind"])


def check_kind(name: str, kind: str) -> None:
    """Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"{name} is {kind!r}; it must be one of {', '.join(KINDS)}")


def check_positive(name: str, scales: Array | np.ndarray) -> None:
    """Raises ValueError where a scale is not positive and finite; what is traced is not looked at."""
    if isinstance(scales, jax.core.Tracer):
        return
    values = np.asarray(scales, np.float32)
    bad = ~((values > 0) & (values < np.inf))
    if bad.any():
        where = f"[{', '.join(map(str, np.argwhere(bad)[0]))}]" if values.ndim else ""
        raise ValueError(f"{name}{where} is {values[bad][0]}; scales must be positive and finite")


def _checked_scales(name: str, scale: ArrayLike) -> Array:
    try:
        scales = jnp.asarray(scale, jnp.float32)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {scale!r}; it must be a number, or one per expert") from None
    if scales.ndim > 1:
        raise ValueError(f"{name} has shape {scales.shape}; it must be (), or (experts,)")
    check_positive(name, scales)
    return scales
