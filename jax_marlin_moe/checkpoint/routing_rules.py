"""What the configs of model families say of routing and activation: one rule each, with the keys that it reads.

A missing key means what transformers' configuration class of the model type says.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_marlin_moe.activations import Activation, swiglu
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
    """

    renormalize: Any = REQUIRED
    groups: int = 1
    top_groups: int = 1
    scale: Any = 1.0
    shared: int = 1


@dataclasses.dataclass(frozen=True)
class RoutingRule:
    """A rule: `read(keys, experts, top_k, defaults)` makes it from a config, of which it reads `keys`."""

    keys: tuple[str, ...]
    read: Callable[[Keys, int, int, Defaults], Routing]


@dataclasses.dataclass(frozen=True)
class ActivationRule:
    """An activation: `read(keys)` makes it from a config, of which it reads `keys`."""

    keys: tuple[str, ...]
    read: Callable[[Keys], "str | Activation"]


def softmax(renormalize: bool | None = None) -> RoutingRule:
    """Softmax over all experts; `renormalize` None means the config's `norm_topk_prob`."""

    def read(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
        if renormalize is not None:
            return Routing(top_k, renormalize=renormalize)
        return Routing(top_k, renormalize=keys.boolean("norm_topk_prob", defaults.renormalize))

    return RoutingRule(() if renormalize is not None else ("norm_topk_prob",), read)


def sigmoid(*, scaled: bool) -> RoutingRule:
    """MiniMax's: sigmoid, always renormalised, without groups; M3 scales."""

    def read(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
        return Routing(top_k, scoring="sigmoid", scale=_scale(keys, defaults) if scaled else 1.0)

    return RoutingRule(("routed_scaling_factor",) if scaled else (), read)


def _grouped_sigmoid(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> Routing:
    groups, top_groups = _groups(keys, experts, top_k, defaults)
    return Routing(
        top_k,
        scoring="sigmoid",
        renormalize=keys.boolean("norm_topk_prob", defaults.renormalize),
        num_groups=groups,
        top_groups=top_groups,
        group_score="top2",
        scale=_scale(keys, defaults),
    )


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


GROUPED_SIGMOID = RoutingRule(("norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor"), _grouped_sigmoid)
DEEPSEEK_V2 = RoutingRule(("topk_method", "n_group", "topk_group", "routed_scaling_factor"), _deepseek_v2)
DEEPSEEK_V4 = RoutingRule(("scoring_func", "routed_scaling_factor"), _deepseek_v4)
GPT_OSS = RoutingRule(
    (),
    lambda keys, experts, top_k, defaults: Routing(
        top_k, scoring="identity", renormalize=False, softmax_after_topk=True
    ),
)
LLAMA4 = RoutingRule(
    (),
    lambda keys, experts, top_k, defaults: Routing(
        top_k, scoring="chosen_sigmoid", renormalize=False, apply_on_input=True
    ),
)


def _scale(keys: Keys, defaults: Defaults) -> float:
    # MiMo's files have null, which its class takes for the default of 1.
    return keys.number("routed_scaling_factor", defaults.scale, above=0, null=defaults.scale == 1.0)


def _groups(keys: Keys, experts: int, top_k: int, defaults: Defaults) -> tuple[int, int]:
    """`n_group` and `topk_group`, which must fit the experts; null means no groups where missing does."""
    groups = keys.integer("n_group", defaults.groups, low=1, null=defaults.groups == 1)
    if experts % groups:
        raise keys.fault("n_group", f"a divisor of the {experts} experts", _meaning(keys, "n_group", groups))
    top = keys.integer("topk_group", min(defaults.top_groups, groups), low=1, high=groups, null=groups == 1)
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
    return ActivationRule((key,), lambda keys: _GATED[keys.choice(key, tuple(_GATED), default)])


def clamped_silu(limit: Any) -> ActivationRule:
    """Silu whose inputs are clamped at `swiglu_limit`; `limit` for a missing one, None where that means no clamp."""

    def read(keys: Keys) -> str | Activation:
        found = keys.number("swiglu_limit", limit, above=0, null=limit is None)
        name = _GATED[keys.choice("hidden_act", ("silu", "swish") if found is not None else tuple(_GATED), "silu")]
        return name if found is None else swiglu(found)

    return ActivationRule(("hidden_act", "swiglu_limit"), read)


def swiglu_oai(names: tuple[str, ...]) -> ActivationRule:
    """gpt-oss's activation, whatever of `names` the config calls it: transformers does not look at the name."""

    def read(keys: Keys) -> Activation:
        keys.choice("hidden_act", names, "silu")
        limit = keys.number("swiglu_limit", 7.0, above=0)
        return swiglu(limit, keys.number("swiglu_alpha", 1.702, above=0), 1.0)

    return ActivationRule(("hidden_act", "swiglu_limit", "swiglu_alpha"), read)


HIDDEN_ACT = named()
RELU2 = ActivationRule(("mlp_hidden_act",), lambda keys: keys.choice("mlp_hidden_act", ("relu2",), "relu2"))
