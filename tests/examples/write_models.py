"""Writes the small models of gpt-oss and DeepSeek-V3 in tests/data, with transformers and torch of the parity extra.

python tests/examples/write_models.py tests/data

Weights are random, of sizes at which every part of a layer moves the logits. transformers writes names and configs; the
linears that the published checkpoints have quantised are encoded here as those are: MXFP4 in the experts of gpt-oss,
FP8 in blocks of 128 by 128 in DeepSeek-V3.
"""

import json
import pathlib
import sys

import ml_dtypes
import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import checkpoint_files as files

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
YARN = {"rope_type": "yarn", "rope_theta": 150.0, "beta_fast": 4.0, "beta_slow": 1.0}
COMMON = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
GPT_OSS = GptOssConfig(
    **COMMON, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, head_dim=32, num_key_value_heads=2,
    sliding_window=4, max_position_embeddings=128,
    rope_parameters={**YARN, "factor": 8.0, "truncate": False, "original_max_position_embeddings": 16},
)  # fmt: skip
DEEPSEEK_V3 = DeepseekV3Config(
    **COMMON, num_key_value_heads=4, intermediate_size=128, moe_intermediate_size=64, n_shared_experts=1,
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=64,
    kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, max_position_embeddings=64,
    num_mtp_layers=0,
    rope_parameters={
        **YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.8, "original_max_position_embeddings": 16,
    },
)  # fmt: skip


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "correction" in name]
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *buffers]:
            drawn = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                drawn = 1 + 0.2 * drawn
            elif "correction" in name:
                drawn *= 0.1
            elif "bias" in name:
                drawn *= 0.3
            elif "sinks" not in name and "embed" not in name:
                transposed = isinstance(model, GptOssForCausalLM) and value.ndim == 3
                drawn *= value.shape[1 if transposed else -1] ** -0.5
            value.copy_(drawn.to(torch.bfloat16).float())


def mxfp4(weight):
    """Blocks [..., N, K / 32, 16] and scales of [..., N, K]."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    bits = np.floor(np.log2(np.abs(groups).max(-1) / 6 * 1.2)).astype(int) + 127
    scaled = groups / 2.0 ** (bits - 127)[..., None]
    codes = np.abs(scaled[..., None] - files.E2M1).argmin(-1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, bits.astype(np.uint8)


def fp8_blocks(weight):
    """Codes of [N, K], and a float32 scale per block."""
    scales = np.zeros([-(-size // 128) for size in weight.shape], np.float32)
    codes = np.zeros(weight.shape, E4M3)
    for i, j in np.ndindex(scales.shape):
        at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        scales[i, j] = np.abs(weight[at]).max() / 448
        codes[at] = (weight[at] / scales[i, j]).astype(E4M3)
    return codes, scales


def gpt_oss_tensors(name, value):
    if "experts" not in name or name.endswith("bias"):
        return {name: value.astype(BF16)}
    blocks, scales = mxfp4(np.swapaxes(value, 1, 2).astype(np.float64))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def deepseek_tensors(name, value):
    if "correction" in name:
        return {name: value}
    if value.ndim < 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
        return {name: value.astype(BF16)}
    codes, scales = fp8_blocks(value.astype(np.float64))
    return {name: codes, f"{name}_scale_inv": scales}


def write(model, folder, tensors_of, quantization):
    model.save_pretrained(folder)
    written = files.read(folder / "model.safetensors")
    files.write(
        folder / "model.safetensors", {k: v for name in written for k, v in tensors_of(name, written[name]).items()}
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    data = pathlib.Path(sys.argv[1])
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"modules_to_not_convert": plain, "quant_method": "mxfp4"}
    gpt_oss = GptOssForCausalLM(GPT_OSS)
    randomise(gpt_oss, 1)
    write(gpt_oss, data / "gpt_oss", gpt_oss_tensors, quantization)
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    deepseek_v3 = DeepseekV3ForCausalLM(DEEPSEEK_V3)
    randomise(deepseek_v3, 2)
    write(deepseek_v3, data / "deepseek_v3", deepseek_tensors, quantization)
