"""Public functions refuse bad arguments by name, when the call is traced."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from accepted_calls import (
    HIDDEN,
    INNER,
    TOKENS,
    TOP_K,
    block_arguments,
    cast,
    constant,
    experts,
    gemm_arguments,
    replaced,
    shaped,
)
from host_arrays import ones, zeros
from oracle import FACTS

import jax_marlin_moe as jmm
from jax_marlin_moe import native
from jax_marlin_moe.arguments import check_weights
from jax_marlin_moe.cuda import compiler

BAD_WEIGHTS = {
    "dense array": (constant(zeros((4, 128, 64))), TypeError, r"{} has type .*; it must be a MarlinWeights"),
    "another layout": (partial(replaced, layout=constant("a8")), ValueError, r"{}\.layout is 'a8', .*'a16'"),
    "another format": (
        partial(replaced, format=constant(dataclasses.replace(jmm.FORMATS["int4"], zero_point=7))),
        ValueError,
        r"{}\.format is .*; it must be a row of",
    ),
    "unsigned words": (partial(replaced, packed=cast(jnp.uint32)), TypeError, r"{}\.packed has dtype uint32"),
    "words without experts": (partial(replaced, packed=shaped(8, 128)), ValueError, r"{}\.packed has shape"),
    "N off the tile": (
        partial(replaced, packed=shaped(4, 8, 192)),
        ValueError,
        r"{} is packed as \(K, N\) = \(128, 96\)",
    ),
    "no rows": (partial(replaced, packed=shaped(4, 0, 128)), ValueError, r"{} is packed as \(K, N\) = \(0, 64\)"),
    "integer scales": (
        partial(replaced, scales=cast(jnp.int32)),
        TypeError,
        r"{}\.scales has dtype int32; format int4_zp takes float16 or bfloat16 or float32",
    ),
    "scales as bytes": (partial(replaced, scales=cast(jnp.uint8)), TypeError, r"{}\.scales has dtype uint8"),
    "flat scales": (partial(replaced, scales=shaped(4, 64)), ValueError, r"{}\.scales has shape"),
    "scales of another width": (partial(replaced, scales=shaped(4, 4, 32)), ValueError, r"{}\.scales has shape"),
    "scales of fewer experts": (partial(replaced, scales=shaped(3, 4, 64)), ValueError, r"{}\.scales has shape"),
    "groups of 8": (partial(replaced, scales=shaped(4, 16, 64)), ValueError, r"{}\.scales has 16 groups over K = 128"),
    "groups that do not divide K": (partial(replaced, scales=shaped(4, 3, 64)), ValueError, r"{}\.scales has 3 groups"),
    "no zero points": (partial(replaced, zeros=constant(None)), ValueError, r"{}\.zeros is None; int4_zp needs zeros"),
    "superfluous zero points": (
        partial(replaced, format=constant(jmm.FORMATS["int4"])),
        ValueError,
        r"{}\.zeros is not None; int4 takes no zeros",
    ),
    "unsigned zero points": (partial(replaced, zeros=cast(jnp.uint32)), TypeError, r"{}\.zeros has dtype uint32"),
    "zero points of one group": (partial(replaced, zeros=shaped(4, 1, 8)), ValueError, r"{}\.zeros has shape"),
    "superfluous global scales": (
        partial(replaced, global_scales=constant(ones((4, 1)))),
        ValueError,
        r"{}\.global_scales is not None; int4_zp takes no global_scales",
    ),
    "more row padding than rows": (partial(replaced, row_padding=constant(128)), ValueError, r"{} has row_padding 128"),
    "negative column padding": (
        partial(replaced, column_padding=constant((-1,))),
        ValueError,
        r"{} has .* column_padding \(-1,\), which do not fit",
    ),
    "half a bias": (partial(replaced, bias=cast(jnp.float16)), TypeError, r"{}\.bias has dtype float16"),
    "bias of another width": (partial(replaced, bias=shaped(4, 32)), ValueError, r"{}\.bias has shape"),
    "float row order": (
        partial(replaced, input_order=constant(zeros((4, 128)))),
        TypeError,
        r"{}\.input_order has dtype float32",
    ),
    "a short row order": (
        partial(replaced, input_order=constant(zeros((4, 64), jnp.int32))),
        ValueError,
        r"{}\.input_order has shape",
    ),
}


@pytest.mark.parametrize("name", ["weights", "gate_up", "down"])
@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_bad_weights_are_refused(bad, name):
    change, error, message = BAD_WEIGHTS[bad]
    arguments = gemm_arguments() if name == "weights" else block_arguments()
    arguments[name] = change(experts(HIDDEN, 64, group_size=32, weight_format="int4_zp", bias=True))
    call = jmm.moe_gemm if name == "weights" else jmm.fused_moe
    with pytest.raises(error, match=message.format(name)):
        call(**arguments)


BAD_LEAVES_OF_FORMATS = [
    ("nvfp4", {"scales": cast(jnp.float16)}, TypeError, r"w\.scales has dtype float16; format nvfp4 takes uint8"),
    ("nvfp4", {"scales": shaped(4, 4, 64)}, ValueError, r"w\.scales has 4 groups over K = 128; .*one of \(16,\)"),
    ("nvfp4", {"global_scales": constant(None)}, ValueError, r"w\.global_scales is None; nvfp4 needs global_scales"),
    ("nvfp4", {"global_scales": cast(jnp.bfloat16)}, TypeError, r"w\.global_scales has dtype bfloat16"),
    ("nvfp4", {"global_scales": shaped(4)}, ValueError, r"w\.global_scales has shape \(4,\)"),
    ("nvfp4", {"global_scales": shaped(4, 64)}, ValueError, r"w\.global_scales has shape .*\(E, N / 64\) = \(4, 1\)"),
    ("nvfp4", {"global_scales": shaped(3, 1)}, ValueError, r"w\.global_scales has shape"),
    ("mxfp4", {"scales": cast(jnp.bfloat16)}, TypeError, r"w\.scales has dtype bfloat16; format mxfp4 takes uint8"),
    ("mxfp4", {"scales": shaped(4, 1, 64)}, ValueError, r"w\.scales has 1 groups .* must be one of \(32,\)$"),
    (
        "mxfp8",
        {"zeros": constant(zeros((4, 4, 16), jnp.int32))},
        ValueError,
        r"w\.zeros is not None; mxfp8 takes no",
    ),
    ("fp8", {"scales": cast(jnp.uint8)}, TypeError, r"w\.scales has dtype uint8"),
    ("fp8", {"packed": shaped(4, 8, 128)}, ValueError, r"w is packed as \(K, N\) = \(128, 32\)"),
    ("int8_zp", {"zeros": shaped(4, 1, 8)}, ValueError, r"w\.zeros has shape .*\(E, groups, N / pf\) = \(4, 1, 16\)"),
    ("int8_zp", {"zeros": constant(None)}, ValueError, r"w\.zeros is None; int8_zp needs zeros"),
    ("int4_fzp", {"zeros": cast(jnp.int32)}, TypeError, r"w\.zeros has dtype int32; it must be a bfloat16"),
    ("int4_fzp", {"zeros": cast(jnp.float32)}, TypeError, r"w\.zeros has dtype float32; it must be a bfloat16"),
    ("int4_fzp", {"zeros": shaped(4, 1, 32)}, ValueError, r"w\.zeros has shape .*\(E, groups, N\) = \(4, 1, 64\)"),
]


@pytest.mark.parametrize(("weight_format", "leaves", "error", "message"), BAD_LEAVES_OF_FORMATS)
def test_bad_leaves_of_a_format_are_refused(weight_format, leaves, error, message):
    sizes = FACTS[weight_format].group_sizes
    weights = experts(HIDDEN, 64, weight_format=weight_format, group_size=sizes[-1])
    with pytest.raises(error, match=message):
        check_weights("w", replaced(weights, **leaves))


def alignment_with(**leaves):
    alignment = gemm_arguments()["alignment"]
    return dataclasses.replace(alignment, **leaves)


BAD_PRODUCTS = {
    "integer rows": (
        {"x": zeros((TOKENS, HIDDEN), int)},
        TypeError,
        "x has dtype int32; it must be bfloat16, float16 or float32",
    ),
    "flat rows": ({"x": zeros(HIDDEN, jnp.bfloat16)}, ValueError, "x has shape .*2 dimensions"),
    "rows of another width": ({"x": zeros((TOKENS, 64), jnp.bfloat16)}, ValueError, r"x has shape \(5, 64\)"),
    "a list": ({"x": [[0.0]]}, TypeError, "x has dtype list"),
    "no alignment": ({"alignment": zeros(8, jnp.int32)}, TypeError, "alignment has type .*moe_align_block_size"),
    "blocks of 24": ({"alignment": alignment_with(block_size=24)}, ValueError, "block_size is 24; .*8, 16, 32, 48, 64"),
    "no choice": ({"top_k": 0}, ValueError, "top_k is 0"),
    "more choices than experts": ({"top_k": 5}, ValueError, r"top_k is 5; it must lie in \[1, 4\]"),
    "float slots": (
        {"alignment": alignment_with(sorted_token_ids=zeros(38))},
        TypeError,
        r"alignment\.sorted_token_ids has dtype float32",
    ),
    "too few blocks": (
        {"alignment": alignment_with(expert_ids=zeros(4, jnp.int32))},
        ValueError,
        r"alignment\.expert_ids has shape \(4,\); .*\(5,\)",
    ),
    "two counts": (
        {"alignment": alignment_with(num_tokens_post_padded=zeros(2, jnp.int32))},
        ValueError,
        r"alignment\.num_tokens_post_padded has shape \(2,\)",
    ),
    "weights to multiply by": ({"mul_topk_weights": True}, ValueError, "topk_weights is None"),
    "integer router weights": (
        {"mul_topk_weights": True, "topk_weights": zeros((TOKENS, TOP_K), jnp.int32)},
        TypeError,
        "topk_weights has dtype int32; it must be a float32",
    ),
    "too few router weights": (
        {"mul_topk_weights": True, "topk_weights": zeros(TOKENS)},
        ValueError,
        r"topk_weights has shape \(5,\); .* = 10 values",
    ),
    "unknown implementation": ({"implementation": "triton"}, ValueError, "implementation is 'triton'"),
}


@pytest.mark.parametrize("bad", BAD_PRODUCTS)
def test_bad_products_are_refused(bad):
    change, error, message = BAD_PRODUCTS[bad]
    with pytest.raises(error, match=message):
        jmm.moe_gemm(**(gemm_arguments() | change))


BAD_BLOCKS = {
    "integer rows": ({"x": zeros((TOKENS, HIDDEN), int)}, TypeError, "x has dtype int32"),
    "a batch of rows alone": (
        {"x": zeros((1, TOKENS, HIDDEN), jnp.bfloat16)},
        ValueError,
        r"topk_weights has shape \(5, 2\); x has shape \(1, 5, 128\)",
    ),
    "rows of another width": ({"x": zeros((TOKENS, 64), jnp.bfloat16)}, ValueError, r"x has shape \(5, 64\)"),
    "down with too many rows": (
        {"down": experts(128, HIDDEN)},
        ValueError,
        "gate_up has N = 128 columns and down K = 128 rows; activation 'silu' needs N = 2",
    ),
    "down with too few columns": (
        {"down": experts(INNER, 64)},
        ValueError,
        "down has N = 64 columns; it must be H = 128",
    ),
    "two halves where none are gated": (
        {"activation": "relu2"},
        ValueError,
        "gate_up has N = 128 columns and down K = 64 rows; activation 'relu2' needs N = 1",
    ),
    "halves padded as one": (
        {"gate_up": experts(HIDDEN, 2 * 20), "down": experts(20, HIDDEN)},
        ValueError,
        r"gate_up has .* column_padding = \(24,\); .*join them with jax_marlin_moe.concatenate_columns",
    ),
    "fewer experts in down": (
        {"down": experts(INNER, HIDDEN).expert(0)},
        ValueError,
        "down has 1 experts; .*gate_up: 4",
    ),
    "reordered down": (
        {"down": experts(INNER, HIDDEN, reordered=True)},
        ValueError,
        "down.input_order .*fold_input_order",
    ),
    "unknown activation": ({"activation": "sine"}, ValueError, "activation is 'sine'; .*relu2.* or made by .*swiglu"),
    "float ids": ({"topk_ids": zeros((TOKENS, TOP_K))}, TypeError, "topk_ids has dtype float32; .*int32"),
    "64-bit ids": ({"topk_ids": np.zeros((TOKENS, TOP_K), np.int64)}, TypeError, "topk_ids has dtype int64"),
    "ids in a list": ({"topk_ids": [[0, 1]]}, TypeError, "topk_ids has dtype list"),
    "flat ids": ({"topk_ids": zeros(TOKENS, jnp.int32)}, ValueError, "topk_ids has shape .*2 dimensions"),
    "ids of other tokens": ({"topk_ids": zeros((4, TOP_K), jnp.int32)}, ValueError, r"topk_ids has shape \(4, 2\)"),
    "integer router weights": (
        {"topk_weights": zeros((TOKENS, TOP_K), jnp.int32)},
        TypeError,
        "topk_weights has dtype int32; it must be a float32",
    ),
    "router weights of other shape": (
        {"topk_weights": zeros((TOKENS, 3))},
        ValueError,
        r"topk_weights has shape \(5, 3\); .*\(5, 2\)",
    ),
    "more choices than experts": (
        {"topk_ids": zeros((TOKENS, 5), jnp.int32), "topk_weights": zeros((TOKENS, 5))},
        ValueError,
        r"top_k is 5; it must lie in \[1, 4\]",
    ),
    "no choice": (
        {"topk_ids": zeros((TOKENS, 0), jnp.int32), "topk_weights": zeros((TOKENS, 0))},
        ValueError,
        "top_k is 0",
    ),
    "a float map": ({"expert_map": zeros(4)}, TypeError, "expert_map has dtype float32"),
    "a map of two dimensions": ({"expert_map": zeros((1, 4), jnp.int32)}, ValueError, "expert_map has shape"),
    "a map past the last expert": (
        {"expert_map": np.asarray([0, -1, 4, 1], np.int32)},
        ValueError,
        r"expert_map\[2\] is 4; it must be one of the 4 experts here, in \[0, 4\), or -1 for an expert that lives",
    ),
    "a map to what is no expert": (
        {"expert_map": jnp.asarray([0, -2], jnp.int32)},
        ValueError,
        r"expert_map\[1\] is -2; it must be one of the 4",
    ),
    "a map with an expert twice": (
        {"expert_map": jnp.asarray([2, 0, -1, 2], jnp.int32)},
        ValueError,
        r"expert_map\[0\] and expert_map\[3\] are both 2; an expert here must be one of all",
    ),
    "more choices than the map has": ({"expert_map": zeros(1, jnp.int32)}, ValueError, r"top_k is 2; .*\[1, 1\]"),
    "unknown implementation": ({"implementation": "triton"}, ValueError, "implementation is 'triton'"),
}


@pytest.mark.parametrize("bad", BAD_BLOCKS)
def test_bad_blocks_are_refused(bad):
    change, error, message = BAD_BLOCKS[bad]
    with pytest.raises(error, match=message):
        jmm.fused_moe(**(block_arguments() | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": zeros((2, 2))}, TypeError, "topk_ids has dtype float32"),
        ({"topk_ids": zeros(4, jnp.int32)}, ValueError, "topk_ids has shape"),
        ({"block_size": 4}, ValueError, "block_size is 4"),
        ({"num_experts": 0}, ValueError, "num_experts is 0"),
        ({"expert_map": zeros(3, jnp.int32)}, ValueError, r"expert_map has shape \(3,\)"),
        ({"expert_map": np.zeros(4, np.int64)}, TypeError, "expert_map has dtype int64"),
        ({"expert_map": np.asarray([0, 1, 4, 3], np.int32)}, ValueError, r"expert_map\[2\] is 4; .*\[0, 4\)"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'"),
    ],
)
def test_bad_alignments_are_refused(change, error, message):
    arguments = {"topk_ids": zeros((2, 2), jnp.int32), "block_size": 8, "num_experts": 4}
    with pytest.raises(error, match=message):
        jmm.moe_align_block_size(**(arguments | change))


def test_errors_come_when_the_call_is_traced():
    """`jax.eval_shape` neither compiles nor runs anything, and meets the same checks."""
    with pytest.raises(TypeError, match="topk_weights has dtype int32"):
        jax.eval_shape(
            lambda arguments: jmm.fused_moe(**arguments),
            block_arguments() | {"topk_weights": jax.ShapeDtypeStruct((TOKENS, TOP_K), jnp.int32)},
        )
    with pytest.raises(ValueError, match=r"x has shape \(5, 64\)"):
        jax.eval_shape(
            lambda x: jmm.moe_gemm(**(gemm_arguments() | {"x": x})), jax.ShapeDtypeStruct((TOKENS, 64), jnp.float16)
        )


@pytest.mark.parametrize("call", ["align", "product", "block"])
def test_an_implementation_of_another_platform_is_refused(call, monkeypatch):
    monkeypatch.setattr(compiler, "unavailable_reason", lambda: None)
    functions = {
        "align": lambda: jmm.moe_align_block_size(
            zeros((2, 2), jnp.int32), block_size=8, num_experts=4, implementation="cuda"
        ),
        "product": lambda: jmm.moe_gemm(**gemm_arguments(), implementation="cuda"),
        "block": lambda: jmm.fused_moe(**block_arguments(), implementation="cuda"),
    }
    traced = jax.jit(functions[call]).trace()
    with pytest.raises(ValueError, match="implementation is 'cuda', but the program is lowered for cpu"):
        traced.lower(lowering_platforms=("cpu",))


def test_an_implementation_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda: "the module is missing")
    with pytest.raises(ValueError, match="implementation is 'cpu', which cannot run here: the module is missing"):
        jmm.fused_moe(**block_arguments(), implementation="cpu")


def test_without_a_choice_the_reference_steps_in_and_says_so(monkeypatch):
    expected = np.asarray(jmm.fused_moe(**block_arguments(), implementation="xla"))
    monkeypatch.setattr(native, "unavailable_reason", lambda: "the module is missing")
    arguments = block_arguments()
    with pytest.warns(UserWarning, match="slow reference on cpu: the module is missing"):
        text = jax.jit(lambda: jmm.fused_moe(**arguments)).trace().lower(lowering_platforms=("cpu",)).as_text()
    assert native.TARGETS["fused_moe", "cpu"] not in text
    assert expected.shape == (TOKENS, HIDDEN)
