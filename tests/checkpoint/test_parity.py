"""Layers of every family beside transformers' own modules: what missing keys mean, routing, activation and layout.

Tiny random models are saved by transformers and loaded here as int8, which holds their experts exactly: what is left is
float16. Run with `-m parity` where the `parity` extra is installed.
"""

import json

import numpy as np
import pytest

from jax_marlin_moe.checkpoint import families, load_moe_layer
from jax_marlin_moe.checkpoint.families import get_family
from jax_marlin_moe.checkpoint.model_facts import read_facts

# What transformers and torch warn of is theirs.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

E, H, I, ROWS = 8, 128, 64, 40
LIMIT = 5e-4

# Sizes for whichever of these keys a configuration class has.
SIZES = {
    "vocab_size": 64,
    "hidden_size": H,
    "intermediate_size": 96,
    "moe_intermediate_size": I,
    "shared_expert_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "shared_intermediate_size": 96,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_topk": 4,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "first_k_dense_replace": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "hidden_size_per_layer_input": 0,
}
EXPERTS_ARE_INTERMEDIATE = {"intermediate_size": I}
FEW_GROUPS = {"n_group": 4, "topk_group": 2}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
NEMOTRON = {"layers_block_type": ["moe", "full_attention"], "num_hidden_layers": None}
GEMMA = {"enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"]}
V4 = {"mlp_layer_types": ["moe", "moe"], "layer_types": ["sliding_attention", "sliding_attention"]}
SHARED = {"n_shared_experts": 1}

