"""Adapters compute what the package's own calls compute, by the frameworks' conventions; qwix and tokamax run."""

import enum
import inspect

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_marlin_moe as jmm
from jax_marlin_moe.adapters.levanter import moe_mlp
from jax_marlin_moe.adapters.names import activation_named
from jax_marlin_moe.adapters.sglang_jax import MarlinEPMoE
from jax_marlin_moe.adapters.tokamax import ragged_dot
from jax_marlin_moe.adapters.tpu_inference import fused_moe_func

E, H, I, TOKENS, TOP_K = 4, 64, 64, 6, 2
GROUPS = jnp.asarray(np.int32([3, 0, 2, 1]))


@pytest.fixture(scope="module")
def block():
    dense = [
        host_arrays.normal(seed, shape, jnp.bfloat16, 1 / 8) for seed, shape in enumerate([(E, H, 2 * I), (E, I, H)])
    ]
    gate_up, down = (jmm.quantize(matrix, "int4", group_size=32) for matrix in dense)
    x = host_arrays.normal(2, (TOKENS, H), jnp.bfloat16)
    logits = host_arrays.normal(3, (TOKENS, E))
    return x, gate_up, down, logits


def test_padding_of_sglang_jax_is_zeros(block):
    x, gate_up, down, logits = block
    weights, ids = jmm.route(logits, top_k=TOP_K)
    y = jmm.fused_moe(x, gate_up, down, weights, ids)
    padded = np.array(ids)
    padded[-2:] = -1
    padded = jax.device_put(padded)
    layer = MarlinEPMoE(gate_up, down)
    found = layer(x, weights.astype(jnp.bfloat16).astype(jnp.float32), padded)
    assert not np.asarray(found)[-2:].any()
    np.testing.assert_array_equal(np.asarray(layer(x, weights, padded))[:-2], np.asarray(y)[:-2])
    with pytest.raises(ValueError, match=r"out_sharding is .*; it must be None"):
        layer(x, weights, ids, out_sharding=jax.sharding.PartitionSpec())


def test_levanter_masks_tokens_and_takes_functions(block):
    x, gate_up, down, logits = block
    weights, ids = jmm.route(logits, top_k=TOP_K)
    y = jmm.fused_moe(x, gate_up, down, weights, ids)
    valid = jax.device_put(np.arange(TOKENS) != 1)
    found = moe_mlp(x.astype(jnp.float32), ids, weights, gate_up, down, activation=jax.nn.silu, token_valid=valid)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.where(np.asarray(valid)[:, None], np.asarray(y, np.float32), 0))
    silu = enum.Enum("ActivationFunctionEnum", {"silu": "silu"}).silu
    reported, dropped = moe_mlp(x, ids, weights, gate_up, down, activation=silu, report_capacity_overflow=True)
    np.testing.assert_array_equal(reported, y)
    assert dropped == 0
    with pytest.raises(ValueError, match=r"activation is .*tanh.*; it must be one of"):
        moe_mlp(x, ids, weights, gate_up, down, activation=jnp.tanh)


def test_names_of_activations():
    assert activation_named("swigluoai") == jmm.swiglu(limit=7.0, alpha=1.702, beta=1.0)
    assert activation_named("gelu_tanh") == activation_named("gelu_new") == activation_named(jax.nn.gelu) == "gelu_tanh"


