"""Schemes and families without a genuine file: tiny checkpoints written here, against numpy on their tensors."""

import json

import checkpoint_files as files
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import load_moe_layer, load_moe_layers

H, I, E = 128, 64, 4
E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def save(tmp_path):
    def make(config, tensors, folder="checkpoint"):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        base = {"hidden_size": H, "moe_intermediate_size": I, "num_experts": E, "num_experts_per_tok": 2}
        (path / "config.json").write_text(json.dumps({**base, **config}))
        files.write(path / "model.safetensors", tensors)
        return path

    return make


def weight(rng, n, k, dtype=BF16):
    return (rng.normal(size=(n, k)) * k**-0.5).astype(dtype)


def router(rng, name="model.layers.0.mlp.gate.weight"):
    return {name: rng.normal(size=(E, H)).astype(BF16)}


def check(layer, gate, up, down):
    """Dense [E, K, N] in float64 against the packed weights."""
    gate_up = np.concatenate([gate, up], axis=2) if gate is not None else up
    np.testing.assert_allclose(oracle.dense(layer.gate_up), gate_up, rtol=2**-22, atol=0)
    np.testing.assert_allclose(oracle.dense(layer.down), down, rtol=2**-22, atol=0)


def expected_block(layer, x, gate, up, down, activation, biases=(0.0, 0.0, 0.0)):
    """float64, with the router's choice taken from the layer."""
    weights, ids = (np.asarray(a, np.float64) for a in layer.route(jnp.asarray(x)))
    out = np.zeros_like(x, np.float64)
    bg, bu, bd = (np.broadcast_to(b, (E, 1)) if np.ndim(b) == 0 else b for b in biases)
    for t, (row, chosen) in enumerate(zip(weights, ids.astype(int), strict=True)):
        for w, e in zip(row, chosen, strict=True):
            source = x[t] * w if layer.routing.apply_on_input else x[t]
            g = source @ gate[e] + bg[e] if gate is not None else None
            u = source @ up[e] + bu[e]
            y = activation(g, u) @ down[e] + bd[e]
            out[t] += y if layer.routing.apply_on_input else w * y
    return out


def run_and_compare(layer, rng, gate, up, down, activation, biases=(0.0, 0.0, 0.0), extra=None):
    x = rng.normal(size=(9, H)).astype(np.float16).astype(np.float64)
    y = np.asarray(layer(jnp.asarray(x, jnp.float16), implementation="xla"), np.float64)
    answer = expected_block(layer, x, gate, up, down, activation, biases)
    if extra is not None:
        answer += extra(x)
    assert np.linalg.norm(y - answer) <= 2e-3 * np.linalg.norm(answer)


def silu(g, u):
    return g / (1 + np.exp(-g)) * u


def clamped(g, u, limit=7.0, alpha=1.702):
    g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
    return (u + 1) * g / (1 + np.exp(-alpha * g))


