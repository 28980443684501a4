"""`moe_layer`: a whole layer, from its rows to its result: router, experts and shared expert.

The contract is docs/formats.md, "The layer".
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import arguments, native, reference_layer
from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype
from jax_marlin_moe.cuda.compiler import compute_capability, target_architecture
from jax_marlin_moe.cuda.kernels.router import RULE_OPTIONS, Router
from jax_marlin_moe.cuda.plan_layer import ROUTER_OPERANDS, choice_buffers, plan_moe_layer
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.cuda.scheme import BlockScheme, requested_scheme
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.layer_operands import LayerOperands
from jax_marlin_moe.operand_types import replicated_type, shard_rows_like
from jax_marlin_moe.operands import WEIGHT_OPERANDS, cpu_weight_operands, format_attributes, or_empty, weight_operands
from jax_marlin_moe.ops.block_arguments import check_experts
from jax_marlin_moe.ops.block_division import block_division
from jax_marlin_moe.ops.fused_moe import expert_block
from jax_marlin_moe.ops.layer_arguments import (
    ROUTER_DTYPES,
    check_floats,
    check_router,
    check_shared,
    checked_scales,
)
from jax_marlin_moe.ops.layer_composition import composition, shared_beside
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op
from jax_marlin_moe.ops.shares import count_shares
from jax_marlin_moe.ops.tangents import jvp_of
from jax_marlin_moe.reference_layer import scaled_rows
from jax_marlin_moe.routing import Routing
from jax_marlin_moe.shared_expert import SharedExpert, packed_alike
from jax_marlin_moe.weights import MarlinWeights, as_packed, drop_column_padding, pad_rows


def moe_layer(
    x: Float[Array, "tokens H"],
    router: Float[Array, "H experts"],
    gate_up: MarlinWeights,
    down: MarlinWeights,
    *,
    routing: Routing,
    activation: str | Activation = "silu",
    shared: SharedExpert | None = None,
    shared_activation: str | Activation | None = None,
    router_bias: Float[Array, " experts"] | None = None,
    correction_bias: Float[Array, " experts"] | None = None,
    expert_scale: Float[Array, " experts"] | None = None,
    router_input: Float[Array, "tokens H"] | None = None,
    router_input_scale: Float[Array, " H"] | None = None,
    norm_epsilon: float = 1e-6,
    expert_input_scale: Float[Array, " H"] | None = None,
    topk_ids: Int32[Array, "tokens top_k"] | None = None,
    expert_map: Int32[Array, " experts"] | None = None,
    activation_dtype: ByteDtype | DTypeLike | None = None,
    x_scale: Float32[Array, ""] | None = None,
    intermediate: IntermediateQuantizer | None = None,
    return_routing: bool = False,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    cuda_scheme: BlockScheme | None = None,
    batch_invariant: bool = False,
) -> Any:
    """A whole mixture-of-experts layer in one custom call.

    `route` of `x @ router + router_bias`, in float32, chooses experts; `fused_moe` runs them; the shared expert is
    added in float32, and the sum is rounded once. Rows whose logits are infinite or not numbers choose experts too,
    distinct ones, and change no other row.

    Args:
        x: bfloat16 or float16 tokens; of float32 ones the experts multiply a rounding to bfloat16, the router reads all
            bits, and the result is float32. There may be further leading dimensions, which `router_input` and
            `topk_ids` share.
        router: bfloat16, float16 or float32, input dimension first.
        gate_up: as for `fused_moe`.
        down: as for `fused_moe`.
        routing: how the model chooses experts.
        activation: as for `fused_moe`.
        shared: the expert that every token visits. It runs in the kernels of the others where it is packed as they are,
            beside them otherwise.
        shared_activation: of the shared expert; None, that of the others.
        router_bias: added to the logits.
        correction_bias: added to the scores for the choice alone.
        expert_scale: factors of the router weights by expert.
        router_input: what the router reads, where it is not x.
        router_input_scale: where it is there, the router reads `rms_norm(rows) * scale / sqrt(H)`.
        norm_epsilon: of that norm.
        expert_input_scale: where it is there, the routed experts read `x * expert_input_scale`, rounded to the type of
            x; the router, the shared expert and identity experts read x.
        topk_ids: int32 experts that are chosen already; their weights follow from the router as usual.
        expert_map: as for `fused_moe`; the router then has a column for each expert that ids may name.
        activation_dtype: as for `fused_moe`, of packed experts, the shared one among them; the router and a dense
            shared expert read x. The router, the experts and the shared one are then custom calls of their own.
        x_scale: with `activation_dtype`, as for `fused_moe`, of the routed experts: rows of the shared one have scales
            of their own.
        intermediate: likewise.
        return_routing: whether router weights and expert ids are returned beside the result.
        preferred_element_type: of the result: that of x, which is the default, or float32, unrounded, for results that
            are summed again.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        cuda_scheme: as for `fused_moe`.
        batch_invariant: as for `fused_moe`, of the router too.

    Returns:
        The rows' results, of the shape of x; with `return_routing` a tuple of them, the router weights
        (float32, [..., top_k]) and the expert ids (int32, likewise).

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    lead = None
    if arguments.has_batch(x):
        lead = x.shape[:-1]
        router_input = None if router_input is None else arguments.batch_rows("router_input", router_input, x)
        topk_ids = None if topk_ids is None else arguments.batch_rows("topk_ids", topk_ids, x)
        x = x.reshape(-1, x.shape[-1])
    rows, dtype = arguments.as_rows("x", x, preferred_element_type)
    if router_input is None and rows.dtype != x.dtype:
        router_input = x
    x = rows
    arguments.check_rank("x", x, 2)
    act = get_activation(activation)
    shared_act = act if shared_activation is None else get_activation(shared_activation)
    check_experts(x, gate_up, down, act)
    arguments.check_expert_map(expert_map, gate_up.num_experts)
    layer = LayerOperands(
        x=x,
        router=router,
        gate_up=gate_up,
        down=down,
        shared=shared,
        router_bias=router_bias,
        correction_bias=correction_bias,
        expert_scale=expert_scale,
        router_input=router_input,
        router_input_scale=router_input_scale,
        topk_ids=topk_ids,
        expert_map=expert_map,
    )
    check_router(layer, routing)
    if shared is not None:
        check_shared(x, shared, shared_act)
    activation_dtype = as_byte_dtype(activation_dtype)
    x_scale = checked_scales(activation_dtype, x_scale, intermediate, gate_up.num_experts)
    if expert_input_scale is not None:
        check_floats("expert_input_scale", expert_input_scale, (gate_up.k,), "(H,)")
    results = _layer(
        *layer,
        routing=routing,
        activation=act,
        shared_activation=shared_act,
        norm_epsilon=arguments.as_number("norm_epsilon", norm_epsilon),
        activation_dtype=activation_dtype,
        x_scale=x_scale,
        intermediate=intermediate,
        expert_input_scale=expert_input_scale,
        out_dtype=dtype,
        implementation=implementation,
        cuda_scheme=requested_scheme(cuda_scheme, batch_invariant, implementation),
    )
    if lead is not None:
        results = tuple(result.reshape(*lead, result.shape[-1]) for result in results)
    return results if return_routing else results[0]


