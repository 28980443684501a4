"""The router: its product, and the choice of experts. Twin of csrc/cuda/router."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Bound, Facts, Pointer, optional, token_count
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel
from jax_marlin_moe.routing import Routing

_NUMBERS = {"float16": "jmm::Half", "bfloat16": "jmm::BFloat", "float32": "float"}
# The scores of each scoring. Those that choose by the logits themselves differ in their weights.
_SCORES = {
    "softmax": "SoftmaxScores",
    "sigmoid": "SigmoidScores",
    "sqrtsoftplus": "SqrtSoftplusScores",
    "identity": "IdentityScores",
    "chosen_sigmoid": "IdentityScores",
    "sparsemixer": "IdentityScores",
}
# The options of a rule that the kernels know.
RULE_OPTIONS = (
    "top_k",
    "scoring",
    "renormalize",
    "softmax_after_topk",
    "num_groups",
    "top_groups",
    "group_score",
    "scale",
    "apply_on_input",
    "logits_soft_cap",
    "renormalize_epsilon",
    "jitter",
    "identity_experts",
)
_MOST_LANES = 32
_MOST_EXPERTS = 1024
_MOST_SLICES = 64
_INVARIANT_SLICES = 8
_MOST_PLAIN_TOKENS = 512
_MOST_ALONE = 128  # experts
_MOST_NUMBERS = 192  # of slices, that a lane has registers for
_MOST_APART = 1024  # tokens
_LEAST_FELT = 1e-12  # beside the largest of 1024 scores whose sum is 1


@dataclasses.dataclass(frozen=True)
class Router:
    """The arrays of a router, as shapes and dtypes, and its rule.

    Attributes:
        rows: what it reads, [tokens, columns], any float; columns from K on are padding.
        kernel: [K, experts].
        routing: the rule.
        bias: added to the logits, or None.
        correction_bias: added to the scores, or None.
        expert_scale: factors of the weights, or None.
        given: experts that are chosen already, or None.
        input_scale: [K] where it reads `rms_norm(rows) * input_scale / sqrt(K)`, or None.
        norm_epsilon: of that norm.
        gate: of the shared expert, or None.
        shared: experts that every token visits, behind those of its choice.
    """

    rows: jax.Array | jax.ShapeDtypeStruct
    kernel: jax.Array
    routing: Routing
    bias: jax.Array | None = None
    correction_bias: jax.Array | None = None
    expert_scale: jax.Array | None = None
    given: jax.Array | None = None
    input_scale: jax.Array | None = None
    norm_epsilon: float = 1e-6
    gate: jax.Array | None = None
    shared: int = 0

    @property
    def experts(self) -> int:
        """That it chooses among."""
        return self.kernel.shape[1]

    @property
    def slots(self) -> int:
        """Of a token: its choice, and the shared experts."""
        return self.routing.top_k + self.shared

    @property
    def stride(self) -> int:
        """Of a token's logits, with the gate's and the sum of squares behind them."""
        return -(-(self.experts + (self.gate is not None) + (self.input_scale is not None)) // 4) * 4

    def fits(self, capability: int, *, batch_invariant: bool = False) -> bool:
        """Whether the kernels can be this router, and are faster than XLA's: the plain product is for few tokens.

        With `batch_invariant`, whether they can.
        """
        known = Routing(**{name: getattr(self.routing, name) for name in RULE_OPTIONS})
        floats = (self.bias, self.correction_bias, self.expert_scale, self.input_scale, self.gate)
        return (
            known == self.routing
            and self.routing.scoring in _SCORES
            and all(array is None or array.dtype.name in _NUMBERS for array in (*floats, self.rows, self.kernel))
            and self.experts <= _MOST_EXPERTS
            and max(self.slots, self.routing.num_groups) <= _MOST_LANES
            and (batch_invariant or self.rows.shape[0] <= _MOST_PLAIN_TOKENS or self.fits_tensor_cores(capability))
        )

    def fits_tensor_cores(self, capability: int) -> bool:
        """Whether the product is one of tensor cores."""
        return (
            capability >= 80
            and self.rows.dtype.name in ("float16", "bfloat16")
            and self.kernel.shape[0] % 16 == 0
            and self.rows.shape[1] % 8 == 0
            and self.experts * self.kernel.dtype.itemsize % 4 == 0
        )


@dataclasses.dataclass(frozen=True)
class RouterTile:
    """How the product is cut.

    Attributes:
        tokens: of a CTA.
        experts: of a CTA.
        slices: of K.
        block: rows of K of a stage.
        stages: of a CTA; 0 where it has no tensor cores to feed.
        warps_n: along the experts.
        warps_t: along the tokens.
        warps_of_token: of the selection that add up a token's slices.
    """

    tokens: int
    experts: int
    slices: int
    block: int
    stages: int = 0
    warps_n: int = 4
    warps_t: int = 1
    warps_of_token: int = 1


def router_tile(router: Router, capability: int, *, batch_invariant: bool = False) -> RouterTile:
    """Few tokens: slices of K for all multiprocessors. Many: tiles so large that rows and router are seldom read.

    With `batch_invariant`, what decides the order of a logit's sum does not depend on the number of tokens.
    """
    tokens, experts = router.rows.shape[0], router.experts
    if not router.fits_tensor_cores(capability):
        return _plain_tile(router, capability, batch_invariant)
    many = tokens > 512
    tile = 128 if many else next((size for size in (8, 16, 32) if tokens <= max(size, size // 32 * 128)), 64)
    columns = min(128 if many else 64, max(16, 1 << math.ceil(math.log2(experts))))
    warps_n = min(4, columns // 16)
    warps_t = min((4 if tile <= 32 else 8) // warps_n, tile // 8)
    block = 32 if router.kernel.dtype.itemsize == 4 and (many or batch_invariant) else 64
    blocks = -(-router.kernel.shape[0] // block)
    tiles = -(-tokens // tile) * -(-experts // columns)
    # What a slice leaves is written and read again, which few tokens do not feel.
    most = min(_MOST_SLICES, blocks if tokens <= 16 else -(-blocks // 2))
    slices = max(1, min(most, get_architecture(capability).multiprocessors // tiles))
    if _is_alone(router):  # a lane reads the numbers of its experts at once
        slices = min(slices, -(-blocks // -(-blocks * -(-experts // 32) // _MOST_NUMBERS)))
    if batch_invariant:
        slices = min(_INVARIANT_SLICES, blocks)
    warps_of_token = _warps_of_token(slices) if batch_invariant or tokens <= 512 else 1
    width = router.kernel.dtype.itemsize
    stage = block * (columns * width + 16) + tile * (block * 2 + 16)
    room = get_architecture(capability).most_shared_kib * 1024
    stages = min(-(-blocks // slices) + 1, 5, room // stage)
    return RouterTile(tile, columns, slices, block, max(2, stages), warps_n, warps_t, warps_of_token)


def _plain_tile(router: Router, capability: int, batch_invariant: bool) -> RouterTile:
    """Eight tokens and 128 columns of a CTA; slices of K where that leaves multiprocessors idle."""
    tile, columns, block = 8, 128, 32
    tiles = -(-router.rows.shape[0] // tile) * -(-router.stride // columns)
    slices = get_architecture(capability).multiprocessors // tiles
    slices = _INVARIANT_SLICES if batch_invariant else max(1, min(slices, 32))
    slices = min(slices, -(-router.kernel.shape[0] // block))
    return RouterTile(tile, columns, slices, block, warps_of_token=_warps_of_token(slices))


def _warps_of_token(slices: int) -> int:
    """Of a CTA with eight, those that add up a token's slices."""
    return 1 << min(3, slices.bit_length() - 1)


