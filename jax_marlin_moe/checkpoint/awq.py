"""AutoAWQ checkpoints, version "gemm": 4-bit codes packed along N, integer zero points in every group."""

import dataclasses
from typing import Any

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, group_size_from, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.importers import LogicalLinear, decode_awq

_CODES_PER_WORD = 8


@dataclasses.dataclass(frozen=True)
class AwqStorage(Storage):
    """`group_size` None means one group over K."""

    group_size: int | None
    weight_format: str = "int4_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """AutoAWQ's own key names (`w_bit`, `q_group_size`) count as well."""
        config, source = quantization.config, quantization.source
        by_auto_round = "auto_awq" in str(config.get("packing_format"))
        if linear.name(".qweight") not in files or not (quantization.method == "awq" or by_auto_round):
            return None
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm" and not by_auto_round:
            raise ValueError(
                f"{source}: AWQ version is {version!r}; only 'gemm' files have a layout that can be loaded"
            )
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4:
            raise ValueError(f"{source}: AWQ bits is {bits!r}; it must be 4")
        if not config.get("zero_point", True):
            raise ValueError(f"{source}: AWQ zero_point is false; only files with zero points can be loaded")
        rule = quantization.module_rule(config.get("extra_config"), linear.module)
        size = rule.get("group_size", config.get("group_size", config.get("q_group_size")))
        return cls(group_size_from(source, "AWQ group_size", size))

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Words, zero points and scales."""
        groups, words = number_of_groups(k, self.group_size), n // _CODES_PER_WORD
        qweight = linear.read(files, ".qweight", (k, words), ("I32",), columns=1)
        qzeros = linear.read(files, ".qzeros", (groups, words), ("I32",), columns=1)
        scales = linear.read(files, ".scales", (groups, n), FLOATS, columns=1)
        check_finite(files, linear.name(".scales"), scales)
        return qweight, qzeros, scales

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_awq(*tensors)
