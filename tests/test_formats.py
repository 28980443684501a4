"""Every weight format on every path against float64 numpy: code types, scales, zero points, groups, padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import (
    E4M3,
    E8M0,
    FACTS,
    Experts,
    Joined,
    assert_block_accepted,
    assert_block_close,
    assert_product_close,
    expert_block,
    group_sizes,
    grouped_product,
    random_experts,
    random_routing,
    random_rows,
    scale_dtypes,
)

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda.kernels import wgmma
from jax_marlin_moe.cuda.kernels.problem import GemmShape

FORMATS = pytest.mark.parametrize("weight_format", FACTS)
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
EVERY_GROUP_AND_SCALE = pytest.mark.parametrize(
    ("weight_format", "group_size", "scale_dtype"),
    [(name, g, scale) for name in FACTS for g in group_sizes(name) for scale in scale_dtypes(name)],
)

MIXED = [("fp16", "bfloat16"), ("bf16", "float16")]  # formats of 16 bits with rows of the other type


def test_the_registry_has_these_facts():
    assert list(jmm.FORMATS) == list(FACTS)
    for name, facts in FACTS.items():
        row = jmm.FORMATS[name]
        for field in ("bits", "zero_point", "zeros", "group_sizes", "per_channel", "has_global_scales"):
            assert getattr(row, field) == getattr(facts, field), (name, field)
        assert set(row.scale_dtypes) == set(scale_dtypes(name))


def product(x, weights, ids, implementation, num_experts, **options):
    """`moe_gemm` over a fresh alignment."""
    alignment = jmm.moe_align_block_size(
        ids, block_size=16, num_experts=num_experts, implementation=None if implementation == "xla" else implementation
    )
    return jmm.moe_gemm(x, weights, alignment, top_k=ids.shape[1], implementation=implementation, **options)


@pytest.mark.covering
@EVERY_GROUP_AND_SCALE
@DTYPES
def test_product(platform, weight_format, group_size, scale_dtype, dtype):
    """K = 272 is 17 tiles: its last group of 32, 64 or 128 is a partial one."""
    rng = np.random.default_rng(0)
    options = {"weight_format": weight_format, "group_size": group_size, "scale_dtype": jnp.dtype(scale_dtype)}
    experts = random_experts(rng, 3, 272, 128, bias=True, **options)
    x = random_rows(rng, 9, 272, jnp.dtype(dtype))
    router, ids = random_routing(rng, 9, 2, 3)
    y = product(x, experts.packed(), ids, platform, 3, topk_weights=router, mul_topk_weights=True)
    assert_product_close(y, grouped_product(x, experts, ids, router_weights=router))


@FORMATS
def test_reference_product(weight_format):
    rng = np.random.default_rng(1)
    experts = random_experts(rng, 3, 272, 128, weight_format=weight_format, group_size=group_sizes(weight_format)[0])
    x = random_rows(rng, 5, 272, jnp.bfloat16)
    _, ids = random_routing(rng, 5, 2, 3)
    assert_product_close(product(x, experts.packed(), ids, "xla", 3), grouped_product(x, experts, ids))


@FORMATS
def test_dequantized_weights(weight_format):
    """In float32, of which the last bit of a product of three factors may be another."""
    size = FACTS[weight_format].group_sizes[0]
    experts = random_experts(np.random.default_rng(2), 2, 164, 80, weight_format=weight_format, group_size=size)
    dense = np.asarray(jmm.dequantize(experts.packed()))
    assert dense.dtype == np.float32
    np.testing.assert_allclose(dense, experts.dense(), rtol=3e-7, atol=0)


def every_code(weight_format) -> Experts:
    """One expert in which every code meets scales of every kind that the format has."""
    facts = FACTS[weight_format]
    k, n = 128, 64
    group_size = facts.group_sizes[0]
    groups = k // group_size
    codes = (np.arange(k * n).reshape(1, k, n) * 7 % 2**facts.bits).astype(np.uint8)
    codes = np.where(np.isnan(facts.values[codes]), 0, codes).astype(np.uint8)
    shape = (1, groups, n)
    scales = np.ones(shape, np.float32)
    if facts.scale_bytes is not None:  # all but NaN, and for e4m3 no negative ones
        scales = (np.arange(groups * n) % (127 if facts.scale_bytes is E4M3 else 255)).astype(np.uint8).reshape(shape)
    zeros = None
    if facts.zeros == "integer":
        zeros = (np.arange(groups * n) % 2**facts.bits).astype(np.uint8).reshape(shape)
    elif facts.zeros == "float":
        zeros = (np.arange(groups * n) % 2**facts.bits - 0.25).astype(np.float32).reshape(shape)
    return Experts(
        weight_format=weight_format,
        group_size=group_size,
        codes=codes,
        scales=scales,
        zeros=zeros,
        global_scales=np.full((1, 1), 0.75, np.float32) if facts.has_global_scales else None,
    )


@pytest.mark.covering
@FORMATS
@DTYPES
@pytest.mark.parametrize("factor", [1.0, 2.0**-6])
def test_every_code_by_itself(platform, weight_format, dtype, factor):
    """Rows that are 0 but for one element read the weights one by one: nothing but the one rounding is allowed.

    Scales of 2^-127 and e4m3 scales of 2^-9 are among them; weights too large for float32 or the output are infinite.
    """
    experts = every_code(weight_format)
    if platform == "cuda" and FACTS[weight_format].scale_bytes is E8M0:
        # The CUDA kernels hold sums with power-of-two scales 2^46 too small: exact for scales from 2^-64 on.
        experts = dataclasses.replace(experts, scales=np.maximum(experts.scales, 127 - 64))
    x = (np.eye(experts.k) * factor).astype(jnp.dtype(dtype))
    y = product(x, experts.packed(), np.zeros((experts.k, 1), np.int32), platform, 1)
    with np.errstate(over="ignore"):
        expected = (experts.dense()[0] * factor).astype(np.float32).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(y), expected)


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4", "mxfp8"])
def test_nan_scales_stay_in_their_columns(weight_format):
    """What a corrupt scale says must not read as a number. (Importers refuse it; the CUDA kernels rely on that.)"""
    experts = every_code(weight_format)
    scales = np.full_like(experts.scales, 0x38 if weight_format == "nvfp4" else 127)
    scales[:, 0, 5] = 0x7F if weight_format == "nvfp4" else 0xFF
    experts = dataclasses.replace(experts, scales=scales)
    x = np.ones((2, experts.k), jnp.bfloat16)
    y = np.asarray(product(x, experts.packed(), np.zeros((2, 1), np.int32), "cpu", 1)).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(np.arange(64) == 5, y.shape))


def test_large_rows_meet_the_smallest_scale():
    """2^100 * 2^-127 is an ordinary number, though 2^-127 is none. (Beyond what the CUDA kernels take.)"""
    rng = np.random.default_rng(3)
    experts = random_experts(rng, 2, 64, 64, weight_format="mxfp4", group_size=32)
    experts = dataclasses.replace(experts, scales=np.zeros_like(experts.scales))
    x = (random_rows(rng, 4, 64, np.float32) * 2.0**100).astype(jnp.bfloat16)
    ids = np.asarray([[0], [1], [1], [0]], np.int32)
    assert_product_close(product(x, experts.packed(), ids, "cpu", 2), grouped_product(x, experts, ids))


@pytest.mark.covering
@FORMATS
@pytest.mark.parametrize(("k", "n"), [(100, 80), (24, 8), (2880, 64), (1856, 64), (1408, 64), (704, 72), (320, 64)])
def test_products_of_padded_and_partial_shapes(platform, weight_format, k, n):
    """Rows and columns off the tile, and a last group that is shorter: 2880 = 22.5 * 128."""
    rng = np.random.default_rng(4)
    size = FACTS[weight_format].group_sizes[-1]
    experts = random_experts(rng, 2, k, n, weight_format=weight_format, group_size=min(size, k), bias=True)
    experts = dataclasses.replace(experts, group_size=size)
    weights = experts.packed()
    assert (weights.k, weights.n) == (k, n)
    x = random_rows(rng, 5, k, np.float16)
    _, ids = random_routing(rng, 5, 2, 2)
    y = product(x, weights, ids, platform, 2)
    assert y.shape == (10, n)
    assert_product_close(y, grouped_product(x, experts, ids))


@dataclasses.dataclass(frozen=True)
class Block:
    """An expert block; the defaults are an ordinary one."""

    name: str
    weight_format: str = "int4"
    down_format: str | None = None  # None: the same
    hidden: int = 128
    inner: int = 128
    tokens: int = 7
    dtype: str = "bfloat16"
    activation: str = "silu"
    parameters: tuple[float, ...] = ()
    bias: bool = False
    top_k: int = 2


def rounded_up(size, unit):
    return -(-size // unit) * unit


BLOCKS = [
    *(Block(f"{name}, {d}", name, dtype=d) for name in FACTS for d in ("bfloat16", "float16")),
    *(Block(f"padded {name}", name, hidden=80, inner=100, bias=True) for name in FACTS),
    *(Block(f"padded {name}, one token", name, hidden=72, inner=36, tokens=1) for name in ("int4_zp", "nvfp4")),
    Block("halves off the units", hidden=64, inner=192),
    Block("formats of their own", "fp8", "mxfp4"),
    Block("gpt-oss", "mxfp4", hidden=288, inner=288, activation="swiglu", parameters=(7.0, 1.702, 1.0), bias=True),
    Block("gpt-oss, fp16", "mxfp4", dtype="float16", activation="swiglu", parameters=(7.0, 1.702, 1.0), bias=True),
    Block("padded gpt-oss", "mxfp4", inner=100, activation="swiglu", parameters=(7.0, 1.702, 1.0), bias=True),
    Block("a tight limit", activation="swiglu", parameters=(0.5, 1.0, 0.0)),
    Block("no limit", activation="swiglu", parameters=(float("inf"), 1.0, 0.0)),
    Block("gelu", activation="gelu_tanh"),
    Block("padded gelu", "int8", inner=100, activation="gelu_tanh", bias=True),
    Block("not gated", activation="relu2"),
    Block("Nemotron", "nvfp4", hidden=64, inner=29 * 64, activation="relu2"),
    Block("Nemotron, fp16", "int8_zp", hidden=64, inner=29 * 64, activation="relu2", dtype="float16"),
    Block("padded and not gated", "mxfp8", hidden=80, inner=100, activation="relu2", bias=True),
    Block("GLM", "int4_zp", hidden=64, inner=1408),
    Block("a shard of 320", hidden=64, inner=320),
    Block("Gemma", "int8_fzp", hidden=64, inner=704, activation="gelu_tanh"),
]


def make_block(case: Block):
    """x, gate_up, down, router weights and ids."""
    rng = np.random.default_rng(5)

    def experts(weight_format, k, n):
        size = FACTS[weight_format].group_sizes[-1]
        part = random_experts(rng, 3, k, n, weight_format=weight_format, group_size=min(size, k), bias=case.bias)
        return dataclasses.replace(part, group_size=size)

    if case.activation == "relu2":
        gate_up = experts(case.weight_format, case.hidden, case.inner)
    elif case.inner == 96:
        gate_up = experts(case.weight_format, case.hidden, 2 * case.inner)
    else:
        gate_up = Joined(tuple(experts(case.weight_format, case.hidden, case.inner) for _ in range(2)))
    down = experts(case.down_format or case.weight_format, case.inner, case.hidden)
    x = random_rows(rng, case.tokens, case.hidden, jnp.dtype(case.dtype))
    return (x, gate_up, down, *random_routing(rng, case.tokens, case.top_k, 3))


def run_block(case: Block, arrays, implementation):
    x, gate_up, down, router, ids = arrays
    activation = jmm.swiglu(*case.parameters) if case.parameters else case.activation
    return jmm.fused_moe(
        x, gate_up.packed(), down.packed(), router, ids, activation=activation, implementation=implementation
    )


def codes_rounded_to(dtype: str, experts):
    """Experts of 16-bit codes whose numbers `dtype` holds too."""
    if isinstance(experts, Joined):
        return Joined(tuple(codes_rounded_to(dtype, part) for part in experts.parts))
    numbers = experts.codes.view({"bf16": jnp.bfloat16, "fp16": np.float16}[experts.weight_format])
    codes = numbers.astype(jnp.dtype(dtype)).astype(numbers.dtype).view(np.uint16)
    return dataclasses.replace(experts, codes=codes)


def expected_block(case: Block, arrays, implementation):
    """On CUDA the codes of 16-bit weights of another type than x are rounded to it (docs/formats.md, section 1)."""
    if (case.weight_format, case.dtype) in MIXED and implementation == "cuda":
        x, gate_up, down, *routing = arrays
        arrays = (x, codes_rounded_to(case.dtype, gate_up), codes_rounded_to(case.dtype, down), *routing)
    return expert_block(*arrays, activation=case.activation, parameters=case.parameters)


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_block(platform, case):
    arrays = make_block(case)
    y = run_block(case, arrays, platform)
    assert y.dtype == jnp.dtype(case.dtype)
    assert_block_close(y, expected_block(case, arrays, platform))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "case",
    [case for case in BLOCKS if case.name in ("padded nvfp4", "padded gpt-oss", "padded gelu", "padded and not gated")],
    ids=lambda case: case.name,
)
def test_reference_block(case):
    arrays = make_block(case)
    assert_block_close(run_block(case, arrays, "xla"), expected_block(case, arrays, "xla"))


def test_halves_with_global_scales_of_their_own(platform):
    """Gate a thousand times up, in subnormal block scales alone: a kernel that flushed them would return zeros."""
    case = Block("", "nvfp4", tokens=3)
    x, gate_up, down, router, ids = make_block(case)
    gate, up = (
        dataclasses.replace(
            part,
            scales=(part.scales % 7 + 1).astype(np.uint8),
            global_scales=(part.global_scales * factor).astype(np.float32),
        )
        for part, factor in zip(gate_up.parts, (32.0, 2.0**15), strict=True)
    )
    down = dataclasses.replace(down, global_scales=(down.global_scales * np.float32(2.0**-10)).astype(np.float32))
    arrays = (x, Joined((gate, up)), down, router, ids)
    assert_block_close(run_block(case, arrays, platform), expected_block(case, arrays, platform))


@pytest.mark.gpu
@FORMATS
@DTYPES
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_blocks_of_real_width(weight_format, dtype, tokens):
    """Many tiles in every direction, as a layer of Qwen3-30B has, with few experts."""
    with jax.default_device(jax.devices("cuda")[0]):
        case = Block("", weight_format, hidden=2048, inner=768, tokens=tokens, dtype=dtype)
        arrays = make_block(case)
        # Kernels for many rows may round weights to 16 bits; tests/cuda/test_wgmma.py holds them to that, row by row.
        assert_close = assert_block_accepted if tokens == 300 else assert_block_close
        assert_close(run_block(case, arrays, "cuda"), expected_block(case, arrays, "cuda"))


def test_two_runs_give_the_same_bits(platform):
    case = Block("", "nvfp4", tokens=70)
    arrays = make_block(case)
    first = np.asarray(run_block(case, arrays, platform))
    for _ in range(3):
        np.testing.assert_array_equal(
            np.asarray(run_block(case, arrays, platform)).view(np.uint16), first.view(np.uint16)
        )


def test_weights_of_16_bits_are_not_rounded_twice():
    """To the type of x, and with their scales again."""
    for code, dtype in (*MIXED, ("bf16", "bfloat16")):
        shape = GemmShape(1024, 512, 8, 128, False, code, 16, dtype, None, dtype)
        tiles = [tile for tokens in wgmma.TOKEN_TILES for tile in wgmma.candidates(shape, tokens, 90)]
        scaled = {tile.scales_weights for tile in tiles}
        assert scaled == ({False} if (code, dtype) in MIXED else {False, True})


@FORMATS
def test_a_row_does_not_depend_on_its_company(weight_format):
    """The CPU kernels promise it bit for bit."""
    with jax.default_device(jax.devices("cpu")[0]):
        case = Block("", weight_format, tokens=23)
        x, gate_up, down, router, ids = make_block(case)
        together = np.asarray(run_block(case, (x, gate_up, down, router, ids), "cpu"))
        for token in (0, 17):
            one = slice(token, token + 1)
            alone = run_block(case, (x[one], gate_up, down, router[one], ids[one]), "cpu")
            np.testing.assert_array_equal(np.asarray(alone)[0].view(np.uint16), together[token].view(np.uint16))
