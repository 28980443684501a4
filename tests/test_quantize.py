"""`quantize`: dense weights to codes and scales, and packed weights back to both."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    FACTS,
    Experts,
    random_experts,
    unpacked,
)

import jax_marlin_moe as jmm

K, N = 128, 64


DENSE_DTYPES = pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])


GROUPS = pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])


def group_steps(dense, weights):
    """|dense - weights| and the scale of each element, both [E, G, g, N]."""
    shape = (dense.shape[0], weights.num_groups, -1, dense.shape[2])
    experts = unpacked(weights)
    return np.abs(experts.dense() - dense.astype(np.float32)).reshape(shape), experts.scales.astype(np.float32)[
        :, :, None
    ]


EVERY_FORMAT = pytest.mark.parametrize("weight_format", FACTS)


def stored(weights) -> Experts:
    """Codes, scales and zero points of packed weights, for the oracle's arithmetic."""
    experts, padding = unpacked(weights), (weights.column_padding or (0,))[0]
    columns = slice(experts.n - padding)
    zeros = None if experts.zeros is None else experts.zeros[..., columns]
    return dataclasses.replace(
        experts, codes=experts.codes[..., columns], scales=experts.scales[..., columns], zeros=zeros
    )


def nearest_errors(dense, experts: Experts):
    """The distance of each weight to what the best code for its scale and zero point would give."""
    facts, group = experts.facts, np.arange(experts.k) // experts.group_size
    scales = experts.scales.astype(np.float64) if facts.scale_bytes is None else facts.scale_bytes[experts.scales]
    step = scales[:, group]
    if experts.global_scales is not None:
        step = step * experts.global_scales.astype(np.float64).repeat(64, axis=1)[:, None, : experts.n]
    zeros = facts.zero_point if experts.zeros is None else experts.zeros.astype(np.float64)[:, group]
    values = np.unique(facts.values[~np.isnan(facts.values)])
    if facts.zeros is None and facts.values[1] == 1.0:
        values = values[1:]  # symmetric integers may leave the lowest code unused
    # The two neighbours of each weight among the values.
    wanted = dense / np.where(step == 0, 1, step) + zeros
    above = np.clip(np.searchsorted(values, wanted), 1, len(values) - 1)
    distances = [np.abs((values[index] - zeros) * step - dense) for index in (above - 1, above)]
    return np.minimum(*distances), step


@pytest.mark.sampled(2)
@EVERY_FORMAT
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-12, 12), offset=st.floats(-2, 2))
def test_codes_are_the_nearest_for_the_scales_as_stored(weight_format, seed, exponent, offset):
    rng = np.random.default_rng(seed)
    size = FACTS[weight_format].group_sizes[0]
    # A partial last group, padding in both directions, and a group that is zero but for one large weight.
    dense = (rng.normal(offset, 1.0, (2, 2 * size + 9, 72)) * 2.0**exponent).astype(np.float32)
    dense[:, :size, 5] = 0
    dense[:, 3, 5] = 2.0**exponent
    experts = stored(jmm.quantize(dense, weight_format, group_size=size))
    error = np.abs(experts.dense() - dense)
    best, step = nearest_errors(dense.astype(np.float64), experts)
    # Where two codes are as near but for the rounding of the quotient, either will do.
    assert (error <= best + 1e-5 * np.maximum(step, np.abs(dense))).all()


