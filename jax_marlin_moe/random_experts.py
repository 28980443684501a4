"""Experts with random weights: what new layers begin with, and what timings run on."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jax_marlin_moe.formats import get_format
from jax_marlin_moe.packing import check_group_size
from jax_marlin_moe.quantize import quantize
from jax_marlin_moe.weights import MarlinWeights

Draw = Callable[[Key[Array, ""], tuple[int, ...]], Float[Array, "..."]]


def normal(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """float32 numbers of a normal distribution of variance 1."""
    return jax.random.normal(key, shape, jnp.float32)


def random_experts(
    key: Key[Array, ""],
    num_experts: int,
    k: int,
    n: int,
    *,
    weight_format: str,
    group_size: int | Literal["customary"] | None,
    scale_dtype: DTypeLike,
    draw: Draw = normal,
    gain: float = 1.0,
) -> MarlinWeights:
    """Draws and quantises experts one by one: the float32 weights of a large layer need not fit in memory.

    Args:
        key: of the whole stack.
        num_experts: E.
        k: rows of an expert.
        n: columns of an expert.
        weight_format: a name of the format registry.
        group_size: as for `quantize`.
        scale_dtype: of the scales, where the format leaves a choice.
        draw: key and shape to float32 numbers, a function of a module: each one is compiled once.
        gain: the drawn numbers are multiplied by `gain / sqrt(K)`.

    Raises:
        TypeError: the format's scales cannot have that dtype.
        ValueError: the format is unknown, or the group size does not fit it or K.
    """
    row = get_format(weight_format)
    if group_size == "customary":
        group_size = row.customary_group_size
    check_group_size("group_size", group_size, k, row)
    return _random_experts(key, num_experts, k, n, weight_format, group_size, jnp.dtype(scale_dtype), draw, gain)


@partial(jax.jit, static_argnums=range(1, 9))
def _random_experts(
    key: Key[Array, ""],
    num_experts: int,
    k: int,
    n: int,
    weight_format: str,
    group_size: int | None,
    scale_dtype: jnp.dtype,
    draw: Draw,
    gain: float,
) -> MarlinWeights:
    def one_expert(key: Array) -> MarlinWeights:
        dense = draw(key, (1, k, n)) * (gain / k**0.5)
        return quantize(dense, weight_format, group_size=group_size, scale_dtype=scale_dtype)

    stacked = jax.lax.map(one_expert, jax.random.split(key, num_experts))
    return jax.tree.map(lambda leaf: leaf[:, 0], stacked)
