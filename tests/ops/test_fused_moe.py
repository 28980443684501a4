"""`fused_moe` on every platform against float64 numpy, and the properties that hold whatever the numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_cases import Case, make_call
from oracle import assert_block_close, expert_block, random_routing, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.measure.models import MODELS

CASES = [
    Case("ordinary"),
    Case("fp16", dtype="float16", scale_dtype="float16"),
    Case("bf16 rows, fp16 scales", scale_dtype="float16"),
    Case("fp16 rows, bf16 scales", dtype="float16"),
    *(Case(f"groups of {g}", hidden=256, inner=256, group_size=g, down_group_size=g) for g in (16, 32, 128)),
    *(
        Case(
            f"zero points, groups of {g}",
            group_size=g,
            down_group_size=g,
            weight_format="int4_zp",
            down_format="int4_zp",
        )
        for g in (16, 32, 64)
    ),
    Case("zero points, fp16", weight_format="int4_zp", down_format="int4_zp", dtype="float16", scale_dtype="float16"),
    Case("one group", group_size=None, down_group_size=None),
    Case("formats of their own", group_size=None, weight_format="int4_zp", down_group_size=16),
    *(Case(f"top {t}", top_k=t, experts=11, tokens=20) for t in (1, 3, 4, 5, 6, 7, 8, 9)),
    Case("one token", tokens=1),
    Case("one token, fp16, bias", tokens=1, dtype="float16", scale_dtype="float16", bias=True, weight_format="int4_zp"),
    Case("one token, holes", tokens=1, top_k=6, routing="holes"),
    Case("one token, the same expert again", tokens=1, top_k=4, routing="duplicates"),
    Case("one token, remote experts", tokens=1, experts=3, top_k=5, expert_map=(1, -1, 2, -1, 0)),
    Case("one slot", tokens=1, top_k=1, experts=1),
    Case("two tokens", tokens=2, experts=24),
    Case("many tokens", tokens=300),
    Case("no tokens", tokens=0),
    Case("seven experts", experts=7, top_k=3),
    Case("empty experts", routing="few", experts=9),
    Case("one expert takes all", routing="one", tokens=70),
    Case("one expert takes all of few", routing="one", tokens=64),
    Case("the same expert again", routing="duplicates", top_k=3),
    Case("ids that name nobody", routing="holes", top_k=4),
    Case("remote experts", experts=4, expert_map=(-1, 2, 0, -1, 3, -1, 1, -1), top_k=4),
    Case("remote experts and holes", experts=3, expert_map=(1, -1, 2, -1, 0), routing="holes", top_k=3, bias=True),
    Case("many tokens, remote experts and holes", 80, 3, 3, expert_map=(1, -1, 2, -1, 0), routing="holes"),
    Case("bias", bias=True),
    Case("minimum tile", hidden=64, inner=64),
    Case("an inner extent of 192", inner=192, hidden=320),
    Case("rows in orders of their own", reordered=True),
    Case("row orders, one token", reordered=True, tokens=1, top_k=4),
    Case("row orders, one choice", reordered=True, top_k=1),
    Case("row orders, remote experts", reordered=True, experts=3, expert_map=(1, -1, 2, -1, 0), routing="holes"),
    Case("row orders, no tokens", reordered=True, tokens=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block(platform, case):
    call = make_call(case, platform)
    y = call.run()
    assert y.dtype == jnp.dtype(case.dtype)
    assert_block_close(y, call.expected())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES[::9], ids=lambda case: case.name)
def test_reference_block(case):
    call = make_call(case, "xla")
    assert_block_close(call.run(), call.expected())


def test_traced_maps_past_the_last_expert_name_experts_that_live_elsewhere(platform):
    call = make_call(Case("", experts=3, expert_map=(0, 3, 2, 100, 1), top_k=3), platform)
    y = jax.jit(lambda expert_map: call.run(expert_map=expert_map))(call.options["expert_map"])
    assert_block_close(y, call.expected())


def test_tokens_that_nobody_serves_are_zero(platform):
    call = make_call(Case("", top_k=2), platform)
    call.ids[5:9] = -1
    y = np.asarray(call.run())
    assert not y[5:9].any()
    assert_block_close(y, call.expected())


def test_experts_of_two_devices_add_up(platform):
    """Expert parallelism: each device maps the others' experts to -1 and the results are summed."""
    call = make_call(Case("", experts=6, top_k=3, dtype="float16", scale_dtype="float16"), platform)
    total = np.zeros(call.expected().shape)
    for local in ([4, 1, 0], [2, 3, 5]):
        expert_map = np.full(6, -1, np.int32)
        expert_map[local] = np.arange(3)
        shard = [
            jax.tree.map(lambda leaf, local=local: leaf[np.asarray(local)], w.packed())
            for w in (call.gate_up, call.down)
        ]
        total += np.asarray(
            jmm.fused_moe(call.x, *shard, call.router, call.ids, expert_map=expert_map, implementation=platform)
        ).astype(np.float64)
    assert_block_close(total.astype(np.float32).astype(np.float16), call.expected())


