"""Sharded operands under plain `jit` on two cards: as on one, without a gather of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm

EXPERTS, HIDDEN, INNER, TOP_K = 16, 512, 256, 4
WHERE = {"tokens": (P("cards"), P()), "experts": (P(), P("cards")), "both": (P("cards"), P("cards"))}
ONCE = {"tokens": (), "experts": ("all-reduce",), "both": ("all-gather", "reduce-scatter")}


@functools.cache
def cards():
    try:
        return len(jax.devices("cuda"))
    except RuntimeError:
        return 0


@functools.cache
def weights():
    keys = jax.random.split(jax.random.key(0), 2)
    gate_up = jmm.quantize(jax.random.normal(keys[0], (EXPERTS, HIDDEN, 2 * INNER)) * HIDDEN**-0.5, "int4")
    return gate_up, jmm.quantize(jax.random.normal(keys[1], (EXPERTS, INNER, HIDDEN)) * INNER**-0.5, "nvfp4")


def rows(tokens):
    x = jax.random.normal(jax.random.key(tokens), (tokens, HIDDEN), jnp.bfloat16)
    return (x, *jmm.route(jax.random.normal(jax.random.key(1), (tokens, EXPERTS)), top_k=TOP_K))


def block(x, w, ids, gate_up, down):
    return jmm.fused_moe(x, gate_up, down, w, ids, implementation="cuda")


def gradients(x, w, ids, gate_up, down):
    y, pull = jax.vjp(lambda x, w: block(x, w, ids, gate_up, down), x, w)
    return pull(y)


def error(ours, wanted):
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)


@pytest.mark.gpu
@pytest.mark.skipif("cards() < 2", reason="it needs two cards")
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("tokens", [4, 64, 1024])
def test_two_cards_agree_with_one(tokens, where, axes):
    mesh = jax.make_mesh((2,), ("cards",), axis_types=(axes,), devices=jax.devices("cuda")[:2])
    of_tokens, of_experts = (NamedSharding(mesh, spec) for spec in WHERE[where])
    with jax.set_mesh(mesh):
        placed = *jax.device_put(rows(tokens), of_tokens), *jax.device_put(weights(), of_experts)
        compiled = jax.jit(block).lower(*placed).compile()
        y = compiled(*placed)
        found = jax.jit(gradients)(*placed)
    text = compiled.as_text()
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"):
        assert (f" {kind}(" in text or f" {kind}-start(" in text) == (kind in ONCE[where]), kind
    assert error(y, jax.jit(block)(*rows(tokens), *weights())) < 5e-3
    for ours, wanted in zip(found, jax.jit(gradients)(*rows(tokens), *weights()), strict=True):
        assert error(ours, wanted) < 1e-2
