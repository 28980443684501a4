"""The interface of a quantisation scheme: how the tensors of one linear are read, checked and decoded."""

import abc
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization_config import Quantization
from jax_marlin_moe.checkpoint.tensors import TensorFolder
from jax_marlin_moe.importers import LogicalLinear


class Storage(abc.ABC):
    """How one linear is stored. Hashable: linears with equal storages share a compiled decoder.

    Attributes:
        weight_format: name of the format that decoding gives.
        ignored: suffixes of tensors that the scheme knows and has no use for.
    """

    weight_format: str
    ignored: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> "Storage | None":
        """The storage of a linear (k, n), from the tensors that exist; None where it is of another scheme.

        Raises:
            ValueError: it is of this scheme, in a variant that is not supported.
        """

    @abc.abstractmethod
    def rows_per_group(self, k: int) -> int:
        """Rows of K that share a scale; k where one scale covers all of them."""

    def of_matrix(self, files: TensorFolder, linears: Sequence[Linear], k: int, n: int) -> "Storage":
        """The storage that all linears of a matrix share; may look at their small tensors."""
        return self

    def row_order(self, files: TensorFolder, linear: Linear, k: int) -> np.ndarray | None:
        """The order in which rows stand in groups, int32 [k]; None for ascending."""
        return None

    @abc.abstractmethod
    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """The arguments of `decode`, shapes, dtypes and values checked."""

    @abc.abstractmethod
    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """The logical linear, rows in `order`; traced by JAX."""


def check_finite(files: TensorFolder, name: str, values: np.ndarray) -> None:
    """Raises ValueError, naming file and tensor, where there are infinities or NaN."""
    if not np.isfinite(values.astype(np.float32, copy=False)).all():
        raise files.fault(name, "holds infinities or NaN; every scale must be finite")


def number_of_groups(k: int, group_size: int | None) -> int:
    """Groups over k rows; None or -1 is one."""
    return 1 if group_size in (None, -1) else -(-k // group_size)


def group_size_from(source: pathlib.Path, what: str, value: object) -> int | None:
    """A group size of a config: None for one group; raises ValueError, naming the file, where it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise ValueError(f"{source}: {what} is {value!r}; it must be a positive integer, or -1 for one group")
    return None if value == -1 else value