def gpt_oss_tensors(rng, module, blocks, scales, bias, names):
    up_blocks = rng.integers(0, 256, (E, 2 * I, H // 32, 16), dtype=np.uint8)
    up_scales = rng.integers(120, 126, (E, 2 * I, H // 32), dtype=np.uint8)
    down_blocks = rng.integers(0, 256, (E, H, I // 32, 16), dtype=np.uint8)
    down_scales = rng.integers(120, 126, (E, H, I // 32), dtype=np.uint8)
    up_bias, down_bias = rng.normal(size=(E, 2 * I)).astype(BF16), rng.normal(size=(E, H)).astype(BF16)
    first, second = names
    tensors = {
        f"{module}{first}{blocks}": up_blocks,
        f"{module}{first}{scales}": up_scales,
        f"{module}{first}{bias}": up_bias,
        f"{module}{second}{blocks}": down_blocks,
        f"{module}{second}{scales}": down_scales,
        f"{module}{second}{bias}": down_bias,
    }

    def dense(data, scale):
        flat = data.reshape(*data.shape[:2], -1)
        return np.stack([files.fp4(b, 2.0 ** (s.astype(float) - 127)) for b, s in zip(flat, scale, strict=True)])

    both = dense(up_blocks, up_scales)
    parts = both[..., 0::2], both[..., 1::2], dense(down_blocks, down_scales)
    biases = up_bias[:, 0::2].astype(float), up_bias[:, 1::2].astype(float), down_bias.astype(float)
    return tensors, parts, biases


@pytest.mark.parametrize("original", [False, True])
def test_gpt_oss(save, rng, original):
    if original:
        module, names, spelling = "block.0.mlp.", ("mlp1", "mlp2"), ("_weight.blocks", "_weight.scales", "_bias")
        gate, config = "block.0.mlp.gate", {"experts_per_token": 2, "intermediate_size": I, "swiglu_limit": 7.0}
    else:
        module, names = "model.layers.0.mlp.experts.", ("gate_up_proj", "down_proj")
        spelling, gate = ("_blocks", "_scales", "_bias"), "model.layers.0.mlp.router"
        config = {"model_type": "gpt_oss", "intermediate_size": I, "quantization_config": {"quant_method": "mxfp4"}}
    tensors, parts, biases = gpt_oss_tensors(rng, module, *spelling, names)
    tensors |= router(rng, f"{gate}.weight") | {f"{gate}.bias": rng.normal(size=E).astype(BF16)}
    if original:
        tensors["block.0.mlp.norm.scale"] = np.ones(H, np.float32)
    layer = load_moe_layer(save(config, tensors), 0)
    assert layer.gate_up.format.name == "mxfp4"
    assert (layer.routing.softmax_after_topk, layer.routing.scoring) == (True, "identity")
    assert layer.router_bias is not None
    check(layer, *parts)
    run_and_compare(layer, rng, *parts, clamped, biases)


def test_gpt_oss_in_bfloat16_lies_transposed(save, rng):
    up = (rng.normal(size=(E, H, 2 * I)) * 0.1).astype(BF16)
    down = (rng.normal(size=(E, I, H)) * 0.1).astype(BF16)
    module = "model.layers.0.mlp.experts."
    tensors = {
        f"{module}gate_up_proj": up,
        f"{module}down_proj": down,
        f"{module}gate_up_proj_bias": np.zeros((E, 2 * I), BF16),
        f"{module}down_proj_bias": np.zeros((E, H), BF16),
        "model.layers.0.mlp.router.bias": np.zeros(E, BF16),
    } | router(rng, "model.layers.0.mlp.router.weight")
    layer = load_moe_layer(save({"model_type": "gpt_oss"}, tensors), 0, quantize="int8", group_size=32)
    joined = np.concatenate([up[..., 0::2], up[..., 1::2]], axis=2)
    same = jmm.quantize(joined, "int8", group_size=32)
    np.testing.assert_array_equal(layer.gate_up.packed, same.packed)
    np.testing.assert_array_equal(layer.down.packed, jmm.quantize(down, "int8", group_size=32).packed)


def expert_tensors(rng, make, names=("gate_proj", "up_proj", "down_proj"), prefix="model.layers.0.mlp.experts"):
    """Tensors of all experts from `make(rng, n, k) -> (tensors by suffix, dense [K, N])`, and the dense stacks."""
    tensors, dense = {}, [[] for _ in names]
    for e in range(E):
        for i, name in enumerate(names):
            found, value = make(rng, *((H, I) if name in ("down_proj", "w2") else (I, H)))
            tensors |= {f"{prefix}.{e}.{name}{suffix}": tensor for suffix, tensor in found.items()}
            dense[i].append(value)
    return tensors, [np.stack(part) for part in dense]


def fp8_block(suffix, scale_dtype=np.float32):
    def make(rng, n, k):
        codes = (rng.normal(size=(n, k)) * 50).astype(E4M3)
        scale = 2.0 ** rng.integers(-9, -5, (-(-n // 128), -(-k // 128)))
        scale = scale.astype(scale_dtype)
        spread = scale.astype(np.float64).repeat(128, 0)[:n].repeat(128, 1)[:, :k]
        return {".weight": codes, suffix: scale}, (codes.astype(np.float64) * spread).T

    return make


def fp8_rows(kind):
    def make(rng, n, k):
        codes = (rng.normal(size=(n, k)) * 50).astype(E4M3)
        shape = {"tensor": (), "channel": (n, 1), "group": (n, -(-k // 128))}[kind]
        scale = rng.uniform(0.001, 0.01, shape).astype(BF16)
        found = {".weight": codes, ".weight_scale": scale, ".input_scale": np.float32(1)}
        wide = scale.astype(np.float64)
        wide = wide.repeat(128, 1)[:, :k] if kind == "group" else wide
        return found, (codes.astype(np.float64) * wide).T

    return make


def packed_fp4(weight_suffix, scale_suffix, weight_dtype, scale_dtype):
    def make(rng, n, k):
        data = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
        bits = rng.integers(118, 125, (n, k // 32), dtype=np.uint8)
        found = {weight_suffix: data.view(weight_dtype), scale_suffix: bits.view(scale_dtype)}
        return found, files.fp4(data, 2.0 ** (bits.astype(float) - 127))

    return make


def mxfp8(rng, n, k):
    codes = (rng.normal(size=(n, k)) * 50).astype(E4M3)
    bits = rng.integers(116, 120, (n, k // 32), dtype=np.uint8)
    dense = codes.astype(np.float64) * (2.0 ** (bits.astype(float) - 127)).repeat(32, 1)
    return {".weight": codes, ".weight_scale": bits}, dense.T


def gptq8(zeros, plus):
    return gptq(8, 32, zeros, plus)


def gptq(bits, group, zeros, plus):
    """`group` -1 is one group."""

    def make(rng, n, k):
        size = k if group == -1 else group
        codes, shape = rng.integers(0, 2**bits, (k, n)), (k // size, n)
        z = np.full(shape, 2 ** (bits - 1)) if zeros is None else rng.integers(1, 2**bits, shape)
        scale = rng.uniform(0.001, 0.002, shape).astype(np.float16)
        rows = np.arange(k) // size
        found = {
            ".qweight": files.join(codes, bits, 0),
            ".qzeros": files.join(z - plus, bits, 1),
            ".scales": scale,
            ".g_idx": rows.astype(np.int32),
        }
        return found, (codes - z[rows]) * scale.astype(float)[rows]

    return make


def compressed(bits, group, symmetric, dtype, shuffled=False):
    """`group` -1 is one group."""

    def make(rng, n, k):
        size = k if group == -1 else group
        codes, groups = rng.integers(0, 2**bits, (n, k)), k // size
        z = np.full((n, groups), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (n, groups))
        scale = rng.uniform(0.01, 0.02, (n, groups)).astype(dtype)
        rows = np.arange(k) // size
        if shuffled:  # the same for gate and up of an expert, as their input is
            rows = np.random.default_rng(k).permutation(rows)
        found = {
            ".weight_packed": files.join(codes, bits, 1),
            ".weight_scale": scale,
            ".weight_shape": np.asarray([n, k]),
        }
        if shuffled:
            found[".weight_g_idx"] = rows.astype(np.int32)
        if not symmetric:
            found[".weight_zero_point"] = files.join(z, bits, 0)
        return found, ((codes - z[:, rows]) * scale.astype(float)[:, rows]).T

    return make


def hqq(bits, dtype=np.float16, size=64):
    """`size` -1 is one group."""

    def make(rng, n, k):
        group = k if size == -1 else size
        codes = rng.integers(0, 2**bits, (n * k // group, group), dtype=np.uint8)
        half = len(codes) // 2
        data = codes[:half] << 4 | codes[half:] if bits == 4 else codes
        scale, zero = (rng.uniform(low, high, (len(codes), 1)).astype(dtype) for low, high in ((0.01, 0.02), (3, 9)))
        found = {
            ".W_q": data,
            ".scale": scale,
            ".zero": zero,
            ".axis": np.asarray(1),
            ".nbits": np.asarray(bits),
            ".group_size": np.asarray(group),
            ".shape": np.asarray([n, k]),
        }
        return found, ((codes - zero.astype(float)) * scale.astype(float)).reshape(n, k).T

    return make


def ct_config(bits=4, group=32, symmetric=True, **weights):
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group,
    } | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}}
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


@pytest.mark.parametrize("tool", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_integer_groups(save, rng, monkeypatch, bits, group, symmetric, tool):
    monkeypatch.setitem(globals(), "H", 256)
    monkeypatch.setitem(globals(), "I", 256)
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, 128, -1])
def test_hqq_groups(save, rng, monkeypatch, bits, group):
    monkeypatch.setitem(globals(), "H", 256)
    monkeypatch.setitem(globals(), "I", 256)
    tensors, dense = expert_tensors(rng, hqq(bits, size=group))
    layer = load_moe_layer(save({"model_type": "qwen3_moe", "quantization_config": HQQ}, tensors | router(rng)), 0)
    assert layer.down.group_size == (256 if group == -1 else group)
    check(layer, *dense)


@pytest.mark.parametrize("kind", ["block", "group"])
def test_fp8_groups(save, rng, monkeypatch, kind):
    monkeypatch.setitem(globals(), "H", 320)
    monkeypatch.setitem(globals(), "I", 192)
    make = fp8_block(".weight_scale_inv") if kind == "block" else fp8_rows("group")
    tensors, dense = expert_tensors(rng, make)
    path = save({"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}}, tensors | router(rng))
    layer = load_moe_layer(path, 0)
    assert (layer.gate_up.num_groups, layer.down.num_groups) == (3, 2)
    check(layer, *dense)


def modelopt_nvfp4(rng, n, k):
    data = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    blocks = rng.integers(0, 0x7F, (n, k // 16), dtype=np.uint8).view(E4M3)
    factor = np.float32(rng.uniform(0.01, 0.1))
    found = {".weight": data, ".weight_scale": blocks, ".weight_scale_2": factor}
    return found, files.fp4(data, blocks, float(factor))


MODULE = "model.layers.{}.mlp.experts.*"
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
    monkeypatch.setitem(globals(), "E", 8)
    make = gptq(4, 32, None, 1)
    tensors, experts = expert_tensors(rng, make)
    found, dense = make(rng, E, H)
    tensors |= {f"model.layers.0.mlp.gate{suffix}": tensor for suffix, tensor in found.items()}
    quantization = GPTQ | {"bits": 4, "sym": True}
    path = save({"model_type": "qwen3_moe", "num_experts": E, "quantization_config": quantization}, tensors)
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
    for quantize, size in ((None, 32), ("int8", 32), ("int4", 64)):
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
    ({"axis": 1}, {".axis": np.asarray(0)}, "HQQ axis 0; only axis 1 has groups along K"),
    ({"axis": 1}, {".axis": np.asarray([1, 1])}, r"down_proj\.axis is \[1, 1\]; it must be one integer"),
    ({"axis": 1}, {".nbits": np.float32(np.nan)}, r"down_proj\.nbits is nan; it must be one integer"),
    ({"axis": 1}, {".group_size": np.asarray(48)}, "HQQ group_size 48; it must be 64, or one of"),
    ({"axis": 1}, {".view_as_float": np.asarray(True)}, "HQQ view_as_float; only float scales"),
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


FAMILIES = [
    # model type, prefix of the layer, names of the linears, router, further tensors, further config
    ("mixtral", "model.layers.0.block_sparse_moe", ("w1", "w3", "w2"), "gate.weight", {}, {}),
    (
        "minimax_m2",
        "model.layers.0.block_sparse_moe",
        ("w1", "w3", "w2"),
        "gate.weight",
        {"e_score_correction_bias": (E,)},
        {},
    ),
    ("olmoe", "model.layers.0.mlp", None, "gate.weight", {}, {}),
    ("qwen3_vl_moe", "model.language_model.layers.0.mlp", None, "gate.weight", {}, {}),
    (
        "qwen2_moe",
        "model.layers.0.mlp",
        None,
        "gate.weight",
        {"shared_expert_gate.weight": (1, H)},
        {"shared": "shared_expert"},
    ),
    ("deepseek_v2", "model.layers.0.mlp", None, "gate.weight", {}, {"shared": "shared_experts"}),
    (
        "deepseek_v3",
        "model.layers.0.mlp",
        None,
        "gate.weight",
        {"gate.e_score_correction_bias": (E,)},
        {"shared": "shared_experts", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    ),
    (
        "kimi_k25",
        "language_model.model.layers.0.mlp",
        None,
        "gate.weight",
        {"gate.e_score_correction_bias": (E,)},
        {"n_group": 1, "topk_group": 1},
    ),
    (
        "deepseek_v4",
        "layers.0.ffn",
        ("w1", "w3", "w2"),
        "gate.weight",
        {"gate.bias": (E,)},
        {"shared": "shared_experts"},
    ),
    (
        "llama4",
        "model.layers.0.feed_forward",
        None,
        "router.weight",
        {},
        {"shared": "shared_expert", "num_experts_per_tok": 1},
    ),
    (
        "nemotron_h",
        "backbone.layers.0.mixer",
        ("up_proj", "down_proj"),
        "gate.weight",
        {"gate.e_score_correction_bias": (E,)},
        {"mlp_hidden_act": "relu2", "shared": "shared_experts", "routed_scaling_factor": 2.5},
    ),
]


@pytest.mark.parametrize(("model_type", "block", "names", "router_name", "further", "config"), FAMILIES)
def test_families(save, rng, model_type, block, names, router_name, further, config):
    names = names or ("gate_proj", "up_proj", "down_proj")
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16), names, f"{block}.experts")
    tensors |= router(rng, f"{block}.{router_name}")
    tensors |= {f"{block}.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in further.items()}
    config = dict(config)
    shared, extra = config.pop("shared", None), None
    gated = len(names) == 3
    activation = silu if gated else lambda _, u: np.maximum(u, 0) ** 2
    if shared:
        parts = [weight(rng, *((H, 96) if name in ("down_proj", "w2") else (96, H))) for name in names]
        tensors |= {f"{block}.{shared}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
        *first, last = (part.astype(np.float64).T for part in parts)
        gate = tensors.get(f"{block}.shared_expert_gate.weight")

        def extra(x):
            y = activation(x @ first[0] if gated else None, x @ first[-1]) @ last
            return y if gate is None else y / (1 + np.exp(-(x @ gate.astype(np.float64).T)))

    config |= {"model_type": model_type, "quantization_config": ct_config()}
    path = save(config, tensors)
    layer = load_moe_layer(path, 0)
    dense = dense if gated else [None, *dense]
    check(layer, *dense)
    assert (layer.shared is not None) == bool(shared)
    run_and_compare(layer, rng, *dense, activation, extra=extra)
    for name in (router_name, *further):
        without = save(config, {key: value for key, value in tensors.items() if key != f"{block}.{name}"})
        with pytest.raises(ValueError, match=f"has no tensor {block}.{name}"):
            load_moe_layer(without, 0)


def test_promised_shared_experts_must_be_there(save, rng):
    tensors, _ = expert_tensors(rng, compressed(4, 32, True, np.float16))
    tensors |= router(rng) | {"model.layers.0.mlp.gate.e_score_correction_bias": np.zeros(E, np.float32)}
    config = {"model_type": "deepseek_v3", "n_group": 1, "n_shared_experts": 1, "quantization_config": ct_config()}
    with pytest.raises(ValueError, match=r"has no tensors .*shared_experts.* says n_shared_experts = 1"):
        load_moe_layer(save(config, tensors), 0)


def test_minimax_m3_names_its_shared_expert_otherwise(save, rng):
    block = "model.layers.0.block_sparse_moe"
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16), ("w1", "w3", "w2"), f"{block}.experts")
    shared = {name: weight(rng, *((H, 96) if name == "down_proj" else (96, H))) for name in ("gate_proj", "up_proj")}
    shared["down_proj"] = weight(rng, H, 96)
    tensors |= {f"{block}.shared_experts.{name}.weight": part for name, part in shared.items()}
    tensors |= router(rng, f"{block}.gate.weight") | {f"{block}.e_score_correction_bias": np.zeros(E, np.float32)}
    layer = load_moe_layer(save({"model_type": "minimax_m3", "quantization_config": ct_config()}, tensors), 0)
    gate, up, down = (part.astype(np.float64).T for part in shared.values())
    assert (layer.routing.scale, layer.activation.parameters) == (2.0, (7.0, 1.702, 1.0))
    run_and_compare(layer, rng, *dense, clamped, extra=lambda x: clamped(x @ gate, x @ up) @ down)


def test_quantised_shared_experts_stay_packed(save, rng):
    tensors, _ = expert_tensors(rng, fp8_block(".weight_scale_inv"))
    shared, one = {}, []
    for name in ("gate_proj", "up_proj", "down_proj"):
        found, value = fp8_block(".weight_scale_inv")(rng, *((H, I) if name == "down_proj" else (I, H)))
        shared |= {f"model.layers.0.mlp.shared_experts.{name}{suffix}": tensor for suffix, tensor in found.items()}
        one.append(value)
    config = {
        "model_type": "deepseek_v3",
        "n_group": 1,
        "n_shared_experts": 1,
        "quantization_config": {"quant_method": "fp8"},
    }
    tensors |= {"model.layers.0.mlp.gate.e_score_correction_bias": np.zeros(E, np.float32)}
    layer = load_moe_layer(save(config, tensors | shared | router(rng)), 0)
    assert layer.shared.gate_up.num_experts == 1
    np.testing.assert_array_equal(oracle.dense(layer.shared.down)[0], one[2])


def test_hash_layers_of_deepseek_v4(save, rng):
    tensors, _ = expert_tensors(
        rng, packed_fp4(".weight", ".scale", np.int8, E8M0), ("w1", "w3", "w2"), "layers.0.ffn.experts"
    )
    table = rng.integers(0, E, (10, 2))
    tensors |= router(rng, "layers.0.ffn.gate.weight") | {"layers.0.ffn.gate.tid2eid": table}
    config = {"model_type": "deepseek_v4", "swiglu_limit": 10.0, "quantization_config": {"quant_method": "fp8"}}
    layer = load_moe_layer(save(config, tensors), 0)
    assert layer.activation.parameters == (10.0, 1.0, 0.0)
    x = jnp.asarray(rng.normal(size=(3, H)), jnp.float32)
    _, ids = layer.route(x, jnp.asarray([4, 4, 9]))
    np.testing.assert_array_equal(ids, table[[4, 4, 9]])
    with pytest.raises(ValueError, match="token_ids is None"):
        layer.route(x)


def test_gemma(save, rng):
    up = (rng.normal(size=(E, 2 * I, H)) * 0.1).astype(BF16)
    down = (rng.normal(size=(E, H, I)) * 0.1).astype(BF16)
    layer = "model.language_model.layers.0."
    scale, factors = rng.uniform(1, 2, H).astype(BF16), rng.uniform(1, 2, E).astype(BF16)
    tensors = {
        f"{layer}experts.gate_up_proj": up,
        f"{layer}experts.down_proj": down,
        f"{layer}router.scale": scale,
        f"{layer}router.per_expert_scale": factors,
        f"{layer}mlp.gate_proj.weight": np.zeros((8, H), BF16),
    } | router(rng, f"{layer}router.proj.weight")
    text = {"model_type": "gemma4_text", "top_k_experts": 2, "hidden_activation": "gelu_pytorch_tanh"}
    loaded = load_moe_layer(
        save({"model_type": "gemma4", "text_config": text}, tensors), 0, quantize="int8", group_size=32
    )
    assert loaded.activation == "gelu_tanh"
    x = rng.normal(size=(5, H)).astype(np.float32)
    weights, ids = loaded.route(jnp.asarray(x))
    rows = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * scale.astype(float) / np.sqrt(H)
    logits = rows @ tensors[f"{layer}router.proj.weight"].astype(float).T
    for t in range(5):
        best = np.argsort(-logits[t])[:2]
        p = np.exp(logits[t][best])
        np.testing.assert_array_equal(ids[t], best)
        np.testing.assert_allclose(weights[t], p / p.sum() * factors.astype(float)[best], rtol=1e-5)
    np.testing.assert_array_equal(loaded.gate_up.packed, jmm.quantize(up.swapaxes(1, 2), "int8", group_size=32).packed)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_plain_experts(save, rng, transposed):
    """[E, 2 I, H] and [E, H, 2 I]: the shapes tell."""
    up, down = (
        (rng.normal(size=(E, 3 * H, H)) * 0.1).astype(BF16),
        (rng.normal(size=(E, H, 3 * H // 2)) * 0.1).astype(BF16),
    )
    module = "model.layers.0.feed_forward.experts."
    stored = [part.swapaxes(1, 2) if transposed else part for part in (up, down)]
    tensors = {f"{module}gate_up_proj": stored[0], f"{module}down_proj": stored[1]}
    config = {"model_type": "llama4_text", "num_experts_per_tok": 1, "moe_intermediate_size": 3 * H // 2}
    path = save(config, tensors | router(rng, "model.layers.0.feed_forward.router.weight"))
    layer = load_moe_layer(path, 0, quantize="int8", group_size=64)
    for loaded, dense in ((layer.gate_up, up), (layer.down, down)):
        np.testing.assert_array_equal(loaded.packed, jmm.quantize(dense.swapaxes(1, 2), "int8", group_size=64).packed)


def test_sizes_that_are_padded(save, rng, monkeypatch):
    monkeypatch.setitem(globals(), "I", 96)  # gate and up are padded to 128 columns each
    tensors, dense = expert_tensors(rng, compressed(4, 32, True, np.float16))
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": 96, "quantization_config": ct_config()}
    layer = load_moe_layer(save(config, tensors | router(rng)), 0)
    assert layer.gate_up.column_padding == (32, 32)
    check(layer, *dense)
    run_and_compare(layer, rng, *dense, silu)


def test_layers_are_those_with_experts(save, rng):
    tensors, _ = expert_tensors(rng, compressed(4, 32, True, np.float16), prefix="model.layers.3.mlp.experts")
    tensors |= {"model.layers.3.mlp.gate.e_score_correction_bias": np.zeros(E, np.float32)}
    beyond = {name.replace("layers.3", "layers.5"): value for name, value in tensors.items()}
    mtp = {f"mtp.{name.removeprefix('model.')}": value for name, value in tensors.items()}
    dense = {"model.layers.0.mlp.gate_proj.weight": weight(rng, I, H)}
    config = {"model_type": "deepseek_v3", "n_group": 1, "num_hidden_layers": 5, "quantization_config": ct_config()}
    path = save(config, tensors | beyond | mtp | dense | router(rng, "model.layers.3.mlp.gate.weight"))
    assert [number for number, _ in load_moe_layers(path)] == [3]
    with pytest.raises(ValueError, match="layer 0 has no experts; layers with experts: 3 to 3"):
        load_moe_layer(path, 0)


def test_latent_experts_are_refused(save, rng):
    tensors, _ = expert_tensors(
        rng, compressed(4, 32, True, np.float16), ("up_proj", "down_proj"), "backbone.layers.0.mixer.experts"
    )
    config = {"model_type": "nemotron_h", "moe_latent_size": 64, "quantization_config": ct_config()}
    path = save(config, tensors | router(rng, "backbone.layers.0.mixer.gate.weight"))
    with pytest.raises(ValueError, match="moe_latent_size is 64; experts behind a latent projection"):
        load_moe_layer(path, 0)
