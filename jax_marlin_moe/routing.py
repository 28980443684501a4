"""Routing: router logits to experts and weights."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jax_marlin_moe.arguments import as_number, check_array, check_rank, check_shape, check_top_k

# Scores of all experts from float32 logits.
_SCORINGS = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrtsoftplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
    "identity": lambda logits: logits,
    "chosen_sigmoid": lambda logits: logits,
    "sparsemixer": lambda logits: logits,
}
_MIXER_ALONE = "scoring is 'sparsemixer', which takes no correction_bias, no ids and num_groups=1"
_COUNTS = ("top_k", "num_groups", "top_groups", "identity_experts")
_NUMBERS = ("scale", "logits_soft_cap", "renormalize_epsilon", "jitter")
_FLAGS = ("renormalize", "softmax_after_topk", "apply_on_input")
# What a group of experts is worth, from its scores [..., group]: V3's rule and V2's.
_GROUP_SCORES = {
    "top2": lambda scores: jax.lax.top_k(scores, min(2, scores.shape[-1]))[0].sum(-1),
    "max": lambda scores: scores.max(-1),
}


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a model chooses experts: the static arguments of `route`, and where the weights go.

    Attributes:
        top_k: experts per token.
        scoring: "softmax", "sigmoid", "sqrtsoftplus", "identity", "chosen_sigmoid" or "sparsemixer".
        renormalize: whether the chosen weights are divided by their sum.
        softmax_after_topk: whether the weights are the softmax of the chosen scores.
        num_groups: groups of experts, of which `top_groups` stay in the choice.
        top_groups: see there.
        group_score: "top2", the sum of a group's two largest scores, or "max".
        scale: multiplies the weights.
        apply_on_input: whether an expert's weight multiplies its input, not its output (Llama-4).
        logits_soft_cap: the bound of `cap * tanh(logits / cap)`, which takes the place of the logits (Laguna).
        renormalize_epsilon: added to the sum that the chosen weights are divided by.
        jitter: of "sparsemixer" (Phi-3.5-MoE).
        identity_experts: how many of the router's experts, the last ones, have no weights and return their input
            (LongCat).
    """

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    softmax_after_topk: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "top2"
    scale: float = 1.0
    apply_on_input: bool = False
    logits_soft_cap: float | None = None
    renormalize_epsilon: float = 1e-20
    jitter: float = 0.0
    identity_experts: int = 0

    def __post_init__(self) -> None:
        # Numbers and truth values of numpy and JAX become Python's: an array has no hash.
        for name in (*_COUNTS, *_NUMBERS, *_FLAGS):
            value = getattr(self, name)
            if getattr(value, "shape", None) == () and not isinstance(value, jax.core.Tracer):
                object.__setattr__(self, name, value.item())

    def options(self) -> dict[str, object]:
        """The keyword arguments of `route`."""
        values = dataclasses.asdict(self)
        del values["apply_on_input"], values["identity_experts"]
        return values


