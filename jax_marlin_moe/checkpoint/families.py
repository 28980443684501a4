"""How model families name the tensors of a mixture-of-experts layer and what their configs say: one row each."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jax_marlin_moe.activations import Activation, get_activation, swiglu
from jax_marlin_moe.routing import Routing

Config = Mapping[str, Any]

# What may stand before `layers.{layer}.`: text models, multimodal ones of both generations, Nemotron, DeepSeek-V4.
_STEMS = ("model.", "model.language_model.", "language_model.model.", "backbone.", "")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "experts_per_token")


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Tensors that hold all experts.

    Attributes:
        gate_up: module of the fused tensor, inside the layer; `up` alone where there is no gate.
        down: likewise.
        interleaved: whether gate and up alternate row by row.
        transposed: whether plain weights lie as [E, K, N] where their shape does not tell.
    """

    gate_up: str
    down: str
    interleaved: bool = False
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of one family. Names are inside the layer, `layers.{layer}.`.

    Attributes:
        model_types: `model_type` in config.json.
        block: the module whose tensors are all known; the layer has nothing else in it.
        experts: the module of numbered experts.
        gate: the expert linear (H, I) that goes through the activation; None where experts have no gate.
        up: the expert linear (H, I) that multiplies it, or that goes through the activation itself.
        down: the expert linear (I, H).
        routing: the rule, from the config.
        router: the router's tensor [E, H].
        router_bias: its bias [E].
        correction_bias: added to scores for the choice alone, [E].
        shared: modules that shared experts may have.
        shared_gate: the gate's tensor [1, H] of the shared expert.
        hash_table: experts by token id, [vocabulary, top_k].
        expert_scale: factors of the weights by expert, [E].
        input_scale: factors of the normalised input of the router, [H].
        stacked: tensors that hold all experts, where files may have them.
        biased: whether experts have biases.
        activation: the activation, from the config.
        shared_size: keys of the shared expert's intermediate size.
        others: tensors of the block that are no part of its experts or its router.

    Tensors that a row names are there in every layer of its models; only a layer that routes by a hash table has no
    correction bias.
    """

    model_types: tuple[str, ...]
    block: str
    routing: Callable[[Config, int], Routing]
    experts: str = "{block}.experts"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "{block}.gate.weight"
    router_bias: str | None = None
    correction_bias: str | None = None
    shared: tuple[str, ...] = ()
    shared_gate: str | None = None
    hash_table: str | None = None
    expert_scale: str | None = None
    input_scale: str | None = None
    stacked: tuple[Stacked, ...] = ()
    biased: bool = False
    activation: Callable[[Config], "str | Activation"] = dataclasses.field(default=lambda config: _activation(config))
    shared_size: tuple[str, ...] = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    others: tuple[str, ...] = ()

    def name(self, template: str, layer: str) -> str:
        """A name inside a layer, spelt out."""
        return f"{layer}{template.format(block=self.block)}"

    def layer_pattern(self) -> re.Pattern[str]:
        """Matches names of expert tensors: the layer's own prefix, then its number."""
        stems = "|".join(re.escape(stem) for stem in _STEMS)
        inner = [re.escape(self.name(self.experts, "")) + r"\.[0-9]+\."]
        inner += [re.escape(self.name(module, "")) for row in self.stacked for module in (row.gate_up, row.down)]
        return re.compile(rf"^((?:{stems})(?:layers|block)\.([0-9]+)\.)(?:{'|'.join(inner)})")


def _activation(config: Config) -> str | Activation:
    """`hidden_act` under its several keys, clamped where the config has a limit."""
    name = next((config[k] for k in ("hidden_act", "hidden_activation", "mlp_hidden_act") if config.get(k)), "silu")
    limit = config.get("swiglu_limit")
    if name in ("swigluoai", "swiglu_oai"):
        return swiglu(7.0 if limit is None else limit, float(config.get("swiglu_alpha", 1.702)), 1.0)
    if name in ("silu", "swish") and limit:
        return swiglu(limit)
    name = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}.get(name, name)
    get_activation(name)
    return name


