"""What a checkpoint holds beside its experts: tensors by name, linears of every scheme, and both after `convert`."""

import json
import pathlib
import shutil

import checkpoint_files as files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import Checkpoint, convert, packed_form

DATA = pathlib.Path(__file__).parents[1] / "data"
ATTENTION = "model.layers.1.self_attn"


def other_checkpoint(tmp_path, tensors, quantization):
    """A checkpoint with one more linear, `model.extra`, which its config describes."""
    whole = files.read(DATA / "ck_q3" / "model.safetensors")
    files.write(tmp_path / "model.safetensors", whole | tensors)
    config = json.loads((DATA / "ck_q3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return Checkpoint(tmp_path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", files.GENUINE)
def test_attention_is_what_its_definition_says(name):
    decoder, weight_format, _ = files.GENUINE[name]
    tensors = files.read(DATA / name / "model.safetensors")
    checkpoint = Checkpoint(DATA / name)
    for part, n in (("q_proj", 128), ("v_proj", 64)):
        weights = checkpoint.linear(f"{ATTENTION}.{part}")
        assert (weights.num_experts, weights.k, weights.n) == (1, 128, n)
        assert weights.format.name == weight_format
        answer = decoder(tensors, f"{ATTENTION}.{part}")
        np.testing.assert_allclose(jmm.dense_weights(weights)[0], answer, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(checkpoint.linear("lm_head"), tensors["lm_head.weight"].T)
    assert checkpoint.linear("lm_head").dtype == tensors["lm_head.weight"].dtype


def test_an_fp8_linear_of_blocks_and_its_bias(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(200, 256)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (2, 2)).astype(np.float32)
    bias = rng.normal(size=200).astype(np.float16)
    tensors = {"model.extra.weight": codes, "model.extra.weight_scale_inv": scale, "model.extra.bias": bias}
    checkpoint = other_checkpoint(
        tmp_path, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    )
    weights = checkpoint.linear("model.extra")
    dense = codes.astype(np.float32) * np.repeat(np.repeat(scale, 128, 0)[:200], 128, 1)
    np.testing.assert_allclose(jmm.dense_weights(weights)[0], dense.T, rtol=1e-6)
    np.testing.assert_array_equal(weights.bias[:, :200], bias.astype(np.float32)[None])
    np.testing.assert_array_equal(checkpoint.tensor("model.extra.weight").view(jnp.uint8), codes.view(np.uint8))
    assert checkpoint.tensor("model.extra.weight").dtype == jnp.float8_e4m3fn


def test_an_hqq_linear_has_the_size_that_its_file_states(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        "model.extra.W_q": rng.integers(0, 256, (64 * 2 // 2, 64), dtype=np.uint8),
        "model.extra.scale": rng.uniform(1, 2, (128, 1)).astype(np.float16),
        "model.extra.zero": rng.uniform(0, 15, (128, 1)).astype(np.float16),
        **{f"model.extra.{k}": np.int32(v) for k, v in {"nbits": 4, "axis": 1, "group_size": 64}.items()},
    }
    with pytest.raises(ValueError, match=r"has no tensor model\.extra\.shape of shape \(2,\)"):
        other_checkpoint(tmp_path, tensors, {"quant_method": "hqq"}).linear("model.extra")
    tensors["model.extra.shape"] = np.asarray([64, 128])
    weights = other_checkpoint(tmp_path, tensors, {"quant_method": "hqq"}).linear("model.extra")
    assert (weights.k, weights.n, weights.format.name) == (128, 64, "int4_fzp")


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16, np.uint8])
def test_tensors_keep_their_bits_and_dtype(tmp_path, dtype):
    value = np.arange(12, dtype=np.uint8).view(dtype)
    found = other_checkpoint(tmp_path, {"extra": value}, {}).tensor("extra")
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), value.view(np.uint8))


def test_integers_of_64_bits_are_narrowed_where_they_fit_and_refused_elsewhere(tmp_path):
    tensors = {"small": np.asarray([1, -2]), "large": np.asarray([1 << 40]), "double": np.ones(2)}
    checkpoint = other_checkpoint(tmp_path, tensors, {})
    assert checkpoint.tensor("small").dtype == jnp.int32
    np.testing.assert_array_equal(checkpoint.tensor("small"), [1, -2])
    for name, dtype in (("large", "int64"), ("double", "float64")):
        with pytest.raises(ValueError, match=f"tensor {name} has dtype {dtype}.* set jax_enable_x64"):
            checkpoint.tensor(name)
        with jax.enable_x64(True):
            np.testing.assert_array_equal(checkpoint.tensor(name), tensors[name])


