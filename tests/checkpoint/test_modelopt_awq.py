"""AWQ of ModelOpt, W4A8 and its kin: what the files mean in float64, whose inputs are scaled, and what is refused."""

import pathlib

import checkpoint_files as files
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from byte_blocks import in_fixed_units, relative_error
from scheme_tensors import BF16, E, H, I, check, expert_tensors, modelopt_nvfp4, router, silu

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import Checkpoint, convert, load_moe_layer
from jax_marlin_moe.checkpoint.linears import Linear
from jax_marlin_moe.checkpoint.pre_quant_scales import scales_of_up
from jax_marlin_moe.checkpoint.tensors import TensorFolder

DATA = pathlib.Path(__file__).parents[1] / "data" / "ck_modelopt_w4a8"
EXPERTS = "model.layers.0.mlp.experts"
W4A8 = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": 32, "pre_quant_scale": True}


def signed(data):
    """Bytes [N / 2, K] to integers [N, K]: output feature 2 i in the low nibble of row i, two's complement."""
    pairs = np.stack([data & 15, data >> 4], axis=1).reshape(-1, data.shape[1]).astype(int)
    return np.where(pairs < 8, pairs, pairs - 16)


def awq(group, scales, dtype=np.float32):
    """Tensors of a linear of W4A8_AWQ whose input is scaled by `scales[k]`, and its dense weight without that."""

    def make(rng, n, k):
        data = rng.integers(0, 256, (n // 2, k), dtype=np.uint8)
        scale = rng.uniform(0.005, 0.01, (n, k // group)).astype(dtype)
        found = {
            ".weight": data,
            ".weight_scale": scale,
            ".weight_scale_2": np.float32(0.002),
            ".input_scale": np.float32(rng.uniform(0.01, 0.03)),
        }
        if scales is not None:
            found[".pre_quant_scale"] = scales[k]
        return found, (signed(data) * scale.astype(float).repeat(group, 1)).T

    return make


def factors(rng, dtype=BF16):
    return {k: rng.uniform(0.5, 2, k).astype(dtype) for k in (H, I)}


def block(layer, x, gate, up, down, scales, quantise=lambda rows, scale: rows):
    """float64: x and the activation's result times their factors, quantised by the file's scales if asked for."""
    weights, ids = (np.asarray(a, np.float64) for a in layer.route(jax.device_put(x)))
    rows = quantise(np.asarray(x * scales[H].astype(x.dtype)), layer.x_scale)
    out = np.zeros(x.shape)
    for t in range(len(x)):
        for w, e in zip(weights[t], ids[t].astype(int), strict=True):
            hidden = silu(rows[t] @ gate[e], rows[t] @ up[e]) * scales[I].astype(float)
            out[t] += w * (quantise(hidden[None], layer.intermediate_scales[e])[0] @ down[e])
    return out


def in_units(rows, scale):
    codes, scale = in_fixed_units(rows, scale)
    return codes * np.float64(scale)


def saved(save, make, rng, quantization=W4A8, **config):
    tensors, dense = expert_tensors(rng, make)
    return save({"model_type": "qwen3_moe", "quantization_config": quantization} | config, tensors | router(rng)), dense


def test_a_layer_scales_the_input_of_its_experts(save, rng, tmp_path):
    scales = factors(rng)
    path, (gate, up, down) = saved(save, awq(32, scales), rng)
    layer = load_moe_layer(path, 0)
    # The factors of down's input are in the scales of up.
    check(layer, gate, up * scales[I].astype(float), down)
    assert (layer.gate_up.format.name, layer.gate_up.group_size, layer.down.group_size) == ("int4", 32, 32)
    np.testing.assert_array_equal(layer.expert_input_scale, scales[H])
    x = rng.normal(size=(9, H)).astype(BF16)
    y = layer(jax.device_put(x))
    assert relative_error(y, block(layer, x, gate, up, down, scales)) < 5e-3
    assert Checkpoint(path).activation_dtype(0) == "float8_e4m3fn"
    quantised = layer(jax.device_put(x), activation_dtype="float8_e4m3fn")
    wanted = block(layer, x, gate, up, down, scales, in_units)
    assert relative_error(quantised, wanted) < 6e-3  # of bfloat16, and of hidden values next to a tie
    assert relative_error(y, wanted) > 1e-2
    convert(path, tmp_path / "packed")
    np.testing.assert_array_equal(load_moe_layer(tmp_path / "packed", 0)(jax.device_put(x)), y)


def test_what_modelopt_wrote_is_what_its_definition_says(rng):
    layer, tensors = load_moe_layer(DATA, 0), files.read(DATA / "model.safetensors")
    scale_of_down = tensors[f"{EXPERTS}.0.down_proj.pre_quant_scale"].astype(float)
    assert scale_of_down.std() > 0.1
    dense = []
    for part in ("gate_proj", "up_proj", "down_proj"):
        of_experts = []
        for e in range(4):
            found = {s: tensors[f"{EXPERTS}.{e}.{part}.{s}"] for s in ("weight", "weight_scale")}
            of_experts.append((signed(found["weight"]) * found["weight_scale"].astype(float).repeat(32, 1)).T)
        dense.append(np.stack(of_experts))
    gate, up, down = dense
    gate_up = np.concatenate([gate, up * scale_of_down], axis=2)
    np.testing.assert_allclose(oracle.dense(layer.gate_up), gate_up, rtol=2**-22, atol=0)
    np.testing.assert_allclose(oracle.dense(layer.down), down, rtol=2**-22, atol=0)
    np.testing.assert_array_equal(layer.expert_input_scale, tensors[f"{EXPERTS}.2.up_proj.pre_quant_scale"])
    x_scales = [tensors[f"{EXPERTS}.{e}.{part}.input_scale"] for e in range(4) for part in ("gate_proj", "up_proj")]
    assert layer.x_scale == max(x_scales)
    # ModelOpt multiplies weights by the inverse of what it multiplies rows by: the experts are those of the model.
    x = rng.normal(size=(9, 128)).astype(BF16)
    scales = {H: np.asarray(layer.expert_input_scale), I: tensors[f"{EXPERTS}.0.down_proj.pre_quant_scale"]}
    y = layer(jax.device_put(x), activation_dtype=Checkpoint(DATA).activation_dtype(0))
    assert relative_error(y, block(layer, x, gate, up, down, scales, in_units)) < 6e-3


def test_a_linear_with_a_scaled_input_is_the_callers_to_scale():
    name, checkpoint = "model.layers.0.self_attn.o_proj", Checkpoint(DATA)
    with pytest.raises(ValueError, match=r"o_proj\.pre_quant_scale multiplies .* and pass scaled_input=True"):
        checkpoint.linear(name)
    packed, tensors = checkpoint.linear(name, scaled_input=True), files.read(DATA / "model.safetensors")
    wanted = signed(tensors[f"{name}.weight"]) * tensors[f"{name}.weight_scale"].astype(float).repeat(32, 1)
    np.testing.assert_allclose(oracle.dense(packed)[0], wanted.T, rtol=2**-22, atol=0)
    assert checkpoint.linear("model.layers.0.self_attn.q_proj").n == 128  # that of q, k and v is in the norm


def test_a_layer_over_devices_has_the_factors_of_its_shares(save, rng):
    path, _ = saved(save, awq(32, factors(rng)), rng)
    whole = load_moe_layer(path, 0)
    mesh = jax.make_mesh((1, 1), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = load_moe_layer(path, 0, sharding=jmm.sharding.MoESharding(mesh))
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_mixed_model_says_it_layer_by_layer(save, rng):
    linears = [f"{EXPERTS}.{e}.{part}_proj" for e in range(E) for part in ("gate", "up", "down")]
    stated = {"quant_algo": "W4A8_AWQ", "group_size": 32, "has_zero_point": False, "pre_quant_scale": True}
    numbers = {"dynamic": False, "type": "float", "group_size": 32}  # as ModelOpt has them of this algorithm
    group = {"weights": numbers | {"num_bits": 4}, "input_activations": numbers | {"num_bits": 8}, "targets": linears}
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "config_groups": {"group_0": group}}
    mixed |= {"quantized_layers": dict.fromkeys(linears, stated)}
    path, _ = saved(save, awq(32, factors(rng)), rng, mixed)
    layer = load_moe_layer(path, 0)
    assert (layer.gate_up.format.name, layer.gate_up.group_size) == ("int4", 32)
    assert Checkpoint(path).activation_dtype(0) == "float8_e4m3fn"
    assert layer.x_scale is not None
    stated["group_size"] = 64
    path, _ = saved(save, awq(32, None), rng, mixed)
    with pytest.raises(ValueError, match=r"quantized_layers\..*group_size is 64; it must be 32"):
        load_moe_layer(path, 0)


def test_nvfp4_awq_has_factors_of_x_alone(save, rng):
    scales = rng.uniform(0.5, 2, H).astype(BF16)

    def make(rng, n, k):
        found, dense = modelopt_nvfp4(rng, n, k)
        return found | ({".pre_quant_scale": scales} if n == I else {}), dense

    nvfp4 = {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ", "group_size": 16}
    path, dense = saved(save, make, rng, nvfp4)
    layer = load_moe_layer(path, 0)
    check(layer, *dense)
    np.testing.assert_array_equal(layer.expert_input_scale, scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "another expert's",
            r"experts\.1\.gate_proj\.pre_quant_scale differs from .*experts\.0\.gate.*export_hf_checkp",
        ),
        ("missing", r"has no tensor .*experts\.3\.up_proj\.pre_quant_scale, although .*experts\.0\.gate_proj"),
        ("negative", r"experts\.2\.down_proj\.pre_quant_scale holds values that are not positive and finite"),
        ("short", r"experts\.0\.gate_proj\.pre_quant_scale has shape \(5,\); it must be \(128,\)"),
        ("e4m3 scales", r"down_proj\.pre_quant_scale multiplies .* format nvfp4, are not floats .* must be 1"),
        (
            "another group size",
            r"config\.json: group_size is 64; it must be 32, that of the tensors of .*experts\.0\.gate",
        ),
        (
            "5 groups",
            r"gate_proj\.weight_scale has shape \(64, 5\); it must be \(64, groups\), groups that divide K = 128",
        ),
        (
            "groups of 8",
            r"gate_proj\.weight_scale has 16 groups of 8 rows; groups must have 16, 32, 64, 128 or all 128",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(save, rng, change, message):
    scales, quantization = factors(rng), W4A8
    make = awq(32, scales)
    if change == "e4m3 scales":
        quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}

        def make(rng, n, k):
            found, dense = modelopt_nvfp4(rng, n, k)
            return found | {".pre_quant_scale": scales[k]}, dense

    if change == "another group size":
        quantization = W4A8 | {"group_size": 64}
    tensors, _ = expert_tensors(rng, make)
    if change == "another expert's":
        tensors[f"{EXPERTS}.1.gate_proj.pre_quant_scale"] = scales[H] * BF16(1.5)
    elif change == "missing":
        del tensors[f"{EXPERTS}.3.up_proj.pre_quant_scale"]
    elif change == "negative":
        tensors[f"{EXPERTS}.2.down_proj.pre_quant_scale"] = -scales[I]
    elif change == "short":
        tensors[f"{EXPERTS}.0.gate_proj.pre_quant_scale"] = scales[H][:5]
    elif change in ("5 groups", "groups of 8"):
        tensors[f"{EXPERTS}.0.gate_proj.weight_scale"] = np.ones((I, 5 if change == "5 groups" else 16), np.float32)
    path = save({"model_type": "qwen3_moe", "quantization_config": quantization}, tensors | router(rng))
    with pytest.raises(ValueError, match=message):
        load_moe_layer(path, 0)


def test_a_factor_that_does_not_pass_the_activation_is_refused_by_name(save, rng):
    path, _ = saved(save, awq(32, factors(rng)), rng)
    downs = [[Linear(f"{EXPERTS}.{e}.down_proj")] for e in range(E)]

    def found(activation):
        return scales_of_up(TensorFolder(path), downs, I, "int4", activation)

    assert found("gelu_tanh").shape == found(jmm.swiglu(float("inf"), 1.702, 0.0)).shape == (E, I)
    for activation in (jmm.swiglu(7.0, 1.702, 1.0), "relu2", "silu_ungated", jmm.situ(4.0, 25.0)):
        with pytest.raises(ValueError, match=r"pre_quant_scale multiplies the result of the activation .* must be 1"):
            found(activation)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_stacks_in_memory_are_packed_alike(rng, dtype):
    made = [awq(32, None, dtype)(rng, 64, 128) for _ in range(2)]
    stacks = (np.stack([found[suffix] for found, _ in made]) for suffix in (".weight", ".weight_scale"))
    packed = jmm.from_modelopt_awq(*map(jnp.asarray, stacks))
    np.testing.assert_allclose(oracle.dense(packed), np.stack([dense for _, dense in made]), rtol=2**-22, atol=0)
    assert packed.scales.dtype == dtype
