"""Every CUDA kernel compiled for every architecture, on a machine that has none of them; exports; the disk cache."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from oracle import assert_block_close, expert_block, random_experts, random_routing, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.activations import ACTIVATIONS, get_activation
from jax_marlin_moe.cuda import cache, compiler, plan
from jax_marlin_moe.cuda.kernels.align import plan_align
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.kernels.wgmma import WgmmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import DECODE_TOKENS, MODELS, PREFILL_TOKENS

needs_nvrtc = pytest.mark.skipif(compiler.unavailable_reason() is not None, reason=str(compiler.unavailable_reason()))

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
CALL = f"@{native.TARGETS['program', 'cuda']}"


@pytest.fixture
def lower(monkeypatch):
    """Lowers a function for a CUDA architecture. The architecture is read then, so every call traces anew."""

    def lower_for(architecture, function, *arguments):
        monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, architecture)
        traced = jax.jit(lambda *arrays: function(*arrays)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower_for


def array(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_experts(num_experts, k, n, *, group_size=None, zeros=False, bias=False, scale_dtype=jnp.bfloat16):
    groups = -(-k // (group_size or k))
    return jmm.MarlinWeights(
        packed=array((num_experts, k // 16, 2 * n)),
        scales=array((num_experts, groups, n), scale_dtype),
        zeros=array((num_experts, groups, n // 8)) if zeros else None,
        bias=array((num_experts, n), jnp.float32) if bias else None,
        input_order=None,
        format=jmm.FORMATS["int4_zp" if zeros else "int4"],
        group_size=group_size or k,
    )


def abstract_block(tokens, top_k, hidden, inner, num_experts, dtype, **options):
    return (
        array((tokens, hidden), dtype),
        abstract_experts(num_experts, hidden, 2 * inner, **options),
        abstract_experts(num_experts, inner, hidden, **options),
        array((tokens, top_k), jnp.float32),
        array((tokens, top_k)),
    )


def types_of(architecture):
    return ["float16"] if architecture == "sm_75" else ["bfloat16", "float16"]


def on_every_architecture(cases):
    """(architecture, dtype, *case): the cases with each type that the architecture has."""
    return [
        pytest.param(architecture, dtype, *case, id="-".join(map(str, (architecture, dtype, *case))))
        for architecture in ARCHITECTURES
        for dtype in types_of(architecture)
        for case in cases
    ]


@needs_nvrtc
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alignment_compiles(lower, architecture, mapped):
    def align(ids, expert_map):
        return jmm.moe_align_block_size(ids, block_size=16, num_experts=60, expert_map=expert_map)

    text = lower(architecture, align, array((300, 4)), array((60,)) if mapped else None)
    assert text.count(CALL) == 1


# Blocks of 8, 16, 48 and 64 have token tiles of 8, 16, 24 and 32.
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


@needs_nvrtc
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, None])
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90a"])
def test_every_group_size_compiles(lower, architecture, group_size):
    arguments = abstract_block(
        1, 2, 256, 128, 8, jnp.float16, group_size=group_size, zeros=True, scale_dtype=jnp.float16
    )
    assert CALL in lower(architecture, jmm.fused_moe, *arguments)


def formatted_experts(num_experts, k, n, name, dtype, *, group_size="customary", bias=False):
    """Shapes and dtypes of experts in any format, scales in `dtype` where they are floats."""

    def make(dense, bias):
        return jmm.quantize(dense, name, group_size=group_size, bias=bias)

    bias = array((num_experts, n), jnp.float32) if bias else None
    return jax.eval_shape(make, array((num_experts, k, n), dtype), bias)


EVERY_ACTIVATION = (*ACTIVATIONS.values(), jmm.swiglu(7.0, 1.702, 1.0), jmm.swiglu_step(7.0), jmm.situ(4.0, 25.0))


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


@needs_nvrtc
@pytest.mark.parametrize("name", jmm.FORMATS)
def test_every_group_size_of_every_format_compiles(lower, name):
    row = jmm.FORMATS[name]
    for group_size in (*row.group_sizes, *([None] if row.per_channel else [])):
        weights = formatted_experts(4, 448, 128, name, jnp.bfloat16, group_size=group_size)

        def product(x, weights, ids):
            return jmm.moe_gemm(x, weights, jmm.moe_align_block_size(ids, block_size=16, num_experts=4), top_k=2)

        assert CALL in lower("sm_90a", product, array((9, 448), jnp.bfloat16), weights, array((9, 2)))


def planned_block(tokens, scheme=None):
    """64 experts, top 8: `plan_fused_moe` for sm_90a."""
    x, gate_up, down, *_ = abstract_block(tokens, 8, 512, 256, 64, jnp.bfloat16, group_size=128)
    return plan.plan_fused_moe(
        x,
        gate_up,
        down,
        tokens=tokens,
        top_k=8,
        routed_experts=64,
        mapped=False,
        activation=get_activation("silu"),
        architecture="sm_90a",
        scheme=scheme,
    )


@pytest.mark.parametrize(
    ("routing", "tokens", "found", "kernels"),
    [
        ("direct", 2, "DirectTiles", 3),
        ("grouped", 16, "GroupedTiles", 3),
        ("grouped", 17, "AlignedTiles", 4),  # more slots than a CTA groups
        ("aligned", 1, "AlignedTiles", 4),
    ],
)
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_scheme_says_who_finds_the_slots_and_what_overlaps(routing, tokens, found, kernels, overlaps):
    tile = MmaTile(8, 2, 2, 1, 64, 2, 2)
    planned = planned_block(tokens, BlockScheme(routing, tile, tile, overlaps=overlaps))
    assert found in planned.source
    assert len(planned.kernels) == kernels
    assert [kernel.overlaps_predecessor for kernel in planned.kernels[-2:]] == [overlaps, True]


@pytest.mark.parametrize(("tokens", "aligns"), [(1, False), (8, False), (17, True)])
def test_few_slots_need_no_alignment_kernel(tokens, aligns):
    assert ("AlignBlockSize" in planned_block(tokens).source) == aligns


@pytest.mark.parametrize(
    "scheme",
    [
        BlockScheme("aligned", MmaTile(8, 2, 1, 1, 64, 2, 2), MmaTile(16, 2, 1, 1, 64, 2, 2)),
        BlockScheme("aligned", MmaTile(8, 2, 3, 1, 64, 2, 2), MmaTile(8, 2, 1, 1, 64, 2, 2)),
        BlockScheme("aligned", WgmmaTile(8, 2, 1, 2, 64, 3, 1, False), WgmmaTile(8, 2, 1, 2, 64, 4, 1, False)),
    ],
    ids=["blocks of 8 and of 16 rows", "half a tile of columns", "a stage of two warpgroups"],
)
def test_a_scheme_that_does_not_fit_is_refused(lower, scheme):
    arguments = abstract_block(16, 2, 512, 512, 4, jnp.bfloat16, group_size=128)

    def block(*arrays):
        return jmm.fused_moe(*arrays, implementation="cuda", cuda_scheme=scheme)

    with pytest.raises(ValueError, match=r"cuda_scheme is BlockScheme.* does not fit"):
        lower("sm_90a", block, *arguments)


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


@pytest.mark.parametrize("tokens", DECODE_TOKENS + PREFILL_TOKENS)
@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_blocks_of_models_have_shapes(shape, tokens):
    y = jax.eval_shape(jmm.fused_moe, *model_block(shape, tokens))
    assert (y.shape, y.dtype) == ((tokens, shape.hidden), jnp.bfloat16)


@needs_nvrtc
@pytest.mark.long
@pytest.mark.parametrize("tokens", DECODE_TOKENS + PREFILL_TOKENS)
@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_blocks_of_models_compile(lower, shape, tokens):
    text = lower("sm_90a", jmm.fused_moe, *model_block(shape, tokens))
    assert text.count(CALL) == 1
    assert "dot_general" not in text


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_86", "sm_120a"])
@pytest.mark.parametrize("shape", MODELS.values(), ids=lambda shape: shape.name)
def test_blocks_of_models_compile_where_shared_memory_is_scarce(lower, architecture, shape):
    for tokens in (1, 4096):
        assert CALL in lower(architecture, jmm.fused_moe, *model_block(shape, tokens, jnp.float16))


# Exports.

CHECKS = [export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]


def concrete_block():
    rng = np.random.default_rng(0)
    gate_up, down = (random_experts(rng, 5, *shape, group_size=64, bias=True) for shape in ((128, 256), (128, 128)))
    x = random_rows(rng, 9, 128, jnp.bfloat16)
    router, ids = random_routing(rng, 9, 3, 5)
    return (x, gate_up.packed(), down.packed(), router, ids), expert_block(x, gate_up, down, router, ids)


def exported_block(platforms):
    arguments, expected = concrete_block()
    leaves, treedef = jax.tree.flatten(arguments)

    def block(*arrays):
        return jmm.fused_moe(*jax.tree.unflatten(treedef, arrays))

    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    program = export.export(jax.jit(block), platforms=platforms, disabled_checks=CHECKS)(*leaves)
    return export.deserialize(program.serialize()), leaves, expected


def test_an_export_runs_on_the_cpu():
    program, leaves, expected = exported_block(["cpu"])
    assert program.platforms == ("cpu",)
    assert native.TARGETS["fused_moe", "cpu"] in program.mlir_module()
    with jax.default_device(jax.devices("cpu")[0]):
        assert_block_close(program.call(*leaves), expected)


@needs_nvrtc
def test_an_export_for_cuda_carries_its_kernels(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    program, leaves, _ = exported_block(["cuda"])
    assert program.platforms == ("cuda",)
    assert [aval.shape for aval in program.out_avals] == [(9, 128)]
    assert [aval.shape for aval in program.in_avals] == [leaf.shape for leaf in leaves]
    assert native.TARGETS["program", "cuda"] in program.mlir_module()
    assert len(program.mlir_module_serialized) > 10_000  # machine code and all


@needs_nvrtc
def test_an_export_for_both_runs_here(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    program, leaves, expected = exported_block(["cpu", "cuda"])
    assert native.TARGETS["program", "cuda"] in program.mlir_module()
    with jax.default_device(jax.devices("cpu")[0]):
        assert_block_close(program.call(*leaves), expected)


@pytest.mark.gpu
def test_an_export_runs_on_cuda():
    program, leaves, expected = exported_block(["cuda"])
    with jax.default_device(jax.devices("cuda")[0]):
        assert_block_close(program.call(*leaves), expected)


def test_an_export_that_was_not_told_of_our_calls_is_refused():
    with pytest.raises(ValueError, match=native.TARGETS["moe_align_block_size", "cpu"]):
        export.export(
            jax.jit(lambda ids: jmm.moe_align_block_size(ids, block_size=8, num_experts=4).expert_ids),
            platforms=["cpu"],
        )(array((3, 2)))


# The compiler.


def device_of(capability):
    return lambda backend: [SimpleNamespace(compute_capability=capability)]


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [("7.5", "sm_75"), ("8.0", "sm_80"), ("8.9", "sm_89"), ("9.0", "sm_90a"), ("10.0", "sm_100a"), ("12.0", "sm_120a")],
)
def test_the_device_names_the_architecture(monkeypatch, capability, architecture):
    monkeypatch.delenv(compiler.ARCHITECTURE_VARIABLE, raising=False)
    monkeypatch.setattr(jax, "local_devices", device_of(capability))
    assert compiler.target_architecture() == architecture
    assert compiler.compute_capability(architecture) == int(capability.replace(".", ""))


@pytest.mark.parametrize(
    ("named", "architecture"),
    [
        ("sm_80", "sm_80"),
        ("sm_90", "sm_90a"),
        ("sm_120a", "sm_120a"),
        ("compute_75", "compute_75"),
        ("compute_89", "compute_89"),
        ("compute_90", "compute_90a"),
        ("compute_100f", "compute_100f"),
    ],
)
def test_the_environment_names_the_architecture(monkeypatch, named, architecture):
    monkeypatch.setattr(jax, "local_devices", device_of("9.0"))
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, named)
    assert compiler.target_architecture() == architecture
    assert str(compiler.compute_capability(architecture)) in named
    assert compiler.is_virtual(architecture) == named.startswith("compute")


@pytest.mark.parametrize("capability", ["7.0", "99.9"])
def test_a_device_that_the_kernels_are_not_made_for_is_an_error(monkeypatch, lower, capability):
    monkeypatch.setattr(jax, "local_devices", device_of(capability))
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    message = rf"device has compute capability {capability}; it must be one of sm_75, .* set JAX_MARLIN_MOE_CUDA"
    with pytest.raises(ValueError, match=message):
        lower("", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.float16))


def test_no_device_and_no_architecture_is_an_error(monkeypatch, lower):
    def no_devices(backend):
        raise RuntimeError("no cuda")

    monkeypatch.setattr(jax, "local_devices", no_devices)
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    with pytest.raises(ValueError, match=r"JAX_MARLIN_MOE_CUDA_ARCH is not set; .* such as sm_90a"):
        lower("", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.float16))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        *(
            (name, "it must look like sm_90a, or compute_80 for PTX")
            for name in ("90a", "sm_90b", "sm_9", "compute", "compute_", "lto_90", "sm_90 ", "SM_80", "sm_9.0")
        ),
        *((name, "it must be one of sm_75, .*, sm_121, or compute_ in") for name in ("sm_42", "compute_70", "sm_999")),
    ],
)
def test_a_name_that_is_no_architecture_is_an_error(monkeypatch, lower, named, message):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    with pytest.raises(ValueError, match=f"JAX_MARLIN_MOE_CUDA_ARCH is '{named}'; {message}"):
        lower(named, jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.float16))


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "target"), [("compute_75", "sm_75"), ("compute_89", "sm_89"), ("compute_90a", "sm_90a")]
)
def test_a_virtual_architecture_gives_ptx(monkeypatch, architecture, target):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    source = plan_align(12, 5, 8, False, architecture).source
    ptx = compiler.compile_cubin.__wrapped__(source, architecture)
    text = ptx.decode()
    assert text.count("\0") == 1
    assert text.endswith("\0")  # the driver reads up to there
    assert f".target {target}\n" in text
    assert ".entry " in text


@needs_nvrtc
def test_a_block_for_a_virtual_architecture_has_its_tiles(lower):
    """As for the card's own architecture: the same kernels, in a custom call of ours."""
    arguments = abstract_block(33, 2, 256, 128, 8, jnp.float16, scale_dtype=jnp.float16)
    assert lower("compute_86", jmm.fused_moe, *arguments).count(CALL) == 1
    x, gate_up, down, *_ = arguments
    options = {"tokens": 33, "top_k": 2, "routed_experts": 8, "mapped": False, "activation": get_activation("silu")}
    sources = [
        plan.plan_fused_moe(x, gate_up, down, **options, architecture=name).source for name in ("sm_86", "compute_86")
    ]
    assert sources[0] == sources[1]


