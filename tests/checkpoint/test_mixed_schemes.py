"""Schemes side by side: layers, matrices and linears that are stored in different ways, and plain ones."""

import json

import numpy as np
import pytest
import scheme_tensors
from scheme_tensors import (
    BF16,
    GPTQ,
    MODULE,
    E,
    H,
    I,
    check,
    compressed,
    ct_config,
    expert_tensors,
    fp8_block,
    fp8_rows,
    gptq,
    modelopt_nvfp4,
    router,
    run_and_compare,
    silu,
    weight,
)

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import load_moe_layer, load_moe_layers

MIXED = {
    # nvidia/Qwen3.6-35B-A3B-NVFP4: groups by glob, in config.json
    "config.json": {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "ignore": ["lm_head", "*.mlp.gate", "*.mlp.shared_expert_gate"],
        "config_groups": {
            "group_0": {"targets": [MODULE.format(1)], "weights": {"num_bits": 8, "type": "float"}},
            "group_1": {"targets": [MODULE.format(0)], "weights": {"num_bits": 4, "type": "float", "group_size": 16}},
        },
    },
    "hf_quant_config.json": {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "exclude_modules": ["*.mlp.gate"],
            "quantized_layers": {MODULE.format(0): {"quant_algo": "NVFP4", "group_size": 16}},
        },
    },
    # nvidia/DeepSeek-V4-*-NVFP4: FP8 for the model, NVFP4 groups for experts
    "fp8": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "config_groups": {"group_0": {"targets": [MODULE.format(0)], "weights": {"num_bits": 4, "group_size": 16}}},
    },
}


@pytest.mark.parametrize("form", MIXED)
def test_layers_quantised_in_different_ways(save, rng, form):
    """NVFP4 experts in layer 0, FP8 ones in layer 1: each by its tensors, whatever globs the config has."""
    nvfp4, first = expert_tensors(rng, modelopt_nvfp4)
    fp8, second = expert_tensors(
        rng,
        fp8_block(".weight_scale_inv") if form == "fp8" else fp8_rows("tensor"),
        prefix="model.layers.1.mlp.experts",
    )
    tensors = nvfp4 | fp8 | router(rng) | router(rng, "model.layers.1.mlp.gate.weight")
    path = save(
        {"model_type": "qwen3_moe"} | ({"quantization_config": MIXED[form]} if "hf" not in form else {}), tensors
    )
    if "hf" in form:
        (path / form).write_text(json.dumps(MIXED[form]))
    layers = dict(load_moe_layers(path))
    for number, weight_format, dense in ((0, "nvfp4", first), (1, "fp8", second)):
        assert (layers[number].gate_up.format.name, layers[number].down.format.name) == (weight_format, weight_format)
        check(layers[number], *dense)


@pytest.mark.parametrize("stacked", [False, True])
def test_plain_layers_beside_quantised_ones(save, rng, stacked):
    """`quantize` is for the plain ones, and refused where there are none."""
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16))
    tensors |= router(rng) | router(rng, "model.layers.1.mlp.gate.weight")
    module = "model.layers.1.mlp.experts"
    if stacked:
        plain = {
            f"{module}.gate_up_proj": rng.normal(size=(E, 2 * I, H)).astype(BF16),
            f"{module}.down_proj": rng.normal(size=(E, H, I)).astype(BF16),
        }
    else:
        plain, _ = expert_tensors(rng, lambda rng, n, k: ({".weight": weight(rng, n, k)}, None), prefix=module)
    config = {"model_type": "qwen3_moe", "quantization_config": ct_config()}
    path = save(config, tensors | plain)
    layers = dict(load_moe_layers(path, quantize="mxfp8"))
    assert [layers[number].gate_up.format.name for number in (0, 1)] == ["int4", "mxfp8"]
    check(layers[0], *dense)
    kept = load_moe_layer(path, 1, quantize="bf16")
    if stacked:
        for matrix, name in ((kept.gate_up, "gate_up_proj"), (kept.down, "down_proj")):
            stored = plain[f"{module}.{name}"].swapaxes(1, 2).astype(np.float32)
            np.testing.assert_array_equal(jmm.dense_weights(matrix), stored)
    with pytest.raises(ValueError, match=r"is plain BF16; .* pass quantize=.*'bf16' and 'fp16' keep"):
        load_moe_layer(path, 1)
    del tensors["model.layers.1.mlp.gate.weight"]
    with pytest.raises(ValueError, match="is quantised already; quantize='mxfp8' is for plain weights"):
        load_moe_layer(save(config, tensors, "quantised"), 0, quantize="mxfp8")


