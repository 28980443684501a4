"""The decoder of the examples: the logits of transformers on genuine checkpoints, its cache and loops, sampling."""

import functools
import importlib
import json
import pathlib
import re
import sys

import checkpoint_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_marlin_moe.checkpoint import convert

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT))  # at the end: the package itself is the one that is installed
command, models, decoder_file = (
    importlib.import_module(f"examples.{name}") for name in ("generate", "models", "decoder")
)
Sampling, generate = command.Sampling, command.generate
Cache, SIZES, load = decoder_file.Cache, models.SIZES, models.load

DATA = ROOT / "tests" / "data"
# What is rounded beside float16 rows: the parent's experts, which become int8, and latents, which are float16 too.
LIMIT = {"ck_q3": 2e-3, "gpt_oss": 1.5e-3, "deepseek_v3": 2e-3}
OPTIONS = {"ck_q3": {"quantize": "int8", "group_size": 32}}
OTHER_MODELS = ("gpt_oss", "deepseek_v3")  # on tokens of their own, beyond the window of gpt-oss
NAMES = [*files.GENUINE, "ck_q3", *OTHER_MODELS]
QUICK = ("ck_q3_gptq_True", "ck_modelopt", *OTHER_MODELS)


@pytest.fixture(scope="module")
def expected():
    """Of transformers in float32, with weights that an independent decoder dequantised: `expected_by_transformers`."""
    with np.load(DATA / "expected_logits.npz") as file:
        return dict(file)


@functools.cache
def decoder(name):
    return load(DATA / name, dtype=jnp.float16, **OPTIONS.get(name, {}))


@functools.partial(jax.jit, static_argnames="graph")
def logits_of(graph, state, tokens, cache):
    return nnx.merge(graph, state)(tokens, cache, last_only=False)


def stepwise(model, tokens, prompt):
    """Logits of all tokens: a prompt at once, then one by one behind the cache."""
    graph, state = nnx.split(model)
    cache = Cache.empty(model.sizes, len(tokens), tokens.shape[1], model.dtype)
    parts = []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]:
        logits, cache = logits_of(graph, state, tokens[:, start:stop], cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.parity) for name in NAMES]
)
def test_logits_are_those_of_transformers(name, expected):
    tokens = expected[f"tokens_{name}" if name in OTHER_MODELS else "tokens"]
    found = stepwise(decoder(name), jax.device_put(tokens), tokens.shape[1] - 5)
    error = np.linalg.norm(found - expected[name], axis=-1) / np.linalg.norm(expected[name], axis=-1)
    assert error.max() < LIMIT.get(name, 1.2e-3)
    assert error.max() < 1.05 * documented_errors()[name]


def documented_errors():
    """The largest error of each checkpoint in the table of docs/examples.md."""
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| ([\d.e-]+) \|", page, re.MULTILINE)
    return {name: float(error) for name, error in rows}


def test_the_table_of_errors_has_every_checkpoint_within_its_limit():
    errors = documented_errors()
    assert errors.keys() == set(NAMES)
    assert all(error < LIMIT.get(name, 1.2e-3) for name, error in errors.items())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_what_transformers_computes(tmp_path, name, expected):
    tokens = expected[f"tokens_{name}" if name in OTHER_MODELS else "tokens"]
    answer = expected_by_transformers(tmp_path, name, tokens)
    np.testing.assert_allclose(answer, expected[name], rtol=1e-4, atol=1e-5)


def fp8_blocks(tensors, module):
    """[K, N] of a linear in FP8 whose scales are those of blocks of 128 by 128."""
    weight = tensors[f"{module}.weight"].astype(np.float64)
    scales = tensors[f"{module}.weight_scale_inv"].astype(np.float64).repeat(128, 0).repeat(128, 1)
    return (weight * scales[: weight.shape[0], : weight.shape[1]]).T


def expected_by_transformers(folder, name, tokens):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Mxfp4Config

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if name == "gpt_oss":  # which it decodes itself
        model = AutoModelForCausalLM.from_pretrained(
            DATA / name, quantization_config=Mxfp4Config(dequantize=True), **options
        ).float()
    else:
        write_dequantised(folder, name)
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def write_dequantised(folder, name):
    tensors = files.read(DATA / name / "model.safetensors")
    dense, modules = {}, set()
    for tensor, value in tensors.items():
        module, _, suffix = tensor.rpartition(".")
        if suffix in ("weight", "e_score_correction_bias") and value.dtype.itemsize > 1:
            dense[tensor] = value.astype(np.float32)
        else:
            modules.add(module)
    decode = fp8_blocks if name == "deepseek_v3" else files.GENUINE[name][0] if modules else None
    for module in modules:
        weight = decode(tensors, module).T
        dense[f"{module}.weight"] = np.ascontiguousarray(weight).astype(np.float32)
    files.write(folder / "model.safetensors", dense)
    config = json.loads((DATA / name / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))


