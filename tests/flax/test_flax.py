"""The Flax layers: the same numbers as the function, under both APIs' transformations."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import MoELayer, SharedExpert
from jax_marlin_moe.flax.linen import MarlinMoE as LinenMoE
from jax_marlin_moe.flax.nnx import MarlinMoE, QuantizedParam

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 128, 64, 2


@pytest.fixture(scope="module")
def parts():
    keys = jax.random.split(jax.random.key(0), 3)
    gate_up = jax.random.normal(keys[0], (EXPERTS, HIDDEN, 2 * INTERMEDIATE)) / HIDDEN**0.5
    down = jax.random.normal(keys[1], (EXPERTS, INTERMEDIATE, HIDDEN)) / INTERMEDIATE**0.5
    router = jax.random.normal(keys[2], (HIDDEN, EXPERTS))
    return jmm.quantize(gate_up, "int4", group_size=64), jmm.quantize(down, "int4_zp", group_size=None), router


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, HIDDEN), jnp.bfloat16)


def expected(parts, x, **rule):
    gate_up, down, router = parts
    rows = x.reshape(-1, x.shape[-1])
    weights, ids = jmm.route(rows.astype(jnp.float32) @ router, top_k=TOP_K, **rule)
    return jmm.fused_moe(rows, gate_up, down, weights, ids, implementation="xla").reshape(x.shape)


def assert_close(actual, wanted):
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype
    actual, wanted = np.asarray(actual, np.float32), np.asarray(wanted, np.float32)
    assert np.linalg.norm(actual - wanted) <= 5e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("renormalize", [True, False])
def test_nnx_agrees_with_the_function(parts, x, renormalize):
    layer = MarlinMoE(*parts, top_k=TOP_K, renormalize=renormalize)
    wanted = expected(parts, x, renormalize=renormalize)
    assert_close(layer(x), wanted)
    assert_close(nnx.jit(lambda m, x: m(x))(layer, x), wanted)
    assert_close(layer(x[0, 0]), wanted[0, 0])


def test_nnx_empty_batch(parts):
    assert MarlinMoE(*parts, top_k=TOP_K)(jnp.zeros((0, 3, HIDDEN), jnp.float16)).shape == (0, 3, HIDDEN)


def test_nnx_split_merge_and_update(parts, x):
    layer = MarlinMoE(*parts, top_k=TOP_K)
    graph, params, quantized = nnx.split(layer, nnx.Param, QuantizedParam)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(HIDDEN, EXPERTS)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(quantized)} == {"int32", "bfloat16"}
    assert_close(nnx.merge(graph, params, quantized)(x), layer(x))
    apply = jax.jit(lambda params, quantized, x: nnx.merge(graph, params, quantized)(x))
    assert_close(apply(params, quantized, x), layer(x))
    before = layer(x)
    nnx.update(layer, jax.tree.map(jnp.zeros_like, params))
    assert np.linalg.norm(np.asarray(layer(x) - before, np.float32)) > 0


def test_nnx_optimiser_sees_the_router_alone(parts):
    layer = MarlinMoE(*parts, top_k=TOP_K)
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)
    gradients = nnx.grad(lambda m: jnp.sum(m.router.get_value() ** 2))(layer)
    packed = layer.gate_up.get_value().packed
    optimizer.update(layer, gradients)
    assert np.all(np.asarray(layer.router.get_value() != parts[2]))
    np.testing.assert_array_equal(layer.gate_up.get_value().packed, packed)
    moments = [leaf for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if leaf.ndim]
    assert {leaf.shape for leaf in moments} == {(HIDDEN, EXPERTS)}


@pytest.mark.parametrize("weight_format", jmm.FORMATS)
def test_nnx_random(weight_format):
    sizes = jmm.FORMATS[weight_format].group_sizes
    group_size = 64 if 64 in sizes else "customary"
    make = {"top_k": TOP_K, "weight_format": weight_format, "group_size": group_size, "dtype": jnp.float16}
    layer = MarlinMoE.random(EXPERTS, HIDDEN, INTERMEDIATE, rngs=nnx.Rngs(0), **make)
    again = MarlinMoE.random(EXPERTS, HIDDEN, INTERMEDIATE, rngs=nnx.Rngs(0), **make)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), nnx.state(again))
    gate_up = layer.gate_up.get_value()
    assert gate_up.format.name == weight_format
    assert (gate_up.num_experts, gate_up.k, gate_up.n) == (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    assert gate_up.group_size == min(HIDDEN, 64 if 64 in sizes else sizes[-1])
    assert gate_up.scales.dtype.name == ("float16" if "float16" in gate_up.format.scale_dtypes else "uint8")
    assert abs(float(jnp.std(jmm.dequantize(gate_up))) * HIDDEN**0.5 - 1) < 0.05
    assert not np.array_equal(gate_up.packed[0], gate_up.packed[1])
    y = layer(jax.random.normal(jax.random.key(2), (3, HIDDEN), jnp.float16))
    assert 0.05 < float(jnp.std(y.astype(jnp.float32))) < 2


def test_nnx_shapes_without_data():
    abstract = nnx.eval_shape(
        lambda: MarlinMoE.random(EXPERTS, HIDDEN, INTERMEDIATE, top_k=TOP_K, group_size=64, rngs=nnx.Rngs(0))
    )
    assert abstract.gate_up.get_value().packed.shape == (EXPERTS, HIDDEN // 16, 2 * INTERMEDIATE * 2)


@pytest.mark.parametrize("renormalize", [True, False])
def test_linen_agrees_with_the_function(parts, x, renormalize):
    module, variables = LinenMoE.from_weights(*parts, top_k=TOP_K, renormalize=renormalize)
    wanted = expected(parts, x, renormalize=renormalize)
    assert_close(module.apply(variables, x), wanted)
    assert_close(jax.jit(module.apply)(variables, x), wanted)


def test_linen_init(x):
    module = LinenMoE(EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, weight_format="int4_zp", group_size=64)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert set(variables) == {"params", "quantized"}
    assert jax.tree.map(jnp.shape, variables["params"]) == {"router": (HIDDEN, EXPERTS)}
    down = variables["quantized"]["down"]
    assert isinstance(down, jmm.MarlinWeights)
    assert (down.num_experts, down.k, down.n, down.format.name) == (EXPERTS, INTERMEDIATE, HIDDEN, "int4_zp")
    y = module.apply(variables, x)
    quantized = variables["quantized"]
    assert_close(y, expected((quantized["gate_up"], down, variables["params"]["router"]), x))
    state = optax.adam(1e-3).init(variables["params"])
    assert {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim} == {(HIDDEN, EXPERTS)}


def test_linen_needs_the_experts(parts, x):
    module, variables = LinenMoE.from_weights(*parts, top_k=TOP_K)
    with pytest.raises(ValueError, match="no collection 'quantized'"):
        module.apply({"params": variables["params"]}, x)


@pytest.mark.parametrize("make", [MarlinMoE, LinenMoE.from_weights])
def test_wrong_arguments_are_named(parts, make):
    gate_up, down, router = parts
    with pytest.raises(TypeError, match="gate_up is a ArrayImpl"):
        make(router, down, router, top_k=TOP_K)
    with pytest.raises(ValueError, match=r"down has \(E, K, N\) = \(6, 128, 128\)"):
        make(gate_up, gate_up, router, top_k=TOP_K)
    with pytest.raises(ValueError, match="router has shape"):
        make(gate_up, down, router.T, top_k=TOP_K)
    with pytest.raises(TypeError, match="router has dtype int32"):
        make(gate_up, down, router.astype(jnp.int32), top_k=TOP_K)
    with pytest.raises(ValueError, match="top_k is 7"):
        make(gate_up, down, router, top_k=7)
    with pytest.raises(ValueError, match="activation is 'none of ours'"):
        make(gate_up, down, router, top_k=TOP_K, activation="none of ours")


def test_wrong_rows_are_named(parts):
    layer = MarlinMoE(*parts, top_k=TOP_K)
    with pytest.raises(ValueError, match="its last dimension must be H = 128"):
        layer(jnp.zeros((2, HIDDEN + 1), jnp.bfloat16))
    with pytest.raises(TypeError, match="x has dtype float32"):
        layer(jnp.zeros((2, HIDDEN), jnp.float32))


def test_the_package_does_not_import_flax():
    code = "import sys, jax_marlin_moe, jax_marlin_moe.flax, jax_marlin_moe.checkpoint; print('flax' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def loaded(parts, **changes):
    gate_up, down, router = parts
    return MoELayer(gate_up, down, router, changes.pop("routing", jmm.Routing(TOP_K)), **changes)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_loaded_softmax_layer_keeps_its_numbers(parts, x, renormalize):
    layer = loaded(parts, routing=jmm.Routing(TOP_K, renormalize=renormalize))
    module, variables = LinenMoE.from_layer(layer)
    assert_close(MarlinMoE.from_layer(layer)(x), layer(x))
    assert_close(module.apply(variables, x), layer(x))


def test_a_loaded_layer_keeps_an_activation_with_parameters(parts, x):
    layer = loaded(parts, activation=jmm.swiglu(0.5, 1.702, 1.0))
    module, variables = LinenMoE.from_layer(layer)
    assert_close(MarlinMoE.from_layer(layer)(x), layer(x))
    assert_close(module.apply(variables, x), layer(x))


VECTOR = jnp.ones(EXPERTS)
BEYOND_MARLIN_MOE = {
    "router_bias": {"router_bias": VECTOR},
    "correction_bias": {"correction_bias": VECTOR},
    "expert_scale": {"expert_scale": VECTOR},
    "router_input_scale": {"router_input_scale": jnp.ones(HIDDEN)},
    "token_experts": {"token_experts": jnp.zeros((7, TOP_K), jnp.int32)},
    "shared": {"shared": SharedExpert(jnp.ones((HIDDEN, 128)), jnp.ones((64, HIDDEN)))},
    "routing.scoring is 'sigmoid'": {"routing": jmm.Routing(TOP_K, scoring="sigmoid")},
    "routing.softmax_after_topk": {"routing": jmm.Routing(TOP_K, scoring="identity", softmax_after_topk=True)},
    "routing.num_groups is 2": {"routing": jmm.Routing(TOP_K, num_groups=2)},
    "routing.scale is 2.5": {"routing": jmm.Routing(TOP_K, scale=2.5)},
    "routing.apply_on_input": {"routing": jmm.Routing(TOP_K, apply_on_input=True)},
}


@pytest.mark.parametrize("build", [MarlinMoE.from_layer, LinenMoE.from_layer], ids=["nnx", "linen"])
@pytest.mark.parametrize("name", BEYOND_MARLIN_MOE)
def test_layers_with_more_than_a_softmax_router_are_refused_by_name(parts, build, name):
    with pytest.raises(ValueError, match=f"layer has what MarlinMoE cannot hold: .*{name}"):
        build(loaded(parts, **BEYOND_MARLIN_MOE[name]))


def test_only_a_loaded_layer_is_taken(parts):
    with pytest.raises(TypeError, match="layer is a tuple; it must be a"):
        MarlinMoE.from_layer(parts)
