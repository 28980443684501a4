"""compressed-tensors "pack-quantized" checkpoints: 4- and 8-bit codes packed along K, symmetric or not."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization, group_size_from
from jax_marlin_moe.checkpoint.quantization_keys import CACHE, RECORD, TENSORS_SHOW, Method
from jax_marlin_moe.checkpoint.schemes.stacks import check_float_scales, integer_format, pack_stack
from jax_marlin_moe.checkpoint.schemes.storage import (
    LogicalLinear,
    Scheme,
    check_shape,
    number_of_groups,
    read_float_scales,
    shape_of_rank,
)
from jax_marlin_moe.checkpoint.schemes.values import row_order
from jax_marlin_moe.checkpoint.schemes.words import unpack_along_k, unpack_along_n
from jax_marlin_moe.checkpoint.stated import (
    check_format,
    check_order,
    check_scale_dtype,
    check_zero_point_dtype,
    group_of,
    states_e4m3_inputs,
)
from jax_marlin_moe.checkpoint.tensors import TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import check_stack, resolve_group_size
from jax_marlin_moe.weights import MarlinWeights

COMPRESSED_TENSORS = Method(
    "compressed-tensors",
    read=("config_groups", "format", "version", "group_size", "bits", "desc_act"),
    harmless={
        "ignore": TENSORS_SHOW, "quantization_status": RECORD, "kv_cache_scheme": CACHE,
        "global_compression_ratio": RECORD, "producer": RECORD,
    },
    fixed={"sparsity_config": (None, {}, {"format": "dense"})},
)  # fmt: skip
_PACKED = ("pack-quantized",)


def decode_compressed_tensors(
    weight_packed: Array, weight_scale: Array, zero_point: Array | None, order: Array | None, *, bits: int, k: int
) -> LogicalLinear:
    """compressed-tensors pack-quantized: words along K of [N, K]; codes and zero points both offset by 2^(bits - 1)."""
    codes = unpack_along_n(weight_packed, bits=bits)[:, :k].T
    zeros = None
    if zero_point is not None:  # packed along N, its first axis; N need not fill the last word
        zeros = unpack_along_k(zero_point, bits=bits)[: weight_packed.shape[0]].T
    return LogicalLinear(codes if order is None else codes[order], weight_scale.T, zeros)


class IntegerFacts(NamedTuple):
    """What a config says of a linear of integer codes.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share a scale, None for one group.
        symmetric: whether there are no zero points.
        ordered: whether `weight_g_idx` puts rows into groups: True where it must, False where it must not, None where
            it may.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool | None


def integer_facts(
    files: TensorFolder,
    linear: Linear,
    k: int,
    quantization: Quantization,
    *,
    formats: tuple[str, ...],
    strategies: tuple[str, ...],
) -> IntegerFacts:
    """What the config says of a linear of integer codes.

    Args:
        files: the checkpoint.
        linear: the linear.
        k: its input features.
        quantization: the config.
        formats: values of `format` that it may have.
        strategies: values of `strategy` that it may have.

    Raises:
        ValueError: the config says something else, or contradicts the tensors; names file and key.
    """
    keys = _weights_scheme(quantization, linear.module, formats)
    keys.choice("type", ["int"], None)
    bits = keys.integer("num_bits")
    if bits not in (4, 8):
        raise keys.fault("num_bits", f"4 or 8 for {linear.module}")
    if keys.boolean("dynamic", False, null=True):
        raise keys.fault("dynamic", "false")
    grouped = keys.choice("strategy", strategies, "group") == "group"
    sizes = get_format(f"int{bits}").group_sizes
    size = group_size_from(keys, "group_size", k=k, sizes=sizes) if grouped else None
    symmetric = keys.boolean("symmetric", True)
    check_scale_dtype(files, linear, ".weight_scale", keys)
    check_zero_point_dtype(keys, symmetric=symmetric)
    for name in ("block_structure", "scale_bits"):
        if keys.values.get(name) is not None:
            raise keys.fault(name, "null", ": scales of integer codes are floats, in groups along K")
    ordered: bool | None = check_order(keys) == "group"
    if ordered and _writes_no_order(quantization):
        ordered = None
    return IntegerFacts(bits, size, symmetric, ordered)


