"""The ops under JAX's configuration and transformations: strict modes, empty batches, export."""

import functools
import itertools
import re

import host_arrays
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.checkpoint import MoELayer
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.flax.nnx import MarlinMoE
from jax_marlin_moe.ops import implementation as implementations

EXPERTS, HIDDEN, INNER, TOKENS, TOP_K = 4, 64, 50, 5, 2
SAFE = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]

MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "equal ranks": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": jax.disable_jit,
}


def quantised():
    """Padded matrices: int4 with zero points, with a bias, and NVFP4."""
    parts = [
        jmm.quantize(
            host_arrays.normal(seed, (EXPERTS, HIDDEN, INNER)),
            "int4_zp",
            group_size=32,
            bias=host_arrays.ones((EXPERTS, INNER)),
        )
        for seed in range(2)
    ]
    down = jmm.quantize(host_arrays.normal(2, (EXPERTS, INNER, HIDDEN)), "nvfp4")
    return jmm.concatenate_columns(parts), down


gate_up_and_down = functools.cache(quantised)


def rows():
    x = host_arrays.normal(1, (TOKENS, HIDDEN), jnp.bfloat16)
    return x, host_arrays.normal(2, (TOKENS, EXPERTS), jnp.float32)


def spread():
    return jax.device_put(np.linspace(0, 1, EXPERTS, dtype=np.float32))


def routed(logits):
    return jmm.route(logits, top_k=TOP_K, scoring="sigmoid", correction_bias=spread(), scale=2.5)


def call_block(implementation):
    x, logits = rows()
    weights, ids = routed(logits)
    return jmm.fused_moe(x, *gate_up_and_down(), weights, ids, implementation=implementation)


def call_product(implementation):
    x, logits = rows()
    weights, ids = routed(logits)
    alignment = jmm.moe_align_block_size(
        ids, block_size=8, num_experts=EXPERTS, expert_map=np.arange(EXPERTS, dtype=np.int32),
        implementation=implementation,
    )  # fmt: skip
    y = jmm.moe_gemm(
        x, gate_up_and_down()[0], alignment, top_k=TOP_K, topk_weights=weights, mul_topk_weights=True,
        implementation=implementation,
    )  # fmt: skip
    return y, alignment


def call_loops(implementation):
    x, logits = rows()
    weights, ids = routed(logits)
    matrices = gate_up_and_down()

    def one(x, weights, ids):
        return jmm.fused_moe(x, *matrices, weights, ids, implementation=implementation)

    batched = jax.vmap(one)(*(jnp.stack([array, array]) for array in (x, weights, ids)))
    repeated = jax.lax.scan(lambda h, _: (one(h, weights, ids), None), x, length=2)[0]
    return batched, repeated


def call_flax(implementation):
    x, _ = rows()
    router = host_arrays.normal(3, (HIDDEN, EXPERTS), jnp.float32)
    layer = jmm.MoELayer(*gate_up_and_down(), router, jmm.Routing(TOP_K))
    module = MarlinMoE(layer, implementation=implementation)
    return nnx.jit(lambda module, x: module(x), graph=False)(module, x)


def call_packing(implementation):
    return quantised()


CALLS = [
    (call_packing, None),
    *itertools.product([call_block, call_product, call_loops, call_flax], ["cpu", "xla"]),
]
wanted_of = functools.cache(lambda call, implementation: call(implementation))


@pytest.mark.covering
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("call", "implementation"), CALLS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_jax_change_nothing(mode, call, implementation):
    if (mode, implementation) == ("disable_jit", "xla") and call is call_flax:
        pytest.skip("a loop over blocks, each step by itself: the other calls have it")
    wanted = wanted_of(call, implementation)
    with MODES[mode]():
        actual = call(implementation)
    for ours, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == expected.dtype
        ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
        assert np.linalg.norm(ours - expected) <= 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_eager_calls_transfer_nothing(implementation):
    """Constants are in the compiled program: a call by itself creates none."""
    x, logits = rows()
    weights, ids = routed(logits)
    matrices = gate_up_and_down()
    layer = jmm.MoELayer(*matrices, host_arrays.ones((HIDDEN, EXPERTS)), jmm.Routing(TOP_K))
    module = MarlinMoE(layer, implementation=implementation)
    batch = [jax.device_put(np.stack([array, array])) for array in (x, weights, ids)]

    def block(x, weights, ids):
        return jmm.fused_moe(x, *matrices, weights, ids, implementation=implementation)

    with jax.transfer_guard("disallow"):
        alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS, implementation=implementation)
        jmm.moe_gemm(x, matrices[0], alignment, top_k=TOP_K, implementation=implementation)
        block(x, weights, ids)
        jax.vmap(block)(*batch)
        jax.lax.scan(lambda h, _: (block(h, weights, ids), None), x, length=2)
        module(x)
        jmm.linear(x, matrices[0], expert=1, implementation=implementation)


