"""`moe_gemm` on every platform against float64 numpy, and the properties that hold whatever the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_product_close, grouped_product, local_experts, random_experts, random_routing, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.measure.models import MODELS


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. The defaults are an ordinary one; each case says where it differs."""

    name: str
    tokens: int = 33
    top_k: int = 2
    experts: int = 6
    k: int = 256
    n: int = 128
    group_size: int | None = 128
    weight_format: str = "int4"
    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    block_size: int = 16
    routing: str = "distinct"
    bias: bool = False
    weighted: bool = False
    expert_map: tuple[int, ...] | None = None
    reordered: bool = False


CASES = [
    Case("ordinary"),
    Case("fp16", dtype="float16", scale_dtype="float16"),
    Case("bf16 rows, fp16 scales", scale_dtype="float16"),
    Case("fp16 rows, bf16 scales", dtype="float16"),
    *(Case(f"groups of {g}", group_size=g) for g in (16, 32, 64)),
    *(Case(f"zero points, groups of {g}", group_size=g, weight_format="int4_zp") for g in (16, 32, 64, 128)),
    Case("zero points, fp16", weight_format="int4_zp", dtype="float16", scale_dtype="float16"),
    Case("one group", group_size=None),
    Case("one group with zero points", group_size=None, weight_format="int4_zp", dtype="float16"),
    Case("one group of 128", k=128),
    *(Case(f"blocks of {b}", block_size=b, tokens=70) for b in (8, 32, 48, 64)),
    *(Case(f"top {t}", top_k=t, experts=11, tokens=20) for t in (1, 3, 4, 5, 6, 7, 8, 9)),
    Case("one token", tokens=1),
    Case("one slot", tokens=1, top_k=1, experts=1),
    Case("fewer slots than experts", tokens=2, experts=24),
    Case("many tokens", tokens=300, k=128),
    Case("no tokens", tokens=0),
    Case("seven experts", experts=7, top_k=3),
    Case("empty experts", routing="few", experts=9),
    Case("one expert takes all", routing="one", tokens=70),
    Case("the same expert again", routing="duplicates", top_k=3),
    Case("ids that name nobody", routing="holes", top_k=4),
    Case("remote experts", experts=4, expert_map=(-1, 2, 0, -1, 3, -1, 1, -1), top_k=4),
    Case("remote experts and holes", experts=3, expert_map=(1, -1, 2, -1, 0), routing="holes", top_k=3, bias=True),
    Case("bias", bias=True, dtype="float16"),
    Case("router weights", weighted=True),
    Case("bias and router weights", bias=True, weighted=True, routing="holes"),
    Case("minimum tile", k=16, n=64, group_size=16),
    Case("minimum tile with zero points", k=16, n=64, group_size=None, weight_format="int4_zp", dtype="float16"),
    Case("odd tiles", k=208, n=320, group_size=None),
    Case("odd tiles in groups", k=336, n=192, group_size=16, weight_format="int4_zp"),
    Case("rows in orders of their own", reordered=True, group_size=32),
    Case(
        "row orders, holes and weights",
        reordered=True,
        routing="holes",
        weighted=True,
        bias=True,
        weight_format="int4_zp",
    ),
]


@dataclasses.dataclass(frozen=True)
class Call:
    x: np.ndarray
    weights: jmm.MarlinWeights
    alignment: jmm.BlockAlignment
    options: dict
    expected: np.ndarray
    served: np.ndarray  # expert of each slot, -1 where none

    def run(self, **changes):
        return jmm.moe_gemm(self.x, self.weights, self.alignment, **(self.options | changes))


