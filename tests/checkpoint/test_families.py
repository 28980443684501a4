"""Rows of families: those that a caller adds, what files may lack or have, layers that are loaded by name.

`tests/checkpoint/test_parity.py` compares every row with transformers; here are files that no model of it writes.
"""

import dataclasses
import json
import re

import checkpoint_files as files
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import FAMILIES, Checkpoint, Defaults, Family, find_family, load_moe_layer

E, H, I = 4, 64, 32
CONFIG = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": 2}


def experts(block, names=("gate_proj", "up_proj", "down_proj"), count=E):
    """Small integers, which int8 holds: groups of 32 with a 127 in each have scales that are powers of two."""
    rng = np.random.default_rng(0)
    made = {}
    for e in range(count):
        for name, shape in zip(names, ((I, H), (I, H), (H, I)), strict=True):
            codes = rng.integers(-127, 128, shape)
            codes[:, ::32] = 127
            made[f"{block}.experts.{e}.{name}.weight"] = (codes / 1024).astype(np.float16)
    return made


def router(name, count=E):
    return {name: np.random.default_rng(1).normal(size=(count, H)).astype(np.float32)}


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    files.write(folder / "model.safetensors", tensors)
    return folder


def load(folder, layer=0, **options):
    return load_moe_layer(folder, layer, quantize="int8", group_size=32, **options)


QWEN = {**experts("model.layers.0.mlp"), **router("model.layers.0.mlp.gate.weight")}


def test_a_row_of_ones_own_loads_a_family_that_the_package_does_not_know(tmp_path):
    block = "model.layers.0.ffn"
    tensors = {**experts(block, ("a", "b", "c")), **router(f"{block}.choose.weight")}
    folder = write(tmp_path / "model", tensors, model_type="mine")
    with pytest.raises(ValueError, match=r"model_type is 'mine'; the loader knows .*pass families= with a row of it"):
        load(folder)
    qwen = find_family("qwen3_moe", FAMILIES)
    row = Family(
        model_types={"mine": Defaults(renormalize=True)},
        block="ffn",
        linears=("a", "b", "c"),
        router="{block}.choose.weight",
        routing=qwen.routing,
    )
    layer = load(folder, families=(*FAMILIES, row))
    same = load(write(tmp_path / "qwen", QWEN, model_type="qwen3_moe", norm_topk_prob=True))
    assert layer.routing == same.routing == jmm.Routing(2)
    np.testing.assert_array_equal(layer.gate_up.packed, same.gate_up.packed)
    np.testing.assert_array_equal(layer.router, same.router)
    jmm.checkpoint.convert(folder, tmp_path / "packed", quantize="int8", group_size=32, families=(*FAMILIES, row))
    np.testing.assert_array_equal(load_moe_layer(tmp_path / "packed", 0).down.packed, layer.down.packed)


def test_the_first_row_that_has_a_model_type_counts(tmp_path):
    folder = write(tmp_path / "model", QWEN, model_type="qwen3_moe")
    row = dataclasses.replace(find_family("qwen3_moe", FAMILIES), model_types={"qwen3_moe": Defaults(renormalize=True)})
    assert not load(folder).routing.renormalize
    assert load(folder, families=(row, *FAMILIES)).routing.renormalize


def renamed(tensors, new):
    return {name.replace("model.layers.0.", new): value for name, value in tensors.items()}


@pytest.mark.parametrize("name", ["model.layers.1", "mtp.layers.0", "model.mtp.0"])
def test_a_layer_for_multi_token_prediction_is_loaded_by_its_name(tmp_path, name):
    tensors = QWEN | renamed(QWEN, f"{name}.") | {f"{name}.eh_proj.weight": np.zeros((2, 2), np.float32)}
    folder = write(tmp_path / "model", tensors, model_type="qwen3_moe", num_hidden_layers=1)
    checkpoint = Checkpoint(folder, quantize="int8", group_size=32)
    assert checkpoint.layers == [0]
    assert checkpoint.layer_names == ["model.layers.0", name]
    np.testing.assert_array_equal(checkpoint.load(name).gate_up.packed, checkpoint.load(0).gate_up.packed)
    with pytest.raises(
        ValueError, match=rf"layer 1 has no experts; layers with experts: 0 to 0; others, by name: {name}"
    ):
        checkpoint.load(1)
    with pytest.raises(ValueError, match=rf"layer 'mtp' has no experts; names of such layers: model.layers.0, {name}"):
        checkpoint.load("mtp")


