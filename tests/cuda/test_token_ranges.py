"""Blocks of many tokens: one program for a range of numbers."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler, program
from jax_marlin_moe.cuda.token_ranges import most_tokens
from jax_marlin_moe.custom_call import custom_call

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 1024, 256


def test_ranges_hold_their_numbers_and_waste_a_quarter_at_most():
    mosts = {tokens: most_tokens(tokens) for tokens in range(65, 5000)}
    assert all(tokens <= most <= 1.25 * tokens for tokens, most in mosts.items())
    assert all(most_tokens(most) == most for most in mosts.values())
    assert [mosts[power] for power in (128, 256, 512, 1024, 2048, 4096)] == [128, 256, 512, 1024, 2048, 4096]
    assert len({most for tokens, most in mosts.items() if tokens <= 4096}) == 24
    assert most_tokens(64) is None
    assert most_tokens((1 << 16) + 1) is None


@functools.cache
def experts() -> tuple[jmm.MarlinWeights, jmm.MarlinWeights]:
    keys = jax.random.split(jax.random.key(0))
    shapes = (EXPERTS, HIDDEN, 2 * INTERMEDIATE), (EXPERTS, INTERMEDIATE, HIDDEN)
    dense = [jax.random.normal(key, s, jnp.bfloat16) / s[1] ** 0.5 for key, s in zip(keys, shapes, strict=True)]
    return tuple(jmm.quantize(w, "int4", group_size=128) for w in dense)


def operands(tokens: int) -> tuple:
    keys = jax.random.split(jax.random.key(tokens), 3)
    ids = jnp.argsort(jax.random.uniform(keys[0], (tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(jnp.int32)
    ids = jnp.where(jax.random.uniform(keys[1], ids.shape) < 0.05, -1, ids)
    weights = jax.random.uniform(keys[1], ids.shape, jnp.float32, 0.5, 1.5)
    return jax.random.normal(keys[2], (tokens, HIDDEN), jnp.bfloat16), *experts(), weights, ids


def block(*arguments):
    return jmm.fused_moe(*arguments, implementation="cuda")


def layer_of(arguments: tuple, **options) -> jax.Array:
    """A layer with these experts, whose router reads its rows from the first of them."""
    x, gate_up, down, *_ = arguments
    router = jax.random.normal(jax.random.key(9), (HIDDEN, EXPERTS), jnp.bfloat16) / HIDDEN**0.5
    layer = jmm.MoELayer(gate_up, down, router, jmm.Routing(top_k=TOP_K, **options))
    return layer(x, implementation="cuda")


def sources(tokens: int, call=lambda arguments: block(*arguments)) -> list[str]:
    found = []

    def recorded(source: str, architecture: str) -> bytes:
        found.append(source)
        return b"not compiled"

    abstract = jax.eval_shape(lambda: operands(tokens))
    with mock.patch.object(compiler, "compile_cubin", recorded):
        jax.jit(call).trace(abstract).lower(lowering_platforms=("cuda",))
    return found


def test_numbers_of_a_range_have_one_program(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    assert sources(513) == sources(600) == sources(640)
    assert sources(640) != sources(641)
    assert sources(60) != sources(61)


@pytest.mark.parametrize("apply_on_input", [False, True])
def test_layers_of_a_range_have_one_program(apply_on_input, monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")

    def call(arguments):
        return layer_of(arguments, apply_on_input=apply_on_input)

    assert sources(513, call) == sources(600, call) != sources(641, call)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [513, 600, 640])
def test_every_number_of_a_range_has_the_result_of_its_own_program(tokens, monkeypatch):
    arguments = operands(tokens)
    shared = jax.jit(block)(*arguments)
    expected = jmm.fused_moe(*arguments, implementation="xla")
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (shared, expected)), atol=0.05, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("apply_on_input", [False, True])
def test_a_layer_of_a_range_has_the_result_of_its_rows_alone(apply_on_input):
    """640 tokens have the program of 513, and a token's choice does not depend on the others."""
    arguments = operands(640)

    def call(arguments):
        return layer_of(arguments, apply_on_input=apply_on_input)

    whole = np.asarray(jax.jit(call)(arguments), np.float32)
    some = np.asarray(jax.jit(call)((arguments[0][:513], *arguments[1:])), np.float32)
    np.testing.assert_array_equal(some, whole[:513])


@pytest.mark.gpu
def test_rows_that_are_not_those_of_one_number_of_tokens_are_refused():
    x, gate_up, down, weights, ids = operands(600)
    calls = []

    def recorded(op, given, results, plan, architecture):
        calls.append((given, results, plan, architecture))
        return program.call_program(op, given, results, plan, architecture)

    with mock.patch("jax_marlin_moe.ops.fused_moe.call_program", recorded):
        jax.jit(block).trace(x, gate_up, down, weights, ids).lower()
    ((_, results, plan, architecture),) = calls
    results = [*results, *plan.scratch]
    leaves = [x, *jax.tree.leaves(gate_up), *jax.tree.leaves(down), weights, ids]
    present = [place for place, operand in enumerate(calls[0][0]) if operand is not None]
    assert len(leaves) == len(present)

    def called(**other: int):
        """The program with as many rows of its operands as are named by their places."""
        by_place = dict(zip(present, leaves, strict=True))
        by_place |= {int(name[1:]): by_place[int(name[1:])][:rows] for name, rows in other.items()}
        given = [by_place.get(place) for place in range(len(calls[0][0]))]
        cubin = compiler.compile_cubin(plan.source, architecture)
        contract = program._contract([*calls[0][0], *results], plan.kernels, plan.counted)
        names = " ".join(kernel.name for kernel in plan.kernels)
        fingerprint = np.int64(native.fingerprint(cubin, contract.tobytes(), names))
        attributes = {"contract": contract, "kernels": names, "fingerprint": fingerprint}
        run = jax.jit(
            lambda arrays: custom_call(
                "fused_moe",
                native.TARGETS["program", "cuda"],
                arrays,
                results,
                cubin=np.frombuffer(cubin, np.uint8),
                **attributes,
            )
        )
        return run([array for array in given if array is not None])

    first = present[0]
    jax.block_until_ready(called())
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rows for each of the call's 599 tokens"):
        jax.block_until_ready(called(**{f"p{first}": 599}))
