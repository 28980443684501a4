"""Exported programs: those for CUDA carry their kernels, those for both platforms run here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import array, needs_nvrtc
from jax import export
from oracle import assert_block_close, expert_block, random_experts, random_routing, random_rows

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.cuda import compiler

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
