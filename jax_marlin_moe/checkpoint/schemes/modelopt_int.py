"""Integer checkpoints of ModelOpt: 4-bit AWQ, two output features in a byte (W4A8_AWQ, W4A16_AWQ)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
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

ALGORITHMS = ("W4A8_AWQ", "W4A16_AWQ")


def decode_modelopt_awq(weight: Array, weight_scale: Array) -> LogicalLinear:
    """4-bit AWQ of ModelOpt: bytes [N / 2, K], signed, the even output feature in the low nibble; scales [N, K / g]."""
    return LogicalLinear((unpack_nibbles(weight, 0) ^ 8).T, weight_scale.T)  # two's complement, with an offset of 8


@dataclasses.dataclass(frozen=True)
class ModelOptAwqStorage(Scheme):
    """How a linear of W4A8_AWQ or W4A16_AWQ is stored.

    `weight_scale_2` is the unit in which other kernels round the weights to e4m3. These kernels round no weights, so it
    does not enter the value.

    Attributes:
        group_size: rows of K that share a scale, None for one group.
    """

    group_size: int | None
    weight_format: str = "int4"
    known_as: ClassVar[str] = "4-bit AWQ of ModelOpt"
    marks: ClassVar[tuple[str, ...]] = (".weight_scale",)
    ignored: ClassVar[tuple[str, ...]] = (".input_scale", ".weight_scale_2")

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by bytes with float scales."""
        scale = linear.name(".weight_scale")
        if files.dtype(linear.name(".weight")) != "U8" or files.dtype(scale) not in FLOATS:
            return None
        size = int4_group_size(files, scale, k, n)
        assumed = Assumed(
            bits=4, group_sizes=(size,), algorithms=ALGORITHMS, strategies=("group",), formats=(),
            types=("int", "float"),  # ModelOpt's configs of mixed models say "float" of W4A8_AWQ
        )  # fmt: skip
        check_stated(files, linear, ".weight_scale", quantization, assumed)
        return cls(None if size == k else size)

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """Two output features per byte; FP4 bytes, which look alike, have two input features."""
        shape = shape_of_rank(files, linear.name(".weight"), 2, "U8")
        if shape is None or files.dtype(linear.name(".weight_scale")) not in FLOATS:
            return None
        return shape[1], 2 * shape[0]

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """Of W4A8_AWQ; files of W4A16_AWQ have none."""
        return True

    def rows_per_group(self, k: int) -> int:
        """As the scales have it."""
        return self.group_size or k

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Bytes and scales."""
        if n % 2:
            raise files.fault(linear.name(".weight"), f"holds pairs of output features; N = {n} is odd")
        weight = linear.read(files, ".weight", (n // 2, k), ("U8",), rows=1)
        return weight, read_float_scales(files, linear, ".weight_scale", n, number_of_groups(k, self.group_size))

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_modelopt_awq(*tensors)


def from_modelopt_awq(
    weight: UInt8[Array, "experts N/2 K"],
    weight_scale: Float[Array, "experts N groups"],
    *,
    group_size: int | None = None,
) -> MarlinWeights:
    """Packs 4-bit AWQ weights of ModelOpt (W4A8_AWQ, W4A16_AWQ), experts stacked in front; `q * s`, exact.

    The files' `pre_quant_scale` multiplies the input: rows of x for gate and up, which `moe_layer` and `MoELayer` take
    as `expert_input_scale`; that of down may be multiplied into the scales of up's columns, where the activation is a
    function of gate times up. `input_scale` is the scale of e4m3 rows: `x_scale` of `fused_moe`.

    Args:
        weight: two signed codes per byte, the even output feature in the low nibble.
        weight_scale: float16, bfloat16 or float32, kept as they are.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or groups are unequal.
    """
    row = get_format("int4")
    check_array("weight", weight, ndim=3, dtype=jnp.uint8)
    check_float_scales("weight_scale", weight_scale, row)
    experts, pairs, k = weight.shape
    groups = weight_scale.shape[2]
    check_stack("weight_scale", weight_scale.shape, (experts, 2 * pairs, groups))
    size = resolve_group_size(group_size, k, groups, row)
    return pack_stack(decode_modelopt_awq, (weight, weight_scale), row, k, 2 * pairs, size)
