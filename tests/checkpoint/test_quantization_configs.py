"""What a quantisation config says: read, harmless, or refused by name; and tensors that change a linear's result."""

import dataclasses
import json
import pathlib
import re
import shutil

import checkpoint_files as files
import jax
import ml_dtypes
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import load_moe_layer, patterns
from jax_marlin_moe.checkpoint.schemes import METHODS

DATA = pathlib.Path(__file__).parents[1] / "data"
MODULE = "model.layers.0.mlp"
LAYERS = "model.layers.*.mlp.experts*"


@pytest.fixture
def copy(tmp_path):
    """A folder of tests/data with changes to its quantisation config and its tensors."""

    def make(name, *, config=None, tensors=None, drop=()):
        path = tmp_path / name
        shutil.copytree(DATA / name, path)
        values = json.loads((path / "config.json").read_text())
        if config is not None:
            config(values["quantization_config"])
            (path / "config.json").write_text(json.dumps(values))
        if tensors is not None or drop:
            found = files.read(path / "model.safetensors")
            found = {key: value for key, value in found.items() if key not in drop} | (tensors or {})
            files.write(path / "model.safetensors", found)
        return path

    return make


def weights_of(config):
    return config["config_groups"]["group_0"]["weights"]


REFUSED = [
    ("ck_awq", lambda c: c.update(surprise=1), r"config\.json: surprise is 1; it must be omitted"),
    ("ck_awq", lambda c: c.update(group_size=96), "group_size is 96; it must be -1"),
    ("ck_awq", lambda c: c.update(zero_point="true"), "zero_point is 'true'; it must be true or false"),
    ("ck_awq", lambda c: c.update(pack_dtype="int16"), "pack_dtype is 'int16'; it must be one of 'int32'"),
    ("ck_awq", lambda c: c.update(bits=4.0), r"bits is 4\.0; it must be an integer"),
    ("ck_q3_gptq_False", lambda c: c.update(rotation="hadamard"), "rotation is 'hadamard'; it must be off"),
    ("ck_q3_gptq_False", lambda c: c["meta"].update(rotation="random"), r"meta\.rotation is 'random'; it must be off"),
    ("ck_q3_gptq_False", lambda c: c.update(adapter={"path": "x"}), "adapter is {'path': 'x'}; it must be off"),
    ("ck_q3_gptq_False", lambda c: c.update(group_size=24), "group_size is 24; it must be -1"),
    ("ck_q3_gptq_False", lambda c: c.update(desc_act=1), "desc_act is 1; it must be true or false"),
    ("ck_q3_gptq_False", lambda c: c.update(checkpoint_format="gptq_v2"), "zero points other than 8; sym is true"),
    ("ck_q3_gptq_False", lambda c: c.update(dynamic={r"(a)\1": {}}), "pattern .* cannot be matched: it has"),
    ("ck_llmc_W4A16", lambda c: c.update(transform_config={"config_groups": {"r": {}}}), "transform_config is .* off"),
    ("ck_llmc_W4A16", lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is"),
    ("ck_llmc_W4A16", lambda c: weights_of(c).update(group_size=80), r"weights\.group_size is 80; it must be -1"),
    ("ck_llmc_W4A16", lambda c: weights_of(c).update(dynamic=True), r"weights\.dynamic is True; it must be off"),
    ("ck_llmc_W4A16", lambda c: weights_of(c).update(rounding="up"), r"weights\.rounding is 'up'; it must be omitted"),
    ("ck_llmc_NVFP4A16", lambda c: weights_of(c).update(group_size=32), "group_size is 32; it must be 16"),
    ("ck_llmc_MXFP4A16", lambda c: weights_of(c).update(group_size=16), "group_size is 16; it must be 32"),
    ("ck_modelopt", lambda c: c.update(group_size=32), "group_size is 32; it must be 16"),
    ("ck_modelopt", lambda c: c.update(smoothquant={"alpha": 0.5}), "smoothquant is .* it must be off"),
    (
        "ck_llmc_W4A16",
        lambda c: weights_of(c).update(scale_dtype="float16"),
        "scale_dtype is 'float16'; it must be one",
    ),
    (
        "ck_llmc_W4A16",
        lambda c: weights_of(c).update(scale_dtype="torch.float8_e4m3fn"),
        r"scale_dtype is 'torch.float8_e4m3fn'; it must be 'torch.float32', that of .*_proj.weight_scale, F32",
    ),
    ("ck_llmc_W4A16_ASYM", lambda c: weights_of(c).update(zp_dtype="torch.float16"), "zp_dtype is 'torch.float16'; it"),
    ("ck_llmc_W4A16", lambda c: weights_of(c).update(actorder="sorted"), "actorder is 'sorted'; it must be one of"),
    ("ck_llmc_W4A16", lambda c: weights_of(c).update(block_structure=[128, 128]), "block_structure is .* must be null"),
    ("ck_llmc_W4A16", lambda c: c["config_groups"]["group_0"].update(format="marlin-24"), "format is 'marlin-24'; it"),
    ("ck_llmc_MXFP4A16", lambda c: c["config_groups"]["group_0"].update(format="pack-quantized"), "it must be 'mxfp4"),
    (
        "ck_awq",
        lambda c: c.update(packing_format=["auto_awq"]),
        r"packing_format is \['auto_awq'\]; it must be",
    ),
    ("ck_llmc_NVFP4A16", lambda c: weights_of(c).update(type="int"), "type is 'int'; it must be 'float'"),
    ("ck_llmc_NVFP4A16", lambda c: weights_of(c).update(num_bits=8), "num_bits is 8; it must be 4, as the tensors of"),
    ("ck_llmc_NVFP4A16", lambda c: weights_of(c).update(symmetric=False), "symmetric is False; it must be true: codes"),
    ("ck_llmc_NVFP4A16", lambda c: weights_of(c).update(scale_dtype="torch.uint8"), "scale_dtype is 'torch.uint8'; it"),
    ("ck_llmc_NVFP4A16", lambda c: weights_of(c).update(scale_bits=[8, 0]), r"scale_bits is .* must be \[4, 3\]"),
    ("ck_llmc_MXFP4A16", lambda c: weights_of(c).update(scale_dtype="torch.float16"), "scale_dtype is 'torch.float16'"),
    ("ck_llmc_MXFP4A16", lambda c: weights_of(c).update(strategy="tensor"), "strategy is 'tensor'; it must be 'group'"),
    ("ck_modelopt", lambda c: c.update(quantized_layers={LAYERS: {"quant_algo": "FP8"}}), "quant_algo is 'FP8'; it"),
    (
        "ck_modelopt",
        lambda c: c.update(quantized_layers={LAYERS: {"quant_algo": "NVFP4", "group_size": 32}}),
        r"quantized_layers\..*group_size is 32; it must be 16",
    ),
    (
        "ck_modelopt",
        lambda c: c.update(quantized_layers={LAYERS: {"quant_algo": "NVFP4", "rotate": True}}),
        "rotate is True; it must be omitted",
    ),
    ("ck_modelopt", lambda c: c.update(quantized_layers=[LAYERS]), "quantized_layers is .*; it must be an object"),
    ("ck_modelopt", lambda c: c.update(ignore="lm_head"), "ignore is 'lm_head'; it must be a list of strings"),
    ("ck_modelopt", lambda c: c.update(pre_quant_scale="yes"), "pre_quant_scale is 'yes'; it must be true or false"),
    (
        "ck_awq",
        lambda c: c.update(modules_to_not_convert={"gate": 1}),
        "modules_to_not_convert is .* a list of strings",
    ),
    ("ck_q3_gptq_False", lambda c: c.update(static_groups="false"), "static_groups is 'false'; it must be true or"),
    ("ck_llmc_W4A16", lambda c: c.update(kv_cache_scheme=8), "kv_cache_scheme is 8; it must be an object"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_the_loader_does_not_follow_is_refused_by_name(copy, name, change, message):
    with pytest.raises(ValueError, match=message):
        load_moe_layer(copy(name, config=change), 0)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_key_of_a_method_is_of_one_kind(method):
    kinds = [*method.read, *method.harmless, *method.fixed, *method.known]
    assert sorted(kinds) == sorted(set(kinds))
    assert all(reason for reason in method.harmless.values())


HARMLESS = [
    ("ck_awq", lambda c: c.update(modules_to_fuse=None, backend="auto", rotation=None)),
    ("ck_q3_gptq_False", lambda c: c.update(true_sequential=False, damp_percent=0.1, static_groups=True, adapter=None)),
    ("ck_llmc_W4A16", lambda c: c.update(kv_cache_scheme={"num_bits": 8}, transform_config=None)),
    ("ck_modelopt", lambda c: c.update(kv_cache_quant_algo="FP8", pre_quant_scale=True)),
    ("ck_modelopt", lambda c: c.update(quantized_layers={LAYERS: {"quant_algo": "NVFP4", "group_size": 16}})),
    ("ck_llmc_W4A16", lambda c: weights_of(c).update(scale_dtype="torch.float32", actorder="weight")),
    ("ck_llmc_MXFP4A16", lambda c: weights_of(c).update(scale_dtype="torch.float8_e8m0fnu")),
]


@pytest.mark.parametrize(("name", "change"), HARMLESS)
def test_what_does_not_matter_loads_the_same(copy, name, change):
    expected = load_moe_layer(DATA / name, 0)
    for ours, theirs in zip(
        jax.tree.leaves(load_moe_layer(copy(name, config=change), 0)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_scale_of_one_linears_input_is_refused_unless_it_is_one(copy):
    linear = f"{MODULE}.experts.0.gate_proj"
    k = files.read(DATA / "ck_modelopt" / "model.safetensors")[f"{linear}.weight"].shape[1] * 2
    ones = np.ones(k, np.float32)
    path = copy("ck_modelopt", tensors={f"{linear}.pre_quant_scale": ones})
    np.testing.assert_array_equal(
        load_moe_layer(path, 0).gate_up.scales, load_moe_layer(DATA / "ck_modelopt", 0).gate_up.scales
    )
    ones[3] = 0.5
    tensors = files.read(path / "model.safetensors") | {f"{linear}.pre_quant_scale": ones}
    files.write(path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"no tensor .*0\.up_proj\.pre_quant_scale, although {re.escape(linear)}"):
        load_moe_layer(path, 0)


def test_a_shape_that_a_file_states_is_checked(copy):
    linear = f"{MODULE}.experts.1.down_proj"
    path = copy("ck_llmc_NVFP4A16", tensors={f"{linear}.weight_shape": np.asarray([3, 5])})
    with pytest.raises(ValueError, match=r"down_proj\.weight_shape says \[3, 5\]; it must be"):
        load_moe_layer(path, 0)


@pytest.mark.parametrize(
    ("name", "suffix"), [("ck_modelopt", "weight_scale_2"), ("ck_llmc_NVFP4A16", "weight_global_scale")]
)
def test_a_dead_expert_does_not_stop_its_layer(copy, name, suffix):
    linear = f"{MODULE}.experts.0.up_proj"
    tensors = files.read(DATA / name / "model.safetensors")
    codes = f"{linear}.weight" if name == "ck_modelopt" else f"{linear}.weight_packed"
    dead = {key: np.zeros_like(tensors[key]) for key in (codes, f"{linear}.weight_scale", f"{linear}.{suffix}")}
    layer = load_moe_layer(copy(name, tensors=dead), 0)
    half = layer.gate_up.n // 2
    dense = np.asarray(jmm.dense_weights(layer.gate_up))
    assert not dense[0, :, half:].any()
    assert dense[0, :, :half].any()
    shutil.rmtree(copy.__closure__[0].cell_contents / name)
    dead[f"{linear}.{suffix}"] = np.full_like(tensors[f"{linear}.{suffix}"], -1)
    with pytest.raises(ValueError, match=f"{suffix} is -1.0; a global scale must be positive and finite"):
        load_moe_layer(copy(name, tensors=dead), 0)


def test_a_quantised_router_is_dequantised(copy):
    """One with the rows of an expert's gate: as many of its tensors' rows as there are experts."""
    tensors = files.read(DATA / "ck_llmc_W4A16" / "model.safetensors")
    source = f"{MODULE}.experts.0.gate_proj"
    experts = tensors[f"{MODULE}.gate.weight"].shape[0]
    parts = {f"{MODULE}.gate.{s}": tensors[f"{source}.{s}"][:experts] for s in ("weight_packed", "weight_scale")}
    path = copy("ck_llmc_W4A16", tensors=parts, drop=(f"{MODULE}.gate.weight",))
    dense = files.pack_quantized(tensors, source)[:, :experts]
    np.testing.assert_allclose(load_moe_layer(path, 0).router, dense, rtol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(r".*experts", True), (r".*\.mlp\.gate$", False), (r"^(?!.*experts).*", False), (r"model\.layers\.\d+\.", True)],
)
def test_patterns_match_as_regular_expressions_do(pattern, expected):
    text = "model.layers.0.mlp.experts.3.gate_proj"
    assert patterns.matches(pattern, text) is expected is (re.match(pattern, text) is not None)


@pytest.mark.parametrize(
    "pattern", [r"(.*.*)*.*.*=$", r"(\w+\.?)+\$", "(" * 15 + "a*" + ")*" * 15 + "=", "(a|a)*" * 9 + "="]
)
def test_patterns_that_backtrack_without_end_cost_nothing(pattern):
    assert not patterns.matches(pattern, "model.layers.0.mlp.experts." + "a" * 60)


@pytest.mark.parametrize(
    "pattern", ["a" * 1001, "(?i)a", r"(a)\1", "(?<=a)b", "(?P<n>a)", "a++", "[", "a{2000}", ".*" * 31]
)
def test_patterns_without_a_bound_are_refused(pattern):
    with pytest.raises(ValueError, match=r"it has|it is not a regular expression"):
        patterns.matches(pattern, "a")


@pytest.mark.parametrize("name", ["ck_awq", "ck_q3_gptq_True", "ck_modelopt", "ck_llmc_W4A16_ASYM"])
def test_checkpoints_load_under_x64_and_strict_rank_promotion(name):
    expected = load_moe_layer(DATA / name, 0)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        found = load_moe_layer(DATA / name, 0)
        fields = {field.name for field in dataclasses.fields(found.gate_up)}
        assert "group_size" in fields
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("weight_format", jmm.FORMATS)
def test_quantize_works_under_x64_and_strict_rank_promotion(weight_format):
    dense = np.random.default_rng(0).normal(size=(2, 128, 64)).astype(ml_dtypes.bfloat16)
    expected = jmm.quantize(dense, weight_format)
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        found = jmm.quantize(dense, weight_format)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
