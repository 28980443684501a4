"""Derivatives of the ops, forward and reverse: against the reference's own and against differences in float64."""

import dataclasses
from functools import partial

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads

import jax_marlin_moe as jmm

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 5, 128, 64, 7, 3
LIMITS = {"float16": 4e-3, "bfloat16": 2e-2}


def block(weight_format="int4", dtype="bfloat16", *, gated=True, kind="holes", **options):
    """x, gate_up, down, router weights, ids, as the oracle has them; biases, and slots without an expert."""
    rng = np.random.default_rng(7)
    options = {"weight_format": weight_format, "scale_dtype": jnp.bfloat16, "bias": True} | options
    options.setdefault("group_size", 64 if 64 in oracle.FACTS[weight_format].group_sizes else None)
    if not oracle.FACTS[weight_format].per_channel:
        options["group_size"] = oracle.FACTS[weight_format].group_sizes[-1]
    gate_up = oracle.random_experts(rng, EXPERTS, HIDDEN, (2 if gated else 1) * INNER, **options)
    down = oracle.random_experts(rng, EXPERTS, INNER, HIDDEN, **(options | {"reordered": False}))
    x = oracle.random_rows(rng, TOKENS, HIDDEN, jnp.dtype(dtype))
    return x, gate_up, down, *oracle.random_routing(rng, TOKENS, TOP_K, EXPERTS, kind)


def trainable(gate_up, down):
    """What of two packed matrices has derivatives."""
    parts = (gate_up.bias, down.bias, gate_up.global_scales, down.global_scales)
    return tuple(part for part in parts if part is not None)


