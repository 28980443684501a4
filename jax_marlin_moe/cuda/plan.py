"""Plans of whole expert blocks: from static shapes to the kernels of a call, how they are tiled, over which buffers.

Pointers are the kernels' only run-time parameters: every extent is a compile-time constant of the C++ types that are
spelled here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.byte_rows import ByteDtype, has_groups, number_type
from jax_marlin_moe.cuda.block_kernels import BlockBuffers, BlockKernels
from jax_marlin_moe.cuda.block_scheme import block_scheme
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.grouped_gemm import gemm_shape
from jax_marlin_moe.cuda.limits import check_counts, check_matrix, check_rows
from jax_marlin_moe.cuda.plan_byte_rows import multiplies_bytes
from jax_marlin_moe.cuda.program import Plan, counted_plan
from jax_marlin_moe.cuda.scheme import BatchInvariant, BlockScheme
from jax_marlin_moe.cuda.token_ranges import MOST_EXACT_SLOTS, most_tokens
from jax_marlin_moe.operands import WEIGHT_OPERANDS, weight_operands
from jax_marlin_moe.weights import MarlinWeights


def plan_fused_moe(
    x: jax.Array,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    *,
    tokens: int,
    top_k: int,
    routed_experts: int,
    mapped: bool,
    activation: Activation,
    architecture: str,
    scheme: BlockScheme | BatchInvariant | None = None,
    scaled: bool = False,
    intermediate: str | None = None,
    out_dtype: jnp.dtype | None = None,
    rounded_to: jnp.dtype | None = None,
    activation_dtype: ByteDtype | None = None,
    sliced: bool = False,
    shared: int = 0,
) -> Plan:
    """Buffers: the operands of `operands_of_block`; y; scratch.

    `scaled` says whether there is an x_scale, `intermediate` how the intermediate is quantised; `rounded_to` and
    `sliced` as for `plan_block`. Many tokens get the program of a range of numbers. Each token visits `shared` experts
    beside `top_k` others: weights and ids name them too.
    """
    router = 1 + 2 * WEIGHT_OPERANDS
    of_shared = router + 5
    y = of_shared + (2 * WEIGHT_OPERANDS if shared else 0)
    buffers = BlockBuffers(
        x=0,
        gate_up=1,
        down=1 + WEIGHT_OPERANDS,
        topk_weights=router,
        topk_ids=router + 1,
        expert_map=router + 2 if mapped else None,
        x_scale=router + 3 if scaled else None,
        intermediate_scales=None if intermediate is None else router + 4,
        y=y,
        scratch=y + 1,
        shared_gate_up=of_shared if shared else None,
        shared_down=of_shared + WEIGHT_OPERANDS if shared else None,
    )
    most = None if activation_dtype is not None or sliced else most_of_program(tokens, top_k)
    plan = plan_block(
        rows_of_program(x, tokens, most),
        gate_up,
        down,
        buffers,
        tokens=most or tokens,
        top_k=top_k,
        routed_experts=routed_experts,
        activation=activation,
        architecture=architecture,
        scheme=scheme,
        shared=shared,
        intermediate=intermediate,
        out_dtype=out_dtype,
        rounded_to=rounded_to,
        activation_dtype=activation_dtype,
        sliced=sliced,
        counted=most is not None,
    )
    rows = {buffers.x: x.shape[0] // tokens, buffers.topk_weights: 1, buffers.topk_ids: 1, buffers.y: 1}
    return counted_plan(plan, tokens, most, rows | buffers.rows_of_scratch(top_k + shared), buffers.scratch)


def operands_of_block(
    x: jax.Array,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    expert_map: jax.Array | None = None,
    x_scale: jax.Array | None = None,
    intermediate_scales: jax.Array | None = None,
    shared: tuple[MarlinWeights, ...] = (),
) -> list[jax.Array | None]:
    """The operands of a call that `plan_fused_moe` plans, in the order of its buffers; `shared` are a pair, or none."""
    matrices = [*weight_operands(gate_up), *weight_operands(down)]
    of_slots = [topk_weights, topk_ids, expert_map, x_scale, intermediate_scales]
    return [x, *matrices, *of_slots, *(leaf for matrix in shared for leaf in weight_operands(matrix))]


def most_of_program(tokens: int, top_k: int) -> int | None:
    """The most tokens of the program that blocks of that many share; None where they have one of their own.

    Where the CTAs of the products group the slots, they are compiled for their number.
    """
    return most_tokens(tokens) if tokens * top_k > MOST_EXACT_SLOTS else None


def rows_of_program(
    x: jax.Array | jax.ShapeDtypeStruct, tokens: int, most: int | None
) -> jax.Array | jax.ShapeDtypeStruct:
    """The rows that a program is compiled for: those of the call, or, of one for `most` tokens, as many for each."""
    return x if most is None else jax.ShapeDtypeStruct((x.shape[0] // tokens * most, x.shape[1]), x.dtype)


def plan_block(
    x: jax.Array | jax.ShapeDtypeStruct,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    buffers: BlockBuffers,
    *,
    tokens: int,
    top_k: int,
    routed_experts: int,
    activation: Activation,
    architecture: str,
    scheme: BlockScheme | BatchInvariant | None,
    shared: int = 0,
    intermediate: str | None = None,
    out_dtype: jnp.dtype | None = None,
    rounded_to: jnp.dtype | None = None,
    activation_dtype: ByteDtype | None = None,
    sliced: bool = False,
    counted: bool = False,
) -> Plan:
    """The kernels of an expert block, over these buffers. Each token visits `shared` experts beside `top_k` others.

    `rounded_to`: what the caller rounds results of `out_dtype` to; None for the same.

    `sliced`: the second product's rows take at most three times the memory of its input: where they need more, even
    with four columns in 64 bits, they are made and summed in slices of the columns. With `counted`, `tokens`, and the
    rows of x, are the most that a call may have; there are many.
    """
    capability = compute_capability(architecture)
    check_rows(x, capability)
    check_matrix("gate_up", gate_up)
    check_matrix("down", down)
    num_slots, num_experts = tokens * (top_k + shared), gate_up.num_experts + shared
    check_counts(num_slots, max(num_experts, routed_experts + shared), num_slots)
    first, second = gemm_shape(gate_up, activation.gated, x.dtype), gemm_shape(down, False, x.dtype)
    if activation_dtype is not None:
        byte, grouped = number_type(activation_dtype), has_groups(activation_dtype)
        in_bytes = [dataclasses.replace(shape, dtype=byte, row_groups=grouped) for shape in (first, second)]
        rows = num_slots / (routed_experts + shared) if scheme is None else None
        if multiplies_bytes(activation_dtype, in_bytes, capability, rows):
            first, second = in_bytes
    chosen = block_scheme(
        scheme,
        gate_up,
        down,
        first,
        second,
        tokens=tokens,
        top_k=top_k,
        routed_experts=routed_experts,
        shared=shared,
        architecture=architecture,
    )
    if counted and chosen.routing == "direct":  # whose slots are those of the call, not of a list
        chosen = dataclasses.replace(chosen, routing="aligned")
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    block = BlockKernels(
        x,
        gate_up,
        down,
        first,
        second,
        buffers,
        tokens=tokens,
        top_k=top_k,
        shared=shared,
        routed_experts=routed_experts + shared,
        activation=activation,
        capability=capability,
        scheme=chosen,
        in_order=scheme == "batch_invariant",
        intermediate=intermediate,
        dtype=dtype,
        rounded_to=dtype if rounded_to is None else jnp.dtype(rounded_to),
        activation_dtype=activation_dtype,
        sliced=sliced,
        counted=counted,
    )
    return block.plan()
