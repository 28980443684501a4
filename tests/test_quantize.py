"""Into `MarlinWeights` and back: rounding of dense weights, AWQ and GPTQ tensors, row orders."""

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
    Joined,
    assert_block_close,
    expert_block,
    random_experts,
    random_routing,
    random_rows,
    unpacked,
)

import jax_marlin_moe as jmm

PAIR_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
K, N = 128, 64


def words_along_last(codes, order=range(8)):
    """4-bit codes of the last axis in words, code i of a word at bit `4 * order[i]`."""
    shifts = 4 * np.asarray(order, np.uint32)
    fields = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 8) << shifts
    return np.bitwise_or.reduce(fields, axis=-1).view(np.int32)


def words_along_k(codes):
    return words_along_last(codes.swapaxes(1, 2)).swapaxes(1, 2)


def decode(codes, zeros, scales, group_of_row):
    """`(q - z) * s`, exact in float64 as it is in float32."""
    rows = [np.take(a.astype(np.float64), group_of_row, axis=1) for a in (zeros, scales)]
    return (codes.astype(np.float64) - rows[0]) * rows[1]


def checkpoint(experts=2, k=K, n=N, group_size=32, scale_dtype=np.float16, seed=0):
    """Codes, zero points and scales; every zero point 0 ... 15 appears."""
    rng = np.random.default_rng(seed)
    groups = k // group_size
    codes = rng.integers(0, 16, (experts, k, n), dtype=np.uint8)
    zeros = (np.arange(experts * groups * n, dtype=np.uint32) % 16).astype(np.uint8).reshape(experts, groups, n)
    return codes, zeros, rng.uniform(0.01, 0.02, (experts, groups, n)).astype(scale_dtype)


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


