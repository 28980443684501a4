"""`linear` on every platform against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc
from oracle import assert_product_close, products, random_experts, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.plan_rows import plan_linear

EXPERTS, K, N = 3, 144, 192


@functools.cache
def arrays(rows=10, dtype="bfloat16", n=N, **options):
    rng = np.random.default_rng(4)
    facts = {"weight_format": "int4", "group_size": 16, "bias": True} | options
    return random_rows(rng, rows, K, jnp.dtype(dtype)), random_experts(rng, EXPERTS, K, n, **facts)


def expected(x, experts, expert):
    return products(x, experts, np.full(len(x), expert))


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {}),
        (10, {"weight_format": "nvfp4", "dtype": "float16"}),
        (10, {"n": 100, "bias": False}),
        (70, {"weight_format": "int8_zp", "group_size": 32}),
        (7, {"reordered": True}),
    ],
    ids=str,
)
def test_linear(platform, rows, options):
    x, experts = arrays(rows, **options)
    weights = experts.packed()
    assert_product_close(jmm.linear(x, weights.expert(1), implementation=platform), expected(x, experts, 1))
    by_number = jax.jit(functools.partial(jmm.linear, implementation=platform))
    for number in (0, 2):
        assert_product_close(by_number(x, weights, expert=jnp.int32(number)), expected(x, experts, number))


def test_a_part_of_the_columns():
    x, experts = arrays()
    y = jmm.linear(x, experts.packed().expert(2).columns(64, 192))
    assert_product_close(y, expected(x, experts, 2)[:, 64:192])


@pytest.mark.parametrize(("implementation", "n"), [("cpu", N), ("xla", 100)])
def test_a_bias_of_its_own(implementation, n):
    x, experts = arrays(n=n, bias=False)
    bias = np.random.default_rng(0).normal(size=(EXPERTS, n)).astype(np.float32)
    weights = experts.packed()
    y = jmm.linear(x, weights.expert(1), bias[1], implementation=implementation)
    assert_product_close(y, expected(x, experts, 1) + bias[1])
    numbered = jmm.linear(x, weights, bias, expert=1, implementation=implementation)
    np.testing.assert_array_equal(y, numbered)


def test_a_traced_number_out_of_range_is_the_nearest(platform):
    x, experts = arrays()
    run = jax.jit(functools.partial(jmm.linear, implementation=platform))
    for number, nearest in ((-3, 0), (9, 2)):
        y = run(x, experts.packed(), expert=jnp.int32(number))
        np.testing.assert_array_equal(y, run(x, experts.packed(), expert=jnp.int32(nearest)))


def test_leading_dimensions_are_a_batch():
    x, experts = arrays(12)
    weights = experts.packed().expert(0)
    flat = jmm.linear(x, weights)
    np.testing.assert_array_equal(jmm.linear(x.reshape(2, 3, 2, K), weights), flat.reshape(2, 3, 2, N))
    np.testing.assert_array_equal(jmm.linear(x[0], weights), jmm.linear(x[:1], weights)[0])
    assert jmm.linear(x[:0].reshape(2, 0, K), weights).shape == (2, 0, N)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_the_number_of_rows_may_be_symbolic(implementation):
    x, experts = arrays(7)
    weights = experts.packed().expert(1)
    (t,) = jax.export.symbolic_shape("t")
    function = jax.jit(lambda x: jmm.linear(x, weights, implementation=implementation))
    safe = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]
    exported = jax.export.export(function, disabled_checks=safe)(jax.ShapeDtypeStruct((t, K), x.dtype))
    assert_product_close(exported.call(x), expected(x, experts, 1))


def test_batches_of_rows_weights_and_numbers():
    x, experts = arrays(12)
    weights = experts.packed()
    rows = x.reshape(3, 4, K)
    alone = np.stack([jmm.linear(rows[e], weights, expert=e) for e in range(EXPERTS)])
    stacked = jax.tree.map(lambda leaf: leaf[:, None], weights)
    np.testing.assert_array_equal(jax.vmap(jmm.linear)(rows, stacked), alone)
    by_number = jax.vmap(lambda x, expert: jmm.linear(x, weights, expert=expert))
    np.testing.assert_array_equal(by_number(rows, jnp.arange(3, dtype=jnp.int32)), alone)
    np.testing.assert_array_equal(
        jax.vmap(lambda x: jmm.linear(x, weights.expert(0)), in_axes=1)(rows),
        jmm.linear(rows, weights, expert=0).swapaxes(0, 1),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((4, K), np.int8)}, TypeError, "x has dtype int8; it must be bfloat16, float16 or float32"),
        (
            {"x": jnp.zeros((4, 64), jnp.bfloat16)},
            ValueError,
            r"x has shape \(4, 64\); its last .* K = 144",
        ),
        ({"x": jnp.zeros((), jnp.bfloat16)}, ValueError, r"x has shape \(\); its last dimension"),
        ({"weights": jnp.zeros((K, N))}, TypeError, "weights has type .*; it must be a MarlinWeights"),
        ({"expert": None}, ValueError, "weights has 3 experts; it must have one: take weights.expert"),
        ({"expert": 3}, IndexError, r"expert is 3; it must lie in \[0, 3\)"),
        ({"expert": True}, TypeError, "expert is True; it must be an int"),
        ({"preferred_element_type": "float33"}, TypeError, "preferred_element_type is 'float33'; it must be a dtype"),
        ({"expert": 1.0}, TypeError, "expert has dtype float; it must be an int32 array"),
        ({"expert": np.zeros(2, np.int32)}, ValueError, r"expert has shape \(2,\); it must have 0 dimensions"),
        ({"bias": np.zeros((EXPERTS, N))}, ValueError, "bias is not None, and neither is weights.bias"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    x, experts = arrays()
    with pytest.raises(error, match=message):
        jmm.linear(**({"x": x, "weights": experts.packed(), "expert": 1} | change))


def test_a_bias_that_does_not_fit_is_refused():
    x, experts = arrays(bias=False)
    with pytest.raises(ValueError, match=r"bias has shape \(100,\); it must be \(N,\) = \(192,\)"):
        jmm.linear(x, experts.packed().expert(0), np.zeros(100, np.float32))
    with pytest.raises(ValueError, match=r"bias has shape \(192,\); it must be \(E, N\) = \(3, 192\)"):
        jmm.linear(x, experts.packed(), np.zeros(N, np.float32), expert=0)
    with pytest.raises(TypeError, match="bias has dtype int32; it must be floating point"):
        jmm.linear(x, experts.packed().expert(0), np.zeros(N, np.int32))


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "rows", "named"), [("sm_75", 1, True), ("sm_90a", 16, False), ("sm_90a", 4096, True)]
)
def test_the_kernel_compiles(architecture, rows, named):
    weights = jax.eval_shape(
        lambda dense: jmm.quantize(dense, "int4", group_size=64), jax.ShapeDtypeStruct((7, 256, 192), jnp.float16)
    )
    planned = plan_linear(
        jax.ShapeDtypeStruct((rows, 256), jnp.float16), weights, named=named, architecture=architecture
    )
    (kernel,) = planned.kernels
    assert kernel.structs["TokenTiles"]["slots"] == rows
    assert compiler.compile_cubin(planned.source, architecture)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 100, 4096])
@pytest.mark.parametrize("weight_format", ["int4", "nvfp4", "fp8"])
def test_widths_of_real_layers_on_the_card(rows, weight_format):
    rng = np.random.default_rng(rows)
    experts = random_experts(
        rng, 2, 2048, 1536, group_size=16 if weight_format == "nvfp4" else 128, weight_format=weight_format
    )
    x = random_rows(rng, rows, 2048, jnp.bfloat16)
    with jax.default_device(jax.devices("cuda")[0]):
        y = jmm.linear(x, experts.packed(), expert=1, implementation="cuda")
    picked = np.unique(np.concatenate([np.arange(min(rows, 24)), np.arange(max(0, rows - 24), rows)]))
    assert_product_close(np.asarray(y)[picked], expected(x[picked], experts, 1))
