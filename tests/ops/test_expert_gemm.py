"""`expert_gemm` on every platform against float64 numpy: tables of dispatches, good and bad."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_product_close, products, random_experts, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler, plan_rows
from jax_marlin_moe.cuda.plan_rows import plan_expert_gemm
from jax_marlin_moe.cuda.scheme import KERNELS

ROWS, OUT_ROWS, EXPERTS, K, N = 40, 48, 4, 80, 100
MOST = 2**31 - 1
SAFE = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]

TABLES = {
    "in order": [(0, 0, 0, 10), (1, 10, 10, 5), (2, 15, 15, 17), (3, 32, 32, 8)],
    "out of order, with gaps": [(3, 30, 2, 10), (0, 1, 40, 8), (2, 7, 20, 1)],
    "the same expert again": [(1, 0, 0, 9), (1, 20, 9, 9), (1, 10, 30, 9), (1, 3, 39, 9)],
    "rows read again": [(0, 5, 0, 12), (1, 5, 12, 12), (2, 10, 24, 12), (0, 0, 36, 12)],
    "rows written again": [(0, 0, 0, 20), (1, 10, 10, 20), (2, 0, 15, 3), (0, 39, 47, 1)],
    "no rows": [(0, 0, 0, 0), (1, 5, 3, 0), (-1, MOST, -5, 0), (0, 2, 3, 4)],
    "one for all": [(2, 0, 8, 40)],
    "none": [],
    "of no expert": [(-1, 0, 0, 4), (4, 0, 8, 4), (MOST, 0, 16, 4), (1, 0, 2, 4)],
    "past x": [(0, 37, 0, 4), (0, -1, 8, 4), (1, 36, 16, 4), (2, MOST, 20, 2), (3, -MOST - 1, 22, 2)],
    "past the result": [(0, 0, 45, 4), (0, 0, -1, 4), (1, 0, 44, 4), (2, 0, MOST, 2), (3, 0, -MOST - 1, 2)],
    "too long": [(0, 0, 0, 41), (1, 1, 1, MOST), (2, 2, 2, -1), (3, 3, 3, -MOST - 1), (0, 0, 0, 40)],
}


def table_of(dispatches):
    """As long as the longest, so that all are one program."""
    return np.asarray([*dispatches, *[(0, 0, 0, 0)] * (5 - len(dispatches))], np.int32).reshape(-1, 4)


def expected(x, experts, table, out_rows=OUT_ROWS):
    served, sources, skipped = np.full(out_rows, -1), np.zeros(out_rows, int), 0
    for e, i, o, m in np.asarray(table).tolist():
        if 0 <= e < experts.num_experts and m >= 0 and 0 <= i <= i + m <= len(x) and 0 <= o <= o + m <= out_rows:
            served[o : o + m], sources[o : o + m] = e, range(i, i + m)
        else:
            skipped += m != 0
    return products(x[sources], experts, served), skipped, served


@functools.cache
def arrays(dtype="bfloat16", **options):
    rng = np.random.default_rng(3)
    experts = random_experts(rng, EXPERTS, K, N, group_size=16, bias=True, **options)
    return random_rows(rng, ROWS, K, jnp.dtype(dtype)), experts


@functools.cache
def compiled(implementation):
    return jax.jit(functools.partial(jmm.expert_gemm, num_out_rows=OUT_ROWS, implementation=implementation))


@pytest.mark.parametrize("table", TABLES)
def test_dispatches(platform, table):
    x, experts = arrays()
    table = table_of(TABLES[table])
    y, skipped = compiled(platform)(x, experts.packed(), table)
    values, misfits, served = expected(x, experts, table)
    assert (y.dtype, skipped.dtype, skipped) == (jnp.bfloat16, jnp.int32, misfits)
    assert_product_close(y, values)
    assert not np.asarray(y)[served < 0].any()


EXTENTS = st.sampled_from([-1, 0, 1, 7, 25, 33, 40, 47, 48, MOST])


@given(st.lists(st.tuples(st.integers(-1, 4), EXTENTS, EXTENTS, EXTENTS), max_size=5))
def test_any_table_is_what_the_reference_says(dispatches):
    x, experts = arrays()
    table = table_of(dispatches)
    ours, theirs = (compiled(implementation)(x, experts.packed(), table) for implementation in ("cpu", "xla"))
    assert ours[1] == theirs[1] == expected(x, experts, table)[1]
    ours, theirs = (np.asarray(y, np.float32) for y, _ in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(ours.any(axis=1), theirs.any(axis=1))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("table", ["rows written again", "past x"])
def test_rows_in_orders_of_their_own(implementation, table):
    x, experts = arrays("float16", reordered=True)
    table = table_of(TABLES[table])
    y, skipped = compiled(implementation)(x, experts.packed(), table)
    values, misfits, _ = expected(x, experts, table)
    assert skipped == misfits
    assert_product_close(y, values)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_extents_may_be_nothing(implementation):
    x, experts = arrays()
    weights, table = experts.packed(), table_of(TABLES["in order"])
    y, skipped = jmm.expert_gemm(x, weights, table[:0], implementation=implementation)
    assert (y.shape, int(skipped), np.asarray(y).any()) == ((ROWS, N), 0, False)
    y, skipped = jmm.expert_gemm(x, weights, table, num_out_rows=0, implementation=implementation)
    assert (y.shape, int(skipped)) == ((0, N), 4)
    y, skipped = jmm.expert_gemm(x[:0], weights, table, num_out_rows=6, implementation=implementation)
    assert (y.shape, int(skipped), np.asarray(y).any()) == ((6, N), 4, False)


@pytest.mark.parametrize("in_axes", [(0, None, 0), (None, None, 0), (0, None, None), (None, 0, None)], ids=str)
def test_a_batch_is_its_elements(in_axes):
    """A dispatch that leaves its element's rows is out of range, though the next element's rows follow."""
    x, experts = arrays()
    table = table_of(TABLES["past x"])
    one = (x, experts.packed(), table)
    other = (-x, jax.tree.map(lambda leaf: leaf[::-1], experts.packed()), table_of(TABLES["rows written again"]))

    def both(axis, a, b):
        return a if axis is None else jax.tree.map(lambda *leaves: np.stack(leaves), a, b)

    elements = [[a, b if axis == 0 else a] for axis, a, b in zip(in_axes, one, other, strict=True)]
    call = functools.partial(jmm.expert_gemm, num_out_rows=OUT_ROWS)
    found = jax.jit(jax.vmap(call, in_axes))(*map(both, in_axes, one, other))
    for number in (0, 1):
        alone = compiled(None)(*(pair[number] for pair in elements))
        np.testing.assert_array_equal(found[0][number], alone[0])
        assert found[1][number] == alone[1]


def test_a_table_and_rows_are_arguments_of_an_exported_function():
    x, experts = arrays()
    (t,) = jax.export.symbolic_shape("t")
    function = jax.export.export(jax.jit(jmm.expert_gemm), disabled_checks=SAFE)
    blob = function(
        jax.ShapeDtypeStruct((t, K), jnp.bfloat16),
        jax.tree.map(jax.typeof, experts.packed()),
        jax.ShapeDtypeStruct((5, 4), jnp.int32),
    ).serialize()
    table = table_of(TABLES["in order"])
    ours = jax.export.deserialize(blob).call(x, experts.packed(), table)
    np.testing.assert_array_equal(ours[0], jmm.expert_gemm(x, experts.packed(), table)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((4, K), np.int8)}, TypeError, "x has dtype int8; it must be bfloat16, float16 or float32"),
        ({"x": jnp.zeros((4, 64), jnp.bfloat16)}, ValueError, r"x has shape \(4, 64\); it must be \(rows, K\)"),
        ({"stack": jnp.zeros((4, 64))}, TypeError, "stack has type .*; it must be a MarlinWeights"),
        ({"dispatches": np.zeros((2, 4), np.int64)}, TypeError, "dispatches has dtype int64; it must be an int32"),
        ({"dispatches": [(0, 0, 0, 1)]}, TypeError, "dispatches has dtype list"),
        ({"dispatches": np.zeros((4,), np.int32)}, ValueError, r"dispatches has shape \(4,\); it must have 2 dim"),
        ({"dispatches": np.zeros((2, 3), np.int32)}, ValueError, r"dispatches has shape \(2, 3\); .*\(dispatches, 4\)"),
        ({"num_out_rows": -1}, ValueError, "num_out_rows is -1; it must be an int of at least 0"),
        ({"num_out_rows": True}, ValueError, "num_out_rows is True"),
        ({"num_out_rows": 2.0}, ValueError, r"num_out_rows is 2\.0"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    x, experts = arrays()
    good = {"x": x, "stack": experts.packed(), "dispatches": np.zeros((2, 4), np.int32)}
    with pytest.raises(error, match=message):
        jmm.expert_gemm(**(good | change))


def tile_of_kernel(name):
    """A choice of tiles that takes one kernel's first with at least 16 rows."""

    def choose(shape, num_rows, parts, capability):
        kernel = KERNELS[name]
        return next(tile for rows in (16, 32, 64) for tile in kernel.candidates(shape, rows, capability))

    return choose


