"""Calls of the ops without values, for lowering them to CUDA on a machine without a card."""

import io

import jax
import jax.numpy as jnp
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.cuda.plan import plan_fused_moe

needs_nvrtc = pytest.mark.skipif(compiler.unavailable_reason() is not None, reason=str(compiler.unavailable_reason()))


ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]


CALL = f"@{native.TARGETS['program', 'cuda']}"


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


def planned_block(x, gate_up, down, *, top_k, **options):
    """`plan_fused_moe` for a row of each token, by default for H200s with every expert in the matrices."""
    usual = {"routed_experts": gate_up.num_experts, "mapped": False, "activation": get_activation("silu")}
    options = usual | {"architecture": "sm_90a"} | options
    return plan_fused_moe(x, gate_up, down, tokens=x.shape[0], top_k=top_k, **options)


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


def formatted_experts(num_experts, k, n, name, dtype, *, group_size="customary", bias=False):
    """Shapes and dtypes of experts in any format, scales in `dtype` where they are floats."""

    def make(dense, bias):
        return jmm.quantize(dense, name, group_size=group_size, bias=bias)

    bias = array((num_experts, n), jnp.float32) if bias else None
    return jax.eval_shape(make, array((num_experts, k, n), dtype), bias)


def ptxas_log(source: str) -> str:
    """What ptxas says about each kernel of a translation unit for Hopper: registers, and products it serialises."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch="sm_90a", std="c++20", include_path=str(compiler.source_directory()), ptxas_options=["-v"]
    )
    log = io.StringIO()
    Program(source, "c++", options).compile("cubin", logs=log)
    return log.getvalue()
