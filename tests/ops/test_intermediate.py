"""Quantised intermediates on every platform, against codes that are looked up in tables of their values."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from abstract_calls import needs_nvrtc, planned_block
from oracle import E2M1, E4M3, Experts, local_experts, products

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme

KINDS = ("static_fp8", "dynamic_nvfp4")


def nearest(values, table):
    """The nearest value of a table of codes, ties to the even code."""
    positive = table[: len(table) // 2][np.isfinite(table[: len(table) // 2])]
    code = np.abs(np.abs(values)[..., None] - positive)
    best = code.min(-1, keepdims=True)
    even = np.where((code == best) & (np.arange(len(positive)) % 2 == 0), 0, np.where(code == best, 1, 2)).argmin(-1)
    return np.where(np.isnan(values), np.nan, np.copysign(positive[even], values))


def quantized(rows, kind, scales):
    """docs/formats.md, "Quantised intermediates": divisions in float32, the rest without rounding."""
    rows, scales = np.float32(rows), np.float32(scales)[:, None]
    with np.errstate(all="ignore"):
        if kind == "static_fp8":
            return np.where(scales > 0, nearest(rows / scales, E4M3) * np.float64(scales), 0)
        width = -rows.shape[1] % 16
        blocks = np.pad(rows, ((0, 0), (0, width))).reshape(len(rows), -1, 16)
        scales = scales[:, None]
        block_scale = np.float32(nearest(np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / scales, E4M3))
        divisor = block_scale * scales
        values = nearest(blocks / divisor, E2M1) * block_scale * np.float64(scales)
    return np.where(divisor > 0, values, 0).reshape(len(rows), -1)[:, : rows.shape[1]]


def exact_experts(rng, num_experts, k, n, weight_format, bias=False):
    """Experts whose products with small integers are exact in float32, in any order."""
    facts = {"int4": (16, np.ones, jnp.bfloat16), "nvfp4": (16, None, np.uint8)}[weight_format]
    group = {"int4": 32, "nvfp4": 16}[weight_format]
    shape = (num_experts, -(-k // group), n)
    powers = rng.integers(-1, 2, shape)
    scales = (2.0**powers).astype(jnp.bfloat16) if weight_format == "int4" else (0x38 + 8 * powers).astype(np.uint8)
    return Experts(
        weight_format=weight_format,
        group_size=group,
        codes=rng.integers(0, facts[0], (num_experts, k, n), dtype=np.uint8),
        scales=scales,
        bias=rng.integers(-4, 5, (num_experts, n)).astype(np.float32) if bias else None,
        global_scales=np.full((num_experts, -(-n // 64)), 0.5, np.float32) if weight_format == "nvfp4" else None,
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A block whose activation, `gate * up`, is exact: what is quantised is the same number on every platform."""

    name: str
    kind: str = "static_fp8"
    weight_format: str = "int4"
    tokens: int = 5
    hidden: int = 64
    inner: int = 64
    bias: bool = False
    activation: str = "none"
    x_scale: float | None = None
    dtype: str = "bfloat16"
    experts: int = 5
    expert_map: tuple[int, ...] | None = None


CASES = [
    *(Case(f"{kind}, {row}", kind, row, bias=True) for kind in KINDS for row in ("int4", "nvfp4")),
    *(Case(f"{kind}, inner extents of 40", kind, inner=40, hidden=72) for kind in KINDS),
    *(Case(f"{kind}, many tokens, float16", kind, tokens=150, dtype="float16", inner=192) for kind in KINDS),
    Case("not gated", "dynamic_nvfp4", activation="identity", bias=True),
    *(Case(f"{kind}, x in FP8", kind, bias=True, x_scale=0.375) for kind in KINDS),
    Case("x in FP8 alone", None, bias=True, x_scale=0.375),
    Case("scales of local experts", expert_map=(2, -1, 0, 4, 1, 3)),
]


def make_block(case):
    rng = np.random.default_rng(3)
    gate_up = exact_experts(
        rng, case.experts, case.hidden, case.inner * (1 if case.activation == "identity" else 2), case.weight_format,
        case.bias,
    )  # fmt: skip
    down = exact_experts(rng, case.experts, case.inner, case.hidden, case.weight_format, case.bias)
    x = rng.integers(-2, 3, (case.tokens, case.hidden)).astype(np.float32)
    ids = rng.integers(-1, case.experts + 1, (case.tokens, 3)).astype(np.int32)
    router = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    scales = rng.uniform(0.5, 40, case.experts).astype(np.float32)
    return x, gate_up, down, router, ids, scales


