"""The kernel that quantises rows to 8 bits. Twin of csrc/cuda/quantize_rows.cuh."""

from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Pointer, optional
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel

_THREADS = 128
_SUMMED = 128  # columns that share a sum


def row_stride(columns: int, *, sums: bool, groups: bool) -> int:
    """Bytes from a quantised row to the next.

    Its columns, 64 for each 16 sums of 128 of them, and whole sixteens for scales of 128 of them.
    """
    stride = columns + (64 * -(-columns // (16 * _SUMMED)) if sums else 0)
    return stride + (16 * -(-columns // (4 * _SUMMED)) if groups else 0)


def has_scales(to: str, *, in_units: bool, groups: bool) -> bool:
    """Whether each quantised row has a scale of its own.

    Integers in units of known scales have one too, of 1, or NaN where the row has a NaN, which no integer stands for.
    """
    return not groups and (to == "int8" or not in_units)


def quantize_rows_kernel(
    stage: str,
    rows: int,
    columns: int,
    source_stride: int,
    dtype: str,
    to: str,
    *,
    wide: bool,
    halves_apart: bool,
    sums: bool,
    groups: bool,
    places: bool,
    in_units: bool,
    from_previous: bool,
    x: int,
    fixed: int | None,
    out: int,
    scales: int,
    overlaps_predecessor: bool,
) -> Kernel:
    """Rows of x to 8 bits for a product, a scale for each row or `groups` of 128 columns, and sums if it wants them.

    `wide` says that the product multiplies 16 bits: the values go to numbers of x's type, in order, without sums.
    `halves_apart` says which of two orders the bytes of the product's fragments have (`wgmma_bytes.halves_apart`).
    `places` says whether x has the columns of a unit in the order of its scales, as the first product leaves them.
    `in_units` says that x has values of the type already, in units of scales that are known, `from_previous` that the
    kernel before writes x.

    Buffers: x [rows, source_stride], fixed [1], a scale of all rows, or None; out [rows, row_stride] and, where
    `has_scales`, scales [rows], which it writes.
    """
    row_threads = 128 if columns > 8192 else 64 if columns > 4096 else 32
    return Kernel(
        name=f"jmm_quantize_{stage}_{to}",
        headers=("quantize_rows.cuh",),
        body="QuantizeRows<Facts>",
        structs={
            "Facts": {
                "element": ELEMENT_TYPES[dtype],
                "byte": ELEMENT_TYPES[to],
                "wide": wide,
                "rows": rows,
                "columns": columns,
                "source_stride": source_stride,
                "halves_apart": halves_apart,
                "stride": row_stride(columns, sums=sums, groups=groups),
                "sums": sums,
                "groups": groups,
                "places": places,
                "fixed": fixed is not None,
                "in_units": in_units,
                "from_previous_kernel": from_previous,
            }
        },
        pointers={
            "x": Pointer(x, dtype),
            "fixed": optional(fixed, "float32"),
            "bytes": Pointer(out, dtype if wide else to, written=True),
            "scales": Pointer(scales, "float32", written=True)
            if has_scales(to, in_units=in_units, groups=groups)
            else None,
        },
        threads=_THREADS,
        shared_bytes=0,
        max_ctas=grid(-(-rows * row_threads // _THREADS), "quantising the rows"),
        overlaps_predecessor=overlaps_predecessor,
    )
