"""How much memory a call takes on the device, by the device's own statistics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_PIECE_BYTES = 1 << 30  # free memory need not be in one piece


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that were allocated during a call beyond those before it and those of its result.

    Statistics have the peak of the whole process. Arrays that fill memory up to that peak make any further byte a new
    one.
    """
    device = jax.devices()[0]
    jax.block_until_ready(call())  # what a first call allocates, and stays
    stats = device.memory_stats()
    filling = jax.block_until_ready(_bytes_in_pieces(max(0, stats["peak_bytes_in_use"] - stats["bytes_in_use"])))
    before = device.memory_stats()
    result = jax.block_until_ready(call())
    most = device.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"]
    del filling
    return most - sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def _bytes_in_pieces(size: int) -> list[jax.Array]:
    return [jnp.zeros(min(_PIECE_BYTES, size - start), jnp.uint8) for start in range(0, size, _PIECE_BYTES)]
