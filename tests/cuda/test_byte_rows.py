"""Products with rows of 8 bits on Hopper: compiled without serialised products, right on the card."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from abstract_calls import abstract_experts, array, needs_nvrtc, planned_block, ptxas_log
from byte_blocks import GROUPED, quantized_block, random_block, relative_error
from oracle import E2M1

import jax_marlin_moe as jmm
from jax_marlin_moe import layout
from jax_marlin_moe.cuda import choose, compiler
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.wgmma_bytes import WgmmaByteTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import MODELS

# Format, group size, type of scales, type of rows, hidden and inner size, tile.
CASES = {
    "int4, fp8": ("int4", 128, "bfloat16", "float8_e4m3fn", 768, 512, (128, 2, 2, 4)),
    "int4, fp8, half a k-block": ("int4", 128, "bfloat16", "float8_e4m3fn", 992, 448, (96, 2, 1, 4)),
    "int4, fp8, long K": ("int4", 128, "bfloat16", "float8_e4m3fn", 2304, 256, (64, 4, 1, 3)),
    "int4, fp8, float32 scales": ("int4", 128, "float32", "float8_e4m3fn", 768, 512, (32, 2, 2, 4)),
    "int4_zp, fp8": ("int4_zp", 128, "bfloat16", "float8_e4m3fn", 768, 512, (64, 2, 2, 4)),
    "int4_zp, fp8, one group": ("int4_zp", None, "bfloat16", "float8_e4m3fn", 768, 512, (16, 2, 2, 4)),
    "fp8, fp8": ("fp8", 128, "float32", "float8_e4m3fn", 768, 512, (128, 2, 2, 3)),
    "fp8, fp8, one group": ("fp8", None, "float32", "float8_e4m3fn", 768, 512, (48, 4, 1, 3)),
    "int4, int8": ("int4", 128, "bfloat16", "int8", 768, 512, (128, 2, 2, 4)),
    "int8, int8": ("int8", None, "bfloat16", "int8", 992, 448, (96, 2, 1, 4)),
    "int8_zp, int8": ("int8_zp", 128, "float16", "int8", 768, 512, (64, 4, 1, 3)),
    "mxfp4, fp8": ("mxfp4", 32, "uint8", "float8_e4m3fn", 768, 512, (128, 2, 2, 4)),
    "mxfp4, fp8, half a k-block": ("mxfp4", 32, "uint8", "float8_e4m3fn", 992, 448, (96, 2, 1, 4)),
    "mxfp4, fp8, scales apart": ("mxfp4", 32, "uint8", "float8_e4m3fn", 768, 512, (64, 4, 1, 3)),
    "mxfp4, fp8, columns twice": ("mxfp4", 32, "uint8", "float8_e4m3fn", 704, 576, (16, 2, 2, 4)),
    "int4, int8, columns twice": ("int4", 128, "bfloat16", "int8", 832, 576, (32, 2, 2, 4)),
    "mxfp8, fp8": ("mxfp8", 32, "uint8", "float8_e4m3fn", 768, 512, (128, 2, 2, 3)),
    "mxfp8, fp8, half a k-block": ("mxfp8", 32, "uint8", "float8_e4m3fn", 992, 448, (48, 2, 1, 3)),
    "int4, fp8, by parts": ("int4", 128, "bfloat16", "float8_e4m3fn", 1024, 512, (144, 2, 2, 5)),
    "int4_zp, int8, by parts": ("int4_zp", 128, "bfloat16", "int8", 992, 448, (144, 2, 2, 5)),
    "fp8, fp8, by parts": ("fp8", 128, "float32", "float8_e4m3fn", 768, 512, (144, 2, 2, 4)),
    "mxfp4, fp8, by parts, scales apart": ("mxfp4", 32, "uint8", "float8_e4m3fn", 768, 512, (144, 2, 2, 5)),
    "mxfp8, fp8, by parts": ("mxfp8", 32, "uint8", "float8_e4m3fn", 768, 512, (144, 2, 2, 4)),
    "int4, groups of fp8": ("int4", 128, "bfloat16", GROUPED, 768, 512, (128, 2, 2, 4)),
    "int4_zp, groups of fp8": ("int4_zp", 128, "bfloat16", GROUPED, 2304, 256, (64, 4, 1, 3)),
    "fp8, groups of fp8, half a k-block": ("fp8", 128, "float32", GROUPED, 992, 448, (96, 2, 1, 4)),
}
EXPERTS = 5


def scheme_of(name):
    tile = WgmmaByteTile(*CASES[name][-1])
    return BlockScheme("aligned", tile, tile)


def block_of(name, tokens, rng):
    weight_format, group_size, scale_dtype, _, hidden, inner, _ = CASES[name]
    options = {"weight_format": weight_format, "group_size": group_size, "scale_dtype": jnp.dtype(scale_dtype)}
    first, second, *rest = random_block(rng, tokens, EXPERTS, hidden, inner, dtype=jnp.bfloat16, bias=True, **options)
    return (with_scales_apart(first) if name.endswith("scales apart") else first), second, *rest


def with_scales_apart(experts):
    """Of every other column, the group with the largest scale by far has no codes but zeros and signs."""
    scales, codes = experts.scales.copy(), experts.codes.copy()
    scales[:, 1::4, ::2] = 127 + 90
    codes.reshape(EXPERTS, -1, 32, experts.n)[:, 1::4, :, ::2] &= 8
    return dataclasses.replace(experts, scales=scales, codes=codes)


def shape_of(k, n, *, gated=False, dtype="float8_e4m3fn", **facts):
    facts = {"code": "int4", "bits": 4, "scale": "bfloat16", "zeros": None, "group_size": 128} | facts
    return GemmShape(k=k, n=n, num_experts=8, gated=gated, dtype=dtype, **facts)


def plan_of(name, tokens):
    first, second, x, _, ids = block_of(name, tokens, np.random.default_rng(0))
    options = {"scheme": scheme_of(name), "activation_dtype": CASES[name][3]}
    return planned_block(jax.device_put(x), first.packed(), second.packed(), top_k=ids.shape[1], **options)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.sampled(len(CASES))
@pytest.mark.parametrize("name", CASES)
def test_products_of_bytes_are_not_serialised(name):
    """ptxas says so in its log (C7510 and its like), and what it keeps in memory for want of registers."""
    planned = plan_of(name, 9)
    assert planned.source.count("WgmmaGroupedGemm") == 2
    log = ptxas_log(planned.source)
    assert "registers" in log
    assert "serialized" not in log


def permuted(low, high, selector):
    """`prmt` of four bytes of two words."""
    chosen = np.uint32([low, high]).view(np.uint8)[[selector >> 4 * i & 7 for i in range(4)]]
    return int(chosen.view(np.uint32)[0])


def folded_column(codes, exponent):
    """Two words of e5m2 numbers, of eight codes of e2m1 (csrc/cuda/weights/fragments_bytes.cuh)."""
    table = exponent * 0x04040400 + 0x06040000, exponent * 0x04040404 + 0x0E0C0A08
    magnitudes, signs = codes & 0x77777777, codes << 4 & 0xFFFFFFFF
    return [
        permuted(*table, magnitudes >> shift & 0xFFFF) | permuted(codes, signs, selector) & 0x80808080
        for shift, selector in ((0, 0x1504), (16, 0x3726))
    ]


def test_a_fragment_of_e2m1_takes_in_powers_of_two_exactly():
    """Codes in the packed order, e5m2 numbers in the order of the rows of x that products of 8-bit codes have."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (32, 64)).astype(np.uint8)
    x = rng.integers(-8, 9, (8, 32))
    rows = x.reshape(8, 2, 2, 4, 2).transpose(0, 1, 3, 4, 2).reshape(8, 32)
    words = np.asarray(layout.pack(jnp.asarray(codes), 4)).view(np.uint32).reshape(2, 32, 4)
    for sub_tile, exponents in enumerate([np.full(16, 1), np.full(16, 27), *rng.integers(1, 28, (2, 16))]):
        a = np.zeros((16, 32), np.uint8)
        for lane in range(32):
            first, second = (int(word) for word in words[:, lane, sub_tile])
            for r, selector in enumerate((0x6420, 0x7531)):
                column = lane // 4 + 8 * r
                pair = folded_column(permuted(first, second, selector), int(exponents[column]))
                a[column].reshape(2, 4, 4)[:, lane % 4] = np.uint32(pair).view(np.uint8).reshape(2, 4)
        values = E2M1[codes[:, 16 * sub_tile : 16 * sub_tile + 16]]
        wanted = x @ (values * 2.0 ** (exponents - 14))
        np.testing.assert_array_equal(rows @ a.view(ml_dtypes.float8_e5m2).astype(np.float64).T, wanted)


