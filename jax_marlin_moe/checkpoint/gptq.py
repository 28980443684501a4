"""GPTQ checkpoints, v1 and v2, 4 and 8 bit, with or without act-order: codes packed along K."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, group_size_from, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
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
        baked: whether all zero points of the matrix are the middle code.
    """

    bits: int
    group_size: int | None
    less_one: bool
    desc_act: bool
    baked: bool = False
    ignored: ClassVar[tuple[str, ...]] = (".g_idx",)

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are stored where they differ."""
        return f"int{self.bits}" if self.baked else f"int{self.bits}_zp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """`dynamic` rules override width and group size module by module."""
        config, source = quantization.config, quantization.source
        by_auto_round = quantization.method == "auto-round" and "auto_awq" not in str(config.get("packing_format"))
        if linear.name(".qweight") not in files or not (quantization.method == "gptq" or by_auto_round):
            return None
        packing = str(config.get("packing_format", "auto_round:auto_gptq"))
        if by_auto_round and packing not in ("auto_round:auto_gptq", "auto_gptq", "auto_round:gptq"):
            raise ValueError(
                f"{source}: packing_format is {packing!r}; it must be 'auto_round:auto_gptq' or 'auto_round:auto_awq'"
            )
        rule = quantization.module_rule(config.get("dynamic") or config.get("extra_config"), linear.module)
        merged = {**config, **rule}
        if merged.get("bits") not in (4, 8):
            raise ValueError(f"{source}: GPTQ bits is {merged.get('bits')!r} for {linear.module}; it must be 4 or 8")
        if merged.get("pack_dtype", "int32") != "int32":
            raise ValueError(f"{source}: GPTQ pack_dtype is {merged['pack_dtype']!r}; it must be 'int32'")
        if merged.get("is_marlin_format"):
            raise ValueError(f"{source}: is_marlin_format is true; only unpermuted GPTQ files can be loaded")
        variant = merged.get("checkpoint_format", merged.get("format", "gptq"))
        if by_auto_round:
            variant = "gptq"
        if variant not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"{source}: GPTQ checkpoint_format is {variant!r}; it must be 'gptq' or 'gptq_v2' (planar 'gptq_p' and "
                "Marlin files have other layouts)"
            )
        return cls(
            bits=merged["bits"],
            group_size=group_size_from(source, "GPTQ group_size", merged.get("group_size")),
            less_one=variant == "gptq",
            desc_act=bool(merged.get("desc_act", False)),
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
            baked = baked and zeros_are_baked(qzeros, self.bits, less_one=self.less_one)
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
