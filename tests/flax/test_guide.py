"""The snippets of docs/layers.md run, in their order, and agree."""

import pathlib
import re

import jax
import numpy as np
import pytest

import jax_marlin_moe
from jax_marlin_moe.cli import demo

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "layers.md"
CHECKPOINT = pathlib.Path(demo.__file__).parent / "demo_checkpoint"


@pytest.fixture(scope="module")
def names():
    found = {}
    text = PAGE.read_text(encoding="utf-8").replace('"path/to/model"', repr(str(CHECKPOINT)))
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, PAGE.name, "exec"), found)
    return found


def test_the_forms_of_a_stack_agree(names):
    stacked, x = names["stacked"], names["x"]
    wanted = x
    step = jax.jit(lambda layer, h: h + layer(h))
    for _, layer in jax_marlin_moe.checkpoint.load_moe_layers(CHECKPOINT):
        wanted = step(layer, wanted)
    for y in (names["y"], names["forward"](stacked, x), names["forward_nnx"](names["moes"], x)):
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(wanted, np.float32))
    assert names["z"].shape == x[0].shape
