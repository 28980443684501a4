"""The Flax layers: the bits of the layer that they hold, under both APIs' transformations."""

import dataclasses
import functools
import pathlib
import subprocess
import sys

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import MoELayer, SharedExpert, load_moe_layer
from jax_marlin_moe.flax.linen import MarlinMoE as LinenMoE
from jax_marlin_moe.flax.nnx import MarlinMoE, QuantizedParam, RoutingState
from jax_marlin_moe.flax.parts import random_part

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, VOCABULARY = 8, 128, 64, 2, 7
ROUTING = jmm.Routing(TOP_K)
CHECKPOINT = pathlib.Path(__file__).parents[1] / "data" / "ck_q3"


def normal(seed, *shape, dtype=jnp.float32, scale=1.0):
    return host_arrays.normal(seed, shape, dtype, scale * shape[0] ** -0.5)


@functools.cache
def experts(count=EXPERTS, halves=2, bias=False):
    gate_up = normal(0, count, HIDDEN, halves * INTERMEDIATE, scale=1 / 4)
    down = normal(1, count, INTERMEDIATE, HIDDEN, scale=1 / 4)
    biases = [normal(2, count, w.shape[2]) if bias else None for w in (gate_up, down)]
    return (
        jmm.quantize(gate_up, "int4", group_size=64, bias=biases[0]),
        jmm.quantize(down, "int4_zp", group_size=None, bias=biases[1]),
    )


def build(routing=ROUTING, pair=None, router_dtype=jnp.float32, **changes):
    router = normal(3, HIDDEN, EXPERTS, dtype=router_dtype)
    return MoELayer(*(pair or experts()), router, routing, **changes)


def vector(seed, dtype=jnp.float32):
    return normal(seed, EXPERTS, dtype=dtype)


def dense_shared(gate=None):
    sixteen = jnp.bfloat16
    return SharedExpert(normal(6, HIDDEN, 256, dtype=sixteen), normal(7, 128, HIDDEN, dtype=sixteen), gate)


# A layer of each kind of router, in the way of the models that have it.
SIGMOID = jmm.Routing(TOP_K, "sigmoid", num_groups=4, top_groups=2, scale=2.5)
FAMILIES = {
    "Qwen3": build,
    "OLMoE": lambda: build(jmm.Routing(TOP_K, renormalize=False)),
    "Qwen2": lambda: build(
        jmm.Routing(TOP_K, renormalize=False), shared=dense_shared(normal(8, HIDDEN, 1, dtype=jnp.bfloat16))
    ),
    "DeepSeek-V2": lambda: build(
        jmm.Routing(TOP_K, renormalize=False, num_groups=4, top_groups=2, group_score="max", scale=16.0),
        shared=SharedExpert(*experts(1)),
    ),
    "DeepSeek-V3": lambda: build(
        SIGMOID, router_dtype=jnp.bfloat16, correction_bias=vector(4), shared=SharedExpert(*experts(1))
    ),
    "DeepSeek-V4": lambda: build(
        jmm.Routing(TOP_K, "sqrtsoftplus", scale=1.5),
        token_experts=jax.device_put(np.argsort(normal(5, VOCABULARY, EXPERTS))[:, :TOP_K].astype(np.int32)),
        shared=SharedExpert(*experts(1)),
    ),
    "Llama-4": lambda: build(
        jmm.Routing(TOP_K, "sigmoid", renormalize=False, apply_on_input=True), shared=dense_shared()
    ),
    "gpt-oss": lambda: build(
        jmm.Routing(TOP_K, "identity", softmax_after_topk=True),
        experts(bias=True),
        jnp.bfloat16,
        router_bias=vector(4, jnp.bfloat16),
        activation=jmm.swiglu(7.0, 1.702, 1.0),
    ),
    "Gemma-4": lambda: build(
        expert_scale=vector(4),
        router_input_scale=normal(9, HIDDEN),
        activation="gelu_tanh",
        norm_epsilon=1e-5,
    ),
    "Nemotron": lambda: build(
        jmm.Routing(TOP_K, "sigmoid", scale=2.5),
        experts(halves=1),
        correction_bias=vector(4),
        activation="relu2",
        shared=SharedExpert(*experts(1, halves=1)),
    ),
    "W4A8": lambda: build(
        x_scale=jnp.float32(0.02),
        intermediate_scales=jax.device_put(np.full(EXPERTS, 0.01, np.float32)),
        expert_input_scale=jax.device_put(np.linspace(0.5, 2, HIDDEN).astype(jnp.bfloat16)),
    ),
    "a soft cap": lambda: build(jmm.Routing(TOP_K, logits_soft_cap=0.5)),
}


