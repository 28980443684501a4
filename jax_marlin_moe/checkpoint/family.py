"""A row of a model family: the names of a layer's tensors, the rules of its config; and how rows are found."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_marlin_moe.checkpoint import routing_rules as rules
from jax_marlin_moe.checkpoint.keys import Keys
from jax_marlin_moe.checkpoint.routing_rules import ActivationRule, Defaults, RoutingRule

# What may precede `layers.{layer}.`: text models, multimodal ones of both generations, Nemotron, DBRX, Qwen3-Omni,
# DeepSeek-V4.
_STEMS = (
    "model.", "model.language_model.", "language_model.model.", "backbone.", "transformer.", "thinker.model.",
    "language_model.backbone.", "model.llm.", "",
)  # fmt: skip
_LAYERS = ("layers", "block", "blocks")
# What holds layers for multi-token prediction, where they are not numbered behind the others.
_PREDICTION = ("mtp.layers", "mtp", "mtp_layers", "nextn.layers")

# Model types that files of a later model have too, with its architecture: MiniMax-M2's first ones, those of Ling 2.0.
_RENAMED = {
    "minimax": ("MiniMaxM2ForCausalLM", "minimax_m2"),
    "bailing_moe": ("BailingMoeV2ForCausalLM", "bailing_moe_v2"),
}

_NUM_LAYERS = "num_hidden_layers"
# Sizes, which some configs have beside `text_config`. Tensors contradict wrong ones.
SIZES = ("hidden_size", "moe_intermediate_size", "intermediate_size", _NUM_LAYERS)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k",
    "experts_per_token",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StackedNames:
    """Tensors that hold all experts.

    Attributes:
        gate_up: module of the fused tensor, inside the layer; `up` alone where there is no gate; two modules where gate
            and up are apart.
        down: likewise.
        interleaved: whether gate and up alternate row by row.
        transposed: whether plain weights lie as [E, K, N] where their shape does not tell.
        flat: whether experts lie one below the other in two dimensions: [E * I, H], of all three linears (DBRX).
    """

    gate_up: str | tuple[str, str]
    down: str
    interleaved: bool = False
    transposed: bool = False
    flat: bool = False


# A linear of these names is one tensor of gate and up, [gate | up].
Linears = tuple[str | None, str, str]
_USUAL: Linears = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of one family. Names are inside the layer, `layers.{layer}.`.

    In names, `{block}` and `{experts}` stand for the attributes.

    Attributes:
        model_types: `model_type` in config.json, each with what missing keys mean.
        block: the module whose tensors are all known; the layer has nothing else in it.
        routing: the rule that is made from the config.
        experts: the module of numbered experts.
        linears: names of an expert's linears: gate (H, I), which goes through the activation, or None where experts
            have no gate; up (H, I), which multiplies it, or goes through the activation itself; down (I, H).
        router: the router's tensor [E, H].
        router_transposed: whether that lies as [H, E].
        router_bias: its bias [E].
        correction_bias: added to scores for the choice alone, [E].
        correction_if: the key that says whether there is one (`true` where it is missing); None where there always is.
        shared: modules that shared experts may have.
        shared_names: names that a shared expert's linears may have; gate and up of one name are one tensor.
        shared_gate: the gate's tensor [1, H] of the shared expert.
        shared_activation: of the shared expert, where it is another.
        shared_size: keys of the shared expert's intermediate size.
        shared_each: whether that is the size of each of several.
        shared_scale: the factor of the shared expert's result, from the config.
        hash_table: experts by token id, [vocabulary, top_k].
        expert_scale: factors of the weights by expert, [E].
        input_scale: factors of the normalised input of the router, [H].
        output_norm: the weight of the norm of the result, [H].
        output_bias: added to the result, [H], where the weights of the experts sum to 1.
        stacked: tensors that hold all experts, where files may have them.
        biased: whether experts have biases.
        activation: the rule that is made from the config.
        size: keys of the intermediate size of an expert, the first that is there.
        keys: other names of keys, by the name that the rules have for them; where they are given, no others count.
        by_layer: keys whose value may be a list with one for each layer.
        modalities: how many groups of experts lie one behind the other, the first of which, for text, is loaded. Lists
            of the config have a value for each, and so have rows of the correction bias (Ernie 4.5 VL).
        merged: objects of the config whose keys count as its own.
        wholes: model types of whole models, whose text part is of this family.
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
    linears: Linears = _USUAL
    router: str = "{block}.gate.weight"
    router_transposed: bool = False
    router_bias: str | None = None
    correction_bias: str | None = None
    correction_if: str | None = None
    shared: tuple[str, ...] = ()
    shared_names: tuple[Linears, ...] = ()
    shared_gate: str | None = None
    shared_activation: ActivationRule | None = None
    shared_size: tuple[str, ...] = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    shared_each: bool = False
    shared_scale: Callable[[Keys], float] | None = None
    hash_table: str | None = None
    expert_scale: str | None = None
    input_scale: str | None = None
    output_norm: str | None = None
    output_bias: str | None = None
    stacked: tuple[StackedNames, ...] = (StackedNames("{experts}.gate_up_proj", "{experts}.down_proj"),)
    biased: bool = False
    activation: ActivationRule = rules.HIDDEN_ACT
    size: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    by_layer: tuple[str, ...] = ()
    modalities: int = 1
    merged: tuple[str, ...] = ()
    wholes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    numbered: str | None = None

    @property
    def shared_linears(self) -> tuple[Linears, ...]:
        """Names that a shared expert's linears may have: its own, those of experts, or the usual ones."""
        return (*self.shared_names, self.linears, _USUAL)

    @property
    def router_module(self) -> str:
        """What the names of the router's tensors begin with."""
        return self.router.removesuffix(".weight")

    def owned(self, layer: str) -> tuple[str, ...]:
        """Prefixes of tensors that belong to the layer of experts: each must be known."""
        named = (self.router, self.correction_bias, self.expert_scale, self.output_norm, *self.shared)
        first = {self.name(template, "").split(".")[0] for template in ("{block}", *named) if template is not None}
        return (f"{self.name('{block}', layer)}.", *(f"{layer}{module}." for module in sorted(first)))

    def name(self, template: str, layer: str) -> str:
        """A name inside a layer, spelt out."""
        return f"{layer}{template.format(block=self.block, experts=self.experts.format(block=self.block))}"

    def layer_pattern(self) -> re.Pattern[str]:
        """Matches names of expert tensors: the layer's own prefix, its number, and what is not of a numbered layer."""
        stems = "|".join(re.escape(stem) for stem in _STEMS)
        inner = [re.escape(self.name(self.experts, "")) + r"\.[0-9]+\."]
        for row in self.stacked:
            modules = (row.gate_up,) if isinstance(row.gate_up, str) else row.gate_up
            inner += [re.escape(self.name(module, "")) + r"(?![^._])" for module in (*modules, row.down)]
        holders = "|".join(map(re.escape, _LAYERS))
        prediction = "|".join(map(re.escape, _PREDICTION))
        return re.compile(
            rf"^((?:{stems})(?:(?:{holders})|(?P<prediction>{prediction}))\.(?P<number>[0-9]+)\.)(?:{'|'.join(inner)})"
        )


