"""`TensorRTMoE`: the values of IMoELayer's sample, its definition on random experts, and bad input."""

import functools

import host_arrays
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import E2M1, E4M3

import jax_marlin_moe as jmm

E, H, I, TOP_K = 8, 32, 32, 4  # of the sample
Q = jmm.IntermediateQuantizer
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def default_device(implementation):
    return jax.default_device(jax.devices("cuda" if implementation == "cuda" else "cpu")[0])


def of_ones(k, n):
    ones = np.ones((E, k, n), ml_dtypes.float4_e2m1fn)
    return jmm.from_tensorrt_nvfp4(ones, np.ones((E, k // 16, n), ml_dtypes.float8_e4m3fn), np.float32(1))


@functools.cache
def sample(intermediate=None, scale=1.0, activation="silu"):
    """The layer whose weights are ones."""
    quantizer = None if intermediate is None else getattr(Q, intermediate)(np.float32(scale))
    return jmm.TensorRTMoE.from_weights(
        of_ones(H, I), of_ones(H, I), of_ones(I, H), activation=activation, intermediate=quantizer, hidden_scale=1.0
    )


def tokens(dtype=jnp.float32, batch=(2, 3)):
    ids = np.arange(np.prod(batch) * TOP_K, dtype=np.int32).reshape(*batch, TOP_K) % E
    return host_arrays.ones((*batch, H), dtype), ids, host_arrays.ones(ids.shape)


@functools.partial(jax.jit, static_argnames="implementation")
def called(layer, *arguments, implementation=None):
    """As one program: a layer's own operations are twenty."""
    return layer(*arguments, implementation=implementation)


@pytest.mark.covering
@IMPLEMENTATIONS
@pytest.mark.parametrize(
    ("intermediate", "scale", "value"),
    [
        ("static_fp8", 1.0, 57344),
        (None, 1.0, 131072),
        ("static_fp8", 1024 / 448, 131072),
        ("dynamic_nvfp4", 1.0, 135168),
    ],
)
def test_the_values_of_the_sample(implementation, intermediate, scale, value):
    """All ones: silu(32) * 32 is 1024, times 32 columns and 4 experts, as far as its type reaches."""
    with default_device(implementation):
        y = called(sample(intermediate, scale), *tokens(), implementation=implementation)
    assert (y.shape, y.dtype) == ((2, 3, H), jnp.float32)
    np.testing.assert_array_equal(np.asarray(y), np.float32(value))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_the_result_has_the_type_of_the_hidden_states(dtype):
    y = called(sample("static_fp8"), *tokens(dtype))
    assert y.dtype == (jnp.float32 if dtype == jnp.float8_e4m3fn else dtype)
    np.testing.assert_array_equal(np.asarray(y, np.float32), 57344)


def test_no_tokens_have_a_result():
    assert jax.eval_shape(sample(), *(part[:, :0] for part in tokens())).shape == (2, 0, H)


def test_the_product_without_an_activation():
    np.testing.assert_array_equal(np.asarray(sample("static_fp8", activation="none")(*tokens())), 57344)
    np.testing.assert_array_equal(np.asarray(sample(activation="none")(*tokens())), 4 * 32 * 1024)


@IMPLEMENTATIONS
def test_the_whole_contract_on_random_experts(implementation):
    """Doubly quantised weights, FP8 hidden states, biases, limits, scales per expert: in float64, from the tables."""
    rng = np.random.default_rng(5)
    limit, alpha, beta = 2.0, 1.5, 0.25

    def linear(k, n):
        codes = rng.integers(0, 16, (E, k, n), dtype=np.uint8)
        blocks = rng.integers(0x20, 0x40, (E, k // 16, n), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.03, E).astype(np.float32)
        bias = rng.normal(size=(E, n)).astype(np.float32)
        dense = E2M1[codes] * (E4M3[blocks] * np.float64(scales)[:, None, None]).repeat(16, axis=1)
        bytes_ = codes[..., ::2] | codes[..., 1::2] << 4
        return jmm.from_tensorrt_nvfp4(bytes_, blocks, scales, bias=bias), dense, bias

    (gate, wg, bg), (up, wu, bu), (down, wd, bd) = linear(64, 48), linear(64, 48), linear(48, 64)
    hidden_scale, scales = np.float32(0.02), rng.uniform(0.001, 0.01, E).astype(np.float32)
    layer = jmm.TensorRTMoE.from_weights(
        gate, up, down, activation=jmm.swiglu(limit, alpha, beta), intermediate=Q.static_fp8(scales),
        hidden_scale=hidden_scale,
    )  # fmt: skip
    h = rng.normal(size=(2, 9, 64)).astype(np.float32)
    ids = rng.integers(-1, E + 1, (2, 9, 3))
    scores = rng.uniform(0, 1, ids.shape).astype(np.float32)
    with default_device(implementation):
        y = layer(h, jax.device_put(ids), scores.astype(jnp.bfloat16), implementation=implementation)

    def fp8(values, scale):
        units = np.clip(np.float32(values) / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return units.astype(np.float64) * np.float64(scale)

    x, expected, ranges = fp8(h, hidden_scale), np.zeros(h.shape), np.zeros(h.shape)
    for at in np.ndindex(ids.shape):
        e = ids[at]
        if 0 <= e < E:
            g = np.minimum(x[at[:2]] @ wg[e] + bg[e], limit)
            u = np.clip(x[at[:2]] @ wu[e] + bu[e], -limit, limit)
            a = fp8(g / (1 + np.exp(-alpha * g)) * (u + beta), scales[e])
            score = float(scores[at].astype(jnp.bfloat16))
            expected[at[:2]] += score * (a @ wd[e] + bd[e])
            ranges[at[:2]] += score * (np.abs(a) @ np.abs(wd[e]))
    # A value beside the middle of two codes may take the other one: 1/16 of one term of a sum of 48.
    error = np.abs(np.asarray(y) - expected)
    assert (error <= 1e-5 + 0.01 * ranges).all()
    assert np.median(error) < 1e-5


def test_packed_codes_are_those_of_the_narrow_type():
    codes = np.random.default_rng(0).integers(0, 16, (2, 32, 64), dtype=np.uint8)
    blocks = np.full((2, 2, 64), 0x38, np.uint8)
    packed = jmm.from_tensorrt_nvfp4(codes[..., ::2] | codes[..., 1::2] << 4, blocks, np.float32(0.5))
    narrow = jmm.from_tensorrt_nvfp4(
        codes.view(ml_dtypes.float4_e2m1fn), blocks.view(ml_dtypes.float8_e4m3fn), np.full(2, 0.5, np.float32)
    )
    for leaf, same in zip(jax.tree.leaves(packed), jax.tree.leaves(narrow), strict=True):
        np.testing.assert_array_equal(leaf, same)
    np.testing.assert_array_equal(jmm.dequantize(packed), E2M1[codes] / 2)


def test_layers_are_arguments_of_jitted_and_exported_functions():
    layer, arguments = sample("dynamic_nvfp4"), tokens()
    np.testing.assert_array_equal(np.asarray(called(layer, *arguments)), 135168)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]
    data = jax.export.export(called, disabled_checks=checks)(layer, *arguments).serialize()
    np.testing.assert_array_equal(np.asarray(jax.export.deserialize(data).call(layer, *arguments)), 135168)
    assert "TensorRTMoE(" in repr(layer)


@IMPLEMENTATIONS
def test_layers_of_a_stack(implementation):
    """Weights are read where they lie in the stack, scales of their layer with them."""
    layers = [sample("static_fp8", 1.0), sample("static_fp8", 1024 / 448)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    hidden_states, *routing = tokens()

    @jax.jit
    def results(stack):
        def step(carry, index):
            return carry, jmm.take_layer(stack, index)(hidden_states, *routing, implementation=implementation)

        return jax.lax.scan(step, None, jnp.arange(2))[1]

    with default_device(implementation):
        y = np.asarray(results(stack))
    np.testing.assert_array_equal(y[0], 57344)
    np.testing.assert_array_equal(y[1], 131072)


ONES, BLOCKS = np.ones((E, H, I), ml_dtypes.float4_e2m1fn), np.full((E, H // 16, I), 0x38, np.uint8)
BAD = [
    (lambda: jmm.from_tensorrt_nvfp4(ONES.astype(np.float32), BLOCKS, np.float32(1)), TypeError, "weight has dtype"),
    (lambda: jmm.from_tensorrt_nvfp4(ONES, BLOCKS[:, :1], np.float32(1)), ValueError, "block_scale has shape"),
    (lambda: jmm.from_tensorrt_nvfp4(ONES, BLOCKS | 0x80, np.float32(1)), ValueError, "block_scale holds"),
    (lambda: jmm.from_tensorrt_nvfp4(ONES, BLOCKS, np.float32(-1)), ValueError, "scale holds values that are negative"),
    (lambda: jmm.from_tensorrt_nvfp4(ONES, BLOCKS, np.float32(np.nan)), ValueError, "scale holds values"),
    (lambda: jmm.from_tensorrt_nvfp4(ONES, BLOCKS, np.ones(3, np.float32)), TypeError, r"scale is float32 of shape"),
    (lambda: build(fc_up=of_ones(48, I)), ValueError, r"fc_up is 8 matrices \(48, 32\); with fc_gate, 8"),
    (lambda: build(fc_down=of_ones(48, H)), ValueError, r"fc_down is 8 matrices \(48, 32\)"),
    (lambda: build(activation="relu2"), ValueError, "activation is 'relu2', which is not gated"),
    (lambda: build(hidden_scale=0.0), ValueError, r"hidden_scale is 0\.0; scales must be positive and finite"),
    (lambda: build(hidden_scale=np.nan), ValueError, "hidden_scale is nan"),
    (lambda: build(hidden_scale=np.ones(2)), ValueError, r"hidden_scale has shape \(2,\)"),
    (lambda: build(intermediate=Q.static_fp8(np.ones(3))), ValueError, r"intermediate\.scales has shape \(3,\)"),
    (lambda: build(intermediate=Q.static_fp8(-1.0)), ValueError, r"scale is -1\.0; scales must be positive and finite"),
    (lambda: build(hidden_scale="one"), TypeError, "hidden_scale is 'one'; it must be a number"),
    (lambda: build(intermediate=1.0), TypeError, "intermediate has type float; it must be made by"),
    (lambda: Q.static_fp8("one"), TypeError, "scale is 'one'; it must be a number, or one per expert"),
    (lambda: build()(*tokens()), TypeError, "hidden_states has dtype float32; .* need a hidden_scale"),
    (lambda: sample()(tokens()[0], tokens()[1][0], tokens()[2]), ValueError, "selected_experts has shape"),
    (lambda: sample()(tokens()[0], *[tokens()[2]] * 2), TypeError, "selected_experts has dtype float32"),
    (lambda: sample()(*tokens()[:2], tokens()[2][:1]), ValueError, r"scores has shape \(1, 3, 4\)"),
    (lambda: sample()(*tokens()[:2], tokens()[1]), TypeError, "scores has dtype int32"),
    (lambda: sample()(*tokens()[:2], [[1.0]]), TypeError, "scores has type list; it must be an array"),
]  # fmt: skip


def build(**changes):
    parts = {"fc_gate": of_ones(H, I), "fc_up": of_ones(H, I), "fc_down": of_ones(I, H)}
    return jmm.TensorRTMoE.from_weights(**parts | changes)


@pytest.mark.parametrize(("run", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_cannot_be_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run()