@pytest.mark.parametrize("scale_dtype", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("group_size", [32, 128])
def test_awq_is_exact(group_size, scale_dtype):
    codes, zeros, scales = checkpoint(group_size=group_size, scale_dtype=scale_dtype)
    weights = jmm.from_awq(words_along_last(codes, PAIR_ORDER), words_along_last(zeros, PAIR_ORDER), scales)
    assert weights.format.name == "int4_zp"
    expected = decode(codes, zeros, scales, np.arange(K) // group_size)
    np.testing.assert_array_equal(jmm.dense_weights(weights), expected)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_gptq_is_exact(checkpoint_format, group_size):
    codes, zeros, scales = checkpoint(group_size=group_size)
    offset = 0
    if checkpoint_format == "gptq":
        zeros, offset = np.maximum(zeros, 1), 1  # v1 stores z - 1, so it has no zero point of 0
    weights = jmm.from_gptq(
        words_along_k(codes), words_along_last(zeros - offset), scales, checkpoint_format=checkpoint_format
    )
    assert weights.format.name == "int4_zp"
    assert weights.input_order is None
    expected = decode(codes, zeros, scales, np.arange(K) // group_size)
    np.testing.assert_array_equal(jmm.dense_weights(weights), expected)


@pytest.mark.parametrize(("checkpoint_format", "stored"), [("gptq", 7), ("gptq_v2", 8)])
def test_zero_points_that_are_all_eight_are_baked_in(checkpoint_format, stored):
    codes, zeros, scales = checkpoint()
    qzeros = words_along_last(np.full_like(zeros, stored))
    weights = jmm.from_gptq(words_along_k(codes), qzeros, scales, checkpoint_format=checkpoint_format)
    assert weights.format.name == "int4"
    assert weights.zeros is None
    expected = decode(codes, np.full_like(zeros, 8), scales, np.arange(K) // 32)
    np.testing.assert_array_equal(jmm.dense_weights(weights), expected)


def shuffled_groups(experts=2, k=K, group_size=32, seed=5):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(np.arange(k) // group_size) for _ in range(experts)]).astype(np.int32)


def test_act_order_is_folded():
    codes, zeros, scales = checkpoint()
    g_idx = shuffled_groups()
    weights = jmm.from_gptq(
        words_along_k(codes), words_along_last(zeros), scales, g_idx=g_idx, checkpoint_format="gptq_v2"
    )
    assert weights.input_order.dtype == jnp.int32
    expected = np.stack([decode(codes[e : e + 1], zeros[e : e + 1], scales[e : e + 1], g_idx[e])[0] for e in range(2)])
    np.testing.assert_array_equal(jmm.dense_weights(weights), expected)
    # Rows in packed order, against x in the same order: the product that the ops compute.
    order = np.asarray(weights.input_order)
    np.testing.assert_array_equal(jmm.dequantize(weights), np.take_along_axis(expected, order[..., None], axis=1))


def test_a_natural_g_idx_needs_no_order():
    codes, zeros, scales = checkpoint()
    natural = np.tile(np.arange(K, dtype=np.int32) // 32, (2, 1))
    weights = jmm.from_gptq(
        words_along_k(codes), words_along_last(zeros), scales, g_idx=natural, checkpoint_format="gptq_v2"
    )
    assert weights.input_order is None


@pytest.mark.parametrize("change", [(0, 1), (0, 7), (0, -1)])
def test_unequal_groups_are_refused(change):
    codes, zeros, scales = checkpoint()
    g_idx = shuffled_groups()
    g_idx[1, np.argmax(g_idx[1] == change[0])] = change[1]
    with pytest.raises(ValueError, match="g_idx does not put exactly K / groups = 32 rows"):
        jmm.from_gptq(words_along_k(codes), words_along_last(zeros), scales, g_idx=g_idx, checkpoint_format="gptq_v2")


def test_a_v1_zero_point_of_16_is_refused():
    codes, zeros, scales = checkpoint()
    with pytest.raises(ValueError, match="v1 zero point of 16"):
        jmm.from_gptq(words_along_k(codes), words_along_last(zeros), scales)


def gptq_arguments():
    codes, zeros, scales = checkpoint()
    return {"qweight": words_along_k(codes), "qzeros": words_along_last(zeros), "scales": scales}


def awq_arguments():
    codes, zeros, scales = checkpoint()
    return {
        "qweight": words_along_last(codes, PAIR_ORDER),
        "qzeros": words_along_last(zeros, PAIR_ORDER),
        "scales": scales,
    }


BAD_TENSORS = [
    ({"qweight": np.zeros((2, 16, 64), np.uint32)}, TypeError, "qweight has dtype uint32"),
    ({"qweight": np.zeros((16, 64), np.int32)}, ValueError, "qweight has shape .* 3 dimensions"),
    ({"qzeros": np.zeros((2, 4, 8), np.int64)}, TypeError, "qzeros has dtype int64"),
    ({"qzeros": np.zeros((2, 4, 9), np.int32)}, ValueError, "qzeros has shape"),
    (
        {"scales": np.zeros((2, 4, 64), np.int32)},
        TypeError,
        "scales has dtype int32; it must be float16 or bfloat16 or",
    ),
    ({"scales": np.zeros((4, 64), np.float16)}, ValueError, "scales has shape"),
    ({"scales": np.zeros((3, 4, 64), np.float16)}, ValueError, "scales has shape"),
    ({"bits": 3}, ValueError, "bits is 3"),
]


@pytest.mark.parametrize("arguments", [awq_arguments, gptq_arguments])
@pytest.mark.parametrize(("change", "error", "message"), BAD_TENSORS)
def test_bad_tensors_are_refused(arguments, change, error, message):
    importer = jmm.from_awq if arguments is awq_arguments else jmm.from_gptq
    with pytest.raises(error, match=message):
        importer(**(arguments() | change))


@pytest.mark.parametrize("importer", [jmm.from_awq, jmm.from_gptq])
def test_groups_that_no_kernel_serves_are_refused(importer):
    # K = 128 in 16 groups of 8 rows.
    packed = (2, 128, 8) if importer is jmm.from_awq else (2, 16, 64)
    with pytest.raises(ValueError, match="group_size is 8"):
        importer(np.zeros(packed, np.int32), np.zeros((2, 16, 8), np.int32), np.ones((2, 16, 64), np.float16))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"checkpoint_format": "marlin"}, ValueError, "checkpoint_format is 'marlin'"),
        ({"g_idx": np.zeros((2, K), np.int64)}, TypeError, "g_idx has dtype int64"),
        ({"g_idx": np.zeros((2, K - 8), np.int32)}, ValueError, "g_idx has shape"),
    ],
)
def test_bad_gptq_options_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        jmm.from_gptq(**({"checkpoint_format": "gptq_v2"} | gptq_arguments() | change))


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
        ((1, 128, 64), {"weight_format": "int3"}, "format is 'int3'; it must be one of fp8, int4, int4_fzp"),
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


@pytest.mark.parametrize("weight_format", [name for name, facts in FACTS.items() if not facts.has_global_scales])
@pytest.mark.parametrize("inner", [128, 100])
def test_folding_keeps_the_function_of_the_block(weight_format, inner):
    rng = np.random.default_rng(6)
    options = {"weight_format": weight_format, "group_size": FACTS[weight_format].group_sizes[0], "bias": True}
    gate_up = Joined(tuple(random_experts(rng, 3, 256, inner, **options) for _ in range(2)))
    down = random_experts(rng, 3, inner, 256, **options, reordered=True)
    folded_gate_up, folded_down = jmm.fold_input_order(gate_up.packed(), down.packed())
    assert folded_down.input_order is None
    x = random_rows(rng, 9, 256, np.float16)
    router, ids = random_routing(rng, 9, 2, 3)
    y = jmm.fused_moe(x, folded_gate_up, folded_down, router, ids, implementation="cpu")
    assert_block_close(y, expert_block(x, gate_up, down, router, ids))


def test_folding_nothing_changes_nothing():
    rng = np.random.default_rng(7)
    gate_up, down = random_experts(rng, 2, 64, 128).packed(), random_experts(rng, 2, 64, 64).packed()
    assert jmm.fold_input_order(gate_up, down) == (gate_up, down)


def test_folding_into_global_scales_is_refused():
    rng = np.random.default_rng(8)
    gate_up = random_experts(rng, 2, 64, 128, weight_format="nvfp4", group_size=16).packed()
    with pytest.raises(ValueError, match=r"gate_up.global_scales is not None: they belong to blocks of 64 columns"):
        jmm.fold_input_order(gate_up, random_experts(rng, 2, 64, 64, reordered=True).packed())


def test_folding_into_columns_that_do_not_match_is_refused():
    rng = np.random.default_rng(8)
    gate_up = random_experts(rng, 2, 64, 128).packed()
    with pytest.raises(ValueError, match="gate_up has N = 128"):
        jmm.fold_input_order(gate_up, random_experts(rng, 2, 192, 64, reordered=True).packed())
