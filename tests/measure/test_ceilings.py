"""The ceilings that blocks are held against."""

import pytest

pytest.importorskip("cuda.bindings.driver")
from benchmarks.blocks import raise_ceiling


def row(block_us: float, tflop_s: float, weight_us: float) -> dict:
    return {"block_us": block_us, "tflop_s": tflop_s, "weight_us": weight_us, "limit_us": 0.0}


def test_no_limit_is_below_what_a_block_has_reached():
    document = {"bf16_tflop_s": 700.0, "rows": [row(100.0, 735.0, 20.0), row(50.0, 70.0, 30.0)]}
    raise_ceiling(document)
    assert document["bf16_tflop_s"] == 735.0
    assert [one["limit_us"] for one in document["rows"]] == [pytest.approx(100.0), pytest.approx(30.0)]
    assert all(one["limit_us"] <= one["block_us"] for one in document["rows"])


def test_a_ceiling_that_nothing_reaches_stays():
    document = {"bf16_tflop_s": 800.0, "rows": [row(100.0, 400.0, 20.0)]}
    raise_ceiling(document)
    assert document["bf16_tflop_s"] == 800.0
    assert document["rows"][0]["limit_us"] == pytest.approx(50.0)
