"""Mixture-of-experts layers from checkpoints on disk, and the packed form of them.

Rows to add for more of them: naming families in `families.py`, quantisation schemes in `schemes.py`.
"""

from jax_marlin_moe.checkpoint.conversion import convert
from jax_marlin_moe.checkpoint.layer import MoELayer, SharedExpert
from jax_marlin_moe.checkpoint.loading import Checkpoint, load_moe_layer, load_moe_layers

__all__ = ["Checkpoint", "MoELayer", "SharedExpert", "convert", "load_moe_layer", "load_moe_layers"]