def make_call(case: Case, implementation: str, seed=0) -> Call:
    rng = np.random.default_rng(seed)
    experts = random_experts(
        rng,
        case.experts,
        case.k,
        case.n,
        group_size=case.group_size,
        scale_dtype=jnp.dtype(case.scale_dtype),
        weight_format=case.weight_format,
        bias=case.bias,
        reordered=case.reordered,
    )
    routed = case.experts if case.expert_map is None else len(case.expert_map)
    expert_map = None if case.expert_map is None else np.asarray(case.expert_map, np.int32)
    x = random_rows(rng, case.tokens, case.k, jnp.dtype(case.dtype))
    router, ids = random_routing(rng, case.tokens, case.top_k, routed, case.routing)
    alignment = jmm.moe_align_block_size(
        ids, block_size=case.block_size, num_experts=routed, expert_map=expert_map, implementation=implementation
    )
    options = {"top_k": case.top_k, "implementation": implementation}
    if case.weighted:
        options |= {"topk_weights": router, "mul_topk_weights": True}
    expected = grouped_product(x, experts, ids, expert_map=expert_map, router_weights=router if case.weighted else None)
    return Call(x, experts.packed(), alignment, options, expected, local_experts(ids, case.experts, expert_map))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_product(platform, case):
    call = make_call(case, platform)
    y = call.run()
    assert y.dtype == jnp.dtype(case.dtype)
    assert_product_close(y, call.expected)
    assert not np.asarray(y)[call.served < 0].any()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [CASES[0], CASES[9], *(c for c in CASES if c.reordered)], ids=lambda case: case.name)
def test_reference_product(case):
    call = make_call(case, "xla")
    assert_product_close(call.run(), call.expected)


def test_two_runs_give_the_same_bits(platform):
    call = make_call(Case("", tokens=70, k=512, routing="one", weighted=True), platform)
    run = jax.jit(call.run)
    first = np.asarray(run())
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(run()).view(np.uint16), first.view(np.uint16))


def test_a_row_does_not_depend_on_its_company():
    """The CPU kernels promise it bit for bit."""
    with jax.default_device(jax.devices("cpu")[0]):
        call = make_call(Case("", tokens=40, top_k=1, routing="one"), "cpu")
        together = np.asarray(call.run())
        for token in (0, 17, 39):
            ids = np.full((1, 1), 5, np.int32)
            alignment = jmm.moe_align_block_size(ids, block_size=16, num_experts=6)
            alone = jmm.moe_gemm(call.x[token : token + 1], call.weights, alignment, **call.options)
            np.testing.assert_array_equal(np.asarray(alone)[0].view(np.uint16), together[token].view(np.uint16))


def test_an_expert_that_nobody_chose_may_hold_anything(platform):
    call = make_call(Case("", routing="few", experts=9), platform)
    unused = np.setdiff1d(np.arange(9), call.served)
    assert unused.size == 7
    poisoned = dataclasses.replace(call.weights, scales=call.weights.scales.at[unused].set(jnp.nan))
    y = jmm.moe_gemm(call.x, poisoned, call.alignment, **call.options)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(call.run()))


def test_a_poisoned_row_stays_alone(platform):
    call = make_call(Case("", top_k=1), platform)
    x = call.x.copy()
    x[7] = np.nan
    y = np.asarray(jmm.moe_gemm(x, call.weights, call.alignment, **call.options))
    assert np.isnan(y[7].astype(np.float32)).all()
    others = np.arange(33) != 7
    np.testing.assert_array_equal(y[others], np.asarray(call.run())[others])


def test_an_overflow_is_infinite_not_wrapped(platform):
    """One rounding, from float32: bias and router weight may bring a large sum back into range."""
    call = make_call(Case("", dtype="float16", scale_dtype="float16", top_k=1), platform)
    x = np.full_like(call.x, 3e4)
    weights = dataclasses.replace(call.weights, scales=jnp.full_like(call.weights.scales, 1.0))
    sums = 3e4 * np.asarray(jmm.dequantize(weights)).astype(np.float64).sum(1)[call.served]
    assert (np.abs(sums) > 65520).any()
    y = np.asarray(jmm.moe_gemm(x, weights, call.alignment, **call.options))
    np.testing.assert_array_equal(np.isinf(y), np.abs(sums) > 65519)
    router = np.full(33, 2.0**-8, np.float32)
    scaled = jmm.moe_gemm(x, weights, call.alignment, **call.options, topk_weights=router, mul_topk_weights=True)
    assert_product_close(scaled, sums / 256)