@dataclasses.dataclass(frozen=True)
class PackQuantizedStorage(Scheme):
    """How a pack-quantized linear is stored.

    Attributes:
        bits: as in `IntegerFacts`.
        group_size: likewise.
        symmetric: likewise.
        ordered: likewise.
        k: input features.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool | None
    k: int
    methods: ClassVar[tuple[Method, ...]] = (COMPRESSED_TENSORS,)
    known_as: ClassVar[str] = "compressed-tensors pack-quantized"
    marks: ClassVar[tuple[str, ...]] = (".weight_packed",)
    broken: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (f".{part}_{kind}" for part in ("gate_up_proj", "down_proj") for kind in ("packed", "scale", "shape")),
        "is of llm-compressor 0.12.0, which wrote fused experts in a broken way; requantise with a later version",
    )
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where the scheme has them."""
        return f"int{self.bits}" if self.symmetric else f"int{self.bits}_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """Known by int32 words."""
        if files.dtype(linear.name(".weight_packed")) != "I32":
            return None
        if quantization.method != "compressed-tensors":
            raise files.fault(
                linear.name(".weight_packed"),
                f"is compressed-tensors' packing; {quantization.source} has quant_method {quantization.method!r}, so "
                "nothing says how it was quantised",
            )
        options = {"formats": _PACKED, "strategies": ("group", "channel")}
        return cls(*integer_facts(files, linear, k, quantization, **options), k)

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """As `weight_shape` says, since the last word along K may be filled in part; else whole words."""
        shape = shape_of_rank(files, linear.name(".weight_packed"), 2, "I32")
        if shape is None:
            return None
        if shape_of_rank(files, linear.name(".weight_shape"), 1, "I64", "I32") == (2,):
            n, k = linear.read(files, ".weight_shape", (2,), ("I64", "I32")).tolist()
            return k, n
        known = quantization.method == COMPRESSED_TENSORS.name  # `find` says what is wrong elsewhere
        bits = _weights_scheme(quantization, linear.module, _PACKED).integer("num_bits", low=1) if known else 4
        return shape[1] * (32 // bits), shape[0]

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """As the config says."""
        return states_e4m3_inputs(quantization, linear.module) is True

    def rows_per_group(self, k: int) -> int:
        """As the config says."""
        return self.group_size or k

    def row_order(self, files: TensorFolder, linear: Linear, k: int) -> np.ndarray | None:
        """From `weight_g_idx`, where the file has it; -1 in all of it means none."""
        name = linear.name(".weight_g_idx")
        if name not in files and not (self.ordered and self.group_size):
            return None
        index = linear.read(files, ".weight_g_idx", (k,), ("I32",))
        if (index == -1).all():
            return None
        try:
            order = row_order(index, self.group_size or k)
        except ValueError as error:
            raise files.fault(name, f"cannot be used: {error}") from None
        if order is not None and self.ordered is False:
            raise files.fault(name, "puts rows into groups in another order; actorder must then be 'group'")
        return order

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Words, scales, and zero points or None."""
        groups, pf = number_of_groups(k, self.group_size), 32 // self.bits
        packed = linear.read(files, ".weight_packed", (n, -(-k // pf)), ("I32",), rows=1)
        scale = read_float_scales(files, linear, ".weight_scale", n, groups)
        check_shape(files, linear, k, n)
        zeros = None
        if not self.symmetric:
            of_groups = 1 if groups > 1 else None
            zeros = linear.read(files, ".weight_zero_point", (-(-n // pf), groups), ("I32",), rows=of_groups)
        return packed, scale, zeros

    def cut_to(self, k: int, n: int) -> "PackQuantizedStorage":
        """Decoding needs the number of rows."""
        return dataclasses.replace(self, k=k)

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows sorted by group."""
        packed, scale, zeros = tensors
        return decode_compressed_tensors(packed, scale, zeros, order, bits=self.bits, k=self.k)


def from_compressed_tensors(
    weight_packed: Int32[Array, "experts N K/pf"],
    weight_scale: Float[Array, "experts N groups"],
    *,
    k: int,
    bits: int = 4,
    group_size: int | None = None,
    weight_zero_point: Int32[Array, "experts N/pf groups"] | None = None,
    weight_g_idx: Int32[Array, "experts K"] | None = None,
) -> MarlinWeights:
    """Packs compressed-tensors "pack-quantized" tensors, experts stacked in front; `(q - z) * s`, exact.

    The format is "int4" or "int8", with zero points "int4_zp" or "int8_zp".

    Args:
        weight_packed: codes packed along K (the last word may be filled in part).
        weight_scale: float16, bfloat16 or float32, kept as they are; one group is channel-wise.
        k: input features, the second number of `weight_shape`.
        bits: 4 or 8.
        group_size: rows of K that share a scale; may be None where there is one group or groups divide K.
        weight_zero_point: zero points of asymmetric weights, packed along N.
        weight_g_idx: group of each row, concrete values. All groups must be equally long.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or groups are unequal or not determined.
    """
    row = integer_format(bits, zeros=weight_zero_point is not None)
    check_array("weight_packed", weight_packed, ndim=3, dtype=jnp.int32)
    check_float_scales("weight_scale", weight_scale, row)
    experts, n, words = weight_packed.shape
    check_stack("weight_packed", (experts, n, words), (experts, n, -(-k // row.codes_per_word)))
    groups = weight_scale.shape[2]
    check_stack("weight_scale", weight_scale.shape, (experts, n, groups))
    size = resolve_group_size(group_size, k, groups, row)
    if weight_zero_point is not None:
        check_array("weight_zero_point", weight_zero_point, ndim=3, dtype=jnp.int32)
        check_stack("weight_zero_point", weight_zero_point.shape, (experts, -(-n // row.codes_per_word), groups))
    order = None
    if weight_g_idx is not None:
        check_array("weight_g_idx", weight_g_idx, ndim=2, dtype=jnp.int32)
        check_stack("weight_g_idx", weight_g_idx.shape, (experts, k))
        order = row_order(np.asarray(weight_g_idx), size)
    tensors = (weight_packed, weight_scale, weight_zero_point, order)
    return pack_stack(decode_compressed_tensors, tensors, row, k, n, size, order, options={"bits": bits, "k": k})


def _weights_scheme(quantization: Quantization, module: str, formats: tuple[str, ...]) -> Keys:
    """`weights` of the module's config group; raises ValueError where there is none, or its format is another."""
    group = group_of(quantization, module)
    if group is None:
        raise ValueError(f"{quantization.source}: no config group has {module} among its targets")
    check_format(quantization, group, formats)
    return group.object("weights")


def _writes_no_order(quantization: Quantization) -> bool:
    """Whether the version that wrote the config is one that writes no `weight_g_idx`: 0.20 or later."""
    version = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", quantization.keys.text("version", "0.0", null=True) or "")
    return version is not None and (int(version[1]), int(version[2])) >= (0, 20)
