"""Tiles of `fused_moe` and ways to find slots beyond what the choice takes, on the card: products agree, or bits do."""

import dataclasses

import jax
import numpy as np
import pytest
from block_cases import Case, make_call
from oracle import assert_block_close

from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme


def assert_tiles_agree(case, tiles, *, routing="grouped"):
    """Two tiles on the card against the oracle."""
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(case, "cuda")
        assert_block_close(call.run(cuda_scheme=BlockScheme(routing, *tiles)), call.expected())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [
        (MmaTile(8, 2, 3, 2, 64, 2, 2), MmaTile(8, 1, 3, 1, 64, 3, 4)),
        (MmaTile(16, 2, 3, 1, 32, 3, 2), MmaTile(16, 1, 5, 1, 64, 2, 2)),
        (MmaTile(8, 1, 2, 3, 64, 2, 2), MmaTile(8, 1, 5, 1, 32, 3, 2)),
    ],
    ids=["3 and 3", "3 and 5", "2 and 5"],
)
def test_tiles_of_odd_width(tiles):
    """Warps side by side: 2880 columns, gpt-oss's, are 45 units of 64."""
    assert_tiles_agree(Case("", hidden=960, inner=384, group_size=64, down_group_size=64), tiles)


@pytest.mark.gpu
@pytest.mark.parametrize(("weight_format", "group"), [("int4_zp", 128), ("int4", 32), ("nvfp4", 16), ("fp8", 128)])
@pytest.mark.parametrize(
    "tiles",
    [
        (MmaTile(8, 2, 1, 3, 128, 2, 1), MmaTile(8, 1, 1, 2, 128, 2, 2)),
        (MmaTile(16, 1, 2, 2, 64, 3, 2), MmaTile(16, 1, 3, 1, 256, 2, 1)),
        (MmaTile(8, 1, 2, 4, 128, 2, 1), MmaTile(8, 1, 5, 2, 64, 3, 1)),
    ],
    ids=["3 and 2", "2 and 1", "4 and 2"],
)
def test_shares_of_k_that_are_not_alike(tiles, weight_format, group):
    """The last k-block of K may be shorter, as the last group may."""
    case = Case("", hidden=960, inner=448, group_size=group, down_group_size=group)
    assert_tiles_agree(dataclasses.replace(case, weight_format=weight_format, down_format=weight_format), tiles)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tiles",
    [
        (MmaTile(8, 2, 2, 1, 64, 2, 2), MmaTile(8, 2, 1, 1, 64, 2, 2)),
        (MmaTile(24, 2, 1, 1, 64, 2, 1), MmaTile(24, 1, 2, 1, 64, 2, 1)),
        (MmaTile(16, 1, 2, 2, 64, 2, 1), MmaTile(16, 1, 1, 2, 64, 2, 1)),
    ],
    ids=["each warp its own", "three rows of fragments", "exchanged"],
)
def test_every_column_has_its_own_bias(tiles):
    """A warp that has all of its sums holds their biases while it multiplies; one that adds shares loads them then."""
    assert_tiles_agree(Case("", hidden=256, inner=256, routing="holes", bias=True), tiles)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile",
    [MmaTile(8, 2, 1, 1, 64, 2, 2), MmaTile(24, 2, 2, 1, 64, 2, 1), WgmmaTile(16, 2, 2, 1, 64, 4, 1, False)],
    ids=["8 rows", "24 rows", "wgmma"],
)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 43, 64])
@pytest.mark.parametrize("routing", ["distinct", "few", "one", "duplicates", "holes"])
def test_grouped_slots_give_the_bits_of_aligned_ones(routing, tokens, tile):
    """The products group the slots themselves, or a kernel before them does; they overlap or do not."""
    if isinstance(tile, WgmmaTile) and compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("wgmma is Hopper's")
    case = Case("", tokens=tokens, hidden=256, routing=routing, expert_map=(1, -1, 2, 5, 0, 4, 3))
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(case, "cuda")
        aligned = np.asarray(call.run(cuda_scheme=BlockScheme("aligned", tile, tile)))
        grouped = np.asarray(call.run(cuda_scheme=BlockScheme("grouped", tile, tile, overlaps=False)))
    assert_block_close(grouped, call.expected())
    np.testing.assert_array_equal(grouped.view(np.uint16), aligned.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 64])
