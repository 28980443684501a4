"""What Python and C++ both state about a kernel: a difference between the two does not compile."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from abstract_calls import needs_nvrtc, planned_block

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler, plan_products
from jax_marlin_moe.cuda.facts import Pointer
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.program import render, render_facts, render_includes
from jax_marlin_moe.cuda.scheme import BlockScheme

pytestmark = needs_nvrtc

MMA = (MmaTile(16, 2, 1, 2, 64, 3, 2), MmaTile(16, 2, 4, 1, 32, 3, 2))
WGMMA = (WgmmaTile(16, 2, 1, 2, 64, 4, 1, False), WgmmaTile(16, 1, 2, 1, 64, 4, 1, False))


def array(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def experts(k, n):
    return jmm.MarlinWeights(
        packed=array((8, k // 16, 2 * n)),
        scales=array((8, k // 64, n), jnp.bfloat16),
        zeros=None,
        bias=array((8, n), jnp.float32),
        input_order=None,
        format=jmm.FORMATS["int4"],
        group_size=64,
    )


def block(slots, tiles, tokens=24, **options):
    return planned_block(
        array((tokens, 512), jnp.bfloat16),
        experts(512, 640),
        experts(320, 512),
        top_k=3,
        routed_experts=16,
        mapped=True,
        scheme=BlockScheme(slots, *tiles),
        **options,
    )


def many_tokens(sub_tiles, **options):
    """A program for a range of tokens, whose rows have four columns in 64 bits."""
    tiles = (WgmmaTile(48, 2, 1, 1, 64, 4, 1, True), WgmmaTile(48, sub_tiles, 1, 1, 64, 4, 1, True))
    return block("aligned", tiles, tokens=70, **options)


SHARE = {"out_dtype": jnp.dtype("float32"), "rounded_to": jnp.dtype("bfloat16")}


def product():
    return plan_products.plan_moe_gemm(
        array((24, 512), jnp.bfloat16),
        experts(512, 640),
        top_k=3,
        block_size=48,
        list_length=480,
        weighted=True,
        architecture="sm_90a",
    )


PLANS = {
    "mma": lambda: block("aligned", MMA),
    "mma grouped": lambda: block("grouped", MMA),
    "wgmma": lambda: block("grouped", WGMMA),
    "many tokens": lambda: many_tokens(2),
    "many tokens in pairs": lambda: many_tokens(1),
    "share of many tokens": lambda: many_tokens(2, **SHARE),
    "share of many tokens in pairs": lambda: many_tokens(1, **SHARE),
    "moe_gemm": product,
}


def kernel_of(planned, stage):
    return planned.kernels[planned.position(stage)]


def refusal(kernel, *, whole=False):
    """What the compiler says to the facts of a kernel, "" where they hold; `whole` has its entry point, too."""
    source = render([kernel]) if whole else "\n".join([render_includes([kernel]), render_facts(kernel)])
    try:
        compiler._compile(source, "sm_90a")
    except compiler.CompilationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("mma", "align"),
        ("mma", "gate_up"),
        ("mma", "combine"),
        ("mma grouped", "down"),
        ("wgmma", "gate_up"),
        ("many tokens", "align"),
        ("many tokens", "combine"),
        ("many tokens in pairs", "down"),
        ("share of many tokens", "combine"),
        ("share of many tokens in pairs", "combine"),
        ("moe_gemm", "clear"),
        ("moe_gemm", "first_rows"),
        ("moe_gemm", "moe_gemm"),
    ],
)
def test_launch_sizes_of_the_plan_are_those_of_the_kernel(name, stage):
    planned = PLANS[name]()
    kernel = kernel_of(planned, stage)
    assert not refusal(kernel)
    wrong = [("threads", kernel.threads // 2, "kThreads"), ("max_ctas", kernel.max_ctas // 2, "kMaxCtas")]
    if kernel.shared_bytes:
        wrong.append(("shared_bytes", kernel.shared_bytes + 16, "kSharedBytes"))
    if kernel.ctas_per_sm:
        wrong.append(("ctas_per_sm", kernel.ctas_per_sm + 1, "kCtasPerSm"))
        wrong.append(("cluster", 2, "kCluster"))
    for field, value, constant in wrong:
        found = refusal(dataclasses.replace(kernel, **{field: value}))
        assert f"Kernel::{constant} of the plan" in found, field


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, 256),
        (SHARE, 256),  # whose sum with other shares is rounded
        ({"out_dtype": jnp.dtype("float32")}, 512),
        (SHARE | {"rounded_to": jnp.dtype("float16")}, 512),
    ],
)
def test_rows_of_slots_have_the_bits_that_what_they_are_rounded_to_needs(options, words):
    assert many_tokens(2, **options).scratch[1].shape[1] == words


@pytest.mark.parametrize(
    "constant",
    ["kMaxTiles", "kSharedBytes", "kScratchBytes", "kMostGroupedSlots"],
)
def test_what_token_tiles_need_is_the_same_on_both_sides(constant):
    planned = PLANS["mma grouped"]()
    kernel = kernel_of(planned, "gate_up")
    (name,) = (name for name in kernel.constants if name.endswith(constant))
    wrong = dataclasses.replace(kernel, constants=kernel.constants | {name: kernel.constants[name] + 1})
    assert f"{name} of the plan" in refusal(wrong)


def test_a_fact_that_one_side_lacks_does_not_compile():
    planned = PLANS["mma"]()
    for stage in ("align", "down", "combine"):
        kernel = kernel_of(planned, stage)
        for name, facts in kernel.structs.items():
            for fact in facts:
                fewer = {other: value for other, value in facts.items() if other != fact}
                assert refusal(dataclasses.replace(kernel, structs=kernel.structs | {name: fewer})), fact


@pytest.mark.parametrize(
    ("name", "stage", "first", "second"),
    [
        ("mma", "gate_up", "operands.x", "operands.packed"),
        ("mma", "gate_up", "operands.packed", "operands.scales"),
        ("mma", "gate_up", "operands.scales", "epilogue.bias"),
        ("mma", "gate_up", "token_tiles.expert_ids", "epilogue.bias"),
        ("mma", "gate_up", "epilogue.out", "operands.x"),
        ("mma", "down", "epilogue.topk_weights", "operands.scales"),
        ("mma", "combine", "partials", "topk_ids"),
        ("mma", "combine", "partials", "out"),
        ("mma", "align", "parts.topk_ids", "sorted_token_ids"),
        ("wgmma", "down", "operands.packed", "operands.scales"),
        ("moe_gemm", "clear", "out", "first_rows"),
        ("moe_gemm", "moe_gemm", "epilogue.topk_weights", "token_tiles.first_rows"),
    ],
)
def test_pointers_of_different_types_cannot_be_exchanged(name, stage, first, second):
    planned = PLANS[name]()
    kernel = kernel_of(planned, stage)
    a, b = kernel.pointers[first], kernel.pointers[second]
    swapped = {first: dataclasses.replace(b, element=a.element), second: dataclasses.replace(a, element=b.element)}
    assert refusal(dataclasses.replace(kernel, pointers=kernel.pointers | swapped), whole=True)


@pytest.mark.parametrize(
    "member", ["operands.global_scales", "token_tiles.first_rows", "epilogue.bias", "operands.packed"]
)
def test_no_member_is_left_unbound(member):
    planned = PLANS["mma"]()
    kernel = kernel_of(planned, "gate_up")
    fewer = {name: pointer for name, pointer in kernel.pointers.items() if name != member}
    assert "sizeof(Kernel)" in refusal(dataclasses.replace(kernel, pointers=fewer))
    more = kernel.pointers | {"further": Pointer(0, "bfloat16")}
    assert refusal(dataclasses.replace(kernel, pointers=more))


def test_the_transposed_product_shares_the_ends_of_tiles_with_the_others():
    """It compiles: what the wgmma kernels have in common needs nothing that one of them lacks."""
    planned = plan_products.plan_grouped_product(
        array((2048, 640), jnp.bfloat16),
        experts(512, 640),
        2048,
        transposed=True,
        dtype=jnp.dtype(jnp.bfloat16),
        architecture="sm_90a",
    )
    kernel = kernel_of(planned, "transposed")
    assert "WgmmaGroupedGemm" in kernel.body
    assert b"wgmma" in compiler._compile(render([kernel]), "compute_90a")
