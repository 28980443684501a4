"""GPTQ checkpoints, v1 and v2, 4 and 8 bit, with or without act-order: codes packed along K."""

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
from jax_marlin_moe.importers import (
    LogicalLinear,
    check_gptq_zeros,
    decode_gptq,
    row_order,
    zeros_are_baked,
)


@dataclasses.dataclass(frozen=True)
class GptqStorage(Storage):
    """How a GPTQ linear is stored.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share a scale, None for one group.
        less_one: whether zero points are stored less one (v1).
        desc_act: whether groups follow the activations: `g_idx` must then be there.
        symmetric: whether the config promises that all zero points are the middle code.
        baked: whether they are.
    """

    bits: int
    group_size: int | None
    less_one: bool
    desc_act: bool
    symmetric: bool
    baked: bool = False

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where they differ."""
        return f"int{self.bits}" if self.baked else f"int{self.bits}_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """`dynamic` rules override width and group size module by module."""
        packing = str(quantization.config.get("packing_format", "auto_round:auto_gptq"))
        by_auto_round = quantization.method == "auto-round" and "auto_awq" not in packing
        if linear.name(".qweight") not in files or not (quantization.method == "gptq" or by_auto_round):
            return None
        if by_auto_round and packing not in ("auto_round:auto_gptq", "auto_gptq", "auto_round:gptq"):
            raise quantization.keys.fault("packing_format", "'auto_round:auto_gptq' or 'auto_round:auto_awq'")
        rule = quantization.module_rule(linear.module, "dynamic", "extra_config")
        keys = Keys({**quantization.config, **rule}, quantization.source)
        if keys.integer("bits") not in (4, 8):
            raise keys.fault("bits", f"4 or 8 for {linear.module}")
        keys.choice("data_type", ["int"], None)
        keys.choice("pack_dtype", ["int32"], None)
        if keys.boolean("is_marlin_format", False, null=True):
            raise keys.fault("is_marlin_format", "false", ": only unpermuted GPTQ files can be loaded")
        name = "checkpoint_format" if "checkpoint_format" in keys else "format"
        variant = "gptq" if by_auto_round else keys.text(name, "gptq", null=True)
        if variant not in ("gptq", "gptq_v2"):
            raise keys.fault(name, "'gptq' or 'gptq_v2'", " (planar 'gptq_p' and Marlin files have other layouts)")
        bits = keys.integer("bits")
        return cls(
            bits=bits,
            group_size=group_size_from(keys, "group_size", k=k, sizes=get_format(f"int{bits}").group_sizes),
            less_one=variant == "gptq",
            desc_act=keys.boolean("desc_act", False, null=True),
            symmetric=keys.boolean("sym", False, null=True),
        )

    def rows_per_group(self, k: int) -> int:
        """As the config says."""
        return self.group_size or k

    def of_matrix(self, files: TensorFolder, linears: Sequence[Linear], k: int, n: int) -> Storage:
        """Zero points need no storage where all of the matrix are the middle code."""
        baked = True
        for linear in linears:
            qzeros = self._zeros(files, linear, k, n)
            try:
                check_gptq_zeros(qzeros, self.bits, self.less_one)
            except ValueError as error:
                raise files.fault(linear.name(".qzeros"), f"cannot be used: {error}") from None
            of_linear = zeros_are_baked(qzeros, self.bits, less_one=self.less_one)
            if self.symmetric and not of_linear:
                raise files.fault(
                    linear.name(".qzeros"),
                    f"holds zero points other than {2 ** (self.bits - 1)}; sym is true in the config, whose "
                    "checkpoint_format may be another than that of the file",
                )
            baked = baked and of_linear
            files.drop_pages()
        return dataclasses.replace(self, baked=baked)

    def row_order(self, files: TensorFolder, linear: Linear, k: int) -> np.ndarray | None:
        """From `g_idx`, where the file has it."""
        name = linear.name(".g_idx")
        if name not in files and not self.desc_act:
            return None
        index = linear.read(files, ".g_idx", (k,), ("I32",))
        try:
            return row_order(index, self.group_size or k)
        except ValueError as error:
            raise files.fault(name, f"cannot be used: {error}") from None

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Words, zero points (None where baked in) and scales."""
        groups = number_of_groups(k, self.group_size)
        qweight = linear.read(files, ".qweight", (k * self.bits // 32, n), ("I32",), columns=1)
        scales = linear.read(files, ".scales", (groups, n), FLOATS, columns=1)
        check_finite(files, linear.name(".scales"), scales)
        return qweight, None if self.baked else self._zeros(files, linear, k, n), scales

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows sorted by group."""
        qweight, qzeros, scales = tensors
        return decode_gptq(qweight, qzeros, scales, order, bits=self.bits, stored_less_one=self.less_one)

    def _zeros(self, files: TensorFolder, linear: Linear, k: int, n: int) -> np.ndarray:
        groups = number_of_groups(k, self.group_size)
        return linear.read(files, ".qzeros", (groups, n * self.bits // 32), ("I32",), columns=1)