def get_family(config: Mapping[str, Any], source: object, families: Sequence[Family]) -> tuple[Family, str, Keys]:
    """The row for a config, the model type that says what its missing keys mean, and the keys of its text part.

    Raises:
        ValueError: no row has its `model_type`, naming `source` and the known ones; or `text_config` is not an object,
            or is present where the model type has none.
    """
    whole = Keys(config, source)
    outer = whole.text("model_type", None, null=True)
    if outer in _RENAMED:
        architecture, later = _RENAMED[outer]
        outer = later if architecture in whole.texts("architectures", [], null=True) else outer
    if outer is None and "model_type" not in config and "experts_per_token" in config:
        outer = "gpt_oss_original"  # the files that OpenAI published for gpt-oss name no type
    text = whole
    thinker = whole.object("thinker_config", None, null=True)  # Qwen3-Omni's: a whole model within another
    for part in (whole, thinker):
        found = None if part is None else part.object("text_config", None, null=True)
        text = text if found is None else found
    row = find_family(outer, families)
    if text is whole:
        if row is None or outer is None:
            raise _unknown(whole, families)
        return row, outer, _keys_of(row, whole)
    wholes = [row for row in families if outer in row.wholes]
    if not wholes and row is not None:
        raise whole.fault("text_config", f"missing: {outer} has no text part")
    if not wholes or outer is None:
        raise _unknown(whole, families)
    inner = text.text("model_type", None, null=True)
    if inner is None and row is not None:
        inner = outer
    if inner is None:
        inner = next(iter(wholes[0].model_types))
    row = find_family(inner, families)
    if row is None:
        raise _unknown(text, families)
    beside = {key: config[key] for key in (*SIZES, *NUM_EXPERTS, *TOP_K) if key in config}
    return row, inner, _keys_of(row, Keys({**beside, **text.values}, source, text.path))


def find_family(model_type: str | None, families: Sequence[Family]) -> Family | None:
    """The first row that has a model type; None where none has it."""
    return next((row for row in families if model_type in row.model_types), None)


def number_of_layers(keys: Keys) -> int | None:
    """Layers of the model, of which those for multi-token prediction are none; None where the config does not say."""
    return keys.integer(_NUM_LAYERS, None, low=1, null=True)


def _keys_of(row: Family, keys: Keys) -> Keys:
    """The keys as a row reads them: with those of its merged objects, and with its names."""
    values = dict(keys.values)
    for name in row.merged:
        part = keys.object(name, None, null=True)
        values |= {} if part is None else part.values
    return Keys(values, keys.source, keys.path, row.keys)


def _unknown(keys: Keys, families: Sequence[Family]) -> ValueError:
    found = repr(keys.values.get("model_type"))
    known = ", ".join(dict.fromkeys(name for row in families for name in (*row.model_types, *row.wholes)))
    advice = "for another, pass families= with a row of it"
    return ValueError(f"{keys.source}: {keys.path}model_type is {found}; the loader knows {known}; {advice}")
