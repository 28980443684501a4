"""Hopper's wgmma kernels: compiled without serialised products, chosen where they pay, right on the card."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc, planned_block, ptxas_log
from oracle import (
    assert_block_accepted,
    assert_block_close,
    assert_product_close,
    expert_block,
    grouped_product,
    random_experts,
    random_routing,
    random_rows,
)

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import choose, compiler, tables
from jax_marlin_moe.cuda.kernels import wgmma
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.formats import FLOAT_SCALES
from jax_marlin_moe.measure.models import MODELS


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Two tiles and the weights that they multiply; scales have the type of the activations by default."""

    tiles: tuple[WgmmaTile, WgmmaTile]
    dtype: str
    weight_format: str
    group_size: int | None
    scale_dtype: str | None = None
    hidden: int = 768
    inner: int = 512


def two(gate_up, down):
    return WgmmaTile(*gate_up), WgmmaTile(*down)


MANY_ROWS = two((144, 2, 2, 1, 128, 3, 1, True), (144, 2, 2, 1, 64, 3, 1, True))
FEW_ROWS = two((16, 2, 1, 1, 64, 4, 2, True), (16, 4, 1, 2, 64, 4, 1, True))
SCALED_SUMS = two((32, 4, 2, 1, 64, 3, 1, False), (32, 2, 1, 2, 128, 4, 1, False))


SCHEMES = {
    "shared K": Scheme(two((16, 2, 2, 2, 128, 6, 1, False), (16, 4, 1, 3, 128, 6, 1, False)), "bfloat16", "int4", 128),
    "two blocks": Scheme(two((8, 2, 2, 1, 128, 4, 2, False), (8, 2, 1, 1, 64, 4, 2, False)), "float16", "int4_zp", 64),
    "scaled weights": Scheme(
        two((144, 2, 2, 1, 128, 3, 1, True), (144, 2, 2, 1, 64, 4, 1, True)), "bfloat16", "int4", 128
    ),
    "groups of 16": Scheme(
        two((48, 2, 2, 1, 64, 5, 1, True), (48, 4, 1, 1, 64, 5, 1, True)), "bfloat16", "int4_zp", 16
    ),
    "groups of 32": Scheme(two((32, 2, 2, 1, 64, 5, 1, False), (32, 2, 1, 2, 128, 6, 1, False)), "float16", "int4", 32),
    "one group": Scheme(two((16, 2, 2, 2, 64, 6, 1, False), (16, 2, 1, 3, 64, 6, 1, False)), "bfloat16", "int4", None),
    "8 bits": Scheme(two((32, 2, 2, 1, 64, 6, 1, False), (32, 2, 2, 1, 64, 5, 1, False)), "bfloat16", "int8", 128),
    "fp8, sums": Scheme(SCALED_SUMS, "bfloat16", "fp8", 128, "float32"),
    "fp8, float16": Scheme(SCALED_SUMS, "float16", "fp8", None, "float32"),
    "fp8, weights": Scheme(MANY_ROWS, "bfloat16", "fp8", 128, "float32"),
    "nvfp4": Scheme(MANY_ROWS, "bfloat16", "nvfp4", 16),
    "nvfp4, float16": Scheme(FEW_ROWS, "float16", "nvfp4", 16),
    "mxfp4": Scheme(FEW_ROWS, "bfloat16", "mxfp4", 32),
    "mxfp4, float16": Scheme(SCALED_SUMS, "float16", "mxfp4", 32),
    "mxfp8": Scheme(MANY_ROWS, "bfloat16", "mxfp8", 32),
    "mxfp8, float16": Scheme(SCALED_SUMS, "float16", "mxfp8", 32),
    "float zeros": Scheme(FEW_ROWS, "bfloat16", "int4_fzp", 64),
    "8 bits, float zeros": Scheme(MANY_ROWS, "bfloat16", "int8_fzp", 64, "float16"),
    "float16 scales": Scheme(MANY_ROWS, "bfloat16", "int4_zp", 128, "float16"),
    "float32 scales": Scheme(MANY_ROWS, "bfloat16", "int4", 32, "float32"),
    "float16 weights": Scheme(MANY_ROWS, "float16", "int4_zp", 128),
    "float16 weights, 8 bits": Scheme(MANY_ROWS, "float16", "int8_fzp", 64),
    "one group, many rows": Scheme(
        two((144, 2, 2, 1, 128, 3, 1, False), (144, 2, 2, 1, 64, 3, 1, False)), "bfloat16", "fp8", None, "float32"
    ),
    "three warpgroups": Scheme(
        two((32, 2, 2, 1, 64, 4, 1, False), (32, 1, 3, 1, 64, 4, 1, False)), "bfloat16", "int4", 128
    ),
    "float32 scales, sums": Scheme(SCALED_SUMS, "float16", "int8_zp", 64, "float32"),
}
# K of seven and a half k-blocks, and of three and a half: the last one repeats rows of the one before.
SCHEMES |= {
    f"half a k-block, {weight_format}": Scheme(tiles, dtype, weight_format, group_size, scale_dtype, 960, 448)
    for tiles, dtype, weight_format, group_size, scale_dtype in (
        (two((16, 2, 1, 2, 128, 6, 1, False), (16, 1, 3, 2, 128, 4, 1, False)), "bfloat16", "int4", 128, None),
        (two((8, 2, 1, 3, 128, 6, 1, False), (8, 1, 1, 3, 128, 6, 1, False)), "bfloat16", "int8_zp", None, None),
        (two((32, 2, 1, 1, 128, 4, 2, False), (32, 1, 1, 2, 128, 4, 1, False)), "float16", "mxfp4", 32, None),
        (two((144, 2, 1, 1, 128, 3, 1, True), (144, 1, 3, 1, 128, 3, 1, True)), "bfloat16", "nvfp4", 16, None),
        (two((48, 2, 1, 1, 128, 4, 1, True), (48, 1, 3, 1, 128, 4, 1, True)), "bfloat16", "fp8", 128, "float32"),
    )
}
EXPERTS, TOP_K = 5, 2


