"""Routing: router logits to experts and weights, and the sizes that the aligned slots need."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import reference
from jax_marlin_moe.ops.arguments import check_block_size, check_rank, check_top_k


def route(
    logits: Float[Array, "tokens experts"], *, top_k: int, scoring: str = "softmax", renormalize: bool = True
) -> tuple[Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """Chooses top_k experts for each token; leading batch dimensions are allowed.

    `p = softmax(logits)` in float32 over all experts; the top_k largest, in descending order (ties to the lower
    expert); divided by their sum if `renormalize` (Mixtral, Qwen3), left as they are otherwise (Qwen1.5, OLMoE).

    Args:
        logits: router outputs of any float dtype.
        top_k: experts per token, 1 to the number of experts.
        scoring: "softmax".
        renormalize: whether the chosen weights sum to one.

    Returns:
        Weights (float32) and expert ids (int32).

    Raises:
        TypeError: logits are not floating point.
        ValueError: top_k or scoring is out of range.
    """
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits has dtype {getattr(logits, 'dtype', type(logits))}; it must be floating point")
    if logits.ndim < 1:
        check_rank("logits", logits, 2)
    check_top_k(top_k, logits.shape[-1])
    if scoring != "softmax":
        raise ValueError(f"scoring is {scoring!r}; it must be 'softmax'")
    scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, ids = jax.lax.top_k(scores, top_k)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, ids.astype(jnp.int32)


def workspace_size(*, num_slots: int, num_experts: int, n: int, block_size: int, multiprocessors: int) -> int:
    """Workspace of the classic Marlin MoE GEMM in int32 words, for code that allocates it (FORMATS section 5).

    `locks = roundup4(min(N / 64 * ceil(P / B), 4 * SMs))` plus
    `c_tmp = min(N * P, SMs * 4 * B * 256) * (2 if B == 8 else 1)`. This package's own kernels need none.

    Args:
        num_slots: tokens * top_k.
        num_experts: experts that ids may name.
        n: columns of the matrix, a multiple of 64.
        block_size: 8, 16, 32, 48 or 64.
        multiprocessors: of the card.
    """
    check_block_size(block_size)
    if n % 64 or n <= 0:
        raise ValueError(f"n is {n}; it must be a positive multiple of 64")
    padded = reference.padded_size(num_slots, num_experts, block_size)
    locks = min(n // 64 * -(-padded // block_size), 4 * multiprocessors)
    partial_sums = min(n * padded, multiprocessors * 4 * block_size * 256) * (2 if block_size == 8 else 1)
    return -(-locks // 4) * 4 + partial_sums
