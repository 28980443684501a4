"""Times the expert block that `tokamax` makes possible, on the routings and the card that ours is timed on.

The library has grouped products, no block: around them is what a JAX user writes, slots sorted by expert, two
`tokamax.ragged_dot` on int4 `QArray` weights, silu and product, the weighted sum. The products run in the library's
Mosaic GPU kernels, in the configurations that it chooses by itself, on weights in the physical order that they require
(K innermost). Device time cannot be told from host time here as for kernels that we launch ourselves, so a block's time
is its share of a jitted chain (benchmarks/chain.py), to be held against `jit_us` of ours. Every timed configuration is
checked against float32 of the dequantised weights (`rel_l2`).

Needs `tokamax`, hence Python 3.12, and JAX as recent as it asks for.
"""

import logging
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.chain import chain_microseconds
from jax_marlin_moe.measure.models import ModelShape
from jax_marlin_moe.measure.random_layers import layers_to_rotate

try:
    import qwix
    import tokamax
except ImportError:
    qwix = tokamax = None

_CODE_DEVIATION = (16**2 / 12 * 13 / 12) ** 0.5  # with the mean square of the scales
_SAMPLES = 10  # of ten calls each, as for `jit_us` of ours


@partial(jax.jit, static_argnums=range(1, 7))
def _random_matrices(key, experts: int, k: int, n: int, group_size: int, gain: float, dtype):
    """Codes [E, N, K] and scales [E, K / group_size, N]; uniform codes -8 ... 7."""

    def one_expert(key):
        code_key, scale_key = jax.random.split(key)
        codes = jax.lax.bitcast_convert_type(jax.random.bits(code_key, (n, k), jnp.uint8), jnp.int8) >> 4
        scales = jax.random.uniform(scale_key, (k // group_size, n), jnp.float32, 0.5, 1.5)
        return codes.astype(jnp.int4), (scales * (gain / _CODE_DEVIATION / k**0.5)).astype(dtype)

    return jax.lax.map(one_expert, jax.random.split(key, experts))


def _random_layer(shape: ModelShape, layer: int, dtype) -> tuple:
    first, second = jax.random.split(jax.random.key(layer))
    experts, hidden, intermediate, group_size = shape.num_experts, shape.hidden, shape.intermediate, shape.group_size
    gate_up = _random_matrices(first, experts, hidden, 2 * intermediate, group_size, 1.0, dtype)
    # The activation and the weighted sum shrink the rows: scale them back (jax_marlin_moe/measure/random_layers.py).
    down_gain = shape.top_k**0.5 / 0.597
    return gate_up, _random_matrices(second, experts, intermediate, hidden, group_size, down_gain, dtype)


@partial(jax.jit, static_argnames="implementation")
def expert_block(x, layer, weights, ids, implementation: str):
    """The block; `ids` and `weights` are [tokens, top_k]."""
    (gate_up, gate_up_scales), (down, down_scales) = layer
    # Swapped twice, here and in the library, K stays innermost in memory.
    gate_up = qwix.QArray(gate_up.mT, gate_up_scales)
    down = qwix.QArray(down.mT, down_scales)
    product = partial(
        tokamax.ragged_dot,
        group_sizes=jnp.bincount(ids.ravel(), length=gate_up.shape[0]).astype(jnp.int32),
        preferred_element_type=x.dtype,
        implementation=implementation,
    )
    order = jnp.argsort(ids.ravel())
    rows = product(x[order // ids.shape[1]], gate_up)
    gate, up = jnp.split(rows, 2, axis=-1)
    rows = product(jax.nn.silu(gate) * up, down)
    rows = rows[jnp.argsort(order)].reshape(*ids.shape, -1)
    return jnp.einsum("tk,tkh->th", weights, rows, preferred_element_type=jnp.float32).astype(x.dtype)


def installed() -> bool:
    """Whether the library is."""
    return tokamax is not None


def random_gate_up(shape: ModelShape) -> tuple:
    """Codes [E, N, K] and scales of one layer's first matrix."""
    return _random_layer(shape, 0, jnp.dtype(jnp.bfloat16))[0]


def quantised_product(rows, matrix, sizes):
    """`tokamax.ragged_dot` on int4 weights of `random_gate_up`."""
    codes, scales = matrix
    return tokamax.ragged_dot(
        rows,
        qwix.QArray(codes.mT, scales),
        group_sizes=sizes,
        preferred_element_type=rows.dtype,
        implementation="mosaic",
    )


def dense_products() -> dict[str, Callable]:
    """The library's grouped product of dense weights, by the name of the peer; nothing where it is not installed."""
    return {"tokamax_dense": partial(tokamax.ragged_dot, implementation="mosaic")} if installed() else {}


def float32_block(x, layer, weights, ids) -> np.ndarray:
    """The same in float32, expert by expert."""

    @jax.jit
    def dense(matrices, expert):
        codes, scales = (jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False) for leaf in matrices)
        scales = jnp.repeat(scales.astype(jnp.float32), codes.shape[1] // scales.shape[0], axis=0)
        return codes.astype(jnp.float32).T * scales

    @jax.jit
    def slots(rows, gate_up, down):
        with jax.default_matmul_precision("highest"):
            gate, up = jnp.split(rows @ gate_up, 2, axis=-1)
            return (jax.nn.silu(gate) * up) @ down

    ids, weights = np.asarray(ids), np.asarray(weights)
    x = np.asarray(x, np.float32)
    out = np.zeros(x.shape, np.float32)
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        # All rows, not only the expert's, so that one program works for every expert.
        rows = np.asarray(slots(x, *(dense(matrices, expert) for matrices in layer)))
        np.add.at(out, token, rows[token] * weights[token, slot][:, None])
    return out


def tokamax_block(
    shape: ModelShape,
    tokens: int,
    ids: np.ndarray,
    *,
    dtype: str = "bfloat16",
    samples: int = _SAMPLES,
    pause_seconds: float = 0.0,
    weight_format: str = "int4",
    implementation: str = "mosaic",
) -> dict[str, Any] | None:
    """Times the expert block of `tokamax`.

    Args:
        shape: of the expert block.
        tokens: rows of the input.
        ids: routings [repeats, tokens, top_k], one for each block of the chain; every id is below `num_experts`.
        dtype: bfloat16 or float16, of the rows and the scales.
        samples: times ten calls of the chain, at most ten.
        pause_seconds: before each ten calls, so that the card stays out of its power limit.
        weight_format: int4; this file makes weights of no other.
        implementation: which of the library's implementations computes the products.

    Returns:
        `implementation`; `block_us` with its `block_p10_us` and `block_p90_us`, the same as `jit_us`; `rel_l2`. The
        products are not timed alone. None where the library is not installed.

    Raises:
        ValueError: another format.
    """
    if weight_format != "int4":
        raise ValueError(f"weight_format is {weight_format!r}; it must be 'int4' for tokamax")
    if tokamax is None:
        return None
    # It warns of every shape that it has no measured configuration for.
    logging.getLogger("absl").setLevel(logging.ERROR)
    row_dtype = jnp.dtype(dtype)
    layers = [_random_layer(shape, i, row_dtype) for i in range(layers_to_rotate(shape, weight_format))]
    x = jax.random.normal(jax.random.key(8), (tokens, shape.hidden), row_dtype)
    weights = jax.random.uniform(jax.random.key(7), ids.shape, jnp.float32, 0.5, 1.5)
    weights /= weights.sum(-1, keepdims=True)
    block = partial(expert_block, implementation=implementation)

    exact = float32_block(x, layers[0], weights[0], ids[0])
    error = np.asarray(block(x, layers[0], weights[0], jnp.asarray(ids[0])), np.float32) - exact
    times = chain_microseconds(block, x, layers, weights, ids, min(samples, _SAMPLES), pause_seconds)
    median = statistics.median(times)
    return {
        "implementation": f"tokamax {tokamax.__version__}",
        "block_us": median,
        "block_p10_us": times[len(times) // 10],
        "block_p90_us": times[-1 - len(times) // 10],
        "gemm1_us": None,
        "gemm2_us": None,
        "jit_us": median,
        "rel_l2": float(np.linalg.norm(error) / np.linalg.norm(exact)),
    }
