"""FP8 checkpoints: e4m3 codes with scales of blocks, channels or the tensor, and MXFP8."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.stated import Assumed, check_stated
from jax_marlin_moe.checkpoint.storage import Storage
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.importers import (
    FP8_BLOCK,
    LogicalLinear,
    bad_block_scales,
    bad_float_scales,
    decode_fp8,
    decode_mxfp8,
    fp8_scale_shapes,
    fp8_scale_shapes_in_words,
    has_nan_codes,
)

_SCALES = (".weight_scale_inv", ".weight_scale", ".scale")

_FP8 = Assumed(
    8, (None, FP8_BLOCK), ("FP8", "FP8_PB_WO", "FP8_PB_REAL", "FP8_PER_CHANNEL_PER_TOKEN"),
    ("tensor", "channel", "group", "block"), block=(FP8_BLOCK, FP8_BLOCK),
)  # fmt: skip
_MXFP8 = Assumed(8, (32,), ("MXFP8",), ("group",), scale_bits=(8, 0))


@dataclasses.dataclass(frozen=True)
class Fp8Storage(Storage):
    """How an FP8 linear is stored.

    Attributes:
        scale: suffix of the scales, multipliers whatever their name.
        weight_format: "fp8" or "mxfp8".
        groups: scales along K.
    """

    scale: str
    weight_format: str
    groups: int
    ignored: ClassVar[tuple[str, ...]] = (".input_scale",)

    @classmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Storage | None:
        """Known by e4m3 codes; the shape of the scales tells the rest."""
        name = linear.name(".weight")
        if files.dtype(name) != "F8_E4M3":
            return None
        block = quantization.config.get("weight_block_size")
        if block is not None and repr(block) != repr([FP8_BLOCK, FP8_BLOCK]):  # [128.0, 128] is none, nor is true
            raise quantization.keys.fault("weight_block_size", "[128, 128]")
        quantization.keys.choice("activation_scheme", ("dynamic", "static"), None, null=True)
        quantization.keys.choice("scale_fmt", ("ue8m0",), None, null=True)
        for suffix in _SCALES:
            if linear.name(suffix) in files:
                found = files.info(linear.name(suffix))
                micro = found.dtype in ("U8", "F8_E8M0") and found.shape == (n, -(-k // 32))
                check_stated(files, linear, suffix, quantization, _MXFP8 if micro else _FP8)
                groups = found.shape[1] if len(found.shape) == 2 else 1
                return cls(suffix, "mxfp8" if micro else "fp8", groups)
        raise files.fault(
            name, f"has no scales; one of {', '.join(linear.name(suffix) for suffix in _SCALES)} must exist"
        )

    def rows_per_group(self, k: int) -> int:
        """Fixed by the format, where the scales follow K."""
        if self.weight_format == "mxfp8":
            return 32
        return FP8_BLOCK if self.groups > 1 else k

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Codes and scales; e8m0 scales as bits."""
        weight = linear.read(files, ".weight", (n, k), ("F8_E4M3",))
        if has_nan_codes(weight):
            raise files.fault(linear.name(".weight"), "holds NaN (e4m3 0x7F or 0xFF)")
        name = linear.name(self.scale)
        shape = files.info(name).shape
        if self.weight_format == "fp8" and shape not in fp8_scale_shapes(k, n):
            raise files.fault(name, f"has shape {shape}; it must be {fp8_scale_shapes_in_words(k, n)}")
        scale = files.read(name, shape, (*FLOATS, "F8_E8M0", "U8"))
        if scale.dtype != np.uint8:
            if fault := bad_float_scales(scale):
                raise files.fault(name, f"holds {fault}")
        elif fault := bad_block_scales(scale, exponent=True):
            raise files.fault(name, f"holds {fault}; every scale must be a number")
        return weight, scale

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rows have no order of their own."""
        return decode_fp8(*tensors) if self.weight_format == "fp8" else decode_mxfp8(*tensors)