@pytest.mark.sampled(3)
@EVERY_FORMAT
@given(seed=st.integers(0, 2**32 - 1), offset=st.floats(-1, 1))
def test_errors_are_half_a_step(weight_format, seed, offset):
    """Of integers: half a scale. Of floats: half the distance of neighbouring values, the largest in the top binade."""
    rng = np.random.default_rng(seed)
    facts = FACTS[weight_format]
    size = facts.group_sizes[0]
    dense = rng.normal(offset, 1.0, (1, 2 * size, 64)).astype(np.float32)
    experts = stored(jmm.quantize(dense, weight_format, group_size=size, scale_dtype=_float32_where_free(facts)))
    error = np.abs(experts.dense() - dense)
    _, step = nearest_errors(dense.astype(np.float64), experts)
    if facts.values[1] == 1.0:
        assert (error <= 0.5001 * step).all()
        return
    scaled = np.abs(dense) / step
    values = np.unique(np.abs(facts.values[~np.isnan(facts.values)]))
    above = np.clip(np.searchsorted(values, scaled), 1, len(values) - 1)
    half = (values[above] - values[above - 1]) / 2
    # Power-of-two scales leave up to a third (e2m1) or a seventh (e4m3) above the largest value, e4m3 scales half of
    # their own last bit.
    reach = np.maximum(half, scaled - values[-1])
    assert (error <= 1.0001 * reach * step).all()
    limit = {"nvfp4": 1 + 2.0**-4, "mxfp4": 8 / 6, "mxfp8": 512 / 448}.get(weight_format, 1.0001)
    assert (scaled <= limit * values[-1] * 1.0001).all()


def _float32_where_free(facts):
    return np.float32 if facts.scale_bytes is None else None


