"""What CPU handlers do with extents that no memory backs, with memory that runs out, and with listings made by hand."""

import subprocess
import sys
import textwrap

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe import native

INNER = 64


def matrix(experts, k, n, group_size):
    """Operands of int4 experts without a value; whether they have elements is for the extents to say."""
    return [
        host_arrays.zeros((experts, k // 16, 2 * n), jnp.int32),
        host_arrays.zeros((experts, -(-k // group_size), n), jnp.bfloat16),
        host_arrays.zeros((0,), jnp.int32),
        host_arrays.zeros((0,), jnp.float32),
        host_arrays.zeros((0,), jnp.float32),
    ]


def matrix_attributes(prefix, group_size):
    values = {"code": "int4", "scale": "float", "zeros": "none", "zero_point": np.int64(8)}
    values["group_size"] = np.int64(group_size)
    return {prefix + name: value for name, value in values.items()}


def call(target, result, operands, **attributes):
    """A call that XLA keeps although its result is empty."""
    run = jax.ffi.ffi_call(target, result, has_side_effect=True)
    return jax.block_until_ready(jax.jit(lambda *operands: run(*operands, **attributes))(*operands))


def block(*, experts=1, tokens=0, top_k=1, hidden=64, group_size=64, map_length=0):
    down_columns = -(-hidden // 64) * 64
    operands = [
        host_arrays.zeros((tokens, hidden), jnp.bfloat16),
        *matrix(experts, hidden, 2 * INNER, group_size),
        *matrix(experts, INNER, down_columns, INNER),
        host_arrays.zeros((tokens, top_k), jnp.float32),
        host_arrays.zeros((tokens, top_k), jnp.int32),
        host_arrays.zeros((map_length,), jnp.int32),
        host_arrays.zeros((0,), jnp.float32),
        host_arrays.zeros((0,), jnp.float32),
    ]
    return call(
        native.TARGETS["fused_moe", "cpu"],
        jax.ShapeDtypeStruct((tokens, down_columns), jnp.bfloat16),
        operands,
        activation="silu",
        activation_parameters=np.zeros(0, np.float32),
        intermediate="none",
        **matrix_attributes("gate_up_", group_size),
        **matrix_attributes("down_", INNER),
    )


def gemm(*, experts=1, tokens=0, top_k=1, k=64, n=64, group_size=64, block_size=8):
    operands = [
        host_arrays.zeros((tokens, k), jnp.bfloat16),
        *matrix(experts, k, n, group_size),
        host_arrays.zeros((0,), jnp.float32),
        *(host_arrays.zeros((length,), jnp.int32) for length in (0, 0, 1)),
    ]
    return call(
        native.TARGETS["moe_gemm", "cpu"],
        jax.ShapeDtypeStruct((tokens * top_k, n), jnp.bfloat16),
        operands,
        top_k=np.int64(top_k),
        block_size=np.int64(block_size),
        mul_topk_weights=False,
        **matrix_attributes("", group_size),
    )


def test_calls_without_tokens_pass_the_checks():
    assert block().shape == gemm().shape == (0, 64)


@pytest.mark.parametrize(
    ("run", "sizes", "message"),
    [
        (block, {"experts": 0, "top_k": 2**30, "hidden": 2**34}, "gate_up packed has 0 experts"),  # top_k * N is 2^64
        (block, {"experts": 0}, "gate_up packed has 0 experts; there must be at least one"),
        (gemm, {"experts": 0}, "packed has 0 experts; there must be at least one"),
        (gemm, {"experts": 0, "k": 2**40}, "packed is the product of .*; it must be at most 281474976710656|0 experts"),
        (gemm, {"k": 2**49, "experts": 0}, r"x has shape \[0, 562949953421312\]; extents must be at most 2814749767"),
        (block, {"top_k": 2**50}, r"topk_ids has shape \[0, 1125899906842624\]; extents must be at most 281474976"),
        (block, {"top_k": 2**47}, r"what a token's experts compute is the product of \[140737488355328, 64\]; it must"),
        (gemm, {"group_size": 2**50}, "group_size is 1125899906842624; it must be at most 281474976710656"),
    ],
)
def test_extents_that_no_memory_backs_are_refused(run, sizes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*({message})"):
        run(**sizes)


def under_memory_limit(program):
    """What a program prints in a process of its own, after whose `limit(bytes)` no more than these can be had."""
    begin = """
        import resource, sys, warnings
        warnings.simplefilter("ignore")
        import jax, jax.numpy as jnp, numpy as np
        import jax_marlin_moe as jmm

        def limit(bytes):
            pages = int(open("/proc/self/statm").read().split()[0])
            most = pages * resource.getpagesize() + bytes
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
    """
    source = textwrap.dedent(begin) + textwrap.dedent(program)
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_runs_out_is_an_error_with_op_and_size():
    output = under_memory_limit("""
        gate_up = jmm.MarlinWeights(
            jnp.zeros((8, 256, 2 * 128), jnp.int32), jnp.ones((8, 1, 128), jnp.bfloat16), None, None, None,
            jmm.FORMATS["int4"], group_size=4096)
        down = jmm.MarlinWeights(
            jnp.zeros((8, 4, 2 * 4096), jnp.int32), jnp.ones((8, 1, 4096), jnp.bfloat16), None, None, None,
            jmm.FORMATS["int4"], group_size=64)
        layer = jax.jit(lambda x, w, i: jmm.fused_moe(x, gate_up, down, w, i, implementation="cpu"))
        arguments = jnp.zeros((512, 4096), jnp.bfloat16), jnp.ones((512, 8)), jnp.zeros((512, 8), jnp.int32)
        compiled = layer.lower(*arguments).compile()
        # Threads, of which large machines have many, have their stacks and arenas after the first run.
        jax.block_until_ready(compiled(*arguments))
        limit(24 << 20)
        try:
            jax.block_until_ready(compiled(*arguments))
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX's fast path raises the latter
            print(error)
    """)
    assert "RESOURCE_EXHAUSTED: fused_moe: allocating 67108864 bytes of scratch memory failed" in output


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_alignment_takes_memory_for_slots_not_for_experts():
    output = under_memory_limit("""
        ids = jnp.asarray([[2**31 - 2, 5, -1]], jnp.int32)
        align = jax.jit(
            lambda ids: jmm.moe_align_block_size(
                ids, block_size=8, num_experts=2**31 - 1, implementation="cpu").expert_ids)
        compiled = align.lower(ids).compile()
        jax.block_until_ready(compiled(ids))
        limit(64 << 20)
        print(np.asarray(compiled(ids)).tolist())
    """)
    assert output.strip() == f"[5, {2**31 - 2}, -1]"


def test_the_first_of_several_listings_of_a_slot_counts():
    weights = jmm.quantize(host_arrays.normal(0, (8, 512, 1024), jnp.bfloat16), "int4", group_size=128)
    x = host_arrays.ones((2, 512), jnp.bfloat16)
    listed = np.full((9, 8), 2, np.int32)  # 2 is no slot
    listed[:, 0] = 1  # every block lists slot 1, the sixth slot 0 as well
    listed[5, 3:5] = 0
    experts = np.asarray([-1, 8, 3, 0, 1, 2, 3, 4, 5], np.int32)  # the first two are nobody's blocks
    alignment = jmm.BlockAlignment(listed.reshape(-1), experts, np.asarray([72], np.int32), 8, 8)
    run = jax.jit(lambda x: jmm.moe_gemm(x, weights, alignment, top_k=1, implementation="cpu"))
    results = {np.asarray(run(x)).tobytes() for _ in range(50)}
    of_expert = [
        np.asarray(
            jmm.moe_gemm(
                x,
                weights,
                jmm.moe_align_block_size(jnp.full((2, 1), expert, jnp.int32), block_size=8, num_experts=8),
                top_k=1,
                implementation="cpu",
            )
        )
        for expert in (2, 3)
    ]
    assert results == {np.stack([of_expert[0][0], of_expert[1][1]]).tobytes()}


def test_a_dropped_slot_contributes_nothing_whatever_its_weight():
    gate_up = jmm.quantize(host_arrays.normal(0, (4, 128, 128), jnp.bfloat16), "int4", group_size=128)
    down = jmm.quantize(host_arrays.normal(1, (4, 64, 128), jnp.bfloat16), "int4", group_size=None)
    x = host_arrays.ones((3, 128), jnp.bfloat16)
    ids = jnp.asarray([[0, 1], [2, -1], [-1, 7]], jnp.int32)
    dropped = (np.asarray(ids) < 0) | (np.asarray(ids) >= 4)

    def results(weight):
        weights = jnp.where(dropped, weight, 0.5).astype(jnp.float32)
        alignment = jmm.moe_align_block_size(ids, block_size=8, num_experts=4)
        options = dict(top_k=2, topk_weights=weights, mul_topk_weights=True, implementation="cpu")
        product = jmm.moe_gemm(x, gate_up, alignment, **options)
        return np.asarray(jmm.fused_moe(x, gate_up, down, weights, ids, implementation="cpu")), np.asarray(product)

    (block_nan, product_nan), (block_zero, product_zero) = results(np.nan), results(0.0)
    assert block_nan.tobytes() == block_zero.tobytes()
    assert product_nan.tobytes() == product_zero.tobytes()
    assert not block_nan[2].any()
    assert not product_nan[dropped.reshape(-1)].any()
