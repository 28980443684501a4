"""Mixture-of-experts layers from checkpoints on disk, and the packed form of them.

Rows to add for more of them: naming families in `families.py`, quantisation schemes in `schemes/`.
"""

from jax_marlin_moe.checkpoint.conversion import convert
from jax_marlin_moe.checkpoint.families import FAMILIES
from jax_marlin_moe.checkpoint.family import Family, StackedNames, find_family
from jax_marlin_moe.checkpoint.loading import Checkpoint, load_moe_layer, load_moe_layers
from jax_marlin_moe.checkpoint.routing_rules import ActivationRule, Defaults, RoutingRule
from jax_marlin_moe.checkpoint.with_facts import with_facts, without_facts
from jax_marlin_moe.layer import MoELayer
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.stacked_layer import StackedMoELayer

__all__ = [
    "FAMILIES",
    "ActivationRule",
    "Checkpoint",
    "Defaults",
    "Family",
    "MoELayer",
    "RoutingRule",
    "SharedExpert",
    "StackedMoELayer",
    "StackedNames",
    "convert",
    "find_family",
    "load_moe_layer",
    "load_moe_layers",
    "with_facts",
    "without_facts",
]
