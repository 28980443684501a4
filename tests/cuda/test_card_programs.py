"""HLO of programs for cards, compiled without one: calls, copies and collectives."""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from abstract_calls import needs_nvrtc

pytestmark = [
    needs_nvrtc,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="it needs jax-cuda13-plugin and jax-cuda13-pjrt"
    ),
]


@functools.cache
def programs():
    program = pathlib.Path(__file__).with_name("card_programs.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=600)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["block", "scan", "artefact", "tokens", "experts", "both"])
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
        ("both", ["all-gather", "reduce-scatter"]),  # of the rows, and of the results
        ("recipe, gather", ["all-gather", "reduce-scatter"]),
        ("recipe, ragged", ["all-gather", "ragged-all-to-all", "ragged-all-to-all"]),  # of the choices; there and back
    ],
)
def test_only_rows_and_sums_go_between_cards(name, wanted):
    assert programs()[name]["others"] == wanted
    assert programs()[name]["calls"] == 1
