"""Rows of DeepSeek's models, and of those whose blocks are DeepSeek's, with other names, keys or sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_marlin_moe.checkpoint import routing_rules as rules
from jax_marlin_moe.checkpoint.family import Family
from jax_marlin_moe.checkpoint.keys import REQUIRED
from jax_marlin_moe.checkpoint.routing_rules import Defaults

DEEPSEEK_SHARED = ("{block}.shared_experts", "{block}.shared_expert")
W1_W3_W2 = ("w1", "w3", "w2")
RENORMALIZED = Defaults(renormalize=True)
SIGMOID_ONLY: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid", "noaux_tc"),  # dots1's files have the latter
    "topk_method": ("noaux_tc",),
}

_DEEPSEEK_V3 = Defaults(renormalize=True, groups=8, top_groups=4, scale=2.5)
_SCALED = Defaults(renormalize=True, scale=2.5)
# No class of transformers says what a missing key means.
_UNKNOWN = Defaults(scale=REQUIRED)

_DEEPSEEK = Family(
    model_types={
        **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_vl", "kimi_k2", "kimi_k25"), _DEEPSEEK_V3),
        "glm4_moe": RENORMALIZED,
        "glm4_moe_lite": Defaults(renormalize=True, scale=1.8),
        "glm4v_moe_text": RENORMALIZED,
        "glm_moe_dsa": _SCALED,
        "glm5_next_text": Defaults(renormalize=True, scale=2.5, limit=10.0),
        "mimo_v2_flash": RENORMALIZED,
        "dots1": Defaults(renormalize=False),
        "solar_open": RENORMALIZED,
        "beam": _DEEPSEEK_V3,
        "sarvam_mla": _SCALED,
        "kimi_k3": _UNKNOWN,
        "glm5_moe": _UNKNOWN,
    },
    wholes=("kimi_vl", "kimi_k25", "kimi_k3", "glm4v_moe", "glm5_next"),
    block="mlp",
    routing=rules.GROUPED_SIGMOID,
    correction_bias="{block}.gate.e_score_correction_bias",
    shared=DEEPSEEK_SHARED,
    activation=rules.clamped_silu(),
    fixed=SIGMOID_ONLY,
)
# Names that transformers' classes have beside DeepSeek's own.
_KIMI_KEYS = {
    "norm_topk_prob": ("moe_renormalize", "norm_topk_prob"),
    "n_group": ("num_expert_group", "n_group"),
}
_KIMI_ONLY: Mapping[str, tuple[Any, ...]] = {
    **SIGMOID_ONLY,
    "moe_router_activation_func": ("sigmoid",),
    "score_function": ("sigmoid",),
    "use_grouped_topk": (True,),
    "moe_router_enable_expert_bias": (True,),
}

DEEPSEEK_FAMILIES: tuple[Family, ...] = (
    Family(
        model_types={
            "deepseek_v2": Defaults(shared=2),
            "deepseek_ocr2_text": Defaults(shared=2),
            "unlimited_ocr_text": Defaults(shared=2),
        },
        wholes=("deepseek_ocr2", "unlimited_ocr"),
        block="mlp",
        routing=rules.DEEPSEEK_V2,
        shared=DEEPSEEK_SHARED,
        fixed={"scoring_func": ("softmax",)},
        ignored=("norm_topk_prob",),
    ),
    _DEEPSEEK,
    dataclasses.replace(
        # With groups, this block counts the experts of dropped groups as 0, below which a biased score may lie.
        _DEEPSEEK,
        model_types={"axk2": _SCALED},
        wholes=(),
        routing=rules.scored("sigmoid", scaled=True),
        fixed={**SIGMOID_ONLY, "n_group": (1,), "topk_group": (1,)},
    ),
    dataclasses.replace(
        _DEEPSEEK, model_types={"axk1": _DEEPSEEK_V3}, wholes=(), output_norm="post_mlp_layernorm.weight"
    ),
    dataclasses.replace(
        _DEEPSEEK, model_types={"exaone_moe": _SCALED}, wholes=(), correction_bias="{block}.e_score_correction_bias"
    ),
    Family(
        # Ling and Ring, as their authors published them (github.com/inclusionAI/Ling, models/modeling_bailing_moe.py):
        # the first ones here, those of Ling 2.0 behind it.
        model_types={"bailing_moe": Defaults()},
        block="mlp",
        routing=rules.of_several(rules.scored("softmax")),
        shared=DEEPSEEK_SHARED,
        fixed={"multi_gate": (False,), "score_function": ("softmax",)},
    ),
    dataclasses.replace(
        _DEEPSEEK,
        model_types={"bailing_moe_v2": Defaults(scale=REQUIRED, groups=REQUIRED, top_groups=REQUIRED)},
        wholes=(),
        routing=rules.of_several(rules.GROUPED_SIGMOID),
        correction_bias="{block}.gate.expert_bias",
        correction_if="moe_router_enable_expert_bias",
        shared_each=True,
        fixed={
            **SIGMOID_ONLY,
            "score_function": ("sigmoid",),
            "multi_gate": (False,),
            "router_type": ("topN",),
            "moe_router_enable_shared_expert": (True,),
            "moe_router_enable_routed_scaling": (True,),
        },
    ),
    dataclasses.replace(
        _DEEPSEEK,
        model_types={"bailing_hybrid": _DEEPSEEK_V3, "sarvam_moe": _SCALED},
        wholes=(),
        correction_bias="{block}.gate.expert_bias",
        keys=_KIMI_KEYS,
        fixed=_KIMI_ONLY,
    ),
    dataclasses.replace(
        _DEEPSEEK,
        model_types={"kimi_linear": Defaults(renormalize=True, scale=2.446)},
        wholes=("kimi_k3",),
        block="block_sparse_moe",
        linears=W1_W3_W2,
        keys=_KIMI_KEYS,
        fixed=_KIMI_ONLY,
    ),
    dataclasses.replace(
        # Its routed experts are clamped, its shared one is not.
        _DEEPSEEK,
        model_types=dict.fromkeys(("hy_v4", "hy_v4_vl_text"), Defaults(renormalize=True, scale=2.827, limit=10.0)),
        wholes=("hy_v4_vl",),
        shared_names=(("linear_gate", "up_proj", "down_proj"),),
        shared_activation=rules.HIDDEN_ACT,
    ),
    dataclasses.replace(
        _DEEPSEEK,
        model_types={"dots3_note_text": RENORMALIZED},
        wholes=("dots3_note",),
        shared_size=("shared_experts_intermediate_size",),
        shared_each=True,
    ),
)
