"""Activations in 8 bits on every platform, against rows that numpy quantises and products in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_blocks import DTYPES, GROUPED, LARGEST, quantized, quantized_block, random_block, relative_error

import jax_marlin_moe as jmm
from jax_marlin_moe.byte_rows import quantize_rows

EXPERTS, HIDDEN, INNER, TOKENS = 4, 256, 128, 9


def block_of(weight_format, group_size, *, bias=True):
    scale_dtype = jnp.float32 if weight_format == "fp8" else jnp.bfloat16
    options = {"weight_format": weight_format, "group_size": group_size, "bias": bias, "scale_dtype": scale_dtype}
    return random_block(np.random.default_rng(0), TOKENS, EXPERTS, HIDDEN, INNER, dtype=jnp.bfloat16, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_quantised_as_stated(dtype):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 96)) * 10.0 ** rng.uniform(-30, 30, (40, 1))
    rows[0] = 0
    rows[1, :3] = 448, 24.5, -0.001  # ties and subnormals of e4m3, where 448 is the largest
    rows[2] = 1e-38  # subnormal scales would not have an inverse
    rows = rows.astype(jnp.bfloat16)
    values, scales = jax.jit(partial(quantize_rows, dtype=dtype))(rows)
    of_numpy, scales_of_numpy = quantized(rows, dtype)
    np.testing.assert_array_equal(scales, scales_of_numpy)
    np.testing.assert_array_equal(values, of_numpy)
    assert not np.asarray(values)[0].any()
    assert np.max(np.abs(np.asarray(values)[3:])) == LARGEST[dtype]


def test_columns_are_quantised_128_at_a_time():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 320)) * np.repeat(10.0 ** rng.uniform(-3, 3, (5, 3)), 128, axis=1)[:, :320]
    rows[0, :128] = 0
    rows = rows.astype(jnp.bfloat16)
    values, scales = jax.jit(partial(quantize_rows, dtype=GROUPED))(rows)
    of_numpy, scales_of_numpy = quantized(rows, GROUPED)
    np.testing.assert_array_equal(scales, scales_of_numpy[:, [0, 128, 256]])
    np.testing.assert_array_equal(values, of_numpy)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_spoils_itself_alone(dtype, bad):
    first, second, x, weights, ids = block_of("int4", 128)
    ids[5] = 1, 2
    spoiled = x.copy()
    spoiled[5, 7] = bad
    block = partial(jmm.fused_moe, activation_dtype=dtype, implementation="cpu")
    packed = first.packed(), second.packed()
    y, whole = (np.asarray(block(jax.device_put(rows), *packed, weights, jax.device_put(ids))) for rows in (spoiled, x))
    assert np.isnan(y[5]).all()
    np.testing.assert_array_equal(np.delete(y, 5, 0), np.delete(whole, 5, 0))


@pytest.mark.covering
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize(
    ("weight_format", "group_size", "dtype"),
    [
        ("int4", 128, "float8_e4m3fn"),
        ("int4", 32, "int8"),
        ("int8_zp", None, "int8"),
        ("fp8", 128, "float8_e4m3fn"),
        ("fp8", 128, GROUPED),
        ("int4", 32, GROUPED),
    ],
)
def test_a_block_is_that_of_its_quantised_rows(implementation, weight_format, group_size, dtype):
    first, second, x, weights, ids = block_of(weight_format, group_size)
    y = jmm.fused_moe(
        jax.device_put(x),
        first.packed(),
        second.packed(),
        jax.device_put(weights),
        jax.device_put(ids),
        activation_dtype=dtype,
        preferred_element_type=jnp.float32,
        implementation=implementation,
    )
    # A hidden value next to a tie may be rounded to the other of two neighbours: a few of them in a row.
    assert relative_error(y, quantized_block(first, second, x, weights, ids, dtype)) < 3e-3
    assert not np.asarray(y)[2].any()


def quantizer_of(dtype):
    quantizers = jmm.IntermediateQuantizer
    return {"float8_e4m3fn": quantizers.static_fp8, "int8": quantizers.static_int8}[dtype]


@pytest.mark.covering
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "of_x", "of_hidden"),
    [
        ("float8_e4m3fn", True, True),
        ("float8_e4m3fn", True, False),
        ("float8_e4m3fn", False, True),
        ("int8", True, True),
        ("int8", False, True),
    ],
)
def test_scales_that_are_fixed_take_the_place_of_those_of_rows(implementation, dtype, of_x, of_hidden):
    first, second, x, weights, ids = block_of("int4", 128)
    # Some values are beyond the largest number of the type, and are that.
    x_scale = np.float32(np.abs(np.float32(x)).max() / (100 if dtype == "int8" else 300)) if of_x else None
    hidden_scales = np.float32([0.11, 0.2, 0.07, 0.4]) if of_hidden else None
    quantizer = quantizer_of(dtype)(hidden_scales) if of_hidden else None
    y = jmm.fused_moe(
        jax.device_put(x),
        first.packed(),
        second.packed(),
        jax.device_put(weights),
        jax.device_put(ids),
        activation_dtype=dtype,
        x_scale=x_scale,
        intermediate=quantizer,
        preferred_element_type=jnp.float32,
        implementation=implementation,
    )
    assert relative_error(y, quantized_block(first, second, x, weights, ids, dtype, x_scale, hidden_scales)) < 3e-3
    assert relative_error(y, quantized_block(first, second, x, weights, ids, dtype)) > 1e-2


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_row_that_is_not_a_number_stays_one_with_fixed_scales(implementation, dtype):
    """Integers have no NaN, and what is not a number is not the largest one in silence; infinity is."""
    first, second, x, weights, ids = block_of("int4", 128)
    x, ids = x[4:7].copy(), ids[4:7] % EXPERTS
    x[0, 3], x[1, 3] = np.nan, np.inf
    y = jmm.fused_moe(
        *(jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights[4:7]), jax.device_put(ids)),
        activation_dtype=dtype,
        x_scale=0.1,
        intermediate=quantizer_of(dtype)(0.1),
        implementation=implementation,
    )
    y = np.float32(y)
    assert np.isnan(y).all(axis=1).tolist() == [True, False, False]
    assert np.isfinite(y[1:]).all()


def test_a_layer_uses_its_fixed_scales_for_rows_of_e4m3_alone():
    first, second, x, *_ = block_of("int4", 128)
    rng = np.random.default_rng(1)
    router = jax.device_put(rng.normal(size=(HIDDEN, EXPERTS)).astype(np.float32))
    bare = jmm.MoELayer(first.packed(), second.packed(), router, jmm.Routing(2, "softmax"))
    scales = jax.device_put(np.float32([0.11, 0.2, 0.07, 0.4]))
    layer = dataclasses.replace(bare, x_scale=jnp.float32(0.02), intermediate_scales=scales)
    rows = jax.device_put(x)
    weights, ids = layer.route(rows)
    fixed = {"x_scale": layer.x_scale, "intermediate": jmm.IntermediateQuantizer.static_fp8(scales)}
    arguments = rows, layer.gate_up, layer.down, weights, ids
    wanted = jmm.fused_moe(*arguments, activation_dtype="float8_e4m3fn", **fixed)
    np.testing.assert_array_equal(layer(rows, activation_dtype="float8_e4m3fn"), wanted)
    np.testing.assert_array_equal(layer(rows, activation_dtype="int8"), bare(rows, activation_dtype="int8"))
    np.testing.assert_array_equal(layer(rows), bare(rows))
    # Slots may have an order of their own.
    order = np.int32([2, 0, 3, 1])
    gate_up, down = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[order]), (layer.gate_up, layer.down))
    placed = dataclasses.replace(layer, placement=jax.device_put(order), gate_up=gate_up, down=down)
    np.testing.assert_array_equal(placed(rows, activation_dtype="float8_e4m3fn"), wanted)
    with pytest.raises(ValueError, match="x_scale is not None and activation_dtype None; it must be None: rows stay"):
        jmm.moe_layer(rows, router, layer.gate_up, layer.down, routing=layer.routing, x_scale=1.0)


def test_quantised_rows_are_named_where_they_cannot_be():
    first, second, x, weights, ids = block_of("int4", 128)
    arguments = jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids)
    with pytest.raises(
        ValueError, match=r"activation_dtype is 'bfloat16'; it must be None .* 'float8_e4m3fn', 'f.*8', 'int8'"
    ):
        jmm.fused_moe(*arguments, activation_dtype="bfloat16")
    quantizer = jmm.IntermediateQuantizer.static_fp8(1.0)
    with pytest.raises(ValueError, match=r"'int8' and intermediate\.kind 'static_fp8'; it must be 'static_int8', or i"):
        jmm.fused_moe(*arguments, activation_dtype="int8", intermediate=quantizer)
    for bad in (-1.0, 0, np.float32("nan")):
        with pytest.raises(ValueError, match=r"x_scale is .*; scales must be positive and finite"):
            jmm.fused_moe(*arguments, activation_dtype="float8_e4m3fn", x_scale=bad)
    integers = jmm.IntermediateQuantizer.static_int8(1.0)
    with pytest.raises(
        ValueError, match=r"intermediate\.kind 'static_int8'; it must be 'static_fp8' or 'dynamic_nvfp4'"
    ):
        jmm.fused_moe(*arguments, intermediate=integers)
    with pytest.raises(ValueError, match=r"_g128' and x_scale is not None; it must be None: .* 'float8_e4m3fn' and 'i"):
        jmm.fused_moe(*arguments, activation_dtype="float8_e4m3fn_g128", x_scale=1.0)
    blocks = jmm.IntermediateQuantizer.dynamic_nvfp4(1.0)
    with pytest.raises(ValueError, match=r"intermediate\.kind 'dynamic_nvfp4'; it must be 'static_fp8', or inter"):
        jmm.fused_moe(*arguments, activation_dtype="float8_e4m3fn", intermediate=blocks)
    fp8 = arguments[0].astype(jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match="activation_dtype is 'int8' and x has dtype float8_e4m3fn; x must have 16 bi"):
        jmm.fused_moe(fp8, *arguments[1:], activation_dtype="int8", x_scale=1.0)
    with pytest.raises(NotImplementedError, match="where activation_dtype is not None: what it rounds has no derivati"):
        jax.grad(lambda rows: jmm.fused_moe(rows, *arguments[1:], activation_dtype="int8").sum())(arguments[0])


@pytest.mark.parametrize("activation_dtype", ["float8_e4m3fn", "int8"])
def test_the_reference_has_no_derivative_of_rounding_either(activation_dtype):
    def total(rows):
        values, scales = quantize_rows(rows, activation_dtype)
        return (values * scales).sum()

    rows = np.ones((2, 8), np.float32)
    with pytest.raises(NotImplementedError, match=r"rounding to (e4m3|integers) has no derivative"):
        jax.eval_shape(jax.grad(total), rows)
    gradient = jax.jit(jax.grad(lambda rows: (rows + jax.lax.stop_gradient(total(rows))).sum()))(rows)
    np.testing.assert_array_equal(gradient, 1)


def test_rows_may_be_named_by_a_dtype():
    first, second, x, weights, ids = block_of("int4", 128)
    arguments = jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids)
    block = partial(jmm.fused_moe, *arguments)
    np.testing.assert_array_equal(block(activation_dtype=jnp.int8), block(activation_dtype="int8"))
    layer = jmm.MoELayer(*arguments[1:3], jnp.ones((HIDDEN, EXPERTS)), jmm.Routing(2), x_scale=jnp.float32(0.02))
    by_name, by_dtype = (layer(arguments[0], activation_dtype=d) for d in ("float8_e4m3fn", jnp.float8_e4m3fn))
    np.testing.assert_array_equal(by_dtype, by_name)
    with pytest.raises(ValueError, match=r"activation_dtype is <class 'jax.numpy.uint8'>; it must be None"):
        block(activation_dtype=jnp.uint8)


def test_a_layer_quantises_rows_for_its_experts_and_not_for_its_router():
    first, second, x, *_ = block_of("int4", 128)
    rng = np.random.default_rng(1)
    router = jax.device_put(rng.normal(size=(HIDDEN, EXPERTS)).astype(np.float32))
    layer = jmm.MoELayer(first.packed(), second.packed(), router, jmm.Routing(2, "softmax"))
    rows = jax.device_put(x)
    weights, ids = layer.route(rows)
    alone = jmm.fused_moe(rows, layer.gate_up, layer.down, weights, ids, activation_dtype="int8")
    np.testing.assert_array_equal(layer(rows, activation_dtype="int8"), alone)
    assert np.any(np.asarray(layer(rows)) != np.asarray(alone))
