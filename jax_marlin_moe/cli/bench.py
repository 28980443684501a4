"""Times blocks on this machine's card: device time with a cold L2, and the bandwidth at which weights are read."""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin_moe.cli.console import complain, measured_table
from jax_marlin_moe.cli.shape_options import add_shape_options, positive, shapes_to_measure
from jax_marlin_moe.cuda.compiler import CompilationError
from jax_marlin_moe.measure.random_layers import random_layers, random_routings

_ROUTINGS = 24  # blocks of a replay
# The card lowers its clock when replays in a row drive it into its power limit.
_PAUSE_SECONDS = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_shape_options(parser, tokens=[1, 4, 16, 64])
    parser.add_argument("--samples", type=positive, default=30, help="replays that are timed")


def run(options: argparse.Namespace) -> int:
    """Prints a table of the blocks; returns 1 if nothing can be measured, 2 for unusable options."""
    shapes, status = shapes_to_measure(options, "measure")
    if status:
        return status
    # It imports the driver's bindings, which a machine without CUDA need not have.
    from jax_marlin_moe.measure.replay import replayed_block

    dtype = jnp.dtype(options.dtype)
    print(f"{jax.devices('cuda')[0].device_kind}, {options.format}, {dtype}: blocks, by {options.samples} replays")
    count = len(shapes) * len(options.tokens)
    with measured_table("blocks", count, "model", "tokens", "experts hit", "us", "10 % to 90 %", "TB/s") as add_row:
        for shape in shapes:
            try:
                layers = random_layers(shape, options.format, dtype)
            except ValueError as error:
                complain(f"cannot measure {shape.name}: {error}")
                return 2
            expert_bytes = sum(weights.nbytes for weights in layers[0]) / shape.num_experts
            for tokens in options.tokens:
                ids = random_routings(shape.num_experts, shape.top_k, tokens, _ROUTINGS)
                x = jax.random.normal(jax.random.key(0), (tokens, shape.hidden), dtype)
                weights = jnp.full((tokens, shape.top_k), 1 / shape.top_k, jnp.float32)
                try:
                    kernels = replayed_block(x, layers, [weights] * _ROUTINGS, ids)
                except (CompilationError, RuntimeError, ValueError) as error:
                    complain(f"cannot measure {shape.name} with {tokens} tokens: {error}")
                    return 1
                times = kernels.microseconds(samples=options.samples, pause_seconds=_PAUSE_SECONDS)
                kernels.close()
                hit = float(np.mean([len(np.unique(chosen)) for chosen in ids]))
                block_us = statistics.median(times)
                add_row(
                    shape.name,
                    str(tokens),
                    f"{hit:.1f}",
                    f"{block_us:.1f}",
                    f"{times[len(times) // 10]:.1f} - {times[-1 - len(times) // 10]:.1f}",
                    f"{hit * expert_bytes / block_us / 1e6:.2f}",
                )
            del layers
    return 0
