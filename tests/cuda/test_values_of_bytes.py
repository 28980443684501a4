"""Rows of 8 bits where no kernel multiplies bytes: their values are multiplied in 16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc, planned_block, ptxas_log
from byte_blocks import quantized_block, random_block, relative_error

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler

# Format, group size, type of scales, type of rows.
CASES = {
    "int4 of groups of 64, int8": ("int4", 64, "bfloat16", "int8"),
    "mxfp4, fp8": ("mxfp4", 32, None, "float8_e4m3fn"),
    "mxfp8, fp8": ("mxfp8", 32, None, "float8_e4m3fn"),
    "nvfp4, int8": ("nvfp4", 16, None, "int8"),
    "int8, fp8": ("int8", 128, "bfloat16", "float8_e4m3fn"),
}
OF_HOPPER = ("int4", 128, "bfloat16", "float8_e4m3fn")
EXPERTS, HIDDEN, INNER = 5, 256, 128


def block_of(case, tokens, dtype=jnp.bfloat16):
    weight_format, group_size, scale_dtype, _ = case
    options = {"weight_format": weight_format, "group_size": group_size}
    options["scale_dtype"] = None if scale_dtype is None else jnp.dtype(scale_dtype)
    return random_block(np.random.default_rng(1), tokens, EXPERTS, HIDDEN, INNER, dtype=dtype, bias=True, **options)


def plan_of(case, tokens, architecture, dtype=jnp.bfloat16, **options):
    first, second, x, _, ids = block_of(case, tokens, dtype)
    row_type, weights = jax.ShapeDtypeStruct(x.shape, x.dtype), (first.packed(), second.packed())
    options = {"architecture": architecture, "activation_dtype": case[3]} | options
    return planned_block(row_type, *weights, top_k=ids.shape[1], **options)


def elements_of_products(planned):
    return [kernel.structs["Problem"]["element"] for kernel in planned.kernels if "Problem" in kernel.structs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a", "sm_120"])
def test_rows_are_quantised_and_their_values_multiplied_in_16_bits(name, architecture):
    quantize_x, gate_up, quantize_hidden, down, _ = plan_of(CASES[name], 9, architecture).kernels
    byte = {"float8_e4m3fn": "jmm::Fp8", "int8": "jmm::Signed8"}[CASES[name][3]]
    for product, quantizes in ((gate_up, quantize_x), (down, quantize_hidden)):
        facts = quantizes.structs["Facts"]
        assert (facts["byte"], facts["wide"], facts["sums"]) == (byte, True, False)
        assert product.structs["Problem"]["element"] == "jmm::BFloat"
        assert product.pointers["operands.x"].buffer == quantizes.pointers["bytes"].buffer
        assert product.pointers["epilogue.row_scales"].buffer == quantizes.pointers["scales"].buffer
        assert not product.overlaps_predecessor


def test_bytes_are_multiplied_where_there_is_an_instruction_for_them():
    in_integers = (*OF_HOPPER[:3], "int8")
    for architecture in ("sm_75", "sm_80", "sm_86", "sm_100"):
        assert elements_of_products(plan_of(OF_HOPPER, 9, architecture, dtype=jnp.float16)) == ["jmm::Half"] * 2
    for architecture, tokens in (("sm_89", 9), ("sm_90a", 80), ("sm_120", 9)):
        assert elements_of_products(plan_of(OF_HOPPER, tokens, architecture)) == ["jmm::Fp8"] * 2
    for architecture in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"):
        assert elements_of_products(plan_of(in_integers, 9, architecture)) == ["jmm::Signed8"] * 2
    assert elements_of_products(plan_of(in_integers, 9, "sm_75", dtype=jnp.float16)) == ["jmm::Half"] * 2


@pytest.mark.parametrize("name", ["mxfp4, fp8", "mxfp8, fp8"])
def test_groups_of_32_with_powers_of_two_are_bytes_on_hopper_where_experts_have_rows(name):
    """160 slots are 32 rows of each of five experts."""
    in_integers = (*CASES[name][:3], "int8")
    assert elements_of_products(plan_of(CASES[name], 80, "sm_90a")) == ["jmm::Fp8"] * 2
    assert elements_of_products(plan_of(CASES[name], 79, "sm_90a")) == ["jmm::BFloat"] * 2
    assert elements_of_products(plan_of(CASES[name], 3, "sm_90a", scheme="batch_invariant")) == ["jmm::Fp8"] * 2
    assert elements_of_products(plan_of(CASES[name], 80, "sm_89")) == ["jmm::BFloat"] * 2
    assert elements_of_products(plan_of(in_integers, 80, "sm_90a")) == ["jmm::BFloat"] * 2


def test_rows_in_units_of_fixed_scales_are_read_as_they_are():
    quantize_x, gate_up, down, _ = plan_of(OF_HOPPER, 9, "sm_80", scaled=True, intermediate="static_fp8").kernels
    assert quantize_x.structs["Facts"]["fixed"]
    assert gate_up.structs["Epilogue"]["row_scaled"]
    assert not gate_up.structs["Epilogue"]["scaled"]
    assert down.pointers["operands.x"].buffer == gate_up.pointers["epilogue.out"].buffer
    assert down.structs["Epilogue"]["scaled"]
    assert not down.structs["Epilogue"]["row_scaled"]


def test_scales_of_groups_are_those_of_bytes_alone():
    grouped = (*OF_HOPPER[:3], "float8_e4m3fn_g128")
    assert elements_of_products(plan_of(grouped, 9, "sm_90a")) == ["jmm::Fp8"] * 2
    with pytest.raises(
        ValueError, match=r"is 'float8_e4m3fn_g128', the compute capability 8\.9 and gate_up has.*pass 'fl"
    ):
        plan_of(grouped, 9, "sm_89")
    with pytest.raises(
        ValueError, match=r"capability 9\.0 and gate_up has codes 'e2m1' in groups of 32, K = 256 and N"
    ):
        plan_of(("mxfp4", 32, None, "float8_e4m3fn_g128"), 9, "sm_90a")


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "tokens", "architecture"), [("mxfp4, fp8", 9, "sm_80"), ("nvfp4, int8", 300, "sm_90a")]
)
def test_products_of_their_values_compile(name, tokens, architecture):
    source = plan_of(CASES[name], tokens, architecture).source
    if architecture == "sm_90a":
        assert "serialized" not in ptxas_log(source)
    else:
        assert compiler.compile_cubin(source, architecture)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("int4 of groups of 64, int8", 300),
        ("mxfp4, fp8", 9),
        ("mxfp8, fp8", 60),
        ("nvfp4, int8", 90),
        ("int8, fp8", 1),
    ],
)
def test_a_block_of_their_values_on_the_card(name, tokens):
    first, second, x, weights, ids = block_of(CASES[name], tokens + 2)
    dtype = CASES[name][3]
    run = jax.jit(lambda *a: jmm.fused_moe(*a, activation_dtype=dtype, preferred_element_type=jnp.float32))
    with jax.default_device(jax.devices("cuda")[0]):
        actual = run(jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids))
    # Weights have 16 bits, and hidden values next to a tie are then rounded to the other of two neighbours.
    most = {"int8": 4e-3, "float8_e4m3fn": 1.2e-2}
    assert relative_error(actual, quantized_block(first, second, x, weights, ids, dtype)) < most[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "tokens", "most"),
    [("mxfp4, fp8", 9, 1.2e-2), ("mxfp4, fp8", 300, 1.2e-2), ("int4 of groups of 64, int8", 60, 4e-3)],
)
def test_a_block_of_their_values_with_fixed_scales_on_the_card(name, tokens, most):
    first, second, x, weights, ids = block_of(CASES[name], tokens)
    dtype = CASES[name][3]
    quantizers = jmm.IntermediateQuantizer
    quantizer = {"float8_e4m3fn": quantizers.static_fp8, "int8": quantizers.static_int8}[dtype]
    x_scale, hidden_scales = np.float32(0.03), np.linspace(0.05, 0.3, EXPERTS, dtype=np.float32)
    run = jax.jit(
        lambda *a: jmm.fused_moe(
            *a,
            activation_dtype=dtype,
            x_scale=x_scale,
            intermediate=quantizer(hidden_scales),
            preferred_element_type=jnp.float32,
        )
    )
    with jax.default_device(jax.devices("cuda")[0]):
        actual = run(jax.device_put(x), first.packed(), second.packed(), jax.device_put(weights), jax.device_put(ids))
    wanted = quantized_block(first, second, x, weights, ids, dtype, x_scale, hidden_scales)
    assert relative_error(actual, wanted) < most
