"""`batch_invariant`: a token has the same bits alone and among others, wherever it stands."""

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda.choose import invariant_listed_tile, invariant_rows_tile, invariant_scheme
from jax_marlin_moe.cuda.compiler import compute_capability
from jax_marlin_moe.cuda.grouped_gemm import gemm_shape
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.flax.nnx import MarlinMoE

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 512, 256
ALL = 600  # tokens; blocks of 144 rows are worth considering
PARTS = [slice(0, 1), slice(599, 600), slice(100, 117), slice(250, 350), slice(None, None, -1)]


def weights_of(weight_format, dtype="bfloat16", hidden=HIDDEN):
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = (EXPERTS, hidden, 2 * INNER), (EXPERTS, INNER, hidden)
    dense = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return [jmm.quantize(matrix, weight_format) for matrix in dense]


def rows(dtype="bfloat16", hidden=HIDDEN):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(ALL, hidden)), dtype)
    ids = np.argsort(rng.random((ALL, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    return x, rng.uniform(0.1, 1, (ALL, TOP_K)).astype(np.float32), ids


def assert_same_bits(of_rows, parts):
    whole = np.asarray(of_rows(slice(None)), np.float32)
    assert np.isfinite(whole).all()
    assert np.abs(whole).max() > 0
    for part in parts:
        np.testing.assert_array_equal(np.asarray(of_rows(part), np.float32), whole[part], err_msg=str(part))


@pytest.mark.parametrize("weight_format", ["int4", pytest.param("nvfp4", marks=pytest.mark.gpu), "bf16"])
def test_a_block(platform, weight_format):
    gate_up, down = weights_of(weight_format)
    x, router, ids = rows()

    def block(part):
        return jmm.fused_moe(
            x[part], gate_up, down, router[part], ids[part], implementation=platform, batch_invariant=True
        )

    assert_same_bits(block, PARTS if platform == "cuda" else PARTS[1:4])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("weight_format", "dtype"),
    [("int4_zp", "float16"), ("fp8", "bfloat16"), ("mxfp4", "bfloat16"), ("int8", "float16")],
)
def test_a_block_on_the_card(weight_format, dtype):
    gate_up, down = weights_of(weight_format, dtype)
    x, router, ids = rows(dtype)

    def block(part):
        return jmm.fused_moe(
            x[part], gate_up, down, router[part], ids[part], implementation="cuda", batch_invariant=True
        )

    assert_same_bits(block, PARTS[1:4])


@pytest.mark.parametrize("activation_dtype", ["float8_e4m3fn", pytest.param("int8", marks=pytest.mark.gpu)])
def test_a_block_of_rows_of_bytes(platform, activation_dtype):
    """On cards zero points have sums of their own, for each 2048 rows of K."""
    hidden = 4352 if platform == "cuda" else HIDDEN
    gate_up, down = weights_of("int4_zp", hidden=hidden)
    x, router, ids = rows(hidden=hidden)

    def block(part):
        call = x[part], gate_up, down, router[part], ids[part]
        options = {"activation_dtype": activation_dtype, "batch_invariant": True}
        return jmm.fused_moe(*call, **options, implementation=platform)

    assert_same_bits(block, PARTS if platform == "cuda" else PARTS[1:3])


def test_a_layer(platform):
    """The router's logits decide the weights, to the last bit."""
    gate_up, down = weights_of("int4")
    x, *_ = rows()
    router = host_arrays.normal(2, (HIDDEN, EXPERTS), "bfloat16", HIDDEN**-0.5)
    layer = MarlinMoE(jmm.MoELayer(gate_up, down, router, jmm.Routing(top_k=TOP_K)), implementation=platform)
    assert_same_bits(
        lambda part: layer(x[part], batch_invariant=True),
        PARTS if platform == "cuda" else PARTS[1:3],
    )


@pytest.mark.parametrize("weight_format", ["int4", pytest.param("nvfp4", marks=pytest.mark.gpu)])
def test_a_product_of_rows(platform, weight_format):
    matrix = weights_of(weight_format)[0].expert(3)
    x, *_ = rows()
    assert_same_bits(
        lambda part: jmm.linear(x[part], matrix, implementation=platform, batch_invariant=True),
        PARTS if platform == "cuda" else PARTS[1:4],
    )


def test_a_product_of_listed_slots(platform):
    """The list's blocks may be of any size."""
    matrix, _ = weights_of("int4")
    x, router, ids = rows()

    def product(part):
        some = jax.device_put(ids[part])
        size = 64 if len(some) > 300 else 16
        alignment = jmm.moe_align_block_size(some, block_size=size, num_experts=EXPERTS, implementation=platform)
        options = {"top_k": TOP_K, "topk_weights": router[part], "mul_topk_weights": True}
        y = jmm.moe_gemm(x[part], matrix, alignment, **options, implementation=platform, batch_invariant=True)
        return y.reshape(len(some), -1)

    assert_same_bits(product, PARTS if platform == "cuda" else PARTS[1:3])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", jmm.FORMATS)
def test_tiles_of_a_product_add_up_in_one_order(weight_format):
    dense = jax.ShapeDtypeStruct((EXPERTS, HIDDEN, 2 * INNER), "bfloat16")
    matrix = jax.eval_shape(lambda dense: jmm.quantize(dense, weight_format), dense)
    shape = gemm_shape(matrix, False, jnp.dtype("bfloat16"))
    tiles = [invariant_rows_tile(shape, count, 90) for count in (1, 30, 600, 16384)]
    tiles += [invariant_listed_tile(shape, 600, EXPERTS, block, 90) for block in (8, 16, 48, 128)]
    assert {type(tile) for tile in tiles} == {WgmmaTile}
    assert len({(tile.warpgroups_k, tile.scales_weights) for tile in tiles}) == 1
    assert len({tile.tokens for tile in tiles}) > 2


def test_products_in_float32_are_refused():
    gate_up, _ = weights_of("int4")
    x, _, ids = rows()
    with pytest.raises(ValueError, match="batch_invariant is True and the result has dtype float32"):
        jmm.linear(x, gate_up.expert(0), preferred_element_type=jnp.float32, batch_invariant=True)
    alignment = jmm.moe_align_block_size(jax.device_put(ids), block_size=16, num_experts=EXPERTS, implementation="xla")
    with pytest.raises(ValueError, match="batch_invariant is True and implementation 'xla'"):
        jmm.moe_gemm(x, gate_up, alignment, top_k=TOP_K, implementation="xla", batch_invariant=True)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("weight_format", jmm.FORMATS)
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_80"])
def test_schemes_differ_in_what_no_sum_crosses(weight_format, architecture):
    gate_up, down = (
        jax.eval_shape(lambda dense: jmm.quantize(dense, weight_format), jax.ShapeDtypeStruct(shape, "bfloat16"))
        for shape in ((EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN))
    )
    shapes = gemm_shape(gate_up, True, jnp.dtype("bfloat16")), gemm_shape(down, False, jnp.dtype("bfloat16"))
    orders, rows_of_a_tile = set(), set()
    for tokens in (1, 16, 600, 16384):
        planned = invariant_scheme(*shapes, tokens * TOP_K, EXPERTS, compute_capability(architecture))
        for place, tile in enumerate((planned.gate_up, planned.down)):
            rows_of_a_tile.add(tile.tokens)
            assert isinstance(tile, MmaTile if architecture == "sm_80" else WgmmaTile)
            if isinstance(tile, MmaTile):
                orders.add((place, tile.warps_k, tile.cluster))
            else:
                orders.add((place, tile.warpgroups_k, tile.scales_weights))
    assert len(orders) == 2  # of the two products
    assert len(rows_of_a_tile) > 1


def test_what_does_not_go_with_it_is_refused():
    gate_up, down = weights_of("int4")
    x, router, ids = rows()
    call = x[:2], gate_up, down, router[:2], ids[:2]
    with pytest.raises(ValueError, match="batch_invariant is True and implementation 'xla'"):
        jmm.fused_moe(*call, implementation="xla", batch_invariant=True)
    tile = MmaTile(8, 2, 1, 1, 64, 2, 2)
    with pytest.raises(ValueError, match="cuda_scheme is given and batch_invariant is True"):
        jmm.fused_moe(*call, cuda_scheme=BlockScheme("direct", tile, tile), batch_invariant=True)
    layer = jmm.MoELayer(gate_up, down, jnp.ones((HIDDEN, EXPERTS), "bfloat16"), jmm.Routing(top_k=TOP_K))
    with pytest.raises(ValueError, match="one custom call is the whole layer"):
        jax.grad(lambda x: layer(x, implementation="cpu", batch_invariant=True).sum().astype("float32"))(x[:2])
