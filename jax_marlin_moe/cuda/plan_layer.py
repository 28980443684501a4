"""The kernels of a whole layer: the router before the expert block, in one call."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.cuda.block_kernels import BlockBuffers
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.kernels.combine import IdentityExperts
from jax_marlin_moe.cuda.kernels.router import (
    Router,
    RouterTile,
    WeightedRows,
    logits_buffer,
    product_kernel,
    router_tile,
    select_kernel,
)
from jax_marlin_moe.cuda.plan import most_of_program, plan_block, rows_of_program
from jax_marlin_moe.cuda.program import Kernel, Plan, counted_plan
from jax_marlin_moe.cuda.scheme import BatchInvariant, BlockScheme
from jax_marlin_moe.operands import WEIGHT_OPERANDS
from jax_marlin_moe.weights import MarlinWeights

# Operands before the matrices, in this order.
ROUTER_OPERANDS = (
    "x", "router", "router_input", "router_bias", "correction_bias", "expert_scale", "input_scale", "gate", "given",
)  # fmt: skip


def plan_moe_layer(
    x: jax.Array | jax.ShapeDtypeStruct,
    gate_up: MarlinWeights,
    down: MarlinWeights,
    router: Router,
    *,
    own_input: bool,
    mapped: bool,
    activation: Activation,
    architecture: str,
    scheme: BlockScheme | BatchInvariant | None = None,
    out_dtype: jnp.dtype | None = None,
    rounded_to: jnp.dtype | None = None,
) -> Plan:
    """Buffers: `ROUTER_OPERANDS`, gate_up (5), down (5), those shared (10), expert_map; y, weights, ids; scratch.

    `rounded_to` as for `plan_block`.
    """
    capability = compute_capability(architecture)
    place = {name: at for at, name in enumerate(ROUTER_OPERANDS)}
    first = len(ROUTER_OPERANDS)
    expert_map = first + 4 * WEIGHT_OPERANDS
    y, topk_weights, topk_ids, logits = (expert_map + i for i in range(1, 5))
    rule, weighted = router.routing, None
    tokens, slots = x.shape[0], router.slots
    most = most_of_program(tokens, rule.top_k)
    counted = most is not None
    router = dataclasses.replace(router, rows=rows_of_program(router.rows, tokens, most))
    x = rows_of_program(x, tokens, most)
    rows_of_token = dict.fromkeys((place["x"], place["router_input"], place["given"], y, topk_weights, topk_ids), 1)
    tile = router_tile(router, capability, batch_invariant=scheme == "batch_invariant")
    scratch = [logits_buffer(router, tile)]
    rows: Any = x
    if rule.apply_on_input:
        rows = jax.ShapeDtypeStruct((x.shape[0] * router.slots, x.shape[1]), x.dtype)
        at = logits + len(scratch)
        weighted = WeightedRows(place["x"], at, at + 1, x.dtype, x.shape[1])
        scratch += [rows, jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)]
        rows_of_token |= {at: slots, at + 1: slots}
    identity = None
    if rule.identity_experts:
        identity = IdentityExperts(rule.identity_experts, place["x"], x.dtype, x.shape[1], topk_weights)

    kernels = _router_kernels(
        router,
        tile,
        place,
        own_input=own_input,
        logits=logits,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        weighted=weighted,
        overlaps=capability >= 90,
        counted=counted,
    )
    buffers = BlockBuffers(
        x=place["x"] if weighted is None else weighted.rows,
        gate_up=first,
        down=first + WEIGHT_OPERANDS,
        topk_weights=topk_weights if weighted is None else weighted.slot_weights,
        topk_ids=topk_ids,
        expert_map=expert_map if mapped else None,
        y=y,
        scratch=logits + len(scratch),
        ids_from_previous=True,
        shared_gate_up=first + 2 * WEIGHT_OPERANDS if router.shared else None,
        shared_down=first + 3 * WEIGHT_OPERANDS if router.shared else None,
        identity=identity,
    )
    block = plan_block(
        rows,
        gate_up,
        down,
        buffers,
        tokens=x.shape[0],
        top_k=rule.top_k,
        routed_experts=router.experts - rule.identity_experts,
        activation=activation,
        architecture=architecture,
        scheme=scheme,
        shared=router.shared,
        out_dtype=out_dtype,
        rounded_to=rounded_to,
        counted=counted,
    )
    plan = dataclasses.replace(block, kernels=(*kernels, *block.kernels), scratch=(*scratch, *block.scratch))
    return counted_plan(plan, tokens, most, rows_of_token | buffers.rows_of_scratch(slots), logits)


def _router_kernels(
    router: Router,
    tile: RouterTile,
    place: Mapping[str, int],
    *,
    own_input: bool,
    logits: int,
    topk_weights: int,
    topk_ids: int,
    weighted: WeightedRows | None,
    overlaps: bool,
    counted: bool,
) -> tuple[Kernel, Kernel]:
    """The router's product, and the choice of experts; `place` has the buffers of `ROUTER_OPERANDS`."""

    def present(name: str, array: jax.Array | None) -> int | None:
        return None if array is None else place[name]

    product = product_kernel(
        router,
        tile,
        rows=place["router_input" if own_input else "x"],
        kernel=place["router"],
        gate=present("gate", router.gate),
        scale=present("input_scale", router.input_scale),
        out=logits,
        counted=counted,
    )
    select = select_kernel(
        router,
        tile,
        logits=logits,
        bias=present("router_bias", router.bias),
        correction_bias=present("correction_bias", router.correction_bias),
        expert_scale=present("expert_scale", router.expert_scale),
        given=present("given", router.given),
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        overlaps_predecessor=overlaps,
        weighted=weighted,
        counted=counted,
    )
    return product, select


def choice_buffers(router: Router) -> list[jax.ShapeDtypeStruct]:
    """Weights and ids of all slots."""
    shape = (router.rows.shape[0], router.slots)
    return [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)]
