"""Rows in 8 bits within the plan of a block: what makes them, where they are, and which products there are for them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.kernels import wgmma_bytes
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.quantize_rows import quantize_rows_kernel, row_stride
from jax_marlin_moe.cuda.program import Kernel
from jax_marlin_moe.weights import MarlinWeights


class Rows(NamedTuple):
    """What a product reads.

    Attributes:
        buffer: of the rows.
        stride: elements from one to the next.
        scales: the buffer of a scale for each, or None.
    """

    buffer: int
    stride: int
    scales: int | None = None


class QuantizedRows(NamedTuple):
    """Rows in 8 bits.

    Attributes:
        kernel: which makes them.
        rows: what the product reads.
        scratch: buffers for them, the first one that of `rows`.
    """

    kernel: Kernel
    rows: Rows
    scratch: tuple[jax.ShapeDtypeStruct, ...]


def quantized_rows(
    stage: str,
    source: jax.ShapeDtypeStruct | jax.Array,
    source_buffer: int,
    shape: GemmShape,
    weights: MarlinWeights,
    scratch: int,
    *,
    overlaps_predecessor: bool,
    fixed: int | None = None,
    in_units: bool = False,
) -> QuantizedRows:
    """The rows of `source` quantised for a product of this shape with `weights`.

    Args:
        stage: "x", the rows of the call, or "hidden", those that the first product leaves.
        source: [rows, columns], the columns of the product first.
        source_buffer: that has them.
        shape: of the product.
        weights: of the product.
        scratch: the first one of the scratch that is asked for.
        overlaps_predecessor: whether the kernel may start before the one before it has ended.
        fixed: the buffer of a scale for all rows, or None.
        in_units: whether rows have values of the type already, in units of scales that are known.
    """
    rows, source_stride = source.shape
    # Of codes that have a zero point to subtract; the integers of int8 products are less that of the format already.
    sums = bool(weights.format.zeros or (weights.format.zero_point and shape.dtype != "int8"))
    stride = row_stride(shape.k, sums=sums)
    of_hidden = stage == "hidden"
    kernel = quantize_rows_kernel(
        stage,
        rows,
        shape.k,
        source_stride,
        source.dtype.name,
        shape.dtype,
        halves_apart=wgmma_bytes.halves_apart(shape),
        sums=sums,
        places=of_hidden,
        in_units=in_units,
        from_previous=of_hidden,
        x=source_buffer,
        fixed=fixed,
        out=scratch,
        scales=scratch + 1,
        overlaps_predecessor=overlaps_predecessor,
    )
    quantized = jax.ShapeDtypeStruct((rows, stride), shape.dtype)
    if in_units:
        return QuantizedRows(kernel, Rows(scratch, stride), (quantized,))
    scales = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return QuantizedRows(kernel, Rows(scratch, stride, scratch + 1), (quantized, scales))


def check_byte_products(
    activation_dtype: str, matrices: dict[str, tuple[MarlinWeights, GemmShape]], capability: int
) -> None:
    """Raises ValueError, by the name of the matrix, where there is no kernel for such rows."""
    if "wgmma_bytes" not in get_architecture(capability).kernels:
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}, which the CUDA kernels multiply on compute capability 9.0 "
            f"alone; this is {capability / 10:.1f}: pass None, or implementation='xla'"
        )
    for name, (weights, shape) in matrices.items():
        if not wgmma_bytes.multiplies(shape):
            raise ValueError(
                f"activation_dtype is {activation_dtype!r} and {name} has format {weights.format.name!r}, groups of "
                f"{shape.group_size}, K = {shape.k} and N = {shape.n}; the CUDA kernels take "
                f"{wgmma_bytes.FORMATS[activation_dtype]}, groups of 128 or one group, multiples of 32 from 128 on for "
                "K, and of 128 for N: pass None, or implementation='xla'"
            )
