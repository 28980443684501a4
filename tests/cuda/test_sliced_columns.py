"""Blocks whose second product is made and summed in slices of its columns, as derivatives ask for: less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from abstract_calls import formatted_experts, planned_block

import jax_marlin_moe as jmm

EXPERTS, TOP_K = 5, 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weight_format", ["int4", "nvfp4"])
@pytest.mark.parametrize("tokens", [3, 96, 768])  # or the most of their ranges, whose programs have the same tiles
def test_the_card_agrees_on_blocks_in_sliced_columns(tokens, weight_format, dtype):
    """To the bit where the rows that are summed are float32 on both sides; plain rows for bfloat16 results are not."""
    rng = np.random.default_rng(tokens)
    hidden, inner, group = 1024, 128, oracle.FACTS[weight_format].group_sizes[0]
    matrices = [
        oracle.random_experts(rng, EXPERTS, k, n, weight_format=weight_format, group_size=group, bias=True)
        for k, n in ((hidden, 2 * inner), (inner, hidden))
    ]
    x = oracle.random_rows(rng, tokens, hidden, jnp.dtype(dtype))
    weights, ids = oracle.random_routing(rng, tokens, TOP_K, EXPERTS, "holes")
    expected = oracle.expert_block(x, *matrices, weights, ids)
    gate_up, down = (matrix.packed() for matrix in matrices)

    def block(x, **options):
        return jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cuda", **options)

    plain, sliced = jax.jit(block), jax.jit(lambda x: jax.jvp(block, (x,), (x,))[0])
    rounded_here = jax.jit(partial(block, preferred_element_type=jnp.float32))(x).astype(dtype)
    for _ in range(3):
        value, of_slices = plain(x), sliced(x)
        np.testing.assert_array_equal(of_slices, rounded_here)
        if dtype == "float16" or tokens == 3:
            np.testing.assert_array_equal(of_slices, value)
        oracle.assert_block_accepted(value, expected)
        oracle.assert_block_accepted(of_slices, expected)


def training_plan(dtype):
    """Of Qwen3-30B's block, whose value is one of what a derivative computes."""
    x = jax.ShapeDtypeStruct((4096, 2048), dtype)
    matrices = [formatted_experts(16, k, n, "int4", dtype) for k, n in ((2048, 1536), (768, 2048))]
    return planned_block(x, *matrices, top_k=8, sliced=True)


def test_slices_of_a_block_are_launches_of_one_kernel():
    plan = training_plan(jnp.float16)
    names = [kernel.name.split("_")[1] for kernel in plan.kernels]
    assert names[-4:] == ["down", "combine", "down", "combine"]
    first, second = (kernel for kernel in plan.kernels if "down" in kernel.name)
    moved = [after - before for (_, before), (_, after) in zip(first.parameters, second.parameters, strict=True)]
    assert moved[:3] == [0, 1024 // 64 * 512, 1024 * 2]
    assert (32768, 1024) in [scratch.shape for scratch in plan.scratch]
    assert plan.source.count("__global__") == len(plan.kernels) - 2


def test_rows_that_fit_with_four_columns_in_64_bits_are_not_sliced():
    plan = training_plan(jnp.bfloat16)
    names = [kernel.name.split("_")[1] for kernel in plan.kernels]
    assert names[-3:] == ["gate", "down", "combine"]
    assert "PackedPartials" in plan.source
    assert (32768, 2048 // 2) in [scratch.shape for scratch in plan.scratch if scratch.dtype == jnp.float32]


@pytest.mark.gpu
def test_the_value_of_a_derivative_is_that_of_the_call_where_rows_are_not_sliced():
    rng = np.random.default_rng(5)
    gate_up, down = (
        oracle.random_experts(rng, EXPERTS, k, n, group_size=128).packed() for k, n in ((256, 512), (256, 256))
    )
    x = jnp.asarray(oracle.random_rows(rng, 768, 256, jnp.bfloat16))
    weights, ids = map(jnp.asarray, oracle.random_routing(rng, 768, TOP_K, EXPERTS, "holes"))

    def block(x):
        return jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cuda")

    np.testing.assert_array_equal(jax.jit(lambda x: jax.jvp(block, (x,), (x,))[0])(x), jax.jit(block)(x))
