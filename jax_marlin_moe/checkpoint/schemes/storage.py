"""The interface of a quantisation scheme: how the tensors of one linear are read, checked and decoded."""

import abc
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped, UInt8

from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.quantization import Quantization
from jax_marlin_moe.checkpoint.quantization_keys import Method
from jax_marlin_moe.checkpoint.tensors import FLOATS, TensorFolder
from jax_marlin_moe.formats import get_format


class LogicalLinear(NamedTuple):
    """One linear (K, N) in logical order; what `jax_marlin_moe.packing.pack_expert` takes."""

    codes: UInt8[Array, "K N"]
    scales: Shaped[Array, "groups N"]
    zeros: Shaped[Array, "groups N"] | None = None
    global_scale: Float32[Array, ""] | None = None

    def cut(self, rows: tuple[int, int], columns: tuple[int, int], group_size: int) -> "LogicalLinear":
        """A share: whole groups of rows, and columns."""
        groups = slice(None) if self.scales.shape[0] == 1 else slice(rows[0] // group_size, -(-rows[1] // group_size))
        zeros = None if self.zeros is None else self.zeros[groups, slice(*columns)]
        codes, scales = self.codes[slice(*rows), slice(*columns)], self.scales[groups, slice(*columns)]
        return self._replace(codes=codes, scales=scales, zeros=zeros)

    def columns(self, order: Int32[Array, " N"]) -> "LogicalLinear":
        """The same with columns taken in another order."""
        zeros = None if self.zeros is None else self.zeros[:, order]
        return self._replace(codes=self.codes[:, order], scales=self.scales[:, order], zeros=zeros)


class Storage(abc.ABC):
    """How one linear is stored. Hashable: linears with equal storages share a compiled decoder.

    Attributes:
        known_as: what it is called where an error lists what the loader knows.
        stacked: suffixes of the first tensor, where one holds all experts.
        weight_format: name of the format that decoding gives.
        ignored: suffixes of tensors that do not matter to weight-only results: scales of activations, which the tools
            round; `fixes_input_scale` tells where ours may be rounded by them.
    """

    known_as: ClassVar[str]
    stacked: ClassVar[tuple[str, ...]] = ()
    weight_format: str
    ignored: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def rows_per_group(self, k: int) -> int:
        """Rows of K that share a scale; k where one scale covers all of them."""

    def cut_to(self, k: int, n: int) -> "Storage":
        """The storage of a share (k, n) of the linear, for `decode`."""
        return self

    def of_matrix(self, files: TensorFolder, linears: Sequence[Linear], k: int, n: int) -> "Storage":
        """The storage that all linears of a matrix share; may look at their small tensors."""
        return self

    def row_order(self, files: TensorFolder, linear: Linear, k: int) -> np.ndarray | None:
        """The order of the rows in their groups, int32 [k]; None for ascending."""
        return None

    def fixes_input_scale(self, linear: Linear, quantization: Quantization) -> bool:
        """Whether `input_scale` of the linear, if there is one, is that of rows in e4m3."""
        return False

    @abc.abstractmethod
    def read(self, files: TensorFolder, linear: Linear, k: int, n: int) -> tuple[np.ndarray | None, ...]:
        """The arguments of `decode`, shapes, dtypes and values checked."""

    @abc.abstractmethod
    def decode(self, order: Any, *tensors: Any) -> LogicalLinear:
        """The logical linear, rows in `order`; traced by JAX."""


class Scheme(Storage):
    """A storage that is recognised by its tensors.

    Attributes:
        methods: the values of `quant_method` that are this scheme's, each with its keys.
        marks: suffixes of tensors whose presence shows that a linear may be stored so.
        broken: suffixes, after the module of all experts, of tensors that a tool is known to have written wrongly; each
            with the text of the error.
    """

    methods: ClassVar[tuple[Method, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()
    broken: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @classmethod
    @abc.abstractmethod
    def find(cls, files: TensorFolder, linear: Linear, k: int, n: int, quantization: Quantization) -> "Scheme | None":
        """The storage of a linear (k, n), from the tensors that exist; None where it is of another scheme.

        Raises:
            ValueError: it is of this scheme, in a variant that is not supported.
        """

    @classmethod
    @abc.abstractmethod
    def size(cls, files: TensorFolder, linear: Linear, quantization: Quantization) -> tuple[int, int] | None:
        """(k, n) of a linear with tensors of its own, provided that `find` then recognises it as of this scheme.

        None where there are no tensors of such names, dtypes and ranks.
        """


def shape_of_rank(files: TensorFolder, name: str, rank: int, *dtypes: str) -> tuple[int, ...] | None:
    """The shape of a tensor; None where there is none, or one of another rank or dtype."""
    if files.dtype(name) not in dtypes:
        return None
    shape = files.info(name).shape
    return shape if len(shape) == rank else None


def check_finite(files: TensorFolder, name: str, values: np.ndarray) -> None:
    """Raises ValueError, naming file and tensor, where there are infinities or NaN."""
    if not np.isfinite(values.astype(np.float32, copy=False)).all():
        raise files.fault(name, "holds infinities or NaN; every scale must be finite")


def read_float_scales(files: TensorFolder, linear: Linear, suffix: str, n: int, groups: int) -> np.ndarray:
    """Float scales [n, groups] of a linear.

    Raises:
        ValueError: their shape or dtype is another, or some are not finite; names file and tensor.
    """
    scales = linear.read(files, suffix, (n, groups), FLOATS, rows=1 if groups > 1 else None)
    check_finite(files, linear.name(suffix), scales)
    return scales


def number_of_groups(k: int, group_size: int | None) -> int:
    """Groups over k rows; None or -1 is one."""
    return 1 if group_size in (None, -1) else -(-k // group_size)


def int4_group_size(files: TensorFolder, name: str, k: int, n: int) -> int:
    """Rows of K that share a scale in a linear (k, n) of format "int4", from the shape of its scales, (n, groups).

    Raises:
        ValueError: the shape is another, or the format has no such groups; names file and tensor.
    """
    shape = files.info(name).shape
    if len(shape) != 2 or not shape[1] or k % shape[1]:
        raise files.fault(name, f"has shape {shape}; it must be ({n}, groups), groups that divide K = {k}")
    size, sizes = k // shape[1], get_format("int4").group_sizes
    if size not in (k, *sizes):
        allowed = ", ".join(map(str, sizes))
        raise files.fault(name, f"has {shape[1]} groups of {size} rows; groups must have {allowed} or all {k}")
    return size


def check_shape(files: TensorFolder, linear: Linear, k: int, n: int) -> None:
    """Raises ValueError where compressed-tensors' `weight_shape` of a linear says something else than (k, n)."""
    name = linear.name(".weight_shape")
    if name in files and linear.expert is None:
        stated = files.read(name, (2,), ("I64", "I32")).tolist()
        if stated != [n, k]:
            raise files.fault(name, f"says {stated}; it must be {[n, k]}")