@one_program(
    "routing",
    "activation",
    "shared_activation",
    "norm_epsilon",
    "activation_dtype",
    "out_dtype",
    "cuda_scheme",
    saved_as="moe_layer",
)
def _layer(*operands, activation_dtype, x_scale=None, intermediate=None, expert_input_scale=None, out_dtype, **params):
    layer = LayerOperands(*operands)
    shared = layer.shared
    if expert_input_scale is not None and shared is None and not params["routing"].identity_experts:
        # Nothing but the router reads x as it is.
        own = layer.x if layer.router_input is None else layer.router_input
        layer = layer._replace(x=scaled_rows(layer.x, expert_input_scale), router_input=own)
        expert_input_scale = None
    if activation_dtype is not None or expert_input_scale is not None:
        options = {"activation_dtype": activation_dtype, "x_scale": x_scale, "intermediate": intermediate}
        options |= {"expert_input_scale": expert_input_scale, "out_dtype": out_dtype}
        return composition(*layer, **options, **params)
    laid_out = [layer.gate_up] if shared is None else [layer.gate_up, shared.gate_up]
    if (
        layer.gate_up.input_order is not None
        or (shared is not None and _has_order(shared))
        or any(count_shares(one) > 1 for one in laid_out)
    ):
        # Experts that read x in orders of their own need a row per slot, which follows from the choice; so do experts
        # in shares.
        return composition(*layer, out_dtype=out_dtype, **params)
    if shared is not None and isinstance(shared.gate_up, MarlinWeights):
        shared = dataclasses.replace(shared, gate_up=as_packed(shared.gate_up), down=as_packed(shared.down))
    packed = layer._replace(
        x=pad_rows(layer.x, layer.gate_up), gate_up=as_packed(layer.gate_up), down=as_packed(layer.down), shared=shared
    )
    y, *choice = moe_layer_op(*packed, out_dtype=jnp.dtype(out_dtype), **params)
    return tuple(shard_rows_like(result, layer.x) for result in (drop_column_padding(y, layer.down), *choice))


def _has_order(shared: SharedExpert) -> bool:
    return isinstance(shared.gate_up, MarlinWeights) and shared.gate_up.input_order is not None


