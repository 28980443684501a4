"""Sharded operands under plain `jit`: what `partitioned_calls.py` finds in processes with four devices."""

import functools

import pytest
from other_process import found_by

OPS = ("moe_gemm", "linear", "ragged_dot", "expert_gemm")
BLOCKS = [
    "block, experts",
    "block, experts, tokens over another axis",
    "block, experts and tokens over one axis",
    "block, columns and rows",
    "gradients of a block, experts, tokens over another axis",
    "scan, experts",
    "vmap, experts",
    "while, experts",
    "cond, experts",
    "remat, experts",
    "eager, experts",
    "donation, experts",
    "layer, experts, tokens over another axis",
    "layer, experts and tokens over one axis",
    "linear of many, rows",
    "gated block, columns and rows",
    "gated block, columns and rows, tokens over the same axis",
    "gradients of a gated block, columns and rows",
    "whole layer, experts, columns and rows",
]
ONLY_AUTOMATIC = (
    "gated block, columns and rows, tokens",
    "gradients of a gated",
    "block, experts, tokens",
    "while",
    "cond",
    "remat",
    "eager",
    "donation",
)
EXPLICIT = [f"explicit {name}" for name in BLOCKS if not name.startswith(ONLY_AUTOMATIC)]
PRODUCTS = [
    f"{kind}{call}"
    for op in OPS
    for kind in ("", "explicit ")
    for call in (f"{op}, experts", f"{op}, rows", f"{op}, columns", f"gradient of {op}, rows")
]
REFUSALS = ["refusals", "explicit refusals"]
# The rest differs from these in what is called, not in how it is divided.
ORDINARY = [
    "block, experts",
    "block, experts and tokens over one axis",
    "gradients of a block, experts, tokens over another axis",
    "layer, experts, tokens over another axis",
    "layer, experts and tokens over one axis",
    "linear of many, rows",
    "explicit linear of many, rows",
    "gated block, columns and rows",
    "gradients of a gated block, columns and rows",
    "explicit gated block, columns and rows",
    "whole layer, experts, columns and rows",
    "explicit block, experts and tokens over one axis",
    "explicit gradients of a block, experts, tokens over another axis",
    "donation, experts",
    "linear, rows",
    "explicit linear, columns",
    *REFUSALS,
]
CALLS = [*BLOCKS, *EXPLICIT, *PRODUCTS, *REFUSALS]


@functools.cache
def found(calls):
    return found_by("partitioned_calls.py", __file__, *calls)


@pytest.mark.parametrize("call", ORDINARY)
def test_each_device_computes_with_what_it_has(call):
    assert found(tuple(ORDINARY))[call] is None, found(tuple(ORDINARY))[call]


@pytest.mark.exhaustive
@pytest.mark.parametrize("call", [call for call in CALLS if call not in ORDINARY])
def test_each_device_computes_every_op_with_what_it_has(call):
    others = tuple(call for call in CALLS if call not in ORDINARY)
    assert found(others)[call] is None, found(others)[call]
