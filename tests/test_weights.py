"""`MarlinWeights` as a value: slices, joins, stacks and pytree behaviour."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import FACTS, random_experts

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.arguments import check_weights

GROUPS = pytest.mark.parametrize("group_size", [32, None])
EVERY_FORMAT = pytest.mark.parametrize("weight_format", FACTS)


def assert_same_weights(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def experts_with_everything(group_size=32, seed=0, **changes):
    fields = {"weight_format": "int4_zp", "bias": True} | changes
    return random_experts(np.random.default_rng(seed), 3, 64, 192, group_size=group_size, **fields)


@pytest.mark.sampled(3)
@EVERY_FORMAT
def test_weights_can_be_pickled(weight_format):
    weights = random_experts(np.random.default_rng(0), 2, 64, 64, weight_format=weight_format).packed()
    for again in (pickle.loads(pickle.dumps(weights)), copy.deepcopy(weights)):
        assert_same_weights(again, weights)
        np.testing.assert_array_equal(jmm.dequantize(again), jmm.dequantize(weights))


@pytest.mark.parametrize("activation", ["silu", "relu2", jmm.swiglu(7.0, 1.702, 1.0), jmm.situ(4.0)])
def test_activations_can_be_pickled(activation):
    activation = get_activation(activation)
    again = pickle.loads(pickle.dumps(activation))
    assert again == activation
    gate, up = jnp.linspace(-9, 9, 7), jnp.linspace(9, -9, 7)
    np.testing.assert_array_equal(again.apply(gate, up), activation.apply(gate, up))


def test_extents_follow_from_the_leaves():
    weights = experts_with_everything().packed()
    assert (weights.num_experts, weights.k, weights.n) == (3, 64, 192)
    assert (weights.num_groups, weights.group_size) == (2, 32)
    assert weights.nbytes == 3 * (64 * 192 // 2 + 2 * 192 * 2 + 2 * 192 // 2 + 192 * 4)


def test_a_single_group_is_as_long_as_k():
    assert experts_with_everything(None).packed().group_size == 64


@GROUPS
def test_columns_are_those_of_the_matrix(group_size):
    experts = experts_with_everything(group_size)
    expected = dataclasses.replace(
        experts,
        codes=experts.codes[..., 64:192],
        scales=experts.scales[..., 64:192],
        zeros=experts.zeros[..., 64:192],
        bias=experts.bias[..., 64:192],
    )
    assert_same_weights(experts.packed().columns(64, 192), expected.packed())


def test_rows_are_those_of_the_matrix_without_bias():
    experts = experts_with_everything()
    expected = dataclasses.replace(
        experts, codes=experts.codes[:, 32:], scales=experts.scales[:, 1:], zeros=experts.zeros[:, 1:], bias=None
    )
    assert_same_weights(experts.packed().rows(32, 64), expected.packed())


def test_rows_of_a_single_group_may_be_cut_at_any_tile():
    experts = experts_with_everything(None)
    expected = dataclasses.replace(experts, codes=experts.codes[:, 16:32], bias=None)
    assert_same_weights(experts.packed().rows(16, 32), expected.packed())


def test_products_of_row_shards_add_up():
    weights = experts_with_everything(bias=False).packed()
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    whole = x @ np.asarray(jmm.dequantize(weights))
    first, second = (np.asarray(jmm.dequantize(weights.rows(*part))) for part in ((0, 32), (32, 64)))
    np.testing.assert_allclose(x[:, :32] @ first + x[:, 32:] @ second, whole, rtol=1e-4, atol=1e-5)


def test_expert_is_a_stack_of_one():
    experts = experts_with_everything(reordered=True)
    expected = jax.tree.map(lambda leaf: leaf[1:2], experts.packed())
    assert_same_weights(experts.packed().expert(1), expected)
    assert experts.packed().expert(1).num_experts == 1


@pytest.mark.parametrize("index", [-1, 3])
def test_an_expert_that_is_not_there_is_refused(index):
    with pytest.raises(IndexError, match=rf"index is {index}.*\[0, 3\)"):
        experts_with_everything().packed().expert(index)


def test_slices_that_are_no_integers_are_refused():
    packed = experts_with_everything().packed()
    for index in (1.0, "1", jnp.zeros(2, jnp.int32)):
        with pytest.raises(TypeError, match=r"index is .*; it must be an integer"):
            packed.expert(index)
    with pytest.raises(TypeError, match=r"columns \[0, 64\.0\) must be a range between two ints"):
        packed.columns(0, 64.0)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (128, 256), (64, 64), (-64, 64), (0, 193)])
def test_column_ranges_that_are_not_there_are_refused(start, stop):
    with pytest.raises(ValueError, match=rf"columns \[{start}, {stop}\) must be a non-empty range inside \[0, 192\)"):
        experts_with_everything().packed().columns(start, stop)


@pytest.mark.parametrize(
    ("start", "stop", "nearest"),
    [(0, 32, "32 are 0 and 64"), (32, 96, "32 are 0 and 64"), (64, 190, "190 are 128 and 192")],
)
def test_column_ranges_off_the_tile_are_refused(start, stop, nearest):
    with pytest.raises(ValueError, match=rf"columns .* multiples of 64; the nearest to {nearest}"):
        experts_with_everything().packed().columns(start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 96), (32, 32), (-32, 32), (64, 96)])
def test_row_ranges_that_are_not_there_are_refused(start, stop):
    with pytest.raises(ValueError, match=rf"rows \[{start}, {stop}\) must be a non-empty range inside \[0, 64\)"):
        experts_with_everything().packed().rows(start, stop)


@pytest.mark.parametrize(
    ("start", "stop", "nearest"),
    [(0, 16, "16 are 0 and 32"), (16, 48, "16 are 0 and 32"), (32, 63, "63 are 32 and 64")],
)
def test_row_ranges_off_the_groups_are_refused(start, stop, nearest):
    """A shard of which a group would straddle the end has no scale of its own there."""
    with pytest.raises(ValueError, match=rf"rows .* split a group .* multiples of 32; the nearest to {nearest}"):
        experts_with_everything().packed().rows(start, stop)


def test_a_shard_of_2880_rows_names_its_neighbours():
    """Two ranks of gpt-oss in groups of 128: 1440 is 11.25 groups."""
    weights = random_experts(np.random.default_rng(0), 1, 2880, 64, group_size=128).packed()
    with pytest.raises(ValueError, match="the nearest to 1440 are 1408 and 1536"):
        weights.rows(0, 1440)
    assert (weights.rows(0, 1408).k, weights.rows(1408, 2880).k) == (1408, 1472)


@pytest.mark.parametrize(("rows", "half", "below", "above"), [(1408, 704, 640, 768), (640, 320, 256, 384)])
def test_half_of_the_rows_needs_a_group_that_divides_it(rows, half, below, above):
    """Two ranks of 1408 (GLM-4.5-Air) and of 640 rows: not in groups of 128, but in groups of 64."""
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=rf"would split a group .* the nearest to {half} are {below} and {above}"):
        random_experts(rng, 1, rows, 64, group_size=128).packed().rows(half, rows)
    shard = random_experts(rng, 1, rows, 64, group_size=64).packed().rows(half, rows)
    assert (shard.k, shard.num_groups) == (half, half // 64)


def test_rows_of_reordered_weights_are_refused():
    """Their row order names columns of the whole x."""
    with pytest.raises(ValueError, match="input_order"):
        experts_with_everything(reordered=True).packed().rows(0, 32)


def test_columns_keep_the_row_order():
    weights = experts_with_everything(reordered=True).packed()
    np.testing.assert_array_equal(weights.columns(0, 64).input_order, weights.input_order)


def test_concatenated_columns_are_those_of_the_joined_matrix():
    gate, up = experts_with_everything(seed=1), experts_with_everything(seed=2)
    expected = dataclasses.replace(
        gate,
        **{
            name: np.concatenate([getattr(gate, name), getattr(up, name)], axis=-1)
            for name in ("codes", "scales", "zeros", "bias")
        },
    )
    joined = jmm.concatenate_columns([gate.packed(), up.packed()])
    assert_same_weights(joined, expected.packed())
    assert_same_weights(joined.columns(192, 384), up.packed())


def test_equal_row_orders_are_kept():
    gate = experts_with_everything(reordered=True)
    up = dataclasses.replace(experts_with_everything(seed=3), input_order=gate.input_order.copy())
    joined = jmm.concatenate_columns([gate.packed(), up.packed()])
    np.testing.assert_array_equal(joined.input_order, gate.input_order)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": "int4"}, r"parts\[1\]\.format"),
        ({"group_size": None}, r"parts\[1\]\.num_groups is 1"),
        ({"bias": False}, r"parts\[1\]\.bias"),
        ({"reordered": True}, r"parts\[1\]\.input_order must be given"),
        ({"scale_dtype": jnp.float16}, r"parts\[1\]\.scales has dtype float16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jmm.concatenate_columns([experts_with_everything().packed(), experts_with_everything(**changes).packed()])


def test_parts_in_different_row_orders_are_refused():
    parts = [experts_with_everything(seed=seed, reordered=True).packed() for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"parts\[1\]\.input_order differs"):
        jmm.concatenate_columns(parts)


def test_stacked_experts_are_their_stack():
    weights = experts_with_everything(reordered=True).packed()
    assert_same_weights(jmm.stack_experts([weights.expert(e) for e in range(3)]), weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_format": "int4"}, r"experts\[1\]\.format"),
        ({"group_size": None}, r"experts\[1\]\.num_groups is 1"),
        ({"bias": False}, r"experts\[1\]\.bias"),
        ({"reordered": True}, r"experts\[1\]\.input_order must be given"),
        ({"scale_dtype": jnp.float16}, r"experts\[1\]\.scales has dtype float16"),
    ],
)
def test_experts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jmm.stack_experts([experts_with_everything().packed(), experts_with_everything(**changes).packed()])


@pytest.mark.sampled(3)
@EVERY_FORMAT
def test_slices_and_joins_of_every_format(weight_format):
    """Columns, rows, joins and stacks are those of the logical matrix, global scales included."""
    rng = np.random.default_rng(4)
    size = FACTS[weight_format].group_sizes[-1]
    experts = random_experts(rng, 3, 2 * size + 16, 192, weight_format=weight_format, group_size=size, bias=True)
    weights, dense = experts.packed(), experts.dense()
    assert (weights.group_size, weights.num_groups) == (size, 3)
    # In one program: slices are one of their own for each leaf.
    columns, first, last, joined, stacked = jax.jit(
        lambda w: (
            w.columns(64, 192),
            w.rows(0, size),
            w.rows(size, 2 * size + 16),
            jmm.concatenate_columns([w.columns(0, 64), w.columns(64, 192)]),
            jmm.stack_experts([w.expert(e) for e in range(3)]),
        )
    )(weights)
    np.testing.assert_array_equal(oracle.dense(columns), dense[..., 64:192])
    np.testing.assert_array_equal(columns.bias, experts.bias[:, 64:192])
    np.testing.assert_array_equal(oracle.dense(first), dense[:, :size])
    np.testing.assert_array_equal(oracle.dense(last), dense[:, size:])
    assert_same_weights(joined, weights)
    assert_same_weights(stacked, weights)
    if experts.global_scales is not None:
        np.testing.assert_array_equal(columns.global_scales, experts.global_scales[:, 1:])


@pytest.mark.sampled(3)
@EVERY_FORMAT
def test_padded_matrices_join_and_stack(weight_format):
    rng = np.random.default_rng(5)
    size = FACTS[weight_format].group_sizes[-1]
    gate, up = (
        random_experts(rng, 2, size + 20, 36, weight_format=weight_format, group_size=size, bias=True) for _ in range(2)
    )
    joined = jmm.concatenate_columns([gate.packed(), up.packed()])
    assert (joined.k, joined.n, joined.padded_n, joined.column_padding) == (size + 20, 72, 128, (28, 28))
    dense = np.concatenate([part.dense() for part in (gate, up)], axis=-1)
    np.testing.assert_array_equal(oracle.dense(joined), dense)
    assert_same_weights(jmm.stack_experts([joined.expert(e) for e in range(2)]), joined)
    last = joined.rows(size, size + 20)
    assert (last.k, last.row_padding) == (20, 12)
    np.testing.assert_array_equal(oracle.dense(last), dense[:, size:])
    with pytest.raises(ValueError, match=r"column_padding is \(28, 28\).*slice before packing"):
        joined.columns(0, 64)


def test_padded_matrices_of_different_widths_are_refused():
    rng = np.random.default_rng(6)
    parts = [random_experts(rng, 2, 64, n).packed() for n in (36, 128)]
    with pytest.raises(ValueError, match=r"parts have \[36, 128\] columns; padded matrices must be equally wide"):
        jmm.concatenate_columns(parts)


def test_weights_pass_through_jit():
    weights = experts_with_everything(reordered=True).packed()
    passed = jax.jit(lambda w: jax.tree.map(lambda leaf: leaf + 0, w))(weights)
    assert_same_weights(passed, weights)
    assert (passed.format, passed.layout) == (jmm.FORMATS["int4_zp"], "a16")


def test_slicing_traces():
    weights = experts_with_everything().packed()
    sliced = jax.jit(lambda w: w.columns(64, 128).rows(0, 32).expert(2))(weights)
    assert_same_weights(sliced, weights.columns(64, 128).rows(0, 32).expert(2))


def test_format_is_part_of_the_structure():
    """Or a jitted function would use kernels of one format for another."""
    symmetric, asymmetric = experts_with_everything(weight_format="int4").packed(), experts_with_everything().packed()
    assert jax.tree.structure(symmetric) != jax.tree.structure(asymmetric)
    assert jax.tree.structure(symmetric) != jax.tree.structure(dataclasses.replace(symmetric, layout="a8"))


def test_the_group_size_is_a_fact_and_no_guess():
    """Two groups of K = 96 are 64 and 32 rows, or 80 and 16: the shapes are the same."""
    experts = random_experts(np.random.default_rng(0), 2, 96, 64, group_size=64)
    weights = experts.packed()
    other = dataclasses.replace(weights, group_size=80)
    assert weights.scales.shape == other.scales.shape
    assert jax.tree.structure(weights) != jax.tree.structure(other)
    np.testing.assert_allclose(jmm.dequantize(weights), experts.dense(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"weights\.group_size is 80, .*; the group size must be one of"):
        check_weights("weights", other)
    with pytest.raises(ValueError, match=r"has 2 groups over K = 96; weights\.group_size is 32, which makes 3"):
        check_weights("weights", dataclasses.replace(weights, group_size=32))
    with pytest.raises(TypeError, match=r"weights\.group_size is 64\.0; it must be an integer"):
        check_weights("weights", dataclasses.replace(weights, group_size=64.0))
    with pytest.raises(ValueError, match=r"group_size is None, and 2 groups over K = 95 do not determine it"):
        jmm.pack_logical(experts.codes[:, :95], experts.scales, "int4")
    with pytest.raises(ValueError, match="group_size is 48; format int4 takes"):
        jmm.pack_logical(experts.codes, experts.scales, "int4")
    with pytest.raises(ValueError, match="scales has 2 groups over K = 96; group_size 32 makes 3"):
        jmm.pack_logical(experts.codes, experts.scales, "int4", group_size=32)
    assert_same_weights(jmm.pack_logical(experts.codes, experts.scales, "int4", group_size=64), weights)
    narrow = dataclasses.replace(weights, group_size=128, scales=weights.scales[:, :1])
    with pytest.raises(ValueError, match=r"parts\[1\]\.group_size is 96; it must equal parts\[0\]\.group_size = 128"):
        jmm.concatenate_columns([narrow, dataclasses.replace(narrow, group_size=96)])
    assert (weights.rows(0, 64).group_size, weights.rows(64, 96).group_size) == (64, 32)


def test_leaves_are_named_in_paths():
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree.leaves_with_path(experts_with_everything(reordered=True).packed())
    ]
    assert paths == [".packed", ".scales", ".zeros", ".bias", ".input_order"]
