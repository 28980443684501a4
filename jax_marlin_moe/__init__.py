"""Mixture-of-experts layers with quantised weights, as ordinary JAX functions.

import jax_marlin_moe as jmm

gate_up = jmm.quantize(dense_gate_up, "int4", group_size=128)
down = jmm.quantize(dense_down, "int4", group_size=128)
weights, ids = jmm.route(logits, top_k=8)
y = jmm.fused_moe(x, gate_up, down, weights, ids)

Public are the names that are imported here with `as`, and those of `checkpoint.schemes`.
"""

from jax_marlin_moe import checkpoint as checkpoint
from jax_marlin_moe import exported_types
from jax_marlin_moe import sharding as sharding
from jax_marlin_moe.activations import Activation as Activation
from jax_marlin_moe.activations import situ as situ
from jax_marlin_moe.activations import swiglu as swiglu
from jax_marlin_moe.activations import swiglu_step as swiglu_step
from jax_marlin_moe.checkpoint.schemes import *  # noqa: F403
from jax_marlin_moe.formats import FORMATS as FORMATS
from jax_marlin_moe.formats import WeightFormat as WeightFormat
from jax_marlin_moe.intermediate import IntermediateQuantizer as IntermediateQuantizer
from jax_marlin_moe.layer import MoELayer as MoELayer
from jax_marlin_moe.layer_slice import take_layer as take_layer
from jax_marlin_moe.native import CUSTOM_CALL_TARGETS as CUSTOM_CALL_TARGETS
from jax_marlin_moe.ops.align import BlockAlignment as BlockAlignment
from jax_marlin_moe.ops.align import moe_align_block_size as moe_align_block_size
from jax_marlin_moe.ops.expert_gemm import expert_gemm as expert_gemm
from jax_marlin_moe.ops.fused_moe import fused_moe as fused_moe
from jax_marlin_moe.ops.linear import linear as linear
from jax_marlin_moe.ops.moe_gemm import moe_gemm as moe_gemm
from jax_marlin_moe.ops.moe_layer import moe_layer as moe_layer
from jax_marlin_moe.ops.ragged_dot import ragged_dot as ragged_dot
from jax_marlin_moe.ops.workspace import workspace_size as workspace_size
from jax_marlin_moe.packing import dense_weights as dense_weights
from jax_marlin_moe.packing import dequantize as dequantize
from jax_marlin_moe.packing import fold_input_order as fold_input_order
from jax_marlin_moe.packing import pack_logical as pack_logical
from jax_marlin_moe.quantize import fake_quantize as fake_quantize
from jax_marlin_moe.quantize import quantize as quantize
from jax_marlin_moe.routing import Routing as Routing
from jax_marlin_moe.routing import route as route
from jax_marlin_moe.shared_expert import SharedExpert as SharedExpert
from jax_marlin_moe.stacked_layer import StackedMoELayer as StackedMoELayer
from jax_marlin_moe.stacked_layer import stack_layers as stack_layers
from jax_marlin_moe.tensorrt_moe import TensorRTMoE as TensorRTMoE
from jax_marlin_moe.weights import MarlinWeights as MarlinWeights
from jax_marlin_moe.weights import concatenate_columns as concatenate_columns
from jax_marlin_moe.weights import stack_experts as stack_experts

exported_types.register()

__version__ = "0.1.0"
