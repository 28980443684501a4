"""The arguments of layers beside those of their blocks, checked. Errors name the argument and what it must be."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jax_marlin_moe import arguments
from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype
from jax_marlin_moe.formats import ACTIVATION_DTYPES
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.layer_operands import LayerOperands
from jax_marlin_moe.ops.block_arguments import as_scale, check_experts, check_fixed_scales, check_intermediate
from jax_marlin_moe.routing import Routing, check_routing
from jax_marlin_moe.shared_expert import SharedExpert
from jax_marlin_moe.weights import MarlinWeights

ROUTER_DTYPES = (*ACTIVATION_DTYPES, jnp.dtype(jnp.float32))


def checked_scales(
    activation_dtype: ByteDtype | None, x_scale: Any, intermediate: IntermediateQuantizer | None, num_experts: int
) -> Float32[Array, ""] | None:
    """The scale of x; raises TypeError or ValueError where it, or the intermediate's, goes with nothing."""
    for name, value in (("x_scale", x_scale), ("intermediate", intermediate)):
        if activation_dtype is None and value is not None:
            raise ValueError(f"{name} is not None and activation_dtype None; it must be None: rows stay in 16 bits")
    check_fixed_scales(activation_dtype, x_scale, intermediate)
    if intermediate is not None:
        check_intermediate(intermediate, num_experts)
    return None if x_scale is None else as_scale(x_scale)


def check_floats(name: str, array: Any, shape: tuple[int, ...], meaning: str, *, narrow: bool = False) -> None:
    """Raises TypeError on dtypes other than floats (`narrow`: those that kernels read), ValueError on another shape."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or (narrow and jnp.dtype(dtype) not in ROUTER_DTYPES):
        found = type(array).__name__ if dtype is None else dtype
        wanted = "bfloat16, float16 or float32" if narrow else "floating point"
        raise TypeError(f"{name} has dtype {found}; it must be {wanted}: cast it before the call")
    arguments.check_shape(name, array, shape, meaning)


def check_router(layer: LayerOperands, routing: Routing) -> None:
    """Raises TypeError or ValueError unless the rule, and the arrays that choose experts, are those of the layer."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing has type {type(routing).__name__}; it must be a jax_marlin_moe.Routing")
    tokens, hidden = layer.x.shape[0], layer.gate_up.k
    experts = layer.gate_up.num_experts if layer.expert_map is None else layer.expert_map.shape[0]
    experts += routing.identity_experts
    check_floats("router", layer.router, (hidden, experts), "(H, experts)", narrow=True)
    check_routing(routing, experts, alone=layer.correction_bias is None and layer.topk_ids is None)
    for name in ("router_bias", "correction_bias", "expert_scale"):
        if getattr(layer, name) is not None:
            check_floats(name, getattr(layer, name), (experts,), "(experts,)")
    if layer.router_input is not None:
        check_floats("router_input", layer.router_input, (tokens, hidden), "(tokens, H)", narrow=True)
    if layer.router_input_scale is not None:
        check_floats("router_input_scale", layer.router_input_scale, (hidden,), "(H,)")
    if layer.topk_ids is not None:
        arguments.check_array("topk_ids", layer.topk_ids, ndim=2, dtype=jnp.int32)
        arguments.check_shape("topk_ids", layer.topk_ids, (tokens, routing.top_k), "(tokens, top_k)")


def check_shared(x: jax.Array, shared: SharedExpert, activation: Activation) -> None:
    """Raises TypeError or ValueError unless the shared expert is one for rows like x."""
    if not isinstance(shared, SharedExpert):
        raise TypeError(f"shared has type {type(shared).__name__}; it must be a jax_marlin_moe.SharedExpert")
    gate_up, down, hidden = shared.gate_up, shared.down, x.shape[1]
    if isinstance(gate_up, MarlinWeights) != isinstance(down, MarlinWeights):
        raise TypeError(
            f"shared.gate_up has type {type(gate_up).__name__} and shared.down {type(down).__name__}; both must be "
            "packed, or both dense"
        )
    if isinstance(gate_up, MarlinWeights):
        assert isinstance(down, MarlinWeights)
        check_experts(x, gate_up, down, activation, within="shared.")
    else:
        assert not isinstance(down, MarlinWeights)
        for name, matrix in (("shared.gate_up", gate_up), ("shared.down", down)):
            if not hasattr(matrix, "ndim") or matrix.ndim != 2:
                kind, found = (
                    ("shape", tuple(matrix.shape)) if hasattr(matrix, "shape") else ("type", type(matrix).__name__)
                )
                raise ValueError(f"{name} has {kind} {found}; it must be a matrix, or packed")
        inner = down.shape[0]
        wide = f"(H, {activation.halves} * rows of shared.down)"
        check_floats("shared.gate_up", gate_up, (hidden, activation.halves * inner), wide)
        check_floats("shared.down", down, (inner, hidden), "(I, H)")
    if shared.gate is not None:
        check_floats("shared.gate", shared.gate, (hidden, 1), "(H, 1)")
