"""Every CUDA kernel compiles for every architecture, and a program has the kernels that its call needs."""

import jax
import jax.numpy as jnp
import pytest
from abstract_calls import (
    ARCHITECTURES,
    CALL,
    abstract_block,
    abstract_experts,
    array,
    formatted_experts,
    needs_nvrtc,
    on_every_architecture,
    planned_block,
    types_of,
)

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import ACTIVATIONS, get_activation
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.kernels.align import plan_align
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import DECODE_TOKENS, MODELS, PREFILL_TOKENS
from jax_marlin_moe.ops.four_numbers import WORDS
from jax_marlin_moe.ops.fused_moe import expert_block
from jax_marlin_moe.ops.packed_shares import add_shares, pack_share


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alignment_compiles(lower, architecture, mapped):
    def align(ids, expert_map):
        return jmm.moe_align_block_size(ids, block_size=16, num_experts=60, expert_map=expert_map)

    text = lower(architecture, align, array((300, 4)), array((60,)) if mapped else None)
    assert text.count(CALL) == 1


# Blocks of 8, 16, 48 and 64 have token tiles of 8, 16, 24 and 32.
@pytest.mark.covering
@pytest.mark.sampled(2)
@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "dtype", "block_size", "zeros"),
    on_every_architecture([(8, True), (16, False), (48, True), (64, False)]),
)
def test_product_compiles(lower, architecture, dtype, block_size, zeros):
    # Options that only the epilogue and the scales' loads know alternate with the rest.
    extras = (dtype == "float16") != zeros
    weights = abstract_experts(
        6, 512, 256, group_size=128, zeros=zeros, bias=extras, scale_dtype=jnp.dtype(dtype) if extras else jnp.float16
    )

    def product(x, weights, ids, router):
        alignment = jmm.moe_align_block_size(ids, block_size=block_size, num_experts=6)
        return jmm.moe_gemm(
            x, weights, alignment, top_k=2, topk_weights=router if extras else None, mul_topk_weights=extras
        )

    text = lower(
        architecture, product, array((33, 512), jnp.dtype(dtype)), weights, array((33, 2)), array((33, 2), jnp.float32)
    )
    assert text.count(CALL) == 2


@pytest.mark.covering
@pytest.mark.sampled(2)
@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "dtype", "tokens", "zeros"),
    on_every_architecture([(1, False), (1, True), (24, True), (64, False), (400, True)]),
)
def test_block_compiles(lower, architecture, dtype, tokens, zeros):
    extras = (dtype == "float16") != zeros
    arguments = abstract_block(
        tokens, 4, 512, 256, 16, jnp.dtype(dtype), group_size=64, zeros=zeros, bias=extras, scale_dtype=jnp.float16
    )

    def block(*arrays):
        *arrays, expert_map = arrays
        return jmm.fused_moe(*arrays, expert_map=expert_map)

    text = lower(architecture, block, *arguments, array((24,)) if extras else None)
    assert text.count(CALL) == 1
    assert "dot_general" not in text  # of the reference


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_over_cards_compile(lower, architecture):
    def total(shares):
        return add_shares(pack_share(shares), "float32"), add_shares(pack_share(shares[:2]), "bfloat16")

    text = lower(architecture, total, array((9, 64, 128), jnp.float32))
    assert text.count(CALL) == (3 if architecture == "sm_75" else 4)  # which lacks bfloat16