def scheme_of(name):
    return BlockScheme("grouped", *SCHEMES[name].tiles)


def experts_of(name, rng):
    case = SCHEMES[name]
    options = {"weight_format": case.weight_format, "group_size": case.group_size, "bias": True}
    options["scale_dtype"] = jnp.dtype(case.scale_dtype or case.dtype)
    return (
        random_experts(rng, EXPERTS, case.hidden, 2 * case.inner, **options),
        random_experts(rng, EXPERTS, case.inner, case.hidden, **options),
    )


def shape_of(k, n, *, gated=False, dtype="bfloat16", **facts):
    facts = {"code": "int4", "bits": 4, "scale": "bfloat16", "zeros": None, "group_size": 128} | facts
    return GemmShape(k=k, n=n, num_experts=8, gated=gated, dtype=dtype, **facts)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.sampled(len(SCHEMES))
@pytest.mark.parametrize("name", SCHEMES)
def test_products_are_not_serialised(name):
    """ptxas says so in its log (C7510 and its like)."""
    gate_up, down = (experts.packed() for experts in experts_of(name, np.random.default_rng(0)))
    x = jnp.zeros((9, SCHEMES[name].hidden), SCHEMES[name].dtype)
    planned = planned_block(x, gate_up, down, top_k=TOP_K, scheme=scheme_of(name))
    assert planned.source.count("WgmmaGroupedGemm") == 2
    log = ptxas_log(planned.source)
    assert "registers" in log
    assert "serialized" not in log


