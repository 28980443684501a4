"""The commands of `python -m jax_marlin_moe`, one file each, and what they share."""
