"""Measures the CUDA tiles of blocks on this machine's card and stores the fastest beside the kernel cache."""

import argparse
import dataclasses
import time

import jax.numpy as jnp

from jax_marlin_moe.cli.console import complain, measured_table
from jax_marlin_moe.cli.shape_options import add_shape_options, positive, shapes_to_measure
from jax_marlin_moe.cuda import cache, tables
from jax_marlin_moe.cuda.block_scheme import block_key
from jax_marlin_moe.cuda.compiler import target_architecture
from jax_marlin_moe.measure.random_layers import random_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_shape_options(parser, tokens=[1, 16])
    parser.add_argument(
        "--candidates", type=positive, default=24, help="tiles measured for each product and block size"
    )
    parser.add_argument(
        "--shared", type=positive, help="experts that every token visits beside the chosen ones (default: none)"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the winner of every block; returns 1 if nothing can be measured or stored, 2 for unusable options."""
    shapes, status = shapes_to_measure(options, "tune")
    if status:
        return status
    try:
        cache.located()
    except cache.OffError as error:
        complain(f"cannot tune: the kernel cache is off: {error}")
        return 1
    # It imports the driver's bindings, which a machine without CUDA need not have.
    from jax_marlin_moe.measure.autotune import autotune

    dtype, architecture = jnp.dtype(options.dtype), target_architecture()
    path = tables.user_path(architecture)
    headers = ("model", "tokens", "block us", "gate_up us", "down us", "seconds", "scheme")
    with measured_table("blocks", len(shapes) * len(options.tokens), *headers) as add_row:
        for shape in shapes:
            try:
                layers = random_layers(shape, options.format, dtype)
                shared = []
                if options.shared is not None:
                    of_shared = dataclasses.replace(shape, num_experts=options.shared)
                    shared = random_layers(of_shared, options.format, dtype, len(layers))
            except ValueError as error:
                complain(f"cannot tune {shape.name}: {error}")
                return 2
            for tokens in options.tokens:
                start = time.perf_counter()
                try:
                    best = autotune(
                        layers,
                        tokens=tokens,
                        top_k=shape.top_k,
                        dtype=dtype,
                        candidates_per_product=options.candidates,
                        shared=shared,
                    )
                except (RuntimeError, ValueError) as error:
                    complain(f"cannot tune {shape.name} with {tokens} tokens: {error}")
                    return 1
                add_row(
                    shape.name,
                    str(tokens),
                    *(f"{us:.1f}" for us in (best.block_us, best.gate_up_us, best.down_us)),
                    f"{time.perf_counter() - start:.0f}",
                    str(best.scheme),
                )
                key = block_key(*layers[0], shape.top_k, options.shared or 0)
                if tables.lookup(key, tokens, architecture) != best.scheme:
                    complain(f"{path} cannot be written; set {cache.ENVIRONMENT_VARIABLE} to a folder that can")
                    return 1
            del layers, shared
    print(f"stored in {path}: calls with these shapes use it from their next lowering on")
    return 0