def test_two_runs_give_the_same_bits(platform):
    call = make_call(Case("", tokens=70, routing="one", top_k=4), platform)
    run = jax.jit(call.run)
    first = np.asarray(run())
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(run()).view(np.uint16), first.view(np.uint16))


def test_a_token_does_not_depend_on_its_company():
    """The CPU kernels promise it bit for bit."""
    with jax.default_device(jax.devices("cpu")[0]):
        call = make_call(Case("", tokens=40, routing="few"), "cpu")
        together = np.asarray(call.run())
        for token in (0, 17, 39):
            one = slice(token, token + 1)
            alone = dataclasses.replace(call, x=call.x[one], router=call.router[one], ids=call.ids[one]).run()
            np.testing.assert_array_equal(np.asarray(alone)[0].view(np.uint16), together[token].view(np.uint16))


@pytest.mark.parametrize("reordered", [False, True])
def test_many_tokens_take_several_passes(reordered):
    """The CPU block holds 2^24 float32 results at most: 512 tokens of this width, then the next pass."""
    with jax.default_device(jax.devices("cpu")[0]):
        call = make_call(Case("", tokens=520, top_k=8, experts=8, hidden=4096, inner=64, reordered=reordered), "cpu")
        y = np.asarray(call.run())
        ends = np.asarray([0, 511, 512, 519])
        picked = dataclasses.replace(call, x=call.x[ends], router=call.router[ends], ids=call.ids[ends])
        np.testing.assert_array_equal(np.asarray(picked.run()).view(np.uint16), y[ends].view(np.uint16))
        assert_block_close(y[ends], picked.expected())


@pytest.mark.parametrize("tokens", [1, 20])
def test_an_expert_that_nobody_chose_may_hold_anything(platform, tokens):
    call = make_call(Case("", tokens=tokens, routing="few", experts=9), platform)
    unused = np.setdiff1d(np.arange(9), call.ids)
    assert unused.size >= 7
    poisoned = [
        dataclasses.replace(w, scales=w.scales.at[unused].set(jnp.nan))
        for w in (call.gate_up.packed(), call.down.packed())
    ]
    y = jmm.fused_moe(call.x, *poisoned, call.router, call.ids, implementation=platform)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(call.run()))


def test_a_poisoned_token_stays_alone(platform):
    call = make_call(Case("", tokens=20), platform)
    x = call.x.copy()
    x[7] = np.nan
    y = np.asarray(dataclasses.replace(call, x=x).run())
    assert np.isnan(y[7].astype(np.float32)).all()
    others = np.arange(20) != 7
    np.testing.assert_array_equal(y[others], np.asarray(call.run())[others])


def test_dropped_slots_do_not_read_their_weight(platform):
    """A router weight of NaN at a dropped slot is not multiplied into anything."""
    call = make_call(Case("", routing="holes", top_k=4), platform)
    dropped = (call.ids < 0) | (call.ids >= 6)
    assert dropped.any()
    router = np.where(dropped, np.float32(np.nan), call.router)
    np.testing.assert_array_equal(np.asarray(dataclasses.replace(call, router=router).run()), np.asarray(call.run()))


