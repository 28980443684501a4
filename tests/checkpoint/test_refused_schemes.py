"""Checkpoints whose configuration and tensors contradict, or that no reader follows, are refused by name."""

import numpy as np
import pytest
from scheme_tensors import GPTQ, HQQ, MODULE, check, compressed, ct_config, expert_tensors, fp8_block, hqq, router

from jax_marlin_moe.checkpoint import load_moe_layer


@pytest.mark.parametrize(
    "quantization", [ct_config(), GPTQ, GPTQ | {"quant_method": "auto-round", "packing_format": "auto_gptq"}, None]
)
def test_experts_of_gpt_oss_with_names_of_two_meanings_are_refused(save, rng, quantization):
    tensors, _ = expert_tensors(rng, compressed(4, 32, True, np.float16))
    config = {"model_type": "gpt_oss"} | ({} if quantization is None else {"quantization_config": quantization})
    tensors |= router(rng, "model.layers.0.mlp.router.weight")
    with pytest.raises(
        ValueError, match=r"the experts of gpt_oss have tensors of their own .*; llm-compressor up to 0\.11"
    ):
        load_moe_layer(save(config, tensors), 0)


FP8_REFUSED = [
    ({"group_size": 64}, "group_size is 64; it must be 128, that of the tensors of"),
    ({"activation_scheme": "rotated"}, "activation_scheme is 'rotated'; it must be one of 'dynamic', 'static'"),
    ({"scale_fmt": "inverse"}, "scale_fmt is 'inverse'; it must be 'ue8m0'"),
    ({"moe_quant_algo": "NVFP4"}, "moe_quant_algo is 'NVFP4'; it must be one of 'FP8'"),
    ({"quantized_layers": {MODULE.format(0): {"quant_algo": "MXFP8"}}}, "quant_algo is 'MXFP8'; it must be one of"),
    (
        {"config_groups": {"a": {"targets": [MODULE.format(0)], "weights": {"num_bits": 4, "group_size": 16}}}},
        "num_bits is 4; it must be 8",
    ),
    (
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"block_structure": [64, 64]}}}},
        r"block_structure is \[64, 64\]; it must be \[128, 128\]",
    ),
]


@pytest.mark.parametrize(("values", "message"), FP8_REFUSED)
def test_what_a_config_says_of_fp8_is_compared_with_the_tensors(save, rng, values, message):
    tensors, dense = expert_tensors(rng, fp8_block(".weight_scale_inv"))
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0", "group_size": 128}
    config = {"model_type": "qwen3_moe", "quantization_config": quantization}
    check(load_moe_layer(save(config, tensors | router(rng)), 0), *dense)
    config["quantization_config"] = quantization | values
    with pytest.raises(ValueError, match=message):
        load_moe_layer(save(config, tensors | router(rng)), 0)


HQQ_REFUSED = [
    ({"nbits": 4, "group_size": 64, "axis": 1, "rotation": 1}, {}, "rotation is 1; it must be omitted"),
    ({"nbits": 3}, {".nbits": np.asarray(3)}, "HQQ nbits 3; it must be 4 or 8"),
    ({"axis": 1}, {".axis": np.asarray(0)}, "HQQ axis 0; it must be 1"),
    ({"axis": 1}, {".axis": np.asarray([1, 1])}, r"down_proj\.axis is \[1, 1\]; it must be one integer"),
    ({"axis": 1}, {".nbits": np.float32(np.nan)}, r"down_proj\.nbits is nan; it must be one integer"),
    ({"axis": 1}, {".group_size": np.asarray(48)}, "HQQ group_size 48; it must be 64, or one of"),
    ({"axis": 1}, {".view_as_float": np.asarray(True)}, "HQQ view_as_float; it must be false: only float scales"),
    ({"axis": 1}, {".shape": np.asarray([3, 5])}, r"down_proj\.shape says \[3, 5\]; it must be \[128, 64\]"),
    ({"axis": "1"}, {".axis": None}, "axis is '1'; it must be an integer"),
    ({"axis": 1}, {".scale": np.full((128, 1), np.inf, np.float16)}, r"\.scale holds infinities or NaN"),
    ({"axis": 1}, {".zero": np.zeros((128, 1), np.float32)}, r"\.zero has dtype float32; it must be float16"),
    ({"axis": 1}, {".W_q": np.zeros((64, 64), np.int8)}, r"\.W_q has dtype I8"),
]


@pytest.mark.parametrize(("params", "changes", "message"), HQQ_REFUSED)
def test_hqq_that_cannot_be_followed_is_refused(save, rng, params, changes, message):
    tensors, _ = expert_tensors(rng, hqq(4))
    modules = [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]
    for suffix, value in changes.items():
        for module in modules:
            tensors.pop(f"{module}{suffix}", None)
            if value is not None:
                tensors[f"{module}{suffix}"] = value
    quantization = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}
    config = {"model_type": "qwen3_moe", "quantization_config": quantization}
    with pytest.raises(ValueError, match=message):
        load_moe_layer(save(config, tensors | router(rng)), 0)


def test_hqq_scales_that_are_quantised_themselves_are_refused(save, rng):
    tensors, _ = expert_tensors(rng, hqq(4))
    params = HQQ["quant_config"] | {"scale_quant_params": {"nbits": 8}}
    config = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "hqq", "quant_config": params}}
    with pytest.raises(ValueError, match=r"scale_quant_params is .*; it must be null: HQQ scales and zeros must be"):
        load_moe_layer(save(config, tensors | router(rng)), 0)