def test_a_router_of_gptq_is_dequantised(save, rng, monkeypatch):
    monkeypatch.setattr(scheme_tensors, "E", 8)
    make = gptq(4, 32, None, 1)
    tensors, experts = expert_tensors(rng, make)
    found, dense = make(rng, 8, H)
    tensors |= {f"model.layers.0.mlp.gate{suffix}": tensor for suffix, tensor in found.items()}
    quantization = GPTQ | {"bits": 4, "sym": True}
    path = save({"model_type": "qwen3_moe", "num_experts": 8, "quantization_config": quantization}, tensors)
    layer = load_moe_layer(path, 0)
    np.testing.assert_allclose(layer.router, dense, rtol=1e-6)
    check(layer, *experts)


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_plain_linears_beside_quantised_ones(save, rng, part):
    """In a shared expert all become dense; among experts they are quantised as the others of their matrix are."""
    block = "model.layers.0.mlp"
    make = compressed(4, 32, True, np.float16)
    tensors, dense = expert_tensors(rng, make)
    one = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        found, value = make(rng, *((H, I) if name == "down_proj" else (I, H)))
        if name == part:
            found = {".weight": value.T.astype(np.float32)}
        tensors |= {f"{block}.shared_expert.{name}{suffix}": tensor for suffix, tensor in found.items()}
        one.append(value)
    tensors |= router(rng) | {f"{block}.shared_expert_gate.weight": np.zeros((1, H), BF16)}
    config = {"model_type": "qwen2_moe", "shared_expert_intermediate_size": I, "quantization_config": ct_config()}
    layer = load_moe_layer(save(config, tensors), 0)
    run_and_compare(layer, rng, *dense, silu, extra=lambda x: silu(x @ one[0], x @ one[1]) @ one[2] / 2)
    for suffix in (".weight_packed", ".weight_scale", ".weight_shape"):
        del tensors[f"{block}.experts.0.up_proj{suffix}"]
    plain = weight(rng, I, H)
    tensors[f"{block}.experts.0.up_proj.weight"] = plain
    path = save(config, tensors, "mixed")
    for quantize, size in ((None, "customary"), ("int8", 32), ("int4", 64)):
        with pytest.raises(
            ValueError, match=r"up_proj is plain, and .* int4 in groups of 32; .* pass quantize='int4' and"
        ):
            load_moe_layer(path, 0, quantize=quantize, group_size=size)
    mixed = load_moe_layer(path, 0, quantize="int4", group_size=32).gate_up
    rounded = jmm.quantize(plain.T[None], "int4", group_size=32, scale_dtype=np.float16)
    np.testing.assert_array_equal(jmm.dense_weights(mixed)[0, :, I:], jmm.dense_weights(rounded)[0])
    np.testing.assert_array_equal(mixed.packed[1:], layer.gate_up.packed[1:])
    with pytest.raises(ValueError, match=r"scales .* have dtype bfloat16; .* plain linears beside quantised ones get"):
        load_moe_layer(path, 0, quantize="int4", group_size=32, scale_dtype="bfloat16")


def test_one_plain_matrix_beside_quantised_ones(save, rng):
    """The down matrices plain: one error says what to do, and it then loads."""
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16))
    plain = []
    for e in range(E):
        module = f"model.layers.0.mlp.experts.{e}.down_proj"
        tensors = {name: value for name, value in tensors.items() if not name.startswith(module)}
        plain.append(weight(rng, H, I))
        tensors[f"{module}.weight"] = plain[-1]
    path = save({"model_type": "qwen3_moe", "quantization_config": ct_config()}, tensors | router(rng))
    with pytest.raises(ValueError, match=r"down_proj\.weight is plain BF16; .* pass quantize="):
        load_moe_layer(path, 0)
    layer = load_moe_layer(path, 0, quantize="int8", group_size=32)
    assert (layer.gate_up.format.name, layer.down.format.name) == ("int4", "int8")
    check(layer, *dense[:2], jmm.dense_weights(jmm.quantize(np.stack(plain).swapaxes(1, 2), "int8", group_size=32)))
    kept = load_moe_layer(path, 0, quantize="bf16")
    assert (kept.gate_up.format.name, kept.down.format.name) == ("int4", "bf16")
    np.testing.assert_array_equal(jmm.dense_weights(kept.down), np.stack(plain).swapaxes(1, 2).astype(np.float32))
    check(kept, *dense[:2], jmm.dense_weights(kept.down))


def test_plain_rows_take_the_order_of_the_quantised_linears_beside_them(save, rng):
    make = compressed(4, 32, True, np.float16, shuffled=True)
    tensors, _ = expert_tensors(rng, make)
    module = "model.layers.0.mlp.experts.0.up_proj"
    tensors = {name: value for name, value in tensors.items() if not name.startswith(module)}
    tensors[f"{module}.weight"] = plain = weight(rng, I, H)
    config = {"model_type": "qwen3_moe", "quantization_config": ct_config(actorder="group")}
    layer = load_moe_layer(save(config, tensors | router(rng)), 0, quantize="int4", group_size=32)
    order = np.asarray(layer.gate_up.input_order[0])
    assert (order != np.arange(H)).any()
    rounded = jmm.quantize(plain.T[None, order], "int4", group_size=32, scale_dtype=np.float16)
    columns = np.asarray(jmm.dequantize(layer.gate_up))[0, :, I:]
    # The order of down's rows is in the columns of gate and up, so columns are compared as sets.
    found, expected = (np.sort(rows, axis=1) for rows in (columns, np.asarray(jmm.dequantize(rounded))[0]))
    np.testing.assert_array_equal(found, expected)