@needs_nvrtc
@pytest.mark.parametrize(
    ("down", "rows"),
    [
        (WgmmaTile(48, 2, 1, 1, 128, 3, 1, True), "CombineFourColumns"),
        # The same kernels, but for the width of a tile of down.
        pytest.param(WgmmaTile(48, 1, 1, 1, 128, 3, 1, True), "CombineFourColumns", marks=pytest.mark.exhaustive),
        (MmaTile(32, 2, 1, 2, 64, 3, 1), "Combine"),
    ],
)
def test_a_block_that_packs_its_shares_compiles(lower, monkeypatch, down, rows):
    scheme = BlockScheme("aligned", down if rows == "Combine" else WgmmaTile(48, 2, 1, 1, 128, 3, 1, True), down)
    sources = []
    compile_cubin = compiler.compile_cubin
    monkeypatch.setattr(
        compiler, "compile_cubin", lambda source, *to: (sources.append(source), compile_cubin(source, *to))[1]
    )

    def block(*arrays):
        return expert_block(
            *arrays, None, activation=get_activation("silu"), out_dtype=WORDS, rounded_to=jnp.dtype("bfloat16"),
            cuda_scheme=scheme, implementation=None,
        )  # fmt: skip

    lower("sm_90a", block, *abstract_block(200, 4, 512, 256, 16, jnp.bfloat16, group_size=64))
    assert f"jmm::{rows}<Facts>" in sources[-1]
    assert "using Element = int32_t;" in sources[-1]


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90a"])
def test_every_group_size_compiles(lower, architecture, group_size):
    arguments = abstract_block(
        1, 2, 256, 128, 8, jnp.float16, group_size=group_size, zeros=True, scale_dtype=jnp.float16
    )
    assert CALL in lower(architecture, jmm.fused_moe, *arguments)


EVERY_ACTIVATION = (*ACTIVATIONS.values(), jmm.swiglu(7.0, 1.702, 1.0), jmm.swiglu_step(7.0), jmm.situ(4.0, 25.0))


