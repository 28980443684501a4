"""Layers of a stack: the bits of the layers themselves, and no copy of weights on the way."""

import dataclasses
import functools
import re

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.layer_slice import LayerSlice

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 3, 4, 64, 64, 2, 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / shape[-2] ** 0.5, jnp.float32)


def matrix(seed, k, n, experts=EXPERTS, *, bias=False):
    """Zero points and a bias, or scales of two levels: together all leaves that matrices have. Nothing is compiled."""
    rng = np.random.default_rng(seed)
    words = functools.partial(rng.integers, -(2**31), 2**31, dtype=np.int32)
    packed = words((experts, k // 16, 2 * n))
    if bias:
        scales = rng.uniform(0.01, 0.03, (experts, k // 32, n)).astype(jnp.bfloat16)
        zeros, biases = words((experts, k // 32, n // 8)), rng.normal(size=(experts, n)).astype(np.float32)
        made = jmm.MarlinWeights(packed, scales, zeros, biases, None, jmm.FORMATS["int4_zp"], 32)
    else:
        scales = rng.integers(0x28, 0x38, (experts, k // 16, n), dtype=np.uint8)
        factors = rng.uniform(0.05, 0.1, (experts, n // 64)).astype(np.float32)
        made = jmm.MarlinWeights(packed, scales, None, None, None, jmm.FORMATS["nvfp4"], 16, global_scales=factors)
    return jax.tree.map(jnp.asarray, made)


@functools.cache
def layers():
    made = []
    for seed in range(0, 100 * LAYERS, 100):
        one = matrix(seed + 1, HIDDEN, 2 * INTERMEDIATE, 1), matrix(seed + 2, INTERMEDIATE, HIDDEN, 1)
        made.append(
            jmm.MoELayer(
                matrix(seed + 3, HIDDEN, 2 * INTERMEDIATE, bias=True),
                matrix(seed + 4, INTERMEDIATE, HIDDEN),
                normal(seed + 5, HIDDEN, EXPERTS),
                jmm.Routing(TOP_K, "sigmoid", scale=1.5),
                router_bias=normal(seed + 6, 1, EXPERTS)[0],
                correction_bias=normal(seed + 7, 1, EXPERTS)[0],
                shared=jmm.SharedExpert(*one, normal(seed + 8, HIDDEN, 1)),
            )
        )
    return made


@functools.cache
def stacked():
    return jmm.stack_layers(layers())


def rows(dtype=jnp.bfloat16):
    return host_arrays.normal(7, (TOKENS, HIDDEN), dtype)


@functools.partial(jax.jit, static_argnames="implementation")
def one(layer, x, implementation=None):
    return layer(x, implementation=implementation)


def scanned(stack, x, **options):
    return jax.lax.scan(lambda h, l: (stack[l](h, **options), None), x, jnp.arange(len(stack)))[0]


def assert_equal(actual, wanted):
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(wanted, np.float32))


def test_a_scan_is_equal_to_the_layers_one_by_one():
    x = wanted = rows()
    for layer in layers():
        wanted = one(layer, wanted)
    assert_equal(jax.jit(scanned)(stacked(), x), wanted)
    for layer in stacked():
        x = one(layer, x)
    assert_equal(x, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_on_a_card_a_scan_of_whole_layers_is_equal_to_the_layers(tokens):
    x = wanted = host_arrays.normal(8, (tokens, HIDDEN), jnp.bfloat16)
    stack = jmm.stack_layers(routed())
    for layer in routed():
        wanted = one(layer, wanted, implementation="cuda")
    program = jax.jit(functools.partial(scanned, implementation="cuda")).lower(stack, x).compile()
    assert_copies_no_weights(program)
    assert_equal(program(stack, x), wanted)
    for layer in stack:
        x = one(layer, x, implementation="cuda")
    assert_equal(x, wanted)


@functools.cache
def routed():
    """Without the shared expert, which is packed otherwise: the whole layer is one program."""
    return [dataclasses.replace(layer, shared=None) for layer in layers()]


@needs_nvrtc
def test_a_program_for_a_card_takes_stacks_and_an_index(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    stack = jmm.stack_layers(routed())
    run = jax.jit(lambda stack, layer, x: stack[layer](x))
    text = run.trace(stack, jnp.int32(0), rows()).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if native.TARGETS["program", "cuda"] in line)
    operands = re.findall(r"tensor<([^>]*)>", call.rpartition(" : (")[2].partition(") -> ")[0])
    spelled = {"int32": "i32", "bfloat16": "bf16", "float32": "f32", "uint8": "ui8"}
    for leaf in jax.tree.leaves(stack):
        assert "x".join([*map(str, leaf.shape), spelled[leaf.dtype.name]]) in operands
    assert operands.count("i32") == 1
    assert "dynamic_slice" not in text


def weights_of(stack):
    return jax.tree.leaves([stack.layers.gate_up, stack.layers.down, stack.layers.shared, stack.layers.router])


def assert_copies_no_weights(program):
    """Weights go from parameters to calls, through the loop, and nowhere else."""
    text = program.as_text()
    for leaf in weights_of(stacked()):
        spelled = {"int32": "s32", "bfloat16": "bf16", "float32": "f32", "uint8": "u8"}[leaf.dtype.name]
        for shape in (leaf.shape, leaf.shape[1:], (1, *leaf.shape[1:])):
            array = rf"{spelled}\[{','.join(map(str, shape))}\]"
            made = set(re.findall(rf" = {array}\S* ([\w-]+)\(", text))
            assert made <= {"parameter", "get-tuple-element"}, f"{array} is made by {made}"


def test_a_scan_copies_and_gathers_no_weights():
    program = jax.jit(scanned).lower(stacked(), rows()).compile()
    assert_copies_no_weights(program)
    targets = re.findall(r'custom_call_target="(jax_marlin_moe[^"]*)"', program.as_text())
    assert targets == ["jax_marlin_moe.layer_of_stack.cpu.v1"]  # one call for the whole layer


def block(x, gate_up, down, **options):
    weights, ids = jmm.route(normal(9, x.shape[0], EXPERTS), top_k=TOP_K)
    return jmm.fused_moe(x, gate_up, down, weights, ids, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_on_a_card_a_scan_is_equal_to_the_layers_one_by_one(tokens):
    """Of the block: between blocks, XLA may compile two programs to other roundings."""
    x = wanted = host_arrays.normal(8, (tokens, HIDDEN), jnp.bfloat16)
    choice = jmm.route(normal(9, tokens, EXPERTS), top_k=TOP_K)

    @jax.jit
    def run(x, choice, gate_up, down):
        return jmm.fused_moe(x, gate_up, down, *choice, implementation="cuda")

    for layer in layers():
        wanted = run(wanted, choice, layer.gate_up, layer.down)
    stack = (stacked().layers.gate_up, stacked().layers.down)

    @jax.jit
    def scan(stack, choice, x):
        return jax.lax.scan(lambda h, l: (run(h, choice, *jmm.take_layer(stack, l)), None), x, jnp.arange(LAYERS))[0]

    program = scan.lower(stack, choice, x).compile()
    assert_copies_no_weights(program)
    assert_equal(program(stack, choice, x), wanted)
    for number in range(LAYERS):
        x = run(x, choice, *jmm.take_layer(stack, number))
    assert_equal(x, wanted)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_ops_take_packed_weights_of_a_layer(implementation):
    stack = (stacked().layers.gate_up, stacked().layers.down)
    options = {"implementation": implementation}
    wanted = block(rows(), layers()[1].gate_up, layers()[1].down, **options)
    for index in (1, jnp.int32(1), -2):
        assert_equal(block(rows(), *jmm.take_layer(stack, index), **options), wanted)


def test_products_take_packed_weights_of_a_layer():
    _, ids = jmm.route(normal(9, TOKENS, EXPERTS), top_k=TOP_K)
    alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
    taken = jmm.take_layer(stacked().layers.gate_up, 1)
    wanted = jmm.moe_gemm(rows(), layers()[1].gate_up, alignment, top_k=TOP_K)
    assert_equal(jmm.moe_gemm(rows(), taken, alignment, top_k=TOP_K), wanted)
    down = jmm.take_layer(stacked().layers.down, 2)
    assert_equal(jmm.linear(rows(), down, expert=1), jmm.linear(rows(), layers()[2].down, expert=1))


def test_layers_may_differ_within_a_call_and_pass_through_functions():
    stack = (stacked().layers.gate_up, stacked().layers.down)
    mixed = jmm.take_layer(stack[0], 2), jmm.take_layer(stack[1], 0)
    wanted = block(rows(), layers()[2].gate_up, layers()[0].down)
    assert_equal(block(rows(), *mixed), wanted)
    assert_equal(jax.jit(block)(rows(), *mixed), wanted)


def test_an_index_that_is_traced_is_clamped():
    stack = (stacked().layers.gate_up, stacked().layers.down)
    for index, number in ((-5, 0), (99, LAYERS - 1)):
        wanted = block(rows(), layers()[number].gate_up, layers()[number].down)
        for implementation in ("cpu", "xla"):
            actual = block(rows(), *jmm.take_layer(stack, jnp.int32(index)), implementation=implementation)
            assert np.linalg.norm(np.asarray(actual - wanted, np.float32)) <= 1e-2 * np.linalg.norm(
                np.asarray(wanted, np.float32)
            )


def test_row_orders_are_gathered_for_the_layer():
    order = jnp.stack([jax.random.permutation(jax.random.key(n), HIDDEN) for n in range(EXPERTS)])
    first, second = (dataclasses.replace(layers()[n].gate_up, input_order=(order + n) % HIDDEN) for n in range(2))
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    down = layers()[0].down
    assert_equal(block(rows(), jmm.take_layer(stack, 1), down), block(rows(), second, down))


def test_vmap_over_rows_and_over_layers():
    stack = (stacked().layers.gate_up, stacked().layers.down)
    batch = jnp.stack([rows(), rows()[::-1]])
    by_rows = jax.vmap(lambda x: block(x, *jmm.take_layer(stack, 1)))(batch)
    assert_equal(by_rows[1], block(batch[1], *jmm.take_layer(stack, 1)))
    by_layers = jax.vmap(lambda l: block(rows(), *jmm.take_layer(stack, l)))(jnp.arange(LAYERS))
    assert_equal(by_layers[2], block(rows(), layers()[2].gate_up, layers()[2].down))


def test_derivatives_are_those_of_the_layer():
    matrices = (layers()[1].gate_up, layers()[1].down)
    stack = (stacked().layers.gate_up, stacked().layers.down)

    def gradients(bias, x, gate_up, down, layer=None):
        gate_up = dataclasses.replace(gate_up, bias=bias)
        taken = (gate_up, down) if layer is None else jmm.take_layer((gate_up, down), layer)
        return block(x, *taken).astype(jnp.float32).sum()

    program = jax.jit(jax.grad(gradients, (0, 1)))
    of_bias, of_rows = program(stack[0].bias, rows(), *stack, 1)
    wanted_of_bias, wanted_of_rows = program(matrices[0].bias, rows(), *matrices)
    assert_equal(of_rows, wanted_of_rows)
    assert_equal(of_bias[1], wanted_of_bias)
    assert not of_bias[0].any()
    assert of_bias[1].any()


def test_exports_take_stacks_and_layers_of_them():
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]
    stack = (stacked().layers.gate_up, stacked().layers.down)

    def exported(function, *arguments):
        return jax.export.deserialize(
            jax.export.export(jax.jit(function), disabled_checks=checks)(*arguments).serialize()
        )

    def of_stack(whole, layer, x):
        taken = whole[layer]
        return block(x, taken.gate_up, taken.down)

    wanted = block(rows(), layers()[1].gate_up, layers()[1].down)
    arguments = (stacked(), jnp.int32(1), rows())
    assert_equal(exported(of_stack, *arguments).call(*arguments), wanted)
    taken = (rows(), *jmm.take_layer(stack, 1))
    assert_equal(exported(block, *taken).call(*taken), wanted)


def test_a_stack_is_a_sequence_and_a_pytree():
    stack = stacked()
    assert len(stack) == LAYERS == len(list(stack))
    assert all(isinstance(leaf, LayerSlice) for leaf in (stack[0].router, stack[0].gate_up.packed))
    assert "StackedMoELayer(layers=" in repr(stack)
    assert stack[1].gate_up.num_experts == EXPERTS
    for name, wanted in (("router", layers()[1].router), ("gate_up", layers()[1].gate_up)):
        read = jax.tree.map(jnp.asarray, getattr(stack[1], name), is_leaf=lambda node: isinstance(node, LayerSlice))
        jax.tree.map(np.testing.assert_array_equal, read, wanted)
    again = jax.tree.map(lambda leaf: leaf, stack)
    assert jax.tree.structure(again) == jax.tree.structure(stack)


def test_wrong_indices_are_named():
    with pytest.raises(IndexError, match=r"index is 3; it must lie in \[-3, 3\), for 3 layers"):
        stacked()[LAYERS]
    with pytest.raises(TypeError, match=r"index has type float32\[\]; it must be an integer"):
        stacked()[jnp.float32(1)]
    with pytest.raises(TypeError, match="index has type slice; it must be an integer"):
        stacked()[:2]
    with pytest.raises(ValueError, match=r"stacked has 2 in stacked\[0\], 3 in stacked\[1\]"):
        jmm.take_layer([jnp.ones((2, 4)), jnp.ones((3, 4))], 0)
    with pytest.raises(ValueError, match="has no dimensions"):
        jmm.take_layer([jnp.ones(())], 0)


def test_layers_that_are_not_alike_are_refused_by_name():
    first = layers()[0]
    for changes, message in (
        ({"routing": jmm.Routing(1)}, r"layers\[1\]\.routing is Routing\(top_k=1"),
        ({"correction_bias": None}, r"layers\[1\]\.correction_bias is None; it must be float32\[4\]"),
        ({"router": first.router.astype(jnp.bfloat16)}, r"layers\[1\]\.router is bfloat16\[64, 4\]"),
        ({"gate_up": dataclasses.replace(first.gate_up, group_size=16)}, "must have the formats and paddings"),
    ):
        with pytest.raises(ValueError, match=message):
            jmm.stack_layers([first, dataclasses.replace(first, **changes)])
    with pytest.raises(TypeError, match=r"layers\[1\] has type tuple"):
        jmm.stack_layers([first, ()])
    with pytest.raises(TypeError, match="count is None, and layers has type generator without a length"):
        jmm.stack_layers(layer for layer in layers())
    for count, number in ((2, "more"), (4, "3")):
        with pytest.raises(ValueError, match=f"count is {count}; there are {number} layers"):
            jmm.stack_layers(iter(layers()), count)
    with pytest.raises(ValueError, match="there are 0 layers"):
        jmm.stack_layers([])
