"""How model families name the tensors of a mixture-of-experts layer and what their configs say: one row each."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax_marlin_moe.checkpoint import routing_rules as rules
from jax_marlin_moe.checkpoint.keys import REQUIRED, Keys
from jax_marlin_moe.checkpoint.routing_rules import ActivationRule, Defaults, RoutingRule

# What may stand before `layers.{layer}.`: text models, multimodal ones of both generations, Nemotron, DeepSeek-V4.
_STEMS = ("model.", "model.language_model.", "language_model.model.", "backbone.", "")

# Model types of whole models, whose `text_config` has the language model's keys; for some its own type counts.
_WHOLE = ("qwen3_vl_moe", "qwen3_5_moe", "qwen3_6_moe", "minimax_m3", "minimax_m3_vl", "llama4", "gemma4")
_WHOLE_OF_ANY_TEXT = ("kimi_vl", "kimi_k25", "kimi_k3")

_NUM_LAYERS = "num_hidden_layers"
# Sizes, which some configs have beside `text_config`. Tensors contradict wrong ones.
SIZES = ("hidden_size", "moe_intermediate_size", "intermediate_size", _NUM_LAYERS)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "experts_per_token",
)  # fmt: skip


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
        model_types: `model_type` in config.json, each with what missing keys mean.
        block: the module whose tensors are all known; the layer has nothing else in it.
        experts: the module of numbered experts.
        gate: the expert linear (H, I) that goes through the activation; None where experts have no gate.
        up: the expert linear (H, I) that multiplies it, or that goes through the activation itself.
        down: the expert linear (I, H).
        routing: the rule that is made from the config.
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
        activation: likewise.
        shared_size: keys of the shared expert's intermediate size.
        fixed: keys with the only values that the family's block can have.
        ignored: keys that transformers' block of the family does not look at, whatever they say.
        others: tensors of the block that are not part of its experts or its router.
        numbered: why experts with tensors of their own cannot be loaded; None where they can.

    Tensors that a row names are there in every layer of its models; only a layer that routes by a hash table has no
    correction bias.
    """

    model_types: Mapping[str, Defaults]
    block: str
    routing: RoutingRule
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
    activation: ActivationRule = rules.HIDDEN_ACT
    shared_size: tuple[str, ...] = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    others: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    numbered: str | None = None

    @property
    def experts_linears(self) -> tuple[str | None, str, str]:
        """Names of an expert's linears: gate, up, down."""
        return self.gate, self.up, self.down

    @property
    def shared_linears(self) -> tuple[tuple[str | None, str, str], ...]:
        """Names that a shared expert's linears may have: those of experts, or the usual ones, as in MiniMax-M3."""
        return self.experts_linears, ("gate_proj", "up_proj", "down_proj")

    @property
    def router_module(self) -> str:
        """What the names of the router's tensors begin with."""
        return self.router.removesuffix(".weight")

    def owned(self, layer: str) -> tuple[str, ...]:
        """Prefixes of tensors that belong to the layer of experts: each must be known."""
        return f"{self.name('{block}', layer)}.", f"{self.name(self.router.split('.')[0], layer)}."

    def name(self, template: str, layer: str) -> str:
        """A name inside a layer, spelt out."""
        return f"{layer}{template.format(block=self.block)}"

    def layer_pattern(self) -> re.Pattern[str]:
        """Matches names of expert tensors: the layer's own prefix, then its number."""
        stems = "|".join(re.escape(stem) for stem in _STEMS)
        inner = [re.escape(self.name(self.experts, "")) + r"\.[0-9]+\."]
        inner += [re.escape(self.name(module, "")) for row in self.stacked for module in (row.gate_up, row.down)]
        return re.compile(rf"^((?:{stems})(?:layers|block)\.([0-9]+)\.)(?:{'|'.join(inner)})")


_TWO_MEANINGS = (
    "llm-compressor up to 0.11 calls gate and up gate_proj and up_proj, later versions the halves of rows in which "
    "both alternate, other tools do either, and nothing says which wrote the file: use a file with stacked experts "
    "(gate_up_proj_blocks)"
)
_DEEPSEEK_SHARED = ("{block}.shared_experts", "{block}.shared_expert")

