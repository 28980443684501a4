"""`moe_layer` on every platform: its choice against `route`, its result against float64 numpy, bad input by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import activate, assert_block_close, expert_block, random_experts

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.ops.layer_composition import composition
from jax_marlin_moe.shared_expert import split_like

HIDDEN, INNER, EXPERTS = 128, 64, 16
RULES = {
    "softmax": jmm.Routing(4),
    "as they are": jmm.Routing(2, renormalize=False),
    "capped": jmm.Routing(3, logits_soft_cap=2.0),
    "sigmoid": jmm.Routing(4, "sigmoid", scale=2.5),
    "top 2 of groups": jmm.Routing(3, "sigmoid", num_groups=4, top_groups=2, scale=2.5),
    "best of groups": jmm.Routing(4, num_groups=8, top_groups=3, group_score="max", renormalize=False, scale=16.0),
    "sqrtsoftplus": jmm.Routing(5, "sqrtsoftplus"),
    "softmax of the chosen": jmm.Routing(4, "identity", softmax_after_topk=True),
    "identity": jmm.Routing(2, "identity", renormalize=False),
    "on the input": jmm.Routing(2, "sigmoid", renormalize=False, apply_on_input=True),
    "chosen sigmoids": jmm.Routing(2, "chosen_sigmoid", renormalize=False, apply_on_input=True),
    "sparsemixer": jmm.Routing(2, "sparsemixer", renormalize=False, jitter=0.3),
    "identity experts": jmm.Routing(6, renormalize=False, scale=3.0, identity_experts=5),
    "everybody": jmm.Routing(16, num_groups=2, top_groups=2),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer. The defaults are an ordinary one; each case says where it differs."""

    name: str
    rule: str = "softmax"
    tokens: int = 9
    dtype: str = "bfloat16"
    router_dtype: str = "bfloat16"
    vectors: tuple[str, ...] = ()
    shared: str | None = None
    shared_experts: int = 1
    gated: bool = False
    given: bool = False
    own_input: str | None = None
    expert_map: bool = False
    reordered: bool = False
    weight_format: str = "int4"
    group_size: int = 32
    bias: bool = False


CASES = [
    *(Case(rule, rule) for rule in RULES),
    *(Case(f"biased, {rule}", rule, vectors=("correction_bias",)) for rule in ("top 2 of groups", "sqrtsoftplus")),
    Case("one token", "top 2 of groups", tokens=1, vectors=("correction_bias",), router_dtype="float32"),
    Case("a float32 router", router_dtype="float32", tokens=40),
    Case("a float16 router and bfloat16 rows", router_dtype="float16"),
    Case("a bfloat16 router and float16 rows", dtype="float16"),
    Case("all vectors", "sigmoid", vectors=("router_bias", "correction_bias", "expert_scale"), dtype="float16"),
    Case("given experts", "sqrtsoftplus", given=True),
    Case("rows of its own, normed", vectors=("expert_scale", "router_input_scale"), own_input="bfloat16"),
    Case("rows of its own in float32", own_input="float32", tokens=40),
    Case("many rows, normed", vectors=("expert_scale", "router_input_scale"), router_dtype="float32", tokens=600),
    Case("normed rows and a gate", vectors=("router_input_scale",), shared="alike", gated=True),
    Case("rows of its own, and a shared expert", own_input="float16", shared="alike", dtype="float16"),
    Case("experts elsewhere", "sigmoid", expert_map=True),
    Case("identity experts and others elsewhere", "identity experts", expert_map=True),
    Case("identity experts and a shared one", "identity experts", shared="alike", vectors=("correction_bias",)),
    Case("sparsemixer of many rows", "sparsemixer", tokens=600),
    Case("experts elsewhere, and a shared one", "sigmoid", expert_map=True, shared="alike"),
    Case("a shared expert", "sigmoid", shared="alike", tokens=40),
    Case("a shared expert beside 120 slots", shared="alike", tokens=30),
    Case("a shared expert and many tokens", "sigmoid", shared="alike", tokens=700, vectors=("correction_bias",)),
    Case("a shared expert with global scales", shared="alike", weight_format="nvfp4", group_size=16),
    Case("a shared expert with a gate", shared="alike", gated=True, router_dtype="float32"),
    Case("two shared experts with a gate", shared="alike", shared_experts=2, gated=True),
    Case("a shared expert of another format", shared="int8", gated=True),
    Case("a wider shared expert", shared="wide"),
    Case("a dense shared expert", shared="dense", gated=True, dtype="float16"),
    Case("a shared expert, weights on the input", "on the input", shared="alike"),
    Case("a gated shared expert, weights on the input of many rows", "on the input", 600, shared="alike", gated=True),
    Case("biases", shared="alike", bias=True, weight_format="int4_zp"),
    Case("a row order", reordered=True, shared="alike", gated=True),
    Case("a scaled input of the experts", vectors=("expert_input_scale",), tokens=40),
    Case(
        "a scaled input beside rows of its own", vectors=("expert_input_scale",), own_input="float32", dtype="float16"
    ),
    Case("a scaled input and a shared expert", vectors=("expert_input_scale",), shared="alike", gated=True),
    Case("a scaled input and identity experts", "identity experts", vectors=("expert_input_scale",)),
    Case("a scaled input, weights on it", "on the input", shared="alike", vectors=("expert_input_scale",)),
    Case("no tokens", tokens=0, shared="alike"),
]


