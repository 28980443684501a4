"""`Op`: who runs a call, and the rules that an op may bring: derivatives and partitioning."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import ad

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.operand_types import replicated_type
from jax_marlin_moe.ops.one_program import one_program
from jax_marlin_moe.ops.primitive import Op, map_batch

NAMES = (f"scaled_{number}" for number in itertools.count())


def scaled_reference(x, table, *, power):
    """`x * table["scale"] ** power` in float32."""
    return x * jnp.power(table["scale"], power)


def scaled_op(**rules):
    """An op of a pytree and a row of x, whose CPU form adds one, so that it can be told from the reference."""
    return Op(
        next(NAMES),
        shape_rule=lambda x, table, *, power: [replicated_type(x, x.shape, x.dtype)],
        reference=scaled_reference,
        cpu=lambda x, table, *, power: [scaled_reference(x, table, power=power) + 1],
        cuda=lambda x, table, *, power, hint: [scaled_reference(x, table, power=power) + hint],
        batching_rule=lambda op, leaves, dims, **params: map_batch(op, leaves, dims, **params),
        cuda_options=("hint",),
        **rules,
    )


X, TABLE = jnp.arange(4.0), {"scale": jnp.full((4,), 3.0), "unused": jnp.int32(0)}


def call(op, x, table, implementation=None):
    return op(x, table, power=2, hint=5, implementation=implementation)[0]


def test_the_form_of_the_platform_runs_unless_another_is_named(monkeypatch):
    op = scaled_op()
    np.testing.assert_array_equal(call(op, X, TABLE), 9 * X + 1)
    np.testing.assert_array_equal(call(op, X, TABLE, "xla"), 9 * X)
    np.testing.assert_array_equal(jax.vmap(lambda x: call(op, x, TABLE))(jnp.stack([X, X]))[1], 9 * X + 1)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "the module is missing")
    with pytest.warns(UserWarning, match="slow reference on cpu: the module is missing"):
        np.testing.assert_array_equal(call(op, X[:3], {"scale": jnp.full((3,), 3.0)}), 9 * X[:3])


def test_an_implementation_is_checked_at_every_call(monkeypatch):
    op = scaled_op()
    run = one_program("power")(lambda x, **options: op(x, TABLE, hint=5, **options)[0])
    np.testing.assert_array_equal(run(X, power=1, implementation="cpu"), 3 * X + 1)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "the module is missing")
    with pytest.raises(ValueError, match="implementation is 'cpu', which cannot run here: the module is missing"):
        run(X, power=1, implementation="cpu")
    with pytest.raises(ValueError, match="implementation is 'tpu'; it must be None or one of"):
        run(X, power=1, implementation="tpu")


def test_without_a_rule_differentiation_names_the_op_the_operands_and_the_ways_out():
    op = scaled_op()
    message = (
        rf"{op.primitive.name} cannot be differentiated with respect to x, table\['scale'\]: .*implementation='xla'.*"
        r"stop_gradient around x, table\['scale'\] or the result"
    )

    def loss(x, scale, implementation=None):
        return call(op, x, TABLE | {"scale": scale}, implementation).sum()

    for transform in (
        jax.grad(loss, (0, 1)),
        lambda *a: jax.jvp(loss, a, a),
        lambda *a: jax.linearize(loss, *a)[1](*a),
    ):
        with pytest.raises(NotImplementedError, match=message):
            transform(X, TABLE["scale"])
    with pytest.raises(NotImplementedError, match=r"with respect to x: .*implementation='xla'"):
        jax.linear_transpose(lambda x: call(op, x, TABLE), X)(X)
    np.testing.assert_array_equal(jax.grad(lambda x: loss(x, TABLE["scale"], "xla"))(X), np.full(4, 9.0))


def test_without_a_rule_a_result_may_be_frozen():
    op = scaled_op()

    def around_arguments(x):
        return (x + call(op, jax.lax.stop_gradient(x), TABLE)).sum()

    def around_the_result(x):
        return (x + jax.lax.stop_gradient(call(op, x, TABLE))).sum()

    def in_a_scan(x):
        return jax.lax.scan(lambda h, _: (h + jax.lax.stop_gradient(call(op, h, TABLE)), None), x, None, length=2)[
            0
        ].sum()

    for loss in (around_arguments, around_the_result, in_a_scan, jax.checkpoint(around_the_result)):
        np.testing.assert_array_equal(jax.grad(loss)(X), np.ones(4))
        np.testing.assert_array_equal(jax.vmap(jax.grad(loss))(X[None]), np.ones((1, 4)))
    twice = jax.grad(lambda x: (x * jax.grad(around_the_result)(x)).sum())
    np.testing.assert_array_equal(twice(X), np.ones(4))
    with pytest.raises(NotImplementedError, match="with respect to x"):
        jax.vmap(jax.grad(lambda x: call(op, x, TABLE).sum()))(X[None])


def tangent_rule(op, cotangents, operands, *, implementation, power, hint):
    (cotangent,), (dx, table) = cotangents, operands
    assert ad.is_undefined_primal(dx)
    return (cotangent * jnp.power(table["scale"], power), None)


def scaled_op_with_derivatives(tangents_by):
    """Its tangents come from a linear op, by the form that is named: the CPU form, None, adds one to them too."""
    linear = scaled_op(transpose=tangent_rule)

    def jvp(op, primals, tangents, *, implementation, **params):
        (dx, dtable), (_, table) = tangents, primals
        assert dtable == {"scale": None, "unused": None}
        results = op(*primals, implementation=implementation, **params)
        return results, linear(dx, table, implementation=tangents_by, **params)

    return scaled_op(jvp=jvp)


def test_derivatives_are_those_of_the_rules():
    for tangents_by, one in (("xla", 0), (None, 1)):
        op = scaled_op_with_derivatives(tangents_by)
        y, dy = jax.jvp(lambda x, op=op: call(op, x, TABLE), (X,), (X,))
        np.testing.assert_array_equal(y, 9 * X + 1)
        np.testing.assert_array_equal(dy, 9 * X + one)
        _, linear = jax.linearize(lambda x, op=op: call(op, x, TABLE), X)
        np.testing.assert_array_equal(linear(X), 9 * X + one)

    def loss(x):
        return call(op, x, TABLE).sum()

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.checkpoint(loss))):
        np.testing.assert_array_equal(gradient(X), np.full(4, 9.0))
    np.testing.assert_array_equal(jax.vmap(jax.grad(loss))(jnp.stack([X, X])), np.full((2, 4), 9.0))


def test_a_layer_of_a_stack_is_an_operand_of_derivatives_too():
    op, stack = scaled_op_with_derivatives("xla"), {"scale": jnp.stack([X, TABLE["scale"]]), "unused": jnp.arange(2)}
    loss = jax.jit(lambda x, stack, layer: call(op, x, jmm.take_layer(stack, layer)).sum())
    np.testing.assert_array_equal(jax.grad(loss)(X, stack, 1), np.full(4, 9.0))
    with pytest.raises(AssertionError):  # the rule above asserts that no scale moves
        jax.grad(lambda scale: loss(X, stack | {"scale": scale}, 1))(stack["scale"])

    def jvp(op, primals, tangents, *, implementation, **params):
        results = op(*primals, implementation=implementation, **params)
        return results, [primals[0] * tangents[1]["scale"] * 6]

    moving = scaled_op(jvp=jvp)
    gradient = jax.grad(lambda scale: call(moving, X, jmm.take_layer(stack | {"scale": scale}, 1)).sum())
    np.testing.assert_array_equal(gradient(stack["scale"]), [np.zeros(4), 6 * X])


def test_a_module_of_other_sources_is_named():
    with pytest.raises(RuntimeError, match=r"native module .* has no handler of no_op on cpu: it was built from other"):
        native.TARGETS["no_op", "cpu"]
