"""AutoAWQ checkpoints, version "gemm": 4-bit codes packed along N, integer zero points in every group."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization, group_size_from
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.importers import LogicalLinear, decode_awq, zeros_are_baked

_CODES_PER_WORD = 8


@dataclasses.dataclass(frozen=True)
class AwqStorage(Storage):
    """How an AWQ linear is stored.

    Attributes:
        group_size: rows of K that share a scale, None for one group.
        symmetric: whether the config promises that all zero points are 8; files may then lack them.
        baked: whether all zero points of the matrix are 8.
    """

    group_size: int | None
    symmetric: bool = False
    baked: bool = False

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where they differ."""
        return "int4" if self.baked else "int4_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """AutoAWQ's own key names (`w_bit`, `q_group_size`) count as well."""
        by_auto_round = "auto_awq" in str(quantization.config.get("packing_format"))
        if linear.name(".qweight") not in files or not (quantization.method == "awq" or by_auto_round):
            return None
        if not by_auto_round:
            version = quantization.keys.text("version", "gemm").lower()
            if version != "gemm":
                raise quantization.keys.fault("version", "'gemm'", ": no other layout can be loaded")
        rule = quantization.module_rule(linear.module, "extra_config")
        keys = Keys({**quantization.config, **rule}, quantization.source)
        bits = "bits" if "bits" in keys else "w_bit"
        if keys.integer(bits) != 4:
            raise keys.fault(bits, f"4 for {linear.module}")
        keys.choice("data_type", ["int"], None)
        size = "group_size" if "group_size" in keys else "q_group_size"
        symmetric = not keys.boolean("zero_point", True)
        sizes = get_format("int4" if symmetric else "int4_zp").group_sizes
        return cls(group_size_from(keys, size, k=k, sizes=sizes), symmetric=symmetric)

    def rows_per_group(self, k: int) -> int:
        """As the config says."""
        return self.group_size or k

    def of_matrix(self, files: TensorFolder, linears: Sequence[Linear], k: int, n: int) -> Storage:
        """Zero points need no storage where all of the matrix are 8."""
        baked = True
        for linear in linears:
            if self.symmetric and linear.name(".qzeros") not in files:
                continue
            of_linear = zeros_are_baked(self._zeros(files, linear, k, n), 4)
            if self.symmetric and not of_linear:
                raise files.fault(linear.name(".qzeros"), "holds zero points other than 8; zero_point is false")
            baked = baked and of_linear
            files.drop_pages()
        return dataclasses.replace(self, baked=baked)

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Words, zero points (None where baked in) and scales."""
        groups, words = number_of_groups(k, self.group_size), n // _CODES_PER_WORD
        qweight = linear.read(files, ".qweight", (k, words), ("I32",), columns=1)
        scales = linear.read(files, ".scales", (groups, n), FLOATS, columns=1)
        check_finite(files, linear.name(".scales"), scales)
        return qweight, None if self.baked else self._zeros(files, linear, k, n), scales

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_awq(*tensors)

    def _zeros(self, files: TensorFolder, linear: Linear, k: int, n: int) -> np.ndarray:
        groups, words = number_of_groups(k, self.group_size), n // _CODES_PER_WORD
        return linear.read(files, ".qzeros", (groups, words), ("I32",), columns=1)
