"""What config.json says of a model's layers of experts, every key read with its type or known not to matter."""

import dataclasses
import re
from collections.abc import Mapping

from jax_marlin_moe.activations import Activation
from jax_marlin_moe.checkpoint.family import NUM_EXPERTS, SIZES, TOP_K, Family
from jax_marlin_moe.checkpoint.keys import Keys, short
from jax_marlin_moe.routing import Routing

_SHARED_NUMBERS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_SIZES = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "shared_experts_intermediate_size",
    "share_expert_dim",
    "share_expert_dims",
)

# Words in the names of keys that say how tokens are routed, what experts compute, or how results are combined.
_BEHAVIOUR = re.compile(
    r"(?:^|_)(?:rout|top_?k|n_groups?(?:_|$)|num_groups?|expert|moe|renorm|gat(?:e|ing)|scor|sigmoid|softmax"
    r"|swiglu|glu|act(?:_|$|ivation)|scal|limit|clamp|clip|(?:soft)?cap(?:_|$|acity|ping)|jitter|latent)"
)

# Keys with such words that change nothing in a block: patterns, each with the reason.
HARMLESS = {
    r"(attn|attention|rope|rotary|index|indexer|mamba|swa|linear_attn|sparse_attention|query_pre_attn|log_scaling)_.*"
    r"|clip_qkv|floor_scale|time_step_limit": "attention, positions and state-space layers, not the block",
    r"final_logit_softcapping|logits?_scal(e|ing)|embedding_scale|scale_embeddings?": "embeddings and logits",
    r"router_(aux|z)_loss_coef|(router|input)_jitter_noise|output_router_logits|moe_aux_loss_coeff?": "training alone",
    r"moe_layer_freq|moe_layers|interleave_moe_layer_step|enable_moe_block"
    r"|expert_layer_(offset|period)": "tensors show which layers have experts",
    r"expert_dtype": "tensors show how experts are stored",
    r"(moe_)?ep_size|moe_shared_expert_overlap|experts_implementation": "how work is spread and overlapped",
    r"top_k|output_scores": "sampling of tokens",
    r"(num_)?mtp_.*": "multi-token prediction, whose layers are loaded by name",
    r"(use_)?(head_wise|attn|output)_.*gate.*|gated_(norm_rank|attention_.*)|kda_.*|hc_.*": "beside the block",
    r"router_dtype": "the router's products are in float32 here",
}

