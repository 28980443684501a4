"""Activations against float64 numpy, value by value, and their derivatives."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import activate

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import ACTIVATIONS, PARAMETERS, make_activation

ALL = (
    *ACTIVATIONS.values(),
    jmm.swiglu(7.0, 1.702, 1.0),
    jmm.swiglu(0.5),
    jmm.swiglu(),
    jmm.swiglu_step(2.0),
    jmm.swiglu_step(math.inf),
    jmm.situ(4.0, 25.0),
    jmm.situ(1.0),
)
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ALL, ids=str)

# Tiny ones, where a quotient loses digits; ordinary ones on both sides of every bound; those that saturate.
TINY, LARGE = [0.0, 1e-4, -1e-4, 3e-3, 0.2, -0.26], [-9, 9, 20, -20, 80, -80, 30, -30]
GATE = np.concatenate([TINY, np.linspace(-6, 6, 50), LARGE])
UP = np.tile([1.0, -0.7, 3.0, -8.0], 16)
COLUMNS = 64


def values(activation, gate, up):
    h = np.stack([gate, up], axis=1).reshape(-1, 2) if activation.gated else gate.reshape(-1, 1)
    return activate(h.astype(np.float64), activation.name, activation.parameters).reshape(-1)


def test_every_name_is_tested():
    assert {activation.name for activation in ALL} == PARAMETERS.keys()


@EVERY_ACTIVATION
def test_the_reference_computes_the_definition(activation):
    gate, up = GATE.astype(np.float32), UP.astype(np.float32)
    found = activation.apply(jnp.asarray(gate), jnp.asarray(up) if activation.gated else None)
    np.testing.assert_allclose(found, values(activation, gate, up), rtol=2e-5, atol=1e-25)
    assert make_activation(activation.name, activation.parameters) == activation


def block_of_values(activation, gate, up, dtype):
    """A block of experts without weights in gate and up, whose biases are the values; down is the identity."""
    rows = len(gate) // COLUMNS
    halves = (gate, up) if activation.gated else (gate,)
    bias = jnp.concatenate([half.reshape(rows, COLUMNS) for half in halves], axis=1)
    nothing = jnp.zeros((rows, COLUMNS, bias.shape[1]), jnp.float32)
    gate_up = jmm.quantize(nothing, "fp16", bias=bias)
    down = jmm.quantize(jnp.broadcast_to(jnp.eye(COLUMNS), (rows, COLUMNS, COLUMNS)), "fp16")
    x, ids = jnp.zeros((rows, COLUMNS), dtype), jnp.arange(rows, dtype=jnp.int32)[:, None]
    return x, gate_up, down, jnp.ones((rows, 1), jnp.float32), ids


@EVERY_ACTIVATION
def test_kernels_compute_the_definition(platform, activation):
    """Each value alone, to the rounding of float16: a block's error would drown in that of the others.

    And they keep NaN, in gate or in up, for the row that has it: a comparison with a bound must not end it.
    """
    gate, up = (np.concatenate([row, np.ones(3 * COLUMNS)]).astype(np.float32) for row in (GATE, UP))
    gate[COLUMNS + 3] = up[2 * COLUMNS + 5] = np.nan
    arguments = block_of_values(activation, gate, up, jnp.float16)
    y = np.asarray(jmm.fused_moe(*arguments, activation=activation, implementation=platform), np.float64)
    np.testing.assert_allclose(y[0], values(activation, gate, up)[:COLUMNS], rtol=1.1e-3, atol=1e-7)
    np.testing.assert_array_equal(np.isnan(y).all(1), [False, True, activation.gated, False])
    np.testing.assert_array_equal(np.isnan(y).any(1), [False, True, activation.gated, False])


@EVERY_ACTIVATION
def test_derivatives_are_right(activation):
    """Those that JAX takes of the reference, against differences of float64 on both sides of every bound."""
    gate = GATE[(np.abs(GATE) > 1e-3) & (np.abs(GATE) < 15)]
    up = UP[: len(gate)]

    @jax.jit
    def slopes(gate, up):
        if activation.gated:
            return jax.grad(lambda gate, up: activation.apply(gate, up).sum(), (0, 1))(gate, up)
        return (jax.grad(lambda gate: activation.apply(gate, None).sum())(gate),)

    found = slopes(*(value.astype(np.float32) for value in (gate, up)))
    steps = ((1e-6, 0), (0, 1e-6))[: len(found)]
    for slope, (dg, du) in zip(found, steps, strict=True):
        ahead, behind = (values(activation, gate + side * dg, up + side * du) for side in (1, -1))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "relu2", "relu_ungated", "relu2_gated"])
def test_relu_has_no_slope_at_zero(name):
    activation = ACTIVATIONS[name]
    up = jnp.ones(()) if activation.gated else None
    assert jax.grad(lambda gate: activation.apply(gate, up))(jnp.zeros(())) == 0


@EVERY_ACTIVATION
def test_factors_of_up_are_factors_of_the_result_where_it_says_so(activation):
    scaled = (GATE, 3 * UP) if activation.gated else (3 * GATE, UP)
    passes = np.allclose(values(activation, *scaled), 3 * values(activation, GATE, UP), rtol=1e-12)
    # Infinite bounds are none, and may be taken for bounds all the same.
    assert activation.passes_factors == passes or (passes and math.inf in activation.parameters)


def test_an_activation_is_a_value():
    assert jmm.situ(4) == jmm.situ(4.0, math.inf)
    assert dataclasses.replace(jmm.swiglu_step(7), parameters=(8.0,)) == jmm.swiglu_step(8)