def run_block(case, platform, **options):
    """The block, and what it must be."""
    x, gate_up, down, router, ids, scales = make_block(case)
    halves = 1 if case.activation == "identity" else 2
    packed = gate_up.packed() if gate_up.n % 64 == 0 else halved(gate_up, halves)
    intermediate = None if case.kind is None else getattr(jmm.IntermediateQuantizer, case.kind)(scales)
    rows = jnp.asarray(x, jnp.float8_e4m3fn if case.x_scale else case.dtype)
    expert_map = None if case.expert_map is None else np.asarray(case.expert_map, np.int32)
    y = jmm.fused_moe(
        rows, packed, down.packed(), router, ids, activation=case.activation, x_scale=case.x_scale,
        intermediate=intermediate, preferred_element_type=jnp.float32, expert_map=expert_map, implementation=platform,
        **options,
    )  # fmt: skip
    served = local_experts(ids, case.experts, case.expert_map)
    h = products((x * np.float64(case.x_scale or 1)).repeat(3, axis=0), gate_up, served)
    a = h if halves == 1 else np.multiply(*np.split(h, 2, axis=1))
    assert np.abs(a).max() < 2**24
    if case.kind is None:
        a = a.astype(np.float32).astype(jnp.bfloat16 if case.x_scale else rows.dtype)
    else:
        a = quantized(a, case.kind, scales[np.maximum(served, 0)])
    expected = products(a, down, served) * router.reshape(-1, 1)
    return y, expected.reshape(case.tokens, 3, case.hidden).sum(1)


def halved(gate_up, halves):
    """[gate | up], each padded to whole tiles."""
    parts = np.split(np.arange(gate_up.n), halves)
    cut = [
        dataclasses.replace(
            gate_up,
            codes=gate_up.codes[..., part],
            scales=gate_up.scales[..., part],
            bias=None if gate_up.bias is None else gate_up.bias[..., part],
        )
        for part in parts
    ]
    return jmm.concatenate_columns([part.packed() for part in cut])


def assert_nearly_equal(y, expected):
    """Within the rounding of float32 sums: a code more or less in the intermediate would show."""
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_quantised_intermediate(platform, case):
    assert_nearly_equal(*run_block(case, platform))


