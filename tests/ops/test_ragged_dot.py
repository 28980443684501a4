"""`ragged_dot`: values on every platform, arguments, derivatives."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler, plan_products
from jax_marlin_moe.cuda.kernels.transposed import WgmmaTransposedTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.plan_products import plan_grouped_product

EXPERTS, K, N = 5, 80, 192
ROWS = 37


def experts(weight_format="int4", **options):
    size = oracle.FACTS[weight_format].group_sizes[0]
    rng = np.random.default_rng(0)
    return oracle.random_experts(rng, EXPERTS, K, N, weight_format=weight_format, group_size=size, **options)


def lhs(dtype="bfloat16"):
    return oracle.random_rows(np.random.default_rng(1), ROWS, K, jnp.dtype(dtype))


def expected(x, matrix, sizes, offset=0):
    """The groups' products one after the other, in float64."""
    dense, out = matrix.dense(), np.zeros((x.shape[0], N))
    first = 0
    for group, size in enumerate(np.maximum(np.int64(sizes), 0)):
        rows, e = slice(min(first, x.shape[0]), min(first + size, x.shape[0])), group - offset
        first += size
        if 0 <= e < EXPERTS:
            out[rows] = x[rows].astype(np.float64) @ dense[e]
            out[rows] += 0 if matrix.bias is None else matrix.bias[e]
    return out


SIZES = {
    "all rows": [7, 0, 20, 9, 1],
    "rows past the end": [3, 4, 0, 5, 6],
    "too many": [30, 20, 5, 5, 1],
    "none": [0, 0, 0, 0, 0],
    "negative and huge": [-4, 5, 2**31 - 1, 2**31 - 1, -(2**31)],
}


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_are_multiplied_by_the_expert_of_their_group(sizes, implementation):
    matrix, x = experts(), lhs()
    y = jmm.ragged_dot(x, matrix.packed(), jnp.asarray(sizes, jnp.int32), implementation=implementation)
    oracle.assert_product_close(y, expected(x, matrix, sizes))


@pytest.mark.parametrize("offset", [0, 3, 7, -2, 100])
def test_rows_of_groups_elsewhere_are_zero(offset):
    matrix, x = experts("nvfp4", bias=True), lhs("float16")
    sizes = [4, 1, 6, 0, 2, 9, 3, 5]
    y = jmm.ragged_dot(x, matrix.packed(), jnp.asarray(sizes, jnp.int32), group_offset=jnp.int32(offset))
    oracle.assert_product_close(y, expected(x, matrix, sizes, offset))


def test_it_takes_the_place_of_the_dense_one():
    matrix, x = experts(), jax.device_put(lhs("float32"))
    sizes = jnp.asarray([7, 0, 20, 9, 1], jnp.int32)
    packed = matrix.packed()
    y = jmm.ragged_dot(x, packed, sizes, None, jnp.float32)
    assert y.dtype == jnp.float32
    dense = jax.lax.ragged_dot(x, jmm.dense_weights(packed), sizes, None, jnp.float32)
    np.testing.assert_allclose(y, dense, atol=0.02 * float(jnp.abs(dense).max()))


def test_rows_in_orders_of_their_own_are_reordered():
    matrix, x = experts("int4_zp", reordered=True, bias=True), lhs()
    sizes = [7, 0, 20, 5, 1]
    y = jmm.ragged_dot(x, matrix.packed(), jnp.asarray(sizes, jnp.int32))
    oracle.assert_product_close(y, expected(x, matrix, sizes))