def test_work_tiles_of_bytes_are_counted_by_each_product_from_what_alignment_clears():
    kernels = {kernel.name: kernel for kernel in plan_of("int4, fp8", 9).kernels}
    stages = ["align_m128", "quantize_x_", "gate_up_", "quantize_hidden_", "down_", "combine_"]
    assert [stage in name for stage, name in zip(stages, kernels, strict=True)] == [True] * len(stages)
    align, _, gate_up, _, down, _ = kernels.values()
    cleared = align.pointers["taken"]
    taken = [product.pointers["token_tiles.taken"] for product in (gate_up, down)]
    assert [(pointer.buffer, pointer.offset) for pointer in taken] == [(cleared.buffer, 0), (cleared.buffer, 4)]
    assert align.structs["Facts"]["products"] == 2
    # The kernel that quantises x runs beside alignment; the next one waits for both.
    assert not align.overlaps_predecessor
    assert all(kernel.overlaps_predecessor for kernel in list(kernels.values())[1:])


def test_a_tile_of_bytes_fits_what_its_kernel_takes():
    tile = WgmmaByteTile(128, 2, 2, 6)
    assert tile.fits(shape_of(2048, 1536, gated=True), 90)
    assert not tile.fits(shape_of(2048, 1536, dtype="bfloat16"), 90)
    assert not tile.fits(shape_of(2048, 1536), 80)
    assert not tile.fits(shape_of(2048, 1536), 100)  # wgmma is Hopper's
    assert tile.fits(shape_of(2080, 1536), 90)
    assert not tile.fits(shape_of(2064, 1536), 90)  # half a fragment
    assert not tile.fits(shape_of(96, 1536), 90)  # nothing to repeat
    assert not tile.fits(shape_of(2048, 1536, group_size=64), 90)
    assert tile.fits(shape_of(2048, 1536, group_size=2048, zeros="integer"), 90)
    assert not tile.fits(shape_of(2048, 1536, zeros="float"), 90)
    assert tile.fits(shape_of(2048, 1600), 90)  # the last column tile has columns of the one before
    assert tile.column_tiles(shape_of(2048, 1600)) == 7
    assert tile.fits(shape_of(2880, 2880), 90)
    assert not tile.fits(shape_of(2048, 1568), 90)  # half a unit
    assert not tile.fits(shape_of(2048, 192), 90)  # less than a column tile
    mxfp4 = {"code": "e2m1", "scale": "e8m0", "group_size": 32}
    assert tile.fits(shape_of(2080, 1536, **mxfp4), 90)
    assert not tile.fits(shape_of(2048, 1536, **mxfp4, dtype="int8"), 90)
    assert not tile.fits(shape_of(2048, 1536, **mxfp4, row_groups=True), 90)
    assert not tile.fits(shape_of(2048, 1536, **mxfp4 | {"scale": "e4m3", "group_size": 16}), 90)  # NVFP4
    assert WgmmaByteTile(128, 2, 2, 4).fits(shape_of(2048, 1536, code="e4m3", bits=8, scale="e8m0", group_size=32), 90)
    assert not tile.fits(shape_of(2048, 1536, code="int8", bits=8), 90)  # not in e4m3
    assert WgmmaByteTile(128, 2, 2, 4).fits(shape_of(2048, 1536, code="int8", bits=8, dtype="int8"), 90)
    assert not WgmmaByteTile(128, 4, 2, 3).fits(shape_of(2048, 1536), 90)  # registers
    by_parts = WgmmaByteTile(144, 2, 2, 6)
    assert by_parts.fits(shape_of(2048, 1536), 90)
    assert not by_parts.fits(shape_of(2048, 1536, row_groups=True), 90)  # more rows than threads copy scales of
    assert not WgmmaByteTile(144, 4, 1, 3).fits(shape_of(2048, 1536), 90)  # registers
    assert not WgmmaByteTile(160, 2, 2, 4).fits(shape_of(2048, 1536), 90)  # not three parts of whole instructions


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_there_is_a_scheme_of_bytes_for_any_number_of_tokens(name, tokens):
    model = MODELS[name]
    first = shape_of(model.hidden, 2 * model.intermediate, gated=True)
    second = shape_of(model.intermediate, model.hidden)
    scheme = choose.predicted_scheme(first, second, tokens * model.top_k, model.top_k, model.num_experts, 90)
    assert isinstance(scheme.gate_up, WgmmaByteTile)
    assert scheme.fits(first, second, 90)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if "by parts" not in name])
