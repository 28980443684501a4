"""Scales of 8-bit activations that a checkpoint fixes: loaded, used for rows of e4m3, and kept by the packed form."""

import dataclasses
import pathlib

import checkpoint_files as files
import jax
import numpy as np
import oracle
import pytest
from byte_blocks import in_fixed_units, relative_error
from scheme_tensors import (
    BF16,
    E,
    H,
    I,
    check,
    compressed,
    ct_config,
    expert_tensors,
    fp8_block,
    fp8_rows,
    int_quantized,
    modelopt_nvfp4,
    router,
    silu,
    w4afp8,
)

from jax_marlin_moe.checkpoint import Checkpoint, convert, load_moe_layer

DATA = pathlib.Path(__file__).parents[1] / "data" / "ck_ct_W4A8"
INPUTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def ct_inputs(**changes):
    config = ct_config()
    (name,) = config["config_groups"]
    group = config["config_groups"][name] | {"input_activations": INPUTS | changes}
    return config | {"config_groups": {name: group}}


INT4 = compressed(4, 32, True, BF16)
BYTES = int_quantized(4, 32, True, BF16)  # as compressed-tensors writes integer weights whose rows are quantised
NVFP4 = {"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8", "group_size": 16}
# What the tensors are made by, the config, and whether it fixes the scales of rows.
CASES = {
    "W4A8 of compressed-tensors": (INT4, ct_inputs(), True),
    "W4A8 in bytes": (BYTES, ct_inputs() | {"format": "int-quantized"}, True),
    "W8A8 of ModelOpt": (fp8_rows("tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}, True),
    "NVFP4 of ModelOpt with rows in FP8": (modelopt_nvfp4, NVFP4, True),
    "NVFP4 of ModelOpt": (modelopt_nvfp4, NVFP4 | {"quant_algo": "NVFP4"}, False),
    "W8A8 of fp8": (fp8_rows("tensor"), {"quant_method": "fp8", "activation_scheme": "static"}, True),
    "scales of each token": (INT4, ct_inputs(dynamic=True, strategy="token"), False),
    "scales of int8": (INT4, ct_inputs(type="int"), False),
    "scales of int8 in bytes": (BYTES, ct_inputs(type="int") | {"format": "int-quantized"}, False),
    "16 bits": (INT4, ct_config(), False),
    "dynamic fp8": (fp8_rows("tensor"), {"quant_method": "fp8", "activation_scheme": "dynamic"}, False),
}


def with_scales(make, values):
    def made(rng, n, k):
        found, dense = make(rng, n, k)
        return found | {".input_scale": np.float32(values.pop())}, dense

    return made


def written(save, rng, name, values):
    make, quantization, _ = CASES[name]
    tensors, dense = expert_tensors(rng, with_scales(make, values))
    config = {"model_type": "qwen3_moe", "quantization_config": quantization}
    return save(config, tensors | router(rng)), dense


@pytest.mark.parametrize("name", CASES)
def test_scales_of_rows_are_loaded_where_the_config_fixes_them(save, rng, name):
    values = list(np.float32(rng.uniform(0.01, 0.1, 3 * E)))
    of_experts = np.float32(values[::-1]).reshape(E, 3)  # gate, up, down
    layer = load_moe_layer(written(save, rng, name, values)[0], 0)
    if CASES[name][2]:
        assert layer.x_scale == of_experts[:, :2].max()
        np.testing.assert_array_equal(layer.intermediate_scales, of_experts[:, 2])
    else:
        assert layer.x_scale is None
        assert layer.intermediate_scales is None


@pytest.mark.parametrize("config", ["config.json", "hf_quant_config.json"])
def test_scales_beside_the_experts_of_w4afp8_are_those_of_their_rows(save, rng, tmp_path, config):
    """As SGLang's files and TensorRT-LLM's script have them, with linears in FP8 for all but the routed experts."""
    tensors, dense = expert_tensors(rng, w4afp8(64, BF16))
    values = rng.uniform(0.005, 0.02, (E, 3)).astype(BF16)  # gate, up, down
    for e, number in np.ndindex(E, 3):
        name = f"model.layers.0.mlp.experts.{e}.w{(1, 3, 2)[number]}.input_scale"
        tensors[name] = values[e, number : number + 1]
    for name, (n, k) in {"gate": (I, H), "up": (I, H), "down": (H, I)}.items():
        found, _ = fp8_block(".weight_scale_inv")(rng, n, k)
        tensors |= {f"model.layers.0.mlp.shared_experts.{name}_proj{suffix}": t for suffix, t in found.items()}
    tensors |= router(rng) | {"model.layers.0.mlp.gate.e_score_correction_bias": np.zeros(E, np.float32)}
    facts = {"model_type": "deepseek_v3", "n_routed_experts": E, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    method = {"quantization_config": {"quant_method": "w4afp8"}} if config == "config.json" else {}
    path = save(facts | method, tensors)
    if not method:
        (path / config).write_text('{"quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": null}}')
    layer = load_moe_layer(path, 0)
    check(layer, *dense)
    assert layer.shared.gate_up.format.name == "fp8"
    assert layer.x_scale == values[:, :2].astype(np.float32).max()
    np.testing.assert_array_equal(layer.intermediate_scales, values[:, 2].astype(np.float32))
    assert Checkpoint(path).activation_dtype(0) == "float8_e4m3fn"
    if method:
        x = rng.normal(size=(9, H)).astype(BF16)
        y = dataclasses.replace(layer, shared=None)(jax.device_put(x), activation_dtype="float8_e4m3fn")
        assert relative_error(y, quantised_block(layer, x, *dense)) < 6e-3
    else:
        convert(path, tmp_path / "packed")
        np.testing.assert_array_equal(load_moe_layer(tmp_path / "packed", 0).down.packed, layer.down.packed)


def test_w4afp8_that_its_config_contradicts_is_refused(save, rng):
    tensors, _ = expert_tensors(rng, w4afp8(32))

    def load(**config):
        facts = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "w4afp8"} | config}
        return load_moe_layer(save(facts, tensors | router(rng)), 0)

    assert load(moe_activation_scheme="dynamic").x_scale is None
    with pytest.raises(ValueError, match="group_size is 128; it must be 32, that of the tensors of model"):
        load(group_size=128)
    with pytest.raises(ValueError, match="moe_activation_scheme is 'token'; it must be one of 'static', 'dynamic'"):
        load(moe_activation_scheme="token")
    with pytest.raises(ValueError, match="rotation_matrix is 'r'; it must be omitted: the loader does not know"):
        load(rotation_matrix="r")
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv"
    tensors[name] = np.where(np.arange(H // 32) == 1, np.float32(np.nan), tensors[name])
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight_scale_inv holds infinities or NaN"):
        load()


def quantised_block(layer, x, gate, up, down):
    """float64, of rows and hidden values that are rounded by the layer's scales."""
    weights, ids = (np.asarray(a, np.float64) for a in layer.route(jax.device_put(x)))
    codes, scale = in_fixed_units(x, layer.x_scale)
    rows, out = codes * np.float64(scale), np.zeros(x.shape)
    for t in range(len(x)):
        for w, e in zip(weights[t], ids[t].astype(int), strict=True):
            hidden = silu(rows[t] @ gate[e], rows[t] @ up[e])[None]
            codes, scale = in_fixed_units(hidden, layer.intermediate_scales[e])
            out[t] += w * (codes[0] * np.float64(scale[0]) @ down[e])
    return out


def test_a_loaded_layer_rounds_rows_by_the_scales_of_its_file(save, rng, tmp_path):
    values = list(np.float32(rng.uniform(0.005, 0.02, 3 * E)))
    path, dense = written(save, rng, "W4A8 of compressed-tensors", values)
    layer = load_moe_layer(path, 0)
    x = rng.normal(size=(9, H)).astype(BF16)
    wanted = quantised_block(layer, x, *dense)
    y = layer(jax.device_put(x), activation_dtype="float8_e4m3fn")
    assert relative_error(y, wanted) < 6e-3  # of bfloat16, and of hidden values next to a tie
    convert(path, tmp_path / "packed")
    again = load_moe_layer(tmp_path / "packed", 0)
    np.testing.assert_array_equal(again(jax.device_put(x), activation_dtype="float8_e4m3fn"), y)


def test_what_compressed_tensors_wrote_is_what_its_definition_says(rng):
    layer, tensors = load_moe_layer(DATA, 0), files.read(DATA / "model.safetensors")

    def of(part, suffix):
        return np.stack([tensors[f"model.layers.0.mlp.experts.{e}.{part}_proj.{suffix}"] for e in range(4)]).astype(
            float
        )

    parts = [(of(p, "weight") * of(p, "weight_scale").repeat(32, 2)).swapaxes(1, 2) for p in ("gate", "up", "down")]
    np.testing.assert_allclose(oracle.dense(layer.gate_up), np.concatenate(parts[:2], axis=2), rtol=2**-22, atol=0)
    np.testing.assert_allclose(oracle.dense(layer.down), parts[2], rtol=2**-22, atol=0)
    assert layer.x_scale == max(of("gate", "input_scale").max(), of("up", "input_scale").max())
    np.testing.assert_array_equal(layer.intermediate_scales, of("down", "input_scale")[:, 0])
    x = rng.normal(size=(9, 128)).astype(BF16)
    y = layer(jax.device_put(x), activation_dtype=Checkpoint(DATA).activation_dtype(0))
    assert relative_error(y, quantised_block(layer, x, *parts)) < 6e-3


@pytest.mark.parametrize("bad", [0.0, np.inf, np.nan])
def test_a_scale_that_no_token_reached_leaves_rows_their_own(save, rng, caplog, bad):
    values = [np.float32(0.02)] * (3 * E - 1) + [np.float32(bad)]  # the last one is that of the first gate
    layer = load_moe_layer(written(save, rng, "W8A8 of fp8", values)[0], 0)
    assert layer.x_scale is None
    np.testing.assert_array_equal(layer.intermediate_scales, [np.float32(0.02)] * E)
    assert "experts.0.gate_proj.input_scale is not positive and finite: rows have scales of their own" in caplog.text


def test_scales_of_many_numbers_are_refused_by_name(save, rng):
    path, _ = written(save, rng, "W8A8 of fp8", [np.full(3, 0.02, np.float32)] * (3 * E))
    with pytest.raises(ValueError, match=r"gate_proj.input_scale has shape \(3,\); it must be \(\) or \(1,\), one num"):
        load_moe_layer(path, 0)


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ROWS_OF_128 = ct_inputs(dynamic=True, strategy="group", group_size=128)
STATED = {
    "blocks of fp8": (fp8_rows("group"), BLOCKS, "float8_e4m3fn_g128"),
    "groups of 128": (INT4, ROWS_OF_128, "float8_e4m3fn_g128"),
    "groups of 64": (INT4, ct_inputs(dynamic=True, strategy="group", group_size=64), None),
    "fixed": (INT4, ct_inputs(), "float8_e4m3fn"),
    "of each token": (INT4, ct_inputs(dynamic=True, strategy="token"), "float8_e4m3fn"),
    "int8": (INT4, ct_inputs(dynamic=True, strategy="token", type="int"), "int8"),
    "4 bits": (INT4, ct_inputs(dynamic=True, strategy="token", type="int", num_bits=4), None),
    "W8A8 of ModelOpt": (fp8_rows("tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}, "float8_e4m3fn"),
    "NVFP4 with rows in FP8": (modelopt_nvfp4, NVFP4, "float8_e4m3fn"),
    "SmoothQuant of ModelOpt": (
        int_quantized(8, -1, True, np.float32, "row"),
        {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"},
        "int8",
    ),
    "16 bits": (INT4, ct_config(), None),
}


@pytest.mark.parametrize("name", STATED)
def test_what_rows_are_quantised_to_is_what_the_config_says(save, rng, tmp_path, name):
    make, quantization, stated = STATED[name]
    tensors, _ = expert_tensors(rng, make)
    path = save({"model_type": "qwen3_moe", "quantization_config": quantization}, tensors | router(rng))
    assert Checkpoint(path).activation_dtype(0) == stated
    with pytest.raises(ValueError, match="layer 1 has no experts; layers with experts: 0 to 0"):
        Checkpoint(path).activation_dtype(1)
    if name == "blocks of fp8":
        layer, x = load_moe_layer(path, 0), rng.normal(size=(9, H)).astype(BF16)
        y = layer(jax.device_put(x), activation_dtype=stated)
        assert relative_error(y, np.float64(layer(jax.device_put(x)))) < 0.06
        convert(path, tmp_path / "packed")
        assert Checkpoint(tmp_path / "packed").activation_dtype(0) == stated
