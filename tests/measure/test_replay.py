"""The replay outside of XLA: the operands that it hands to the kernels are those of the custom call."""

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import formatted_experts

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler, program
from jax_marlin_moe.cuda.facts import Pointer
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import ModelShape
from jax_marlin_moe.measure.random_layers import random_layers, random_routings
from jax_marlin_moe.ops.fused_moe import fused_moe_op

pytest.importorskip("cuda.bindings")

from jax_marlin_moe.measure.replay import operands_by_routing, plan_block, replayed_block, timed_samples

SHAPE = ModelShape("small", 8, 2, 256, 128, group_size=64)
PADDED = ModelShape("padded", 8, 2, 200, 120, group_size=64)
TOKENS, ROUTINGS = 3, 4
CASES = [(SHAPE, "int4"), (SHAPE, "int4_zp"), (SHAPE, "nvfp4"), (PADDED, "int4")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
def case(request):
    shape, weight_format = request.param
    layers = random_layers(shape.grouped(get_format(weight_format)), weight_format, "bfloat16", count=2)
    x = host_arrays.normal(0, (TOKENS, shape.hidden), jnp.bfloat16)
    ids = random_routings(SHAPE.num_experts, SHAPE.top_k, TOKENS, ROUTINGS)
    weights = jax.random.uniform(jax.random.key(1), ids.shape)
    return x, layers, weights, ids


@pytest.mark.sampled(2)
def test_operands_are_those_of_the_custom_call(case):
    x, layers, weights, ids = case
    operands = operands_by_routing(*case)
    assert len(operands) == ROUTINGS
    for i, ours in enumerate(operands):
        layer = layers[i % len(layers)]
        jaxpr = jax.make_jaxpr(jmm.fused_moe)(x, *layer, weights[i], jax.device_put(ids[i]))
        (block,) = jaxpr.jaxpr.eqns
        equations = block.params["jaxpr"].jaxpr.eqns
        (call,) = (equation for equation in equations if equation.primitive is fused_moe_op.primitive)
        bound = [(variable.aval.shape, str(variable.aval.dtype)) for variable in call.invars]
        present = [operand for operand in ours if operand is not None]
        assert sorted((operand.shape, str(operand.dtype)) for operand in present) == sorted(bound)
        # Shapes alone would not tell layers and routings apart.
        assert ours[1] is layer[0].packed
        position = next(j for j, operand in enumerate(ours) if operand is layer[1].packed)
        assert 1 < position < len(ours)
        assert np.array_equal(present[-1], ids[i])
        assert np.array_equal(present[-2], weights[i])


@pytest.mark.parametrize("tokens", [3, 100])
def test_operands_with_shared_experts_are_where_the_kernels_read_them(tokens, monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    layer, shared = (
        (
            formatted_experts(experts, 256, 256, "int4", "bfloat16"),
            formatted_experts(experts, 128, 256, "int4", "bfloat16"),
        )
        for experts in (8, 1)
    )
    x = host_arrays.normal(0, (tokens, 256), jnp.bfloat16)
    plan = plan_block(x, *layer, top_k=2, activation="silu", scheme=None, shared=1)
    ids = np.zeros((1, tokens, 3), np.int32)
    (operands,) = operands_by_routing(x, [layer], jnp.ones(ids.shape), ids, [shared])
    buffers = [*operands, jax.ShapeDtypeStruct(x.shape, x.dtype), *plan.scratch]
    program._contract(buffers, plan.kernels, plan.counted)  # raises where a kernel reads what is not there
    read = {
        pointer.buffer
        for kernel in plan.kernels
        for pointer in kernel.pointers.values()
        if isinstance(pointer, Pointer)
    }
    assert read == {place for place, buffer in enumerate(buffers) if buffer is not None}


def test_a_sample_lasts_two_milliseconds():
    asked = []

    def replay(times):
        asked.append(times)
        return 100.0 - len(asked)  # microseconds of one repetition

    times = timed_samples(replay, 4, samples=5, pause_seconds=0.0)
    assert times == [92.0, 93.0, 94.0, 95.0, 96.0]
    assert asked == [1, 1, 1, *[6] * 5]  # 4 repetitions of 97 at best: six times 388


@pytest.mark.gpu
def test_replay(case):
    kernels = replayed_block(*case)
    times = kernels.microseconds(samples=5)
    assert len(times) == 5
    assert times == sorted(times)
    assert 0 < times[0] < 1e4
    # The replay wrote what a call computes.
    x, layers, weights, ids = case
    for i in range(ROUTINGS):
        expected = jmm.fused_moe(x, *layers[i % 2], weights[i], jax.device_put(ids[i]), implementation="cuda")
        (written,) = kernels.results(i)
        assert np.array_equal(np.asarray(written)[:, : x.shape[1]], np.asarray(expected))
    kernels.close()