@needs_nvrtc
@pytest.mark.parametrize(("architecture", "kernel"), [("sm_75", "mma"), ("sm_90a", "mma"), ("sm_90a", "wgmma")])
def test_the_kernels_compile(monkeypatch, architecture, kernel):
    monkeypatch.setattr(plan_rows, "choose_rows_tile", tile_of_kernel(kernel))
    weights = jax.eval_shape(
        lambda dense: jmm.quantize(dense, "int4", group_size=64), jax.ShapeDtypeStruct((7, 256, 192), jnp.float16)
    )
    x = jax.ShapeDtypeStruct((50, 256), jnp.float16)
    planned = plan_expert_gemm(x, weights, num_dispatches=37, num_out_rows=90, architecture=architecture)
    assert [kernel.name.split("_")[1] for kernel in planned.kernels] == ["dispatches", "expert"]
    assert [scratch.shape for scratch in planned.scratch] == [(37,), (90,)]
    assert compiler.compile_cubin(planned.source, architecture)


def test_tiles_are_as_long_as_dispatches_may_be():
    """Few rows in each: short tiles; all rows in one: long ones."""
    weights = jax.eval_shape(
        lambda dense: jmm.quantize(dense, "int4", group_size=128), jax.ShapeDtypeStruct((64, 2048, 768), jnp.bfloat16)
    )
    x = jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16)
    rows = [
        plan_expert_gemm(x, weights, num_dispatches=count, num_out_rows=4096, architecture="sm_90a")
        .kernels[1]
        .structs["Tile"]["tokens"]
        for count in (1024, 64, 4)
    ]
    assert rows == sorted(rows)
    assert rows[0] <= 16
    assert rows[-1] >= 64


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["mma", "wgmma", None])
@pytest.mark.parametrize(("dispatches", "longest"), [(9, 300), (200, 20), (1500, 3)])
def test_large_tables_on_the_card(monkeypatch, kernel, dispatches, longest):
    """Token tiles of several dispatches, long and short ones, some out of range, some over others."""
    if kernel:
        monkeypatch.setattr(plan_rows, "choose_rows_tile", tile_of_kernel(kernel))
    rng = np.random.default_rng(dispatches)
    experts, rows, out_rows = random_experts(rng, 8, 256, 192, group_size=128), 1000, 1500
    x = random_rows(rng, rows, 256, jnp.bfloat16)
    table = np.stack([rng.integers(0, high, dispatches) for high in (8, rows, out_rows, longest)], 1).astype(np.int32)
    table[-2:] = (8, 0, 0, 9), (0, rows - 1, 0, 2)
    with jax.default_device(jax.devices("cuda")[0]):
        run = jax.jit(functools.partial(jmm.expert_gemm, num_out_rows=out_rows, implementation="cuda"))
        y, skipped = run(x, experts.packed(), table)
        again, _ = run(x, experts.packed(), table)
    values, misfits, served = expected(x, experts, table, out_rows)
    assert skipped == misfits >= 2
    assert 0 < (served < 0).sum() < out_rows
    assert_product_close(y, values)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(again).view(np.uint16))
