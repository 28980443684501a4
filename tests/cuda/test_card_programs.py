"""HLO of programs for cards, compiled without one: calls, copies and collectives."""

import functools
import importlib.util

import pytest
from abstract_calls import needs_nvrtc
from other_process import found_by

pytestmark = [
    needs_nvrtc,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="it needs jax-cuda13-plugin and jax-cuda13-pjrt"
    ),
]


@functools.cache
def programs():
    return found_by("card_programs.py", __file__)


@pytest.mark.parametrize("name", ["block", "scan", "artefact", "tokens", "experts", "both", "columns"])
def test_a_block_is_one_call_and_copies_no_weights(name):
    assert programs()[name]["calls"] == 1
    assert not programs()[name]["copies a layer"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("scan", []),
        ("artefact", []),  # nor a branch: the number of tokens is known when it is compiled
        ("tokens", []),
        ("experts", ["all-reduce"]),
        ("columns", ["all-reduce"]),
        ("both", ["all-gather", "reduce-scatter"]),  # of the rows, and of the results
        ("recipe, gather", ["all-gather", "reduce-scatter"]),
        ("recipe, ragged", ["all-gather", "all-to-all", "all-to-all"]),  # of the choices; there and back
    ],
)
def test_only_rows_and_sums_go_between_cards(name, wanted):
    assert programs()[name]["others"] == wanted
    assert programs()[name]["calls"] == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("many rows, two cards", ["collective-permute"]),  # of whole shares
        ("many rows, four cards", ["all-gather", "all-to-all"]),  # of parts, and of their rounded sums
        ("recipe, many rows", ["collective-permute"]),
    ],
)
def test_large_shares_go_packed_from_the_block_to_one_kernel_that_adds_them(name, wanted):
    assert programs()[name]["others"] == wanted
    assert programs()[name]["calls"] == 2