def test_float32_results_are_not_rounded_on_the_way():
    matrix, x = experts(), lhs()
    sizes = jnp.asarray([7, 0, 20, 9, 1], jnp.int32)
    exact = jmm.ragged_dot(x, matrix.packed(), sizes, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(exact, expected(x, matrix, sizes), atol=1e-4)
    np.testing.assert_array_equal(jmm.ragged_dot(x, matrix.packed(), sizes), exact.astype(x.dtype))


def test_derivatives_are_those_of_the_reference():
    packed, x = experts("nvfp4", bias=True).packed(), jax.device_put(lhs())
    sizes = jnp.asarray([3, 4, 0, 5, 6, 2], jnp.int32)

    def loss(x, bias, global_scales, implementation):
        matrix = dataclasses.replace(packed, bias=bias, global_scales=global_scales)
        y = jmm.ragged_dot(
            x,
            matrix,
            sizes,
            group_offset=jnp.int32(1),
            preferred_element_type=jnp.float32,
            implementation=implementation,
        )
        return jnp.sin(y).sum()

    moving = (x, packed.bias, packed.global_scales)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for ours, theirs in zip(gradients(*moving, None), gradients(*moving, "xla"), strict=True):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)
    rows = np.asarray(gradients(*moving, None)[0], np.float32)
    assert not rows[:3].any()
    assert rows[3:20].any(axis=1).all()
    assert not rows[20:].any()


@pytest.mark.parametrize("precision", ["default", "bfloat16", jax.lax.Precision.DEFAULT, ("default", "fastest")])
def test_the_default_precision_has_the_names_of_jax(precision):
    arguments = jnp.zeros((3, K), jnp.bfloat16), jnp.zeros((EXPERTS, K, N), jnp.bfloat16), jnp.zeros(EXPERTS, jnp.int32)
    wanted = jax.eval_shape(partial(jax.lax.ragged_dot, precision=precision), *arguments)
    found = jax.eval_shape(partial(jmm.ragged_dot, precision=precision), arguments[0], experts().packed(), arguments[2])
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


def test_vmap_over_rows_and_sizes():
    packed, x = experts().packed(), jax.device_put(lhs())
    sizes = jnp.asarray([[7, 0, 20, 9, 1], [1, 2, 3, 4, 5]], jnp.int32)
    both = jax.vmap(lambda s: jmm.ragged_dot(x, packed, s))(sizes)
    for i in range(2):
        np.testing.assert_array_equal(both[i], jmm.ragged_dot(x, packed, sizes[i]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"lhs": jnp.zeros((3, K), jnp.int8)},
            TypeError,
            "lhs has dtype int8; it must be bfloat16, float16 or float32",
        ),
        ({"lhs": jnp.zeros((3, K + 16), jnp.bfloat16)}, ValueError, r"lhs has shape \(3, 96\)"),
        ({"rhs": jnp.zeros((EXPERTS, K, N))}, TypeError, "rhs has type .*MarlinWeights"),
        ({"group_sizes": jnp.zeros((EXPERTS,), jnp.float32)}, TypeError, "group_sizes has dtype float32"),
        ({"group_sizes": jnp.zeros((3,), jnp.int32)}, ValueError, "3 groups and rhs 5 experts"),
        ({"group_offset": jnp.float32(1)}, TypeError, "group_offset has dtype float32"),
        ({"group_offset": jnp.zeros((2,), jnp.int32)}, ValueError, r"group_offset has shape \(2,\)"),
        ({"precision": "highest"}, ValueError, "precision is highest"),
        ({"precision": ("default", "highest")}, ValueError, "precision is .*'highest'"),
        ({"preferred_element_type": jnp.float16}, TypeError, "preferred_element_type is float16"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, error, message):
    arguments = {
        "lhs": jnp.zeros((3, K), jnp.bfloat16),
        "rhs": experts().packed(),
        "group_sizes": jnp.zeros((EXPERTS,), jnp.int32),
    } | changes
    with pytest.raises(error, match=message):
        jmm.ragged_dot(**arguments)


@pytest.mark.skipif(compiler.unavailable_reason() is not None, reason=str(compiler.unavailable_reason()))
@pytest.mark.parametrize(("architecture", "rows", "transposed"), [("sm_90a", 900, False), ("sm_80", 90, True)])
def test_on_cuda_it_is_one_kernel(architecture, rows, transposed):
    x = jax.ShapeDtypeStruct((rows, 128 if transposed else 256), jnp.bfloat16)
    rng = np.random.default_rng(0)
    packed = oracle.random_experts(rng, EXPERTS, 256, 128, group_size=64).packed()
    plan = plan_grouped_product(
        x,
        packed,
        rows,
        num_groups=9,
        offset=True,
        transposed=transposed,
        dtype=jnp.dtype("bfloat16"),
        architecture=architecture,
    )
    assert len(plan.kernels) == 1
    assert not plan.scratch
    assert re.search(r"jmm::RaggedTiles<TokenTiles>", plan.source)
    assert compiler.compile_cubin(plan.source, architecture)


