"""Formats of existing parts in new pairs: a row alone must do, on every path, and `quantize` must round to nearest."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from abstract_calls import needs_nvrtc, planned_block
from oracle import assert_product_close, grouped_product, random_experts, random_routing, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe import activations, formats
from jax_marlin_moe.cuda import choose, compiler
from jax_marlin_moe.cuda.kernels.problem import GemmShape
from jax_marlin_moe.formats import E2M1, E4M3_SCALES, E8M0_SCALES, FLOAT_SCALES, INT4, INT8, WeightFormat

CODES4, CODES8 = np.arange(16.0), np.arange(256.0)
PAIRS = {
    "mxint8": (
        WeightFormat("mxint8", INT8, 128, None, E8M0_SCALES, (32,), per_channel=False),
        oracle.Facts(8, CODES8, 128, None, oracle.E8M0, (32,), False),
    ),
    "int4_e4m3": (
        WeightFormat("int4_e4m3", INT4, 8, None, E4M3_SCALES, (16,), per_channel=False, has_global_scales=True),
        oracle.Facts(4, CODES4, 8, None, oracle.E4M3, (16,), False, has_global_scales=True),
    ),
    "int4_zp_e8m0": (
        WeightFormat("int4_zp_e8m0", INT4, None, "integer", E8M0_SCALES, (32,), per_channel=False),
        oracle.Facts(4, CODES4, None, "integer", oracle.E8M0, (32,), False),
    ),
    "fp4": (
        WeightFormat("fp4", E2M1, 0, None, FLOAT_SCALES, (32,), per_channel=True),
        oracle.Facts(4, oracle.E2M1, 0, None, None, (32,), True),
    ),
    "e2m1_e4m3": (
        WeightFormat("e2m1_e4m3", E2M1, 0, None, E4M3_SCALES, (32,), per_channel=False),
        oracle.Facts(4, oracle.E2M1, 0, None, oracle.E4M3, (32,), False),
    ),
}


@pytest.fixture(params=PAIRS)
def pair(request, monkeypatch):
    row, facts = PAIRS[request.param]
    monkeypatch.setitem(jmm.FORMATS, request.param, row)
    monkeypatch.setitem(oracle.FACTS, request.param, facts)
    return request.param


def logical_scales(weights, facts):
    """Of one expert, [G, N] in float64, with the global scale."""
    columns = np.arange(weights.n)
    stored = np.asarray(weights.scales)[0][:, columns // 64 * 64 + 8 * (columns % 8) + columns % 64 // 8]
    scales = stored.astype(np.float64) if facts.scale_bytes is None else facts.scale_bytes[stored]
    return scales * (1.0 if weights.global_scales is None else float(weights.global_scales[0, 0]))


@pytest.mark.sampled(2)
def test_quantize_rounds_to_the_nearest_code_of_a_scale_that_fits(pair):
    facts, size = oracle.FACTS[pair], oracle.FACTS[pair].group_sizes[-1]
    dense = np.random.default_rng(0).standard_normal((1, 128, 64)).astype(np.float32)
    weights = jmm.quantize(jax.device_put(dense), pair)
    steps = logical_scales(weights, facts).repeat(size, 0)
    found = np.asarray(jmm.dequantize(weights))[0]
    values = facts.values if facts.zeros is None else np.arange(-15.0, 16.0)  # some zero point's
    values = values - (facts.zero_point or 0)
    distance = np.abs(values[:, None, None] * steps - dense[0]).min(0)
    groups = dense[0].reshape(-1, size, 64)
    if facts.zeros is None:
        np.testing.assert_array_less(np.abs(found - dense[0]), distance + 1e-5)
        extents, reach = np.abs(groups).max(1), values.max()
    else:
        extents, reach = np.maximum(groups.max(1), 0) - np.minimum(groups.min(1), 0), 15.0
        # Half a step; at the ends, what the zero point was rounded by and what powers of two leave uncovered.
        assert np.all(np.abs(found - dense[0]) <= steps * 1.51)
    covered = extents / steps[::size]
    if facts.scale_bytes is oracle.E8M0:  # the binade of the largest value
        binade = 2.0 ** np.floor(np.log2(reach))
        assert covered.min() >= binade
        assert covered.max() < 2 * binade
    else:
        np.testing.assert_allclose(covered, reach, rtol=1 / 15)  # half a step of e4m3


@pytest.mark.sampled(2)
def test_the_error_is_that_of_the_codes(pair):
    """With rounding that belonged to another pair it would be above 0.4 here."""
    dense = np.random.default_rng(1).standard_normal((2, 256, 128)).astype(np.float32)
    found = np.asarray(jmm.dequantize(jmm.quantize(jax.device_put(dense), pair)))
    error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
    assert error < {"mxint8": 0.012, "int4_zp_e8m0": 0.12}.get(pair, 0.13)


@pytest.mark.covering
@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_a_pair(platform, pair, dtype):
    rng = np.random.default_rng(2)
    size = oracle.FACTS[pair].group_sizes[0]
    experts = random_experts(rng, 3, 272, 128, weight_format=pair, group_size=size, bias=True)
    x = random_rows(rng, 9, 272, jnp.dtype(dtype))
    router, ids = random_routing(rng, 9, 2, 3)
    implementation = None if platform == "xla" else platform
    alignment = jmm.moe_align_block_size(ids, block_size=16, num_experts=3, implementation=implementation)
    for implementation in dict.fromkeys(("xla", platform)):
        y = jmm.moe_gemm(
            x,
            experts.packed(),
            alignment,
            top_k=2,
            topk_weights=router,
            mul_topk_weights=True,
            implementation=implementation,
        )
        assert_product_close(y, grouped_product(x, experts, ids, router_weights=router))


@pytest.mark.covering
@pytest.mark.sampled(2)
@needs_nvrtc
@pytest.mark.parametrize(("architecture", "tokens"), [("sm_90a", 4), ("sm_90a", 512), ("sm_80", 40)])
def test_kernels_of_a_pair_compile(pair, architecture, tokens):
    def experts(k, n):
        return jax.eval_shape(lambda w: jmm.quantize(w, pair), jax.ShapeDtypeStruct((8, k, n), jnp.float16))

    x = jax.ShapeDtypeStruct((tokens, 256), jnp.float16)
    planned = planned_block(x, experts(256, 512), experts(256, 256), top_k=2, architecture=architecture)
    assert compiler.compile_cubin(planned.source, architecture)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zeros": "integer"}, "zero_point 8 and zeros 'integer'; one of them must be None"),
        ({"zero_point": None}, "zero_point None and zeros None; one of them must be None"),
        ({"zero_point": None, "zeros": "packed"}, "zeros 'packed'; it must be None, 'integer' or 'float'"),
        ({"code": E2M1}, "codes of e2m1, which have a sign; zero_point must be 0"),
        ({"zero_point": None, "zeros": "float", "scale": E4M3_SCALES}, "float zeros beside scales of e4m3"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(jmm.FORMATS["int4"], **changes)


def headers():
    return "".join(path.read_text() for path in sorted(compiler.source_directory().rglob("*.cuh")))


def test_every_name_of_a_type_or_function_is_in_the_cuda_sources():
    source = headers()
    names = [part.cpp for row in jmm.FORMATS.values() for part in (row.code, row.scale) if part.cpp]
    names += [f"jmm::{function.cpp}" for function in activations._FUNCTIONS.values() if function.cpp]
    for name in re.findall(r"jmm::(\w+)", " ".join(names)):
        assert f"struct {name} {{" in source, name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_what_the_cuda_kernels_lack_is_refused_by_name(monkeypatch, architecture):
    monkeypatch.setitem(activations._FUNCTIONS, "softsign", activations._Function(lambda gate, up: gate * up, None))
    monkeypatch.setitem(
        jmm.FORMATS,
        "int4_soft",
        dataclasses.replace(jmm.FORMATS["int4"], name="int4_soft", code=dataclasses.replace(INT4, name="int4_soft")),
    )

    def planned(activation, weight_format):
        array = jax.ShapeDtypeStruct
        dense = array((8, 256, 256), jnp.float16)
        weights = [jax.eval_shape(lambda w: jmm.quantize(w, weight_format), dense) for _ in range(2)]
        x = array((1, 256), jnp.float16)
        return planned_block(
            x, *weights, top_k=2, activation=activations.Activation(activation), architecture=architecture
        )

    with pytest.raises(ValueError, match="activation is 'softsign', which the CUDA kernels lack"):
        planned("softsign", "int4")
    with pytest.raises(
        ValueError, match=r"no cost is known for codes of int4_soft; it must be one of bf16, e2m1, .*int4"
    ):
        planned("relu2", "int4_soft")


def test_the_cost_model_knows_every_code():
    for code in {row.code.name for row in jmm.FORMATS.values()}:
        shape = GemmShape(512, 512, 8, 128, False, code, 4, "bfloat16", None, "bfloat16")
        assert choose.choose_tile(shape, 8, 8.0, 90)
    assert formats.get_format("int4").reach == 7
