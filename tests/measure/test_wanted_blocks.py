"""Which blocks benchmarks.blocks times."""

import pytest

pytest.importorskip("cuda.bindings.driver")
from benchmarks import blocks


def wanted(monkeypatch, timed, *options):
    monkeypatch.setattr("sys.argv", ["blocks", "--tokens", "256", "1024", "--out", "out", *options])
    return blocks.wanted_blocks(blocks.parsed_arguments(), timed)


def row(model, tokens, routing, group_size, **changed):
    """A row of results, with what `block_of` reads."""
    return {
        "model": model,
        "format": "int4",
        "group_size": group_size,
        "dtype": "bfloat16",
        "activation": "silu",
        "biases": False,
        "batch_invariant": False,
        "routing": routing,
        "M": tokens,
        "implementation": "jax_marlin_moe 0.0.9",
        **changed,
    }


def test_all_blocks_are_timed_without_being_asked_for_the_missing(monkeypatch):
    timed = {blocks.block_of(row("mixtral-8x7b", 256, "uniform", 128))}
    found = wanted(monkeypatch, timed, "--models", "mixtral-8x7b")
    assert found == {("mixtral-8x7b", "int4"): [(256, "uniform"), (1024, "uniform")]}


def test_only_blocks_that_no_earlier_row_has_are_timed(monkeypatch):
    rows = [
        row("mixtral-8x7b", 256, "uniform", 128),
        row("mixtral-8x7b", 1024, "zipf", 128, batch_invariant=True),  # another block
        row("mixtral-8x7b", 1024, "zipf", 128, implementation="humming-kernels 0.1.20"),  # a peer's
        row("gpt-oss-20b", 1024, "uniform", 128, activation="swiglu", biases=True),
    ]
    options = "--models", "mixtral-8x7b", "gpt-oss-20b", "--routing", "uniform", "zipf", "--only-missing"
    found = wanted(monkeypatch, {blocks.block_of(one) for one in rows}, *options)
    assert found["mixtral-8x7b", "int4"] == [(256, "zipf"), (1024, "uniform"), (1024, "zipf")]
    assert len(found["gpt-oss-20b", "int4"]) == 4
