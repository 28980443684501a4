"""`route` against numpy, and the workspace sizes of FORMATS section 5."""

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


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        (np.zeros((2, 4), np.int32), {"top_k": 1}, TypeError, "logits has dtype int32"),
        (np.zeros((), np.float32), {"top_k": 1}, ValueError, "logits has shape"),
        ([[0.0, 1.0]], {"top_k": 1}, TypeError, "logits has dtype"),
        (np.zeros((2, 4), np.float32), {"top_k": 5}, ValueError, r"top_k is 5; .*\[1, 4\]"),
        (np.zeros((2, 4), np.float32), {"top_k": 0}, ValueError, "top_k is 0"),
        (np.zeros((2, 4), np.float32), {"top_k": 1, "scoring": "sigmoid"}, ValueError, "scoring is 'sigmoid'"),
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
