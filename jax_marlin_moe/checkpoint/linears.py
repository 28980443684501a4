"""Where one linear of one expert lies in a checkpoint: in tensors of its own, or as a part of stacked ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_marlin_moe.checkpoint.tensors import TensorFolder


class CannotCutError(Exception):
    """The tensors of a linear have no share of their own for a cut: the whole linear is read, and cut decoded."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """A rank's share of a linear (k, n): its input features, and its output features.

    Attributes:
        rows: the first and the one behind the last, of k.
        columns: likewise, of n.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear of one expert.

    Attributes:
        module: what the names of its tensors begin with.
        expert: its index in tensors that hold all experts, None for tensors of its own.
        num_experts: E, for tensors that hold all experts.
        part: which part of the output features of a fused tensor: 0 gate, 1 up.
        parts: how many linears a fused tensor holds.
        interleaved: whether the parts alternate row by row.
        transposed: whether a plain weight lies as [K, N].
        flat: whether a tensor that holds all experts has them one below the other, in two dimensions.
        cut: what is read of it, None for all.
        size: (k, n), with a cut.
    """

    module: str
    expert: int | None = None
    num_experts: int = 0
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False
    flat: bool = False
    cut: Cut | None = None
    size: tuple[int, int] = (0, 0)

    def name(self, suffix: str) -> str:
        """The name of one of its tensors; the suffix brings its own separator."""
        return self.module + suffix

    def read(
        self,
        files: TensorFolder,
        suffix: str,
        shape: Sequence[int],
        dtypes: Sequence[str],
        *,
        columns: int = 0,
        rows: int | None = None,
    ) -> np.ndarray:
        """A view of this linear's share of a tensor.

        Args:
            files: the checkpoint.
            suffix: of the tensor.
            shape: of the share, before a cut.
            dtypes: safetensors names of the dtypes allowed.
            columns: the axis of the share that follows output features.
            rows: the axis that follows input features, None where none does, as scales of one group.

        Raises:
            CannotCutError: the cut is not between entries of the tensor.
            ValueError: the tensor is missing, or its shape or dtype is another.
        """
        stored = list(shape)
        if self.parts > 1:
            stored[columns] *= self.parts
        if self.expert is not None:
            stored.insert(0, self.num_experts)
        lying = [stored[0] * stored[1], *stored[2:]] if self.flat else stored
        view = files.read(self.name(suffix), lying, dtypes).reshape(stored)
        if self.expert is not None:
            view = view[self.expert]
        if self.parts > 1:
            width = shape[columns]
            cut = (
                slice(self.part, None, self.parts)
                if self.interleaved
                else slice(self.part * width, (self.part + 1) * width)
            )
            view = view[(slice(None),) * columns + (cut,)]
        return self.cut_view(view, columns=columns, rows=rows)

    def cut_view(self, view: np.ndarray, *, columns: int | None, rows: int | None) -> np.ndarray:
        """What the cut leaves of a tensor; axes and errors as for `read`, None where no axis follows."""
        if self.cut is None:
            return view
        for axis, size, ends in ((rows, self.size[0], self.cut.rows), (columns, self.size[1], self.cut.columns)):
            if axis is None or ends == (0, size):
                continue
            length = view.shape[axis]
            if max(size, length) % min(size, length) or any(end * length % size for end in ends):
                raise CannotCutError
            view = view[(slice(None),) * axis + (slice(*(end * length // size for end in ends)),)]
        return view

    def refuse_cut(self, *, of_rows: bool = False) -> None:
        """Raises CannotCutError where there is a cut, or one of rows, for tensors that are read as a whole."""
        if self.cut is not None and (self.cut.rows != (0, self.size[0]) or not of_rows):
            raise CannotCutError
