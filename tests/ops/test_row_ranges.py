"""CUDA programs for a symbolic number of rows: a program for each of a few numbers, chosen when it runs."""

import host_arrays
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import needs_nvrtc

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.ops import row_ranges

EXPERTS, HIDDEN, TOP_K = 4, 64, 2
SAFE = [jax.export.DisabledSafetyCheck.custom_call(target) for target in jmm.CUSTOM_CALL_TARGETS]


def weights(columns):
    dense = host_arrays.normal(columns, (EXPERTS, HIDDEN, columns), scale=HIDDEN**-0.5)
    return jmm.quantize(dense, "int4", group_size=64)


def exported(function, *, constraints, platforms=("cuda",), slots=True):
    (t,) = jax.export.symbolic_shape("t", constraints=constraints)
    shapes = [jax.ShapeDtypeStruct((t, HIDDEN), jnp.bfloat16)]
    shapes += [jax.ShapeDtypeStruct((t, TOP_K), dtype) for dtype in (jnp.float32, jnp.int32)] if slots else []
    return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=SAFE)(*shapes)


def arguments(tokens):
    x = host_arrays.normal(tokens, (tokens, HIDDEN), jnp.bfloat16)
    return (x, *jmm.route(host_arrays.normal(tokens + 1, (tokens, EXPERTS)), top_k=TOP_K))


def block(x, w, ids):
    return jmm.fused_moe(x, weights(2 * HIDDEN), weights(HIDDEN), w, ids)


def calls(program):
    return program.mlir_module().count(f"@{native.TARGETS['program', 'cuda']}")


@pytest.mark.parametrize("constraints", [(), ("t <= 16",), ("t >= 5", "t <= 40")], ids=str)
def test_rows_are_padded_to_a_range_or_come_in_runs(constraints, monkeypatch):
    monkeypatch.setattr(row_ranges, "_LAST", 16)
    seen = []

    def call(x, ids, table):
        """Rows and slots, and what padding has."""
        seen.append(x.shape[0])
        return [x + table[jnp.maximum(ids, 0)].reshape(x.shape[0], -1), jnp.repeat(x.sum(1), 2)]

    def run(x, ids, table):
        types = jax.eval_shape(call, x, ids, table)
        seen.clear()
        return row_ranges.over_ranges(call, (x, ids, table), (0, 1), types, op="op")

    (t,) = jax.export.symbolic_shape("t", constraints=constraints)
    table = jnp.arange(3.0)
    program = jax.export.export(jax.jit(run))(
        jax.ShapeDtypeStruct((t, 2), jnp.float32), jax.ShapeDtypeStruct((2 * t,), jnp.int32), table
    )
    assert seen == {0: [1, 4, 16, 16], 1: [1, 4, 16], 2: [16, 16]}[len(constraints)]
    for rows in (1, 3, 16, 17, 50) if not constraints else (5, 16):
        x, ids = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2), np.arange(2 * rows, dtype=np.int32) % 3
        for ours, wanted in zip(program.call(x, ids, table), jax.jit(call)(x, ids, table), strict=True):
            np.testing.assert_array_equal(ours, wanted)


@needs_nvrtc
def test_an_export_for_cuda_has_a_program_per_range(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    program = exported(block, constraints=("t <= 4",), platforms=("cpu", "cuda"))
    assert calls(program) == 2  # of one row and of four
    assert program.out_avals[0].shape[1:] == (HIDDEN,)
    with jax.default_device(jax.devices("cpu")[0]):
        np.testing.assert_array_equal(program.call(*arguments(3)), block(*arguments(3)))


@needs_nvrtc
def test_a_symbolic_number_in_a_shard_map_is_refused():
    mesh = jax.make_mesh((1,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.sharding.PartitionSpec(),) * 3
    run = jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=specs[0])
    with pytest.raises(ValueError, match=r"fused_moe has an operand of the symbolic shape \(t, 64\) inside of"):
        exported(run, constraints=(), platforms=("cpu",))


def test_a_derivative_has_a_symbolic_number_of_rows_on_cpus():
    def gradient(x, w, ids):
        return jax.grad(lambda x: block(x, w, ids).astype(jnp.float32).sum())(x)

    program = exported(gradient, constraints=(), platforms=("cpu",))
    np.testing.assert_array_equal(program.call(*arguments(5)), gradient(*arguments(5)))


def test_ops_whose_rows_depend_on_each_other_refuse_a_symbolic_number(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")

    def product(x, w, ids):
        lists = jmm.moe_align_block_size(ids, block_size=8, num_experts=EXPERTS)
        return jmm.moe_gemm(x, weights(HIDDEN), lists, top_k=TOP_K)

    with pytest.raises(
        ValueError, match=r"moe_align_block_size has operands of shape \(t, 2\).*a program for each shape"
    ):
        exported(product, constraints=())
    with pytest.raises(ValueError, match=r"expert_gemm has operands of shape \(t, 64\).* fused_moe, moe_layer, linear"):
        exported(
            lambda x: jmm.expert_gemm(x, weights(HIDDEN), jnp.zeros((1, 4), jnp.int32)), constraints=(), slots=False
        )


@pytest.mark.gpu
def test_on_a_card_one_artefact_has_every_number_of_tokens():
    program = exported(block, constraints=("t <= 16",))
    for tokens in (1, 3, 16):
        run = jax.jit(program.call).lower(*arguments(tokens)).compile()
        text = run.as_text()
        assert text.count(native.TARGETS["program", "cuda"]) == 1, text
        assert " conditional(" not in text, text
        ours, wanted = (np.asarray(y, np.float64) for y in (run(*arguments(tokens)), block(*arguments(tokens))))
        assert np.linalg.norm(ours - wanted) <= 1e-2 * np.linalg.norm(wanted)
