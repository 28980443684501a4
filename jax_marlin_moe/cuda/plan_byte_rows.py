"""Rows in 8 bits within the plan of a block: what makes them, where they are, and which products there are for them.

Where no kernel multiplies bytes of their type with the weights, 16 bits hold every number of 8 bits: rows are quantised
all the same, and their values multiplied by the kernels of 16 bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_marlin_moe.byte_rows import ByteDtype, has_groups, number_type
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.kernels import mma_bytes, wgmma_bytes
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.quantize_rows import has_scales, quantize_rows_kernel, row_stride
from jax_marlin_moe.cuda.program import Kernel
from jax_marlin_moe.cuda.scheme import Tile
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
    """Rows in 8 bits, or the values of such rows in 16.

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
    tile: Tile,
    weights: MarlinWeights,
    scratch: int,
    activation_dtype: ByteDtype,
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
        tile: of the product, whose kernel reads them.
        weights: of the product.
        scratch: the first one of the scratch that is asked for.
        activation_dtype: of the bytes; the product may read their values in 16 bits.
        overlaps_predecessor: whether the kernel may start before the one before it has ended.
        fixed: the buffer of a scale for all rows, or None.
        in_units: whether rows have values of the type already, in units of scales that are known.
    """
    rows, source_stride = source.shape
    # Of codes that have a zero point to subtract, unless the product adds up its rows itself; the integers of int8
    # products are less that of the format already.
    wide = not shape.has_byte_rows
    sums = tile.has_slabs and bool(weights.format.zeros or (weights.format.zero_point and shape.dtype != "int8"))
    stride = row_stride(shape.k, sums=sums, groups=shape.row_groups)
    of_hidden = stage == "hidden"
    kernel = quantize_rows_kernel(
        stage,
        rows,
        shape.k,
        source_stride,
        source.dtype.name,
        number_type(activation_dtype),
        wide=wide,
        halves_apart=wgmma_bytes.halves_apart(shape),
        sums=sums,
        groups=shape.row_groups,
        places=of_hidden and tile.has_slabs,
        in_units=in_units,
        from_previous=of_hidden,
        x=source_buffer,
        fixed=fixed,
        out=scratch,
        scales=scratch + 1,
        overlaps_predecessor=overlaps_predecessor,
    )
    quantized = jax.ShapeDtypeStruct((rows, stride), shape.dtype)
    if not has_scales(number_type(activation_dtype), in_units=in_units, groups=shape.row_groups):
        return QuantizedRows(kernel, Rows(scratch, stride), (quantized,))
    scales = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return QuantizedRows(kernel, Rows(scratch, stride, scratch + 1), (quantized, scales))


def multiplies_bytes(
    activation_dtype: ByteDtype, shapes: Sequence[GemmShape], capability: int, rows: float | None
) -> bool:
    """Whether rows of bytes are multiplied as such in products of these shapes, which have them.

    Args:
        activation_dtype: of the call.
        shapes: of both products, with rows of bytes.
        capability: compute capability times ten.
        rows: of an expert on average, by which the kernel is chosen; None where that is not to depend on them.

    Raises:
        ValueError: there is no kernel for them, and their values cannot be multiplied in 16 bits either.
    """
    of_wgmma = "wgmma_bytes" in get_architecture(capability).kernels
    if of_wgmma:
        there = all(map(wgmma_bytes.multiplies, shapes))
    else:
        there = all(mma_bytes.multiplies(shape, capability) for shape in shapes)
    if not there and has_groups(activation_dtype):
        first = shapes[0]
        raise ValueError(
            f"activation_dtype is {activation_dtype!r}, the compute capability {capability / 10:.1f} and gate_up has "
            f"codes {first.code!r} in groups of {first.group_size}, K = {first.k} and N = {first.n}; the CUDA kernels "
            "take compute capability 9.0 and formats int4, int4_zp and fp8, groups of 128 or one group, multiples of "
            "32 from 128 on for K, and of 64 from 128 on for N, in both matrices: pass 'float8_e4m3fn', or "
            "implementation='xla'"
        )
    return there and (rows is None or not of_wgmma or all(wgmma_bytes.pays(shape, rows) for shape in shapes))
