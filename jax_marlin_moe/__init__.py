"""Mixture-of-experts layers with quantised weights, as ordinary JAX functions.

import jax_marlin_moe as jmm

gate_up = jmm.quantize(dense_gate_up, "int4", group_size=128)
down = jmm.quantize(dense_down, "int4", group_size=128)
weights, ids = jmm.route(logits, top_k=8)
y = jmm.fused_moe(x, gate_up, down, weights, ids)
"""

from jax_marlin_moe import checkpoint, exported_types, sharding
from jax_marlin_moe.activations import Activation, situ, swiglu, swiglu_step
from jax_marlin_moe.checkpoint import schemes
from jax_marlin_moe.checkpoint.schemes import *  # noqa: F403
from jax_marlin_moe.formats import FORMATS, WeightFormat
from jax_marlin_moe.layer import MoELayer, SharedExpert
from jax_marlin_moe.native import CUSTOM_CALL_TARGETS
from jax_marlin_moe.ops.align import BlockAlignment, moe_align_block_size
from jax_marlin_moe.ops.fused_moe import fused_moe
from jax_marlin_moe.ops.moe_gemm import moe_gemm
from jax_marlin_moe.ops.workspace import workspace_size
from jax_marlin_moe.packing import dense_weights, dequantize, fold_input_order, pack_logical
from jax_marlin_moe.quantize import quantize
from jax_marlin_moe.routing import Routing, route
from jax_marlin_moe.weights import MarlinWeights, concatenate_columns, stack_experts

exported_types.register()

__version__ = "0.1.0"

__all__ = [
    "CUSTOM_CALL_TARGETS",
    "FORMATS",
    "Activation",
    "BlockAlignment",
    "MarlinWeights",
    "MoELayer",
    "Routing",
    "SharedExpert",
    "WeightFormat",
    "checkpoint",
    "concatenate_columns",
    "dense_weights",
    "dequantize",
    "fold_input_order",
    "fused_moe",
    "moe_align_block_size",
    "moe_gemm",
    "pack_logical",
    "quantize",
    "route",
    "sharding",
    "situ",
    "stack_experts",
    "swiglu",
    "swiglu_step",
    "workspace_size",
]
__all__ += schemes.__all__
