"""FP4 checkpoints: NVFP4 of compressed-tensors and ModelOpt; MXFP4 of compressed-tensors, gpt-oss and DeepSeek-V4."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from jax_marlin_moe.arguments import check_array, check_rank
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import CACHE, RECORD, RUNTIME, TENSORS_SHOW, Method
from jax_marlin_moe.checkpoint.schemes.stacks import bit_patterns, pack_stack, refuse_block_scales
from jax_marlin_moe.checkpoint.schemes.storage import LogicalLinear, Scheme, check_shape, shape_of_rank
from jax_marlin_moe.checkpoint.schemes.values import bad_block_scales
from jax_marlin_moe.checkpoint.schemes.words import unpack_nibbles
from jax_marlin_moe.checkpoint.stated import E4M3_ALGORITHMS, Assumed, algorithm_of, check_stated
from jax_marlin_moe.checkpoint.tensors import TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import check_stack, pack_logical
from jax_marlin_moe.weights import MarlinWeights

MODELOPT = Method(
    "modelopt",
    read=("group_size", "config_groups", "quantized_layers"),
    harmless={
        "ignore": TENSORS_SHOW, "exclude_modules": TENSORS_SHOW, "producer": RECORD, "kv_cache_scheme": CACHE,
        "kv_cache_quant_algo": CACHE, "kv_cache_quant_method": CACHE, "quantization_status": RECORD,
        "pre_quant_scale": "the tensors of that name are read, linear by linear",
        "awq_block_size": "group_size says it", "modules_to_not_convert": TENSORS_SHOW, "version": RECORD,
    },
    known={
        "quant_algo": (
            "NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO",
            "fp8_pb_wo", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "W4A8_AWQ", "W4A16_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL",
            "MIXED_PRECISION",
        )
    },
    file="hf_quant_config.json",
)  # fmt: skip

MXFP4 = Method(
    "mxfp4",
    read=(),
    harmless={"modules_to_not_convert": TENSORS_SHOW, "dequantize": RUNTIME, "swizzle": RUNTIME},
)  # fmt: skip

_NVFP4 = Assumed(
    bits=4,
    group_sizes=(16,),
    algorithms=("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ"),
    strategies=("tensor_group", "group"),
    formats=("nvfp4-pack-quantized",),
    scale_bits=(4, 3),
)
_MXFP4 = Assumed(
    bits=4,
    group_sizes=(32,),
    algorithms=("MXFP4", "W4A16_MXFP4", "W4A8_MXFP4_FP8"),
    strategies=("group",),
    formats=("mxfp4-pack-quantized",),
    scale_bits=(8, 0),
)


def decode_fp4(weight: Array, scale: Array, global_scale: Array | None = None) -> LogicalLinear:
    """MXFP4 and NVFP4: two e2m1 codes per byte of [N, K / 2], the low nibble first; scales [N, K / group] as bits."""
    return LogicalLinear(unpack_nibbles(weight, 1).T, scale.T, None, global_scale)


def is_zero_fp4(weight: np.ndarray, scale: np.ndarray) -> bool:
    """Whether all values of FP4 bytes with e4m3 scales are zero, so that no global scale matters."""
    return not (weight & 0x77).any() or not (scale & 0x7F).any()


@dataclasses.dataclass(frozen=True)
class Nvfp4Storage(Scheme):
    """How an NVFP4 linear is stored.

    Attributes:
        weight: suffix of the bytes.
        global_scale: suffix of the float32 scale of the linear.
        divides: whether that is a divisor.
        group_size: rows of K that share a scale in the file: 16, or 32 of ModelOpt's W4A8_NVFP4_FP8, whose scales are
            repeated.
    """

    weight: str
    global_scale: str
    divides: bool
    group_size: int = 16
    weight_format: str = "nvfp4"
    methods: ClassVar[tuple[Method, ...]] = (MODELOPT, dataclasses.replace(MODELOPT, name="modelopt_fp4", file=None))
    known_as: ClassVar[str] = "NVFP4 of compressed-tensors and ModelOpt"
    marks: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale")
    ignored: ClassVar[tuple[str, ...]] = (".input_scale", ".input_global_scale")

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by bytes with e4m3 block scales."""
        if files.dtype(linear.name(".weight_packed")) == "U8":
            files.file_of(linear.name(".weight_scale"))  # without it nothing tells NVFP4 from MXFP4
        if files.dtype(linear.name(".weight_scale")) != "F8_E4M3":
            return None
        if files.dtype(linear.name(".weight_packed")) == "U8":
            check_stated(files, linear, ".weight_scale", quantization, _NVFP4)
            return cls(".weight_packed", ".weight_global_scale", divides=True)
        if files.dtype(linear.name(".weight")) == "U8":
            shape = files.info(linear.name(".weight_scale")).shape
            size = 32 if shape == (n, k // 32) and k % 32 == 0 else 16
            assumed = dataclasses.replace(_NVFP4, group_sizes=(size,))
            check_stated(files, linear, ".weight_scale", quantization, assumed)
            return cls(".weight", ".weight_scale_2", divides=False, group_size=size)
        return None

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """Two codes per byte."""
        return _size(files, linear)

    def rows_per_group(self, k: int) -> int:
        """Fixed by the format that decoding gives."""
        return 16

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """Of ModelOpt's algorithms with rows in e4m3; of others it is that of rows in FP4."""
        return algorithm_of(quantization, linear.module) in E4M3_ALGORITHMS

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Bytes, block scales as bits, and the factor of the linear."""
        check_shape(files, linear, k, n)
        weight = linear.read(files, self.weight, (n, -(-k // 2)), ("U8",), rows=1)
        scale = linear.read(files, ".weight_scale", (n, -(-k // self.group_size)), ("F8_E4M3",), rows=1)
        _check_block_scales(files, linear.name(".weight_scale"), scale, exponent=False)
        name = linear.name(self.global_scale)
        files.file_of(name)
        shape = files.info(name).shape
        if shape not in ((), (1,)):
            raise files.fault(name, f"has shape {shape}; it must be () or (1,)")
        value = np.float32(files.read(name, shape, ("F32",)).reshape(()))
        if value == 0 and (not self.divides or is_zero_fp4(weight, scale)):
            return weight, scale, np.asarray(np.float32(0))  # an expert that no token ever reached
        with np.errstate(all="ignore"):
            factor = np.float32(1) / value if self.divides else value
        if not (np.isfinite(value) and np.isfinite(factor) and value > 0):
            inverse = ", and so must its inverse" if self.divides else ""
            raise files.fault(name, f"is {value}; a global scale must be positive and finite{inverse}")
        return weight, scale, np.asarray(factor)

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        weight, scale, factor = tensors
        return decode_fp4(weight, jnp.repeat(scale, self.group_size // 16, axis=1), factor)


@dataclasses.dataclass(frozen=True)
class Mxfp4Storage(Scheme):
    """How an MXFP4 linear is stored.

    Attributes:
        weight: suffix of the bytes.
        scale: suffix of the e8m0 scales.
        blocked: whether the bytes lie in blocks, [n, k / 32, 16].
    """

    weight: str
    scale: str
    blocked: bool = False
    weight_format: str = "mxfp4"
    methods: ClassVar[tuple[Method, ...]] = (MXFP4,)
    known_as: ClassVar[str] = "MXFP4 of compressed-tensors, gpt-oss and DeepSeek-V4"
    marks: ClassVar[tuple[str, ...]] = (".weight_packed", ".weight_scale", ".scale")
    stacked: ClassVar[tuple[str, ...]] = ("_blocks", "_weight.blocks")
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by bytes with e8m0 scales."""
        for weight, scale in (("_blocks", "_scales"), ("_weight.blocks", "_weight.scales")):
            if linear.name(weight) in files:
                check_stated(files, linear, scale, quantization, _MXFP4)
                return cls(weight, scale, blocked=True)
        for weight, scale in ((".weight_packed", ".weight_scale"), (".weight", ".scale"), (".weight", ".weight_scale")):
            found = files.dtype(linear.name(weight)), files.dtype(linear.name(scale))
            if found[0] in ("U8", "I8") and found[1] in ("U8", "F8_E8M0"):
                check_stated(files, linear, scale, quantization, _MXFP4)
                return cls(weight, scale)
        return None

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """Two codes per byte."""
        return _size(files, linear)

    def rows_per_group(self, k: int) -> int:
        """Fixed by the format."""
        return 32

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """Of ModelOpt's algorithms with rows in e4m3; of others it is that of rows in FP4."""
        return algorithm_of(quantization, linear.module) in E4M3_ALGORITHMS

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Bytes and scales as bits."""
        check_shape(files, linear, k, n)
        shape = (n, -(-k // 32), 16) if self.blocked else (n, -(-k // 2))
        weight = linear.read(files, self.weight, shape, ("U8", "I8"), rows=1).view(np.uint8)
        weight = weight.reshape(len(weight), -1)
        scale = linear.read(files, self.scale, (n, -(-k // 32)), ("U8", "F8_E8M0"), rows=1)
        _check_block_scales(files, linear.name(self.scale), scale, exponent=True)
        return weight, scale

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_fp4(*tensors)


def from_nvfp4(
    weight: UInt8[Array, "experts N K/2"],
    weight_scale: UInt8[Array, "experts N K/16"],
    global_scale: Float32[Array, " experts"],
    *,
    divides: bool = False,
) -> MarlinWeights:
    """Packs NVFP4 tensors, experts stacked in front; `e2m1 * e4m3 * global_scale`.

    Args:
        weight: two codes per byte, the low nibble first (ModelOpt `weight`, compressed-tensors `weight_packed`).
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
    weight_scale = bit_patterns("weight_scale", weight_scale, "float8_e4m3fn")
    check_stack("weight_scale", weight_scale.shape, (experts, n, -(-k // 16)))
    refuse_block_scales("weight_scale", bad_block_scales(np.asarray(weight_scale), exponent=False))
    check_array("global_scale", global_scale, ndim=1, dtype=jnp.float32)
    check_stack("global_scale", global_scale.shape, (experts,))
    given, codes, scales = (np.asarray(array) for array in (global_scale, weight, weight_scale))
    dead = (given == 0) & [not divides or is_zero_fp4(codes[e], scales[e]) for e in range(experts)]
    with np.errstate(divide="ignore"):
        factors = np.where(dead, np.float32(0), np.float32(1) / given if divides else given)
    if not (dead | (np.isfinite(factors) & np.isfinite(given) & (given > 0))).all():
        raise ValueError("global_scale holds values that are not positive and finite; every expert needs one")
    return pack_stack(decode_fp4, (weight, weight_scale, factors), row, k, n, 16)


def from_tensorrt_nvfp4(
    weight: Shaped[Array, "experts K N"] | UInt8[Array, "experts K N/2"],
    block_scale: Shaped[Array, "experts K/16 N"],
    scale: Float32[Array, ""] | Float32[Array, " experts"],
    *,
    bias: Float[Array, "experts N"] | None = None,
) -> MarlinWeights:
    """Packs NVFP4 weights whose block scales are quantised themselves, input dimension first, as TensorRT has them.

    `e2m1 * e4m3 * scale`, a block scale for every 16 rows of K.

    Args:
        weight: float4_e2m1fn, or two codes per byte along N, the low nibble first.
        block_scale: float8_e4m3fn, or its bit patterns as uint8; concrete values.
        scale: of the block scales; one, or one per expert.
        bias: added after scaling, kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, a block scale is negative or NaN, or a scale is negative or not finite.
    """
    check_rank("weight", weight, 3)
    if weight.dtype == jnp.float4_e2m1fn:
        codes = np.asarray(weight).view(np.uint8) & 15
    elif weight.dtype == jnp.uint8:
        data = np.asarray(weight)
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], -1)
    else:
        raise TypeError(f"weight has dtype {weight.dtype}; it must be float4_e2m1fn, or uint8 with two codes per byte")
    experts, k, n = codes.shape
    bits = np.asarray(bit_patterns("block_scale", block_scale, "float8_e4m3fn"))
    check_stack("block_scale", bits.shape, (experts, -(-k // 16), n))
    refuse_block_scales("block_scale", bad_block_scales(bits, exponent=False))
    factors = np.asarray(scale)
    if factors.dtype != np.float32 or factors.shape not in ((), (experts,)):
        raise TypeError(
            f"scale is {factors.dtype} of shape {factors.shape}; it must be float32 of shape () or {(experts,)}"
        )
    if not ((factors >= 0) & (factors < np.inf)).all():
        raise ValueError("scale holds values that are negative or not finite; every expert needs one that is neither")
    factors = np.broadcast_to(factors, (experts,))
    return pack_logical(
        jnp.asarray(codes), jnp.asarray(bits), "nvfp4", group_size=16, global_scales=jnp.asarray(factors), bias=bias
    )


def from_mxfp4(
    weight: UInt8[Array, "experts N K/2"], weight_scale: UInt8[Array, "experts N K/32"], *, bias: Array | None = None
) -> MarlinWeights:
    """Packs MXFP4 tensors, experts stacked in front; `e2m1 * 2^(e8m0 - 127)`, exact.

    gpt-oss: reshape `_blocks` [E, N, K / 32, 16] to [E, N, K / 2], and take rows 0::2 for gate and 1::2 for up (of
    blocks, scales and bias alike).

    Args:
        weight: two codes per byte, the low nibble first; uint8, or int8 with the same bits.
        weight_scale: e8m0 bit patterns as uint8, or float8_e8m0fnu; concrete values.
        bias: [experts, N], kept in float32.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or a scale is NaN (255).
    """
    if hasattr(weight, "dtype") and weight.dtype == jnp.int8:
        weight = weight.view(jnp.uint8)
    k, n = _check_fp4(weight)
    weight_scale = bit_patterns("weight_scale", weight_scale, "float8_e8m0fnu")
    check_stack("weight_scale", weight_scale.shape, (weight.shape[0], n, -(-k // 32)))
    refuse_block_scales("weight_scale", bad_block_scales(np.asarray(weight_scale), exponent=True))
    return pack_stack(decode_fp4, (weight, weight_scale), get_format("mxfp4"), k, n, 32, bias=bias)


def _check_fp4(weight: Array) -> tuple[int, int]:
    """K and N of FP4 bytes [E, N, K / 2]."""
    check_array("weight", weight, ndim=3, dtype=jnp.uint8)
    return weight.shape[2] * 2, weight.shape[1]


def _size(files: TensorFolder, linear: Linear) -> tuple[int, int] | None:
    """(k, n) from bytes [n, k / 2], by either name."""
    for suffix in (".weight_packed", ".weight"):
        shape = shape_of_rank(files, linear.name(suffix), 2, "U8", "I8")
        if shape is not None:
            return 2 * shape[1], shape[0]
    return None


def _check_block_scales(files: TensorFolder, name: str, scale: np.ndarray, *, exponent: bool) -> None:
    fault = bad_block_scales(scale, exponent=exponent)
    if fault:
        raise files.fault(name, f"holds {fault}; every block scale must be a number that is not negative")
