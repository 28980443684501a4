"""What is read of config.json: types, missing keys, keys that contradict each other, and keys that are not known."""

import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint.families import FAMILIES
from jax_marlin_moe.checkpoint.family import find_family, get_family
from jax_marlin_moe.checkpoint.keys import REQUIRED
from jax_marlin_moe.checkpoint.model_facts import HARMLESS, read_facts
from jax_marlin_moe.routing import Routing

SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
# What types without a class of transformers, or with groups that do not fit 8 experts, need beside the sizes.
NEEDED = {"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
GROUPED = [name for row in FAMILIES if "n_group" in row.routing.keys for name in row.model_types]
TYPES = [name for row in FAMILIES for name in row.model_types if name != "gpt_oss_original"]


def facts(model_type, **config):
    family = find_family(model_type, FAMILIES)
    needed = {"hidden_size": 128, family.size[0]: 64} | (NEEDED if model_type in GROUPED else {})
    if family.model_types[model_type].renormalize is REQUIRED and "norm_topk_prob" in family.routing.keys:
        needed["norm_topk_prob"] = True
    needed = {name: value for key, value in needed.items() for name in family.keys.get(key, (key,))[:1]}
    row, found, keys = get_family({"model_type": model_type, **SIZES, **needed, **config}, "dir/config.json", FAMILIES)
    return read_facts(row, found, keys)


def refused(message, model_type, **config):
    with pytest.raises(ValueError, match=message) as error:
        facts(model_type, **config)
    assert str(error.value).startswith("dir/config.json: ")


@pytest.mark.parametrize(
    ("model_type", "key", "value", "must"),
    [
        ("qwen3_moe", "norm_topk_prob", "false", "true or false"),
        ("qwen3_moe", "norm_topk_prob", None, "true or false"),
        ("deepseek_v3", "norm_topk_prob", 0, "true or false"),
        ("deepseek_v3", "routed_scaling_factor", float("nan"), "a finite number greater than 0"),
        ("deepseek_v3", "routed_scaling_factor", 0, "a finite number greater than 0"),
        ("deepseek_v3", "routed_scaling_factor", "4", "a finite number greater than 0"),
        ("deepseek_v3", "n_group", 0.5, "an integer of at least 1"),
        ("deepseek_v3", "n_group", "", "an integer of at least 1"),
        ("deepseek_v3", "n_group", [], "an integer of at least 1"),
        ("deepseek_v3", "n_group", 3, "a divisor of the 8 experts"),
        ("deepseek_v3", "topk_group", 2, "an integer from 1 to 1"),
        ("deepseek_v3", "scoring_func", "softmax", "'sigmoid' or 'noaux_tc'"),
        ("deepseek_v3", "scoring_func", ["sigmoid"], "'sigmoid' or 'noaux_tc'"),
        ("deepseek_v3", "topk_method", "greedy", "'noaux_tc'"),
        ("deepseek_v2", "topk_method", "noaux_tc", "one of 'greedy', 'group_limited_greedy'"),
        ("deepseek_v2", "scoring_func", "sigmoid", "'softmax'"),
        ("deepseek_v4", "scoring_func", "softmax", "one of 'sqrtsoftplus', 'sqrt_softplus', 'sigmoid'"),
        ("deepseek_v4", "swiglu_limit", 0, "a finite number greater than 0"),
        ("deepseek_v4", "swiglu_limit", None, "a finite number greater than 0"),
        ("gpt_oss", "swiglu_limit", 0, "a finite number greater than 0"),
        ("gpt_oss", "swiglu_alpha", "1.702", "a finite number greater than 0"),
        ("gpt_oss", "hidden_act", "gelu", "'silu'"),
        ("minimax_m2", "use_routing_bias", False, "True"),
        ("minimax_m2", "use_routing_bias", 1, "True"),
        ("minimax_m2", "routed_scaling_factor", 2.0, "1.0"),
        ("gemma4_text", "hidden_activation", None, "one of 'silu'"),
        ("gemma4_text", "hidden_activation", "", "one of 'silu'"),
        ("gemma4_text", "hidden_activation", [], "one of 'silu'"),
        ("qwen3_moe", "hidden_act", {"silu": 1}, "one of 'silu'"),
        ("nemotron_h", "mlp_hidden_act", "silu", "'relu2'"),
        ("qwen3_moe", "num_experts_per_tok", True, "a positive integer"),
        ("qwen3_moe", "num_experts", 8.0, "a positive integer"),
        ("qwen3_moe", "moe_intermediate_size", 0, "a positive integer"),
        ("qwen3_moe", "rms_norm_eps", float("nan"), "a finite number of at least 0"),
        ("qwen3_moe", "rms_norm_eps", -1, "a finite number of at least 0"),
        ("qwen3_moe", "rms_norm_eps", True, "a finite number of at least 0"),
        ("deepseek_v3", "n_shared_experts", "1", "an integer of at least 0"),
        ("qwen2_moe", "shared_expert_intermediate_size", -1, "an integer of at least 0"),
        ("qwen3_moe", "n_shared_experts", 1, "0: qwen3_moe has no shared experts"),
        ("qwen3_moe", "text_config", {}, "missing: qwen3_moe has no text part"),
        ("qwen3_vl_moe", "text_config", [1], "an object"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused(model_type, key, value, must):
    refused(rf"{key} is .*; it must be {must}", model_type, **{key: value})


UNKNOWN = {
    "swiglu_alpha": 1.5,
    "swiglu_beta": 1.0,
    "router_logit_softcapping": 30.0,
    "moe_router_logit_softcapping": 30.0,
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "use_grouped_topk": True,
    "num_expert_group": 2,
    "route_scale": 2.0,
    "score_function": "sigmoid",
    "gate_activation": "sigmoid",
    "zero_expert_num": 4,
    "use_expert_bias": True,
    "expert_capacity_factor": 1.25,
    "capacity_factor": 1.25,
    "activation_clamp": 7.0,
    "act_limit": 7.0,
    "clamp_value": 7.0,
    "moe_latent_size": 64,
    "latent_moe_use_norm": True,
    "scale_router_input": True,
    "shared_moe_mode": "sigmoid",
    "top_k_scaling": 2.0,
}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "llama4_text", "gemma4_text"])
@pytest.mark.parametrize("key", UNKNOWN)
def test_a_key_of_routing_or_activation_that_is_not_known_is_refused_with_its_value(model_type, key):
    refused(rf"{key} is {UNKNOWN[key]!r}; ", model_type, **{key: UNKNOWN[key]})
    assert facts(model_type, **{key: None}) == facts(model_type)


# Keys of published configs that change nothing in the block.
GENUINE = {
    "router_aux_loss_coef": 0.001, "output_router_logits": False, "router_jitter_noise": 0.0, "seq_aux": True,
    "aux_loss_alpha": 0.001, "moe_layer_freq": 1, "first_k_dense_replace": 3, "decoder_sparse_step": 1, "ep_size": 1,
    "mlp_only_layers": [], "rope_scaling": {"factor": 40}, "attention_bias": False, "attn_output_gate": True,
    "index_topk": 2048, "attn_scale": 0.1, "floor_scale": 8192, "interleave_moe_layer_step": 1, "top_k": 50,
    "num_nextn_predict_layers": 1, "final_logit_softcapping": 30.0, "use_cache": True, "clip_qkv": None,
    "attention_value_scale": 0.707, "mamba_hidden_act": "silu", "time_step_limit": [0.0, float("inf")],
    "partial_rotary_factor": 0.5, "architectures": ["X"], "attn_temperature_tuning": True, "expert_dtype": "fp4",
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_keys_that_change_nothing_in_the_block_change_nothing(model_type):
    read = find_family(model_type, FAMILIES).routing.keys
    assert facts(model_type, **{key: value for key, value in GENUINE.items() if key not in read}) == facts(model_type)


# Keys of published configs, beside the sizes, and what they make.
PUBLISHED = {
    "afmoe": (  # Trinity
        {"route_norm": True, "route_scale": 2.826, "score_func": "sigmoid", "n_group": 1, "topk_group": 1,
         "num_expert_groups": 1, "num_limited_groups": 1, "num_shared_experts": 1, "use_grouped_mm": True},
        Routing(2, scoring="sigmoid", scale=2.826),
    ),
    "step3p5": (
        {"use_moe": True, "moe_num_experts": 8, "moe_top_k": 2, "share_expert_dim": 64, "moe_layer_offset": 0,
         "moe_every_n_layer": 1, "moe_layers_enum": "1,2,3", "moe_router_activation": "sigmoid",
         "moe_router_scaling_factor": 3.0, "use_moe_router_bias": True, "need_fp32_gate": True,
         "norm_expert_weight": True, "use_head_wise_attn_gate": True, "swiglu_limits": [0.0] * 4,
         "swiglu_limits_shared": [0.0] * 4, "num_nextn_predict_layers": 3},
        Routing(2, scoring="sigmoid", scale=3.0),
    ),
    "hunyuan_v1_moe": (
        {"moe_topk": [2] * 4, "moe_intermediate_size": [64] * 4, "num_shared_expert": [1] * 4, "n_group": None,
         "use_mixed_mlp_moe": True, "norm_topk_prob": True, "group_limited_greedy": False, "moe_layer_num_skipped": 0,
         "routed_scaling_factor": 1.0, "capacity_factor": 1.0, "moe_drop_tokens": False},
        Routing(2),
    ),
    "ernie4_5_moe": (
        {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
         "moe_layer_end_index": 27, "moe_layer_interval": 1, "moe_capacity": [64, 64, 64], "moe_gate": "topk",
         "moe_use_aux_free": True, "moe_norm_min": 1e-12},
        Routing(2),
    ),
    "bailing_moe_v2": (  # Ling 2.0
        {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
         "moe_router_enable_expert_bias": True, "num_shared_experts": 1, "moe_shared_expert_intermediate_size": 64,
         "norm_topk_prob": True, "router_dtype": "fp32", "first_k_dense_replace": 1, "mtp_loss_scaling_factor": 0},
        Routing(2, scoring="sigmoid", num_groups=4, top_groups=2, scale=2.5),
    ),
    "kimi_linear": (
        {"num_experts_per_token": 2, "moe_renormalize": True, "num_expert_group": 1, "topk_group": 1,
         "routed_scaling_factor": 2.446, "moe_router_activation_func": "sigmoid", "use_grouped_topk": True,
         "num_shared_experts": 1, "moe_layer_freq": 1},
        Routing(2, scoring="sigmoid", scale=2.446),
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_keys_of_published_configs_are_known(model_type):
    config, routing = PUBLISHED[model_type]
    assert facts(model_type, **config).routing == routing


def test_every_harmless_key_has_a_reason():
    assert all(reason for reason in HARMLESS.values())


@pytest.mark.parametrize("names", [("num_experts", "num_local_experts"), ("num_experts_per_tok", "experts_per_token")])
def test_two_keys_of_one_meaning_that_differ_are_an_error_that_names_both(names):
    first, second = names
    assert facts("qwen3_moe", **dict.fromkeys(names, 4)).experts
    refused(rf"says {first} = 4 and {second} = 2; they mean the same", "qwen3_moe", **{first: 4, second: 2})


@pytest.mark.parametrize("model_type", ["kimi_k3", "glm5_moe"])
@pytest.mark.parametrize("key", ["norm_topk_prob", "routed_scaling_factor"])
def test_a_key_must_be_there_where_no_class_says_what_a_missing_one_means(model_type, key):
    config = {"model_type": model_type, **SIZES, **NEEDED}
    del config[key]
    row, found, keys = get_family(config, "config.json", FAMILIES)
    with pytest.raises(ValueError, match=rf"^config\.json: {key} is missing; it must be"):
        read_facts(row, found, keys)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu2", "relu2_gated"), ("quick_gelu", jmm.swiglu(alpha=1.702))],
)
def test_a_gate_has_the_activation_that_its_config_names(name, activation):
    assert facts("qwen3_moe", hidden_act=name).activation == activation


def test_routing_and_activation_are_read_from_the_text_part_alone():
    text = {"model_type": "qwen3_vl_moe_text", **SIZES}
    whole = {"model_type": "qwen3_vl_moe", "hidden_act": "gelu", "swiglu_limit": 3, "text_config": text}
    row, found, keys = get_family(whole, "config.json", FAMILIES)
    assert read_facts(row, found, keys) == facts("qwen3_vl_moe_text")
    text["hidden_act"] = "mish"
    with pytest.raises(ValueError, match=r"^config\.json: text_config\.hidden_act is 'mish'; it must be one of"):
        read_facts(*get_family(whole, "config.json", FAMILIES))


def test_minimax_is_the_first_model_unless_the_files_are_those_of_the_second():
    assert facts("minimax").routing.scoring == "softmax"
    assert facts("minimax", architectures=["MiniMaxM2ForCausalLM"]).routing.scoring == "sigmoid"
    refused(r"scoring_func is 'sigmoid'; what this key means", "minimax", scoring_func="sigmoid")


def test_every_type_that_a_text_part_can_have_is_named_where_it_is_not_known():
    with pytest.raises(ValueError, match=r"text_config\.model_type is 'x'; the loader knows qwen3_moe, olmoe"):
        get_family({"model_type": "kimi_k25", "text_config": {"model_type": "x"}}, "config.json", FAMILIES)


@pytest.mark.parametrize("value", [["qwen3_moe"], "", 3, {}])
def test_a_model_type_that_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match=r"^config\.json: model_type is .*; it must be a string that is not empty"):
        get_family({"model_type": value}, "config.json", FAMILIES)
