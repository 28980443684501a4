"""Calls whose arrays are larger than 32-bit offsets reach, held against the reference on a few rows.

`python -m benchmarks.largest` runs every case, one after the other, each in a process of its own: a case needs up to 75
GB of the card's memory. `--small` runs the same code on shapes that any card holds, with offsets that fit. The script
takes compute-sanitizer as it is:

    compute-sanitizer --tool memcheck python -m benchmarks.largest --case mixtral-mma
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin_moe as jmm
from jax_marlin_moe.cuda.choose import choose_tile
from jax_marlin_moe.cuda.grouped_gemm import gemm_shape
from jax_marlin_moe.cuda.scheme import BlockScheme
from jax_marlin_moe.measure.models import ModelShape
from jax_marlin_moe.measure.random_layers import random_layers

_PERIOD = 4093  # rows of x repeat after so many, a prime: an offset that wraps lands on another row
_CHECKED_ROWS = 48
_MMA_ROWS = 32  # of a block, where the mma.sync kernels are forced
_MMA_CAPABILITY = 86  # whose tiles are all of mma.sync, and fit the shared memory of every later one
_TOLERANCE = 0.02  # of a row's largest value: the types of x and of the rows between the products have 8 bits


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        shape: of the layer.
        tokens: rows of x.
        product: "block" for `fused_moe`, "gemm" for `moe_gemm` with the first matrix alone.
        mma: whether the mma.sync kernels are forced.
        offsets: the array that is too large, and its extent.
    """

    shape: ModelShape
    tokens: int
    product: str
    mma: bool
    offsets: str


def _mixtral(mma: bool) -> Case:
    return Case(
        ModelShape("mixtral-8x7b", 8, 2, 4096, 14336),
        150_000,
        "block",
        mma,
        "rows between the products: 2**32 elements",
    )


CASES = {
    "mixtral-mma": _mixtral(mma=True),
    "mixtral": _mixtral(mma=False),
    "intermediate": Case(
        ModelShape("wide", 8, 2, 128, 14336), 1_200_000, "block", False, "rows between the products: 2**32 x 16 bytes"
    ),
    "sum": Case(ModelShape("narrow", 8, 1, 8192, 64, 64), 1_050_000, "block", False, "result: 2**31 x 4 columns"),
    "result": Case(ModelShape("wide", 8, 2, 128, 14336), 300_000, "gemm", False, "result: 2**31 x 16 bytes"),
}


def rows_to_check(tokens: int) -> np.ndarray:
    """The first and the last tokens, and random ones; int32, ascending."""
    chosen = np.random.default_rng(1).integers(0, tokens, _CHECKED_ROWS)
    ends = np.r_[: min(8, tokens), max(0, tokens - 8) : tokens]
    return np.unique(np.r_[ends, chosen]).astype(np.int32)


def largest_error(case: Case) -> float:
    """Runs the case; the largest error of the checked rows, each relative to its row's largest value."""
    shape, tokens = case.shape, case.tokens
    rng = np.random.default_rng(0)
    ((gate_up, down),) = random_layers(shape, "int4", "bfloat16", count=1)
    period = min(_PERIOD, tokens)
    base = jax.random.normal(jax.random.key(0), (period, shape.hidden), jnp.bfloat16)
    x = jax.jit(lambda rows: jnp.take(rows, jnp.arange(tokens) % period, axis=0))(base)
    ids = jnp.asarray(rng.integers(0, shape.num_experts, (tokens, shape.top_k)), jnp.int32)
    router = jnp.asarray(rng.uniform(0.2, 1.0, (tokens, shape.top_k)), jnp.float32)
    rows = jnp.asarray(rows_to_check(tokens))
    slots = (rows[:, None] * shape.top_k + jnp.arange(shape.top_k, dtype=jnp.int32)).reshape(-1)

    if case.product == "block":
        scheme = _mma_scheme(gate_up, down, case) if case.mma else None

        def block(x, gate_up, down, router, ids, implementation, cuda_scheme):
            return jmm.fused_moe(x, gate_up, down, router, ids, implementation=implementation, cuda_scheme=cuda_scheme)

        run = jax.jit(block, static_argnums=(5, 6))
        y = jax.block_until_ready(run(x, gate_up, down, router, ids, "cuda", scheme))
        actual = jnp.take(y, rows, axis=0)
        with jax.default_matmul_precision("highest"):
            expected = run(base[rows % period], gate_up, down, router[rows], ids[rows], "xla", None)
    else:

        def gemm(x, weights, ids, implementation):
            alignment = jmm.moe_align_block_size(
                ids, block_size=64, num_experts=shape.num_experts, implementation=implementation
            )
            return jmm.moe_gemm(x, weights, alignment, top_k=shape.top_k, implementation=implementation)

        run = jax.jit(gemm, static_argnums=3)
        y = jax.block_until_ready(run(x, gate_up, ids, "cuda"))
        actual = jnp.take(y, slots, axis=0)
        with jax.default_matmul_precision("highest"):
            expected = run(base[rows % period], gate_up, ids[rows], "xla")
    actual, expected = (np.asarray(values, np.float32) for values in (actual, expected))
    assert np.abs(expected).max(1).min() > 0, "a row of the reference is zero: the case shows nothing"
    errors = np.abs(actual - expected).max(1) / np.abs(expected).max(1)
    return float(np.where(np.isnan(errors), np.inf, errors).max())


def _mma_scheme(gate_up: jmm.MarlinWeights, down: jmm.MarlinWeights, case: Case) -> BlockScheme:
    blocks = case.tokens * case.shape.top_k / _MMA_ROWS
    shapes = gemm_shape(gate_up, True, jnp.dtype(jnp.bfloat16)), gemm_shape(down, False, jnp.dtype(jnp.bfloat16))
    return BlockScheme("aligned", *(choose_tile(shape, _MMA_ROWS, blocks, _MMA_CAPABILITY) for shape in shapes))


def main() -> int:
    """Runs the cases that the command line names; 1 if a row is wrong or a case fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="this one, in this process (default: all, each in its own)")
    parser.add_argument("--small", action="store_true", help="500 tokens")
    options = parser.parse_args()
    if options.case is None:
        command = [sys.executable, "-m", "benchmarks.largest", *(["--small"] if options.small else []), "--case"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return max(subprocess.run([*command, name], env=environment, check=False).returncode != 0 for name in CASES)
    case = CASES[options.case]
    case = dataclasses.replace(case, tokens=500) if options.small else case
    start = time.perf_counter()
    error = largest_error(case)
    right = error <= _TOLERANCE
    print(
        f"{options.case}: {case.tokens} tokens, {case.offsets}: largest error {error:.4f} of at most {_TOLERANCE}, "
        f"{'right' if right else 'WRONG'}, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
