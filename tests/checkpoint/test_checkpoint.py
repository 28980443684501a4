"""The loader against files that the formats' own tools wrote, and against files that are wrong on purpose."""

import io
import json
import pathlib
import re
import shutil
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_marlin_moe as jmm
from jax_marlin_moe import progress
from jax_marlin_moe.checkpoint import FAMILIES, MoELayer, load_moe_layer, load_moe_layers

DATA = pathlib.Path(__file__).parents[1] / "data"
EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 4, 128, 128, 64
PREFIX = "model.layers.0.mlp.experts"


@pytest.fixture
def copy(tmp_path):
    """A copy of a checkpoint that a test may spoil."""

    def make(name="ck_awq", config=(), quantization=(), tensors=()):
        folder = tmp_path / name
        shutil.copytree(DATA / name, folder)
        values = json.loads((folder / "config.json").read_text())
        values.update(dict(config))
        if values.get("quantization_config") is not None:
            values["quantization_config"].update(dict(quantization))
        (folder / "config.json").write_text(json.dumps(values))
        if tensors:
            contents = load_file(folder / "model.safetensors")
            for key, value in dict(tensors).items():
                contents.pop(key, None)
                if value is not None:
                    contents[key] = value
            save_file(contents, folder / "model.safetensors")
        return folder

    return make


