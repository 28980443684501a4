"""FP8 checkpoints: e4m3 codes with scales of blocks, channels or the tensor, and MXFP8."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jax_marlin_moe.arguments import check_rank
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import ACTIVATIONS, CACHE, RECORD, RUNTIME, TENSORS_SHOW, Method
from jax_marlin_moe.checkpoint.schemes.stacks import bit_patterns, pack_stack, refuse_block_scales
from jax_marlin_moe.checkpoint.schemes.storage import LogicalLinear, Scheme, shape_of_rank
from jax_marlin_moe.checkpoint.schemes.values import bad_block_scales
from jax_marlin_moe.checkpoint.stated import Assumed, check_stated, states_e4m3_inputs
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import decode_e8m0, get_format
from jax_marlin_moe.weights import MarlinWeights

FP8 = Method(
    "fp8",
    read=("weight_block_size", "config_groups", "group_size", "quantized_layers", "quant_algo", "moe_quant_algo",
          "activation_scheme", "scale_fmt"),
    harmless={
        "activation_scale_ub": ACTIVATIONS, "modules_to_not_convert": TENSORS_SHOW,
        "ignored_layers": TENSORS_SHOW, "ignore": TENSORS_SHOW, "exclude_modules": TENSORS_SHOW,
        "expert_dtype": TENSORS_SHOW, "kv_cache_scheme": CACHE, "kv_cache_quant_algo": CACHE,
        "dequantize": RUNTIME, "producer": RECORD,
    },
    fixed={"fmt": ("e4m3", "float8_e4m3fn", "float8_e4m3", None)},
)  # fmt: skip

FP8_BLOCK = 128  # rows of K under one scale of a block-quantised weight
_SCALES = (".weight_scale_inv", ".weight_scale", ".scale")

_FP8_FORMATS = ("float-quantized", "naive-quantized")
_FP8 = Assumed(
    bits=8,
    group_sizes=(None, FP8_BLOCK),
    algorithms=("FP8", "FP8_PB_WO", "fp8_pb_wo", "FP8_PB_REAL", "FP8_PER_CHANNEL_PER_TOKEN"),
    strategies=("tensor", "channel", "group", "block"),
    formats=_FP8_FORMATS,
    block=(FP8_BLOCK, FP8_BLOCK),
)
_MXFP8 = Assumed(
    bits=8,
    group_sizes=(32,),
    algorithms=("MXFP8",),
    strategies=("group",),
    formats=(*_FP8_FORMATS, "mxfp8-quantized"),
    scale_bits=(8, 0),
)


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


def has_nan_codes(weight: np.ndarray) -> bool:
    """Whether e4m3 bit patterns hold NaN (0x7F or 0xFF)."""
    return bool(((weight & 0x7F) == 0x7F).any())


def bad_float_scales(scale: np.ndarray) -> str | None:
    """What is wrong with float scales that may not be negative, or None."""
    if not np.isfinite(scale.astype(np.float32, copy=False)).all():
        return "infinities or NaN; every scale must be finite"
    return "negative values; no scale may be negative" if (scale < 0).any() else None


@dataclasses.dataclass(frozen=True)
class Fp8Storage(Scheme):
    """How an FP8 linear is stored.

    Attributes:
        scale: suffix of the scales, multipliers whatever their name.
        weight_format: "fp8" or "mxfp8".
        groups: scales along K.
    """

    scale: str
    weight_format: str
    groups: int
    methods: ClassVar[tuple[Method, ...]] = (FP8,)
    known_as: ClassVar[str] = "FP8 (blocks, groups, channels, tensor), MXFP8"
    marks: ClassVar[tuple[str, ...]] = _SCALES
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by e4m3 codes; the shape of the scales tells the rest."""
        name = linear.name(".weight")
        if files.dtype(name) != "F8_E4M3":
            return None
        block = quantization.config.get("weight_block_size")
        if block is not None and repr(block) != repr([FP8_BLOCK, FP8_BLOCK]):  # [128.0, 128] is none, nor is true
            raise quantization.keys.fault("weight_block_size", "[128, 128]")
        quantization.keys.choice("activation_scheme", ("dynamic", "static"), None, null=True)
        quantization.keys.choice("scale_fmt", ("ue8m0",), None, null=True)
        for suffix in _SCALES:
            if linear.name(suffix) in files:
                found = files.info(linear.name(suffix))
                micro = found.dtype in ("U8", "F8_E8M0") and found.shape == (n, -(-k // 32))
                check_stated(files, linear, suffix, quantization, _MXFP8 if micro else _FP8)
                shape = _without_ones(found.shape)
                groups = shape[1] if len(shape) == 2 else 1
                return cls(suffix, "mxfp8" if micro else "fp8", groups)
        raise files.fault(
            name, f"has no scales; one of {', '.join(linear.name(suffix) for suffix in _SCALES)} must exist"
        )

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """A code per byte."""
        shape = shape_of_rank(files, linear.name(".weight"), 2, "F8_E4M3")
        return None if shape is None else (shape[1], shape[0])

    def rows_per_group(self, k: int) -> int:
        """Fixed by the format, where the scales follow K."""
        if self.weight_format == "mxfp8":
            return 32
        return FP8_BLOCK if self.groups > 1 else k

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """As the config says; that of ModelOpt says nothing where the scales are fixed."""
        if self.weight_format != "fp8" or quantization.config.get("activation_scheme") == "dynamic":
            return False
        return states_e4m3_inputs(quantization, linear.module) is not False

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Codes and scales; e8m0 scales as bits."""
        weight = linear.read(files, ".weight", (n, k), ("F8_E4M3",), rows=1)
        if has_nan_codes(weight):
            raise files.fault(linear.name(".weight"), "holds NaN (e4m3 0x7F or 0xFF); every code must be a number")
        name = linear.name(self.scale)
        stored = files.info(name).shape
        shape = _without_ones(stored)
        if self.weight_format == "fp8" and shape not in fp8_scale_shapes(k, n):
            raise files.fault(name, f"has shape {stored}; it must be {fp8_scale_shapes_in_words(k, n)}")
        by_columns = 0 if shape and shape[0] > 1 else None
        by_rows = 1 if len(shape) == 2 and shape[1] > 1 else None
        if by_columns == 0 and shape[0] != n and n % FP8_BLOCK:
            linear.refuse_cut()  # the last block is not whole
        scale = files.read(name, stored, (*FLOATS, "F8_E8M0", "U8")).reshape(shape)
        scale = linear.cut_view(scale, columns=by_columns, rows=by_rows)
        if scale.dtype != np.uint8:
            if fault := bad_float_scales(scale):
                raise files.fault(name, f"holds {fault}")
        elif fault := bad_block_scales(scale, exponent=True):
            raise files.fault(name, f"holds {fault}; every scale must be a number")
        return weight, scale

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_fp8(*tensors) if self.weight_format == "fp8" else decode_mxfp8(*tensors)


def from_fp8(
    weight: UInt8[Array, "experts N K"], weight_scale: Float[Array, "experts ..."], *, bias: Array | None = None
) -> MarlinWeights:
    """Packs FP8 (e4m3fn) tensors, experts stacked in front; `e4m3 * scale`, scales in float32.

    Args:
        weight: float8_e4m3fn, or its bit patterns as uint8; concrete values.
        weight_scale: a factor (also where the file calls it `weight_scale_inv`): [E] or [E, 1] per tensor, [E, N] or
            [E, N, 1] per output channel, [E, N, ceil(K / 128)] per group of 128 in a channel,
            [E, ceil(N / 128), ceil(K / 128)] per block; floats, or e8m0 bit patterns as uint8 or float8_e8m0fnu.
        bias: [experts, N], kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, a code is NaN, or a scale is negative or not finite.
    """
    weight = bit_patterns("weight", weight, "float8_e4m3fn")
    check_rank("weight", weight, 3)
    experts, n, k = weight.shape
    if has_nan_codes(np.asarray(weight)):
        raise ValueError("weight holds NaN (e4m3 0x7F or 0xFF); every code must be a number")
    if getattr(weight_scale, "dtype", None) == jnp.float8_e8m0fnu or weight_scale.dtype == jnp.uint8:
        weight_scale = bit_patterns("weight_scale", weight_scale, "float8_e8m0fnu")
        refuse_block_scales("weight_scale", bad_block_scales(np.asarray(weight_scale), exponent=True))
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
    return pack_stack(decode_fp8, (weight, weight_scale), get_format("fp8"), k, n, size, bias=bias)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of scales without the axes of 1 in ModelOpt's blocks, (rows, 1, columns, 1)."""
    return (shape[0], shape[2]) if len(shape) == 4 and (shape[1], shape[3]) == (1, 1) else shape
