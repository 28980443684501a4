"""The router: its product, and the choice of experts. Twin of csrc/cuda/router."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.facts import ELEMENT_TYPES, Facts, Pointer, optional
from jax_marlin_moe.cuda.limits import grid
from jax_marlin_moe.cuda.program import Kernel
from jax_marlin_moe.routing import Routing

_NUMBERS = {"float16": "jmm::Half", "bfloat16": "jmm::BFloat", "float32": "float"}
# What the kernels know: the scores of each scoring, and whether the chosen ones' sigmoids are the weights.
_SCORES = {
    "softmax": ("SoftmaxScores", False),
    "sigmoid": ("SigmoidScores", False),
    "sqrtsoftplus": ("SqrtSoftplusScores", False),
    "identity": ("IdentityScores", False),
    "chosen_sigmoid": ("IdentityScores", True),
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
    "logits_soft_cap",
    "renormalize_epsilon",
)
_MOST_LANES = 32
_MOST_EXPERTS = 1024
_MOST_SLICES = 64
_INVARIANT_SLICES = 8


@dataclasses.dataclass(frozen=True)
class Router:
    """The arrays of a router, as shapes and dtypes, and its rule.

    Attributes:
        rows: what it reads, [tokens, columns]; columns from K on are padding.
        kernel: [K, experts].
        routing: the rule.
        bias: added to the logits, or None.
        correction_bias: added to the scores, or None.
        expert_scale: factors of the weights, or None.
        given: experts that are chosen already, or None.
        gate: of the shared expert, or None.
        shared: experts that every token visits, behind those of its choice.
    """

    rows: jax.Array
    kernel: jax.Array
    routing: Routing
    bias: jax.Array | None = None
    correction_bias: jax.Array | None = None
    expert_scale: jax.Array | None = None
    given: jax.Array | None = None
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
        """Of a token's logits, with the gate's behind them."""
        return -(-(self.experts + (self.gate is not None)) // 4) * 4

    def fits(self, capability: int) -> bool:
        """Whether the kernels can be this router."""
        known = Routing(**{name: getattr(self.routing, name) for name in RULE_OPTIONS})
        vectors = (self.bias, self.correction_bias, self.expert_scale, self.gate, self.kernel)
        return (
            capability >= 80
            and known == self.routing
            and self.routing.scoring in _SCORES
            and self.rows.dtype.name in ("float16", "bfloat16")
            and all(vector is None or vector.dtype.name in _NUMBERS for vector in vectors)
            and self.kernel.shape[0] % 16 == 0
            and self.rows.shape[1] % 8 == 0
            and self.experts * self.kernel.dtype.itemsize % 4 == 0
            and self.experts <= _MOST_EXPERTS
            and max(self.slots, self.routing.num_groups) <= _MOST_LANES
        )


@dataclasses.dataclass(frozen=True)
class RouterTile:
    """How the product is cut.

    Attributes:
        tokens: of a CTA.
        experts: of a CTA.
        slices: of K.
        block: rows of K of a stage.
        stages: of a CTA.
        warps_n: along the experts.
        warps_t: along the tokens.
        warps_of_token: of the selection that add up a token's slices.
    """

    tokens: int
    experts: int
    slices: int
    block: int
    stages: int
    warps_n: int
    warps_t: int
    warps_of_token: int


def router_tile(router: Router, capability: int, *, batch_invariant: bool = False) -> RouterTile:
    """Few tokens: slices of K for all multiprocessors. Many: tiles so large that rows and router are seldom read.

    With `batch_invariant`, what decides the order of a logit's sum does not depend on the number of tokens.
    """
    tokens, experts = router.rows.shape[0], router.experts
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
    if batch_invariant:
        slices = min(_INVARIANT_SLICES, blocks)
    warps_of_token = 1 << min(3, slices.bit_length() - 1) if batch_invariant or tokens <= 512 else 1
    width = router.kernel.dtype.itemsize
    stage = block * (columns * width + 16) + tile * (block * 2 + 16)
    room = get_architecture(capability).most_shared_kib * 1024
    stages = min(-(-blocks // slices) + 1, 5, room // stage)
    return RouterTile(tile, columns, slices, block, max(2, stages), warps_n, warps_t, warps_of_token)


def logits_buffer(router: Router, tile: RouterTile) -> jax.ShapeDtypeStruct:
    """What the product leaves to the choice: sums over slices of K."""
    return jax.ShapeDtypeStruct((tile.slices, router.rows.shape[0], router.stride), jnp.float32)


def product_kernel(router: Router, tile: RouterTile, *, rows: int, kernel: int, gate: int | None, out: int) -> Kernel:
    """The logits of every slice of K."""
    tokens, experts, (k, _) = router.rows.shape[0], router.experts, router.kernel.shape
    dtype, width = router.kernel.dtype.name, router.kernel.dtype.itemsize
    facts: Facts = {
        "element": ELEMENT_TYPES[router.rows.dtype.name],
        "router_element": _NUMBERS[dtype],
        "gate_element": "float" if router.gate is None else _NUMBERS[router.gate.dtype.name],
        "tokens": tokens,
        "experts": experts,
        "k": k,
        "row_stride": router.rows.shape[1],
        "tile": tile.tokens,
        "columns": tile.experts,
        "slices": tile.slices,
        "block": tile.block,
        "stages": tile.stages,
        "warps_n": tile.warps_n,
        "warps_t": tile.warps_t,
        "stride": router.stride,
        "gated": gate is not None,
    }
    ctas = -(-tokens // tile.tokens) * -(-experts // tile.experts) * tile.slices
    stage = tile.block * (tile.experts * width + 16) + tile.tokens * (tile.block * 2 + 16)
    return Kernel(
        name=f"jmm_router_m{tile.tokens}",
        headers=("router/product.cuh",),
        body="RouterProduct<Facts>",
        structs={"Facts": facts},
        pointers={
            "x": Pointer(rows, router.rows.dtype.name),
            "router": Pointer(kernel, dtype),
            "gate": None if router.gate is None or gate is None else Pointer(gate, router.gate.dtype.name),
            "logits": Pointer(out, "float32", written=True),
        },
        threads=32 * tile.warps_n * tile.warps_t,
        shared_bytes=tile.stages * stage,
        max_ctas=grid(ctas, "the router"),
    )


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
) -> Kernel:
    """Experts and weights from logits."""
    tokens, rule = router.rows.shape[0], router.routing
    scores, chosen_sigmoid = _SCORES[rule.scoring]

    def elements(vector: jax.Array | None) -> str:
        return "float" if vector is None else _NUMBERS[vector.dtype.name]

    def pointer(buffer: int | None, vector: jax.Array | None) -> Pointer | None:
        return None if buffer is None or vector is None else Pointer(buffer, vector.dtype.name)

    facts: Facts = {
        "scores": f"jmm::{scores}",
        "router_bias": elements(router.bias),
        "correction_bias": elements(router.correction_bias),
        "expert_scale": elements(router.expert_scale),
        "tokens": tokens,
        "experts": router.experts,
        "top_k": rule.top_k,
        "slots": router.slots,
        "slices": tile.slices,
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
        "chosen_sigmoid": chosen_sigmoid,
        "softmax_of_chosen": rule.softmax_after_topk,
        "renormalized": rule.renormalize,
        "warps": 8,
        "warps_of_token": tile.warps_of_token,
    }
    return Kernel(
        name=f"jmm_select_m{tokens}",
        headers=("router/select.cuh",),
        body="RouterSelect<Facts>",
        structs={"Facts": facts},
        pointers={
            "logits": Pointer(logits, "float32"),
            "router_bias": pointer(bias, router.bias),
            "correction_bias": pointer(correction_bias, router.correction_bias),
            "expert_scale": pointer(expert_scale, router.expert_scale),
            "given": optional(given, "int32"),
            "topk_weights": Pointer(topk_weights, "float32", written=True),
            "topk_ids": Pointer(topk_ids, "int32", written=True),
        },
        threads=256,
        shared_bytes=8 * router.stride * 4,
        max_ctas=grid(-(-tokens // (8 // tile.warps_of_token)), "the choice of experts"),
        overlaps_predecessor=overlaps_predecessor,
    )


def _bits(value: float) -> int:
    """The bits of a float32 number, as an int32."""
    return int(np.float32(value).view(np.int32))