# What is said of keys that are refused for what they mean.
_REFUSED = {"moe_latent_size": "experts behind a latent projection cannot be loaded"}


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Facts of all layers of experts.

    Attributes:
        hidden: H.
        size: I of the routed experts.
        experts: E.
        routing: the model's rule.
        activation: of the experts.
        norm_epsilon: of the norm in front of a router.
        promised: the key that says there are shared experts, and its value; None where no key does.
        denied: the key that says there are none, and its value; None where no key does.
        shared_size: I of the shared experts together, None where the config does not say.
        usual_shared_size: what it is where the config does not say.
        shared_activation: of the shared expert, where it is another.
        shared_scale: the factor of its result.
        correction: the key that says whether there is a correction bias, and its value; None where no key does.
    """

    hidden: int
    size: int
    experts: int
    routing: Routing
    activation: str | Activation
    norm_epsilon: float
    promised: tuple[str, int] | None
    denied: tuple[str, int] | None
    shared_size: int | None
    usual_shared_size: int
    shared_activation: str | Activation | None
    shared_scale: float
    correction: tuple[str, bool] | None


def read_facts(family: Family, model_type: str, keys: Keys, layer: int | None = 0) -> ModelFacts:
    """The facts of a config.

    Args:
        family: from `get_family`.
        model_type: likewise.
        keys: likewise.
        layer: the number of a layer, for keys that have one value for each; None where the numbers do not count it.

    Raises:
        ValueError: a key has a value that it cannot have, or a key about routing or activation is not known.
    """
    defaults = family.model_types[model_type]
    keys = _of_layer(family, keys, layer)
    _refuse_unknown(family, model_type, keys)
    experts = _agreed(keys, NUM_EXPERTS)
    top_k = _agreed(keys, TOP_K)
    if top_k > experts:
        key = next(key for key in TOP_K if keys.get(key) is not None)
        raise ValueError(f"{keys.source}: {keys.path}{key} is {top_k}, more than the {experts} experts")
    size = _first(keys, family.size)
    numbers, sizes = (
        {key: keys.integer(key, low=0) for key in names if keys.get(key) is not None} if family.shared else {}
        for names in (_SHARED_NUMBERS, (*_SHARED_SIZES, *(key for key in family.shared_size if key in SIZES)))
    )
    stated = [(key, value) for key, value in {**numbers, **sizes}.items() if key not in SIZES]
    correction = None
    if family.correction_if is not None:
        correction = family.correction_if, keys.boolean(family.correction_if, True)
    return ModelFacts(
        hidden=_first(keys, ("hidden_size",)),
        size=size,
        experts=experts,
        routing=family.routing.read(keys, experts, top_k, defaults),
        activation=family.activation.read(keys, defaults),
        norm_epsilon=keys.number(
            "rms_norm_eps", 1e-6, low=0, null=family.input_scale is None and family.output_norm is None
        ),
        promised=next((item for item in stated if item[1]), None),
        denied=next((item for item in stated if not item[1]), None),
        shared_size=_shared_size(family, numbers, sizes, size),
        usual_shared_size=size * defaults.shared,
        shared_activation=None if family.shared_activation is None else family.shared_activation.read(keys, defaults),
        shared_scale=1.0 if family.shared_scale is None else family.shared_scale(keys),
        correction=correction,
    )


def _of_layer(family: Family, keys: Keys, layer: int | None) -> Keys:
    """The keys of one layer: its value of each list that has one for every layer."""
    activations = [rule for rule in (family.activation, family.shared_activation) if rule is not None]
    values = dict(keys.values)
    for key in (*family.by_layer, *(key for rule in activations for key in rule.by_layer)):
        value = keys.get(key)
        if not isinstance(value, list):
            continue
        if layer is None and any(item != value[0] for item in value):
            raise keys.fault(key, "one value: which of these is that of a layer for multi-token prediction is not said")
        if (layer or 0) >= len(value):
            raise keys.fault(key, f"a list with a value for layer {layer}", f", and has {len(value)}")
        values[keys.name(key)] = value[layer or 0]
    if family.modalities > 1:
        for key in (*NUM_EXPERTS, *TOP_K, *family.size):
            value = keys.get(key)
            if isinstance(value, list):
                if len(value) != family.modalities:
                    raise keys.fault(key, f"one value, or {family.modalities}, for text and for images")
                values[keys.name(key)] = value[0]
    return dataclasses.replace(keys, values=values)


def _shared_size(family: Family, numbers: Mapping[str, int], sizes: Mapping[str, int], routed: int) -> int | None:
    number = next((number for number in numbers.values() if number), None)
    for key in family.shared_size:
        if sizes.get(key):
            return sizes[key] * (number or 1 if family.shared_each else 1)
    return None if number is None else routed * number


def _agreed(keys: Keys, names: tuple[str, ...]) -> int:
    """The value of keys that mean the same; raises ValueError where two differ, naming both."""
    found = {key: _positive(keys, key) for key in names if keys.get(key) is not None}
    if not found:
        raise ValueError(f"{keys.source}: {keys.path}{' or '.join(names)} is missing; it must be a positive integer")
    if len(set(found.values())) > 1:
        both = " and ".join(f"{key} = {value}" for key, value in found.items())
        raise ValueError(f"{keys.source}: {keys.path or 'it'} says {both}; they mean the same and must be equal")
    return next(iter(found.values()))


def _first(keys: Keys, names: tuple[str, ...]) -> int:
    """The first of `names` that is there."""
    for key in names:
        if keys.get(key) is not None:
            return _positive(keys, key)
    raise ValueError(f"{keys.source}: {keys.path}{' or '.join(names)} is missing; it must be a positive integer")


def _positive(keys: Keys, key: str) -> int:
    value = keys.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise keys.fault(key, "a positive integer")
    return value


def _refuse_unknown(family: Family, model_type: str, keys: Keys) -> None:
    """Every key about routing and activation is read, fixed to what the block does, or known not to matter."""
    shared = (*_SHARED_NUMBERS, *_SHARED_SIZES)
    read = {*SIZES, *NUM_EXPERTS, *TOP_K, *family.size, *family.routing.keys, *family.activation.keys, *family.ignored}
    read |= set() if family.shared_activation is None else set(family.shared_activation.keys)
    read |= set() if family.correction_if is None else {family.correction_if}
    known = {name for key in read for name in family.keys.get(key, (key,))}
    for key, value in keys.values.items():
        if key in family.fixed:
            if value is not None and not any(_same(value, one) for one in family.fixed[key]):
                allowed = " or ".join(map(repr, family.fixed[key]))
                raise keys.fault(key, allowed, f": the block of {model_type} has no other")
        elif key in shared:
            if not family.shared and value not in (None, 0):
                raise keys.fault(key, f"0: {model_type} has no shared experts")
        elif value is not None and key not in known and _BEHAVIOUR.search(key.lower()) and not _harmless(key):
            what = _REFUSED.get(key, f"what this key means for the experts of {model_type} is not known")
            raise ValueError(f"{keys.source}: {keys.path}{key} is {short(value)}; {what}")


def _same(value: object, allowed: object) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _harmless(key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in HARMLESS)
