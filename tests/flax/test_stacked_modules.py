"""Flax modules of stacked layers: scans of both APIs give the bits of the layers, and copy no weights."""

import dataclasses
import functools
import pathlib
import re

import flax.linen as nn
import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import jax_marlin_moe as jmm
from jax_marlin_moe.checkpoint import load_moe_layer, load_moe_layers, with_facts, without_facts
from jax_marlin_moe.flax.linen import MarlinMoE as LinenMoE
from jax_marlin_moe.flax.nnx import MarlinMoE

LAYERS, EXPERTS, HIDDEN, TOP_K = 3, 4, 64, 2
CHECKPOINT = pathlib.Path(__file__).parents[1] / "data" / "ck_q3_gptq_False"


def normal(seed, *shape):
    return host_arrays.normal(seed, shape, scale=shape[-2] ** -0.5)


@functools.cache
def layers():
    return [
        jmm.MoELayer(
            jmm.quantize(normal(seed, EXPERTS, HIDDEN, 2 * HIDDEN), "int4", group_size=64),
            jmm.quantize(normal(seed + 1, EXPERTS, HIDDEN, HIDDEN), "int4", group_size=64),
            normal(seed + 2, HIDDEN, EXPERTS),
            jmm.Routing(TOP_K, "sigmoid"),
            correction_bias=normal(seed + 3, 1, EXPERTS)[0],
        )
        for seed in range(0, 10 * LAYERS, 10)
    ]


@functools.cache
def stacked():
    return jmm.stack_layers(layers())


@pytest.fixture
def x():
    return host_arrays.normal(1, (5, HIDDEN), jnp.bfloat16)


@functools.cache
def wanted():
    """Of the layers one by one, each with its own program."""
    y = host_arrays.normal(1, (5, HIDDEN), jnp.bfloat16)
    step = jax.jit(lambda layer, h: h + layer(h))
    for layer in layers():
        y = step(layer, y)
    return np.asarray(y, np.float32)


def assert_copies_no_weights(compiled):
    """Weights come from parameters and go through the loop to the calls; the calls read them in place."""
    text = compiled.as_text()
    for leaf in (stacked().layers.gate_up.packed, stacked().layers.down.packed):
        for shape in (leaf.shape, leaf.shape[1:], (1, *leaf.shape[1:])):
            made = set(re.findall(rf" = s32\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(", text))
            assert made <= {"parameter", "get-tuple-element"}, f"{shape} is made by {made}"


def test_nnx_scan(x):
    def forward(module, x):
        step = nnx.scan(
            lambda h, l, moe: h + moe(h, layer=l), in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry, graph=False
        )
        return step(x, jnp.arange(LAYERS), module)

    module = MarlinMoE(stacked())
    program = nnx.jit(forward, graph=False)
    np.testing.assert_array_equal(np.asarray(program(module, x), np.float32), wanted())
    assert_copies_no_weights(program.lower(module, x).compile())


class Body(nn.Module):
    moe: LinenMoE

    @nn.compact
    def __call__(self, h, index):
        return h + self.moe(h, layer=index), None


def test_linen_scan(x):
    module, variables = LinenMoE.from_layer(stacked())
    collections = ("params", "quantized", "routing")
    body = nn.scan(Body, variable_broadcast=collections, split_rngs={"params": False})(module)
    variables = {kind: {"moe": parts} for kind, parts in variables.items()}
    program = jax.jit(lambda variables, x: body.apply(variables, x, jnp.arange(LAYERS))[0])
    np.testing.assert_array_equal(np.asarray(program(variables, x), np.float32), wanted())
    assert_copies_no_weights(program.lower(variables, x).compile())


def test_linen_init_has_the_shapes_of_the_stack(x):
    module, variables = LinenMoE.from_layer(stacked())
    initial = jax.eval_shape(functools.partial(module.init, layer=0), jax.random.key(0), x)
    assert jax.tree.structure(initial) == jax.tree.structure(variables)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)


def test_one_layer_by_its_number_and_the_stack_back(x):
    module = MarlinMoE(stacked())
    linen, variables = LinenMoE.from_layer(stacked())
    one = np.asarray(layers()[1](x), np.float32)
    np.testing.assert_array_equal(np.asarray(module(x, layer=1), np.float32), one)
    np.testing.assert_array_equal(np.asarray(linen.apply(variables, x, layer=1), np.float32), one)
    jax.tree.map(np.testing.assert_array_equal, module.layer, stacked())


def test_a_stack_needs_the_number_of_a_layer_and_a_layer_takes_none(x):
    with pytest.raises(ValueError, match="layer is None; this module holds a stack of 3 layers"):
        MarlinMoE(stacked())(x)
    with pytest.raises(ValueError, match="layer is given; this module holds one layer"):
        MarlinMoE(layers()[0])(x, layer=1)
    with pytest.raises(IndexError, match="index is 3"):
        MarlinMoE(stacked())(x, layer=3)


def test_stacks_are_saved_and_restored():
    empty = jax.tree.map(jnp.zeros_like, stacked())
    restored = serialization.from_bytes(empty, serialization.to_bytes(stacked()))
    assert jax.tree.structure(restored) == jax.tree.structure(stacked())
    jax.tree.map(np.testing.assert_array_equal, restored, stacked())
    other = jmm.StackedMoELayer(dataclasses.replace(empty.layers, routing=jmm.Routing(1)))
    with pytest.raises(ValueError, match=r"routing.* in the target MoELayer"):
        serialization.from_bytes(other, serialization.to_bytes(stacked()))
    with pytest.raises(ValueError, match=r"routing.* in the template"):
        without_facts(with_facts(other) | {"facts": with_facts(stacked())["facts"]})


def test_layers_of_a_checkpoint_load_into_one_stack():
    stack = load_moe_layers(CHECKPOINT, stacked=True)
    numbers = [number for number, _ in load_moe_layers(CHECKPOINT)]
    assert len(stack) == len(numbers) > 1
    module = MarlinMoE(load_moe_layers(CHECKPOINT, layers=numbers[::-1], stacked=True))
    x = host_arrays.normal(2, (3, stack.layers.gate_up.k), jnp.bfloat16)
    last = np.asarray(load_moe_layer(CHECKPOINT, numbers[-1])(x), np.float32)
    np.testing.assert_array_equal(np.asarray(stack[-1](x), np.float32), last)
    np.testing.assert_array_equal(np.asarray(module(x, layer=0), np.float32), last)
    with pytest.raises(ValueError, match="whose layers \\[\\] are stacked: count is 0"):
        load_moe_layers(CHECKPOINT, layers=[], stacked=True)