@pytest.fixture
def x():
    return host_arrays.normal(1, (2, 3, HIDDEN), jnp.bfloat16)


def assert_equal(actual, wanted):
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(wanted, np.float32))


# Each of these has a leaf or an input that the others lack.
DISTINCT = ("Qwen2", "DeepSeek-V3", "DeepSeek-V4", "gpt-oss", "Gemma-4", "Nemotron", "W4A8")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in DISTINCT else pytest.mark.exhaustive) for family in FAMILIES],
)
def test_both_modules_give_the_bits_of_the_layer(family, x):
    layer = FAMILIES[family]()
    rest = () if layer.token_experts is None else (jax.device_put(np.arange(6, dtype=np.int32).reshape(2, 3)),)
    options = {
        "Gemma-4": {"router_input": jax.device_put(np.asarray(x)[::-1])},
        "W4A8": {"activation_dtype": "float8_e4m3fn"},
    }.get(family, {})
    of_module = {} if family != "W4A8" else {"activation_dtype": jnp.float8_e4m3fn}
    module = MarlinMoE.from_layer(layer, **of_module)
    linen, variables = LinenMoE.from_layer(layer, **of_module)
    of_call = {} if of_module else options

    def three(layer, module, variables, *rows):  # one program: most of a test is compiling
        return layer(*rows, **options), module(*rows, **of_call), linen.apply(variables, *rows, **of_call)

    wanted, *ours = nnx.jit(three, graph=False)(layer, module, variables, x, *rest)
    for y in ours:
        assert_equal(y, wanted)
    assert np.asarray(wanted, np.float32).std() > 0.01
    assert_same(module.layer, layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_without_values_has_the_shapes_of_the_layer(family, x):
    layer = FAMILIES[family]()
    shapes = jax.eval_shape(lambda: layer)
    assert_shapes(MarlinMoE(shapes).layer, shapes)
    assert_shapes(nnx.eval_shape(lambda: MarlinMoE(layer)).layer, shapes)
    module, variables = LinenMoE.from_layer(shapes)
    ids = None if layer.token_experts is None else jax.ShapeDtypeStruct((2, 3), jnp.int32)
    initial = jax.eval_shape(module.init, jax.random.key(0), x, ids)
    assert_shapes(initial, variables)
    assert jax.tree.structure(initial) == jax.tree.structure(LinenMoE.from_layer(layer)[1])


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_shapes(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(a)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(b)
    ]


def test_nnx_without_a_batch_or_with_an_empty_one(x):
    layer = MarlinMoE(build())
    assert_equal(layer(x[0, 0]), layer(x)[0, 0])
    assert layer(host_arrays.zeros((0, 3, HIDDEN), jnp.float16)).shape == (0, 3, HIDDEN)


def test_nnx_split_merge_and_update(x):
    layer = MarlinMoE(FAMILIES["DeepSeek-V3"]())
    graph, params, quantized, routing = nnx.split(layer, nnx.Param, QuantizedParam, RoutingState)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(HIDDEN, EXPERTS)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(quantized)} == {"int32", "bfloat16"}
    assert [leaf.shape for leaf in jax.tree.leaves(routing)] == [(EXPERTS,)]
    before = layer(x)
    assert_equal(nnx.merge(graph, params, quantized, routing)(x), before)
    apply = jax.jit(lambda *states: nnx.merge(graph, *states[:-1])(states[-1]))
    assert_equal(apply(params, quantized, routing, x), before)
    nnx.update(layer, jax.tree.map(jnp.zeros_like, params))
    assert np.linalg.norm(np.asarray(layer(x) - before, np.float32)) > 0


@pytest.mark.parametrize(
    ("family", "trained"),
    {
        "Qwen3": {"router"},
        "DeepSeek-V3": {"router"},
        "Gemma-4": {"router", "expert_scale", "router_input_scale"},
        "Qwen2": {"router", "shared_gate_up", "shared_down", "shared_gate"},
        "gpt-oss": {"router", "router_bias"},
    }.items(),
)
def test_optimisers_see_what_gradients_train(family, trained):
    layer = FAMILIES[family]()
    module = MarlinMoE(layer)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))} == trained
    assert LinenMoE.from_layer(layer)[1]["params"].keys() == trained


