"""`from_awq` and `from_gptq` in memory: exact values, row orders, tensors that are refused."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm

K, N = 128, 64


PAIR_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


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


def checkpoint(group_size=32, scale_dtype=np.float16):
    """Codes, zero points and scales of two experts; every zero point 0 ... 15 appears."""
    rng = np.random.default_rng(0)
    shape = (2, K // group_size, N)
    codes = rng.integers(0, 16, (2, K, N), dtype=np.uint8)
    zeros = (np.arange(math.prod(shape), dtype=np.uint32) % 16).astype(np.uint8).reshape(shape)
    return codes, zeros, rng.uniform(0.01, 0.02, shape).astype(scale_dtype)


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


def shuffled_groups():
    rng = np.random.default_rng(5)
    return np.stack([rng.permutation(np.arange(K) // 32) for _ in range(2)]).astype(np.int32)


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
