"""For Flax: layers in `jax_marlin_moe.flax.nnx` and `.linen`, states in `.serialization`; they alone import Flax."""