@pytest.mark.covering
@needs_nvrtc
@pytest.mark.parametrize("name", jmm.FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_format_compiles(lower, architecture, name):
    # What the format does not decide alternates: the type of x and of float scales, few and many tokens, the
    # activation, biases.
    number = list(jmm.FORMATS).index(name) + ARCHITECTURES.index(architecture)
    dtype = jnp.dtype(types_of(architecture)[-1 if number % 2 else 0])
    tokens = 3 if number % 3 else 96
    activation = EVERY_ACTIVATION[number % len(EVERY_ACTIVATION)]
    halves = 2 if activation.gated else 1
    gate_up = formatted_experts(6, 320, halves * 192, name, [dtype, jnp.float32][number % 2], bias=tokens == 96)
    down = formatted_experts(6, 192, 320, name, jnp.float16)

    def block(*arrays):
        return jmm.fused_moe(*arrays, activation=activation)

    text = lower(
        architecture,
        block,
        array((tokens, 320), dtype),
        gate_up,
        down,
        array((tokens, 2), jnp.float32),
        array((tokens, 2)),
    )
    assert text.count(CALL) == 1
    assert "dot_general" not in text


GROUPED = [
    (name, group_size)
    for name, row in jmm.FORMATS.items()
    for group_size in (*row.group_sizes, *([None] if row.per_channel else []))
]


@pytest.mark.sampled(8)
@needs_nvrtc
@pytest.mark.parametrize(("name", "group_size"), GROUPED)
def test_every_group_size_of_every_format_compiles(lower, name, group_size):
    weights = formatted_experts(4, 448, 128, name, jnp.bfloat16, group_size=group_size)

    def product(x, weights, ids):
        return jmm.moe_gemm(x, weights, jmm.moe_align_block_size(ids, block_size=16, num_experts=4), top_k=2)

    assert CALL in lower("sm_90a", product, array((9, 448), jnp.bfloat16), weights, array((9, 2)))


def plan_of_64_experts(tokens, scheme=None):
    x, gate_up, down, *_ = abstract_block(tokens, 8, 512, 256, 64, jnp.bfloat16, group_size=128)
    return planned_block(x, gate_up, down, top_k=8, scheme=scheme)


@pytest.mark.parametrize(
    ("routing", "tokens", "found", "kernels"),
    [
        ("direct", 2, "DirectTiles", 3),
        ("grouped", 16, "GroupedTiles", 3),
        ("grouped", 64, "GroupedTiles", 3),
        ("grouped", 65, "AlignedTiles", 4),  # more slots than a CTA groups
        ("aligned", 1, "AlignedTiles", 4),
    ],
)
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_scheme_says_who_finds_the_slots_and_what_overlaps(routing, tokens, found, kernels, overlaps):
    tile = MmaTile(8, 2, 2, 1, 64, 2, 2)
    planned = plan_of_64_experts(tokens, BlockScheme(routing, tile, tile, overlaps=overlaps))
    assert found in planned.source
    assert len(planned.kernels) == kernels
    assert [kernel.overlaps_predecessor for kernel in planned.kernels[-2:]] == [overlaps, True]


@pytest.mark.parametrize(("tokens", "aligns"), [(1, False), (8, False), (17, True)])
def test_few_slots_need_no_alignment_kernel(tokens, aligns):
    assert ("AlignBlockSize" in plan_of_64_experts(tokens).source) == aligns


@needs_nvrtc
@pytest.mark.parametrize(("slots", "kernels"), [(2048, ["align"]), (2049, ["count_slots", "align"])])
def test_many_slots_are_aligned_by_many_ctas(slots, kernels):
    planned = plan_align(slots, 60, 16, False, "sm_90a")
    assert [kernel.name for kernel in planned.kernels] == [f"jmm_{stage}_m16" for stage in kernels]
    assert len(planned.scratch) == len(kernels) - 1
    compiler.compile_cubin(planned.source, "sm_90a")


@pytest.mark.parametrize(
    "scheme",
    [
        BlockScheme("aligned", MmaTile(16, 2, 1, 1, 64, 2, 2), MmaTile(24, 2, 1, 1, 64, 2, 2)),
        BlockScheme("grouped", MmaTile(8, 2, 1, 1, 64, 2, 2), MmaTile(16, 2, 1, 1, 64, 2, 2)),
        BlockScheme("aligned", MmaTile(8, 2, 3, 1, 64, 2, 2), MmaTile(8, 2, 1, 1, 64, 2, 2)),
        BlockScheme("aligned", WgmmaTile(8, 2, 1, 2, 64, 3, 1, False), WgmmaTile(8, 2, 1, 2, 64, 4, 1, False)),
    ],
    ids=["blocks of 16 and of 24 rows", "two blocks of no list", "half a tile of columns", "a stage of two warpgroups"],
)
def test_a_scheme_that_does_not_fit_is_refused(lower, scheme):
    arguments = abstract_block(16, 2, 512, 512, 4, jnp.bfloat16, group_size=128)

    def block(*arrays):
        return jmm.fused_moe(*arrays, implementation="cuda", cuda_scheme=scheme)

    with pytest.raises(ValueError, match=r"cuda_scheme is BlockScheme.* does not fit"):
        lower("sm_90a", block, *arguments)


@pytest.mark.sampled(3)
@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smallest_block_compiles(lower, architecture):
    arguments = abstract_block(1, 1, 64, 64, 1, jnp.float16, scale_dtype=jnp.float16)
    assert CALL in lower(architecture, jmm.fused_moe, *arguments)


@needs_nvrtc
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_tokens_need_no_kernel(lower, tokens):
    arguments = abstract_block(tokens, 2, 64, 64, 4, jnp.bfloat16)
    text = lower("sm_90a", jmm.fused_moe, *arguments)
    assert (CALL in text) == (tokens > 0)


@needs_nvrtc
def test_turing_has_no_bfloat16(lower):
    with pytest.raises(ValueError, match="x has dtype bfloat16, which compute capability 75 lacks; pass float16"):
        lower("sm_75", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.bfloat16))


def model_block(shape, tokens, dtype=jnp.bfloat16):
    return abstract_block(
        tokens,
        shape.top_k,
        shape.hidden,
        shape.intermediate,
        shape.num_experts,
        dtype,
        group_size=shape.group_size,
        scale_dtype=dtype,
    )


@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_blocks_of_models_have_shapes(shape):
    y = jax.eval_shape(jmm.fused_moe, *model_block(shape, 7))
    assert (y.shape, y.dtype) == ((7, shape.hidden), jnp.bfloat16)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.covering
@pytest.mark.sampled(3)
@pytest.mark.parametrize("tokens", DECODE_TOKENS + PREFILL_TOKENS)
@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_blocks_of_models_compile(lower, shape, tokens):
    text = lower("sm_90a", jmm.fused_moe, *model_block(shape, tokens))
    assert text.count(CALL) == 1
    assert "dot_general" not in text


@pytest.mark.covering
@pytest.mark.sampled(4)
@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_86", "sm_120a"])
@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_blocks_of_models_compile_where_shared_memory_is_scarce(lower, architecture, shape):
    for tokens in (1, 4096):
        assert CALL in lower(architecture, jmm.fused_moe, *model_block(shape, tokens, jnp.float16))
