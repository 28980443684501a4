"""Mixture-of-experts layers from quantised checkpoints on disk.

Rows to add for more of them: naming families in `families.py`, quantisation schemes in `schemes.py`.
"""

from jax_marlin_moe.checkpoint.layer import MoELayer, load_moe_layer

__all__ = ["MoELayer", "load_moe_layer"]
