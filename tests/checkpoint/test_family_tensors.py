"""Families without a genuine file: tiny checkpoints with their names, against numpy on their tensors."""

import checkpoint_files as files
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scheme_tensors import (
    BF16,
    E8M0,
    E,
    H,
    I,
    check,
    clamped,
    compressed,
    ct_config,
    expert_tensors,
    fp8_block,
    packed_fp4,
    router,
    run_and_compare,
    silu,
    weight,
)

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import convert, load_moe_layer, load_moe_layers


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


def with_wide_shared(save, rng, scheme, *, width, family):
    """A checkpoint whose shared expert has this width, the values of its experts, and of the shared one."""
    tensors, dense = expert_tensors(rng, scheme)
    module = "model.layers.0.mlp.shared_expert" + ("s" if family == "deepseek_v2" else "")
    shared = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        found, value = scheme(rng, *((H, width) if name == "down_proj" else (width, H)))
        tensors |= {f"{module}.{name}{suffix}": tensor for suffix, tensor in found.items()}
        shared.append(value)
    config = {"model_type": family, "quantization_config": ct_config()}
    gate = None
    if family == "qwen2_moe":
        config["shared_expert_intermediate_size"] = width
        gate = rng.normal(size=(1, H)).astype(BF16)
        tensors[f"{module}_gate.weight"] = gate
    else:
        config |= {"n_shared_experts": width // I}
    return save(config, tensors | router(rng)), dense, shared, gate


@pytest.mark.parametrize(("family", "count"), [("deepseek_v2", 2), ("qwen2_moe", 3)])
def test_a_shared_expert_as_wide_as_several_becomes_as_many(save, rng, family, count, caplog, tmp_path):
    scheme = compressed(4, 32, True, np.float16)
    folder, dense, shared, gate = with_wide_shared(save, rng, scheme, width=count * I, family=family)
    with caplog.at_level("INFO", logger="jax_marlin_moe"):
        layer = load_moe_layer(folder, 0)
    assert "not in the launch" not in caplog.text
    assert (layer.shared.down.num_experts, layer.shared.down.k, layer.shared.gate_up.n) == (count, I, 2 * I)
    np.testing.assert_array_equal(oracle.dense(layer.shared.down).reshape(count * I, H), shared[2])
    gate_up = oracle.dense(layer.shared.gate_up)
    for half, wanted in zip((gate_up[..., :I], gate_up[..., I:]), shared, strict=False):
        np.testing.assert_array_equal(np.concatenate(list(half), axis=1), wanted)

    def extra(x):
        y = (silu(x @ shared[0], x @ shared[1])) @ shared[2]
        return y if gate is None else y / (1 + np.exp(-x @ gate.astype(np.float64).T))

    run_and_compare(layer, rng, *dense, silu, extra=extra)
    convert(folder, tmp_path / "packed")
    again = load_moe_layer(tmp_path / "packed", 0)
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    jax.tree.map(np.testing.assert_array_equal, again, layer)


def test_the_log_says_why_a_shared_expert_is_not_split(save, rng, caplog):
    scheme = compressed(4, 32, True, np.float16)
    folder, *_ = with_wide_shared(save, rng, scheme, width=I + I // 2, family="qwen2_moe")
    with caplog.at_level("INFO", logger="jax_marlin_moe"):
        layer = load_moe_layer(folder, 0)
    assert layer.shared.down.num_experts == 1
    assert "not in the launch of the others: its intermediate size 96 is not a multiple of that of the" in caplog.text


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
    weights, ids = loaded.route(jax.device_put(x))
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
