"""What becomes of a product's sums. Twin of csrc/cuda/epilogue.cuh, activations.cuh and intermediate.cuh."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Bound, Facts, Pointer, optional
from jax_marlin_moe.intermediate import KINDS


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of a product's sums: a type of csrc/cuda/epilogue.cuh.

    Attributes:
        cpp: the C++ template.
        facts: that it is compiled with.
        pointers: of its members.
    """

    cpp: str
    facts: Facts
    pointers: Mapping[str, Bound]


def activation_type(activation: Activation) -> str:
    """The C++ spelling; parameters as the bits of float32 values. Raises ValueError where there is no such kernel."""
    if activation.cpp is None:
        raise ValueError(
            f"activation is {activation.name!r}, which the CUDA kernels lack; pass implementation='xla', or add it to "
            "csrc/cuda/activations.cuh"
        )
    bits = [f"0x{int(np.float32(value).view(np.uint32)):08X}u" for value in activation.parameters]
    return f"jmm::{activation.cpp}" + (f"<{', '.join(bits)}>" if bits else "")


def activated(
    activation: Activation,
    dtype: str,
    columns: int,
    *,
    out: int,
    bias: int | None,
    x_scale: int | None = None,
    intermediate: str | None = None,
    intermediate_scales: int | None = None,
    row_scales: int | None = None,
    slots_per_row: int = 1,
) -> Epilogue:
    """The input of the second product, of `columns`; quantised, it is in units of its scales."""
    facts: Facts = {
        "element": ELEMENT_TYPES[dtype],
        "activation": activation_type(activation),
        "intermediate": f"jmm::{'Rounded' if intermediate is None else KINDS[intermediate].cpp}",
        "columns": columns,
        "bias": bias is not None,
        "scaled": x_scale is not None,
        "row_scaled": row_scales is not None,
        "slots_per_row": slots_per_row,
    }
    pointers = {
        "out": Pointer(out, dtype, written=True),
        "bias": optional(bias, "float32"),
        "x_scale": optional(x_scale, "float32"),
        "intermediate_scales": optional(None if intermediate is None else intermediate_scales, "float32"),
        "row_scales": optional(row_scales, "float32"),
    }
    return Epilogue("Activated", facts, pointers)


def slot_rows(dtype: str, columns: int, *, out: int, bias: int | None, topk_weights: int | None) -> Epilogue:
    """A row per slot, times its router weight if there are any."""
    facts: Facts = {
        "element": ELEMENT_TYPES[dtype],
        "columns": columns,
        "bias": bias is not None,
        "weighted": topk_weights is not None,
    }
    pointers = {
        "out": Pointer(out, dtype, written=True),
        "bias": optional(bias, "float32"),
        "topk_weights": optional(topk_weights, "float32"),
    }
    return Epilogue("SlotRows", facts, pointers)


def slot_partials(
    columns: int,
    *,
    out: int,
    bias: int | None,
    topk_weights: int | None,
    intermediate_scales: int | None = None,
    row_scales: int | None = None,
    columns_of: range | None = None,
) -> Epilogue:
    """A float32 row per slot, times its router weight if there are any, for sums that follow.

    Rows have the columns of `columns_of` alone; None is all.
    """
    columns_of = range(columns) if columns_of is None else columns_of
    facts: Facts = {
        "columns": len(columns_of),
        "bias_columns": columns,
        "bias": bias is not None,
        "weighted": topk_weights is not None,
        "scaled": intermediate_scales is not None,
        "row_scaled": row_scales is not None,
    }
    pointers = {
        "out": Pointer(out, "float32", written=True),
        "bias": None if bias is None else Pointer(bias, "float32", offset=4 * columns_of.start),
        "topk_weights": optional(topk_weights, "float32"),
        "intermediate_scales": optional(intermediate_scales, "float32"),
        "row_scales": optional(row_scales, "float32"),
    }
    return Epilogue("SlotPartials", facts, pointers)


def packed_partials(partials: Epilogue, pairs: bool) -> Epilogue:
    """`slot_partials` with four columns in 64 bits; `pairs` says which ones they are (csrc/cuda/four_columns.cuh)."""
    return Epilogue("PackedPartials", {**partials.facts, "pairs": pairs}, partials.pointers)
