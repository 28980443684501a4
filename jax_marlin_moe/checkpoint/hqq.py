"""HQQ checkpoints in safetensors: 4- and 8-bit codes with float zero points, groups along K (axis 1)."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.storage import Storage, check_finite, number_of_groups
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.importers import LogicalLinear, decode_hqq

_DTYPES = ("I64", "I32", "I16", "I8", "U8", "F32", "BOOL")


@dataclasses.dataclass(frozen=True)
class HqqStorage(Storage):
    """How an HQQ linear (k, n) is stored: `bits` 4 or 8, `group_size` rows of K under one scale, None for K."""

    bits: int
    group_size: int | None
    k: int
    n: int
    ignored: ClassVar[tuple[str, ...]] = tuple(
        f".{name}"
        for name in (
            "nbits", "group_size", "axis", "shape", "packing", "view_as_float", "unpack_view_dtype", "compute_dtype",
            "channel_wise", "optimize", "round_zero", "stores_quant_config", "encoded_state_dict", "offload_meta",
            "quant_scale", "quant_zero",
        )
    )  # fmt: skip

    @property
    def weight_format(self) -> str:  # type: ignore[override]
        """Zero points are floats."""
        return f"int{self.bits}_fzp"

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """The scalars beside the weight count before the config."""
        if linear.name(".W_q") not in files:
            return None
        config = quantization.config.get("quant_config") or {}
        weights = config.get("weight_quant_params") or {}

        def setting(name: str) -> Any:
            tensor = linear.name(f".{name}")
            if tensor not in files:
                return weights.get(name)
            values = files.read(tensor, files.info(tensor).shape, _DTYPES).reshape(-1).tolist()
            return values[0] if len(values) == 1 else values

        where = f"{files.file_of(linear.name('.W_q'))}: {linear.module}"
        if config.get("scale_quant_params") or config.get("zero_quant_params"):
            raise ValueError(
                f"{quantization.source}: HQQ scales or zeros are quantised themselves; they must be floats"
            )
        if setting("axis") not in (1, 1.0):
            raise ValueError(f"{where} has HQQ axis {setting('axis')!r}; only axis 1 has groups along K")
        bits, size = setting("nbits"), setting("group_size")
        if bits not in (4, 8):
            raise ValueError(f"{where} has HQQ nbits {bits!r}; it must be 4 or 8")
        if setting("view_as_float"):
            raise ValueError(f"{where} has HQQ view_as_float; only uint8 codes can be loaded")
        if size is not None and (int(size) < 1 or k % int(size)):
            raise ValueError(f"{where} has HQQ group_size {size}; it must divide K = {k}")
        size = None if size is None or int(size) == k else int(size)
        stated = setting("shape")
        if stated is not None and list(stated) != [n, k]:
            raise files.fault(linear.name(".shape"), f"says {stated}; it must be {[n, k]}")
        return cls(int(bits), size, k, n)

    def rows_per_group(self, k: int) -> int:
        """As the file says."""
        return self.group_size or k

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Codes, scales and zero points."""
        groups = number_of_groups(k, self.group_size)
        rows = n * groups
        size = self.group_size or k
        w_q = linear.read(files, ".W_q", (rows * self.bits // 8, size), ("U8",))
        scale, zero = (linear.read(files, suffix, (rows, 1), FLOATS) for suffix in (".scale", ".zero"))
        for suffix, values in ((".scale", scale), (".zero", zero)):
            check_finite(files, linear.name(suffix), values)
        if zero.dtype != scale.dtype:
            raise files.fault(linear.name(".zero"), f"has dtype {zero.dtype}; it must be {scale.dtype}, as the scale")
        return w_q, scale, zero

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_hqq(*tensors, bits=self.bits, k=self.k, n=self.n)