def make(case):
    """x, the arguments of `moe_layer`, and what goes into them: experts of the oracle and float64 logits."""
    rng = np.random.default_rng(sum(map(ord, case.name)))
    identity = RULES[case.rule].identity_experts
    routed_experts = EXPERTS - identity
    experts = 3 * routed_experts // 4 if case.expert_map else routed_experts

    def stack(count, k, n, **options):
        usual = {"weight_format": case.weight_format, "group_size": case.group_size, "bias": case.bias}
        return random_experts(rng, count, k, n, **(usual | options))

    routed = stack(experts, HIDDEN, 2 * INNER, reordered=case.reordered), stack(experts, INNER, HIDDEN)
    x = jnp.asarray(rng.normal(size=(case.tokens, HIDDEN)), case.dtype)
    router = jnp.asarray(rng.normal(size=(HIDDEN, EXPERTS)) * HIDDEN**-0.5, case.router_dtype)
    options = {"routing": RULES[case.rule]}
    lengths = {"router_input_scale": HIDDEN, "expert_input_scale": HIDDEN}
    for vector in case.vectors:
        options[vector] = jnp.asarray(rng.normal(size=lengths.get(vector, EXPERTS)), jnp.float32)
    if case.own_input:
        options["router_input"] = jnp.asarray(rng.normal(size=x.shape), case.own_input)
    if case.given:
        ids = np.argsort(rng.random((case.tokens, EXPERTS)), axis=1)[:, : RULES[case.rule].top_k]
        options["topk_ids"] = jnp.asarray(ids, jnp.int32)
    if case.expert_map:
        local = rng.permutation(routed_experts)
        options["expert_map"] = jnp.asarray(np.where(local < experts, local, -1), jnp.int32)
    shared = None
    if case.shared == "dense":
        dense = rng.normal(size=(HIDDEN, 2 * 96)) * HIDDEN**-0.5, rng.normal(size=(96, HIDDEN)) * 96**-0.5
        shared = tuple(jnp.asarray(matrix, case.dtype) for matrix in dense)
    elif case.shared:
        inner = 2 * INNER if case.shared == "wide" else INNER
        kind = {"weight_format": "int8"} if case.shared == "int8" else {}
        shared = (
            stack(case.shared_experts, HIDDEN, 2 * inner, **kind),
            stack(case.shared_experts, inner, HIDDEN, **kind),
        )
    gate = jnp.asarray(rng.normal(size=(HIDDEN, 1)) * HIDDEN**-0.5, case.router_dtype) if case.gated else None
    if shared is not None:
        matrices = shared if case.shared == "dense" else [matrix.packed() for matrix in shared]
        options["shared"] = jmm.SharedExpert(*matrices, gate)
    return x, router, routed, shared, gate, options


def call(case, x, router, routed, options, **more):
    return jmm.moe_layer(x, router, *(matrix.packed() for matrix in routed), **options, **more)


