"""Rounding that stays where it is written, whatever is fused with it.

A cast and a cast back are not enough: on GPUs XLA drops the pair, and keeps the excess precision.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rounded(values: Float32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """`values.astype(dtype)`, also where the result is cast to float32 again; its derivative is that of the cast."""
    return _reduced(values, dtype, of_subnormal=lambda value: value).astype(dtype)


def round_to(values: Float32[Array, "..."], dtype: jnp.dtype) -> Float32[Array, "..."]:
    """Non-negative float32 values, rounded to ones that `dtype` stores exactly."""
    return _reduced(values, dtype, of_subnormal=lambda value: jnp.round(value * 2.0**24) * 2.0**-24)


def _reduced(values, dtype, *, of_subnormal):
    """Values of the dtype's precision; those of float16 that `reduce_precision` flushes are `of_subnormal`'s."""
    facts = jnp.finfo(dtype)
    reduced = jax.lax.reduce_precision(values, exponent_bits=facts.nexp, mantissa_bits=facts.nmant)
    if dtype != jnp.float16:
        return reduced
    return jnp.where(jnp.abs(values) < facts.smallest_normal, of_subnormal(values), reduced)
