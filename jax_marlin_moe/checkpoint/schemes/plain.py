"""Plain bfloat16, float16 and float32 weights, quantised on the way in."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_marlin_moe.arguments import as_dtype
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.schemes.storage import LogicalLinear, Storage
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import E4M3, FLOAT_SCALES, FORMATS, get_format
from jax_marlin_moe.packing import check_group_size
from jax_marlin_moe.quantize import quantize_expert


@dataclasses.dataclass(frozen=True)
class Target:
    """What plain weights become: the arguments of `jax_marlin_moe.quantize` of the same names."""

    weight_format: str
    group_size: int | Literal["customary"] | None = "customary"
    scale_dtype: str | None = None

    @classmethod
    def of(
        cls, quantize: str | None, group_size: int | Literal["customary"] | None, scale_dtype: DTypeLike | None
    ) -> "Target | None":
        """What the arguments of `load_moe_layer` ask for; None where `quantize` is None.

        Args:
            quantize: as for `load_moe_layer`.
            group_size: likewise.
            scale_dtype: likewise.

        Raises:
            TypeError: `scale_dtype` is not a dtype.
            ValueError: `quantize` is not a format, or another argument is given without it.
        """
        scale_name = None if scale_dtype is None else as_dtype("scale_dtype", scale_dtype).name
        if quantize is None:
            for name, value, usual in (("group_size", group_size, "customary"), ("scale_dtype", scale_name, None)):
                if value != usual:
                    raise ValueError(
                        f"{name} is {value!r} and quantize None; it must be omitted: what is quantised keeps what its "
                        "file has, and for plain weights quantize names a format"
                    )
            return None
        if not isinstance(quantize, str) or quantize not in FORMATS:
            raise ValueError(f"quantize is {quantize!r}; it must be None or one of {', '.join(sorted(FORMATS))}")
        return cls(quantize, group_size, scale_name)


@dataclasses.dataclass(frozen=True)
class PlainStorage(Storage):
    """How a plain weight is stored.

    Attributes:
        weight: suffix of the weight.
        transposed: whether it lies as [K, N].
        weight_format: what it becomes.
        group_size: rows of K that will share a scale.
        scale_dtype: of the scales that it will have.
    """

    weight: str
    transposed: bool
    weight_format: str
    group_size: int
    scale_dtype: str
    known_as: ClassVar[str] = "plain weights with quantize="
    stacked: ClassVar[tuple[str, ...]] = ("", ".weight", "_weight")

    @classmethod
    def to(cls, target: Target, files: TensorFolder, linear: Linear, k: int) -> Storage:
        """The storage of a plain linear that becomes `target`."""
        suffix = plain_suffix(files, linear)
        assert suffix is not None
        row = get_format(target.weight_format)
        size = row.customary_group_size if target.group_size == "customary" else target.group_size
        check_group_size("group_size", size, k, row)
        if row.scale != FLOAT_SCALES:
            dtype = "uint8"
        elif target.scale_dtype is not None:
            dtype = jnp.dtype(target.scale_dtype).name
        else:
            stored = {"F16": "float16", "BF16": "bfloat16", "F32": "bfloat16"}[files.info(linear.name(suffix)).dtype]
            dtype = "float32" if row.code == E4M3 else stored
        if dtype not in row.scale_dtypes:
            raise TypeError(f"scale_dtype is {dtype}; format {row.name} takes {' or '.join(row.scale_dtypes)}")
        return cls(suffix, linear.transposed, row.name, size or k, dtype)

    def rows_per_group(self, k: int) -> int:
        """As the target says."""
        return self.group_size

    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """The weight."""
        if get_format(self.weight_format).has_global_scales or self.group_size >= k:
            # Scales follow from all of it, or from all rows of a column.
            linear.refuse_cut(of_rows=not get_format(self.weight_format).has_global_scales)
        weight = read_plain(files, linear, self.weight, k, n)
        if not np.isfinite(weight.astype(np.float32, copy=False)).all():
            raise files.fault(linear.name(self.weight), "holds infinities or NaN; such weights cannot be quantised")
        return (weight,)

    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """Rounds to nearest, rows in the order of the quantised linears beside it."""
        weight = tensors[0] if self.transposed else tensors[0].T
        weight = weight if order is None else weight[order]
        parts = quantize_expert(weight, get_format(self.weight_format), self.group_size, jnp.dtype(self.scale_dtype))
        return LogicalLinear(*parts)


def plain_suffix(files: TensorFolder, linear: Linear) -> str | None:
    """The suffix of a plain float weight, None where the linear has none."""
    for suffix in (".weight", ""):
        if files.dtype(linear.name(suffix)) in FLOATS:
            return suffix
    return None


def read_plain(files: TensorFolder, linear: Linear, suffix: str, k: int, n: int) -> np.ndarray:
    """A view of a plain weight, [n, k], or [k, n] where it lies transposed."""
    if linear.transposed:
        return linear.read(files, suffix, (k, n), FLOATS, columns=1, rows=0)
    return linear.read(files, suffix, (n, k), FLOATS, rows=1)
