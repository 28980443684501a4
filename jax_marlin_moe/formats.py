"""The weight formats: one row each, and the facts that the rest of the package reads from the row.

Nothing else switches on a format's name. Numerics are those of docs/formats.md, "Numerics": a weight is
`(value(code) - zero) * scale`, times the global scale where the format has one, in float32.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

# Values of the codes 0 ... 7 of e2m1; bit 3 is the sign.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0


def _decode_float(scales: Float[Array, "..."]) -> Float32[Array, "..."]:
    return scales.astype(jnp.float32)


def _decode_integer(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    return codes.astype(jnp.float32)


def _decode_e2m1(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    values = jnp.asarray(E2M1_VALUES, jnp.float32)
    return jnp.concatenate([values, -values])[codes]


def decode_e4m3(bits: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """The values of e4m3fn bit patterns, subnormals included."""
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def decode_e8m0(bits: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """`2^(bits - 127)`; NaN for 255."""
    exponent = bits.astype(jnp.uint32)
    # float32 keeps 2^-127 as a subnormal, which is why it has a pattern of its own.
    pattern = jnp.where(exponent == 0, jnp.uint32(0x00400000), exponent << 23)
    powers = jax.lax.bitcast_convert_type(pattern, jnp.float32)
    return jnp.where(exponent == 255, jnp.float32(jnp.nan), powers)


@dataclasses.dataclass(frozen=True)
class CodeType:
    """What the bits of a code stand for.

    Attributes:
        name: as the custom calls spell it.
        bits: width of a code.
        cpp: the type in csrc/cuda/weights/codes.cuh.
        decode: codes to float32 values, before zero point and scale.
    """

    name: str
    bits: int
    cpp: str
    decode: Callable[[Array], Array] = dataclasses.field(compare=False, repr=False)


INT4 = CodeType("int4", 4, "jmm::Int4", _decode_integer)
INT8 = CodeType("int8", 8, "jmm::Int8", _decode_integer)
E2M1 = CodeType("e2m1", 4, "jmm::E2M1", _decode_e2m1)
E4M3 = CodeType("e4m3", 8, "jmm::E4M3", decode_e4m3)


@dataclasses.dataclass(frozen=True)
class ScaleType:
    """How the scales of a format are stored.

    Attributes:
        name: as the custom calls spell it.
        dtypes: of the `scales` array; bit patterns travel as uint8.
        decode: the stored array to float32.
    """

    name: str
    dtypes: tuple[str, ...]
    decode: Callable[[Array], Array] = dataclasses.field(compare=False, repr=False)


FLOAT_SCALES = ScaleType("float", ("float16", "bfloat16", "float32"), _decode_float)
E4M3_SCALES = ScaleType("e4m3", ("uint8",), decode_e4m3)
E8M0_SCALES = ScaleType("e8m0", ("uint8",), decode_e8m0)


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
    """

    name: str
    code: CodeType
    zero_point: int | None
    zeros: str | None
    scale: ScaleType
    group_sizes: tuple[int, ...]
    per_channel: bool
    has_global_scales: bool = False

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
    WeightFormat("fp8", E4M3, 0, None, FLOAT_SCALES, (128,), per_channel=True),
    WeightFormat("nvfp4", E2M1, 0, None, E4M3_SCALES, (16,), per_channel=False, has_global_scales=True),
    WeightFormat("mxfp4", E2M1, 0, None, E8M0_SCALES, (32,), per_channel=False),
    WeightFormat("mxfp8", E4M3, 0, None, E8M0_SCALES, (32,), per_channel=False),
)

FORMATS: dict[str, WeightFormat] = {row.name: row for row in _ROWS}

ACTIVATION_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def get_format(name: str) -> WeightFormat:
    """The registry row called `name`; raises ValueError with the known names otherwise."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
