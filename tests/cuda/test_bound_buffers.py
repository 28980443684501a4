"""Which buffer every member of every kernel points to: types alone do not tell apart those of equal type."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from abstract_calls import array, formatted_experts

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import get_activation
from jax_marlin_moe.cuda import compiler, program
from jax_marlin_moe.cuda.kernels.mma import MmaTile
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.ops.grouped_product import grouped_product_op, multiplied
from jax_marlin_moe.ops.hidden_cotangents import hidden_cotangents_op
from jax_marlin_moe.ops.packed_shares import add_shares, pack_share

# No two arrays of a call have one size and one dtype, so that these name them.
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 24, 3, 8, 512, 320


def matrix(k, n, experts=EXPERTS, weight_format="int4_zp", bias=True):
    group_size = 16 if weight_format == "nvfp4" else 64
    return formatted_experts(experts, k, n, weight_format, jnp.bfloat16, group_size=group_size, bias=bias)


def bound(monkeypatch, function, arguments, results):
    """Buffers by kernel and member: arguments by their names, results by theirs, and scratch by its first writer.

    What is None is not there. `results` are names of the first buffers behind the operands.
    """
    names = {}
    for path, leaf in jax.tree.leaves_with_path(arguments):
        key = (leaf.size, leaf.dtype.name)  # ops flatten and stack what they pass on
        assert key not in names, f"{path} cannot be told from {names[key]}"
        names[key] = jax.tree_util.keystr(path, simple=True, separator=".")
    calls, contract = [], program._contract

    def watched(buffers, kernels, counted):
        calls.append((buffers, kernels))
        return contract(buffers, kernels, counted)

    with monkeypatch.context() as patch:
        patch.setattr(program, "_contract", watched)
        patch.setattr(compiler, "compile_cubin", lambda source, architecture: b"machine code")
        patch.setenv(compiler.ARCHITECTURE_VARIABLE, "sm_90a")
        jax.jit(lambda arguments: function(**arguments)).trace(arguments).lower(lowering_platforms=("cuda",))
    ((buffers, kernels),) = calls
    first = next(place for place, buffer in enumerate(buffers) if isinstance(buffer, jax.ShapeDtypeStruct))
    labels = dict(enumerate(results, first))
    found = {}
    for kernel in kernels:
        stage = re.sub(r"jmm_|_int4_zp|_nvfp4|_m\d+", "", kernel.name)
        for member, pointer in kernel.pointers.items():
            if pointer is None:
                continue
            buffer = buffers[pointer.buffer]
            if pointer.buffer < first:
                label = names[buffer.size, buffer.dtype.name]
            else:
                label = labels.setdefault(pointer.buffer, f"{stage}.{member.rpartition('.')[2]}")
            found.setdefault(stage, {})[member] = label
    return found


X, WEIGHTS = array((TOKENS, HIDDEN), jnp.bfloat16), array((TOKENS, TOP_K), jnp.float32)
IDS, EXPERT_MAP = array((TOKENS, TOP_K)), array((16,))
SCHEME = BlockScheme("aligned", MmaTile(16, 2, 1, 2, 64, 3, 2), MmaTile(16, 2, 4, 1, 32, 3, 2))
ALIGNMENT = jax.eval_shape(lambda ids: jmm.moe_align_block_size(ids, block_size=16, num_experts=EXPERTS), IDS)
ONE = {"x": X, "weights": matrix(HIDDEN, INNER)}


def members(prefix, origin, *names):
    """Members that point to arrays of their own names."""
    return {f"{prefix}{name}": f"{origin}{name}" for name in names}


PACKED = ("packed", "scales", "zeros")
LISTS = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")
OF_ONE = {"operands.x": "x", **members("operands.", "weights.", *PACKED), "epilogue.bias": "weights.bias"}


def test_of_a_block(monkeypatch):
    arguments = {
        "x": X,
        "gate_up": matrix(HIDDEN, 2 * INNER),
        "down": matrix(INNER, HIDDEN, weight_format="nvfp4"),
        "topk_weights": WEIGHTS,
        "topk_ids": IDS,
        "expert_map": EXPERT_MAP,
    }
    ids = members("", "", "topk_ids", "expert_map")
    gate_up = {
        "operands.x": "x",
        **members("operands.", "gate_up.", *PACKED),
        "epilogue.bias": "gate_up.bias",
        "epilogue.out": "gate_up.out",
    }
    down = {
        "operands.x": "gate_up.out",
        **members("operands.", "down.", "packed", "scales", "global_scales"),
        "epilogue.bias": "down.bias",
        "epilogue.topk_weights": "topk_weights",
        "epilogue.out": "down.out",
    }
    combine = {"partials": "down.out", **ids, "out": "y"}
    found = {
        "aligned": members("token_tiles.", "align.", *LISTS),
        "grouped": members("token_tiles.", "", "topk_ids", "expert_map"),
    }
    for routing, tiles in found.items():
        scheme = dataclasses.replace(SCHEME, routing=routing)
        align = {"parts.topk_ids": "topk_ids", "parts.expert_map": "expert_map", **members("", "align.", *LISTS)}
        assert bound(monkeypatch, functools.partial(jmm.fused_moe, cuda_scheme=scheme), arguments, ["y"]) == {
            **({"align": align} if routing == "aligned" else {}),
            "gate_up": gate_up | tiles,
            "down": down | tiles,
            "combine": combine,
        }


def test_of_a_layer_with_a_shared_expert(monkeypatch):
    arguments = {
        "x": X,
        "router": array((HIDDEN, EXPERTS), jnp.float32),
        "gate_up": matrix(HIDDEN, 2 * INNER, bias=False),
        "down": matrix(INNER, HIDDEN, bias=False),
        "correction_bias": array((EXPERTS,), jnp.float32),
        "shared": jmm.SharedExpert(matrix(HIDDEN, 2 * INNER, 1, bias=False), matrix(INNER, HIDDEN, 1, bias=False)),
    }
    layer = functools.partial(
        jmm.moe_layer, routing=jmm.Routing(TOP_K, scoring="sigmoid"), return_routing=True, cuda_scheme=SCHEME
    )

    def of(name, x):
        shared = {f"operands.shared_{leaf}": f"shared.{name}.{leaf}" for leaf in PACKED}
        own = {"operands.x": x, **members("operands.", f"{name}.", *PACKED), "epilogue.out": f"{name}.out"}
        return own | shared | members("token_tiles.", "align.", *LISTS)

    assert bound(monkeypatch, layer, arguments, ["y", "topk_weights", "topk_ids"]) == {
        "router": {"x": "x", "router": "router", "logits": "router.logits"},
        "select": {"logits": "router.logits", **members("", "", "correction_bias", "topk_weights", "topk_ids")},
        "align": {"parts.topk_ids": "topk_ids", **members("", "align.", *LISTS)},
        "gate_up": of("gate_up", "x"),
        "down": of("down", "gate_up.out") | {"epilogue.topk_weights": "topk_weights"},
        "combine": {"partials": "down.out", "topk_ids": "topk_ids", "out": "y"},
    }


def test_of_an_alignment_by_many_ctas(monkeypatch):
    arguments = {"topk_ids": array((900, 8)), "expert_map": EXPERT_MAP}
    align = functools.partial(jmm.moe_align_block_size, block_size=16, num_experts=16)
    parts = members("parts.", "", "topk_ids", "expert_map") | {"counts": "count_slots.counts"}
    assert bound(monkeypatch, align, arguments, LISTS) == {
        "count_slots": parts | {"sorted_token_ids": "sorted_token_ids"},
        "align": parts | members("", "", *LISTS),
    }


def test_of_a_product(monkeypatch):
    product = functools.partial(jmm.moe_gemm, top_k=TOP_K, mul_topk_weights=True)
    arguments = ONE | {"alignment": ALIGNMENT, "topk_weights": WEIGHTS}
    lists = members("token_tiles.", "alignment.", *LISTS) | {"token_tiles.first_rows": "clear.first_rows"}
    assert bound(monkeypatch, product, arguments, ["y"]) == {
        "clear": {"out": "y", "first_rows": "clear.first_rows"},
        "first_rows": {**members("", "alignment.", *LISTS), "first_rows": "clear.first_rows"},
        "moe_gemm": OF_ONE | lists | {"epilogue.out": "y", "epilogue.topk_weights": "topk_weights"},
    }


def test_of_dispatches(monkeypatch):
    arguments = {"x": X, "stack": ONE["weights"], "dispatches": array((9, 4))}
    found = bound(monkeypatch, jmm.expert_gemm, arguments, ["y", "skipped"])
    made = {"tile_ends": "dispatches.tile_ends", "owners": "dispatches.owners"}
    tiles = {f"token_tiles.{name}": label for name, label in made.items()} | {"token_tiles.dispatches": "dispatches"}
    of_stack = {member: label.replace("weights.", "stack.") for member, label in OF_ONE.items()}
    assert found == {
        "dispatches": made | {"dispatches": "dispatches", "skipped": "skipped", "out": "y"},
        "expert_gemm": of_stack | tiles | {"epilogue.out": "y"},
    }


def test_of_one_matrix(monkeypatch):
    found = bound(monkeypatch, jmm.linear, ONE | {"expert": array(())}, ["y"])
    assert found == {"linear": OF_ONE | {"token_tiles.named": "expert", "epilogue.out": "y"}}


def test_of_sorted_rows(monkeypatch):
    arguments = {"lhs": X, "rhs": ONE["weights"], "group_sizes": array((EXPERTS,))}
    found = bound(monkeypatch, jmm.ragged_dot, arguments, ["y"])
    product = {"operands.x": "lhs", **members("operands.", "rhs.", *PACKED)}
    assert found == {"product": product | {"token_tiles.group_sizes": "group_sizes", "epilogue.out": "y"}}


def test_between_the_products_of_a_backward_pass(monkeypatch):
    def pull(hidden, pulled, experts, topk_weights, bias):
        params = {"num_experts": EXPERTS, "activation": get_activation("silu"), "dtype": "bfloat16"}
        return hidden_cotangents_op(hidden, pulled, experts, topk_weights, bias, implementation="cuda", **params)

    arguments = {
        "hidden": array((TOKENS, 2 * INNER), jnp.bfloat16),
        "pulled": array((TOKENS, INNER), jnp.bfloat16),
        "experts": array((TOKENS,)),
        "topk_weights": array((TOKENS,), jnp.float32),
        "bias": array((EXPERTS, 2 * INNER), jnp.float32),
    }
    results = ["d_hidden", "d_weights"]
    assert bound(monkeypatch, pull, arguments, results) == {
        "hidden_cotangents": members("", "", *arguments, *results),
    }


def test_of_sums_over_the_slots_of_a_row(monkeypatch):
    def sums(x, weights, experts):
        params = {"transposed": True, "dtype": "bfloat16", "summed": TOP_K}
        return grouped_product_op(x, multiplied(weights), experts, None, None, implementation="cuda", **params)

    arguments = {"x": array((TOKENS, INNER), jnp.bfloat16), "weights": matrix(HIDDEN, INNER, bias=False)}
    found = bound(monkeypatch, sums, arguments | {"experts": array((TOKENS,))}, ["y"])
    product = {"operands.x": "x", **members("operands.", "weights.", *PACKED), "token_tiles.topk_ids": "experts"}
    assert found == {
        "transposed": product | {"epilogue.out": "transposed.out"},
        "combine": {"partials": "transposed.out", "topk_ids": "experts", "out": "y"},
    }


def test_of_shares_on_their_way_to_a_sum(monkeypatch):
    share = {"y": array((TOKENS, HIDDEN), jnp.float32)}
    assert bound(monkeypatch, pack_share, share, ["words"]) == {"pack_share": {"share": "y", "words": "words"}}
    words = {"words": array((2, TOKENS, HIDDEN // 2))}
    found = bound(monkeypatch, lambda words: add_shares(words, "bfloat16"), words, ["y"])
    assert found == {"add_shares": {"words": "words", "sum": "y"}}
