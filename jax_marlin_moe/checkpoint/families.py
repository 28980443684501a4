"""How model families name the tensors of a mixture-of-experts layer and what their configs say: one row each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_marlin_moe.checkpoint import routing_rules as rules
from jax_marlin_moe.checkpoint.family import Family, StackedNames
from jax_marlin_moe.checkpoint.keys import REQUIRED
from jax_marlin_moe.checkpoint.routing_rules import Defaults

_TWO_MEANINGS = (
    "llm-compressor up to 0.11 calls gate and up gate_proj and up_proj, later versions the halves of rows in which "
    "both alternate, other tools do either, and nothing says which wrote the file: use a file with stacked experts "
    "(gate_up_proj_blocks)"
)
_DEEPSEEK_SHARED = ("{block}.shared_experts", "{block}.shared_expert")
_TRANSPOSED = (StackedNames("{experts}.gate_up_proj", "{experts}.down_proj", transposed=True),)

_RENORMALIZED = Defaults(renormalize=True)
_NOT_RENORMALIZED = Defaults(renormalize=False)
_DEEPSEEK_V3 = Defaults(renormalize=True, groups=8, top_groups=4, scale=2.5)
_SCALED = Defaults(renormalize=True, scale=2.5)
# No class of transformers says what a missing key means.
_UNKNOWN = Defaults(scale=REQUIRED)
_SIGMOID_ONLY: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid", "noaux_tc"),  # dots1's files have the latter
    "topk_method": ("noaux_tc",),
}
_KIMI_ONLY: Mapping[str, tuple[Any, ...]] = {
    **_SIGMOID_ONLY,
    "moe_router_activation_func": ("sigmoid",),
    "score_function": ("sigmoid",),
    "use_grouped_topk": (True,),
    "moe_router_enable_expert_bias": (True,),
}
_MINIMAX: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid",), "use_routing_bias": (True,), "n_group": (1,), "topk_group": (1,),
}  # fmt: skip

_W1_W3_W2 = ("w1", "w3", "w2")

_DEEPSEEK = Family(
    model_types={
        **dict.fromkeys(("deepseek_v3", "deepseek_v32", "kimi_vl", "kimi_k2", "kimi_k25"), _DEEPSEEK_V3),
        "glm4_moe": _RENORMALIZED,
        "glm4_moe_lite": Defaults(renormalize=True, scale=1.8),
        "glm4v_moe_text": _RENORMALIZED,
        "glm_moe_dsa": _SCALED,
        "glm5_next_text": Defaults(renormalize=True, scale=2.5, limit=10.0),
        "mimo_v2_flash": _RENORMALIZED,
        "dots1": _NOT_RENORMALIZED,
        "solar_open": _RENORMALIZED,
        "beam": _DEEPSEEK_V3,
        "sarvam_mla": _SCALED,
        "kimi_k3": _UNKNOWN,
        "glm5_moe": _UNKNOWN,
    },
    wholes=("kimi_vl", "kimi_k25", "kimi_k3", "glm4v_moe", "glm5_next"),
    block="mlp",
    routing=rules.GROUPED_SIGMOID,
    correction_bias="{block}.gate.e_score_correction_bias",
    shared=_DEEPSEEK_SHARED,
    activation=rules.clamped_silu(),
    fixed=_SIGMOID_ONLY,
)
# Names that transformers' classes have beside DeepSeek's own.
_KIMI_KEYS = {
    "norm_topk_prob": ("moe_renormalize", "norm_topk_prob"),
    "n_group": ("num_expert_group", "n_group"),
}
_GPT_OSS = Family(
    model_types={"gpt_oss": Defaults()},
    block="mlp",
    routing=rules.SOFTMAX_AFTER_TOPK,
    router="{block}.router.weight",
    router_bias="{block}.router.bias",
    stacked=(StackedNames("{experts}.gate_up_proj", "{experts}.down_proj", interleaved=True, transposed=True),),
    biased=True,
    activation=rules.swiglu_oai(("silu",)),
    ignored=("norm_topk_prob",),
    numbered=_TWO_MEANINGS,
)
_GRANITE = Family(
    model_types=dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), Defaults()),
    block="block_sparse_moe",
    routing=rules.SOFTMAX_AFTER_TOPK,
    router="{block}.router.layer.weight",
    shared=("shared_mlp",),
    shared_names=(("input_linear", "input_linear", "output_linear"),),
    shared_size=("shared_intermediate_size",),
    stacked=(StackedNames("{block}.input_linear", "{block}.output_linear"),),
)
_GEMMA = Family(
    # Its dense branch, beside the block, is left to the model.
    model_types=dict.fromkeys(("gemma4", "gemma4_text", "diffusion_gemma_text"), Defaults()),
    wholes=("gemma4", "diffusion_gemma"),
    block="experts",
    experts="{block}",
    routing=rules.scored("softmax", renormalize=True),
    router="router.proj.weight",
    expert_scale="router.per_expert_scale",
    input_scale="router.scale",
    activation=rules.named("hidden_activation", "gelu_pytorch_tanh"),
    fixed={"hidden_act": ("gelu_pytorch_tanh",)},
)

_ERNIE = Family(
    model_types={"ernie4_5_moe": Defaults(shared=2)},
    block="mlp",
    routing=rules.scored("softmax", renormalize=True),
    correction_bias="{block}.moe_statics.e_score_correction_bias",
    shared=_DEEPSEEK_SHARED,
    # What the sum of the chosen scores is at least: a softmax's sum is more, and this changes nothing.
    fixed={"moe_norm_min": (1e-12,), "moe_use_aux_free": (True,), "moe_gate": ("topk", "top2_fused")},
    ignored=("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_capacity", "norm_topk_prob"),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types={
            "qwen3_moe": _NOT_RENORMALIZED,
            "olmoe": _NOT_RENORMALIZED,
            "flex_olmo": _NOT_RENORMALIZED,
            "mellum": _RENORMALIZED,
        },
        block="mlp",
        routing=rules.scored("softmax"),
    ),
    Family(
        # Named twice, as Qwen3.5 is: the whole model, and its text part.
        model_types=dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), Defaults()),
        wholes=("qwen3_vl_moe",),
        block="mlp",
        routing=rules.scored("softmax", renormalize=True),
        stacked=_TRANSPOSED,
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types=dict.fromkeys(("qwen3_omni_moe_text",), Defaults()),
        wholes=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        block="mlp",
        routing=rules.scored("softmax", renormalize=True),
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={
            "qwen2_moe": _NOT_RENORMALIZED,
            "qwen3_next": _RENORMALIZED,
            "qwen4_exp_text": _RENORMALIZED,
        },
        wholes=("qwen4_exp",),
        block="mlp",
        routing=rules.scored("softmax"),
        shared=("{block}.shared_expert",),
        shared_gate="{block}.shared_expert_gate.weight",
    ),
    Family(
        model_types=dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_6_moe", "qwen3_6_moe_text"), Defaults()),
        wholes=("qwen3_5_moe", "qwen3_6_moe"),
        block="mlp",
        routing=rules.scored("softmax", renormalize=True),
        shared=("{block}.shared_expert",),
        shared_gate="{block}.shared_expert_gate.weight",
        ignored=("norm_topk_prob",),
    ),
    Family(
        # The shared expert has no gate.
        model_types={"lara_mini": _RENORMALIZED},
        block="mlp",
        routing=rules.scored("softmax"),
        shared=("{block}.shared_expert",),
    ),
    Family(
        model_types={"flint": _RENORMALIZED},
        block="mlp",
        routing=rules.scored("sigmoid"),
        shared=("{block}.shared_expert",),
    ),
    Family(
        # minimax is MiniMax-Text-01.
        model_types=dict.fromkeys(("mixtral", "minimax"), Defaults()),
        block="block_sparse_moe",
        routing=rules.scored("softmax", renormalize=True),
        linears=_W1_W3_W2,
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={"phimoe": Defaults()},
        block="block_sparse_moe",
        routing=rules.SPARSEMIXER,
        linears=_W1_W3_W2,
    ),
    Family(
        model_types={"minimax_m2": Defaults()},
        block="block_sparse_moe",
        routing=rules.scored("sigmoid", renormalize=True),
        linears=_W1_W3_W2,
        correction_bias="{block}.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        shared_size=("shared_intermediate_size",),
        fixed={**_MINIMAX, "routed_scaling_factor": (1.0,)},
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types=dict.fromkeys(("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"), Defaults(scale=2.0)),
        wholes=("minimax_m3", "minimax_m3_vl"),
        block="block_sparse_moe",
        routing=rules.scored("sigmoid", renormalize=True, scaled=True),
        linears=_W1_W3_W2,
        correction_bias="{block}.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        activation=rules.swiglu_oai(("silu", "swigluoai", "swiglu_oai")),
        shared_size=("shared_intermediate_size",),
        fixed=_MINIMAX,
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={
            "deepseek_v2": Defaults(shared=2),
            "deepseek_ocr2_text": Defaults(shared=2),
            "unlimited_ocr_text": Defaults(shared=2),
        },
        wholes=("deepseek_ocr2", "unlimited_ocr"),
        block="mlp",
        routing=rules.DEEPSEEK_V2,
        shared=_DEEPSEEK_SHARED,
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
        fixed={**_SIGMOID_ONLY, "n_group": (1,), "topk_group": (1,)},
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
        shared=_DEEPSEEK_SHARED,
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
            **_SIGMOID_ONLY,
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
        linears=_W1_W3_W2,
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
        model_types={"dots3_note_text": _RENORMALIZED},
        wholes=("dots3_note",),
        shared_size=("shared_experts_intermediate_size",),
        shared_each=True,
    ),
    Family(
        model_types={"mistral4": _RENORMALIZED},
        block="mlp",
        routing=rules.scored("softmax", grouped=True, scaled=True),
        shared=_DEEPSEEK_SHARED,
    ),
    Family(
        model_types={"mistral_large4_text": Defaults()},
        wholes=("mistral_large4",),
        block="experts",
        experts="{block}",
        router="gate.weight",
        routing=rules.scored("softmax", renormalize=True, grouped=True, scaled=True),
        linears=_W1_W3_W2,
        shared=("shared_experts",),
        ignored=("norm_topk_prob",),
    ),
    Family(
        model_types={"deepseek_v4": Defaults(scale=1.5, limit=10.0)},
        block="ffn",
        routing=rules.DEEPSEEK_V4,
        linears=_W1_W3_W2,
        correction_bias="{block}.gate.bias",
        hash_table="{block}.gate.tid2eid",
        shared=_DEEPSEEK_SHARED,
        activation=rules.clamped_silu(),
        fixed={"topk_method": ("noaux_tc",), "n_group": (1,), "topk_group": (1,)},
        ignored=("norm_topk_prob",),
    ),
    _GPT_OSS,
    Family(
        # The files that OpenAI published: get_family gives them this type.
        model_types={"gpt_oss_original": Defaults()},
        block="mlp",
        routing=rules.SOFTMAX_AFTER_TOPK,
        router_bias="{block}.gate.bias",
        stacked=(StackedNames("{block}.mlp1", "{block}.mlp2", interleaved=True),),
        biased=True,
        activation=rules.swiglu_oai(("silu",)),
        numbered=_TWO_MEANINGS,
        others=("{block}.norm.scale",),
    ),
    dataclasses.replace(_GPT_OSS, model_types={"openai_privacy_filter": Defaults()}, stacked=_TRANSPOSED),
    Family(
        model_types=dict.fromkeys(("llama4", "llama4_text"), Defaults()),
        wholes=("llama4",),
        block="feed_forward",
        routing=rules.LLAMA4,
        router="{block}.router.weight",
        shared=("{block}.shared_expert",),
        stacked=_TRANSPOSED,
    ),
    Family(
        model_types={"jamba": Defaults()},
        block="feed_forward",
        routing=rules.scored("softmax", renormalize=False),
        router="{block}.router.weight",
        size=("intermediate_size",),
    ),
    Family(
        model_types={"lfm2_moe": _RENORMALIZED},
        block="feed_forward",
        routing=rules.scored("sigmoid", scaled=True, renormalize_epsilon=1e-6),
        linears=_W1_W3_W2,
        correction_bias="{block}.expert_bias",
        correction_if="use_expert_bias",
        activation=rules.SILU,
    ),
    Family(
        model_types={"nemotron_h": _RENORMALIZED},
        wholes=("nemotron_h_omni", "nemo_speechlm"),
        block="mixer",
        routing=rules.GROUPED_SIGMOID,
        linears=(None, "up_proj", "down_proj"),
        correction_bias="{block}.gate.e_score_correction_bias",
        shared=_DEEPSEEK_SHARED,
        shared_size=("moe_shared_expert_intermediate_size",),
        activation=rules.RELU2,
        fixed=_SIGMOID_ONLY,
        ignored=("n_groups",),  # of its state-space layers
    ),
    _GEMMA,
    _GRANITE,
    dataclasses.replace(
        _GRANITE,
        model_types={"granitemoe_swa": Defaults()},
        router="{block}.router.weight",
        stacked=(StackedNames("{experts}.gate_up_proj", "{experts}.down_proj"),),
    ),
    Family(
        model_types={"jetmoe": Defaults()},
        block="mlp",
        routing=rules.SOFTMAX_AFTER_TOPK,
        router="{block}.router.layer.weight",
        output_bias="{block}.bias",
        stacked=(StackedNames("{block}.input_linear", "{block}.output_linear"),),
        activation=rules.named("activation_function"),
    ),
    _ERNIE,
    dataclasses.replace(
        _ERNIE,
        model_types={"ernie4_5_vl_moe_text": Defaults(shared=2)},
        wholes=("ernie4_5_vl_moe",),
        modalities=2,
        router_transposed=True,
        others=("{block}.gate.weight_1",),
    ),
    Family(
        model_types={"hunyuan_v1_moe": Defaults()},
        block="mlp",
        routing=rules.scored("softmax", renormalize=True),
        router="{block}.gate.wg.weight",
        shared=("{block}.shared_mlp",),
        shared_size=("intermediate_size",),
        size=("intermediate_size",),
        by_layer=("num_experts", "moe_topk"),
        fixed={
            "use_mixed_mlp_moe": (True,),
            "norm_topk_prob": (True,),
            "group_limited_greedy": (False,),
            "routed_scaling_factor": (1.0,),
            "n_group": (1,),
            "topk_group": (1,),
            "moe_drop_tokens": (False,),
        },
        ignored=(
            "num_shared_expert",
            "moe_layer_num_skipped",
            "moe_random_routing_dropped_token",
            "capacity_factor",
        ),
    ),
    Family(
        model_types={"hy_v3": Defaults(scale=2.826)},
        block="mlp",
        routing=rules.scored("sigmoid", renormalize=True, scaled=True),
        router="{block}.router.gate.weight",
        correction_bias="{block}.expert_bias",
        shared=("{block}.shared_mlp",),
        keys={"routed_scaling_factor": ("router_scaling_factor",)},
        fixed={"moe_router_use_sigmoid": (True,), "moe_router_enable_expert_bias": (True,), "route_norm": (True,)},
        ignored=("enable_moe_fp32_combine",),
    ),
    Family(
        model_types={"afmoe": Defaults()},
        block="mlp",
        routing=rules.scored("sigmoid", renormalize=True, scaled=True),
        router="{block}.router.gate.weight",
        correction_bias="{block}.expert_bias",
        shared=_DEEPSEEK_SHARED,
        keys={"routed_scaling_factor": ("route_scale",)},
        fixed={
            "score_func": ("sigmoid",),
            "route_norm": (True,),
            "n_group": (1,),
            "topk_group": (1,),
            "num_expert_groups": (1,),
            "num_limited_groups": (1,),
        },
    ),
    Family(
        model_types={"laguna": Defaults()},
        block="mlp",
        routing=rules.with_soft_cap(rules.scored("sigmoid", renormalize=True, scaled=True)),
        correction_bias="{experts}.e_score_correction_bias",
        shared=("{block}.shared_expert", "{block}.shared_experts"),
        keys={"routed_scaling_factor": ("moe_routed_scaling_factor",)},
        fixed={"moe_apply_router_weight_on_input": (False,)},
        ignored=("norm_topk_prob", "gating"),  # the latter is of its attention
    ),
    Family(
        model_types={"kolibri1": _NOT_RENORMALIZED},
        block="mlp",
        routing=rules.scored("chosen_sigmoid"),
        correction_bias="moe.router.expert_bias",
        shared=_DEEPSEEK_SHARED,
    ),
    Family(
        model_types={"cohere2_moe": _RENORMALIZED},
        block="mlp",
        routing=rules.COHERE,
        shared=_DEEPSEEK_SHARED,
        shared_scale=rules.cohere_shared_scale,
        size=("intermediate_size",),
    ),
    Family(
        model_types={"aria_text": Defaults(shared=2)},
        wholes=("aria",),
        block="mlp",
        routing=rules.SOFTMAX_AFTER_TOPK,
        router="{block}.router.weight",
        shared=_DEEPSEEK_SHARED,
        stacked=(StackedNames("{experts}.fc1", "{experts}.fc2", transposed=True),),
        size=("intermediate_size",),
        activation=rules.SILU,
    ),
    Family(
        model_types={"dbrx": Defaults()},
        block="ffn",
        routing=rules.DBRX,
        router="{block}.router.layer.weight",
        stacked=(StackedNames(("{experts}.mlp.w1", "{experts}.mlp.v1"), "{experts}.mlp.w2", flat=True),),
        size=("ffn_hidden_size",),
        keys={"hidden_size": ("d_model",), "num_hidden_layers": ("n_layers",)},
        merged=("ffn_config",),
        activation=rules.DBRX_ACTIVATION,
        ignored=("moe_jitter_eps", "moe_loss_weight"),
    ),
    Family(
        model_types={"longcat_flash": Defaults(scale=6.0, identity=256)},
        block="mlp",
        routing=rules.with_identity_experts(rules.scored("softmax", renormalize=False, scaled=True)),
        router="{block}.router.classifier.weight",
        correction_bias="{block}.router.e_score_correction_bias",
        size=("expert_ffn_hidden_size", "moe_intermediate_size"),
        keys={"num_hidden_layers": ("num_layers", "num_hidden_layers")},
        fixed={"zero_expert_type": ("identity",), "router_bias": (False,), "norm_topk_prob": (False,)},
    ),
    Family(
        model_types={"step3p5": Defaults()},
        wholes=("step3p7",),
        block="moe",
        routing=rules.scored("sigmoid", renormalize=True, scaled=True),
        correction_bias="{block}.router_bias",
        shared=("share_expert",),
        shared_size=("share_expert_dim", "share_expert_dims"),
        shared_activation=rules.step("swiglu_limits_shared"),
        stacked=(StackedNames(("{block}.gate_proj", "{block}.up_proj"), "{block}.down_proj"),),
        activation=rules.step("swiglu_limits"),
        keys={"routed_scaling_factor": ("moe_router_scaling_factor",)},
        fixed={
            "moe_router_activation": ("sigmoid",),
            "use_moe_router_bias": (True,),
            "norm_expert_weight": (True,),
            "use_moe": (True,),
            "moe_dynamic_exp_p": (1.0,),
        },
        ignored=("moe_layers_enum", "moe_every_n_layer", "moe_layer_offset", "need_fp32_gate"),
    ),
    Family(
        model_types={"inkling2_text": Defaults(scale=8.0)},
        wholes=("inkling2",),
        block="mlp",
        routing=rules.scored("sigmoid", renormalize=True, scaled=True),
        correction_bias="{block}.gate.bias",
        stacked=(StackedNames("{experts}.w13_weight", "{experts}.w2_weight", interleaved=True),),
        activation=rules.SITU,
        keys={"routed_scaling_factor": ("route_scale",)},
        fixed={"scoring_func": ("sigmoid",)},
        ignored=("qk_l2_clip_threshold", "rel_l2_clip_threshold"),  # beside the block
    ),
)
