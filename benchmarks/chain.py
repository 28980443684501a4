"""What a block costs a user: its share of a jitted chain of blocks that is called again and again, host included."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_CALLS = 10
# A block is about quadratic in its rows: fed back to itself it dies out or overflows within some ten blocks, and the
# card, which pays for bits that change, runs faster on zeros. So the rows are brought back to unit length every third
# block, where a deviation has grown by 2^3.
_BLOCKS_PER_NORM = 3


def seconds_of_calls(call: Callable[[], jax.Array], calls: int, pause_seconds: float) -> float:
    """Of one of several calls in a row, waited for once, after a rest."""
    time.sleep(pause_seconds)
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def chain_microseconds(
    block: Callable[..., jax.Array],
    x: jax.Array,
    layers: Sequence,
    weights: Sequence[jax.Array],
    ids: np.ndarray,
    samples: int,
    pause_seconds: float = 0.0,
) -> list[float]:
    """Microseconds of `block(x, layer, weights, ids)`, one value for every ten calls of the chain; sorted.

    Each block is fed by the one before, with the next layer and a routing of its own. Calls follow each other as in a
    decoding loop, waited for once in ten. The rows are donated, so that every call finds its buffers where the captured
    graph has them.
    """

    @partial(jax.jit, donate_argnums=0)
    def chain(x, layers, weights, ids):
        for i in range(len(ids)):
            x = block(x, layers[i % len(layers)], weights[i], ids[i])
            if i % _BLOCKS_PER_NORM == _BLOCKS_PER_NORM - 1 or i == len(ids) - 1:
                scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-30)
                x = (x * scale).astype(x.dtype)
        return x

    arguments = layers, list(weights), list(jnp.asarray(ids))
    x = x + 0

    def call() -> jax.Array:
        nonlocal x
        x = chain(x, *arguments)
        return x

    seconds_of_calls(call, 5, pause_seconds)
    if not jnp.isfinite(x.astype(jnp.float32)).all():
        raise FloatingPointError("the chain's rows are not finite")
    return sorted(seconds_of_calls(call, _CALLS, pause_seconds) / len(ids) * 1e6 for _ in range(samples))
