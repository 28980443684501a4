"""The kernel that quantises rows to 8 bits. Twin of csrc/cuda/quantize_rows.cuh."""

from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Pointer
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel

_THREADS = 128
_SUMMED = 128  # columns that share a sum


def row_stride(columns: int, *, sums: bool) -> int:
    """Bytes from a quantised row to the next: its columns, and 64 for each 16 sums of 128 of them."""
    return columns + (64 * -(-columns // (16 * _SUMMED)) if sums else 0)


def quantize_rows_kernel(
    stage: str,
    rows: int,
    columns: int,
    source_stride: int,
    dtype: str,
    to: str,
    code_bits: int,
    *,
    sums: bool,
    x: int,
    out: int,
    scales: int,
    overlaps_predecessor: bool,
) -> Kernel:
    """Rows of x to 8 bits for a product with codes of `code_bits`, a scale for each row, and sums if it wants them.

    Buffers: x [rows, source_stride]; out [rows, row_stride] and scales [rows], which it writes.
    """
    chunks = columns // 32
    row_threads = 128 if chunks > 256 else 64 if chunks > 128 else 32
    return Kernel(
        name=f"jmm_quantize_{stage}_{to}",
        headers=("quantize_rows.cuh",),
        body="QuantizeRows<Facts>",
        structs={
            "Facts": {
                "element": ELEMENT_TYPES[dtype],
                "byte": ELEMENT_TYPES[to],
                "rows": rows,
                "columns": columns,
                "source_stride": source_stride,
                "code_bits": code_bits,
                "stride": row_stride(columns, sums=sums),
                "sums": sums,
            }
        },
        pointers={
            "x": Pointer(x, dtype),
            "bytes": Pointer(out, to, written=True),
            "scales": Pointer(scales, "float32", written=True),
        },
        threads=_THREADS,
        shared_bytes=0,
        max_ctas=grid(-(-rows * row_threads // _THREADS), "quantising the rows"),
        overlaps_predecessor=overlaps_predecessor,
    )
