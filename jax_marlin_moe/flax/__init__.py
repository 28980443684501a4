"""Flax layers: `jax_marlin_moe.flax.nnx` and `jax_marlin_moe.flax.linen`. Flax is imported by those two alone."""
