"""The CPU kernels of every instruction set, each in a process of its own: the choice is made once."""

import os
import pathlib
import subprocess
import sys

import pytest
from native.processor import FLAGS, runs

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
import jax.numpy as jnp
import numpy as np
import jax_marlin_moe as jmm
from oracle import *

from test_formats import every_code, product

rng = np.random.default_rng(0)
for name, facts in FACTS.items():
    # 17 tiles: with the larger groups the last is a partial one, and one group takes several steps.
    for dtype, scale_dtype, group_size in (
        ("bfloat16", scale_dtypes(name)[0], facts.group_sizes[-1]),
        ("float16", scale_dtypes(name)[-1], None if facts.per_channel else facts.group_sizes[0]),
    ):
        experts = random_experts(rng, 5, 272, 128, weight_format=name, group_size=group_size, bias=True,
                                 scale_dtype=jnp.dtype(scale_dtype))
        weights = experts.packed()
        # From one row to more than a panel of 16, in every remainder of the rows that share a dequantisation.
        calls = [
            (random_rows(rng, tokens, 272, jnp.dtype(dtype)), random_routing(rng, tokens, 2, 5, kind)[1])
            for tokens, kind in ((1, "distinct"), (3, "one"), (23, "one"), (40, "holes"))
        ]
        # In one program: compiling takes most of the time.
        found = jax.jit(lambda weights, calls: [product(x, weights, ids, "cpu", 5) for x, ids in calls])(weights, calls)
        for y, (x, ids) in zip(found, calls, strict=True):
            assert_product_close(y, grouped_product(x, experts, ids))
        codes = every_code(name)
        x = np.eye(codes.k).astype(jnp.dtype(dtype))
        y = np.asarray(product(x, codes.packed(), np.zeros((codes.k, 1), np.int32), "cpu", 1))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(y, codes.dense()[0].astype(np.float32).astype(x.dtype))
    block = [random_experts(rng, 5, *shape, group_size=facts.group_sizes[-1], weight_format=name)
             for shape in ((128, 384), (192, 128))]
    x = random_rows(rng, 21, 128, jnp.bfloat16)
    router, ids = random_routing(rng, 21, 3, 5)
    y = jmm.fused_moe(x, *(experts.packed() for experts in block), router, ids, implementation="cpu")
    assert_block_close(y, expert_block(x, *block, router, ids))
print("all close")
"""


@pytest.mark.long
@pytest.mark.parametrize("kernel", FLAGS)
def test_kernel(kernel, tmp_path):
    if not runs(kernel):
        pytest.skip(f"this processor does not run {kernel}")
    environment = os.environ | {"JAX_MARLIN_MOE_CPU_ISA": kernel, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(pathlib.Path(__file__).parents[1])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "all close\n", result.stderr