def expected_choice(x, router, options):
    """The choice of `route`, on exact logits."""
    rows = np.asarray(options.get("router_input", x)).astype(np.float64)
    if "router_input_scale" in options:
        rows = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + 1e-6)
        rows = rows * np.asarray(options["router_input_scale"]) / HIDDEN**0.5
    logits = rows @ np.asarray(router).astype(np.float64)
    if "router_bias" in options:
        logits += np.asarray(options["router_bias"])
    picked = {name: options[name] for name in ("correction_bias", "expert_scale") if name in options}
    rule = options["routing"].options()
    return jmm.route(jax.device_put(np.asarray(logits, np.float32)), **rule, **picked, ids=options.get("topk_ids"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, platform):
    x, router, routed, shared, gate, options = make(case)
    y, weights, ids = call(case, x, router, routed, options, return_routing=True, implementation=platform)
    expected_weights, expected_ids = expected_choice(x, router, options)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-5, atol=1e-7)

    rows, chosen = np.asarray(x), np.asarray(expected_ids)
    scale = np.asarray(options.get("expert_input_scale", np.float32(1)))
    read = (rows.astype(np.float32) * scale).astype(rows.dtype)  # by the routed experts
    local = np.asarray(options["expert_map"]) if case.expert_map else None
    router_weights = np.asarray(expected_weights, np.float64)
    if RULES[case.rule].apply_on_input:
        slots = (read[:, None].astype(np.float32) * np.asarray(expected_weights)[..., None]).astype(rows.dtype)
        flat = slots.reshape(-1, HIDDEN)
        expected = expert_block(flat, *routed, np.ones((len(flat), 1)), chosen.reshape(-1, 1), expert_map=local)
        expected = expected.reshape(*chosen.shape, HIDDEN).sum(1)
    else:
        # Identity experts are behind all that the block knows: to it they are elsewhere.
        identity = chosen >= EXPERTS - RULES[case.rule].identity_experts
        known = np.where(identity, -1, chosen)
        expected = expert_block(read, *routed, router_weights, known, expert_map=local)
        expected = expected + rows.astype(np.float64) * (router_weights * identity).sum(1, keepdims=True)
    if shared is not None:
        if case.shared == "dense":
            h = rows.astype(np.float64) @ np.asarray(shared[0]).astype(np.float64)
            extra = activate(h).astype(rows.dtype).astype(np.float64) @ np.asarray(shared[1]).astype(np.float64)
        else:
            every = np.broadcast_to(np.arange(case.shared_experts), (case.tokens, case.shared_experts))
            extra = expert_block(rows, *shared, np.ones(every.shape), every)
        if gate is not None:
            extra = extra / (1 + np.exp(-rows.astype(np.float64) @ np.asarray(gate).astype(np.float64)))
        expected = expected + extra
    assert_block_close(y, expected)


ONE_CALL = [
    *(Case(rule, rule) for rule in RULES),
    Case("normed", vectors=("router_input_scale",)),
    Case("given", given=True),
    Case("an identity expert and a shared one", "identity experts", shared="alike"),
]


@pytest.mark.parametrize("case", ONE_CALL, ids=lambda case: case.name)
def test_every_rule_is_one_call_on_cpus_whatever_the_type_of_the_rows(case):
    x, router, routed, _, _, options = make(case)
    layer = jax.jit(lambda rows: call(case, rows, router, routed, options, implementation="cpu"))
    for rows in (x, x.astype(jnp.float32)):
        assert layer.lower(rows).as_text().count("custom_call @jax_marlin_moe") == 1


@pytest.mark.parametrize("rule", ["sigmoid", "on the input", "identity experts"])
def test_float32_rows_have_float32_results(rule, platform):
    case = Case("float32", rule, shared="wide", tokens=5)
    x, router, routed, _, _, options = make(case)
    y = call(case, x.astype(jnp.float32), router, routed, options, implementation=platform)
    assert y.dtype == jnp.float32
    rounded = call(case, x, router, routed, options, implementation=platform)
    np.testing.assert_allclose(np.asarray(rounded, np.float32), y, rtol=2**-8, atol=1e-6)