def test_rows_that_are_already_slots(platform):
    """With top_k = 1, the alignment of more choices also fits rows that have one slot each."""
    call = make_call(Case("", top_k=3), platform)
    y = jmm.moe_gemm(call.x.repeat(3, axis=0), call.weights, call.alignment, top_k=1, implementation=platform)
    assert_product_close(y, call.expected)


@pytest.mark.parametrize("reordered", [False, True])
def test_lists_that_cannot_be_trusted(platform, reordered):
    """Slots and experts out of range, and entries past the count, are skipped; none is read or written."""
    call = make_call(Case("", tokens=8, top_k=1, reordered=reordered), platform)
    garbage = jmm.BlockAlignment(
        sorted_token_ids=jnp.asarray(
            [3, -1, 8, 2**31 - 1, -(2**31), 5, 7, 1, *([0, 2, 4, 6] * 2), *range(8)], jnp.int32
        ),
        expert_ids=jnp.asarray([2, 6, 0], jnp.int32),  # the second is none, the third is past the count
        num_tokens_post_padded=jnp.asarray([16], jnp.int32),
        block_size=8,
        num_experts=6,
    )
    y = np.asarray(jmm.moe_gemm(call.x, call.weights, garbage, top_k=1, implementation=platform)).astype(np.float64)
    listed = [3, 5, 7, 1]
    expected = np.zeros((8, 128))
    expected[listed] = call.x[listed].astype(np.float64) @ np.asarray(jmm.dense_weights(call.weights))[2]
    assert_product_close(jnp.asarray(y, jnp.bfloat16), expected)


@pytest.mark.parametrize("count", [-5, 0, 8, 10**6])
def test_a_count_that_cannot_be_trusted(platform, count):
    call = make_call(Case("", tokens=8, top_k=1, experts=2, routing="one"), platform)
    alignment = dataclasses.replace(call.alignment, num_tokens_post_padded=jnp.asarray([count], jnp.int32))
    y = np.asarray(jmm.moe_gemm(call.x, call.weights, alignment, top_k=1, implementation=platform))
    listed = np.arange(8) < count
    assert not y[~listed].any()
    assert y[listed].any(axis=1).all()


@pytest.mark.parametrize("case", [Case("plain"), Case("weighted", weighted=True, routing="holes", tokens=5)])
def test_vmap_over_tokens_is_a_loop(platform, case):
    calls = [make_call(dataclasses.replace(case), platform, seed=0)]
    rng = np.random.default_rng(1)
    for _ in range(2):
        router, ids = random_routing(rng, case.tokens, case.top_k, case.experts, case.routing)
        options = calls[0].options | ({"topk_weights": router} if case.weighted else {})
        alignment = jmm.moe_align_block_size(ids, block_size=16, num_experts=case.experts, implementation=platform)
        calls.append(
            dataclasses.replace(
                calls[0],
                x=random_rows(rng, case.tokens, case.k, calls[0].x.dtype),
                alignment=alignment,
                options=options,
            )
        )

    def one(x, alignment, router):
        options = calls[0].options | ({} if router is None else {"topk_weights": router})
        return jmm.moe_gemm(x, calls[0].weights, alignment, **options)

    def stack(*leaves):
        return jnp.stack(leaves)

    batched = jax.vmap(one)(
        np.stack([call.x for call in calls]),
        jax.tree.map(stack, *(call.alignment for call in calls)),
        np.stack([call.options["topk_weights"] for call in calls]) if case.weighted else None,
    )
    for y, call in zip(batched, calls, strict=True):
        assert_product_close(y, np.asarray(call.run()).astype(np.float64))


def test_vmap_over_rows_alone_is_a_loop(platform):
    call = make_call(Case(""), platform)
    xs = np.stack([call.x, -2 * call.x])
    batched = jax.vmap(lambda x: jmm.moe_gemm(x, call.weights, call.alignment, **call.options))(xs)
    assert_product_close(batched[0], call.expected)
    assert_product_close(batched[1], -2 * call.expected)