def test_a_value_for_each_layer_is_that_of_the_layer(tmp_path):
    block = "model.layers.0.mlp"
    one = {**experts(block), **router(f"{block}.gate.wg.weight")}
    config = {"model_type": "hunyuan_v1_moe", "intermediate_size": I, "moe_topk": [2, 3], "num_hidden_layers": 2}
    del (rest := dict(CONFIG))["num_experts_per_tok"]
    folder = write(tmp_path / "model", one | renamed(one, "model.layers.1.") | renamed(one, "mtp.layers.0."))
    (folder / "config.json").write_text(json.dumps(rest | config))
    assert [load(folder, layer).routing.top_k for layer in (0, 1)] == [2, 3]
    with pytest.raises(ValueError, match=r"moe_topk is \[2, 3\]; it must be one value"):
        load(folder, "mtp.layers.0")
    (folder / "config.json").write_text(json.dumps(rest | config | {"moe_topk": [2]}))
    with pytest.raises(ValueError, match=r"moe_topk is \[2\]; it must be a list with a value for layer 1, and has 1"):
        load(folder, 1)


def test_tensors_of_another_family_are_refused_with_both_facts(tmp_path):
    block = "model.layers.0.block_sparse_moe"
    folder = write(
        tmp_path, {**experts(block, ("w1", "w3", "w2")), **router(f"{block}.gate.weight")}, model_type="qwen3_moe"
    )
    with pytest.raises(
        ValueError, match=r"block_sparse_moe.* is named as in mixtral.*config.json says model_type = 'qwen3_moe'"
    ):
        load(folder)


LFM = {
    **experts("model.layers.0.feed_forward", ("w1", "w3", "w2")),
    **router("model.layers.0.feed_forward.gate.weight"),
}
LFM_BIAS = {"model.layers.0.feed_forward.expert_bias": np.arange(E, dtype=np.float32)}


def test_a_bias_that_the_config_denies_or_promises_is_an_error_with_both_facts(tmp_path):
    folder = write(tmp_path, LFM | LFM_BIAS, model_type="lfm2_moe", use_expert_bias=False)
    with pytest.raises(ValueError, match=r"has a tensor .*expert_bias; .*config\.json says use_expert_bias = False"):
        load(folder)
    folder = write(tmp_path, LFM, model_type="lfm2_moe")
    with pytest.raises(ValueError, match=r"has no tensor .*expert_bias; .*config\.json says use_expert_bias = True"):
        load(folder)
    folder = write(tmp_path, LFM | LFM_BIAS, model_type="lfm2_moe")
    np.testing.assert_array_equal(load(folder).correction_bias, np.arange(E))


@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [("hidden_size", 128, "gate_proj"), ("moe_intermediate_size", 64, "gate_proj"), ("num_experts", 3, "4 experts")],
)
def test_a_size_that_tensors_contradict_is_an_error_with_both_facts(tmp_path, key, value, tensor):
    folder = write(tmp_path, QWEN, **{"model_type": "qwen3_moe", key: value})
    with pytest.raises(ValueError, match=rf"{tensor}.*; .*config\.json says .*{value}"):
        load(folder)


def test_two_names_of_a_key_that_differ_are_an_error_that_names_both(tmp_path):
    folder = write(tmp_path, {}, model_type="kimi_linear", moe_renormalize=True, norm_topk_prob=False)
    with pytest.raises(ValueError, match="says moe_renormalize = True and norm_topk_prob = False; they mean the same"):
        jmm.checkpoint.family.get_family(json.loads((folder / "config.json").read_text()), "config.json", FAMILIES)[
            2
        ].boolean("norm_topk_prob")


