"""`route` against numpy, and the workspace sizes of docs/formats.md, "Block alignment"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_marlin_moe as jmm


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (6, 6), (60, 4), (1, 1)])
def test_route_takes_the_largest(experts, top_k, renormalize, dtype):
    # A permutation, so that no rounding makes a tie.
    rng = np.random.default_rng(0)
    logits = (np.stack([rng.permutation(experts) for _ in range(7)]) / 16).astype(dtype)
    weights, ids = jmm.route(logits, top_k=top_k, renormalize=renormalize)
    order = np.argsort(-logits.astype(np.float64), axis=1)[:, :top_k]
    expected = np.take_along_axis(softmax(logits.astype(np.float64)), order, axis=1)
    if renormalize:
        expected /= expected.sum(1, keepdims=True)
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5]), min_size=6, max_size=6), st.integers(1, 6))
def test_ties_go_to_the_lower_expert(logits, top_k):
    _, ids = jmm.route(np.asarray([logits], np.float32), top_k=top_k)
    expected = sorted(range(6), key=lambda expert: (-logits[expert], expert))[:top_k]
    assert ids[0].tolist() == expected


def test_renormalised_weights_sum_to_one():
    logits = np.random.default_rng(1).normal(size=(50, 128)).astype(np.float32)
    weights, _ = jmm.route(logits, top_k=8)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    unscaled, _ = jmm.route(logits, top_k=8, renormalize=False)
    assert (unscaled.sum(-1) < 0.9).all()


def test_large_logits_do_not_overflow():
    weights, ids = jmm.route(np.asarray([[-3e38, 2e38, 3e38]], np.float32), top_k=2)
    assert ids[0, 0] == 2
    assert weights.tolist() == [[1.0, 0.0]]


def test_leading_dimensions_are_a_batch():
    logits = np.random.default_rng(2).normal(size=(3, 5, 8)).astype(np.float32)
    weights, ids = jmm.route(logits, top_k=2)
    flat_weights, flat_ids = jmm.route(logits.reshape(15, 8), top_k=2)
    np.testing.assert_array_equal(ids, flat_ids.reshape(3, 5, 2))
    np.testing.assert_array_equal(weights, flat_weights.reshape(3, 5, 2))


def test_route_has_a_gradient():
    """Through the softmax alone: the choice itself is constant."""
    logits = np.random.default_rng(3).normal(size=8).astype(np.float32)

    def second(x):
        return jmm.route(x, top_k=2, renormalize=False)[0][1]

    ids = jmm.route(logits, top_k=2)[1]
    p = softmax(logits)
    expected = p[ids[1]] * ((np.arange(8) == ids[1]) - p)
    np.testing.assert_allclose(jax.grad(second)(logits), expected, atol=1e-6)


LOGITS = np.random.default_rng(4).normal(size=(40, 16)).astype(np.float32)
BIAS = np.random.default_rng(5).normal(size=16).astype(np.float32)


def best(scores, top_k):
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_k]


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_the_correction_bias_is_for_the_choice_alone(scoring):
    weights, ids = jmm.route(LOGITS, top_k=4, scoring=scoring, correction_bias=BIAS, scale=2.5)
    z = LOGITS.astype(np.float64)
    scores = 1 / (1 + np.exp(-z)) if scoring == "sigmoid" else np.sqrt(np.log1p(np.exp(z)))
    order = best(scores + BIAS, 4)
    assert (order != best(scores, 4)).any()
    chosen = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True) * 2.5, rtol=1e-5)


@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_only_the_best_groups_stay(group_score):
    weights, ids = jmm.route(
        LOGITS, top_k=3, scoring="sigmoid", correction_bias=BIAS, num_groups=4, top_groups=2, group_score=group_score
    )
    scores = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    for t, row in enumerate(scores + BIAS):
        groups = np.sort(row.reshape(4, 4), axis=1)
        worth = groups[:, -2:].sum(1) if group_score == "top2" else groups[:, -1]
        kept = np.argsort(-worth)[:2]
        allowed = [e for e in np.argsort(-row) if e // 4 in kept][:3]
        np.testing.assert_array_equal(ids[t], allowed)
        np.testing.assert_allclose(weights[t], scores[t][allowed] / scores[t][allowed].sum(), rtol=1e-5)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_soft_cap_bends_the_logits_before_they_are_scores(scoring):
    # Of Laguna (transformers, models/laguna/modeling_laguna.py, LagunaTopKRouter).
    weights, ids = jmm.route(LOGITS, top_k=4, scoring=scoring, correction_bias=BIAS, logits_soft_cap=1.5)
    capped = np.tanh(LOGITS.astype(np.float64) / 1.5) * 1.5
    scores = 1 / (1 + np.exp(-capped)) if scoring == "sigmoid" else softmax(capped)
    order = best(scores + BIAS, 4)
    chosen = np.take_along_axis(scores, order, axis=1)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True), rtol=1e-5)


def test_a_soft_cap_makes_infinite_logits_finite():
    logits = np.asarray([[-np.inf, np.inf, 0.0]], np.float32)
    weights, ids = jmm.route(logits, top_k=3, scoring="identity", renormalize=False, logits_soft_cap=30)
    assert ids.tolist() == [[1, 2, 0]]
    assert weights.tolist() == [[30.0, 0.0, -30.0]]


def test_softmax_over_the_chosen():
    weights, ids = jmm.route(LOGITS, top_k=4, scoring="identity", softmax_after_topk=True)
    order = best(LOGITS, 4)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, softmax(np.take_along_axis(LOGITS, order, axis=1)), rtol=1e-5)


def test_sigmoids_of_the_chosen_logits():
    # Of Kolibri (transformers, models/kolibri1/modeling_kolibri1.py): the bias is added to the logits.
    weights, ids = jmm.route(LOGITS, top_k=3, scoring="chosen_sigmoid", correction_bias=BIAS, renormalize=False)
    order = best(LOGITS + BIAS, 3)
    assert (order != best(LOGITS, 3)).any()
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(-np.take_along_axis(LOGITS, order, axis=1))), rtol=1e-5)


def test_large_logits_are_told_apart_where_their_sigmoids_are_equal():
    logits = np.asarray([[30.0, 40.0, 35.0]], np.float32)
    weights, ids = jmm.route(logits, top_k=2, scoring="chosen_sigmoid", renormalize=False)
    assert (ids.tolist(), weights.tolist()) == ([[1, 2]], [[1.0, 1.0]])


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3])
def test_sparsemixer_weighs_a_logit_among_those_close_to_it(jitter):
    # Of Phi-3.5-MoE (transformers, models/phimoe/modeling_phimoe.py, sparsemixer).
    weights, ids = jmm.route(LOGITS, top_k=2, scoring="sparsemixer", renormalize=False, jitter=jitter)
    np.testing.assert_array_equal(ids, best(LOGITS, 2))
    for t, row in enumerate(LOGITS.astype(np.float64)):
        left = dict(enumerate(row))
        for position in range(2):
            expert = max(left, key=left.get)
            top = left[expert]
            close = [z for z in left.values() if not (top - z) / max(abs(z), top) > 2 * jitter]
            np.testing.assert_allclose(weights[t, position], 1 / np.exp(np.asarray(close) - top).sum(), rtol=1e-5)
            del left[expert]
    assert (np.asarray(weights) < 1).any() == (jitter > 0)


def test_sparsemixer_of_equal_logits():
    weights, ids = jmm.route(np.zeros((1, 4), np.float32), top_k=2, scoring="sparsemixer", renormalize=False)
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[1 / 4, 1 / 3]], rtol=1e-6)


def test_the_epsilon_of_the_sum_counts_where_the_scores_are_small():
    # Of LFM2 (transformers, models/lfm2_moe/modeling_lfm2_moe.py), which adds 1e-6.
    weights, _ = jmm.route(LOGITS - 14, top_k=4, scoring="sigmoid", renormalize_epsilon=1e-6)
    chosen = -np.sort(-1 / (1 + np.exp(14 - LOGITS.astype(np.float64))), axis=1)[:, :4]
    np.testing.assert_allclose(weights, chosen / (chosen.sum(1, keepdims=True) + 1e-6), rtol=1e-5)
    assert (weights.sum(1) < 0.98).all()


def test_sigmoid_of_the_top_logit():
    weights, ids = jmm.route(LOGITS, top_k=1, scoring="sigmoid", renormalize=False)
    np.testing.assert_array_equal(ids[:, 0], LOGITS.argmax(1))
    np.testing.assert_allclose(weights[:, 0], 1 / (1 + np.exp(-LOGITS.max(1))), rtol=1e-5)


def test_factors_by_expert():
    weights, ids = jmm.route(LOGITS, top_k=2, expert_scale=BIAS)
    plain, _ = jmm.route(LOGITS, top_k=2)
    np.testing.assert_allclose(weights, plain * BIAS[np.asarray(ids)], rtol=1e-6)


def test_no_rows_have_no_experts():
    for options in ({}, {"num_groups": 4}, {"scoring": "sparsemixer", "renormalize": False}):
        weights, ids = jmm.route(LOGITS[:0], top_k=1, **options)
        assert weights.shape == ids.shape == (0, 1)


def test_given_experts():
    given = np.random.default_rng(6).integers(0, 16, (40, 3)).astype(np.int32)
    weights, ids = jmm.route(LOGITS, top_k=3, scoring="sqrtsoftplus", scale=1.5, ids=given)
    scores = np.sqrt(np.log1p(np.exp(LOGITS.astype(np.float64))))
    chosen = np.take_along_axis(scores, given, axis=1)
    np.testing.assert_array_equal(ids, given)
    np.testing.assert_allclose(weights, chosen / chosen.sum(1, keepdims=True) * 1.5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scoring": "sigmoid"}, {"scoring": "identity", "softmax_after_topk": True}])
def test_given_ids_that_name_nobody_weigh_nothing(options):
    given = np.asarray([[3, -1, 7], [16, 2, 5]], np.int32)
    weights, _ = jmm.route(LOGITS[:2], top_k=3, ids=given, expert_scale=BIAS, **options)
    pairs = np.asarray([[3, 7], [2, 5]], np.int32)
    expected, _ = jmm.route(LOGITS[:2], top_k=2, ids=pairs, expert_scale=BIAS, **options)
    np.testing.assert_array_equal(weights[0, 1], 0)
    np.testing.assert_array_equal(weights[1, 0], 0)
    np.testing.assert_allclose([weights[0, ::2], weights[1, 1:]], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (np.zeros((2, 4), np.int32), {"top_k": 1}, TypeError, "logits has dtype int32"),
        (np.zeros((), np.float32), {"top_k": 1}, ValueError, "logits has shape"),
        ([[0.0, 1.0]], {"top_k": 1}, TypeError, "logits has dtype"),
        (np.zeros((2, 4), np.float32), {"top_k": 5}, ValueError, r"top_k is 5; .*\[1, 4\]"),
        (np.zeros((2, 4), np.float32), {"top_k": 0}, ValueError, "top_k is 0"),
        (np.zeros((2, 4), np.float32), {"top_k": 1, "scoring": "tanh"}, ValueError, "scoring is 'tanh'"),
        (LOGITS, {"top_k": 1, "group_score": "sum"}, ValueError, "group_score is 'sum'"),
        (LOGITS, {"top_k": 1, "logits_soft_cap": 0.0}, ValueError, "logits_soft_cap is 0.0; it must be positive"),
        (LOGITS, {"top_k": 1, "logits_soft_cap": np.nan}, ValueError, "logits_soft_cap is nan"),
        (LOGITS, {"top_k": 1, "renormalize_epsilon": -1e-6}, ValueError, "renormalize_epsilon is -1e-06"),
        (LOGITS, {"top_k": 1, "jitter": 0.1}, ValueError, "jitter is 0.1; it must be 0, as scoring 'softmax' has none"),
        (LOGITS, {"top_k": 1, "jitter": np.nan, "scoring": "sparsemixer"}, ValueError, "jitter is nan"),
        (
            LOGITS,
            {"top_k": 1, "correction_bias": BIAS, "scoring": "sparsemixer"},
            ValueError,
            "takes no correction_bias",
        ),
        (LOGITS, {"top_k": "1"}, TypeError, "top_k is '1'; it must be an int"),
        (LOGITS, {"top_k": 1, "num_groups": 2.0}, TypeError, r"num_groups is 2\.0; it must be an int"),
        (LOGITS, {"top_k": 1, "renormalize": "no"}, TypeError, "renormalize is 'no'; it must be True or False"),
        (LOGITS, {"top_k": 1, "scale": np.nan}, ValueError, "scale is nan; it must be finite"),
        (LOGITS, {"top_k": 1, "scale": "2"}, TypeError, "scale is '2'; it must be a number"),
        (LOGITS, {"top_k": 1, "expert_scale": [1.0]}, TypeError, "expert_scale has type list; it must be an array"),
        (LOGITS, {"top_k": 1, "correction_bias": BIAS > 0}, TypeError, "correction_bias has dtype bool"),
        (LOGITS, {"top_k": 1, "num_groups": 3}, ValueError, "num_groups is 3"),
        (LOGITS, {"top_k": 1, "num_groups": 4, "top_groups": 5}, ValueError, "top_groups 5"),
        (LOGITS, {"top_k": 5, "num_groups": 4}, ValueError, "top_k is 5; 1 groups have 4 experts"),
        (LOGITS, {"top_k": 1, "correction_bias": BIAS[:3]}, ValueError, r"correction_bias has shape \(3,\)"),
        (LOGITS, {"top_k": 1, "ids": np.zeros((40, 2), np.int32)}, ValueError, r"ids has shape \(40, 2\)"),
    ],
)
def test_bad_routers_are_refused(logits, options, error, message):
    with pytest.raises(error, match=message):
        jmm.route(logits, **options)


@pytest.mark.parametrize(
    ("slots", "experts", "n", "block_size", "multiprocessors", "expected"),
    [
        # P = 16 + 8 * 15 = 136: locks min(2 * 9, 528) = 18 -> 20; sums 128 * 136.
        (16, 8, 128, 16, 132, 20 + 128 * 136),
        # Fewer slots than experts: P = min(2 * 16, 2 + 8 * 15) = 32; locks min(2 * 2, 528) = 4.
        (2, 8, 128, 16, 132, 4 + 128 * 32),
        # Rows of 8 count twice: P = 16 + 8 * 7 = 72; locks min(1 * 9, 528) = 9 -> 12.
        (16, 8, 64, 8, 132, 12 + 2 * 64 * 72),
        # The card bounds both: P = 65536 + 8 * 63 = 66040; locks 4 * 10; sums 10 * 4 * 64 * 256.
        (65536, 8, 4096, 64, 10, 40 + 10 * 4 * 64 * 256),
        # ceil(P / B): P = 20 + 3 * 47 = 161, 4 blocks of 48.
        (20, 3, 64, 48, 132, 4 + 64 * 161),
        (0, 8, 64, 16, 132, 0),
    ],
)
def test_workspace_sizes(slots, experts, n, block_size, multiprocessors, expected):
    size = jmm.workspace_size(
        num_slots=slots, num_experts=experts, n=n, block_size=block_size, multiprocessors=multiprocessors
    )
    assert size == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n": 96}, "n is 96"), ({"n": 0}, "n is 0"), ({"block_size": 24}, "block_size is 24")],
)
def test_bad_workspaces_are_refused(change, message):
    arguments = {"num_slots": 16, "num_experts": 8, "n": 64, "block_size": 16, "multiprocessors": 132}
    with pytest.raises(ValueError, match=message):
        jmm.workspace_size(**(arguments | change))
