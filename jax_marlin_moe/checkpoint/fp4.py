"""FP4 checkpoints: NVFP4 of compressed-tensors and ModelOpt; MXFP4 of compressed-tensors, gpt-oss and DeepSeek-V4."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.stated import Assumed, check_stated
from jax_marlin_moe.checkpoint.storage import Storage, check_shape
from jax_marlin_moe.checkpoint.tensors import TensorFolder
from jax_marlin_moe.importers import LogicalLinear, bad_block_scales, decode_fp4, is_zero_fp4

_NVFP4 = Assumed(4, (16,), ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"), ("tensor_group", "group"), scale_bits=(4, 3))
_MXFP4 = Assumed(4, (32,), ("MXFP4", "W4A16_MXFP4"), ("group",), scale_bits=(8, 0))


@dataclasses.dataclass(frozen=True)
class Nvfp4Storage(Storage):
    """How an NVFP4 linear is stored.

    Attributes:
        weight: suffix of the bytes.
        global_scale: suffix of the float32 scale of the linear.
        divides: whether that is a divisor.
    """

    weight: str
    global_scale: str
    divides: bool
    weight_format: str = "nvfp4"
    ignored: ClassVar[tuple[str, ...]] = (".input_scale", ".input_global_scale")

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """Known by bytes with e4m3 block scales."""
        if files.dtype(linear.name(".weight_packed")) == "U8":
            files.file_of(linear.name(".weight_scale"))  # without it nothing tells NVFP4 from MXFP4
        if files.dtype(linear.name(".weight_scale")) != "F8_E4M3":
            return None
        if files.dtype(linear.name(".weight_packed")) == "U8":
            check_stated(files, linear, ".weight_scale", quantization, _NVFP4)
            return cls(".weight_packed", ".weight_global_scale", divides=True)
        if files.dtype(linear.name(".weight")) == "U8":
            check_stated(files, linear, ".weight_scale", quantization, _NVFP4)
            return cls(".weight", ".weight_scale_2", divides=False)
        return None

    def rows_per_group(self, k: int) -> int:
        """Fixed by the format."""
        return 16

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Bytes, block scales as bits, and the factor of the linear."""
        check_shape(files, linear, k, n)
        weight = linear.read(files, self.weight, (n, -(-k // 2)), ("U8",))
        scale = linear.read(files, ".weight_scale", (n, -(-k // 16)), ("F8_E4M3",))
        _check_block_scales(files, linear.name(".weight_scale"), scale, exponent=False)
        name = linear.name(self.global_scale)
        files.file_of(name)
        shape = files.info(name).shape
        if shape not in ((), (1,)):
            raise files.fault(name, f"has shape {shape}; it must be () or (1,)")
        value = np.float32(files.read(name, shape, ("F32",)).reshape(()))
        if value == 0 and (not self.divides or is_zero_fp4(weight, scale)):
            return weight, scale, np.asarray(np.float32(0))  # an expert that no token ever reached
        with np.errstate(all="ignore"):
            factor = np.float32(1) / value if self.divides else value
        if not (np.isfinite(value) and np.isfinite(factor) and value > 0):
            inverse = ", and so must its inverse" if self.divides else ""
            raise files.fault(name, f"is {value}; a global scale must be positive and finite{inverse}")
        return weight, scale, np.asarray(factor)

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_fp4(*tensors)


@dataclasses.dataclass(frozen=True)
class Mxfp4Storage(Storage):
    """How an MXFP4 linear is stored.

    Attributes:
        weight: suffix of the bytes.
        scale: suffix of the e8m0 scales.
        blocked: whether the bytes lie in blocks, [n, k / 32, 16].
    """

    weight: str
    scale: str
    blocked: bool = False
    weight_format: str = "mxfp4"
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """Known by bytes with e8m0 scales."""
        for weight, scale in (("_blocks", "_scales"), ("_weight.blocks", "_weight.scales")):
            if linear.name(weight) in files:
                check_stated(files, linear, scale, quantization, _MXFP4)
                return cls(weight, scale, blocked=True)
        for weight, scale in ((".weight_packed", ".weight_scale"), (".weight", ".scale"), (".weight", ".weight_scale")):
            found = files.dtype(linear.name(weight)), files.dtype(linear.name(scale))
            if found[0] in ("U8", "I8") and found[1] in ("U8", "F8_E8M0"):
                check_stated(files, linear, scale, quantization, _MXFP4)
                return cls(weight, scale)
        return None

    def rows_per_group(self, k: int) -> int:
        """Fixed by the format."""
        return 32

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Bytes and scales as bits."""
        check_shape(files, linear, k, n)
        shape = (n, -(-k // 32), 16) if self.blocked else (n, -(-k // 2))
        weight = linear.read(files, self.weight, shape, ("U8", "I8")).view(np.uint8).reshape(n, -1)
        scale = linear.read(files, self.scale, (n, -(-k // 32)), ("U8", "F8_E8M0"))
        _check_block_scales(files, linear.name(self.scale), scale, exponent=True)
        return weight, scale

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_fp4(*tensors)


def _check_block_scales(files: TensorFolder, name: str, scale: np.ndarray, *, exponent: bool) -> None:
    fault = bad_block_scales(scale, exponent=exponent)
    if fault:
        raise files.fault(name, f"holds {fault}; every block scale must be a number that is not negative")