def _gpt_oss_activation(config: Config) -> Activation:
    return swiglu(float(config.get("swiglu_limit") or 7.0), 1.702, 1.0)


def _softmax(renormalize: bool | None) -> Callable[[Config, int], Routing]:
    """Softmax over all experts; `renormalize` None means the config's `norm_topk_prob`, false where it is missing."""

    def rule(config: Config, top_k: int) -> Routing:
        chosen = bool(config.get("norm_topk_prob", False)) if renormalize is None else renormalize
        return Routing(top_k, renormalize=chosen)

    return rule


def _qwen_with_shared_expert(config: Config, top_k: int) -> Routing:
    """Qwen3.5 renormalises and says nothing; Qwen2 does where its config says so."""
    default = config.get("model_type") != "qwen2_moe"
    return Routing(top_k, renormalize=bool(config.get("norm_topk_prob", default)))


def _deepseek(scoring: str, group_score: str) -> Callable[[Config, int], Routing]:
    """DeepSeek's rule with the config's scoring, groups and scale."""

    def rule(config: Config, top_k: int) -> Routing:
        method = config.get("topk_method") or ""
        grouped = method != "greedy" and (config.get("n_group") or 1) > 1
        found = {"sqrt_softplus": "sqrtsoftplus"}.get(config.get("scoring_func") or scoring, config.get("scoring_func"))
        return Routing(
            top_k,
            scoring=found or scoring,
            renormalize=bool(config.get("norm_topk_prob", scoring != "softmax")),
            num_groups=config["n_group"] if grouped else 1,
            top_groups=config.get("topk_group") or 1 if grouped else 1,
            group_score=group_score,
            scale=float(config.get("routed_scaling_factor") or 1.0),
        )

    return rule


def _gpt_oss(config: Config, top_k: int) -> Routing:
    return Routing(top_k, scoring="identity", renormalize=False, softmax_after_topk=True)


def _llama4(config: Config, top_k: int) -> Routing:
    return Routing(top_k, scoring="sigmoid", renormalize=False, apply_on_input=True)


_DEEPSEEK_SHARED = ("{block}.shared_experts", "{block}.shared_expert")

