"""`fused_moe`: the whole expert block, align to weighted sum, as one custom call.

The contract is docs/formats.md, "The expert block".
"""

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe import arguments, native, reference
from jax_marlin_moe.activations import Activation, get_activation
from jax_marlin_moe.block_operands import BlockOperands
from jax_marlin_moe.byte_rows import ByteDtype, as_byte_dtype, scales_whole_rows
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.cuda.plan import operands_of_block, plan_fused_moe
from jax_marlin_moe.cuda.program import call_program
from jax_marlin_moe.cuda.scheme import BlockScheme, requested_scheme
from jax_marlin_moe.custom_call import custom_call
from jax_marlin_moe.intermediate import IntermediateQuantizer
from jax_marlin_moe.operand_types import replicated_type, shard_rows_like
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes, or_empty
from jax_marlin_moe.ops.block_arguments import (
    FP8_ROWS,
    as_block_rows,
    check_experts,
    check_fixed_scales,
    check_groups_of_rank,
    check_intermediate,
    check_rows_in_shares,
)
from jax_marlin_moe.ops.block_division import block_division
from jax_marlin_moe.ops.block_of_bytes import composed_of_bytes
from jax_marlin_moe.ops.four_numbers import WORDS, pack_fours
from jax_marlin_moe.ops.fused_moe_tangent import block_jvp
from jax_marlin_moe.ops.input_order import gather_input_order
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op
from jax_marlin_moe.ops.shares import choose_shares, count_shares, split_block
from jax_marlin_moe.weights import MarlinWeights, as_packed, drop_column_padding, pad_rows


def fused_moe(
    x: Float[Array, "tokens H"],
    gate_up: MarlinWeights,
    down: MarlinWeights,
    topk_weights: Float32[Array, "tokens top_k"],
    topk_ids: Int32[Array, "tokens top_k"],
    *,
    activation: str | Activation = "silu",
    expert_map: Int32[Array, " experts"] | None = None,
    x_scale: Float32[Array, ""] | None = None,
    intermediate: IntermediateQuantizer | None = None,
    activation_dtype: ByteDtype | DTypeLike | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    cuda_scheme: BlockScheme | None = None,
    batch_invariant: bool = False,
) -> Float[Array, "tokens H"]:
    """A mixture-of-experts block over packed experts.

    `out[t] = sum_j topk_weights[t, j] * (act(x[t] @ Wg[e] + bg[e], x[t] @ Wu[e] + bu[e]) @ Wd[e] + bd[e])` with
    `e = topk_ids[t, j]`. Products accumulate in float32; the activation's result is rounded to the type of x, the sum
    over j is in float32, in order, and rounded once. Experts named twice count twice.

    Args:
        x: bfloat16 or float16 tokens, or float8_e4m3fn ones with an `x_scale`; float32 ones are multiplied as bfloat16,
            and the result is float32. There may be further leading dimensions, which router weights and ids share.
        gate_up: experts of shape (H, 2 I), columns [gate | up]; (H, I) where the activation is not gated.
        down: experts of shape (I, H).
        topk_weights: router weights, float32 or rounded to fewer bits.
        topk_ids: int32 experts. Slots whose id is outside [0, E), or is mapped to -1, contribute nothing.
        activation: a name, as "silu" (`gate * sigmoid(gate) * up`), "gelu" or "relu2" (not gated), or made by
            `jax_marlin_moe.swiglu`, `swiglu_step` or `situ`; docs/formats.md, "The expert block", has them all.
        expert_map: int32, global to local expert, -1 for experts that live elsewhere.
        x_scale: float32, the factor of float8_e4m3fn tokens; one that is not positive and finite is refused where it is
            a number, and counts as zero in an array. With `activation_dtype` "float8_e4m3fn" or "int8", the scale that
            x is quantised by.
        intermediate: how the activation's result is quantised, in place of its rounding to the type of x; scales are
            those of the local experts.
        activation_dtype: None, or what the rows of both products are quantised to within the call, a name or a dtype
            (docs/formats.md, "8-bit activations"). "float8_e4m3fn" and "int8" have a scale per row,
            "float8_e4m3fn_g128" one per 128 columns of a row. Scales that calibration has fixed take the place of the
            rows' own for "float8_e4m3fn" and "int8": `x_scale` for x, and for the second product an `intermediate` of
            `IntermediateQuantizer.static_fp8` or `.static_int8`.
        preferred_element_type: of the result: that of x, which is the default, or float32, unrounded, for results that
            are summed again. For float8_e4m3fn float32, which is the default, or bfloat16.
        implementation: None (the best that works), "cuda", "cpu" or "xla".
        cuda_scheme: how CUDA cuts the block; None takes the measured or predicted best.
        batch_invariant: whether a token has the same bits whatever else is in the batch, and wherever it stands. On
            CUDA that takes a scheme whose sums depend on the matrices alone, slower than the best. On CPUs it is always
            so; "xla" does not have it.

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an argument has the wrong shape or value, or the implementation cannot run.
    """
    lead = None
    if arguments.has_batch(x):
        lead = x.shape[:-1]
        topk_weights = arguments.batch_rows("topk_weights", topk_weights, x)
        topk_ids = arguments.batch_rows("topk_ids", topk_ids, x)
        x = x.reshape(-1, x.shape[-1])
    y = _checked_block(
        x,
        gate_up,
        down,
        topk_weights,
        topk_ids,
        activation=activation,
        expert_map=expert_map,
        x_scale=x_scale,
        intermediate=intermediate,
        activation_dtype=activation_dtype,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
        cuda_scheme=requested_scheme(cuda_scheme, batch_invariant, implementation),
    )
    return y if lead is None else y.reshape(*lead, y.shape[-1])


