"""What the CUDA kernels count and reach, and what is refused beyond."""

import jax
import jax.numpy as jnp

from jax_marlin_moe.weights import MarlinWeights

# Kernels count slots, experts, entries of the list and work tiles in int32, and look a little past the last one: a
# stride of the grid, twice, or a part of the list for each warp. Offsets into arrays are as wide as the arrays need.
MOST_COUNTED = 2**31 - 2**16
# Offsets inside a few rows of one expert's weights are int32: 16 rows of K of 8 bits, eight times.
MOST_COLUMNS = 2**22
_MOST_CTAS = 2**31 - 1  # of a grid


def check_rows(x: jax.Array | jax.ShapeDtypeStruct, capability: int) -> None:
    """Raises ValueError where the architecture cannot multiply the type."""
    if capability < 80 and x.dtype == jnp.bfloat16:
        raise ValueError(f"x has dtype bfloat16, which compute capability {capability} lacks; pass float16")


def check_counts(num_slots: int, num_experts: int, list_length: int) -> None:
    """Raises ValueError where slots, experts or the entries of the aligned list are more than int32 counts."""
    if num_experts > MOST_COUNTED:
        raise ValueError(f"num_experts is {num_experts}; the CUDA kernels take at most {MOST_COUNTED}")
    if max(num_slots, list_length) > MOST_COUNTED:
        raise ValueError(
            f"topk_ids has {num_slots} ids, {list_length} with the padding of their blocks; the CUDA kernels take at "
            f"most {MOST_COUNTED}: split the tokens"
        )


def check_matrix(name: str, weights: MarlinWeights) -> None:
    """Raises ValueError where one expert's matrix is larger than the kernels' offsets inside of it reach."""
    for axis, extent in (("K", weights.padded_k), ("N", weights.padded_n)):
        if extent > MOST_COLUMNS:
            raise ValueError(
                f"{name} is packed with {axis} = {extent}; the CUDA kernels take at most {MOST_COLUMNS}: split the "
                "matrix"
            )


def grid(blocks: int, what: str) -> int:
    """`blocks`, or ValueError where a grid has no room for them."""
    if blocks > _MOST_CTAS:
        raise ValueError(f"{what} takes {blocks} CTAs; a grid has at most {_MOST_CTAS}: split the tokens")
    return blocks
