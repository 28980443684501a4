"""Calls whose arrays are larger than 32 bits count: what is 64-bit then, what is refused, and the card's own word."""

import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc, planned_block

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import cache, compiler, limits, plan_products
from jax_marlin_moe.cuda.kernels.align import plan_align
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.program import render_facts, render_includes
from jax_marlin_moe.cuda.scheme import BlockScheme

ROOT = pathlib.Path(__file__).parents[2]
MMA = BlockScheme("aligned", MmaTile(8, 2, 1, 1, 64, 2, 2), MmaTile(8, 2, 1, 1, 64, 2, 2))
WGMMA = BlockScheme("aligned", WgmmaTile(8, 2, 1, 1, 64, 4, 1, False), WgmmaTile(8, 2, 1, 1, 64, 4, 1, False))


def array(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def experts(num_experts, k, n, *, bias=False):
    return jmm.MarlinWeights(
        packed=array((num_experts, k // 16, 2 * n)),
        scales=array((num_experts, 1, n), jnp.bfloat16),
        zeros=None,
        bias=array((num_experts, n), jnp.float32) if bias else None,
        input_order=None,
        format=jmm.FORMATS["int4"],
        group_size=k,
    )


def block_plan(tokens, hidden, inner, scheme=None, *, num_experts=8, top_k=2, routed_experts=None, bias=False):
    return planned_block(
        array((tokens, hidden), jnp.bfloat16),
        experts(num_experts, hidden, 2 * inner, bias=bias),
        experts(num_experts, inner, hidden, bias=bias),
        top_k=top_k,
        routed_experts=routed_experts or num_experts,
        mapped=routed_experts is not None,
        scheme=scheme,
    )


def gemm_plan(tokens, k, n, *, list_length=None, top_k=2):
    return plan_products.plan_moe_gemm(
        array((tokens, k), jnp.bfloat16),
        experts(8, k, n),
        top_k=top_k,
        block_size=64,
        list_length=list_length or tokens * top_k + 8 * 63,
        weighted=False,
        architecture="sm_90a",
    )


def assert_size(planned, stage, type_, size):
    """Compiles the facts alone, of a stage: a C++ type there has so many bytes."""
    kernel = planned.kernels[planned.position(stage)]
    kernel = dataclasses.replace(kernel, constants={f"sizeof({type_})": size})
    source = "\n".join([render_includes([kernel]), render_facts(kernel)])
    assert compiler.compile_cubin.__wrapped__(source, "sm_90a")


@needs_nvrtc
@pytest.mark.parametrize(
    ("scheme", "tokens", "size"),
    [
        (MMA, 149_796, 4),  # 2^32 elements between the products are reached with 149 797 tokens
        (MMA, 149_797, 8),
        (WGMMA, 1_198_372, 4),  # in 16-byte pieces, 2^32 of them with 1 198 373 tokens
        (WGMMA, 1_198_373, 8),
    ],
)
def test_offsets_of_rows_are_as_wide_as_the_rows_between_the_products(monkeypatch, scheme, tokens, size):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert_size(block_plan(tokens, 128, 14336, scheme), "down", "Kernel::RowOffset", size)


@needs_nvrtc
@pytest.mark.parametrize(("tokens", "size"), [(2**18 - 1, 4), (2**18, 4), (2**18 + 1, 8), (2**20, 8)])
def test_offsets_of_rows_are_as_wide_as_x(monkeypatch, tokens, size):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert_size(block_plan(tokens, 2**14, 64, MMA, top_k=1), "gate_up", "Kernel::RowOffset", size)


@needs_nvrtc
@pytest.mark.parametrize(("tokens", "size"), [(1_048_559, 4), (1_048_577, 8)])
def test_the_sum_counts_the_vectors_of_its_result(monkeypatch, tokens, size):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert_size(block_plan(tokens, 8192, 64, MMA, top_k=1), "combine", "Kernel::VectorIndex", size)


@needs_nvrtc
@pytest.mark.parametrize(("tokens", "size"), [(1_048_559, 4), (1_048_577, 8)])
def test_the_sum_of_packed_rows_counts_the_pieces_of_a_row(monkeypatch, tokens, size):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert_size(block_plan(tokens, 2**14, 64, top_k=1), "combine", "Kernel::PieceIndex", size)


@needs_nvrtc
@pytest.mark.parametrize(("tokens", "size"), [(299_593, 4), (299_594, 8)])
def test_clearing_counts_the_pieces_of_the_result(monkeypatch, tokens, size):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert_size(gemm_plan(tokens, 128, 28672), "clear", "Kernel::PieceIndex", size)


@needs_nvrtc
@pytest.mark.parametrize(("num_experts", "size"), [(2**19, 4), (2**19 + 1, 8)])
def test_biases_and_global_scales_count_the_columns_of_all_experts(monkeypatch, num_experts, size):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    planned = block_plan(1, 64, 2048, num_experts=num_experts, bias=True)
    assert_size(planned, "gate_up", "jmm::Problem<Problem>::ExpertIndex", size)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize("scheme", [MMA, WGMMA], ids=["mma", "wgmma"])
def test_kernels_with_wide_offsets_compile(monkeypatch, scheme):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    for planned in (block_plan(2_000_000, 8192, 14336, scheme), gemm_plan(600_000, 8192, 28672)):
        assert compiler.compile_cubin.__wrapped__(planned.source, "sm_90a")


# What is still counted in 32 bits is refused before anything is compiled.


def test_more_slots_than_int32_counts_are_refused():
    most = limits.MOST_COUNTED
    with pytest.raises(ValueError, match=rf"topk_ids has {2**31} ids, .*; .* at most {most}: split the tokens"):
        block_plan(2**30, 64, 64)
    with pytest.raises(ValueError, match=rf"topk_ids has {2**31} ids, .*; .* at most {most}: split the tokens"):
        gemm_plan(2**30, 64, 64)
    with pytest.raises(ValueError, match=rf"topk_ids has 2 ids, {2**31} with the padding of their blocks; .*: split"):
        gemm_plan(1, 64, 64, list_length=2**31)
    with pytest.raises(ValueError, match=rf"topk_ids has {most + 1} ids, .*; .* at most {most}: split the tokens"):
        plan_align(most + 1, 8, 8, False, "sm_90a")
    assert plan_align(most - 8 * 7, 8, 8, False, "sm_90a").kernels


def test_more_work_tiles_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match=r"token tiles by 4096 of columns are \d+ work tiles; .*: split the tokens"):
        block_plan(2_200_000, 128, 2**18, MMA)


def test_a_matrix_with_more_columns_than_offsets_reach_is_refused():
    most = limits.MOST_COLUMNS
    with pytest.raises(ValueError, match=f"weights is packed with N = {2 * most}; .* at most {most}: split the matrix"):
        gemm_plan(4, 64, 2 * most)
    with pytest.raises(ValueError, match=f"down is packed with K = {2 * most}; .* at most {most}: split the matrix"):
        limits.check_matrix("down", experts(2, 2 * most, 64))
    with pytest.raises(ValueError, match=f"gate_up is packed with N = {2 * most}; .* at most {most}: split the matrix"):
        block_plan(4, 64, most)


def test_more_experts_than_the_alignment_counts_are_refused():
    with pytest.raises(ValueError, match=r"num_experts is 30000; .* at most 29055 in the shared memory .*: shard the"):
        plan_align(100, 30_000, 8, False, "sm_90a")
    assert plan_align(100, 29_055, 8, False, "sm_90a").kernels[0].threads == 32
    with pytest.raises(ValueError, match=r"num_experts is 9000; .* at most 8191 in the shared memory .* capability 75"):
        plan_align(100, 9_000, 8, False, "sm_75")
    with pytest.raises(ValueError, match=rf"num_experts is {2**31}; the CUDA kernels take at most"):
        block_plan(1, 64, 64, routed_experts=2**31)


def test_a_grid_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match=r"clearing the result takes \d+ CTAs; a grid has at most 2147483647: split"):
        gemm_plan(2**30, 64, 2**13, top_k=1)


def test_what_a_block_of_the_largest_sizes_needs_is_planned():
    """Nothing but int64 in the sizes: rows between the products of 2^36 elements."""
    planned = block_plan(2_400_000, 8192, 14336)
    assert planned.scratch[0].size == 2_400_000 * 2 * 14336 > 2**36
    assert all(kernel.max_ctas < 2**31 for kernel in planned.kernels)


# On the card.


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("case", ["mixtral-mma", "mixtral", "intermediate", "sum", "result"])
def test_large_arrays_on_the_card(case):
    """Each in a process of its own, one at a time: it gives its memory back."""
    with (pathlib.Path(tempfile.gettempdir()) / f"large-arrays-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.largest", "--case", case],
            cwd=ROOT,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "right" in run.stdout


def test_the_checked_rows_hold_both_ends():
    from benchmarks.largest import rows_to_check

    rows = rows_to_check(150_000)
    assert rows.dtype == np.int32
    assert (rows[:8] == np.arange(8)).all()
    assert rows[-1] == 149_999
    assert len(rows) > 40
