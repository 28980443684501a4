"""`MoELayer`: what it does around `route` and `fused_moe`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm

E, H, I = 4, 64, 32


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)

    def packed(experts):
        gate, up, down = (
            rng.normal(size=(experts, *shape)).astype(np.float16) / 8 for shape in ((H, I), (H, I), (I, H))
        )
        gate, up, down = (jmm.quantize(dense, "int8", group_size=32) for dense in (gate, up, down))
        return jmm.concatenate_columns([gate, up]), down

    router = rng.normal(size=(H, E)).astype(np.float32)
    shared = jmm.SharedExpert(*packed(1))
    return jmm.MoELayer(*packed(E), router, jmm.Routing(2, renormalize=False), shared=shared)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, H)), jnp.float16)


def test_identity_experts_add_their_weights_of_the_input(layer, x):
    router = jnp.concatenate([layer.router, 3 * layer.router[:, ::-1]], axis=1)
    routing = dataclasses.replace(layer.routing, top_k=3, identity_experts=4, scale=2.5)
    mixed = dataclasses.replace(layer, router=router, routing=routing, shared=None)
    weights, ids = mixed.route(x.reshape(-1, H))
    assert ((ids >= E).any(1) & (ids < E).any(1)).any()
    routed = jmm.fused_moe(x.reshape(-1, H), layer.gate_up, layer.down, weights, ids)
    kept = np.where(ids >= E, weights, 0).sum(1, keepdims=True)
    expected = np.asarray(routed, np.float32) + kept * np.asarray(x.reshape(-1, H), np.float32)
    np.testing.assert_allclose(mixed(x).reshape(-1, H), expected, rtol=2e-3, atol=2e-3)


def test_an_output_norm_divides_the_result_by_its_root_mean_square(layer, x):
    scale = jnp.linspace(0.5, 2, H)
    y = np.asarray(layer(x), np.float64)
    expected = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 0.01) * np.asarray(scale)
    normed = dataclasses.replace(layer, output_norm=scale, norm_epsilon=0.01)(x)
    np.testing.assert_allclose(normed, expected, rtol=2e-3, atol=2e-3)


def test_rows_beside_x_are_in_its_shape(layer, x):
    by_token = dataclasses.replace(layer, token_experts=jnp.zeros((7, 2), jnp.int32).at[:, 1].set(1))
    by_token(x, jnp.ones((3, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"token_ids has shape \(5, 3\); it must be .* = \(3, 5\)"):
        by_token(x, jnp.ones((5, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"router_input has shape \(5, 3, 64\); it must be that of x = \(3, 5, 64\)"):
        layer(x, router_input=x.reshape(5, 3, H))
    with pytest.raises(TypeError, match="x has type list; it must be an array"):
        layer([1.0])


def test_a_layer_that_is_compiled_itself_says_that_it_is_an_argument(layer, x):
    with pytest.raises(TypeError, match=r"a MoELayer holds arrays, which have no hash; pass it .* as an argument that"):
        jax.jit(layer)(x)
    with pytest.raises(TypeError, match="a MarlinWeights holds arrays, which have no hash"):
        hash(layer.gate_up)
    with pytest.raises(TypeError, match=r"router has type NoneType; it must be an array \(H, experts\)"):
        dataclasses.replace(layer, router=None)(x)


def test_numbers_of_a_rule_may_be_arrays_of_one(layer, x):
    routing = jmm.Routing(np.int64(2), renormalize=False, scale=jnp.float32(2.5))
    assert routing == jmm.Routing(2, renormalize=False, scale=2.5)
    np.testing.assert_array_equal(
        dataclasses.replace(layer, routing=routing)(x),
        dataclasses.replace(layer, routing=jmm.Routing(2, renormalize=False, scale=2.5))(x),
    )
    with pytest.raises(TypeError, match="top_k is True; it must be an int"):
        dataclasses.replace(layer, routing=jmm.Routing(True))(x)


@pytest.mark.parametrize("dense", [False, True])
def test_a_shared_expert_may_have_an_activation_of_its_own(layer, x, dense):
    """Of HunYuan V4 and Step 3.7, whose routed experts clamp what the shared one does not."""
    parts = [jmm.dense_weights(part)[0] for part in (layer.shared.gate_up, layer.shared.down)]
    gate, up = jnp.split(x @ parts[0], 2, axis=-1)
    expected = np.asarray(dataclasses.replace(layer, shared=None)(x), np.float32)
    expected += np.asarray(jax.nn.gelu(gate, approximate=True) * up @ parts[1], np.float32)
    shared = jmm.SharedExpert(*parts) if dense else layer.shared
    y = dataclasses.replace(layer, shared=shared, shared_activation="gelu_tanh")(x)
    np.testing.assert_allclose(y, expected, rtol=4e-3, atol=4e-3)