def test_nnx_optimiser_changes_the_router_alone():
    layer = MarlinMoE(build())
    router, packed = layer.router.get_value(), layer.gate_up.get_value().packed
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    gradients = nnx.grad(lambda m: jnp.sum(m.router.get_value() ** 2))(layer)
    optimizer.update(layer, gradients)
    assert np.all(np.asarray(layer.router.get_value() != router))
    np.testing.assert_array_equal(layer.gate_up.get_value().packed, packed)
    moments = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if leaf.ndim]
    assert {leaf.shape for leaf in moments} == {(HIDDEN, EXPERTS)}


def test_plain_nnx_jit_returns_the_state_and_graph_false_does_not(x):
    """Why every example has graph=False: outputs of a program that are its inputs are copies."""
    layer = MarlinMoE(build())

    def outputs(**options):
        text = nnx.jit(lambda m, x: m(x), **options).lower(layer, x).as_text()
        (results,) = (line.partition("->")[2] for line in text.splitlines() if "@main(" in line)
        return results.count("tensor<")

    assert outputs(graph=False) == 1
    assert outputs() > len(jax.tree.leaves(layer.layer))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weight_format", ["int4", "int8_fzp", "nvfp4", "mxfp8"])
def test_nnx_random(weight_format):
    sizes = jmm.FORMATS[weight_format].group_sizes
    group_size = 64 if 64 in sizes else "customary"
    make = {"weight_format": weight_format, "group_size": group_size, "dtype": jnp.float16}
    layer = MarlinMoE.random(EXPERTS, HIDDEN, INTERMEDIATE, ROUTING, rngs=nnx.Rngs(0), **make)
    again = MarlinMoE.random(EXPERTS, HIDDEN, INTERMEDIATE, ROUTING, rngs=nnx.Rngs(0), **make)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), nnx.state(again))
    gate_up = layer.gate_up.get_value()
    assert gate_up.format.name == weight_format
    assert (gate_up.num_experts, gate_up.k, gate_up.n) == (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    assert gate_up.group_size == min(HIDDEN, 64 if 64 in sizes else sizes[-1])
    assert gate_up.scales.dtype.name == ("float16" if "float16" in gate_up.format.scale_dtypes else "uint8")
    assert abs(np.asarray(jmm.dequantize(gate_up), np.float32).std() * HIDDEN**0.5 - 1) < 0.05
    assert not np.array_equal(*np.asarray(gate_up.packed)[:2])
    y = layer(host_arrays.normal(2, (3, HIDDEN), jnp.float16))
    assert 0.05 < np.asarray(y, np.float32).std() < 2


SIZES = (EXPERTS, HIDDEN, INTERMEDIATE, SIGMOID)
OPTIONS = {"group_size": 64, "correction_bias": True, "shared_intermediate": 128, "shared_gate": True}


def test_linen_init_draws_what_random_describes(x):
    module = LinenMoE.random(*SIZES, **OPTIONS)
    shapes = nnx.eval_shape(lambda: MarlinMoE.random(*SIZES, **OPTIONS, rngs=nnx.Rngs(0)).layer)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"router": (HIDDEN, EXPERTS), "shared_gate": (HIDDEN, 1)}
    assert variables["routing"].keys() == {"correction_bias"}
    assert not variables["routing"]["correction_bias"].any()
    quantized = variables["quantized"]
    parts = {name: quantized[name] for name in ("gate_up", "down")} | {"router": variables["params"]["router"]}
    shared = SharedExpert(quantized["shared_gate_up"], quantized["shared_down"], variables["params"]["shared_gate"])
    layer = MoELayer(**parts, routing=SIGMOID, correction_bias=jnp.zeros(EXPERTS), shared=shared)
    assert_shapes(layer, shapes)
    assert_equal(module.apply(variables, x), layer(x))