@pytest.mark.parametrize(
    ("facts", "rows", "work_tile"),
    [
        ({}, 1024, (160, 256)),
        ({}, 256, (288, 128)),  # one tile for most experts
        ({"code": "e2m1", "scale": "e4m3", "group_size": 16}, 1024, (288, 128)),  # weights cost more, and are made once
    ],
)
def test_products_of_very_many_rows_have_the_work_tiles_that_were_ahead(facts, rows, work_tile):
    shape = dataclasses.replace(shape_of(2048, 1536, **facts), num_experts=128)
    tile = choose.choose_product_tile(shape, 128 * rows, 128, 90, False)
    assert (tile.tokens, shape.n // tile.column_tiles(shape)) == work_tile
    few = choose.choose_product_tile(shape, 128 * rows, 128, 80, False)  # where no kernel has so large ones
    assert few.fits(shape, 80)


def test_a_tile_fits_what_its_kernel_takes():
    tile = WgmmaTile(144, 2, 2, 1, 128, 4, 1, True)
    assert tile.fits(shape_of(2048, 1536, gated=True), 90)
    assert not tile.fits(shape_of(2048, 1536, gated=True), 80)
    assert not tile.fits(shape_of(2048, 1536, dtype="float16"), 90)  # small weights would be lost
    assert tile.fits(shape_of(2048, 1536, dtype="float16", scale="float16"), 90)
    assert tile.fits(shape_of(2048, 1536, dtype="float16", code="e2m1", scale="e4m3", group_size=16), 90)  # exact
    assert not tile.fits(shape_of(2048, 1536, dtype="float16", code="e2m1", scale="e8m0", group_size=32), 90)
    assert tile.fits(shape_of(2048, 1536, zeros="float"), 90)
    assert not WgmmaTile(32, 2, 2, 1, 128, 4, 1, False).fits(shape_of(2048, 1536, zeros="float"), 90)
    assert tile.fits(shape_of(2112, 1536), 90)  # half a k-block
    assert tile.fits(shape_of(2112, 1536, group_size=64), 90)
    assert not tile.fits(shape_of(2080, 1536, group_size=64), 90)  # and half a group
    assert not tile.fits(shape_of(64, 1536, group_size=64), 90)  # nothing to repeat
    assert not tile.fits(shape_of(2048, 1600), 90)  # part of a column tile
    assert not WgmmaTile(144, 4, 2, 1, 128, 3, 1, True).fits(shape_of(2048, 1536), 90)  # registers
    assert not WgmmaTile(24, 2, 1, 3, 128, 6, 1, False).fits(shape_of(256, 1536), 90)  # a warpgroup without a k-block
    assert WgmmaTile(8, 4, 1, 3, 128, 6, 1, False).fits(shape_of(2048, 1536), 90)
    assert not WgmmaTile(8, 4, 1, 3, 128, 8, 1, False).fits(shape_of(2048, 1536), 90)  # a stage of two warpgroups


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_the_cost_model_takes_wgmma_for_many_rows(name, dtype):
    model = MODELS[name]
    first = shape_of(model.hidden, 2 * model.intermediate, gated=True, dtype=dtype)
    second = shape_of(model.intermediate, model.hidden, dtype=dtype)
    for capability, kind in ((90, WgmmaTile), (80, MmaTile)):
        scheme = choose.predicted_scheme(first, second, 4096 * model.top_k, model.top_k, model.num_experts, capability)
        for tile, shape in ((scheme.gate_up, first), (scheme.down, second)):
            assert isinstance(tile, kind)
            assert tile.fits(shape, capability)
        assert scheme.gate_up.tokens == scheme.down.tokens


@pytest.mark.parametrize("code", ["int4", "int8"])
def test_the_cost_model_leaves_blocks_of_eight_rows_to_mma(code):
    first, second = (
        shape_of(k, n, gated=gated, code=code, bits=int(code[3:]))
        for k, n, gated in ((2048, 1536, True), (768, 2048, False))
    )
    for tokens in (1, 2, 4, 8):
        scheme = choose.predicted_scheme(first, second, tokens * 8, 8, 128, 90)
        assert isinstance(scheme.gate_up, MmaTile)
        assert isinstance(scheme.down, MmaTile)


def test_more_tokens_are_not_predicted_to_take_less_time():
    """A program's tiles are those of its range of token counts, whatever they are in the next one."""
    first, second = shape_of(2048, 1536, gated=True), shape_of(768, 2048)
    times = []
    for tokens in (1024, 1280, 1536, 1792, 2048, 2560, 3072):
        slots = tokens // 16 * 8  # of 8 experts, as of 128
        scheme = choose.predicted_scheme(first, second, slots, 8, 8, 90)
        blocks = choose.expected_blocks(slots, 8, 8, scheme.gate_up.tokens)
        times.append(
            sum(
                tile.predicted_microseconds(shape, blocks, slots / blocks, 90, uniform=True)
                for tile, shape in ((scheme.gate_up, first), (scheme.down, second))
            )
        )
    assert times == sorted(times)


def test_the_cost_model_overlaps_the_products_of_short_blocks():
    first, second = shape_of(2048, 1536, gated=True), shape_of(768, 2048)
    for slots, overlaps in ((8, True), (128, True), (65536, False)):
        scheme = choose.predicted_scheme(first, second, slots, 8, 8, 90)
        assert scheme.overlaps == overlaps
    small = MmaTile(8, 1, 1, 1, 32, 2, 12)
    assert not choose.overlaps(second, small, 100.0, 90)  # more of them than planned find room
    assert choose.overlaps(second, dataclasses.replace(small, ctas_per_sm=8), 100.0, 90)


def test_blocks_expected_under_uniform_routing():
    rng = np.random.default_rng(0)
    rows = rng.multinomial(4096, np.full(32, 1 / 32), size=200)
    for tokens in (8, 48, 128, 144):
        mean = np.mean(np.sum(-(-rows // tokens), axis=1))
        assert choose.expected_blocks(4096, 32, 32, tokens) == pytest.approx(mean, rel=0.03)


def test_measured_schemes_fit():
    """A table's scheme that does not is passed over without a word."""
    path = pathlib.Path(tables.__file__).parent / "scheme_tables" / "sm_90a.json"
    scales = {("e2m1", 16): "e4m3", ("e2m1", 32): "e8m0", ("e4m3", 32): "e8m0", ("e4m3", 128): "float32"}
    table = json.loads(path.read_text())
    assert table.pop("version") == 2
    for name, entries in table.items():
        fields = re.fullmatch(r"E(\d+) k(\d+) H(\d+) I(\d+) g(\d+) (\w+)/(\w+)", name)
        experts, top_k, hidden, inner, group = map(int, fields.groups()[:5])
        codes = fields.groups()[5:]
        for tokens in map(int, entries):
            scheme = tables.lookup(tables.BlockKey(experts, top_k, hidden, inner, group, codes), tokens, "sm_90a")
            first, second = (
                shape_of(
                    k,
                    n,
                    gated=gated,
                    code=code,
                    bits=4 if code in ("int4", "e2m1") else 8,
                    group_size=group,
                    scale=scales.get((code, group), "bfloat16"),
                )
                for code, k, n, gated in ((codes[0], hidden, 2 * inner, True), (codes[1], inner, hidden, False))
            )
            assert scheme.fits(first, second, 90), (name, tokens, scheme)


def test_measured_schemes_of_either_kind_are_read_back(tmp_path, monkeypatch):
    path = tmp_path / "tuned-sm_90a.json"
    key = tables.BlockKey(4, 2, 256, 128, 128, ("int4", "int4"))
    tiles = WgmmaTile(16, 2, 2, 1, 64, 4, 1, False), MmaTile(16, 1, 2, 1, 64, 2, 2)
    mixed = BlockScheme("aligned", *tiles, overlaps=False)
    tables.record(key, 16, "sm_90a", mixed, path)
    monkeypatch.setattr(tables, "user_path", lambda architecture: path)
    assert tables.lookup(key, 16, "sm_90a") == mixed
    assert tables.lookup(key, 20, "sm_90a") == mixed
    assert tables.lookup(key, 32, "sm_90a") is None


def test_a_measured_scheme_of_many_tokens_is_that_of_its_range_alone(tmp_path, monkeypatch):
    path = tmp_path / "tuned-sm_90a.json"
    key = tables.BlockKey(4, 2, 256, 128, 128, ("int4", "int4"))
    scheme = BlockScheme("aligned", *2 * (WgmmaTile(80, 2, 2, 1, 128, 5, 1, True),))
    tables.record(key, 1000, "sm_90a", scheme, path)
    monkeypatch.setattr(tables, "user_path", lambda architecture: path)
    assert tables.lookup(key, 900, "sm_90a") == tables.lookup(key, 1024, "sm_90a") == scheme
    assert tables.lookup(key, 896, "sm_90a") is tables.lookup(key, 1025, "sm_90a") is None


def test_schemes_of_an_older_version_are_passed_over(tmp_path, monkeypatch):
    path = tmp_path / "tuned-sm_90a.json"
    key = tables.BlockKey(4, 2, 256, 128, 128, ("int4", "int4"))
    path.write_text(json.dumps({str(key): {"16": {"direct": False, "gate_up": [8, 2, 1], "down": [8, 2, 1]}}}))
    monkeypatch.setattr(tables, "user_path", lambda architecture: path)
    assert tables.lookup(key, 16, "sm_90a") is None
    tables.record(
        key, 8, "sm_90a", BlockScheme("direct", MmaTile(8, 2, 1, 1, 64, 2, 2), MmaTile(8, 2, 1, 1, 64, 2, 2)), path
    )
    assert list(json.loads(path.read_text())[str(key)]) == ["8", "16"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 64, 500])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_block_on_the_card(monkeypatch, name, tokens):
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    rng = np.random.default_rng(1)
    gate_up, down = experts_of(name, rng)
    x = random_rows(rng, tokens, SCHEMES[name].hidden, jnp.dtype(SCHEMES[name].dtype))
    router, ids = random_routing(rng, tokens, TOP_K, EXPERTS)
    monkeypatch.setattr(tables, "lookup", lambda *_: scheme_of(name))
    with jax.default_device(jax.devices("cuda")[0]):
        actual = jax.jit(lambda *a: jmm.fused_moe(*a))(x, gate_up.packed(), down.packed(), router, ids)
    arrays = (x, gate_up, down, router, ids)
    assert_block_accepted(actual, expert_block(*arrays))
    # Where weights get their scale, each is rounded once; what e2m1 and block scales make has no bit to lose.
    rounded = SCHEMES[name].tiles[0].scales_weights and SCHEMES[name].weight_format != "nvfp4"
    assert_block_close(actual, expert_block(*arrays, weights_dtype=x.dtype if rounded else np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [
        two((48, 4, 2, 1, 128, 5, 1, True), (48, 4, 2, 1, 128, 5, 1, True)),
        two((144, 2, 2, 1, 128, 4, 1, True), (144, 2, 2, 1, 128, 4, 1, True)),
        two((144, 2, 2, 1, 128, 4, 1, True), (288, 1, 2, 1, 64, 5, 1, True)),
    ],
    ids=lambda tiles: f"{tiles[0].tokens} and {tiles[1].tokens} rows",
)
def test_token_tiles_of_any_number_of_rows_are_right(monkeypatch, tiles):
    """They multiply eighths of their rows: expert e of 24 has e + 1 twenty-fourths of the larger tile."""
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    rng = np.random.default_rng(5)
    gate_up, down = (
        random_experts(rng, 24, *sizes, weight_format="int4", group_size=128) for sizes in ((512, 512), (256, 512))
    )
    ids = np.repeat(np.arange(24), tiles[1].tokens // 24 * np.arange(1, 25)).astype(np.int32)[:, None]
    x = random_rows(rng, len(ids), 512, jnp.dtype("bfloat16"))
    router = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    rng.shuffle(ids)
    monkeypatch.setattr(tables, "lookup", lambda *_: BlockScheme("aligned", *tiles))
    with jax.default_device(jax.devices("cuda")[0]):
        actual = jax.jit(lambda *a: jmm.fused_moe(*a))(x, gate_up.packed(), down.packed(), router, ids)
    assert_block_close(actual, expert_block(x, gate_up, down, router, ids, weights_dtype=x.dtype))


@pytest.mark.parametrize("name", jmm.FORMATS)
def test_every_warpgroup_has_two_stages(name):
    """It waits for the next one before it releases the one that it reads, so that one stage would be a deadlock."""
    row = jmm.FORMATS[name]
    facts = {"code": row.code.name, "bits": row.bits, "zeros": row.zeros, "group_size": row.group_sizes[-1]}
    shape = shape_of(2048, 1536, gated=True, **facts, scale="bfloat16" if row.scale == FLOAT_SCALES else row.scale.name)
    tiles = [tile for tokens in wgmma.TOKEN_TILES for tile in wgmma.candidates(shape, tokens, 90)]
    assert any(tile.warpgroups_k == 3 for tile in tiles)
    for tile in tiles:
        assert tile.stages >= 2 * tile.warpgroups_k
        one_each = dataclasses.replace(tile, stages=tile.warpgroups_k)
        assert not one_each.fits(shape, 90)


# Calls behind each other: the weights of a call are there before its rows, so that no warpgroup waits for them, and
# stages go round as fast as they can. What a stage holds is loaded before it is filled again, factors and scales too.
def differing_calls(call, *arrays):
    """The numbers of 300 calls in one queue that differ from a call alone, whose result comes first."""
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    with jax.default_device(jax.devices("cuda")[0]):
        arrays = jax.device_put(arrays)
        run = jax.jit(call)
        first = jax.block_until_ready(run(*arrays))
        results = [run(*arrays) for _ in range(300)]
        return first, np.flatnonzero([jnp.any(result != first) for result in results]).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", "float16"), ("fp16", "float16"), ("int8", "bfloat16"), ("int4", "bfloat16"), ("int4_zp", "float16")],
)
def test_products_behind_each_other_agree_with_one_alone(name, dtype):
    rng = np.random.default_rng(4)
    experts = random_experts(rng, 2, 1408, 64, weight_format=name, group_size=128)
    x = random_rows(rng, 5, 1408, jnp.dtype(dtype))
    _, ids = random_routing(rng, 5, 2, 2)

    def product(x, weights, ids):
        return jmm.moe_gemm(x, weights, jmm.moe_align_block_size(ids, block_size=16, num_experts=2), top_k=2)

    first, differing = differing_calls(product, x, experts.packed(), ids)
    assert not differing
    assert_product_close(first, grouped_product(x, experts, ids))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "activation_dtype"), [("int4", "float8_e4m3fn"), ("int8", "int8")])
def test_blocks_of_bytes_behind_each_other_agree_with_one_alone(name, activation_dtype):
    rng = np.random.default_rng(4)
    gate_up = random_experts(rng, 2, 1408, 1024, weight_format=name, group_size=128)
    down = random_experts(rng, 2, 512, 1408, weight_format=name, group_size=128)
    x = random_rows(rng, 5, 1408, jnp.bfloat16)
    router, ids = random_routing(rng, 5, 2, 2)

    def block(*arrays):
        return jmm.fused_moe(*arrays, activation_dtype=activation_dtype)

    assert not differing_calls(block, x, gate_up.packed(), down.packed(), router, ids)[1]


@pytest.mark.gpu
@pytest.mark.long
def test_many_runs_give_the_same_bits():
    """Three warpgroups take the k-blocks of a long K in turn; copies arrive in any order."""
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    experts, hidden, inner, tokens, top_k = 32, 7168, 2048, 16, 8
    tile = WgmmaTile(8, 4, 1, 3, 128, 6, 1, False)
    with jax.default_device(jax.devices("cuda")[0]):
        keys = jax.random.split(jax.random.key(0), 3)
        gate_up, down = (
            jmm.quantize(jax.random.normal(key, (experts, k, n), jnp.bfloat16) / k**0.5, "int4", group_size=128)
            for key, k, n in ((keys[0], hidden, 2 * inner), (keys[1], inner, hidden))
        )
        x = jax.random.normal(keys[2], (tokens, hidden), jnp.bfloat16)
        router, ids = random_routing(np.random.default_rng(0), tokens, top_k, experts)
        run = jax.jit(lambda *a: jmm.fused_moe(*a, cuda_scheme=BlockScheme("grouped", tile, tile)))
        first = run(x, gate_up, down, router, ids)
        differing = sum(jnp.any(run(x, gate_up, down, router, ids) != first) for _ in range(2000))
    assert not jnp.any(jnp.isnan(first))
    assert differing == 0
