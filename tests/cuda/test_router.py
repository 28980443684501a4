"""The router's kernels: compiled for every architecture that has them, what they refuse, how they are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from abstract_calls import needs_nvrtc

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.kernels.router import (
    Router,
    WeightedRows,
    product_kernel,
    router_tile,
    select_kernel,
)
from jax_marlin_moe.cuda.program import Plan
from jax_marlin_moe.measure.models import MODELS


def array(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def router(tokens=5, hidden=256, experts=60, dtype="bfloat16", router_dtype="bfloat16", rule=None, **changes):
    rule = jmm.Routing(4) if rule is None else rule
    return Router(array((tokens, hidden), jnp.dtype(dtype)), array((hidden, experts), router_dtype), rule, **changes)


def plan(made, architecture):
    capability = compiler.compute_capability(architecture)
    assert made.fits(capability)
    tile = router_tile(made, capability)
    optional = {
        name: None if getattr(made, name) is None else at
        for at, name in enumerate(("bias", "correction_bias", "expert_scale", "given", "gate", "input_scale"), start=2)
    }
    gate, scale = optional.pop("gate"), optional.pop("input_scale")
    weighted = WeightedRows(0, 12, 13, made.rows.dtype, made.rows.shape[1]) if made.routing.apply_on_input else None
    product = product_kernel(made, tile, rows=0, kernel=1, gate=gate, scale=scale, out=9)
    outputs = {"topk_weights": 10, "topk_ids": 11, "weighted": weighted}
    select = select_kernel(made, tile, logits=9, **optional, **outputs, overlaps_predecessor=True)
    return Plan((product, select))


FULL = {
    "bias": array((60,), jnp.bfloat16),
    "correction_bias": array((60,)),
    "expert_scale": array((60,), jnp.float16),
    "gate": array((256, 1), jnp.bfloat16),
    "shared": 2,
}
GROUPS = jmm.Routing(4, "sigmoid", num_groups=5, top_groups=3, scale=2.5, logits_soft_cap=30.0)
GROUPS_OF_16 = jmm.Routing(4, "sigmoid", num_groups=4, top_groups=2)
COMPILED = [
    *((name, router(rule=GROUPS, **FULL)) for name in ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")),
    ("sm_90a", router(700, router_dtype="float32", rule=jmm.Routing(4, "sqrtsoftplus"))),
    ("sm_90a", router(20, dtype="float16", given=array((20, 4), jnp.int32))),
    ("sm_90a", router(3, rule=jmm.Routing(2, "sparsemixer", renormalize=False, jitter=0.01))),
    ("sm_90a", router(40, rule=jmm.Routing(2, "chosen_sigmoid", renormalize=False, apply_on_input=True))),
    ("sm_90a", router(7, input_scale=array((256,), jnp.bfloat16), expert_scale=array((60,)))),
    ("sm_90a", router(9, 2880, 128, rule=jmm.Routing(4, "identity", softmax_after_topk=True))),
    ("sm_90a", router(1, 512, 100, router_dtype="float32", input_scale=array((512,)), gate=array((512, 1)))),
    ("sm_80", router(600, router_dtype="float32", input_scale=array((256,)), gate=array((256, 1)))),
    ("sm_75", router(9, 264, 61, "float16", rule=jmm.Routing(4, "sigmoid"), gate=array((264, 1), jnp.float16))),
    ("sm_90a", router(2, 100, dtype="float32", rule=jmm.Routing(1), input_scale=array((100,)))),
]


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize(("architecture", "made"), COMPILED, ids=[f"{a}-{r.rows.shape[0]}" for a, r in COMPILED])
def test_the_kernels_compile(architecture, made):
    assert compiler.compile_cubin(plan(made, architecture).source, architecture)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": jmm.Routing(33)},
        {"experts": 1025},
        {"bias": array((60,), jnp.float8_e4m3fn)},
        {"tokens": 513, "dtype": "float32"},
    ],
    ids=str,
)
def test_other_routers_are_left_to_the_composition(change):
    assert router().fits(90)
    assert not router(**change).fits(90)


@pytest.mark.parametrize(
    "change", [{"hidden": 264}, {"experts": 61}, {"dtype": "float32"}, {"capability": 75}], ids=str
)
def test_what_tensor_cores_do_not_multiply_is_left_to_the_plain_product(change):
    capability = change.pop("capability", 90)
    assert router().fits_tensor_cores(90)
    assert not router(**change).fits_tensor_cores(capability)
    assert router_tile(router(**change), capability).stages == 0


@dataclasses.dataclass(frozen=True)
class NewRouting(jmm.Routing):
    """A rule with an option that no kernel knows."""

    option: int = 1


def test_a_rule_with_an_option_that_the_kernels_do_not_know_is_left_to_the_composition():
    assert not router(rule=NewRouting(4)).fits(90)


@pytest.mark.covering
@pytest.mark.parametrize("tokens", [1, 9, 33, 64, 512, 513, 16384])
@pytest.mark.parametrize("router_dtype", ["bfloat16", "float32"])
def test_tiles_fit_every_architecture(tokens, router_dtype):
    for model in MODELS.values():
        made = router(tokens, model.hidden, model.num_experts, router_dtype=router_dtype)
        for architecture in ("sm_80", "sm_86", "sm_90a", "sm_120a"):
            product, _ = plan(made, architecture).kernels
            tile = router_tile(made, compiler.compute_capability(architecture))
            rows = tile.tokens // tile.warps_t // 8
            assert tile.stages >= 2
            assert product.shared_bytes <= 99 * 1024 or architecture in ("sm_80", "sm_90a")
            assert product.shared_bytes <= 227 * 1024
            assert rows * tile.warps_t * 8 == tile.tokens
            assert rows == 1 or rows % 2 == 0
            assert tile.experts % (16 * tile.warps_n) == 0


def stack(experts, k, n, weight_format="int4"):
    dense = jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16)
    return jax.eval_shape(lambda w: jmm.quantize(w, weight_format, group_size=64), dense)


def shared_expert(inner=64, weight_format="int4", gate=True):
    matrices = stack(1, 128, 2 * inner, weight_format), stack(1, inner, 128, weight_format)
    return jmm.SharedExpert(*matrices, array((128, 1), jnp.bfloat16) if gate else None)


def custom_calls(architecture, monkeypatch, rule, *, dtype="bfloat16", router_input=None, ids=False, **fields):
    """The lowered text of a layer."""
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, architecture)
    experts = 16 - rule.identity_experts
    layer = jmm.MoELayer(
        stack(experts, 128, 128), stack(experts, 64, 128), array((128, 16), jnp.bfloat16), rule, **fields
    )
    x = array((3, 128), jnp.dtype(dtype))
    rows = None if router_input is None else array((3, 128), jnp.dtype(router_input))
    token_ids = array((3,), jnp.int32) if ids else None
    traced = jax.jit(lambda layer, x, ids, rows: layer(x, ids, router_input=rows)).trace(layer, x, token_ids, rows)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_layer_with_a_shared_expert_is_one_call(architecture, monkeypatch):
    text = custom_calls(architecture, monkeypatch, GROUPS_OF_16, correction_bias=array((16,)), shared=shared_expert())
    assert text.count("custom_call @jax_marlin_moe") == 1
    for stage in ("router", "select", "gate_up", "down", "combine"):
        assert f"jmm_{stage}_" in text


LLAMA = jmm.Routing(1, "chosen_sigmoid", renormalize=False, apply_on_input=True)
LAYERS = {
    "Llama-4": {"rule": LLAMA, "shared": shared_expert(gate=False)},
    "Gemma-4": {
        "rule": jmm.Routing(4),
        "router_input": "bfloat16",
        "router_input_scale": array((128,), jnp.bfloat16),
        "expert_scale": array((16,), jnp.bfloat16),
    },
    "LongCat": {
        "rule": jmm.Routing(4, renormalize=False, scale=6.0, identity_experts=4),
        "correction_bias": array((16,)),
    },
    "Phi-3.5": {"rule": jmm.Routing(2, "sparsemixer", renormalize=False, jitter=0.01)},
    "DeepSeek-V4 by hash": {
        "rule": jmm.Routing(4, "sqrtsoftplus", scale=1.5),
        "ids": True,
        "token_experts": array((100, 4), jnp.int32),
        "shared": shared_expert(gate=False),
    },
    "Laguna": {"rule": jmm.Routing(4, "sigmoid", logits_soft_cap=30.0)},
    "gpt-oss": {
        "rule": jmm.Routing(4, "identity", softmax_after_topk=True),
        "router_bias": array((16,), jnp.bfloat16),
    },
    "rows of float32 for the router": {"rule": jmm.Routing(4), "router_input": "float32"},
    "rows of the router's own, and a shared expert": {
        "rule": jmm.Routing(4), "router_input": "bfloat16", "shared": shared_expert(gate=False),
    },
    "Turing": {"rule": GROUPS_OF_16, "dtype": "float16", "architecture": "sm_75"},
}  # fmt: skip


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_every_rule_is_one_call(options, monkeypatch):
    monkeypatch.setattr(compiler, "compile_cubin", lambda source, architecture: b"machine code")
    text = custom_calls(options.pop("architecture", "sm_90a"), monkeypatch, **options)
    assert text.count("custom_call @jax_marlin_moe") == 1
    assert "jmm_select_m3" in text


BESIDE = {
    "another format": {"shared": shared_expert(weight_format="int8")},
    "another size": {"shared": shared_expert(inner=128)},
    "another activation": {"shared": shared_expert(), "shared_activation": "gelu_tanh"},
    "a gate and rows of the router's own": {"shared": shared_expert(), "router_input": "bfloat16"},
    "identity experts": {"shared": shared_expert(), "rule": jmm.Routing(4, identity_experts=4)},
}


@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
def test_a_shared_expert_unlike_the_others_runs_beside_the_one_call(options, monkeypatch):
    monkeypatch.setattr(compiler, "compile_cubin", lambda source, architecture: b"machine code")
    text = custom_calls("sm_90a", monkeypatch, **({"rule": jmm.Routing(4)} | options))
    assert text.count("custom_call @jax_marlin_moe") == 2
    assert text.count("jmm_select_m3") == 1