@needs_nvrtc
def test_turing_has_no_bfloat16_as_ptx_either(lower):
    with pytest.raises(ValueError, match="x has dtype bfloat16, which compute capability 75 lacks; pass float16"):
        lower("compute_75", jmm.fused_moe, *abstract_block(4, 2, 128, 64, 4, jnp.bfloat16))


HEADERS = sorted(
    path.relative_to(compiler.source_directory()).as_posix() for path in compiler.source_directory().rglob("*.cuh")
)


@needs_nvrtc
@pytest.mark.parametrize("header", HEADERS)
def test_every_header_includes_what_it_uses(header, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    assert compiler.compile_cubin.__wrapped__(f'#include "{header}"', "sm_90a")


def test_instructions_stand_in_one_folder():
    assert {
        header.split("/")[0] for header in HEADERS if "asm" in (compiler.source_directory() / header).read_text()
    } == {"ptx"}


def test_headers_use_no_builtin_that_an_older_compiler_lacks():
    """NVRTC 12.9 and 13.0 do not parse offsetof, 13.5 does."""
    root = compiler.source_directory()
    assert not [path for path in root.rglob("*.cuh") if re.search(r"\boffsetof\(|__builtin_", path.read_text())]


def test_the_key_of_a_program_depends_on_headers_in_folders(monkeypatch, tmp_path):
    (tmp_path / "ptx").mkdir()
    digests = []
    monkeypatch.setattr(compiler, "source_directory", lambda: tmp_path)
    for text in ("one", "another"):
        (tmp_path / "ptx" / "a.cuh").write_text(text)
        digests.append(compiler._headers_digest.__wrapped__())
    (tmp_path / "ptx" / "a.cuh").rename(tmp_path / "a.cuh")
    assert len({*digests, compiler._headers_digest.__wrapped__()}) == 3


@needs_nvrtc
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("this is no C++", "sm_90a"),
        ('#include "absent.cuh"', "sm_90a"),
        ("", "sm_42"),
        ("this is no C++", "compute_80"),
        ("", "compute_42"),
    ],
)
def test_what_the_compiler_refuses_is_a_compilation_error(source, architecture, monkeypatch, capsys):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    with pytest.raises(compiler.CompilationError, match=f"refused a kernel for {architecture}"):
        compiler.compile_cubin.__wrapped__(source, architecture)
    assert source in capsys.readouterr().err


