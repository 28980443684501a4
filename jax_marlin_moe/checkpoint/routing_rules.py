"""What the configs of model families say of routing and activation: one rule each, with the keys that it reads.

A missing key means what transformers' configuration class of the model type says.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_marlin_moe.activations import Activation, situ, swiglu, swiglu_step
from jax_marlin_moe.checkpoint.keys import REQUIRED, Keys
from jax_marlin_moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What missing keys mean for one model type; `REQUIRED` where the key must be there.

    Attributes:
        renormalize: for `norm_topk_prob`.
        groups: for `n_group`.
        top_groups: for `topk_group`.
        scale: for `routed_scaling_factor`.
        shared: for `n_shared_experts`, where files have shared experts.
        limit: for `swiglu_limit`; None where that means no clamp.
        identity: for `zero_expert_num`.
    """

    renormalize: Any = REQUIRED
    groups: Any = 1
    top_groups: Any = 1
    scale: Any = 1.0
    shared: int = 1
    limit: Any = None
    identity: int = 0


@dataclasses.dataclass(frozen=True)
class RoutingRule:
    """A rule: `read(keys, experts, top_k, defaults)` makes it from a config, of which it reads `keys`."""

    keys: tuple[str, ...]
    read: Callable[[Keys, int, int, Defaults], Routing]


@dataclasses.dataclass(frozen=True)
class ActivationRule:
    """An activation: `read(keys, defaults)` makes it from a config, of which it reads `keys`.

    A value under a key of `by_layer` may be a list with one for each layer.
    """

    keys: tuple[str, ...]
    read: Callable[[Keys, Defaults], "str | Activation"]
    by_layer: tuple[str, ...] = ()