def test_a_block_of_bytes_on_the_card(name):
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    first, second, x, weights, ids = block_of(name, 300, np.random.default_rng(1))
    dtype = CASES[name][3]
    run = jax.jit(
        lambda *a: jmm.fused_moe(
            *a, activation_dtype=dtype, cuda_scheme=scheme_of(name), preferred_element_type=jnp.float32
        )
    )
    with jax.default_device(jax.devices("cuda")[0]):
        arguments = jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids)
        actual, again = run(*arguments), run(*arguments)
    np.testing.assert_array_equal(actual, again)
    assert not np.any(actual[2])
    # Sums of integers are exact, what zero points take has 16 bits, sums of e4m3 numbers have 14, and offset codes are
    # larger than their weights. Hidden values next to a tie are then rounded to the other of two neighbours.
    most = 1e-3 if dtype == "int8" else {"fp8": 3e-3, "mxfp4": 6e-3, "mxfp8": 6e-3}.get(CASES[name][0], 1.2e-2)
    assert relative_error(actual, quantized_block(first, second, x, weights, ids, dtype)) < most


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if "by parts" in name])
def test_sums_by_parts_have_the_bits_of_those_at_once_on_the_card(name):
    """720 slots of five experts are 144 for each: tiles with all rows, and with some.

    Zero points of K up to 2048 have one stage; of more, their sums' order depends on the stages that a tile holds.
    """
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    first, second, x, weights, ids = block_of(name, 360, np.random.default_rng(1))
    at_once = WgmmaByteTile(128, 2, 2, 3)
    schemes = scheme_of(name), BlockScheme("aligned", at_once, at_once)
    options = {"activation_dtype": CASES[name][3], "preferred_element_type": jnp.float32}
    with jax.default_device(jax.devices("cuda")[0]):
        arguments = jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids)
        by_parts, together = (
            jax.jit(lambda *a, scheme=scheme: jmm.fused_moe(*a, cuda_scheme=scheme, **options))(*arguments)
            for scheme in schemes
        )
    np.testing.assert_array_equal(by_parts, together)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4, fp8", "int4, int8", "int8_zp, int8"])