def share_of_block(
    x: Float[Array, "tokens H"],
    gate_up: MarlinWeights,
    down: MarlinWeights,
    topk_weights: Float32[Array, "tokens top_k"],
    topk_ids: Int32[Array, "tokens top_k"],
    *,
    activation: str | Activation,
    expert_map: Int32[Array, " experts"] | None,
    out_dtype: jnp.dtype,
    rounded_to: jnp.dtype,
    implementation: str | None,
    activation_dtype: ByteDtype | None = None,
    x_scale: Float32[Array, ""] | None = None,
    intermediate: IntermediateQuantizer | None = None,
    columns_over: tuple[str, ...] = (),
) -> Float[Array, "tokens H"]:
    """What some of the experts add to `fused_moe`, as `out_dtype`; the sum of all shares is as `rounded_to`.

    An `out_dtype` of `four_numbers.WORDS` packs float32 shares; that has no derivative, and needs `can_pack` and rows
    of 16 bits. `columns_over` as for `expert_block`.
    """
    return _checked_block(
        x,
        gate_up,
        down,
        topk_weights,
        topk_ids,
        activation=activation,
        expert_map=expert_map,
        preferred_element_type=jnp.float32 if out_dtype != x.dtype else None,
        implementation=implementation,
        x_scale=x_scale,
        intermediate=intermediate,
        activation_dtype=activation_dtype,
        rounded_to=rounded_to,
        packed=out_dtype == WORDS,
        columns_over=columns_over,
    ).astype(out_dtype)


def can_pack(down: MarlinWeights) -> bool:
    """Whether shares of a block with this second matrix can be packed where they are made: it has no padded columns."""
    return down.n == down.padded_n


def _checked_block(
    x,
    gate_up,
    down,
    topk_weights,
    topk_ids,
    *,
    activation,
    expert_map,
    preferred_element_type,
    implementation,
    x_scale=None,
    intermediate=None,
    activation_dtype=None,
    cuda_scheme=None,
    rounded_to=None,
    packed=False,
    columns_over=(),
):
    """`fused_moe` of rows without further dimensions, or its packed shares; other options as for `expert_block`."""
    activation_dtype = as_byte_dtype(activation_dtype)
    x, x_scale, out_dtype = as_block_rows(x, x_scale, preferred_element_type, activation_dtype)
    topk_weights = arguments.as_router_weights("topk_weights", topk_weights)
    act = get_activation(activation)
    check_experts(x, gate_up, down, act)
    arguments.check_array("topk_ids", topk_ids, ndim=2, dtype=jnp.int32)
    arguments.check_array("topk_weights", topk_weights, ndim=2, dtype=jnp.float32)
    tokens, top_k = topk_ids.shape
    arguments.check_shape("topk_ids", topk_ids, (x.shape[0], top_k), "(tokens, top_k)")
    arguments.check_shape("topk_weights", topk_weights, (tokens, top_k), "(tokens, top_k)")
    arguments.check_expert_map(expert_map, gate_up.num_experts)
    routed_experts = gate_up.num_experts if expert_map is None else expert_map.shape[0]
    arguments.check_top_k(top_k, routed_experts)
    if intermediate is not None:
        check_intermediate(intermediate, gate_up.num_experts)
    check_fixed_scales(activation_dtype, x_scale, intermediate)
    return expert_block(
        x,
        gate_up,
        down,
        topk_weights,
        topk_ids,
        expert_map,
        x_scale,
        intermediate,
        activation=act,
        activation_dtype=activation_dtype,
        out_dtype=WORDS if packed else out_dtype,
        rounded_to=rounded_to,
        implementation=implementation,
        cuda_scheme=cuda_scheme,
        columns_over=columns_over,
    )


