"""Rounding that stays where it is written, whatever is fused with it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rounded(values: Float32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """`values.astype(dtype)`, also where the result is cast to float32 again: on GPUs XLA drops such casts."""
    facts = jnp.finfo(dtype)
    kept = jax.lax.reduce_precision(values, exponent_bits=facts.nexp, mantissa_bits=facts.nmant)
    if dtype == jnp.float16:  # `reduce_precision` flushes its subnormals
        kept = jnp.where(jnp.abs(values) < facts.smallest_normal, values, kept)
    return kept.astype(dtype)
