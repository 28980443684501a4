"""The router's kernels: compiled for every architecture that has them, what they refuse, how they are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.kernels.router import Router, product_kernel, router_tile, select_kernel
from jax_marlin_moe.cuda.program import Plan
from jax_marlin_moe.measure.models import MODELS

needs_nvrtc = pytest.mark.skipif(compiler.unavailable_reason() is not None, reason=str(compiler.unavailable_reason()))


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
        for at, name in enumerate(("bias", "correction_bias", "expert_scale", "given", "gate"), start=2)
    }
    gate = optional.pop("gate")
    product = product_kernel(made, tile, rows=0, kernel=1, gate=gate, out=9)
    select = select_kernel(made, tile, logits=9, **optional, topk_weights=7, topk_ids=8, overlaps_predecessor=True)
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
]


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize(("architecture", "made"), COMPILED, ids=[f"{a}-{r.rows.shape[0]}" for a, r in COMPILED])
def test_the_kernels_compile(architecture, made):
    assert compiler.compile_cubin(plan(made, architecture).source, architecture)


@pytest.mark.parametrize(
    "change",
    [
        {"rule": jmm.Routing(4, "sparsemixer", renormalize=False)},
        {"rule": jmm.Routing(4, apply_on_input=True)},
        {"rule": jmm.Routing(4, identity_experts=4)},
        {"rule": jmm.Routing(33)},
        {"hidden": 264},
        {"experts": 61},
        {"dtype": "float32"},
        {"bias": array((60,), jnp.float8_e4m3fn)},
    ],
    ids=str,
)
def test_other_routers_are_left_to_the_composition(change):
    assert router().fits(90)
    assert not router(**change).fits(90)
    assert not router().fits(75)


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


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_a_layer_with_a_shared_expert_is_one_call(architecture, monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, architecture)

    def stack(experts, k, n):
        dense = jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16)
        return jax.eval_shape(lambda w: jmm.quantize(w, "int4", group_size=64), dense)

    shared = jmm.SharedExpert(stack(1, 128, 128), stack(1, 64, 128), array((128, 1), jnp.bfloat16))
    parts = stack(16, 128, 128), stack(16, 64, 128), array((128, 16), jnp.bfloat16)
    layer = jmm.MoELayer(*parts, GROUPS_OF_16, correction_bias=array((16,)), shared=shared)
    traced = jax.jit(lambda layer, x: layer(x)).trace(layer, array((3, 128), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @jax_marlin_moe") == 1
    for stage in ("router", "select", "gate_up", "down", "combine"):
        assert f"jmm_{stage}_" in text