FAMILIES = (
    Family(
        model_types=("qwen3_moe", "olmoe"),
        block="mlp",
        routing=_softmax(None),
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj"),),
    ),
    Family(
        # Named twice, as Qwen3.5 is: the whole model, and its text part.
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        block="mlp",
        routing=_softmax(None),
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj", transposed=True),),
    ),
    Family(
        model_types=("qwen2_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_6_moe", "qwen3_6_moe_text"),
        block="mlp",
        routing=_qwen_with_shared_expert,
        shared=("{block}.shared_expert",),
        shared_gate="{block}.shared_expert_gate.weight",
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj"),),
    ),
    Family(
        model_types=("mixtral",),
        block="block_sparse_moe",
        routing=_softmax(True),
        gate="w1",
        up="w3",
        down="w2",
    ),
    Family(
        model_types=("minimax_m2", "minimax_m3", "minimax_m3_vl", "minimax"),
        block="block_sparse_moe",
        routing=_deepseek("sigmoid", "top2"),
        gate="w1",
        up="w3",
        down="w2",
        correction_bias="{block}.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        shared_size=("shared_intermediate_size",),
    ),
    Family(
        model_types=("deepseek_v2", "kimi_vl"),
        block="mlp",
        routing=_deepseek("softmax", "max"),
        shared=_DEEPSEEK_SHARED,
    ),
    Family(
        model_types=(
            "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "kimi_k3", "glm4_moe", "glm4_moe_lite",
            "glm_moe_dsa", "glm5_moe", "mimo_v2_flash", "dots1",
        ),
        block="mlp",
        routing=_deepseek("sigmoid", "top2"),
        correction_bias="{block}.gate.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
    ),
    Family(
        model_types=("deepseek_v4",),
        block="ffn",
        routing=_deepseek("sqrtsoftplus", "top2"),
        gate="w1",
        up="w3",
        down="w2",
        correction_bias="{block}.gate.bias",
        hash_table="{block}.gate.tid2eid",
        shared=_DEEPSEEK_SHARED,
    ),
    Family(
        model_types=("gpt_oss",),
        block="mlp",
        routing=_gpt_oss,
        router="{block}.router.weight",
        router_bias="{block}.router.bias",
        stacked=(
            Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj", interleaved=True, transposed=True),
        ),
        biased=True,
        activation=_gpt_oss_activation,
    ),
    Family(
        # The files that OpenAI published: get_family gives them this type.
        model_types=("gpt_oss_original",),
        block="mlp",
        routing=_gpt_oss,
        router_bias="{block}.gate.bias",
        stacked=(Stacked("{block}.mlp1", "{block}.mlp2", interleaved=True),),
        biased=True,
        activation=_gpt_oss_activation,
        others=("{block}.norm.scale",),
    ),
    Family(
        model_types=("llama4", "llama4_text"),
        block="feed_forward",
        routing=_llama4,
        router="{block}.router.weight",
        shared=("{block}.shared_expert",),
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj", transposed=True),),
    ),
    Family(
        model_types=("nemotron_h",),
        block="mixer",
        routing=_deepseek("sigmoid", "top2"),
        gate=None,
        correction_bias="{block}.gate.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        shared_size=("moe_shared_expert_intermediate_size",),
        activation=lambda config: _activation({"mlp_hidden_act": config.get("mlp_hidden_act", "relu2")}),
    ),
    Family(
        # Its dense branch stands beside the block and is left to the model.
        model_types=("gemma4", "gemma4_text"),
        block="experts",
        experts="{block}",
        routing=_softmax(True),
        router="router.proj.weight",
        expert_scale="router.per_expert_scale",
        input_scale="router.scale",
        stacked=(Stacked("{block}.gate_up_proj", "{block}.down_proj"),),
        activation=lambda config: _activation({"hidden_act": config.get("hidden_activation", "gelu_pytorch_tanh")}),
    ),
)  # fmt: skip


def get_family(config: Config, source: object) -> tuple[Family, Config]:
    """The row for a config, and the config with its text part in front.

    Raises:
        ValueError: no row has its `model_type`, naming `source` and the known ones.
    """
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    # The files that OpenAI published for gpt-oss name no type.
    unnamed = "gpt_oss_original" if "model_type" not in config and "experts_per_token" in config else None
    for model_type in (merged.get("model_type"), config.get("model_type"), unnamed):
        for row in FAMILIES:
            if model_type in row.model_types:
                return row, merged
    known = ", ".join(name for row in FAMILIES for name in row.model_types)
    raise ValueError(f"{source}: model_type is {config.get('model_type')!r}; the loader knows {known}")


def num_experts(config: Config, source: object) -> int:
    """E."""
    return positive(config, _EXPERTS, source)


def top_k(config: Config, source: object) -> int:
    """Experts per token."""
    return positive(config, _TOP_K, source)


def intermediate(config: Config, source: object) -> int:
    """I of the routed experts."""
    return positive(config, ("moe_intermediate_size", "intermediate_size"), source)


def positive(config: Config, keys: tuple[str, ...], source: object) -> int:
    """The first of `keys` that the config has; raises ValueError unless it is a positive integer."""
    for key in keys:
        if config.get(key) is not None:
            if not isinstance(config[key], int) or config[key] < 1:
                raise ValueError(f"{source}: {key} is {config[key]!r}; it must be a positive integer")
            return config[key]
    raise ValueError(f"{source}: {' or '.join(keys)} is missing")
