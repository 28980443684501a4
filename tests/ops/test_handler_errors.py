"""Handlers refuse operands, results and attributes that disagree, as those of a program that was edited."""

import dataclasses

import host_arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accepted_calls import EXPERTS, HIDDEN, INNER, TOKENS, TOP_K, block_arguments, constant, experts, gemm_arguments
from oracle import FACTS

from jax_marlin_moe import native
from jax_marlin_moe.operands import cpu_weight_operands, format_attributes

ALIGN = ["topk_ids", "expert_map"]


MATRIX = ["packed", "scales", "zeros", "global_scales", "bias"]


DISPATCHES = ["x", *MATRIX, "dispatches"]


GEMM = ["x", *MATRIX, "topk_weights", "sorted_token_ids", "expert_ids", "count"]


BLOCK = [
    "x",
    *(f"{matrix} {leaf}" for matrix in ("gate_up", "down") for leaf in MATRIX),
    "topk_weights",
    "topk_ids",
    "expert_map",
    "x_scale",
    "intermediate_scales",
]


def align_operands():
    operands = [host_arrays.zeros((TOKENS, TOP_K), jnp.int32), host_arrays.zeros(EXPERTS, jnp.int32)]
    # P = 10 + 4 * 7.
    results = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((38,), (5,), (1,))]
    return dict(zip(ALIGN, operands, strict=True)), results, {"block_size": 8, "num_experts": EXPERTS}