def test_a_million_choices_are_those_of_route_ties_included(platform):
    """Small integers make exact logits, so that there are ties, and every sum is exact."""
    rng = np.random.default_rng(0)
    tokens, hidden = (1 << 11, 64) if platform == "cpu" else (1 << 17, 64)
    x = jnp.asarray(rng.integers(-4, 5, (tokens, hidden)), jnp.bfloat16)
    router = jnp.asarray(rng.integers(-2, 3, (hidden, EXPERTS)) / 8, jnp.bfloat16)
    bias = jnp.asarray(rng.integers(-2, 3, EXPERTS) / 4, jnp.float32)
    experts = [
        jmm.quantize(jnp.zeros((EXPERTS, k, n)), "int4", group_size=64, scale_dtype=jnp.bfloat16)
        for k, n in ((hidden, 128), (64, hidden))
    ]
    logits = jnp.asarray(np.asarray(x, np.float32) @ np.asarray(router, np.float32))
    scored = {"sigmoid": jax.nn.sigmoid, "sqrtsoftplus": lambda values: jnp.sqrt(jax.nn.softplus(values))}
    for name, rule in RULES.items():
        if rule.identity_experts or rule.logits_soft_cap or (rule.scoring in scored and rule.apply_on_input):
            continue
        biased = {"correction_bias": bias} if rule.scoring in scored else {}
        options = {"routing": rule, "return_routing": True, "implementation": platform, **biased}
        _, _, ids = jmm.moe_layer(x, router, *experts, **options)
        _, expected = jmm.route(logits, **rule.options(), **biased)
        differ = np.flatnonzero((np.asarray(ids) != np.asarray(expected)).any(1))
        scores = scored[rule.scoring](logits) + bias if rule.scoring in scored else logits
        # Where the choice depends on how a sum or an exponential is rounded, both choices are worth the same.
        worth = [np.take_along_axis(np.asarray(scores)[differ], np.asarray(i)[differ], 1) for i in (ids, expected)]
        np.testing.assert_allclose(*worth, rtol=1e-6, err_msg=name)
        assert len(differ) <= tokens / 1000, name


@pytest.mark.gpu
@pytest.mark.parametrize("router_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("tokens", "experts"), [(5, 256), (60, 256), (200, 256), (700, 256), (1, 128), (61, 128), (12, 56), (3, 8)]
)
def test_routers_of_many_experts_choose_as_exact_logits_do(tokens, experts, router_dtype):
    """Every way in which the kernels cut a router; where the next score is close, either expert may be chosen.

    The experts compute what they do for these ids in a call of their own, bit by bit: the lists of slots are alike.
    """
    rng = np.random.default_rng(tokens)
    hidden, rule = 576, jmm.Routing(4, "sigmoid", num_groups=4, top_groups=2, scale=2.5)
    x = jnp.asarray(rng.normal(size=(tokens, hidden)), jnp.bfloat16)
    router = jnp.asarray(rng.normal(size=(hidden, experts)) * hidden**-0.5, router_dtype)
    bias = jnp.asarray(rng.normal(size=experts) / 8, jnp.float32)
    matrices = [
        jmm.quantize(jnp.asarray(rng.normal(size=(experts, k, n)) / k**0.5, jnp.float32), "int4", group_size=64)
        for k, n in ((hidden, 128), (64, hidden))
    ]
    options = {"routing": rule, "correction_bias": bias, "return_routing": True, "implementation": "cuda"}
    y, weights, ids = jmm.moe_layer(x, router, *matrices, **options)
    np.testing.assert_array_equal(y, jmm.fused_moe(x, *matrices, weights, ids, implementation="cuda"))
    expected_weights, expected = expected_choice(x, router, options)
    same = (np.asarray(ids) == np.asarray(expected)).all(1)
    assert same.mean() > 0.99
    np.testing.assert_allclose(np.asarray(weights)[same], np.asarray(expected_weights)[same], rtol=2e-5)