@pytest.mark.parametrize(
    ("weight_format", "dtype", "largest", "top"),
    [("mxfp4", ml_dtypes.float4_e2m1fn, 6.0, 7.99), ("mxfp8", ml_dtypes.float8_e4m3fn, 448.0, 511.0)],
)
def test_floats_round_as_ml_dtypes_does(weight_format, dtype, largest, top):
    """Every value, every midpoint and what lies next to them, of either sign, at a scale of 1; saturating."""
    facts = FACTS[weight_format]
    values = np.unique(np.abs(facts.values[~np.isnan(facts.values)])).astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    probes = np.concatenate([values, middles, [top, 0.0]]).astype(np.float32)
    probes = np.concatenate([probes, np.nextafter(probes, np.float32(0)), np.nextafter(probes, np.float32(np.inf))])
    probes = np.concatenate([probes, -probes]).astype(np.float32)
    columns = -(-probes.size // 31)
    dense = np.zeros((32, columns), np.float32)
    dense[:31].flat[: probes.size] = probes
    dense[31] = largest  # whose exponent makes the scale 1
    experts = stored(jmm.quantize(dense[None], weight_format))
    assert (experts.scales == 127).all()
    expected = np.clip(dense, -largest, largest).astype(dtype).view(np.uint8)
    mask = 0xF if facts.bits == 4 else 0xFF
    np.testing.assert_array_equal(experts.codes[0] & mask, expected & mask)


@pytest.mark.covering
@EVERY_FORMAT
@pytest.mark.parametrize(("k", "n"), [(256, 128), (100, 80), (7, 3)])
def test_packing_is_bit_exact(weight_format, k, n):
    """`pack_logical` against the index formulas of the layout, and back."""
    size = FACTS[weight_format].group_sizes[0]
    experts = random_experts(
        np.random.default_rng(11), 3, k, n, weight_format=weight_format, group_size=size, bias=True
    )
    weights = jmm.pack_logical(
        experts.codes,
        experts.scales,
        weight_format,
        group_size=size,
        zeros=experts.zeros,
        global_scales=experts.global_scales,
        bias=experts.bias,
    )
    expected = experts.packed()
    assert jax.tree.structure(weights) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    back = stored(weights)
    np.testing.assert_array_equal(back.codes, experts.codes)
    np.testing.assert_array_equal(back.scales, experts.scales)
    if experts.zeros is not None:
        np.testing.assert_array_equal(back.zeros, experts.zeros)


def test_one_global_scale_an_expert_serves_all_columns():
    experts = random_experts(np.random.default_rng(12), 2, 32, 128, weight_format="nvfp4", group_size=16)
    weights = jmm.pack_logical(experts.codes, experts.scales, "nvfp4", global_scales=np.asarray([0.5, 3.0], np.float32))
    np.testing.assert_array_equal(weights.global_scales, [[0.5, 0.5], [3.0, 3.0]])


@pytest.mark.covering
@GROUPS
@DENSE_DTYPES
def test_symmetric_codes_are_the_nearest(platform, group_size, dtype):
    dense = np.random.default_rng(0).normal(size=(2, 256, 64)).astype(dtype)
    weights = jmm.quantize(dense, "int4", group_size=group_size)
    assert weights.format.name == "int4"
    assert weights.zeros is None
    assert weights.group_size == (group_size or 256)
    error, step = group_steps(dense, weights)
    assert (error <= 0.5001 * step).all()


@pytest.mark.sampled(2)
@GROUPS
def test_asymmetric_codes_are_the_nearest(group_size):
    # Off centre, so that a symmetric quantiser would waste half of its codes.
    dense = np.random.default_rng(1).normal(0.7, 1.0, (2, 256, 64)).astype(np.float32)
    weights = jmm.quantize(dense, "int4_zp", group_size=group_size, scale_dtype=np.float16)
    assert weights.zeros is not None
    error, step = group_steps(dense, weights)
    # At the ends of the range the zero point's and the scale's own rounding come on top.
    assert (error <= (0.5 + 16 * 2**-11) * step).all()
    symmetric, _ = group_steps(dense, jmm.quantize(dense, "int4", group_size=group_size, scale_dtype=np.float16))
    assert error.mean() < symmetric.mean()


@pytest.mark.parametrize("magnitude", [1e-3, 1e-5, 1e-6])
def test_small_weights_have_subnormal_scales(platform, magnitude):
    """Of float16; a compiler that flushed them would make zeros of whole groups."""
    dense = (np.random.default_rng(9).normal(size=(1, 64, 64)) * magnitude).astype(np.float32)
    weights = jmm.quantize(dense, "int4", group_size=None, scale_dtype=np.float16)
    largest = np.abs(dense).max(1)[:, None] / 7
    scales = np.asarray(jmm.layout.unpermute_scales(weights.scales))
    np.testing.assert_array_max_ulp(scales, largest.astype(np.float16), maxulp=1)
    error, step = group_steps(dense, weights)
    # Where the scale itself was rounded down by much, the largest weight is out of the codes' reach.
    reach = np.maximum(0.5001 * step, np.abs(dense)[:, None] - 7 * step)
    assert (error <= reach).all()


@pytest.mark.parametrize("weight_format", ["int4", "int4_zp"])
def test_all_zero_groups_stay_zero(weight_format):
    dense = np.random.default_rng(2).normal(size=(1, 64, 64)).astype(np.float32)
    dense[:, :32] = 0
    restored = np.asarray(jmm.dense_weights(jmm.quantize(dense, weight_format, group_size=32)))
    assert (restored[:, :32] == 0).all()
    assert restored[:, 32:].any()


@pytest.mark.parametrize("weight_format", ["int4", "int4_zp"])
def test_quantisation_is_idempotent(weight_format):
    # The largest magnitude of each column is 7 steps, or its range is 15, so the scale is found again.
    codes = np.random.default_rng(3).integers(-7, 8, (1, 64, 64))
    codes[:, 0], codes[:, 1] = -7, 8 if weight_format == "int4_zp" else 7
    dense = (codes * 0.125).astype(np.float32)
    weights = jmm.quantize(dense, weight_format, group_size=None)
    np.testing.assert_array_equal(jmm.dense_weights(weights), dense)


def test_scales_keep_the_type_of_the_weights_unless_told():
    dense = np.ones((1, 16, 64), np.float32)
    assert jmm.quantize(dense, group_size=16).scales.dtype == jnp.bfloat16
    assert jmm.quantize(dense.astype(np.float16), group_size=16).scales.dtype == np.float16
    assert jmm.quantize(dense, group_size=16, scale_dtype=np.float16).scales.dtype == np.float16


def test_bias_is_kept_in_float32():
    bias = np.arange(64, dtype=np.float16)[None]
    weights = jmm.quantize(np.ones((1, 16, 64), np.float32), group_size=16, bias=bias)
    assert weights.bias.dtype == jnp.float32
    np.testing.assert_array_equal(weights.bias, bias)


def test_quantize_traces():
    dense = jnp.asarray(np.random.default_rng(4).normal(size=(2, 64, 64)), jnp.bfloat16)
    traced = jax.jit(lambda w: jmm.quantize(w, group_size=32))(dense)
    np.testing.assert_array_equal(traced.packed, jmm.quantize(dense, group_size=32).packed)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 0, 64), {"group_size": None}, r"dense has shape \(1, 0, 64\); it must not be empty"),
        ((0, 16, 64), {"group_size": None}, r"dense has shape \(0, 16, 64\); it must not be empty"),
        ((1, 64, 64), {"group_size": 48}, "group_size is 48"),
        (
            (1, 64, 64),
            {"weight_format": "nvfp4", "group_size": 32},
            r"group_size is 32; format nvfp4 takes one of \(16,\)",
        ),
        ((1, 64, 64), {"weight_format": "mxfp4", "group_size": None}, r"group_size is None; format mxfp4 takes one of"),
        ((1, 256, 64), {"weight_format": "fp8", "group_size": 64}, r"takes None \(one group\) or one of \(128,\)"),
        ((1, 64, 64), {"group_size": 0}, "group_size is 0"),
        ((64, 64), {}, "dense has shape"),
        ((1, 128, 64), {"weight_format": "int3"}, "format is 'int3'; it must be one of bf16, fp16, fp8, int4"),
        ((1, 128, 64), {"bias": np.zeros((1, 63), np.float32)}, "bias has shape"),
    ],
)
def test_bad_dense_weights_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        jmm.quantize(np.zeros(shape, np.float32), **options)


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (np.int32, {}, "dense has dtype int32"),
        (np.float32, {"scale_dtype": np.int8}, "scale_dtype is int8; format int4 takes float16 or bfloat16 or float32"),
    ],
)
def test_bad_dense_types_are_refused(dtype, options, message):
    with pytest.raises(TypeError, match=message):
        jmm.quantize(np.ones((1, 128, 64), dtype), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weight_format", ["int4", "int4_zp", "nvfp4", "mxfp4"])
def test_weights_that_are_not_finite_are_refused_or_spoil_their_group(weight_format, value):
    dense = np.ones((2, 64, 64), np.float32)
    dense[0, 3, 5] = value
    with pytest.raises(ValueError, match="dense holds infinities or NaN"):
        jmm.quantize(dense, weight_format, group_size=FACTS[weight_format].group_sizes[0])

    @jax.jit
    def grids(dense):
        size = FACTS[weight_format].group_sizes[0]
        packed = jmm.dequantize(jmm.quantize(dense, weight_format, group_size=size))
        return packed, jmm.fake_quantize(dense, weight_format, size)

    for grid in grids(dense):
        assert not np.isfinite(np.asarray(grid)[0, 3, 5])
        assert np.isfinite(grid[1]).all()


@pytest.mark.parametrize(
    ("dense", "options", "message"),
    [
        ([[[1.0]]], {}, "dense has type list; it must be an array"),
        (np.ones((1, 128, 64), np.float32), {"bias": [[0.0]]}, "bias has type list; it must be an array"),
        (np.ones((1, 128, 64), np.float32), {"scale_dtype": "bf16"}, "scale_dtype is 'bf16'; it must be a dtype"),
    ],
)
def test_what_is_no_array_or_dtype_is_refused_by_name(dense, options, message):
    with pytest.raises(TypeError, match=message):
        jmm.quantize(dense, **options)