def scored(
    scoring: str, *, renormalize: bool | None = None, grouped: bool = False, scaled: bool = False, **facts: Any
) -> RoutingRule:
    """Scores of all experts, of which the largest are chosen.

    Args:
        scoring: as in `Routing`.
        renormalize: likewise; None means the config's `norm_topk_prob`.
        grouped: whether the config has groups, of which those with the largest sums of two stay.
        scaled: whether it has a `routed_scaling_factor`.
        **facts: further fields of `Routing`.
    """

    def read(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
        groups, top_groups = _groups(keys, experts, top_k, defaults) if grouped else (1, 1)
        return Routing(
            top_k,
            scoring=scoring,
            renormalize=keys.boolean("norm_topk_prob", defaults.renormalize) if renormalize is None else renormalize,
            num_groups=groups,
            top_groups=top_groups,
            scale=_scale(keys, defaults) if scaled else 1.0,
            **facts,
        )

    return RoutingRule(
        (
            *(("norm_topk_prob",) if renormalize is None else ()),
            *(("n_group", "topk_group") if grouped else ()),
            *(("routed_scaling_factor",) if scaled else ()),
        ),
        read,
    )


def of_several(rule: RoutingRule) -> RoutingRule:
    """A rule whose weights are divided by their sum only where a token has several experts (Ling)."""

    def read(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
        made = rule.read(keys, experts, top_k, defaults)
        return dataclasses.replace(made, renormalize=made.renormalize and top_k > 1)

    return RoutingRule(rule.keys, read)


def with_identity_experts(rule: RoutingRule) -> RoutingRule:
    """A rule for routers that also choose among `zero_expert_num` experts that return their input."""

    def read(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
        extra = keys.integer("zero_expert_num", defaults.identity, low=0, null=True) or 0
        return dataclasses.replace(rule.read(keys, experts, top_k, defaults), identity_experts=extra)

    return RoutingRule((*rule.keys, "zero_expert_num"), read)


def with_soft_cap(rule: RoutingRule) -> RoutingRule:
    """A rule for logits that are bounded by `moe_router_logit_softcapping`, where 0 is no bound."""

    def read(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
        cap = keys.number("moe_router_logit_softcapping", 0.0, low=0)
        return dataclasses.replace(rule.read(keys, experts, top_k, defaults), logits_soft_cap=cap or None)

    return RoutingRule((*rule.keys, "moe_router_logit_softcapping"), read)


def _deepseek_v2(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
    method = keys.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups, top_groups = _groups(keys, experts, top_k, defaults)
    grouped = method == "group_limited_greedy"
    return Routing(
        top_k,
        renormalize=False,
        num_groups=groups if grouped else 1,
        top_groups=top_groups if grouped else 1,
        group_score="max",
        scale=_scale(keys, defaults),
    )


_V4_SCORINGS = {"sqrtsoftplus": "sqrtsoftplus", "sqrt_softplus": "sqrtsoftplus", "sigmoid": "sigmoid"}


def _deepseek_v4(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
    scoring = keys.choice("scoring_func", tuple(_V4_SCORINGS), "sqrtsoftplus")
    return Routing(top_k, scoring=_V4_SCORINGS[scoring], scale=_scale(keys, defaults))


def _sparsemixer(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
    # The rule has a formula for the first expert and one for the second.
    if top_k != 2:
        raise ValueError(f"{keys.source}: a token has {top_k} experts; with sparsemixer it must have 2")
    return Routing(2, scoring="sparsemixer", renormalize=False, jitter=keys.number("router_jitter_noise", 0.01, low=0))


def cohere_shared_scale(keys: Keys) -> float:
    """The factor of the shared expert in Cohere's block: 0.5, as for the routed ones, where the two are averaged."""
    way = keys.choice("shared_expert_combination_strategy", ("sum", "average"), "average")
    return 0.5 if keys.integer("num_shared_experts", 0, low=0) and way == "average" else 1.0


def _cohere(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
    renormalize = keys.boolean("norm_topk_prob", defaults.renormalize)
    scale = cohere_shared_scale(keys)
    if keys.choice("expert_selection_fn", ("softmax", "sigmoid"), "softmax") == "softmax":
        return Routing(top_k, scoring="identity", renormalize=False, softmax_after_topk=True, scale=scale)
    return Routing(top_k, scoring="chosen_sigmoid", renormalize=renormalize, scale=scale)


def _dbrx(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
    # The power of the norm that weights are divided by; null is no norm, and missing is 1.
    key = "moe_normalize_expert_weights"
    keys.number(key, 1.0, low=1, high=1, null=True)
    return Routing(top_k, renormalize=key not in keys or keys.get(key) is not None)


GROUPED_SIGMOID = scored("sigmoid", grouped=True, scaled=True)
SPARSEMIXER = RoutingRule(("router_jitter_noise",), _sparsemixer)
COHERE = RoutingRule(
    ("norm_topk_prob", "num_shared_experts", "shared_expert_combination_strategy", "expert_selection_fn"), _cohere
)
DBRX = RoutingRule(("moe_normalize_expert_weights",), _dbrx)
DEEPSEEK_V2 = RoutingRule(("topk_method", "n_group", "topk_group", "routed_scaling_factor"), _deepseek_v2)
DEEPSEEK_V4 = RoutingRule(("scoring_func", "routed_scaling_factor"), _deepseek_v4)
SOFTMAX_AFTER_TOPK = scored("identity", renormalize=False, softmax_after_topk=True)
LLAMA4 = scored("chosen_sigmoid", renormalize=False, apply_on_input=True)


def _scale(keys: Keys, defaults: Defaults) -> float:
    # MiMo's files have null, which its class takes for the default of 1.
    return keys.number("routed_scaling_factor", defaults.scale, above=0, null=defaults.scale == 1.0)


def _groups(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> tuple[int, int]:
    """`n_group` and `topk_group`, which must fit the experts; null means no groups where missing does."""
    groups = keys.integer("n_group", defaults.groups, low=1, null=defaults.groups == 1)
    if experts % groups:
        raise keys.fault("n_group", f"a divisor of the {experts} experts", _meaning(keys, "n_group", groups))
    # A class's number of groups is cut to those that there are.
    missing = min(defaults.top_groups, groups) if isinstance(defaults.top_groups, int) else defaults.top_groups
    top = keys.integer("topk_group", 1 if groups == 1 else missing, low=1, high=groups, null=groups == 1)
    if top * (experts // groups) < top_k:
        must = f"enough groups of {experts // groups} experts for the {top_k} of each token"
        raise keys.fault("topk_group", must, _meaning(keys, "topk_group", top))
    return groups, top


def _meaning(keys: Keys, key: str, value: int) -> str:
    return "" if key in keys else f" (a missing {key} means {value} for this model type)"


# By the names of ACT2FN of transformers (activations.py).
_GATED: dict[str, "str | Activation"] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": swiglu(alpha=1.702),
    "relu": "relu",
    "relu2": "relu2_gated",
    "linear": "none",
}


def named(key: str = "hidden_act", default: str = "silu") -> ActivationRule:
    """A gated activation by its name under `key`."""
    return ActivationRule((key,), lambda keys, defaults: _GATED[keys.choice(key, tuple(_GATED), default)])


def clamped_silu() -> ActivationRule:
    """Silu whose inputs are clamped at `swiglu_limit`, where there is one."""

    def read(keys: Keys, defaults: Defaults) -> str | Activation:
        found = keys.number("swiglu_limit", defaults.limit, above=0, null=defaults.limit is None)
        name = _GATED[keys.choice("hidden_act", ("silu", "swish") if found is not None else tuple(_GATED), "silu")]
        return name if found is None else swiglu(found)

    return ActivationRule(("hidden_act", "swiglu_limit"), read)


def swiglu_oai(names: tuple[str, ...]) -> ActivationRule:
    """gpt-oss's activation, whatever of `names` the config calls it: transformers does not look at the name."""

    def read(keys: Keys, defaults: Defaults) -> Activation:
        keys.choice("hidden_act", names, "silu")
        limit = keys.number("swiglu_limit", 7.0, above=0)
        return swiglu(limit, keys.number("swiglu_alpha", 1.702, above=0), 1.0)

    return ActivationRule(("hidden_act", "swiglu_limit", "swiglu_alpha"), read)


def step(key: str) -> ActivationRule:
    """Step's: silu, clamped afterwards where the layer's value under `key` is neither null nor 0."""

    def read(keys: Keys, defaults: Defaults) -> str | Activation:
        keys.choice("hidden_act", ("silu",), "silu")
        limit = keys.number(key, None, low=0, null=True)
        return swiglu_step(limit) if limit else "silu"

    return ActivationRule(("hidden_act", key), read, by_layer=(key,))


def _situ(keys: Keys, defaults: Defaults) -> Activation:
    keys.choice("hidden_act", ("silu",), "silu")
    return situ(keys.number("mlp_gate_softcap", 4.0, above=0), keys.number("mlp_up_softcap", 25.0, above=0))


def _dbrx_activation(keys: Keys, defaults: Defaults) -> "str | Activation":
    function = keys.object("ffn_act_fn", None, null=True)
    if function is None:
        return "silu"
    for name in function.values:
        if name != "name":
            raise function.fault(name, "omitted: what it means is not known")
    return _GATED[function.choice("name", tuple(_GATED), "silu")]


HIDDEN_ACT = named()
# Blocks that do not look at the name.
SILU = ActivationRule(
    ("hidden_act",), lambda keys, defaults: _GATED[keys.choice("hidden_act", ("silu", "swish"), "silu")]
)
RELU2 = ActivationRule(("mlp_hidden_act",), lambda keys, defaults: keys.choice("mlp_hidden_act", ("relu2",), "relu2"))
SITU = ActivationRule(("hidden_act", "mlp_gate_softcap", "mlp_up_softcap"), _situ)
DBRX_ACTIVATION = ActivationRule(("ffn_act_fn",), _dbrx_activation)