def _result_types(layer: LayerOperands, top_k: int, dtype: DTypeLike) -> list[jax.ShapeDtypeStruct]:
    """Rows, column padding included, router weights and ids."""
    tokens = layer.x.shape[0]
    return [
        jax.ShapeDtypeStruct((tokens, layer.down.padded_n), dtype),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.float32),
        jax.ShapeDtypeStruct((tokens, top_k), jnp.int32),
    ]


def _shape_rule(*operands, routing, out_dtype, **params):
    layer = LayerOperands(*operands)
    results = _result_types(layer, routing.top_k, out_dtype)
    return [replicated_type(layer.x, result.shape, result.dtype) for result in results]


# The scorings that the handler of csrc/ffi/moe_layer_cpu.cc knows.
_CPU_SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "identity", "chosen_sigmoid", "sparsemixer")


def _cpu(*operands, routing, activation, shared_activation, norm_epsilon, out_dtype):
    layer = LayerOperands(*operands)
    shared = layer.shared
    rules = dict(routing=routing, activation=activation, shared_activation=shared_activation, norm_epsilon=norm_epsilon)
    if shared is not None and (activation != shared_activation or not _sized_alike(layer, shared)):
        y, *choice = _cpu(*layer._replace(shared=None), **rules, out_dtype=jnp.dtype(jnp.float32))
        y += reference_layer.padded_to(y, shared_beside(layer.x, shared, shared_activation, implementation="cpu"))
        return [y.astype(out_dtype), *choice]
    if not _has_cpu_kernels(layer, routing):
        return composition(*layer, **rules, out_dtype=out_dtype, implementation="cpu")
    matrices = {"gate_up": layer.gate_up, "down": layer.down}
    if shared is not None:
        matrices |= {"shared_gate_up": shared.gate_up, "shared_down": shared.down}
    buffers, formats = [layer.x], {}
    for name in ("gate_up", "down", "shared_gate_up", "shared_down"):
        if name in matrices:
            buffers += cpu_weight_operands(matrices[name])
            formats |= format_attributes(f"{name}_", matrices[name])
        else:
            buffers += [or_empty(None, jnp.int32)] * WEIGHT_OPERANDS
    floats = (layer.router_input, layer.router_bias, layer.correction_bias, layer.expert_scale)
    buffers += [or_empty(layer.expert_map, jnp.int32), layer.router]
    buffers += [or_empty(array, jnp.float32) for array in floats]
    buffers.append(or_empty(layer.topk_ids, jnp.int32))
    buffers.append(or_empty(None if shared is None else shared.gate, jnp.float32))
    buffers.append(or_empty(layer.router_input_scale, jnp.float32))
    return custom_call(
        "moe_layer",
        native.TARGETS["moe_layer", "cpu"],
        buffers,
        _result_types(layer, routing.top_k, out_dtype),
        activation=activation.name,
        activation_parameters=np.asarray(activation.parameters, np.float32),
        scoring=routing.scoring,
        top_k=np.int64(routing.top_k),
        renormalize=bool(routing.renormalize),
        softmax_after_topk=bool(routing.softmax_after_topk),
        num_groups=np.int64(routing.num_groups),
        top_groups=np.int64(routing.top_groups),
        top2=routing.group_score == "top2",
        scale=np.float32(routing.scale),
        renormalize_epsilon=np.float32(routing.renormalize_epsilon),
        soft_cap=np.float32(routing.logits_soft_cap or 0),
        apply_on_input=bool(routing.apply_on_input),
        jitter=np.float32(routing.jitter),
        identity_experts=np.int64(routing.identity_experts),
        norm_epsilon=np.float32(norm_epsilon),
        **formats,
    )


def _has_cpu_kernels(layer: LayerOperands, routing: Routing) -> bool:
    """Whether the handler knows the rule, and every option of it, and has the types of the router's arrays."""
    gate = None if layer.shared is None else layer.shared.gate
    biases = (layer.router_bias, layer.correction_bias, layer.expert_scale)
    arrays = (layer.router, layer.router_input, layer.router_input_scale, *biases, gate)
    return (
        routing == Routing(**{name: getattr(routing, name) for name in RULE_OPTIONS})
        and routing.scoring in _CPU_SCORINGS
        and all(array is None or array.dtype in ROUTER_DTYPES for array in arrays)
    )


def _sized_alike(layer: LayerOperands, shared: SharedExpert) -> bool:
    """Whether the shared experts are packed, and as large as the others."""
    return all(
        isinstance(one, MarlinWeights) and (one.padded_k, one.padded_n) == (other.padded_k, other.padded_n)
        for one, other in ((shared.gate_up, layer.gate_up), (shared.down, layer.down))
    )


