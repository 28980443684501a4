"""Shares of sums over devices, packed and added up. Twin of csrc/cuda/shares.cuh."""

import jax.numpy as jnp

from jax_marlin_moe.cuda.facts import Pointer, optional
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel

VECTOR = 8  # numbers of a thread
_THREADS = 128


def pack_share_kernel(numbers: int, *, share: int, words: int) -> Kernel:
    """From float32 numbers to four in 64 bits."""
    return Kernel(
        name="jmm_pack_share",
        headers=("shares.cuh",),
        body="PackShare<Facts>",
        structs={"Facts": {"numbers": numbers}},
        pointers={"share": Pointer(share, "float32"), "words": Pointer(words, "int32", written=True)},
        threads=_THREADS,
        shared_bytes=0,
        max_ctas=_ctas(numbers),
    )


def add_shares_kernel(
    shares: int, numbers: int, dtype: jnp.dtype, *, words: int, other: int | None = None, total: int
) -> Kernel:
    """The sum of packed shares of that many numbers each, rounded to a dtype; of two, the second may be in `other`."""
    result = Pointer(total, dtype.name, written=True)
    return Kernel(
        name="jmm_add_shares",
        headers=("shares.cuh",),
        body="AddShares<Facts>",
        structs={
            "Facts": {"element": result.cpp_element, "numbers": numbers, "shares": shares, "apart": other is not None}
        },
        pointers={"words": Pointer(words, "int32"), "other": optional(other, "int32"), "sum": result},
        threads=_THREADS,
        shared_bytes=0,
        max_ctas=_ctas(numbers),
    )


def _ctas(numbers: int) -> int:
    return grid(-(-numbers // VECTOR // _THREADS), "a sum over devices")
