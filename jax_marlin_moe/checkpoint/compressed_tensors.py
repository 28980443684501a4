"""compressed-tensors "pack-quantized" checkpoints: 4- and 8-bit codes packed along K, symmetric or not."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, group_size_from, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.importers import LogicalLinear, decode_compressed_tensors, row_order

_FORMATS = (None, "pack-quantized", "mixed-precision")  # of a config whose int32 words are pack-quantized


def weights_scheme(quantization: Quantization, module: str) -> Mapping[str, Any]:
    """The `weights` of the config group that a module belongs to: by name first, then by the class "Linear".

    Raises:
        ValueError: no group has it, or the group is malformed.
    """
    by_class = None
    groups = quantization.config.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise ValueError(
            f"{quantization.source}: config_groups is a JSON {type(groups).__name__}; it must be an object"
        )
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ValueError(f"{quantization.source}: config group {name!r} has no weights")
        targets = group.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(
                f"{quantization.source}: targets of config group {name!r} are {targets!r}; they must be names"
            )
        for target in targets:
            pattern = target.removeprefix("re:")
            if quantization.matches(pattern, module) if target.startswith("re:") else target == module:
                return group["weights"]
            if target == "Linear":
                by_class = by_class or group["weights"]
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
    ignored: ClassVar[tuple[str, ...]] = (".weight_shape", ".input_scale", ".weight_g_idx")

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
        scheme, source = weights_scheme(quantization, linear.module), quantization.source
        form = quantization.config.get("format")
        if form not in _FORMATS:
            raise ValueError(
                f"{source}: compressed-tensors format is {form!r}; int32 words can be read as 'pack-quantized' alone"
            )
        if scheme.get("type", "int") != "int" or scheme.get("num_bits") not in (4, 8):
            raise ValueError(
                f"{source}: weights of {linear.module} have type {scheme.get('type')!r} and num_bits "
                f"{scheme.get('num_bits')!r}; int32 words hold type 'int' with 4 or 8 bits"
            )
        strategy = scheme.get("strategy", "group")
        if strategy not in ("group", "channel"):
            raise ValueError(f"{source}: strategy of {linear.module} is {strategy!r}; it must be 'group' or 'channel'")
        size = -1 if strategy == "channel" else scheme.get("group_size")
        return cls(
            scheme["num_bits"],
            group_size_from(source, "compressed-tensors group_size", size),
            bool(scheme.get("symmetric", True)),
            k,
        )

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
        shape = linear.name(".weight_shape")
        if shape in files and linear.expert is None:
            stated = files.read(shape, (2,), ("I64", "I32")).tolist()
            if stated != [n, k]:
                raise files.fault(shape, f"says {stated}; it must be {[n, k]}")
        zeros = None
        if not self.symmetric:
            zeros = linear.read(files, ".weight_zero_point", (-(-n // pf), groups), ("I32",))
        return packed, scale, zeros

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows sorted by group."""
        packed, scale, zeros = tensors
        return decode_compressed_tensors(packed, scale, zeros, order, bits=self.bits, k=self.k)