def test_saturated_gates(platform):
    """silu of large magnitudes: the gate passes, or nothing does; never NaN."""
    call = make_call(Case("", dtype="float16", scale_dtype="float16", top_k=1), platform)
    gate_up = dataclasses.replace(call.gate_up, scales=(call.gate_up.scales * np.float16(64)))
    down = dataclasses.replace(call.down, scales=(call.down.scales / np.float16(64)))
    call = dataclasses.replace(call, gate_up=gate_up, down=down)
    y = np.asarray(call.run())
    assert np.isfinite(y).all()
    assert_block_close(y, call.expected())


@pytest.mark.parametrize("case", [Case("plain"), Case("row orders", reordered=True, tokens=5), Case("one", tokens=1)])
def test_vmap_over_tokens_is_a_loop(platform, case):
    first = make_call(case, platform)
    rng = np.random.default_rng(1)
    calls = [first]
    for _ in range(2):
        router, ids = random_routing(rng, case.tokens, case.top_k, case.experts)
        calls.append(
            dataclasses.replace(
                first, x=random_rows(rng, case.tokens, case.hidden, first.x.dtype), router=router, ids=ids
            )
        )
    gate_up, down = first.gate_up.packed(), first.down.packed()
    xs, routers, ids = (np.stack([getattr(call, name) for call in calls]) for name in ("x", "router", "ids"))
    block = jax.vmap(lambda x, w, i: jmm.fused_moe(x, gate_up, down, w, i, implementation=platform))
    for y, call in zip(block(xs, routers, ids), calls, strict=True):
        assert_block_close(y, call.expected())
    # Two levels of batching, as a sequence of a batch has.
    twice = jax.vmap(block)(xs[None], routers[None], ids[None])
    assert twice.shape == (1, 3, case.tokens, case.hidden)
    assert_block_close(twice[0, 2], calls[2].expected())


def test_vmap_over_rows_alone_is_a_loop(platform):
    call = make_call(Case("", tokens=5), platform)
    gate_up, down = call.gate_up.packed(), call.down.packed()
    xs = np.stack([call.x, -call.x], axis=1)
    batched = jax.vmap(
        lambda x: jmm.fused_moe(x, gate_up, down, call.router, call.ids, implementation=platform), in_axes=1
    )(xs)
    assert_block_close(batched[0], call.expected())
    assert_block_close(batched[1], dataclasses.replace(call, x=-call.x).expected())


def test_vmap_over_maps_is_a_loop(platform):
    call = make_call(Case("", tokens=5, experts=3, expert_map=(0, 1, 2, -1, -1)), platform)
    gate_up, down = call.gate_up.packed(), call.down.packed()
    maps = np.asarray([[0, 1, 2, -1, -1], [-1, -1, 0, 1, 2]], np.int32)
    batched = jax.vmap(
        lambda m: jmm.fused_moe(call.x, gate_up, down, call.router, call.ids, expert_map=m, implementation=platform)
    )(maps)
    for y, expert_map in zip(batched, maps, strict=True):
        assert_block_close(y, dataclasses.replace(call, options={"expert_map": expert_map}).expected())


def test_the_program_holds_our_call(platform):
    call = make_call(CASES[0], platform)
    text = (
        jax.jit(lambda *arguments: jmm.fused_moe(*arguments))
        .lower(call.x, call.gate_up.packed(), call.down.packed(), call.router, call.ids)
        .as_text()
    )
    target = {"cpu": native.TARGETS["fused_moe", "cpu"], "cuda": native.TARGETS["program", "cuda"]}[platform]
    assert text.count(f"@{target}") == 1
    assert "dot_general" not in text  # of the reference


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("reordered", [False, True])
def test_numpy_arrays_under_jit(implementation, reordered):
    """Weights and maps that a jitted function closes over may be numpy arrays."""
    case = Case("", tokens=5, experts=3, expert_map=(1, -1, 2, -1, 0), reordered=reordered)
    call = make_call(case, implementation)
    weights = jax.tree.map(np.asarray, (call.gate_up.packed(), call.down.packed()))
    y = jax.jit(lambda x, router, ids: jmm.fused_moe(x, *weights, router, ids, **call.options))(
        call.x, call.router, call.ids
    )
    assert_block_close(y, call.expected())