# The parameters of the frameworks' own functions, in their order.
SIGNATURES = {
    fused_moe_func: "hidden_states w1 w2 w1_scale w2_scale w1_bias w2_bias gating_output topk renormalize mesh use_ep "
    "activation scoring_fn all_gather_fp8 enable_rs_kernel use_gmm_fused_rs_kernel onehot_moe_permute_threshold "
    "scatter_results defer_all_reduce hash_based_topk_indices expert_score_correction_bias moe_chunk_size "
    "num_valid_tokens",
    moe_mlp: "x selected_experts combine_weights w_up_gate w_down activation implementation mesh capacity_factor "
    "remat_mode report_capacity_overflow",
    MarlinEPMoE.__call__: "self hidden_states topk_weights topk_ids out_sharding",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_parameters_are_those_of_the_frameworks(function):
    names = SIGNATURES[function].split()
    assert list(inspect.signature(function).parameters)[: len(names)] == names


def test_tpu_inference_takes_chosen_experts_a_bias_and_padding(block):
    x, gate_up, down, logits = block
    rest = (None, None, None, None, logits, TOP_K, True, None, False, "silu", "sigmoid")
    bias = jnp.asarray([0.0, 3.0, 0.0, 0.0])
    weights, ids = jmm.route(logits, top_k=TOP_K, scoring="sigmoid", correction_bias=bias)
    y = jmm.fused_moe(x, gate_up, down, weights, ids)
    by_bias = fused_moe_func(x, gate_up, down, *rest, expert_score_correction_bias=bias, num_valid_tokens=4)
    np.testing.assert_array_equal(by_bias, np.where(np.arange(TOKENS)[:, None] < 4, np.asarray(y), 0))
    by_ids = fused_moe_func(x, gate_up, down, *rest, hash_based_topk_indices=ids, moe_chunk_size=256)
    np.testing.assert_array_equal(by_ids, y)
    for name in ("all_gather_fp8", "scatter_results", "defer_all_reduce"):
        with pytest.raises(ValueError, match=f"{name} is True; it must be False"):
            fused_moe_func(x, gate_up, down, *rest, **{name: True})


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_tpu_inference_routes_by_its_arguments(block, scoring):
    x, gate_up, down, logits = block
    rest = (None, None, None, None, logits, TOP_K, True, None, False, "silu", scoring)
    y = jmm.fused_moe(x, gate_up, down, *jmm.route(logits, top_k=TOP_K, scoring=scoring, renormalize=True))
    np.testing.assert_array_equal(fused_moe_func(x, gate_up, down, *rest), y)
    with pytest.raises(ValueError, match="scoring_fn is 'relu'"):
        fused_moe_func(x, gate_up, down, *rest[:-1], "relu")
    with pytest.raises(ValueError, match="w1_scale is given"):
        fused_moe_func(x, gate_up, down, gate_up.scales, *rest[1:])


def test_tpu_inference_lowers_over_the_experts_of_a_mesh(block):
    """Without devices: four of them are abstract."""
    x, gate_up, down, logits = block
    mesh = jax.sharding.AbstractMesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    rest = (None, None, None, None, logits, TOP_K, True, mesh)
    traced = jax.jit(lambda *arrays: fused_moe_func(*arrays, *rest, True, "silu")).trace(x, gate_up, down)
    assert "psum" in str(traced.jaxpr)
    with pytest.raises(ValueError, match="use_ep is False and mesh has 4 devices"):
        fused_moe_func(x, gate_up, down, *rest, False, "silu")


def test_tpu_inference_needs_an_axis_that_divides_the_experts(block):
    x, gate_up, down, logits = block
    mesh = jax.sharding.AbstractMesh((3,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    rest = (None, None, None, None, logits, TOP_K, True, mesh, True, "silu")
    with pytest.raises(ValueError, match="expert_axis names the axis 'expert'; the mesh has 'model'"):
        fused_moe_func(x, gate_up, down, *rest)
    with pytest.raises(ValueError, match="weights has E = 4 experts; 3 ranks need a multiple of 3"):
        fused_moe_func(x, gate_up, down, *rest, expert_axis="model")


def quantised():
    qwix = pytest.importorskip("qwix")
    dense = host_arrays.normal(5, (E, H, I), scale=1 / 8)
    return qwix.quantize(dense, "int8", channelwise_axes=(0, 2), tiled_axes={1: 32})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tokamax_tries_implementations_in_order(block):
    x, *_ = block
    array = quantised()
    y = jmm.ragged_dot(x, jmm.from_qarray(array), GROUPS)
    np.testing.assert_array_equal(ragged_dot(x, array, group_sizes=GROUPS), y)
    for arguments, message in (
        ((x, jnp.zeros((E, H, I))), "it must be MarlinWeights, or a qwix QArray"),
        ((array, array), "lhs is"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            ragged_dot(*arguments, group_sizes=GROUPS)


@pytest.mark.filterwarnings("ignore")
def test_tokamax_takes_it_as_an_implementation(block):
    tokamax = pytest.importorskip("tokamax")
    x, *_ = block
    array = quantised()
    y = tokamax.ragged_dot(x, array, GROUPS, implementation=[ragged_dot])
    np.testing.assert_array_equal(y, jmm.ragged_dot(x, jmm.from_qarray(array), GROUPS))
    dense = host_arrays.normal(1, (E, H, I), jnp.bfloat16)
    z = tokamax.ragged_dot(x, dense, GROUPS, implementation=[ragged_dot, "xla"])
    np.testing.assert_allclose(z, jax.lax.ragged_dot(x, dense, GROUPS), atol=0.05)


class Experts(nnx.Module):
    """A layer of a model that knows nothing of this package."""

    def __init__(self) -> None:
        self.w = nnx.Param(host_arrays.normal(2, (E, H, I), scale=1 / 8))
        self.head = nnx.Linear(I, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(jax.lax.ragged_dot(x, self.w[...].astype(x.dtype), GROUPS))


@pytest.mark.filterwarnings("ignore")
def test_qwix_packs_the_experts_of_a_model(block):
    qwix = pytest.importorskip("qwix")
    from jax_marlin_moe.adapters.qwix import MarlinProvider, PackedExperts

    x = block[0].astype(jnp.float32)
    model = Experts()
    answer = model(x)
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8")]
    packed = qwix.quantize_model(model, MarlinProvider(rules, weight_format="int8", group_size=32), x)
    assert isinstance(packed.w.get_value(), PackedExperts)
    assert packed.w.get_value().weights.format.name == "int8"
    found = packed(x)
    np.testing.assert_allclose(found, answer, atol=0.06)
    assert np.abs(found - answer).max() > 0  # it is quantised
    gradient, wanted = (jax.jit(jax.grad(lambda x, m=m: jnp.sum(m(x))))(x) for m in (packed, model))
    np.testing.assert_allclose(gradient, wanted, atol=0.06)
    with pytest.raises(TypeError, match="indexed with 0; it must be"):
        packed.w.get_value()[0]
