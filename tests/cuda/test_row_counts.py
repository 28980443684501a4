"""How many rows a token tile multiplies that is not full, and which rows of slots are packed."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from abstract_calls import planned_block

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda.kernels import wgmma
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile, likely_row_counts, multiplied_rows, row_counts
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import MODELS
from jax_marlin_moe.measure.random_layers import random_layers

TILE = WgmmaTile(144, 2, 2, 1, 128, 3, 1, True)


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [
        (8, ()),
        (24, (8, 16)),
        (48, (16, 24, 32, 40)),
        (80, (24, 40, 64, 72)),
        (144, (40, 72, 112, 128)),
        (160, (40, 80, 120, 144)),
        (288, (80, 144, 224, 256)),
    ],
)
def test_token_tiles_multiply_quarters_and_eighths(tokens, counts):
    assert row_counts(tokens) == counts


def test_rows_of_bytes_are_multiplied_in_quarters_of_sixteens():
    assert row_counts(96, byte_rows=True) == (32, 48, 80)
    assert row_counts(64, byte_rows=True) == (16, 32, 48)


def test_tiles_have_counts_near_what_experts_leave_for_their_last_one():
    assert sorted(likely_row_counts(144, 128.0, 2048)) == [120, 136]
    assert sorted(likely_row_counts(144, 256.0, 2048)) == [96, 104, 120]
    assert likely_row_counts(48, 32.0, 2048) == ()  # has every eighth
    assert likely_row_counts(160, 512.0, 2048) == ()  # four tiles of an expert
    assert likely_row_counts(144, 128.0, 768) == ()


@pytest.mark.parametrize("tokens", wgmma.TOKEN_TILES)
@pytest.mark.parametrize("expert_rows", [2.5, 64.0, 170.67])
def test_what_is_multiplied_is_enough_for_all_rows(tokens, expert_rows):
    shares = multiplied_rows(tokens, expert_rows, 2048)
    counts = {*row_counts(tokens), *likely_row_counts(tokens, expert_rows, 2048), tokens}
    assert sum(share for _, share in shares) == pytest.approx(1)
    assert {rows for rows, _ in shares} <= counts
    # An expert has at least a tile's rows in as many tiles, and at most a tile too many.
    of_tile = sum(rows * share for rows, share in shares)
    assert of_tile <= tokens
    assert of_tile * (expert_rows / tokens + 1) >= expert_rows * (1 - math.exp(-expert_rows))


def test_a_block_is_compiled_with_counts_for_its_number_of_rows():
    def counts(tokens):
        ((gate_up, down),) = jax.eval_shape(lambda: random_layers(MODELS["qwen3-30b-a3b"], "int4", jnp.bfloat16, 1))
        x = jax.ShapeDtypeStruct((tokens, 2048), jnp.bfloat16)
        planned = planned_block(x, gate_up, down, top_k=8, scheme=BlockScheme("aligned", TILE, TILE))
        return {int(found) for found in re.findall(r"kRowCounts = (\d+);", planned.source)}

    # The second product's K is 768: it has the tile's own counts.
    own = (40, 72, 112, 128)
    assert counts(4096) == {wgmma.row_counts_fact(own), wgmma.row_counts_fact((*own, 96, 104, 120))}
    assert counts(2048) == {wgmma.row_counts_fact(own), wgmma.row_counts_fact((*own, 120, 136))}


@pytest.mark.parametrize(("model", "tokens", "packs"), [("deepseek-v3-tp8", 256, True), ("qwen3-30b-a3b", 256, False)])
def test_rows_of_few_slots_are_packed_where_they_outgrow_the_cache(model, tokens, packs):
    shape = MODELS[model]
    ((gate_up, down),) = jax.eval_shape(lambda: random_layers(shape, "int4", jnp.bfloat16, 1))
    tile = WgmmaTile(16, 4, 1, 1, 128, 4, 2, False)
    x = jax.ShapeDtypeStruct((tokens, shape.hidden), jnp.bfloat16)
    planned = planned_block(x, gate_up, down, top_k=shape.top_k, scheme=BlockScheme("aligned", tile, tile))
    assert ("CombineFourColumns" in planned.source) == packs


@pytest.mark.gpu
def test_last_tiles_of_every_count_have_the_rows_of_the_reference():
    """Experts of 1 to 152 rows, in tiles that multiply 40, 72, 112, 120, 128, 136 or 144 of them."""
    rng = np.random.default_rng(3)
    rows = [1, 39, 41, 72, 73, 112, 113, 120, 121, 128, 129, 136, 137, 144, 145, 152]
    experts = len(rows)
    ids = np.repeat(np.arange(experts, dtype=np.int32), rows)
    ids = np.concatenate([ids, np.full(128 * experts - len(ids), -1, np.int32)])  # 128 slots for each on average
    rng.shuffle(ids)
    gate_up, down = (oracle.random_experts(rng, experts, k, n, group_size=128) for k, n in ((1024, 256), (128, 1024)))
    x = oracle.random_rows(rng, len(ids), 1024, jnp.bfloat16)
    weights = rng.uniform(0.5, 1.5, (len(ids), 1)).astype(np.float32)
    tile = WgmmaTile(144, 2, 1, 1, 64, 3, 1, True)
    assert {120, 136} <= set(likely_row_counts(tile.tokens, len(ids) / experts, 1024))

    def block(implementation, scheme):
        arguments = jnp.asarray(x), gate_up.packed(), down.packed(), jnp.asarray(weights), jnp.asarray(ids)[:, None]
        return np.asarray(
            jmm.fused_moe(*arguments, implementation=implementation, cuda_scheme=scheme).astype(jnp.float32)
        )

    found, expected = block("cuda", BlockScheme("aligned", tile, tile)), block("xla", None)
    real = ids >= 0
    assert not found[~real].any()
    for row, (ours, theirs) in enumerate(zip(found[real], expected[real], strict=True)):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 0.02, (row, error)