def test_experts_for_images_behind_those_for_text_are_not_read(tmp_path):
    block = "model.layers.0.mlp"
    images = {name: value[:16] if value.shape == (I, H) else value[:, :16] for name, value in experts(block).items()}
    images = {re.sub(r"experts\.([0-9])", lambda m: f"experts.{int(m.group(1)) + E}", n): v for n, v in images.items()}
    bias = {f"{block}.moe_statics.e_score_correction_bias": np.arange(2 * E, dtype=np.float32).reshape(2, E)}
    gate = {name: value.T for name, value in router(f"{block}.gate.weight").items()}
    tensors = QWEN | images | bias | gate | {f"{block}.gate.weight_1": np.zeros((H, E), np.float32)}
    config = {"model_type": "ernie4_5_vl_moe_text", "moe_intermediate_size": [I, 16], "moe_num_experts": [E, E]}
    config |= {"num_experts": None}
    layer = load(write(tmp_path, tensors, **config))
    assert (layer.gate_up.num_experts, layer.down.k) == (E, I)
    np.testing.assert_array_equal(layer.correction_bias, np.arange(E))
    with pytest.raises(
        ValueError, match=r"moe_num_experts is \[4\]; it must be one value, or 2, for text and for images"
    ):
        load(write(tmp_path, tensors, **config | {"moe_num_experts": [E]}))


@pytest.mark.parametrize(
    ("architecture", "bias", "routing"),
    [
        ("BailingMoeForCausalLM", {}, jmm.Routing(2)),
        (
            "BailingMoeV2ForCausalLM",
            {"model.layers.0.mlp.gate.expert_bias": np.ones(E, np.float32)},
            jmm.Routing(2, scoring="sigmoid", num_groups=2, scale=2.5),
        ),
    ],
)
def test_ling_is_the_first_model_unless_the_files_are_those_of_the_second(tmp_path, architecture, bias, routing):
    # github.com/inclusionAI/Ling: the first chooses by a softmax, the second by sigmoids in groups.
    config = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5} if bias else {}
    config |= {"model_type": "bailing_moe", "architectures": [architecture], "norm_topk_prob": True}
    assert load(write(tmp_path, QWEN | bias, **config)).routing == routing


def test_identity_experts_are_columns_of_the_router_alone(tmp_path):
    block = "model.layers.0.mlp"
    tensors = {
        **experts(block),
        **router(f"{block}.router.classifier.weight", E + 2),
        f"{block}.router.e_score_correction_bias": np.zeros(E + 2, np.float32),
    }
    config = {"model_type": "longcat_flash", "zero_expert_num": 2, "expert_ffn_hidden_size": I}
    layer = load(write(tmp_path, tensors, **config))
    assert (layer.router.shape, layer.gate_up.num_experts, layer.routing.identity_experts) == ((H, E + 2), E, 2)
    with pytest.raises(ValueError, match=rf"has shape \({E + 2}, {H}\); it must be \({E}, {H}\)"):
        load(write(tmp_path, tensors, **config | {"zero_expert_num": 0}))
    with pytest.raises(ValueError, match="zero_expert_type is 'copy'; it must be 'identity'"):
        load(write(tmp_path, tensors, **config, zero_expert_type="copy"))


def test_a_quantised_shared_expert_that_counts_half_is_refused(tmp_path):
    """Its codes could take up no factor, and to leave it out would be a wrong result."""
    block = "model.layers.0.mlp"
    shared = {
        f"{block}.shared_experts.{name}_proj.{part}": value
        for name, (k, n) in {"gate": (H, I), "up": (H, I), "down": (I, H)}.items()
        for part, value in {
            "weight_packed": np.zeros((n, k // 4), np.int32),
            "weight_scale": np.ones((n, 1), np.float16),
            "weight_shape": np.asarray([n, k]),
        }.items()
    }
    group = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group}},
    }
    config = {"model_type": "cohere2_moe", "intermediate_size": I, "num_shared_experts": 1}
    folder = write(tmp_path, QWEN | shared, **config, quantization_config=quantization)
    with pytest.raises(ValueError, match=r"shared_experts counts 0\.5 times and is quantised"):
        load(folder)
    config["shared_expert_combination_strategy"] = "sum"
    assert load(write(tmp_path, QWEN | shared, **config, quantization_config=quantization)).shared is not None