def _cuda(*operands, routing, activation, shared_activation, norm_epsilon, out_dtype, cuda_scheme):
    layer = LayerOperands(*operands)
    architecture = target_architecture()
    within = layer.shared if activation == shared_activation and _in_one_launch(layer, routing) else None
    beside = None if within is not None else layer.shared
    router = Router(
        layer.x if layer.router_input is None else layer.router_input,
        layer.router,
        routing,
        bias=layer.router_bias,
        correction_bias=layer.correction_bias,
        expert_scale=layer.expert_scale,
        given=layer.topk_ids,
        input_scale=layer.router_input_scale,
        norm_epsilon=norm_epsilon,
        gate=None if within is None else within.gate,
        shared=0 if within is None else within.gate_up.num_experts,
    )
    invariant = cuda_scheme == "batch_invariant"
    fits = router.fits(compute_capability(architecture), batch_invariant=invariant)
    if layer.x.shape[0] == 0 or not fits or (beside is not None and invariant):
        return composition(
            *layer,
            routing=routing,
            activation=activation,
            shared_activation=shared_activation,
            norm_epsilon=norm_epsilon,
            out_dtype=out_dtype,
            cuda_scheme=cuda_scheme,
            implementation="cuda",
        )
    dtype = out_dtype if beside is None else jnp.dtype(jnp.float32)
    plan = plan_moe_layer(
        layer.x,
        layer.gate_up,
        layer.down,
        router,
        own_input=layer.router_input is not None,
        mapped=layer.expert_map is not None,
        activation=activation,
        architecture=architecture,
        scheme=cuda_scheme,
        out_dtype=dtype,
        rounded_to=out_dtype,
    )
    placed = layer._asdict() | {"input_scale": layer.router_input_scale, "gate": router.gate, "given": layer.topk_ids}
    buffers = [placed[name] for name in ROUTER_OPERANDS]
    for matrix in (layer.gate_up, layer.down, *((None, None) if within is None else (within.gate_up, within.down))):
        buffers += [None] * WEIGHT_OPERANDS if matrix is None else weight_operands(matrix)
    buffers.append(layer.expert_map)
    results = [_result_types(layer, routing.top_k, dtype)[0], *choice_buffers(router)]
    y, *choice = call_program("moe_layer", buffers, results, plan, architecture)
    if beside is not None:
        extra = shared_beside(layer.x, beside, shared_activation, implementation="cuda")
        y = (y + reference_layer.padded_to(y, extra)).astype(out_dtype)
    return [y, *(slots[:, : routing.top_k] for slots in choice)]


def _in_one_launch(layer: LayerOperands, routing: Routing) -> bool:
    """Whether the CUDA kernels of the routed experts can run the shared ones too, which have the same activation.

    They must be packed as the others, and the router must be able to compute their gate; an expert map and identity
    experts have no place for them.
    """
    shared = layer.shared
    return (
        shared is not None
        and (shared.gate is None or (layer.router_input is None and layer.router_input_scale is None))
        and layer.expert_map is None
        and not routing.identity_experts
        and packed_alike(layer.gate_up, shared.gate_up)
        and packed_alike(layer.down, shared.down)
    )


def _jvp(op, primals, tangents, *, implementation, **params):
    """Those of the composition, whose ops have rules of their own; ids have none."""
    results, dots = jvp_of(partial(composition, implementation=implementation, **params), primals, tangents)
    return list(results), [*dots[:2], None]


def _division(*, activation, shared_activation, routing, norm_epsilon, out_dtype):
    division = block_division(activation, share=_share)
    return dataclasses.replace(division, results=(*division.results, None, None), vectors=(), weights=("shared",))


def _share(call, part, *operands, **params):
    """The layer in pieces: the router is on every device alike; what is added to experts, on those that keep a row."""

    def block(x, gate_up, down, topk_weights, ids, expert_map, *, out_dtype, **options):
        # `rounded_to`, among the options, is the type of the layer's result.
        local_map = part.local_map(expert_map, gate_up.num_experts)
        routed = x, gate_up, part.with_bias_once(down), topk_weights, ids, local_map
        return part.total(expert_block(*routed, out_dtype=jnp.dtype(jnp.float32), **options), out_dtype)

    return list(composition(*operands, **params, block=block, keep=part.keep))


moe_layer_op = Op(
    "moe_layer",
    shape_rule=_shape_rule,
    reference=reference_layer.moe_layer,
    cpu=_cpu,
    cuda=_cuda,
    operands=LayerOperands._fields,
    cuda_options=("cuda_scheme",),
    jvp=_jvp,
    rows=("x", "router_input", "topk_ids"),
    division=_division,
)
