"""`from_*` over stacks of experts in memory, against numpy on the same tensors."""

import types

import checkpoint_files as files
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm

E, K, N = 3, 128, 72  # N is padded to 128
BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def same(weights, expected):
    assert (weights.k, weights.n) == expected.shape[1:]
    np.testing.assert_allclose(oracle.dense(weights), expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_awq(rng, bits):
    order = np.argsort([0, 4, 1, 5, 2, 6, 3, 7]) if bits == 4 else np.argsort([0, 2, 1, 3])
    codes, zeros = rng.integers(0, 2**bits, (E, K, N)), rng.integers(0, 2**bits, (E, K // 32, N))

    def words(values):
        fields = values.reshape(*values.shape[:2], -1, len(order))[..., order]
        return files.join(fields.reshape(values.shape), bits, 2)

    scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
    weights = jmm.from_awq(words(codes), words(zeros), scales, bits=bits)
    assert weights.format.name == f"int{bits}_zp"
    same(weights, (codes - zeros.repeat(32, 1)) * scales.astype(float).repeat(32, 1))
    symmetric = jmm.from_awq(words(codes), None, scales, bits=bits)
    assert symmetric.format.name == f"int{bits}"
    same(symmetric, (codes - 2.0 ** (bits - 1)) * scales.astype(float).repeat(32, 1))


@pytest.mark.parametrize(("bits", "zeros"), [(8, False), (4, True)])
def test_int_quantized(rng, bits, zeros):
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (E, N, K)).astype(np.int8)
    points = rng.integers(-half, half, (E, N, K // 32)).astype(np.int8) if zeros else None
    scales = rng.uniform(0.01, 0.02, (E, N, K // 32)).astype(np.float32)
    weights = jmm.from_int_quantized(codes, scales, bits=bits, weight_zero_point=points)
    assert weights.format.name == f"int{bits}" + "_zp" * zeros
    shifted = codes - (points.astype(int).repeat(32, 2) if zeros else 0)
    same(weights, (shifted * scales.astype(float).repeat(32, 2)).swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"weight holds integers outside \[-8, 7\]"):
        jmm.from_int_quantized(np.full((1, 64, 32), 8, np.int8), scales[:1, :64, :1], bits=4)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_8_bit(rng, symmetric, checkpoint_format):
    codes = rng.integers(0, 256, (E, K, N))
    zeros = np.full((E, K // 32, N), 128) if symmetric else rng.integers(1, 256, (E, K // 32, N))
    scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float32)
    stored = zeros - (checkpoint_format == "gptq")
    weights = jmm.from_gptq(
        files.join(codes, 8, 1), files.join(stored, 8, 2), scales, bits=8, checkpoint_format=checkpoint_format
    )
    assert weights.format.name == ("int8" if symmetric else "int8_zp")
    assert weights.scales.dtype == np.float32
    same(weights, (codes - zeros.repeat(32, 1)) * scales.astype(float).repeat(32, 1))


def test_a_v1_zero_point_of_256_is_refused(rng):
    stored = np.full((E, K // 32, N), 255)
    with pytest.raises(ValueError, match="qzeros holds 255, a v1 zero point of 256"):
        jmm.from_gptq(
            np.zeros((E, K // 4, N), np.int32), files.join(stored, 8, 2), np.ones(stored.shape, np.float16), bits=8
        )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [K, 100])
def test_compressed_tensors(rng, bits, k):
    """K = 100 fills neither the last word nor, for 8 bit, the last group."""
    group = 32
    groups = -(-k // group)
    codes = np.zeros((E, N, -(-k // 8) * 8), int)
    codes[..., :k] = rng.integers(0, 2**bits, (E, N, k))
    zeros = rng.integers(0, 2**bits, (E, N, groups))
    scales = rng.uniform(0.01, 0.02, zeros.shape).astype(BF16)
    words = files.join(codes, bits, 2)[..., : -(-k * bits // 32)]
    weights = jmm.from_compressed_tensors(
        words, scales, k=k, bits=bits, group_size=group, weight_zero_point=files.join(zeros, bits, 1)
    )
    rows = np.arange(k) // group
    dense = (codes[..., :k] - zeros[..., rows]) * scales.astype(float)[..., rows]
    same(weights, dense.swapaxes(1, 2))


@pytest.mark.parametrize("divides", [True, False])
def test_nvfp4(rng, divides):
    data = rng.integers(0, 256, (E, N, K // 2), dtype=np.uint8)
    scale = rng.integers(0, 0x7F, (E, N, K // 16), dtype=np.uint8).view(E4M3)
    factors = np.float32([0.5, 0.01, 3e4])
    weights = jmm.from_nvfp4(data, scale, factors, divides=divides)
    used = 1 / factors.astype(float) if divides else factors.astype(float)
    same(weights, np.stack([files.fp4(data[e], scale[e], used[e]) for e in range(E)]))


@pytest.mark.parametrize("divides", [True, False])
def test_a_global_scale_of_zero_is_that_of_a_dead_expert(divides):
    data = np.zeros((1, N, K // 2), np.uint8)
    scale = np.zeros((1, N, K // 16), np.uint8)
    weights = jmm.from_nvfp4(data, scale, np.zeros(1, np.float32), divides=divides)
    same(weights, np.zeros((1, K, N)))


def test_mxfp4(rng):
    data = rng.integers(0, 256, (E, N, K // 2), dtype=np.uint8)
    bits = rng.integers(100, 150, (E, N, K // 32), dtype=np.uint8)
    expected = np.stack([files.fp4(d, 2.0 ** (b.astype(float) - 127)) for d, b in zip(data, bits, strict=True)])
    same(jmm.from_mxfp4(data, bits), expected)
    same(jmm.from_mxfp4(data.view(np.int8), bits.view(E8M0)), expected)


@pytest.mark.parametrize("kind", ["tensor", "channel", "group", "block", "block e8m0"])
def test_fp8(rng, kind):
    n, k = 200, 300  # neither whole blocks
    codes = (rng.normal(size=(E, n, k)) * 50).astype(E4M3)
    shape = {"tensor": (E,), "channel": (E, n), "group": (E, n, 3)}.get(kind, (E, 2, 3))
    scale = rng.uniform(0.001, 0.01, shape).astype(np.float32)
    if kind == "block e8m0":
        scale = (2.0 ** rng.integers(-9, -4, shape)).astype(E8M0)
    wide = scale.astype(float).reshape(E, *({"tensor": (1, 1), "channel": (n, 1)}.get(kind, shape[1:])))
    if kind.startswith("block"):
        wide = wide.repeat(128, 1)[:, :n]
    if wide.shape[2] == 3:
        wide = wide.repeat(128, 2)[..., :k]
    same(jmm.from_fp8(codes, scale), (codes.astype(float) * wide).swapaxes(1, 2))


def test_w4afp8(rng):
    codes, scales = rng.integers(-8, 8, (E, N, K)), rng.uniform(0.01, 0.02, (E, N, K // 64)).astype(BF16)
    data = (codes[..., ::2] & 15 | (codes[..., 1::2] & 15) << 4).astype(np.uint8).view(np.int8)
    weights = jmm.from_w4afp8(data, scales)
    assert (weights.format.name, weights.group_size, weights.scales.dtype) == ("int4", 64, BF16)
    same(weights, (codes * scales.astype(float).repeat(64, 2)).swapaxes(1, 2))
    with pytest.raises(TypeError, match="weight has dtype uint8; it must be an int8 array"):
        jmm.from_w4afp8(data.view(np.uint8), scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq(rng, bits):
    group, rows = 64, N * K // 64
    codes = rng.integers(0, 2**bits, (E, rows, group), dtype=np.uint8)
    half = rows // 2
    data = codes[:, :half] << 4 | codes[:, half:] if bits == 4 else codes
    scale, zero = (rng.uniform(low, low + 3, (E, rows, 1)).astype(np.float16) for low in (0.1, 5))
    dense = ((codes - zero.astype(float)) * scale.astype(float)).reshape(E, N, K)
    same(jmm.from_hqq(data, scale, zero, shape=(N, K), group_size=group, bits=bits), dense.swapaxes(1, 2))


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["int4", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("groups", [1, K // 128, K // 64])
@pytest.mark.parametrize("zero", [True, False])
def test_qarray(rng, dtype, groups, zero):
    if dtype == "float8_e4m3fn" and (zero or groups == K // 64):
        return
    if dtype == "float8_e4m3fn":
        values = jnp.asarray(rng.normal(size=(E, K, N)), dtype)
    else:
        limit = 8 if dtype == "int4" else 128
        values = jnp.asarray(rng.integers(-limit, limit, (E, K, N)), jnp.int8).astype(dtype)
    scale = jnp.asarray(rng.uniform(0.1, 1, (E, groups, N)), jnp.bfloat16)
    points = jnp.asarray(rng.integers(-8, 8, scale.shape), jnp.int8).astype(dtype) if zero else None
    weights = jmm.from_qarray(types.SimpleNamespace(qvalue=values, scale=scale, zero_point=points))
    rows = np.arange(K) // (K // groups)
    shift = 0 if points is None else np.asarray(points.astype(jnp.int32))[:, rows]
    same(weights, (np.asarray(values.astype(jnp.float32)) - shift) * np.asarray(scale, float)[:, rows])


@pytest.mark.parametrize(
    ("dtype", "tile", "scale_dtype", "weight_format"),
    [
        ("float8_e4m3fn", 32, "float8_e8m0fnu", "mxfp8"),
        ("float4_e2m1fn", 32, "float8_e8m0fnu", "mxfp4"),
        ("float4_e2m1fn", 16, "float8_e4m3fn", "nvfp4"),
    ],
)
def test_qarray_of_block_floats(rng, dtype, tile, scale_dtype, weight_format):
    """qwix keeps their scales as floats of the type of the weights; subnormal e4m3 scales among them."""
    values = jnp.asarray(rng.normal(size=(E, K, N)) * 3, jnp.float32).astype(dtype)
    exact = rng.uniform(2.0**-9, 0.5, (E, K // tile, N)).astype(scale_dtype).astype(np.float32)
    array = types.SimpleNamespace(qvalue=values, scale=jnp.asarray(exact, jnp.bfloat16), zero_point=None)
    weights = jmm.from_qarray(array)
    assert weights.format.name == weight_format
    same(weights, np.asarray(values.astype(jnp.float32), float) * exact.astype(float).repeat(tile, 1))
    array.scale = jnp.full_like(array.scale, 0.3)
    with pytest.raises(ValueError, match=f"scale holds values that {scale_dtype} does not.* {weight_format}"):
        jmm.from_qarray(array)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("qtype", "tile", "method", "weight_format"),
    [
        ("int4", 32, "absmax", "int4"),
        ("int4", 64, "minmax", "int4_zp"),
        ("int8", None, "absmax", "int8"),
        ("int8", 128, "minmax", "int8_zp"),
        ("float8_e4m3fn", 128, "absmax", "fp8"),
        ("mxfp8", 32, "absmax", "mxfp8"),
        ("mxfp4", 32, "absmax", "mxfp4"),
        ("nvfp4", 16, "absmax", "nvfp4"),
    ],
)
def test_qarray_of_qwix(rng, qtype, tile, method, weight_format):
    qwix = pytest.importorskip("qwix")
    dense = jnp.asarray(rng.normal(size=(E, K, N)), jnp.bfloat16)
    tiles = {} if tile is None else {1: tile}
    array = qwix.quantize(dense, qtype, channelwise_axes=(0, 2), tiled_axes=tiles, calibration_method=method)
    weights = jmm.from_qarray(array)
    assert weights.format.name == weight_format
    wide = array.astype(jnp.float32)  # the same values, multiplied without rounding
    same(weights, np.asarray(qwix.dequantize(wide), float))


def imported(rng):
    """One stack by each importer."""
    scales = rng.uniform(0.1, 1, (E, K // 32, N)).astype(np.float16)
    words = rng.integers(-(2**31), 2**31, (E, K, N // 8), dtype=np.int64).astype(np.int32)
    along_k = rng.integers(-(2**31), 2**31, (E, K // 8, N), dtype=np.int64).astype(np.int32)
    zeros = np.full((E, K // 32, N // 8), 0x22222222, np.int32)
    order = np.stack([rng.permutation(K) // 32 for _ in range(E)]).astype(np.int32)
    nibbles = rng.integers(0, 256, (E, N, K // 2), dtype=np.uint8)
    codes = rng.integers(0, 0x7F, (E, N, K), dtype=np.uint8)
    array = types.SimpleNamespace(qvalue=jnp.ones((E, K, N), jnp.int8), scale=scales, zero_point=None)
    rows = np.ones((E, N * K // 64, 1), np.float16)
    return [
        jmm.from_awq(words, zeros, scales),
        jmm.from_gptq(along_k, zeros, scales, g_idx=order),
        jmm.from_compressed_tensors(
            along_k.swapaxes(1, 2), scales.swapaxes(1, 2), k=K, weight_g_idx=order, weight_zero_point=None
        ),
        jmm.from_nvfp4(nibbles, codes[..., : K // 16], np.ones(E, np.float32), divides=True),
        jmm.from_mxfp4(nibbles, codes[..., : K // 32]),
        jmm.from_fp8(codes, np.ones((E, 1, 1), np.float32), bias=np.ones((E, N), np.float32)),
        jmm.from_hqq(codes.reshape(E, -1, 64)[:, ::2], rows, rows, shape=(N, K), group_size=64),
        jmm.from_qarray(array),
    ]


def test_importers_give_the_same_bits_under_x64_and_strict_rank_promotion():
    expected = imported(np.random.default_rng(0))
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        found = imported(np.random.default_rng(0))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


ZEROS = np.zeros((1, 64, 32), np.uint8)
BAD = [
    (
        lambda: jmm.from_nvfp4(ZEROS.astype(int), ZEROS[..., :4], np.ones(1, np.float32)),
        TypeError,
        "weight has dtype int64",
    ),
    (lambda: jmm.from_nvfp4(ZEROS, ZEROS[..., :5], np.ones(1, np.float32)), ValueError, "weight_scale has shape"),
    (lambda: jmm.from_nvfp4(ZEROS, ZEROS[..., :4] + np.uint8(0x7F), np.ones(1, np.float32)), ValueError, "holds NaN"),
    (lambda: jmm.from_nvfp4(ZEROS, ZEROS[..., :4] + np.uint8(0x81), np.ones(1, np.float32)), ValueError, "negative"),
    (lambda: jmm.from_nvfp4(ZEROS, ZEROS[..., :4], -np.ones(1, np.float32)), ValueError, "global_scale holds"),
    (lambda: jmm.from_nvfp4(ZEROS, ZEROS[..., :4], np.full(1, np.nan, np.float32)), ValueError, "global_scale holds"),
    (
        lambda: jmm.from_nvfp4(
            ZEROS + np.uint8(1), ZEROS[..., :4] + np.uint8(1), np.zeros(1, np.float32), divides=True
        ),
        ValueError,
        "global_scale holds",
    ),
    (lambda: jmm.from_nvfp4(ZEROS, ZEROS[..., :4], np.ones(2, np.float32)), ValueError, "global_scale has shape"),
    (lambda: jmm.from_mxfp4(ZEROS, ZEROS[..., :2] + np.uint8(255)), ValueError, "e8m0 255"),
    (lambda: jmm.from_mxfp4(ZEROS, ZEROS[..., :2].astype(np.float32)), TypeError, "weight_scale has dtype float32"),
    (lambda: jmm.from_fp8(ZEROS + np.uint8(0x7F), np.ones(1, np.float32)), ValueError, "weight holds NaN"),
    (
        lambda: jmm.from_fp8(ZEROS, np.ones((1, 3), np.float32)),
        ValueError,
        r"weight_scale has shape \(1, 3\); it must be",
    ),
    (lambda: jmm.from_fp8(ZEROS, np.full(1, np.inf, np.float32)), ValueError, "holds infinities"),
    (lambda: jmm.from_fp8(ZEROS, np.full(1, -1, np.float32)), ValueError, "weight_scale holds negative values"),
    (lambda: jmm.from_fp8(ZEROS, np.ones(1, np.int32)), TypeError, "weight_scale has dtype int32"),
    (
        lambda: jmm.from_compressed_tensors(np.zeros((1, 64, 8), np.int32), np.ones((1, 64, 1), np.float16), k=32),
        ValueError,
        "weight_packed has shape",
    ),
    (
        lambda: jmm.from_hqq(
            ZEROS, np.ones((1, 64), np.float16), np.ones((1, 64), np.float32), shape=(64, 64), group_size=64
        ),
        TypeError,
        "zero has dtype float32",
    ),
    (
        lambda: jmm.from_hqq(
            ZEROS, np.ones((1, 64), np.float16), np.ones((1, 64), np.float16), shape=(64, 64), group_size=16
        ),
        ValueError,
        "group_size is 16",
    ),
    (lambda: jmm.from_hqq(ZEROS, ZEROS, ZEROS, shape=(64, 64), group_size=64, bits=3), ValueError, "bits is 3"),
    (
        lambda: jmm.from_qarray(
            types.SimpleNamespace(
                qvalue=jnp.zeros((1, 64, 64), jnp.int16), scale=jnp.ones((1, 1, 64), jnp.float32), zero_point=None
            )
        ),
        TypeError,
        "qvalue has dtype int16",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_tensors_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