def logits_buffer(router: Router, tile: RouterTile) -> jax.ShapeDtypeStruct:
    """What the product leaves to the choice: sums over slices of K."""
    return jax.ShapeDtypeStruct((tile.slices, router.rows.shape[0], router.stride), jnp.float32)


def product_kernel(
    router: Router,
    tile: RouterTile,
    *,
    rows: int,
    kernel: int,
    gate: int | None,
    scale: int | None,
    out: int,
    counted: bool = False,
) -> Kernel:
    """The logits of every slice of K; `counted` where a call may have fewer tokens than the router."""
    tokens, experts, (k, _) = router.rows.shape[0], router.experts, router.kernel.shape
    dtype, width = router.kernel.dtype.name, router.kernel.dtype.itemsize
    facts: Facts = {
        "element": _NUMBERS[router.rows.dtype.name],
        "router_element": _NUMBERS[dtype],
        "gate_element": _element(router.gate),
        "scale_element": _element(router.input_scale),
        "tokens": tokens,
        "experts": experts,
        "k": k,
        "row_stride": router.rows.shape[1],
        "tile": tile.tokens,
        "columns": tile.experts,
        "slices": tile.slices,
        "block": tile.block,
        "stride": router.stride,
        "gated": gate is not None,
        "normed": scale is not None,
        "counted": counted,
    }
    if tile.stages:
        facts |= {"stages": tile.stages, "warps_n": tile.warps_n, "warps_t": tile.warps_t}
        columns = experts
        stage = tile.block * (tile.experts * width + 16) + tile.tokens * (tile.block * 2 + 16)
        threads, shared_bytes = 32 * tile.warps_n * tile.warps_t, tile.stages * stage
    else:
        columns = experts + (gate is not None) + (scale is not None)
        threads, shared_bytes = tile.experts, tile.block * tile.tokens * 4
    ctas = -(-tokens // tile.tokens) * -(-columns // tile.experts) * tile.slices
    return Kernel(
        name=f"jmm_router_m{tile.tokens}",
        headers=("router/product.cuh" if tile.stages else "router/plain_product.cuh",),
        body="RouterProduct<Facts>" if tile.stages else "PlainRouterProduct<Facts>",
        structs={"Facts": facts},
        pointers={
            "x": Pointer(rows, router.rows.dtype.name),
            "router": Pointer(kernel, dtype),
            "gate": _vector(gate, router.gate),
            "scale": _vector(scale, router.input_scale),
            "logits": Pointer(out, "float32", written=True),
            **token_count(counted),
        },
        threads=threads,
        shared_bytes=shared_bytes,
        max_ctas=grid(ctas, "the router"),
    )


@dataclasses.dataclass(frozen=True)
class WeightedRows:
    """The experts' input where weights multiply it, as buffers.

    Attributes:
        x: the layer's input.
        rows: a row for each slot.
        slot_weights: what multiplies the results of slots.
        dtype: of x and the rows.
        columns: likewise.
    """

    x: int
    rows: int
    slot_weights: int
    dtype: jnp.dtype
    columns: int


def select_kernel(
    router: Router,
    tile: RouterTile,
    *,
    logits: int,
    bias: int | None,
    correction_bias: int | None,
    expert_scale: int | None,
    given: int | None,
    topk_weights: int,
    topk_ids: int,
    overlaps_predecessor: bool,
    weighted: WeightedRows | None = None,
    counted: bool = False,
) -> Kernel:
    """Experts and weights from logits, and the experts' input where weights multiply it; `counted` as before."""
    tokens = router.rows.shape[0]
    alone = _is_alone(router)
    warps = 1 if alone and tokens <= _MOST_APART else 8
    warps_of_token = 1 if alone else tile.warps_of_token
    tokens_of_cta = warps // warps_of_token
    facts = _rule_facts(router) | {
        "element": "float" if weighted is None else ELEMENT_TYPES[weighted.dtype.name],
        "columns": 0 if weighted is None else weighted.columns,
        "on_input": weighted is not None,
        "tokens": tokens,
        "slices": tile.slices,
        "alone": alone,
        "quotients": alone and _has_quotients(router),
        "warps": warps,
        "warps_of_token": warps_of_token,
        "counted": counted,
    }
    of_rows: dict[str, Bound] = dict.fromkeys(("x", "rows", "slot_weights"))
    slot_weights = 4
    if weighted is not None:
        slot_weights = tokens_of_cta * router.slots
        of_rows = {
            "x": Pointer(weighted.x, weighted.dtype.name),
            "rows": Pointer(weighted.rows, weighted.dtype.name, written=True),
            "slot_weights": Pointer(weighted.slot_weights, "float32", written=True),
        }
    return Kernel(
        name=f"jmm_select_m{tokens}",
        headers=("router/select.cuh",),
        body="RouterSelect<Facts>",
        structs={"Facts": facts},
        pointers={
            "logits": Pointer(logits, "float32"),
            "router_bias": _vector(bias, router.bias),
            "correction_bias": _vector(correction_bias, router.correction_bias),
            "expert_scale": _vector(expert_scale, router.expert_scale),
            "given": optional(given, "int32"),
            "topk_weights": Pointer(topk_weights, "float32", written=True),
            "topk_ids": Pointer(topk_ids, "int32", written=True),
            **of_rows,
            **token_count(counted),
        },
        threads=32 * warps,
        shared_bytes=4 * ((warps + tokens_of_cta) * router.stride + slot_weights),
        max_ctas=grid(-(-tokens // tokens_of_cta), "the choice of experts"),
        overlaps_predecessor=overlaps_predecessor,
    )


def _rule_facts(router: Router) -> Facts:
    """What the choice is compiled with that follows from the rule, and from which arrays there are."""
    rule = router.routing
    return {
        "scores": f"jmm::{_SCORES[rule.scoring]}",
        "router_bias": _element(router.bias),
        "correction_bias": _element(router.correction_bias),
        "expert_scale": _element(router.expert_scale),
        "k": router.kernel.shape[0],
        "experts": router.experts,
        "top_k": rule.top_k,
        "slots": router.slots,
        "stride": router.stride,
        "groups": rule.num_groups,
        "top_groups": rule.top_groups,
        "top2": rule.group_score == "top2",
        "given": router.given is not None,
        "gated": router.gate is not None,
        "router_biased": router.bias is not None,
        "biased": router.correction_bias is not None,
        "scaled": router.expert_scale is not None,
        "capped": rule.logits_soft_cap is not None,
        "cap": _bits(rule.logits_soft_cap or 0.0),
        "scale": _bits(rule.scale),
        "epsilon": _bits(rule.renormalize_epsilon),
        "chosen_sigmoid": rule.scoring == "chosen_sigmoid",
        "mixer": rule.scoring == "sparsemixer",
        "twice_jitter": _bits(2 * rule.jitter),
        "normed": router.input_scale is not None,
        "norm_epsilon": _bits(router.norm_epsilon),
        "softmax_of_chosen": rule.softmax_after_topk,
        "renormalized": rule.renormalize,
    }


def _is_alone(router: Router) -> bool:
    """Whether one warp chooses for a token, with its experts in registers from their logits on."""
    beside = router.gate is not None or router.input_scale is not None or router.routing.apply_on_input
    grouped = router.routing.top_groups < router.routing.num_groups
    return router.experts <= _MOST_ALONE and not beside and not grouped


def _has_quotients(router: Router) -> bool:
    """Whether weights do not feel what a softmax is divided by, which no smaller number than itself is added to."""
    rule = router.routing
    divided = rule.renormalize and not rule.softmax_after_topk and rule.renormalize_epsilon <= _LEAST_FELT
    return rule.scoring == "softmax" and divided and router.correction_bias is None and router.given is None


def _element(vector: jax.Array | None) -> str:
    """The C++ type of a vector's numbers; any where there is none."""
    return "float" if vector is None else _NUMBERS[vector.dtype.name]


def _vector(buffer: int | None, vector: jax.Array | None) -> Pointer | None:
    return None if buffer is None or vector is None else Pointer(buffer, vector.dtype.name)


def _bits(value: float) -> int:
    """The bits of a float32 number, as an int32."""
    return int(np.float32(value).view(np.int32))
