"""What is computed again in a backward pass: results have names that policies of `jax.checkpoint` save by."""

from collections import Counter

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm

EXPERTS, HIDDEN, INNER, TOKENS = 4, 64, 64, 6
POLICIES = jax.checkpoint_policies


@pytest.fixture(scope="module")
def matrices():
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = (EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)
    return [
        jmm.quantize(jax.random.normal(key, shape) / 8, "int4", group_size=64)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def calls(jaxpr):
    """How often each primitive is called and each name given, in nested jaxprs too."""
    found = Counter()
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        found[f"saved as {equation.params['name']}" if kind == "name" else kind] += 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                found += calls(inner)
    return found


def gradient_and_calls(function, policy, *arguments):
    gradient = jax.grad(lambda *operands: jnp.sin(jax.checkpoint(function, policy=policy)(*operands)).sum())
    return gradient(*arguments), calls(jax.make_jaxpr(gradient)(*arguments).jaxpr)


def test_a_block_that_is_saved_by_its_name_runs_once(matrices):
    x = host_arrays.normal(1, (TOKENS, HIDDEN))
    weights, ids = jmm.route(host_arrays.normal(2, (TOKENS, EXPERTS)), top_k=2)

    def layer(x):
        return jnp.tanh(jmm.fused_moe(jnp.tanh(x), *matrices, weights, ids))

    again, found = gradient_and_calls(layer, POLICIES.nothing_saveable, x)
    assert found["fused_moe"] == 2
    saved, found = gradient_and_calls(layer, POLICIES.save_only_these_names("fused_moe"), x)
    assert found["fused_moe"] == 1
    np.testing.assert_array_equal(saved, again)


@pytest.mark.parametrize(("policy", "products"), [("nothing_saveable", 3 + 1), ("save_only_these_names", 3)])
def test_the_first_product_of_a_block_is_computed_again_or_saved(matrices, policy, products):
    rows = host_arrays.normal(1, (TOKENS, HIDDEN))
    sizes = jnp.asarray([2, 0, 3, 1], jnp.int32)

    def layer(rows):
        gate, up = jnp.split(jmm.ragged_dot(jnp.tanh(rows), matrices[0], sizes), 2, axis=1)
        return jmm.ragged_dot(jax.nn.silu(gate) * up, matrices[1], sizes)

    policy = POLICIES.nothing_saveable if policy == "nothing_saveable" else POLICIES.save_only_these_names("ragged_dot")
    _, found = gradient_and_calls(layer, policy, rows)
    # Both products forward and both transposed; the loss needs the second forward product, too.
    assert found["grouped_product"] == products + 1


@pytest.mark.parametrize("name", ["fused_moe", "moe_layer", "moe_gemm", "expert_gemm", "linear", "ragged_dot"])
def test_results_have_the_name_of_their_op(matrices, name):
    x = jnp.ones((TOKENS, HIDDEN), jnp.bfloat16)
    ids = jnp.zeros((TOKENS, 1), jnp.int32)
    weights = jnp.ones((TOKENS, 1))
    alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
    layer = jmm.MoELayer(*matrices, jnp.ones((HIDDEN, EXPERTS)), jmm.Routing(top_k=1))
    of = {
        "fused_moe": lambda x: jmm.fused_moe(x, *matrices, weights, ids),
        "moe_layer": lambda x: layer(x),
        "moe_gemm": lambda x: jmm.moe_gemm(x, matrices[0], alignment, top_k=1),
        "expert_gemm": lambda x: jmm.expert_gemm(x, matrices[0], jnp.asarray([[0, 0, 0, TOKENS]], jnp.int32)),
        "linear": lambda x: jmm.linear(x, matrices[0], expert=0),
        "ragged_dot": lambda x: jmm.ragged_dot(x, matrices[0], jnp.full(EXPERTS, 1, jnp.int32)),
    }[name]
    assert calls(jax.make_jaxpr(of)(x).jaxpr)[f"saved as {name}"]