def route(
    logits: Float[Array, "tokens experts"],
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    softmax_after_topk: bool = False,
    correction_bias: Float[Array, " experts"] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    scale: float = 1.0,
    expert_scale: Float[Array, " experts"] | None = None,
    ids: Int32[Array, "tokens top_k"] | None = None,
    logits_soft_cap: float | None = None,
    renormalize_epsilon: float = 1e-20,
    jitter: float = 0.0,
) -> tuple[Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """Chooses top_k experts for each token, all in float32; leading batch dimensions are allowed.

    `s = scoring(logits)` over all experts, of `cap * tanh(logits / cap)` where there is a `logits_soft_cap`. The top_k
    largest `s + correction_bias` are chosen, in descending order (ties to the lower expert), with groups only from the
    best `top_groups` of them. Their weights are `s`, without the bias: as they are, divided by their sum plus
    `renormalize_epsilon` (`renormalize`), or put through a softmax (`softmax_after_topk`); then times `scale` and
    `expert_scale[id]`.

    Two scorings choose by the logits themselves and have weights of another kind. "chosen_sigmoid": the sigmoids of the
    chosen logits, which unlike their choice may be equal where logits are large. "sparsemixer": the softmax of the
    chosen logit `t` over those logits `z` that are not chosen before it and have `(t - z) / max(|z|, t) <= 2 * jitter`.

    Mixtral and Qwen3 need no option, Qwen1.5 and OLMoE `renormalize=False`; DeepSeek-V3, Kimi, GLM, MiniMax and
    Nemotron are "sigmoid" with a bias, DeepSeek-V4 "sqrtsoftplus"; gpt-oss is "identity" with `softmax_after_topk`;
    Llama-4 is "chosen_sigmoid" and Phi-3.5-MoE "sparsemixer", both with `renormalize=False`; Gemma-4 has an
    `expert_scale`.

    Args:
        logits: router outputs of any float dtype.
        top_k: experts per token, 1 to the number of experts.
        scoring: "softmax", "sigmoid", "sqrtsoftplus", "identity", "chosen_sigmoid" or "sparsemixer".
        renormalize: whether the chosen weights sum to one (before `scale`).
        softmax_after_topk: whether the weights are a softmax over the chosen; then nothing is renormalised.
        correction_bias: added to the scores for the choice alone.
        num_groups: equal groups of consecutive experts.
        top_groups: how many of them stay in the choice.
        group_score: "top2" or "max": what a group is worth, from its biased scores.
        scale: factor of all weights.
        expert_scale: factors by expert.
        ids: experts chosen already (int32, as the hash layers of DeepSeek-V4 do); only their weights are computed. One
            out of range weighs nothing.
        logits_soft_cap: keeps the logits within its negative and itself; None leaves them as they are.
        renormalize_epsilon: added to the sum that the weights are divided by: keeps 0 / 0 from being NaN.
        jitter: of "sparsemixer", which takes neither a bias nor groups nor `ids`.

    Returns:
        Weights (float32) and expert ids (int32).

    Raises:
        TypeError: an argument has the wrong dtype or type.
        ValueError: an option is out of range, or a shape does not fit.
    """
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"logits has dtype {getattr(logits, 'dtype', type(logits).__name__)}; it must be floating point"
        )
    if logits.ndim < 1:
        check_rank("logits", logits, 2)
    num_experts = logits.shape[-1]
    rule = Routing(
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        softmax_after_topk=softmax_after_topk,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        renormalize_epsilon=renormalize_epsilon,
        jitter=jitter,
    )
    check_routing(rule, num_experts, alone=correction_bias is None and ids is None)
    for name, vector in (("correction_bias", correction_bias), ("expert_scale", expert_scale)):
        if vector is not None:
            check_shape(name, vector, (num_experts,), "(experts,)")
            if not jnp.issubdtype(vector.dtype, jnp.floating):
                raise TypeError(f"{name} has dtype {vector.dtype}; it must be floating point: cast it before the call")
    if ids is not None:
        check_array("ids", ids, ndim=logits.ndim, dtype=jnp.int32)
        check_shape("ids", ids, (*logits.shape[:-1], top_k), "(tokens, top_k)")
    return _route(logits, correction_bias, expert_scale, ids, rule=rule)


def check_routing(routing: Routing, num_experts: int, *, alone: bool = True) -> None:
    """Raises, naming the option, unless the rule chooses among that many experts: TypeError on a wrong type of it.

    `alone` says that there are neither biases for the choice nor ids that are chosen already.
    """
    for name in _COUNTS:
        if not isinstance(getattr(routing, name), int) or isinstance(getattr(routing, name), bool):
            raise TypeError(f"{name} is {getattr(routing, name)!r}; it must be an int")
    for name in _FLAGS:
        if not isinstance(getattr(routing, name), bool | np.bool_):
            raise TypeError(f"{name} is {getattr(routing, name)!r}; it must be True or False")
    top_k, num_groups, top_groups = routing.top_k, routing.num_groups, routing.top_groups
    if routing.identity_experts < 0:
        raise ValueError(f"identity_experts is {routing.identity_experts}; it must not be negative")
    check_top_k(top_k, num_experts)
    for name, known in (("scoring", _SCORINGS), ("group_score", _GROUP_SCORES)):
        if getattr(routing, name) not in known:
            raise ValueError(f"{name} is {getattr(routing, name)!r}; it must be one of {', '.join(known)}")
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise ValueError(
            f"num_groups is {num_groups} and top_groups {top_groups}; num_groups must divide the {num_experts} experts "
            "and top_groups lie in [1, num_groups]"
        )
    if top_groups * (num_experts // num_groups) < top_k:
        raise ValueError(f"top_k is {top_k}; {top_groups} groups have {top_groups * num_experts // num_groups} experts")
    cap = None if routing.logits_soft_cap is None else as_number("logits_soft_cap", routing.logits_soft_cap)
    epsilon, jitter = (as_number(name, getattr(routing, name)) for name in ("renormalize_epsilon", "jitter"))
    if not math.isfinite(as_number("scale", routing.scale)):
        raise ValueError(f"scale is {routing.scale}; it must be finite")
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"logits_soft_cap is {cap}; it must be positive and finite, or None for no cap")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"renormalize_epsilon is {epsilon}; it must be finite and not negative")
    if not (0 <= jitter < math.inf and (jitter == 0 or routing.scoring == "sparsemixer")):
        must = (
            "finite and not negative"
            if routing.scoring == "sparsemixer"
            else f"0, as scoring {routing.scoring!r} has none"
        )
        raise ValueError(f"jitter is {jitter}; it must be {must}")
    if routing.scoring == "sparsemixer" and (num_groups > 1 or not alone):
        raise ValueError(_MIXER_ALONE)


