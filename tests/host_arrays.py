"""Arrays by NumPy: JAX compiles a program for each shape, which takes longer than most calls under test."""

import jax
import numpy as np
from jax.typing import DTypeLike


def normal(seed: int, shape: tuple[int, ...], dtype: DTypeLike = "float32", scale: float = 1) -> jax.Array:
    """Numbers with standard deviation `scale`, rounded to `dtype` once."""
    numbers = scale * np.random.default_rng(seed).standard_normal(shape)
    return jax.device_put(numbers.astype(np.dtype(dtype)))


def zeros(shape: int | tuple[int, ...], dtype: DTypeLike = "float32") -> jax.Array:
    return jax.device_put(np.zeros(shape, np.dtype(dtype)))


def ones(shape: int | tuple[int, ...], dtype: DTypeLike = "float32") -> jax.Array:
    return jax.device_put(np.ones(shape, np.dtype(dtype)))
