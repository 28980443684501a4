"""What the host adds to a block: dispatch, the way to the first kernel, and a call's share of a stack of layers.

    python -m benchmarks.host --models qwen3-30b-a3b --tokens 1 16 --out host.json

A jitted stack of `layers` blocks, each fed by the one before with a routing of its own, once with XLA's command buffers
and once without, each in a process of its own. All times in microseconds:

* `block_us`: the block's kernels by themselves, in a CUDA graph.
* `dispatch_us`: until the call of the stack returns to Python; the card works on.
* `first_kernel_us`: from that call until its first kernel begins, on the profiler's clock (which adds to it).
* `waited_us`: until the results of one call are there.
* `stack_us`: of one block, where calls follow each other without waiting.
* `overhead_us`: what `stack_us` has beyond `block_us`.
"""

import argparse
import bisect
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp

import jax_marlin_moe as jmm
from benchmarks.blocks import Case, make_case
from benchmarks.chain import seconds_of_calls
from benchmarks.record import recorded_run
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.measure.models import MODELS
from jax_marlin_moe.measure.random_layers import random_layers
from jax_marlin_moe.measure.replay import replayed_block

_LAYERS = (1, 48)
_CALLS = 40
_NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


def stack(x, layers, weights, ids):
    """Blocks in a row. A block is about quadratic in its rows, which must not overflow: they are clipped."""
    for i in range(len(ids)):
        y = jmm.fused_moe(x, *layers[i % len(layers)], weights[i], ids[i], implementation="cuda")
        x = jnp.clip(y, -1, 1)
    return x


def first_kernel_microseconds(call, calls: int) -> float | None:
    """From the beginning of a jitted call in Python to the beginning of its first kernel; the median of `calls`.

    None where the profiler shows no kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call().block_until_ready()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    host, card = [], []
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name.startswith("PjitFunction"):
                    host.append(event.start_ns)
                elif plane.name.startswith("/device:GPU") and line.name.startswith("Stream"):
                    card.append(event.start_ns)
    # A call shows as nested events; those that have no kernel after them before the next one begins are the outer ones.
    host.sort()
    card.sort()
    delays = []
    for start, following in zip(host, [*host[1:], math.inf], strict=True):
        kernel = bisect.bisect_right(card, start)
        if kernel < len(card) and card[kernel] < following:
            delays.append(card[kernel] - start)
    return statistics.median(delays) / 1e3 if delays else None


def measure_stack(case: Case, layers: int) -> dict:
    """The times of a stack of so many blocks."""
    arguments = case.layers[:layers], list(case.weights[:layers]), list(jnp.asarray(case.ids[:layers]))
    jitted = jax.jit(stack, donate_argnums=0)
    x = case.x + 0

    def call() -> jax.Array:
        nonlocal x
        x = jitted(x, *arguments)
        return x

    for _ in range(5):
        call()
    waited, dispatched = [], []
    for _ in range(_CALLS):
        start = time.perf_counter()
        call()
        dispatched.append(time.perf_counter() - start)
        x.block_until_ready()
        waited.append(time.perf_counter() - start)
    stacked = [seconds_of_calls(call, _CALLS, pause_seconds=0.02) / layers for _ in range(10)]
    return {
        "dispatch_us": statistics.median(dispatched) * 1e6,
        "first_kernel_us": first_kernel_microseconds(call, 20),
        "waited_us": statistics.median(waited) * 1e6,
        "stack_us": statistics.median(stacked) * 1e6,
    }


def measure(name: str, tokens: list[int], commands: bool) -> list[dict]:
    """The rows of one process."""
    shape = MODELS[name].grouped(get_format("int4"))
    experts = random_layers(shape, "int4", jnp.bfloat16)
    rows = []
    for count in tokens:
        case = make_case(shape, experts, count, max(_LAYERS), "uniform", jnp.dtype(jnp.bfloat16))
        kernels = replayed_block(case.x, case.layers, case.weights, case.ids)
        block_us = statistics.median(kernels.microseconds(pause_seconds=0.02))
        kernels.close()
        for layers in _LAYERS:
            row = {"model": name, "M": count, "layers": layers, "command_buffers": commands, "block_us": block_us}
            row |= measure_stack(case, layers)
            rows.append(row | {"overhead_us": row["stack_us"] - block_us})
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b"], choices=sorted(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--commit", default=None, help="recorded beside the numbers; asked from git by default")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    rows, given = [], os.environ.get("XLA_FLAGS", "")
    for commands in (True, False):
        os.environ["XLA_FLAGS"] = given if commands else f"{given} {_NO_COMMAND_BUFFERS}"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            for name in args.models:
                for row in pool.submit(measure, name, args.tokens, commands).result():
                    rows.append(row)
                    print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    document = recorded_run("benchmarks.host", args.commit) | {"rows": rows}
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
