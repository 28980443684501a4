"""The GEMM on mma.sync with rows of 8 bits: its tiles. Twin of csrc/cuda/gemm/mma/multiplier_bytes.cuh."""

import dataclasses

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.kernels import wgmma_bytes
from jax_marlin_moe.cuda.kernels.mma import MmaTile, candidates_of
from jax_marlin_moe.cuda.kernels.problem import GemmShape

BLOCK_K = wgmma_bytes.BLOCK_K

# Compute capabilities, times ten, from which on there is an instruction for rows of the type.
_LEAST_CAPABILITY = {"float8_e4m3fn": 89, "int8": 80}

# As counted in SASS: eight weights of 4 bits are half of two permutations, two shifts and four masks (of int8 also four
# bits the other way round, in the masks' instructions); those of 8 bits are half of nothing, or of four such bits.
_WORD_INSTRUCTIONS = {"int4": 4.0, "e4m3": 0.0, "int8": 2.0}
_MMA_INSTRUCTIONS = 0.9  # for eight tokens and a word: half of an instruction that keeps the warp as long as one of 16


@dataclasses.dataclass(frozen=True)
class MmaByteTile(MmaTile):
    """`jmm::MmaTile` with rows of 8 bits, whose `block_k` is 128: sums of that many rows of K are scaled together."""

    def multiplies(self, shape: GemmShape, capability: int) -> bool:
        """Whether the kernel has fragments and instructions for such rows and weights."""
        return self.block_k == BLOCK_K and _has_fragments(shape) and capability >= _LEAST_CAPABILITY[shape.dtype]

    def unevenness(self, shape: GemmShape) -> float:
        """Of k-blocks, which cannot be smaller."""
        return self.longest_share(shape) * self.shares_k / -(-shape.k // BLOCK_K)

    def step_instructions(self, shape: GemmShape) -> float:
        """As for `MmaTile`."""
        return 4 * (_WORD_INSTRUCTIONS[shape.code] + self.tokens // 8 * _MMA_INSTRUCTIONS)


def _has_fragments(shape: GemmShape) -> bool:
    # Rows in groups of columns have scales that this kernel does not fetch.
    return wgmma_bytes.has_fragments(shape) and not shape.row_groups


def multiplies(shape: GemmShape, capability: int) -> bool:
    """Whether there is a kernel for rows of 8 bits and such weights, with an instruction of the card's own.

    Elsewhere ptxas makes products of 16 bits of those of e4m3, and more than the kernels of 16 bits need around them.
    """
    return _has_fragments(shape) and shape.dtype in get_architecture(capability).mma_bytes


def candidates(shape: GemmShape, tokens: int, capability: int) -> list[MmaByteTile]:
    """Every tile worth considering: it fits, and the card has the instruction."""
    if not multiplies(shape, capability):
        return []
    return candidates_of(MmaByteTile, (BLOCK_K,), shape, tokens, capability)
