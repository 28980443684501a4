"""Products with rows of 8 bits on mma.sync: the order of their bytes, which cards have them, right on the card."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc, planned_block
from byte_blocks import quantized_block, random_block, relative_error

import jax_marlin_moe as jmm
from jax_marlin_moe import layout
from jax_marlin_moe.cuda import choose, compiler
from jax_marlin_moe.cuda.architectures import get_architecture
from jax_marlin_moe.cuda.kernels.mma_bytes import MmaByteTile
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.wgmma_bytes import WgmmaByteTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import MODELS

# Format, group size, type of scales, type of rows, hidden and inner size, tile: tokens, units, warps of N and of K.
CASES = {
    "int4, fp8": ("int4", 128, "bfloat16", "float8_e4m3fn", 768, 512, (16, 2, 1, 2)),
    "int4, fp8, half a k-block": ("int4", 128, "bfloat16", "float8_e4m3fn", 992, 448, (24, 1, 2, 1)),
    "int4, fp8, float32 scales": ("int4", 128, "float32", "float8_e4m3fn", 768, 512, (8, 1, 2, 3)),
    "int4_zp, fp8": ("int4_zp", 128, "bfloat16", "float8_e4m3fn", 768, 512, (32, 1, 4, 1)),
    "int4_zp, fp8, one group": ("int4_zp", None, "bfloat16", "float8_e4m3fn", 768, 512, (8, 2, 2, 2)),
    "fp8, fp8": ("fp8", 128, "float32", "float8_e4m3fn", 768, 512, (16, 1, 2, 2)),
    "fp8, fp8, one group": ("fp8", None, "float32", "float8_e4m3fn", 224, 192, (24, 2, 1, 1)),
    "int4, int8": ("int4", 128, "bfloat16", "int8", 768, 512, (32, 1, 2, 2)),
    "int4_zp, int8": ("int4_zp", 128, "bfloat16", "int8", 992, 448, (16, 2, 1, 3)),
    "int8, int8": ("int8", None, "bfloat16", "int8", 992, 448, (24, 1, 2, 1)),
    "int8_zp, int8": ("int8_zp", 128, "float16", "int8", 768, 512, (8, 2, 1, 4)),
}
EXPERTS = 5
FP8, INT8 = "float8_e4m3fn", "int8"


def scheme_of(name, routing="aligned"):
    tile = MmaByteTile(*CASES[name][-1], 128, 2, 1)
    return BlockScheme(routing, tile, tile)


def block_of(name, tokens):
    weight_format, group_size, scale_dtype, _, hidden, inner, _ = CASES[name]
    options = {"weight_format": weight_format, "group_size": group_size, "scale_dtype": jnp.dtype(scale_dtype)}
    return random_block(
        np.random.default_rng(1), tokens, EXPERTS, hidden, inner, dtype=jnp.bfloat16, bias=True, **options
    )


def plan_of(name, tokens, architecture, scheme=None, **options):
    first, second, x, _, ids = block_of(name, tokens)
    row_type, weights = jax.ShapeDtypeStruct(x.shape, x.dtype), (first.packed(), second.packed())
    options = {"architecture": architecture, "scheme": scheme, "activation_dtype": CASES[name][3]} | options
    return planned_block(row_type, *weights, top_k=ids.shape[1], **options)


def shape_of(k, n, *, gated=False, dtype=FP8, **facts):
    facts = {"code": "int4", "bits": 4, "scale": "bfloat16", "zeros": None, "group_size": 128} | facts
    return GemmShape(k=k, n=n, num_experts=8, gated=gated, dtype=dtype, **facts)


def in_fragment_order(rows, bits):
    """Rows of x as csrc/cuda/quantize_rows.cuh permutes them, 32 columns at a time: (s, h, t, i) to what codes have."""
    parts = rows.reshape(len(rows), -1, 2, 2, 4, 2)
    order = (0, 1, 3, 4, 2, 5) if bits == 4 else (0, 1, 2, 4, 5, 3)
    return parts.transpose(order).reshape(rows.shape)


def fragment(first, second, bits):
    """[4] words of a lane, from its words of a sub-tile in two steps (csrc/cuda/weights/fragments_bytes.cuh)."""
    if bits == 8:
        return [first[0], first[1], second[0], second[1]]
    first, second = (int(word) & 0xFFFFFFFF for word in (first[0], second[0]))
    pair = [first >> 8 * b & 0xFF | (first >> 8 * b + 16 & 0xFF) << 8 for b in (0, 1)]
    pair = [low | (second >> 8 * b & 0xFF | (second >> 8 * b + 16 & 0xFF) << 8) << 16 for b, low in enumerate(pair)]
    return [pair[0] & 0x0F0F0F0F, pair[1] & 0x0F0F0F0F, pair[0] >> 4 & 0x0F0F0F0F, pair[1] >> 4 & 0x0F0F0F0F]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_fragment_of_bytes_multiplies_the_columns_of_rows_in_its_order(bits):
    """Lanes and registers of A are those of mma.sync.m16n8k32 (PTX ISA), B is a row of x as it lies."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 2**bits, (32, 64)).astype(np.uint8)
    x = rng.integers(-127, 128, (8, 32))
    words = np.asarray(layout.pack(jnp.asarray(codes), bits)).view(np.uint32).reshape(2, 32, 4, bits // 4)
    rows = in_fragment_order(x, bits)
    for sub_tile in range(4):
        a = np.zeros((16, 32), np.int64)
        for lane in range(32):
            registers = fragment(words[0, lane, sub_tile], words[1, lane, sub_tile], bits)
            for r, register in enumerate(registers):
                k = 16 * (r // 2) + 4 * (lane % 4)
                a[lane // 4 + 8 * (r % 2), k : k + 4] = np.uint32([register]).view(np.uint8)
        wanted = x @ codes[:, 16 * sub_tile : 16 * sub_tile + 16].astype(np.int64)
        np.testing.assert_array_equal(rows @ a.T, wanted)


@pytest.mark.parametrize(
    ("name", "architectures"),
    [("int4, fp8", ["sm_89", "sm_120a"]), ("int4_zp, int8", ["sm_80", "sm_89", "sm_100a"]), ("fp8, fp8", ["sm_121a"])],
)
def test_rows_are_quantised_for_the_product_and_their_sums_left_to_it(name, architectures):
    byte = {FP8: "jmm::Fp8", INT8: "jmm::Signed8"}[CASES[name][3]]
    for architecture in architectures:
        quantize_x, gate_up, quantize_hidden, down, combine = plan_of(name, 9, architecture).kernels
        for product, quantizes in ((gate_up, quantize_x), (down, quantize_hidden)):
            facts = quantizes.structs["Facts"]
            assert (facts["byte"], facts["wide"], facts["sums"], facts["places"]) == (byte, False, False, False)
            assert product.structs["Problem"]["element"] == byte
            assert product.structs["Problem"]["row_stride"] == facts["stride"] == facts["columns"]
            assert product.pointers["epilogue.row_scales"].buffer == quantizes.pointers["scales"].buffer
            assert not product.overlaps_predecessor
        assert not combine.structs["Facts"]["places"]


def test_hidden_rows_in_units_of_fixed_scales_become_bytes():
    *_, quantize_hidden, down, _ = plan_of("int4, fp8", 9, "sm_89", scaled=True, intermediate="static_fp8").kernels
    assert quantize_hidden.structs["Facts"]["in_units"]
    assert down.pointers["operands.x"].buffer == quantize_hidden.pointers["bytes"].buffer
    assert down.structs["Epilogue"]["scaled"]
    assert not down.structs["Epilogue"]["row_scaled"]


@needs_nvrtc
@pytest.mark.long
def test_integers_in_units_of_fixed_scales_have_a_scale_that_says_whether_their_row_is_of_numbers():
    planned = plan_of("int4, int8", 9, "sm_80", scaled=True, intermediate="static_int8")
    *_, quantize_hidden, down, _ = planned.kernels
    assert quantize_hidden.structs["Facts"]["in_units"]
    assert down.structs["Epilogue"]["scaled"]
    assert down.pointers["epilogue.row_scales"].buffer == quantize_hidden.pointers["scales"].buffer
    assert compiler.compile_cubin(planned.source, "sm_80")


def test_a_tile_of_bytes_fits_what_its_kernel_takes():
    tile = MmaByteTile(16, 2, 1, 2, 128, 2, 1)
    assert tile.fits(shape_of(2048, 1536, gated=True), 89)
    assert not tile.fits(shape_of(2048, 1536), 80)  # no e4m3
    assert tile.fits(shape_of(2048, 1536, dtype=INT8), 80)
    assert not tile.fits(shape_of(2048, 1536, dtype=INT8), 75)  # no products of 32 rows of K
    assert not tile.fits(shape_of(2048, 1536, dtype="bfloat16"), 89)
    assert not dataclasses.replace(tile, block_k=64).fits(shape_of(2048, 1536), 89)
    assert tile.fits(shape_of(2080, 1536), 89)
    assert not tile.fits(shape_of(2064, 1536), 89)  # half a fragment
    assert not tile.fits(shape_of(2048, 1536, group_size=64), 89)
    assert tile.fits(shape_of(2048, 1536, group_size=2048, zeros="integer"), 89)
    assert tile.fits(shape_of(2080, 1536, group_size=2080), 89)
    assert not tile.fits(shape_of(2048, 1536, zeros="float"), 89)
    assert not tile.fits(shape_of(2048, 1536, row_groups=True), 89)
    assert not tile.fits(shape_of(2048, 1536, code="e2m1", scale="e8m0", group_size=32), 89)
    assert not tile.fits(shape_of(2048, 1536, code="int8", bits=8), 89)  # not in e4m3


def test_a_scheme_does_not_mix_kernels_of_bytes():
    first, second = shape_of(2048, 1536, gated=True), shape_of(768, 2048)
    tiles = MmaByteTile(16, 2, 1, 2, 128, 2, 1), WgmmaByteTile(16, 2, 2, 4)
    assert all(BlockScheme("aligned", tile, tile).fits(first, second, 90) for tile in tiles)
    assert not BlockScheme("aligned", *tiles).fits(first, second, 90)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
@pytest.mark.parametrize(("capability", "dtype"), [(80, INT8), (89, FP8)])
def test_there_is_a_scheme_of_bytes_for_any_number_of_tokens(name, capability, dtype):
    model = MODELS[name]
    first = shape_of(model.hidden, 2 * model.intermediate, gated=True, dtype=dtype)
    second = shape_of(model.intermediate, model.hidden, dtype=dtype)
    for tokens in (1, 64, 4096):
        slots = tokens * model.top_k
        scheme = choose.predicted_scheme(first, second, slots, model.top_k, model.num_experts, capability)
        assert {type(scheme.gate_up), type(scheme.down)} == {MmaByteTile}
        assert scheme.fits(first, second, capability)
        invariant = choose.invariant_scheme(first, second, slots, model.num_experts, capability)
        assert {type(invariant.gate_up), invariant.gate_up.shares_k, invariant.down.shares_k} == {MmaByteTile, 1}


@needs_nvrtc
@pytest.mark.long
@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", CASES)
def test_products_of_bytes_compile(name):
    for architecture in ("sm_80" if CASES[name][3] == INT8 else "sm_89", "sm_90a"):
        assert compiler.compile_cubin(plan_of(name, 9, architecture, scheme_of(name)).source, architecture)


def run_on_the_card(name, tokens, scheme, **options):
    first, second, x, weights, ids = block_of(name, tokens)
    options |= {"activation_dtype": CASES[name][3], "preferred_element_type": jnp.float32}
    run = jax.jit(lambda *a: jmm.fused_moe(*a, cuda_scheme=scheme, **options))
    with jax.default_device(jax.devices("cuda")[0]):
        arguments = jnp.asarray(x), first.packed(), second.packed(), jnp.asarray(weights), jnp.asarray(ids)
        actual, again = run(*arguments), run(*arguments)
    np.testing.assert_array_equal(actual, again)
    assert not np.any(actual[2])
    return relative_error(actual, quantized_block(first, second, x, weights, ids, CASES[name][3]))


def most_error(name):
    """As for wgmma's products of bytes, but that zero points leave by sums that tensor cores make."""
    return 1e-3 if CASES[name][3] == INT8 else 3e-3 if CASES[name][0] == "fp8" else 1.2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("tokens", "routing"), [(70, "aligned"), (9, "grouped")])
def test_a_block_of_bytes_on_the_card(name, tokens, routing):
    assert run_on_the_card(name, tokens, scheme_of(name, routing)) < most_error(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4, fp8", "int8_zp, int8"])
def test_a_block_of_bytes_whose_ctas_share_k_on_the_card(name):
    tile = MmaByteTile(8, 2, 1, 2, 128, 2, 1, 2)
    assert run_on_the_card(name, 9, BlockScheme("aligned", tile, tile)) < most_error(name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4, fp8", "int4_zp, fp8", "fp8, fp8", "int4, int8", "int8_zp, int8"])
@pytest.mark.parametrize("tokens", [1 + 2, 300])
def test_a_block_of_bytes_by_the_scheme_of_the_architecture_on_the_card(name, tokens):
    """Where the environment names compute_80 or compute_89: an H200 itself has the wgmma kernel for them."""
    architecture = get_architecture(compiler.compute_capability(compiler.target_architecture()))
    if CASES[name][3] not in architecture.mma_bytes:
        pytest.skip("such rows are multiplied by another kernel")
    assert run_on_the_card(name, tokens, None) < most_error(name)
