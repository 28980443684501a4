"""HQQ checkpoints in safetensors: 4- and 8-bit codes with float zero points, groups along K (axis 1)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jax_marlin_moe.arguments import check_array
from jax_marlin_moe.checkpoint.keys import Keys, short
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import TENSORS_SHOW, Method
from jax_marlin_moe.checkpoint.schemes.stacks import pack_stack
from jax_marlin_moe.checkpoint.schemes.storage import (
    LogicalLinear,
    Scheme,
    check_finite,
    number_of_groups,
    shape_of_rank,
)
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import check_group_size, check_stack
from jax_marlin_moe.weights import MarlinWeights

HQQ = Method(
    "hqq",
    read=("quant_config",),
    harmless={"skip_modules": TENSORS_SHOW},
)  # fmt: skip

_QUANT_CONFIG = ("weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta")
_WEIGHT_PARAMS = ("nbits", "group_size", "axis", "channel_wise", "optimize", "round_zero", "view_as_float")
_DTYPES = ("I64", "I32", "I16", "I8", "U8", "F32", "BOOL")


def decode_hqq(w_q: Array, scale: Array, zero: Array, *, bits: int, k: int, n: int) -> LogicalLinear:
    """HQQ, axis 1: rows of a group each; 4 bit packs row r above row r + half in one byte."""
    rows = jnp.concatenate([w_q >> 4, w_q & 15]) if bits == 4 else w_q
    grouped = [array.reshape(n, -1).T for array in (scale, zero)]
    return LogicalLinear(rows.reshape(n, k).T, *grouped)


@dataclasses.dataclass(frozen=True)
class HqqStorage(Scheme):
    """How an HQQ linear is stored.

    Attributes:
        bits: 4 or 8.
        group_size: rows of K that share a scale, None for one group.
        k: input features.
        n: output features.
    """

    bits: int
    group_size: int | None
    k: int
    n: int
    methods: ClassVar[tuple[Method, ...]] = (HQQ,)
    known_as: ClassVar[str] = "HQQ"
    marks: ClassVar[tuple[str, ...]] = (".W_q",)
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
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> Scheme | None:
        """The scalars beside the weight count before the config."""
        if linear.name(".W_q") not in files:
            return None
        params = _weight_params(quantization)

        def setting(name: str, default: Any) -> Any:
            """The scalar beside the weight, which counts before the config."""
            tensor = linear.name(f".{name}")
            if tensor in files:
                return _one_integer(files, tensor)
            reader = params.boolean if isinstance(default, bool) else params.integer
            return reader(name, default, null=True)

        where = f"{files.file_of(linear.name('.W_q'))}: {linear.module}"
        for name in ("quant_scale", "quant_zero", "view_as_float"):
            if setting(name, False):
                raise ValueError(
                    f"{where} has HQQ {name}; it must be false: only float scales and uint8 codes can be loaded"
                )
        axis, bits, size = setting("axis", None), setting("nbits", None), setting("group_size", None)
        if axis != 1:
            raise ValueError(f"{where} has HQQ axis {axis!r}; it must be 1: only axis 1 has groups along K")
        if bits not in (4, 8):
            raise ValueError(f"{where} has HQQ nbits {bits!r}; it must be 4 or 8")
        sizes = get_format(f"int{bits}_fzp").group_sizes
        if size is not None and size != k and (size not in sizes or k % size):
            raise ValueError(f"{where} has HQQ group_size {size}; it must be {k}, or one of {sizes} that divides it")
        size = None if size == k else size
        shape = linear.name(".shape")
        if shape in files:
            stated = files.read(shape, files.info(shape).shape, _DTYPES).tolist()
            if stated != [n, k]:
                raise files.fault(shape, f"says {short(stated)}; it must be {[n, k]}")
        return cls(bits, size, k, n)

    @classmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """As the tensor `shape` says: rows of `W_q` are groups of any output feature."""
        if linear.name(".W_q") not in files:
            return None
        name = linear.name(".shape")
        if shape_of_rank(files, name, 1, *_DTYPES) != (2,):
            raise ValueError(f"{files.folder} has no tensor {name} of shape (2,), which alone tells the size")
        n, k = files.read(name, (2,), _DTYPES).tolist()
        return int(k), int(n)

    def rows_per_group(self, k: int) -> int:
        """As the file says."""
        return self.group_size or k

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """Codes, scales and zero points."""
        linear.refuse_cut()  # rows of W_q are groups of any output feature, and codes of two of them share a byte
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


def from_hqq(
    w_q: UInt8[Array, "experts rows cols"],
    scale: Float[Array, "experts ..."],
    zero: Float[Array, "experts ..."],
    *,
    shape: tuple[int, int],
    group_size: int | None,
    bits: int = 4,
) -> MarlinWeights:
    """Packs HQQ tensors (axis 1), experts stacked in front; `(q - zero) * scale` with float zero points, exact.

    The format is "int4_fzp" or "int8_fzp".

    Args:
        w_q: `W_q`, bytes of two codes (`4bit_u8`) or one (8 bit).
        scale: float16, bfloat16 or float32, one per group.
        zero: zero points in the dtype of the scales.
        shape: (N, K) of the linear, the tensor `shape`.
        group_size: rows of K under one scale; None means K.
        bits: 4 or 8.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes disagree, or the format has no such groups.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; it must be 4 or 8")
    row = get_format(f"int{bits}_fzp")
    n, k = shape
    check_group_size("group_size", group_size, k, row)
    size = group_size or k
    if k % size:
        raise ValueError(f"group_size is {size}; HQQ groups must divide K = {k}")
    check_array("w_q", w_q, ndim=3, dtype=jnp.uint8)
    experts, groups = w_q.shape[0], k // size
    check_stack("w_q", (experts, w_q[0].size), (experts, n * k * bits // 8))
    for name, value in (("scale", scale), ("zero", zero)):
        if jnp.dtype(value.dtype).name not in row.scale_dtypes or value.dtype != scale.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype}; it must be {' or '.join(row.scale_dtypes)}, both the same"
            )
        check_stack(name, (value.shape[0], value[0].size), (experts, n * groups))
    return pack_stack(decode_hqq, (w_q, scale, zero), row, k, n, size, options={"bits": bits, "k": k, "n": n})


def _weight_params(quantization: Quantization) -> Keys:
    """What the config says of weights; raises ValueError on keys that the loader does not know."""
    empty = Keys({}, quantization.source)
    outer = quantization.keys.object("quant_config", empty, null=True)
    for name in outer.values:
        if name in ("scale_quant_params", "zero_quant_params") and outer.values[name]:
            raise outer.fault(name, "null", ": HQQ scales and zeros must be floats, not quantised themselves")
        if name not in _QUANT_CONFIG:
            raise outer.fault(name, "omitted", ": the loader does not know this key")
    params = outer.object("weight_quant_params", empty, null=True)
    for name in params.values:
        if name not in _WEIGHT_PARAMS:
            raise params.fault(name, "omitted", ": the loader does not know this key")
    return params


def _one_integer(files: TensorFolder, name: str) -> int:
    """The value of a tensor of one number; raises ValueError unless it is an integer of 32 bits."""
    value = files.read(name, files.info(name).shape, _DTYPES)
    number = float(value.reshape(-1)[0]) if value.size == 1 else np.nan
    if not np.isfinite(number) or number != int(number) or abs(number) > 2**31:
        raise files.fault(name, f"is {short(value.tolist())}; it must be one integer")
    return int(number)