def test_a_profile_names_the_layers_and_their_parts():
    graph, state = nnx.split(decoder("ck_modelopt"))
    cache = Cache.empty(decoder("ck_modelopt").sizes, 1, 4, jnp.float16)
    text = logits_of.lower(graph, state, jnp.zeros((1, 1), jnp.int32), cache).as_text(debug_info=True)
    for number in range(2):
        assert f"layer_{number}/attention/" in text
        assert re.search(rf'layer_{number}/experts/[^"]*moe_layer', text)
    layer = decoder("ck_modelopt").blocks[0].experts.layer
    text = jax.jit(lambda layer, x: layer(x, implementation="xla")).lower(layer, jnp.ones((1, 128), jnp.float16))
    text = text.as_text(debug_info=True)
    assert all(f"moe_layer/{stage}/" in text for stage in ("gate_up", "down", "combine"))


def test_linears_of_the_same_rows_are_one_product_unless_they_are_packed_differently():
    alike, dense, other = (
        decoder(name).blocks[0].attention.qkv for name in ("ck_modelopt", "gpt_oss", "ck_q3_gptq_True")
    )
    apart = decoder_file.Linears([linears.parts[0] for linears in (alike, other)])
    for linears, products in ((alike, 1), (dense, 1), (apart, 2)):
        assert len(linears.parts) == products
        found = jax.eval_shape(linears, jnp.zeros((1, 128), jnp.float16))
        assert [y.shape[-1] for y in found] == list(linears.widths)


def test_a_packed_folder_is_the_same_model(tmp_path):
    convert(DATA / "ck_modelopt", tmp_path / "packed")
    packed = load(tmp_path / "packed", dtype=jnp.float16)
    ours, theirs = (jax.tree.leaves(nnx.state(model)) for model in (packed, decoder("ck_modelopt")))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_of_experts_are_quantised_as_the_checkpoint_says():
    model = load(DATA / "deepseek_v3", activation_dtype="checkpoint")
    found = [getattr(block.experts, "activation_dtype", None) for block in model.blocks]
    assert found == [None, "float8_e4m3fn_g128"]  # the first layer has no experts


def test_loops_write_what_single_steps_choose_and_end_with_the_last_sequence(expected):
    model, prompts = decoder("ck_modelopt"), expected["tokens"][:, :5]
    tokens = np.concatenate(list(generate(model, prompts, new_tokens=9, chunk=4)), axis=1)
    assert tokens.shape == (1, 9)
    logits = stepwise(model, jnp.asarray(np.concatenate([prompts, tokens[:, :5]], axis=1)), 5)
    np.testing.assert_array_equal(logits[:, 4:].argmax(-1), tokens[:, :6])
    end = int(tokens[0, 3])
    chunks = list(generate(model, prompts, new_tokens=9, chunk=4, ends=[end, 300]))
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), tokens[:, : tokens[0].tolist().index(end) + 1])


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [(Sampling(), {2}), (Sampling(1.0, 0.5), {2}), (Sampling(1.0, 0.8), {1, 2}), (Sampling(1.0), {0, 1, 2})],
)
def test_sampling_draws_from_the_smallest_set_of_the_mass(sampling, allowed):
    logits = np.log(np.float32([[0.15, 0.25, 0.6]]))
    drawn = jax.jit(jax.vmap(lambda key: sampling.draw(logits, key)[0]))(jax.random.split(jax.random.key(0), 200))
    assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; this decoder is 'qwen3_moe'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear'"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_models_that_it_does_not_compute_are_refused(change, message):
    config = json.loads((DATA / "ck_q3" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        SIZES["qwen3_moe"].from_config(config | change)


def test_the_command_streams_tokens_and_times_random_weights(capsys):
    decoder = [str(DATA / "ck_q3"), "--quantize", "int8", "--new-tokens", "3"]
    assert command.main([*decoder, "--tokens", "5", "1"]) == 0
    numbers = capsys.readouterr().out.split()
    assert len(numbers) == 3
    assert command.main([*decoder, "--prompt", "t5 t1"]) == 0
    assert capsys.readouterr().out == " ".join(["t5", "t1", *(f"t{number}" for number in numbers)]) + "\n"
    assert command.main(["--random", "tiny", "--new-tokens", "2"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_folders_that_it_cannot_read_are_refused_in_a_line(capsys):
    with pytest.raises(SystemExit):
        command.main([str(DATA / "gpt_oss"), "--prompt", "t5 t17"])
    assert "gpt_oss has no tokenizer.json to read the prompt with; pass token ids" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["openai/gpt-oss-20b"])
    assert re.fullmatch("cannot load: .* is not a folder here; .*hf download .*\n", capsys.readouterr().err)