def test_fields():
    layer = load_moe_layer(str(DATA / "ck_awq"), layer=1)
    assert layer.routing == jmm.Routing(top_k=2)
    assert layer.activation == "silu"
    assert (layer.gate_up.num_experts, layer.gate_up.k, layer.gate_up.n) == (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    assert (layer.down.k, layer.down.n, layer.down.group_size) == (INTERMEDIATE, HIDDEN, GROUP)
    assert layer.gate_up.format.name == "int4_zp"
    assert layer.gate_up.scales.dtype == jnp.float16
    assert layer.router.shape == (HIDDEN, EXPERTS)
    assert layer.router.dtype == jnp.float16


def test_gptq_fields():
    layer = load_moe_layer(DATA / "ck_q3_gptq_True", 0)
    assert layer.gate_up.format.name == "int4"  # symmetric: all zero points are 8
    assert layer.gate_up.input_order is not None
    assert layer.down.input_order is None
    assert layer.router.dtype == ml_dtypes.bfloat16
    assert load_moe_layer(DATA / "ck_q3_gptq_False", 0).gate_up.input_order is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_long_load_shows_progress_on_a_terminal(stream, monkeypatch):
    monkeypatch.setattr(progress, "_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0))  # shows every step
    monkeypatch.setattr("sys.stderr", stream())
    load_moe_layer(DATA / "ck_awq", 1)
    shown = sys.stderr.getvalue()
    if stream is Terminal:
        assert re.findall(r"layer 1: +\d+%\|.*?\| (\d/8) ", shown) == [f"{done}/8" for done in range(9)]
    else:
        assert shown == ""
    monkeypatch.setattr("sys.stderr", stream())
    assert len(list(load_moe_layers(DATA / "ck_awq"))) == 2
    shown = sys.stderr.getvalue()
    if stream is Terminal:
        assert re.findall(r"layers: +\d+%\|.*?\| (\d/2) ", shown) == ["0/2", "1/2", "2/2"]
    else:
        assert shown == ""


def test_layer_is_a_pytree():
    layer = load_moe_layer(DATA / "ck_awq", 0)
    doubled = jax.jit(lambda value: jax.tree.map(lambda leaf: leaf + leaf, value))(layer)
    assert isinstance(doubled, MoELayer)
    assert doubled.routing == layer.routing
    np.testing.assert_array_equal(doubled.router, layer.router * 2)


def assert_same(a: MoELayer, b: MoELayer) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sharded_files(copy):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    assert_same(load_moe_layer(folder, 0), load_moe_layer(DATA / "ck_awq", 0))  # without an index
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(load_moe_layer(folder, 0), load_moe_layer(DATA / "ck_awq", 0))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a\\b", "c:x", "..", ""])
def test_index_must_stay_in_the_folder(copy, name):
    folder = copy()
    index = {"weight_map": {f"{PREFIX}.0.gate_proj.qweight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must be a plain file name"):
        load_moe_layer(folder, 0)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_malformed_index(copy, text):
    folder = copy()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_moe_layer(folder, 0)


def test_single_file_of_another_name(copy):
    folder = copy()
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit.safetensors")
    assert_same(load_moe_layer(folder, 0), load_moe_layer(DATA / "ck_awq", 0))


def test_mixtral_names(copy):
    folder = copy(config={"model_type": "mixtral", "intermediate_size": INTERMEDIATE, "norm_topk_prob": False})
    new = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for old, replacement in new.items():
            name = name.replace(old, replacement)
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    loaded = load_moe_layer(folder, 0)
    assert loaded.routing.renormalize
    assert_same(loaded, load_moe_layer(DATA / "ck_awq", 0))


def test_router_rule_follows_the_config(copy):
    assert not load_moe_layer(copy(config={"norm_topk_prob": False}), 0).routing.renormalize


def test_published_name_of_the_number_of_experts(copy):
    folder = copy()
    values = json.loads((folder / "config.json").read_text())
    values["num_experts"] = values.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(values))
    assert load_moe_layer(folder, 0).gate_up.num_experts == EXPERTS


@pytest.mark.parametrize(
    ("name", "file"), [("ck_awq", "quant_config.json"), ("ck_q3_gptq_False", "quantize_config.json")]
)
def test_config_in_a_file_of_its_own(copy, name, file):
    folder = copy(name, config={"quantization_config": None})
    own = {"bits": 4, "group_size": 64, "desc_act": False}
    if name == "ck_awq":
        own = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    (folder / file).write_text(json.dumps(own))
    assert_same(load_moe_layer(folder, 0), load_moe_layer(DATA / name, 0))


def test_gptq_v2(copy):
    name = "ck_q3_gptq_False"
    stored = load_file(DATA / name / "model.safetensors")
    plus_one = {key: value + 0x11111111 for key, value in stored.items() if key.endswith("qzeros")}
    folder = copy(name, quantization={"checkpoint_format": "gptq_v2"}, tensors=plus_one)
    assert_same(load_moe_layer(folder, 0), load_moe_layer(DATA / name, 0))


def test_gptq_asymmetric(copy):
    # One zero point that is not 8 makes the format that stores them; v1 stores 6 for 7.
    name, key = "ck_q3_gptq_False", f"{PREFIX}.1.up_proj.qzeros"
    qzeros = load_file(DATA / name / "model.safetensors")[key].copy()
    qzeros[1, 0] = 0x77777776
    loaded = load_moe_layer(copy(name, quantization={"sym": False}, tensors={key: qzeros}), 0)
    symmetric = load_moe_layer(DATA / name, 0)
    assert loaded.gate_up.format.name == "int4_zp"
    assert loaded.down.format.name == "int4"
    difference = np.asarray(jmm.dense_weights(loaded.gate_up) - jmm.dense_weights(symmetric.gate_up))
    changed = np.argwhere(difference)
    assert (changed[:, 0] == 1).all()
    assert (changed[:, 1] >= GROUP).all()
    assert (changed[:, 2] == INTERMEDIATE).all()
    assert len(changed) == HIDDEN - GROUP


@pytest.mark.parametrize("stored", [True, False])
def test_symmetric_awq(copy, stored):
    """`zero_point` false, as auto-round writes it: every zero point is 8, whether or not the file says so."""
    eights = {
        key: np.full_like(value, 0x88888888 - 2**32) if stored else None
        for key, value in load_file(DATA / "ck_awq" / "model.safetensors").items()
        if key.endswith("qzeros")
    }
    loaded = load_moe_layer(copy(tensors=eights, quantization={"zero_point": False}), 0)
    assert (loaded.gate_up.format.name, loaded.down.format.name) == ("int4", "int4")
    asymmetric = load_moe_layer(DATA / "ck_awq", 0)
    for found, other in ((loaded.gate_up, asymmetric.gate_up), (loaded.down, asymmetric.down)):
        np.testing.assert_array_equal(found.packed, other.packed)
        np.testing.assert_array_equal(found.scales, other.scales)


def test_gptq_bias(copy):
    def biases(value):
        return {
            f"{PREFIX}.{e}.{part}_proj.bias": np.full((128,), value * (e + 1), np.float16)
            for e in range(EXPERTS)
            for part in ("gate", "up", "down")
        }

    name = "ck_q3_gptq_True"
    zero = copy(name, tensors=biases(0))
    assert load_moe_layer(zero, 0).gate_up.bias is None
    save_file({**load_file(zero / "model.safetensors"), **biases(1)}, zero / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"experts\.0\.gate_proj\.bias is not zero; experts of this model have no bias"
    ):
        load_moe_layer(zero, 0)


WRONG = [
    ("ck_awq", {"config": {"model_type": "llama"}}, r"model_type is 'llama'; the loader knows qwen3_moe, olmoe"),
    ("ck_awq", {"config": {"quantization_config": None}}, r"qweight I32.*quant_method None in config\.json"),
    ("ck_awq", {"config": {"hidden_act": "tanh"}}, "hidden_act is 'tanh'; it must be one of 'silu', 'swish'"),
    ("ck_awq", {"config": {"num_experts_per_tok": 5}}, "num_experts_per_tok is 5, more than the 4 experts"),
    (
        "ck_awq",
        {"config": {"model_type": "deepseek_v2", "n_group": 3, "topk_group": 1}},
        r"config\.json: n_group is 3; it must be a divisor of the 4 experts",
    ),
    (
        "ck_awq",
        {"config": {"model_type": "deepseek_v2", "scoring_func": "tanh"}},
        r"scoring_func is 'tanh'; it must be 'softmax': the block of deepseek_v2 has no other",
    ),
    ("ck_awq", {"config": {"hidden_size": "x"}}, "hidden_size is 'x'; it must be a positive integer"),
    ("ck_awq", {"config": {"num_local_experts": 5}}, r"layer 0 has tensors of 4 experts; config\.json says 5"),
    ("ck_awq", {"quantization": {"quant_method": "eetq"}}, "quant_method is 'eetq'; the loader knows awq, gptq"),
    ("ck_awq", {"quantization": {"version": "gemv"}}, "version is 'gemv'"),
    ("ck_awq", {"quantization": {"bits": 8}}, "bits is 8; it must be 4"),
    ("ck_awq", {"quantization": {"group_size": None}}, "group_size is None"),
    ("ck_awq", {"quantization": {"group_size": 32}}, r"qzeros has shape \(2, 16\); it must be \(4, 16\)"),
    ("ck_awq", {"tensors": {f"{PREFIX}.2.up_proj.scales": None}}, f"no tensor {PREFIX}.2.up_proj.scales"),
    (
        "ck_awq",
        {"tensors": {f"{PREFIX}.2.up_proj.scales": np.zeros((2, 128), np.int32)}},
        r"up_proj\.scales has dtype I32; it must be F16 or BF16 or F32",
    ),
    (
        "ck_awq",
        {"tensors": {f"{PREFIX}.2.up_proj.scales": np.zeros((2, 128), ml_dtypes.bfloat16)}},
        r"scales of .*experts\.2\.up_proj have dtype bfloat16; they must be float16",
    ),
    (
        "ck_awq",
        {"tensors": {f"{PREFIX}.3.up_proj.scales": np.full((2, 128), np.inf, np.float16)}},
        r"experts\.3\.up_proj\.scales holds infinities",
    ),
    ("ck_q3_gptq_False", {"quantization": {"bits": 3}}, "bits is 3"),
    ("ck_q3_gptq_False", {"quantization": {"pack_dtype": "int64"}}, "pack_dtype is 'int64'"),
    ("ck_q3_gptq_False", {"quantization": {"checkpoint_format": "marlin"}}, "checkpoint_format is 'marlin'"),
    ("ck_q3_gptq_False", {"quantization": {"is_marlin_format": True}}, "is_marlin_format"),
    ("ck_q3_gptq_False", {"quantization": {"group_size": None}}, "group_size is None"),
    (
        "ck_q3_gptq_False",
        {"quantization": {"dynamic": {r".*\.0\.mlp\.experts": {"bits": 8}}}},
        r"qzeros has shape \(2, 16\); it must be \(2, 32\)",
    ),
    ("ck_q3_gptq_True", {"tensors": {f"{PREFIX}.0.up_proj.g_idx": None}}, r"no tensor .*up_proj\.g_idx"),
    (
        "ck_q3_gptq_True",
        {"tensors": {f"{PREFIX}.0.up_proj.g_idx": np.arange(128, dtype=np.int32) // 64}},
        r"g_idx of .*up_proj differs from that of .*gate_proj",
    ),
    (
        "ck_q3_gptq_True",
        {"tensors": {f"{PREFIX}.0.down_proj.g_idx": np.zeros(128, np.int32)}},
        r"model\.safetensors: tensor .*down_proj\.g_idx cannot be used: g_idx does not put exactly",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_wrong_files_are_named(copy, name, change, message):
    with pytest.raises(ValueError, match=message):
        load_moe_layer(copy(name, **change), 0)


def test_rules_for_other_modules_do_not_matter(copy):
    rules = {r"+:lm_head": {"bits": 8}, r"-:.*mlp\.gate$": {}}
    load_moe_layer(copy("ck_q3_gptq_False", quantization={"dynamic": rules}), 0)


def test_missing_layer():
    with pytest.raises(ValueError, match="layer 2 has no experts; layers with experts: 0 to 1"):
        load_moe_layer(DATA / "ck_awq", 2)


def test_layers_and_families_have_types():
    one, other = (load_moe_layer(DATA / "ck_awq", number) for number in (np.int64(1), 1))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    for number in (1.0, True, None):
        with pytest.raises(TypeError, match=f"layer is {number!r}; it must be a number, or the name of a layer"):
            load_moe_layer(DATA / "ck_awq", number)
    for families, message in ((FAMILIES[0], "families has type Family"), ([1], r"families\[0\] has type int")):
        with pytest.raises(TypeError, match=f"{message}; it must be a"):
            load_moe_layer(DATA / "ck_awq", 0, families=families)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_moe_layer(tmp_path, 0)
    shutil.copyfile(DATA / "ck_awq" / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="nor a safetensors file"):
        load_moe_layer(tmp_path, 0)


def test_damaged_file(copy):
    folder = copy()
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_moe_layer(folder, 0)
