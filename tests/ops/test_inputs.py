"""What ops take beside 16-bit rows in two dimensions, alike for all of them, and results that are not rounded."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_marlin_moe as jmm

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 64, 64, 6, 2
ROUTING = jmm.Routing(TOP_K)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def packed(seed, k, n, **options):
    rng = np.random.default_rng(seed)
    return oracle.random_experts(rng, EXPERTS, k, n, group_size=64, bias=True, **options).packed()


GATE_UP, DOWN = packed(0, HIDDEN, 2 * INNER), packed(1, INNER, HIDDEN)
REORDERED = packed(2, HIDDEN, 2 * INNER, reordered=True)
ROUTER = normal(3, HIDDEN, EXPERTS) / 8
WEIGHTS, IDS = jmm.route(normal(4, TOKENS, EXPERTS), top_k=TOP_K)
IDS = IDS.at[1, 0].set(-1)
ALIGNMENT = jmm.moe_align_block_size(IDS, block_size=8, num_experts=EXPERTS)
SIZES = jnp.asarray([2, 0, 3, 0], jnp.int32)
TABLE = jnp.asarray([[1, 0, 1, 3], [7, 0, 0, 1], [3, 2, 4, 2]], jnp.int32)
X = normal(5, TOKENS, HIDDEN)

OPS = {
    "fused_moe": lambda x, **o: jmm.fused_moe(x, GATE_UP, DOWN, WEIGHTS, IDS, **o),
    "moe_gemm": lambda x, **o: jmm.moe_gemm(x, GATE_UP, ALIGNMENT, top_k=TOP_K, **o),
    "moe_gemm, weighted, rows in orders": lambda x, **o: jmm.moe_gemm(
        x, REORDERED, ALIGNMENT, top_k=TOP_K, topk_weights=WEIGHTS, mul_topk_weights=True, **o
    ),
    "ragged_dot": lambda x, **o: jmm.ragged_dot(x, GATE_UP, SIZES, **o),
    "expert_gemm": lambda x, **o: jmm.expert_gemm(x, GATE_UP, TABLE, num_out_rows=7, **o)[0],
    "expert_gemm, rows in orders": lambda x, **o: jmm.expert_gemm(x, REORDERED, TABLE, **o)[0],
    "linear": lambda x, **o: jmm.linear(x, GATE_UP, expert=2, **o),
    "linear, rows in orders": lambda x, **o: jmm.linear(x, REORDERED, expert=jnp.int32(9), **o),
    "moe_layer": lambda x, **o: jmm.moe_layer(x, ROUTER, GATE_UP, DOWN, routing=ROUTING, topk_ids=abs(IDS), **o),
}
all_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def assert_close(actual, wanted, limit):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(wanted) > 0
    assert np.linalg.norm(actual - wanted) <= limit * np.linalg.norm(wanted)


@pytest.mark.sampled(2)
@all_ops
def test_float32_rows_are_multiplied_as_bfloat16_and_results_not_rounded(op):

    @jax.jit
    def all_of_them(x):
        narrow = x.astype(jnp.bfloat16)
        exact = {"preferred_element_type": jnp.float32}
        return op(x), op(narrow, **exact), op(narrow, **exact, implementation="xla"), op(narrow)

    of_float32, exact, reference, rounded = all_of_them(X)
    assert of_float32.dtype == exact.dtype == jnp.float32
    assert rounded.dtype == jnp.bfloat16
    assert_close(exact, reference, 2e-3)  # of intermediates that round the other way
    assert_close(rounded, exact, 2**-8)
    assert np.any(np.asarray(exact.astype(jnp.bfloat16), np.float32) != np.asarray(exact))
    assert_close(of_float32, exact, 1e-2)  # the router of a layer reads all bits of float32 rows
    narrowed = jax.eval_shape(lambda x: op(x, preferred_element_type=jnp.bfloat16), X)
    assert narrowed.dtype == jnp.bfloat16


@all_ops
def test_types_that_results_cannot_have_are_refused(op):
    with pytest.raises(TypeError, match=r"preferred_element_type is float16; for (x|lhs) of dtype bfloat16"):
        op(X.astype(jnp.bfloat16), preferred_element_type=jnp.float16)
    with pytest.raises(TypeError, match=r"(x|lhs) has dtype int32; it must be bfloat16, float16 or float32"):
        op(X.astype(jnp.int32))


@all_ops
def test_weak_types_are_those_of_arrays(op):
    weak = jnp.broadcast_to(jnp.asarray(0.5), X.shape)
    assert weak.weak_type
    y = jax.eval_shape(op, weak)
    assert (y.dtype, y.weak_type) == (jnp.float32, False)


@all_ops
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_empty_batch_has_the_shape_of_a_batch(op, dtype):
    rows = jnp.zeros((0, *X.shape), dtype)
    y, one = jax.eval_shape(jax.vmap(op), rows), jax.eval_shape(op, X.astype(dtype))
    assert (y.shape, y.dtype) == ((0, *one.shape), one.dtype)


NO_ROWS = {
    "moe_layer, weights on the input": lambda x, **o: jmm.moe_layer(
        x, ROUTER, GATE_UP, DOWN, routing=jmm.Routing(1, apply_on_input=True), **o
    ),
    "moe_layer, groups": lambda x, **o: jmm.moe_layer(
        x, ROUTER, GATE_UP, DOWN, routing=jmm.Routing(1, num_groups=2), **o
    ),
    "fused_moe, bytes": lambda x, **o: jmm.fused_moe(
        x, GATE_UP, DOWN, WEIGHTS[:0], IDS[:0], activation_dtype="int8", **o
    ),
    "derivative": lambda x, **o: jax.jvp(
        lambda x: jmm.fused_moe(x, GATE_UP, DOWN, WEIGHTS[:0], IDS[:0], **o), (x,), (x,)
    )[1],
}


@pytest.mark.parametrize("op", NO_ROWS.values(), ids=NO_ROWS)
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_no_rows_have_a_result(op, implementation):
    assert jax.jit(lambda x: op(x, implementation=implementation))(X[:0]).shape == (0, HIDDEN)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "op", ["moe_gemm, weighted, rows in orders", "expert_gemm", "linear, rows in orders", "moe_layer"]
)
def test_gradients_of_float32_rows_are_those_of_the_reference(op):
    op = OPS[op]
    probe = normal(6, *jax.eval_shape(op, X).shape)

    def loss(x, implementation):
        return (op(x, implementation=implementation) * probe).sum()

    ours, theirs = jax.jit(lambda x: [jax.grad(loss)(x, implementation) for implementation in (None, "xla")])(X)
    assert ours.dtype == jnp.float32
    assert_close(ours, theirs, 2e-2)


def test_leading_dimensions_are_rows():
    x = X.astype(jnp.bfloat16)
    batch = x.reshape(2, 1, 3, HIDDEN)
    alignment = jmm.moe_align_block_size(IDS.reshape(2, 1, 3, TOP_K), block_size=8, num_experts=EXPERTS)
    jax.tree.map(np.testing.assert_array_equal, alignment, ALIGNMENT)
    y = jmm.moe_gemm(batch, GATE_UP, alignment, top_k=TOP_K)
    assert y.shape == (2, 1, 3 * TOP_K, 2 * INNER)
    np.testing.assert_array_equal(y.reshape(-1, 2 * INNER), OPS["moe_gemm"](x))
    options = {"routing": ROUTING, "return_routing": True}
    ids = abs(IDS)
    outer = {"router_input": X.reshape(2, 3, HIDDEN), "topk_ids": ids.reshape(2, 3, TOP_K)}
    wanted = jmm.moe_layer(x, ROUTER, GATE_UP, DOWN, router_input=X, topk_ids=ids, **options)
    found = jmm.moe_layer(x.reshape(2, 3, HIDDEN), ROUTER, GATE_UP, DOWN, **outer, **options)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape[:2] == (2, 3)
        np.testing.assert_array_equal(ours.reshape(theirs.shape), theirs)
    with pytest.raises(ValueError, match=r"topk_ids has shape \(6, 2\); x has shape \(2, 3, 64\)"):
        jmm.moe_layer(x.reshape(2, 3, HIDDEN), ROUTER, GATE_UP, DOWN, routing=ROUTING, topk_ids=ids)


def test_leading_dimensions_have_sizes_and_tables_of_their_own():
    x = np.stack([X, -X])[None]
    sizes, tables = (np.stack([t, t[::-1]])[None] for t in map(np.asarray, (SIZES, TABLE)))
    calls = {
        "group_sizes": (lambda x, table: jmm.ragged_dot(x, GATE_UP, table), sizes),
        "dispatches": (lambda x, table: jmm.expert_gemm(x, GATE_UP, table, num_out_rows=7)[0], tables),
    }
    for name, (call, table) in calls.items():
        y = np.asarray(call(x, table))
        assert y.shape[:2] == (1, 2)
        for i in range(2):
            np.testing.assert_array_equal(y[0, i], call(x[0, i], table[0, i]))
        assert call(x[:, :0], table[:, :0]).shape == (1, 0, *y.shape[2:])
        moved = jax.jit(jax.grad(lambda x, call=call, table=table: (call(x, table) ** 2).sum()))(x)
        assert moved.shape == x.shape
        with pytest.raises(ValueError, match=rf"{name} has shape .* leading dimensions must be alike"):
            call(x, table[:, :1])
        with pytest.raises(ValueError, match=rf"{name} has shape .* it must have {table.ndim} dimensions"):
            call(x, table[0])
    _, skipped = jmm.expert_gemm(x, GATE_UP, tables)
    assert skipped.shape == (1, 2)


@pytest.mark.parametrize("kind", ["shared", "on the input", "identity"])
def test_whole_layers_are_not_rounded_where_results_are_float32(kind):
    routing = jmm.Routing(
        TOP_K,
        "sigmoid",
        renormalize=False,
        apply_on_input=kind == "on the input",
        identity_experts=int(kind == "identity"),
    )
    shared = jmm.SharedExpert(GATE_UP.expert(1), DOWN.expert(1), normal(8, HIDDEN, 1)) if kind == "shared" else None
    router = ROUTER if kind != "identity" else normal(7, HIDDEN, EXPERTS + 1)
    x = X.astype(jnp.bfloat16)

    def layer(x, **options):
        return jmm.moe_layer(x, router, GATE_UP, DOWN, routing=routing, shared=shared, **options)

    y = layer(x, preferred_element_type=jnp.float32)
    assert_close(y, layer(x, preferred_element_type=jnp.float32, implementation="xla"), 2e-3)
    assert_close(layer(x), y, 2**-8)


def qarray(dtype="int8", **changes):
    values = np.random.default_rng(9).integers(-8, 8, (EXPERTS, HIDDEN, INNER))
    parts = {"qvalue": jnp.asarray(values, dtype), "scale": jnp.full((EXPERTS, 1, INNER), 0.1), "zero_point": None}
    return types.SimpleNamespace(**(parts | changes))


def test_arrays_of_qwix_are_packed_on_the_way():
    array = qarray()
    y = jmm.ragged_dot(X, array, SIZES)
    np.testing.assert_array_equal(y, jmm.ragged_dot(X, jmm.from_qarray(array), SIZES))
    dense = array.qvalue * array.scale
    wanted = jax.lax.ragged_dot(X.astype(jnp.bfloat16).astype(jnp.float32), dense, SIZES)
    assert_close(y, wanted, 1e-5)
    traced = jax.jit(lambda values: jmm.ragged_dot(X, qarray(qvalue=values), SIZES))(array.qvalue)
    np.testing.assert_array_equal(traced, y)


def test_arrays_of_qwix_that_no_format_holds_are_refused():
    with pytest.raises(TypeError, match="rhs is a QArray that no format holds: qvalue has dtype int16"):
        jmm.ragged_dot(X, qarray("int16"), SIZES)
    with pytest.raises(ValueError, match="rhs is a QArray that no format holds: scale has shape"):
        jmm.ragged_dot(X, qarray(scale=jnp.ones((EXPERTS, 1, 2))), SIZES)
    points = jnp.zeros((EXPERTS, 1, INNER), jnp.int8)
    with pytest.raises(TypeError, match=r"rhs is a QArray that is traced.*pack it before"):
        jax.jit(lambda points: jmm.ragged_dot(X, qarray(zero_point=points), SIZES))(points)
