"""Files that the formats' own tools wrote, against transformers and against the formats' definitions in numpy."""

import functools
import pathlib

import checkpoint_files as files
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.checkpoint import load_moe_layer, load_moe_layers

DATA = pathlib.Path(__file__).parents[1] / "data"
EXPERTS = 4

FOLDERS = files.GENUINE
IMPLEMENTATIONS = ["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@functools.cache
def dense_experts(name, layer, decoder):
    tensors = files.read(DATA / name / "model.safetensors")
    prefix = f"model.layers.{layer}.mlp"
    dense = [
        [decoder(tensors, f"{prefix}.experts.{e}.{part}_proj") for part in ("gate", "up", "down")]
        for e in range(EXPERTS)
    ]
    return dense, tensors[f"{prefix}.gate.weight"].astype(np.float64).T


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "expected.npz") as file:
        return dict(file)


@pytest.fixture
def implementation(request):
    if request.param == "cpu" and native.unavailable_reason():
        pytest.skip(native.unavailable_reason())
    return request.param


def relative_error(actual, answer):
    return np.linalg.norm(np.asarray(actual, np.float64) - answer) / np.linalg.norm(answer)


@pytest.mark.covering
@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FOLDERS)
def test_blocks_agree(name, dtype, implementation, expected):
    for layer, loaded in load_moe_layers(DATA / name):
        y = loaded(jnp.asarray(expected["x"], dtype), implementation=implementation)
        dense, router = dense_experts(name, layer, FOLDERS[name][0])
        answers = [files.block(expected["x"].astype(np.float64), dense, router)]
        if f"{name}/layer{layer}" in expected:
            answers.append(expected[f"{name}/layer{layer}"])
        for answer in answers:
            assert relative_error(y, answer) <= {"float16": 1e-3, "bfloat16": 8e-3}[dtype]


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "ck_q3_gptq_True"])
def test_weights_are_those_of_the_file(name):
    # With desc_act the columns of gate and up are in the order of down's groups: the block above tests those.
    decoder, weight_format, _ = FOLDERS[name]
    loaded = load_moe_layer(DATA / name, 1)
    assert (loaded.gate_up.format.name, loaded.down.format.name) == (weight_format, weight_format)
    dense, _ = dense_experts(name, 1, decoder)
    found = oracle.dense(loaded.gate_up), oracle.dense(loaded.down)
    for e, (gate, up, down) in enumerate(dense):
        # Products of 16-bit scales are exact in float32; a float32 scale, or a global one, rounds once.
        np.testing.assert_allclose(found[0][e], np.concatenate([gate, up], axis=1), rtol=2**-23, atol=0)
        np.testing.assert_allclose(found[1][e], down, rtol=2**-23, atol=0)


MISTAKES = {
    "AWQ columns in order": ("ck_awq", functools.partial(files.awq, columns=range(8))),
    "AWQ order inverted": ("ck_awq", functools.partial(files.awq, columns=(0, 4, 1, 5, 2, 6, 3, 7))),
    "GPTQ without the + 1": ("ck_q3_gptq_False", functools.partial(files.gptq, plus=0)),
    "compressed-tensors offset by one": ("ck_llmc_W4A16", functools.partial(files.pack_quantized, offset=1)),
    "CT NVFP4 nibbles swapped": (
        "ck_llmc_NVFP4A16",
        functools.partial(files.nvfp4_compressed_tensors, low_first=False),
    ),
    "ModelOpt nibbles swapped": ("ck_modelopt", functools.partial(files.nvfp4_modelopt, low_first=False)),
    "MXFP4 nibbles swapped": ("ck_llmc_MXFP4A16", functools.partial(files.mxfp4_compressed_tensors, low_first=False)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_sees_mistakes(mistake, expected):
    """A decoder with a known mistake is far off, so the tests above would see a loader that made it."""
    name, wrong = MISTAKES[mistake]
    dense, router = dense_experts(name, 0, wrong)
    loaded = load_moe_layer(DATA / name, 0)
    y = loaded(jnp.asarray(expected["x"], jnp.float16))
    assert relative_error(y, files.block(expected["x"].astype(np.float64), dense, router)) > 0.03


@pytest.mark.parametrize("name", ["ck_awq", "ck_llmc_W8A16", "ck_modelopt"])
def test_swapped_gate_and_up_are_seen(name, expected):
    dense, router = dense_experts(name, 0, FOLDERS[name][0])
    swapped = [[up, gate, down] for gate, up, down in dense]
    y = load_moe_layer(DATA / name, 0)(jnp.asarray(expected["x"], jnp.float16))
    assert relative_error(y, files.block(expected["x"].astype(np.float64), swapped, router)) > 0.1


# Relative L2 of the block after rounding normal weights to each format.
QUANTIZED = {
    "int4": 0.25, "int4_zp": 0.2, "int4_fzp": 0.2, "int8": 0.02, "int8_zp": 0.02, "int8_fzp": 0.02,
    "fp8": 0.08, "nvfp4": 0.25, "mxfp4": 0.35, "mxfp8": 0.1,
}  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", QUANTIZED)
def test_plain_weights_are_quantised_on_the_way_in(weight_format, expected):
    loaded = load_moe_layer(DATA / "ck_q3", 0, quantize=weight_format)
    assert loaded.gate_up.format.name == weight_format
    dense, _ = dense_experts("ck_q3", 0, files.plain)
    gate_up = np.stack([np.concatenate([gate, up], axis=1) for gate, up, _ in dense]).astype(np.float16)
    down = np.stack([down for *_, down in dense]).astype(np.float16)
    np.testing.assert_array_equal(oracle.dense(loaded.down), oracle.dense(jmm.quantize(down, weight_format)))
    if weight_format != "nvfp4":  # there, gate and up have global scales of their own
        same = jmm.quantize(gate_up, weight_format)
        np.testing.assert_array_equal(oracle.dense(loaded.gate_up), oracle.dense(same))
    y = loaded(jnp.asarray(expected["x"], jnp.float16))
    assert relative_error(y, expected["ck_q3/layer0"]) < QUANTIZED[weight_format]


def test_plain_weights_need_a_target():
    with pytest.raises(ValueError, match=r"down_proj\.weight is plain F16; .* pass quantize="):
        load_moe_layer(DATA / "ck_q3", 0)
    with pytest.raises(ValueError, match="is quantised already; quantize='int4' is for plain"):
        load_moe_layer(DATA / "ck_awq", 0, quantize="int4")
