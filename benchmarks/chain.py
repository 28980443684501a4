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
    """Microseconds of `block(x, layer, weights, ids)`, one value for every ten calls of the chain; sorted."""
    chain = compile_chain(block, x, layers, weights, ids)
    return time_chain(chain, x, layers, weights, ids, samples, pause_seconds)


def compile_chain(
    block: Callable[..., jax.Array], x: jax.Array, layers: Sequence, weights: Sequence[jax.Array], ids: np.ndarray
) -> Callable[..., jax.Array]:
    """A chain of blocks, as many as there are ids, from rows and a buffer to the same rows and the result.

    Each block is fed by the one before, with the next layer and a routing of its own. All calls begin with the same
    rows: fed back over and over, the rows of different tokens become alike, and choose the same experts. They and the
    result's buffer are donated, so that every call finds its buffers where the captured graph has them.
    """

    @partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def chain(x, buffer, layers, weights, ids):
        y = x
        for i in range(len(ids)):
            y = block(y, layers[i % len(layers)], weights[i], ids[i])
            if ends_a_norm(i, len(ids)):
                y = unit_rows(y)
        return x, y

    return chain.lower(x, x, layers, list(weights), list(jnp.asarray(ids))).compile()


def time_chain(
    chain: Callable[..., jax.Array],
    x: jax.Array,
    layers: Sequence,
    weights: Sequence[jax.Array],
    ids: np.ndarray,
    samples: int,
    pause_seconds: float = 0.0,
    calls: int = _CALLS,
) -> list[float]:
    """Microseconds of one block of a compiled chain, one value for so many calls; sorted.

    Calls follow each other as in a decoding loop, waited for once in so many.
    """
    arguments = layers, list(weights), list(jnp.asarray(ids))
    x, y = x + 0, x + 0

    def call() -> jax.Array:
        nonlocal x, y
        x, y = chain(x, y, *arguments)
        return y

    seconds_of_calls(call, max(calls // 2, 2), pause_seconds)
    if not jnp.isfinite(y.astype(jnp.float32)).all():
        raise FloatingPointError("the chain's rows are not finite")
    return sorted(seconds_of_calls(call, calls, pause_seconds) / len(ids) * 1e6 for _ in range(samples))


def ends_a_norm(block: int, blocks: int) -> bool:
    """Whether the rows are brought back to unit length after a block."""
    return block % _BLOCKS_PER_NORM == _BLOCKS_PER_NORM - 1 or block == blocks - 1


def unit_rows(x: jax.Array) -> jax.Array:
    """Rows brought back to unit length."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + 1e-30)
    return (x * scale).astype(x.dtype)
