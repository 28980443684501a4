"""Over two cards or four: sharded operands under plain `jit`, without a gather of weights, and recipes; as on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_marlin_moe as jmm
from jax_marlin_moe.sharding import MoESharding, parallel_layer, partition_specs, place, tensor_parallel

EXPERTS, HIDDEN, INNER, TOP_K = 16, 512, 256, 4
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WHERE = {"tokens": (P("cards"), P()), "experts": (P(), P("cards")), "both": (P("cards"), P("cards"))}
MANY = 4096  # so many rows that their sums have parts
COLLECTIVES = {"tokens": set(), "experts": {"all-reduce"}, "both": {"all-gather", "reduce-scatter"}}
RECIPES = {
    "ep": ("expert", "", {}),
    "ep, gather": ("expert", "", {"tokens": "cards"}),
    "ep, ragged": ("expert", "", {"tokens": "cards", "exchange": "ragged"}),
    "tp": ("", "tensor", {}),
    "tp, gather": ("", "tensor", {"tokens": "cards"}),
}


@functools.cache
def cards():
    try:
        return 4 if len(jax.devices("cuda")) >= 4 else len(jax.devices("cuda"))
    except RuntimeError:
        return 0


pytestmark = [pytest.mark.gpu, pytest.mark.skipif("cards() < 2", reason="it needs two cards")]


def mesh(kind=AUTO):
    return jax.make_mesh((cards(),), ("cards",), axis_types=(kind,), devices=jax.devices("cuda")[: cards()])


@functools.cache
def weights():
    keys = jax.random.split(jax.random.key(0), 2)
    gate_up = jmm.quantize(jax.random.normal(keys[0], (EXPERTS, HIDDEN, 2 * INNER)) * HIDDEN**-0.5, "int4")
    return gate_up, jmm.quantize(jax.random.normal(keys[1], (EXPERTS, INNER, HIDDEN)) * INNER**-0.5, "nvfp4")


@functools.cache
def layer():
    router = jax.random.normal(jax.random.key(2), (HIDDEN, EXPERTS)) * HIDDEN**-0.5
    return jmm.MoELayer(*weights(), router, jmm.Routing(TOP_K))


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


def collectives(compiled):
    kinds = "ragged-all-to-all|all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text()))


def of_many_rows():
    """What brings large shares to their sum: two cards swap them, more get parts, whose sums are gathered rounded."""
    return {"collective-permute"} if cards() == 2 else {"all-gather", "all-to-all"}


@pytest.mark.parametrize(
    ("tokens", "where", "axes"),
    [(tokens, where, AUTO) for tokens in (8, 64, 1024) for where in WHERE]
    + [(64, where, EXPLICIT) for where in WHERE]
    + [(MANY, "experts", AUTO), (MANY, "experts", EXPLICIT)],
)
def test_two_cards_agree_with_one(tokens, where, axes):
    on_cards = mesh(axes)
    of_tokens, of_experts = (NamedSharding(on_cards, spec) for spec in WHERE[where])
    with jax.set_mesh(on_cards):
        placed = *jax.device_put(rows(tokens), of_tokens), *jax.device_put(weights(), of_experts)
        compiled = jax.jit(block).lower(*placed).compile()
        y = compiled(*placed)
        found = jax.jit(gradients)(*placed)
    assert collectives(compiled) == (of_many_rows() if (tokens, where) == (MANY, "experts") else COLLECTIVES[where])
    assert error(y, jax.jit(block)(*rows(tokens), *weights())) < 5e-3
    for ours, other in zip(found, jax.jit(gradients)(*rows(tokens), *weights()), strict=True):
        assert error(ours, other) < 1e-2


@pytest.mark.parametrize("tokens", [8, 1024])
def test_columns_of_gate_and_up_in_shares_agree_with_one_card(tokens):
    on_cards = mesh()
    matrices = tensor_parallel(*weights(), cards())
    specs = [partition_specs(matrix, over, "cards") for matrix, over in zip(matrices, ("columns", "rows"), strict=True)]
    placed = [
        jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(on_cards, spec)), matrix, spec)
        for matrix, spec in zip(matrices, specs, strict=True)
    ]
    operands = *jax.device_put(rows(tokens), NamedSharding(on_cards, P())), *placed
    compiled = jax.jit(block).lower(*operands).compile()
    assert collectives(compiled) == {"all-reduce"}
    assert error(compiled(*operands), jax.jit(block)(*rows(tokens), *weights())) < 5e-3


@pytest.mark.parametrize(
    ("recipe", "tokens"),
    [(recipe, tokens) for recipe in RECIPES for tokens in (8, 1024)] + [("ep", MANY), ("ep, gather", MANY)],
)
def test_recipes_on_two_cards_agree_with_one(recipe, tokens):
    expert, tensor, options = RECIPES[recipe]
    sharding = MoESharding(mesh(), expert=("cards",) if expert else (), tensor=("cards",) if tensor else ())
    x = rows(tokens)[0]

    def run(layer, x):
        y, pull = jax.vjp(lambda x: parallel_layer(layer, x, sharding, **options), x)
        return y, *pull(y)

    def one(layer, x):
        y, pull = jax.vjp(layer, x)
        return y, *pull(y)

    placed = jax.device_put(x, NamedSharding(sharding.mesh, P(options.get("tokens"))))
    found = jax.jit(run)(place(layer(), sharding), placed)
    for ours, other in zip(found, jax.jit(one)(layer(), x), strict=True):
        assert error(ours, other) < 1e-2


@pytest.mark.parametrize("option", [None, {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}])
def test_both_cards_have_the_same_bits_of_a_sum_of_large_shares(option):
    sharding = MoESharding(mesh(), expert="cards")
    x = jax.device_put(rows(MANY)[0], NamedSharding(sharding.mesh, P()))
    run = jax.jit(lambda layer, x: parallel_layer(layer, x, sharding), compiler_options=option)
    try:
        compiled = run.lower(place(layer(), sharding), x).compile()
    except jax.errors.JaxRuntimeError:
        if option is None:
            raise
        pytest.skip("this XLA does not copy between peers")
    assert collectives(compiled) == of_many_rows()
    first, *others = compiled(place(layer(), sharding), x).addressable_shards
    for other in others:
        np.testing.assert_array_equal(*(np.asarray(one.data).view(np.uint16) for one in (first, other)))
    assert error(first.data, layer()(rows(MANY)[0])) < 1e-2


def test_rows_are_sent_to_the_cards_of_their_experts_in_equal_blocks():
    sharding = MoESharding(mesh(), expert="cards")
    x = jax.device_put(rows(64)[0], NamedSharding(sharding.mesh, P("cards")))
    run = jax.jit(lambda layer, x: parallel_layer(layer, x, sharding, tokens="cards", exchange="ragged", capacity=40))
    placed = place(layer(), sharding)
    assert collectives(run.lower(placed, x).compile()) == {"all-gather", "all-to-all", "all-reduce"}
    y, dropped = run(placed, x)
    chosen = layer().route(rows(64)[0])[1]
    reached = [np.flatnonzero((np.asarray(chosen) // (EXPERTS // cards()) == card).any(1)) for card in range(cards())]
    missing = sum(
        int((np.asarray(chosen)[tokens[40:]] // (EXPERTS // cards()) == card).sum())
        for card, tokens in enumerate(reached)
    )
    assert int(dropped) == missing
    kept = np.setdiff1d(np.arange(64), np.concatenate([tokens[40:] for tokens in reached]))
    assert error(y[kept], layer()(rows(64)[0])[kept]) < 1e-2
