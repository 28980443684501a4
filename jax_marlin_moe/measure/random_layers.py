"""Expert layers with random weights, and random routings: what timing and tuning run on."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import ModelShape
from jax_marlin_moe.random_experts import random_experts
from jax_marlin_moe.weights import MarlinWeights, concatenate_columns

# Layers that are timed one after another have this many bytes together: twenty times the largest L2 cache of today's
# cards, so that nothing of a layer is left in it when it is timed again, even where a call hits few of the experts.
_ROTATED_BYTES = 1.2e9
_MOST_LAYERS = 8
# A uniform number of [-1, 1] has variance 1/3, and the columns' factors below have the mean square 13/12.
_UNIT_GAIN = (3 * 12 / 13) ** 0.5
# silu(a) * b of two normal numbers has the standard deviation 0.597, which the weighted sum of top_k of them, with
# about equal weights, divides by the root of top_k. `down` scales the rows back.
_SILU_DEVIATION = 0.597


def layers_to_rotate(shape: ModelShape, weight_format: str) -> int:
    """How many layers a timing should cycle through, so that each finds a cold L2."""
    codes = 3 * shape.num_experts * shape.hidden * shape.intermediate
    layer_bytes = codes * get_format(weight_format).bits / 8
    return min(_MOST_LAYERS, math.ceil(_ROTATED_BYTES / layer_bytes))


def random_layers(
    shape: ModelShape, weight_format: str, dtype: DTypeLike, count: int | None = None
) -> list[tuple[MarlinWeights, MarlinWeights]]:
    """(gate_up, down) pairs on the default device; `layers_to_rotate` many by default.

    Rows of standard deviation 1 come out of a block of silu and about equal router weights with about the same.

    Args:
        shape: sizes of the layer and its group size.
        weight_format: a name of the format registry.
        dtype: of the scales, where the format leaves a choice.
        count: number of layers.

    Raises:
        ValueError: the format is unknown, or the group size does not fit it or the sizes.
    """
    count = layers_to_rotate(shape, weight_format) if count is None else count
    e, h, i = shape.num_experts, shape.hidden, shape.intermediate
    down_gain = _UNIT_GAIN * shape.top_k**0.5 / _SILU_DEVIATION
    experts = partial(
        random_experts,
        weight_format=weight_format,
        group_size=shape.group_size,
        scale_dtype=dtype,
        draw=_uneven_uniform,
    )
    layers = []
    for layer in range(count):
        keys = jax.random.split(jax.random.key(layer), 3)
        # Gate and up by themselves: each is padded to whole tiles.
        gate, up = (experts(key, e, h, i, gain=_UNIT_GAIN) for key in keys[:2])
        down = experts(keys[2], e, i, h, gain=down_gain)
        layers.append((concatenate_columns([gate, up]), down))
    return layers


def _uneven_uniform(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform numbers, hence about uniform codes, under factors that differ from column to column."""
    value_key, factor_key = jax.random.split(key)
    values = jax.random.uniform(value_key, shape, jnp.float32, -1, 1)
    return values * jax.random.uniform(factor_key, (*shape[:-2], 1, shape[-1]), jnp.float32, 0.5, 1.5)


def random_routings(
    experts: int, top_k: int, tokens: int, count: int, *, zipf: bool = False, seed: int = 0
) -> Int[np.ndarray, "count tokens top_k"]:
    """int32 ids; each token's experts are distinct, drawn uniformly or by Zipf's law."""
    rng = np.random.default_rng(seed)
    popularity = np.ones(experts)
    if zipf:
        popularity = 1 / rng.permutation(np.arange(1, experts + 1))
    # Gumbel top-k draws without replacement in proportion to the popularity.
    noise = rng.gumbel(size=(count, tokens, experts))
    noise += np.log(popularity)
    # The largest top_k first: sorting all experts of many tokens takes seconds.
    ids = np.argpartition(noise, -top_k, axis=-1)[..., -top_k:]
    order = np.argsort(-np.take_along_axis(noise, ids, -1), axis=-1)
    return np.take_along_axis(ids, order, -1).astype(np.int32)
