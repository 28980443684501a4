"""Recipes of parallelism: what `four_devices_recipes.py` finds in a process with four devices, and what is refused."""

import dataclasses
import functools
import re

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_calls import CALL, needs_nvrtc
from jax.sharding import AbstractMesh
from other_process import cases_of, checked_by

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda import compiler
from jax_marlin_moe.expert_placement import first_slots, slots_of
from jax_marlin_moe.sharding import MoESharding, parallel_layer, partition_specs, place, place_experts, tensor_parallel

CHECKS = (
    "experts, same tokens",
    "experts, gathered",
    "experts, ragged",
    "experts, capacity",
    "tensors",
    "tensors with tokens",
    "both, packed shared expert",
    "both, dense shared expert",
    "both, weights on the input",
    "both, zero points",
    "both, global scales",
    "shares of 16 bits",
    "sums of packed shares",
    "hierarchy",
    "all on one expert",
    "copies",
    "padding of the last tile",
    "padding alone",
    "stacked",
    "explicit",
    "rows of 8 bits",
    "gradients",
    "quantized, automatic axes",
    "quantized, explicit axes",
    "shares packed where they are made",
)
# What these have by itself, the others have together with something else.
COMBINED = (
    "experts, same tokens",
    "experts, capacity",
    "tensors",
    "both, dense shared expert",
    "both, zero points",
    "both, global scales",
    "padding alone",
    "quantized, explicit axes",
)


@pytest.fixture(scope="module")
def found(request):
    return checked_by("four_devices_recipes.py", request, CHECKS)


@pytest.mark.parametrize("check", cases_of(CHECKS, COMBINED))
def test_four_devices_agree_with_one(found, check):
    assert found[check] is None, found[check]


def mesh(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes))


def shapes(experts=8, hidden=64, inner=128, group_size=64):
    """A layer of shapes."""

    def make():
        gate_up = jmm.quantize(jnp.ones((experts, hidden, 2 * inner)), "int4", group_size=64)
        down = jmm.quantize(jnp.ones((experts, inner, hidden)), "int4", group_size=group_size)
        return jmm.MoELayer(gate_up, down, jnp.ones((hidden, experts)), jmm.Routing(2))

    return jax.eval_shape(make)


def test_axes_are_found_by_their_names():
    sharding = MoESharding(mesh(data=2, expert=4, tensor=2))
    assert (sharding.expert, sharding.tensor) == (("expert",), ("tensor",))
    assert (sharding.expert_ranks, sharding.tensor_ranks) == (4, 2)
    assert MoESharding(mesh(x=2)).expert_ranks == 1
    assert MoESharding(mesh(a=2, b=3), expert=("a", "b")).expert_ranks == 6
    assert hash(sharding) == hash(MoESharding(mesh(data=2, expert=4, tensor=2)))


def test_axes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"tensor names the axis 'cards'; the mesh has 'expert'"):
        MoESharding(mesh(expert=2), tensor="cards")
    with pytest.raises(ValueError, match=r"expert and tensor both name the axis 'x'"):
        MoESharding(mesh(x=2), expert="x", tensor="x")
    with pytest.raises(ValueError, match=r"expert is \('x', 'x'\); it must name each axis once"):
        MoESharding(mesh(x=2), expert=("x", "x"))
    sharding = MoESharding(mesh(expert=2))
    with pytest.raises(ValueError, match=r"tokens names the axis 'data'; the mesh has 'expert'"):
        parallel_layer(shapes(), jnp.ones((4, 64), jnp.bfloat16), sharding, tokens="data")


def test_sizes_that_do_not_divide_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"E = 8 experts; 3 ranks need a multiple of 3, .* nearest are 6 and 9"):
        MoESharding(mesh(expert=3)).specs(shapes())
    sharding = MoESharding(mesh(tensor=4))
    message = "K = 128 rows; 4 ranks need a multiple of 256, .*tiles of 64 .*nearest are 256; 128 .* 1 or 2 ranks"
    for ask in (sharding.specs, sharding.lay_out):
        with pytest.raises(ValueError, match=f"{message}.*or pass pad=True"):
            ask(shapes())
    with pytest.raises(ValueError, match=r"x has 7 rows; 2 ranks need a multiple of 2, .* the nearest are 6 and 8"):
        parallel_layer(shapes(), jnp.ones((7, 64), jnp.bfloat16), MoESharding(mesh(expert=2)), tokens="expert")