@one_program(
    "activation",
    "activation_dtype",
    "out_dtype",
    "rounded_to",
    "cuda_scheme",
    "columns_over",
    saved_as="fused_moe",
)
def expert_block(
    x,
    gate_up,
    down,
    topk_weights,
    topk_ids,
    expert_map,
    x_scale=None,
    intermediate=None,
    *,
    activation_dtype=None,
    out_dtype=None,
    rounded_to=None,
    columns_over=(),
    **params,
):
    """`fused_moe` of arguments that are checked, or that are those of `fused_moe_op`.

    `rounded_to` is what the caller rounds float32 results to once it has added others: what a kernel keeps on the way
    to them need not have more bits than that takes. None is `out_dtype`. An `out_dtype` of `WORDS` is for float32
    results as `pack_fours` packs them, of matrices without padded columns. `columns_over` are manual mesh axes along
    which devices have other columns of the intermediate dimension.
    """
    shares = count_shares(gate_up)
    if shares > 1:
        check_rows_in_shares(gate_up, shares, params["activation"], activation_dtype, intermediate)
        experts = gate_up.num_experts
        gate_up, down = split_block(gate_up, down, shares)
        topk_weights, topk_ids, expert_map = choose_shares(topk_weights, topk_ids, expert_map, experts, shares)
        if intermediate is not None and intermediate.scales.ndim:
            intermediate = dataclasses.replace(intermediate, scales=jnp.tile(intermediate.scales, shares))
    rows = x
    if x_scale is not None:
        rows = x if activation_dtype is not None else x.astype(FP8_ROWS)
        x_scale = x_scale.reshape(1)
    if intermediate is not None:
        scales = jnp.broadcast_to(intermediate.scales, (gate_up.num_experts,))
        intermediate = dataclasses.replace(intermediate, scales=scales)
    if gate_up.input_order is not None:
        expert = topk_ids.reshape(-1)
        if expert_map is not None:
            expert = expert_map[jnp.clip(expert, 0, expert_map.shape[0] - 1)]
        rows = gather_input_order(jnp.repeat(rows, topk_ids.shape[1], axis=0), gate_up, expert)
    out_dtype = rows.dtype if out_dtype is None else out_dtype
    block = BlockOperands(
        x=pad_rows(rows, gate_up),
        gate_up=as_packed(gate_up),
        down=as_packed(down),
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        expert_map=expert_map,
        x_scale=x_scale,
        intermediate=intermediate,
    )
    if columns_over and scales_whole_rows(activation_dtype, intermediate):
        # The scale of a row follows from the columns of all devices, and no kernel communicates between its products.
        y = composed_of_bytes(
            block,
            activation=params["activation"],
            activation_dtype=activation_dtype,
            implementation=params["implementation"],
            columns_over=columns_over,
        ).astype(out_dtype)
    else:
        if columns_over:
            check_groups_of_rank(gate_up, params["activation"], activation_dtype)
        (y,) = fused_moe_op(
            *block,
            activation_dtype=activation_dtype,
            out_dtype=out_dtype,
            cuda_rounded_to=out_dtype if rounded_to is None else rounded_to,
            **params,
        )
    return shard_rows_like(y if out_dtype == WORDS else drop_column_padding(y, down), x)