def test_a_missing_compiler_names_the_extra(monkeypatch):
    def missing():
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(compiler, "version", missing)
    reason = compiler.unavailable_reason.__wrapped__()
    assert "No module named 'cuda'" in reason
    assert "jax_marlin_moe[cuda13]" in reason
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: reason)
    with pytest.raises(ImportError, match=r"cannot compile its CUDA kernels: .*install jax_marlin_moe\[cuda13\]"):
        compiler.compile_cubin.__wrapped__("", "sm_90a")
    with pytest.raises(ValueError, match=r"implementation is 'cuda', .*install jax_marlin_moe\[cuda13\]"):
        jax.eval_shape(
            lambda *arrays: jmm.fused_moe(*arrays, implementation="cuda"),
            *abstract_block(4, 2, 128, 64, 4, jnp.float16),
        )


def test_a_missing_compiler_is_no_reason_to_carry_the_reference_unasked(monkeypatch, lower):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: "NVRTC was not found")
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    arguments = abstract_block(4, 2, 128, 64, 4, jnp.float16)
    with pytest.raises(ValueError, match="lowered for cuda on a cpu backend would carry the slow reference: NVRTC was"):
        lower("sm_90a", jmm.fused_moe, *arguments)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.warns(UserWarning, match="slow reference on cuda: NVRTC was not found"):
        text = lower("sm_90a", jmm.fused_moe, *arguments)
    assert CALL not in text
    assert "dot_general" in text