@pytest.mark.parametrize("routing", ["distinct", "few", "one", "duplicates", "holes"])
def test_as_many_slots_are_grouped_as_a_cta_groups(routing, tokens):
    """A word of counts and several; an expert has most of a word's slots, or all of them."""
    case, tile = Case("", tokens=tokens, top_k=8, experts=40, routing=routing), MmaTile(8, 2, 1, 1, 64, 2, 2)
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(case, "cuda")
        aligned, grouped = (
            np.asarray(call.run(cuda_scheme=BlockScheme(way, tile, tile))) for way in ("aligned", "grouped")
        )
    assert_block_close(grouped, call.expected())
    np.testing.assert_array_equal(grouped.view(np.uint16), aligned.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["grouped", "direct"])
@pytest.mark.parametrize("weight_format", ["int4_zp", "nvfp4"])
@pytest.mark.parametrize(
    "tiles",
    [
        (MmaTile(8, 2, 1, 2, 64, 2, 2, 2), MmaTile(8, 1, 2, 1, 64, 3, 4, 2)),
        (MmaTile(8, 1, 2, 1, 32, 3, 3, 4), MmaTile(8, 2, 1, 3, 64, 2, 1, 2)),
        (MmaTile(8, 2, 2, 1, 64, 3, 1, 4), MmaTile(8, 1, 1, 1, 32, 4, 2, 4)),
    ],
    ids=["2 and 2", "4 and 2", "4 and 4"],
)
def test_clusters_that_share_k(tiles, weight_format, routing):
    if compiler.compute_capability(compiler.target_architecture()) != 90:
        pytest.skip("clusters are measured on Hopper alone")
    group = 16 if weight_format == "nvfp4" else 64
    case = Case("", hidden=768, inner=768, weight_format=weight_format, down_format=weight_format, experts=9)
    case = dataclasses.replace(case, group_size=group, down_group_size=group, routing="holes")
    assert_tiles_agree(case, tiles, routing=routing)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("weight_format", "group", "dtype"),
    [
        ("nvfp4", 16, "bfloat16"),
        ("nvfp4", 16, "float16"),
        ("mxfp4", 32, "bfloat16"),
        ("mxfp4", 32, "float16"),
    ],
)
@pytest.mark.parametrize(
    "tiles",
    [
        (MmaTile(8, 2, 1, 2, 128, 2, 2), MmaTile(8, 1, 2, 1, 128, 3, 2)),
        (MmaTile(16, 1, 2, 1, 256, 2, 1), MmaTile(16, 2, 1, 1, 32, 3, 2)),
    ],
    ids=["8 rows", "16 rows"],
)
def test_groups_side_by_side(tiles, weight_format, group, dtype):
    """Experts have 1, 2, ... 9 rows: two groups of K at a time, or one. Last k-blocks of K are shorter."""
    formats = {"weight_format": weight_format, "down_format": weight_format, "scale_dtype": dtype, "dtype": dtype}
    case = Case("", tokens=45, top_k=1, experts=9, hidden=480, inner=448, group_size=group, down_group_size=group)
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(dataclasses.replace(case, **formats), "cuda")
        call.ids[:, 0] = np.random.default_rng(2).permutation(np.repeat(np.arange(9), np.arange(1, 10)))
        scheme = BlockScheme("grouped", *tiles)
        y = np.asarray(call.run(cuda_scheme=scheme))
        assert_block_close(y, call.expected())
        # A token of NaN has columns of its own there too.
        x = call.x.copy()
        poisoned = np.flatnonzero(np.isin(call.ids[:, 0], [1, 3, 8]))[:3]
        x[poisoned] = np.nan
        others = np.setdiff1d(np.arange(45), poisoned)
        again = np.asarray(dataclasses.replace(call, x=x).run(cuda_scheme=scheme))
    np.testing.assert_array_equal(again[others], y[others])
    assert np.isnan(again[poisoned].astype(np.float32)).all()