# One program: step by step, each constant would be a transfer to the device.
@partial(jax.jit, static_argnames="rule", inline=True)
def _route(
    logits: Array, correction_bias: Array | None, expert_scale: Array | None, ids: Any, *, rule: Routing
) -> tuple[Array, Array]:
    """`route` of arguments that are checked."""
    logits = logits.astype(jnp.float32)
    if rule.logits_soft_cap is not None:
        logits = jnp.tanh(logits / rule.logits_soft_cap) * rule.logits_soft_cap
    scores = _SCORINGS[rule.scoring](logits)
    given = ids is not None
    if not given:
        choice = scores if correction_bias is None else scores + _along_experts(correction_bias, scores)
        if rule.top_groups < rule.num_groups:
            grouped = choice.reshape(*choice.shape[:-1], rule.num_groups, choice.shape[-1] // rule.num_groups)
            _, best = jax.lax.top_k(_GROUP_SCORES[rule.group_score](grouped), rule.top_groups)
            kept = jax.nn.one_hot(best, rule.num_groups, dtype=jnp.bool_).any(-2)
            choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
        ids = jax.lax.top_k(choice, rule.top_k)[1].astype(jnp.int32)
    # Given ids may name nobody: such a slot weighs nothing, and has no part in the others' sum.
    there = (ids >= 0) & (ids < scores.shape[-1]) if given else None
    known = ids if there is None else jnp.clip(ids, 0, scores.shape[-1] - 1)
    weights = (
        _sparsemixer(scores, ids, rule.jitter)
        if rule.scoring == "sparsemixer"
        else jnp.take_along_axis(scores, known, axis=-1)
    )
    if rule.scoring == "chosen_sigmoid":
        weights = jax.nn.sigmoid(weights)
    if there is not None:
        weights = jnp.where(there, weights, -jnp.inf if rule.softmax_after_topk else 0)
    if rule.softmax_after_topk:
        weights = jax.nn.softmax(weights, axis=-1)
    elif rule.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + rule.renormalize_epsilon)
    if rule.scale != 1.0:
        weights = weights * jnp.float32(rule.scale)
    if expert_scale is not None:
        weights = weights * expert_scale.astype(jnp.float32)[known]
    if there is not None:
        weights = jnp.where(there, weights, 0)
    return weights, ids


def _sparsemixer(logits: Array, ids: Array, jitter: float) -> Array:
    """Each chosen logit's softmax over itself and those close to it that are not chosen before it."""
    weights = []
    for position in range(ids.shape[-1]):
        chosen = ids[..., position : position + 1]
        top = jnp.take_along_axis(logits, chosen, axis=-1)
        # Not `<=`: where all are zero, the quotient is NaN, and they are close.
        close = ~((top - logits) / jnp.maximum(jnp.abs(logits), top) > 2 * jitter)
        kept = close & ~jax.nn.one_hot(ids[..., :position], logits.shape[-1], dtype=jnp.bool_).any(-2)
        weights.append(1 / jnp.sum(jnp.where(kept, jnp.exp(logits - top), 0), axis=-1, keepdims=True))
    return jnp.concatenate(weights, axis=-1)


def _along_experts(vector: Array, scores: Array) -> Array:
    """`vector` in float32 with as many dimensions as the scores."""
    return vector.astype(jnp.float32).reshape(*[1] * (scores.ndim - 1), -1)


def rms_normalized(rows: Float32[Array, "tokens H"], epsilon: float) -> Float32[Array, "tokens H"]:
    """Rows, each divided by the root of its mean square."""
    return rows * jax.lax.rsqrt(jnp.mean(jnp.square(rows), axis=-1, keepdims=True) + epsilon)


def route_rows(
    rows: Float[Array, "tokens H"],
    router: Float[Array, "H experts"],
    routing: Routing,
    *,
    router_bias: Float[Array, " experts"] | None = None,
    correction_bias: Float[Array, " experts"] | None = None,
    expert_scale: Float[Array, " experts"] | None = None,
    input_scale: Float[Array, " H"] | None = None,
    norm_epsilon: float = 1e-6,
    ids: Int32[Array, "tokens top_k"] | None = None,
) -> tuple[Float32[Array, "tokens top_k"], Int32[Array, "tokens top_k"]]:
    """`route` of `rows @ router + router_bias`, in float32 from the product on.

    Args:
        rows: what the router reads.
        router: input dimension first.
        routing: the model's rule.
        router_bias: added to the logits.
        correction_bias: as for `route`.
        expert_scale: as for `route`.
        input_scale: where it is there, the router reads `rms_norm(rows) * scale / sqrt(H)`.
        norm_epsilon: of that norm.
        ids: as for `route`.
    """
    rows = rows.astype(jnp.float32)
    if input_scale is not None:
        rows = rms_normalized(rows, norm_epsilon) * input_scale.astype(jnp.float32)[None] * rows.shape[-1] ** -0.5
    logits = jnp.matmul(rows, router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if router_bias is not None:
        logits = logits + router_bias.astype(jnp.float32)[None]
    return route(
        logits,
        correction_bias=correction_bias,
        expert_scale=expert_scale,
        ids=ids,
        **routing.options(),  # type: ignore[arg-type]
    )