@pytest.mark.parametrize("case", [CASES[4], CASES[-2]], ids=lambda case: case.name)
def test_the_reference_quantises_the_intermediate(case):
    assert_nearly_equal(*run_block(case, "xla"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tile", "routing"),
    [
        (MmaTile(8, 2, 1, 1, 64, 2, 2), "grouped"),
        (MmaTile(16, 1, 2, 1, 64, 2, 2), "aligned"),
        (MmaTile(8, 1, 2, 3, 64, 2, 2), "direct"),
        (MmaTile(8, 2, 1, 1, 64, 2, 2, 2), "grouped"),
        (WgmmaTile(16, 2, 1, 1, 64, 4, 1, True), "aligned"),
        (WgmmaTile(16, 4, 1, 2, 64, 4, 1, True), "aligned"),
        (WgmmaTile(48, 2, 2, 1, 64, 3, 1, True), "aligned"),
    ],
    ids=[
        "one warp",
        "gate and up in two warps",
        "shares of K",
        "clusters",
        "wgmma",
        "wgmma, shares of K",
        "wgmma, wide",
    ],
)
def test_every_way_through_the_epilogue(kind, tile, routing):
    if not isinstance(tile, MmaTile) and compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    case = Case("", kind, "nvfp4", tokens=70, hidden=256, inner=256, bias=True, x_scale=0.375)
    with jax.default_device(jax.devices("cuda")[0]):
        assert_nearly_equal(*run_block(case, "cuda", cuda_scheme=BlockScheme(routing, tile, tile)))


def identity(num_experts, size):
    """NVFP4 experts that return what they are given."""
    codes = np.broadcast_to(2 * np.eye(size, dtype=np.uint8), (num_experts, size, size))
    scales = np.full((num_experts, size // 16, size), 0x38, np.uint8)
    return jmm.pack_logical(
        jnp.asarray(codes), jax.device_put(scales), "nvfp4", global_scales=jnp.ones(num_experts, jnp.float32)
    )


def through_the_block(x, quantizer, implementation):
    """The intermediate itself, with an expert per row of scales."""
    experts = identity(quantizer.scales.shape[0], x.shape[1])
    ids = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] % experts.num_experts
    return jmm.fused_moe(
        x, experts, experts, jnp.ones_like(ids, jnp.float32), ids, activation="identity", intermediate=quantizer,
        preferred_element_type=jnp.float32, implementation=implementation,
    )  # fmt: skip


def every_bfloat16(least_exponent, exponents):
    """Every number of both signs with these exponents, 128 mantissas to a row; columns of a block differ in size."""
    bits = np.arange((127 + least_exponent) << 7, (127 + least_exponent + exponents) << 7, dtype=np.uint16)
    both = np.concatenate([bits, bits | 0x8000]).view(ml_dtypes.bfloat16).reshape(-1, 128)
    return np.random.default_rng(0).permuted(both, axis=1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_rounded_to_its_nearest_code(implementation, kind):
    scales = np.asarray([1, 0.37, 2.0**-3, 6 / 7, 448], np.float32)
    x = every_bfloat16(-14, 26)
    if kind == "dynamic_nvfp4":  # blocks of numbers within reach of each other, and of others
        x[::2] = (x[::2].astype(np.float32) * np.exp2(np.arange(128) % 16 % 4 - 2)).astype(x.dtype)
    with jax.default_device(jax.devices("cuda" if implementation == "cuda" else "cpu")[0]):
        y = through_the_block(x, getattr(jmm.IntermediateQuantizer, kind)(scales), implementation)
    of_rows = scales[np.arange(len(x)) % len(scales)]
    expected = quantized(x, kind, of_rows)
    np.testing.assert_array_equal(np.asarray(y), np.float32(expected))
    if kind == "static_fp8":  # the table agrees with the type's own cast
        units = np.clip(np.float32(x) / of_rows[:, None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(units.astype(np.float64) * np.float64(of_rows)[:, None], expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_no_scales_make_zeros_where_they_are_traced(implementation, kind):
    scales = np.asarray([0, -1, np.nan, np.inf, -np.inf, 2], np.float32)
    x = np.full((6, 64), 100, ml_dtypes.bfloat16)

    @jax.jit
    def block(x, scales):
        return through_the_block(x, getattr(jmm.IntermediateQuantizer, kind)(scales), implementation)

    with jax.default_device(jax.devices("cuda" if implementation == "cuda" else "cpu")[0]):
        y = np.asarray(block(x, scales))
        np.testing.assert_array_equal(y[:5], 0)
        assert (y[5] > 90).all()
        # A large value saturates, and a row of NaN stays alone.
        x[0], x[1], x[2] = 1e12, -1e12, np.nan
        y = np.asarray(block(x, np.full(6, 2, np.float32)))
    most = 2 * 448 * (1 if kind == "static_fp8" else 6)
    np.testing.assert_array_equal(y[:2], [[most] * 64, [-most] * 64])
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(y[3:5], [y[5], y[5]])


@pytest.mark.parametrize("implementation", ["xla", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scales_of_x_that_are_no_scales_make_zeros_where_they_are_traced(implementation):
    experts = identity(1, 64)
    ids, ones = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), jnp.float32)

    @jax.jit
    def block(x, scale):
        return jmm.fused_moe(
            x, experts, experts, ones, ids, activation="identity", x_scale=scale, implementation=implementation
        )

    with jax.default_device(jax.devices("cuda" if implementation == "cuda" else "cpu")[0]):
        x = jnp.full((2, 64), 448, jnp.float8_e4m3fn)
        for scale, value in ((2.0, 896), (0.0, 0), (-1.0, 0), (np.nan, 0), (np.inf, 0)):
            np.testing.assert_array_equal(np.asarray(block(x, np.float32(scale))), np.float32(value))


def test_scales_that_are_one_for_all_or_batched(platform):
    x, gate_up, down, router, ids, _ = make_block(CASES[0])
    rows, packed = x.astype(jnp.bfloat16), (gate_up.packed(), down.packed())

    def block(scale):
        return jmm.fused_moe(
            rows, *packed, router, ids, activation="none", implementation=platform,
            intermediate=jmm.IntermediateQuantizer.static_fp8(scale),
        )  # fmt: skip

    apart = [block(np.full(5, scale)) for scale in (3.0, 17.0)]
    np.testing.assert_array_equal(block(3.0), apart[0])
    np.testing.assert_array_equal(jax.vmap(block)(np.asarray([3.0, 17.0])), np.stack(apart))


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "tile", "kind", "name"),
    [
        ("sm_90a", WgmmaTile(8, 2, 1, 1, 64, 4, 1, True), "dynamic_nvfp4", "DynamicNvfp4"),
        ("sm_80", MmaTile(8, 2, 1, 1, 64, 2, 2), "static_fp8", "StaticFp8"),
    ],
)
def test_quantising_kernels_compile(architecture, tile, kind, name):
    weights = jax.eval_shape(lambda: identity(4, 256))
    gate_up = jax.eval_shape(lambda w: jmm.concatenate_columns([w, w]), weights)
    planned = planned_block(
        jax.ShapeDtypeStruct((40, 256), jnp.bfloat16), gate_up, weights, top_k=2, architecture=architecture,
        scheme=BlockScheme("aligned", tile, tile), scaled=True, intermediate=kind, out_dtype=jnp.dtype("float32"),
    )  # fmt: skip
    assert name in planned.source
    compiler.compile_cubin(planned.source, architecture)


ONE = jnp.float32(1)
BAD = [
    (lambda q: q.static_fp8(0.0), ValueError, r"scale is 0\.0; scales must be positive and finite"),
    (lambda q: q.dynamic_nvfp4([1, -2]), ValueError, r"scale\[1\] is -2\.0; scales must be positive"),
    (lambda q: q.static_fp8(np.nan), ValueError, "scale is nan"),
    (lambda q: q.static_fp8(np.inf), ValueError, "scale is inf"),
    (lambda q: q.static_fp8(1e-60), ValueError, r"scale is 0\.0"),
    (lambda q: q.static_fp8(np.ones((2, 2))), ValueError, r"scale has shape \(2, 2\); it must be \(\), or"),
    (lambda q: call(intermediate=q.static_fp8(np.ones(4))), ValueError, r"intermediate\.scales has shape \(4,\)"),
    (
        lambda q: call(intermediate=q(ONE, "int8")),
        ValueError,
        "intermediate.kind is 'int8'; it must be one of static_fp8",
    ),
    (lambda q: call(intermediate=q(jnp.int32(1), "static_fp8")), TypeError, "intermediate.scales has dtype int32"),
    (lambda q: call(intermediate="static_fp8"), TypeError, "intermediate has type str; it must be made by"),
    (lambda q: call(x_scale=ONE), ValueError, "x_scale is not None, but x has dtype bfloat16"),
    (lambda q: call(jnp.float8_e4m3fn), ValueError, "x_scale is None; x has dtype float8_e4m3fn"),
    (lambda q: call(jnp.float8_e4m3fn, x_scale=jnp.ones(1)), ValueError, r"x_scale has shape \(1,\)"),
    (
        lambda q: call(preferred_element_type=jnp.float16),
        TypeError,
        "preferred_element_type is float16; for x of dtype bfloat16 it must be",
    ),
]


def call(dtype=jnp.bfloat16, **options):
    x, gate_up, down, router, ids, _ = make_block(CASES[0])
    return jmm.fused_moe(jnp.asarray(x, dtype), gate_up.packed(), down.packed(), router, ids, **options)


@pytest.mark.parametrize(("run", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_cannot_be_is_refused(run, error, message):
    with pytest.raises(error, match=message):
        run(jmm.IntermediateQuantizer)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_not_differentiated_without_a_word(implementation, kind):
    x, gate_up, down, router, ids, scales = make_block(CASES[0])
    packed = gate_up.packed(), down.packed()

    def total(rows, out_dtype, intermediate):
        options = {"intermediate": intermediate, "implementation": implementation}
        y = jmm.fused_moe(rows, *packed, router, ids, preferred_element_type=out_dtype, **options)
        return y.astype(jnp.float32).sum()

    rows, quantizer = jnp.asarray(x, jnp.bfloat16), getattr(jmm.IntermediateQuantizer, kind)(scales)
    with pytest.raises(NotImplementedError, match=r"(intermediate|rounding to e.m.).* has no derivative"):
        jax.eval_shape(jax.grad(partial(total, out_dtype=jnp.float32, intermediate=quantizer)), rows)
    assert jax.eval_shape(jax.grad(partial(total, out_dtype=jnp.float32, intermediate=None)), rows).dtype == rows.dtype