def test_block_inside_a_larger_program(platform):
    """Router, block and residual under one jit, twice over: the call is one op among others."""
    call = make_call(Case("", top_k=2, experts=6), platform)
    gate_up, down = call.gate_up.packed(), call.down.packed()
    router = np.random.default_rng(2).normal(size=(128, 6)).astype(np.float32) / 11

    @jax.jit
    def model(x):
        for _ in range(2):
            weights, ids = jmm.route(x.astype(jnp.float32) @ router, top_k=2)
            x = x + jmm.fused_moe(x, gate_up, down, weights, ids)
        return x

    x = call.x
    for _ in range(2):
        weights, ids = jmm.route(jnp.asarray(x, jnp.float32) @ router, top_k=2)
        y = expert_block(x, call.gate_up, call.down, np.asarray(weights), np.asarray(ids))
        x = (x.astype(np.float64) + y).astype(x.dtype)
    difference = np.abs(np.asarray(model(call.x)).astype(np.float64) - x.astype(np.float64))
    # A router that changes its mind over a rounding moves a whole token; nearly all must agree.
    assert (difference.max(1) < 0.1).mean() > 0.9


@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_a_layer_of_a_model_scaled_down(platform, shape):
    """The shape of each model with its ratios kept: experts and extents divided, top_k as it is."""
    case = Case(
        shape.name,
        tokens=3,
        top_k=shape.top_k,
        experts=max(shape.num_experts // 8, shape.top_k),
        hidden=64 * max(1, shape.hidden // 1024),
        inner=64 * max(1, shape.intermediate // 1024),
    )
    call = make_call(case, platform)
    assert_block_close(call.run(), call.expected())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_what_memory_held_before_stays_out(tokens):
    """Scratch and results land in memory that held NaN."""
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(Case("", tokens=tokens, top_k=4, routing="holes"), "cuda")
        run, expected = jax.jit(call.run), call.expected()
        run()
        for _ in range(5):
            jax.block_until_ready(jnp.full((1 << 26,), jnp.nan)).delete()
            assert_block_close(run(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
@pytest.mark.parametrize("loops", [False, True])
def test_a_call_waits_for_what_was_just_written(tokens, loops):
    """Rows, router weights and ids come from the kernels right before it, under command buffers too."""
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(Case("", tokens=tokens, hidden=1024, top_k=4, experts=8), "cuda")
        gate_up, down = (jax.tree.map(jnp.asarray, w.packed()) for w in (call.gate_up, call.down))

        def step(n, rows):  # nothing in here rounds but the block
            router, ids = jnp.roll(call.router, n, axis=0), (jnp.asarray(call.ids) + n) % 8
            y = jmm.fused_moe(rows, gate_up, down, router, ids, implementation="cuda")
            return jnp.clip(jnp.roll(-y, 1, axis=1), -2, 2)

        def chain(rows):
            return (
                jax.lax.fori_loop(0, 30, step, rows)
                if loops
                else functools.reduce(lambda r, n: step(n, r), range(30), rows)
            )

        apart = jax.device_put(call.x)
        for n in range(30):
            apart = jax.block_until_ready(jax.jit(step)(n, apart))
        together = [jax.jit(chain)(call.x) for _ in range(5)]
    for rows in together:
        np.testing.assert_array_equal(np.asarray(rows).view(np.uint16), np.asarray(apart).view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_a_layer_of_qwen3_30b(tokens):
    shape = MODELS["qwen3-30b-a3b"]
    case = Case(
        shape.name,
        tokens=tokens,
        top_k=shape.top_k,
        experts=shape.num_experts,
        hidden=shape.hidden,
        inner=shape.intermediate,
        group_size=shape.group_size,
        down_group_size=shape.group_size,
    )
    call = make_call(case, "cuda")
    # Only the experts that were hit: float64 copies of all 128 would take ten gigabytes.
    hit, local = np.unique(call.ids, return_inverse=True)
    hit = hit[:16]
    call = dataclasses.replace(call, ids=np.where(local < 16, hit[np.minimum(local, 15)], -1).reshape(call.ids.shape))
    call = dataclasses.replace(call, ids=call.ids.astype(np.int32))
    kept = [dataclasses.replace(w, codes=w.codes[hit], scales=w.scales[hit]) for w in (call.gate_up, call.down)]
    renumbered = np.where(call.ids >= 0, np.searchsorted(hit, call.ids), -1)
    assert_block_close(call.run(), expert_block(call.x, *kept, call.router, renumbered))
