"""The search for the fastest scheme, without a card: proposals from shapes, decisions from samples."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import tables
from jax_marlin_moe.cuda.block_scheme import measured_scheme
from jax_marlin_moe.cuda.grouped_gemm import gemm_shape
from jax_marlin_moe.cuda.kernels.token_tiles import MOST_GROUPED_SLOTS
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import MODELS
from jax_marlin_moe.measure.propose import propose
from jax_marlin_moe.measure.samples import (
    Measurement,
    fastest_block,
    fastest_pairs,
    rivals,
    winner,
    with_and_without_overlap,
)
from jax_marlin_moe.measure.search import search

QWEN = MODELS["qwen3-30b-a3b"]


def abstract(experts, k, n, group_size):
    dense = jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16)
    return jax.eval_shape(partial(jmm.quantize, weight_format="int4", group_size=group_size), dense)


def shapes_of(model):
    dtype = jnp.dtype("bfloat16")
    e, h, i, g = model.num_experts, model.hidden, model.intermediate, model.group_size
    return (
        gemm_shape(abstract(e, h, 2 * i, g), True, dtype),
        gemm_shape(abstract(e, i, h, g), False, dtype),
    )


def proposed(tokens, capability=90, tiles_per_product=6):
    return propose(
        *shapes_of(QWEN),
        tokens=tokens,
        top_k=QWEN.top_k,
        experts_hit=8.0,
        capability=capability,
        tiles_per_product=tiles_per_product,
    )


# What is proposed.


@pytest.mark.parametrize("tokens", [1, 4, 16, 512])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_proposal_fits_both_products(tokens, capability):
    first, second = shapes_of(QWEN)
    groups = proposed(tokens, capability)
    assert groups
    for group in groups:
        assert 1 <= len(group) <= 6
        assert len({(scheme.routing, scheme.gate_up.tokens) for scheme in group}) == 1
        assert all(scheme.fits(first, second, capability) for scheme in group)
    kinds = [(group[0].routing, group[0].gate_up.tokens) for group in groups]
    assert len(kinds) == len(set(kinds))


def test_proposals_come_best_predicted_first_and_no_more_of_them_than_asked_for():
    first, second = shapes_of(QWEN)
    few, many = proposed(16, tiles_per_product=2), proposed(16, tiles_per_product=40)
    assert [group[:2] for group in many] == few
    for group in proposed(1, tiles_per_product=40):  # one slot for each of eight token tiles
        for shape, product in ((first, "gate_up"), (second, "down")):
            tiles = list(dict.fromkeys(getattr(scheme, product) for scheme in group))
            predicted = [tile.predicted_microseconds(shape, QWEN.top_k, 1.0, 90) for tile in tiles]
            assert predicted == sorted(predicted)


def test_the_number_of_slots_decides_how_they_are_found():
    def routings(tokens):
        return {group[0].routing for group in proposed(tokens, tiles_per_product=1)}

    assert routings(1) == {"direct"}
    assert routings(4) == {"direct", "grouped"}
    assert routings(MOST_GROUPED_SLOTS // QWEN.top_k) == {"grouped"}
    assert routings(MOST_GROUPED_SLOTS // QWEN.top_k + 1) == {"aligned"}


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        (1, [("direct", 8)]),
        (16, [("grouped", 8), ("grouped", 16)]),
        # Of 64 tokens, a shared expert's slots are not among the 512 that are grouped.
        (64, [("grouped", 8), ("grouped", 16)]),
        (65, [("aligned", 8), ("aligned", 16)]),
    ],
)
def test_beside_a_shared_expert_of_many_rows_larger_token_tiles_are_tried(tokens, kinds):
    groups = propose(
        *shapes_of(MODELS["deepseek-v3-tp8"]),
        tokens=tokens,
        top_k=8,
        experts_hit=60.0,
        capability=90,
        tiles_per_product=2,
        shared=1,
    )
    assert [(group[0].routing, group[0].gate_up.tokens) for group in groups] == kinds


def test_a_block_with_shared_experts_has_a_row_of_its_own_or_that_without_them(monkeypatch):
    gate_up, down = abstract(256, 7168, 512, 128), abstract(256, 256, 7168, 128)
    own = "E257 k9 H7168 I256 g128 int4/int4"
    known = {"E256 k8 H7168 I256 g128 int4/int4": "without", own: "with"}
    monkeypatch.setattr(tables, "lookup", lambda key, tokens, architecture: known.get(str(key)))
    assert measured_scheme(gate_up, down, 8, 1, "sm_90a") == "without"
    assert measured_scheme(gate_up, down, 8, 1, "sm_90a", shared=1) == "with"
    del known[own]
    assert measured_scheme(gate_up, down, 8, 1, "sm_90a", shared=1) == "without"
    assert measured_scheme(gate_up, down, 4, 1, "sm_90a", shared=1) is None


def test_each_architecture_has_its_own_kernels():
    def tiles(capability):
        return [
            tile
            for group in proposed(512, capability, tiles_per_product=40)
            for scheme in group
            for tile in (scheme.gate_up, scheme.down)
        ]

    assert any(isinstance(tile, WgmmaTile) for tile in tiles(90))
    assert not any(isinstance(tile, WgmmaTile) or tile.cluster > 1 for tile in tiles(80))


def test_where_no_tile_fits_nothing_is_proposed():
    first, second = shapes_of(QWEN)
    narrow = dataclasses.replace(second, n=32)
    arguments = {"tokens": 4, "top_k": 8, "experts_hit": 8.0, "capability": 90, "tiles_per_product": 4}
    assert propose(first, second, **arguments)
    assert propose(first, narrow, **arguments) == []


def test_shared_experts_unlike_the_others_are_refused(monkeypatch):
    measure = pytest.importorskip("jax_marlin_moe.measure.autotune", exc_type=ImportError)
    monkeypatch.setenv("JAX_MARLIN_MOE_CUDA_ARCH", "sm_90a")
    layer = abstract(16, 256, 512, 128), abstract(16, 256, 256, 128)
    alike, wide = ((abstract(1, 256, 2 * n, 128), abstract(1, n, 256, 128)) for n in (256, 384))
    with pytest.raises(ValueError, match="shared has 1 layers; it must have 2, as layers has"):
        measure.autotune([layer, layer], tokens=1, top_k=2, shared=[alike])
    with pytest.raises(ValueError, match="shared is not packed as layers"):
        measure.autotune([layer, layer], tokens=1, top_k=2, shared=[alike, wide])


# What is chosen.


@pytest.fixture(scope="module")
def group():
    """Eight schemes with different tiles of either product."""
    (schemes,) = proposed(1, tiles_per_product=8)
    assert len({scheme.gate_up for scheme in schemes}) == len({scheme.down for scheme in schemes}) == 8
    return schemes


def test_the_fastest_three_tiles_of_either_product_meet(group):
    gate_up_us = [5.0, 1.0, 4.0, 2.0, 8.0, 7.0, 6.0, 3.0]
    down_us = [1.0, 8.0, 7.0, 6.0, 2.0, 5.0, 4.0, 3.0]
    block_us = [9.0, 9.0, 9.0, 9.0, 9.0, 8.5, 9.0, 9.0]
    measured = [Measurement(*row) for row in zip(group, block_us, gate_up_us, down_us, strict=True)]
    expected = itertools.product((group[i].gate_up for i in (1, 3, 7)), (group[i].down for i in (0, 4, 7)))
    assert [(pair.gate_up, pair.down) for pair in fastest_pairs(measured)] == list(expected)
    assert {pair.routing for pair in fastest_pairs(measured)} == {"direct"}
    assert fastest_block(measured) == group[5]
    assert fastest_pairs(measured[:1]) == [group[0]]


def test_each_finalist_is_timed_with_and_without_an_overlap_once(group):
    first, second = (dataclasses.replace(scheme, overlaps=False) for scheme in group[:2])
    again = dataclasses.replace(first, overlaps=True)
    finalists = with_and_without_overlap([first, second, again])
    assert finalists == [again, first, dataclasses.replace(second, overlaps=True), second]


def test_a_scheme_that_groups_slots_is_compared_with_an_alignment_kernel(group):
    grouped = dataclasses.replace(group[0], routing="grouped", overlaps=False)
    assert rivals(grouped) == [dataclasses.replace(grouped, routing="aligned")]
    assert rivals(group[0]) == rivals(dataclasses.replace(grouped, routing="aligned")) == []


def test_the_first_of_equals_wins(group):
    assert winner({group[0]: 2.0, group[1]: 1.0, group[2]: 1.0}) == group[1]


# The whole search.


class FakeTimer:
    """Times by a function of the scheme; notes what it was asked for."""

    def __init__(self, block_us, gate_up_us=lambda tile: 1.0, down_us=lambda tile: 1.0, refused=()):
        self.block_us, self.gate_up_us, self.down_us, self.refused = block_us, gate_up_us, down_us, refused
        self.measured, self.rested = [], []

    def compiled(self, schemes):
        return [s for s in schemes if not {s.gate_up, s.down} & set(self.refused)]

    def measure(self, scheme):
        self.measured.append(scheme)
        return Measurement(
            scheme, self.block_us(scheme) + 0.5, self.gate_up_us(scheme.gate_up), self.down_us(scheme.down)
        )

    def rested_block_us(self, scheme):
        self.rested.append(scheme)
        return self.block_us(scheme)


def test_the_search_finds_a_pair_that_was_not_proposed(group):
    """Tiles that are only together in the second round, and faster without an overlap."""
    best = BlockScheme("direct", group[2].gate_up, group[6].down, overlaps=False)
    assert best not in group
    gate_up_us = {scheme.gate_up: abs(i - 2) + 1.0 for i, scheme in enumerate(group)}
    down_us = {scheme.down: abs(i - 6) + 1.0 for i, scheme in enumerate(group)}
    timer = FakeTimer(
        lambda s: gate_up_us[s.gate_up] + down_us[s.down] + 0.25 * s.overlaps,
        gate_up_us.__getitem__,
        down_us.__getitem__,
    )
    assert search([group], None, timer) == Measurement(best, 2.0, 1.0, 1.0)
    assert timer.measured == [*group, best]
    assert len(timer.rested) == len(set(timer.rested))


def test_the_search_times_nothing_that_does_not_compile(group):
    refused = [group[0].gate_up, group[1].down]
    timer = FakeTimer(lambda s: 1.0 + (s.gate_up == group[5].gate_up), refused=refused)
    known = dataclasses.replace(group[0], overlaps=False)
    found = search([group[:1], group], known, timer)
    assert found.block_us == 1.0
    for scheme in timer.measured + timer.rested:
        assert scheme.gate_up != group[0].gate_up
        assert scheme.down != group[1].down


def test_the_search_keeps_a_known_scheme_that_nothing_beats(group):
    known = BlockScheme("direct", group[7].gate_up, group[0].down, overlaps=False)
    timer = FakeTimer(lambda s: 1.0 if s == known else 2.0)
    assert search([group[1:5]], known, timer).scheme == known
    assert search([], known, timer).scheme == known
    assert search([group[:1]], None, FakeTimer(lambda s: 1.0, refused=[group[0].down])) is None
    assert search([], None, timer) is None


def test_the_search_prefers_an_alignment_kernel_where_it_is_faster(group):
    grouped = [dataclasses.replace(scheme, routing="grouped") for scheme in group[:2]]
    timer = FakeTimer(lambda s: 1.0 + (s.routing == "grouped"))
    found = search([grouped], None, timer)
    assert found.scheme.routing == "aligned"
    assert found.block_us == 1.0
    slower = FakeTimer(lambda s: 1.0 + (s.routing == "aligned"))
    assert search([grouped], None, slower).scheme.routing == "grouped"
