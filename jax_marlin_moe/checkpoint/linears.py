"""Where one linear of one expert lies in a checkpoint: in tensors of its own, or as a part of stacked ones."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jax_marlin_moe.checkpoint.tensors import TensorFolder


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
    """

    module: str
    expert: int | None = None
    num_experts: int = 0
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False
    flat: bool = False

    def name(self, suffix: str) -> str:
        """The name of one of its tensors; the suffix brings its own separator."""
        return self.module + suffix

    def read(
        self, files: TensorFolder, suffix: str, shape: Sequence[int], dtypes: Sequence[str], *, columns: int = 0
    ) -> np.ndarray:
        """A view of this linear's share of a tensor.

        Args:
            files: the checkpoint.
            suffix: of the tensor.
            shape: of the share.
            dtypes: safetensors names of the dtypes allowed.
            columns: the axis of the share that follows output features.

        Raises:
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
        return view