def assert_card_is_right(packed, sizes, rows, **options):
    """The product and its derivative are those of the reference."""
    x = jnp.asarray(oracle.random_rows(np.random.default_rng(rows), rows, packed.k, jnp.bfloat16))
    sizes = jnp.asarray(sizes, jnp.int32)

    def loss(x, implementation):
        y = jmm.ragged_dot(x, packed, sizes, implementation=implementation, **options)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(x, "cuda")
    (_, wanted), slope = jax.value_and_grad(loss, has_aux=True)(x, "xla")
    for ours, theirs in ((y, wanted), (gradient, slope)):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= 1e-2 * np.linalg.norm(theirs)
        np.testing.assert_array_equal(ours.any(axis=1), theirs.any(axis=1))


def packed_for_the_card(weight_format, experts, k, n):
    size = oracle.FACTS[weight_format].group_sizes[-1]
    rng = np.random.default_rng(k)
    return oracle.random_experts(rng, experts, k, n, weight_format=weight_format, group_size=size).packed()


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", ["int4", "nvfp4"])
@pytest.mark.parametrize("rows", [5, 37, 700, 20000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_card_agrees_with_the_reference(weight_format, rows, dtype):
    shares = np.random.default_rng(rows).multinomial(rows, [0.05, 0.1, 0.3, 0.0, 0.2, 0.15, 0.2])
    sizes = np.where(shares > 2, shares - 2, shares)
    n = 192 if rows < 1000 else 768  # more work tiles than there are CTAs
    options = {"preferred_element_type": jnp.dtype(dtype), "group_offset": jnp.int32(1)}
    assert_card_is_right(packed_for_the_card(weight_format, EXPERTS, 256, n), sizes, rows, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", ["int4", "nvfp4"])
@pytest.mark.parametrize(
    ("tile", "transposed"),  # rows of a token tile, sub-tiles of a warpgroup, warpgroups, rows of K, stages
    [
        ((288, 1, 2, 1, 64, 4), (288, 1, 2, 1, 64, 4)),  # two instructions, two words of a row for each lane
        ((160, 2, 2, 1, 64, 4), (64, 2, 2, 1, 64, 4)),  # four words
        ((48, 4, 1, 1, 64, 4), (32, 2, 1, 1, 64, 4)),  # twice four words
    ],
)
def test_every_part_of_a_token_tile_is_right(monkeypatch, tile, transposed, weight_format):
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    sizes = [70, 130, 0, 220, 250, 288, 300]  # each part of a tile that is multiplied by itself

    def choose(shape, num_slots, num_experts, capability, is_transposed):
        chosen = WgmmaTransposedTile(*transposed, 1, True) if is_transposed else WgmmaTile(*tile, 1, True)
        assert chosen.fits(shape, capability)
        return chosen

    monkeypatch.setattr(plan_products, "choose_product_tile", choose)
    assert_card_is_right(packed_for_the_card(weight_format, len(sizes), 256, 256), sizes, sum(sizes) + 3)


@pytest.mark.gpu
@pytest.mark.parametrize("times", [1, 80])
def test_the_card_gives_whatever_sizes_the_rows_that_they_claim(times):
    matrix, x = experts(), oracle.random_rows(np.random.default_rng(1), times * ROWS, K, jnp.dtype(jnp.bfloat16))
    packed = matrix.packed()
    product = jax.jit(lambda x, sizes: jmm.ragged_dot(x, packed, sizes, implementation="cuda"))
    for sizes in SIZES.values():
        sizes = [size * times if abs(size) < 100 else size for size in sizes]
        y, wanted = product(x, jnp.asarray(sizes, jnp.int32)), expected(x, matrix, sizes)
        oracle.assert_product_close(y, wanted)
        np.testing.assert_array_equal(np.asarray(y, np.float32).any(axis=1), wanted.any(axis=1))
