"""Integers in bytes of their own: compressed-tensors "int-quantized" (W8A8, W4A8, W4AFP8), and int8 of ModelOpt."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import Method
from jax_marlin_moe.checkpoint.schemes.compressed_tensors import (
    COMPRESSED_TENSORS,
    IntegerFacts,
    PackQuantizedStorage,
    integer_facts,
)
from jax_marlin_moe.checkpoint.schemes.stacks import check_float_scales, integer_format, pack_stack
from jax_marlin_moe.checkpoint.schemes.storage import (
    LogicalLinear,
    Scheme,
    check_finite,
    number_of_groups,
    shape_of_rank,
)
from jax_marlin_moe.checkpoint.stated import Assumed, check_stated
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.packing import check_stack, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

# ModelOpt's algorithms with int8 weights, one scale per output feature.
_MODELOPT = Assumed(
    bits=8,
    group_sizes=(None,),
    algorithms=("W8A16", "W8A8_SQ_PER_CHANNEL"),
    strategies=("channel",),
    formats=(),
    types=("int",),
)


def decode_int_quantized(
    weight: Array, weight_scale: Array, zero_point: Array | None, order: Array | None, *, bits: int
) -> LogicalLinear:
    """Signed integers [N, K]; scales, and zero points if any, [N, groups]."""

    def unsigned(signed: Array) -> Array:
        return (signed.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint8).T

    codes = unsigned(weight)
    zeros = None if zero_point is None else unsigned(zero_point)
    return LogicalLinear(codes if order is None else codes[order], weight_scale.T, zeros)


@dataclasses.dataclass(frozen=True)
class IntQuantizedStorage(PackQuantizedStorage):
    """How a linear of whole bytes is stored; attributes as for `PackQuantizedStorage`."""

    methods: ClassVar[tuple[Method, ...]] = ()
    known_as: ClassVar[str] = "compressed-tensors int-quantized, int8 of ModelOpt"
    marks: ClassVar[tuple[str, ...]] = (".weight_scale",)
    broken: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = (".input_scale", ".input_zero_point")

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by int8 with float scales."""
        weight, scale = linear.name(".weight"), linear.name(".weight_scale")
        if files.dtype(weight) != "I8" or files.dtype(scale) not in FLOATS:
            return None
        if quantization.method == COMPRESSED_TENSORS.name:
            formats, strategies = ("int-quantized", "naive-quantized"), ("group", "channel", "tensor")
            return cls(*integer_facts(files, linear, k, quantization, formats=formats, strategies=strategies), k)
        if quantization.method not in ("modelopt", "modelopt_fp4"):
            raise files.fault(
                weight,
                f"is int8 of compressed-tensors or ModelOpt; {quantization.source} has quant_method "
                f"{quantization.method!r}, so nothing says how it was quantised",
            )
        check_stated(files, linear, ".weight_scale", quantization, _MODELOPT)
        return cls(*IntegerFacts(8, None, True, False), k)

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """A code per byte; FP4 bytes of int8, which have other scales, hold two."""
        shape = shape_of_rank(files, linear.name(".weight"), 2, "I8")
        if shape is None or files.dtype(linear.name(".weight_scale")) not in FLOATS:
            return None
        return shape[1], shape[0]

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Integers, scales, and zero points or None."""
        groups = number_of_groups(k, self.group_size)
        weight = linear.read(files, ".weight", (n, k), ("I8",), rows=1)
        scale = self._of_groups(files, linear, ".weight_scale", n, groups, FLOATS)
        check_finite(files, linear.name(".weight_scale"), scale)
        zeros = None if self.symmetric else self._of_groups(files, linear, ".weight_zero_point", n, groups, ("I8",))
        for suffix, integers in ((".weight", weight), (".weight_zero_point", zeros)):
            if self.bits == 4 and integers is not None and not _fit_4_bits(integers):
                found = f"{integers.min()} to {integers.max()}"
                raise files.fault(linear.name(suffix), f"holds {found}; integers of 4 bits lie in [-8, 7]")
        return weight, scale, zeros

    def _of_groups(
        self, files: TensorFolder, linear: Linear, suffix: str, n: int, groups: int, dtypes: tuple[str, ...]
    ) -> np.ndarray:
        """[N, groups] of a tensor that may have one number for all, or, of one group, no axis of groups."""
        shape = files.info(linear.name(suffix)).shape
        if groups == 1 and shape in ((), (1,), (1, 1)) and n > 1:
            value = files.read(linear.name(suffix), shape, dtypes).reshape(1, 1)
            columns = n if linear.cut is None else linear.cut.columns[1] - linear.cut.columns[0]
            return np.repeat(value, columns, axis=0)
        if groups == 1 and shape == (n,):
            return linear.read(files, suffix, (n,), dtypes).reshape(-1, 1)
        return linear.read(files, suffix, (n, groups), dtypes, rows=1 if groups > 1 else None)

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows sorted by group."""
        weight, scale, zeros = tensors
        return decode_int_quantized(weight, scale, zeros, order, bits=self.bits)


def from_int_quantized(
    weight: Int8[Array, "experts N K"],
    weight_scale: Float[Array, "experts N groups"],
    *,
    bits: int = 8,
    group_size: int | None = None,
    weight_zero_point: Int8[Array, "experts N groups"] | None = None,
) -> MarlinWeights:
    """Packs compressed-tensors "int-quantized" tensors, experts stacked in front; `(q - z) * s`, exact.

    The format is "int8" or "int4", with zero points "int8_zp" or "int4_zp".

    Args:
        weight: signed integers, concrete values where they have 4 bits.
        weight_scale: float16, bfloat16 or float32, kept as they are; one group is channel-wise.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.
        weight_zero_point: zero points of asymmetric weights.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, groups are unequal, or integers do not fit into 4 bits.
    """
    row = integer_format(bits, zeros=weight_zero_point is not None)
    check_array("weight", weight, ndim=3, dtype=jnp.int8)
    check_float_scales("weight_scale", weight_scale, row)
    experts, n, k = weight.shape
    groups = weight_scale.shape[2]
    check_stack("weight_scale", weight_scale.shape, (experts, n, groups))
    size = resolve_group_size(group_size, k, groups, row)
    if weight_zero_point is not None:
        check_array("weight_zero_point", weight_zero_point, ndim=3, dtype=jnp.int8)
        check_stack("weight_zero_point", weight_zero_point.shape, (experts, n, groups))
    for name, integers in (("weight", weight), ("weight_zero_point", weight_zero_point)):
        if bits == 4 and integers is not None and not _fit_4_bits(np.asarray(integers)):
            raise ValueError(f"{name} holds integers outside [-8, 7]; with bits=4 all must lie in it")
    tensors = (weight, weight_scale, weight_zero_point, None)
    return pack_stack(decode_int_quantized, tensors, row, k, n, size, options={"bits": bits})


def _fit_4_bits(integers: np.ndarray) -> bool:
    """Whether all are in [-8, 7]."""
    return not integers.size or -8 <= integers.min() <= integers.max() <= 7
