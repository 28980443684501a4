"""The rows of GEMM kernels, which the choice of tiles, the tables and a program's headers follow."""

import dataclasses

import pytest

from jax_marlin_moe.cuda import choose, compiler
from jax_marlin_moe.cuda.architectures import ARCHITECTURES
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.cuda.kernels.wgmma_bytes import WgmmaByteTile
from jax_marlin_moe.cuda.scheme import KERNELS

SHAPE = GemmShape(512, 512, 8, 128, False, "int4", 4, "bfloat16", None, "bfloat16")


def test_architectures_name_kernels_that_exist():
    assert {name for row in ARCHITECTURES.values() for name in row.kernels} == KERNELS.keys()
    for kernel in KERNELS.values():
        assert (compiler.source_directory() / kernel.header).is_file()


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_candidates_are_tiles_of_the_architectures_kernels(capability):
    kernels = {KERNELS[name].tile for name in ARCHITECTURES[capability].kernels}
    of_bytes = dataclasses.replace(SHAPE, dtype="int8")
    kinds = [{type(tile) for tile in choose.candidates(shape, 16, capability)} for shape in (SHAPE, of_bytes)]
    assert kinds == [kernels - {WgmmaByteTile}, kernels & {WgmmaByteTile}]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_sizes_of_token_tiles_are_those_of_the_architectures_kernels(capability):
    sizes = {size for name in ARCHITECTURES[capability].kernels for size in KERNELS[name].token_tiles}
    for slots in (1, 64, 4096):
        assert set(choose.block_sizes(slots, 8, SHAPE, capability)) <= sizes
