"""Grouped products with transposed matrices, and sums over the slots of a row: what derivatives are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from abstract_calls import needs_nvrtc

from jax_marlin_moe.cuda import compiler, plan_products
from jax_marlin_moe.ops.grouped_product import grouped_product_op, multiplied
from jax_marlin_moe.reference import dequantize

EXPERTS = 5
LIMITS = {"float16": 1e-3, "bfloat16": 5e-3}


@pytest.mark.covering
@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", sorted(oracle.FACTS))
@pytest.mark.parametrize(("dtype", "rows", "k", "n"), [("bfloat16", 45, 80, 192), ("float16", 1, 16, 64)])
def test_the_product_with_transposed_matrices(weight_format, dtype, rows, k, n):
    rng = np.random.default_rng(3)
    facts = oracle.FACTS[weight_format]
    group = None if facts.per_channel and rows == 1 else facts.group_sizes[0]
    experts = oracle.random_experts(rng, EXPERTS, k, n, weight_format=weight_format, group_size=group)
    matrix = multiplied(experts.packed())
    chosen = rng.integers(-1, EXPERTS + 1, rows * 2).astype(np.int32)
    x = jax.device_put(oracle.random_rows(rng, rows, n, jnp.dtype(dtype)))
    params = {"transposed": True, "dtype": "float32", "implementation": None}
    (y,) = grouped_product_op(x, matrix, jax.device_put(chosen), None, None, **params)
    dense = np.asarray(jax.jit(dequantize)(matrix), np.float64)
    has_expert = ((chosen >= 0) & (chosen < EXPERTS))[:, None]
    wide = np.repeat(np.asarray(x, np.float64), 2, axis=0)
    expected = has_expert * np.einsum("sn,skn->sk", wide, dense[np.clip(chosen, 0, EXPERTS - 1)])
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)
    (rounded,) = grouped_product_op(x, matrix, jax.device_put(chosen), None, None, **(params | {"dtype": dtype}))
    np.testing.assert_array_equal(rounded, np.asarray(y).astype(jnp.dtype(dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("weight_format", sorted(oracle.FACTS))
@pytest.mark.parametrize(("dtype", "slots", "k", "n"), [("bfloat16", 40, 144, 128), ("float16", 900, 256, 192)])
def test_the_card_agrees_on_products_with_transposed_matrices(weight_format, dtype, slots, k, n):
    rng = np.random.default_rng(slots)
    group = oracle.FACTS[weight_format].group_sizes[0 if slots < 100 else -1]
    matrix = multiplied(
        oracle.random_experts(rng, EXPERTS, k, n, weight_format=weight_format, group_size=group).packed()
    )
    chosen = jnp.asarray(rng.integers(-1, EXPERTS + 1, slots).astype(np.int32))
    x = jnp.asarray(oracle.random_rows(rng, slots // 2, n, jnp.dtype(dtype)))
    params = {"transposed": True, "dtype": dtype}
    ours, theirs = (
        np.asarray(grouped_product_op(x, matrix, chosen, None, None, implementation=name, **params)[0], np.float64)
        for name in ("cuda", "xla")
    )
    assert np.linalg.norm(ours - theirs) <= LIMITS[dtype] * np.linalg.norm(theirs)
    np.testing.assert_array_equal(ours.any(axis=1), theirs.any(axis=1))


def test_sums_over_the_slots_of_a_row_are_those_of_the_slots():
    rng = np.random.default_rng(4)
    matrix = multiplied(oracle.random_experts(rng, EXPERTS, 80, 64, weight_format="nvfp4", group_size=16).packed())
    chosen = rng.integers(-1, EXPERTS + 1, 30).astype(np.int32)
    x = oracle.random_rows(rng, 30, 64, jnp.bfloat16)
    for name in ("cpu", "xla"):
        params = {"transposed": True, "dtype": "bfloat16", "implementation": name}
        # The reference of an op is many programs.
        slots, sums = (
            jax.jit(
                lambda x, chosen, options=params | more: grouped_product_op(x, matrix, chosen, None, None, **options)[0]
            )(x, chosen)
            for more in ({}, {"summed": 3})
        )
        expected = np.asarray(slots, np.float32).reshape(10, 3, -1).sum(1).astype(jnp.bfloat16)
        np.testing.assert_array_equal(sums, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weight_format", ["int4_fzp", "nvfp4", "mxfp4", "int8_zp"])
@pytest.mark.parametrize("slots", [24, 900, 3000])
def test_the_card_agrees_on_sums_over_the_slots_of_a_row(slots, weight_format, dtype, monkeypatch):
    monkeypatch.setattr(plan_products, "_SLICED_BYTES", 1)
    rng = np.random.default_rng(slots)
    k, n, group = 512, 128, oracle.FACTS[weight_format].group_sizes[0]
    matrix = multiplied(
        oracle.random_experts(rng, EXPERTS, k, n, weight_format=weight_format, group_size=group).packed()
    )
    chosen = jnp.asarray(rng.integers(-1, EXPERTS + 1, slots).astype(np.int32))
    x = jnp.asarray(oracle.random_rows(rng, slots, n, jnp.bfloat16))
    params = {"transposed": True, "dtype": dtype, "summed": 6}
    call = jax.jit(lambda x: grouped_product_op(x, matrix, chosen, None, None, implementation="cuda", **params)[0])
    ours = np.asarray(call(x), np.float64)
    theirs = grouped_product_op(x, matrix, chosen, None, None, implementation="xla", **params)[0]
    assert np.linalg.norm(ours - np.asarray(theirs, np.float64)) <= LIMITS["bfloat16"] * np.linalg.norm(theirs)
    np.testing.assert_array_equal(ours, call(x))


@needs_nvrtc
def test_sums_in_slices_compile_for_cards_without_wgmma(monkeypatch):
    monkeypatch.setattr(plan_products, "_SLICED_BYTES", 1)
    matrix = multiplied(oracle.random_experts(np.random.default_rng(0), 2, 256, 64, group_size=128).packed())
    x = jax.ShapeDtypeStruct((40, 64), jnp.bfloat16)
    options = {"transposed": True, "dtype": jnp.dtype(jnp.bfloat16), "architecture": "sm_80", "summed": 4}
    plan = plan_products.plan_grouped_product(x, matrix, 40, **options)
    transposed = [kernel for kernel in plan.kernels if "transposed" in kernel.name]
    assert len(transposed) == 2
    assert compiler.compile_cubin(plan.source, "sm_80")