def replaced(gate_up, down, parts):
    """The matrices with these parts."""
    names = ("bias", "global_scales")[: len(parts) // 2]
    return [
        dataclasses.replace(matrix, **dict(zip(names, parts[i::2], strict=True)))
        for i, matrix in enumerate((gate_up, down))
    ]


PROBE = np.random.default_rng(1).normal(size=(TOKENS, HIDDEN)).astype(np.float32)


def block_loss(x, weights, parts, gate_up, down, ids, **options):
    y = jmm.fused_moe(x, *replaced(gate_up, down, parts), weights, ids, **options)
    return (y.astype(jnp.float32) * PROBE).sum()


def assert_close(actual, expected, dtype="bfloat16", factor=1.0):
    """Leaf by leaf, relative to the norm of the leaf."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for place, (a, b) in enumerate(pairs):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) <= factor * LIMITS[dtype] * np.linalg.norm(b), place


CASES = [
    ("int4", "bfloat16", "silu", {}),
    ("int4_zp", "float16", "gelu_tanh", {}),
    ("int4_fzp", "bfloat16", jmm.swiglu(7, 1.702, 1), {}),
    ("int8", "float16", "relu2", {}),
    ("int8_zp", "bfloat16", "silu", {"group_size": None}),
    ("int8_fzp", "float16", "silu", {}),
    ("fp8", "bfloat16", "silu", {"group_size": None, "scale_dtype": jnp.float32}),
    ("nvfp4", "bfloat16", "silu", {"bias": True}),
    ("nvfp4", "float16", "relu2", {}),
    ("mxfp4", "bfloat16", jmm.swiglu(7, 1.702, 1), {}),
    ("mxfp8", "float16", "silu", {}),
    ("int4", "bfloat16", "silu", {"reordered": True, "kind": "duplicates"}),
]


@pytest.mark.parametrize(("weight_format", "dtype", "activation", "options"), CASES)
def test_gradients_of_the_block_are_those_of_differences_in_float64(weight_format, dtype, activation, options):
    x, gate_up, down, weights, ids = block(weight_format, dtype, gated=activation != "relu2", **options)
    packed = gate_up.packed(), down.packed()
    moving = (jax.device_put(x), jax.device_put(weights), trainable(*packed))
    loss = partial(block_loss, activation=activation, ids=ids, gate_up=packed[0], down=packed[1])
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*moving)
    parameters = activation.parameters if isinstance(activation, jmm.Activation) else ()
    name = activation.name if parameters else activation

    def oracle_loss(x, weights, parts):
        names = ("bias", "global_scales")[: len(parts) // 2]
        matrices = [
            dataclasses.replace(matrix, **dict(zip(names, parts[i::2], strict=True)))
            for i, matrix in enumerate((gate_up, down))
        ]
        y = oracle.expert_block(x, *matrices, weights, ids, activation=name, parameters=parameters)
        return (y * PROBE).sum()

    leaves, structure = jax.tree.flatten(jax.tree.map(np.float64, moving))
    for place, gradient in enumerate(map(np.float64, jax.tree.leaves(gradients))):
        norm = np.linalg.norm(gradient)
        assert norm > 0
        noise = np.random.default_rng(place).normal(size=gradient.shape)
        for direction in (gradient / norm, noise / np.linalg.norm(noise)):
            up, down_ = (
                oracle_loss(*structure.unflatten([*leaves[:place], leaf, *leaves[place + 1 :]]))
                for leaf in (leaves[place] + 1e-6 * direction, leaves[place] - 1e-6 * direction)
            )
            slope = (gradient * direction).sum()
            assert abs((up - down_) / 2e-6 - slope) <= LIMITS[dtype] * norm, (place, slope)


def test_both_modes_are_those_of_the_reference():
    x, gate_up, down, weights, ids = silu_block("nvfp4")
    loss = partial(block_loss, ids=ids, gate_up=gate_up, down=down)
    moving = (x, weights, trainable(gate_up, down))
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*moving)
    expected = jax.jit(jax.grad(partial(loss, implementation="xla"), (0, 1, 2)))(*moving)
    assert_close(gradients, expected)
    unit = jax.tree.map(lambda leaf: np.asarray(leaf) / np.linalg.norm(np.float64(leaf)).astype(leaf.dtype), expected)
    _, dot = jax.jit(partial(jax.jvp, loss))(moving, unit)
    slope = sum(
        np.sum(np.float64(a) * np.float64(b)) for a, b in zip(*map(jax.tree.leaves, (unit, expected)), strict=True)
    )
    np.testing.assert_allclose(dot, slope, rtol=1e-2)


@pytest.mark.parametrize(("weight_format", "reordered"), [("nvfp4", False), ("int4_zp", True)])
def test_gradients_of_a_product_are_those_of_the_reference(weight_format, reordered):
    x, experts, _, router, ids = block(weight_format, reordered=reordered)
    matrix = experts.packed()
    alignment = jmm.moe_align_block_size(jax.device_put(ids), block_size=8, num_experts=EXPERTS)
    names = [name for name in ("bias", "global_scales") if getattr(matrix, name) is not None]

    def loss(x, router, parts, implementation=None):
        y = jmm.moe_gemm(
            x,
            dataclasses.replace(matrix, **dict(zip(names, parts, strict=True))),
            alignment,
            top_k=TOP_K,
            topk_weights=router,
            mul_topk_weights=True,
            implementation=implementation,
        )
        return jnp.sin(y.astype(jnp.float32)).sum()

    moving = (jax.device_put(x), jax.device_put(router), [getattr(matrix, name) for name in names])
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*moving)
    expected = jax.jit(jax.grad(partial(loss, implementation="xla"), (0, 1, 2)))(*moving)
    assert_close(gradients, expected)
    _, dot = jax.jit(partial(jax.jvp, loss))(moving, expected)
    squared = sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(expected))
    np.testing.assert_allclose(dot, squared, rtol=1e-2)


def silu_block(weight_format="int4"):
    x, gate_up, down, weights, ids = block(weight_format)
    return jax.device_put(x), gate_up.packed(), down.packed(), jax.device_put(weights), jax.device_put(ids)


def test_both_modes_agree_with_numerical_differences():
    x, gate_up, down, weights, ids = silu_block()

    def of_router(weights, bias):
        moved = dataclasses.replace(down, bias=bias)
        return jmm.fused_moe(x, gate_up, moved, weights, ids).astype(jnp.float32)

    check_grads(of_router, (weights, down.bias), order=1, modes=("fwd", "rev"), atol=0.1, rtol=0.05, eps=0.5)


def test_gradients_through_jit_scan_remat_vmap_and_linearize():
    x, gate_up, down, weights, ids = silu_block()

    def deep(x, implementation=None):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (gate_up, down))

        def body(h, layer):
            return h + jmm.fused_moe(h, *layer, weights, ids, implementation=implementation), None

        h, _ = jax.lax.scan(jax.checkpoint(body), x, stacked)
        return (h.astype(jnp.float32) * PROBE).sum()

    gradient = jax.jit(jax.grad(deep))(x)
    assert_close(gradient, jax.jit(jax.grad(partial(deep, implementation="xla")))(x), factor=2)
    _, linear = jax.linearize(deep, x)
    squared = np.sum(np.asarray(gradient, np.float64) ** 2)
    np.testing.assert_allclose(linear(gradient), squared, rtol=2e-2)

    def one(x, weights, ids):
        return block_loss(x, weights, (gate_up.bias, down.bias), gate_up, down, ids)

    gradient_of_one = jax.grad(one, (0, 1))
    elements = [jax.tree.map(lambda leaf, i=i: np.roll(leaf, i, 0), (x, weights, ids)) for i in range(2)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *elements)
    gradients = jax.jit(jax.vmap(gradient_of_one))(*batch)
    alone = jax.jit(gradient_of_one)
    for i, element in enumerate(elements):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5),
            jax.device_get(gradients),
            jax.device_get(alone(*element)),
        )


def test_second_derivatives_are_those_of_the_reference():
    x, gate_up, down, weights, ids = silu_block()

    def gradient(x, weights, implementation=None):
        parts = (gate_up.bias, down.bias)
        loss = partial(block_loss, gate_up=gate_up, down=down, ids=ids, implementation=implementation)
        return jax.grad(lambda x: loss(x, weights, parts))(x)

    direction = host_arrays.normal(2, x.shape, x.dtype)

    def forward_over_reverse(implementation):
        return jax.jvp(partial(gradient, weights=weights, implementation=implementation), (x,), (direction,))[1]

    def reverse_over_reverse(implementation):
        def along(x, weights):
            slope = gradient(x, weights, implementation)
            return (slope.astype(jnp.float32) * direction.astype(jnp.float32)).sum()

        return jax.grad(along, (0, 1))(x, weights)

    for second in (forward_over_reverse, reverse_over_reverse):
        assert_close(jax.jit(second, static_argnums=0)(None), jax.jit(second, static_argnums=0)("xla"), factor=2)


def test_gradients_of_dispatches_and_of_one_matrix_are_those_of_the_reference():
    x, gate_up, *_ = silu_block("nvfp4")
    table = jnp.asarray([[1, 0, 2, 3], [4, 2, 5, 2], [9, 0, 0, 2], [0, 6, 0, 1]], jnp.int32)

    def loss(x, bias, global_scales, implementation):
        stack = dataclasses.replace(gate_up, bias=bias, global_scales=global_scales)
        y, _ = jmm.expert_gemm(x, stack, table, num_out_rows=8, implementation=implementation)
        z = jmm.linear(x, stack, expert=jnp.int32(2), implementation=implementation)
        return jnp.sin(y.astype(jnp.float32)).sum() + jnp.cos(z.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    moving = (x, gate_up.bias, gate_up.global_scales)
    assert_close(gradient(*moving, None), gradient(*moving, "xla"))


def test_a_layer_trains_but_for_its_packed_leaves():
    x, gate_up, down, _, _ = silu_block()
    router = host_arrays.normal(0, (HIDDEN, EXPERTS), scale=0.1)
    layer = jmm.MoELayer(gate_up, down, router, jmm.Routing(top_k=TOP_K))

    def loss(layer, x):
        return (layer(x).astype(jnp.float32) * PROBE).sum()

    def by_hand(layer, x):
        weights, ids = jmm.route(x.astype(jnp.float32) @ layer.router, top_k=TOP_K)
        parts = (layer.gate_up.bias, layer.down.bias)
        return block_loss(x, weights, parts, layer.gate_up, layer.down, ids)

    (ours, d_x), (wanted, wanted_d_x) = (
        jax.jit(jax.grad(function, (0, 1), allow_int=True))(layer, x) for function in (loss, by_hand)
    )
    trained = [(g.router, g.gate_up.bias, g.down.bias) for g in (ours, wanted)]
    assert_close((trained[0], d_x), (trained[1], wanted_d_x))
    assert ours.gate_up.packed.dtype == jax.dtypes.float0
    assert not np.asarray(ours.gate_up.scales).any()


def test_float32_results_have_derivatives_and_quantised_rows_none():
    x, gate_up, down, weights, ids = silu_block()

    def loss(x, **options):
        return (jmm.fused_moe(x, gate_up, down, weights, ids, **options).astype(jnp.float32) * PROBE).sum()

    assert_close(jax.grad(partial(loss, preferred_element_type=jnp.float32))(x), jax.grad(loss)(x))
    quantizer = jmm.IntermediateQuantizer.static_fp8(jnp.float32(0.1))
    with pytest.raises(NotImplementedError, match="cannot be differentiated where intermediate is not None"):
        jax.grad(partial(loss, intermediate=quantizer))(x)


def test_rows_and_router_weights_come_in_other_types_and_in_batches():
    x, gate_up, down, weights, ids = silu_block()
    y = jmm.fused_moe(x.astype(jnp.float32), gate_up, down, weights, ids)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y.astype(x.dtype), jmm.fused_moe(x, gate_up, down, weights, ids))
    narrow = weights.astype(jnp.bfloat16)
    batch = [jnp.stack([leaf, leaf]) for leaf in (x, narrow, ids)]
    stacked = jmm.fused_moe(batch[0], gate_up, down, *batch[1:])
    np.testing.assert_array_equal(stacked[1], jmm.fused_moe(x, gate_up, down, narrow.astype(jnp.float32), ids))
    gradient = jax.grad(lambda w: jmm.fused_moe(x, gate_up, down, w, ids).astype(jnp.float32).sum())(narrow)
    assert gradient.dtype == jnp.bfloat16
    assert np.any(gradient)
    alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
    rows = jmm.moe_gemm(x.astype(jnp.float32), gate_up, alignment, top_k=TOP_K)
    np.testing.assert_array_equal(rows.astype(x.dtype), jmm.moe_gemm(x, gate_up, alignment, top_k=TOP_K))


def test_a_router_trains_through_route():
    x, gate_up, down, _, _ = silu_block()
    kernel = host_arrays.normal(0, (HIDDEN, EXPERTS), scale=0.1)

    def loss(kernel, implementation=None):
        weights, ids = jmm.route(x.astype(jnp.float32) @ kernel, top_k=TOP_K)
        return block_loss(x, weights, (gate_up.bias, down.bias), gate_up, down, ids, implementation=implementation)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_close(gradient(kernel, None), gradient(kernel, "xla"))


def test_packed_leaves_of_a_model_are_constants():
    x, gate_up, down, weights, ids = silu_block()

    def loss(layer):
        return block_loss(x, layer["router"], (layer["gate_up"].bias, down.bias), layer["gate_up"], down, ids)

    gradients = jax.jit(jax.grad(loss, allow_int=True))({"gate_up": gate_up, "router": weights})
    assert gradients["gate_up"].packed.dtype == jax.dtypes.float0
    assert not np.asarray(gradients["gate_up"].scales).any()
    assert np.asarray(gradients["gate_up"].bias).any()
    assert np.any(gradients["router"])


@pytest.mark.parametrize("leaf", ["packed", "scales"])
def test_a_derivative_of_frozen_leaves_alone_is_refused_by_name(leaf):
    x, gate_up, down, weights, ids = silu_block()
    alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)

    def moved(value):
        return dataclasses.replace(gate_up, **{leaf: value})

    def block_of(value):
        return jmm.fused_moe(x, moved(value), down, weights, ids).astype(jnp.float32).sum()

    def product_of(value):
        return jmm.moe_gemm(x, moved(value), alignment, top_k=TOP_K).astype(jnp.float32).sum()

    for loss, operand in ((block_of, "gate_up"), (product_of, "weights")):
        with pytest.raises(
            TypeError, match=rf"{operand}\.scales alone.*fake_quantize" if leaf == "scales" else "int32"
        ):
            jax.grad(loss)(getattr(gate_up, leaf))


def primitives(jaxpr):
    """The names of all primitives and the shapes of all values, in nested jaxprs too."""
    names, shapes = set(), set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        shapes |= {variable.aval.shape for variable in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if not hasattr(inner, "eqns"):
                continue
            more_names, more_shapes = primitives(inner)
            names, shapes = names | more_names, shapes | more_shapes
    return names, shapes


def test_a_frozen_block_costs_its_forward_pass_alone():
    x, gate_up, down, weights, ids = silu_block()

    def loss(x):
        frozen = jax.lax.stop_gradient(x)
        return (x + jmm.fused_moe(frozen, gate_up, down, weights, ids)).astype(jnp.float32).sum()

    names, _ = primitives(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)
    assert "fused_moe" in names
    assert not names & {"grouped_product", "fused_moe_tangent"}
    np.testing.assert_array_equal(jax.grad(loss)(x), np.ones(x.shape))


def test_residuals_are_the_inputs_and_no_stack_is_ever_dense():
    x, gate_up, down, weights, ids = silu_block()
    operands = (x, gate_up, down, weights, ids)
    _, pull = jax.vjp(lambda x, weights: jmm.fused_moe(x, gate_up, down, weights, ids), x, weights)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes"))
    assert kept <= sum(leaf.nbytes for leaf in jax.tree.leaves(operands)) + 64

    def loss(x, weights):
        return block_loss(x, weights, (gate_up.bias, down.bias), gate_up, down, ids)

    names, shapes = primitives(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights).jaxpr)
    assert "grouped_product" in names
    largest = max(int(np.prod(shape)) for shape in shapes)
    assert largest < INNER * HIDDEN  # one expert's smaller matrix


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [7, 600])
def test_the_card_agrees_on_gradients_of_the_block(tokens):
    rng = np.random.default_rng(tokens)
    gate_up, down = (
        oracle.random_experts(rng, EXPERTS, k, n, weight_format="nvfp4", group_size=16, bias=True).packed()
        for k, n in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    )
    x = jnp.asarray(oracle.random_rows(rng, tokens, HIDDEN, jnp.bfloat16))
    weights, ids = map(jnp.asarray, oracle.random_routing(rng, tokens, TOP_K, EXPERTS, "holes"))
    probe = host_arrays.normal(0, x.shape)

    def loss(x, weights, parts, implementation):
        y = jmm.fused_moe(x, *replaced(gate_up, down, parts), weights, ids, implementation=implementation)
        return (y.astype(jnp.float32) * probe).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    moving = (x, weights, trainable(gate_up, down))
    assert_close(gradient(*moving, "cuda"), gradient(*moving, "xla"))
