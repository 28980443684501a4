"""The table of whole layers in the documentation is that of the measured file."""

import argparse
import json
import pathlib

import pytest

from benchmarks.layers import missing
from benchmarks.layers_table import BEGIN, END, table, with_table

ROOT = pathlib.Path(__file__).parents[1]
ROWS = [
    {"model": "qwen3-30b-a3b", "M": 1, "shared": False, "block_us": 20.0, "layer_us": 19.5, "composed_us": 32.04},
    {"model": "qwen3-30b-a3b", "M": 16, "shared": False, "block_us": 60.0, "layer_us": 64.0},
    {"model": "kimi-k2", "M": 1, "shared": True, "block_us": 50.0, "layer_us": 60.0, "composed_us": 80.0},
]


def test_the_documentation_has_the_table_of_the_measured_layers():
    rows = json.loads((ROOT / "benchmarks/results/h200/layers.json").read_text())["rows"]
    document = (ROOT / "docs/benchmarks.md").read_text()
    assert with_table(document, rows) == document, (
        "run python -m benchmarks.layers_table benchmarks/results/h200/layers.json docs/benchmarks.md"
    )


def test_a_model_is_named_once_and_what_was_not_timed_is_empty():
    assert table(ROWS).splitlines()[2:] == [
        "| Qwen3-30B-A3B | 1 | 20.0 | +12.0 | −0.5 |",
        "| | 16 | 60.0 | | +4.0 |",
        "| Kimi-K2, shared expert | 1 | 50.0 | +30.0 | +10.0 |",
    ]


@pytest.mark.parametrize("document", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}", f"{BEGIN}{BEGIN}{END}"])
def test_a_document_without_a_place_for_it_is_refused(document):
    with pytest.raises(ValueError, match="the document must have"):
        with_table(document, ROWS)


def test_what_earlier_rows_lack_is_timed():
    forms, models = ["block_us", "layer_us", "composed_us"], ["kimi-k2", "qwen3-30b-a3b"]
    options = argparse.Namespace(models=models, tokens=[16, 1], forms=forms, format="int4")
    rows = [{**row, "format": "int4"} for row in ROWS]
    assert missing(rows, options) == {"kimi-k2": [16], "qwen3-30b-a3b": [16]}
    assert missing([], options) == {"kimi-k2": [16, 1], "qwen3-30b-a3b": [16, 1]}
    options.forms = ["layer_us"]
    assert missing(rows, options) == {"kimi-k2": [16]}
    assert missing(rows, argparse.Namespace(**{**vars(options), "models": ["qwen3-30b-a3b"]})) == {}
