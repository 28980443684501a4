"""compressed-tensors "pack-quantized" checkpoints: 4- and 8-bit codes packed along K, symmetric or not."""

import dataclasses
import re
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization, group_size_from
from jax_marlin_moe.checkpoint.stated import check_order, check_scale_dtype, check_zero_point_dtype, group_of
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, check_shape, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.importers import LogicalLinear, decode_compressed_tensors, row_order

_FORMATS = (None, "pack-quantized", "mixed-precision")  # of a config whose int32 words are pack-quantized


def _weights_scheme(quantization: Quantization, module: str) -> Keys:
    group = group_of(quantization, module)
    if group is None:
        raise ValueError(f"{quantization.source}: no config group has {module} among its targets")
    return group


def _writes_no_order(quantization: Quantization) -> bool:
    """Whether a version of the tool wrote the config that has no `weight_g_idx` any more: 0.20 and later."""
    version = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", quantization.keys.text("version", "0.0", null=True) or "")
    return version is not None and (int(version[1]), int(version[2])) >= (0, 20)


@dataclasses.dataclass(frozen=True)
class PackQuantizedStorage(Storage):
    """How a pack-quantized linear is stored.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share a scale, None for one group.
        symmetric: whether there are no zero points.
        k: input features.
        ordered: whether `weight_g_idx` puts rows into groups: True where it must, False where it must not, None where
            it may.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    k: int
    ordered: bool | None
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where the scheme has them."""
        return f"int{self.bits}" if self.symmetric else f"int{self.bits}_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """Known by int32 words."""
        if files.dtype(linear.name(".weight_packed")) != "I32":
            return None
        if quantization.method != "compressed-tensors":
            raise files.fault(
                linear.name(".weight_packed"),
                f"is compressed-tensors' packing; {quantization.source} has quant_method {quantization.method!r}, so "
                "nothing says how it was quantised",
            )
        keys = _weights_scheme(quantization, linear.module)
        if quantization.config.get("format") not in _FORMATS:
            raise quantization.keys.fault(
                "format", "'pack-quantized' or 'mixed-precision'", ": nothing else is in int32 words"
            )
        keys.choice("type", ["int"], None)
        bits = keys.integer("num_bits")
        if bits not in (4, 8):
            raise keys.fault("num_bits", f"4 or 8 for {linear.module}")
        if keys.boolean("dynamic", False, null=True):
            raise keys.fault("dynamic", "false")
        channel = keys.choice("strategy", ["group", "channel"], "group") == "channel"
        sizes = get_format(f"int{bits}").group_sizes
        size = None if channel else group_size_from(keys, "group_size", k=k, sizes=sizes)
        symmetric = keys.boolean("symmetric", True)
        check_scale_dtype(files, linear, ".weight_scale", keys)
        check_zero_point_dtype(keys, symmetric=symmetric)
        for name in ("block_structure", "scale_bits"):
            if keys.values.get(name) is not None:
                raise keys.fault(name, "null", ": scales of integer codes are floats, in groups along K")
        ordered: bool | None = check_order(keys) == "group"
        if ordered and _writes_no_order(quantization):
            ordered = None
        return cls(bits, size, symmetric, k, ordered)

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
        packed = linear.read(files, ".weight_packed", (n, -(-k // pf)), ("I32",))
        scale = linear.read(files, ".weight_scale", (n, groups), FLOATS)
        check_finite(files, linear.name(".weight_scale"), scale)
        check_shape(files, linear, k, n)
        zeros = None
        if not self.symmetric:
            zeros = linear.read(files, ".weight_zero_point", (-(-n // pf), groups), ("I32",))
        return packed, scale, zeros

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows sorted by group."""
        packed, scale, zeros = tensors
        return decode_compressed_tensors(packed, scale, zeros, order, bits=self.bits, k=self.k)