_RENORMALIZED = Defaults(renormalize=True)
_DEEPSEEK_V3 = Defaults(renormalize=True, groups=8, top_groups=4, scale=2.5)
# No class of transformers says what a missing key means.
_UNKNOWN = Defaults(scale=REQUIRED)
_SIGMOID_ONLY: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid", "noaux_tc"),  # dots1's files have the latter
    "topk_method": ("noaux_tc",),
}
_MINIMAX: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",), "use_routing_bias": (True,), "n_group": (1,), "topk_group": (1,),
}  # fmt: skip

FAMILIES = (
    Family(
        model_types={"qwen3_moe": Defaults(renormalize=False), "olmoe": Defaults(renormalize=False)},
        block="mlp",
        routing=rules.softmax(),
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj"),),
    ),
    Family(
        # Named twice, as Qwen3.5 is: the whole model, and its text part.
        model_types=dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), Defaults()),
        block="mlp",
        routing=rules.softmax(True),
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj", transposed=True),),
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={"qwen2_moe": Defaults(renormalize=False), "qwen3_next": _RENORMALIZED},
        block="mlp",
        routing=rules.softmax(),
        shared=("{block}.shared_expert",),
        shared_gate="{block}.shared_expert_gate.weight",
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj"),),
    ),
    Family(
        model_types=dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_6_moe", "qwen3_6_moe_text"), Defaults()),
        block="mlp",
        routing=rules.softmax(True),
        shared=("{block}.shared_expert",),
        shared_gate="{block}.shared_expert_gate.weight",
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj"),),
        ignored=("norm_topk_prob",),
    ),
    Family(
        # minimax is MiniMax-Text-01.
        model_types=dict.fromkeys(("mixtral", "minimax"), Defaults()),
        block="block_sparse_moe",
        routing=rules.softmax(True),
        gate="w1",
        up="w3",
        down="w2",
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={"minimax_m2": Defaults()},
        block="block_sparse_moe",
        routing=rules.sigmoid(scaled=False),
        gate="w1",
        up="w3",
        down="w2",
        correction_bias="{block}.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        shared_size=("shared_intermediate_size",),
        fixed={**_MINIMAX, "routed_scaling_factor": (1.0,)},
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types=dict.fromkeys(("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"), Defaults(scale=2.0)),
        block="block_sparse_moe",
        routing=rules.sigmoid(scaled=True),
        gate="w1",
        up="w3",
        down="w2",
        correction_bias="{block}.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        activation=rules.swiglu_oai(("silu", "swigluoai", "swiglu_oai")),
        shared_size=("shared_intermediate_size",),
        fixed=_MINIMAX,
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={"deepseek_v2": Defaults(shared=2)},
        block="mlp",
        routing=rules.DEEPSEEK_V2,
        shared=_DEEPSEEK_SHARED,
        fixed={"scoring_func": ("softmax",)},
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={
            **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_vl", "kimi_k2", "kimi_k25"), _DEEPSEEK_V3),
            "glm4_moe": _RENORMALIZED,
            "glm4_moe_lite": Defaults(renormalize=True, scale=1.8),
            "glm_moe_dsa": Defaults(renormalize=True, scale=2.5),
            "mimo_v2_flash": _RENORMALIZED,
            "dots1": Defaults(renormalize=False),
            "kimi_k3": _UNKNOWN,
            "glm5_moe": _UNKNOWN,
        },
        block="mlp",
        routing=rules.GROUPED_SIGMOID,
        correction_bias="{block}.gate.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        activation=rules.clamped_silu(None),
        fixed=_SIGMOID_ONLY,
    ),
    Family(
        model_types={"deepseek_v4": Defaults(scale=1.5)},
        block="ffn",
        routing=rules.DEEPSEEK_V4,
        gate="w1",
        up="w3",
        down="w2",
        correction_bias="{block}.gate.bias",
        hash_table="{block}.gate.tid2eid",
        shared=_DEEPSEEK_SHARED,
        activation=rules.clamped_silu(10.0),
        fixed={"topk_method": ("noaux_tc",), "n_group": (1,), "topk_group": (1,)},
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={"gpt_oss": Defaults()},
        block="mlp",
        routing=rules.GPT_OSS,
        router="{block}.router.weight",
        router_bias="{block}.router.bias",
        stacked=(
            Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj", interleaved=True, transposed=True),
        ),
        biased=True,
        activation=rules.swiglu_oai(("silu",)),
        ignored=("norm_topk_prob",),
        numbered=_TWO_MEANINGS,
    ),
    Family(
        # The files that OpenAI published: get_family gives them this type.
        model_types={"gpt_oss_original": Defaults()},
        block="mlp",
        routing=rules.GPT_OSS,
        router_bias="{block}.gate.bias",
        stacked=(Stacked("{block}.mlp1", "{block}.mlp2", interleaved=True),),
        biased=True,
        activation=rules.swiglu_oai(("silu",)),
        numbered=_TWO_MEANINGS,
        others=("{block}.norm.scale",),
    ),
    Family(
        model_types=dict.fromkeys(("llama4", "llama4_text"), Defaults()),
        block="feed_forward",
        routing=rules.LLAMA4,
        router="{block}.router.weight",
        shared=("{block}.shared_expert",),
        stacked=(Stacked("{block}.experts.gate_up_proj", "{block}.experts.down_proj", transposed=True),),
    ),
    Family(
        model_types={"nemotron_h": _RENORMALIZED},
        block="mixer",
        routing=rules.GROUPED_SIGMOID,
        gate=None,
        correction_bias="{block}.gate.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        shared_size=("moe_shared_expert_intermediate_size",),
        activation=rules.RELU2,
        fixed=_SIGMOID_ONLY,
        ignored=("n_groups",),  # of its state-space layers
    ),
    Family(
        # Its dense branch stands beside the block and is left to the model.
        model_types=dict.fromkeys(("gemma4", "gemma4_text"), Defaults()),
        block="experts",
        experts="{block}",
        routing=rules.softmax(True),
        router="router.proj.weight",
        expert_scale="router.per_expert_scale",
        input_scale="router.scale",
        stacked=(Stacked("{block}.gate_up_proj", "{block}.down_proj"),),
        activation=rules.named("hidden_activation", "gelu_pytorch_tanh"),
        fixed={"hidden_act": ("gelu_pytorch_tanh",)},
    ),
)