@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        ("tensor", "model.norm", r"has no tensor model\.norm; there are model\.norm\.weight"),
        ("tensor", "norm.weight", r"there are model\.norm\.weight"),
        ("tensor", "lm_head.qweight", r"has no tensor lm_head\.qweight; there are lm_head\.weight"),
        ("tensor", "nothing", "has no tensor nothing; `tensor_names` lists all"),
        ("linear", "nothing", "has no tensor nothing; `tensor_names` lists all"),
        ("linear", "lm_head.weight", r"is a tensor, not a linear; read it as tensor\('lm_head\.weight'\)"),
        ("linear", "model.norm", r"tensor model\.norm\.weight has shape \(128,\); that of a linear has two"),
    ],
)
def test_names_that_are_none(call, name, message):
    with pytest.raises(ValueError, match=message):
        getattr(Checkpoint(DATA / "ck_q3"), call)(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 32}, "group_size is 32 and quantize None; it must be omitted"),
        ({"group_size": None}, "group_size is None and quantize None; it must be omitted"),
        ({"scale_dtype": jnp.float16}, "scale_dtype is 'float16' and quantize None"),
        ({"quantize": "int3"}, "quantize is 'int3'; it must be None or one of bf16, fp16"),
        ({"quantize": jmm.FORMATS["int4"]}, r"quantize is WeightFormat\(.*; it must be None or one of"),
    ],
)
def test_what_plain_weights_become_is_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(DATA / "ck_awq", **options)


@pytest.mark.parametrize("call", ["tensor", "linear"])
def test_names_are_strings(call):
    with pytest.raises(TypeError, match=r"name is 3; it must be a string, as in the file"):
        getattr(Checkpoint(DATA / "ck_q3"), call)(3)


def test_a_linear_of_no_known_scheme_is_described(tmp_path):
    checkpoint = other_checkpoint(tmp_path, {"model.extra.qweight": np.zeros((4, 4), np.int32)}, {})
    with pytest.raises(ValueError, match=r"model\.extra is stored in no way .*qweight I32; quant_method None"):
        checkpoint.linear("model.extra")


def test_a_converted_folder_is_the_whole_model(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DATA / "ck_q3_gptq_True", source)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "model.pt", ".hidden"):
        (source / name).write_text("{}")
    convert(source, tmp_path / "packed")
    kept = {path.name for path in (tmp_path / "packed").iterdir()}
    assert kept == {
        packed_form.MANIFEST, "layer-00000.safetensors", "layer-00001.safetensors", "others-00001.safetensors",
        "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    before, after = Checkpoint(source), Checkpoint(tmp_path / "packed")
    assert after.config == before.config
    assert set(after.tensor_names) == {name for name in before.tensor_names if ".mlp." not in name}
    for name in after.tensor_names:
        np.testing.assert_array_equal(after.tensor(name), before.tensor(name))
    ours, theirs = (checkpoint.linear(f"{ATTENTION}.o_proj") for checkpoint in (after, before))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert ours.input_order is not None  # of the file, which has act-order


@pytest.mark.parametrize("name", ["config.json", "others-00001.safetensors"])
def test_files_beside_the_layers_are_compared_with_their_digests(tmp_path, name):
    convert(DATA / "ck_llmc_W8A16", tmp_path / "packed")
    path = tmp_path / "packed" / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1) if name == "config.json" else path.read_bytes()[:-1])
    checkpoint = Checkpoint(tmp_path / "packed")
    with pytest.raises(ValueError, match=f"{name} has SHA-256 .*: the file is damaged"):
        checkpoint.tensor("model.norm.weight")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; jax_marlin_moe\.json names it"):
        Checkpoint(tmp_path / "packed").tensor("model.norm.weight")


def test_a_folder_without_the_rest_says_so():
    with pytest.raises(ValueError, match="holds layers of experts alone; convert the checkpoint again"):
        Checkpoint(DATA / "packed_version_1").tensor("model.norm.weight")
