"""Experts over devices: what `four_devices.py` finds in a process with four of them, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from other_process import cases_of, checked_by

import jax_marlin_moe as jmm
from jax_marlin_moe.sharding import partition_specs, tensor_parallel

OPS = ("parallel_experts", "shuffled_experts", "varying_ids", "batches", "explicit_tokens")
MATRICES = ("int4", "int4 in one group", "int4_zp", "int8_fzp", "nvfp4", "mxfp4", "mxfp8", "fp8", "relu2")
CHECKS = [
    "partitioned op",
    "sharded tokens",
    "sharded derivatives",
    "uneven tokens",
    "sharded tokens in scan",
    "sharded layer",
]
CHECKS += [f"{op} {implementation}" for op in OPS for implementation in ("cpu", "xla")]
CHECKS += ["gradients"]
CHECKS += [f"tensors {name}" for name in MATRICES]

# Formats whose leaves are cut as those of others, and ops that divide by the same rule whatever computes them.
ALIKE = [f"tensors {name}" for name in ("int8_fzp", "mxfp4", "mxfp8", "fp8")]
ALIKE += [f"{op} xla" for op in OPS if op != "varying_ids"]


@pytest.fixture(scope="module")
def found(request):
    return checked_by("four_devices.py", request, CHECKS)


@pytest.mark.parametrize("check", cases_of(CHECKS, ALIKE))
def test_four_devices_agree_with_one(found, check):
    assert found[check] is None, found[check]


def matrix(k, n, experts=2, **options):
    return jax.eval_shape(lambda: jmm.quantize(jnp.ones((experts, k, n)), "int4", **options))


def test_every_leaf_has_a_spec():
    weights = matrix(128, 64, group_size=64, bias=jnp.ones((2, 64)))
    assert partition_specs(weights, "experts", "d").packed == P("d")
    columns = partition_specs(weights, "columns", "d", one_matrix=True)
    rows = partition_specs(weights, "rows", "d")
    assert (columns.packed, columns.scales, columns.bias) == (P(None, None, "d"), P(None, None, "d"), P(None, "d"))
    assert (rows.packed, rows.scales, rows.bias, rows.zeros) == (P(None, "d"), P(None, "d"), P(None, "d"), None)
    assert partition_specs(matrix(128, 64, group_size=None), "rows", "d").scales == P()


@pytest.mark.parametrize(
    ("inner", "group_size", "ranks", "message"),
    [
        (192, 64, 2, r"K = 192 rows; 2 ranks need a multiple of 128, .* the nearest are 128 and 256; .* 1 or 3 ranks"),
        (256, 128, 4, r"multiple of 512, .* whole groups of 128 rows of down: the nearest are 512; .* 1 or 2 ranks"),
        (64, None, 2, r"multiple of 128, .* the nearest are 128; 64 falls into shares for 1 ranks"),
    ],
)
def test_sizes_that_do_not_fall_into_shares_are_refused(inner, group_size, ranks, message):
    with pytest.raises(ValueError, match=message):
        tensor_parallel(matrix(64, 2 * inner, group_size=None), matrix(inner, 64, group_size=group_size), ranks)


@pytest.mark.parametrize(
    ("over", "ranks", "message"),
    [
        (
            "experts",
            4,
            r"E = 6 experts; 4 ranks need a multiple of 4, .* nearest are 4 and 8; 6 falls .* 1 or 2 or 3 or 6",
        ),
        ("columns", 2, r"N = 192 columns; 2 ranks need a multiple of 128, .* nearest are 128 and 256; .* 1 or 3 ranks"),
        (
            "rows",
            8,
            r"K = 256 rows; 8 ranks need a multiple of 512, .*groups of 64 rows: the nearest are 512; .* 1 or 2",
        ),
        ("rows", 0, r"ranks is 0; it must be at least 1"),
    ],
)
def test_specs_for_ranks_that_do_not_divide_are_refused(over, ranks, message):
    weights = matrix(256, 192, experts=6, group_size=64)
    with pytest.raises(ValueError, match=message):
        partition_specs(weights, over, "d", ranks=ranks, one_matrix=True)
    one = {"one_matrix": True}
    assert partition_specs(weights, over, "d", ranks=1, **one) == partition_specs(weights, over, "d", **one)


def test_rows_of_one_group_fall_into_shares_of_tiles():
    partition_specs(matrix(64, 64, group_size=None), "rows", "d", ranks=4)


def test_padded_matrices_are_not_cut_through_their_padding():
    gate_up, down = matrix(100, 200, group_size=None), matrix(100, 100, group_size=None)
    with pytest.raises(ValueError, match=r"column_padding \(56,\), .* append zeros to the intermediate dimension"):
        partition_specs(gate_up, "columns", "d", one_matrix=True)
    with pytest.raises(ValueError, match=r"row_padding 12, so shares of its rows .* append zeros"):
        partition_specs(down, "rows", "d")
    with pytest.raises(ValueError, match=r"down has K = 100 rows; 4 ranks .*: the nearest are 256; .* append zeros"):
        tensor_parallel(gate_up, down, 4)
    assert partition_specs(gate_up, "experts", "d", ranks=2).column_padding == (56,)


def test_arguments_of_sharding_are_checked():
    gate_up, down = matrix(64, 128, group_size=None), matrix(64, 64, group_size=None)
    with pytest.raises(ValueError, match="over is 'tokens'; it must be 'experts', 'columns' or 'rows'"):
        partition_specs(gate_up, "tokens", "d")
    with pytest.raises(ValueError, match="ranks is 0; it must be at least 1"):
        tensor_parallel(gate_up, down, 0)
    with pytest.raises(ValueError, match=r"gate_up has N = 128 columns and down K = 64 rows; activation 'relu2'"):
        tensor_parallel(gate_up, down, 1, activation="relu2")
    with pytest.raises(TypeError, match="down has type int; it must be a MarlinWeights"):
        tensor_parallel(gate_up, 3, 1)