def test_a_rounded_block_of_bytes_on_the_card(name):
    """Its slots' rows, with four columns in 64 bits, go to the sum: what is rounded twice is within 1.1 roundings."""
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    first, second, x, weights, ids = block_of(name, 300, np.random.default_rng(1))
    run = jax.jit(
        lambda *a: [
            jmm.fused_moe(
                *a, activation_dtype=CASES[name][3], cuda_scheme=scheme_of(name), preferred_element_type=dtype
            )
            for dtype in (jnp.bfloat16, jnp.float32)
        ]
    )
    with jax.default_device(jax.devices("cuda")[0]):
        arguments = jnp.asarray(x), first.packed(), second.packed(), jnp.asarray(weights), jnp.asarray(ids)
        rounded, exact = (np.asarray(y, np.float32) for y in run(*arguments))
    once = relative_error(exact.astype(jnp.bfloat16).astype(np.float32), exact)
    assert once < relative_error(rounded, exact) < 1.1 * once


def planned_model(model, tokens, activation_dtype):
    weights = [
        abstract_experts(model.num_experts, k, n, group_size=128)
        for k, n in ((model.hidden, 2 * model.intermediate), (model.intermediate, model.hidden))
    ]
    x = array((tokens, model.hidden), jnp.bfloat16)
    return planned_block(x, *weights, top_k=model.top_k, scheme=None, activation_dtype=activation_dtype)


def elements_of_products(planned):
    return [kernel.structs["Problem"]["element"] for kernel in planned.kernels if "Problem" in kernel.structs]