def _result(block: BlockOperands, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """Column padding included."""
    columns = block.down.padded_n // 2 if dtype == WORDS else block.down.padded_n
    return jax.ShapeDtypeStruct((block.topk_ids.shape[0], columns), dtype)


def _shape_rule(*operands, activation, activation_dtype, out_dtype):
    block = BlockOperands(*operands)
    return [replicated_type(block.x, _result(block, out_dtype).shape, out_dtype)]


def _packing(form: Callable) -> Callable:
    """A form that returns float32 where `out_dtype` says so, for words as well."""

    @wraps(form)
    def packed(*operands: Any, out_dtype: Any, **params: Any) -> Any:
        if out_dtype != WORDS:
            return form(*operands, out_dtype=out_dtype, **params)
        y = form(*operands, out_dtype=jnp.dtype(jnp.float32), **params)
        return [pack_fours(*(y if isinstance(y, list) else [y]))]

    return packed


@_packing
def _cpu(*operands, activation, activation_dtype, out_dtype):
    block = BlockOperands(*operands)
    if activation_dtype is not None:
        y = composed_of_bytes(block, activation=activation, activation_dtype=activation_dtype, implementation="cpu")
        return [y.astype(out_dtype)]
    intermediate = block.intermediate
    return custom_call(
        "fused_moe",
        native.TARGETS["fused_moe", "cpu"],
        [
            block.x,
            *cpu_weight_operands(block.gate_up),
            *cpu_weight_operands(block.down),
            block.topk_weights,
            block.topk_ids,
            or_empty(block.expert_map, jnp.int32),
            or_empty(block.x_scale, jnp.float32),
            or_empty(None if intermediate is None else intermediate.scales, jnp.float32),
        ],
        [_result(block, out_dtype)],
        activation=activation.name,
        activation_parameters=np.asarray(activation.parameters, np.float32),
        intermediate="none" if intermediate is None else intermediate.kind,
        **format_attributes("gate_up_", block.gate_up),
        **format_attributes("down_", block.down),
    )


def _cuda(*operands, activation, activation_dtype, out_dtype, cuda_scheme, cuda_rounded_to, cuda_sliced=False):
    block = BlockOperands(*operands)
    result, intermediate, expert_map = _result(block, out_dtype), block.intermediate, block.expert_map
    tokens, top_k = block.topk_ids.shape
    if tokens == 0:
        return [jnp.zeros(result.shape, result.dtype)]
    architecture = target_architecture()
    plan = plan_fused_moe(
        block.x,
        block.gate_up,
        block.down,
        tokens=tokens,
        top_k=top_k,
        routed_experts=block.gate_up.num_experts if expert_map is None else expert_map.shape[0],
        mapped=expert_map is not None,
        activation=activation,
        architecture=architecture,
        scheme=cuda_scheme,
        scaled=block.x_scale is not None,
        intermediate=None if intermediate is None else intermediate.kind,
        out_dtype=out_dtype,
        rounded_to=cuda_rounded_to,
        activation_dtype=activation_dtype,
        sliced=cuda_sliced,
    )
    buffers = operands_of_block(
        block.x,
        block.gate_up,
        block.down,
        block.topk_weights,
        block.topk_ids,
        expert_map=expert_map,
        x_scale=block.x_scale,
        intermediate_scales=None if intermediate is None else intermediate.scales,
    )
    return call_program("fused_moe", buffers, [result], plan, architecture)


def _division(*, activation, activation_dtype, out_dtype):
    return block_division(activation, activation_dtype, share=_share)


def _share(call, part, *operands, out_dtype, **params):
    block = BlockOperands(*operands)
    local = block._replace(
        down=part.with_bias_once(block.down), expert_map=part.local_map(block.expert_map, block.gate_up.num_experts)
    )
    tokens, columns = block.topk_ids.shape[0], block.down.padded_n
    if part.platform == "cuda" and params["activation_dtype"] is None and part.packs((tokens, columns), out_dtype):
        return [part.total_of_packed(*call(*local, out_dtype=WORDS), out_dtype)]
    return [part.total(*call(*local, out_dtype=jnp.dtype(jnp.float32)), out_dtype)]


fused_moe_op = Op(
    "fused_moe",
    shape_rule=_shape_rule,
    reference=_packing(reference.fused_moe),
    cpu=_cpu,
    cuda=_cuda,
    operands=BlockOperands._fields,
    cuda_options=("cuda_scheme", "cuda_rounded_to", "cuda_sliced"),
    jvp=block_jvp,
    rows=("x", "topk_weights", "topk_ids"),
    division=_division,
)