CASES = [
    # model type, what is special, values of its configuration class
    ("qwen3_moe", "", {}),
    ("qwen3_moe", "renormalised", {"norm_topk_prob": True}),
    ("qwen3_moe", "top 1", {"num_experts_per_tok": 1}),
    ("qwen3_moe", "top 3", {"num_experts_per_tok": 3}),
    ("olmoe", "", EXPERTS_ARE_INTERMEDIATE),
    ("olmoe", "renormalised", {**EXPERTS_ARE_INTERMEDIATE, "norm_topk_prob": True}),
    ("qwen3_vl_moe_text", "", {}),
    ("qwen3_vl_moe_text", "top 1", {"num_experts_per_tok": 1}),
    ("qwen3_vl_moe_text", "norm_topk_prob false", {"norm_topk_prob": False}),
    ("qwen2_moe", "", {}),
    ("qwen2_moe", "renormalised", {"norm_topk_prob": True}),
    ("qwen3_next", "", {}),
    ("qwen3_next", "not renormalised", {"norm_topk_prob": False}),
    ("qwen3_5_moe_text", "", {}),
    ("mixtral", "", EXPERTS_ARE_INTERMEDIATE),
    ("mixtral", "top 1", {**EXPERTS_ARE_INTERMEDIATE, "num_experts_per_tok": 1}),
    ("minimax", "", EXPERTS_ARE_INTERMEDIATE),
    ("minimax_m2", "", EXPERTS_ARE_INTERMEDIATE),
    ("minimax_m2", "top 4", {**EXPERTS_ARE_INTERMEDIATE, "num_experts_per_tok": 4}),
    ("deepseek_v2", "", {}),
    ("deepseek_v2", "groups, scale 16", {"topk_method": "group_limited_greedy", **FEW_GROUPS,
                                         "routed_scaling_factor": 16.0}),
    ("deepseek_v2", "greedy beside groups", FEW_GROUPS),
    ("deepseek_v2", "norm_topk_prob", {"norm_topk_prob": True, "routed_scaling_factor": 16.0}),
    ("deepseek_v3", "", FEW_GROUPS),
    ("deepseek_v3", "no groups", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", "not renormalised", {**FEW_GROUPS, "norm_topk_prob": False}),
    ("deepseek_v3", "2 shared", {**FEW_GROUPS, "n_shared_experts": 2}),
    ("deepseek_v32", "", FEW_GROUPS),
    ("deepseek_v4", "", V4),
    ("deepseek_v4", "hash layer", {**V4, "mlp_layer_types": ["hash_moe", "moe"]}),
    ("deepseek_v4", "norm_topk_prob false", {**V4, "norm_topk_prob": False}),
    ("deepseek_v4", "small limit", {**V4, "swiglu_limit": 0.25}),
    ("deepseek_v4", "sigmoid", {**V4, "scoring_func": "sigmoid"}),
    ("glm4_moe", "", {}),
    ("glm4_moe", "groups, not renormalised", {**FEW_GROUPS, "norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    ("glm4_moe_lite", "", SPARSE),
    ("glm_moe_dsa", "", SPARSE),
    ("mimo_v2_flash", "", SPARSE),
    ("mimo_v2_flash", "groups", {**SPARSE, **FEW_GROUPS}),
    ("dots1", "", SHARED),
    ("dots1", "renormalised, scale 2.5", {**SHARED, "norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    ("gpt_oss", "", EXPERTS_ARE_INTERMEDIATE),
    ("gpt_oss", "small limit, other alpha", {**EXPERTS_ARE_INTERMEDIATE, "swiglu_limit": 0.25, "swiglu_alpha": 1.1}),
    ("llama4_text", "", EXPERTS_ARE_INTERMEDIATE),
    ("llama4_text", "top 2", {**EXPERTS_ARE_INTERMEDIATE, "num_experts_per_tok": 2}),
    ("nemotron_h", "", NEMOTRON),
    ("nemotron_h", "groups, scale 2.5", {**NEMOTRON, **FEW_GROUPS, "routed_scaling_factor": 2.5}),
    ("nemotron_h", "not renormalised", {**NEMOTRON, "norm_topk_prob": False}),
    ("gemma4_text", "", GEMMA),
    ("gemma4_text", "top 4", {**GEMMA, "top_k_experts": 4}),
]  # fmt: skip

# Whole models: their names of tensors and their text_config.
WHOLE = [
    ("qwen3_vl_moe", "qwen3_vl_moe_text", {}),
    ("qwen3_5_moe", "qwen3_5_moe_text", {}),
    ("minimax_m3_vl", "minimax_m3_vl_text", EXPERTS_ARE_INTERMEDIATE),
    ("minimax_m3_vl", "minimax_m3_vl_text", {**EXPERTS_ARE_INTERMEDIATE, "swiglu_limit": 0.25, "swiglu_alpha": 1.1}),
    ("llama4", "llama4_text", EXPERTS_ARE_INTERMEDIATE),
    ("gemma4", "gemma4_text", GEMMA),
]
# Sizes of vision towers.
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "out_hidden_size": H, "patch_size": 14,
    "image_size": 28, "deepstack_visual_indexes": [0], "vision_output_dim": 32, "projector_input_dim": 32,
    "projector_output_dim": 32, "num_position_embeddings": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def table(request):
    """Rows of the table that is printed at the end: family, variant, error."""
    rows = []
    yield rows
    write = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    write("")
    write("| family | variant | error |")
    write("|---|---|---:|")
    for row in rows:
        write("| {} | {} | {:.1e} |".format(*row))


def values_for(kind, special):
    """Values of a configuration class: sizes for the keys that it has, and special ones."""
    has = kind().to_dict()
    return {key: value for key, value in SIZES.items() if key in has} | special


def make_config(model_type, special):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**values_for(CONFIG_MAPPING[model_type], special))


def make_whole(model_type, text_type, special):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    given = kind().to_dict()
    vision = {key: value for key, value in VISION.items() if key in (given.get("vision_config") or {})}
    vision = {**vision, **({"model_type": given["vision_config"]["model_type"]} if vision else {})}
    text = {**values_for(CONFIG_MAPPING[text_type], special), "model_type": text_type}
    return kind(text_config=text, vision_config=vision or None)


def build(config):
    """A model with random weights whose experts int8 holds exactly."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = "text_config" not in config.to_dict()
    for auto in (AutoModelForCausalLM, AutoModel) if text else (AutoModelForImageTextToText, AutoModel):
        if type(config) in auto._model_mapping:
            model = auto.from_config(config, dtype=torch.float32).eval()
            break
    generator = torch.Generator().manual_seed(1)

    def normal(shape):  # as in files: what bfloat16 holds, so that no weight is rounded on the way to float16
        return torch.randn(shape, generator=generator).bfloat16().float()

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "layers." not in name or not value.dtype.is_floating_point:
                continue
            if ".experts." in name and value.ndim == 3:
                down = "down_proj" in name
                rows = I if down else H
                axis = 1 if text_type(config) in ("llama4_text", "gpt_oss") else 2  # where inputs of a product lie
                codes = torch.randint(-127, 128, value.shape, generator=generator).float()
                codes.index_fill_(axis, torch.arange(0, rows, 32), 127.0)
                value.copy_(codes / 1024)
            elif value.ndim >= 2 or "norm" not in name:
                value.copy_(normal(value.shape) / 8)
        for name, value in model.named_buffers():
            if name.endswith("tid2eid"):
                value.copy_(torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(len(value))]))
    return model


def text_type(config):
    return config.get_text_config().model_type


def find_block(model):
    """The first module with experts and a router, and its layer's number."""
    for name, module in model.named_modules():
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router")):
            return module, int(name.split("layers.")[1].split(".")[0])
    raise AssertionError("the model has no block of experts")


def theirs(block, x, ids):
    """What transformers' module makes of rows, and the rows that its router reads where those are others."""
    import torch

    rows = torch.tensor(x)
    with torch.no_grad():
        if hasattr(block, "router") and hasattr(block.router, "per_expert_scale"):  # Gemma-4 has no module of its own
            _, weights, chosen = block.router(rows)
            return block.experts(rows, chosen, weights).numpy()
        out = block(rows[None], torch.tensor(ids)[None]) if getattr(block, "is_hash", False) else block(rows[None])
        return (out[0] if isinstance(out, tuple) else out).reshape(x.shape).numpy()


def error_of(config, folder):
    import jax.numpy as jnp

    model = build(config)
    model.save_pretrained(folder)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(ROWS, H)).astype(np.float16)
    ids = rng.integers(0, 64, ROWS)
    block, number = find_block(model)
    expected = theirs(block, x.astype(np.float32), ids)
    layer = load_moe_layer(folder, number, quantize="int8", group_size=32)
    token_ids = jnp.asarray(ids, jnp.int32) if layer.token_experts is not None else None
    y = np.asarray(layer(jnp.asarray(x), token_ids, implementation="xla"), np.float32)
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("model_type", "variant", "special"), CASES)
def test_a_layer_is_what_transformers_makes_of_it(tmp_path, table, model_type, variant, special):
    error = error_of(make_config(model_type, special), tmp_path)
    table.append((model_type, variant, error))
    assert error <= LIMIT


@pytest.mark.parametrize(("model_type", "inner", "special"), WHOLE)
def test_a_layer_of_a_whole_model_is_what_transformers_makes_of_it(tmp_path, table, model_type, inner, special):
    config = make_whole(model_type, inner, special)
    error = error_of(config, tmp_path)
    variant = ", ".join(["whole model", *(f"{key} {value}" for key, value in special.items() if "swiglu" in key)])
    table.append((model_type, variant, error))
    assert error <= LIMIT


TYPES = [name for row in families.FAMILIES for name in row.model_types]
WITHOUT_A_CLASS = {"qwen3_6_moe", "qwen3_6_moe_text", "minimax_m3", "kimi_vl", "kimi_k2", "kimi_k3", "glm5_moe",
                   "gpt_oss_original"}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_missing_key_means_what_the_configuration_class_says(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert (model_type in CONFIG_MAPPING) == (model_type not in WITHOUT_A_CLASS)
    if model_type in WITHOUT_A_CLASS:
        return
    kind = CONFIG_MAPPING[model_type]
    needed = {"num_experts": 64, "top_k_experts": 4} if "gemma4" in model_type else {}
    needed |= {"num_experts_per_tok": 4} if model_type in ("deepseek_v2", "dots1") else {}
    needed |= {"n_routed_experts": 64, "n_shared_experts": 1} if model_type == "dots1" else {}
    needed |= {"moe_intermediate_size": 64} if "gemma4" in model_type else {}
    values = json.loads(kind().to_json_string(use_diff=False))
    values = (
        {**values, "text_config": {**values["text_config"], **needed}} if "text_config" in values else values | needed
    )
    row, found, keys = get_family(values, "config.json")
    whole = read_facts(row, found, keys)
    read = {*row.routing.keys, *row.activation.keys, "rms_norm_eps"}
    left = {key: value for key, value in keys.values.items() if key not in read}
    assert left.keys() != keys.values.keys()
    short = read_facts(row, found, type(keys)(left, "config.json"))
    assert short.routing == whole.routing
    assert short.activation == whole.activation
    if row.input_scale is not None:
        assert short.norm_epsilon == whole.norm_epsilon
