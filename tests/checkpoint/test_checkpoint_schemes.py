"""Schemes without a genuine file: tiny checkpoints written here, against numpy on their tensors."""

import functools
import json

import checkpoint_files as files
import numpy as np
import pytest
import scheme_tensors
from scheme_tensors import (
    BF16,
    E4M3,
    E8M0,
    GPTQ,
    HQQ,
    E,
    check,
    compressed,
    ct_config,
    expert_tensors,
    fp8_block,
    fp8_rows,
    gptq,
    gptq8,
    hqq,
    int_quantized,
    modelopt_nvfp4,
    mxfp8,
    packed_fp4,
    router,
    run_and_compare,
    silu,
    w4afp8,
)

from jax_marlin_moe.checkpoint import load_moe_layer


def ct_integers(*arguments, **options):
    return ct_config(*arguments, **options) | {"format": "int-quantized"}


def fp8_block_of_modelopt(rng, n, k):
    found, dense = fp8_block(".weight_scale")(rng, n, k)
    return found | {".weight_scale": found[".weight_scale"][:, None, :, None]}, dense


SCHEMES = {
    "fp8 block": (fp8_block(".weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    "fp8 block, e8m0": (fp8_block(".weight_scale_inv", E8M0), {"quant_method": "fp8"}, "fp8"),
    "fp8 block, .scale": (fp8_block(".scale"), {"quant_method": "fp8"}, "fp8"),
    "fp8 channel": (fp8_rows("channel"), {"quant_method": "compressed-tensors"}, "fp8"),
    "fp8 tensor": (fp8_rows("tensor"), {"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
    "fp4 of DeepSeek-V4": (packed_fp4(".weight", ".scale", np.int8, E8M0), {"quant_method": "fp8"}, "mxfp4"),
    "mxfp4": (
        packed_fp4(".weight_packed", ".weight_scale", np.uint8, np.uint8),
        ct_config(type="float") | {"format": "mxfp4-pack-quantized"},
        "mxfp4",
    ),
    "mxfp8": (mxfp8, {"quant_method": "modelopt", "quant_algo": "MXFP8"}, "mxfp8"),
    "gptq 8 bit": (gptq8(None, 1), GPTQ, "int8"),
    "gptq 8 bit, zeros": (gptq8("random", 1), GPTQ, "int8_zp"),
    "gptq v2 8 bit, zeros": (gptq8("random", 0), GPTQ | {"checkpoint_format": "gptq_v2"}, "int8_zp"),
    "auto-round": (
        gptq8(None, 1),
        GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        "int8",
    ),
    "gptq, dynamic": (gptq8(None, 1), GPTQ | {"bits": 4, "dynamic": {r"+:.*experts": {"bits": 8}, "-:x": {}}}, "int8"),
    "pack, bf16": (compressed(4, 32, True, BF16), ct_config(), "int4"),
    "pack, float32, zeros": (compressed(4, 32, False, np.float32), ct_config(symmetric=False), "int4_zp"),
    "pack, 8 bit, zeros": (compressed(8, 32, False, np.float16), ct_config(8, symmetric=False), "int8_zp"),
    "pack, by name": (
        compressed(8, 32, True, np.float16),
        ct_config()
        | {
            "config_groups": ct_config()["config_groups"]
            | {"b": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 8, "group_size": 32}}}
        },
        "int8",
    ),
    "int-quantized, W8A8": (int_quantized(8, -1, True, BF16), ct_integers(8, None, strategy="channel"), "int8"),
    "int-quantized, W8A8, one scale": (
        int_quantized(8, -1, True, np.float32, "one"),
        ct_integers(8, None, strategy="tensor"),
        "int8",
    ),
    "int-quantized, W4A8": (int_quantized(4, 32, True, np.float32), ct_integers(4), "int4"),
    "int-quantized, 8 bit, zeros": (int_quantized(8, 32, False, BF16), ct_integers(8, symmetric=False), "int8_zp"),
    "int-quantized, 4 bit, zeros": (
        int_quantized(4, -1, False, np.float16),
        ct_integers(4, None, symmetric=False, strategy="channel"),
        "int4_zp",
    ),
    "SmoothQuant of ModelOpt": (
        int_quantized(8, -1, True, np.float32, "row"),
        {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"},
        "int8",
    ),
    "w4afp8": (w4afp8(64), {"quant_method": "w4afp8", "weight_block_size": [128, 128]}, "int4"),
    "w4afp8 of bfloat16 scales": (w4afp8(32, BF16), {"quant_method": "w4afp8", "group_size": 32}, "int4"),
    "fp8 block of ModelOpt": (
        fp8_block_of_modelopt,
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"},
        "fp8",
    ),
    "fp8 channel of ModelOpt": (
        fp8_rows("channel"),
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "fp8",
    ),
    "nvfp4 of ModelOpt, groups of 32": (
        functools.partial(modelopt_nvfp4, group=32),
        {"quant_method": "modelopt", "quant_algo": "W4A8_NVFP4_FP8", "group_size": 32},
        "nvfp4",
    ),
    "mxfp4 of ModelOpt": (
        packed_fp4(".weight", ".weight_scale", np.uint8, np.uint8),
        {"quant_method": "modelopt", "quant_algo": "W4A8_MXFP4_FP8", "group_size": 32},
        "mxfp4",
    ),
    "hqq": (hqq(4), HQQ, "int4_fzp"),
    "hqq 8 bit": (hqq(8, BF16), HQQ, "int8_fzp"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(save, rng, scheme):
    make, quantization, weight_format = SCHEMES[scheme]
    tensors, dense = expert_tensors(rng, make)
    path = save(
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "quantization_config": quantization}, tensors | router(rng)
    )
    layer = load_moe_layer(path, 0)
    assert (layer.gate_up.format.name, layer.down.format.name) == (weight_format, weight_format)
    check(layer, *dense)


GROUPS = [(bits, group) for bits, sizes in ((4, (16, 32, 64, 128, -1)), (8, (32, 64, 128, -1))) for group in sizes]


@pytest.mark.covering
@pytest.mark.parametrize("tool", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_integer_groups(save, rng, monkeypatch, bits, group, symmetric, tool):
    monkeypatch.setattr(scheme_tensors, "H", 256)
    monkeypatch.setattr(scheme_tensors, "I", 256)
    if tool == "compressed-tensors":
        make, strategy = compressed(bits, group, symmetric, BF16), {"strategy": "channel"} if group == -1 else {}
        quantization = ct_config(bits, None if group == -1 else group, symmetric, **strategy)
    else:
        make = gptq(bits, group, None if symmetric else "random", tool == "gptq")
        quantization = GPTQ | {"bits": bits, "group_size": group, "checkpoint_format": tool}
    tensors, dense = expert_tensors(rng, make)
    layer = load_moe_layer(
        save({"model_type": "qwen3_moe", "quantization_config": quantization}, tensors | router(rng)), 0
    )
    for matrix in (layer.gate_up, layer.down):
        assert matrix.format.name == f"int{bits}" + ("" if symmetric else "_zp")
        assert matrix.group_size == (256 if group == -1 else group)
    check(layer, *dense)


@pytest.mark.covering
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, 128, -1])
def test_hqq_groups(save, rng, monkeypatch, bits, group):
    monkeypatch.setattr(scheme_tensors, "H", 256)
    monkeypatch.setattr(scheme_tensors, "I", 256)
    tensors, dense = expert_tensors(rng, hqq(bits, size=group))
    layer = load_moe_layer(save({"model_type": "qwen3_moe", "quantization_config": HQQ}, tensors | router(rng)), 0)
    assert layer.down.group_size == (256 if group == -1 else group)
    check(layer, *dense)


@pytest.mark.parametrize("kind", ["block", "group"])
def test_fp8_groups(save, rng, monkeypatch, kind):
    monkeypatch.setattr(scheme_tensors, "H", 320)
    monkeypatch.setattr(scheme_tensors, "I", 192)
    make = fp8_block(".weight_scale_inv") if kind == "block" else fp8_rows("group")
    tensors, dense = expert_tensors(rng, make)
    path = save({"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}}, tensors | router(rng))
    layer = load_moe_layer(path, 0)
    assert (layer.gate_up.num_groups, layer.down.num_groups) == (3, 2)
    check(layer, *dense)


def test_scales_keep_their_dtype(save, rng):
    for dtype in (np.float32, np.float16, BF16):
        tensors, _ = expert_tensors(rng, compressed(4, 32, True, dtype))
        path = save({"model_type": "qwen3_moe", "quantization_config": ct_config()}, tensors | router(rng), str(dtype))
        assert load_moe_layer(path, 0).gate_up.scales.dtype == dtype


def test_groups_in_any_order(save, rng):
    """`weight_g_idx`: of gate and up a gather of x, of down an order of their columns."""
    tensors, dense = expert_tensors(rng, compressed(4, 32, False, np.float16, shuffled=True))
    config = {"model_type": "qwen3_moe", "quantization_config": ct_config(symmetric=False, actorder="group")}
    layer = load_moe_layer(save(config, tensors | router(rng)), 0)
    assert layer.gate_up.input_order is not None
    assert layer.down.input_order is None
    run_and_compare(layer, rng, *dense, silu)


def test_groups_in_an_order_that_the_config_does_not_state_are_refused(save, rng):
    tensors, _ = expert_tensors(rng, compressed(4, 32, True, np.float16, shuffled=True))
    config = {"model_type": "qwen3_moe", "quantization_config": ct_config()}
    with pytest.raises(ValueError, match=r"weight_g_idx puts rows into groups in another order; actorder must"):
        load_moe_layer(save(config, tensors | router(rng)), 0)


@pytest.mark.parametrize("order", ["group", "dynamic", True])
def test_an_order_that_the_config_states_must_be_in_the_file(save, rng, order):
    """From version 0.20 on, compressed-tensors writes none."""
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16))
    quantization = ct_config(actorder=order)
    config = {"model_type": "qwen3_moe", "quantization_config": quantization}
    for version in ("0.18.0", None):
        config["quantization_config"] = quantization | {"version": version}
        with pytest.raises(ValueError, match=r"no tensor .*weight_g_idx"):
            load_moe_layer(save(config, tensors | router(rng)), 0)
    config["quantization_config"] = quantization | {"version": "0.20.1"}
    check(load_moe_layer(save(config, tensors | router(rng)), 0), *dense)


def test_gate_and_up_keep_global_scales_of_their_own(save, rng):
    scales = iter(np.float32([0.01, 0.03, 0.02] * E))

    def make(rng, n, k):
        data = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        blocks = rng.integers(0, 0x7F, (n, k // 16), dtype=np.uint8).view(E4M3)  # subnormals and zero included
        factor = next(scales)
        found = {".weight": data, ".weight_scale": blocks, ".weight_scale_2": factor, ".input_scale": np.float32(1)}
        return found, files.fp4(data, blocks, float(factor))

    tensors, dense = expert_tensors(rng, make)
    config = {"model_type": "qwen3_moe"}  # the config is in a file of its own
    path = save(config, tensors | router(rng))
    algorithm = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["*.mlp.gate"]}}
    (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, **algorithm}))
    layer = load_moe_layer(path, 0)
    np.testing.assert_array_equal(layer.gate_up.global_scales[0], np.float32([0.01, 0.03]))
    check(layer, *dense)


def test_sizes_that_are_padded(save, rng, monkeypatch):
    monkeypatch.setattr(scheme_tensors, "I", 96)  # gate and up are padded to 128 columns each
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16))
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": 96, "quantization_config": ct_config()}
    layer = load_moe_layer(save(config, tensors | router(rng)), 0)
    assert layer.gate_up.column_padding == (32, 32)
    check(layer, *dense)
    run_and_compare(layer, rng, *dense, silu)
