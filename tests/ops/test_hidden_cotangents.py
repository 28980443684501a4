"""What lies between the two products of a block's backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.cuda.compiler import compile_cubin
from jax_marlin_moe.cuda.plan_hidden import plan_hidden_cotangents
from jax_marlin_moe.ops.hidden_cotangents import hidden_cotangents_op

SLOTS, COLUMNS, INNER, EXPERTS = 11, 320, 272, 3
GATED = {name: name for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2_gated", "none")} | {
    "swiglu": jmm.swiglu(1.5, 1.702, 1),
    "swiglu_step": jmm.swiglu_step(1.5),
    "situ": jmm.situ(2, 3),
}
LIMITS = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 1e-5}


def operands(dtype="bfloat16", *, biased=True):
    """Hidden values, some of them at limits, cotangents, experts of which some are none, weights and biases."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(SLOTS, 2 * COLUMNS)) * 2
    hidden[:, ::7], hidden[:, ::11], hidden[:, ::13] = 1.5, -1.5, 0
    experts = np.asarray([0, 1, 2, -1, 3, 0, 2, 2, 1, -5, 0], np.int32)
    weights = rng.uniform(size=SLOTS).astype(np.float32)
    bias = rng.normal(size=(EXPERTS, 2 * COLUMNS)).astype(np.float32) if biased else None
    cotangents = rng.normal(size=(SLOTS, INNER))
    return jnp.asarray(hidden, dtype), jnp.asarray(cotangents, dtype), jnp.asarray(experts), jnp.asarray(weights), bias


def called(arrays, implementation, activation="silu", dtype="bfloat16"):
    """The op, jitted."""
    params = {"num_experts": EXPERTS, "activation": get_activation(activation), "dtype": dtype}
    call = jax.jit(lambda *arrays: hidden_cotangents_op(*arrays, implementation=implementation, **params))
    return [np.asarray(result, np.float64) for result in call(*arrays)]


def test_rows_without_an_expert_are_not_read():
    arrays = operands()
    absent = (np.asarray(arrays[2]) < 0) | (np.asarray(arrays[2]) >= EXPERTS)
    filled = [jnp.where(absent[:, None], jnp.nan, rows) for rows in arrays[:2]]
    for found, expected in zip(called((*filled, *arrays[2:]), "cpu"), called(arrays, "xla"), strict=True):
        assert np.isfinite(found).all()
        assert not found[absent].any()
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", GATED)
def test_the_card_agrees_on_every_gated_activation(activation):
    for dtype, result, biased in (("bfloat16", "bfloat16", False), ("float16", "float32", True)):
        arrays = operands(dtype, biased=biased)
        ours = called(arrays, "cuda", GATED[activation], result)
        theirs = called(arrays, "xla", GATED[activation], result)
        for found, expected, limit in zip(ours, theirs, (LIMITS[result], LIMITS[dtype]), strict=True):
            np.testing.assert_allclose(found, expected, atol=limit * np.abs(expected).max(), rtol=2 * limit)


@pytest.mark.gpu
def test_the_card_does_not_read_rows_without_an_expert():
    arrays = operands()
    absent = (np.asarray(arrays[2]) < 0) | (np.asarray(arrays[2]) >= EXPERTS)
    filled = [jnp.where(absent[:, None], jnp.nan, rows) for rows in arrays[:2]]
    for found in called((*filled, *arrays[2:]), "cuda"):
        assert np.isfinite(found).all()
        assert not found[absent].any()


@needs_nvrtc
@pytest.mark.parametrize("activation", ["gelu", "swiglu_step", "situ"])
def test_its_kernel_compiles(activation):
    hidden, pulled = (jax.ShapeDtypeStruct((SLOTS, n), jnp.bfloat16) for n in (2 * COLUMNS, INNER))
    plan = plan_hidden_cotangents(
        hidden,
        pulled,
        num_experts=EXPERTS,
        biased=True,
        activation=get_activation(GATED[activation]),
        dtype=jnp.dtype(jnp.float32),
        architecture="sm_90a",
    )
    assert compile_cubin(plan.source, "sm_90a")