@pytest.mark.sampled(2)
@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", jmm.FORMATS)
def test_eager_packing_transfers_nothing(weight_format):
    dense = host_arrays.normal(0, (2, 128, 64))
    with jax.transfer_guard("disallow"):
        weights = jmm.quantize(dense, weight_format)
        jmm.dequantize(weights)
        jmm.concatenate_columns([weights, weights.columns(0, 64)]).expert(1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scoring": "sigmoid", "num_groups": 2, "top_groups": 1, "scale": 2.5},
        {"scoring": "sqrtsoftplus", "renormalize": False, "group_score": "max", "num_groups": 2},
        {"scoring": "identity", "softmax_after_topk": True},
    ],
    ids=str,
)
def test_eager_routing_transfers_nothing(options):
    _, logits = rows()
    bias = spread()
    with jax.transfer_guard("disallow"):
        _, ids = jmm.route(logits, top_k=TOP_K, correction_bias=bias, expert_scale=bias, **options)
        jmm.route(logits, top_k=TOP_K, ids=ids, **options)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_vmap_over_no_elements_is_empty(implementation):
    matrices = gate_up_and_down()

    def block(x, weights, ids):
        return jmm.fused_moe(x, *matrices, weights, ids, implementation=implementation)

    def product(x, ids):
        lists = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS, implementation=implementation)
        return jmm.moe_gemm(x, matrices[0], lists, top_k=TOP_K, implementation=implementation)

    x, ids = host_arrays.ones((0, 3, HIDDEN), jnp.bfloat16), host_arrays.zeros((0, 3, TOP_K), jnp.int32)
    assert jax.vmap(block)(x, host_arrays.ones((0, 3, TOP_K)), ids).shape == (0, 3, HIDDEN)
    assert jax.vmap(product)(x, ids).shape == (0, 3 * TOP_K, 100)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_a_dropped_slot_does_not_read_its_weight(implementation):
    x, _ = rows()
    gate_up, _ = gate_up_and_down()
    ids = np.int32([[0, 1], [2, -1], [-1, -1], [3, 9], [1, 2]])
    absent = (ids < 0) | (ids >= EXPERTS)
    ids, weights = jax.device_put((ids, np.where(absent, np.nan, 0.5).astype(np.float32)))
    alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS, implementation=implementation)
    options = {"top_k": TOP_K, "mul_topk_weights": True, "implementation": implementation}
    y = np.asarray(jmm.moe_gemm(x, gate_up, alignment, topk_weights=weights, **options), np.float32)
    assert np.array_equal(~np.any(y != 0, axis=1), absent.reshape(-1))
    assert not np.isnan(y).any()
    layer = MoELayer(
        *gate_up_and_down(),
        host_arrays.ones((HIDDEN, EXPERTS)),
        jmm.Routing(TOP_K, apply_on_input=True),
        token_experts=ids,
    )
    y = np.asarray(layer(x, jax.device_put(np.arange(5, dtype=np.int32)), implementation=implementation), np.float32)
    assert not np.isnan(y).any()
    assert not np.any(y[2])


@pytest.mark.parametrize("reordered", [False, True])
def test_the_first_listing_of_a_slot_counts_on_the_reference(reordered):
    x, _ = rows()
    gate_up, _ = gate_up_and_down()
    if reordered:
        order = np.stack([np.random.default_rng(e).permutation(HIDDEN) for e in range(EXPERTS)])
        gate_up = jax.tree.map(jnp.asarray, jmm.MarlinWeights(**vars(gate_up) | {"input_order": jnp.int32(order)}))
    ids = jnp.asarray([[0], [1], [2], [3], [0]], jnp.int32)
    once = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
    lists = np.tile(once.sorted_token_ids[:32], 2)
    # An expert that is not here lists nothing, so the slots of block 1 are listed first by the fifth block.
    experts, rows_listed = np.int32([0, 9, 2, 3, 3, 1, 1, 1]), np.int32([64])
    twice = jmm.BlockAlignment(*jax.device_put((lists, experts, rows_listed)), 8, EXPERTS)
    wanted = jmm.moe_gemm(x, gate_up, once, top_k=1, implementation="xla")
    np.testing.assert_array_equal(jmm.moe_gemm(x, gate_up, twice, top_k=1, implementation="xla"), wanted)


