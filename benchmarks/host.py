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
import json
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
from benchmarks.blocks import make_case
from benchmarks.record import current_commit, recorded_command
from jax_marlin_moe.argument_shapes import MODELS
from jax_marlin_moe.cuda.replay import replayed_block
from jax_marlin_moe.formats import get_format
from jax_marlin_moe.random_layers import random_layers

_LAYERS = (1, 48)
_CALLS = 40
_NO_COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="


def stack(x, layers, weights, ids):
    """Blocks in a row; their rows are kept small, as a sum with what comes in would."""
    for i in range(len(ids)):
        x = jnp.clip(jmm.fused_moe(x, *layers[i % len(layers)], weights[i], ids[i]), -1, 1)
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
    delays = [
        min(kernel for kernel in card if kernel > start) - start
        for start, following in zip(host, [*host[1:], float("inf")], strict=True)
        if any(start < kernel < following for kernel in card)
    ]
    return statistics.median(delays) / 1e3 if delays else None


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
            arguments = case.layers[:layers], list(case.weights[:layers]), list(jnp.asarray(case.ids[:layers]))
            call = jax.jit(stack, donate_argnums=0)
            x = case.x + 0
            for _ in range(5):
                x = call(x, *arguments)
            waited, dispatched, stacked = [], [], []
            for _ in range(_CALLS):
                start = time.perf_counter()
                x = call(x, *arguments)
                dispatched.append(time.perf_counter() - start)
                x.block_until_ready()
                waited.append(time.perf_counter() - start)
            for _ in range(10):
                time.sleep(0.02)
                start = time.perf_counter()
                for _ in range(_CALLS):
                    x = call(x, *arguments)
                x.block_until_ready()
                stacked.append((time.perf_counter() - start) / (_CALLS * layers))

            def again(call=call, arguments=arguments):
                nonlocal x
                x = call(x, *arguments)
                return x

            stack_us = statistics.median(stacked) * 1e6
            rows.append(
                {
                    "model": name,
                    "M": count,
                    "layers": layers,
                    "command_buffers": commands,
                    "block_us": block_us,
                    "dispatch_us": statistics.median(dispatched) * 1e6,
                    "first_kernel_us": first_kernel_microseconds(again, 20),
                    "waited_us": statistics.median(waited) * 1e6,
                    "stack_us": stack_us,
                    "overhead_us": stack_us - block_us,
                }
            )
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
    document = {
        "card": jax.devices()[0].device_kind,
        "commit": args.commit or current_commit(),
        "command": recorded_command("benchmarks.host"),
        "versions": {"jax": jax.__version__, "jax_marlin_moe": jmm.__version__},
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
