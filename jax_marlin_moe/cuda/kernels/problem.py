"""What a grouped product computes, and the costs that all GEMM kernels share. Twin of csrc/cuda/gemm."""

import dataclasses

from jax_marlin_moe.layout import TILE_N

_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "e4m3": 8, "e8m0": 8}

BYTE_DTYPES = ("float8_e4m3fn", "int8")  # of rows of 8 bits
UNIT = TILE_N  # columns of a packed tile

# The cost models' constants, fitted to 1100 timed kernels on an H200 (Qwen3-30B and Mixtral, 1 to 64 tokens): 17 %
# root mean square error, and tiles chosen with it were 7 % slower than the best timed ones on average. (Integer codes
# took more instructions then; the other constants are as they were.) Measured tables (cuda/tables.py) come before it.
_WORD_INSTRUCTIONS = {"int4": 5, "int8": 6, "e2m1": 15, "e4m3": 14, "bf16": 2, "fp16": 2}  # dequantisation of 8 weights
LAUNCH_MICROSECONDS = 2.2


@dataclasses.dataclass(frozen=True)
class GemmShape:
    """One grouped product, as the kernel is compiled for it.

    Attributes:
        k: contraction extent.
        n: columns of the packed matrix, gate and up counted both.
        num_experts: E.
        group_size: rows that share a scale.
        gated: whether gate and up columns are combined in the epilogue.
        code: the type of the codes.
        bits: of a code.
        scale: the type of the scales: a float dtype, "e4m3" or "e8m0".
        zeros: "integer" or "float" where each group has a zero point of its own.
        dtype: of the activations: 16 bits, or 8 where rows are quantised.
        row_groups: whether each 128 columns of such rows have a scale of their own.
    """

    k: int
    n: int
    num_experts: int
    group_size: int
    gated: bool
    code: str
    bits: int
    scale: str
    zeros: str | None
    dtype: str
    row_groups: bool = False

    @property
    def has_byte_rows(self) -> bool:
        """Whether the activations have 8 bits."""
        return self.dtype in BYTE_DTYPES

    @property
    def group_bits(self) -> int:
        """What the rows of a group share in a column: a scale and a zero point."""
        scale_bits = _SCALE_BITS[self.scale]
        return scale_bits + {None: 0, "integer": self.bits, "float": scale_bits}[self.zeros]

    @property
    def bytes_per_weight(self) -> float:
        """Codes and what a group shares."""
        return (self.bits + self.group_bits / self.group_size) / 8


def word_instructions(code: str) -> int:
    """Instructions that make eight weights of codes.

    Raises:
        ValueError: nobody has counted them.
    """
    if code not in _WORD_INSTRUCTIONS:
        raise ValueError(
            f"no cost is known for codes of {code}; it must be one of {', '.join(sorted(_WORD_INSTRUCTIONS))}"
        )
    return _WORD_INSTRUCTIONS[code]
