"""The weight formats: one row each, and the facts that the rest of the package reads from the row.

Nothing else switches on a format's name. Numerics are those of docs/formats.md, "Numerics": a weight is
`(value(code) - zero) * scale`, times the global scale where the format has one, in float32.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8, UInt16

from jax_marlin_moe.rounding import round_to

# Values of the codes 0 ... 7 of e2m1; bit 3 is the sign.
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_MAX = 448.0


def _decode_integer(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    return codes.astype(jnp.float32)


def _encode_integer(largest: int, values: Float32[Array, "..."]) -> UInt8[Array, "..."]:
    return jnp.clip(jnp.round(values), 0, largest).astype(jnp.uint8)


def _decode_e2m1(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    values = jnp.asarray(_E2M1_VALUES, jnp.float32)
    return jnp.concatenate([values, -values])[codes]


def _encode_e2m1(values: Float32[Array, "..."]) -> UInt8[Array, "..."]:
    """Nearest e2m1 codes, ties to the even code, saturating."""
    magnitude = jnp.abs(values)
    code = jnp.zeros(values.shape, jnp.uint8)
    for index, (low, high) in enumerate(itertools.pairwise(_E2M1_VALUES)):
        middle = (low + high) / 2
        # A tie goes up where the upper code is even.
        above = magnitude >= middle if index % 2 else magnitude > middle
        code += above.astype(jnp.uint8)
    return code | (jnp.signbit(values).astype(jnp.uint8) << 3)


def decode_e4m3(bits: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """The values of e4m3fn bit patterns, subnormals included."""
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def _encode_e4m3(values: Float32[Array, "..."]) -> UInt8[Array, "..."]:
    """Nearest e4m3fn as bit patterns, saturating: the cast itself gives NaN above 464."""
    saturated = jnp.clip(values, -_E4M3_MAX, _E4M3_MAX).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(saturated, jnp.uint8)


def _decode_whole(dtype: Any, bits: UInt16[Array, "..."]) -> Float32[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def _encode_whole(dtype: Any, values: Float32[Array, "..."]) -> UInt16[Array, "..."]:
    """Nearest numbers of a type of 16 bits as bit patterns, saturating."""
    most = float(jnp.finfo(dtype).max)
    return jax.lax.bitcast_convert_type(jnp.clip(values, -most, most).astype(dtype), jnp.uint16)


def decode_e8m0(bits: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """`2^(bits - 127)`; NaN for 255."""
    exponent = bits.astype(jnp.uint32)
    # float32 keeps 2^-127 as a subnormal, which is why it has a pattern of its own.
    pattern = jnp.where(exponent == 0, jnp.uint32(0x00400000), exponent << 23)
    powers = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    return jnp.where(exponent == 255, jnp.float32(jnp.nan), powers)


@dataclasses.dataclass(frozen=True)
class CodeType:
    """What the bits of a code mean.

    Attributes:
        name: as the custom calls spell it.
        bits: width of a code.
        cpp: the type in csrc/cuda/weights/codes.cuh.
        signed: whether values have a sign; those of others begin with 0, and a zero point is subtracted.
        largest: the largest value.
        decode: codes to float32 values, before zero point and scale.
        encode: float32 values to the nearest codes, saturating.
        is_scaled: whether scales are chosen for the weights; those of other codes are 1, and the codes the weights.
    """

    name: str
    bits: int
    cpp: str
    signed: bool
    largest: float
    decode: Callable[[Array], Array] = dataclasses.field(compare=False, repr=False)
    encode: Callable[[Array], Array] = dataclasses.field(compare=False, repr=False)
    is_scaled: bool = True

    @property
    def dtype(self) -> Any:
        """Of arrays of codes that are not packed."""
        return jnp.uint8 if self.bits <= 8 else jnp.uint16


INT4 = CodeType("int4", 4, "jmm::Int4", False, 15, _decode_integer, partial(_encode_integer, 15))
INT8 = CodeType("int8", 8, "jmm::Int8", False, 255, _decode_integer, partial(_encode_integer, 255))
E2M1 = CodeType("e2m1", 4, "jmm::E2M1", True, _E2M1_VALUES[-1], _decode_e2m1, _encode_e2m1)
E4M3 = CodeType("e4m3", 8, "jmm::E4M3", True, _E4M3_MAX, decode_e4m3, _encode_e4m3)


def _whole(name: str, cpp: str, dtype: Any) -> CodeType:
    most = float(jnp.finfo(dtype).max)
    decode, encode = partial(_decode_whole, dtype), partial(_encode_whole, dtype)
    return CodeType(name, 16, cpp, True, most, decode, encode, is_scaled=False)


BF16 = _whole("bf16", "jmm::BF16", jnp.bfloat16)
FP16 = _whole("fp16", "jmm::FP16", jnp.float16)


def _decode_float_scales(scales: Float[Array, "..."]) -> Float32[Array, "..."]:
    return scales.astype(jnp.float32)


def _encode_float_scales(
    extents: Float32[Array, "..."], reach: float, unit: Array | float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    return round_to(extents / reach / unit, dtype).astype(dtype)


def _encode_e4m3_scales(
    extents: Float32[Array, "..."], reach: float, unit: Array | float, _: jnp.dtype
) -> UInt8[Array, "..."]:
    return _encode_e4m3(extents / reach / unit)


def _encode_e8m0_scales(
    extents: Float32[Array, "..."], reach: float, unit: Array | float, _: jnp.dtype
) -> UInt8[Array, "..."]:
    """Powers of two that bring the extents into the binade of `reach`."""
    exponent = (jax.lax.bitcast_convert_type(extents / unit, jnp.uint32) >> 23).astype(jnp.int32)
    return jnp.clip(exponent - math.floor(math.log2(reach)), 0, 254).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class ScaleType:
    """How the scales of a format are stored.

    Attributes:
        name: as the custom calls spell it.
        dtypes: of the `scales` array; bit patterns travel as uint8.
        cpp: the type in csrc/cuda/weights/scales.cuh; None where it is that of the array's elements.
        largest: what a global scale, if there is one, brings the largest scale of an expert to.
        decode: the stored array to float32.
        encode: (extents, reach, unit, dtype) to the stored array: the scales, in units of the global one, by which
            codes that reach so far cover the extents.
    """

    name: str
    dtypes: tuple[str, ...]
    cpp: str | None
    largest: float
    decode: Callable[[Array], Array] = dataclasses.field(compare=False, repr=False)
    encode: Callable[[Array, float, Array | float, jnp.dtype], Array] = dataclasses.field(compare=False, repr=False)


FLOAT_SCALES = ScaleType(
    "float", ("float16", "bfloat16", "float32"), None, 1.0, _decode_float_scales, _encode_float_scales
)
E4M3_SCALES = ScaleType("e4m3", ("uint8",), "jmm::E4M3Scale", _E4M3_MAX, decode_e4m3, _encode_e4m3_scales)
E8M0_SCALES = ScaleType("e8m0", ("uint8",), "jmm::E8M0Scale", 1.0, decode_e8m0, _encode_e8m0_scales)


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """What the codes of a packed weight mean.

    Attributes:
        name: the name in the registry.
        code: the type of the codes.
        zero_point: the zero baked into the codes; 0 for signed codes, None where each group stores its own.
        zeros: how groups store zero points: None, "integer" (packed like codes) or "float" (in the scales' dtype).
        scale: the type of the scales.
        group_sizes: rows of K that may share a scale, the customary size last.
        per_channel: whether one group over all of K is allowed as well.
        has_global_scales: whether float32 factors multiply the scales of each 64 columns.
        quantized_scale_dtype: of float scales that `quantize` makes; None for the dtype of the dense weights.

    Raises:
        ValueError: the parts do not go together.
    """

    name: str
    code: CodeType
    zero_point: int | None
    zeros: str | None
    scale: ScaleType
    group_sizes: tuple[int, ...]
    per_channel: bool
    has_global_scales: bool = False
    quantized_scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.zero_point is None) != (self.zeros is not None):
            raise ValueError(
                f"{self.name} has zero_point {self.zero_point} and zeros {self.zeros!r}; one of them must be None, and "
                "the other one not"
            )
        if self.zeros not in (None, "integer", "float"):
            raise ValueError(f"{self.name} has zeros {self.zeros!r}; it must be None, 'integer' or 'float'")
        if self.code.signed and self.zero_point != 0:
            raise ValueError(f"{self.name} has codes of {self.code.name}, which have a sign; zero_point must be 0")
        if self.zeros == "float" and self.scale != FLOAT_SCALES:
            raise ValueError(
                f"{self.name} has float zeros beside scales of {self.scale.name}; they share a dtype, so the scales "
                "must be float as well"
            )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.code.bits

    @property
    def codes_per_word(self) -> int:
        """Codes in one int32 word."""
        return 32 // self.code.bits

    @property
    def max_code(self) -> int:
        """The largest code."""
        return 2**self.code.bits - 1

    @property
    def customary_group_size(self) -> int | None:
        """Rows of K that share a scale unless something else is said; None for one group."""
        return self.group_sizes[-1] if self.code.is_scaled else None

    @property
    def reach(self) -> float:
        """The largest value, less the zero point that is baked into the codes: how far they reach to both sides."""
        return self.code.largest - (self.zero_point or 0)

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """Dtypes that the `scales` array may have."""
        return self.scale.dtypes

    def decode_scales(self, scales: Float[Array, "..."] | UInt8[Array, "..."]) -> Float32[Array, "..."]:
        """Stored scales to float32, without the global ones."""
        return self.scale.decode(scales)


def _integer(name: str, code: CodeType, zero_point: int | None, zeros: str | None, groups: tuple[int, ...]):
    return WeightFormat(name, code, zero_point, zeros, FLOAT_SCALES, groups, per_channel=True)


_ROWS = (
    _integer("int4", INT4, 8, None, (16, 32, 64, 128)),
    _integer("int4_zp", INT4, None, "integer", (16, 32, 64, 128)),
    _integer("int4_fzp", INT4, None, "float", (64, 128)),
    _integer("int8", INT8, 128, None, (32, 64, 128)),
    _integer("int8_zp", INT8, None, "integer", (32, 64, 128)),
    _integer("int8_fzp", INT8, None, "float", (64, 128)),
    WeightFormat("fp8", E4M3, 0, None, FLOAT_SCALES, (128,), per_channel=True, quantized_scale_dtype="float32"),
    WeightFormat("nvfp4", E2M1, 0, None, E4M3_SCALES, (16,), per_channel=False, has_global_scales=True),
    WeightFormat("mxfp4", E2M1, 0, None, E8M0_SCALES, (32,), per_channel=False),
    WeightFormat("mxfp8", E4M3, 0, None, E8M0_SCALES, (32,), per_channel=False),
    WeightFormat("bf16", BF16, 0, None, FLOAT_SCALES, (128,), per_channel=True),
    WeightFormat("fp16", FP16, 0, None, FLOAT_SCALES, (128,), per_channel=True),
)

FORMATS: dict[str, WeightFormat] = {row.name: row for row in _ROWS}

ACTIVATION_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def get_format(name: str) -> WeightFormat:
    """The registry row called `name`; raises ValueError with the known names otherwise."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
