"""The workspace of the classic Marlin MoE GEMM, whose contract `moe_gemm` has, for code that allocates it."""

from jax_marlin_moe import reference
from jax_marlin_moe.arguments import check_block_size


def workspace_size(*, num_slots: int, num_experts: int, n: int, block_size: int, multiprocessors: int) -> int:
    """Workspace of the classic Marlin MoE GEMM in int32 words, for code that allocates it.

    From docs/formats.md, "Block alignment":

    `locks = roundup4(min(N / 64 * ceil(P / B), 4 * SMs))` plus
    `c_tmp = min(N * P, SMs * 4 * B * 256) * (2 if B == 8 else 1)`. This package's own kernels need none.

    Args:
        num_slots: tokens * top_k.
        num_experts: experts that ids may name.
        n: columns of the matrix, a multiple of 64.
        block_size: 8, 16, 32, 48, 64, 128 or 256.
        multiprocessors: of the card.

    Raises:
        ValueError: there is no such block size, or n is not a positive multiple of 64.
    """
    check_block_size(block_size)
    if n % 64 or n <= 0:
        raise ValueError(f"n is {n}; it must be a positive multiple of 64")
    padded = reference.padded_size(num_slots, num_experts, block_size)
    locks = min(n // 64 * -(-padded // block_size), 4 * multiprocessors)
    partial_sums = min(n * padded, multiprocessors * 4 * block_size * 256) * (2 if block_size == 8 else 1)
    return -(-locks // 4) * 4 + partial_sums
