"""Layers of every family beside transformers' own modules: what missing keys mean, routing, activation and layout.

Tiny random models are saved by transformers and loaded here as int8, which holds their experts exactly: what is left is
float16. Run with `-m parity` where the `parity` extra is installed; `--parity-table docs/families.md` writes the table.
"""

import importlib
import json
import pathlib
import re

import numpy as np
import pytest

from jax_marlin_moe.checkpoint import families, load_moe_layer
from jax_marlin_moe.checkpoint.family import get_family
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
    "moe_num_experts": E,
    "moe_k": 2,
    "moe_topk": 2,
    "expert_ffn_hidden_size": I,
    "ffn_hidden_size": 96,
    "num_experts_per_token": 2,
    "share_expert_dim": 96,
    "shared_experts_intermediate_size": 96,
    "num_layers": 2,
    "num_dense_layers": 0,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "linear_num_heads": 2,
    "linear_head_dim": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "num_nextn_predict_layers": 0,
    "kv_channels": 32,
    "hc_mult": 2,
}
EXPERTS_ARE_INTERMEDIATE = {"intermediate_size": I}
FEW_GROUPS = {"n_group": 4, "topk_group": 2}
SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
NEMOTRON = {"layers_block_type": ["moe", "full_attention"], "num_hidden_layers": None}
GEMMA = {"enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"]}
V4 = {"mlp_layer_types": ["moe", "moe"], "layer_types": ["sliding_attention", "sliding_attention"]}
SHARED = {"n_shared_experts": 1}
LFM = {"layer_types": ["full_attention", "full_attention"]}
GLM5 = {**SPARSE, "index_topk": 16, "qk_rope_head_dim": 0}
DBRX = {
    "d_model": H, "n_heads": 4, "n_layers": 2, "rope_theta": 1e4,
    "ffn_config": {"ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": 2, "hidden_size": H},
    "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4},
}  # fmt: skip

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
    ("flex_olmo", "", EXPERTS_ARE_INTERMEDIATE),
    ("flex_olmo", "renormalised", {**EXPERTS_ARE_INTERMEDIATE, "norm_topk_prob": True}),
    ("deepseek_ocr2_text", "", SPARSE),
    ("diffusion_gemma_text", "", GEMMA),
    ("qwen3_omni_moe_text", "", {}),
    ("unlimited_ocr_text", "groups", {"topk_method": "group_limited_greedy", **FEW_GROUPS}),
    ("inkling2_text", "", {"unpadded_vocab_size": 64}),
    ("inkling2_text", "small caps", {"unpadded_vocab_size": 64, "mlp_gate_softcap": 0.25, "mlp_up_softcap": 0.5}),
    ("mellum", "", SPARSE),
    ("mellum", "not renormalised", {**SPARSE, "norm_topk_prob": False}),
    ("qwen4_exp_text", "", {}),
    ("lara_mini", "", {}),
    ("lara_mini", "not renormalised", {"norm_topk_prob": False}),
    ("flint", "", {"mlp_only_layers": []}),
    ("flint", "not renormalised", {"mlp_only_layers": [], "norm_topk_prob": False}),
    ("phimoe", "", EXPERTS_ARE_INTERMEDIATE),
    ("phimoe", "jitter 0.3", {**EXPERTS_ARE_INTERMEDIATE, "router_jitter_noise": 0.3}),
    ("jamba", "", EXPERTS_ARE_INTERMEDIATE),
    ("jamba", "top 3", {**EXPERTS_ARE_INTERMEDIATE, "num_experts_per_tok": 3}),
    ("solar_open", "", SHARED),
    ("solar_open", "groups, scale 2.5", {**SHARED, **FEW_GROUPS, "routed_scaling_factor": 2.5}),
    ("beam", "", {**SPARSE, **FEW_GROUPS}),
    ("beam", "not renormalised", {**SPARSE, **FEW_GROUPS, "norm_topk_prob": False}),
    ("sarvam_mla", "", SHARED),
    ("sarvam_moe", "", SHARED),
    ("sarvam_moe", "groups", {**SHARED, **FEW_GROUPS}),
    ("axk1", "", {**FEW_GROUPS, **SPARSE}),
    ("axk2", "", SPARSE),
    ("exaone_moe", "", {}),
    ("exaone_moe", "groups, not renormalised", {**FEW_GROUPS, "norm_topk_prob": False}),
    ("bailing_hybrid", "", {**FEW_GROUPS, **SPARSE}),
    ("bailing_hybrid", "no groups, scale 1", {**SPARSE, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    ("kimi_linear", "", SPARSE),
    ("kimi_linear", "groups", {**SPARSE, **FEW_GROUPS}),
    ("hy_v4", "", SPARSE),
    ("hy_v4", "small limit", {**SPARSE, "swiglu_limit": 0.25}),
    ("dots3_note_text", "", SPARSE),
    ("dots3_note_text", "2 shared", {**SPARSE, "n_shared_experts": 2}),
    ("glm4v_moe_text", "", {}),
    ("glm5_next_text", "", GLM5),
    ("glm5_next_text", "small limit", {**GLM5, "swiglu_limit": 0.25}),
    ("mistral4", "", SPARSE),
    ("mistral4", "groups, not renormalised", {**SPARSE, **FEW_GROUPS, "norm_topk_prob": False}),
    ("mistral_large4_text", "", SPARSE),
    ("mistral_large4_text", "groups, scale 2.5", {**SPARSE, **FEW_GROUPS, "routed_scaling_factor": 2.5}),
    ("openai_privacy_filter", "", EXPERTS_ARE_INTERMEDIATE),
    ("openai_privacy_filter", "small limit", {**EXPERTS_ARE_INTERMEDIATE, "swiglu_limit": 0.25}),
    ("lfm2_moe", "", LFM),
    ("lfm2_moe", "without a bias", {**LFM, "use_expert_bias": False}),
    ("lfm2_moe", "not renormalised, scale 2.5", {**LFM, "norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    ("granitemoe", "", EXPERTS_ARE_INTERMEDIATE),
    ("granitemoeshared", "", EXPERTS_ARE_INTERMEDIATE),
    ("granitemoehybrid", "", {**EXPERTS_ARE_INTERMEDIATE, "layer_types": ["full_attention"] * 2}),
    ("granitemoe_swa", "", {**EXPERTS_ARE_INTERMEDIATE, "layer_types": ["full_attention"] * 2}),
    ("jetmoe", "", EXPERTS_ARE_INTERMEDIATE),
    ("ernie4_5_moe", "", {**SPARSE, "moe_num_shared_experts": 1}),
    ("ernie4_5_moe", "2 shared", {**SPARSE, "moe_num_shared_experts": 2}),
    ("hunyuan_v1_moe", "", EXPERTS_ARE_INTERMEDIATE),
    ("hunyuan_v1_moe", "top 3 of every layer", {**EXPERTS_ARE_INTERMEDIATE, "moe_topk": [3, 3]}),
    ("hy_v3", "", SPARSE),
    ("hy_v3", "2 shared", {**SPARSE, "num_shared_experts": 2}),
    ("afmoe", "", {}),
    ("afmoe", "scale 2.5, 1 shared", {"route_scale": 2.5, "num_shared_experts": 1}),
    ("laguna", "", SPARSE),
    ("laguna", "soft cap, scale 2.5", {**SPARSE, "moe_router_logit_softcapping": 1.5,
                                       "moe_routed_scaling_factor": 2.5}),
    ("kolibri1", "", SPARSE),
    ("kolibri1", "renormalised", {**SPARSE, "norm_topk_prob": True}),
    ("cohere2_moe", "", {**EXPERTS_ARE_INTERMEDIATE, **SPARSE}),
    ("cohere2_moe", "shared, averaged", {**EXPERTS_ARE_INTERMEDIATE, **SPARSE, "num_shared_experts": 2}),
    ("cohere2_moe", "shared, sigmoid, summed", {**EXPERTS_ARE_INTERMEDIATE, **SPARSE, "num_shared_experts": 1,
                                                "expert_selection_fn": "sigmoid",
                                                "shared_expert_combination_strategy": "sum"}),
    ("aria_text", "", EXPERTS_ARE_INTERMEDIATE),
    ("aria_text", "1 shared", {**EXPERTS_ARE_INTERMEDIATE, "moe_num_shared_experts": 1}),
    ("dbrx", "", DBRX),
    ("dbrx", "not renormalised", {**DBRX, "ffn_config": {**DBRX["ffn_config"], "moe_normalize_expert_weights": None}}),
    ("longcat_flash", "", {"zero_expert_num": 4}),
    ("longcat_flash", "no identity experts", {"zero_expert_num": 0, "moe_topk": 3}),
]  # fmt: skip

ERNIE_VL = {
    **SPARSE,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "moe_intermediate_size": [I, 32],
    "moe_num_shared_experts": 1,
}
STEP = {**SPARSE, "layer_types": ["full_attention", "full_attention"]}

# Whole models: their names of tensors and their text_config.
WHOLE = [
    ("qwen3_vl_moe", "qwen3_vl_moe_text", {}),
    ("qwen3_5_moe", "qwen3_5_moe_text", {}),
    ("minimax_m3_vl", "minimax_m3_vl_text", EXPERTS_ARE_INTERMEDIATE),
    ("minimax_m3_vl", "minimax_m3_vl_text", {**EXPERTS_ARE_INTERMEDIATE, "swiglu_limit": 0.25, "swiglu_alpha": 1.1}),
    ("llama4", "llama4_text", EXPERTS_ARE_INTERMEDIATE),
    ("gemma4", "gemma4_text", GEMMA),
    ("kimi_k25", "deepseek_v3", FEW_GROUPS),
    ("glm4v_moe", "glm4v_moe_text", {}),
    ("aria", "aria_text", EXPERTS_ARE_INTERMEDIATE),
    ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text", ERNIE_VL),
    ("glm5_next", "glm5_next_text", GLM5),
    ("hy_v4_vl", "hy_v4_vl_text", {**SPARSE, "qk_rope_head_dim": 64}),
    ("mistral_large4", "mistral_large4_text", SPARSE),
    ("qwen4_exp", "qwen4_exp_text", {}),
    ("step3p7", "step3p5", STEP),
    ("step3p7", "step3p5", {**STEP, "swiglu_limits": [0.25, 0], "swiglu_limits_shared": [0, 0.25]}),
    ("nemotron_h_omni", "nemotron_h", NEMOTRON),
]
# Sizes of vision towers.
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "out_hidden_size": H, "patch_size": 14,
    "image_size": 28, "deepstack_visual_indexes": [0], "vision_output_dim": 32, "projector_input_dim": 32,
    "projector_output_dim": 32, "num_position_embeddings": 16, "video_temporal_patch_size": 2,
}  # fmt: skip


TEXT_MODELS = {
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel", "diffusion_gemma_text": "DiffusionGemmaEncoderTextModel",
}  # fmt: skip
TRANSPOSED = ("llama4_text", "gpt_oss", "openai_privacy_filter", "aria_text")


@pytest.fixture(scope="module")
def table(request):
    """Rows of the table that is printed at the end, and written where the option names a file."""
    import transformers

    rows = []
    yield rows
    lines = ["| `model_type` | variant | error |", "|---|---|---:|"]
    lines += [f"| `{name}` | {variant} | {error:.1e} |" for name, variant, error in rows]
    write = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    for line in ["", *lines]:
        write(line)
    path = request.config.getoption("--parity-table")
    if path is not None:
        head = HEAD.format(version=transformers.__version__, limit=LIMIT)
        tail = ["| `model_type` | why |", "|---|---|", *(f"| `{name}` | {why} |" for name, why in REFUSED.items())]
        apart = ", ".join(f"`{name}`" for name in sorted(WITHOUT_A_CLASS))
        text = [head, *lines, "", f"Without a class there, and so not in the table: {apart}.", "", REFUSED_HEAD, *tail]
        pathlib.Path(path).write_text("\n".join(text) + "\n", encoding="utf-8")


HEAD = """# Model families beside transformers

Written by `pytest -m parity --parity-table docs/families.md`: do not edit it by hand.

Each row is a tiny random model of transformers {version}, saved by it and loaded here as int8, which holds its experts
exactly. The error is that of a layer's results beside transformers' own module, relative to their norm: what is left is
routing, activation, layout, and float16, and at most {limit} is allowed. An empty variant is the configuration class
as it is.
"""
REFUSED_HEAD = """## Refused

Model types of transformers that have experts, and whose layers are not of the kind that is loaded here.
"""
# Every other class with keys of experts is in a row.
REFUSED = {
    "doge": "its experts are rows of two embeddings, found by product keys: there are no matrices of experts",
    "dots3_note_vision_encoder": "the experts of a vision tower, with routing by keys of its own",
    "evolla": "no layers of experts",
    "inkling2_loop": "files have experts in two quantisations of their own",
    "inkling2_loop_text": "likewise",
    "inkling_mm_model": "the weights of shared and routed experts come from one normalisation",
    "inkling_text": "likewise",
    "muse_spark": "a projection and norms stand between the layer's rows and its experts",
    "muse_spark_text": "likewise",
    "nllb-moe": "an encoder and a decoder whose experts have a capacity, beyond which tokens are dropped",
    "qwen3_omni_moe_talker_text": "of a whole model, the thinker's layers are loaded",
    "switch_transformers": "an encoder and a decoder whose experts have a capacity, beyond which tokens are dropped",
    "vitpose": "experts are chosen by data set, not by a router",
    "vitpose_backbone": "likewise",
    "zaya": "its router is a network that reads what the router of the layer before it has left",
}


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
    else:  # the text part of a model that has no class of its own for it
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
        name = TEXT_MODELS.get(config.model_type, type(config).__name__.removesuffix("Config") + "Model")
        model = getattr(module, name)._from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)

    def normal(shape):  # as in files: what bfloat16 holds, so that no weight is rounded on the way to float16
        return torch.randn(shape, generator=generator).bfloat16().float()

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not re.search(r"(layers|blocks)\.", name) or not value.dtype.is_floating_point:
                continue
            flat = re.search(r"\.experts\.mlp\.(w1|v1|w2)$", name)
            if flat or (value.ndim == 3 and re.search(r"\.experts\.|_linear\.weight", name)):
                axis = 1 if text_type(config) in TRANSPOSED else 2  # where inputs of a product lie
                axis = axis if flat is None else int(flat.group(1) != "w2")
                rows = value.shape[axis]
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
    """The first module with experts and a router, the decoder layer that it is in, and its number."""
    for name, module in model.named_modules():
        numbers = re.search(r"(?:layers|blocks)\.([0-9]+)(?:\.|$)", name)
        if numbers and (
            hasattr(module, "text_moe")
            or (hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router")))
            or type(module).__name__ == "JetMoeMoE"
        ):
            return module, model.get_submodule(name.rpartition(".")[0]), int(numbers.group(1))
    raise AssertionError("the model has no block of experts")


def theirs(block, around, x, ids):
    """What transformers' module makes of rows, and the rows that its router reads where those are others."""
    import torch

    rows = torch.tensor(x)
    with torch.no_grad():
        if hasattr(block, "router") and hasattr(block.router, "per_expert_scale"):  # Gemma-4 has no module of its own
            _, weights, chosen = block.router(rows)
            return block.experts(rows, chosen, weights).numpy()
        out = block(rows[None], torch.tensor(ids)[None]) if getattr(block, "is_hash", False) else block(rows[None])
        out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
        # Granite's shared expert is beside the block.
        return (out + around.shared_mlp(rows) if hasattr(around, "shared_mlp") else out).numpy()


def error_of(config, folder):
    import jax.numpy as jnp

    model = build(config)
    model.save_pretrained(folder)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(ROWS, H)).astype(np.float16)
    ids = rng.integers(0, 64, ROWS)
    block, around, number = find_block(model)
    expected = theirs(block, around, x.astype(np.float32), ids)
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


def test_every_class_with_experts_is_in_a_row_or_refused_for_a_reason():
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = {name for row in families.FAMILIES for name in (*row.model_types, *row.wholes)}
    assert not known & REFUSED.keys()
    found = set()
    for name in CONFIG_MAPPING:
        try:
            values = CONFIG_MAPPING[name]().to_dict()
        except (StrictDataclassError, TypeError, ValueError):  # classes that need arguments
            continue
        parts = [values, *(part for part in values.values() if isinstance(part, dict))]
        if any(re.search("expert|moe", key) for part in parts for key in map(str, part)):
            found.add(name)
    assert sorted(found - known - REFUSED.keys()) == []
    for name in REFUSED:
        with pytest.raises(ValueError, match="model_type is"):
            get_family({"model_type": name}, "config.json", families.FAMILIES)


TYPES = [name for row in families.FAMILIES for name in row.model_types]
WITHOUT_A_CLASS = {"qwen3_6_moe", "qwen3_6_moe_text", "minimax_m3", "kimi_vl", "kimi_k2", "kimi_k3", "glm5_moe",
                   "gpt_oss_original", "bailing_moe", "bailing_moe_v2"}  # fmt: skip
# What a class leaves to the model.
NEEDED = {
    "num_experts": 64, "n_routed_experts": 64, "num_experts_per_tok": 4, "top_k_experts": 4,
    "moe_intermediate_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_missing_key_means_what_the_configuration_class_says(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    assert (model_type in CONFIG_MAPPING) == (model_type not in WITHOUT_A_CLASS)
    if model_type in WITHOUT_A_CLASS:
        return
    values = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
    text = values.get("text_config") or values
    text.update({key: value for key, value in NEEDED.items() if key in text and text[key] is None})
    row, found, keys = get_family(values, "config.json", families.FAMILIES)
    whole = read_facts(row, found, keys)
    read = {*row.routing.keys, *row.activation.keys, "rms_norm_eps", row.correction_if}
    read |= set() if row.shared_activation is None else {*row.shared_activation.keys}
    names = {name for key in read for name in row.keys.get(key, (key,))} - {"num_shared_experts"}
    left = {key: value for key, value in keys.values.items() if key not in names}
    assert left.keys() != keys.values.keys()
    short = read_facts(row, found, type(keys)(left, "config.json", names=keys.names))
    assert short.routing == whole.routing
    assert (short.activation, short.shared_activation) == (whole.activation, whole.shared_activation)
    assert short.correction == whole.correction
    if row.input_scale is not None or row.output_norm is not None:
        assert short.norm_epsilon == whole.norm_epsilon