def test_rows_that_are_not_numbers_choose_distinct_experts_and_change_no_others(platform):
    normed = ("router_input_scale",)
    cases = [Case("faulty rows", "sqrtsoftplus", given=True), Case("faulty rows", vectors=normed)]
    rules = ("softmax", "top 2 of groups", "sparsemixer", "on the input", "identity experts")
    for case in (*cases, *(Case("faulty rows", rule) for rule in rules)):
        x, router, routed, _, _, options = make(case)
        options["return_routing"], options["implementation"] = True, platform
        fine = call(case, x, router, routed, options)
        bad = np.array(x)
        bad[[1, 4, 6, 6], [3, 0, 5, 6]] = np.nan, np.inf, -np.inf, np.inf
        y, weights, ids = call(case, jax.device_put(bad), router, routed, options)
        others = np.asarray([0, 2, 3, 5, 7, 8])
        for ours, untouched in zip((y, weights, ids), fine, strict=True):
            np.testing.assert_array_equal(np.asarray(ours)[others], np.asarray(untouched)[others])
        assert ((np.asarray(ids) >= 0) & (np.asarray(ids) < EXPERTS)).all()
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_the_layer_and_its_op_agree_on_every_implementation():
    case = Case("layers", "top 2 of groups", vectors=("correction_bias",), shared="alike", gated=True)
    x, router, routed, _, _, options = make(case)
    layer = jmm.MoELayer(
        *(matrix.packed() for matrix in routed),
        router,
        options["routing"],
        correction_bias=options["correction_bias"],
        shared=options["shared"],
    )
    y = layer(x.reshape(3, 3, HIDDEN), implementation="cpu").reshape(x.shape)
    np.testing.assert_array_equal(y, call(case, x, router, routed, options, implementation="cpu"))
    parts = [x, router, layer.gate_up, layer.down, layer.shared, None, layer.correction_bias, *[None] * 5]
    silu = get_activation("silu")
    static = {"routing": layer.routing, "activation": silu, "shared_activation": silu, "norm_epsilon": 1e-6}
    composed, weights, ids = composition(*parts, **static, implementation="cpu")
    np.testing.assert_allclose(np.asarray(composed, np.float32), np.asarray(y, np.float32), rtol=0.02, atol=0.02)
    expected_weights, expected_ids = layer.route(x)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(weights, expected_weights)


def test_derivatives_are_those_of_the_reference():
    case = Case("derivatives", "top 2 of groups", vectors=("correction_bias",), shared="alike", gated=True)
    x, router, routed, _, _, options = make(case)
    wish = jnp.asarray(np.random.default_rng(5).normal(size=x.shape), jnp.float32)

    def loss(x, router, gate, implementation):
        shared = dataclasses.replace(options["shared"], gate=gate)
        y = call(case, x, router, routed, options | {"shared": shared}, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32) * wish)

    arguments = x, router.astype(jnp.float32), options["shared"].gate.astype(jnp.float32)
    ours, expected = (jax.grad(loss, (0, 1, 2))(*arguments, name) for name in ("cpu", "xla"))
    for one, other in zip(ours, expected, strict=True):
        one, other = (np.asarray(array, np.float64) for array in (one, other))
        assert np.linalg.norm(other) > 0
        assert np.linalg.norm(one - other) <= 0.01 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({}, {}, None),
        ({"weight_format": "nvfp4", "group_size": 16}, {}, None),
        ({"group_size": None, "weight_format": "int8"}, {}, None),
        ({}, {"weight_format": "int8"}, "its matrices are of formats int8, int8, those of the others of int4, int4"),
        ({}, {"group_size": 64}, "its gate_up differs in bias, groups, padding or type of scales"),
        ({}, {"scale_dtype": jnp.float16}, "its gate_up differs in bias, groups, padding or type of scales"),
        ({}, {"inner": 3 * INNER // 2}, "its intermediate size 96 is not a multiple of that of the others, 64"),
        ({"bias": True}, {}, "down.bias is not None"),
        ({}, {"reordered": True}, "gate_up has an input_order"),
    ],
)
def test_wide_shared_experts_are_split_where_they_are_packed_as_the_others(options, changes, reason):
    rng = np.random.default_rng(0)
    usual = {"weight_format": "int4", "group_size": 32, "scale_dtype": jnp.bfloat16} | options

    def pair(experts, inner=INNER, reordered=False, **options):
        options = usual | options
        first = random_experts(rng, experts, HIDDEN, 2 * inner, reordered=reordered, **options)
        return first.packed(), random_experts(rng, experts, inner, HIDDEN, **options).packed()

    shared = jmm.SharedExpert(*pair(1, **({"inner": 2 * INNER} | changes)))
    found, why = split_like(shared, *pair(2))
    if reason is None:
        assert why is None
        assert found.down.num_experts == 2
        np.testing.assert_array_equal(
            jmm.dequantize(found.down).reshape(2 * INNER, HIDDEN), jmm.dequantize(shared.down)[0]
        )
    else:
        assert why.startswith(reason)
        assert found is shared