# The disk cache.


@pytest.fixture
def compilations(monkeypatch):
    """Replaces NVRTC by a recorder: what is compiled, in order."""
    compiled = []

    def record(source, architecture):
        compiled.append((source, architecture))
        return f"{source} for {architecture}".encode()

    monkeypatch.setattr(compiler, "_compile", record)
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return compiled


def compile_anew(source="a", architecture="sm_90a"):
    """As a new process would: nothing is remembered but the disk."""
    return compiler.compile_cubin.__wrapped__(source, architecture)


def test_what_was_compiled_is_found_again(monkeypatch, tmp_path, compilations):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "new" / "folder"))
    assert compile_anew() == compile_anew() == b"a for sm_90a"
    assert compilations == [("a", "sm_90a")]
    assert [file.suffix for file in (tmp_path / "new" / "folder").iterdir()] == [".cubin"]


def test_everything_that_shapes_a_cubin_is_in_its_key(monkeypatch, tmp_path, compilations):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    compile_anew()
    compile_anew(source="b")
    compile_anew(architecture="sm_80")
    compile_anew(architecture="compute_80")
    monkeypatch.setattr(compiler, "version", lambda: (13, 1))
    compile_anew()
    monkeypatch.setattr(compiler, "_headers_digest", lambda: b"edited")
    compile_anew()
    assert len(compilations) == 6
    assert len(list(tmp_path.iterdir())) == 6