def test_padding_goes_to_the_last_ranks():
    sharding = MoESharding(mesh(tensor=3), pad=True)
    laid_out = jax.eval_shape(sharding.lay_out, shapes())
    assert (laid_out.gate_up.layout, laid_out.gate_up.padded_n, laid_out.down.padded_k) == ("a16/128", 384, 192)
    gate_up = jmm.quantize(host_arrays.normal(0, (1, 64, 256)), "int4_zp", group_size=64)
    down = jmm.quantize(host_arrays.normal(1, (1, 128, 64)), "int8", group_size=64)
    wide, tall = tensor_parallel(gate_up, down, 3, pad=True)
    dense = np.asarray(jmm.reference.dequantize(wide))[0]
    whole = np.asarray(jmm.dequantize(gate_up))[0]
    for rank in range(2):
        for half in range(2):
            of_rank = dense[:, rank * 128 + half * 64 :][:, :64]
            np.testing.assert_array_equal(of_rank, whole[:, half * 128 + rank * 64 :][:, :64])
    assert not dense[:, 256:].any()
    np.testing.assert_array_equal(jmm.reference.dequantize(tall)[0, :128], jmm.dequantize(down)[0])
    assert not np.asarray(jmm.reference.dequantize(tall))[0, 128:].any()


def test_a_cut_that_parts_gate_from_up_is_refused():
    layer = shapes()
    with pytest.raises(ValueError, match=r"weights is not laid out for ranks: a cut of \[gate \| up\] gives gate to"):
        partition_specs(layer.gate_up, "columns", "d")
    sharding = MoESharding(mesh(tensor=2))
    with pytest.raises(ValueError, match=r"gate_up is laid out for 1 ranks; .* have 2, and a cut elsewhere would part"):
        sharding.specs(layer)
    laid_out = jax.eval_shape(sharding.lay_out, layer)
    assert sharding.specs(laid_out).gate_up.packed[2] == "tensor"
    with pytest.raises(ValueError, match=r"laid out for 2 ranks, and ranks is 4"):
        partition_specs(laid_out.gate_up, "columns", "d", ranks=4)
    with pytest.raises(ValueError, match=r"gate_up is laid out for 2 ranks"):
        MoESharding(mesh(expert=2)).specs(laid_out)
    x = jax.ShapeDtypeStruct((4, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"'a16/128', with 256 columns; its columns are those of several ranks, 128"):
        jax.eval_shape(lambda x, weights: jmm.linear(x, weights, expert=0), x, laid_out.gate_up)
    choice = jax.ShapeDtypeStruct((4, 2), jnp.float32), jax.ShapeDtypeStruct((4, 2), jnp.int32)
    down = dataclasses.replace(layer.down, bias=jax.ShapeDtypeStruct((8, 64), jnp.float32))
    with pytest.raises(ValueError, match=r"gate_up is laid out for 2 ranks; down, with K = 128 rows, must be, too"):
        jax.eval_shape(jmm.fused_moe, x, laid_out.gate_up, down, *choice)
    block = functools.partial(jmm.fused_moe, activation_dtype="int8")
    with pytest.raises(ValueError, match=r"'int8', intermediate is None and gate_up is laid out for 2 ranks; each row"):
        jax.eval_shape(block, x, laid_out.gate_up, laid_out.down, *choice)
    block = functools.partial(jmm.fused_moe, activation_dtype="float8_e4m3fn_g128")
    with pytest.raises(ValueError, match=r"each rank has 64 columns .*; it must have a multiple of 128, which share"):
        jax.eval_shape(block, x, laid_out.gate_up, laid_out.down, *choice)
    call = functools.partial(parallel_layer, sharding=sharding, activation_dtype="float8_e4m3fn_g128")
    with pytest.raises(ValueError, match=r"each rank has 64 columns of the intermediate dimension"):
        jax.eval_shape(call, sharding.abstract(laid_out), x)


@needs_nvrtc
def test_cards_exchange_rows_in_equal_blocks_and_not_by_ragged_collectives(monkeypatch):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    sharding = MoESharding(mesh(expert=4))
    call = jax.jit(lambda layer, x: parallel_layer(layer, x, sharding, tokens="expert", exchange="ragged"))
    x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    text = call.trace(sharding.abstract(shapes()), x).lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_all_to_all" not in text
    assert text.count("stablehlo.all_to_all") == 2
    assert text.count("stablehlo.all_gather") == 2
    assert CALL in text


@needs_nvrtc
@pytest.mark.parametrize("share_dtype", ["float32", "bfloat16"])
def test_shares_go_between_cards_in_the_dtype_that_is_asked_for(monkeypatch, share_dtype):
    monkeypatch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
    sharding = MoESharding(mesh(expert=4))
    call = jax.jit(lambda layer, x: parallel_layer(layer, x, sharding, share_dtype=share_dtype))
    x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    text = call.trace(sharding.abstract(shapes()), x).lower(lowering_platforms=("cuda",)).as_text()
    (summed,) = re.findall(r"stablehlo.all_reduce.*?\) -> tensor<8x64x(\w+)>", text, re.DOTALL)
    assert summed == {"float32": "f32", "bfloat16": "bf16"}[share_dtype]


def test_arguments_of_exchanges_are_checked():
    layer, x, sharding = shapes(), jnp.ones((4, 64), jnp.bfloat16), MoESharding(mesh(expert=2))
    with pytest.raises(ValueError, match=r"exchange is 'all'; it must be 'gather' or 'ragged'"):
        parallel_layer(layer, x, sharding, exchange="all")
    with pytest.raises(ValueError, match=r"capacity is 4, and exchange 'gather' .*: without one nothing is dropped"):
        parallel_layer(layer, x, sharding, tokens="expert", capacity=4)
    with pytest.raises(ValueError, match=r"capacity is 0; it must be a positive number of rows"):
        parallel_layer(layer, x, sharding, tokens="expert", exchange="ragged", capacity=0)
    with pytest.raises(TypeError, match=r"share_dtype is int8; it must be float32, bfloat16 or float16"):
        parallel_layer(layer, x, sharding, share_dtype="int8")
    with pytest.raises(TypeError, match=r"sharding has type str; it must be a jax_marlin_moe.sharding.MoESharding"):
        parallel_layer(layer, x, "expert")
    with pytest.raises(
        TypeError, match=r"sharding.mesh has type AbstractMesh; it must be a jax.sharding.Mesh of devices"
    ):
        place(layer, sharding)


def test_tables_of_experts_are_checked():
    layer = shapes()
    for table, message in (
        ([0, 1, 2, 3, 4, 5, 6, 8], r"experts names the expert 8; experts lie in \[0, 8\)"),
        ([-1, 1, 2, 3, 4, 5, 6, 7], "experts names the expert -1"),
        ([0, 1, 2, 3, 4, 5, 6, 6], "experts has no slot for expert 7; each of the 8"),
    ):
        with pytest.raises(ValueError, match=message):
            place_experts(layer, table)
    with pytest.raises(TypeError, match=r"experts is float64\[1\]; it must be a vector of integers"):
        place_experts(layer, [0.5])


def test_tokens_take_the_copies_of_an_expert_in_turn():
    table = jnp.asarray([2, 0, 2, 1, 2], jnp.int32)
    ids = jnp.asarray([[2, 0], [2, -1], [2, 3], [2, 1]], jnp.int32)
    np.testing.assert_array_equal(slots_of(ids, table, 3), [[0, 1], [2, -1], [4, -1], [0, 3]])
    np.testing.assert_array_equal(first_slots(table, 3), [1, 3, 0])
    np.testing.assert_array_equal(first_slots(table, 4), [1, 3, 0, -1])