@pytest.mark.parametrize(("dtype", "element"), [("float8_e4m3fn", "jmm::Fp8"), ("int8", "jmm::Signed8")])
def test_blocks_whose_results_do_not_depend_on_the_batch_add_zero_points_in_one_order(dtype, element):
    """No rows by parts; of K of more than 2048, half of a ring always has two stages of zero points."""
    weights = [abstract_experts(8, k, n, group_size=128, zeros=True) for k, n in ((4096, 28672), (14336, 4096))]
    rows_of_a_tile = set()
    for tokens in (1, 64, 1024, 16384):
        x = array((tokens, 4096), jnp.bfloat16)
        planned = planned_block(x, *weights, top_k=2, scheme="batch_invariant", activation_dtype=dtype)
        assert elements_of_products(planned) == [element, element]
        tiles = [kernel.structs["Tile"] for kernel in planned.kernels if "Tile" in kernel.structs]
        assert all(tile["tokens"] <= 128 and tile["stages"] // 2 == 2 for tile in tiles)
        rows_of_a_tile |= {tile["tokens"] for tile in tiles}
    assert len(rows_of_a_tile) > 1


@pytest.mark.parametrize(("name", "tokens", "packed"), [("deepseek-v3", 512, True), ("qwen3-30b-a3b", 256, False)])
def test_results_of_many_slots_are_packed_though_experts_have_few_rows(name, tokens, packed):
    """117 MB of float32 rows do not stay in L2 until they are summed, 16 MB do."""
    (down,) = (k for k in planned_model(MODELS[name], tokens, "float8_e4m3fn").kernels if "_down_" in k.name)
    assert ("PackedPartials" in str(down.body)) == packed


def test_rows_of_e4m3_are_multiplied_in_16_bits_where_experts_have_few():
    """Qwen3-30B has 16 rows for each expert at 256 tokens, and 32 at 512. Sums of int8 rows are exact as they are."""
    model = MODELS["qwen3-30b-a3b"]
    assert elements_of_products(planned_model(model, 256, "float8_e4m3fn")) == ["jmm::BFloat"] * 2
    assert elements_of_products(planned_model(model, 512, "float8_e4m3fn")) == ["jmm::Fp8"] * 2
    assert elements_of_products(planned_model(model, 256, "int8")) == ["jmm::Signed8"] * 2
    assert elements_of_products(planned_model(model, 256, GROUPED)) == ["jmm::Fp8"] * 2


def test_tiles_of_144_rows_are_those_of_experts_with_128_on_average():
    model = MODELS["mixtral-8x7b"]
    for tokens, rows in ((512, 144), (1024, 144), (4096, 128)):
        products = [k for k in planned_model(model, tokens, "float8_e4m3fn").kernels if "Problem" in k.structs]
        assert [k.structs["Tile"]["tokens"] for k in products] == [rows] * 2


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "most"), [("int4, fp8", 1.2e-2), ("int4, int8", 3e-3)])
def test_a_block_with_fixed_scales_on_the_card(name, most):
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    first, second, x, weights, ids = block_of(name, 300, np.random.default_rng(1))
    x[3, 5], ids[3] = np.nan, 1
    dtype = CASES[name][3]
    quantizers = jmm.IntermediateQuantizer
    quantizer = {"float8_e4m3fn": quantizers.static_fp8, "int8": quantizers.static_int8}[dtype]
    x_scale, hidden_scales = np.float32(0.03), np.linspace(0.05, 0.3, EXPERTS, dtype=np.float32)
    run = jax.jit(
        lambda *a: jmm.fused_moe(
            *a,
            activation_dtype=dtype,
            x_scale=x_scale,
            intermediate=quantizer(hidden_scales),
            cuda_scheme=scheme_of(name),
            preferred_element_type=jnp.float32,
        )
    )
    with jax.default_device(jax.devices("cuda")[0]):
        actual = run(jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids))
    assert np.isnan(actual[3]).all()
    x[3], actual = 0, np.where(np.arange(300)[:, None] == 3, 0, actual)
    ids[3] = -1
    wanted = quantized_block(first, second, x, weights, ids, dtype, x_scale, hidden_scales)
    assert relative_error(actual, wanted) < most
    assert relative_error(actual, quantized_block(first, second, x, weights, ids, dtype)) > 2e-2
