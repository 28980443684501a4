"""Gradients through the Flax layers: those of the reference, for rows, routers and biases, under both APIs."""

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jax_marlin_moe as jmm
from jax_marlin_moe.flax.linen import MarlinMoE as LinenMoE
from jax_marlin_moe.flax.nnx import MarlinMoE, QuantizedParam

EXPERTS, HIDDEN, INNER, TOP_K = 4, 64, 64, 2


def normal(seed, *shape):
    return host_arrays.normal(seed, shape, scale=1 / 8)


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    gate_up, down = (
        oracle.random_experts(rng, EXPERTS, k, n, group_size=64, bias=True).packed()
        for k, n in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    )
    return jmm.MoELayer(
        gate_up,
        down,
        normal(4, HIDDEN, EXPERTS),
        jmm.Routing(TOP_K, "identity", softmax_after_topk=True),
        router_bias=normal(5, EXPERTS),
    )


X = 8 * normal(6, 2, 3, HIDDEN).astype(jnp.bfloat16)
PROBE = normal(7, *X.shape)


def scalar(y):
    return (y.astype(jnp.float32) * PROBE).sum()


@pytest.fixture(scope="module")
def expected(layer):
    """The reference's own derivatives: of router, router bias, the biases of both matrices, and x."""

    def loss(router, router_bias, first, second, x):
        weights, ids = jmm.route(
            x.reshape(-1, HIDDEN).astype(jnp.float32) @ router + router_bias,
            top_k=TOP_K, scoring="identity", softmax_after_topk=True,
        )  # fmt: skip
        gate_up, down = (
            jmm.MarlinWeights(**(vars(matrix) | {"bias": bias}))
            for matrix, bias in ((layer.gate_up, first), (layer.down, second))
        )
        y = jmm.fused_moe(x.reshape(-1, HIDDEN), gate_up, down, weights, ids, implementation="xla")
        return scalar(y.reshape(x.shape))

    moving = layer.router, layer.router_bias, layer.gate_up.bias, layer.down.bias, X
    return jax.jit(jax.grad(loss, range(5)))(*moving)


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(theirs) > 0
        assert np.linalg.norm(ours - theirs) <= 2e-2 * np.linalg.norm(theirs)


def test_nnx_grad_is_that_of_the_reference(layer, expected):
    module = MarlinMoE(layer)
    gradient = nnx.grad(
        lambda module, x: scalar(module(x)),
        argnums=(nnx.DiffState(0, (nnx.Param, QuantizedParam)), 1),
        allow_int=True,
    )
    of_module, d_x = nnx.jit(gradient, graph=False)(module, X)
    first, second = of_module["gate_up"].get_value(), of_module["down"].get_value()
    found = of_module["router"].get_value(), of_module["router_bias"].get_value(), first.bias, second.bias, d_x
    assert_close(found, expected)
    assert first.packed.dtype == jax.dtypes.float0
    assert not np.any(first.scales)


def test_nnx_grad_of_what_optimisers_see_takes_no_options(layer, expected):
    of_params = nnx.grad(lambda module: scalar(module(X)))(MarlinMoE(layer))
    assert set(of_params) == {"router", "router_bias"}
    assert_close([of_params[name].get_value() for name in ("router", "router_bias")], expected[:2])


def test_linen_gradients_are_those_of_the_reference(layer, expected):
    module, variables = LinenMoE.from_layer(layer)
    gradient = jax.grad(lambda variables, x: scalar(module.apply(variables, x)), (0, 1), allow_int=True)
    found, d_x = jax.jit(gradient)(variables, X)
    params, quantized = found["params"], found["quantized"]
    biases = [quantized[name].bias for name in ("gate_up", "down")]
    assert_close([params["router"], params["router_bias"], *biases, d_x], expected)
    assert quantized["down"].packed.dtype == jax.dtypes.float0