def get_family(config: Mapping[str, Any], source: object) -> tuple[Family, str, Keys]:
    """The row for a config, the model type that says what its missing keys mean, and the keys of its text part.

    Raises:
        ValueError: no row has its `model_type`, naming `source` and the known ones; or `text_config` is not an object,
            or is present where the model type has none.
    """
    whole = Keys(config, source)
    text = whole.object("text_config", None, null=True)
    outer = whole.text("model_type", None, null=True)
    if outer == "minimax" and "MiniMaxM2ForCausalLM" in whole.texts("architectures", [], null=True):
        outer = "minimax_m2"  # MiniMax-M2's first files
    if outer is None and "model_type" not in config and "experts_per_token" in config:
        outer = "gpt_oss_original"  # the files that OpenAI published for gpt-oss name no type
    if text is None:
        row = _row(outer)
        if row is None or outer is None:
            raise _unknown(whole)
        return row, outer, whole
    inner = text.text("model_type", None, null=True)
    if outer not in (*_WHOLE, *_WHOLE_OF_ANY_TEXT) and _row(outer) is not None:
        raise whole.fault("text_config", f"missing: {outer} has no text part")
    found = outer if outer in _WHOLE or inner is None else inner
    row = _row(found)
    if row is None or found is None:
        raise _unknown(whole if inner is None else text)
    beside = {key: config[key] for key in (*SIZES, *NUM_EXPERTS, *TOP_K) if key in config}
    return row, found, Keys({**beside, **text.values}, source, text.path)


def number_of_layers(keys: Keys) -> int | None:
    """Layers of the model, of which those for multi-token prediction are none; None where the config does not say."""
    return keys.integer(_NUM_LAYERS, None, low=1, null=True)


def _row(model_type: str | None) -> Family | None:
    return next((row for row in FAMILIES if model_type in row.model_types), None)


def _unknown(keys: Keys) -> ValueError:
    found = repr(keys.values.get("model_type"))
    known = ", ".join(name for row in FAMILIES for name in row.model_types)
    return ValueError(f"{keys.source}: {keys.path}model_type is {found}; the loader knows {known}")