@pytest.mark.parametrize("name", ["x_scale", "intermediate_scales", "expert_input_scale", "router_input_scale"])
def test_scales_that_linen_draws_are_one(name):
    shape = jax.ShapeDtypeStruct((EXPERTS,), jnp.float32)
    np.testing.assert_array_equal(random_part(jax.random.key(0), name, shape), np.ones(EXPERTS, np.float32))


def test_a_random_layer_with_a_gate_and_no_shared_expert_is_refused():
    with pytest.raises(ValueError, match="shared_gate is True and shared_intermediate 0"):
        LinenMoE.random(*SIZES, shared_gate=True)


def test_linen_init_keeps_padding_biases_and_row_orders():
    rows = host_arrays.normal(0, (2, 3, 40), jnp.bfloat16)
    halves = [jmm.quantize(normal(n, EXPERTS, 40, 24), "int8_zp", group_size=32) for n in range(2)]
    gate_up = dataclasses.replace(
        jmm.concatenate_columns(halves),
        input_order=jax.device_put(np.tile(np.arange(40, dtype=np.int32)[::-1], (EXPERTS, 1))),
    )
    down = jmm.quantize(normal(2, EXPERTS, 24, 40), "mxfp4", group_size=32, bias=normal(3, EXPERTS, 40))
    module, variables = LinenMoE.from_layer(MoELayer(gate_up, down, normal(4, 40, EXPERTS), ROUTING))
    initial = jax.eval_shape(module.init, jax.random.key(0), rows)
    assert_shapes(initial, variables)
    state = serialization.to_bytes(variables)
    assert_same(serialization.from_bytes(initial, state), variables)


def test_linen_needs_all_collections(x):
    module, variables = LinenMoE.from_layer(FAMILIES["DeepSeek-V3"]())
    with pytest.raises(ValueError, match="no 'gate_up' in a collection 'quantized'"):
        module.apply({"params": variables["params"]}, x)
    with pytest.raises(ValueError, match="no 'correction_bias' in a collection 'routing'"):
        module.apply({name: variables[name] for name in ("params", "quantized")}, x)


BUILDS = pytest.mark.parametrize("make", [MarlinMoE, LinenMoE.from_layer], ids=["nnx", "linen"])


@BUILDS
def test_parts_that_do_not_fit_are_named(make):
    gate_up, down = experts()
    layer = build()
    for changes, message in (
        ({"gate_up": layer.router}, "gate_up has type "),
        ({"down": gate_up}, "gate_up has N = 128 columns and down K = 128 rows"),
        ({"router": layer.router.astype(jnp.int32)}, "router has dtype int32; it must be floating point"),
        ({"router": layer.router.T}, "x has shape|contracting|x has"),
        ({"routing": jmm.Routing(9)}, "top_k is 9"),
        ({"activation": "none of ours"}, "activation is 'none of ours'"),
        ({"correction_bias": jnp.ones(3)}, r"correction_bias has shape \(3,\)"),
        ({"shared": SharedExpert(*experts(1, halves=1))}, "gate_up has N = 64 columns"),
    ):
        with pytest.raises(ValueError, match=f"layer: the layer does not fit together: .*({message})"):
            make(dataclasses.replace(layer, **changes))
    with pytest.raises(TypeError, match=r"layer has type tuple; it must be a jax_marlin_moe\.MoELayer or Stacked"):
        make((gate_up, down))


def test_wrong_rows_and_missing_tokens_are_named(x):
    with pytest.raises(TypeError, match="x has dtype int8"):
        MarlinMoE(build())(x.astype(jnp.int8))
    with pytest.raises(ValueError, match="token_ids is None"):
        MarlinMoE(FAMILIES["DeepSeek-V4"]())(x)


def test_both_modules_load_a_layer_of_a_checkpoint():
    options = {"quantize": "int8", "group_size": None}
    layer = load_moe_layer(CHECKPOINT, 1, **options)
    rows = host_arrays.normal(0, (3, layer.gate_up.k), jnp.bfloat16)
    wanted = layer(rows)
    assert_equal(MarlinMoE.from_checkpoint(CHECKPOINT, 1, **options)(rows), wanted)
    module, variables = LinenMoE.from_checkpoint(CHECKPOINT, layer=1, **options)
    assert_equal(module.apply(variables, rows), wanted)


def test_the_package_does_not_import_flax():
    code = "import sys, jax_marlin_moe, jax_marlin_moe.flax, jax_marlin_moe.checkpoint; print('flax' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