def test_an_expert_may_be_chosen_by_a_traced_index():
    gate_up, _ = gate_up_and_down()
    chosen = jax.jit(lambda weights, index: weights.expert(index))(gate_up, 2)
    for ours, expected in zip(jax.tree.leaves(chosen), jax.tree.leaves(gate_up.expert(2)), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_slices_of_abstract_weights_are_abstract():
    def weights():
        dense, bias = jnp.ones((EXPERTS, 128, 128)), jnp.ones((EXPERTS, 128))
        return jmm.quantize(dense, "int4_zp", group_size=64, bias=bias)

    abstract = jax.eval_shape(weights)
    for cut in (lambda w: w.columns(64, 128), lambda w: w.rows(64, 128), lambda w: w.expert(1)):
        assert cut(abstract) == jax.eval_shape(lambda cut=cut: cut(weights()))


def test_quantize_blames_the_argument_that_was_given():
    with pytest.raises(TypeError, match="dense has dtype float64, which the scales of format int4 cannot have"):
        jmm.quantize(np.ones((1, 64, 64)))


def exported(function, *arguments, **options):
    blob = jax.export.export(jax.jit(function), disabled_checks=SAFE, **options)(*arguments).serialize()
    return jax.export.deserialize(blob)


@pytest.mark.parametrize("activation", ["silu", get_activation("silu"), jmm.swiglu(limit=7.0)])
def test_layers_are_arguments_and_results_of_exported_functions(activation):
    x, logits = rows()
    routing = jmm.Routing(TOP_K, scoring="sigmoid", scale=2.5)
    router = jax.device_put(np.tile(logits[:1], (HIDDEN, 1)))
    layer = MoELayer(*gate_up_and_down(), router, routing, activation=activation)
    y, again = exported(lambda layer, x: (layer(x), layer), layer, x).call(layer, x)
    np.testing.assert_array_equal(y, layer(x))
    assert jax.tree.structure(again) == jax.tree.structure(layer)


def test_alignments_are_arguments_of_exported_functions():
    x, logits = rows()
    gate_up, _ = gate_up_and_down()
    alignment = jmm.moe_align_block_size(routed(logits)[1], block_size=8, num_experts=EXPERTS)

    def product(x, gate_up, alignment):
        return jmm.moe_gemm(x, gate_up, alignment, top_k=TOP_K)

    y = exported(product, x, gate_up, alignment).call(x, gate_up, alignment)
    np.testing.assert_array_equal(y, product(x, gate_up, alignment))


@pytest.mark.covering
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("constraints", [(), ("t >= 1",), ("t <= 64",)], ids=str)
def test_the_number_of_tokens_may_be_symbolic(implementation, constraints):
    (t,) = jax.export.symbolic_shape("t", constraints=constraints)
    matrices = gate_up_and_down()

    def block(x, weights, ids):
        lists = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS, implementation=implementation)
        product = jmm.moe_gemm(x, matrices[0], lists, top_k=TOP_K, implementation=implementation)
        return jmm.fused_moe(x, *matrices, weights, ids, implementation=implementation), product, lists

    dtypes = {HIDDEN: jnp.bfloat16}
    shapes = [jax.ShapeDtypeStruct((t, HIDDEN), dtypes[HIDDEN])]
    shapes += [jax.ShapeDtypeStruct((t, TOP_K), dtype) for dtype in (jnp.float32, jnp.int32)]
    artifact = jax.export.export(jax.jit(block), disabled_checks=SAFE)(*shapes)
    for tokens in (1, 3, 20) if not constraints else (3,):
        x = host_arrays.normal(tokens, (tokens, HIDDEN), jnp.bfloat16)
        arguments = (x, *routed(host_arrays.normal(tokens, (tokens, EXPERTS))))
        results = zip(jax.tree.leaves(artifact.call(*arguments)), jax.tree.leaves(block(*arguments)), strict=True)
        for ours, expected in results:
            np.testing.assert_array_equal(ours, expected)


def test_an_artifact_does_not_carry_the_reference_unasked(monkeypatch):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found; install jax_marlin_moe[cuda13]")
    monkeypatch.setattr(implementations.jax, "default_backend", lambda: "cpu")
    x, logits = rows()
    arguments = (x, *gate_up_and_down(), *routed(logits))
    with pytest.raises(
        ValueError, match=r"lowered for cuda on a cpu backend .*install jax_marlin_moe\[cuda13\].*'xla'"
    ):
        exported(jmm.fused_moe, *arguments, platforms=["cuda"])
    artifact = exported(lambda *a: jmm.fused_moe(*a, implementation="xla"), *arguments, platforms=["cuda", "cpu"])
    np.testing.assert_array_equal(artifact.call(*arguments), jmm.fused_moe(*arguments, implementation="xla"))


def test_a_card_without_a_compiler_is_warned(monkeypatch):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found")
    monkeypatch.setattr(implementations.jax, "default_backend", lambda: "gpu")
    with pytest.warns(UserWarning, match="falls back to the slow reference on cuda: NVRTC was not found"):
        exported(jmm.fused_moe, rows()[0], *gate_up_and_down(), *routed(rows()[1]), platforms=["cuda"])


def test_a_named_implementation_needs_its_platform():
    x, logits = rows()
    arguments = (x, *gate_up_and_down(), *routed(logits))
    with pytest.raises(ValueError, match="implementation is 'cpu', but the program is lowered for a platform that has"):
        exported(lambda *a: jmm.fused_moe(*a, implementation="cpu"), *arguments, platforms=["tpu"])


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_programs_name_the_ops(implementation):
    x, logits = rows()
    arguments = (x, *gate_up_and_down(), *routed(logits))
    program = jax.jit(lambda *a: jmm.fused_moe(*a, implementation=implementation)).lower(*arguments).compile()
    assert "/fused_moe/" in program.as_text()
    if implementation == "cpu":
        assert re.search(r"%fused_moe\.?\d* = .* custom-call\(", program.as_text())