def test_the_cache_can_be_switched_off(monkeypatch, tmp_path, compilations):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "")
    compile_anew()
    compile_anew()
    assert len(compilations) == 2
    assert not list(tmp_path.iterdir())


def test_the_cache_lies_in_the_users_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "jax_marlin_moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "jax_marlin_moe"


def test_a_folder_that_cannot_be_made_costs_a_compilation(monkeypatch, tmp_path, compilations):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "file" / "folder"))
    assert compile_anew() == compile_anew() == b"a for sm_90a"
    assert len(compilations) == 2


@pytest.mark.parametrize("function", ["replace", "fdopen"])
def test_a_write_that_fails_leaves_nothing_behind(monkeypatch, tmp_path, compilations, function):
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, function, full)
    assert compile_anew() == b"a for sm_90a"
    assert not list(tmp_path.iterdir())


def test_readers_never_see_half_a_file(monkeypatch, tmp_path):
    """Four processes store different files of a megabyte under one name while this one reads it."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path))
    script = (
        "import runpy, sys\n"
        "store = runpy.run_path(sys.argv[2])['store']\n"  # without the package, whose imports take longer
        "for _ in range(100): store('key', bytes([int(sys.argv[1])]) * 2**20)\n"
    )
    command = [sys.executable, "-c", script]
    writers = [subprocess.Popen([*command, str(i), cache.__file__], cwd=tmp_path) for i in range(4)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        cubin = cache.load("key")
        if cubin is not None:
            assert len(cubin) == 2**20
            assert len(set(cubin)) == 1
            seen.add(cubin[0])
    assert [writer.returncode for writer in writers] == [0] * 4
    assert seen
    assert [file.name for file in tmp_path.iterdir()] == ["key.cubin"]