def test_vmap_over_weights_is_a_loop(platform):
    calls = [make_call(Case("", bias=True), platform, seed=seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(call.weights for call in calls))
    batched = jax.vmap(lambda w: jmm.moe_gemm(calls[0].x, w, calls[0].alignment, **calls[0].options))(stacked)
    for y, call in zip(batched, calls, strict=True):
        expected = jmm.moe_gemm(calls[0].x, call.weights, calls[0].alignment, **calls[0].options)
        assert_product_close(y, np.asarray(expected).astype(np.float64))


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("reordered", [False, True])
def test_numpy_arrays_under_jit(implementation, reordered):
    """Weights and maps that a jitted function closes over may be numpy arrays."""
    case = Case("", tokens=5, experts=3, expert_map=(1, -1, 2, -1, 0), reordered=reordered)
    call = make_call(case, implementation)
    weights = jax.tree.map(np.asarray, call.weights)
    _, ids = random_routing(np.random.default_rng(1), 5, 2, 5)
    expert_map = np.asarray(case.expert_map, np.int32)

    @jax.jit
    def product(topk_ids):
        alignment = jmm.moe_align_block_size(
            topk_ids, block_size=8, num_experts=5, expert_map=expert_map, implementation=implementation
        )
        return jmm.moe_gemm(call.x, weights, alignment, top_k=2, implementation=implementation)

    served = local_experts(ids, 3, expert_map)
    dense = np.asarray(jmm.dense_weights(call.weights)).astype(np.float64)
    expected = np.stack(
        [
            row @ dense[e] if e >= 0 else np.zeros(128)
            for row, e in zip(call.x.repeat(2, axis=0).astype(np.float64), served, strict=True)
        ]
    )
    assert_product_close(product(ids), expected)


def test_the_program_holds_our_call(platform):
    call = make_call(CASES[0], platform)

    def product(x, weights, alignment):
        return jmm.moe_gemm(x, weights, alignment, top_k=2)

    text = jax.jit(product).lower(call.x, call.weights, call.alignment).as_text()
    target = {"cpu": native.TARGETS["moe_gemm", "cpu"], "cuda": native.TARGETS["program", "cuda"]}[platform]
    assert text.count(f"@{target}") == 1
    assert "dot_general" not in text  # of the reference


@pytest.mark.gpu
def test_what_memory_held_before_stays_out():
    """Results land in memory that held NaN; rows that nothing writes must be cleared, not inherited."""
    with jax.default_device(jax.devices("cuda")[0]):
        call = make_call(Case("", tokens=300, routing="holes"), "cuda")
        run = jax.jit(call.run)
        run()
        for _ in range(5):
            jax.block_until_ready(jnp.full((1 << 26,), jnp.nan)).delete()
            assert_product_close(run(), call.expected)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "deepseek-v3-tp8", "gpt-oss-20b"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_shapes_of_models(model, tokens):
    """Whole columns and rows of a real layer, with fewer experts than it has."""
    shape = MODELS[model]
    case = Case(
        "",
        tokens=tokens,
        top_k=shape.top_k,
        experts=8,
        k=shape.hidden,
        n=2 * shape.intermediate,
        group_size=shape.group_size,
    )
    call = make_call(case, "cuda")
    assert_product_close(call.run(), call.expected)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_format": "int4_zp", "bias": True},
        {"dtype": "float16", "scale_dtype": "float16", "weighted": True},
        {"experts": 3, "expert_map": (1, -1, 2, -1, 0), "routing": "holes", "top_k": 3},
    ],
    ids=["zero points and biases", "weighted", "experts elsewhere"],
)
def test_blocks_as_large_as_the_largest_tiles(block_size, options):
    """Enough slots for whole blocks of each expert, and for one that is partly full."""
    call = make_call(Case("", tokens=900, k=256, n=192, group_size=64, block_size=block_size, **options), "cuda")
    y = call.run()
    assert_product_close(y, call.expected)
    assert not np.asarray(y)[call.served < 0].any()
    exact = call.run(preferred_element_type=jnp.float32)
    assert exact.dtype == jnp.float32
    assert_product_close(exact.astype(y.dtype), call.expected)