def test_a_shared_expert_split_into_narrower_ones_is_the_same():
    case = Case("split", shared="wide", gated=True)
    x, router, routed, _, _, options = make(case)
    whole = call(case, x, router, routed, options)
    shared = options["shared"].split(2)
    assert [matrix.packed.shape[1:] for matrix in (shared.gate_up, shared.down)] == [
        matrix.packed().packed.shape[1:] for matrix in routed
    ]
    y = call(case, x, router, routed, options | {"shared": shared})
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(whole, np.float32), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="down has 2 experts; only a single one is split"):
        shared.split(2)
    with pytest.raises(ValueError, match="experts is 3; it must divide the 128 rows of down"):
        options["shared"].split(3)


def test_batches_of_rows_are_one_call(platform):
    case = Case("batches", "sigmoid", tokens=12)
    x, router, routed, _, _, options = make(case)
    options["implementation"] = platform
    parts = [matrix.packed() for matrix in routed]
    batched = jax.jit(jax.vmap(lambda rows: jmm.moe_layer(rows, router, *parts, **options)))
    text = batched.lower(x.reshape(3, 4, HIDDEN)).as_text()
    assert text.count("custom_call @jax_marlin_moe") == 1
    y = batched(x.reshape(3, 4, HIDDEN)).reshape(x.shape)
    np.testing.assert_array_equal(y, jmm.moe_layer(x, router, *parts, **options))


BAD = [
    ({"router": np.zeros((HIDDEN, EXPERTS), np.int32)}, TypeError, "router has dtype int32"),
    ({"router": np.zeros((HIDDEN, 4), np.float32)}, ValueError, r"router has shape \(128, 4\).*\(H, experts\)"),
    ({"routing": 4}, TypeError, "routing has type int"),
    ({"routing": jmm.Routing(17)}, ValueError, "top_k is 17"),
    ({"routing": jmm.Routing(1, "tanh")}, ValueError, "scoring is 'tanh'"),
    (
        {"routing": jmm.Routing(1, "sparsemixer"), "correction_bias": np.zeros(EXPERTS, np.float32)},
        ValueError,
        "'sparsemixer', which takes no correction_bias",
    ),
    ({"router_bias": np.zeros(4, np.float32)}, ValueError, r"router_bias has shape \(4,\)"),
    ({"correction_bias": np.zeros(EXPERTS, np.int32)}, TypeError, "correction_bias has dtype int32"),
    ({"expert_scale": np.zeros((EXPERTS, 1), np.float32)}, ValueError, r"expert_scale has shape \(16, 1\)"),
    ({"router_input": np.zeros((2, HIDDEN), np.float32)}, ValueError, r"router_input has shape \(2, 128\)"),
    ({"router_input_scale": np.zeros(4, np.float32)}, ValueError, r"router_input_scale has shape \(4,\)"),
    ({"topk_ids": np.zeros((9, 4), np.int64)}, TypeError, "topk_ids has dtype int64"),
    ({"topk_ids": np.zeros((9, 3), np.int32)}, ValueError, r"topk_ids has shape \(9, 3\)"),
    ({"shared": 3}, TypeError, "shared has type int"),
    ({"shared": ("dense", np.zeros((96, 64), np.float16))}, ValueError, r"shared.down has shape \(96, 64\)"),
    ({"shared": ("dense", None)}, ValueError, r"shared.down has type NoneType"),
    ({"shared": ("packed", None)}, TypeError, "shared.gate_up has type MarlinWeights and shared.down NoneType"),
    ({"shared": ("packed", "gate_up")}, ValueError, "shared.gate_up has N = 128 columns and shared.down K = 128"),
    ({"shared": ("packed", "down", np.zeros((1, HIDDEN), np.float32))}, ValueError, "shared.gate has shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_parts_that_do_not_fit_are_refused_by_name(change, error, message):
    case = Case("refused")
    x, router, routed, _, _, options = make(case)
    gate_up, down = (matrix.packed() for matrix in routed)
    shared = change.get("shared")
    if isinstance(shared, tuple):
        first = gate_up if shared[0] == "packed" else np.zeros((HIDDEN, 192), np.float16)
        second = {"gate_up": gate_up, "down": down}.get(shared[1]) if isinstance(shared[1], str) else shared[1]
        change = {"shared": jmm.SharedExpert(first, second, *shared[2:])}
    arguments = {"x": x, "router": router, "gate_up": gate_up, "down": down, **options, **change}
    with pytest.raises(error, match=message):
        jmm.moe_layer(**arguments)
