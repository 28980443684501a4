"""`fold_input_order`: the order of an input goes into the matrix before it."""

import numpy as np
import pytest
from oracle import (
    FACTS,
    Joined,
    assert_block_close,
    expert_block,
    random_experts,
    random_routing,
    random_rows,
)

import jax_marlin_moe as jmm


@pytest.mark.covering
@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", [name for name, facts in FACTS.items() if not facts.has_global_scales])
@pytest.mark.parametrize("inner", [128, 100])
def test_folding_keeps_the_function_of_the_block(weight_format, inner):
    rng = np.random.default_rng(6)
    options = {"weight_format": weight_format, "group_size": FACTS[weight_format].group_sizes[0], "bias": True}
    gate_up = Joined(tuple(random_experts(rng, 3, 256, inner, **options) for _ in range(2)))
    down = random_experts(rng, 3, inner, 256, **options, reordered=True)
    folded_gate_up, folded_down = jmm.fold_input_order(gate_up.packed(), down.packed())
    assert folded_down.input_order is None
    x = random_rows(rng, 9, 256, np.float16)
    router, ids = random_routing(rng, 9, 2, 3)
    y = jmm.fused_moe(x, folded_gate_up, folded_down, router, ids, implementation="cpu")
    assert_block_close(y, expert_block(x, gate_up, down, router, ids))


def test_folding_nothing_changes_nothing():
    rng = np.random.default_rng(7)
    gate_up, down = random_experts(rng, 2, 64, 128).packed(), random_experts(rng, 2, 64, 64).packed()
    assert jmm.fold_input_order(gate_up, down) == (gate_up, down)


def test_folding_into_global_scales_is_refused():
    rng = np.random.default_rng(8)
    gate_up = random_experts(rng, 2, 64, 128, weight_format="nvfp4", group_size=16).packed()
    with pytest.raises(ValueError, match=r"gate_up.global_scales is not None: they belong to blocks of 64 columns"):
        jmm.fold_input_order(gate_up, random_experts(rng, 2, 64, 64, reordered=True).packed())


def test_folding_into_columns_that_do_not_match_is_refused():
    rng = np.random.default_rng(8)
    gate_up = random_experts(rng, 2, 64, 128).packed()
    with pytest.raises(ValueError, match="gate_up has N = 128"):
        jmm.fold_input_order(gate_up, random_experts(rng, 2, 192, 64, reordered=True).packed())
