"""Gradients of every op, format, type of rows and activation are those of the reference; ordinary runs sample."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 3, 128, 64, 5, 2
LIMITS = {"float16": 4e-3, "bfloat16": 2e-2, "float32": 2e-2}
ACTIVATIONS = {name: name for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2_gated", "none", "silu_ungated")} | {
    "swiglu": jmm.swiglu(7, 1.702, 1),
    "swiglu_step": jmm.swiglu_step(7),
    "situ": jmm.situ(2, 3),
}
PRODUCTS = ("moe_gemm", "expert_gemm", "linear", "ragged_dot")
FORMATS = sorted(oracle.FACTS)
DTYPES = sorted(LIMITS)
CASES = [
    *itertools.product(("fused_moe", "moe_layer"), FORMATS, DTYPES, ACTIVATIONS),
    *itertools.product(PRODUCTS, FORMATS, DTYPES, ["silu"]),
]


def gradients(op, weight_format, dtype, activation, implementation):
    """With respect to rows, and to router weights or the router."""
    rng = np.random.default_rng(5)
    group = oracle.FACTS[weight_format].group_sizes[-1] if not oracle.FACTS[weight_format].per_channel else None
    halves = 1 if activation.endswith("ungated") else 2
    gate_up, down = (
        oracle.random_experts(rng, EXPERTS, k, n, weight_format=weight_format, group_size=group).packed()
        for k, n in ((HIDDEN, halves * INNER), (INNER, HIDDEN))
    )
    act = ACTIVATIONS[activation]
    x = jnp.asarray(oracle.random_rows(rng, TOKENS, HIDDEN, jnp.dtype(dtype)))
    weights, ids = map(jnp.asarray, oracle.random_routing(rng, TOKENS, TOP_K, EXPERTS, "distinct"))
    router = jnp.asarray(rng.normal(size=(HIDDEN, EXPERTS)).astype(np.float32) * 0.1)
    table = jnp.asarray([[1, 0, 1, 3], [2, 3, 4, 1]], jnp.int32)
    sizes = jnp.asarray([2, 0, 3], jnp.int32)
    routing = jmm.Routing(top_k=TOP_K)
    options = {"implementation": implementation}

    def result(x, second):
        if op == "fused_moe":
            return jmm.fused_moe(x, gate_up, down, second, ids, activation=act, **options)
        if op == "moe_layer":
            return jmm.moe_layer(x, second, gate_up, down, routing=routing, activation=act, **options)
        if op == "moe_gemm":
            alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
            weighted = {"topk_weights": second, "mul_topk_weights": True}
            return jmm.moe_gemm(x, gate_up, alignment, top_k=TOP_K, **weighted, **options)
        if op == "expert_gemm":
            return jmm.expert_gemm(x, gate_up, table, **options)[0] * second.sum()
        if op == "linear":
            return jmm.linear(x, gate_up, expert=1, **options) * second.sum()
        return jmm.ragged_dot(x, gate_up, sizes, **options) * second.sum()

    def loss(x, second):
        y = result(x, second)
        y = y[0] if isinstance(y, tuple) else y
        return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(x, router if op == "moe_layer" else weights)


def assert_gradients_agree(op, weight_format, dtype, activation, implementation):
    ours, theirs = (gradients(op, weight_format, dtype, activation, name) for name in (implementation, "xla"))
    for ours_leaf, theirs_leaf in zip(ours, theirs, strict=True):
        assert ours_leaf.dtype == theirs_leaf.dtype
        a, b = np.asarray(ours_leaf, np.float64), np.asarray(theirs_leaf, np.float64)
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) <= LIMITS[dtype] * np.linalg.norm(b)


@pytest.mark.sampled(300)
@pytest.mark.parametrize(("op", "weight_format", "dtype", "activation"), CASES)
def test_gradients_are_those_of_the_reference(op, weight_format, dtype, activation):
    assert_gradients_agree(op, weight_format, dtype, activation, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["fused_moe", "moe_layer", *PRODUCTS])
def test_the_card_agrees_on_the_gradients_of_every_op(op):
    assert_gradients_agree(op, "nvfp4", "bfloat16", "swiglu", "cuda")
