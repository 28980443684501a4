"""W4AFP8 of SGLang and TensorRT-LLM: 4-bit experts for rows in e4m3, beside linears in FP8."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import Method
from jax_marlin_moe.checkpoint.schemes.fp8 import FP8
from jax_marlin_moe.checkpoint.schemes.stacks import check_float_scales, pack_stack
from jax_marlin_moe.checkpoint.schemes.storage import (
    LogicalLinear,
    Scheme,
    int4_group_size,
    number_of_groups,
    read_float_scales,
    shape_of_rank,
)
from jax_marlin_moe.checkpoint.schemes.words import unpack_nibbles
from jax_marlin_moe.checkpoint.stated import Assumed, check_stated
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import check_stack, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

W4AFP8 = dataclasses.replace(
    FP8,
    name="w4afp8",
    read=(*FP8.read, "moe_activation_scheme"),
    fixed={**FP8.fixed, "linear_activation_scheme": ("dynamic", None)},
)

_SCALE = ".weight_scale_inv"  # a multiplier, whatever its name


def decode_w4afp8(weight: Array, scale: Array) -> LogicalLinear:
    """W4AFP8: bytes [N, K / 2], two's complement, the even input feature in the low nibble; scales [N, K / g]."""
    return LogicalLinear((unpack_nibbles(weight, 1) ^ 8).T, scale.T)  # with an offset of 8


@dataclasses.dataclass(frozen=True)
class W4AFp8Storage(Scheme):
    """How a 4-bit expert of W4AFP8 is stored.

    Attributes:
        group_size: rows of K that share a scale, None for one group.
    """

    group_size: int | None
    weight_format: str = "int4"
    methods: ClassVar[tuple[Method, ...]] = (W4AFP8,)
    known_as: ClassVar[str] = "W4AFP8 of SGLang and TensorRT-LLM"
    marks: ClassVar[tuple[str, ...]] = (_SCALE,)
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)
    activation_dtype: ClassVar[ByteDtype] = "float8_e4m3fn"  # of the rows that the files are calibrated for

    @classmethod
    def holds(cls, files: TensorFolder, linear: Linear) -> bool:
        """Whether a linear is stored so: int8 with float scales of this name."""
        return files.dtype(linear.name(".weight")) == "I8" and files.dtype(linear.name(_SCALE)) in FLOATS

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by its tensors; files of TensorRT-LLM name no method but MIXED_PRECISION."""
        if not cls.holds(files, linear):
            return None
        size = int4_group_size(files, linear.name(_SCALE), k, n)
        quantization.keys.choice("moe_activation_scheme", ("static", "dynamic"), None, null=True)
        assumed = Assumed(
            bits=4, group_sizes=(size,), algorithms=("W4A8_AWQ",), strategies=("group",), formats=(), types=("int",)
        )
        check_stated(files, linear, _SCALE, quantization, assumed)
        return cls(None if size == k else size)

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """Two codes per byte."""
        shape = shape_of_rank(files, linear.name(".weight"), 2, "I8")
        return None if shape is None or not cls.holds(files, linear) else (2 * shape[1], shape[0])

    def rows_per_group(self, k: int) -> int:
        """As the scales have it."""
        return self.group_size or k

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """Unless the config says that rows have scales of their own."""
        return quantization.config.get("moe_activation_scheme") != "dynamic"

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Bytes and scales."""
        if k % 2:
            raise files.fault(linear.name(".weight"), f"holds pairs of input features; K = {k} is odd")
        weight = linear.read(files, ".weight", (n, k // 2), ("I8",), rows=1).view(np.uint8)
        return weight, read_float_scales(files, linear, _SCALE, n, number_of_groups(k, self.group_size))

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_w4afp8(*tensors)


def from_w4afp8(
    weight: Int8[Array, "experts N K/2"],
    weight_scale_inv: Float[Array, "experts N groups"],
    *,
    group_size: int | None = None,
) -> MarlinWeights:
    """Packs 4-bit experts of W4AFP8 (SGLang, TensorRT-LLM), experts stacked in front; `q * s`, exact.

    `input_scale` of the files is the scale of e4m3 rows: `x_scale` of `fused_moe`, and that of its `intermediate`.

    Args:
        weight: two signed codes per byte, the even input feature in the low nibble.
        weight_scale_inv: float16, bfloat16 or float32 multipliers, kept as they are.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or groups are unequal.
    """
    row = get_format("int4")
    check_array("weight", weight, ndim=3, dtype=jnp.int8)
    check_float_scales("weight_scale_inv", weight_scale_inv, row)
    experts, n, half = weight.shape
    groups = weight_scale_inv.shape[2]
    check_stack("weight_scale_inv", weight_scale_inv.shape, (experts, n, groups))
    size = resolve_group_size(group_size, 2 * half, groups, row)
    return pack_stack(decode_w4afp8, (weight.view(jnp.uint8), weight_scale_inv), row, 2 * half, n, size)
