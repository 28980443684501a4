"""The rows of GEMM kernels, which the choice of tiles, the tables and a program's headers follow."""

import dataclasses

import jax.numpy as jnp
import pytest
from abstract_calls import abstract_block, planned_block

from jax_marlin_moe.cuda import choose, compiler
from jax_marlin_moe.cuda.architectures import ARCHITECTURES, get_architecture
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.mma_bytes import MmaByteTile
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.wgmma_bytes import WgmmaByteTile
from jax_marlin_moe.cuda.plan_products import plan_moe_gemm
from jax_marlin_moe.cuda.plan_rows import plan_linear
from jax_marlin_moe.cuda.scheme import KERNELS, BlockScheme

SHAPE = GemmShape(512, 512, 8, 128, False, "int4", 4, "bfloat16", None, "bfloat16")


def test_architectures_name_kernels_that_exist():
    assert {name for row in ARCHITECTURES.values() for name in row.kernels} == KERNELS.keys()
    for kernel in KERNELS.values():
        assert (compiler.source_directory() / kernel.header).is_file()


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_candidates_are_tiles_of_the_architectures_kernels(capability):
    kernels = {KERNELS[name].tile for name in ARCHITECTURES[capability].kernels}
    shapes = SHAPE, dataclasses.replace(SHAPE, dtype="int8")
    kinds = [{type(tile) for tile in choose.candidates(shape, 16, capability)} for shape in shapes]
    of_bytes = {MmaByteTile, WgmmaByteTile}
    assert kinds == [kernels - of_bytes, kernels & of_bytes]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_sizes_of_token_tiles_are_those_of_the_architectures_kernels(capability):
    sizes = {size for name in ARCHITECTURES[capability].kernels for size in KERNELS[name].token_tiles}
    for slots in (1, 64, 4096):
        assert set(choose.block_sizes(slots, 8, SHAPE, capability)) <= sizes


def planned(tokens, scheme):
    x, gate_up, down, *_ = abstract_block(tokens, 4, 512, 256, 64, jnp.dtype("bfloat16"), group_size=128)
    return planned_block(x, gate_up, down, top_k=4, scheme=scheme)


@pytest.mark.parametrize("ctas", [1, 3, 8])
def test_ctas_that_come_in_beside_another_kernel_land_evenly(ctas):
    """A multiprocessor has room for as many of the first product's as planned, and for no more."""
    tile = MmaTile(8, 2, 1, 1, 128, 2, ctas)
    aligned = planned(64, BlockScheme("aligned", tile, tile))
    first, second = (aligned.kernels[aligned.position(stage)] for stage in ("gate_up", "down"))
    assert first.overlaps_predecessor
    assert first.padding_bytes > 0
    assert get_architecture(90).fits_shared_memory(first.requested_bytes, ctas)
    assert not get_architecture(90).fits_shared_memory(first.requested_bytes, ctas + 1)
    assert second.padding_bytes == 0
    # Without a kernel before it, CTAs are dealt out in turns.
    grouped = planned(4, BlockScheme("grouped", tile, tile))
    assert grouped.kernels[grouped.position("gate_up")].padding_bytes == 0


def test_products_know_whether_their_order_is_fixed():
    tile = MmaTile(8, 2, 1, 1, 128, 2, 2)
    for scheme, in_order in (("batch_invariant", True), (BlockScheme("aligned", tile, tile), False)):
        plan = planned(64, scheme)
        for stage in ("gate_up", "down"):
            assert plan.kernels[plan.position(stage)].structs["Problem"]["in_order"] is in_order


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_single_products_know_it_too(batch_invariant):
    x, weights, *_ = abstract_block(4, 2, 512, 256, 8, jnp.dtype("bfloat16"), group_size=128)
    options = {"architecture": "sm_80", "batch_invariant": batch_invariant}
    for plan in (
        plan_linear(x, weights, named=False, **options),
        plan_moe_gemm(x, weights, top_k=2, block_size=8, list_length=72, weighted=False, **options),
    ):
        assert plan.kernels[-1].structs["Problem"]["in_order"] is batch_invariant
