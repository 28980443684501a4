"""compressed-tensors "pack-quantized" checkpoints: 4- and 8-bit codes packed along K, symmetric or not."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization, group_size_from
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, check_shape, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.importers import LogicalLinear, decode_compressed_tensors, row_order

_FORMATS = (None, "pack-quantized", "mixed-precision")  # of a config whose int32 words are pack-quantized


def weights_scheme(quantization: Quantization, module: str) -> Keys:
    """The `weights` of the config group that a module belongs to: by name first, then by the class "Linear".

    Raises:
        ValueError: no group has it, or the group is malformed.
    """
    by_class = None
    groups = quantization.keys.object("config_groups", Keys({}, quantization.source), null=True)
    for name in groups.values:
        group = groups.object(name)
        weights = group.object("weights")
        for target in group.texts("targets", [], null=True):
            pattern = target.removeprefix("re:")
            if quantization.matches(pattern, module) if target.startswith("re:") else target == module:
                return weights
            if target == "Linear":
                by_class = by_class or weights
    if by_class is None:
        raise ValueError(f"{quantization.source}: no config group has {module} among its targets")
    return by_class


@dataclasses.dataclass(frozen=True)
class PackQuantizedStorage(Storage):
    """How a pack-quantized linear is stored.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share a scale, None for one group.
        symmetric: whether there are no zero points.
        k: input features.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    k: int
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
        keys = weights_scheme(quantization, linear.module)
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
        return cls(bits, size, keys.boolean("symmetric", True), k)

    def rows_per_group(self, k: int) -> int:
        """As the config says."""
        return self.group_size or k

    def row_order(self, files: TensorFolder, linear: Linear, k: int) -> np.ndarray | None:
        """From `weight_g_idx`, where the file has it; -1 in all of it means none."""
        name = linear.name(".weight_g_idx")
        if name not in files:
            return None
        index = linear.read(files, ".weight_g_idx", (k,), ("I32",))
        if (index == -1).all():
            return None
        try:
            return row_order(index, self.group_size or k)
        except ValueError as error:
            raise files.fault(name, f"cannot be used: {error}") from None

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