def with_every_operand(k, n):
    """int4 with zero points, bias and what no format has beside them: global scales."""
    weights = experts(k, n, group_size=32, weight_format="int4_zp", bias=True)
    return dataclasses.replace(weights, global_scales=host_arrays.ones((EXPERTS, n // 64)))


def gemm_operands():
    arguments = gemm_arguments()
    alignment = arguments["alignment"]
    weights = with_every_operand(HIDDEN, 64)
    operands = [
        arguments["x"],
        *cpu_weight_operands(weights),
        host_arrays.zeros(TOKENS * TOP_K),
        alignment.sorted_token_ids,
        alignment.expert_ids,
        alignment.num_tokens_post_padded,
    ]
    results = [jax.ShapeDtypeStruct((TOKENS * TOP_K, 64), jnp.bfloat16)]
    attributes = {"top_k": TOP_K, "block_size": 8, "mul_topk_weights": True, **format_attributes("", weights)}
    return dict(zip(GEMM, operands, strict=True)), results, attributes


def block_operands():
    arguments = block_arguments()
    gate_up, down = with_every_operand(HIDDEN, 2 * INNER), with_every_operand(INNER, HIDDEN)
    operands = [
        arguments["x"],
        *cpu_weight_operands(gate_up),
        *cpu_weight_operands(down),
        arguments["topk_weights"],
        arguments["topk_ids"],
        host_arrays.zeros(EXPERTS, jnp.int32),
        host_arrays.ones(1),
        host_arrays.ones(EXPERTS),
    ]
    results = [jax.ShapeDtypeStruct((TOKENS, HIDDEN), jnp.bfloat16)]
    attributes = {
        "activation": "silu",
        "activation_parameters": np.zeros(0, np.float32),
        "intermediate": "static_fp8",
        **format_attributes("gate_up_", gate_up),
        **format_attributes("down_", down),
    }
    return dict(zip(BLOCK, operands, strict=True)), results, attributes


def dispatch_operands():
    weights = with_every_operand(HIDDEN, 64)
    operands = [
        host_arrays.zeros((TOKENS, HIDDEN), jnp.bfloat16),
        *cpu_weight_operands(weights),
        host_arrays.zeros((3, 4), jnp.int32),
    ]
    results = [jax.ShapeDtypeStruct((7, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1,), jnp.int32)]
    return dict(zip(DISPATCHES, operands, strict=True)), results, format_attributes("", weights)


HANDLERS = {
    "align": (native.TARGETS["moe_align_block_size", "cpu"], align_operands),
    "product": (native.TARGETS["moe_gemm", "cpu"], gemm_operands),
    "block": (native.TARGETS["fused_moe", "cpu"], block_operands),
    "dispatches": (native.TARGETS["expert_gemm", "cpu"], dispatch_operands),
}


def run_handler(handler, operand_changes=None, attribute_changes=None, result_changes=None):
    target, make = HANDLERS[handler]
    operands, results, attributes = make()
    for name, change in (operand_changes or {}).items():
        operands[name] = change(operands[name])
    for index, result in (result_changes or {}).items():
        results[index] = result
    call = jax.ffi.ffi_call(target, results, vmap_method=None)
    with jax.default_device(jax.devices("cpu")[0]):
        outputs = jax.jit(lambda *arrays: call(*arrays, **(attributes | (attribute_changes or {}))))(*operands.values())
        return jax.block_until_ready(outputs)


@pytest.mark.parametrize("handler", HANDLERS)
def test_handlers_accept_what_agrees(handler):
    assert len(run_handler(handler)) == {"align": 3, "product": 1, "block": 1, "dispatches": 2}[handler]


def rank_three(leaf):
    return host_arrays.zeros((1, *leaf.shape), leaf.dtype)


def scalar(leaf):
    return host_arrays.zeros((), leaf.dtype)


def longer(leaf):
    return host_arrays.zeros((leaf.shape[0] + 8, *leaf.shape[1:]), leaf.dtype)


def another_type(leaf):
    return host_arrays.zeros(leaf.shape, jnp.int32 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.float32)


DISAGREEMENTS = [
    (handler, operand, change)
    for handler, operands in (("align", ALIGN), ("product", GEMM), ("block", BLOCK), ("dispatches", DISPATCHES))
    for operand in operands
    for change in (rank_three, scalar, longer, another_type)
    # The block takes maps of any length: it is the number of experts that ids may name. Dispatches name rows.
    if (handler, operand, change)
    not in {("block", "expert_map", longer), ("dispatches", "x", longer), ("dispatches", "dispatches", longer)}
]


@pytest.mark.parametrize(("handler", "operand", "change"), DISAGREEMENTS)
def test_handlers_refuse_operands_that_disagree(handler, operand, change):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT"):
        run_handler(handler, {operand: change})


def test_block_takes_maps_of_any_length():
    (y,) = run_handler("block", {"expert_map": longer})
    assert y.shape == (TOKENS, HIDDEN)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize(
    "result", [jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((TOKENS, 7), jnp.bfloat16)]
)
def test_handlers_refuse_results_that_disagree(handler, result):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT"):
        run_handler(handler, result_changes={0: result})


@pytest.mark.parametrize(
    ("handler", "attributes", "message"),
    [
        ("align", {"block_size": 0}, "block_size is 0"),
        ("align", {"block_size": 16}, "sorted_token_ids has shape"),
        ("align", {"block_size": 2**40}, "does not fit in int32"),
        ("align", {"num_experts": 0}, "num_experts is 0"),
        ("align", {"num_experts": -(2**62)}, "num_experts is -"),
        ("align", {"num_experts": 5}, "expert_map has shape"),
        ("product", {"top_k": 0}, "top_k is 0"),
        ("product", {"top_k": 2**62}, "top_k is"),
        ("product", {"top_k": 3}, "topk_weights has shape"),
        ("product", {"block_size": -8}, "block_size is -8"),
        ("product", {"block_size": 16}, "expert_ids has shape"),
        ("product", {"code": "int3"}, "code is 'int3'; there are: int4, int8, e2m1, bf16, fp16, e4m3"),
        ("product", {"code": "int8"}, "packed has 128 words a row, not a multiple of 256"),
        ("product", {"code": "e2m1"}, "zeros is 'integer', but only integer codes have zero points"),
        ("product", {"scale": "e5m2"}, "scale is 'e5m2'"),
        ("product", {"scale": "e8m0"}, "scales have dtype code .*, in which 'e8m0' scales are not stored"),
        ("product", {"zeros": "some"}, "zeros is 'some'; there are: none, integer, float"),
        ("product", {"zeros": "none"}, "zeros has shape"),
        ("product", {"zeros": "float"}, "zeros has dtype code"),
        ("product", {"zero_point": np.int64(-1)}, "zero_point is -1, which is no code"),
        ("product", {"zero_point": np.int64(16)}, "zero_point is 16, which is no code"),
        ("product", {"group_size": np.int64(0)}, "group_size is 0, not a multiple of 16"),
        ("product", {"group_size": np.int64(24)}, "group_size is 24, not a multiple of 16"),
        ("product", {"group_size": np.int64(64)}, "scales has shape"),
        ("product", {"group_size": np.int64(2**62)}, "group_size is 4611686018427387904; it must be at most"),
        ("block", {"activation": "sine"}, "activation is 'sine'; there are: none, identity, silu, .*, situ"),
        ("block", {"activation": "swiglu"}, "activation 'swiglu' has 0 parameters; it takes 3"),
        ("block", {"intermediate": "static_int8"}, "intermediate is 'static_int8'; there are: none, static_fp8, dyn"),
        ("block", {"intermediate": "none"}, "intermediate_scales has shape"),
        ("block", {"activation_parameters": np.ones(1, np.float32)}, "activation 'silu' has 1 parameters; it takes 0"),
        ("block", {"activation": "relu2"}, "gate_up has 128 columns, which are not 1 times the 64 rows of down"),
        ("block", {"gate_up_code": "int3"}, "gate_up code is 'int3'"),
        ("block", {"down_code": "int3"}, "down code is 'int3'"),
        ("block", {"down_group_size": np.int64(16)}, "down scales has shape"),
    ],
)
def test_handlers_refuse_attributes_that_disagree(handler, attributes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{message}"):
        run_handler(handler, attribute_changes=attributes)


@pytest.mark.parametrize("rows", [1, TOKENS - 1, TOKENS + 1, TOKENS * TOP_K - 1, 0])
def test_block_rows_are_one_per_token_or_per_slot(rows):
    def change(leaf):
        return host_arrays.zeros((rows, HIDDEN), leaf.dtype)

    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*x has {rows} rows"):
        run_handler("block", {"x": change})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_format", FACTS)
def test_handlers_refuse_leaves_of_another_format(weight_format):
    """Attributes of every format with the operands of every other: all but those that are one format to the kernels."""
    own = experts(HIDDEN, 64, weight_format=weight_format, group_size=FACTS[weight_format].group_sizes[-1])
    attributes = format_attributes("", own)
    for name, facts in FACTS.items():
        weights = experts(HIDDEN, 64, weight_format=name, group_size=facts.group_sizes[-1])
        leaves = {leaf: constant(value) for leaf, value in zip(MATRIX, cpu_weight_operands(weights), strict=True)}
        same_shapes = [
            a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(cpu_weight_operands(own), cpu_weight_operands(weights), strict=True)
        ]
        if all(same_shapes[:3]):
            run_handler("product", leaves, attributes)
            continue
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            run_handler("product", leaves, attributes)


def test_handlers_refuse_router_weights_that_are_missing():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"INVALID_ARGUMENT.*mul_topk_weights needs topk_weights"):
        run_handler("product", {"topk_weights": lambda leaf: leaf[:0]})
